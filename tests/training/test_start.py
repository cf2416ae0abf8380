"""The model that a training starts from."""

import pytest
import torch
from pictures import picture
from tiny_models import FROM_SCRATCH, TEXT, VISION
from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLForConditionalGeneration, Qwen2Config
from trl import ModelConfig

from modeling_vitp import ViTPForConditionalGeneration
from modeling_vitp.training.loading import build_tokenizer, check_options, load_start


def test_a_transformers_internvl_checkpoint_is_a_start(tmp_path):
    tokenizer = build_tokenizer(["How many trees?"], 320)
    config = InternVLConfig(
        vision_config=VISION,
        text_config=Qwen2Config(**{**TEXT, "vocab_size": len(tokenizer)}).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    native = InternVLForConditionalGeneration(config).eval()
    native.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    GotOcr2ImageProcessor(size={"height": 56, "width": 56}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)

    model, processor = load_start(ModelConfig(model_name_or_path=str(tmp_path)), None, [], drop_path_rate=0.1)
    assert isinstance(model, ViTPForConditionalGeneration)
    assert [layer.drop_path.drop_prob for layer in model.model.vision_tower.encoder.layer] == [0.0, 0.05, 0.1]
    assert list(processor.image_processor.image_mean) == [0.4, 0.5, 0.6]
    inputs = processor(images=picture(130, 60), text="<IMG_CONTEXT>How many trees?", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, native(**inputs).logits)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_from_scratch_has_the_attention_that_is_asked_for(implementation):
    model, _ = load_start(ModelConfig(attn_implementation=implementation), FROM_SCRATCH, ["How many? 3 trees"])
    parts = (model.config, model.config.vision_config, model.config.text_config)
    assert {part._attn_implementation for part in parts} == {implementation}


def test_a_model_of_another_kind_is_refused(tmp_path):
    Qwen2Config(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'qwen2' model"):
        load_start(ModelConfig(model_name_or_path=str(tmp_path)), None, [])


def test_weights_that_do_not_fit_the_configuration_are_refused(model_and_processor, tmp_path):
    model, processor = model_and_processor
    del model.model.vision_tower.encoder.layer[0].lambda_1
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing_keys.*lambda_1"):
        load_start(ModelConfig(model_name_or_path=str(tmp_path)), None, [])


@pytest.mark.parametrize(
    ("options", "from_scratch", "kwargs", "message"),
    [
        ({"load_in_4bit": True}, None, None, "load_in_4bit: weights are trained as they are.*leave that out"),
        ({"load_in_8bit": True, "use_peft": True}, None, None, "load_in_8bit: weights"),
        ({"bnb_4bit_quant_type": "fp4"}, None, None, "bnb_4bit_quant_type: weights"),
        ({"use_bnb_nested_quant": True}, None, None, "use_bnb_nested_quant: weights"),
        ({"dtype": "bfloat16"}, FROM_SCRATCH, None, "dtype='bfloat16' is of a model that is loaded; one from_scratch"),
        ({}, None, {"attn_implementation": "eager"}, "model_init_kwargs .*give dtype, attn_implementation and"),
    ],
    ids=str,
)
def test_options_of_the_model_that_would_change_nothing_are_refused(options, from_scratch, kwargs, message):
    with pytest.raises(ValueError, match=message):
        check_options(ModelConfig(**options), from_scratch, kwargs)
    check_options(ModelConfig(dtype="bfloat16", use_peft=True), None)
    check_options(ModelConfig(), FROM_SCRATCH, None)
