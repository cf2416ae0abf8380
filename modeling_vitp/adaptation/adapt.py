"""Adaptation of a ViT to a domain: from labels to a backbone that is compared with its start and with baselines.

[`run_adaptation`] is the list of the stages. The result of each finished part is kept in `progress.json`, and an
unfinished run resumes from its checkpoint, so that the same command goes on wherever it was stopped.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..command.errors import RunStopped
from ..convert.export import export_backbone
from ..evaluation.comparison import Progress
from ..images.seen import report_images
from ..input_spec import InputSpec
from ..training.checkpointing import FolderLock
from ..training.command_line import load_plugins
from ..training.results import no_library_bars
from .arguments import ADAPTED, MAE, RANDOM, START, AdaptArguments
from .backbones import Backbones, open_start
from .bundle import make_bundle
from .comparison import Comparison, fine_tune_backbones, fine_tuning_settings
from .controls import check_instructions, control_settings, count_control_questions, score_answers
from .fitting import check_models
from .instructions import make_all_questions
from .interpolation import choose_alpha, describe_alphas, score_alphas
from .labels import TaskData, read_labels
from .masked_autoencoder import Autoencoder
from .plan import choose_fine_tuning_steps, make_plan
from .preparation import check_arguments, open_progress
from .pretraining import Pretraining, early_comparison, open_pretraining, pretrain
from .probing import Prober, compare_with_start, probe_backbones
from .report import AdaptationReport, make_report
from .runs import describe_seconds, fine_tuning_options

STAGES = {
    "models": "Building the models",
    "instructions": "Making instructions",
    "checks": "Checking the instructions",
    "plan": "Measuring steps",
    "pretraining": "Pretraining",
    "interpolation": "Choosing between the start and the pretrained ViT",
    "mae": "Training the masked autoencoder",
    "frozen": "Probing frozen backbones",
    "controls": "Asking about other images",
    "fine_tuning": "Fine-tuning",
    "bundle": "Exporting",
}


def adapt(
    data: str | Path,
    start: str | Path | None = None,
    baselines: Sequence[str] = (START, RANDOM),
    budget: str = "24h",
    output_dir: str | Path = "outputs/adaptation",
    **settings: Any,
) -> AdaptationReport:
    """Adapt a ViT to the domain of labeled images, and compare it with its start and with baselines.

    A second call with the same arguments goes on where the first was stopped, or returns its report.

    Args:
        data: folder of labeled images, or a configuration, see [`~modeling_vitp.adaptation.labels.read_labels`].
        start: folder or Hub id of the ViT, or of a vision-language model.
        baselines: `"start"`, `"random"`, `"mae"`, and folders or Hub ids of ViTs.
        budget: time for the whole, such as `"24h"`.
        output_dir: folder of all results.
        settings: further fields of [`~modeling_vitp.adaptation.arguments.AdaptArguments`].

    Returns:
        The report with all scores, the verdict and the controls.

    Raises:
        ValueError: if the labels cannot be used, answers follow from their questions, a test image is in the training
            data, or the budget is too short.
        RunStopped: if the backbone is worse than its start after a tenth of the steps, or no backbone between it and
            the pretrained one is better on the validation images.
    """
    args = AdaptArguments(
        data=str(data),
        start=None if start is None else str(start),
        baselines=list(baselines),
        budget=budget,
        output_dir=str(output_dir),
        **settings,
    )
    return run_adaptation(args)


@no_library_bars()
def run_adaptation(args: AdaptArguments) -> AdaptationReport | None:
    """Run the stages that are left, and return the report; `None` with `dry_run`.

    Args:
        args: arguments of the command.
    """
    begin = time.monotonic()
    load_plugins(args.plugins)
    check_arguments(args)
    folder = Path(args.output_dir)
    lock = FolderLock(folder)  # The lock is released when this function ends.
    labels, progress = open_labels(args, lock)
    print(labels.how)
    images = labels.images["train"]
    report_images(len(images), images.__getitem__, InputSpec.from_dict(args.pretraining.get("input_spec")))
    stages = Stages(progress, begin)

    # Wrong settings and missing models are reported before questions are made.
    start = open_start(args, labels, folder, progress)
    if start.size_reason:
        print(start.size_reason)
    fine_tuning = fine_tuning_settings(labels, start.config, args.fine_tuning)
    fine_tuning_options(labels.task, fine_tuning, folder / "plan")
    instructions = args.instructions or str(folder / "instructions" / "train")
    if args.instructions is None:
        Path(instructions).mkdir(parents=True, exist_ok=True)  # Without the folder, the next check misses a data set.
    pretraining = open_pretraining(args, labels, start, instructions, folder / "plan")

    backbones = Backbones(args, start, folder, progress)
    stages.begin("models")
    progress.result(
        "models", lambda: check_models(pretraining, labels.task, fine_tuning, backbones, args.needs_weights)
    )

    controls = control_settings(folder / "pretraining", folder / "instructions" / "test")
    if args.instructions is None:
        stages.begin("instructions")
        make_all_questions(labels, args.class_names or {}, folder / "instructions", args.seed, progress)
        progress.result("instructions/asked", lambda: count_control_questions(controls))

    stages.begin("checks")
    checks = check_once(args, pretraining, labels, folder, progress)

    if "plan" not in progress.parts:
        stages.begin("plan")
    plan = make_plan(args, labels, pretraining, fine_tuning, backbones, progress, stages.spent_seconds)
    if args.dry_run:
        return None
    stages.planned_seconds = plan["planned_seconds"]

    prober = Prober(labels, start.image_size, args.seed)
    train_backbones(stages, pretraining, plan, prober, backbones)
    frozen = score_frozen(stages, plan, prober, backbones)
    stages.begin("controls")
    has_questions = args.instructions is None
    answers = progress.result("controls", lambda: score_answers(controls, folder / "controls", has_questions))
    all_controls = {**checks, **answers, **early_comparison(progress)}
    if "interpolation/backbone" in progress.parts:
        all_controls["interpolation"] = progress.parts["interpolation/backbone"]["result"]

    comparison = Comparison(
        labels=labels,
        settings=fine_tuning,
        steps=choose_fine_tuning_steps(args, plan, progress, stages.spent_seconds),
        learning_rates=args.learning_rates,
        folder=folder / "fine_tuning",
        progress=progress,
        begin=lambda: stages.begin("fine_tuning"),
    )
    fine_tuned, diverged = fine_tune_backbones(comparison, backbones, plan["seeds"], args.label_fractions)

    report = make_report(labels, plan, stages.used_seconds(), backbones, frozen, fine_tuned, all_controls, diverged)
    stages.begin("bundle")
    fine_tuned_folder = folder_of_adapted(fine_tuned)
    progress.result("bundle", lambda: make_bundle(args, labels, report, fine_tuned_folder, folder))
    return report


def open_labels(args: AdaptArguments, lock: FolderLock) -> tuple[TaskData, Progress]:
    """Return the labeled images, and the results of finished parts in the output folder, which is locked.

    Args:
        args: arguments of the command.
        lock: lock of the output folder.
    """
    is_new = not lock.folder.exists()
    if not is_new:
        progress = open_progress(args, lock)
    labels = read_labels(args.data, lock.folder / "splits", args.task, args.scene_pattern, args.seed)
    if is_new:  # Labels that cannot be used leave no folder.
        progress = open_progress(args, lock)
    return labels, progress


def check_once(
    args: AdaptArguments, pretraining: Pretraining, labels: TaskData, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Check the instructions, see [`check_instructions`], unless this is done.

    Args:
        args: arguments of the command.
        pretraining: settings of the pretraining with its instructions.
        labels: labeled images.
        folder: output folder of the adaptation.
        progress: results of finished parts.

    Raises:
        ValueError: if there are problems.
    """
    checks = progress.result("checks", lambda: check_instructions(args, pretraining, labels, folder / "validation"))
    problems = list(checks["problems"])
    if problems:
        problems.append("To go on anyway, add --force.")
    if not args.allow_overlap:
        problems = [*checks["overlap_problems"], *problems]
    if problems and not args.force:
        raise ValueError(" ".join(problems))
    return checks


