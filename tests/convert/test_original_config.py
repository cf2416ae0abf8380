"""Configurations of the original code."""

import json

import pytest
from internvl_checkpoints import FIXTURE, native_model

from modeling_vitp import convert_checkpoint
from modeling_vitp.convert.original_config import text_from_original, text_to_original


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_the_language_models_configuration_is_said_in_old_and_new_words(rope):
    llm_config = json.loads((FIXTURE / "config.json").read_text())["llm_config"] | rope
    config = text_from_original(llm_config)
    assert config.rope_parameters["rope_theta"] == rope["rope_theta"]
    assert config.rope_parameters["rope_type"] == (rope["rope_scaling"] or {}).get("rope_type", "default")
    back = text_to_original(config)
    assert (back["rope_theta"], back["rope_scaling"]) == (rope["rope_theta"], rope["rope_scaling"])
    assert back["architectures"] == ["Qwen2ForCausalLM"]
    for name in ("hidden_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "num_key_value_heads"):
        assert getattr(config, name) == llm_config[name] == back[name]
    assert not hasattr(config, "torchscript")


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"use_mean_pooling": False}, "use_mean_pooling=False, but only True"),
        ({"projection_dropout": 0.1}, "projection_dropout=0.1"),
        (
            {"image_size": [56, 28], "patch_size": [14, 7]},
            r"image_size=\[56, 28\], but the original code needs a square",
        ),
        ({"image_size": [56, 112]}, r"image_size=\[56, 112\] has 4 x 8 patches"),
    ],
)
def test_what_the_original_code_cannot_say_is_refused(tmp_path, vision, message):
    native_model(vision).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
