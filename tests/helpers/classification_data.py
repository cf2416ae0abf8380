"""Small, learnable classification data sets in the layouts of benchmarks."""

from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from dense_data import TINY, save
from pictures import write_bands
from PIL import Image

COLORS = np.array([(200, 60, 40), (40, 170, 60), (60, 60, 200), (200, 190, 40)])


def picture_of(classes: list[int], rng: np.random.Generator, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Return a gray noise image with a stripe in the color of each class."""
    width, height = size
    pixels = np.full((height, width, 3), 120)
    for place in classes:
        pixels[:, place * width // len(COLORS) : (place + 1) * width // len(COLORS)] = COLORS[place]
    return Image.fromarray((pixels + rng.integers(-25, 26, pixels.shape)).clip(0, 255).astype(np.uint8))


def write_folders(root: Path, numbers: dict[str, int], names: tuple[str, ...] = ("field", "forest")) -> None:
    """Write `SPLIT/CLASS/NUMBER.png`, with `numbers` images of each class."""
    rng = np.random.default_rng(0)
    for split, number in numbers.items():
        for place, name in enumerate(names):
            for index in range(number):
                save(picture_of([place], rng, (24 + index % 3, 20)), root / split / name / f"{index}.png")


def make_eurosat(root: Path) -> None:
    rng = np.random.default_rng(1)
    lists = {"train": [], "val": [], "test": []}
    for place, name in enumerate(("AnnualCrop", "Forest", "River")):
        for index in range(1, 9):
            file = f"{name}_{index}.jpg"
            save(picture_of([place], rng), root / name / file)
            lists["train" if index < 6 else "val" if index == 6 else "test"].append(file)
    for split, files in lists.items():
        (root / f"eurosat-{split}.txt").write_text("\n".join(files) + "\n")


def make_resisc45(root: Path) -> None:
    rng = np.random.default_rng(2)
    for place, name in enumerate(("airplane", "airport", "beach")):
        for index in range(1, 21):
            save(picture_of([place], rng), root / name / f"{name}_{index:03}.jpg")


def make_bigearthnet_v2(root: Path) -> None:
    """Write bands as separate 16-bit files of 10, 20 or 60 m a pixel, and classes as lists in a table."""
    rng = np.random.default_rng(3)
    names = ("Arable land", "Pastures", "Mixed forest", "Marine waters")
    sides = {24: "B02 B03 B04 B08", 12: "B05 B06 B07 B8A B11 B12", 4: "B01 B09"}
    rows, tile = [], "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP"
    for index in range(16):
        classes = [place for place in range(4) if (index + place) % 3 == 0] or [0]
        patch = f"{tile}_26_{index}"
        pixels = np.asarray(picture_of(classes, rng, (24, 24))).astype(np.uint16) * 8
        colors = dict(zip(("B04", "B03", "B02"), pixels.transpose(2, 0, 1)))
        for side, bands in sides.items():
            for band in bands.split():
                values = colors.get(band, rng.integers(0, 4000, (side, side), dtype=np.uint16))
                write_bands(root / "BigEarthNet-S2" / tile / patch / f"{patch}_{band}.tif", values[None])
        split = "train" if index < 10 else "validation" if index < 13 else "test"
        rows.append({"patch_id": patch, "labels": [names[place] for place in classes], "split": split})
    pd.DataFrame(rows).to_parquet(root / "metadata.parquet")


def make_chest_xray14(root: Path) -> None:
    """Write findings as text, gray images, and lists by patient."""
    rng = np.random.default_rng(4)
    names = ("Atelectasis", "Edema", "Hernia", "Mass")
    rows, lists = [], {"train_val": [], "test": []}
    for patient in range(1, 9):
        for number in range(2):
            classes = [place for place in range(4) if (patient + number + place) % 3 == 0]
            name = f"{patient:08}_{number:03}.png"
            save(picture_of(classes, rng).convert("L"), root / "images" / name)
            rows.append({"Image Index": name, "Finding Labels": "|".join(names[k] for k in classes) or "No Finding"})
            lists["train_val" if patient < 6 else "test"].append(name)
    pd.DataFrame(rows).to_csv(root / "Data_Entry_2017.csv", index=False)
    for name, files in lists.items():
        (root / f"{name}_list.txt").write_text("\n".join(files) + "\n")


MAKERS = {
    "eurosat": make_eurosat,
    "resisc45": make_resisc45,
    "bigearthnet_v2": make_bigearthnet_v2,
    "chest_xray14": make_chest_xray14,
}
SMALL = {
    "model_name_or_path": "",
    "from_scratch": TINY | {"image_size": [32, 32], "patch_size": [8, 8]},
    "image_size": 32,
    "num_train_epochs": 1,
    "max_steps": 2,
    "warmup_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "report_to": "none",
    "bf16": False,
    "num_pictures": 2,
    "watch_samples": 0,
}


def small_arguments(config: dict, root: Path, output_dir: Path, **settings) -> list[str]:
    """Return the command line of a recipe that trains a tiny model on generated data with a configuration."""
    config = {**config, **SMALL, "data_root": str(root), "output_dir": str(output_dir), **settings}
    path = output_dir.parent / f"{output_dir.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]
