"""Fine-tuning of backbones on the same labels, with the learning rate that is best on the validation split."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..command.errors import TrainingDiverged
from ..data.annotation_files import read_list
from ..evaluation.comparison import Progress
from ..tasks import TASKS
from .backbones import Backbones, whole_patches
from .labels import TaskData, median_size, with_label_fraction
from .runs import remove_weights, run_fine_tuning


@dataclass
class Comparison:
    """Fine-tuning of backbones with the same settings and steps, and their scores on the test split.

    Args:
        labels: labeled images with three splits.
        settings: configuration of the fine-tuning, see [`fine_tuning_settings`].
        steps: steps of each fine-tuning, or `None` for the epochs of the settings.
        learning_rates: learning rates that are tried for each backbone.
        folder: output folder, in which each backbone has a folder.
        progress: results of finished parts.
        begin: function that is called before each fine-tuning that is not finished.
    """

    labels: TaskData
    settings: Mapping[str, Any]
    steps: int | None
    learning_rates: Sequence[float]
    folder: Path
    progress: Progress
    begin: Callable[[], Any] = lambda: None

    def choose_rate(self, model: str, backbone: str, seed: int) -> float:
        """Fine-tune a backbone with each learning rate, and return the best one on the validation split.

        Learning rates whose training diverges are left out.

        Raises:
            TrainingDiverged: if the training diverges with each of them.
        """
        if len(self.learning_rates) == 1:
            return self.learning_rates[0]
        scores = {}
        reason = ""
        greater_is_better = True
        for rate in self.learning_rates:
            try:
                validation = self.fine_tune(model, backbone, rate, seed)
                scores[rate] = validation["score"]
                greater_is_better = validation["greater_is_better"]
            except TrainingDiverged as error:
                reason = str(error)
                print(f"The learning rate {rate:g} is left out for {model}: {reason}")
        if not scores:
            raise TrainingDiverged(f"The fine-tuning of {model} diverges with each of `learning_rates`: {reason}")
        if greater_is_better:
            best = max(scores, key=scores.get)
        else:
            best = min(scores, key=scores.get)
        for rate in scores:
            if rate != best:
                remove_weights(self.run_folder(model, rate, seed))
        return best

    def run_folder(self, model: str, rate: float, seed: int, fraction: float = 1.0) -> Path:
        return self.folder / model / f"labels_{100 * fraction:g}_rate_{rate:g}_seed_{seed}"

    def fine_tune(self, model: str, backbone: str, rate: float, seed: int, fraction: float = 1.0) -> dict[str, Any]:
        """Fine-tune a backbone unless it is done.

        Args:
            model: name of the backbone.
            backbone: folder or Hub id of the backbone.
            rate: learning rate.
            seed: seed of the head, of the batches and of the drawn labels.
            fraction: fraction of the training images.

        Returns:
            `score`, the main score on the validation split, and `greater_is_better`; empty without a validation split.

        Raises:
            TrainingDiverged: if the training diverges, or the score is not a number. It is not run again.
        """
        folder = self.run_folder(model, rate, seed, fraction)
        run_name = f"fine_tuning/{model}/{folder.name}"
        if run_name not in self.progress.parts:
            self.begin()
        settings = {
            **settings_of_backbone(self.labels.task, self.settings, backbone),
            "learning_rate": rate,
            "seed": seed,
        }
        if self.steps is not None:
            settings["max_steps"] = self.steps
            settings["save_steps"] = max(self.steps // 4, 1)
        if fraction < 1:
            data = with_label_fraction(self.labels, fraction, seed, self.labels.lists["train"].parent)
            training_images = read_list(Path(data["splits"]["train"]["list"]))
            batch = settings["per_device_train_batch_size"]
            settings["data"] = data
            settings["per_device_train_batch_size"] = min(batch, len(training_images))

        def run() -> dict[str, Any]:
            try:
                metrics = run_fine_tuning(self.labels.task, settings, folder)
            except TrainingDiverged as error:
                return {"diverged": str(error)}
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            if "eval" not in metrics:
                return {}
            score = metrics["eval"][f"eval_{metrics['main_score']}"]
            return {"score": score, "greater_is_better": metrics["greater_is_better"]}

        validation = self.progress.result(run_name, run)
        if "diverged" in validation:
            raise TrainingDiverged(validation["diverged"])
        check_score(validation, "validation")
        return validation

    def score(
        self, model: str, backbone: str, rate: float, seed: int, fraction: float = 1.0, is_kept: bool = False
    ) -> dict[str, Any]:
        """Fine-tune a backbone, and return its main score on the test split with its resampled values.

        Args:
            model, backbone, rate, seed, fraction: as for [`~modeling_vitp.adaptation.comparison.Comparison.fine_tune`].
            is_kept: whether to keep the weights of the fine-tuned model, and to draw predictions.

        Raises:
            TrainingDiverged: if the training diverges, or a score is not a number.
        """
        self.fine_tune(model, backbone, rate, seed, fraction)
        folder = self.run_folder(model, rate, seed, fraction)
        settings = {
            **self.settings,
            "model_name_or_path": str(folder),
            "do_train": False,
            "eval_split": "",
            "test_split": "test",
            "resample_test": True,
            "num_pictures": 4 if is_kept else 0,
        }

        def run() -> dict[str, Any]:
            metrics = run_fine_tuning(self.labels.task, settings, folder / "test")
            name = metrics["main_score"]
            return {
                "metric": name,
                "greater_is_better": metrics["greater_is_better"],
                "is_share": metrics["is_share"],
                "score": metrics["test"][f"test_{name}"],
                "resampled": metrics["test_resampled"],
                "cases": metrics["test_cases"],
            }

        test_scores = self.progress.result(f"fine_tuning/{model}/{folder.name}/test", run)
        if not is_kept:
            remove_weights(folder)
        check_score(test_scores, "test")
        return {
            "model": model,
            "labels": fraction,
            "seed": seed,
            "learning_rate": rate,
            "folder": str(folder),
            **test_scores,
        }


def check_score(scores: Mapping[str, Any], split: str) -> None:
    """Raise [`TrainingDiverged`] if the score of a split is `None`, as NaN is stored."""
    if "score" in scores and scores["score"] is None:
        raise TrainingDiverged(f"The score on the {split} split is not a number.")


def fine_tune_backbones(
    comparison: Comparison, backbones: Backbones, seeds: Sequence[int], fractions: Sequence[float]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Fine-tune all backbones with all seeds and label fractions, and return their scores on the test split.

    The learning rate of a backbone is the best of the first seed on the validation split with all labels. If the
    training of another seed or fraction diverges, it is left out.

    Args:
        comparison: fine-tuning of a backbone.
        backbones: backbones to compare.
        seeds: seeds of the fine-tunings.
        fractions: fractions of the training images, with 1.

    Returns:
        The scores, and sentences on fine-tunings that are left out.
    """
    first_seed = seeds[0]
    scores = []
    notes = []
    for model in backbones.models:
        rate = comparison.choose_rate(model, backbones.path(model, first_seed), first_seed)
        for fraction in fractions:
            for seed in seeds:
                is_kept = seed == first_seed and fraction == 1
                backbone = backbones.path(model, seed)
                try:
                    scores.append(comparison.score(model, backbone, rate, seed, fraction, is_kept))
                except TrainingDiverged as error:
                    if is_kept:
                        raise
                    labels = f" and {100 * fraction:g}% of the labels" if fraction < 1 else ""
                    note = f"{model} with seed {seed}{labels} is left out: {error}"
                    notes.append(note)
                    print(note)
    return scores, notes


