"""Pretraining of an adaptation: its settings, and its run with an early comparison with the start."""

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from trl import ModelConfig

from ..command.errors import RunStopped
from ..evaluation.comparison import Progress
from ..image_processing_vitp import ViTPImageProcessor
from ..instructions.dry_run import SourceSummary, summarize_sources
from ..instructions.mixture import load_sources
from ..pretraining.arguments import PretrainArguments
from ..pretraining.config import ViTPTrainingConfig
from ..pretraining.loading import tiling
from ..tasks import TASKS
from ..training.checkpointing import last_checkpoint
from . import runs
from .arguments import AdaptArguments
from .backbones import START_SETTINGS, Start
from .instructions import question_options
from .labels import TaskData

EARLY = 0.1  # share of the steps after which the backbone is compared with its start
# Learning rates to choose from, as shares of the default, which makes some ViTs forget what they saw. If the early
# comparison does not tell them apart, the first is taken.
RATE_SHARES = (0.2, 1.0)
EARLY_RUN = "pretraining/early"  # finished part of the steps before this comparison
LOOK = "pretraining/look"  # finished part with the result of this comparison


@dataclass(frozen=True)
class PretrainingArguments:
    """Arguments of `vitp pretrain`, with folders in place of Hub ids."""

    args: PretrainArguments
    training_args: ViTPTrainingConfig
    model_args: ModelConfig

    def tiling(self) -> tuple[ViTPImageProcessor, int]:
        """Return a new image processor of the start, and the number of visual tokens of a tile."""
        args = self.args
        return tiling(
            self.model_args.model_name_or_path,
            args.from_scratch,
            args.vision_model,
            args.max_patches,
            args.vision_image_size,
        )


@dataclass
class Pretraining:
    """Settings and arguments of the pretraining.

    Args:
        start: start of the pretraining.
        user_settings: settings of `vitp pretrain` that replace those of the plan.
        data: settings of the data, see [`data_settings`].
        instructions: stored instructions, for checks and estimates.
        seed: seed of the pretraining.
        folder: folder for the configuration that is parsed.
    """

    start: Start
    user_settings: Mapping[str, Any]
    data: Mapping[str, Any]
    instructions: str
    seed: int
    folder: Path

    def settings(self, **plan_settings: Any) -> dict[str, Any]:
        """Return the configuration of `vitp pretrain`.

        Its defaults are replaced by the settings of the plan, these by those of the user, and these by those of the
        start, of this run and of the data. The user's `part_learning_rates` are merged with that of a new projector.
        """
        settings = {
            "learning_rate": 2e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "weight_decay": 0.05,
            "logging_steps": 10,
            "eval_strategy": "no",
            "save_total_limit": 1,
            "report_to": "none",
        }
        if self.start.settings.get("language_model"):
            settings["learning_rate"] = 5e-5
            if "projector" not in (self.user_settings.get("freeze") or ()):  # A frozen part has no learning rate.
                settings["part_learning_rates"] = {"projector": 1e-3}
        default_part_rates = settings.get("part_learning_rates", {})
        settings.update(plan_settings)
        for name, value in self.user_settings.items():
            if name not in START_SETTINGS:
                settings[name] = value
        if isinstance(settings.get("part_learning_rates"), Mapping):
            settings["part_learning_rates"] = {**default_part_rates, **settings["part_learning_rates"]}
        settings.update(self.start.settings)
        settings.update(seed=self.seed, eval_strategy="no", report_to="none")
        settings.update(self.data)
        return settings

    @property
    def vision_rates(self) -> list[float]:
        """Learning rates of the ViT to choose from; none if the user sets one, or the ViT is new or frozen."""
        settings = self.settings()
        part_rates = settings.get("part_learning_rates") or {}
        is_set = "learning_rate" in self.user_settings or "vision" in part_rates
        if is_set or self.start.vit is None or "vision" in (settings.get("freeze") or ()):
            return []
        return [share * settings["learning_rate"] for share in RATE_SHARES]

    def parse(self, plan_settings: Mapping[str, Any], steps: int) -> PretrainingArguments:
        """Return the arguments as the command parses them.

        Args:
            plan_settings: settings of the plan.
            steps: number of steps.
        """
        settings = self.settings(**plan_settings)
        settings["max_steps"] = steps
        options = runs.pretraining_options(settings, self.folder)
        args = options.data
        model_args = options.model
        # Shapes are read from folders, and without one those of InternVL2.5 would be assumed.
        args.vision_model = configuration_folder(args.vision_model)
        args.language_model = configuration_folder(args.language_model)
        model_args.model_name_or_path = configuration_folder(model_args.model_name_or_path)
        return PretrainingArguments(args, options.training, model_args)

    @cached_property
    def arguments(self) -> PretrainingArguments:
        """Arguments before the plan."""
        return self.parse({}, 1)

    @property
    def image_processor(self) -> ViTPImageProcessor:
        """New image processor that reads the bands of the images."""
        image_processor, _ = self.arguments.tiling()
        input_spec = self.arguments.args.input_spec
        if input_spec is None:
            return image_processor
        return image_processor.with_input_spec(input_spec)

    def summarize(self, image_processor: ViTPImageProcessor) -> list[SourceSummary]:
        """Return the sizes of the stored instructions, see [`summarize_sources`]."""
        return summarize_sources(load_sources(self.instructions), image_processor)


