"""Exported backbones in torchgeo-bench and kaiko-eva, compared with transformers' AutoModel and scikit-learn."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from tiny_models import VISION
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp import ViTPVisionConfig, ViTPVisionModel, export_backbone

pytestmark = pytest.mark.slow
SIDE = VISION["image_size"][0]
BANDS = ["Red", "Green", "Blue"]
SPLITS = {"train": 60, "valid": 20, "test": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a backbone."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    export_backbone(ViTPVisionModel(ViTPVisionConfig(**VISION)), folder / "my_backbone")
    return folder


def noisy_image(label: int, rng: np.random.Generator) -> np.ndarray:
    """Return uint8 `(side, side, 3)` with stripes whose distance depends on the label."""
    stripes = 20 * np.sin(np.arange(SIDE) * (0.2 + 0.15 * label))
    return (rng.normal(120, 50, (SIDE, SIDE, 3)) + stripes[:, None, None]).clip(0, 255).astype(np.uint8)


@torch.no_grad()
def run_automodel(folder: Path, images: list[np.ndarray], **options):
    processor = AutoImageProcessor.from_pretrained(folder / "my_backbone")
    pixels = processor(images, do_resize=False, crop_to_patches=False, return_tensors="pt")["pixel_values"]
    return AutoModel.from_pretrained(folder / "my_backbone")(pixels, **options)


def mean_tokens(folder: Path, images: list[np.ndarray]) -> np.ndarray:
    return run_automodel(folder, images).last_hidden_state[:, 1:].mean(1).numpy()


def run(folder: Path, words: list[str], **environment: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def write_geobench(folder: Path) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    """Write GEO-Bench's m-pv4ger with random images; return images and labels of the splits."""
    import h5py

    root = folder / "data" / "classification_v1.0" / "m-pv4ger"
    root.mkdir(parents=True)
    rng, splits = np.random.default_rng(0), {}
    for split, number in SPLITS.items():
        labels = np.arange(number) % 2
        images = [noisy_image(label, rng) for label in labels]
        for index, (image, label) in enumerate(zip(images, labels)):
            with h5py.File(root / f"{split}_{index}.hdf5", "w") as file:
                file.attrs["pickle"] = str(pickle.dumps({"label": int(label), "bands_order": BANDS}))
                for band, values in zip(BANDS, image.transpose(2, 0, 1)):
                    file[band] = values
        splits[split] = images, labels
    names = {split: [f"{split}_{index}" for index in range(number)] for split, number in SPLITS.items()}
    (root / "default_partition.json").write_text(json.dumps(names))
    return splits


def test_torchgeo_bench_scores_features_of_automodel(folder):
    pytest.importorskip("torchgeo_bench")
    import pandas as pd

    splits = write_geobench(folder)
    words = ["torchgeo_bench.cli", "run", "hydra.searchpath=[pkg://modeling_vitp.recipes.benchmarks.backbones]"]
    words += ["model=vitp", "model.folder=my_backbone", "dataset.names=[m-pv4ger]", "output=mine.csv"]
    words += ["eval.c_range=[0,2,5]"]  # With a small C, logits are almost 0, and the tolerance of a solver decides.
    words += ["device=cpu", "dataset.num_workers=0", "dataset.normalization=model_native", f"dataset.image_size={SIDE}"]
    run(folder, words)
    rows = pd.read_csv(folder / "mine.csv").set_index("method")
    (train, labels), (valid, valid_labels), (test, test_labels) = (
        (mean_tokens(folder, images), labels) for images, labels in splits.values()
    )
    nearest = KNeighborsClassifier(5).fit(train, labels)
    # For two classes torchgeo-bench penalizes two rows of weights, which is half of scikit-learn's penalty.
    linear = LogisticRegression(C=2 * rows.best_c["linear"], max_iter=20000, tol=1e-10)
    linear.fit(np.concatenate([train, valid]), np.concatenate([labels, valid_labels]))
    expected = {"knn5": nearest.score(test, test_labels), "linear": linear.score(test, test_labels)}
    assert dict(rows.metric_value) == pytest.approx(expected) and 0.5 < min(expected.values()) < 1
    assert set(rows.name) == {"my_backbone"}


