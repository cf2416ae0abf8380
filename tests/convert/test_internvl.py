"""transformers' InternVL in our classes."""

import json

import pytest
import torch
from datasets import load_dataset
from internvl_oracle import build_native
from safetensors.torch import load_file
from tiny_models import VISION
from transformers import InternVLForConditionalGeneration, InternVLVisionConfig

from modeling_vitp import (
    ViTPAdapter,
    ViTPBackbone,
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
    export_backbone,
)
from modeling_vitp.convert.internvl import from_internvl, internvl_processor
from modeling_vitp.training.loading import load_checkpoint


def test_the_processor_of_internvl_has_the_tokens_of_its_images_whatever_the_configuration_states(
    tmp_path, model, processor
):
    """transformers' own configuration does not compute them: 256 stands there unless somebody set them."""
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


def test_training_starts_from_our_own_conversion_to_internvl(tmp_path, model, processor, data_folder):
    """transformers' processor needs a video token, which makes the tokenizer longer than the model's embeddings."""
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    convert_checkpoint(tmp_path / "vitp", tmp_path / "native", "internvl")
    started, found = load_checkpoint(str(tmp_path / "native"))
    assert len(found.tokenizer) == started.get_input_embeddings().num_embeddings
    text = "How many <IMG_CONTEXT> trees? <video> 12<|im_end|>"
    assert found.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    config = ViTPTrainingConfig(tmp_path / "run", max_steps=1, use_cpu=True, bf16=False, report_to="none")
    rows = load_dataset(str(data_folder), split="train")
    ViTPTrainer(started, config, train_dataset=rows, processing_class=found).train()


@pytest.mark.parametrize("given", ["alone", "with our configuration"])
@pytest.mark.parametrize("model_class", [ViTPForConditionalGeneration, ViTPModel, ViTPVisionModel])
def test_a_folder_of_transformers_internvl_is_an_error_with_the_command_that_makes_it_ours(
    tmp_path, model, model_class, given
):
    """Opened under InternVL's names, 27 parameters of the language model, or all of the ViT's, would be random."""
    build_native(model).save_pretrained(tmp_path / "native")
    options = {}
    if given == "with our configuration":
        options["config"] = model.config.vision_config if model_class is ViTPVisionModel else model.config
    with pytest.raises(ValueError, match=rf"vitp convert {tmp_path / 'native'} FOLDER"):
        model_class.from_pretrained(tmp_path / "native", **options)

    convert_checkpoint(
        tmp_path / "native", tmp_path / "ours", to="backbone" if model_class is ViTPVisionModel else "vitp"
    )
    opened, report = model_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    wanted = {ViTPModel: model.model, ViTPVisionModel: model.model.vision_tower}.get(model_class, model)
    assert {name: value.tolist() for name, value in opened.state_dict().items()} == {
        name: value.tolist() for name, value in wanted.state_dict().items()
    }
    # What is saved has the names that a model has in memory, so that a run's trainer finds them again.
    opened.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == wanted.state_dict().keys()


@pytest.mark.parametrize("model_class", [ViTPVisionModel, ViTPBackbone, ViTPAdapter])
def test_a_whole_model_is_not_taken_for_its_vit(tmp_path, model, model_class):
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=rf"vitp export_backbone {tmp_path / 'whole'} FOLDER"):
        model_class.from_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="vitp convert"):
        (tmp_path / "original").mkdir()
        (tmp_path / "original" / "config.json").write_text('{"model_type": "internvl_chat"}')
        model_class.from_pretrained(tmp_path / "original")


def test_a_vit_is_not_taken_for_a_whole_model(tmp_path, model):
    export_backbone(model.model.vision_tower, tmp_path / "backbone")
    with pytest.raises(ValueError, match="without the language model"):
        ViTPForConditionalGeneration.from_pretrained(tmp_path / "backbone")


def test_a_chat_template_of_its_own_is_told_not_to_come_along(tmp_path, model, processor, caplog):
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    native = convert_checkpoint(tmp_path / "vitp", tmp_path / "native", "internvl")
    question = [{"role": "user", "content": "How many trees are there?"}]
    plain = ViTPProcessor.from_pretrained(convert_checkpoint(native, tmp_path / "plain"))
    assert "chat template" not in caplog.text
    template = native / "chat_template.jinja"
    template.write_text("{{ '<|im_start|>system\\nYou are a radiologist.<|im_end|>\\n' }}" + template.read_text())
    of_another = ViTPProcessor.from_pretrained(convert_checkpoint(native, tmp_path / "again"))
    assert f"{native} has a chat template of its own, which does not come along" in caplog.text
    rendered = {one.apply_chat_template(question, add_generation_prompt=True) for one in (processor, plain, of_another)}
    assert rendered == {"<|im_start|>user\nHow many trees are there?<|im_end|>\n<|im_start|>assistant\n"}


@torch.no_grad()
def test_configurations_of_transformers_own_model_make_ours_and_stay_as_they_are(model, processor):
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


def test_the_configuration_of_transformers_own_vit_makes_a_classifier():
    config = InternVLVisionConfig(**VISION)
    classifier = ViTPForImageClassification(ViTPImageClassificationConfig(backbone_config=config, num_labels=2))
    assert type(classifier.config.backbone_config) is ViTPVisionConfig and config.model_type == "internvl_vision"
    assert classifier.backbone(torch.zeros(1, 3, 56, 56)).pooler_output.shape == (1, 32)