def train_backbones(
    stages: "Stages",
    pretraining: Pretraining,
    plan: Mapping[str, Any],
    prober: Prober,
    backbones: Backbones,
) -> None:
    """Run or resume the pretraining, choose how far the backbone goes with it, and train a masked autoencoder.

    Args:
        stages: stages of the adaptation.
        pretraining: settings of the pretraining.
        plan: plan of the adaptation.
        prober: probes for the choices on validation images.
        backbones: compared backbones.
    """
    folder = backbones.folder
    progress = backbones.progress

    def compare(checkpoints: Sequence[str]) -> dict[str, Any]:
        start = backbones.path(backbones.start.name, prober.seed)
        return compare_with_start(prober, checkpoints, start, folder / "early")

    stages.begin("pretraining")
    pretrain(pretraining, plan, folder / "pretraining", progress, compare, backbones.args.force)
    if backbones.start.vit is not None and "interpolation_alpha" not in pretraining.user_settings:
        stages.begin("interpolation")
        interpolate_backbone(prober, backbones)
    if MAE in backbones.models:
        stages.begin("mae")
        Autoencoder(pretraining, plan, backbones, prober).train()


def interpolate_backbone(prober: Prober, backbones: Backbones) -> None:
    """Replace the pretrained backbone by the best one between it and the start, see [`choose_alpha`].

    Args:
        prober, backbones: as for [`train_backbones`].

    Raises:
        RunStopped: if this is the start, unless the run is forced to go on.
    """
    progress = backbones.progress
    start = backbones.start
    pretrained = backbones.folder / "pretraining"
    scores = progress.result(
        "interpolation", lambda: score_alphas(prober, start.vit, pretrained, backbones.folder / "between")
    )
    alpha = choose_alpha(scores)
    if alpha == 0 and backbones.args.force:
        alpha = choose_alpha(scores[1:])
    text = describe_alphas(scores, alpha)
    if alpha == 0:
        raise RunStopped(
            f"Keep {start.name}: on the validation images no backbone between it and the pretrained one is better by "
            f"more than one standard error: {text}. To compare one after fine-tuning anyway, add --force."
        )
    print(f"The backbone is {text}.")

    def export() -> str:
        export_backbone(pretrained, pretrained / "backbone", start=start.vit, interpolation_alpha=alpha)
        return text

    progress.result("interpolation/backbone", export)


