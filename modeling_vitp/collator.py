"""Rows of a data set to a training or evaluation batch: VRL, labels on the answers, padding."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from datasets import Image
from torch.nn.utils.rnn import pad_sequence
from trl.data_utils import prepare_multimodal_messages

from .image_processing_vitp import InputSpec
from .processing_vitp import ViTPProcessor, check_messages, message_texts
from .vrl import check_apply_prob, check_drop_ratio, keyed_generator

logger = logging.getLogger(__name__)

SampleTransform = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]
IGNORE_INDEX = -100


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """How the rows of one source of a mixture are encoded; `None` leaves it to the processor.

    Args:
        max_patches: most tiles of a sample; its images share them.
        image_size: side of the square, in pixels, that every image is resampled to before it is cut into tiles: the
            tile size of the model gives one tile, twice as much four and a thumbnail.
        system_prompt: for conversations that have no system message of their own.
        input_spec: how images that are not 8-bit RGB are read, see [`InputSpec`].
        jpeg_degradation: whether training images go through JPEG compression of a random quality from 75 to 100.

    """

    max_patches: int | None = None
    image_size: int | None = None
    system_prompt: str | None = None
    input_spec: dict | None = None
    jpeg_degradation: bool = False

    def check(self) -> None:
        """Raises a `ValueError` if the input spec contradicts itself."""
        InputSpec.from_dict(self.input_spec)


@dataclasses.dataclass
class ViTPDataCollator:
    """Makes a batch for [`ViTPForConditionalGeneration`] from rows with `messages` and `images` (or `image`).

    A row may carry an `id`. Its VRL draw and its `sample_transform` depend on (seed, id, epoch) alone, never on the
    worker, the rank, the batch or what ran before. A row without an `id` is known by the content of its messages.

    Args:
        processor: encodes the rows.
        max_length: longest sequence after the drop, in tokens. Answers beyond it are cut with a warning; a prompt or
            an image that does not fit is an error. No limit if `None`.
        vrl_drop_ratio: r in [0, 1); 0 for evaluation.
        vrl_apply_prob: share of the samples that VRL is applied to.
        seed: of all draws.
        sample_transform: called with the row, its images decoded under `images`, and a generator; returns the row to
            encode. The place for augmentation that has to keep answers true.
        padding_side: "right" or "left".
        pad_to_multiple_of: rounds the length of the batch up.

    Returns, when called with a list of rows, `input_ids`, `attention_mask` and `labels`, int64
    `(batch_size, sequence_length)`, -100 outside the answers; `pixel_values`, float32
    `(num_tiles, 3, height, width)`; and under VRL `position_ids` and `visual_token_indices` (see [`ViTPProcessor`]).

    Raises:
        ValueError: names the sample and the remedy when a row cannot be used: wrong columns, an unreadable image, a
            number of images that does not match the places, an unknown role, an empty answer, a prompt too long.
    """

    processor: ViTPProcessor
    max_length: int | None = None
    vrl_drop_ratio: float = 0.0
    vrl_apply_prob: float = 1.0
    seed: int = 0
    sample_transform: SampleTransform | None = None
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        check_drop_ratio(self.vrl_drop_ratio)
        check_apply_prob(self.vrl_apply_prob)
        # In shared memory, so that persistent workers, which keep the copy they were started with, see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return self._epoch.item()

    def for_evaluation(self) -> "ViTPDataCollator":
        """The same collator without VRL and without the transform."""
        return dataclasses.replace(self, vrl_drop_ratio=0.0, sample_transform=None)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        samples = [self.encode(example) for example in examples]
        batch = {
            "input_ids": self._pad(samples, "input_ids", self.processor.tokenizer.pad_token_id),
            "attention_mask": self._pad(samples, "attention_mask", 0),
            "labels": self._pad(samples, "labels", IGNORE_INDEX),
        }
        with_images = [sample for sample in samples if "pixel_values" in sample]
        if with_images:
            batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in with_images])
        if self.vrl_drop_ratio > 0:
            batch["position_ids"] = self._pad(samples, "position_ids", 0)
            if with_images:
                num_tokens = [len(sample["pixel_values"]) * self.processor.image_seq_length for sample in with_images]
                starts = torch.tensor([0, *num_tokens[:-1]]).cumsum(0)
                batch["visual_token_indices"] = torch.cat(
                    [sample["visual_token_indices"] + start for sample, start in zip(with_images, starts)]
                )
        return batch

    def encode(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One row, not padded: the tensors of the batch, one-dimensional, and its `pixel_values`."""
        sample_id = example.get("id")
        if sample_id is None:
            sample_id = content_id(example)
        try:
            return self._encode(example, sample_id)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ValueError(f"Sample {sample_id!r}: {error}") from error

    def _encode(self, example: dict[str, Any], sample_id: Any) -> dict[str, torch.Tensor]:
        key = (self.seed, sample_id, self.epoch)
        example = {**example, "images": load_images(example)}
        if self.sample_transform is not None:
            try:
                example = self.sample_transform(example, keyed_generator(*key, "transform"))
            except Exception as error:  # whatever a user's function raises; the sample has to be named
                raise ValueError(f"sample_transform failed with {type(error).__name__}: {error}") from error
        messages = example.get("messages")
        if not isinstance(messages, list):
            raise ValueError(
                f"a row needs the column 'messages', a list of {{'role', 'content'}}; it has {sorted(example)}. Rename "
                "or map the columns of the data set (prompt and completion: messages = prompt + completion)."
            )
        check_messages(messages)
        check_answers(messages)
        try:
            messages = prepare_multimodal_messages(messages, images=example["images"])
        except ValueError as error:
            raise ValueError(
                f"{error} Mark the place of each image with {{'type': 'image'}}, or give the first user turn as a "
                "string, which then follows all images."
            ) from error
        encoded = self.processor.apply_chat_template(
            [messages],
            tokenize=True,
            return_dict=True,
            return_tensors=None,
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "vrl_drop_ratio": self.vrl_drop_ratio,
                "vrl_apply_prob": self.vrl_apply_prob,
                "vrl_keys": [key],
                "add_special_tokens": False,
            },
        )
        input_ids = torch.tensor(encoded["input_ids"][0])
        is_answer = torch.tensor(encoded["assistant_masks"][0]).bool()
        sample = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": input_ids.masked_fill(~is_answer, IGNORE_INDEX),
        }
        if "position_ids" in encoded:
            sample["position_ids"] = torch.tensor(encoded["position_ids"][0])
        if self.max_length is not None and len(input_ids) > self.max_length:
            sample = self._cut(sample, sample_id)
        for name in ("pixel_values", "visual_token_indices"):
            if name in encoded:
                sample[name] = encoded[name]
        return sample

    def _cut(self, sample: dict[str, torch.Tensor], sample_id: Any) -> dict[str, torch.Tensor]:
        """Cuts answers to `max_length`; neither an image token nor the whole of the labels may go."""
        length = len(sample["input_ids"])
        num_image_tokens = (sample["input_ids"] == self.processor.image_token_id).sum().item()
        cut = {name: values[: self.max_length] for name, values in sample.items()}
        whole_images = torch.isin(sample["input_ids"][self.max_length :], torch.tensor(self.processor.image_token_ids))
        if whole_images.any() or (cut["labels"] == IGNORE_INDEX).all():
            raise ValueError(
                f"its prompt does not fit: {length} tokens, {num_image_tokens} of them visual, with "
                f"max_length={self.max_length}. Raise max_length, lower the image processor's max_patches, raise "
                "vrl_drop_ratio or shorten the text."
            )
        logger.warning(
            "Sample %r: answers cut from %d to max_length=%d tokens after the drop.",
            sample_id,
            length,
            self.max_length,
        )
        return cut

    def _pad(self, samples: list[dict[str, torch.Tensor]], name: str, value: int) -> torch.LongTensor:
        padded = pad_sequence(
            [sample[name] for sample in samples],
            batch_first=True,
            padding_value=value,
            padding_side=self.padding_side,
        )
        excess = -padded.shape[1] % (self.pad_to_multiple_of or 1)
        sides = (excess, 0) if self.padding_side == "left" else (0, excess)
        return torch.nn.functional.pad(padded, sides, value=value)


