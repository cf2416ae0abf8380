import json

import numpy as np
import pytest
import torch
from launching import run_without_package
from pictures import picture
from safetensors.torch import save_file
from tiny_models import VISION
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from modeling_vitp import (
    ViTPForImageClassification,
    ViTPImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
    resize_backbone,
)

KINDS = {"one": "single_label_classification", "several": "multi_label_classification"}
NAMES = {0: "field", 1: "forest", 2: "water"}


@pytest.fixture
def vision():
    torch.manual_seed(0)
    return ViTPVisionModel(ViTPVisionConfig(**VISION)).eval()


def head_of(model: ViTPForImageClassification, features: torch.Tensor) -> torch.Tensor:
    """Compute LayerNorm and the linear layer step by step."""
    centered = features - features.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed @ model.classifier.weight.T + model.classifier.bias


def test_class_names_are_sorted_by_index(vision):
    shuffled = {index: NAMES[index] for index in (2, 0, 1)}
    for names in (shuffled, json.loads(json.dumps(NAMES))):
        config = ViTPForImageClassification.from_backbone(vision, id2label=names).config
        assert [*config.id2label.items()] == [*NAMES.items()]
        assert config.label2id == {"field": 0, "forest": 1, "water": 2}
    with pytest.raises(ValueError, match="num_labels"):
        ViTPForImageClassification.from_backbone(vision, id2label=["a", "b"], num_labels=5)


@torch.no_grad()
def test_logits_are_linear_in_pooled_tokens(vision):
    images = torch.randn(2, 3, 56, 70)
    tokens = vision(images).last_hidden_state
    for pooling, pooled in (("mean", tokens[:, 1:].mean(1)), ("cls", tokens[:, 0])):
        model = ViTPForImageClassification.from_backbone(vision, id2label=NAMES, pooling=pooling).eval()
        outputs = model(images, output_hidden_states=True)
        torch.testing.assert_close(outputs.logits, head_of(model, pooled), rtol=1e-4, atol=1e-5)
        assert len(outputs.hidden_states) == 4 and model(images).hidden_states is None


def test_loss_is_cross_entropy_or_binary(vision):
    images = torch.randn(4, 3, 56, 56)
    one = ViTPForImageClassification.from_backbone(vision, id2label=NAMES).eval()
    labels = torch.tensor([0, 2, 1, 2])
    outputs = one(images, labels=labels)
    log_shares = outputs.logits.log_softmax(-1)
    torch.testing.assert_close(outputs.loss, -log_shares[range(4), labels].mean())
    outputs.loss.backward()
    assert [name for name, weight in one.named_parameters() if weight.grad is None] == []

    several = {"problem_type": "multi_label_classification"}
    many = ViTPForImageClassification.from_backbone(vision, id2label=NAMES, **several).eval()
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).float()
    outputs = many(images, labels=labels)
    shares = outputs.logits.sigmoid()
    torch.testing.assert_close(outputs.loss, -(labels * shares.log() + (1 - labels) * (1 - shares).log()).mean())
    assert many(images, labels=labels.long()).loss == outputs.loss
    is_known = torch.rand(labels.shape) < 0.5
    losses = -(labels * shares.log() + (1 - labels) * (1 - shares).log())
    loss = many(images, labels=labels.where(is_known, -100)).loss
    torch.testing.assert_close(loss, losses[is_known].mean())
    assert many(images, labels=torch.full_like(labels, -100)).loss == 0


