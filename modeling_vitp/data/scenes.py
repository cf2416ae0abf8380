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
    images: Sequence[Path],
    root: Path,
    classes: Sequence[set],
    layout: Layout,
    scene_pattern: str | None,
) -> tuple[np.ndarray, str]:
    """Return the scene of each image from 0, int of shape `(images,)`, and in words by what images are split.

    The first rule that applies is used: `scene_pattern`; the patient in the tags of DICOM or in a table; GeoTIFFs of
    one coordinate reference system that overlap or touch; the folder and the file name before the numbers of a tile, if
    they make at least `MIN_SCENES` groups, see [`are_scenes`]. Otherwise each image is a scene. Images of one patient,
    and images of several colors with identical bytes, are always in one scene.
    """
    names = [path.relative_to(root).as_posix() for path in images]
    patients = [layout.case(path) for path in images]
    keys, unit, rule = scene_keys(images, names, patients, classes, layout, scene_pattern)
    patients_or_names = [patient or name for patient, name in zip(patients, names)]
    original_names = names_of_originals(images, names)
    # Images with one of these keys in common are connected.
    edges = []
    for keys_of_images in (keys, original_names, patients_or_names):
        first_indices: dict[Any, int] = {}
        for index, key in enumerate(keys_of_images):
            first_index = first_indices.setdefault(key, index)
            edges.append((first_index, index))
    scenes = connected(len(images), edges)
    if rule is not None:
        unit = f"{unit} ({max(scenes) + 1} {unit}s: {rule})"
    return scenes, unit


def scene_keys(
    images: Sequence[Path],
    names: Sequence[str],
    patients: Sequence[str | None],
    classes: Sequence[set],
    layout: Layout,
    scene_pattern: str | None,
) -> tuple[Sequence[Any], str, str | None]:
    """Return the scene of each image by the first rule that applies, what a scene is, and the rule in words."""
    if scene_pattern is not None:
        scenes = [scene_in(name, scene_pattern) for name in names]
        return scenes, "scene", f"`scene_pattern` {scene_pattern}"
    if any(patients):
        return names, "patient", layout.case_source
    areas = touching(images)
    if areas is not None:
        return areas, "scene", "images whose coordinates overlap or touch"
    stems = [stem_of(Path(name), layout.has_class_folders) for name in names]
    if are_scenes(stems, classes):
        return stems, "scene", "folder and file name before the tile number"
    return names, "image", None


