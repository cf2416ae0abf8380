"""Errors for bad settings and inputs name the setting or the input."""

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
from modeling_vitp.vrl import draw_visual_tokens, num_kept_tokens

NAN, INF = float("nan"), float("inf")
SAR, SENTINEL_2 = ["VV", "VH"], [f"B{number:02}" for number in range(12)]
PATCH_16 = {**VISION, "image_size": [96, 96], "patch_size": [16, 16]}
IMAGE_TOKENS = ["<IMG_CONTEXT>", "<img>", "</img>"]
PICTURE, PLACE = picture(60, 56), "<IMG_CONTEXT>"


def vit(**settings) -> ViTPVisionModel:
    return ViTPVisionModel(ViTPVisionConfig(**{**VISION, **settings}))


def vlm_config(vision_config=None, **settings) -> ViTPConfig:
    text = {**TEXT, "vocab_size": 64}
    return ViTPConfig(vision_config={**VISION, **(vision_config or {})}, text_config=text, image_token_id=7, **settings)


def adapter_config(**settings) -> ViTPAdapterConfig:
    return ViTPAdapterConfig(**{**PATCH_16, "num_hidden_layers": 8, **BACKBONE, **settings})


# Configurations: class, settings, name in the error.
CONFIGS = [
    (vlm_config, {"vrl_drop_ratio": 1.0}, "vrl_drop_ratio"),
    (vlm_config, {"vrl_drop_ratio": "0.75"}, "vrl_drop_ratio"),
    (vlm_config, {"vrl_apply_prob": 1.5}, "vrl_apply_prob"),
    (vlm_config, {"vrl_warmup_steps": -1}, "vrl_warmup_steps"),
    (vlm_config, {"vision_config": {"drop_path_rate": NAN}}, "drop_path_rate"),
    (vlm_config, {"vision_config": {"image_size": [112, 28]}}, "8 x 2 patches"),
    (vlm_config, {"vision_config": {"image_size": [7, 7]}}, "7, 7"),
    (vlm_config, {"vision_config": {"image_size": [70, 70]}}, "even number of patches"),
    (ViTPVisionConfig, {"band_names": []}, "band_names"),
    (ViTPVisionConfig, {"band_names": ["VV", "VV"]}, "band_names"),
    (ViTPVisionConfig, {"band_names": "VV"}, "band_names"),
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
    (ViTPObjectDetectionConfig, {"stage_iou_thresholds": [0.5]}, "stage_iou_thresholds"),
    (ViTPObjectDetectionConfig, {"stage_iou_thresholds": [0.5, 0.6, 7]}, "stage_iou_thresholds"),
    (ViTPObjectDetectionConfig, {"stage_box_stds": [0.1, 0.2, 0.3]}, "stage_box_stds"),
    (ViTPObjectDetectionConfig, {"stage_box_stds": [[0.1] * 5] * 3}, "stage_box_stds"),
    (ViTPObjectDetectionConfig, {"stage_loss_weights": [1, NAN, 1]}, "stage_loss_weights"),
    (ViTPObjectDetectionConfig, {"box_loss": "giou"}, "box_loss"),
    (ViTPObjectDetectionConfig, {"rpn_negative_iou": 0.8}, "rpn_negative_iou"),
    (ViTPObjectDetectionConfig, {"roi_samples": 0}, "roi_samples"),
    (ViTPObjectDetectionConfig, {"anchor_scale": INF}, "anchor_scale"),
    (ViTPObjectDetectionConfig, {"anchor_ratios": []}, "anchor_ratios"),
]


@pytest.mark.parametrize(("config_class", "settings", "named"), CONFIGS)
def test_bad_setting_is_named(config_class, settings, named):
    with pytest.raises((StrictDataclassError, ValueError), match=named):
        config_class(**settings)


def test_bad_vrl_options_are_named(processor):
    options = {"images": picture(60, 56), "text": PLACE}
    for ratio in (1, -0.1, NAN):
        for call in (
            lambda ratio: num_kept_tokens(8, ratio),
            lambda ratio: draw_visual_tokens(8, ratio),
            lambda ratio: processor(**options, vrl_drop_ratio=ratio),
        ):
            with pytest.raises(ValueError, match="vrl_drop_ratio"):
                call(ratio)
    for prob in (1.5, -0.1, NAN):
        for call in (
            lambda prob: draw_visual_tokens(8, 0.5, prob),
            lambda prob: processor(**options, vrl_apply_prob=prob, vrl_drop_ratio=0),
            lambda prob: processor(**options, vrl_apply_prob=prob, vrl_drop_ratio=0.5),
        ):
            with pytest.raises(ValueError, match="vrl_apply_prob"):
                call(prob)


# Models that start from a backbone.

