"""Results of fine-tuned models and their drawings; the tab Apply."""

import re

import gradio as gr
import numpy as np
import pytest
import torch
from answers import COLORS
from apply_tab import Classes, Labels, Objects, build_tab, color_of, result_of
from handlers import run, start_of
from loading import TINY, Models
from original_detectors import DETECTORS, original_detector
from pictures import picture
from PIL import Image, ImageColor
from tiny_models import HEAD, VISION_16, adapter_config
from transformers import pipeline
from uploading import CROWNS

from modeling_vitp import (
    ViTPAdapterConfig,
    ViTPChangeDetectionConfig,
    ViTPDetectionImageProcessor,
    ViTPForChangeDetection,
    ViTPForImageClassification,
    ViTPForSemanticSegmentation,
    ViTPImageClassificationConfig,
    ViTPImageProcessor,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
)
from modeling_vitp.tasks.detection.one_stage import DETECTORS as ONE_STAGE

ADAPTER = {"deformable_heads": 4, "spatial_prior_channels": 8}
GREY = np.full((90, 120, 3), 100, np.uint8)


def objects(masks=None):
    corners = np.array(
        [[[10, 40], [50, 40], [50, 80], [10, 80]], [[80, 40], [100, 60], [80, 80], [60, 60]]], np.float32
    )
    return Objects(GREY, ["ship", "<b>plane</b>"], np.array([1, 0]), np.array([0.9, 0.4]), corners, masks)


def has_color(pixels, label):
    return (np.asarray(pixels) == ImageColor.getrgb(COLORS[label])).all(-1)


def test_boxes_above_threshold_have_class_colors():
    both, best, none = (np.asarray(objects().draw(threshold)) for threshold in (0.3, 0.4, 0.9))
    np.testing.assert_array_equal(none, GREY)
    for x, y in ((10, 60), (50, 60), (30, 79), (30, 40)):
        assert has_color(both, 1)[y, x] and has_color(best, 1)[y, x]
    for x, y in ((90, 50), (90, 70), (70, 70), (70, 50)):  # midpoints of the sides of the rotated square
        assert has_color(both, 0)[y - 1 : y + 2, x - 1 : x + 2].any() and not has_color(best, 0).any()
    assert (both[55:65, 20:40] == 100).all()  # nothing inside


def test_object_corners_refer_to_returned_picture():
    facts = objects().facts(0.5)
    assert (facts["width"], facts["height"]) == (120, 90)
    assert facts["objects"] == [
        {"class": "<b>plane</b>", "score": 0.9, "corners": [[10, 40], [50, 40], [50, 80], [10, 80]]}
    ]


def test_masks_cover_their_pixels():
    mask = np.zeros((90, 120), bool)
    mask[50:60, 20:30] = True
    columns = mask.ravel(order="F").astype(int)
    ends = np.flatnonzero(np.diff(columns)) + 1
    counts = np.diff([0, *ends, mask.size]).tolist()
    lengths = {"size": [90, 120], "counts": counts}
    drawn = np.asarray(objects([lengths, {"size": [90, 120], "counts": [90 * 120]}]).draw(0.3)).astype(int)
    expected = np.round(100 + 0.4 * (np.array(color_of(1)) - 100))
    assert (drawn[51:59, 21:29] == expected).all()
    assert (drawn[65:75, 15:45] == 100).all()


def test_legend_counts_objects_and_escapes_names():
    assert "Objects with a score above 0.3: 2" in objects().legend(0.3)
    legend = objects().legend(0.5)
    assert "Objects with a score above 0.5: 1" in legend and "ship" not in legend
    assert "&lt;b&gt;plane&lt;/b&gt;" in legend and "<b>" not in legend


def test_classes_of_one_name_keep_their_values():
    names = ["crane", "dog", "crane"]
    labels = Labels(GREY, names, np.array([0.7, 0.2, 0.1]))
    rows = re.findall(r'scope="row">(\w+)</th><td>([\d.]+)%', labels.legend())
    assert rows == [("crane", "70.0"), ("dog", "20.0"), ("crane", "10.0")]
    assert [(entry["class"], entry["probability"]) for entry in labels.facts()["classes"]] == [
        ("crane", 0.7),
        ("dog", 0.2),
        ("crane", 0.1),
    ]
    shares = Classes(GREY, names, np.array([[0, 0, 2, 1]])).facts()["classes"]
    assert [entry["share"] for entry in shares] == [0.5, 0.25, 0.25]


