"""Plan of an adaptation: batch and checkpointing that fit the memory, and steps that fit the time."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from .backbones import Backbones, Start
from .labels import TaskData, median_size, num_windows
from .pretraining import Pretraining
from .runs import describe_seconds

# Shares of the budget. The rest is for the data, the frozen probes, the controls and the exports.
PRETRAINING_SHARE = 0.5
FINE_TUNING_SHARE = 0.35
MOST_EPOCHS = 20  # of the pretraining
MOST_FINE_TUNING_EPOCHS = 50
MOST_TILES = 12
LEAST_TOKENS = 8  # fewest visual tokens of a tile that VRL leaves
MOST_SEEDS = 3
MEASURED_STEPS = (2, 5)  # steps of the two runs whose difference in time gives the time of a step
BATCH_SETTINGS = {"per_device_train_batch_size", "global_batch_size", "gradient_accumulation_steps"}


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
    num_pretrainings = 2 if with_mae else 1
    step_seconds = costs.step * num_pretrainings
    steps = int(PRETRAINING_SHARE * seconds / step_seconds)

    def affordable_steps(seeds: int) -> int:
        seconds_per_run = FINE_TUNING_SHARE * seconds / runs(seeds)
        return int((seconds_per_run - costs.evaluation) / costs.fine_tuning_step)

    if num_seeds is None:
        num_seeds = MOST_SEEDS
        while num_seeds > 1 and affordable_steps(num_seeds) < fine_tuning_epoch:
            num_seeds -= 1
    fine_tuning_steps = affordable_steps(num_seeds)
    if steps < 1 or fine_tuning_steps < 1:
        one_step_of_each_run = runs(num_seeds) * (costs.fine_tuning_step + costs.evaluation)
        least_budget = max(step_seconds / PRETRAINING_SHARE, one_step_of_each_run / FINE_TUNING_SHARE)
        raise ValueError(
            f"budget: {seconds:.0f} s are too short for one step of the pretraining ({costs.step:.1f} s) and of each "
            f"of {runs(num_seeds)} fine-tunings. Set a budget of at least {math.ceil(least_budget / 60)}min, and "
            "better ten times that, or fewer baselines or seeds."
        )
    return {
        "steps": min(steps, MOST_EPOCHS * epoch),
        "fine_tuning_steps": min(fine_tuning_steps, MOST_FINE_TUNING_EPOCHS * fine_tuning_epoch),
        "seeds": list(range(num_seeds)),
    }


def make_plan(
    args: AdaptArguments,
    labels: TaskData,
    pretraining: Pretraining,
    fine_tuning: Mapping[str, Any],
    backbones: Backbones,
    progress: Progress,
) -> dict[str, Any]:
    """Choose batch, tiles, checkpointing, steps and seeds, print the plan, and keep it unless this is a dry run.

    Args:
        args: arguments of the command.
        labels: labeled images.
        pretraining: settings of the pretraining.
        fine_tuning: configuration of the fine-tuning.
        backbones: compared backbones.
        progress: results of finished parts.
    """
    batch_plan = progress.result("plan/batch", lambda: choose_pretraining(pretraining, labels))
    costs = None
    if args.steps is None or args.fine_tuning_steps is None or args.seeds is None:

        def measure() -> dict[str, float]:
            measured_costs = measure_costs(
                pretraining,
                batch_plan["settings"],
                labels.task,
                fine_tuning,
                backbones.start,
            )
            return asdict(measured_costs)

        costs = Costs(**progress.result("plan/costs", measure))

    def choose() -> dict[str, Any]:
        return choose_plan(args, labels, fine_tuning, len(backbones.models), batch_plan, costs)

    plan = choose() if args.dry_run else progress.result("plan", choose)
    if plan["budget"] != args.budget:
        print(f"The plan of the budget {plan['budget']} is kept. For {args.budget}, set another output_dir.")
    print_summary(plan, backbones.models)
    if args.dry_run and "plan_device" in args.pretraining:
        random_backbone = backbones.path(RANDOM, plan["seeds"][0])
        print_estimates(plan, pretraining, labels.task, fine_tuning, random_backbone)
    return plan


def choose_pretraining(pretraining: Pretraining, labels: TaskData) -> dict[str, Any]:
    """Return `rows`, the number of rows, and `settings` of tiles, VRL, batch and checkpointing."""
    arguments = pretraining.arguments
    user_settings = pretraining.user_settings
    image_processor, tokens_per_tile = arguments.tiling()
    height, width = median_size(labels.images["train"])
    window = labels.data["splits"]["train"].get("tile", {}).get("size", math.inf)
    settings = choose_tiling((min(height, window), min(width, window)), image_processor, tokens_per_tile)
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
    start: Start,
) -> Costs:
    """Measure steps of the pretraining and of a fine-tuning by two short runs of each.

    Args:
        pretraining: settings of the pretraining, whose folder is removed.
        batch_settings: settings of [`choose_pretraining`].
        task: name of the task of the fine-tuning.
        fine_tuning: configuration of the fine-tuning.
        start: start of the pretraining.
    """
    folder = pretraining.folder
    pretraining_settings = {
        **pretraining.settings(**batch_settings),
        "save_strategy": "no",
        "watch_samples": 0,
    }
    pretraining_seconds = []
    fine_tuning_seconds = []
    for steps in MEASURED_STEPS:
        output = folder / f"pretraining_{steps}"
        metrics = runs.run_pretraining({**pretraining_settings, "max_steps": steps}, output)
        pretraining_seconds.append(metrics["train"]["train_runtime"])
        fine_tuning_settings = {
            **fine_tuning,
            "model_name_or_path": start.vit or str(output / "backbone"),
            "save_strategy": "no",
            "max_steps": steps,
        }
        metrics = runs.run_fine_tuning(task, fine_tuning_settings, folder / f"fine_tuning_{steps}")
        fine_tuning_seconds.append(metrics["train"]["train_runtime"])
        evaluation_seconds = metrics["eval"]["eval_runtime"]  # that of the last run counts
    shutil.rmtree(folder)
    return Costs(
        step=seconds_per_step(pretraining_seconds),
        fine_tuning_step=seconds_per_step(fine_tuning_seconds),
        evaluation=evaluation_seconds,
    )


def seconds_per_step(seconds: Sequence[float]) -> float:
    """Return the seconds of a step, from those of runs of `MEASURED_STEPS` steps."""
    fewer_steps, more_steps = MEASURED_STEPS
    return max(seconds[1] - seconds[0], 1e-3) / (more_steps - fewer_steps)


def choose_plan(
    args: AdaptArguments,
    labels: TaskData,
    fine_tuning: Mapping[str, Any],
    num_models: int,
    batch_plan: Mapping[str, Any],
    costs: Costs | None,
) -> dict[str, Any]:
    """Return the plan.

    Args:
        args: arguments of the command.
        labels: labeled images.
        fine_tuning: configuration of the fine-tuning.
        num_models: number of compared backbones.
        batch_plan: rows and settings of [`choose_pretraining`].
        costs: measured costs; `None` if the arguments have the steps and the seeds.
    """

    def num_fine_tunings(num_seeds: int) -> int:
        # The best one of the search of the learning rate is also a scored one.
        num_other_rates = len(args.learning_rates) - 1
        return num_models * (num_other_rates + num_seeds * len(args.label_fractions))

    plan = {
        "steps": args.steps,
        "fine_tuning_steps": args.fine_tuning_steps,
        "seeds": args.seeds,
    }
    if costs is not None:
        affordable = choose_steps(
            seconds=args.seconds,
            costs=costs,
            epoch=math.ceil(batch_plan["rows"] / batch_plan["settings"]["global_batch_size"]),
            fine_tuning_epoch=steps_of_epoch(labels, fine_tuning),
            with_mae=MAE in args.baselines,
            runs=num_fine_tunings,
            num_seeds=None if args.seeds is None else len(args.seeds),
        )
        for name, value in plan.items():
            if value is None:
                plan[name] = affordable[name]
    fine_tunings = num_fine_tunings(len(plan["seeds"]))
    planned_seconds = {}
    if costs is not None:
        planned_seconds["pretraining"] = plan["steps"] * costs.step
        if MAE in args.baselines:
            planned_seconds["mae"] = planned_seconds["pretraining"]
        seconds_per_run = plan["fine_tuning_steps"] * costs.fine_tuning_step + costs.evaluation
        planned_seconds["fine_tuning"] = fine_tunings * seconds_per_run
    plan["machine"] = describe_machine()
    plan["budget"] = args.budget
    plan["fine_tunings"] = fine_tunings
    plan["settings"] = batch_plan["settings"]
    plan["planned_seconds"] = planned_seconds
    return plan


def steps_of_epoch(labels: TaskData, fine_tuning: Mapping[str, Any]) -> int:
    """Return the number of steps of an epoch of a fine-tuning, at least 1.

    Args:
        labels: labeled images.
        fine_tuning: configuration of the fine-tuning.
    """
    samples_per_step = fine_tuning.get("global_batch_size")
    if not samples_per_step:
        accumulation_steps = fine_tuning.get("gradient_accumulation_steps", 1)
        samples_per_step = fine_tuning["per_device_train_batch_size"] * accumulation_steps
    samples = len(labels.images["train"]) * num_windows(labels, "train")
    return max(samples // samples_per_step, 1)


def print_summary(plan: Mapping[str, Any], models: Mapping[str, str]) -> None:
    """Print the steps, the models and the time of a plan."""
    settings = ", ".join(f"{name} {value}" for name, value in plan["settings"].items())
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
