"""Small, learnable segmentation data sets in the layouts of benchmarks."""

from pathlib import Path

import nibabel
import numpy as np
import torch
import yaml
from paths import CONFIGS, LAB_CONFIGS
from pictures import write_bands
from PIL import Image

from modeling_vitp import ViTPImageProcessor, ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.probing.backbones import Backbone, load_backbone
from modeling_vitp.tasks.segmentation.data import DenseData
from modeling_vitp.tasks.segmentation.probe import SegmentationProbe

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": [64, 64],
    "patch_size": [16, 16],
    "attention_bias": True,
}
BACKBONE = {"deformable_heads": 4, "spatial_prior_channels": 8}
HEAD = {"hidden_size": 16, "auxiliary_channels": 16}
TWO = [{"name": "ground"}, {"name": "tree"}]


def tiny_backbone(**settings) -> ViTPVisionModel:
    torch.manual_seed(0)
    return ViTPVisionModel(ViTPVisionConfig(**TINY, **settings))


def loveda_probe(root: Path) -> SegmentationProbe:
    make_loveda(root)
    data = DenseData.from_dict(read_config("loveda")["data"] | {"root": str(root)})
    return SegmentationProbe(data, {"train": "train", "test": "val"}, 1e-2)


def probed_backbone(folder: Path) -> Backbone:
    return load_backbone(str(export_backbone(tiny_backbone(initializer_range=0.2), folder, ViTPImageProcessor())))


def read_config(name: str) -> dict:
    (path,) = [folder / f"{name}.yaml" for folder in (CONFIGS, LAB_CONFIGS) if (folder / f"{name}.yaml").is_file()]
    return yaml.safe_load(path.read_text())


