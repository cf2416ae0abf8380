"""Probes of object centers, compared with scikit-learn and with known answers."""

import json

import numpy as np
import pytest
import torch
from other_backbones import save_backbone
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp.metrics.resampling import resample
from modeling_vitp.probing.backbones import load_backbone
from modeling_vitp.probing.few_labels import FewLabels
from modeling_vitp.probing.heads import fit_linear
from modeling_vitp.recipes.probe import main
from modeling_vitp.tasks.detection.data import DetectionData
from modeling_vitp.tasks.detection.probe import DetectionProbe

NAMES, GRID, PATCH, L2 = ["ship", "plane"], 4, 16, 1e-2
COLORS = [(230, 60, 60), (60, 60, 230)]
SPLITS = {split: {"images": f"{split}/images", "annotations": f"{split}/objects.json"} for split in ("train", "test")}


def write_contents(root, split: str, images: list, objects: list) -> None:
    categories = [{"id": label, "name": name} for label, name in enumerate(NAMES)]
    contents = {"images": images, "annotations": objects, "categories": categories}
    (root / split / "objects.json").write_text(json.dumps(contents))


def write_marks(root, split: str, number: int) -> np.ndarray:
    """Write images of 4 x 4 patches, some with an object that has the color of its class.

    Returns the class of each patch, 2 for none, `(images, 4, 4)`.
    """
    rng = np.random.default_rng(number)
    folder = root / split / "images"
    folder.mkdir(parents=True)
    truth, images, objects = np.full((number, GRID, GRID), 2), [], []
    for index, found in enumerate(truth):
        pixels = rng.integers(0, 200, (GRID * PATCH, GRID * PATCH, 3), dtype=np.uint8)
        for cell in rng.choice(GRID * GRID, 3, replace=False):
            row, column, label = *divmod(int(cell), GRID), int(rng.integers(2))
            found[row, column] = label
            top, left = row * PATCH, column * PATCH
            pixels[top : top + PATCH, left : left + PATCH] = COLORS[label]
            box = [left + 2, top + 4, 12, 8]
            objects.append({"id": len(objects), "image_id": index, "category_id": label, "bbox": box, "iscrowd": 0})
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": GRID * PATCH, "width": GRID * PATCH})
    write_contents(root, split, images, objects)
    return truth


def described(root, splits=SPLITS) -> dict:
    return {"root": str(root), "format": "coco", "classes": NAMES, "splits": splits}


def open_probe(root, splits=SPLITS, **options) -> DetectionProbe:
    data = DetectionData.from_dict(described(root, splits))
    return DetectionProbe(data, {"train": "train", "test": "test"}, L2, **options)


def read_scores(folder) -> dict[str, dict]:
    results = json.loads((folder / "metrics.json").read_text())["results"]
    return {entry["backbone"]: {name: one["mean"] for name, one in entry["scores"].items()} for entry in results}


def test_box_scores_match_scikit_learn(tmp_path, capsys):
    truth = {split: write_marks(tmp_path, split, number) for split, number in (("train", 24), ("test", 12))}
    folder = str(save_backbone(tmp_path / "vit", "vit"))
    words = ["--data", json.dumps(described(tmp_path)), "--task", "detection", "--l2", str(L2), "--device", "cpu"]
    words += ["--output_dir", str(tmp_path / "out"), "--pixel_control", "true", "--backbones", folder]
    assert main(words) == 0
    assert "constant score" in capsys.readouterr().out
    scores = read_scores(tmp_path / "out")
    assert scores[f"{folder}, pixels of its patches"]["centre_auc"] == 1.0
    assert scores[f"{folder}, pixels of its patches"]["centre_ap"] == pytest.approx(1.0)

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    features = {}
    for split, labels in truth.items():
        images = [Image.open(tmp_path / split / "images" / f"{index}.png") for index in range(len(labels))]
        with torch.no_grad():
            states = model(**processor(images, return_tensors="pt")).last_hidden_state
        features[split] = states[:, 1:].flatten(0, 1).double().numpy()
    scaler = StandardScaler().fit(features["train"])
    oracle = LogisticRegression(C=1 / (len(features["train"]) * L2), tol=1e-8, max_iter=5000)
    oracle.fit(scaler.transform(features["train"]), truth["train"].ravel())
    probabilities = oracle.predict_proba(scaler.transform(features["test"]))
    for label, name in enumerate(NAMES):
        wanted = truth["test"].ravel() == label
        area = roc_auc_score(wanted, probabilities[:, label])
        precision = average_precision_score(wanted, probabilities[:, label])
        assert scores[folder][f"centre_auc/{name}"] == pytest.approx(area, abs=5e-3)
        assert scores[folder][f"centre_ap/{name}"] == pytest.approx(precision, abs=2e-2)


