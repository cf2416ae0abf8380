"""Exports in words that transformers 4 reads, too. It is not installed here: the files are held to what it asks for."""

import json

import pytest
import torch
from internvl_checkpoints import assert_same, load_weights
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from modeling_vitp import ViTPForConditionalGeneration, convert_checkpoint
from modeling_vitp.convert.internvl import rope_of_version_4


def saved(parts, folder):
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("to", ["internvl", "original"])
def test_the_tokenizer_names_a_class_and_tokens_that_version_4_knows(model_and_processor, tmp_path, to):
    source = saved(model_and_processor, tmp_path / "source")
    target = convert_checkpoint(source, tmp_path / "target", to)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in settings
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # by default token_type_ids, too
    assert {"<img>", "<IMG_CONTEXT>", "<box>"} < set(settings["additional_special_tokens"])
    # There a dictionary, and nothing else, whose names become attributes of the tokenizer.
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    assert settings.get("extra_special_tokens") == (named | {"video_token": "<video>"} if to == "internvl" else None)
    assert settings.get("processor_class") == ("InternVLProcessor" if to == "internvl" else None)

    reopened, ours = AutoTokenizer.from_pretrained(target), model_and_processor[1].tokenizer
    text = "<|im_start|>user <img><IMG_CONTEXT></img>How many <box>?<|im_end|>"
    assert reopened(text).data == ours(text).data
    assert reopened.extra_special_tokens == ours.extra_special_tokens
    assert (reopened.eos_token, reopened.pad_token) == (ours.eos_token, ours.pad_token)
    if to == "internvl":
        assert {name: getattr(reopened, name) for name in named} == named
        assert AutoProcessor.from_pretrained(target).image_token_id == model_and_processor[0].config.image_token_id


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e6, "rope_scaling": None}),
        (
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
        ),
        ({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, {}),
    ],
)
def test_the_base_of_the_positions_is_where_version_4_looks_for_it(rope, old):
    assert rope_of_version_4(rope) == old


@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_the_positions_of_an_internvl_are_said_twice_and_read_alike(model_and_processor, tmp_path, rope):
    model, processor = model_and_processor
    model.config.text_config.rope_parameters = {"rope_theta": 123.0, "rope_type": "default", **rope}
    target = convert_checkpoint(saved((model, processor), tmp_path / "source"), tmp_path / "target", "internvl")
    text_config = json.loads((target / "config.json").read_text())["text_config"]
    assert text_config["rope_theta"] == 123.0 and (text_config["rope_scaling"] or {}).get("factor") == rope.get(
        "factor"
    )
    wanted = text_config["rope_parameters"]
    assert wanted == model.config.text_config.rope_parameters
    found = AutoModelForImageTextToText.from_pretrained(target).config.text_config.rope_parameters
    assert {name: found[name] for name in wanted} == wanted
    again = ViTPForConditionalGeneration.from_pretrained(convert_checkpoint(target, tmp_path / "again"))
    assert {name: again.config.text_config.rope_parameters[name] for name in wanted} == wanted


@pytest.mark.parametrize("to", ["internvl", "original"])
def test_a_head_that_is_not_tied_survives_where_the_language_model_had_it_tied(model_and_processor, tmp_path, to):
    """transformers 5 asks the whole model's configuration, version 4 and the servers that of the language model."""
    model, processor = model_and_processor
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    model.config.text_config.tie_word_embeddings = True
    assert not model.config.tie_word_embeddings
    source = saved((model, processor), tmp_path / "source")
    target = convert_checkpoint(source, tmp_path / "target", to)
    config = json.loads((target / "config.json").read_text())
    part = {"internvl": "text_config", "original": "llm_config"}[to]
    assert config["tie_word_embeddings"] is config[part]["tie_word_embeddings"] is False
    assert torch.equal(load_weights(target)["language_model.lm_head.weight"], model.lm_head.weight)
    back = convert_checkpoint(target, tmp_path / "back")
    assert_same(load_weights(back), load_weights(source))
    opened = ViTPForConditionalGeneration.from_pretrained(back)
    assert_same(dict(opened.state_dict()), dict(model.state_dict()))
