"""How much padding the batches of a run will have, from the samples that were looked at before it."""

import math
from collections.abc import Sequence

import numpy as np
from trl import SFTConfig

from ..instructions.dry_run import SourceSummary
from ..vrl import num_kept_tokens
from .batching import GlobalBatchSampler

LEAST_SAMPLES = 4096  # that are drawn, as whole steps


def padding_of_samples(
    args: SFTConfig, devices: int, summaries: Sequence[SourceSummary], tokens_per_tile: int, drop_ratio: float
) -> int:
    """Places of a sample's row that hold nothing, on average, where samples are drawn by the shares of their sources.

    Args:
        args: of the training; batches are those of its `train_sampling_strategy`.
        devices: on which a step's samples are shared out.
        summaries: of the sources, with the samples that were seen.
        tokens_per_tile: visual tokens of a tile.
        drop_ratio: r, which may be another than that of the training.
    """
    shares = np.array([summary.share for summary in summaries])
    if args.per_device_train_batch_size == 1 or not shares.sum():
        return 0
    accumulation = args.gradient_accumulation_steps
    step = args.per_device_train_batch_size * accumulation * devices
    number = step * math.ceil(LEAST_SAMPLES / step)
    generator = np.random.default_rng(args.seed)
    samples = np.empty((number, 2))  # tiles and tokens of text
    drawn = generator.choice(len(summaries), number, p=shares / shares.sum())
    for index, summary in enumerate(summaries):
        own = drawn == index
        samples[own] = generator.choice(summary.samples, own.sum())

    def lengths(ratio: float) -> list[int]:
        tokens = [num_kept_tokens(round(tiles) * tokens_per_tile, ratio) + round(text) for tiles, text in samples]
        return np.minimum(tokens, args.max_length or math.inf).astype(int).tolist()

    of_samples, padding = lengths(drop_ratio), 0
    for process in range(devices):
        batches = GlobalBatchSampler(
            number,
            args.per_device_train_batch_size,
            accumulation_steps=accumulation,
            num_processes=devices,
            process_index=process,
            seed=args.seed,
            strategy=args.train_sampling_strategy,
            lengths=lambda: lengths(args.vrl_drop_ratio),
        )
        for batch in batches:
            longest = max(of_samples[row] for row in batch)
            padding += sum(longest - of_samples[row] for row in batch)
    return round(padding / number)
