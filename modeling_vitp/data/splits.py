"""Split of a layout that is read, and the images that are held out."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .layouts import Layout

HELD_OUT_SPLITS = {"train": ("val", "test"), "test": ()}  # Splits that are held out from a split; others: "test".


def choose_split(
    layout: Layout, split: str, listed: list[str] | None = None
) -> tuple[dict[str, tuple[Path, ...]], set[Path]]:
    """Return the files of the images of a split, by id, and the files of the held-out images.

    The test split of the layout is held out, and so is the validation split unless `split` contains it. Images that are
    also in `split` are held out as well. With `listed`, only the listed images are chosen, and all others of the layout
    are held out.

    Args:
        listed: ids, paths below the root of the layout, file names, or file names without suffix.

    Raises:
        ValueError: If the layout does not have the split, or a listed name matches no image or several.
    """
    splits = layout.split_images
    held_out = set()
    if listed is not None:
        searched_splits = [splits[split]] if splits.get(split) else list(splits.values())
        listed_images = choose_listed(layout, searched_splits, listed)
        listed_paths = {path for paths in listed_images.values() for path in paths}
        for images in splits.values():
            for paths in images.values():
                if listed_paths.isdisjoint(paths):
                    held_out.update(paths)
        return listed_images, held_out
    if split not in splits:
        raise ValueError(
            f"Split {split!r} not found in {layout.root}. Found: {sorted(splits)}. Set --split to one of them, or list "
            "the images in a file and set --split_list."
        )
    for name in HELD_OUT_SPLITS.get(split, ("test",)):
        for paths in splits.get(name, {}).values():
            held_out.update(paths)
    return splits[split], held_out


def choose_listed(
    layout: Layout, splits: list[dict[str, tuple[Path, ...]]], listed: list[str]
) -> dict[str, tuple[Path, ...]]:
    """Return the listed images, found by id, by path below the root, or by file name with or without suffix."""
    by_id = defaultdict(list)
    by_path = defaultdict(list)
    by_name = defaultdict(list)
    for images in splits:
        for image_id, paths in images.items():
            image = (image_id, paths)
            by_id[image_id].append(image)
            relative_path = Path(os.path.relpath(paths[0], layout.root))
            by_path[relative_path.as_posix()].append(image)
            for name in {paths[0].stem, paths[0].name}:
                by_name[name].append(image)
    listed_images = {}
    images_of_wrong_names = {}
    for name in dict.fromkeys(listed):
        matching_images = by_id.get(name) or by_path.get(name) or by_name.get(name, [])
        different_images = list(dict.fromkeys(matching_images))  # An image may be in several splits.
        if len(different_images) == 1:
            listed_images.update(different_images)
        else:
            images_of_wrong_names[name] = different_images
    if images_of_wrong_names:
        name, images = next(iter(images_of_wrong_names.items()))
        matches = " or ".join(f"{image_id!r} ({paths[0]})" for image_id, paths in images[:2]) or "none"
        raise ValueError(
            f"{len(images_of_wrong_names)} of {len(listed)} listed names are not the name of one image in "
            f"{layout.root}: {name} matches {matches}. Correct it, list the id of an image, or set --split."
        )
    return listed_images


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most a number of items, evenly spaced."""
    positions = np.linspace(0, len(items) - 1, min(most, len(items)))
    return [items[index] for index in positions.round().astype(int)]
