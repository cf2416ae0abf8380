"""Plan of an adaptation: batch and checkpointing that fit the memory, and steps that fit the time."""

import dataclasses
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from trl import ModelConfig

from ..image_processing_vitp import ViTPImageProcessor
from ..instructions.dry_run import SourceSummary
from ..pretraining.arguments import PretrainArguments
from ..pretraining.config import ViTPTrainingConfig
from ..pretraining.plan import config_of_start, step_cost, work_of
from ..training.costs import GIB, SPARE
from ..vrl import num_kept_tokens

# Shares of the budget. The rest is for the data, the frozen probes, the controls and the exports.
PRETRAINING_SHARE, FINE_TUNING_SHARE = 0.5, 0.35
MOST_EPOCHS, MOST_FINE_TUNING_EPOCHS = 20, 50
MOST_TILES, LEAST_TOKENS = 12, 8
MOST_SEEDS = 3


@dataclass(frozen=True)
class Costs:
    """Measured seconds on this machine.

    Args:
        step: optimizer step of the pretraining.
        fine_tuning_step: step of a fine-tuning.
        evaluation: evaluation of a fine-tuned model on the validation split.
    """

    step: float
    fine_tuning_step: float
    evaluation: float


def describe_machine() -> str:
    """Return the accelerators of this machine, or its processor and number of cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"


def memory() -> float:
    """Return the bytes of memory of the training device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_tiling(size: tuple[int, int], image_processor: ViTPImageProcessor, tokens_per_tile: int) -> dict:
    """Return `max_patches` and `vrl_drop_ratio` for images of a size, `(height, width)` in pixels.

    An image gets as many tiles as it has pixels of a tile. VRL drops three of four visual tokens, as in the paper
    (section 4), unless fewer than eight would be left.
    """
    tile = image_processor.size["height"] * image_processor.size["width"]
    tiles = min(max(round(size[0] * size[1] / tile), 1), MOST_TILES)
    ratios = (ratio for ratio in (0.75, 0.5) if num_kept_tokens(tokens_per_tile, ratio) >= LEAST_TOKENS)
    return {"max_patches": tiles, "vrl_drop_ratio": next(ratios, 0.0)}


def choose_batch(
    args: PretrainArguments,
    training_args: ViTPTrainingConfig,
    model_args: ModelConfig,
    summaries: Sequence[SourceSummary],
    samples: int,
) -> dict:
    """Return the fastest settings of a step of `samples` samples that fit the memory of this machine.

    These are the largest batch of a forward pass and, if even a single sample does not fit, activation checkpointing.

    Raises:
        ValueError: if a single sample does not fit.
    """
    config, _ = config_of_start(args, model_args)
    longest = work_of(training_args, 1, summaries, args.from_scratch is not None).longest
    dtype = getattr(torch, str(model_args.dtype), torch.float32)
    most, available = 2 ** int(math.log2(samples)), (1 - SPARE) * memory()
    for checkpointing in (False, True):
        batch = most
        while batch >= 1:
            shape = dataclasses.replace(longest, samples=batch)
            cost = step_cost(config, shape, int(checkpointing), training_args.bf16, dtype, training_args.optim)
            if cost.memory <= available:
                return {
                    "per_device_train_batch_size": batch,
                    "global_batch_size": batch * (samples // batch),
                    "activation_checkpointing": checkpointing,
                }
            batch //= 2
    raise ValueError(
        f"A sample of {longest.tiles} tiles needs {cost.memory / GIB:.1f} GiB, and this device has "
        f"{memory() / GIB:.1f} GiB. Use a smaller language_model or start, or pretraining '{{\"max_patches\": 1}}'."
    )


def choose_samples(rows: int) -> int:
    """Return the samples of a step: the paper's 128, and fewer for small data sets, so that an epoch has 16 steps."""
    return min(128, max(8, 2 ** int(math.log2(max(rows // 16, 1)))))


def choose_steps(
    seconds: float,
    costs: Costs,
    epoch: int,
    fine_tuning_epoch: int,
    with_mae: bool,
    runs: Callable[[int], int],
    num_seeds: int | None = None,
) -> dict:
    """Return the steps of the pretraining and of each fine-tuning, and the seeds.

    Args:
        seconds: budget.
        costs: measured costs.
        epoch, fine_tuning_epoch: steps of an epoch of the pretraining and of a fine-tuning.
        with_mae: whether a masked autoencoder is trained as long as the pretraining.
        runs: function that returns the number of fine-tunings for a number of seeds.
        num_seeds: number of seeds, by default the largest for which a fine-tuning has an epoch.

    Raises:
        ValueError: if the budget is too short for one step of each.
    """
    steps = int(PRETRAINING_SHARE * seconds / (costs.step * (1 + with_mae)))
    for seeds in range(MOST_SEEDS, 0, -1) if num_seeds is None else (num_seeds,):
        each = FINE_TUNING_SHARE * seconds / runs(seeds) - costs.evaluation
        fine_tuning_steps = int(each / costs.fine_tuning_step)
        if fine_tuning_steps >= fine_tuning_epoch:
            break
    if steps < 1 or fine_tuning_steps < 1:
        one = runs(seeds) * (costs.fine_tuning_step + costs.evaluation) / FINE_TUNING_SHARE
        needed = max(costs.step * (1 + with_mae) / PRETRAINING_SHARE, one)
        raise ValueError(
            f"budget: {seconds:.0f} s are too short for one step of the pretraining ({costs.step:.1f} s) and of each "
            f"of {runs(seeds)} fine-tunings. Set a budget of at least {math.ceil(needed / 60)}min, and better ten "
            "times that, or fewer baselines or seeds."
        )
    return {
        "steps": min(steps, MOST_EPOCHS * epoch),
        "fine_tuning_steps": min(fine_tuning_steps, MOST_FINE_TUNING_EPOCHS * fine_tuning_epoch),
        "seeds": list(range(seeds)),
    }
