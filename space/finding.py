"""The finding of the first page: a linear layer tells trees from ground better on the trained ViT than on its controls.

    python space/finding.py lab/data/aerial_trees

For the packed model, for the same ViT with random weights, and for the pixels of a patch, fits a linear layer that
tells from one patch of 8 × 8 pixels whether it shows a tree. It learns on the `train` split and is measured on images
of the `test` split that do not overlap. The layers, the figures and the image to show are written to
`examples/finding.safetensors` and `examples/finding.jpg`. The image is the one whose area of trees is nearest to half.
`thumbnail.jpg` is the preview of a shared link.
"""

import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from loading import PACKED, RANDOM, Models
from maps import display_size, draw_map, patch_features
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file

from modeling_vitp.images.reading import read_image, read_picture
from modeling_vitp.metrics.ranking import area_under_curve
from modeling_vitp.probing.heads import fit_linear

FILE = Path(__file__).parent / "examples" / "finding.safetensors"
IMAGE = FILE.with_suffix(".jpg")
TRAINED, UNTRAINED, PIXELS = "trained", "random weights", "pixels"
SIDE, STRIDE = 224, 96  # pixels of a training crop and between crops
GROUND, TREE = np.array([45, 30, 75]), np.array([150, 255, 70])  # colors of the map


class Finding(NamedTuple):
    """The finding, as [`read_finding`] returns it.

    Args:
        probes: weights of a linear layer for `TRAINED`, `UNTRAINED` and `PIXELS`, each followed by its bias.
        areas: probability that a patch of a tree has a higher score than a patch of ground, the mean over the images.
        leads: for each control, the bounds of the 95% interval over the images of the trained ViT's lead.
        num_images: number of test images.
        boxes: boxes of the trees in the shown image, `[left, top, right, bottom]` in pixels.
    """

    probes: dict[str, torch.Tensor]
    areas: dict[str, float]
    leads: dict[str, list[float]]
    num_images: int
    boxes: list[list[int]]


def read_finding(models: Models) -> Finding | None:
    """Return the finding of the default model, or `None` if it is another model than the packed one."""
    with safe_open(FILE, "pt") as file:
        facts = json.loads(file.metadata()["finding"])
        if checksum(models) != facts.pop("checksum"):
            return None
        return Finding({name: file.get_tensor(name) for name in (TRAINED, UNTRAINED, PIXELS)}, **facts)


def checksum(models: Models) -> int:
    """Return a number that identifies the weights of the default model's ViT."""
    last = list(models.backbone().model.parameters())[-1]
    return zlib.crc32(last.detach().cpu().half().numpy().tobytes())


