"""A tiny model with random weights: what the app opens when there is no other, so that it always starts."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration, ViTPImageProcessor, ViTPProcessor

SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
SPECIAL += ["<ref>", "</ref>", "<box>", "</box>"]


def tiny_model(seed: int = 0) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """A ViT of 3 layers for 112 pixels, a language model of 2 layers, a tokenizer of bytes. What it says is noise."""
    tokenizer = _byte_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = ViTPConfig(
        vision_config={
            "image_size": [112, 112],
            "patch_size": [14, 14],
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            **special,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTPForConditionalGeneration(config)
    image_processor = ViTPImageProcessor(size={"height": 112, "width": 112}, max_patches=6)
    return model, ViTPProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1], additional_special_tokens=SPECIAL[2:]
    )
