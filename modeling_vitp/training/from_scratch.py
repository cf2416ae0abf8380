"""A small tokenizer, and a model and processor around it, when there are no pretrained weights to start from."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..configuration_vitp import ViTPConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import ViTPForConditionalGeneration
from ..processing_vitp import ViTPProcessor

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = [TURN_START, "<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "</ref>", "<box>", "</box>"]


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on `texts`, with the special tokens of Qwen2.5 and InternVL2.5. Deterministic.

    All bytes are in it whatever `vocab_size` is; without texts there is nothing else.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN_END, *MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PAD, additional_special_tokens=MARKS
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, vision_config: dict, text_config: dict, image_processor: dict | None = None
) -> tuple[ViTPForConditionalGeneration, ViTPProcessor]:
    """Randomly initialised model and its processor; vocabulary and special token ids come from the tokenizer."""
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = ViTPConfig(
        vision_config=vision_config,
        text_config={"model_type": "qwen2", **text_config, "vocab_size": len(tokenizer), **special},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        **special,
    )
    height, width = config.vision_config.image_size
    processor = ViTPProcessor(
        ViTPImageProcessor(size={"height": height, "width": width}, **(image_processor or {})),
        tokenizer,
        image_seq_length=config.image_seq_length,
    )
    return ViTPForConditionalGeneration(config), processor