def names_of_originals(images: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Return the name of each image; images with identical bytes, except those of one color, have the same one."""
    # Each image is a split of its own, so that copies of an image are found wherever they are.
    splits = {}
    for index, path in enumerate(images):
        sample = FileSample("", {}, (path,), None)
        splits[str(index)] = [sample]
    original_names = list(names)
    for copies in shared_images(images_of_files(splits)):
        for image in copies:
            index = int(image.split)
            original_names[index] = copies[0].name
    return original_names


def connected(number: int, edges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the connected component of each of `number` nodes."""
    nodes_of_edges = np.array(edges).reshape(-1, 2)
    is_edge = np.ones(len(edges), bool)
    graph = coo_array((is_edge, nodes_of_edges.T), shape=(number, number))
    _, components = connected_components(graph, directed=False)
    return components


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
    systems = []
    bounds_of_images = []
    for path in images:
        if not is_tiff(path):
            return None
        try:
            crs, _, bounds = georeference(path)
        except ValueError:
            return None
        systems.append(str(crs))
        bounds_of_images.append(bounds)
    _, system_numbers = np.unique(systems, return_inverse=True)
    areas_of_images = np.column_stack([system_numbers, bounds_of_images])
    areas, area_of_image = np.unique(areas_of_images, axis=0, return_inverse=True)
    system, west, south, east, north = areas.T
    edges = []
    for index in range(len(areas)):
        is_same_system = system == system[index]
        overlaps_x = (west <= east[index]) & (east >= west[index])
        overlaps_y = (south <= north[index]) & (north >= south[index])
        neighbors = np.flatnonzero(is_same_system & overlaps_x & overlaps_y)
        for neighbor in neighbors:
            edges.append((index, neighbor))
    component_of_area = connected(len(areas), edges)
    components = component_of_area[area_of_image.ravel()]
    num_components = max(components) + 1
    has_neighbors = num_components < len(components)
    return components if has_neighbors else None


def stem_of(name: Path, with_class_folder: bool) -> str:
    """Return the path of an image before the numbers of its tile, without the folder if that is the class."""
    stem = re.sub(f"{TILE.pattern}$", "", name.stem, flags=TILE.flags)
    if stem == name.stem and stem.isdigit():
        stem = ""
    return stem if with_class_folder else f"{name.parent.as_posix()}/{stem}"


def are_scenes(keys: Sequence[str], classes: Sequence[set]) -> bool:
    """Return whether groups are enough, and neither one has most images nor most classes are in one group each."""
    keys_of_classes = defaultdict(set)
    for key, classes_of_image in zip(keys, classes):
        for label in classes_of_image:
            keys_of_classes[label].add(key)
    num_classes_of_one_group = 0
    for keys_of_class in keys_of_classes.values():
        if len(keys_of_class) == 1:
            num_classes_of_one_group += 1
    sizes = Counter(keys)
    are_enough = MIN_SCENES <= len(sizes) < len(keys)
    has_most_images = 2 * max(sizes.values()) > len(keys)
    have_most_classes = 2 * num_classes_of_one_group > len(keys_of_classes)
    return are_enough and not has_most_images and not have_most_classes


def draw_splits(
    scenes: np.ndarray,
    classes: Sequence[set],
    splits: Sequence[str],
    seed: int,
) -> list[str]:
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
    scene_of_pair, label_of_pair = scenes_with_labels(scenes, classes)
    num_labels = max(label_of_pair) + 1
    num_scenes_of_label = np.bincount(label_of_pair)
    is_of_rare_label = num_scenes_of_label[label_of_pair] == 1
    rare_scenes = np.unique(scene_of_pair[is_of_rare_label])
    common_scenes = np.setdiff1d(np.arange(len(sizes)), rare_scenes)
    random = np.random.default_rng(seed)
    num_splits = len(splits)
    split_size = SHARE * len(scenes)
    best_score = None
    best_split_of_scene = None
    for _ in range(DRAWS):
        common_order = random.permutation(common_scenes)
        rare_order = random.permutation(rare_scenes)
        order = np.concatenate([common_order, rare_order])
        split_of_scene = divide_scenes(order, sizes, num_splits, split_size)
        counts = np.bincount(split_of_scene, sizes, num_splits)
        is_missing = np.ones((num_splits, num_labels), bool)
        is_missing[split_of_scene[scene_of_pair], label_of_pair] = False
        score = (
            sum(counts < MIN_IMAGES),
            is_missing[0].sum(),
            is_missing[1:].sum(),
            abs(counts[1:] - split_size).sum(),
        )
        if best_score is None or score < best_score:
            best_score = score
            best_split_of_scene = split_of_scene
    return [splits[split] for split in best_split_of_scene[scenes]]


def scenes_with_labels(scenes: np.ndarray, classes: Sequence[set]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scene, and the class from 0, of each pair of a scene and a class in it, int of shape `(pairs,)`."""
    names = set()
    for classes_of_image in classes:
        names.update(classes_of_image)
    labels = {name: label for label, name in enumerate(sorted(names))}
    pairs = set()
    for scene, classes_of_image in zip(scenes.tolist(), classes):
        for name in classes_of_image:
            pairs.add((scene, labels[name]))
    scene_of_pair, label_of_pair = np.array(sorted(pairs)).T
    return scene_of_pair, label_of_pair


def divide_scenes(
    order: np.ndarray,
    sizes: np.ndarray,
    num_splits: int,
    split_size: float,
) -> np.ndarray:
    """Return the index of the split of each scene; scenes in `order` fill the splits from 1, and the rest are 0.

    Args:
        order: scenes in the order in which they are divided.
        sizes: number of images of each scene.
        num_splits: number of splits.
        split_size: number of images that each split but the first should have.
    """
    num_scenes = len(sizes)
    min_scenes = 2 if num_scenes >= 3 * num_splits else 1
    num_images_before = np.concatenate([[0], sizes[order].cumsum()])
    split_of_scene = np.zeros(num_scenes, int)
    end = 0
    for split in range(1, num_splits):
        start = end
        # Enough scenes remain for the splits that follow.
        num_later_scenes = min_scenes * (num_splits - split)
        last_end = num_scenes - num_later_scenes
        possible_ends = np.arange(start + min_scenes, last_end + 1)
        num_images = num_images_before[possible_ends] - num_images_before[start]
        differences = abs(num_images - max(split_size, MIN_IMAGES))
        end = possible_ends[differences.argmin()]
        split_of_scene[order[start:end]] = split
    return split_of_scene