def blobs(rng: np.random.Generator, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """Return rectangles of all classes on background 0, uint8 of shape `(height, width)`."""
    width, height = size
    labels = np.zeros((height, width), dtype=np.uint8)
    for label in rng.permutation(np.arange(1, num_classes)):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        labels[top : top + height // 2, left : left + width // 2] = label
    return labels


def picture_of(labels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Return an image with a color for each class, with noise; the first eight colors differ strongly."""
    colours = np.random.default_rng(4809).integers(30, 226, (256, 3))
    noise = rng.integers(-20, 21, (*labels.shape, 3))
    return Image.fromarray((colours[labels] + noise).clip(0, 255).astype(np.uint8))


def save(image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def labelled_folder(root: Path, masks: dict[str, np.ndarray | None]) -> DenseData:
    """Write images of one color to `images/`, and the masks that are not `None`."""
    for name, mask in masks.items():
        save(Image.new("RGB", (8, 6), (10, 20, 30)), root / "images" / f"{name}.png")
        if mask is not None:
            save(Image.fromarray(mask), root / "masks" / f"{name}.png")
    (root / "masks").mkdir(parents=True, exist_ok=True)
    splits = {"train": {"image": "images/{name}.png", "mask": "masks/{name}.png"}}
    return DenseData(classes=TWO, splits=splits, root=str(root))


def small_mask(*values: int, shape: tuple[int, int] = (6, 8)) -> np.ndarray:
    """Return a mask with the values in order, then zeros."""
    array = np.zeros(shape, dtype=np.uint8)
    array.flat[: len(values)] = values
    return array


def make_loveda(root: Path, size: int = 64) -> None:
    """Write values 1 to 7, and 0 for no data."""
    rng = np.random.default_rng(0)
    for split, areas in {"Train": (3, 3), "Val": (1, 2), "Test": (1, 1)}.items():
        for area, number in zip(("Rural", "Urban"), areas):
            for index in range(number):
                labels = blobs(rng, (size, size), 7)
                name = f"{index + 10 * (area == 'Urban')}.png"
                save(picture_of(labels, rng), root / split / area / "images_png" / name)
                if split != "Test":
                    mask = labels + 1
                    mask[:2] = 0
                    save(Image.fromarray(mask), root / split / area / "masks_png" / name)


def make_uavid(root: Path) -> None:
    """Write color masks and oblong images."""
    rng = np.random.default_rng(1)
    colours = np.array([item["color"] for item in read_config("uavid")["data"]["classes"]], dtype=np.uint8)
    for split, sequences in {"train": ("seq1", "seq2"), "val": ("seq16",), "test": ("seq21",)}.items():
        for sequence in sequences:
            for index in range(2):
                labels = blobs(rng, (96, 54), 8)
                folder, name = root / f"uavid_{split}" / sequence, f"{100 * index:06d}.png"
                save(picture_of(labels, rng), folder / "Images" / name)
                if split != "test":
                    save(Image.fromarray(colours[labels]), folder / "Labels" / name)


def make_levir_cd(root: Path, size: int = 64) -> None:
    """Write pairs; 255 is change."""
    rng = np.random.default_rng(2)
    for split, number in {"train": 4, "val": 2, "test": 2}.items():
        for index in range(number):
            before, after = blobs(rng, (size, size), 3), blobs(rng, (size, size), 3)
            name = f"{split}_{index + 1}.png"
            save(picture_of(before, rng), root / split / "A" / name)
            save(picture_of(after, rng), root / split / "B" / name)
            save(Image.fromarray(np.where(before != after, 255, 0).astype(np.uint8)), root / split / "label" / name)


def make_amos(root: Path) -> None:
    """Write CT volumes in Hounsfield units, with the first axis to the left; 0007 is in the validation split."""
    rng = np.random.default_rng(3)
    for split, patients in {"Tr": (1, 2, 7), "Va": (101, 102)}.items():  # The hash of its name decides for 0007.
        for patient in patients:
            labels = np.stack([blobs(rng, (48, 40), 16) for _ in range(6)], axis=-1)
            values = (labels * 25 - 150 + rng.integers(-5, 6, labels.shape)).astype(np.int16)
            affine = np.diag([-1.5, 1.5, 5.0, 1.0])
            name = f"amos_{patient:04d}.nii.gz"
            for kind, array in (("images", values), ("labels", labels)):
                (root / f"{kind}{split}").mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(array, affine), root / f"{kind}{split}" / name)


def make_organs(root: Path) -> None:
    """Write CT volumes in Hounsfield units with masks of three classes."""
    rng = np.random.default_rng(4)
    for split, patients in {"train": (1, 2), "test": (3,)}.items():
        for patient in patients:
            labels = rng.integers(0, 3, (64, 64, 4)).astype(np.uint8)
            for kind, array in (("images", labels.astype(np.int16) * 100 - 100), ("masks", labels)):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / split / kind / f"{patient}.nii.gz")


def make_sen1floods11(root: Path, size: int = 64) -> None:
    """Write two training chips and one of each other split, with dark water and no data along one side."""
    rng, folder = np.random.default_rng(5), root / "data/flood_events/HandLabeled"
    chips = {"train": ["Ghana_1", "India_2"], "valid": ["Ghana_3"], "test": ["Spain_4"]}
    for split, names in chips.items():
        (root / "splits/flood_handlabeled").mkdir(parents=True, exist_ok=True)
        (root / f"splits/flood_handlabeled/{split}.txt").write_text("\n".join(names))
        for name in names:
            labels = blobs(rng, (size, size), 2).astype(np.int16)
            radar = rng.normal(-11, 2, (2, size, size)) - 9 * labels - [[[0]], [[7]]]
            optical = rng.uniform(500, 4000, (13, 1, 1)) * (1 - 0.8 * labels) + rng.normal(0, 50, (13, size, size))
            radar[:, 0, :3], labels[:, :2] = np.nan, -1
            write_bands(folder / f"S1Hand/{name}_S1Hand.tif", radar.astype(np.float32))
            write_bands(folder / f"S2Hand/{name}_S2Hand.tif", optical.clip(0).astype(np.uint16))
            write_bands(folder / f"LabelHand/{name}_LabelHand.tif", labels[None])


def smoke_arguments(name: str, root: Path, output_dir: Path, **settings) -> list[str]:
    """Return the command line of a recipe that trains a tiny model on generated data with a configuration."""
    config = read_config(name)
    config |= {
        "model_name_or_path": "",
        "from_scratch": TINY,
        "backbone": BACKBONE,
        "head": HEAD,
        "data_root": str(root),
        "output_dir": str(output_dir),
        "crop_size": 64,
        "scale_range": [0.5, 2.0],
        "window": 64,
        "stride": 48,
        "global_batch_size": None,
        "max_grad_norm": 1.0,
        "max_steps": 2,
        "warmup_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "bf16": False,
        "num_pictures": 2,
        "watch_samples": 0,
    } | settings
    path = output_dir.parent / f"{output_dir.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]
