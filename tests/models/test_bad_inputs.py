"""Errors for bad settings and inputs name the setting or the input."""

import math

import numpy as np
import pytest
import torch
from dense_data import BACKBONE
from huggingface_hub.errors import StrictDataclassError
from original_detectors import original_detector, original_labels
from pictures import picture
from PIL import Image
from tiny_models import TEXT, VISION
from transformers import PreTrainedTokenizerFast, ResNetConfig

from modeling_vitp import (
    ViTPAdapter,
    ViTPAdapterConfig,
    ViTPConfig,
    ViTPDetectionImageProcessor,
    ViTPFeaturePyramid,
    ViTPFeaturePyramidConfig,
    ViTPForImageClassification,
    ViTPForSemanticSegmentation,
    ViTPImageClassificationConfig,
    ViTPImageProcessor,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
    ViTPProcessor,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
    resize_backbone,
    spread_bands,
)
from modeling_vitp.vrl import check_apply_prob, check_drop_ratio, draw_visual_tokens, num_kept_tokens

NAN, INF = float("nan"), float("inf")
SAR, SENTINEL_2 = ["VV", "VH"], [f"B{number:02}" for number in range(12)]
PATCH_16 = {**VISION, "image_size": [96, 96], "patch_size": [16, 16]}


def vit(**settings) -> ViTPVisionModel:
    return ViTPVisionModel(ViTPVisionConfig(**{**VISION, **settings}))


# Configurations: class, settings, pattern of the error.


def vlm_config(vision_config=None, **settings) -> ViTPConfig:
    text = {**TEXT, "vocab_size": 64}
    return ViTPConfig(vision_config={**VISION, **(vision_config or {})}, text_config=text, image_token_id=7, **settings)


def adapter_config(**settings) -> ViTPAdapterConfig:
    return ViTPAdapterConfig(**{**PATCH_16, "num_hidden_layers": 8, **BACKBONE, **settings})


CONFIGS = [
    *((vlm_config, {"vrl_drop_ratio": value}, "vrl_drop_ratio") for value in (1.0, -0.1, NAN, "0.75")),
    *((vlm_config, {"vrl_apply_prob": value}, "vrl_apply_prob") for value in (1.5, -0.5)),
    (vlm_config, {"vrl_warmup_steps": -1}, "vrl_warmup_steps"),
    *((vlm_config, {"vision_config": {"drop_path_rate": value}}, "drop_path_rate") for value in (1.0, -0.1, NAN)),
    (vlm_config, {"vision_config": {"image_size": [112, 28]}}, "8 x 2 patches"),
    (vlm_config, {"vision_config": {"image_size": [112, 168]}}, "8 x 12 patches"),
    (vlm_config, {"vision_config": {"image_size": [7, 7]}}, "7, 7"),
    (vlm_config, {"vision_config": {"image_size": [70, 70]}}, "even number of patches"),
    (vlm_config, {"vision_config": {"image_size": [14, 14]}}, "even number of patches"),
    *((ViTPVisionConfig, {"band_names": names}, "band_names") for names in ([], SAR[:1] * 2, ["VV", ""], "VV", [1, 2])),
    (adapter_config, {"interaction_layers": [[0, 1], [2, 3], [4, 5], [6, 6]]}, "must be four"),
    (adapter_config, {"spatial_prior_norm": "group_norm"}, "group_norm"),
    (adapter_config, {"patch_size": [14, 14]}, "patch_size"),
    (adapter_config, {"deformable_heads": 3}, "deformable_heads"),
    (adapter_config, {"extractor_residual": "queries"}, "queries"),
    (adapter_config, {"deformable_dropout": 1.0}, "deformable_dropout"),
    (ViTPFeaturePyramidConfig, {**PATCH_16, "patch_size": [14, 14]}, "patch_size"),
    (ViTPImageClassificationConfig, {"pooling": "max"}, "pooling"),
    (ViTPSegmentationConfig, {"backbone_config": {"model_type": "resnet"}}, "resnet"),
    (ViTPSegmentationConfig, {"backbone_config": ResNetConfig()}, "resnet"),
    (ViTPOrientedObjectDetectionConfig, {"flip_test": True}, "flip_test"),
    *(
        (ViTPObjectDetectionConfig, {name: value}, name)
        for name, value in [
            ("stage_iou_thresholds", [0.5]),
            ("stage_iou_thresholds", [0.5, 0.6, 7]),
            ("stage_box_stds", [[0.1] * 5] * 3),
            ("stage_box_stds", [0.1, 0.2, 0.3]),
            ("stage_box_stds", [["x"] * 4] * 3),
            ("stage_loss_weights", [1, NAN, 1]),
            ("box_loss", "giou"),
            ("nms_threshold", 1.5),
            ("rpn_negative_iou", 0.8),
            ("roi_samples", 0),
            ("max_detections", -1),
            ("rpn_proposals_eval", 0),
            ("anchor_scale", INF),
            ("anchor_ratios", []),
            ("anchor_ratios", [0.5, -1]),
        ]
    ),
]


