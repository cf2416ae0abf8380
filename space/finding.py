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
TRAINED = "trained"
UNTRAINED = "random weights"
PIXELS = "pixels"
SIDE = 224  # pixels of a training crop
STRIDE = 96  # pixels between crops
PATCH = 8  # pixels of a side of a patch
GROUND = np.array([45, 30, 75])  # color of the map
TREE = np.array([150, 255, 70])


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
        probes = {name: file.get_tensor(name) for name in (TRAINED, UNTRAINED, PIXELS)}
        return Finding(probes, **facts)


def checksum(models: Models) -> int:
    """Return a number that identifies the weights of the default model's ViT."""
    last_weight = list(models.backbone().model.parameters())[-1]
    values = last_weight.detach().cpu().half().numpy()
    return zlib.crc32(values.tobytes())


def patch_vectors(models: Models, image: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the features of each patch, float32 of shape `(rows, columns, width)`, by the default model and controls.

    The sides of the image, uint8 RGB of shape `(height, width, 3)`, are multiples of the patch size.
    """
    trained = models.backbone()
    untrained = models.backbone(trained.name + RANDOM)
    rows = image.shape[0] // trained.patch[0]
    columns = image.shape[1] // trained.patch[1]
    resolution = max(rows, columns)
    pixels = torch.tensor(image / 255, dtype=torch.float32)
    patches = pixels.unflatten(0, (rows, -1)).unflatten(2, (columns, -1)).swapaxes(1, 2)
    return {
        TRAINED: patch_features(trained, image, resolution).movedim(0, -1),
        UNTRAINED: patch_features(untrained, image, resolution).movedim(0, -1),
        PIXELS: patches.flatten(2),
    }


def patch_scores(probe: torch.Tensor, vectors: torch.Tensor) -> np.ndarray:
    """Return the log-odds of a tree for each patch, float32 of shape `(rows, columns)`."""
    return (vectors @ probe[:-1] + probe[-1]).numpy()


def tree_patches(
    boxes: Iterable[Iterable[float]],
    rows: int,
    columns: int,
    patch: int = PATCH,
) -> np.ndarray:
    """Return a bool mask of shape `(rows, columns)` of the patches whose centers lie in a box."""
    y = (np.arange(rows) + 0.5) * patch
    x = (np.arange(columns) + 0.5) * patch
    mask = np.zeros((rows, columns), dtype=bool)
    for left, top, right, bottom in boxes:
        is_inside_y = (y > top) & (y < bottom)
        is_inside_x = (x > left) & (x < right)
        mask |= is_inside_y[:, None] & is_inside_x
    return mask


def draw_finding(scores: np.ndarray, image: np.ndarray, boxes: Iterable[Iterable[float]]) -> Image.Image:
    """Draw scores over an image, from violet (ground) to green (tree), with the boxes of the trees."""
    probabilities = 1 / (1 + np.exp(-scores))
    shares_of_green = np.clip(2 * probabilities, 0, 1)[..., None]  # A probability of one half is full green.
    colors = GROUND + (TREE - GROUND) * shares_of_green
    picture = draw_map(colors.astype(np.uint8), image, opacity=0.7)
    return outlined(picture, image, boxes)


def outlined(picture: Image.Image, image: np.ndarray, boxes: Iterable[Iterable[float]]) -> Image.Image:
    """Draw the boxes of an image on a picture of another size."""
    scale = picture.width / image.shape[1]
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        scaled_box = [scale * coordinate for coordinate in box]
        pen.rectangle(scaled_box, outline="white", width=3)
    return picture


def pictures_of(models: Models, finding: Finding) -> tuple[Image.Image, dict[str, Image.Image]]:
    """Return the image of the finding and the maps of the trained ViT and of its controls, all with boxes of trees."""
    image = np.asarray(read_image(IMAGE, None))
    maps = {}
    for name, vectors in patch_vectors(models, image).items():
        scores = patch_scores(finding.probes[name], vectors)
        maps[name] = draw_finding(scores, image, finding.boxes)
    plain = Image.fromarray(image).resize(display_size(image), Image.Resampling.BICUBIC)
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
    boxes_of_scenes = {}
    for boxes, scene, corner in zip(rows["boxes"], rows["scene"], corners):
        boxes_in_scene = np.array(boxes.tolist()).reshape(-1, 4) + corner
        boxes_of_scenes.setdefault(scene, []).append(boxes_in_scene)
    for image, scene, corner in zip(rows["image"], rows["scene"], corners):
        distinct_boxes = np.unique(np.concatenate(boxes_of_scenes[scene]), axis=0)
        pixels = np.asarray(read_picture(image["bytes"]).convert("RGB"))
        yield image["bytes"], pixels, distinct_boxes - corner


def held_out_rows(sample: Path) -> list[tuple[bytes, np.ndarray, np.ndarray]]:
    """Return those rows of the test split, see [`read_rows`], that do not overlap an earlier one."""
    separate_rows = []
    separate_corners = []
    corners = pd.read_parquet(sample / "test.parquet", columns=["left", "top"]).to_numpy()
    for row, corner in zip(read_rows(sample, "test"), corners):
        if all((abs(corner - earlier) >= SIDE).any() for earlier in separate_corners):
            separate_rows.append(row)
            separate_corners.append(corner)
    return separate_rows


def training_crops(sample: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield crops of the training images and the share of trees in each patch, in random orientations."""
    rng = np.random.default_rng(0)
    side_in_patches = SIDE // PATCH
    for _, pixels, boxes in read_rows(sample, "train"):
        height, width = pixels.shape[:2]
        mask = tree_patches(boxes, height, width, patch=1)
        for top in range(0, height - SIDE + 1, STRIDE):
            for left in range(0, width - SIDE + 1, STRIDE):
                window = np.s_[top : top + SIDE, left : left + SIDE]
                num_turns = rng.integers(4)
                step = -1 if rng.integers(2) else 1  # from right to left if mirrored
                crop = np.rot90(pixels[window], num_turns)[:, ::step]
                trees = np.rot90(mask[window], num_turns)[:, ::step]
                trees_by_patch = trees.reshape(side_in_patches, PATCH, side_in_patches, PATCH)
                yield np.ascontiguousarray(crop), trees_by_patch.mean((1, 3))


def fit(models: Models, sample: Path) -> dict[str, torch.Tensor]:
    """Fit the linear layers on the training images."""
    all_vectors = []
    shares = []
    for crop, share in training_crops(sample):
        all_vectors.append(patch_vectors(models, crop))
        shares.append(share)
    share_of_trees = np.stack(shares)
    counts = np.stack([1 - share_of_trees, share_of_trees], -1)
    groups = np.arange(len(all_vectors))
    probes = {}
    for name in all_vectors[0]:
        vectors = torch.stack([vectors_of_crop[name] for vectors_of_crop in all_vectors]).numpy()
        layer = fit_linear(vectors, counts, groups, max_iterations=100)
        # The normalization of the features is part of the weights.
        weight = (layer.weight[1] - layer.weight[0]) / layer.std
        bias = layer.bias[1] - layer.bias[0] - layer.mean @ weight
        probes[name] = torch.cat([weight, bias[None]])
    return probes


def measure(
    models: Models,
    probes: dict[str, torch.Tensor],
    rows: list[tuple[bytes, np.ndarray, np.ndarray]],
    masks: list[np.ndarray],
) -> dict[str, list[float]]:
    """Return the area under the ROC curve of each linear layer on each image, with the patches of trees as masks."""
    areas = {name: [] for name in probes}
    for (_, pixels, _), mask in zip(rows, masks):
        for name, vectors in patch_vectors(models, pixels).items():
            scores = patch_scores(probes[name], vectors)
            areas[name].append(area_under_curve(scores.ravel(), mask.ravel()))
    return areas


def leads_of(areas: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the bounds of the 95% interval of the trained ViT's lead over each control."""
    from scipy.stats import ttest_rel  # not needed by the page

    leads = {}
    for name in (UNTRAINED, PIXELS):
        low, high = ttest_rel(areas[TRAINED], areas[name]).confidence_interval()
        leads[name] = [round(float(low), 4), round(float(high), 4)]
    return leads


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    sample = Path(arguments[0])
    models = Models(str(PACKED))
    probes = fit(models, sample)
    rows = held_out_rows(sample)
    masks = [tree_patches(boxes, SIDE // PATCH, SIDE // PATCH) for _, _, boxes in rows]
    areas = measure(models, probes, rows, masks)

    distances_to_half = [abs(mask.mean() - 0.5) for mask in masks]
    shown_index = distances_to_half.index(min(distances_to_half))
    file, _, boxes = rows[shown_index]
    is_in_image = (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < SIDE).all(1)
    facts = {
        "areas": {name: round(float(np.mean(image_areas)), 4) for name, image_areas in areas.items()},
        "num_images": len(rows),
        "leads": leads_of(areas),
        "boxes": boxes[is_in_image].tolist(),
        "checksum": checksum(models),
    }
    save_file(probes, FILE, {"finding": json.dumps(facts)})
    IMAGE.write_bytes(file)
    image, maps = pictures_of(models, read_finding(models))
    draw_thumbnail(image, maps).save(FILE.parents[1] / "thumbnail.jpg", quality=85)
    print(facts["leads"])
    for name, image_areas in areas.items():
        print(f"{name}: {np.mean(image_areas):.4f} (image shown: {image_areas[shown_index]:.4f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