def settings_of_backbone(task: str, settings: Mapping[str, Any], backbone: str) -> dict[str, Any]:
    """Return the configuration of the fine-tuning of a backbone, whose images have whole patches of it.

    Args:
        task: name of the task.
        settings: configuration of [`fine_tuning_settings`].
        backbone: folder or Hub id of the backbone.
    """
    settings = {**settings, "model_name_or_path": backbone}
    side_setting = TASKS[task].image_side
    if TASKS[task].keeps_patches and side_setting in settings:
        settings[side_setting] = whole_patches(backbone, settings[side_setting])
    return settings


def fine_tuning_settings(
    labels: TaskData, config: PreTrainedConfig, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the configuration of a fine-tuning: defaults for images or windows of this size, and the given settings.

    Args:
        labels: labeled images.
        config: configuration of the ViT, whose image size is that of classification, see
            [`~modeling_vitp.adaptation.backbones.choose_image_size`].
        settings: settings that replace the defaults.
    """
    images = labels.images["train"]
    configuration = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.05,
        "logging_steps": 10,
        "save_total_limit": 1,
        "watch_samples": 0,
        "num_pictures": 0,
    }
    configuration.update(TASKS[labels.task].fine_tuning_defaults(config, median_size(images), labels.window))
    batch = configuration["per_device_train_batch_size"]
    configuration["per_device_train_batch_size"] = min(batch, len(images))
    configuration.update(labels.settings)
    configuration.update(settings or {})
    configuration.update(data=labels.data, eval_split="val", eval_strategy="no", report_to="none")
    return configuration
