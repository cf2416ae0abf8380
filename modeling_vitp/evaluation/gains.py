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

BACKBONE, START, RANDOM, PIXELS = "backbone", "at the start", "random weights", "pixels of a patch"
DEPTHS = 4
TITLES = {"patch_auc": "AUC of a patch", "mean_iou": "mean IoU", "accuracy": "accuracy"}  # Of scores in tables.
ALL_LABELS = FewLabels(share=1.0)


def load_backbones(backbone: Path, start: Path, seed: int, device: str | torch.device = "cpu") -> dict[str, Backbone]:
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
    return {name: replace(backbone, name=name) for name, backbone in backbones.items()}


def probe_run(settings: dict, splits: Sequence[str], output_dir: Path, seed: int, device: str | torch.device) -> dict:
    """Return the result of [`measure_gains`] for a run with `backbone` and `backbone_at_start` in its folder.

    Args:
        settings: `data` of a fine-tuning configuration, see [`~modeling_vitp.tasks.segmentation.data.DenseData`].
        splits: training split and test split of the probes.
        output_dir: folder of the run; plots are saved to `probe` in it.
        seed: seed of the random weights.
        device: device of the backbones.
    """
    backbones = load_backbones(output_dir / "backbone", output_dir / "backbone_at_start", seed, device)
    measured = measure_gains(DenseData.from_dict(settings), *splits, backbones=backbones, folder=output_dir / "probe")
    return with_least_gain(measured[splits[1]])


def with_least_gain(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of [`measure_gains`] of a split with `least_gain`, the smallest gain of each probe."""
    return {**measured, "least_gain": {probe: min(gains.values()) for probe, gains in measured["gains"].items()}}


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
    tasks = {
        split: SegmentationProbe(data, {"train": train_split, "test": split}, 1e-2, depths) for split in test_splits
    }
    found = {split: {"control": task.control(), "scores": {}, "token_similarity": {}} for split, task in tasks.items()}
    rows = {split: panels_of_truth(task, backbones[BACKBONE]) for split, task in tasks.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, backbone in backbones.items():
        with tempfile.TemporaryDirectory(dir=folder) as features:
            where = None, Path(features)
            train = next(iter(tasks.values()))
            heads = train.fit(backbone, {ALL_LABELS: [np.arange(len(train.samples["train"]))]}, *where)
            for split, task in tasks.items():
                scores = task.score(heads, backbone, *where)
                found[split]["scores"][name] = {probe: draw[0] for (probe, _), draw in scores.items()}
                maps = task.features(backbone, "test", *where)
                if name != PIXELS:
                    output = maps[..., -backbone.model.config.hidden_size :]
                    found[split]["token_similarity"][name] = token_similarity(output)
                if name in (START, BACKBONE):
                    add_panels(rows[split], task, name, maps, heads["linear", ALL_LABELS][0])
    for split, of_split in found.items():
        of_split["gains"] = gains_of(of_split["scores"])
        draw_panels(rows[split].values(), folder / f"{split}.png")
    return found


def gains_of(scores: dict[str, dict], score: str = "patch_auc") -> dict[str, dict[str, float]]:
    """Return the difference of a score of `BACKBONE` to that of each other backbone, by probe."""
    return {
        probe: {
            name: scores[BACKBONE][probe][score] - scores[name][probe][score] for name in scores if name != BACKBONE
        }
        for probe in scores[BACKBONE]
    }


def token_similarity(features: np.ndarray) -> float:
    """Return the mean cosine similarity of two patch tokens of the same image; 1 if all tokens are equal.

    Args:
        features: patch tokens, `(images, rows, columns, width)`.
    """
    number, of_pairs = math.prod(features.shape[1:3]), []
    for maps in features:  # One at a time, because a mapped file may be larger than memory.
        tokens = torch.nn.functional.normalize(torch.tensor(maps).flatten(0, 1), dim=-1)
        of_pairs.append(tokens.sum(0).square().sum().item() - number)  # Without the similarity of each with itself.
    return float(np.mean(of_pairs)) / (number * (number - 1))


def gains_table(measured: dict) -> str:
    """Return a Markdown table with a row for each backbone, and a column for each probe and score."""
    by_probe = measured["scores"][BACKBONE]
    columns = [(probe, score) for probe in by_probe for score in TITLES if score in by_probe[probe]]
    rows = []
    for name, scores in measured["scores"].items():
        rows.append([name, *(f"{scores[probe][score]:.3f}" for probe, score in columns)])
    titles = [f"{probe}: {TITLES[score]}" for probe, score in columns]
    return table(["read from", *titles], rows)


def panels_of_truth(task: SegmentationProbe, backbone: Backbone) -> dict[int, list[tuple[str, np.ndarray]]]:
    """Return image, as a backbone reads it, and mask of up to four test samples, by their index."""
    samples, rows = task.read_for(backbone, "test"), {}
    band_names = None if samples.spec is None else samples.spec.band_names
    for index in np.linspace(0, len(samples) - 1, min(4, len(samples))).astype(int).tolist():
        sample = samples[index]
        image = shown(sample["images"][0], band_names)
        rows[index] = [("image", image), ("truth", palette_of(task)[sample["mask"].numpy()])]
    return rows


def add_panels(rows: dict[int, list], task: SegmentationProbe, name: str, features: np.ndarray, probe: Head) -> None:
    """Add the principal components of a backbone and the predicted classes to each row."""
    for index, row in rows.items():
        maps = torch.tensor(features[index])
        scores = principal_scores(maps.permute(2, 0, 1))
        colors = colors_of(scores)
        labels = interpolate(probe(maps).cpu(), row[0][1].shape[:2]).max(0).indices.numpy()
        row += [(f"{name}: components", colors), (f"{name}: read", palette_of(task)[labels])]


def palette_of(task: SegmentationProbe) -> np.ndarray:
    """Return the color of each class index, uint8 `(256, 3)`; indices without a class are gray."""
    palette = np.full((256, 3), 127, dtype=np.uint8)
    palette[: len(task.names)] = task.data.encoding.palette
    return palette


def draw_panels(rows: Iterable[Sequence[tuple[str, np.ndarray]]], path: Path) -> None:
    """Save rows of uint8 RGB panels with titles to an image file."""
    rows = list(rows)
    height, width = len(rows), len(rows[0])
    figure = Figure(figsize=(2.3 * width, 2.5 * height), layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    for line, panels in zip(axes, rows):
        for axis, (title, panel) in zip(line, panels):
            axis.imshow(panel, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    figure.savefig(path, dpi=110)
