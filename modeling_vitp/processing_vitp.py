"""Processor that converts images and chat text to token sequences already shortened by VRL."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from .conversations import (
    CHAT_TEMPLATE,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    ChatProcessor,
    message_images,
    number_answers,
)
from .image_processing_vitp import ViTPImageProcessor
from .opening import naming, without_remote_code
from .vrl import (
    KeptTokens,
    check_apply_prob,
    check_drop_ratio,
    draw_kept_tokens,
    draw_visible_tokens,
    flat_indices,
    keyed_generator,
    positions_after_drop,
)


class ViTPProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {
        "images_kwargs": {"crop_to_patches": True},
        "text_kwargs": {"padding_side": "left"},  # generation continues at the right end of every row
    }


class ViTPProcessor(ChatProcessor):
    r"""Processor that combines an image processor and a tokenizer, with Visual Robustness Learning (VRL).

    Args:
        image_processor ([`ViTPImageProcessor`]):
            Image processor that cuts images into tiles. Its `max_patches` is the tile budget of one *sample*, which its
            images share evenly. A thumbnail is added to every image that is cut.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer with the tokens `<img>`, `</img>` and `<IMG_CONTEXT>`. Its padding side is set to the left,
            because pipelines read it from the tokenizer.
        image_seq_length (`int`, defaults to 256):
            Visual tokens of one tile, [`ViTPConfig`]'s `image_seq_length`.
        chat_template (`str`, *optional*):
            Chat template. Defaults to ChatML with `{% generation %}` markers around the answers.
    """

    valid_processor_kwargs = ViTPProcessorKwargs
    images_kwargs = ViTPProcessorKwargs._defaults["images_kwargs"]
    text_kwargs = ViTPProcessorKwargs._defaults["text_kwargs"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a processor, as in transformers.

        Raises:
            ValueError: if a file, which is named, is damaged or missing, or code is needed without `trust_remote_code`.
        """
        with naming(pretrained_model_name_or_path, cls):
            processor = without_remote_code(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
            if processor.tokenizer.pad_token_id is None:
                raise ValueError("tokenizer_config.json has no pad_token")
            return processor

    def __init__(
        self,
        image_processor: ViTPImageProcessor | None = None,
        tokenizer=None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.image_seq_length = image_seq_length
        self.image_token = IMAGE_TOKEN
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in IMAGE_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer lacks the tokens {', '.join(missing)}. Add them with "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': {missing}}}) and resize the model's "
                "token embeddings."
            )
        self.check_template()
        tokenizer.padding_side = self.text_kwargs["padding_side"]
        self.image_token_id = vocabulary[IMAGE_TOKEN]
        self.start_image_token_id = vocabulary[IMAGE_START_TOKEN]
        self.end_image_token_id = vocabulary[IMAGE_END_TOKEN]

    @property
    def image_token_ids(self) -> list[int]:
        return [self.image_token_id, self.start_image_token_id, self.end_image_token_id]

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "position_ids", "visual_token_indices"]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        vrl_drop_ratio: float | None = None,
        vrl_apply_prob: float | None = None,
        vrl_keys: list | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""Prepare images and texts for the model.

        Args:
            images: one image, a list, or a list of images for each text. PIL images, arrays or tensors of any depth
                and number of bands (see [`InputSpec`]), paths or URLs.
            text: one text or a batch; `<IMG_CONTEXT>` marks the position of an image.
            vrl_drop_ratio (`float`, *optional*, defaults to 0):
                r in [0, 1). Each sample keeps a uniformly random subset X of all its visual tokens S, over tiles and
                images together, in order, with |X| = ceil((1 - r) * |S|).
            vrl_apply_prob (`float`, *optional*, defaults to 1):
                Probability, for each sample, that VRL is applied to it.
            vrl_keys (`list`, *optional*):
                Random seed of each text, for example `(seed, sample_id, epoch)`: the kept tokens of a sample depend on
                its key alone. Defaults to torch's global generator.
            kwargs: options of the tokenizer (`padding`, `return_tensors` …) and of the image processor (`max_patches`,
                `input_spec` …). `padding_side` defaults to `"left"`, regardless of the tokenizer's own, because
                `generate` would otherwise continue after the padding of the shorter rows.

        Returns:
            [`~transformers.BatchFeature`]: `input_ids` and `attention_mask`, `(batch_size, sequence_length)`, with one
            image token for each kept visual token; `pixel_values`, float32
            `(num_tiles, channels, height, width)`, all tiles of the batch. With r > 0 also `position_ids`, int64 like
            `input_ids`, with the positions in the full sequence (gaps at dropped tokens, 0 at padding), and, if there
            are images, `visual_token_indices`, int64 `(num_kept,)`: ascending flat indices over the batch's tiles times
            tokens per tile.

        Raises:
            ValueError: if the numbers of images and of their positions differ, a text has a literal image token,
                truncation would cut image tokens, an option is out of range, or videos or audio are passed.
        """
        vrl_drop_ratio = check_drop_ratio(vrl_drop_ratio or 0.0)
        vrl_apply_prob = check_apply_prob(1.0 if vrl_apply_prob is None else vrl_apply_prob)
        if images is None and text is None:
            raise ValueError("Expected `images`, `text` or both, got neither.")
        for modality in ("videos", "audio"):
            if kwargs.get(modality) is not None:  # transformers ignores it without a warning
                raise ValueError(f"Expected `images` and `text`, got {modality}. Pass frames of a video as `images`.")
        merged = self._merge_with_defaults(kwargs)
        text_kwargs = merged["text_kwargs"]
        images_kwargs = merged["images_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        if text is None:
            images_kwargs["return_tensors"] = return_tensors or "pt"
            return self.image_processor(images, **images_kwargs)
        images_kwargs["return_tensors"] = None  # tiles are stacked once, below

        texts = [text] if isinstance(text, str) else list(text)
        images_of_sample = self._images_by_sample(images, texts)
        if vrl_keys is None:
            vrl_keys = [None] * len(texts)
        if len(vrl_keys) != len(texts):
            raise ValueError(f"Expected {len(texts)} vrl_keys, one for each text, got {len(vrl_keys)}.")

        tiles, num_tiles_of_sample = self._tile_samples(images_of_sample, images_kwargs)
        visual_token_indices = []
        kept_of_sample = []
        first_token = 0  # index of the first visual token of the sample in the batch
        for num_tiles, key in zip(num_tiles_of_sample, vrl_keys):
            num_tokens = [number * self.image_seq_length for number in num_tiles]
            indices, kept_of_image = draw_kept_tokens(num_tokens, vrl_drop_ratio, vrl_apply_prob, key)
            visual_token_indices.append(indices + first_token)
            kept_of_sample.append(kept_of_image)
            first_token += sum(num_tokens)

        data, positions = self._encode_texts(texts, kept_of_sample, merged)
        if tiles:
            data["pixel_values"] = torch.stack(tiles)
        if vrl_drop_ratio > 0:
            data["position_ids"] = positions
            if tiles:
                data["visual_token_indices"] = torch.cat(visual_token_indices)
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _encode_texts(
        self,
        texts: list[str],
        kept_of_sample: list[list[KeptTokens]],
        merged: dict[str, Any],
    ) -> tuple[dict[str, Any], list[list[int]]]:
        """Return the tokenizer's outputs for texts with their kept image tokens, and the positions of the tokens.

        Args:
            kept_of_sample: kept tokens of each image of each text.
            merged: settings of the call.
        """
        text_kwargs = merged["text_kwargs"]
        wants_mask = text_kwargs.pop("return_attention_mask", None)
        if wants_mask is None:
            wants_mask = "attention_mask" in self.tokenizer.model_input_names
        wants_offsets = text_kwargs.pop(
            "return_text_replacement_offsets", merged.get("return_text_replacement_offsets", False)
        )
        text_kwargs.pop("return_mm_token_type_ids", None)

        image_texts = []
        for kept_of_image in kept_of_sample:
            for kept_tokens in kept_of_image:
                image_texts.append(tokens_of_image(len(kept_tokens)))
        texts, replacement_offsets = self.get_text_with_replacements(texts, image_texts)
        data = dict(self.tokenizer(texts, return_attention_mask=True, **text_kwargs))
        positions = []
        for row, kept_of_image in enumerate(kept_of_sample):
            row_positions = positions_of(
                self,
                data["input_ids"][row],
                data["attention_mask"][row],
                kept_of_image,
                row,
            )
            positions.append(row_positions.tolist())

        if not wants_mask:
            del data["attention_mask"]
        if wants_offsets:
            data["text_replacement_offsets"] = replacement_offsets
        if merged.get("return_mm_token_type_ids"):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        return data, positions

    def _merge_with_defaults(self, kwargs: dict) -> dict[str, dict]:
        """Merge the settings of a call with those of the tokenizer (except its padding side) and the defaults."""
        settings = dict(self.tokenizer.init_kwargs)
        settings.pop("padding_side", None)
        return self._merge_kwargs(ViTPProcessorKwargs, tokenizer_init_kwargs=settings, **kwargs)

    def replace_image_token(
        self,
        image_inputs: dict,
        image_idx: int,
        **kwargs,
    ) -> str:
        """Return the text of a tiled image without VRL, for serving engines."""
        return tokens_of_image(image_inputs["num_patches"][image_idx] * self.image_seq_length)

    def _images_by_sample(self, images: ImageInput | None, texts: list[str]) -> list[list]:
        """Assign images to texts by the number of image tokens in each text."""
        # Image tokens are replaced by themselves, to count them as transformers does.
        marks = [self.image_token] * sum(text.count(self.image_token) for text in texts)
        expected = [0] * len(texts)
        if marks:
            _, offsets_of_sample = self.get_text_with_replacements(list(texts), marks)
            expected = [len(offsets) for offsets in offsets_of_sample]
        return assign_images(images, expected)

    def _tile_samples(
        self,
        images_of_sample: list[list],
        images_kwargs: Mapping[str, Any],
    ) -> tuple[list[torch.Tensor], list[list[int]]]:
        """Return the tiles of all samples, and their number for each image of each sample.

        Raises:
            ValueError: if an image is invalid. The message names the sample.
        """
        tiles = []
        num_tiles_of_sample = []
        for row, images in enumerate(images_of_sample):
            try:
                sample_tiles, num_tiles = self._tile(images, images_kwargs)
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(f"Images of sample {row} of the batch: {error}") from error
            tiles += sample_tiles
            num_tiles_of_sample.append(num_tiles)
        return tiles, num_tiles_of_sample

    def _tile(
        self,
        images: list,
        images_kwargs: Mapping[str, Any],
    ) -> tuple[list[torch.Tensor], list[int]]:
        """Return the tiles of the images of one sample, within its tile budget, and their number for each image."""
        if not images:
            return [], []
        tiles = self.image_processor([images], **images_kwargs)
        return tiles["pixel_values"], tiles["num_patches"]

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[list[int]] | None = None,
        **kwargs,
    ) -> MultiModalData:
        """Return the numbers of tiles and tokens of each image of one sample without VRL, for serving engines.

        Args:
            image_sizes: height and width of each image in pixels. The images share the sample's tile budget.
            kwargs: options of the image processor (`max_patches` …).

        Returns:
            `num_image_patches`, tiles including the thumbnail; `num_image_tokens`, without the start and end tokens.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_with_defaults(kwargs)["images_kwargs"]
        num_tiles = self.image_processor.num_tiles([tuple(size) for size in image_sizes], images_kwargs)
        num_tokens = [tiles * self.image_seq_length for tiles in num_tiles]
        return MultiModalData(num_image_tokens=num_tokens, num_image_patches=num_tiles)

    def encode_conversation(
        self,
        messages: list[dict[str, Any]],
        images_kwargs: Mapping[str, Any] | None = None,
        vrl_drop_ratio: float = 0.0,
        vrl_apply_prob: float = 1.0,
        vrl_key: tuple | None = None,
        patch_drop_ratio: float = 0.0,
    ) -> dict[str, Any]:
        """Encode one conversation for training, and number its answers.

        The result equals that of [`apply_chat_template`] for a batch of one, but the options are neither merged nor
        validated, which would take as long as resizing a small image.

        Args:
            messages: messages that pass [`check_messages`], with the `image` in each image part.
            images_kwargs: options of the image processor.
            vrl_drop_ratio, vrl_apply_prob, vrl_key: see [`ViTPProcessor.__call__`].
            patch_drop_ratio: share of the visual tokens of each tile whose patches are dropped before the ViT. VRL
                drops tokens of the others. Both ratios are of all tokens: VRL drops more only if its ratio is larger.

        Returns:
            Arrays `(sequence_length,)` of int64: `input_ids`; `answers`, the number of each token's answer, from 1, or
            0 outside of answers; and with a drop `position_ids`. If there are images, their tiles as a list,
            `pixel_values`, and with a drop `visual_token_indices`, an int64 tensor `(num_kept,)`. If patches are
            dropped, also `visible_token_indices`, an int64 tensor `(num_tiles, num_visible)`, see [`ViTPModel`].
        """
        text, spans = self.render(messages)
        (images,) = self._images_by_sample(message_images(messages), [text])
        options = {**self.images_kwargs, "return_tensors": None, **(images_kwargs or {})}
        tiles, num_tiles = self._tile(images, options)
        num_tokens = [number * self.image_seq_length for number in num_tiles]
        visible_tokens = None
        visible_indices = None
        if patch_drop_ratio > 0:
            generator = None if vrl_key is None else keyed_generator(*vrl_key, "patches")
            visible_tokens = draw_visible_tokens(sum(num_tiles), self.image_seq_length, patch_drop_ratio, generator)
            visible_indices = flat_indices(visible_tokens, self.image_seq_length)
        visual_token_indices, kept_of_image = draw_kept_tokens(
            num_tokens, vrl_drop_ratio, vrl_apply_prob, vrl_key, visible_indices
        )

        # Each image is tokenized as one token, which is then repeated.
        text_to_tokenize = text.replace(IMAGE_TOKEN, tokens_of_image(1))
        data = self.tokenizer(text_to_tokenize, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(data["input_ids"], np.int64)
        starts, ends = np.array(data["offset_mapping"], np.int64).reshape(-1, 2).T
        answers = number_answers(text, spans, starts, ends)
        counts = np.ones_like(ids)
        counts[ids == self.image_token_id] = [len(kept_tokens) for kept_tokens in kept_of_image]
        ids = ids.repeat(counts)
        positions = positions_of(self, ids, np.ones_like(ids), kept_of_image, 0)

        encoded = {"input_ids": ids, "answers": answers.repeat(counts)}
        has_drop = vrl_drop_ratio > 0 or patch_drop_ratio > 0
        if has_drop:
            encoded["position_ids"] = positions
        if tiles:
            encoded["pixel_values"] = tiles
            if has_drop:
                encoded["visual_token_indices"] = visual_token_indices
            if patch_drop_ratio > 0:
                encoded["visible_token_indices"] = visible_tokens
        return encoded


def tokens_of_image(number: int) -> str:
    """Return the text of an image with a number of visual tokens."""
    return IMAGE_START_TOKEN + IMAGE_TOKEN * number + IMAGE_END_TOKEN


def positions_of(
    processor: "ViTPProcessor",
    input_ids: list[int],
    attention_mask: list[int],
    kept_of_image: list[KeptTokens],
    row: int,
) -> np.ndarray:
    """Return the positions of the kept tokens of one row in its full sequence; 0 at padding."""
    ids = np.array(input_ids, np.int64)
    is_real = np.array(attention_mask, bool)
    image_tokens = np.flatnonzero(ids == processor.image_token_id)
    image_starts = np.flatnonzero(ids == processor.start_image_token_id)
    image_ends = np.flatnonzero(ids == processor.end_image_token_id)
    num_images = len(kept_of_image)
    num_kept = sum(len(kept_tokens) for kept_tokens in kept_of_image)
    # Truncation on the left may cut the start of an image whose tokens are all kept.
    if len(image_tokens) != num_kept or len(image_ends) != num_images or len(image_starts) > num_images:
        raise ValueError(
            f"Sample {row} of the batch needs {num_kept} image tokens, {num_images} '{IMAGE_START_TOKEN}' and "
            f"{num_images} '{IMAGE_END_TOKEN}', but has {len(image_tokens)}, {len(image_starts)} and "
            f"{len(image_ends)}. Either truncation cut them: raise max_length, lower max_patches or raise "
            "vrl_drop_ratio. Or its text has a literal image token: remove it, and mark the position of an image "
            f"with '{IMAGE_TOKEN}' or, in chat messages, {{'type': 'image'}}."
        )
    return positions_after_drop(image_tokens, image_ends, is_real, kept_of_image)


def assign_images(images: ImageInput | None, expected: list[int]) -> list[list]:
    """Assign images to the samples of a batch.

    Args:
        images: images of all samples, or a list of images for each sample.
        expected: number of images of each sample.

    Raises:
        ValueError: if there are more or fewer images.
    """
    if is_nested(images):
        check_counts([len(sample_images) for sample_images in images], expected)
        return [list(sample_images) for sample_images in images]

    if images is None:
        images = []
    elif not isinstance(images, (list, tuple)):
        is_batch = getattr(images, "ndim", 0) == 4
        images = list(images) if is_batch else [images]
    if len(images) != sum(expected):
        raise ValueError(
            f"Expected {sum(expected)} image(s) for the {IMAGE_TOKEN} tokens in the text ({expected} by sample of the "
            f"batch), got {len(images)}. Write {IMAGE_TOKEN} in the text once for each image, or use "
            "`apply_chat_template`."
        )
    images_of_sample = []
    start = 0
    for number in expected:
        images_of_sample.append(list(images[start : start + number]))
        start += number
    return images_of_sample


def check_counts(counts: list[int], expected: list[int]) -> None:
    """Raise a `ValueError` unless each sample has as many images as image tokens."""
    if len(counts) != len(expected):
        raise ValueError(
            f"Expected a list of images for each of {len(expected)} texts, got {len(counts)}: row by row, the "
            f"{IMAGE_TOKEN} tokens in the prompts should be the same as the number of images."
        )
    for row, (count, number) in enumerate(zip(counts, expected)):
        if count != number:
            raise ValueError(
                f"Sample {row} of the batch has {count} image(s), but {number} image token(s) ({IMAGE_TOKEN}) in its "
                "text."
            )


def is_nested(images: ImageInput | None) -> bool:
    """Return whether images are given as a list of images for each sample."""
    if not isinstance(images, (list, tuple)) or not images:
        return False
    return all(isinstance(sample_images, (list, tuple)) for sample_images in images)


__all__ = ["ViTPProcessor"]
