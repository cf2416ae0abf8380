"""Plan of an adaptation: batch and checkpointing that fit the memory, and steps that fit the time."""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig

from ..evaluation.comparison import Progress
from ..image_processing_vitp import ViTPImageProcessor
from ..instructions.dry_run import SourceSummary
from ..pretraining.arguments import PretrainArguments
from ..pretraining.config import ViTPTrainingConfig
from ..pretraining.plan import config_of_start, print_plan, step_cost, work_of
from ..training.costs import GIB, describe_machine, machine_memory
from ..vrl import num_kept_tokens
from . import runs
from .arguments import MAE, RANDOM, AdaptArguments
from .backbones import Backbones
from .comparison import settings_of_backbone
from .labels import TaskData, median_size, num_windows
from .masked_autoencoder import mae_rates
from .pretraining import EARLY, Pretraining
from .runs import describe_seconds

# Shares of the budget that is left after the checks. The rest is for the probes, the controls and the exports.
PRETRAINING_SHARE = 0.5
FINE_TUNING_SHARE = 0.35
# Shares of the whole budget.
MEASURING_SHARE = 0.05
BUNDLE_SHARE = 0.1  # and for runs that are slower than measured
MOST_EPOCHS = 20  # of the pretraining
MOST_FINE_TUNING_EPOCHS = 50
MOST_TILES = 12
LEAST_TOKENS = 8  # fewest visual tokens of a tile that VRL leaves
MOST_SEEDS = 3
FIRST_SAMPLES = 2  # of the first measured step; heads with batch norm need two
MEASURED_STEPS = 3  # of all samples, if they fit the time of the measurement
BATCH_SETTINGS = {"per_device_train_batch_size", "global_batch_size", "gradient_accumulation_steps"}


@dataclass(frozen=True)
class Costs:
    """Measured seconds on this machine.

    Args:
        step: optimizer step of the pretraining.
        fine_tuning_step: step of a fine-tuning of each compared backbone, in all.
        evaluation: rest of a fine-tuning of each compared backbone, in all: loading, and scoring the validation split.
    """

    step: float
    fine_tuning_step: float
    evaluation: float


@dataclass(frozen=True)
class NumRuns:
    """Number of runs of each compared backbone.

    Args:
        fine_tunings: fine-tunings.
        scored: fine-tuned models that are scored on the test split, which takes about as long as the rest of a
            fine-tuning.
    """

    fine_tunings: int
    scored: int

    def seconds(self, steps: float, costs: Costs) -> float:
        """Return the seconds of all runs with a number of steps each."""
        seconds_of_steps = self.fine_tunings * steps * costs.fine_tuning_step
        return seconds_of_steps + (self.fine_tunings + self.scored) * costs.evaluation

    def affordable_steps(self, seconds: float, costs: Costs) -> int:
        """Return the largest number of steps of each run with which all take at most `seconds`; negative if none."""
        return math.floor((seconds - self.seconds(0, costs)) / (self.fine_tunings * costs.fine_tuning_step))


def count_runs(args: AdaptArguments, num_seeds: int) -> NumRuns:
    """Return the runs of each compared backbone for a number of seeds."""
    # The best one of the search of the learning rate is also a scored one.
    num_scored = num_seeds * len(args.label_fractions)
    return NumRuns(len(args.learning_rates) - 1 + num_scored, num_scored)