@pytest.mark.parametrize(("config_class", "settings", "named"), CONFIGS)
def test_bad_setting_is_named(config_class, settings, named):
    with pytest.raises((StrictDataclassError, ValueError), match=named):
        config_class(**settings)


@pytest.mark.parametrize("value", [1.0, 1, 1.5, -0.1, math.nan, math.inf])
def test_bad_drop_ratio_is_named(processor, value):
    for call in (
        check_drop_ratio,
        lambda ratio: num_kept_tokens(8, ratio),
        lambda ratio: draw_visual_tokens(8, ratio),
        lambda ratio: processor(images=picture(60, 56), text="<IMG_CONTEXT>", vrl_drop_ratio=ratio),
    ):
        with pytest.raises(ValueError, match="vrl_drop_ratio"):
            call(value)


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan])
def test_bad_apply_prob_is_named(processor, value):
    options = {"images": picture(60, 56), "text": "<IMG_CONTEXT>", "vrl_apply_prob": value}
    for call in (
        lambda: check_apply_prob(value),
        lambda: draw_visual_tokens(8, 0.5, value),
        lambda: processor(**options, vrl_drop_ratio=0),
        lambda: processor(**options, vrl_drop_ratio=0.5),
    ):
        with pytest.raises(ValueError, match="vrl_apply_prob"):
            call()


# Models that start from a backbone.

STARTS = [
    (ViTPForSemanticSegmentation, {"neck": "fpn"}, "'adapter'.*'pyramid'.*'fpn'"),
    (ViTPForSemanticSegmentation, {"neck": "pyramid", "num_lables": 15}, "num_lables.*num_labels"),
    (ViTPForImageClassification, {"image_size": 60}, "image_size=60.*patch_size=14"),
    (ViTPAdapter, {"dtype": torch.bfloat16}, r"dtype=torch.bfloat16.*to\(dtype\)"),
    (ViTPAdapter, {"torch_dtype": torch.bfloat16}, r"torch_dtype=torch.bfloat16.*to\(dtype\)"),
    (ViTPFeaturePyramid, {"dtype": torch.bfloat16}, r"dtype=torch.bfloat16.*to\(dtype\)"),
    (ViTPForSemanticSegmentation, {"backbone_kwargs": {"dtype": torch.bfloat16}}, "dtype=torch.bfloat16"),
    (ViTPForImageClassification, {"backbone_kwargs": {"torch_dtype": torch.bfloat16}}, "torch_dtype=torch.bfloat16"),
]


@pytest.mark.parametrize(("model_class", "options", "named"), STARTS)
def test_bad_option_of_start_is_named(tmp_path, model_class, options, named):
    export_backbone(vit(), tmp_path)
    with pytest.raises(ValueError, match=named):
        model_class.from_backbone(tmp_path, **options)


@pytest.mark.parametrize("model_class", [ViTPForSemanticSegmentation, ViTPForImageClassification])
def test_start_from_other_than_backbone_is_named(tmp_path, model_class):
    ViTPFeaturePyramid.from_backbone(vit(), pyramid_channels=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vitp_feature_pyramid"):
        model_class.from_backbone(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"patch_size": 32}, "image_size=112.*patch_size=32"),
        ({"patch_size": 15, "image_size": 128}, "image_size=128.*patch_size=15"),
        ({"image_size": (112, 224)}, r"image_size.*\(112, 224\)"),
        ({"patch_size": 0}, "patch_size.*got 0"),
    ],
)
def test_bad_size_of_resized_backbone_is_named(sizes, named):
    with pytest.raises(ValueError, match=named):
        resize_backbone(vit(image_size=[112, 112]), **sizes)


def test_bands_of_model_for_other_bands_are_named():
    with pytest.raises(ValueError, match=r"2 bands \(VV, VH\)"):
        spread_bands(spread_bands(vit(), SAR), SENTINEL_2)
    with pytest.raises(ValueError, match="4 channels"):
        spread_bands(vit(num_channels=4), SAR)
    with pytest.raises(ValueError, match="band_names"):
        spread_bands(vit(), ["VV", "VV"])