def patch_vectors(models: Models, image: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the features of each patch, float32 of shape `(rows, columns, width)`, by the default model and controls.

    The sides of the image, uint8 RGB of shape `(height, width, 3)`, are multiples of the patch size.
    """
    backbone = models.backbone()
    backbones = {TRAINED: backbone, UNTRAINED: models.backbone(backbone.name + RANDOM)}
    rows, columns = (side // patch for side, patch in zip(image.shape, backbone.patch))
    resolution = max(rows, columns)
    vectors = {name: patch_features(one, image, resolution).movedim(0, -1) for name, one in backbones.items()}
    patches = torch.tensor(image / 255, dtype=torch.float32).unflatten(0, (rows, -1)).unflatten(2, (columns, -1))
    return vectors | {PIXELS: patches.swapaxes(1, 2).flatten(2)}


def patch_scores(probe: torch.Tensor, vectors: torch.Tensor) -> np.ndarray:
    """Return the log-odds of a tree for each patch, float32 of shape `(rows, columns)`."""
    return (vectors @ probe[:-1] + probe[-1]).numpy()


def tree_patches(boxes: Iterable[Iterable[float]], rows: int, columns: int, patch: int = 8) -> np.ndarray:
    """Return a bool mask of shape `(rows, columns)` of the patches whose centers lie in a box."""
    y, x = (np.arange(rows) + 0.5) * patch, (np.arange(columns) + 0.5) * patch
    mask = np.zeros((rows, columns), dtype=bool)
    for left, top, right, bottom in boxes:
        mask |= ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))
    return mask


def draw_finding(scores: np.ndarray, image: np.ndarray, boxes: Iterable[Iterable[float]]) -> Image.Image:
    """Draw scores over an image, from violet (ground) to green (tree), with the boxes of the trees."""
    unit = np.clip(2 / (1 + np.exp(-scores)), 0, 1)[..., None]  # A probability of one half is full green.
    return outlined(draw_map((GROUND + (TREE - GROUND) * unit).astype(np.uint8), image, opacity=0.7), image, boxes)


def outlined(picture: Image.Image, image: np.ndarray, boxes: Iterable[Iterable[float]]) -> Image.Image:
    """Draw the boxes of an image on a picture of another size."""
    scale = picture.width / image.shape[1]
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        pen.rectangle([scale * at for at in box], outline="white", width=3)
    return picture


def pictures_of(models: Models, finding: Finding) -> tuple[Image.Image, dict[str, Image.Image]]:
    """Return the image of the finding and the maps of the trained ViT and of its controls, all with boxes of trees."""
    image = np.asarray(read_image(IMAGE, None))
    scores = {name: patch_scores(finding.probes[name], one) for name, one in patch_vectors(models, image).items()}
    plain = Image.fromarray(image).resize(display_size(image), Image.Resampling.BICUBIC)
    maps = {name: draw_finding(one, image, finding.boxes) for name, one in scores.items()}
    return outlined(plain, image, finding.boxes), maps


def draw_thumbnail(image: Image.Image, maps: dict[str, Image.Image]) -> Image.Image:
    """Draw the preview of a shared link: image and map side by side."""
    card = Image.new("RGB", (1200, 630), "white")
    for picture, left in ((image, 0), (maps[TRAINED], 604)):
        card.paste(ImageOps.fit(picture, (596, 630)), (left, 0))
    return card


def read_rows(sample: Path, split: str) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    """Yield file, pixels and boxes of the images of a split. Boxes are those of all trees, also of overlapping rows."""
    rows = pd.read_parquet(sample / f"{split}.parquet")
    corners = rows[["left", "top", "left", "top"]].to_numpy()
    boxes = [np.array(one.tolist()).reshape(-1, 4) + at for one, at in zip(rows["boxes"], corners)]
    for image, scene, at in zip(rows["image"], rows["scene"], corners):
        known = np.concatenate([one for one, other in zip(boxes, rows["scene"]) if other == scene])
        pixels = np.asarray(read_picture(image["bytes"]).convert("RGB"))
        yield image["bytes"], pixels, np.unique(known, axis=0) - at


def held_out_rows(sample: Path) -> list[tuple[bytes, np.ndarray, np.ndarray]]:
    """Return those rows of the test split, see [`read_rows`], that do not overlap an earlier one."""
    kept, corners = [], []
    places = pd.read_parquet(sample / "test.parquet", columns=["left", "top"]).to_numpy()
    for row, place in zip(read_rows(sample, "test"), places):
        if all((abs(place - other) >= SIDE).any() for other in corners):
            kept.append(row)
            corners.append(place)
    return kept


def training_crops(sample: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield crops of the training images and the share of trees in each patch, in random orientations."""
    rng = np.random.default_rng(0)
    for _, pixels, boxes in read_rows(sample, "train"):
        mask = tree_patches(boxes, *pixels.shape[:2], patch=1)
        for top in range(0, pixels.shape[0] - SIDE + 1, STRIDE):
            for left in range(0, pixels.shape[1] - SIDE + 1, STRIDE):
                window, turns, mirror = np.s_[top : top + SIDE, left : left + SIDE], rng.integers(4), rng.integers(2)
                crop, trees = (np.rot90(one[window], turns)[:, :: 1 - 2 * mirror] for one in (pixels, mask))
                yield np.ascontiguousarray(crop), trees.reshape(SIDE // 8, 8, SIDE // 8, 8).mean((1, 3))


def fit(models: Models, sample: Path) -> dict[str, torch.Tensor]:
    """Fit the linear layers on the training images."""
    crops, shares = zip(*training_crops(sample))
    counts = np.stack([1 - np.stack(shares), np.stack(shares)], -1)
    vectors, probes = [patch_vectors(models, crop) for crop in crops], {}
    for name in vectors[0]:
        layer = fit_linear(
            torch.stack([one[name] for one in vectors]).numpy(), counts, np.arange(len(crops)), max_iterations=100
        )
        weight = (layer.weight[1] - layer.weight[0]) / layer.std
        probes[name] = torch.cat([weight, (layer.bias[1] - layer.bias[0] - layer.mean @ weight)[None]])
    return probes


def main(argv: list[str] | None = None) -> int:
    from scipy.stats import ttest_rel  # not needed by the page

    (sample,) = map(Path, sys.argv[1:] if argv is None else argv)
    models = Models(str(PACKED))
    probes, rows = fit(models, sample), held_out_rows(sample)
    trees = [tree_patches(boxes, SIDE // 8, SIDE // 8) for _, _, boxes in rows]
    areas = {name: [] for name in probes}
    for (_, pixels, _), mask in zip(rows, trees):
        for name, vectors in patch_vectors(models, pixels).items():
            areas[name].append(area_under_curve(patch_scores(probes[name], vectors).ravel(), mask.ravel()))
    shown = min(range(len(rows)), key=lambda index: abs(trees[index].mean() - 0.5))
    file, _, boxes = rows[shown]
    inside = boxes[(boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < SIDE).all(1)]
    facts = {"areas": {name: round(float(np.mean(one)), 4) for name, one in areas.items()}, "num_images": len(rows)}
    leads = {name: ttest_rel(areas[TRAINED], areas[name]).confidence_interval() for name in (UNTRAINED, PIXELS)}
    facts |= {"leads": {name: [round(float(bound), 4) for bound in one] for name, one in leads.items()}}
    facts |= {"boxes": inside.tolist(), "checksum": checksum(models)}
    save_file(probes, FILE, {"finding": json.dumps(facts)})
    IMAGE.write_bytes(file)
    draw_thumbnail(*pictures_of(models, read_finding(models))).save(FILE.parents[1] / "thumbnail.jpg", quality=85)
    print(facts["leads"])
    print(*(f"{name}: {np.mean(one):.4f} (image shown: {one[shown]:.4f})" for name, one in areas.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
