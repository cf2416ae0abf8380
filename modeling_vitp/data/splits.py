"""Split of a layout that is read, and the images that are held out."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .layouts import Layout


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
    if listed is not None:
        chosen = choose_listed(layout, [splits[split]] if splits.get(split) else [*splits.values()], listed)
        taken = {path for paths in chosen.values() for path in paths}
        others = [paths for images in splits.values() for paths in images.values() if taken.isdisjoint(paths)]
    elif split in splits:
        chosen = splits[split]
        names = {"train": ("val", "test"), "test": ()}.get(split, ("test",))
        others = [paths for name in names for paths in splits.get(name, {}).values()]
    else:
        raise ValueError(
            f"Split {split!r} not found in {layout.root}. Found: {sorted(splits)}. Set --split to one of them, or list "
            "the images in a file and set --split_list."
        )
    return chosen, {path for paths in others for path in paths}


def choose_listed(
    layout: Layout, splits: list[dict[str, tuple[Path, ...]]], listed: list[str]
) -> dict[str, tuple[Path, ...]]:
    """Return the listed images, found by id, by path below the root, or by file name with or without suffix."""
    by_id, by_path, by_name = defaultdict(list), defaultdict(list), defaultdict(list)
    for images in splits:
        for key, paths in images.items():
            by_id[key].append((key, paths))
            by_path[Path(os.path.relpath(paths[0], layout.root)).as_posix()].append((key, paths))
            for name in {paths[0].stem, paths[0].name}:
                by_name[name].append((key, paths))
    found = {name: by_id.get(name) or by_path.get(name) or by_name.get(name, []) for name in listed}
    found = {name: [*dict.fromkeys(images)] for name, images in found.items()}  # an image may be in several splits
    missing = [name for name, images in found.items() if not images]
    if missing:
        more = ", …" if len(missing) > 1 else ""
        raise ValueError(
            f"{len(missing)} of {len(listed)} listed images not found in {layout.root}: {missing[0]}{more}"
        )
    for name, images in found.items():
        if len(images) > 1:
            raise ValueError(
                f"The listed name {name} is ambiguous: {images[0][1][0]} or {images[1][1][0]}. List the id "
                f"({images[0][0]!r} or {images[1][0]!r}), or set --split."
            )
    return dict(image for (image,) in found.values())


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most a number of items, evenly spaced."""
    chosen = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[index] for index in chosen]