# Labels of models.


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("cascade_rcnn", {"boxes": None}, "boxes"),
        ("cascade_rcnn", {"boxes": torch.rand(5, 5)}, r"\(5, 5\)"),
        ("cascade_rcnn", {"boxes": torch.tensor([[0.5, 0.5, 0.0, 0.1]] * 5)}, "extent"),
        ("cascade_rcnn", {"class_labels": torch.tensor([0, 1, 2, 3, 4])}, "0 to 3"),
        ("cascade_rcnn", {"class_labels": torch.tensor([0])}, "5 class_labels.*got 1"),
        ("oriented_rcnn", {"corners": None}, "corners"),
        ("mask_rcnn", {"masks": None}, "masks"),
        ("mask_rcnn", {"masks": torch.ones(2, 96, 96)}, r"\(2, 96, 96\)"),
    ],
)
def test_bad_labels_of_detector_are_named(name, change, named):
    model, labels = original_detector(name), original_labels(name)
    labels[0] = {key: value for key, value in (labels[0] | change).items() if value is not None}
    with pytest.raises(ValueError, match=named):
        model(torch.zeros(2, 3, 96, 96), labels=labels)
    with pytest.raises(ValueError, match="2 images.*1"):
        model(torch.zeros(2, 3, 96, 96), labels=labels[1:])


def test_labels_beyond_the_classes_are_named():
    mask = torch.full((1, 32, 32), 7)
    mask[:, 3] = 255
    head = {"hidden_size": 16, "num_labels": 3, "use_auxiliary_head": False}
    segmenter = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **head))
    with pytest.raises(ValueError, match=r"labels.*loss_ignore_index.*\[7, 255\]"):
        segmenter.eval()(torch.randn(1, 3, 32, 32), labels=mask)
    classifier = ViTPForImageClassification.from_backbone(vit(), num_labels=3)
    with pytest.raises(ValueError, match=r"labels.*\[0, 5\]"):
        classifier(torch.randn(4, 3, 56, 56), labels=torch.tensor([0, 5, 0, 0]))


def test_tiles_with_odd_number_of_patches_are_named(model):
    with pytest.raises(ValueError, match="70 x 56 pixels have 5 x 4 patches"):
        model.model.get_image_features(torch.randn(1, 3, 70, 56))


# Images and input specs.


def values(*shape, dtype=np.uint8):
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    return rng.random(shape).astype(dtype) if dtype.kind == "f" else rng.integers(0, 200, shape, dtype=dtype)


GRAY = np.full((7, 10), 100, dtype=np.int16)
NAN_BAND = np.where(np.arange(3).reshape(3, 1, 1) == 1, np.nan, np.full((3, 7, 10), 0.5))
COMPLEX = np.ones((7, 10), np.complex64)
IMAGES = [
    (np.full((7, 10), 1.5), None, r"float64 .*\[1\.5, 1\.5\].*window"),
    (np.full((7, 10), -0.1, np.float32), None, "float32 .*window"),
    (np.where(GRAY == 100, np.nan, 0.5), None, "float64 .*window"),
    (GRAY, None, r"int16 .*\[100, 100\].*window"),
    (Image.new("I", (10, 7), 1000), None, "int32 .*window"),
    (Image.new("F", (10, 7), 1000.0), None, "float32 .*window"),
    (COMPLEX, None, "complex"),
    (COMPLEX, {"window": [0, 1]}, "complex"),
    (np.full((7, 10), np.nan), None, "no finite value"),
    (NAN_BAND, {"percentiles": [2, 98]}, "no finite value.*window"),
    (values(2, 20, 30), None, "2 bands.*input_spec"),
    (values(20, 30, 4), None, "4 bands.*input_spec.*RGBA"),
    (values(5, 20, 30, dtype=np.uint16), {"window": [0, 9]}, "5 bands.*input_spec"),
    *(
        (values(*shape, dtype=np.uint16), {"bands": [0]}, "input_data_format")
        for shape in [(5, 9, 5), (3, 9, 3), (3, 9, 4), (4, 9, 1), (1, 9, 1)]
    ),
    (np.zeros((0, 10), np.uint8), None, "zero"),
    (np.zeros((0, 7, 10), np.uint8), None, "zero"),
    (np.zeros(10, np.uint8), None, r"\(10,\)"),
    (Image.new("RGB", (0, 5)), None, r"length zero, got \(5, 0, 3\)"),
    (Image.new("I;16", (5, 0)), None, r"length zero, got \(1, 0, 5\)"),
    ([], None, "at least one image"),
    (values(5, 20, 30), {"bands": [5]}, r"bands \[5\].*5 band"),
    (values(3, 20, 30), {"window": [[0, 1], [0, 1]]}, "2 windows.*3 band"),
    (GRAY, {"window": [[0, 1]] * 3}, "3 windows.*1 band"),
    (values(3, 20, 30), {"band_names": SAR}, r"red, green and blue.*2 bands \(VV, VH"),
]
SPECS = [
    *(({"bands": bands}, "bands") for bands in ([-1], [0, 1], [], 0, [0.5])),
    ({"window": [0, 1], "percentiles": [2, 98]}, "window.*percentiles"),
    *(({"window": window}, "window") for window in ([5, 5], [1, 0], [NAN, 1], [-INF, 1], 5, [], [0, 1, 2])),
    ({"window": [[0, 1], [0, 1], [3, 2]]}, r"window.*\(3, 2\)"),
    *(({"percentiles": value}, "percentiles") for value in ([-1, 98], [2, 101], [98, 2], 98, [98], [2, 50, 98])),
    *(({"window": [0, 1], "gamma": gamma}, "gamma") for gamma in (0, NAN, "bright")),
    ({"windows": [0, 1]}, "windows"),
    *(({"band_names": names}, "band_names") for names in ([], SAR[:1] * 2, ["VV", ""], "VV", [1, 2])),
    ({"band_names": SENTINEL_2, "bands": [0, 1]}, r"12 `bands`.*\(0, 1\)"),
]