def test_class_overlay_and_legend_show_shares():
    labels = np.zeros((90, 120), int)
    labels[:45, :60] = 1
    labels[0, 0] = 2
    names = ["field", "water", "road"]
    for opacity in (0.0, 0.25, 1.0):
        drawn = np.asarray(Classes(GREY, names, labels).draw(0.3, opacity)).astype(int)
        for label, (y, x) in {0: (80, 10), 1: (10, 10), 2: (0, 0)}.items():
            expected = np.round(100 + opacity * (np.array(ImageColor.getrgb(COLORS[label])) - 100.0))
            np.testing.assert_allclose(drawn[y, x], expected, atol=1)
    found = re.findall(r'scope="row">(\w+)</th><td>([\d.]+)%', Classes(GREY, names, labels).legend())
    assert found == [("field", "75.0"), ("water", "25.0"), ("road", "0.0")]
    changes = np.asarray(Classes(GREY, ["same", "changed"], labels.clip(max=1), unseen=0).draw(0.3, 1.0))
    assert (changes[80, 10] == 100).all() and has_color(changes, 1)[10, 10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the app's models, with a fine-tuned model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for name in DETECTORS:
        original_detector(name).save_pretrained(folder / name)
        ViTPDetectionImageProcessor().save_pretrained(folder / name)
    torch.manual_seed(0)
    maps = {"segmentation": (ViTPForSemanticSegmentation, ViTPSegmentationConfig)}
    maps |= {"changes": (ViTPForChangeDetection, ViTPChangeDetectionConfig)}
    for name, (model, config) in maps.items():
        settings = HEAD if name == "changes" else {**HEAD, "id2label": {0: "field", 1: "water", 2: "road"}}
        model(config(backbone_config=adapter_config(), **settings)).save_pretrained(folder / name)
        ViTPSegmentationImageProcessor(input_spec={"window": [0, 4000]}).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    return Models(TINY, fine_tuned=[str(folder / name) for name in (*DETECTORS, "segmentation", "changes")])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    paths = [tmp_path_factory.mktemp("images") / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        picture(96, 80, seed).save(path)
    return paths


@torch.no_grad()
def outputs_of(models, name, *scenes):
    """Return the detections of the model alone."""
    one = models.fine_tuned(name)
    images = [np.asarray(Image.open(scene).convert("RGB")) for scene in scenes]
    pixels = [torch.from_numpy(image.copy()).movedim(-1, 0)[None].float() / 255 for image in images]
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return one.model(*((values - mean) / std for values in pixels))


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_are_redrawn_without_the_model(models, scenes, name):
    outputs = outputs_of(models, name, scenes[0])
    found, note = result_of(models, str(scenes[0]), None, name)
    picture, legend = found.draw(0.5), found.legend(0.5)
    count = int((outputs.scores > 0.5).sum())
    assert f"Objects with a score above 0.5: {count}" in legend and "0.png: PNG, RGB, 96 × 80 pixels" in note
    assert name in note
    assert (np.asarray(found.draw(0.9)) != np.asarray(picture)).any()
    np.testing.assert_array_equal(np.asarray(found.draw(1.0)), np.asarray(Image.open(scenes[0]).convert("RGB")))


def test_class_map_shows_predicted_classes(models, scenes):
    labels = outputs_of(models, "segmentation", scenes[0]).logits[0].argmax(0).numpy()
    found, _ = result_of(models, str(scenes[0]), None, "segmentation")
    picture, legend = found.draw(0.5, 1.0), found.legend()
    palette = np.array([ImageColor.getrgb(color) for color in COLORS])
    np.testing.assert_array_equal(np.asarray(picture), palette[labels])
    for label, class_name in enumerate(("field", "water", "road")):
        assert f"{class_name}</th><td>{100 * (labels == label).mean():.1f}%" in legend


def test_changes_are_drawn_on_the_second_image(models, scenes, tmp_path):
    labels = outputs_of(models, "changes", *scenes).logits[0].argmax(0).numpy()
    found, _ = result_of(models, *map(str, scenes), "changes")
    shown = found.draw(0.5, 1.0)
    palette = np.array([ImageColor.getrgb(color) for color in COLORS])
    later = np.asarray(Image.open(scenes[1]).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(shown), np.where(labels[..., None] == 0, later, palette[labels]))
    nothing, note = result_of(models, str(scenes[0]), None, "changes")
    assert nothing is None and "second image" in note
    picture(96, 40).save(tmp_path / "low.png")
    with pytest.raises(gr.Error, match="96 × 80 and 96 × 40"):
        result_of(models, str(scenes[0]), str(tmp_path / "low.png"), "changes")


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_image_classes_have_model_probabilities(tmp_path, problem_type):
    torch.manual_seed(0)
    names = {"id2label": {0: "field", 1: "<b>water</b>", 2: "road"}, "problem_type": problem_type}
    model = ViTPForImageClassification(ViTPImageClassificationConfig(backbone_config=VISION_16, **names))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "classes")
    ViTPImageProcessor(size={"height": 64, "width": 64}, crop_to_patches=False).save_pretrained(tmp_path / "classes")
    picture(64, 64).save(tmp_path / "scene.png")
    models = Models(TINY, fine_tuned=[str(tmp_path / "classes")])
    found, _ = result_of(models, str(tmp_path / "scene.png"), None, "classes")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.from_numpy((np.asarray(picture(64, 64)) / 255 - mean) / std).movedim(-1, 0)[None].float()
    with torch.no_grad():
        logits = model.eval()(pixels).logits[0].double().numpy()
    expected = np.exp(logits) / np.exp(logits).sum() if problem_type.startswith("single") else 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    shown, legend = found.draw(0.5), found.legend()
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(picture(64, 64)))
    assert f"&lt;b&gt;water&lt;/b&gt;</th><td>{100 * expected[1]:.1f}%" in legend
    assert models.backbone("classes").depth == 4


