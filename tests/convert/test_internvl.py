"""Conversion of transformers' InternVL to our classes."""

import json

import pytest
import torch
from datasets import load_dataset
from internvl_checkpoints import assert_same, load_weights
from internvl_oracle import build_native
from safetensors.torch import load_file
from tiny_models import VISION
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
)

from modeling_vitp import (
    ViTPConfig,
    ViTPForConditionalGeneration,
    ViTPForImageClassification,
    ViTPImageClassificationConfig,
    ViTPModel,
    ViTPProcessor,
    ViTPTrainer,
    ViTPTrainingConfig,
    ViTPVisionConfig,
    ViTPVisionModel,
    convert_checkpoint,
)
from modeling_vitp.convert.internvl import from_internvl, internvl_processor, rope_of_version_4
from modeling_vitp.pretraining.loading import load_checkpoint


def test_image_seq_length_is_computed(tmp_path, model, processor):
    """The configuration of transformers does not compute `image_seq_length`, and has 256 unless it was set."""
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    convert_checkpoint(tmp_path / "vitp", tmp_path / "native", "internvl")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps(config | {"image_seq_length": 256}))
    native = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native")
    assert native.config.image_seq_length == 256
    converted = from_internvl(native)
    assert internvl_processor(tmp_path / "native").image_seq_length == converted.config.image_seq_length == 4
    assert all(torch.equal(value, converted.state_dict()[name]) for name, value in model.state_dict().items())


def test_training_starts_from_internvl_conversion(tmp_path, model, processor, data_folder):
    """The processor of transformers needs a video token, for which the model has no embedding."""
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    convert_checkpoint(tmp_path / "vitp", tmp_path / "native", "internvl")
    started, found = load_checkpoint(str(tmp_path / "native"))
    assert len(found.tokenizer) == started.get_input_embeddings().num_embeddings
    text = "How many <IMG_CONTEXT> trees? <video> 12<|im_end|>"
    assert found.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no", "report_to": "none"}
    config = ViTPTrainingConfig(tmp_path / "run", use_cpu=True, bf16=False, **settings)
    rows = load_dataset(str(data_folder), split="train")
    ViTPTrainer(started, config, train_dataset=rows, processing_class=found).train()


@pytest.mark.parametrize("model_class", [ViTPForConditionalGeneration, ViTPModel, ViTPVisionModel])
def test_internvl_folder_is_refused_with_command(tmp_path, model, model_class):
    """Under InternVL's names, 27 parameters of the language model, or all of the ViT's, would be random."""
    build_native(model).save_pretrained(tmp_path / "native")
    ours = model.config.vision_config if model_class is ViTPVisionModel else model.config
    for options in ({}, {"config": ours}):
        with pytest.raises(ValueError, match=rf"vitp convert {tmp_path / 'native'} FOLDER"):
            model_class.from_pretrained(tmp_path / "native", **options)

    to = "backbone" if model_class is ViTPVisionModel else "vitp"
    convert_checkpoint(tmp_path / "native", tmp_path / "ours", to=to)
    opened, report = model_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    wanted = {ViTPModel: model.model, ViTPVisionModel: model.model.vision_tower}.get(model_class, model)
    assert_same(dict(opened.state_dict()), dict(wanted.state_dict()))
    # Saved names are those in memory, so that a trainer can resume.
    opened.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == wanted.state_dict().keys()


def test_foreign_chat_template_is_replaced_with_warning(tmp_path, model, processor, caplog):
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    native = convert_checkpoint(tmp_path / "vitp", tmp_path / "native", "internvl")
    question = [{"role": "user", "content": "How many trees are there?"}]
    plain = ViTPProcessor.from_pretrained(convert_checkpoint(native, tmp_path / "plain"))
    assert "chat template" not in caplog.text
    template = native / "chat_template.jinja"
    template.write_text("{{ '<|im_start|>system\\nYou are a radiologist.<|im_end|>\\n' }}" + template.read_text())
    of_another = ViTPProcessor.from_pretrained(convert_checkpoint(native, tmp_path / "again"))
    assert f"The chat template of {native} is replaced" in caplog.text
    rendered = {one.apply_chat_template(question, add_generation_prompt=True) for one in (processor, plain, of_another)}
    assert rendered == {"<|im_start|>user\nHow many trees are there?<|im_end|>\n<|im_start|>assistant\n"}


@torch.no_grad()
def test_transformers_configurations_are_converted(model, processor):
    native = build_native(model).eval()
    native.set_attn_implementation("eager")
    inputs = processor(text="How many trees are there?", return_tensors="pt")
    logits = native(**inputs).logits
    config = native.config
    made = ViTPConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_id=config.image_token_id,
        projector_hidden_act=config.projector_hidden_act,
    )
    assert type(made.vision_config) is ViTPVisionConfig and made.vision_config.model_type == "vitp_vision"
    ours = ViTPForConditionalGeneration(made).eval()
    ours.load_state_dict(native.state_dict())
    torch.testing.assert_close(ours(**inputs).logits, logits)
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "eager"
    assert torch.equal(native(**inputs).logits, logits) and config.vision_config.model_type == "internvl_vision"


def test_transformers_vit_configuration_makes_classifier():
    config = InternVLVisionConfig(**VISION)
    classifier = ViTPForImageClassification(ViTPImageClassificationConfig(backbone_config=config, num_labels=2))
    assert type(classifier.config.backbone_config) is ViTPVisionConfig and config.model_type == "internvl_vision"
    assert classifier.backbone(torch.zeros(1, 3, 56, 56)).pooler_output.shape == (1, 32)


def saved(parts, folder):
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("to", ["internvl", "original"])
def test_tokenizer_config_is_for_version_4(model_and_processor, tmp_path, to):
    source = saved(model_and_processor, tmp_path / "source")
    target = convert_checkpoint(source, tmp_path / "target", to)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in settings
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # the default has token_type_ids
    assert {"<img>", "<IMG_CONTEXT>", "<box>"} < set(settings["additional_special_tokens"])
    # In version 4 this is a dictionary whose keys become attributes of the tokenizer.
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


def test_rope_of_version_4_has_no_layer_types():
    assert rope_of_version_4({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}) == {}


@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_rope_is_written_for_both_versions(model_and_processor, tmp_path, rope):
    model, processor = model_and_processor
    model.config.text_config.rope_parameters = {"rope_theta": 123.0, "rope_type": "default", **rope}
    target = convert_checkpoint(saved((model, processor), tmp_path / "source"), tmp_path / "target", "internvl")
    text_config = json.loads((target / "config.json").read_text())["text_config"]
    old_rope = {**rope, "type": "linear"} if rope else None
    assert (text_config["rope_theta"], text_config["rope_scaling"]) == (123.0, old_rope)
    wanted = text_config["rope_parameters"]
    assert wanted == model.config.text_config.rope_parameters
    found = AutoModelForImageTextToText.from_pretrained(target).config.text_config.rope_parameters
    assert {name: found[name] for name in wanted} == wanted
    again = ViTPForConditionalGeneration.from_pretrained(convert_checkpoint(target, tmp_path / "again"))
    assert {name: again.config.text_config.rope_parameters[name] for name in wanted} == wanted


@pytest.mark.parametrize("to", ["internvl", "original"])
def test_untied_head_survives_a_tied_language_model(model_and_processor, tmp_path, to):
    """Version 5 reads the setting of the whole model, version 4 and the servers that of the language model."""
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
