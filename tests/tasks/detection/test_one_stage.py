"""Tests of the detectors of transformers in the recipe, on small data sets of rectangles."""

import json

import numpy as np
import pytest
import torch
import yaml
from detection_data import NAMES, write_coco
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

from modeling_vitp import ViTPAdapter
from modeling_vitp.recipes import predict_large
from modeling_vitp.recipes.finetune_detection import main
from modeling_vitp.tasks.detection.one_stage import DETECTORS
from modeling_vitp.training.freezing import layer_decay_groups

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
TINY |= {"image_size": [64, 64], "patch_size": [16, 16], "attention_bias": True}
NECK = {"deformable_heads": 4, "spatial_prior_channels": 8}
HEAD = {"d_model": 32, "num_queries": 10, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 2}
HEAD |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1}
HYBRID = {"decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32}
HEADS = {"rt_detr_v2": HEAD | HYBRID, "d_fine": HEAD | HYBRID, "deformable_detr": HEAD | {"d_model": 64}}


def configure(folder, detector, **more) -> list[str]:
    splits = {}
    for split, names in (("train", ["a_001", "a_002", "a_003", "a_005"]), ("test", ["b_101", "b_102"])):
        write_coco(folder / split, names)
        splits[split] = {"images": f"{split}/images", "annotations": f"{split}/instances.json"}
    data = {"root": str(folder), "format": "coco", "classes": NAMES, "splits": splits}
    settings = {
        "output_dir": str(folder / "out"),
        "detector": detector,
        "test_split": "test",
        "image_size": 64,
        "keep_ratio": False,
        "from_scratch": TINY,
        "backbone": NECK,
        "head": HEADS.get(detector),
        "max_steps": 2,
        "lr_milestones": [1.0],
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "num_pictures": 1,
        "bf16": False,
        "report_to": "none",
        "data": data | more.pop("data", {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | more))
    return ["--config", str(folder / "config.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_one_stage_detector_trains_and_loads(tmp_path, detector):
    assert main(configure(tmp_path, detector)) == 0
    out = tmp_path / "out"
    assert (out / "watch" / "step-000000.png").is_file()
    assert "test_map_50" in json.loads((out / "metrics.json").read_text())["test"]
    assert "import modeling_vitp" in (out / "README.md").read_text()

    model, report = AutoModelForObjectDetection.from_pretrained(out, output_loading_info=True)
    image_processor = AutoImageProcessor.from_pretrained(out)
    assert type(model) is DETECTORS[detector][0] and type(image_processor) is DETECTORS[detector][1]
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(NAMES))
    assert isinstance(model.model.backbone.model, ViTPAdapter)
    path = tmp_path / "test" / "images" / "b_101.png"
    found = pipeline("object-detection", model=model, image_processor=image_processor)(str(path), threshold=0.0)

    # The pipeline equals the model on the stretched and normalized image.
    pixels = np.array(Image.open(path).resize((64, 64), Image.Resampling.BILINEAR)) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        logits = model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]).logits
    assert found[0]["score"] == pytest.approx(logits.sigmoid().max().item(), abs=1e-3)

    # A second run scores the model of the first run without training.
    again = {"output_dir": str(tmp_path / "again"), "from_scratch": None, "model_name_or_path": str(out)}
    assert main(configure(tmp_path, detector, **again, do_train=False)) == 0
    scores = [json.loads((tmp_path / name / "metrics.json").read_text())["test"] for name in ("out", "again")]
    assert scores[0]["test_map_50"] == scores[1]["test_map_50"]


def tiny_model(detector):
    torch.manual_seed(0)
    model_class, _ = DETECTORS[detector]
    vision = {"model_type": "vitp_adapter", **TINY, **NECK}
    backbone = ViTPAdapter.config_class(**vision, out_features=["stride8", "stride16", "stride32"])
    widths = {} if detector == "deformable_detr" else {"encoder_in_channels": [32] * 3}
    return model_class(model_class.config_class(backbone_config=backbone, **HEADS[detector], **widths))


@pytest.mark.parametrize("detector", DETECTORS)
def test_each_trained_weight_has_a_gradient(detector):
    """Data-parallel training waits for the gradient of every weight that is trained."""
    model = tiny_model(detector).train()
    box = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    model(pixel_values=torch.randn(2, 3, 64, 64), labels=[box, box]).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []


@pytest.mark.parametrize("detector", ["rt_detr_v2", "deformable_detr"])
def test_large_image_equals_its_windows(tmp_path, detector):
    """Check adjacent windows of 48 pixels that are resized to 64 pixels."""
    model = tiny_model(detector).eval()
    size = {"height": 64, "width": 64}
    image_processor = DETECTORS[detector][1](size=size, do_normalize=True, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    model.save_pretrained(tmp_path / "model")
    image_processor.save_pretrained(tmp_path / "model")
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8))
    scene.save(tmp_path / "scene.png")
    words = [str(tmp_path / "model"), str(tmp_path / "scene.png"), "--output", str(tmp_path / "objects.json")]
    words += ["--window", "48", "--stride", "48", "--threshold", "0", "--nms_threshold", "1", "--device", "cpu"]
    assert predict_large.main(words) == 0
    annotations = json.loads((tmp_path / "objects.json").read_text())["annotations"]
    found = np.array([[*one["bbox"], one["score"]] for one in annotations])

    expected = []
    for left in (0, 48):
        inputs = image_processor(scene.crop((left, 0, left + 48, 48)), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        (one,) = image_processor.post_process_object_detection(outputs, 0.0, target_sizes=[(48, 48)])
        for score, (x1, y1, x2, y2) in zip(one["scores"].tolist(), one["boxes"].tolist()):
            expected.append([x1 + left, y1, x2 - x1, y2 - y1, score])
    expected = np.array(expected)
    assert len(found) == len(expected) >= 20
    np.testing.assert_allclose(np.sort(found[:, 4]), np.sort(expected[:, 4]), atol=1e-4)
    np.testing.assert_allclose(np.sort(found, 0), np.sort(expected, 0), atol=5e-3)


@pytest.mark.parametrize("detector", DETECTORS)
def test_only_vit_layers_have_decayed_rates(detector):
    model = tiny_model(detector)
    vit = {id(part) for part in model.model.backbone.model.encoder.parameters()}
    vit |= {id(part) for part in model.model.backbone.model.embeddings.parameters() if part.requires_grad}
    groups = layer_decay_groups(model, 1.0, 0.1, 0.9, 4)
    slowed = {id(part) for group in groups if group["lr"] < 1 for part in group["params"]}
    assert slowed == vit


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"task": "oriented"}, "detector='rt_detr_v2' .*task='oriented'"),
        ({"keep_ratio": True}, "keep_ratio: false"),
        ({"image_size": 48}, "image_size.* 32 .*48"),
        ({"data": {"input_spec": {"bands": [1, 1, 1]}}}, "input_spec"),
    ],
)
def test_bad_one_stage_settings_are_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(configure(tmp_path, "rt_detr_v2", **more))


def test_model_of_other_detector_is_refused(tmp_path):
    model_class, processor_class = DETECTORS["d_fine"]
    model_class.config_class().save_pretrained(tmp_path / "other")
    processor_class().save_pretrained(tmp_path / "other")
    start = {"from_scratch": None, "model_name_or_path": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="'d_fine'"):
        main(configure(tmp_path, "rt_detr_v2", **start))