@pytest.mark.parametrize("detector", ["rt_detr_v2", "deformable_detr"])
def test_transformers_detector_matches_its_pipeline(tmp_path, scenes, detector):
    torch.manual_seed(0)
    model_class, processor_class = ONE_STAGE[detector]
    backbone = ViTPAdapterConfig(**VISION_16, **ADAPTER, out_features=["stride8", "stride16", "stride32"])
    head = {"d_model": 64, "num_queries": 10, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 2}
    head |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1}
    if detector == "rt_detr_v2":
        head |= {"d_model": 32, "encoder_in_channels": [32] * 3, "decoder_in_channels": [32] * 3}
        head |= {"encoder_hidden_dim": 32}
    model_class(model_class.config_class(backbone_config=backbone, **head)).save_pretrained(tmp_path / "one_stage")
    size = {"height": 64, "width": 64}
    processor_class(size=size, do_normalize=True, image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(
        tmp_path / "one_stage"
    )
    models = Models(TINY, fine_tuned=[str(tmp_path / "one_stage")])
    found, _ = result_of(models, str(scenes[0]), None, "one_stage")
    options = {"model": str(tmp_path / "one_stage"), "image_processor": str(tmp_path / "one_stage")}
    expected = pipeline("object-detection", **options)(str(scenes[0]), threshold=0.0)
    assert len(found.scores) == len(expected) > 0
    best = max(expected, key=lambda one: one["score"])
    index = int(found.scores.argmax())
    assert found.scores[index] == pytest.approx(best["score"], abs=1e-5)
    box = [best["box"][name] for name in ("xmin", "ymin", "xmax", "ymax")]
    np.testing.assert_allclose([*found.corners[index, 0], *found.corners[index, 2]], box, atol=1)
    assert models.backbone("one_stage").depth == 4


def test_invalid_model_or_image_shows_message(models, folder, scenes):
    scene = str(scenes[0])
    for name, image, message in (
        ("cascade_rcnn", None, "No image is selected"),
        (TINY, scene, "is a full model"),
        (str(folder), scene, "Hub id|is a folder"),  # The app was not started with this folder.
    ):
        with pytest.raises(gr.Error, match=message):
            result_of(models, image, None, name)


def test_tab_opens_with_example(models):
    ((handler, values),) = start_of(build_tab, models)
    found, picture, legend, note = run(handler, values)
    assert note.startswith(f"**{CROWNS}: JPEG") and note.endswith(next(iter(DETECTORS)))
    assert picture.size == (672, 672) and legend == found.legend(0.3)
    assert start_of(build_tab, Models(TINY)) == []
