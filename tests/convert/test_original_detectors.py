"""Conversion of OpenMMLab's two-stage detectors, under the original names of the fixtures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from original_detectors import DETECTORS, folder_of, original_detector, original_weights, pixel_mask
from safetensors.torch import load_file, save_file
from tiny_models import VISION_16
from transformers import AutoModelForObjectDetection
from transformers.utils import logging

from modeling_vitp import (
    ViTPAdapter,
    ViTPDetectionImageProcessor,
    ViTPFeaturePyramidConfig,
    ViTPForObjectDetection,
    ViTPObjectDetectionConfig,
    convert_checkpoint,
)
from modeling_vitp.convert.__main__ import main
from modeling_vitp.convert.keys import BENCHMARK_NAMES
from modeling_vitp.convert.original_config import BENCHMARKS

every_detector = pytest.mark.parametrize("name", DETECTORS)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("modeling_vitp"), "propagate", True)
    return caplog


def as_a_source(name: str, folder: Path, **detector) -> Path:
    """Write a folder with an original detector, its backbone's settings and the settings of its heads."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(folder_of(name) / "detector.safetensors", folder / "model.safetensors")
    settings = json.loads((folder_of(name) / "settings.json").read_text())["backbone"]
    (folder / "config.json").write_text(json.dumps(settings | ({"detector": detector} if detector else {})))
    return folder


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@every_detector
@torch.no_grad()
def test_detections_equal_original_detector(name, tmp_path, warnings):
    model = original_detector(name)
    proposals = {key: getattr(model.config, key) for key in ("rpn_candidates_eval", "rpn_proposals_eval")}
    said = proposals | {"max_detections": model.config.max_detections}
    folder = convert_checkpoint(as_a_source(name, tmp_path / "original", **said), tmp_path / "detector")
    assert_same(load_file(folder / "model.safetensors"), original_weights(name))
    opened, report = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert type(opened) is DETECTORS[name] and not report["missing_keys"] and not report["unexpected_keys"]
    images = load_file(folder_of(name) / "expected.safetensors")["pixel_values"]
    found, wanted = opened.eval()(images, pixel_mask()), model(images, pixel_mask())
    assert torch.equal(found.scores, wanted.scores) and torch.equal(found.labels, wanted.labels)
    assert torch.equal(found.pred_boxes, wanted.pred_boxes)
    assert metadata_load(folder / "README.md")["pipeline_tag"] == "object-detection"
    assert "modeling_vitp_detection.py" in {path.name for path in folder.iterdir()}

    back = convert_checkpoint(folder, tmp_path / "back", "original")
    assert_same(load_file(back / "model.safetensors"), load_file(folder_of(name) / "detector.safetensors"))
    again = convert_checkpoint(back, tmp_path / "again")
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert "not visible in the tensors" not in warnings.text


@every_detector
def test_missing_settings_are_published_settings(name, tmp_path, warnings):
    folder = convert_checkpoint(as_a_source(name, tmp_path / "original"), tmp_path / "detector")
    assert "not visible in the tensors" in warnings.text and "dior, dior_r" in warnings.text
    config = DETECTORS[name].config_class.from_pretrained(folder)
    published, model = DETECTORS[name].config_class(), original_detector(name)
    for key in ("rpn_proposals_train", "score_threshold", "nms_threshold", "roi_match_low_quality", "flip_test"):
        assert getattr(config, key) == getattr(published, key)
    for key in ("neck_channels", "neck_top_down", "head_hidden_size", "class_agnostic_boxes", "num_labels"):
        assert getattr(config, key) == getattr(model.config, key)
    assert config.backbone_config.to_dict() == model.config.backbone_config.to_dict() | {"dtype": None}


@torch.no_grad()
def test_adapter_of_a_detector(tmp_path):
    source = as_a_source("cascade_rcnn", tmp_path / "original")
    adapter = ViTPAdapter.from_pretrained(convert_checkpoint(source, tmp_path / "adapter", "adapter")).eval()
    detector = convert_checkpoint(source, tmp_path / "detector")
    again = ViTPAdapter.from_pretrained(convert_checkpoint(detector, tmp_path / "again", "adapter")).eval()
    images = load_file(folder_of("cascade_rcnn") / "expected.safetensors")["pixel_values"]
    expected = original_detector("cascade_rcnn").backbone(images).feature_maps
    for ours, too, wanted in zip(adapter(images).feature_maps, again(images).feature_maps, expected):
        assert torch.equal(ours, wanted) and torch.equal(too, wanted)


KIND_OF_BENCHMARK = {
    "dior": ("cascade_rcnn", 20),
    "dior_r": ("oriented_rcnn", 20),
    "dota_v2": ("oriented_rcnn", 18),
    "sardet_100k": ("cascade_rcnn", 6),
    "rsar": ("oriented_rcnn", 6),
    "ssdd": ("mask_rcnn", 80),
}


def test_command_offers_all_benchmarks():
    assert tuple(BENCHMARKS) == BENCHMARK_NAMES


