"""Scenes of images, which must be in one split only, and random splits by scene."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..images.reading import is_tiff
from .files import FileSample
from .geodata import georeference
from .layouts import Layout
from .leaks import images_of_files, shared_images

SHARE = 0.15  # Share of the training images in a split that the labels lack.
MIN_IMAGES = 2  # Smallest number of images of a split.
MIN_SCENES = 6  # Smallest number of scenes that names of files are trusted to tell apart.
DRAWS = 300  # Number of random splits of which the best is chosen.
# Numbers of a tile at the end of a file name, as in `areaA_3_4`, `P0001__1024__0___0` and `scene12-x512-y0`.
TILE = re.compile(
    r"([-_. ]+((x|y|r|c|row|col|column|tile|patch|chip|crop|window|slice|frame)[-_]?)?\d+)+", re.IGNORECASE
)


def find_scenes(
    images: Sequence[Path], root: Path, classes: Sequence[set], layout: Layout, scene_pattern: str | None
) -> tuple[np.ndarray, str]:
    """Return the scene of each image from 0, int of shape `(images,)`, and in words by what images are split.

    The first rule that applies is used: `scene_pattern`; the patient in the tags of DICOM or in a table; GeoTIFFs of
    one coordinate reference system that overlap or touch; the folder and the file name before the numbers of a tile, if
    they make at least `MIN_SCENES` groups, see [`are_scenes`]. Otherwise each image is a scene. Images of one patient,
    and images of several colors with identical bytes, are always in one scene.
    """
    names = [path.relative_to(root).as_posix() for path in images]
    patients = [layout.case(path) for path in images]
    copies = [*names]
    for group in shared_images(
        images_of_files({str(index): [FileSample("", {}, (path,), None)] for index, path in enumerate(images)})
    ):
        for image in group:
            copies[int(image.split)] = group[0].name
    keys, unit, rule = names, "image", ""
    if scene_pattern is not None:
        keys = [scene_in(name, scene_pattern) for name in names]
        unit, rule = "scene", f"`scene_pattern` {scene_pattern}"
    elif any(patients):
        unit, rule = "patient", layout.case_source
    elif (located := touching(images)) is not None:
        keys, unit, rule = located, "scene", "images whose coordinates overlap or touch"
    elif are_scenes(stems := [stem_of(Path(name), layout.has_class_folders) for name in names], classes):
        keys, unit, rule = stems, "scene", "folder and file name before the tile number"
    edges = []
    for values in (keys, copies, [patient or name for patient, name in zip(patients, names)]):
        first: dict[Any, int] = {}
        edges += [(first.setdefault(value, index), index) for index, value in enumerate(values)]
    scenes = connected(len(images), edges)
    return scenes, f"{unit} ({max(scenes) + 1} {unit}s: {rule})" if rule else unit


def connected(number: int, edges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the connected component of each of `number` nodes."""
    graph = coo_array((np.ones(len(edges), bool), np.array(edges).reshape(-1, 2).T), (number, number))
    return connected_components(graph, directed=False)[1]


def scene_in(name: str, pattern: str) -> str:
    try:
        return re.search(pattern, name)[1]
    except (re.error, TypeError, IndexError) as error:
        raise ValueError(
            f"Expected `scene_pattern` to be a regular expression with a group that matches each image, {pattern!r} "
            f"fails for {name}: {error}."
        ) from error


def touching(images: Sequence[Path]) -> np.ndarray | None:
    """Return the connected component of each GeoTIFF, or `None` if one lacks a georeference, or none touch."""
    try:
        found = [georeference(path) for path in images if is_tiff(path)]
    except ValueError:
        return None
    if len(found) < len(images):
        return None
    systems = np.unique([str(crs) for crs, _, _ in found], return_inverse=True)[1]
    areas = np.column_stack([systems, [bounds for _, _, bounds in found]])
    areas, area_of = np.unique(areas, axis=0, return_inverse=True)
    system, left, bottom, right, top = areas.T
    edges = []
    for k in range(len(areas)):
        across = (system == system[k]) & (left <= right[k]) & (right >= left[k])
        edges += [(k, other) for other in np.flatnonzero(across & (bottom <= top[k]) & (top >= bottom[k]))]
    parts = connected(len(areas), edges)[area_of.ravel()]
    return parts if max(parts) + 1 < len(parts) else None


def stem_of(name: Path, with_class_folder: bool) -> str:
    """Return the path of an image before the numbers of its tile, without the folder if that is the class."""
    stem = re.sub(f"{TILE.pattern}$", "", name.stem, flags=TILE.flags)
    stem = "" if stem == name.stem and stem.isdigit() else stem
    return stem if with_class_folder else f"{name.parent.as_posix()}/{stem}"


def are_scenes(keys: Sequence[str], classes: Sequence[set]) -> bool:
    """Return whether groups are enough, and neither one has most images nor most classes are in one group each."""
    groups = defaultdict(set)
    for key, found in zip(keys, classes):
        for label in found:
            groups[label].add(key)
    alone = sum(len(found) == 1 for found in groups.values())
    is_even = 2 * max(Counter(keys).values()) <= len(keys) and 2 * alone <= len(groups)
    return MIN_SCENES <= len(set(keys)) < len(keys) and is_even


def draw_splits(scenes: np.ndarray, classes: Sequence[set], splits: Sequence[str], seed: int) -> list[str]:
    """Draw the split of each training image, with about `SHARE` of the images in each split but the first.

    Of many random splits, the one is chosen that has the most classes in the first split, then the most in the others,
    and then the sizes closest to the wanted ones. Scenes with the only images of a class are drawn last. With three
    scenes for each split, each has at least two, because differences on a single scene are not decided.

    Args:
        scenes: scene of each image, int of shape `(images,)`.
        classes: classes of each image.
        splits: names of the splits. The first one has the images that are not in the others.
        seed: random seed.
    """
    sizes = np.bincount(scenes)
    labels = {label: k for k, label in enumerate(sorted(set().union(*classes)))}
    pairs = {(scene, labels[label]) for scene, found in zip(scenes.tolist(), classes) for label in found}
    owners, owned = np.array(sorted(pairs)).T  # Each class of each scene.
    rare = np.unique(owners[np.bincount(owned)[owned] == 1])
    common = np.setdiff1d(np.arange(len(sizes)), rare)
    random, best = np.random.default_rng(seed), None
    number, wanted = len(splits), SHARE * len(scenes)
    least = 2 if len(sizes) >= 3 * number else 1
    for _ in range(DRAWS):
        order = np.concatenate([random.permutation(common), random.permutation(rare)])
        sums = np.concatenate([[0], sizes[order].cumsum()])
        parts, end = np.zeros(len(sizes), int), 0
        for part in range(1, number):
            start, last = end, len(sizes) - least * (number - part)  # The splits that follow have their scenes.
            ends = np.arange(start + least, last + 1)
            end = ends[abs(sums[ends] - sums[start] - max(wanted, MIN_IMAGES)).argmin()]
            parts[order[start:end]] = part
        counts = np.bincount(parts, sizes, number)
        lacks = np.ones((number, len(labels)), bool)
        lacks[parts[owners], owned] = False
        score = sum(counts < MIN_IMAGES), lacks[0].sum(), lacks[1:].sum(), abs(counts[1:] - wanted).sum()
        if best is None or score < best[0]:
            best = score, parts
    return [splits[part] for part in best[1][scenes]]
