"""What a pretraining has brought to its ViT: what can be read from the frozen backbone, beside its controls.

Projector and language model learn many tasks from the pixels that a random ViT passes on, so a loss that falls and
answers that are right do not say that the ViT has learned anything. What is kept is the ViT; it is held against itself
at the start, the same ViT with random weights, and the bare pixels of a patch.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from ..cards.sections import table
from ..dense.data import DenseData
from .backbones import Backbone, PatchPixels, load_backbone
from .components import align_scores, colors_of, principal_scores
from .few_labels import Labels
from .segmentation import Segmentation, interpolate

BACKBONE, START, RANDOM, PIXELS = "backbone", "at the start", "random weights", "pixels of a patch"
DEPTHS = 4
ALL_LABELS = Labels(share=1.0)


def load_arms(backbone: Path, start: Path, seed: int, device: str | torch.device = "cpu") -> dict[str, Backbone]:
    """The backbone and its controls, by `BACKBONE`, `START`, `RANDOM` and `PIXELS`.

    Args:
        backbone, start: folders of what was exported at the end and at the start of the run.
        seed: of the random weights, which are others than the start's.
    """
    trained = load_backbone(str(backbone), device)
    arms = {
        BACKBONE: trained,
        START: load_backbone(str(start), device),
        RANDOM: load_backbone(str(backbone), device, random_seed=1000 + seed),
        PIXELS: PatchPixels.of(trained),
    }
    return {name: replace(arm, name=name) for name, arm in arms.items()}


def probe_run(settings: dict, splits: Sequence[str], output_dir: Path, seed: int, device: str | torch.device) -> dict:
    """What [`measure_gains`] finds of a run that left `backbone` and `backbone_at_start` in its folder.

    Args:
        settings: `data` of a configuration of fine-tuning, see [`~modeling_vitp.dense.data.DenseData`].
        splits: what the probes learn from, and what they are scored on.
        output_dir: of the run; `probe.png` goes to `probe` in it.
    """
    arms = load_arms(output_dir / "backbone", output_dir / "backbone_at_start", seed, device)
    measured = measure_gains(DenseData.from_dict(settings), tuple(splits), arms, output_dir / "probe")
    print(f"\nWhat is read from frozen features on split {splits[1]!r}:\n\n{gains_table(measured)}\n")
    return measured


def measure_gains(
    data: DenseData, splits: tuple[str, str], arms: dict[str, Backbone], folder: Path, depths: int = DEPTHS
) -> dict:
    """Scores of every arm, and by how much the backbone is above each of the others.

    Args:
        data: images with masks.
        splits: what the probes learn from, and what they are scored on, which nothing else has seen.
        arms: see [`load_arms`].
        folder: for the features and `probe.png`.
        depths: see [`~modeling_vitp.probing.backbones.Backbone.maps`]; at most as many as there are layers.

    Returns:
        `control` (the largest class everywhere), `scores` by arm and probe, `gains` by probe and arm (differences in
        `patch_auc`), and `token_similarity` by arm, see [`token_similarity`].
    """
    depths = min(depths, arms[BACKBONE].model.config.num_hidden_layers)
    task = Segmentation(data, dict(zip(("train", "test"), splits)), l2=1e-2, depths=depths)
    draws = {ALL_LABELS: [np.arange(len(task.samples["train"]))]}
    scores, similarity = {}, {}
    for name, arm in arms.items():
        probed = task.probe(arm, draws, None, folder / "features")
        scores[name] = {probe: draw[0] for (probe, _), draw in probed.items()}
        if name != PIXELS:
            width = arm.model.config.hidden_size
            similarity[name] = token_similarity(task.features(arm, "test", None, folder / "features")[..., -width:])
    gains = {
        probe: {
            name: scores[BACKBONE][probe]["patch_auc"] - scores[name][probe]["patch_auc"]
            for name in arms
            if name != BACKBONE
        }
        for probe in scores[BACKBONE]
    }
    draw_probes(task, {name: arms[name] for name in (START, BACKBONE)}, folder)
    return {"control": task.control(), "scores": scores, "gains": gains, "token_similarity": similarity}


def token_similarity(features: np.ndarray) -> float:
    """Mean cosine similarity of two patch tokens of one image: 1 where every token says the same.

    Args:
        features: of shape `(images, rows, columns, width)`.
    """
    tokens = torch.nn.functional.normalize(torch.tensor(features).flatten(1, 2), dim=-1)
    number = tokens.shape[1]
    of_pairs = tokens.sum(1).square().sum(-1) - number  # a token with itself is no pair
    return (of_pairs / (number * (number - 1))).mean().item()


def gains_table(measured: dict) -> str:
    """Markdown: a row for each arm, a column for each probe and score."""
    probes = list(measured["gains"])
    columns = [(probe, score) for probe in probes for score in ("patch_auc", "mean_iou")]
    rows = [
        [name, *(f"{by_probe[probe][score]:.3f}" for probe, score in columns)]
        for name, by_probe in measured["scores"].items()
    ]
    titles = [f"{probe}: {'AUC of a patch' if score == 'patch_auc' else 'mean IoU'}" for probe, score in columns]
    return table(["read from", *titles], rows)


def draw_probes(task: Segmentation, arms: dict[str, Backbone], folder: Path, number: int = 4) -> None:
    """`probe.png`: of some test images the truth, and for each arm principal components and what the probe reads."""
    samples = task.samples["test"]
    chosen = np.linspace(0, len(samples) - 1, min(number, len(samples))).astype(int)
    rows = [panels_of_truth(task, samples[int(index)]) for index in chosen]
    references = {}
    for name, arm in arms.items():
        (probe,) = task.fit(arm, {ALL_LABELS: [np.arange(len(task.samples["train"]))]}, None, folder / "features")[
            "linear", ALL_LABELS
        ]
        features = task.features(arm, "test", None, folder / "features")
        for row, index in zip(rows, chosen):
            maps = torch.tensor(features[index])
            scores = principal_scores(maps.permute(2, 0, 1))
            scores = align_scores(scores, references.setdefault(index, scores))
            height, width = row[0][1].shape[:2]
            labels = interpolate(probe(maps).cpu(), (height, width)).argmax(0).numpy()
            row += [(f"{name}: components", colors_of(scores)), (f"{name}: read", palette_of(task)[labels])]
    draw_rows(rows, folder / "probe.png")


def palette_of(task: Segmentation) -> np.ndarray:
    """RGB by class index, uint8 of shape `(256, 3)`; gray where there is no class."""
    palette = np.full((256, 3), 127, dtype=np.uint8)
    palette[: len(task.names)] = task.data.encoding.palette
    return palette


def panels_of_truth(task: Segmentation, sample: dict) -> list[tuple[str, np.ndarray]]:
    image = sample["images"][0].permute(1, 2, 0).numpy()
    return [("image", image), ("truth", palette_of(task)[sample["mask"].numpy()])]


def draw_rows(rows: Sequence[Sequence[tuple[str, np.ndarray]]], path: Path) -> None:
    """Panels with titles, uint8 RGB, as a picture."""
    shape = len(rows), len(rows[0])
    figure, axes = plt.subplots(*shape, figsize=(2.3 * shape[1], 2.5 * shape[0]), squeeze=False, layout="constrained")
    for line, panels in zip(axes, rows):
        for axis, (title, panel) in zip(line, panels):
            axis.imshow(panel, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)
