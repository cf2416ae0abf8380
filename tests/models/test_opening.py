"""What is wrong with a checkpoint is said in one line that names the file; `tests/fuzz` has thousands of ways."""

import json

import pytest
from internvl_checkpoints import edit_json

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor, ViTPVisionConfig

MISTAKES = {
    "cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        r"/model\.safetensors cannot be read: it is damaged or cut short",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no part": (lambda folder: edit_json(folder / "config.json", text_config=None), r"config\.json has no text_config"),
    "no number": (lambda folder: edit_json(folder / "config.json", vrl_drop_ratio="x"), r"config\.json cannot be open"),
    "many layers": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=10**30),
        "no model has more than 1000",
    ),
    "a folder": (
        lambda folder: [(folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()],
        r"/model\.safetensors cannot be read",
    ),
    "shard missing": (
        lambda folder: (
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
            and (folder / "model.safetensors").unlink()
        ),
        r"index\.json cannot be read.* names b\.safetensors, which is missing",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_damaged_model_is_named(model, tmp_path, mistake):
    model.save_pretrained(tmp_path)
    damage, says = MISTAKES[mistake]
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=says) as caught:
        ViTPForConditionalGeneration.from_pretrained(tmp_path)
    assert type(caught.value) in (ValueError, OSError) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_processor_is_named(processor, tmp_path, name):
    processor.save_pretrained(tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text()[:-9])
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name} cannot be read: it is damaged or cut short"):
        ViTPProcessor.from_pretrained(tmp_path)


def test_a_folder_without_a_processor_is_named_with_the_files_that_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} has no processor: none of processor_config\.json, "):
        ViTPProcessor.from_pretrained(tmp_path)


def test_what_no_file_is_to_blame_for_stays_as_it_is(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="flash|Flash"):
        ViTPForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    config = ViTPVisionConfig.from_pretrained(tmp_path)
    assert config.hidden_size == json.loads((tmp_path / "config.json").read_text())["vision_config"]["hidden_size"]