@pytest.mark.parametrize("benchmark", BENCHMARK_NAMES)
def test_benchmark_sets_names_and_image_size(benchmark, tmp_path, warnings):
    name, classes = KIND_OF_BENCHMARK[benchmark]
    source = as_a_source(name, tmp_path / "original")
    weights = load_file(source / "model.safetensors")
    for key in list(weights):  # heads for that number of classes
        if key.endswith(("fc_cls.weight", "fc_cls.bias")):
            weights[key] = torch.zeros(classes + 1, *weights[key].shape[1:])
        elif name == "mask_rcnn" and ".fc_reg." in key:
            weights[key] = torch.zeros(4 * classes, *weights[key].shape[1:])
        elif ".conv_logits." in key:
            weights[key] = torch.zeros(classes, *weights[key].shape[1:])
    save_file(weights, source / "model.safetensors")
    folder = convert_checkpoint(source, tmp_path / "detector", benchmark=benchmark)
    config = DETECTORS[name].config_class.from_pretrained(folder)
    assert len(config.id2label) == len(set(config.id2label.values())) == config.num_labels == classes
    assert config.id2label == {index: label for label, index in config.label2id.items()}
    assert config.flip_test == (benchmark == "ssdd")
    assert ("Score the detector class by class" in warnings.text) == (benchmark in ("dior", "sardet_100k"))
    first = {"dior": "airplane", "dior_r": "airplane", "dota_v2": "plane"}.get(benchmark, "ship")
    assert config.id2label[0] == first
    processor = ViTPDetectionImageProcessor.from_pretrained(folder)
    pixels = processor(torch.zeros(3, 40, 60, dtype=torch.uint8), return_tensors="pt")
    sizes = {"stretch": (96, 96), "fit": (64, 96), None: (40, 60)}[BENCHMARKS[benchmark].resize]
    assert pixels["pixel_values"].shape == (1, 3, 96, 96)
    assert pixels["pixel_mask"][0].nonzero().amax(0).tolist() == [sizes[0] - 1, sizes[1] - 1]
    if benchmark in ("dior_r", "ssdd"):  # without and with `flip_test`
        back = convert_checkpoint(folder, tmp_path / "back", "original")
        again = DETECTORS[name].config_class.from_pretrained(convert_checkpoint(back, tmp_path / "again"))
        assert again.id2label == config.id2label and again.flip_test == config.flip_test


MISTAKES = [  # changed tensors (None removes), settings of the heads, and the error
    ({"rpn_head.rpn_reg.weight": (15, 16, 1, 1)}, {}, "rpn_reg (18 for oriented boxes) at each position, got 15"),
    ({"roi_head.bbox_head.0.fc_reg.weight": (5, 32)}, {}, "roi_head.bbox_head.0.fc_reg.weight is [5, 32], expected"),
    ({"roi_head.bbox_head.2.": None}, {}, "1 or 3 stages, got 2"),
    ({"neck.lateral_convs.0.conv.weight": None}, {}, "'neck.lateral_convs.0.conv.weight'"),
    ({"rpn_head.rpn_cls.bias": None}, {}, "missing: rpn_head.rpn_cls.bias"),
    ({"roi_head.extra.weight": (2,)}, {}, "unknown: roi_head.extra.weight"),
    ({"roi_head.bbox_head.1.fc_cls.weight": (9, 32)}, {}, "fc_cls.weight is [9, 32], expected [5, 32]"),
    ({}, {"neck_channels": 256}, "neck_channels=256, expected 16"),
    ({}, {"id2label": {"0": "ship"}}, "config.json names 1 classes, but the head has 4"),
]


@pytest.mark.parametrize(("changes", "detector", "message"), MISTAKES)
def test_wrong_detector_is_named(tmp_path, changes, detector, message):
    source = as_a_source("cascade_rcnn", tmp_path / "original", **detector)
    weights = load_file(source / "model.safetensors")
    for changed, shape in changes.items():
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(changed)}
        if shape is not None:
            weights[changed] = torch.zeros(shape)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError) as error:
        main([str(source), str(tmp_path / "target")])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_wrong_benchmark_is_refused(tmp_path):
    source = as_a_source("cascade_rcnn", tmp_path / "original")
    for benchmark in ("dior", "rsar"):  # other classes, another kind of detector
        with pytest.raises(ValueError, match=benchmark):
            convert_checkpoint(source, tmp_path / "target", benchmark=benchmark)
    detector = convert_checkpoint(source, tmp_path / "detector")
    with pytest.raises(ValueError, match="benchmark"):
        convert_checkpoint(detector, tmp_path / "target", "original", benchmark="dior")
    with pytest.raises(ValueError, match="'vitp_object_detection'.*'segmentation'"):
        convert_checkpoint(detector, tmp_path / "target", "segmentation")


def test_feature_pyramid_has_no_original_layout(tmp_path):
    config = ViTPObjectDetectionConfig(
        backbone_config=ViTPFeaturePyramidConfig(**VISION_16, pyramid_channels=8), neck_channels=8, head_hidden_size=8
    )
    ViTPForObjectDetection(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="ViT-Adapter"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", "original")