def content_id(example: dict[str, Any]) -> str:
    """The id of a row without one: a hash of its messages, the same in every worker, rank and order."""
    content = json.dumps(example.get("messages"), sort_keys=True, default=str)
    return "content:" + hashlib.sha256(content.encode()).hexdigest()[:16]


def load_images(example: dict[str, Any]) -> list:
    """The images of a row, from `images` or `image`: decoded unless they are images or arrays already."""
    images = example.get("images")
    if images is None:
        images = [] if example.get("image") is None else [example["image"]]
    if not isinstance(images, (list, tuple)):
        images = [images]
    loaded = []
    for index, image in enumerate(images):
        if isinstance(image, str):
            image = {"path": image, "bytes": None}
        if isinstance(image, dict):
            try:
                image = Image().decode_example({"path": image.get("path"), "bytes": image.get("bytes")})
                image.load()
            except Exception as error:  # Pillow raises many kinds, SyntaxError among them, for a broken file
                origin = f" ({image['path']})" if isinstance(image, dict) and image.get("path") else ""
                raise ValueError(
                    f"image {index}{origin} cannot be read: {error}. Mend the file or take the row out."
                ) from error
        if isinstance(image, PIL.Image.Image) and 0 in image.size:
            raise ValueError(f"image {index} is empty: {image.width} x {image.height} pixels. Take the row out.")
        loaded.append(image)
    return loaded


def check_answers(messages: list[dict[str, Any]]) -> None:
    """Raises a `ValueError` if there is nothing to learn from, or an answer is empty."""
    answers = [(index, message) for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("there is no assistant message to learn from. Add one or take the row out.")
    for index, message in answers:
        if not "".join(message_texts(message)).strip():
            raise ValueError(f"the answer in message {index} is empty. Fill it in or take the row out.")