def choose_tiling(size: tuple[int, int], image_processor: ViTPImageProcessor, tokens_per_tile: int) -> dict:
    """Return `max_patches` and `vrl_drop_ratio` for images of a size, `(height, width)` in pixels.

    An image gets as many tiles as it has pixels of a tile. VRL drops three of four visual tokens, as in the paper
    (section 4), unless fewer than eight would be left.
    """
    height, width = size
    tile_pixels = image_processor.size["height"] * image_processor.size["width"]
    tiles = round(height * width / tile_pixels)
    drop_ratio = 0.0
    for ratio in (0.5, 0.75):  # The last one that leaves enough tokens is taken.
        if num_kept_tokens(tokens_per_tile, ratio) >= LEAST_TOKENS:
            drop_ratio = ratio
    return {
        "max_patches": min(max(tiles, 1), MOST_TILES),
        "vrl_drop_ratio": drop_ratio,
    }


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
    work = work_of(training_args, 1, summaries, args.from_scratch is not None)
    dtype = getattr(torch, str(model_args.dtype), torch.float32)
    memory = machine_memory()
    largest_batch = 2 ** int(math.log2(samples))
    for checkpointing in (False, True):
        batch = largest_batch
        while batch >= 1:
            cost = step_cost(
                config,
                dataclasses.replace(work.longest, samples=batch),
                int(checkpointing),
                training_args.bf16,
                dtype,
                training_args.optim,
            )
            if cost.fits(memory):
                return {
                    "per_device_train_batch_size": batch,
                    "global_batch_size": batch * (samples // batch),
                    "activation_checkpointing": checkpointing,
                }
            batch //= 2
    raise ValueError(
        f"A sample of {work.longest.tiles} tiles needs {cost.memory / GIB:.1f} GiB, and this device has "
        f"{memory:.1f} GiB. Use a smaller language_model or start, or pretraining '{{\"max_patches\": 1}}'."
    )


def choose_samples(rows: int) -> int:
    """Return the samples of a step: the paper's 128, and fewer for small data sets, so that an epoch has 16 steps."""
    rows_per_step = max(rows // 16, 1)
    samples = 2 ** int(math.log2(rows_per_step))
    return min(128, max(8, samples))


def choose_steps(
    seconds: float,
    costs: Costs,
    epoch: int,
    fine_tuning_epoch: int,
    num_pretrainings: float,
    runs: Callable[[int], NumRuns],
    num_seeds: int | None = None,
) -> dict:
    """Return the steps of the pretraining and of each fine-tuning, and the seeds.

    Args:
        seconds: time that is left of the budget.
        costs: measured costs.
        epoch, fine_tuning_epoch: steps of an epoch of the pretraining and of a fine-tuning.
        num_pretrainings: number of runs as long as the pretraining, see [`count_pretrainings`].
        runs: function that returns the runs of each backbone for a number of seeds.
        num_seeds: number of seeds, by default the largest for which a fine-tuning has an epoch.

    Raises:
        ValueError: if the budget is too short for one step of each.
    """
    step_seconds = costs.step * num_pretrainings
    steps = int(PRETRAINING_SHARE * seconds / step_seconds)

    def affordable_steps(seeds: int) -> int:
        return runs(seeds).affordable_steps(FINE_TUNING_SHARE * seconds, costs)

    if num_seeds is None:
        num_seeds = MOST_SEEDS
        while num_seeds > 1 and affordable_steps(num_seeds) < fine_tuning_epoch:
            num_seeds -= 1
    fine_tuning_steps = affordable_steps(num_seeds)
    if steps < 1 or fine_tuning_steps < 1:
        one_step_of_each_run = runs(num_seeds).seconds(1, costs)
        least_seconds = max(step_seconds / PRETRAINING_SHARE, one_step_of_each_run / FINE_TUNING_SHARE)
        raise ValueError(
            f"budget: {max(seconds, 0):.0f} s are left, too short for one step of the pretraining ({costs.step:.1f} s) "
            f"and of each of {runs(num_seeds).fine_tunings} fine-tunings of each backbone, which need "
            f"{math.ceil(least_seconds)} s. Set a longer budget, better ten times that, or fewer baselines or seeds."
        )
    return {
        "steps": min(steps, MOST_EPOCHS * epoch),
        "fine_tuning_steps": min(fine_tuning_steps, MOST_FINE_TUNING_EPOCHS * fine_tuning_epoch),
        "seeds": list(range(num_seeds)),
    }


def count_pretrainings(args: AdaptArguments, pretraining: Pretraining, backbones: Backbones) -> float:
    """Return the pretraining with the first steps of each learning rate, and a masked autoencoder, in pretrainings."""
    count = count_early_runs(pretraining)
    if MAE in args.baselines:
        count += count_autoencoders(pretraining, backbones)
    return count


def count_early_runs(pretraining: Pretraining) -> float:
    """Return the length of the pretraining with the first steps of each learning rate, in pretrainings."""
    num_further_rates = max(len(pretraining.vision_rates) - 1, 0)
    return 1 + EARLY * num_further_rates


def count_autoencoders(pretraining: Pretraining, backbones: Backbones) -> float:
    """Return the length of the masked autoencoder with the first steps of each learning rate, in pretrainings.

    Its chosen rate begins anew, after a tenth of the steps with each of several.
    """
    num_rates = len(mae_rates(pretraining, backbones))
    num_early_runs = num_rates if num_rates > 1 else 0
    return 1 + EARLY * num_early_runs


def make_plan(
    args: AdaptArguments,
    labels: TaskData,
    pretraining: Pretraining,
    fine_tuning: Mapping[str, Any],
    backbones: Backbones,
    progress: Progress,
    spent_seconds: Callable[[], float],
) -> dict[str, Any]:
    """Choose batch, tiles, checkpointing, steps and seeds, print the plan, and keep it unless this is a dry run.

    Args:
        args: arguments of the command.
        labels: labeled images.
        pretraining: settings of the pretraining.
        fine_tuning: configuration of the fine-tuning.
        backbones: compared backbones.
        progress: results of finished parts.
        spent_seconds: function that returns the seconds that the command has taken.
    """
    batch_plan = progress.result("plan/batch", lambda: choose_pretraining(pretraining, labels))
    costs = None
    if args.needs_weights:

        def measure() -> dict[str, float]:
            measured_costs = measure_costs(
                pretraining,
                batch_plan["settings"],
                labels.task,
                fine_tuning,
                backbones,
                MEASURING_SHARE * args.seconds,
            )
            return asdict(measured_costs)

        costs = Costs(**progress.result("plan/costs", measure))

    def choose() -> dict[str, Any]:
        seconds_left = args.seconds - spent_seconds()
        return choose_plan(args, labels, pretraining, fine_tuning, backbones, batch_plan, costs, seconds_left)

    plan = choose() if args.dry_run else progress.result("plan", choose)
    if plan["budget"] != args.budget:
        print(f"The plan of the budget {plan['budget']} is kept. For {args.budget}, set another output_dir.")
    print_summary(plan, backbones.models)
    if args.dry_run and "plan_device" in args.pretraining:
        random_backbone = backbones.path(RANDOM, plan["seeds"][0])
        print_estimates(plan, pretraining, labels.task, fine_tuning, random_backbone)
    return plan


def choose_fine_tuning_steps(
    args: AdaptArguments, plan: Mapping[str, Any], progress: Progress, spent_seconds: Callable[[], float]
) -> int:
    """Return the steps of each fine-tuning: those of the plan, or fewer if less time of the budget is left.

    Args:
        args: arguments of the command.
        plan: plan of the adaptation.
        progress: results of finished parts.
        spent_seconds: function that returns the seconds that the command has taken.
    """
    if args.fine_tuning_steps is not None:
        return args.fine_tuning_steps

    def choose() -> int:
        seconds_left = (1 - BUNDLE_SHARE) * args.seconds - spent_seconds()
        costs = Costs(**progress.parts["plan/costs"]["result"])
        affordable_steps = count_runs(args, len(plan["seeds"])).affordable_steps(seconds_left, costs)
        return max(min(plan["fine_tuning_steps"], affordable_steps), 1)

    steps = progress.result("plan/fine_tuning", choose)
    if steps < plan["fine_tuning_steps"]:
        print(f"Fine-tunings have {steps} steps instead of {plan['fine_tuning_steps']}, for which time is left.")
    return steps


def choose_pretraining(pretraining: Pretraining, labels: TaskData) -> dict[str, Any]:
    """Return `rows`, the number of rows, and `settings` of tiles, VRL, batch and checkpointing."""
    arguments = pretraining.arguments
    user_settings = pretraining.user_settings
    image_processor, tokens_per_tile = arguments.tiling()
    size = median_size(labels.images["train"], labels.window)
    settings = choose_tiling(size, image_processor, tokens_per_tile)
    for name in settings:
        if name in user_settings:
            settings[name] = user_settings[name]
    image_processor.max_patches = settings["max_patches"]
    summaries = pretraining.summarize(image_processor)
    rows = sum(summary.effective for summary in summaries)
    training_args = arguments.training_args
    if BATCH_SETTINGS & user_settings.keys():
        samples = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
        settings["global_batch_size"] = samples
    else:
        samples = choose_samples(rows)
        settings |= choose_batch(arguments.args, training_args, arguments.model_args, summaries, samples)
    return {"rows": rows, "settings": settings}


def measure_costs(
    pretraining: Pretraining,
    batch_settings: Mapping[str, Any],
    task: str,
    fine_tuning: Mapping[str, Any],
    backbones: Backbones,
    seconds: float,
) -> Costs:
    """Measure steps of the pretraining and of the fine-tuning of each backbone by two short runs of each.

    Args:
        pretraining: settings of the pretraining, whose folder is removed.
        batch_settings: settings of [`choose_pretraining`].
        task: name of the task of the fine-tuning.
        fine_tuning: configuration of the fine-tuning.
        backbones: compared backbones.
        seconds: time for the measurements. If it is short, they have fewer samples.
    """
    folder = pretraining.folder
    measured_backbones = backbones.of_each_shape()
    seconds_of_each = seconds / (2 + len(measured_backbones))  # The pretraining gets two shares.
    pretraining_settings = {
        **pretraining.settings(**batch_settings),
        "per_device_train_batch_size": pretraining.parse(batch_settings, 1).training_args.per_device_train_batch_size,
        "save_strategy": "no",
        "watch_samples": 0,
    }
    step, _ = measure_runs(
        runs.run_pretraining,
        pretraining_settings,
        batch_settings["global_batch_size"],
        folder / "pretraining",
        2 * seconds_of_each,
    )

    def run_fine_tuning(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
        return runs.run_fine_tuning(task, settings, output)

    fine_tuning_steps = []
    rests = []
    for index, backbone in enumerate(measured_backbones):
        fine_tuning_step, rest = measure_runs(
            run_fine_tuning,
            {**settings_of_backbone(task, fine_tuning, backbone), "save_strategy": "no"},
            samples_of_step(fine_tuning),
            folder / f"fine_tuning_{index}",
            seconds_of_each,
        )
        fine_tuning_steps.append(fine_tuning_step)
        rests.append(rest)
    shutil.rmtree(folder)
    num_of_start_shape = len(backbones.models) - len(backbones.others)
    return Costs(
        step=step,
        fine_tuning_step=(num_of_start_shape - 1) * fine_tuning_steps[0] + sum(fine_tuning_steps),
        evaluation=(num_of_start_shape - 1) * rests[0] + sum(rests),
    )


def measure_runs(
    run: Callable[[Mapping[str, Any], Path], dict[str, Any]],
    settings: Mapping[str, Any],
    samples: int,
    output: Path,
    seconds: float,
) -> tuple[float, float]:
    """Return the seconds of a step, and those of the rest of a run, from a run of two samples and one of several.

    The second run has up to `MEASURED_STEPS` steps, and fewer samples if these would take too long. The seconds of a
    step are those of a sample times the number of samples.

    Args:
        run: function that runs a configuration, and returns its metrics.
        settings: configuration of the run.
        samples: samples of a step.
        output: output folder, to whose name the numbers of steps and samples are appended.
        seconds: time for both runs.
    """

    def measure(steps: int, samples_of_step: int) -> tuple[float, float]:
        batch = min(settings["per_device_train_batch_size"], samples_of_step)
        batch_settings = {
            "per_device_train_batch_size": batch,
            "global_batch_size": batch * (samples_of_step // batch),
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
        }
        start = time.monotonic()
        metrics = run({**settings, **batch_settings}, output.with_name(f"{output.name}_{steps}_{samples_of_step}"))
        train_seconds = metrics["train"]["train_runtime"]
        return train_seconds, time.monotonic() - start - train_seconds

    first_samples = min(FIRST_SAMPLES, samples)
    seconds_of_first, rest = measure(1, first_samples)
    seconds_of_sample = seconds_of_first / first_samples
    affordable_samples = int((seconds - 2 * rest - seconds_of_first) / seconds_of_sample)
    steps = min(affordable_samples // samples, MEASURED_STEPS)
    if steps == 0:
        steps = 1
        samples_of_step = affordable_samples
    else:
        samples_of_step = samples
    if steps * samples_of_step <= first_samples:
        return samples * seconds_of_sample, rest
    # The first run pays for imports and for the first step of the process, so that it counts for nothing.
    train_seconds, rest = measure(steps, samples_of_step)
    return samples * train_seconds / (steps * samples_of_step), rest


def choose_plan(
    args: AdaptArguments,
    labels: TaskData,
    pretraining: Pretraining,
    fine_tuning: Mapping[str, Any],
    backbones: Backbones,
    batch_plan: Mapping[str, Any],
    costs: Costs | None,
    seconds: float,
) -> dict[str, Any]:
    """Return the plan.

    Args:
        args: arguments of the command.
        labels: labeled images.
        pretraining: settings of the pretraining.
        fine_tuning: configuration of the fine-tuning.
        backbones: compared backbones.
        batch_plan: rows and settings of [`choose_pretraining`].
        costs: measured costs; `None` in a dry run whose arguments have the steps and the seeds.
        seconds: time that is left of the budget.
    """
    plan = {
        "steps": args.steps,
        "fine_tuning_steps": args.fine_tuning_steps,
        "seeds": args.seeds,
    }
    if None in plan.values():
        affordable = choose_steps(
            seconds=seconds,
            costs=costs,
            epoch=math.ceil(batch_plan["rows"] / batch_plan["settings"]["global_batch_size"]),
            fine_tuning_epoch=steps_of_epoch(labels, fine_tuning),
            num_pretrainings=count_pretrainings(args, pretraining, backbones),
            runs=lambda num_seeds: count_runs(args, num_seeds),
            num_seeds=None if args.seeds is None else len(args.seeds),
        )
        for name, value in plan.items():
            if value is None:
                plan[name] = affordable[name]
    num_runs = count_runs(args, len(plan["seeds"]))
    planned_seconds = {}
    if costs is not None:
        seconds_of_pretraining = plan["steps"] * costs.step
        planned_seconds["pretraining"] = seconds_of_pretraining * count_early_runs(pretraining)
        if MAE in args.baselines:
            planned_seconds["mae"] = seconds_of_pretraining * count_autoencoders(pretraining, backbones)
        planned_seconds["fine_tuning"] = num_runs.seconds(plan["fine_tuning_steps"], costs)
    plan["machine"] = describe_machine()
    plan["budget"] = args.budget
    plan["fine_tunings"] = len(backbones.models) * num_runs.fine_tunings
    plan["image_size"] = backbones.start.image_size
    plan["settings"] = batch_plan["settings"]
    plan["planned_seconds"] = planned_seconds
    return plan


def steps_of_epoch(labels: TaskData, fine_tuning: Mapping[str, Any]) -> int:
    """Return the number of steps of an epoch of a fine-tuning, at least 1.

    Args:
        labels: labeled images.
        fine_tuning: configuration of the fine-tuning.
    """
    samples = len(labels.images["train"]) * num_windows(labels, "train")
    return max(samples // samples_of_step(fine_tuning), 1)


def samples_of_step(fine_tuning: Mapping[str, Any]) -> int:
    """Return the number of samples of a step of a fine-tuning."""
    samples = fine_tuning.get("global_batch_size")
    if samples:
        return samples
    return fine_tuning["per_device_train_batch_size"] * fine_tuning.get("gradient_accumulation_steps", 1)


def print_summary(plan: Mapping[str, Any], models: Mapping[str, str]) -> None:
    """Print the steps, the models and the time of a plan."""
    shown_settings = {"image_size": plan["image_size"], **plan["settings"]}
    settings = ", ".join(f"{name} {value}" for name, value in shown_settings.items())
    print(
        f"\nPlan on {plan['machine']}: {plan['steps']} steps of pretraining ({settings}); {plan['fine_tunings']} "
        f"fine-tunings of {plan['fine_tuning_steps']} steps, seeds {plan['seeds']}. Models: {', '.join(models)}."
    )
    if plan["planned_seconds"]:
        needed_time = describe_seconds(sum(plan["planned_seconds"].values()))
        print(f"Pretraining and fine-tuning take about {needed_time} of {plan['budget']}.")


def print_estimates(
    plan: Mapping[str, Any], pretraining: Pretraining, task: str, fine_tuning: Mapping[str, Any], backbone: str
) -> None:
    """Print memory and hours of the pretraining and of a fine-tuning on `plan_device`, from the models' shapes.

    Args:
        plan: settings and steps of the plan.
        pretraining: settings of the pretraining.
        task: name of the task of the fine-tuning.
        fine_tuning: configuration of the fine-tuning.
        backbone: folder of a backbone of the same shape as the start.
    """
    arguments = pretraining.parse(plan["settings"], plan["steps"])
    image_processor, _ = arguments.tiling()
    print("\nPretraining", end="")
    summaries = pretraining.summarize(image_processor)
    print_plan(arguments.args, arguments.training_args, arguments.model_args, summaries)
    print("\nOne fine-tuning. Weights of the start are not needed for its estimate.")
    settings = {
        **fine_tuning,
        "model_name_or_path": backbone,
        "max_steps": plan["fine_tuning_steps"],
        "plan_device": arguments.args.plan_device,
    }
    runs.estimate_fine_tuning(task, settings, pretraining.folder)
