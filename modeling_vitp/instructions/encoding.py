"""A conversation to the tokens and tiles of a sample, as the processor makes them, but without merging and checking its
settings for every sample, which takes as long as a small image's resize.

What is not as it usually is in training is left to the processor, and so are all errors.
"""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from ..messages import IMAGE_TOKEN
from ..processing_vitp import OF_EACH_TOKEN, ViTPProcessor
from .raw_tiles import RawTileProcessor


class ConversationEncoder:
    """Encodes conversations one by one.

    Args:
        processor: one of which [`can_encode`] is true.
    """

    def __init__(self, processor: ViTPProcessor):
        self.processor = processor

    @staticmethod
    def can_encode(processor: ViTPProcessor) -> bool:
        """Whether the processor is of the known classes, and its tokenizer's settings neither pad nor cut."""
        settings = processor._merge_with_defaults({"add_special_tokens": False})["text_kwargs"]
        is_plain = all(name in OF_EACH_TOKEN or value in (None, False) for name, value in settings.items())
        is_known = type(processor) is ViTPProcessor and type(processor.image_processor) is RawTileProcessor
        return is_known and is_plain and processor.tokenizer.is_fast

    def __call__(
        self,
        messages: list[dict[str, Any]],
        images_kwargs: Mapping[str, Any],
        drop_ratio: float,
        apply_prob: float,
        key: tuple,
    ) -> dict[str, Any] | None:
        """The sample.

        Args:
            messages: checked, with their images in them.
            images_kwargs: for the image processor.
            drop_ratio, apply_prob, key: of the draw of visual tokens, see [`ViTPProcessor`].

        Returns:
            Arrays `(sequence_length,)`: `input_ids`, int64, `is_answer`, bool, and under VRL `position_ids`, int64; if
            there are images, their tiles as `pixel_values`, and under VRL `visual_token_indices`, int64 tensor
            `(num_kept,)`. `None` if something is not as usual.
        """
        processor, tokenizer = self.processor, self.processor.tokenizer
        parts = [
            part for message in messages if isinstance(message.get("content"), list) for part in message["content"]
        ]
        images = [part["image"] for part in parts if part["type"] == "image"]
        tiled = processor.image_processor.tiled(images, **images_kwargs)
        if tiled is None or any(message.get("tool_calls") for message in messages):
            return None
        (text,), (spans,) = render_jinja_template(
            conversations=[messages],
            chat_template=processor._resolve_chat_template(None),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        pieces, mark = text.split(IMAGE_TOKEN), processor._tokens_of_image(1)
        encoded = tokenizer([mark.join(pieces)], add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"][0], np.int64)
        found = [len(pieces) - 1, *(np.count_nonzero(ids == token) for token in processor.image_token_ids)]
        if found != [len(images)] * len(found):
            return None

        # Where answers are is said of the text without the marks of its images' starts and ends.
        is_answer, longer = np.zeros(len(ids), bool), len(mark) - len(IMAGE_TOKEN)
        image_ends = np.cumsum([len(piece) + len(IMAGE_TOKEN) for piece in pieces[:-1]]).tolist()
        starts, ends = np.array(encoded["offset_mapping"][0], np.int64).reshape(-1, 2).T
        for span in spans:
            start, end = (place + longer * bisect_right(image_ends, place) for place in span)
            is_answer |= (starts < end) & (ends > start)

        tiles, num_tiles = tiled
        kept, by_image = processor._draw(num_tiles, drop_ratio, apply_prob, key)
        is_image, counts, full = ids == processor.image_token_id, np.ones_like(ids), np.ones_like(ids)
        counts[is_image], full[is_image] = [len(local) for local, _ in by_image], [number for _, number in by_image]
        sample = {"input_ids": ids.repeat(counts), "is_answer": is_answer.repeat(counts)}
        if drop_ratio > 0:
            sample["position_ids"] = (full.cumsum() - full).repeat(counts)
        if tiles:
            sample["pixel_values"] = tiles
            if drop_ratio > 0:
                sample["position_ids"][is_image.repeat(counts)] += np.concatenate([local for local, _ in by_image])
                sample["visual_token_indices"] = kept
        return sample