def data_settings(args: AdaptArguments, labels: TaskData, instructions: str) -> dict[str, Any]:
    """Return the settings of the pretraining's data: the labels, to draw questions from, or stored instructions.

    Args:
        args: arguments of the command.
        labels: labeled images.
        instructions: stored instructions.
    """
    if args.instructions is not None or not TASKS[labels.task].draws_questions:
        return {"dataset_name": instructions}
    options = question_options(labels, "train", args.class_names or {})
    options.update(args.pretraining.get("annotation_options", {}))
    return {
        "annotations": str(labels.root),
        "annotation_options": options,
        "dataset_test_split": "",  # The test images are scored by later stages.
    }


def open_pretraining(
    args: AdaptArguments, labels: TaskData, start: Start, instructions: str, folder: Path
) -> Pretraining:
    """Return the settings of the pretraining, which are parsed to report wrong ones.

    Args:
        args: arguments of the command.
        labels: labeled images.
        start: start of the pretraining.
        instructions: stored instructions, or the folder that they will be stored in.
        folder: folder for the configuration that is parsed.
    """
    pretraining = Pretraining(
        start=start,
        user_settings=args.pretraining,
        data=data_settings(args, labels, instructions),
        instructions=instructions,
        seed=args.seed,
        folder=folder,
    )
    _ = pretraining.arguments  # parses the settings
    return pretraining


def pretrain(
    pretraining: Pretraining,
    plan: Mapping[str, Any],
    output: Path,
    progress: Progress,
    compare: Callable[[Sequence[str]], dict[str, Any]],
    force: bool = False,
) -> None:
    """Run or resume the pretraining, which stops early if the backbone gets worse than its start.

    The first tenth of the steps is run with each learning rate of [`Pretraining.vision_rates`], and the rest with the
    one that is chosen by `compare`.

    Args:
        pretraining: settings of the pretraining.
        plan: steps and settings.
        output: output folder.
        progress: results of finished parts.
        compare: function that chooses a checkpoint and compares its backbone with the start, see
            [`~modeling_vitp.adaptation.probing.compare_with_start`].
        force: whether to go on with a worse backbone.

    Raises:
        RunStopped: if the backbone is worse than its start after a tenth of the steps.
    """
    steps = plan["steps"]
    settings = pretraining.settings(save_steps=max(steps // 10, 1), **plan["settings"])
    settings["max_steps"] = steps
    early_steps = round(EARLY * steps)
    if early_steps:
        runs_of_rates = early_runs(settings, pretraining.vision_rates, output)
        for run_output, run_settings in runs_of_rates.items():
            name = f"{EARLY_RUN}/{run_output.name}" if len(runs_of_rates) > 1 else EARLY_RUN
            progress.result(name, functools.partial(train_until, early_steps, run_settings, run_output))

        def look() -> dict[str, Any]:
            comparison = compare([last_checkpoint(run_output) for run_output in runs_of_rates])
            print(f"After {EARLY:.0%} of the steps, a linear probe of the backbone reaches {comparison['text']}.")
            return comparison

        comparison = progress.result(LOOK, look)
        if comparison["is_worse"] and not force:
            raise RunStopped(
                f"After {early_steps} of {steps} steps the frozen backbone is worse than its start: "
                f"{comparison['text']}. Lower learning_rate in `pretraining`, or check the labels. To go on anyway, "
                "add --force."
            )
        chosen_output = list(runs_of_rates)[comparison["chosen"]]
        settings = runs_of_rates[chosen_output]
        if len(runs_of_rates) > 1:
            print(f"The ViT goes on with the learning rate {settings['part_learning_rates']['vision']:g}.")
        keep_run(chosen_output, runs_of_rates, output)
    progress.result("pretraining/run", lambda: runs.run_pretraining(settings, output)["train"])


def early_runs(settings: Mapping[str, Any], rates: Sequence[float], output: Path) -> dict[Path, dict[str, Any]]:
    """Return the settings of the first steps with each learning rate of the ViT, by output folder.

    Args:
        settings: configuration of the pretraining.
        rates: learning rates to choose from; without one, the pretraining itself is the only run.
        output: output folder of the pretraining.
    """
    if not rates:
        return {output: dict(settings)}
    settings_of_runs = {}
    for rate in rates:
        part_rates = {**(settings.get("part_learning_rates") or {}), "vision": rate}
        run_output = output.with_name(f"{output.name}_rate_{rate:g}")
        settings_of_runs[run_output] = {**settings, "part_learning_rates": part_rates}
    return settings_of_runs


def train_until(step: int, settings: Mapping[str, Any], output: Path) -> None:
    """Run or resume a pretraining until a step before its end."""
    try:
        runs.run_pretraining({**settings, "stop_at_step": step}, output)
    except RunStopped as error:
        if error.status:
            raise


def keep_run(chosen: Path, outputs: Iterable[Path], output: Path) -> None:
    """Rename the output folder of the chosen run to that of the pretraining, and remove the others."""
    if chosen.exists() and chosen != output:
        chosen.rename(output)
    for other in outputs:
        if other != output:
            shutil.rmtree(other, ignore_errors=True)


def early_comparison(progress: Progress) -> dict[str, str]:
    """Return the scores of the early comparison with the start as the control `early`; nothing if there was none."""
    if LOOK not in progress.parts:
        return {}
    return {"early": progress.parts[LOOK]["result"]["text"]}


def configuration_folder(name: str | None) -> str | None:
    """Return the folder of a model; of a Hub id, the folder of the cache with its configurations."""
    if name is None or Path(name).is_dir():
        return name
    return snapshot_download(name, allow_patterns="*.json")
