"""Number of tokens of a row, counted without decoding its images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from trl.data_utils import prepare_multimodal_messages

from ..data.rows import image_size
from ..image_processing_vitp import ViTPImageProcessor
from ..processing_vitp import ViTPProcessor
from ..vrl import num_language_tokens
from .collator import ViTPDataCollator
from .rows import SourceSettings, images_of, place_images


@dataclass
class SampleLength:
    """Counter of the tokens of a row after the drop. Images are not decoded; only their headers are read.

    The length of an invalid row is 0. VRL's warm-up and the last steps, without dropped patches, are ignored. With
    `vrl_apply_prob` below 1, the length is the average.

    Args:
        processor, max_length, vrl_drop_ratio, vrl_apply_prob, patch_drop_ratio, source_settings: see
            [`ViTPDataCollator`].
    """

    processor: ViTPProcessor
    max_length: int | None = None
    vrl_drop_ratio: float = 0.0
    vrl_apply_prob: float = 1.0
    patch_drop_ratio: float = 0.0
    source_settings: Mapping[str, SourceSettings] | None = None

    @classmethod
    def of(cls, collator: ViTPDataCollator) -> "SampleLength":
        """Return a counter with the settings of a collator."""
        return cls(**{name: getattr(collator, name) for name in cls.__dataclass_fields__})

    def __call__(self, example: dict[str, Any]) -> int:
        try:
            settings = (self.source_settings or {}).get(example.get("source"), SourceSettings())
            num_tokens = self.num_tokens(example["messages"], images_of(example), settings)
        except (ValueError, TypeError, KeyError, OSError, TemplateError):
            return 0  # The collator raises the error.
        if self.max_length is None:
            return num_tokens
        return min(num_tokens, self.max_length)

    def num_tokens(
        self,
        messages: list[dict[str, Any]],
        images: list,
        settings: SourceSettings,
    ) -> int:
        """Return the number of tokens of a sample after the drop, averaged over the draws of `vrl_apply_prob`."""
        tiles = num_tiles(images, settings, self.processor.image_processor)
        tokens_of_tile = self.processor.image_seq_length
        num_visible = num_language_tokens(sum(tiles), tokens_of_tile, 0.0, self.patch_drop_ratio)
        num_kept = num_language_tokens(sum(tiles), tokens_of_tile, self.vrl_drop_ratio, self.patch_drop_ratio)
        mean_visual = round(self.vrl_apply_prob * num_kept + (1 - self.vrl_apply_prob) * num_visible)

        messages = settings.with_system_prompt(place_images(messages))
        messages = prepare_multimodal_messages(messages, images=images)
        tokenizer = self.processor.tokenizer
        text = tokenizer.apply_chat_template(messages, chat_template=self.processor.template(), tokenize=False)
        num_text = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        # Each image adds a start and an end token, and replaces one placeholder token of the text.
        return num_text + len(images) + mean_visual


def num_tiles(images: list, settings: SourceSettings, image_processor: ViTPImageProcessor) -> list[int]:
    """Return the number of tiles of each image of a sample, thumbnails included, from the headers of its images."""
    if settings.image_size is None:
        sizes = [image_size(image) for image in images]
    else:
        sizes = [(settings.image_size, settings.image_size)] * len(images)
    return image_processor.num_tiles(sizes, settings.images_kwargs)
