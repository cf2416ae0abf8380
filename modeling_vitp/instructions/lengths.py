"""How long a sample is, from the headers of its images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl.data_utils import prepare_multimodal_messages

from ..image_processing_vitp import ViTPImageProcessor
from ..messages import place_images
from ..processing_vitp import ViTPProcessor
from ..vrl import num_kept_tokens
from .collator import ViTPDataCollator
from .rows import image_size, images_of
from .settings import SourceSettings


@dataclass
class SampleLength:
    """The number of tokens that a row has after the drop, from the headers of its images: none is decoded.

    Of a row that the collator will refuse it is 0, and in VRL's warm-up what it will be afterwards. With
    `vrl_apply_prob` below 1 the visual tokens count on average.

    Args:
        processor, max_length, vrl_drop_ratio, vrl_apply_prob, source_settings: as for [`ViTPDataCollator`].
    """

    processor: ViTPProcessor
    max_length: int | None = None
    vrl_drop_ratio: float = 0.0
    vrl_apply_prob: float = 1.0
    source_settings: Mapping[str, SourceSettings] | None = None

    @classmethod
    def of(cls, collator: ViTPDataCollator) -> "SampleLength":
        """Measures what this collator will make of a row."""
        return cls(**{name: getattr(collator, name) for name in cls.__dataclass_fields__})

    def __call__(self, example: dict[str, Any]) -> int:
        try:
            return self._measure(example)
        except (ValueError, TypeError, KeyError, OSError):
            return 0  # the collator names the row and what is wrong with it

    def _measure(self, example: dict[str, Any]) -> int:
        settings = (self.source_settings or {}).get(example.get("source"), SourceSettings())
        images = images_of(example)
        num_tokens = self.num_tokens(example["messages"], images, settings)
        return num_tokens if self.max_length is None else min(num_tokens, self.max_length)

    def num_tokens(self, messages: list[dict[str, Any]], images: list, settings: SourceSettings) -> int:
        """Tokens of a sample that the language model sees, on average over the draws of `vrl_apply_prob`."""
        num_visual = self.processor.image_seq_length * sum(self.num_tiles(images, settings))
        num_kept = num_kept_tokens(num_visual, self.vrl_drop_ratio)
        num_kept = round(self.vrl_apply_prob * num_kept + (1 - self.vrl_apply_prob) * num_visual)

        messages = settings.with_system_prompt(place_images(messages))
        messages = prepare_multimodal_messages(messages, images=images)
        tokenizer = self.processor.tokenizer
        text = tokenizer.apply_chat_template(messages, chat_template=self.processor.chat_template, tokenize=False)
        # Each image has a start and an end token, and its place in the text is a token that goes.
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + len(images) + num_kept

    def num_tiles(self, images: list, settings: SourceSettings) -> list[int]:
        """Tiles of each image of a sample, thumbnails included."""
        return num_tiles(images, settings, self.processor.image_processor)


def num_tiles(images: list, settings: SourceSettings, image_processor: ViTPImageProcessor) -> list[int]:
    """Tiles of each image of a sample, thumbnails included, from the headers of its images."""
    sizes = [image_size(image) if settings.image_size is None else (settings.image_size,) * 2 for image in images]
    return image_processor.num_tiles(sizes, settings.images_kwargs)