def test_torchgeo_bench_segmentation_reads_the_layers(folder):
    pytest.importorskip("torchgeo_bench")
    from torchgeo_bench.datasets import get_bench_dataset_class
    from torchgeo_bench.segmentation_probe import SegmentationProbe

    from modeling_vitp.recipes.benchmarks.backbones.geo_bench import ExportedBackbone

    bands = get_bench_dataset_class("m-pv4ger")().select_band_specs(["red", "green", "blue"])
    model = ExportedBackbone(bands, str(folder / "my_backbone"), normalization="model_native")
    probe = SegmentationProbe(model, ["encoder.layer.2", "encoder.layer.0"], num_classes=2, head_type="fpn")
    image = noisy_image(0, np.random.default_rng(1))
    batch = {"image": torch.tensor(image).permute(2, 0, 1)[None].float(), "mask": torch.zeros(1, SIDE, SIDE)}
    cached = probe.extract_segmentation_features([batch], cache_dtype=torch.float32).layer_tensors
    states = run_automodel(folder, [image], output_hidden_states=True).hidden_states
    for found, state in zip(cached, (states[3], states[1]), strict=True):
        torch.testing.assert_close(found, state[:, 1:].mT.unflatten(2, (4, 4)), rtol=1e-4, atol=1e-5)


def test_kaiko_eva_embeds_as_automodel(folder):
    pytest.importorskip("eva")
    photos, rng = folder / "bach" / "ICIAR2018_BACH_Challenge" / "Photos", np.random.default_rng(0)
    for label, name in enumerate(("Benign", "InSitu", "Invasive", "Normal")):
        (photos / name).mkdir(parents=True)
        for index in range(100):
            Image.fromarray(noisy_image(label, rng)).save(photos / name / f"{index:03d}.tif")
    backbone = {
        "class_path": "eva.vision.models.ModelFromRegistry",
        "init_args": {"model_name": "${oc.env:MODEL_NAME}", "model_extra_kwargs": "${oc.env:MODEL_EXTRA_KWARGS}"},
    }
    processor = AutoImageProcessor.from_pretrained(folder / "my_backbone")
    statistics = {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    transform = {"class_path": "eva.vision.transforms.ResizeAndCrop", "init_args": {"size": SIDE, **statistics}}
    data = {"root": "bach", "split": "val", "transforms": transform}
    writer = {"output_dir": "embeddings", "dataloader_idx_map": {0: "val"}, "backbone": backbone}
    callbacks = [{"class_path": "eva.callbacks.ClassificationEmbeddingsWriter", "init_args": writer}]
    datasets = {"predict": [{"class_path": "eva.vision.datasets.BACH", "init_args": data}]}
    loading = {"batch_size": 64, "num_workers": 1}
    config = {
        "trainer": {
            "class_path": "eva.Trainer",
            "init_args": {"default_root_dir": "logs", "accelerator": "cpu", "callbacks": callbacks},
        },
        "model": {
            "class_path": "eva.HeadModule",
            "init_args": {
                "head": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 32, "out_features": 4}},
                "criterion": "torch.nn.CrossEntropyLoss",
            },
        },
        "data": {
            "class_path": "eva.DataModule",
            "init_args": {"datasets": datasets, "dataloaders": {"predict": loading}},
        },
    }
    (folder / "bach.yaml").write_text(yaml.safe_dump(config))
    words = ["modeling_vitp.recipes.benchmarks.backbones.kaiko_eva", "predict", "--config", "bach.yaml"]
    run(folder, words, MODEL_NAME="vitp", MODEL_EXTRA_KWARGS="{folder: my_backbone}")
    files = sorted((folder / "embeddings").rglob("*.pt"))
    assert len(files) == 132  # eva's validation split
    found = torch.stack([torch.load(path)[0] for path in files])
    images = [Image.open(photos / path.relative_to(folder / "embeddings").with_suffix(".tif")) for path in files]
    np.testing.assert_allclose(found, mean_tokens(folder, [np.asarray(image) for image in images]), atol=1e-5)


def test_kaiko_eva_segmentation_reads_a_map(folder):
    pytest.importorskip("eva")
    from eva.vision.models import ModelFromRegistry

    from modeling_vitp.recipes.benchmarks.backbones import kaiko_eva  # noqa: F401 (registers the model)

    extra = {"folder": str(folder / "my_backbone")}
    (found,) = ModelFromRegistry("vitp", {"out_indices": 1}, extra)(torch.zeros(2, 3, SIDE, SIDE))
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder / "my_backbone")(torch.zeros(2, 3, SIDE, SIDE)).last_hidden_state
    torch.testing.assert_close(found, states[:, 1:].mT.unflatten(2, (4, 4)))
    with pytest.raises(ValueError, match="OUT_INDICES"):
        ModelFromRegistry("vitp", {"out_indices": 3}, extra)