STARTS = [
    (ViTPForSemanticSegmentation, {"neck": "fpn"}, "fpn"),
    (ViTPForSemanticSegmentation, {"neck": "pyramid", "num_lables": 15}, "num_lables"),
    (ViTPForImageClassification, {"image_size": 60}, "image_size=60"),
    (ViTPAdapter, {"torch_dtype": torch.bfloat16}, "torch_dtype"),
    (ViTPFeaturePyramid, {"dtype": torch.bfloat16}, "dtype"),
    (ViTPForSemanticSegmentation, {"backbone_kwargs": {"dtype": torch.bfloat16}}, "dtype"),
    (ViTPForImageClassification, {"backbone_kwargs": {"torch_dtype": torch.bfloat16}}, "torch_dtype"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_backbone(vit(), tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize(("model_class", "options", "named"), STARTS)
def test_bad_option_of_start_is_named(exported, model_class, options, named):
    with pytest.raises(ValueError, match=named):
        model_class.from_backbone(exported, **options)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"patch_size": 32}, "patch_size=32"),
        ({"image_size": (112, 224)}, r"image_size.*\(112, 224\)"),
        ({"patch_size": 0}, "patch_size"),
    ],
)
def test_bad_size_of_resized_backbone_is_named(sizes, named):
    with pytest.raises(ValueError, match=named):
        resize_backbone(vit(image_size=[112, 112]), **sizes)


def test_bands_of_model_for_other_bands_are_named():
    with pytest.raises(ValueError, match="VV, VH"):
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
        ("cascade_rcnn", {"class_labels": torch.tensor([0])}, "class_labels"),
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
    with pytest.raises(ValueError, match="2 images"):
        model(torch.zeros(2, 3, 96, 96), labels=labels[1:])


def test_labels_beyond_the_classes_are_named():
    mask = torch.full((1, 32, 32), 7)
    mask[:, 3] = 255
    head = {"hidden_size": 16, "num_labels": 3, "use_auxiliary_head": False}
    segmenter = ViTPForSemanticSegmentation(ViTPSegmentationConfig(backbone_config=adapter_config(), **head))
    with pytest.raises(ValueError, match=r"\[7, 255\]"):
        segmenter.eval()(torch.randn(1, 3, 32, 32), labels=mask)
    classifier = ViTPForImageClassification.from_backbone(vit(), num_labels=3)
    with pytest.raises(ValueError, match=r"\[0, 5\]"):
        classifier(torch.randn(4, 3, 56, 56), labels=torch.tensor([0, 5, 0, 0]))


def test_tiles_with_odd_number_of_patches_are_named(model):
    with pytest.raises(ValueError, match="70 x 56"):
        model.model.get_image_features(torch.randn(1, 3, 70, 56))


# Images and input specs.


def values(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 200, shape, dtype=dtype)


GRAY = np.full((7, 10), 100, dtype=np.int16)
NAN_BAND = np.where(np.arange(3).reshape(3, 1, 1) == 1, np.nan, np.full((3, 7, 10), 0.5))
IMAGES = [
    (np.full((7, 10), 1.5), None, "float64"),
    (np.full((7, 10), -0.1, np.float32), None, "float32"),
    (np.where(GRAY == 100, np.nan, 0.5), None, "float64"),
    (GRAY, None, "int16"),
    (Image.new("I", (10, 7), 1000), None, "int32"),
    (Image.new("F", (10, 7), 1000.0), None, "float32"),
    (np.ones((7, 10), np.complex64), {"window": [0, 1]}, "complex"),
    (NAN_BAND, {"percentiles": [2, 98]}, "no finite value"),
    (values(2, 20, 30), None, "2 bands"),
    (values(20, 30, 4), None, "4 bands"),
    (values(5, 20, 30, dtype=np.uint16), {"window": [0, 9]}, "5 bands"),
    (values(5, 9, 5, dtype=np.uint16), {"bands": [0]}, "input_data_format"),
    (values(3, 9, 4, dtype=np.uint16), {"bands": [0]}, "input_data_format"),
    (values(1, 9, 1, dtype=np.uint16), {"bands": [0]}, "input_data_format"),
    (np.zeros((0, 7, 10), np.uint8), None, "zero"),
    (np.zeros(10, np.uint8), None, r"\(10,\)"),
    (Image.new("RGB", (0, 5)), None, "zero"),
    (Image.new("I;16", (5, 0)), None, "zero"),
    ([], None, "at least one image"),
    (values(5, 20, 30), {"bands": [5]}, r"bands \[5\]"),
    (values(3, 20, 30), {"window": [[0, 1], [0, 1]]}, "2 windows"),
    (values(3, 20, 30), {"band_names": SAR}, "VV, VH"),
]
SPECS = [
    ({"bands": [-1]}, "bands"),
    ({"bands": [0, 1]}, "bands"),
    ({"bands": 0}, "bands"),
    ({"window": [0, 1], "percentiles": [2, 98]}, "window.*percentiles"),
    ({"window": [5, 5]}, "window"),
    ({"window": [NAN, 1]}, "window"),
    ({"window": [0, 1, 2]}, "window"),
    ({"window": [[0, 1], [0, 1], [3, 2]]}, r"window.*\(3, 2\)"),
    ({"percentiles": [-1, 98]}, "percentiles"),
    ({"percentiles": [98, 2]}, "percentiles"),
    ({"percentiles": [98]}, "percentiles"),
    ({"window": [0, 1], "gamma": 0}, "gamma"),
    ({"window": [0, 1], "gamma": NAN}, "gamma"),
    ({"windows": [0, 1]}, "windows"),
    ({"band_names": ["VV", ""]}, "band_names"),
    ({"band_names": SENTINEL_2, "bands": [0, 1]}, "12 `bands`"),
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
    with pytest.raises(ValueError, match="image_mean"):
        ViTPImageProcessor(input_spec={"band_names": SAR}, image_mean=[0.1, 0.2, 0.3])


TWO = [picture(9, 8), picture(9, 8)]
SHIP = {"category_id": 1, "bbox": [4.0, 6.0, 20.0, 10.0]}
OUTLINED = {**SHIP, "segmentation": [[4, 6, 24, 6, 24, 16, 4, 16]]}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"segmentation_maps": [values(8, 9)]}, "mask.*2 images"),
        ({"segmentation_maps": [values(8, 9), values(9, 8)]}, "Image 1 .*mask"),
        ({"images_after": [picture(9, 8), picture(9, 7)]}, "Image 1 .*image after"),
        ({"images_after": picture(9, 8)}, "image after.*2 images"),
        ({"segmentation_maps": [picture(9, 8)] * 2}, r"\(8, 9, 3\)"),
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
        ([SHIP, {"category_id": 0, "corners": [[4, 6], [24, 6], [24, 16], [4, 16]]}], "corners.*image 7"),
        ([SHIP], "segmentation"),
        ([{**SHIP, "segmentation": np.ones((3, 3))}], r"\(3, 3\)"),
        ([SHIP | {"iscrowd": 1}, OUTLINED, {**SHIP, "segmentation": []}], "object 2 of image 7"),
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