def test_crowds_are_ignored(tmp_path):
    """Check that crowds do not count as classes of images, by which few labels are drawn."""
    truth = write_marks(tmp_path, "train", 5)
    write_marks(tmp_path, "test", 3)
    path = tmp_path / "train" / "objects.json"
    contents = json.loads(path.read_text())
    for image in range(5):
        crowd = {**contents["annotations"][0], "image_id": image, "iscrowd": 1, "id": 10_000 + image}
        contents["annotations"].append(crowd)
    path.write_text(json.dumps(contents))
    probe = open_probe(tmp_path)
    wanted = [[(image == label).any() for label in range(len(NAMES))] for image in truth]
    assert probe.presence.tolist() == wanted and probe.presence.any(0).all()
    halves = probe.centres("test", (1, 2))
    assert halves.shape == (3, 1, 2, 3) and halves[..., :2].sum() == 9


def test_invalid_box_data_are_named(tmp_path):
    write_marks(tmp_path, "train", 3)
    data = json.dumps(described(tmp_path, {"train": SPLITS["train"], "test": {"images": "train/images"}}))
    words = ["--backbones", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    for wrong, named in (
        (["--data", data], "'train' and 'test'"),  # The task is found by the format.
        (["--task", "detection", "--data", data, "--test_split", "train"], "test_split"),
        (["--task", "segmentation", "--data", data], "format"),
        (["--task", "detection", "--dataset_name", "somewhere"], "`data`"),
    ):
        with pytest.raises(ValueError, match=named):
            main([*words, *wrong])


def test_window_centers_are_of_whole_objects(tmp_path):
    """Count objects that are mostly outside of a window, which detection would exclude or clip."""
    rng, size = np.random.default_rng(0), (150, 200)
    for split in SPLITS:
        (tmp_path / split / "images").mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / split / "images/0.png")
        boxes = [[*rng.integers(0, (150, 100)).tolist(), *rng.integers(2, 50, 2).tolist()] for _ in range(60)]
        objects = []
        for index, box in enumerate(boxes):
            entry = {"id": index, "image_id": 0, "category_id": index % 2, "bbox": box, "iscrowd": index < 5}
            objects.append(entry)
        write_contents(tmp_path, split, [{"id": 0, "file_name": "0.png", "height": size[0], "width": size[1]}], objects)
    tile = {"size": 64, "overlap": 16}
    probe = open_probe(tmp_path, {split: settings | {"tile": tile} for split, settings in SPLITS.items()})
    counts, places = probe.centres("test", (8, 8)), probe.samples["test"].places
    assert len(places) == 12 and counts[..., :2].sum() > 60
    for found, present, place in zip(counts, probe.centres("test", (1, 1)), places, strict=True):
        left, top, right, bottom = place.window
        wanted, crowds = np.zeros((8, 8, 2)), np.zeros((8, 8), bool)
        for index, (x, y, width, height) in enumerate(boxes):
            column, row = (x + width / 2 - left) / (right - left), (y + height / 2 - top) / (bottom - top)
            if 0 <= column < 1 and 0 <= row < 1:
                if index < 5:
                    crowds[int(row * 8), int(column * 8)] = True
                else:
                    wanted[int(row * 8), int(column * 8), index % 2] += 1
        assert np.array_equal(found[~crowds, :2], wanted[~crowds]) and not found[crowds].any()
        assert np.array_equal(found[~crowds, 2], ~wanted.any(-1)[~crowds])
        assert crowds.any() or np.array_equal(present[0, 0, :2], wanted.sum((0, 1)))


def test_centre_auc_of_resamples_equals_scikit_learn(tmp_path):
    for split, number in (("train", 5), ("test", 6)):
        write_marks(tmp_path, split, number)
    probe = open_probe(tmp_path, intervals=True)
    backbone = load_backbone(str(save_backbone(tmp_path / "vit", "vit")))
    labels = FewLabels(share=1.0)
    (scores,) = probe.probe(backbone, {labels: [np.arange(2)]}, None, tmp_path / "features")["linear", labels]
    maps = [probe.features(backbone, role, None, tmp_path / "features") for role in ("train", "test")]
    train, test = (probe.centres(role, (GRID, GRID)) for role in ("train", "test"))
    logits = fit_linear(maps[0], train, np.arange(2), L2)(torch.tensor(maps[1])).double().numpy()
    assert scores.main.value == scores["centre_auc"] and len(scores.main.resampled) == 200
    assert scores.main.cases == 6
    for draw, resampled in list(zip(resample(6, number=200), scores.main.resampled))[:10]:
        chosen, wanted = logits[draw].reshape(-1, 3), test[draw].reshape(-1, 3) > 0
        odds = [chosen[:, k] - np.logaddexp.reduce(np.delete(chosen, k, 1), axis=1) for k in range(2)]
        areas = [roc_auc_score(wanted[:, k], odds[k]) for k in range(2) if wanted[:, k].any()]
        assert resampled == pytest.approx(np.mean(areas), abs=1e-3)