@pytest.mark.parametrize(("image", "spec", "named"), IMAGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_image_is_named(image, spec, named):
    with pytest.raises(ValueError, match=named):
        ViTPImageProcessor(size={"height": 7, "width": 10})(image, input_spec=spec)


@pytest.mark.parametrize(("spec", "named"), SPECS)
def test_bad_input_spec_is_named(spec, named):
    """The number of values is checked when the processor is created and when it is called."""
    with pytest.raises(ValueError, match=named):
        ViTPImageProcessor(input_spec=spec)
    with pytest.raises(ValueError, match=named):
        ViTPImageProcessor()(GRAY, input_spec=spec)


def test_statistics_for_other_bands_are_named():
    with pytest.raises(ValueError, match=r"image_mean.*2 bands \(VV, VH\).*3"):
        ViTPImageProcessor(input_spec={"band_names": SAR}, image_mean=[0.1, 0.2, 0.3])


TWO = [picture(9, 8), picture(9, 8)]
SQUARE = [[4.0, 6.0], [24.0, 6.0], [24.0, 16.0], [4.0, 16.0]]
SHIP = {"category_id": 1, "bbox": [4.0, 6.0, 20.0, 10.0]}
OUTLINED = {**SHIP, "segmentation": [[4, 6, 24, 6, 24, 16, 4, 16]]}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"segmentation_maps": [values(8, 9)]}, "mask.*2 images.*1"),
        ({"segmentation_maps": [values(8, 9), values(9, 8)]}, "Image 1 .*8 x 9.*mask.*9 x 8"),
        ({"images_after": [picture(9, 8), picture(9, 7)]}, "Image 1 .*8 x 9.*image after.*7 x 9"),
        ({"images_after": picture(9, 8)}, "image after.*2 images.*1"),
        ({"segmentation_maps": [picture(9, 8)] * 2}, r"uint8.*\(8, 9, 3\)"),
        ({"segmentation_maps": [np.zeros((8, 9))] * 2}, "float64"),
    ],
)
def test_bad_mask_or_pair_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        ViTPSegmentationImageProcessor()(TWO, **arguments)