CALLS = [
    ({}, "images.*text"),
    ({"images": [[PICTURE], [PICTURE, PICTURE]], "text": [PLACE, PLACE]}, "[Ss]ample 1 "),
    ({"images": [[PICTURE], []], "text": [PLACE, PLACE]}, "[Ss]ample 1 "),
    ({"images": [PICTURE, PICTURE], "text": [PLACE, "none"]}, r"\[1, 0\].*got 2"),
    ({"text": ["none", PLACE]}, r"\[0, 1\].*got 0"),
    ({"images": [[PICTURE]], "text": [PLACE, "none"]}, "2 texts"),
    ({"images": [[PICTURE], [np.zeros((9, 9), np.int16)]], "text": [PLACE, PLACE]}, "(?i)sample 1 .*int16"),
    ({"text": ["a", "b"], "vrl_drop_ratio": 0.5, "vrl_keys": []}, "vrl_keys"),
    ({"text": ["a", "b"], "vrl_drop_ratio": 0.5, "vrl_keys": [1, 2, 3]}, "vrl_keys"),
    ({"text": ["fine", "what is <img>?"]}, "(?i)sample 1 "),
    ({"images": [[], [PICTURE]], "text": ["fine", f"{PLACE} what is {PLACE}?"]}, "(?i)sample 1 "),
    ({"images": [[], [PICTURE]], "text": ["fine", f"{PLACE} what is </img>?"]}, "(?i)sample 1 "),
]


@pytest.mark.parametrize(("arguments", "named"), CALLS)
def test_bad_call_of_processor_is_named(processor, arguments, named):
    with pytest.raises(ValueError, match=named):
        processor(**arguments)


@pytest.mark.parametrize("name", ["missing.png", "truncated.png"])
def test_unreadable_image_is_named_with_its_row(processor, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save(tmp_path / "truncated.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "truncated.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"(?i)sample 1 .*{name}"):
        processor(images=[[PICTURE], [name]], text=[PLACE, PLACE])
    chats = [[{"role": "user", "content": content}] for content in ("How many?", [{"type": "image", "path": name}])]
    with pytest.raises(ValueError, match=rf"(?i)sample 1 .*{name}"):
        processor.apply_chat_template(chats, tokenize=True)


@pytest.mark.parametrize("missing", [IMAGE_TOKENS[:1], IMAGE_TOKENS[1:]])
def test_tokenizer_without_image_tokens_is_named(tokenizer, missing):
    backend = tokenizer.backend_tokenizer
    specials = [token for token in IMAGE_TOKENS if token not in missing]
    vocabulary = {token: i for i, token in enumerate(["a", *specials])}
    backend = type(backend)(type(backend.model)(vocab=vocabulary, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=specials)
    with pytest.raises(ValueError, match=", ".join(missing)):
        ViTPProcessor(ViTPImageProcessor(), tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": missing})
    assert ViTPProcessor(ViTPImageProcessor(), tokenizer).image_token_id == tokenizer.convert_tokens_to_ids(PLACE)
