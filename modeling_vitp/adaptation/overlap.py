"""Search for test images in the training images, and how alike the training images are among themselves."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..input_spec import InputSpec
from ..instructions.mixture import load_sources
from ..instructions.overlap import (
    MIN_CONTRAST,
    MIN_CORRELATION,
    Match,
    TestImages,
    as_picture,
    for_hash_check,
    gray_levels,
    opencv_in_one_thread,
    orientations,
)
from ..instructions.rows import images_of, load_images
from ..instructions.sources import read_source

SAME = 0.95  # correlation from which two images are the same
ALIKE = 200  # most training images that are compared with each other
SECONDS_PER_IMAGE = 0.2  # of the search, on one core
PICTURES = 6  # most pairs in the picture

Image = Mapping[str, Any]  # `id`, the name of an image, and `image`, its path or its undecoded bytes


@dataclass(frozen=True)
class Pair:
    """Training image and the test image that it resembles, with their correlation."""

    image: Image
    match: Match

    @property
    def is_same(self) -> bool:
        """Return whether both images are the same, however alike other images are."""
        return self.match.kind == "same" or self.match.score >= SAME


def images_of_files(files: Sequence[Path]) -> list[Image]:
    return [{"id": str(file), "image": str(file)} for file in files]


def images_of_instructions(name: str, number: int, seed: int) -> list[Image]:
    """Return images of instructions: those of a part of the rows of each source, drawn by a seed.

    Args:
        name: data set or mixture, see [`~modeling_vitp.instructions.mixture.load_sources`].
        number: largest number of rows of all sources.
        seed: seed of the draw.
    """
    sources = load_sources(name).sources
    number_of_each = max(number // len(sources), 1)
    images = []
    for source in sources:
        rows = read_source(source)
        if isinstance(rows, Dataset):
            rows = rows.select(draw(len(rows), number_of_each, seed))
        for row in islice(rows, number_of_each):
            for image in images_of(row):
                images.append({"id": f"row {row['id']} of {source.name}", "image": image})
    return images


def draw(length: int, number: int, seed: int) -> list[int]:
    """Return at most `number` of `length` indices in ascending order, drawn by a seed."""
    order = np.random.default_rng(seed).permutation(length)
    return sorted(order[:number].tolist())


def index_images(images: Sequence[Image], spec: InputSpec) -> TestImages:
    """Return the index of images, in which others are searched."""
    return TestImages(images, [image["id"] for image in images], os.cpu_count(), spec)


def find_pairs(index: TestImages, images: Sequence[Image]) -> list[Pair]:
    """Return each image with each image of the index that it resembles, the most alike first.

    Images that cannot be read are skipped. The checks of the instructions report them.
    """

    def find(batch: list[Image]) -> list[Pair]:
        pairs = []
        for image in batch:
            try:
                (picture,) = load_images(image, index.spec)
            except ValueError:
                continue
            for match in index.find(picture):
                pairs.append(Pair(image, match))
        return pairs

    loader = DataLoader(images, batch_size=8, num_workers=os.cpu_count(), collate_fn=find)
    pairs = []
    with opencv_in_one_thread():
        for batch in tqdm(loader, desc="Training images", unit=" batches of 8"):
            pairs += batch
    return sorted(pairs, key=lambda pair: pair.match.score, reverse=True)


def likeness(images: Sequence[Image], spec: InputSpec, seed: int) -> float:
    """Return the correlation from which two images are more alike than training images are among themselves.

    It is halfway between 1 and the highest correlation of two training images that are not the same, because pairs
    that were not compared may be more alike; the lowest correlation of a match if no training images are that alike.

    Args:
        images: training images.
        spec: input spec of the images.
        seed: seed of the choice of images.
    """
    drawn_images = [images[position] for position in draw(len(images), ALIKE, seed)]
    if len(drawn_images) < 2:
        return MIN_CORRELATION
    pairs = find_pairs(index_images(drawn_images[::2], spec), drawn_images[1::2])
    scores = [pair.match.score for pair in pairs if not pair.is_same]
    highest = max([whole_correlation(drawn_images, spec), *scores])
    if highest < MIN_CORRELATION:
        return MIN_CORRELATION
    return min((1 + highest) / 2, SAME)


def whole_correlation(images: Sequence[Image], spec: InputSpec) -> float:
    """Return the highest correlation below `SAME` of two whole images in any of eight orientations.

    Unlike the search, it compares all pairs, so that few images show how alike they are.
    """
    oriented_images = []
    for image in images:
        try:
            (picture,) = load_images(image, spec)
        except ValueError:
            continue
        pixels = for_hash_check(gray_levels(as_picture(picture)))
        if pixels.std() >= MIN_CONTRAST:
            vectors = np.stack([oriented.ravel() for oriented in orientations(pixels)]).astype(np.float32)
            vectors -= vectors.mean(axis=1, keepdims=True)
            oriented_images.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    highest = 0.0
    for index, vectors in enumerate(oriented_images[1:], start=1):
        earlier_images = np.stack([earlier[0] for earlier in oriented_images[:index]])
        correlations = (earlier_images @ vectors.T).max(axis=1)
        highest = max(highest, correlations[correlations < SAME].max(initial=0.0))
    return float(highest)


def draw_pairs(pairs: Sequence[Pair], spec: InputSpec, path: Path) -> None:
    """Draw the first pairs, each test image beside the training image that it resembles."""
    shown_pairs = pairs[:PICTURES]
    figure = Figure(figsize=(6, 3 * len(shown_pairs)), layout="constrained")
    axes = figure.subplots(len(shown_pairs), 2, squeeze=False)
    for (test_axis, training_axis), pair in zip(axes, shown_pairs):
        test_axis.set_title("test image", fontsize=9)
        training_axis.set_title(f"training image, correlation {pair.match.score:.2f}", fontsize=9)
        for axis, image in ((test_axis, {"image": pair.match.test_image}), (training_axis, pair.image)):
            (picture,) = load_images(image, spec)
            axis.imshow(as_picture(picture), cmap="gray")
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