def test_classifier_starts_from_exported_backbone(vision, tmp_path):
    export_backbone(vision.to(torch.bfloat16), tmp_path / "backbone")
    arguments = {"id2label": NAMES, "image_size": 84, "backbone_kwargs": {"drop_path_rate": 0.3}}
    torch.manual_seed(5)
    model = ViTPForImageClassification.from_backbone(tmp_path / "backbone", **arguments)
    assert (model.config.id2label, model.config.label2id) == (NAMES, {"field": 0, "forest": 1, "water": 2})
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.backbone.encoder.layer[-1].drop_path.drop_prob == 0.3
    assert model.config.backbone_config.image_size == [84, 84]
    for name, weight in resize_backbone(vision.float(), image_size=84).state_dict().items():
        torch.testing.assert_close(model.backbone.state_dict()[name], weight, msg=name)
    torch.manual_seed(5)
    again = ViTPForImageClassification.from_backbone(vision, **arguments)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, msg=name)
    own = ViTPImageProcessor.from_backbone(tmp_path / "backbone")
    assert own.size == ViTPImageProcessor.from_pretrained(tmp_path / "backbone").size == {"height": 56, "width": 56}


@pytest.fixture
def saved(vision, tmp_path):
    """Folder with a single-label model `one`, a multi-label model `several` and an image; and expected outputs."""
    expected = {"images": torch.randn(1, 3, 56, 56)}
    image = picture(50, 40)
    image.save(tmp_path / "image.png")
    for name, kind in KINDS.items():
        model = ViTPForImageClassification.from_backbone(vision, id2label=NAMES, problem_type=kind).eval()
        model.save_pretrained(tmp_path / name)
        processor = ViTPImageProcessor(size={"height": 56, "width": 56}, input_spec={"gamma": 0.5})
        processor.save_pretrained(tmp_path / name)
        # Computed by hand: brightened by the spec, resampled, normalized.
        pixels = 255 * (torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255).sqrt()
        pixels = F.interpolate(pixels[None], (56, 56), mode="bicubic", antialias=True).clamp(0, 255) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            expected[name] = model(expected["images"]).logits
            logits = model((pixels - mean[:, None, None]) / std[:, None, None]).logits[0]
        expected[f"{name} scores"] = logits.softmax(-1) if name == "one" else logits.sigmoid()
    save_file(expected, tmp_path / "expected.safetensors")
    return tmp_path, expected


@torch.no_grad()
def test_auto_classes_and_pipelines_open_saved_models(saved, monkeypatch):
    monkeypatch.delattr("builtins.input")  # asks for remote code
    folder, expected = saved
    for name, kind in KINDS.items():
        again = AutoModelForImageClassification.from_pretrained(folder / name).eval()
        assert type(again) is ViTPForImageClassification and again.config.problem_type == kind
        assert again.config.id2label == NAMES and isinstance(again.config.backbone_config, ViTPVisionConfig)
        assert type(AutoImageProcessor.from_pretrained(folder / name)) is ViTPImageProcessor
        assert torch.equal(again(expected["images"]).logits, expected[name])
        found = pipeline("image-classification", model=str(folder / name))(str(folder / "image.png"))
        scores = {one["label"]: one["score"] for one in found}
        scores = torch.tensor([scores[label] for label in NAMES.values()])
        torch.testing.assert_close(scores, expected[f"{name} scores"], rtol=1e-4, atol=1e-5)


def test_other_head_size_needs_option(vision, tmp_path):
    model = ViTPForImageClassification.from_backbone(vision, id2label=NAMES)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="shapes differ"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5)
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert fresh.classifier.weight.shape == (5, vision.config.hidden_size)
    kept = fresh.backbone.state_dict() | {"layernorm": fresh.layernorm.weight}
    wanted = vision.state_dict() | {"layernorm": model.layernorm.weight}
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


SCRIPT = """
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
expected = load_file("expected.safetensors")
for name in ("one", "several"):
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True).eval()
    AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["images"]).logits, expected[name])
    found = pipeline("image-classification", model=name, trust_remote_code=True)("image.png")
    scores = {one["label"]: one["score"] for one in found}
    scores = torch.tensor([scores[label] for label in ("field", "forest", "water")])
    torch.testing.assert_close(scores, expected[name + " scores"], rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_saved_models_open_without_this_package(saved):
    run_without_package(SCRIPT, saved[0])
