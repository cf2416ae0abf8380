"""Registry of model types: one declaration makes a type known everywhere."""

import json

import pytest
import torch
from dense_data import tiny_backbone
from transformers import PreTrainedConfig, pipeline

import modeling_vitp
from modeling_vitp import (
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    convert_checkpoint,
)
from modeling_vitp.auto.registry import MODELS, ModelEntry, find_model, register_model
from modeling_vitp.evaluation.robustness import open_scorer
from modeling_vitp.hub.upload import gather_contents
from modeling_vitp.tasks.robustness_arguments import RobustnessArguments


class CloudConfig(ViTPSegmentationConfig):
    model_type = "clouds"


class CloudModel(ViTPForSemanticSegmentation):
    config: CloudConfig
    config_class = CloudConfig


SETTINGS = {"interaction_layers": [[0, 0], [1, 1], [2, 2], [3, 3]], "deformable_heads": 2, "spatial_prior_channels": 8}
ENTRY = ModelEntry(
    "clouds",
    "AutoModelForSemanticSegmentation",
    "image-segmentation",
    "clouds = CloudModel('{repo}')",
    CloudModel,
    ViTPSegmentationImageProcessor,
    "A model of clouds on {paper}.",
    layout="segmentation",
    task="segmentation",
    metric="mean_iou",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "clouds", ENTRY)  # removed after the test
    register_model(ENTRY)
    torch.manual_seed(0)
    model = CloudModel.from_backbone(tiny_backbone(), num_labels=2, backbone_kwargs=SETTINGS)
    model.save_pretrained(tmp_path / "clouds")
    ViTPSegmentationImageProcessor().save_pretrained(tmp_path / "clouds")
    return tmp_path / "clouds"


def test_declared_type_is_registered_everywhere(folder, tmp_path):
    pipe = pipeline("image-segmentation", model=str(folder))
    assert type(pipe.model) is CloudModel

    contents = gather_contents("model", folder, "org/clouds")
    card = contents.files["README.md"].decode()
    assert "A model of clouds on [ViTP" in card and "clouds = CloudModel('org/clouds')" in card
    assert contents.card.data.pipeline_tag == "image-segmentation" and "model.safetensors" in contents.files

    with pytest.raises(ValueError, match="no record"):
        open_scorer(str(folder), RobustnessArguments(models=[str(folder)], output_dir=str(tmp_path / "out")))

    with pytest.raises(ValueError, match="'original'.*adapter"):
        convert_checkpoint(folder, tmp_path / "original", "original", license="mit")
    spread = convert_checkpoint(
        folder, tmp_path / "bands", license="mit", input_spec={"band_names": ["VV", "VH"], "window": [-25, 0]}
    )
    assert CloudModel.from_pretrained(spread).config.backbone_config.num_channels == 2
    adapter = convert_checkpoint(folder, tmp_path / "adapter", "adapter", license="mit")
    assert json.loads((adapter / "config.json").read_text())["model_type"] == "vitp_adapter"


def test_public_configurations_are_registered():
    public = [getattr(modeling_vitp, name) for name in dir(modeling_vitp)]
    types = {item.model_type for item in public if isinstance(item, type) and issubclass(item, PreTrainedConfig)}
    assert len(types) >= 11
    for model_type in types:
        entry = find_model(model_type)
        assert entry.model_class.config_class.model_type == entry.model_type == model_type
        assert entry.push_as == "model" or model_type == "vitp_vision"  # exported instead


def test_unknown_type_is_named():
    for model_type in (None, "bert"):
        with pytest.raises(ValueError, match=repr(model_type)):
            find_model(model_type)
        assert model_type not in MODELS
