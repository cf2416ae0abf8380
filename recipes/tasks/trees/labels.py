"""Parts of the training ground: with a share of the labels, and held out to choose by."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from modeling_vitp.recipes.data.build_tree_masks import places

TREES_TOLERANCE = 0.2  # a part of the windows has its share of the trees, give or take this much of it


def split_held_out(train: Dataset, scene: str, top: int) -> tuple[Dataset, Dataset]:
    """The rows that show nothing of a scene's ground below `top`, and those that show nothing else of it."""
    where = places(train)
    rows = [index for index, (name, box) in enumerate(where) if name != scene or box[3] <= top]
    held_out = [index for index, (name, box) in enumerate(where) if name == scene and box[1] >= top]
    if not rows or not held_out:
        raise ValueError(f"held_out_top={top} of {scene!r} leaves {len(rows)} windows and holds {len(held_out)} out.")
    return train.select(rows), train.select(held_out)


def label_subset(trees: Sequence[int], share: float, seed: int) -> list[int]:
    """Indices of a random share of the windows that has about the same share of the trees.

    Windows differ in trees from none to dozens: without the second condition a tenth of the labels may have no tree.

    Args:
        trees: number of trees in each window.
        share: in (0, 1].
        seed: of the draw.
    """
    if not 0 < share <= 1:
        raise ValueError(f"label_shares: {share} is not above 0 and at most 1.")
    generator = np.random.default_rng(seed)
    for _ in range(10_000):
        chosen = np.sort(generator.permutation(len(trees))[: max(round(share * len(trees)), 1)]).tolist()
        if abs(sum(trees[index] for index in chosen) / sum(trees) - share) <= TREES_TOLERANCE * share:
            return chosen
    raise ValueError(f"label_shares: no {share:.0%} of the windows have about that share of the trees.")


def labelled_rows(rows: Dataset, share: float, seed: int) -> Dataset:
    """See [`label_subset`]."""
    return rows.select(label_subset([len(boxes) for boxes in rows["boxes"]], share, seed))


def write_splits(splits: dict[str, Dataset], folder: Path) -> str:
    """A data set, images included, that `load_dataset` opens: the folder, which is whole if it is there."""
    if not folder.is_dir():
        written = folder.with_name(f"{folder.name}_writing")
        shutil.rmtree(written, ignore_errors=True)
        (written / "data").mkdir(parents=True)
        for name, rows in splits.items():
            rows.to_parquet(written / "data" / f"{name}-00000-of-00001.parquet")
        written.rename(folder)
    return str(folder)
