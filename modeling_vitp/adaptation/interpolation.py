"""Choice of a backbone between the start and the pretrained ViT, by probes on validation images."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..convert.export import export_backbone
from ..metrics.resampling import Score, first_near_best
from .probing import Prober

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the way of the weights from the start to the pretrained ViT


def score_alphas(prober: Prober, start: str, pretrained: Path, folder: Path) -> list[dict[str, Any]]:
    """Score a linear probe of each backbone between the start and the pretrained ViT on the validation images.

    Args:
        prober: probes.
        start: folder or Hub id of the ViT before the pretraining.
        pretrained: folder of the pretrained model.
        folder: folder for the backbones and the probes, which is removed.

    Returns:
        `alpha`, `score`, the `resampled` scores and the number of `cases` of each backbone, in the order of [`ALPHAS`].
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped
    backbones = []
    for alpha in ALPHAS:
        backbone = export_backbone(pretrained, folder / f"alpha_{alpha:g}", start=start, interpolation_alpha=alpha)
        backbones.append(str(backbone))
    scores = []
    for alpha, score in zip(ALPHAS, prober.linear_scores(backbones, folder / "probe")):
        scores.append({"alpha": alpha, "score": score.value, "resampled": score.resampled, "cases": score.cases})
    shutil.rmtree(folder)
    return scores


def choose_alpha(scores: Sequence[Mapping[str, Any]]) -> float:
    """Return the smallest alpha whose score is within one standard error of the best.

    So the ViT that is closest to the start is taken among those that the validation images cannot tell from the best,
    see [`~modeling_vitp.metrics.resampling.first_near_best`].

    Args:
        scores: scores of [`score_alphas`], or some of them, in increasing order of alpha.
    """
    near_best = first_near_best([Score(entry["score"], entry["resampled"], entry["cases"]) for entry in scores])
    return scores[near_best]["alpha"]


def describe_alphas(scores: Sequence[Mapping[str, Any]], alpha: float) -> str:
    """Return a sentence with the chosen alpha and all scores."""
    texts = [f"{entry['score']:.3f} at {entry['alpha']:g}" for entry in scores]
    return f"{alpha:g} of the way from the start to the pretrained ViT (linear probe, validation: {', '.join(texts)})"
