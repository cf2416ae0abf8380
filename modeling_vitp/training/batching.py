"""Which rows make a batch: shards of processes, the batches of an optimizer step, and samples of like length together.

What is trained on in a step depends on the seed, the epoch and the size of the global batch, and on nothing else.
"""

import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from datasets import Image
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices
from trl.data_utils import prepare_multimodal_messages

from ..image_processing_vitp import ViTPImageProcessor
from ..instructions.collator import SourceSettings, ViTPDataCollator, place_images
from ..processing_vitp import ViTPProcessor
from ..vrl import keyed_generator, num_kept_tokens

BY_LENGTH = ("group_by_length", "batch_rebalance")
EXIF_ORIENTATION = 0x0112


class GlobalBatchSampler(BatchRebalanceSampler):
    """The batches of one process from a map-style data set.

    The order of an epoch is cut into global batches, one for each optimizer step, and each of these into the batches
    of the processes. The last global batch of an epoch may be smaller: it is shared out evenly, so that no row is
    seen twice or lost, every process has the same number of batches, and one may be empty.

    Args:
        num_rows: of the data set.
        batch_size: rows in a batch of one process; with "batch_rebalance" on average.
        accumulation_steps: batches of a process in an optimizer step.
        num_processes, process_index: of the processes, and which of them this is.
        seed: of the order, together with the epoch.
        strategy: "random"; "sequential"; "group_by_length", where the rows of an optimizer step are of like length;
            or "batch_rebalance", where an optimizer step has the rows that it has under "random", but those of like
            length share a batch, more short ones or fewer long ones, so that all batches cost about the same.
        lengths: called at the start of an epoch for the length of every row; for the last two strategies.
        drop_last: leaves the last global batch out if it is smaller.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        strategy: str = "random",
        lengths: Callable[[], list[int]] | None = None,
        drop_last: bool = False,
    ):
        super().__init__(
            lengths=[1] * num_rows,
            effective_batch_size=batch_size * accumulation_steps * num_processes,
            dp_size=num_processes,
            grad_accum=accumulation_steps,
            seed=seed,
            rank=process_index,
            drop_last=drop_last,
        )
        self.strategy = strategy
        self.measure = lengths

    def __len__(self) -> int:
        tail = 0 if self.drop_last else math.ceil(self.remainder / (self.effective_batch_size // self.grad_accum))
        return self.num_full_batches * self.grad_accum + tail

    def __iter__(self) -> Iterator[list[int]]:
        if self.strategy in BY_LENGTH:
            self.lengths = self.measure()
        order = self._order()
        for start in range(0, len(order), self.effective_batch_size):
            rows = order[start : start + self.effective_batch_size]
            if len(rows) == self.effective_batch_size and self.strategy == "batch_rebalance":
                yield from self._yield_global_batch(rows)
            elif len(rows) == self.effective_batch_size or not self.drop_last:
                yield from self._deal(rows)

    def _order(self) -> list[int]:
        generator = keyed_generator(self.seed, self.epoch, "order")
        if self.strategy == "sequential":
            return list(range(len(self.lengths)))
        if self.strategy != "group_by_length":
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        grouped = get_length_grouped_indices(self.lengths, self.effective_batch_size, generator=generator)
        # From here on a group is in one global batch; their order must not go from long to short.
        starts = self.effective_batch_size * torch.randperm(self.num_full_batches, generator=generator)
        full = [row for start in starts.tolist() for row in grouped[start : start + self.effective_batch_size]]
        return full + grouped[len(full) :]

    def _deal(self, rows: list[int]) -> Iterator[list[int]]:
        """This process's batches of a global batch that need no balancing, or is too small for it."""
        if self.strategy in BY_LENGTH:
            rows = sorted(rows, key=lambda row: self.lengths[row], reverse=True)
        size = self.effective_batch_size // self.grad_accum
        for start in range(0, len(rows), size):
            yield share(rows[start : start + size], self.dp_size, self.rank)


