"""Settings of models in mappings: what their configurations have is taken, and nothing else."""

import json
import re

import pytest
import yaml
from huggingface_hub.errors import StrictDataclassError
from paths import ROOT
from tiny_models import FROM_SCRATCH, TEXT, VISION, VISION_16
from transformers import DFineConfig, LlavaConfig, Qwen2Config

from modeling_vitp import (
    ViTPAdapterConfig,
    ViTPForObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPObjectDetectionConfig,
    ViTPSegmentationConfig,
    ViTPVisionConfig,
)
from modeling_vitp.command.errors import MISTAKE, explain
from modeling_vitp.configuration_vitp import known_keys
from modeling_vitp.training.arguments import BackboneArguments
from modeling_vitp.training.fine_tuning import check_start
from modeling_vitp.training.loading import check_config, check_from_scratch

CLASSES = [ViTPVisionConfig, ViTPSegmentationConfig, ViTPObjectDetectionConfig, Qwen2Config]


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda cls: cls.__name__)
def test_what_a_configuration_saves_are_keys_of_it(config_class, tmp_path):
    config_class().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved = {name: value for name, value in saved.items() if name != "backbone_config"}
    assert "model_type" in saved and "dtype" in known_keys(config_class)
    check_config("head", saved, config_class)


@pytest.mark.parametrize("key", ["id2label", "num_labels", "torch_dtype", "hidden_size", "out_features", "model_type"])
def test_inherited_derived_and_other_names_of_fields_pass(key):
    check_config("backbone", {key: None}, ViTPAdapterConfig)
    if key != "out_features":
        check_config("head", {key: None}, DFineConfig)


def test_a_part_of_a_part_is_looked_at():
    part = {"text_config": {"model_type": "qwen2", "num_hiden_layers": 2}}
    with pytest.raises(ValueError, match=r"^text\.text_config: there is no 'num_hiden_layers'; did you mean 'num_"):
        check_config("text", part, LlavaConfig)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"vision_config": VISION | {"num_hiden_layers": 2}},
            r"\.vision_config: .*'num_hiden_.*'num_hidden_layers'\?",
        ),
        ({"text_config": TEXT | {"num_hiden_layers": 2}}, r"\.text_config: .*'num_hiden_.*'num_hidden_layers'\?"),
        (
            {"text_config": {"model_type": "qwn2"}},
            r"\.text_config: there is no model_type 'qwn2'; .*'qwen2'",
        ),
        ({"text_config": TEXT | {"zzz": 2}}, r"\.text_config: there is no 'zzz'; its keys are those of Qwen2Config\."),
        ({"image_processor": {"max_patch": 1}}, r"\.image_processor: .*'max_patch'; did you mean 'max_patches'\?"),
        ({"image_processor": {"size": 1}}, r"\.image_processor: there is no 'size'"),
        ({"vision_config": 24}, r"\.vision_config='24' is no mapping"),
        ({"vision_config": None}, ": there is no vision_config, and"),
    ],
)
def test_a_mistyped_key_from_scratch_is_an_error(changed, says):
    check_from_scratch(FROM_SCRATCH)
    check_from_scratch(FROM_SCRATCH | {"text_config": {"rope_parameters": {"rope_theta": 100.0}, "rope_theta": 1.0}})
    with pytest.raises(ValueError, match=f"^from_scratch{says}"):
        check_from_scratch(FROM_SCRATCH | changed)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"from_scratch": {"num_hiden_layers": 4}}, "from_scratch: .*'num_hiden_.*'; did you mean 'num_hidden_layers'"),
        ({"backbone": {"deformable_head": 4}}, "backbone: .*'deformable_head'; did you mean 'deformable_heads'"),
        (
            {"backbone": {"deformable_heads": 4}, "neck": "pyramid"},
            "backbone: .*'deformable_heads'; its keys are those of ViTPFeaturePyramidConfig",
        ),
        ({"head": {"neck_chanels": 32}}, "head: there is no 'neck_chanels'; did you mean 'neck_channels'"),
        ({"head": {"id2label": {0: "tree"}}}, "head: there is no 'id2label'"),
    ],
)
def test_a_mistyped_key_of_fine_tuning_is_an_error(settings, says):
    args = {"from_scratch": VISION_16, "backbone": {"deformable_heads": 4}, "head": {"neck_channels": 16}}
    check_start(ViTPForObjectDetection, BackboneArguments(**args))
    with pytest.raises(ValueError, match=f"^{says}"):
        check_start(ViTPForObjectDetection, BackboneArguments(**args | {"backbone": None} | settings))


def test_random_weights_are_not_scored():
    args = BackboneArguments(from_scratch=VISION_16)
    with pytest.raises(ValueError, match="do_train is false.*give model_name_or_path"):
        check_start(ViTPForSemanticSegmentation, args, do_train=False)
    trained = BackboneArguments(model_name_or_path="trained", from_scratch={})
    check_start(ViTPForSemanticSegmentation, trained, do_train=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"deformable_heads": 5}, r"deformable_heads=5 .* width of 8 .*backbone: \{deformable_heads: 4\}"),
        ({"deformable_heads": 0}, r"deformable_heads=0 .* width of 8 .*backbone: \{deformable_heads: 1\}"),
        ({"spatial_prior_norm": "none"}, "spatial_prior_norm='none' is neither"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
    ],
)
def test_a_value_that_a_configuration_refuses_is_a_mistake_and_no_failure(settings, says):
    with pytest.raises(StrictDataclassError) as caught:
        ViTPAdapterConfig(**VISION_16 | {"deformable_heads": 4} | settings)
    what, remedy, status = explain(caught.value)
    assert status == MISTAKE and remedy is None
    assert re.search(says, what), what


def test_the_configurations_of_the_package_have_no_other_keys():
    checked = 0
    for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        if "vocab_size" in (settings.get("from_scratch") or {}):
            check_from_scratch(settings["from_scratch"])
            checked += 1
        elif {"neck", "head", "backbone"} & {*settings}:
            names = {name: settings.get(name) for name in ("from_scratch", "backbone", "head")}
            names |= {"neck": settings.get("neck", "adapter")}
            start = {} if names["from_scratch"] else {"model_name_or_path": "backbone"}
            model_class = ViTPForObjectDetection if "image_size" in settings else ViTPForSemanticSegmentation
            check_start(model_class, BackboneArguments(**names, **start))
            checked += 1
    assert checked >= 5
