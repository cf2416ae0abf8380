"""The sample's ground as images and masks, on which the backbone is probed."""

from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image

from modeling_vitp.dense.data import DenseData
from modeling_vitp.recipes.data.build_tree_masks import write_test

from .views import Ground, view_of

VIEWS_PER_WINDOW = 6
CLASSES = (
    {"name": "ground", "value": 0, "color": [120, 100, 60]},
    {"name": "tree", "value": 1, "color": [0, 160, 0]},
)


def write_probe_data(datasets: DatasetDict, folder: Path, seed: int) -> DenseData:
    """Masks of crowns: for the probes to learn from, views as in training (crops, turned and jittered, no mosaic); and
    of the ground that nothing was trained on, crops side by side as they are."""
    write_views(datasets["train"], folder / "train", seed)
    for split in ("test", "second_scene"):
        write_test(datasets[split], folder / split)
    patterns = {"train": "png", "test": "jpg", "second_scene": "jpg"}
    return DenseData(
        classes=CLASSES,
        splits={
            split: {"image": f"{split}/images/{{name}}.{suffix}", "mask": f"{split}/masks/{{name}}.png"}
            for split, suffix in patterns.items()
        },
        root=str(folder),
        ignore=[255],
    )


def write_views(rows: Dataset, folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(rows):
        ground = Ground.of(row["image"], row["boxes"])
        for number in range(VIEWS_PER_WINDOW):
            view = view_of(ground, 1, rng).jittered(rng)
            name = f"{index:06d}_{number}"  # files are found by name, in its order
            view.image.save(folder / "images" / f"{name}.png")
            Image.fromarray(view.crowns.astype(np.uint8)).save(folder / "masks" / f"{name}.png")
