"""Probes of frozen backbones on the labels."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..convert.export import export_backbone
from ..metrics.resampling import Score, first_near_best, paired_difference
from ..tasks import TASKS
from . import runs
from .backbones import Backbones, whole_patches
from .labels import TaskData, num_windows, write_list

PROBED = 1000  # most images or windows of a split whose patch tokens are probed; those of DINOv2-B take 4 MB an image


@dataclass(frozen=True)
class Prober:
    """Probes of frozen backbones.

    Args:
        labels: labeled images.
        image_size: side of the images in pixels, rounded to whole patches of each backbone, unlike the crops of
            published image processors.
        seed: seed of the choice of images.
    """

    labels: TaskData
    image_size: int
    seed: int

    def score(self, backbones: Sequence[str], split: str, output: Path) -> list[dict[str, Any]]:
        """Run `vitp probe`, and return the main score of each backbone and probe with its title and resampled values.

        Args:
            backbones: folders or Hub ids of ViTs with patches of one size.
            split: split that is scored.
            output: output folder.
        """
        task = TASKS[self.labels.task]
        settings = {
            "backbones": backbones,
            "data": self.limited_data(split),
            "image_size": whole_patches(backbones[0], self.image_size),
            "task": task.name,
            "test_split": split,
            "intervals": True,
        }
        metrics = runs.run_probe(settings, output)
        shutil.rmtree(output / "features", ignore_errors=True)
        scores = []
        for entry in metrics["results"]:
            scores.append(
                {
                    "backbone": entry["backbone"],
                    "probe": entry["probe"],
                    "metric": metrics["title"],
                    "score": entry["scores"][metrics["main_score"]]["mean"],
                    "resampled": entry["resampled"][0],
                    "cases": entry["cases"],
                }
            )
        return scores

    def linear_entries(self, backbones: Sequence[str], folder: Path) -> list[dict[str, Any]]:
        """Return the entries of [`score`] of a linear probe on the validation split, in the order of the backbones.

        Args:
            backbones: folders or Hub ids of ViTs with patches of one size.
            folder: output folder.
        """
        return [entry for entry in self.score(backbones, "val", folder) if entry["probe"] == "linear"]

    def linear_scores(self, backbones: Sequence[str], folder: Path) -> list[Score]:
        """Return the scores of [`linear_entries`]."""
        return [score_of(entry) for entry in self.linear_entries(backbones, folder)]

    def limited_data(self, split: str) -> dict[str, Any]:
        """Return the setting `data` with about `PROBED` training images and images of a split.

        If the probes of the task read one vector an image, all images are used.
        """
        labels = self.labels
        splits = dict(labels.data["splits"])
        if TASKS[labels.task].probe_class.reads_patches:
            for name in ("train", split):
                most_images = max(PROBED // num_windows(labels, name), 1)
                if len(labels.images[name]) > most_images:
                    path = self.write_probed_images(name, most_images)
                    splits[name] = {**splits[name], "list": str(path.resolve())}
        return {**labels.data, "splits": splits}

    def write_probed_images(self, split: str, number: int) -> Path:
        """Draw images of a split, and return the file with their list."""
        labels = self.labels
        images = labels.images[split]
        order = np.random.default_rng(self.seed).permutation(len(images))
        probed_images = [images[index] for index in sorted(order[:number])]
        path = labels.lists[split].with_name(f"{split}_probed.txt")
        write_list(path, labels.root, probed_images)
        return path


def score_of(entry: Mapping[str, Any]) -> Score:
    """Return the score of an entry of [`Prober.score`]."""
    return Score(entry["score"], entry["resampled"], entry["cases"])


def probe_backbones(prober: Prober, backbones: Backbones, seed: int, output: Path) -> list[dict[str, Any]]:
    """Return the scores of probes of the frozen backbones on the test split.

    Args:
        prober: probes.
        backbones: backbones to probe.
        seed: seed of random weights.
        output: output folder.
    """
    model_scores = []
    for model in backbones.models:
        for score in prober.score([backbones.path(model, seed)], "test", output / model):
            del score["backbone"]
            model_scores.append({"model": model, **score})
    return model_scores


def compare_with_start(prober: Prober, checkpoints: Sequence[str], start: str, folder: Path) -> dict[str, Any]:
    """Choose a checkpoint, and compare its frozen backbone with the start, by a linear probe on the validation split.

    The first checkpoint within one standard error of the best is chosen, see
    [`~modeling_vitp.metrics.resampling.first_near_best`].

    Args:
        prober: probes.
        checkpoints: folders of the checkpoints, the one that changes the start the least first.
        start: folder or Hub id of the start.
        folder: folder for the backbones and the probes, which is removed.

    Returns:
        `chosen`, the index of the checkpoint; `is_worse`, whether its backbone is clearly worse; and `text` with its
        score and that of the start.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped
    backbones = []
    for index, checkpoint in enumerate(checkpoints):
        backbones.append(str(export_backbone(checkpoint, folder / f"backbone_{index}")))
    entries = prober.linear_entries([*backbones, start], folder / "probe")
    shutil.rmtree(folder)
    *backbone_scores, start_score = [score_of(entry) for entry in entries]
    chosen = first_near_best(backbone_scores)
    chosen_score = backbone_scores[chosen]
    difference = paired_difference([chosen_score], [start_score])
    score_title = entries[0]["metric"]
    text = (
        f"{score_title} {chosen_score.value:.3f} instead of {start_score.value:.3f} "
        f"(95% interval of the difference {difference.low:+.3f} to {difference.high:+.3f})"
    )
    return {"chosen": chosen, "is_worse": difference.high < 0, "text": text}