@pytest.mark.parametrize(
    ("objects", "named"),
    [
        ([{"category_id": 1}], "bbox.*corners"),
        ([SHIP, {"category_id": 0, "corners": SQUARE}], "corners.*image 7"),
        ([SHIP], "segmentation"),
        ([{**SHIP, "segmentation": np.ones((3, 3))}], r"\(30, 40\).*\(3, 3\)"),
        ([{**SHIP, "segmentation": []}] * 2, "object 0 of image 7.*segmentation"),
        ([SHIP | {"iscrowd": 1}, OUTLINED, {**SHIP, "segmentation": []}], "object 2 of image 7.*segmentation"),
        ([OUTLINED, {**SHIP, "segmentation": [4, 6, 24, 6, 24, 16]}], "object 1 of image 7.*polygons"),
        ([{**SHIP, "segmentation": [[4, 6, 24]]}], "object 0 of image 7.*polygons"),
        ([{**SHIP, "segmentation": [[4, 6, 24, "a"]]}], "object 0 of image 7"),
        ([{**SHIP, "segmentation": {"size": [20, 25], "counts": [0, 500]}}], r"object 0 of image 7.*\[20, 25\]"),
    ],
)
def test_bad_object_is_named(objects, named):
    annotations = {"image_id": 7, "annotations": objects}
    with pytest.raises(ValueError, match=named):
        ViTPDetectionImageProcessor()(picture(40, 30), annotations, return_segmentation_masks=True)


# The processor of conversations.

PICTURE, PLACE = picture(60, 56), "<IMG_CONTEXT>"
IMAGE_TOKENS = ["<IMG_CONTEXT>", "<img>", "</img>"]
CALLS = [
    ({}, "images.*text"),
    ({"images": [[PICTURE], [PICTURE, PICTURE]], "text": [PLACE, PLACE]}, "[Ss]ample 1 .*2 image.*1 image token"),
    ({"images": [[PICTURE], []], "text": [PLACE, PLACE]}, "[Ss]ample 1 .*0 image.*1 image token"),
    ({"images": [PICTURE], "text": [PLACE, PLACE]}, r"2 image.*\[1, 1\].*got 1"),
    ({"images": [PICTURE, PICTURE], "text": [PLACE, "none"]}, r"1 image.*\[1, 0\].*got 2"),
    ({"text": ["none", PLACE]}, r"1 image.*\[0, 1\].*got 0"),
    ({"images": [[PICTURE]], "text": [PLACE, "none"]}, "list of images.*2 texts.*1"),
    ({"images": [[PICTURE], [np.zeros((9, 9), np.int16)]], "text": [PLACE, PLACE]}, "(?i)sample 1 .*int16.*window"),
    *(
        ({"text": ["a", "b"], "vrl_drop_ratio": 0.5, "vrl_keys": keys}, f"2 vrl_keys.*got {len(keys)}")
        for keys in ([], [1], [1, 2, 3])
    ),
    *(
        ({"text": ["fine", f"what is {token}?"]}, r"(?i)(?=.*(sample 1|\[0, 1\])).*(literal|IMG_CONTEXT)")
        for token in IMAGE_TOKENS
    ),
    *(
        (
            {"images": [[], [PICTURE]], "text": ["fine", f"{PLACE} what is {token}?"]},
            "(?i)sample 1 .*(literal|image token)",
        )
        for token in IMAGE_TOKENS
    ),
]


@pytest.mark.parametrize(("arguments", "named"), CALLS)
def test_bad_call_of_processor_is_named(processor, arguments, named):
    with pytest.raises(ValueError, match=named):
        processor(**arguments)


@pytest.mark.parametrize("name", ["missing.png", "missing0123.png", "broken.png", "truncated.png"])
@pytest.mark.parametrize("through_chat", [False, True])
def test_unreadable_image_is_named_with_its_row(processor, name, through_chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    PICTURE.save(tmp_path / "truncated.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "truncated.png").read_bytes()[:2000])
    chats = [[{"role": "user", "content": content}] for content in ("How many?", [{"type": "image", "path": name}])]
    with pytest.raises(ValueError, match=rf"(?i)sample 1 .*{name}"):
        if through_chat:
            processor.apply_chat_template(chats, tokenize=True)
        else:
            processor(images=[[PICTURE], [name]], text=[PLACE, PLACE])


@pytest.mark.parametrize("missing", [IMAGE_TOKENS[:1], IMAGE_TOKENS[1:], IMAGE_TOKENS])
def test_tokenizer_without_image_tokens_is_named(tokenizer, missing):
    backend = tokenizer.backend_tokenizer
    specials = [token for token in IMAGE_TOKENS if token not in missing]
    vocabulary = {token: i for i, token in enumerate(["a", *specials])}
    backend = type(backend)(type(backend.model)(vocab=vocabulary, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=specials)
    with pytest.raises(ValueError, match=rf"{', '.join(missing)}\..*add_special_tokens"):
        ViTPProcessor(ViTPImageProcessor(), tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": missing})
    assert ViTPProcessor(ViTPImageProcessor(), tokenizer).image_token_id == tokenizer.convert_tokens_to_ids(PLACE)
