"""Probes of frozen backbones on the labels."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..convert.export import export_backbone
from ..metrics.resampling import Score, paired_difference
from ..pretraining.loading import vision_config_of
from ..tasks import TASKS
from ..vision_towers import pair
from . import runs
from .backbones import Backbones, Start
from .labels import TaskData, num_windows, write_list

PROBED = 1000  # most images or windows of a split whose patch tokens are probed; those of DINOv2-B take 4 MB an image


@dataclass(frozen=True)
class Prober:
    """Probes of frozen backbones.

    Args:
        labels: labeled images.
        image_size: side of the images, the same for all backbones, unlike the crops of published image processors.
        seed: seed of the choice of images.
    """

    labels: TaskData
    image_size: int
    seed: int

    def score(self, backbones: Sequence[str], split: str, output: Path) -> list[dict[str, Any]]:
        """Run `vitp probe`, and return the main score of each backbone and probe with its resampled values.

        Args:
            backbones: folders or Hub ids.
            split: split that is scored.
            output: output folder.
        """
        task = TASKS[self.labels.task]
        settings = {
            "backbones": backbones,
            "data": self.limited_data(split),
            "image_size": self.image_size,
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
                    "score": entry["scores"][task.probe_class.main_score]["mean"],
                    "resampled": entry["resampled"][0],
                    "cases": entry["cases"],
                }
            )
        return scores

    def limited_data(self, split: str) -> dict[str, Any]:
        """Return the setting `data` with about `PROBED` training images and images of a split.

        If the probes of the task read one vector an image, all images are used.
        """
        labels = self.labels
        splits = dict(labels.data["splits"])
        if not TASKS[labels.task].probe_class.reads_patches:
            return {**labels.data, "splits": splits}
        for name in ("train", split):
            images = labels.images[name]
            most_images = max(PROBED // num_windows(labels, name), 1)
            if len(images) <= most_images:
                continue
            drawn = np.random.default_rng(self.seed).permutation(len(images))[:most_images]
            path = labels.lists[name].with_name(f"{name}_probed.txt")
            write_list(path, labels.root, [images[index] for index in sorted(drawn)])
            splits[name] = {**splits[name], "list": str(path.resolve())}
        return {**labels.data, "splits": splits}


def probe_size(start: Start, image_size: int | None) -> int:
    """Return the side of the images of probes: that of the tiles of the pretraining.

    Args:
        start: start of the pretraining.
        image_size: given side of the tiles.
    """
    config = start.config if start.vit is None else vision_config_of(start.vit, image_size)
    return pair(config.image_size)[0]


def probe_backbones(prober: Prober, backbones: Backbones, seed: int, output: Path) -> list[dict[str, Any]]:
    """Return the scores of probes of the frozen backbones on the test split.

    Args:
        prober: probes.
        backbones: backbones to probe.
        seed: seed of random weights.
        output: output folder.
    """
    names = {backbones.path(model, seed): model for model in backbones.models}
    scores = []
    for entry in prober.score(list(names), "test", output):
        scores.append({"model": names[entry.pop("backbone")], **entry})
    return scores


def compare_with_start(prober: Prober, checkpoint: str, start: str, folder: Path) -> dict[str, Any]:
    """Compare the frozen backbone of a checkpoint with the start, by a linear probe on the validation split.

    Args:
        prober: probes.
        checkpoint: folder of the checkpoint.
        start: folder or Hub id of the start.
        folder: folder for the backbone and the probes, which is removed.

    Returns:
        `is_worse`, whether the backbone is clearly worse, and `text` with the scores.
    """
    backbone = str(export_backbone(checkpoint, folder / "backbone"))
    entries = prober.score([backbone, start], "val", folder / "probe")
    backbone_entry, start_entry = (entry for entry in entries if entry["probe"] == "linear")
    backbone_score = Score(backbone_entry["score"], backbone_entry["resampled"], backbone_entry["cases"])
    start_score = Score(start_entry["score"], start_entry["resampled"], start_entry["cases"])
    difference = paired_difference([backbone_score], [start_score])
    shutil.rmtree(folder)
    text = (
        f"{TASKS[prober.labels.task].probe_class.title} {backbone_score.value:.3f} instead of {start_score.value:.3f} "
        f"(95% interval of the difference {difference.low:+.3f} to {difference.high:+.3f})"
    )
    return {"is_worse": difference.high < 0, "text": text}