def score_frozen(
    stages: "Stages", plan: Mapping[str, Any], prober: Prober, backbones: Backbones
) -> list[dict[str, Any]]:
    """Return the scores of probes of the frozen backbones.

    Args:
        stages, plan, prober, backbones: as for [`train_backbones`].
    """
    seed = plan["seeds"][0]
    output = backbones.folder / "frozen"
    stages.begin("frozen")
    return backbones.progress.result("frozen", lambda: probe_backbones(prober, backbones, seed, output))


def folder_of_adapted(fine_tuned: Sequence[Mapping[str, Any]]) -> Path:
    """Return the folder of the model that was first fine-tuned from the adapted backbone, whose weights are kept."""
    folders = [Path(run["folder"]) for run in fine_tuned if run["model"] == ADAPTED]
    return folders[0]


class Stages:
    """Stages of an adaptation, which are printed with the time that is left.

    Args:
        progress: results of finished parts.
        begin: time of the monotonic clock at which the command began.

    Attributes:
        planned_seconds: planned seconds by stage.
    """

    def __init__(self, progress: Progress, begin: float):
        self.progress = progress
        self.begin_time = begin
        self.earlier_seconds = sum(record["seconds"] for record in progress.parts.values())
        self.planned_seconds: dict[str, float] = {}
        self.last_text = ""

    def begin(self, stage: str) -> None:
        """Print the stage and the estimated time that is left, unless this was printed last."""
        names = list(STAGES)
        index = names.index(stage)
        text = f"\n[{index + 1}/{len(STAGES)}] {STAGES[stage]}"
        if self.planned_seconds:
            seconds_left = 0.0
            for name in names[index:]:
                planned_seconds = self.planned_seconds.get(name, 0.0)
                seconds_left += max(planned_seconds - self.progress.seconds(name), 0.0)
            text += f"; about {describe_seconds(seconds_left)} left"
        if text != self.last_text:
            print(text, flush=True)
        self.last_text = text

    def spent_seconds(self) -> float:
        """Return the seconds of this call, and of the parts that earlier calls finished."""
        return self.earlier_seconds + time.monotonic() - self.begin_time

    def used_seconds(self) -> dict[str, float]:
        """Return the seconds that the finished parts of each stage took."""
        used_seconds = {}
        for stage in STAGES:
            seconds = self.progress.seconds(stage)
            if seconds:
                used_seconds[stage] = seconds
        return used_seconds
