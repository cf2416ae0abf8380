"""Gains of a pretraining: probes of the frozen backbone compared with controls.

The projector and the language model can learn many tasks from the output of a random ViT. A falling loss and correct
answers therefore do not show that the ViT has learned anything. To measure this, probes of the pretrained ViT are
compared with those of the ViT at the start, of the same ViT with random weights, and of the raw pixels of a patch.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..cards.sections import table
from ..images.pixels import colors_of, principal_scores, shown
from ..probing.backbones import Backbone, PatchPixels, load_backbone
from ..probing.few_labels import FewLabels
from ..tasks.segmentation.data import DenseData
from ..tasks.segmentation.probe import Head, SegmentationProbe, interpolate

BACKBONE = "backbone"
START = "at the start"
RANDOM = "random weights"
PIXELS = "pixels of a patch"
DEPTHS = 4
MOST_PANELS = 4  # Number of test images that are drawn.
TITLES = {  # Of scores in tables.
    "patch_auc": "AUC of a patch",
    "mean_iou": "mean IoU",
    "accuracy": "accuracy",
    "mean_average_precision": "mean average precision",
}
ALL_LABELS = FewLabels(share=1.0)


def load_backbones(
    backbone: Path,
    start: Path,
    seed: int,
    device: str | torch.device = "cpu",
) -> dict[str, Backbone]:
    """Return the backbone and its controls under `BACKBONE`, `START`, `RANDOM` and `PIXELS`.

    Args:
        backbone, start: folders of the backbones that were exported at the end and at the start of the run.
        seed: seed of the random weights, which differ from those of the start.
        device: device of the backbones.
    """
    trained = load_backbone(str(backbone), device)
    backbones = {
        BACKBONE: trained,
        START: load_backbone(str(start), device),
        RANDOM: load_backbone(str(backbone), device, random_seed=1000 + seed),
        PIXELS: PatchPixels.of(trained),
    }
    named_backbones = {}
    for name, opened_backbone in backbones.items():
        named_backbones[name] = replace(opened_backbone, name=name)
    return named_backbones


def probe_run(
    data: DenseData,
    train_split: str,
    test_split: str,
    output_dir: Path,
    seed: int,
    device: str | torch.device,
) -> dict:
    """Return the result of [`measure_gains`] for a run with `backbone` and `backbone_at_start` in its folder.

    Args:
        data: images with masks.
        train_split: training split of the probes.
        test_split: scored split of the probes.
        output_dir: folder of the run; plots are saved to `probe` in it.
        seed: seed of the random weights.
        device: device of the backbones.
    """
    backbones = load_backbones(
        output_dir / "backbone",
        output_dir / "backbone_at_start",
        seed,
        device,
    )
    gains = measure_gains(
        data,
        train_split,
        test_split,
        backbones=backbones,
        folder=output_dir / "probe",
    )
    return with_least_gain(gains[test_split])


def with_least_gain(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of [`measure_gains`] of a split with `least_gain`, the smallest gain of each probe."""
    least_gain = {}
    for probe, gains in measured["gains"].items():
        least_gain[probe] = min(gains.values())
    return {**measured, "least_gain": least_gain}


def measure_gains(
    data: DenseData,
    train_split: str,
    *test_splits: str,
    backbones: dict[str, Backbone],
    folder: Path,
) -> dict[str, dict]:
    """Return the scores of each backbone, and the gains of `BACKBONE` over the others, for each test split.

    The tokens of up to `DEPTHS` depths are probed, see [`~modeling_vitp.probing.backbones.Backbone.maps`].

    Args:
        data: images with masks.
        train_split: training split of the probes.
        test_splits: test splits, which must not be used in pretraining.
        backbones: backbone and controls, see [`load_backbones`].
        folder: folder of the plots, `SPLIT.png`.

    Returns:
        Results by split: `control` (most frequent class everywhere), `scores` by backbone and probe, `gains` by probe
        and backbone (differences in `patch_auc`), and `token_similarity` by backbone, see [`token_similarity`].
    """
    depths = min(DEPTHS, backbones[BACKBONE].model.config.num_hidden_layers)
    tasks = {}
    for split in test_splits:
        splits = {"train": train_split, "test": split}
        tasks[split] = SegmentationProbe(data, splits, l2=1e-2, depths=depths)
    measured = {}
    panels = {}
    for split, task in tasks.items():
        measured[split] = {
            "control": task.control(),
            "scores": {},
            "token_similarity": {},
        }
        panels[split] = panels_of_truth(task, backbones[BACKBONE])
    folder.mkdir(parents=True, exist_ok=True)
    for name, backbone in backbones.items():
        with tempfile.TemporaryDirectory(dir=folder) as features_folder:
            features_folder = Path(features_folder)
            heads = fit_to_all_labels(tasks[test_splits[0]], backbone, features_folder)
            for split, task in tasks.items():
                scores_of_draws = task.score(heads, backbone, None, features_folder)
                scores = {}
                for (probe, _), draws in scores_of_draws.items():
                    scores[probe] = draws[0]
                measured[split]["scores"][name] = scores
                features = task.features(backbone, "test", None, features_folder)
                if name != PIXELS:
                    width = backbone.model.config.hidden_size
                    output_tokens = features[..., -width:]
                    measured[split]["token_similarity"][name] = token_similarity(output_tokens)
                if name in (START, BACKBONE):
                    (linear_head,) = heads["linear", ALL_LABELS]
                    add_panels(panels[split], task, name, features, linear_head)
    for split, measured_of_split in measured.items():
        measured_of_split["gains"] = gains_of(measured_of_split["scores"])
        draw_panels(panels[split].values(), folder / f"{split}.png")
    return measured


