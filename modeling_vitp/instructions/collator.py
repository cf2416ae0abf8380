"""Rows of a data set to a training or evaluation batch: VRL, labels on the answers, padding."""

import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from datasets import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate
from trl.data_utils import prepare_multimodal_messages

from ..image_processing_vitp import PIL_8BIT_MODES, InputSpec
from ..processing_vitp import ViTPProcessor, check_messages, message_texts
from ..vrl import check_apply_prob, check_drop_ratio, keyed_generator

logger = logging.getLogger(__name__)

SampleTransform = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]
IGNORE_INDEX = -100
IMAGE_PLACE = "<image>"
MAX_REPLACEMENTS = 10
MAX_WORKERS = 256


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

    @property
    def images_kwargs(self) -> dict[str, Any]:
        """What the image processor is told of the source."""
        kwargs = {"max_patches": self.max_patches, "input_spec": self.input_spec}
        return {name: value for name, value in kwargs.items() if value is not None}

    def apply(self, images: list, generator: torch.Generator) -> list:
        """The PIL images of a sample as the source wants them seen."""
        if self.jpeg_degradation:
            images = [degrade(image, generator) for image in images]
        if self.image_size is not None:
            images = [to_square(image, self.image_size) for image in images]
        return images

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
        source_settings: [`SourceSettings`] for the rows whose `source` has that name.
        on_error: "raise" stops at a row that cannot be used. "skip" logs and counts it and takes one of
            `replacement_rows` in its place, by a draw that depends on (seed, id, epoch) alone, so that batches keep
            their size and a run repeats exactly. After 10 in a row that cannot be used it stops all the same.
        replacement_rows: rows that take the place of those that are skipped, by index: the training set, or for a
            stream some rows of it.
        padding_side: "right" or "left".
        pad_to_multiple_of: rounds the length of the batch up.

    Returns, when called with a list of rows (one that is `None` is passed over), `input_ids`, `attention_mask` and
    `labels`, int64 `(batch_size, sequence_length)`, -100 outside the answers; `pixel_values`, float32
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
    source_settings: Mapping[str, SourceSettings] = dataclasses.field(default_factory=dict)
    on_error: str = "raise"
    replacement_rows: Sequence[dict[str, Any]] | None = None
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        check_drop_ratio(self.vrl_drop_ratio)
        check_apply_prob(self.vrl_apply_prob)
        # In shared memory, so that persistent workers, which keep the copy they were started with, see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={self.on_error!r} is neither 'raise' nor 'skip'.")
        if self.on_error == "skip" and not self.replacement_rows:
            raise ValueError("on_error='skip' needs replacement_rows, which take the place of those that are skipped.")
        # A row for each worker, so that no two write to the same count; the last column is for rows without a source.
        self._skipped = torch.zeros(MAX_WORKERS + 1, len(self.source_settings) + 1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return self._epoch.item()

    def for_evaluation(self) -> "ViTPDataCollator":
        """The same collator without VRL, transform and degradation, which stops at a row that cannot be used."""
        settings = {
            name: dataclasses.replace(settings, jpeg_degradation=False)
            for name, settings in self.source_settings.items()
        }
        return dataclasses.replace(
            self, vrl_drop_ratio=0.0, sample_transform=None, source_settings=settings, on_error="raise"
        )

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows of each source were skipped, in all workers of this process since the collator was made."""
        names = [*self.source_settings, "other rows"]
        return {name: count for name, count in zip(names, self._skipped.sum(0).tolist()) if count}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        samples = [self._encode_or_replace(example) for example in examples if example is not None]
        samples = samples or [self._nothing()]
        batch = {
            "input_ids": self._pad(samples, "input_ids", self.processor.tokenizer.pad_token_id),
            "attention_mask": self._pad(samples, "attention_mask", 0),
            "labels": self._pad(samples, "labels", IGNORE_INDEX),
        }
        with_images = [sample for sample in samples if "pixel_values" in sample]
        if with_images:
            # In a worker this stacks straight into shared memory, which saves a copy of every pixel.
            batch["pixel_values"] = default_collate([tile for sample in with_images for tile in sample["pixel_values"]])
        if self.vrl_drop_ratio > 0:
            batch["position_ids"] = self._pad(samples, "position_ids", 0)
            if with_images:
                num_tokens = [len(sample["pixel_values"]) * self.processor.image_seq_length for sample in with_images]
                starts = torch.tensor([0, *num_tokens[:-1]]).cumsum(0)
                batch["visual_token_indices"] = torch.cat(
                    [sample["visual_token_indices"] + start for sample, start in zip(with_images, starts)]
                )
        return batch

    def _nothing(self) -> dict[str, torch.Tensor]:
        """A sample with nothing to learn, for a process that has no row where the last batch of an epoch is shared."""
        input_ids = torch.full((2,), self.processor.tokenizer.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": torch.full_like(input_ids, IGNORE_INDEX),
            "position_ids": torch.arange(len(input_ids)),
        }

    def _encode_or_replace(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.on_error == "raise":
            return self.encode(example)
        generator = keyed_generator(self.seed, sample_id_of(example), self.epoch, "replacement")
        for _ in range(MAX_REPLACEMENTS):
            try:
                return self.encode(example)
            except ValueError as error:
                self._count_skipped(example, error)
            example = self.replacement_rows[torch.randint(len(self.replacement_rows), (), generator=generator).item()]
        return self.encode(example)

    def _count_skipped(self, example: dict[str, Any], error: ValueError) -> None:
        source = example.get("source")
        logger.warning("Skipped a row of %s. %s", source or "the data set", error)
        worker = torch.utils.data.get_worker_info()
        names = list(self.source_settings)
        column = names.index(source) if source in names else len(names)
        self._skipped[0 if worker is None else 1 + worker.id % MAX_WORKERS, column] += 1

    def encode(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One row, not padded: the tensors of the batch, one-dimensional, and its `pixel_values`."""
        sample_id = sample_id_of(example)
        try:
            return self._encode(example, sample_id)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ValueError(f"Sample {sample_id!r}: {error}") from error

    def _encode(self, example: dict[str, Any], sample_id: Any) -> dict[str, torch.Tensor]:
        if example.get("error"):
            raise ValueError(example["error"])
        key = (self.seed, sample_id, self.epoch)
        settings = self.source_settings.get(example.get("source"), SourceSettings())
        images = settings.apply(load_images(example), keyed_generator(*key, "jpeg"))
        example = {**example, "images": images}
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
        messages = place_images(messages)
        if settings.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": settings.system_prompt}, *messages]
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
                **settings.images_kwargs,
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


def sample_id_of(example: dict[str, Any]) -> Any:
    sample_id = example.get("id")
    return content_id(example) if sample_id is None else sample_id


def place_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with each `<image>` in the text of a question, as many public data sets have it, as an image place."""
    return [
        {**message, "content": split_at_places(message["content"])}
        if message["role"] != "assistant" and isinstance(message["content"], str) and IMAGE_PLACE in message["content"]
        else message
        for message in messages
    ]


def split_at_places(text: str) -> list[dict[str, Any]]:
    """Text to parts, `<image>` to an image place. The newline after a place goes: the chat template writes one."""
    first, *rest = text.split(IMAGE_PLACE)
    parts = [{"type": "text", "text": first}] if first or not rest else []
    for piece in rest:
        parts.append({"type": "image", "text": None})
        piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


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


def degrade(image: PIL.Image.Image, generator: torch.Generator) -> PIL.Image.Image:
    """The image after JPEG compression of a quality from 75 to 100."""
    if image.mode not in PIL_8BIT_MODES:
        raise ValueError(f"jpeg_degradation needs 8-bit images, not one of mode {image.mode}.")
    quality = torch.randint(75, 101, (), generator=generator).item()
    compressed = io.BytesIO()
    image.convert("RGB").save(compressed, format="JPEG", quality=quality)
    return PIL.Image.open(compressed).convert("RGB")


def to_square(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The image resampled to `size` pixels a side, whatever its own shape."""
    if image.mode in ("1", "P", "PA"):  # which Pillow resamples without interpolation
        image = image.convert("RGBA")
    return image.resize((size, size), PIL.Image.Resampling.BICUBIC)


def check_answers(messages: list[dict[str, Any]]) -> None:
    """Raises a `ValueError` if there is nothing to learn from, or an answer is empty."""
    answers = [(index, message) for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("there is no assistant message to learn from. Add one or take the row out.")
    for index, message in answers:
        if not "".join(message_texts(message)).strip():
            raise ValueError(f"the answer in message {index} is empty. Fill it in or take the row out.")