def share(rows: list, num_processes: int, process_index: int) -> list:
    """This process's even part of `rows`."""
    return rows[len(rows) * process_index // num_processes : len(rows) * (process_index + 1) // num_processes]


class RankStream(torch.utils.data.IterableDataset):
    """The rows of one process from a stream, for a data loader that takes `batch_size` of them at a time.

    Every process reads the stream, and takes its part of each global batch. With workers, the stream is what each of
    them reads. At the end, places without a row hold `None`, which the collator passes over: no row is seen twice or
    lost, and every process has the same number of batches, a whole number of optimizer steps.

    Args:
        dataset: the stream; its `set_epoch`, if it has one, is called in the workers too.
        batch_size, accumulation_steps, num_processes, process_index, drop_last: as for [`GlobalBatchSampler`].
        length: the length of a row. If given, rows of like length within a global batch share a batch.
    """

    def __init__(
        self,
        dataset: torch.utils.data.IterableDataset,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        length: Callable[[dict[str, Any]], int] | None = None,
        drop_last: bool = False,
    ):
        self.dataset, self.batch_size, self.accumulation_steps = dataset, batch_size, accumulation_steps
        self.num_processes, self.process_index = num_processes, process_index
        self.length, self.drop_last = length, drop_last
        # When a run is resumed: batches that are not needed, so that they need not be encoded.
        self.skip_batches = 0
        # In shared memory, so that persistent workers see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        self.set_epoch(self._epoch.item())
        worker = torch.utils.data.get_worker_info()
        # Batches come from the workers in turn. A worker that is at its end drops out, so others may have given more
        # of those to skip, but none that is not at its end fewer.
        num_skipped = self.skip_batches // (1 if worker is None else worker.num_workers)
        for index, batch in enumerate(self._batches()):
            batch = batch if index >= num_skipped else []
            yield from batch
            yield from itertools.repeat(None, self.batch_size - len(batch))

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        size = self.batch_size * self.num_processes
        rows = iter(self.dataset)
        while group := list(itertools.islice(rows, size * self.accumulation_steps)):
            if self.drop_last and len(group) < size * self.accumulation_steps:
                return
            if self.length is not None:
                group.sort(key=self.length, reverse=True)
            for start in range(0, size * self.accumulation_steps, size):
                yield share(group[start : start + size], self.num_processes, self.process_index)


@dataclass
class SampleLength:
    """The number of tokens that a row has after the drop, from the headers of its images: none is decoded.

    Of a row that the collator will refuse it is 0. With `vrl_apply_prob` below 1 the visual tokens count on average.

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
        images = example.get("images")
        if images is None:
            images = [] if example.get("image") is None else [example["image"]]
        images = images if isinstance(images, (list, tuple)) else [images]
        num_visual = self.processor.image_seq_length * sum(self._num_tiles(images, settings))
        num_kept = num_kept_tokens(num_visual, self.vrl_drop_ratio)
        num_kept = round(self.vrl_apply_prob * num_kept + (1 - self.vrl_apply_prob) * num_visual)

        messages = place_images(example["messages"])
        if settings.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": settings.system_prompt}, *messages]
        messages = prepare_multimodal_messages(messages, images=images)
        tokenizer = self.processor.tokenizer
        text = tokenizer.apply_chat_template(messages, chat_template=self.processor.chat_template, tokenize=False)
        # Each image has a start and an end token, and its place in the text is a token that goes.
        num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + len(images) + num_kept
        return num_tokens if self.max_length is None else min(num_tokens, self.max_length)

    def _num_tiles(self, images: list, settings: SourceSettings) -> list[int]:
        """Tiles of each image within the sample's budget, as [`ViTPProcessor`] shares it out."""
        image_processor = self.processor.image_processor
        budget = settings.max_patches or image_processor.max_patches
        kwargs = {
            "crop_to_patches": True,
            "max_patches": max(budget // max(len(images), 1), image_processor.min_patches, 1),
        }
        sizes = [image_size(image) if settings.image_size is None else (settings.image_size,) * 2 for image in images]
        return [image_processor.get_number_of_image_patches(*size, kwargs) for size in sizes]


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of an image of a row, as it is seen: an encoded one by its header, turned as its EXIF says."""
    if isinstance(image, str):
        image = {"path": image, "bytes": None}
    if isinstance(image, dict):
        source = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
        if isinstance(source, str) and not os.path.isfile(source):
            return Image().decode_example(image).size[::-1]
        with PIL.Image.open(source) as opened:
            # The method of PNG's subclass would decode the image.
            turned = PIL.Image.Image.getexif(opened).get(EXIF_ORIENTATION, 1) >= 5
            return opened.size if turned else opened.size[::-1]
    if isinstance(image, PIL.Image.Image):
        return image.size[::-1]
    return tuple(ViTPImageProcessor._bands_first(torch.as_tensor(image), None).shape[1:])
