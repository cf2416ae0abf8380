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
    images_of_names = {}
    missing_names = []
    for name in dict.fromkeys(listed):
        matching_images = by_id.get(name) or by_path.get(name) or by_name.get(name, [])
        images_of_names[name] = list(dict.fromkeys(matching_images))  # An image may be in several splits.
        if not matching_images:
            missing_names.append(name)
    if missing_names:
        more = ", …" if len(missing_names) > 1 else ""
        raise ValueError(
            f"{len(missing_names)} of {len(listed)} listed images not found in {layout.root}: {missing_names[0]}{more}"
        )
    listed_images = {}
    for name, images in images_of_names.items():
        image_id, paths = images[0]
        if len(images) > 1:
            further_id, further_paths = images[1]
            raise ValueError(
                f"The listed name {name} is ambiguous: {paths[0]} or {further_paths[0]}. List the id ({image_id!r} or "
                f"{further_id!r}), or set --split."
            )
        listed_images[image_id] = paths
    return listed_images


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most a number of items, evenly spaced."""
    positions = np.linspace(0, len(items) - 1, min(most, len(items)))
    return [items[index] for index in positions.round().astype(int)]
