"""Data collator that converts rows to training or evaluation batches: VRL, labels on the answers, padding."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate
from trl.data_utils import prepare_multimodal_messages

from ..command.settings import from_mapping
from ..conversations import check_messages
from ..images.pixels import ColorJitter
from ..processing_vitp import ViTPProcessor
from ..vrl import check_apply_prob, check_drop_ratio, check_warmup_steps, keyed_generator
from .raw_tiles import RawTileProcessor, normalize_tiles
from .rows import (
    SampleTransform,
    SourceSettings,
    check_answers,
    check_image_parts,
    is_given,
    load_images,
    makes_images,
    place_images,
    sample_id_of,
)

logger = logging.getLogger(__name__)
NO_LABEL = -100
# Field of a row with the optimizer step in which it is trained, counted from 0.
STEP = "_step"
MAX_REPLACEMENTS = 10
MAX_WORKERS = 256


@dataclass
class ViTPDataCollator:
    """Data collator for [`ViTPForConditionalGeneration`], for rows with `messages` and `images` (or `image`).

    A row may have an `id`. Its VRL draw and its `sample_transform` depend on (seed, id, epoch) alone, never on the
    worker, the rank, the batch or earlier rows. For a row without an `id`, a hash of its messages is used.

    Args:
        processor: processor that encodes the rows.
        max_length: maximum sequence length after the drop, in tokens. Longer answers are cut with a warning; a prompt
            or an image that does not fit is an error. No limit if `None`.
        vrl_drop_ratio: share r of the visual tokens that is dropped, in [0, 1); 0 for evaluation.
        vrl_apply_prob: probability that VRL is applied to a sample.
        vrl_warmup_steps: number of initial optimizer steps without VRL. It requires the step of each row, which
            [`ViTPTrainer`] adds.
        patch_drop_ratio: share of the visual tokens of each tile whose patches are dropped before the ViT, in [0, 1),
            see [`ViTPProcessor.encode_conversation`]. Drawn like VRL.
        patch_drop_steps: number of initial optimizer steps in which patches are dropped. It requires the step of each
            row. All steps if `None`.
        color_jitter: fields of [`~modeling_vitp.images.pixels.ColorJitter`], `{}` for its defaults. No augmentation of
            colors if `None`. Drawn like VRL, once for all images of a row.
        answer_mask_ratio: probability in [0, 1] that an answer token is replaced by a mask token in the input. Labels
            and the ends of turns are unchanged. Drawn like VRL; see [`mask_answer_tokens`].
        seed: seed of all draws.
        sample_transform: function from a row, with decoded images under `images`, and a generator to the row to
            encode. Use it for augmentation that must keep answers correct. If its attribute `makes_images` is true, the
            images of the row are not read and the transform creates its own. Its attribute `settings`, if it has one,
            is JSON-serializable and must not change when a run is resumed.
        source_settings: [`SourceSettings`] by source name.
        on_error: "raise" raises an error for an invalid row. "skip" logs and counts it and uses a random row of
            `replacement_rows` instead. The draw depends on (seed, id, epoch) alone, so that batches keep their size and
            runs are reproducible. After 10 consecutive invalid rows, the error is raised.
        replacement_rows: rows that replace skipped ones, by index: the training set, or some rows of a stream.
        padding_side: "right" or "left".
        pad_to_multiple_of: multiple that the sequence length is rounded up to.
        padding_free: whether samples are concatenated in one row instead of padded, see [`flatten_batch`].

    When called with a list of rows (`None` is ignored), it returns `input_ids`, `attention_mask` and `labels`, int64
    `(batch_size, sequence_length)`, with labels -100 outside the answers; `pixel_values`, float32
    `(num_tiles, channels, height, width)`; and under VRL `position_ids` and `visual_token_indices` (see
    [`ViTPProcessor`]), with dropped patches also `visible_token_indices`.

    Raises:
        ValueError: If a row is invalid: wrong columns, an unreadable image, different numbers of images and image
            parts, an unknown role, an empty answer, a prompt that is too long. The message names the sample.
    """

    processor: ViTPProcessor
    max_length: int | None = None
    vrl_drop_ratio: float = 0.0
    vrl_apply_prob: float = 1.0
    vrl_warmup_steps: int = 0
    patch_drop_ratio: float = 0.0
    patch_drop_steps: int | None = None
    answer_mask_ratio: float = 0.0
    color_jitter: dict[str, float] | None = None
    seed: int = 0
    sample_transform: SampleTransform | None = None
    source_settings: Mapping[str, SourceSettings] = field(default_factory=dict)
    on_error: str = "raise"
    replacement_rows: Sequence[dict[str, Any]] | None = None
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    padding_free: bool = False

    def __post_init__(self):
        check_drop_ratio(self.vrl_drop_ratio)
        check_apply_prob(self.vrl_apply_prob)
        check_warmup_steps(self.vrl_warmup_steps)
        check_drop_ratio(self.patch_drop_ratio, "patch_drop_ratio")
        self._jitter = None
        if self.color_jitter is not None:
            self._jitter = from_mapping(ColorJitter, self.color_jitter, "color_jitter")
        if not 0 <= self.answer_mask_ratio <= 1:
            raise ValueError(f"answer_mask_ratio must be in [0, 1], got {self.answer_mask_ratio}.")
        self._mask_id = mask_token_id(self.processor) if self.answer_mask_ratio > 0 else None
        # Persistent workers keep the copy of the collator that they started with, so the epoch is in shared memory.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        can_skip = self.on_error == "skip" and self.replacement_rows
        if self.on_error != "raise" and not can_skip:
            raise ValueError(f"on_error must be 'raise', or 'skip' with replacement_rows, got {self.on_error!r}.")
        if self.padding_free and self.pad_to_multiple_of:
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of} cannot be combined with padding_free. Remove one."
            )
        # Each worker has its own row, so that no two write to the same count. The last column counts rows without a
        # known source.
        self._skipped = torch.zeros(MAX_WORKERS + 1, len(self.source_settings) + 1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return self._epoch.item()

    def for_evaluation(self) -> "ViTPDataCollator":
        """Return a padding collator without drops, masked answers, augmentation, transform and skipping."""
        source_settings = {}
        for name, settings in self.source_settings.items():
            source_settings[name] = replace(settings, jpeg_degradation=False)
        return replace(
            self,
            vrl_drop_ratio=0.0,
            vrl_warmup_steps=0,
            patch_drop_ratio=0.0,
            answer_mask_ratio=0.0,
            color_jitter=None,
            sample_transform=None,
            source_settings=source_settings,
            on_error="raise",
            padding_free=False,
        )

    def with_raw_tiles(self) -> "ViTPDataCollator":
        """Return a collator whose `pixel_values` are uint8, unless an image of the batch has more than 8 bits.

        It shares epoch and counts with this collator; see [`RawTileProcessor`] for the tiles.
        """
        image_processor = RawTileProcessor.of(self.processor.image_processor)
        if image_processor is None:
            return self
        raw = copy.copy(self)
        raw.processor = copy.copy(self.processor)
        raw.processor.image_processor = image_processor
        return raw

    @property
    def depends_on_step(self) -> bool:
        """Whether the drop ratios change during training, so that each row needs its optimizer step."""
        return self.vrl_warmup_steps > 0 or (self.patch_drop_ratio > 0 and self.patch_drop_steps is not None)

    def drop_ratios_at(self, step: int) -> dict[str, float]:
        """Return the ratios of VRL and of dropped patches in an optimizer step, counted from 0."""
        ratios = {"vrl_drop_ratio": self.vrl_drop_ratio, "patch_drop_ratio": self.patch_drop_ratio}
        if step < self.vrl_warmup_steps:
            ratios["vrl_drop_ratio"] = 0.0
        if self.patch_drop_steps is not None and step >= self.patch_drop_steps:
            ratios["patch_drop_ratio"] = 0.0
        return ratios

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped rows of each source, in all workers since the collator was created."""
        names = [*self.source_settings, "other rows"]
        counts = self._skipped.sum(0).tolist()
        return {name: count for name, count in zip(names, counts) if count}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        samples = [self._encode_or_replace(example) for example in examples if example is not None]
        pad_id = self.processor.tokenizer.pad_token_id
        if not samples:  # A process may get no row of the last batch of an epoch, which the processes share.
            sample = {
                "input_ids": torch.full((2,), pad_id),
                "attention_mask": torch.full((2,), 1),
                "labels": torch.full((2,), NO_LABEL),
            }
            samples = [sample]
        padding_values = {"input_ids": pad_id, "attention_mask": 0, "labels": NO_LABEL}
        if "position_ids" in samples[0]:
            padding_values["position_ids"] = 0
        batch = {}
        for name, value in padding_values.items():
            sequences = [sample[name] for sample in samples]
            batch[name] = pad(sequences, value, self.padding_side, self.pad_to_multiple_of)
        with_images = [sample for sample in samples if "pixel_values" in sample]
        if with_images:
            batch["pixel_values"] = self._stack_tiles(with_images)
            if "visual_token_indices" in with_images[0]:
                batch["visual_token_indices"] = indices_in_batch(with_images, self.processor.image_seq_length)
            if "visible_token_indices" in with_images[0]:
                batch["visible_token_indices"] = torch.cat([sample["visible_token_indices"] for sample in with_images])
        return flatten_batch(batch) if self.padding_free else batch

    def _stack_tiles(self, samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        tiles = []
        for sample in samples:
            tiles += sample["pixel_values"]
        dtypes = {tile.dtype for tile in tiles}
        if len(dtypes) > 1:
            image_processor = self.processor.image_processor
            tiles = [normalize_tiles(tile[None], image_processor)[0] for tile in tiles]
        return stack(tiles)

    def _encode_or_replace(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.on_error == "raise":
            return self.encode(example)
        generator = keyed_generator(self.seed, sample_id_of(example), self.epoch, "replacement")
        for _ in range(MAX_REPLACEMENTS):
            try:
                return self.encode(example)
            except ValueError as error:
                self._count_skipped(example, error)
            index = torch.randint(len(self.replacement_rows), (), generator=generator).item()
            replacement = dict(self.replacement_rows[index])
            if STEP in example:
                replacement[STEP] = example[STEP]
            example = replacement
        return self.encode(example)

    def _count_skipped(self, example: dict[str, Any], error: ValueError) -> None:
        source = example.get("source")
        logger.warning("Skipped a row of %s. %s", source or "the data set", error)
        names = list(self.source_settings)
        column = names.index(source) if source in names else len(names)
        worker = torch.utils.data.get_worker_info()
        count_row = 0 if worker is None else 1 + worker.id % MAX_WORKERS
        self._skipped[count_row, column] += 1

    def encode(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the one-dimensional tensors of a row, without padding, and its `pixel_values`."""
        sample_id = sample_id_of(example)
        try:
            return self._encode(example, sample_id)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ValueError(f"Sample {sample_id!r}: {error}") from error

    def conversation(self, example: dict[str, Any]) -> tuple[list[dict[str, Any]], list[bool], SourceSettings]:
        """Return the messages of a row with their images, whether each answer is given, and the settings of its source.

        Raises:
            ValueError: If the row is invalid; the message does not name the sample.
        """
        if example.get("error"):
            raise ValueError(example["error"])
        settings = self.source_settings.get(example.get("source"), SourceSettings())
        example = self._transformed(example, settings)
        messages = example.get("messages")
        if not isinstance(messages, list):
            raise ValueError(
                f"expected the column 'messages', a list of {{'role', 'content'}}, found {sorted(example)}. Rename or "
                "map the columns of the data set (prompt and completion: messages = prompt + completion)."
            )
        check_messages(messages)
        check_image_parts(messages)
        check_answers(messages)
        given_answers = [is_given(message) for message in messages if message["role"] == "assistant"]
        messages = settings.with_system_prompt(place_images(messages))
        try:
            prepared_messages = prepare_multimodal_messages(messages, images=example["images"])
        except ValueError as error:
            raise ValueError(
                f"{error} Mark the position of each image with {{'type': 'image'}}, or write the first user turn as a "
                "string, to put all images before it."
            ) from error
        return prepared_messages, given_answers, settings

    def _transformed(self, example: dict[str, Any], settings: SourceSettings) -> dict[str, Any]:
        """Return a row with its decoded images, after JPEG degradation and the transform."""
        key = (self.seed, sample_id_of(example), self.epoch)
        spec = settings.spec_for(self.processor.image_processor)
        images = []
        if not makes_images(self.sample_transform):
            images = load_images(example, spec)
        images = settings.apply(images, keyed_generator(*key, "jpeg"))
        example = {**example, "images": images}
        if self.sample_transform is None:
            return example
        try:
            return self.sample_transform(example, keyed_generator(*key, "transform"))
        except Exception as error:  # A user's function may raise any type; the message must name the sample.
            raise ValueError(f"sample_transform failed with {type(error).__name__}: {error}") from error

    def _encode(self, example: dict[str, Any], sample_id: Any) -> dict[str, torch.Tensor]:
        messages, given_answers, settings = self.conversation(example)
        if self.depends_on_step and STEP not in example:
            raise ValueError(
                "vrl_warmup_steps and patch_drop_steps need the optimizer step of each row. Use ViTPTrainer, which "
                "adds it."
            )
        key = (self.seed, sample_id, self.epoch)
        encoded = self.processor.encode_conversation(
            messages,
            settings.images_kwargs,
            vrl_apply_prob=self.vrl_apply_prob,
            vrl_key=key,
            **self.drop_ratios_at(example.get(STEP, 0)),
        )
        input_ids = torch.from_numpy(encoded["input_ids"])
        # The number of the answer of each token, from 1; 0 for other tokens.
        answers = torch.from_numpy(encoded["answers"])
        if not answers.any():
            raise ValueError(
                "no answer tokens to train on. The chat template needs {% generation %} … {% endgeneration %} around "
                "each answer, up to the end of its turn."
            )
        given_numbers = 1 + torch.tensor(given_answers).nonzero()
        is_answer = (answers > 0) & ~torch.isin(answers, given_numbers)
        sample = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": input_ids.masked_fill(~is_answer, NO_LABEL),
        }
        if self._mask_id is not None:
            sample["input_ids"] = mask_answer_tokens(
                input_ids,
                is_answer,
                self.answer_mask_ratio,
                self._mask_id,
                keyed_generator(*key, "answers"),
            )
        if "position_ids" in encoded:
            sample["position_ids"] = torch.from_numpy(encoded["position_ids"])
        if self.max_length is not None and len(input_ids) > self.max_length:
            sample = cut_answers(sample, self.max_length, self.processor, sample_id)
        for name in ("pixel_values", "visual_token_indices", "visible_token_indices"):
            if name in encoded:
                sample[name] = encoded[name]
        if self._jitter is not None and "pixel_values" in sample:
            generator = keyed_generator(*key, "colors")
            sample["pixel_values"] = self._jitter(sample["pixel_values"], self.processor.image_processor, generator)
        return sample


def cut_answers(
    sample: dict[str, torch.Tensor],
    max_length: int,
    processor: ViTPProcessor,
    sample_id: Any,
) -> dict[str, torch.Tensor]:
    """Cut answers to `max_length`; raise a `ValueError` if an image token or all labels would be cut."""
    input_ids = sample["input_ids"]
    shortened = {name: tokens[:max_length] for name, tokens in sample.items()}
    image_token_ids = torch.tensor(processor.image_token_ids)
    cuts_image = torch.isin(input_ids[max_length:], image_token_ids).any()
    if cuts_image or (shortened["labels"] == NO_LABEL).all():
        num_image_tokens = (input_ids == processor.image_token_id).sum().item()
        raise ValueError(
            f"its prompt does not fit in max_length={max_length}: {len(input_ids)} tokens, {num_image_tokens} of them "
            "visual. Raise max_length, lower the image processor's max_patches, raise vrl_drop_ratio or shorten the "
            "text."
        )
    logger.warning(
        "Sample %r: answers cut from %d to max_length=%d tokens after the drop.",
        sample_id,
        len(input_ids),
        max_length,
    )
    return shortened


def indices_in_batch(samples: list[dict[str, torch.Tensor]], tokens_of_tile: int) -> torch.LongTensor:
    """Return the indices of the kept visual tokens, counted over all images of the batch."""
    indices = []
    start = 0
    for sample in samples:
        indices.append(sample["visual_token_indices"] + start)
        start += len(sample["pixel_values"]) * tokens_of_tile
    return torch.cat(indices)


def pad(
    sequences: list[torch.LongTensor],
    value: int,
    side: str,
    multiple: int | None,
) -> torch.LongTensor:
    """Pad sequences with a value, on the left or right, to the longest one and to a multiple of a length."""
    padded = pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)
    if not multiple:
        return padded
    num_missing = -padded.shape[1] % multiple
    sides = (num_missing, 0) if side == "left" else (0, num_missing)
    return torch.nn.functional.pad(padded, sides, value=value)


def stack(tiles: list[torch.Tensor]) -> torch.Tensor:
    """Stack tiles `(channels, height, width)` and keep their memory format; a worker stacks into shared memory."""
    if tiles[0].stride(0) != 1:
        return default_collate(tiles)
    return default_collate([tile.movedim(0, -1) for tile in tiles]).movedim(-1, 1)


def with_raw_tiles(collator: Any) -> Any:
    """Return [`ViTPDataCollator.with_raw_tiles`] of a collator; return a collator of another class unchanged."""
    return collator.with_raw_tiles() if type(collator) is ViTPDataCollator else collator


def mask_token_id(processor: ViTPProcessor) -> int:
    """Return the id of the token that replaces masked answer tokens.

    It is the first of the tokenizer's mask, pad and unknown token that the chat template does not use. Some templates
    write the pad token at the end of a turn. For Qwen2.5 and InternVL2.5 it is `<|endoftext|>`.

    Raises:
        ValueError: If the tokenizer has none of these tokens.
    """
    tokenizer = processor.tokenizer
    template = processor.template()
    for token in (tokenizer.mask_token, tokenizer.pad_token, tokenizer.unk_token):
        if token is None or token in template:
            continue
        ends_turn = token == tokenizer.eos_token and "eos_token" in template
        if not ends_turn:
            return tokenizer.convert_tokens_to_ids(token)
    raise ValueError(
        "answer_mask_ratio needs a mask, pad or unknown token that the chat template does not use. Set "
        "tokenizer.mask_token."
    )


def mask_answer_tokens(
    input_ids: torch.LongTensor,
    is_answer: torch.BoolTensor,
    mask_ratio: float,
    mask_id: int,
    generator: torch.Generator,
) -> torch.LongTensor:
    """Replace each answer token with probability `mask_ratio` by the mask token.

    The last token of an answer ends the turn and is kept, because no answer token is predicted from it.

    Args:
        input_ids: int64 `(sequence_length,)`.
        is_answer: bool `(sequence_length,)`, true in the answers and at their ends.
        mask_id: id of the mask token, see [`mask_token_id`].
        generator: generator that draws one number for each answer token, in order.

    Returns:
        int64 `(sequence_length,)`.
    """
    is_next_answer = torch.cat([is_answer[1:], is_answer.new_zeros(1)])
    is_last = is_answer & ~is_next_answer
    numbers = torch.rand(int(is_answer.sum()), generator=generator, dtype=torch.float64)
    is_masked = torch.zeros_like(is_answer)
    is_masked[is_answer] = numbers < mask_ratio
    return input_ids.masked_fill(is_masked & ~is_last, mask_id)


def flatten_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | int]:
    """Concatenate the samples of a padded batch in one row, without padding.

    Samples keep their position ids, including the gaps of VRL. The label of the first token of each sample is -100.
    Attention kernels for variable lengths take the starts of the samples from `cu_seq_lens_q` and `cu_seq_lens_k`,
    int32 `(num_samples + 1,)`, and the longest length from `max_length_q` and `max_length_k`.

    Args:
        batch: batch of [`ViTPDataCollator`], padded on either side.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64 `(1, num_tokens)`, the lengths above, and the other fields of
        the batch, except `attention_mask`.
    """
    flattened = dict(batch)
    is_token = flattened.pop("attention_mask").bool()
    position_ids = batch.get("position_ids")
    if position_ids is None:
        position_ids = is_token.cumsum(1) - 1
    lengths = is_token.sum(1)
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    labels = batch["labels"][is_token][None]
    sample_starts = boundaries[:-1]
    labels[0, sample_starts] = NO_LABEL
    longest = lengths.max().item()
    flattened["input_ids"] = batch["input_ids"][is_token][None]
    flattened["labels"] = labels
    flattened["position_ids"] = position_ids[is_token][None]
    flattened["cu_seq_lens_q"] = boundaries
    flattened["cu_seq_lens_k"] = boundaries
    flattened["max_length_q"] = longest
    flattened["max_length_k"] = longest
    return flattened