def fit_to_all_labels(
    task: SegmentationProbe,
    backbone: Backbone,
    folder: Path,
) -> dict[tuple[str, FewLabels], list[Head]]:
    """Return the heads of a backbone that are fitted to all training images of a task."""
    num_images = len(task.samples["train"])
    draws = {ALL_LABELS: [np.arange(num_images)]}
    return task.fit(backbone, draws, None, folder)


def gains_of(scores: dict[str, dict], score: str = "patch_auc") -> dict[str, dict[str, float]]:
    """Return the difference of a score of `BACKBONE` to that of each other backbone, by probe."""
    gains = {}
    for probe, backbone_scores in scores[BACKBONE].items():
        gains[probe] = {}
        for control, control_scores in scores.items():
            if control == BACKBONE:
                continue
            control_score = control_scores[probe][score]
            gains[probe][control] = backbone_scores[score] - control_score
    return gains


def token_similarity(features: np.ndarray) -> float:
    """Return the mean cosine similarity of two patch tokens of the same image; 1 if all tokens are equal.

    Args:
        features: patch tokens, `(images, rows, columns, width)`.
    """
    num_tokens = math.prod(features.shape[1:3])
    similarities_of_images = []
    for feature_map in features:  # One at a time, because a mapped file may be larger than memory.
        tokens = torch.tensor(feature_map).flatten(0, 1)
        tokens = torch.nn.functional.normalize(tokens, dim=-1)
        sum_of_tokens = tokens.sum(0)
        # The squared norm of the sum of the tokens is the sum over all pairs, also of each token with itself.
        similarities = sum_of_tokens.square().sum().item()
        similarities_of_images.append(similarities - num_tokens)
    num_pairs = num_tokens * (num_tokens - 1)
    mean_similarities = float(np.mean(similarities_of_images))
    return mean_similarities / num_pairs


def gains_table(measured: dict) -> str:
    """Return a Markdown table with a row for each backbone, and a column for each probe and score."""
    columns = []
    titles = ["read from"]
    for probe, backbone_scores in measured["scores"][BACKBONE].items():
        for score, title in TITLES.items():
            if score in backbone_scores:
                columns.append((probe, score))
                titles.append(f"{probe}: {title}")
    rows = []
    for name, scores in measured["scores"].items():
        cells = [f"{scores[probe][score]:.3f}" for probe, score in columns]
        rows.append([name, *cells])
    return table(titles, rows)


def panels_of_truth(task: SegmentationProbe, backbone: Backbone) -> dict[int, list[tuple[str, np.ndarray]]]:
    """Return image, as a backbone reads it, and mask of up to four test samples, by their index."""
    samples = task.read_for(backbone, "test")
    band_names = None
    if samples.spec is not None:
        band_names = samples.spec.band_names
    palette = palette_of(task)
    number = min(MOST_PANELS, len(samples))
    positions = np.linspace(0, len(samples) - 1, number)
    indices = positions.astype(int).tolist()
    rows = {}
    for index in indices:
        sample = samples[index]
        image = shown(sample["images"][0], band_names)
        mask = sample["mask"].numpy()
        rows[index] = [("image", image), ("truth", palette[mask])]
    return rows


def add_panels(
    rows: dict[int, list],
    task: SegmentationProbe,
    name: str,
    features: np.ndarray,
    probe: Head,
) -> None:
    """Add the principal components of a backbone and the predicted classes to each row."""
    palette = palette_of(task)
    for index, row in rows.items():
        feature_map = torch.tensor(features[index])
        scores = principal_scores(feature_map.permute(2, 0, 1))
        components = colors_of(scores)
        _, image = row[0]
        logits = probe(feature_map).cpu()
        logits_of_pixels = interpolate(logits, image.shape[:2])
        labels = logits_of_pixels.argmax(0).numpy()
        row.append((f"{name}: components", components))
        row.append((f"{name}: read", palette[labels]))


def palette_of(task: SegmentationProbe) -> np.ndarray:
    """Return the color of each class index, uint8 `(256, 3)`; indices without a class are gray."""
    palette = np.full((256, 3), 127, dtype=np.uint8)
    palette[: len(task.names)] = task.data.encoding.palette
    return palette


def draw_panels(rows: Iterable[Sequence[tuple[str, np.ndarray]]], path: Path) -> None:
    """Save rows of uint8 RGB panels with titles to an image file."""
    rows = list(rows)
    num_rows = len(rows)
    num_columns = len(rows[0])
    width = 2.3 * num_columns
    height = 2.5 * num_rows
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for row_axes, panels in zip(axes, rows):
        for axis, (title, panel) in zip(row_axes, panels):
            axis.imshow(panel, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    figure.savefig(path, dpi=110)
