"""What a probe that has learned from clean images reads under the corruptions of the paper."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..images.corruptions import SEVERITIES
from .backbones import Backbone
from .few_labels import Labels
from .segmentation import Segmentation

SHOWN = ("patch_auc", "mean_iou")


def probe_robustness(
    task: Segmentation, backbone: Backbone, severities: Sequence[int], seed: int, folder: Path
) -> dict[str, dict[str, dict]]:
    """Scores of the readers of a frozen backbone, fitted once, on clean and on corrupted test images.

    Args:
        severities: of each corruption, from 1 to 5.
        seed: of what is drawn: noise, clouds, gaps, directions.
        folder: for features, which are deleted again.

    Returns:
        By probe and score (`patch_auc`, `mean_iou`): `clean`; `corruptions`, the mean over the severities of each;
        `average`, the mean of these; and `relative`, which is the average divided by `clean`.
    """
    labels = Labels(share=1.0)
    draws = {labels: [np.arange(len(task.samples["train"]))]}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as features:
        heads = task.fit(backbone, draws, None, Path(features))

        def score(task: Segmentation) -> dict[str, dict[str, float]]:
            return {probe: draw[0] for (probe, _), draw in task.score(heads, backbone, None, Path(features)).items()}

        clean, corrupted = score(task), {}
        for name in tqdm(SEVERITIES, desc=f"{backbone.name}, corruptions"):
            corrupted[name] = [score(task.under(name, severity, seed)) for severity in severities]
    return {
        probe: {
            shown: summarise(
                clean[probe][shown],
                {name: [scores[probe][shown] for scores in found] for name, found in corrupted.items()},
            )
            for shown in SHOWN
        }
        for probe in clean
    }


def summarise(clean: float, corrupted: dict[str, list[float]]) -> dict:
    means = {name: float(np.mean(scores)) for name, scores in corrupted.items()}
    average = float(np.mean(list(means.values())))
    return {"clean": clean, "average": average, "relative": average / clean, "corruptions": means}
