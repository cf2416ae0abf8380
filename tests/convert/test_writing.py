"""What comes along with the weights: processor, tokenizer, generation."""

import json

import pytest
import torch
from internvl_checkpoints import assert_same, load_weights, native_model, save_original
from pictures import picture
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor, convert_checkpoint
from modeling_vitp.training.loading import build_tokenizer, check_compatible

NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


@pytest.fixture
def internvl_repo(tmp_path):
    """A checkpoint as transformers' own come: model, processor and generation configuration."""
    tokenizer = build_tokenizer(["How many trees are there? There are 12."], vocab_size=320)
    vocab_size = len(tokenizer)
    folder = tmp_path / "repo"
    model = native_model(vocab_size=vocab_size, image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    model.generation_config.update(eos_token_id=[1, 0], max_new_tokens=9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", model_specific_special_tokens=NAMED_TOKENS)
    size = {"height": 56, "width": 56}
    image_processor = GotOcr2ImageProcessor(size=size, max_patches=5, image_mean=[0.4, 0.5, 0.6], image_std=[0.2] * 3)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    InternVLProcessor(
        image_processor, tokenizer, InternVLVideoProcessor(size=size), image_seq_length=4, chat_template=template
    ).save_pretrained(folder)
    return folder


def test_processor_and_generation_come_along(internvl_repo, tmp_path):
    vitp = convert_checkpoint(internvl_repo, tmp_path / "vitp")
    native = AutoProcessor.from_pretrained(internvl_repo)
    processor = AutoProcessor.from_pretrained(vitp)
    model = ViTPForConditionalGeneration.from_pretrained(vitp)
    assert type(processor) is ViTPProcessor
    assert processor.image_processor.max_patches == 5
    assert "generation" in processor.chat_template
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == ([1, 0], 9)
    assert (processor.image_token_id, processor.image_seq_length) == (model.config.image_token_id, 4)
    # The video token has no embedding: a text with it must not become an index beyond the end.
    assert len(native.tokenizer) == len(processor.tokenizer) + 1 == model.config.text_config.vocab_size + 1
    assert max(processor.tokenizer("A <video> of trees")["input_ids"]) < model.config.text_config.vocab_size
    check_compatible(model, processor)

    back = convert_checkpoint(vitp, tmp_path / "internvl", "internvl")
    assert not list(back.glob("*.py"))
    reopened = AutoProcessor.from_pretrained(back)
    assert type(reopened) is InternVLProcessor
    assert reopened.chat_template == processor.chat_template
    assert reopened.tokenizer.get_vocab() == native.tokenizer.get_vocab()
    assert (back / "generation_config.json").read_bytes() == (internvl_repo / "generation_config.json").read_bytes()
    assert "auto_map" not in (back / "tokenizer_config.json").read_text()
    image, text = picture(130, 60), "<IMG_CONTEXT>How many trees are there?"
    wanted = native(images=image, text=text, return_tensors="pt")
    for other in (processor, reopened):
        found = other(images=image, text=text, return_tensors="pt")
        assert found["pixel_values"].shape == (3, 3, 56, 56)
        for name in ("input_ids", "attention_mask", "pixel_values"):
            assert torch.equal(found[name], wanted[name]), name

    again = convert_checkpoint(back, tmp_path / "again")
    assert (again / "tokenizer.json").read_text() == (vitp / "tokenizer.json").read_text()


def test_messages_are_read_alike_by_our_processor_and_transformers(model_and_processor, tmp_path):
    model, processor = model_and_processor
    model.save_pretrained(tmp_path / "vitp")
    processor.save_pretrained(tmp_path / "vitp")
    native = AutoProcessor.from_pretrained(convert_checkpoint(tmp_path / "vitp", tmp_path / "internvl", "internvl"))
    content = [{"type": "image", "image": picture(130, 60)}, {"type": "text", "text": "How many trees?"}]
    chat = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found, wanted = (each.apply_chat_template(chat, **options) for each in (native, processor))
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(found[name], wanted[name]), name


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Of the class that original checkpoints name."""
    trained = build_tokenizer(["How many trees are there? There are 12."], vocab_size=320)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        model["vocab"], merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"extra_special_tokens": trained.extra_special_tokens})
    assert tokenizer.get_vocab() == trained.get_vocab()
    return tokenizer


def test_an_original_checkpoint_with_its_tokenizer(tmp_path):
    tokenizer = qwen_tokenizer()
    source = save_original(native_model(vocab_size=len(tokenizer)), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    # As on the Hub: with code that is not needed, and is not run.
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (source / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 0], "_from_model_config": true}')

    vitp = convert_checkpoint(source, tmp_path / "vitp")
    processor, model = AutoProcessor.from_pretrained(vitp), ViTPForConditionalGeneration.from_pretrained(vitp)
    assert model.config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert processor.image_processor.max_patches == 6  # max_dynamic_patch
    assert processor.image_processor.size["height"] == 56
    assert model.generation_config.eos_token_id == [1, 0]
    check_compatible(model, processor)
    inputs = processor(images=picture(130, 60), text="<IMG_CONTEXT>How many?", return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 3
    assert model(**inputs).logits.isfinite().all()

    back = convert_checkpoint(vitp, tmp_path / "back", "original")
    assert not list(back.glob("*.py"))
    assert {"vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json"} <= {path.name for path in back.iterdir()}
    settings = json.loads((back / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in settings and "<img>" in settings["additional_special_tokens"]
    text = "<img><IMG_CONTEXT></img>How many <|im_end|>"
    reopened = AutoTokenizer.from_pretrained(back)
    assert reopened.get_vocab() == tokenizer.get_vocab()
    assert reopened(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert json.loads((back / "added_tokens.json").read_text())["<IMG_CONTEXT>"] == processor.image_token_id
    (back / "tokenizer.json").unlink()  # as published: for the slow class alone
    again = convert_checkpoint(back, tmp_path / "again")
    assert_same(load_weights(again), load_weights(vitp))
    assert (again / "config.json").read_text() == (vitp / "config.json").read_text()
    slow = AutoProcessor.from_pretrained(again).tokenizer
    assert slow.get_vocab() == tokenizer.get_vocab()
    assert slow(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("settings", "max_patches"),
    [
        ({"dynamic_image_size": False, "use_thumbnail": False}, 1),
        ({"max_dynamic_patch": 12}, 12),
    ],
)
def test_tiling_of_the_original_code_comes_along(tmp_path, settings, max_patches):
    source = save_original(native_model(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | settings
    (source / "config.json").write_text(json.dumps(config))
    folder = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    assert json.loads((folder / "preprocessor_config.json").read_text())["max_patches"] == max_patches


@pytest.mark.parametrize("to", ["internvl", "original"])
def test_an_input_spec_that_the_target_would_ignore_is_refused(model_and_processor, tmp_path, to):
    model, processor = model_and_processor
    processor.image_processor.input_spec = {"gamma": 0.5}
    model.save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="which .* cannot say: its users would misread the images"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    backbone = convert_checkpoint(tmp_path / "source", tmp_path / "backbone", "backbone")
    assert json.loads((backbone / "preprocessor_config.json").read_text())["input_spec"] == {"gamma": 0.5}
