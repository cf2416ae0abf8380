"""Fine-tuned models under corruptions, compared with fine-tuning and with loops over images and pixels."""

import hashlib
import json
import math
import shutil

import dense_data
import nibabel
import numpy as np
import pytest
import torch
import yaml
from classification_data import small_arguments, write_folders
from safetensors.torch import load_file, save_file

from modeling_vitp import (
    ViTPForChangeDetection,
    ViTPForImageClassification,
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPSegmentationImageProcessor,
)
from modeling_vitp.images.corruptions import corrupt, motion
from modeling_vitp.images.pixels import normalized
from modeling_vitp.recipes import (
    evaluate_robustness,
    finetune_change_detection,
    finetune_classification,
    finetune_segmentation,
)
from modeling_vitp.tasks.classification.data import ClassificationData
from modeling_vitp.tasks.segmentation.data import DenseData
from modeling_vitp.tasks.segmentation.trainer import ViTPSegmentationTrainer
from modeling_vitp.vrl import keyed_generator

SETTINGS = {
    "submission": None,
    "num_pictures": 0,
    "max_steps": 10,
    "warmup_steps": 2,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "photometric": False,
    "neck": "pyramid",
    "backbone": {"pyramid_channels": 16},
    "head": {**dense_data.HEAD, "use_auxiliary_head": False},
    "test_scales": [1.0],
    "test_flip": True,
    "stride": 24,
    "crop_size": 48,
    "window": 48,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with two segmentation models, `first` and `second`, and a change-detection model, `change`."""
    folder = tmp_path_factory.mktemp("runs")
    dense_data.make_loveda(folder / "loveda")
    dense_data.make_levir_cd(folder / "levir_cd")
    settings = SETTINGS | {"train_splits": ["train"], "test_split": "val", "per_device_train_batch_size": 3}
    arguments = dense_data.smoke_arguments("loveda", folder / "loveda", folder / "first", **settings)
    assert finetune_segmentation.main(arguments) == 0
    shutil.copytree(folder / "first", folder / "second")
    weights = load_file(folder / "first" / "model.safetensors")
    weights["decode_head.classifier.bias"] += torch.linspace(0, 0.3, 7)
    save_file(weights, folder / "second" / "model.safetensors", {"format": "pt"})
    # After ten steps, the model predicts no change.
    settings = SETTINGS | {"eval_split": None, "per_device_train_batch_size": 4, "max_steps": 30}
    del settings["submission"]
    arguments = dense_data.smoke_arguments("levir_cd", folder / "levir_cd", folder / "change", **settings)
    assert finetune_change_detection.main(arguments) == 0
    return folder


def evaluate(*words, **settings) -> dict:
    """Return the metrics of the command."""
    options = [word for name, value in settings.items() for word in (f"--{name}", *str(value).split())]
    assert evaluate_robustness.main(["--models", *map(str, words), *options]) == 0
    with open(f"{settings['output_dir']}/metrics.json") as file:
        return json.load(file)


def one(**settings) -> dict:
    return {"corruptions": "haze", "severities": 1} | settings


@pytest.mark.parametrize("name", ["first", "change"])
def test_clean_scores_match_fine_tuning(runs, tmp_path, name):
    metrics = evaluate(runs / name, **one(output_dir=tmp_path / "out"))
    recorded = json.loads((runs / name / "metrics.json").read_text())["test"]
    clean = metrics["models"][0]["clean"]["metrics"]
    assert {f"test_{key}": value for key, value in clean.items()}.items() <= recorded.items()
    assert len(clean) == (17 if name == "first" else 4) and clean != metrics["models"][0]["conditions"][0]["metrics"]
    assert metrics["split"] == ("val" if name == "first" else "test")
    assert metrics["score"] == ("mean_iou" if name == "first" else "f1")
    record = json.loads((runs / name / "run.json").read_text())["evaluated_on"]
    assert record["data"] == metrics["data"] and record["scored_with"]["test_flip"] is True


def moved_by_hand(mask: np.ndarray, corruption: str, severity: int, shifts: tuple[float, float]) -> np.ndarray:
    """Return a mask that is rotated, scaled or shifted in a loop over pixels; 255 outside of the image."""
    height, width = mask.shape
    angle = math.radians([30, 45, 60, 75, 90][severity - 1])
    factor = [0.9, 0.8, 0.7, 0.6, 0.5][severity - 1]
    result = np.full_like(mask, 255)
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5 - width / 2, row + 0.5 - height / 2
            if corruption == "rotation":
                x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
            elif corruption == "scale":
                x, y = x / factor, y / factor
            else:
                x, y = x - shifts[0], y - shifts[1]
            x, y = math.floor(x + width / 2 + 1e-9), math.floor(y + height / 2 + 1e-9)
            if 0 <= x < width and 0 <= y < height:
                result[row, column] = mask[y, x]
    return result


@torch.no_grad()
def areas_by_hand(folder, samples, model_class, corruption: str, severity: int, seed: int) -> np.ndarray:
    """Return intersection and union of each class, `(2, num_classes)`, in a loop over images and windows."""
    model = model_class.from_pretrained(folder).eval()
    processor = ViTPSegmentationImageProcessor.from_pretrained(folder)
    counts = np.zeros((2, model.config.num_labels), dtype=int)
    for index in range(len(samples)):
        sample = samples[index]
        mask, (height, width) = sample["mask"].numpy(), sample["mask"].shape
        pixels = []
        for place, image in enumerate(sample["images"]):
            drawn = 0 if corruption in ("rotation", "scale", "translation") else place
            image_seed = keyed_generator(seed, sample["id"], corruption, drawn).initial_seed()
            pixels.append(normalized(corrupt(image, corruption, severity, image_seed), processor)[None])
        if corruption in ("rotation", "scale", "translation"):
            matrix = motion(corruption, severity, height, width, image_seed)
            shifts = (matrix[:, 2] / 2 * torch.tensor([width, height])).tolist()
            mask = moved_by_hand(mask, corruption, severity, shifts)
        total, seen = torch.zeros(1, model.config.num_labels, height, width), torch.zeros(height, width)
        for top in (0, 16):
            for left in (0, 16):
                part = (..., slice(top, top + 48), slice(left, left + 48))
                total[part] += model(*[image[part] for image in pixels]).logits
                seen[part] += 1
        prediction = (total / seen).argmax(1)[0].numpy()
        for label in range(model.config.num_labels):
            mine, theirs = (prediction == label) & (mask != 255), mask == label
            counts[:, label] += (mine & theirs).sum(), (mine | theirs).sum()
    return counts


@pytest.mark.parametrize(("corruption", "severity"), [("rotation", 1), ("translation", 2), ("gaussian_noise", 5)])
def test_corruption_scores_match_loop(runs, tmp_path, corruption, severity):
    """Compare with single windows of 48 pixels at 0 and 16, without flips."""
    settings = {"stride": 16, "per_device_eval_batch_size": 1, "test_flip": False, "seed": 5}
    settings |= {"corruptions": corruption, "severities": severity, "output_dir": tmp_path / "out"}
    metrics = evaluate(runs / "first", **settings)
    data = DenseData.from_dict(dense_data.read_config("loveda")["data"] | {"root": str(runs / "loveda")})
    how = (corruption, severity, 5)
    both, either = areas_by_hand(runs / "first", data.open(["val"]), ViTPForSemanticSegmentation, *how)
    assert (both > 0).sum() > 1
    (condition,) = metrics["models"][0]["conditions"]
    iou = np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)
    found = [condition["metrics"][f"iou/{name}"] for name in data.encoding.names]
    np.testing.assert_array_equal(np.array(found, dtype=float), iou)
    assert condition["score"] == pytest.approx(np.nanmean(iou))


@pytest.mark.parametrize(("corruption", "severity"), [("translation", 2), ("cloud", 3)])
def test_pair_scores_match_loop(runs, tmp_path, corruption, severity):
    settings = {"stride": 16, "per_device_eval_batch_size": 1, "test_flip": False}
    settings |= {"corruptions": corruption, "severities": severity, "output_dir": tmp_path / "out"}
    metrics = evaluate(runs / "change", **settings)
    data = DenseData.from_dict(dense_data.read_config("levir_cd")["data"] | {"root": str(runs / "levir_cd")})
    how = (corruption, severity, 0)
    both, either = areas_by_hand(runs / "change", data.open(["test"]), ViTPForChangeDetection, *how)[:, 1]
    (condition,) = metrics["models"][0]["conditions"]
    assert condition["metrics"]["iou"] == both / either and condition["score"] == 2 * both / (either + both)


@pytest.mark.slow
def test_models_get_identical_pixels(runs, tmp_path, monkeypatch):
    original, seen = ViTPSegmentationTrainer.predict_labels, []

    def predict_labels(self, images, is_test=False):
        seen.append(hashlib.sha256(b"".join(image.numpy().tobytes() for image in images)).hexdigest())
        return original(self, images, is_test)

    monkeypatch.setattr(ViTPSegmentationTrainer, "predict_labels", predict_labels)
    settings = {"corruptions": "translation salt_and_pepper", "severities": "2 4"}
    metrics = evaluate(runs / "first", runs / "second", **settings, output_dir=tmp_path / "both")
    number = 3 * (1 + 2 * 2)
    assert len(seen) == 2 * number and seen[:number] == seen[number:] and len(set(seen)) == number
    assert [model["model"] for model in metrics["models"]] == ["first", "second"]
    assert metrics["models"][0]["clean"]["metrics"] != metrics["models"][1]["clean"]["metrics"]

    settings = {"corruptions": "salt_and_pepper", "severities": 4, "limit": 2}
    evaluate(runs / "second", **settings, output_dir=tmp_path / "few")
    assert seen[2 * number :] == [*seen[:2], *seen[number - 3 : number - 1]]  # images 0 and 1 of 3
    del seen[2 * number :]
    settings = {"corruptions": "translation", "severities": "4", "seed": 1}
    evaluate(runs / "second", **settings, output_dir=tmp_path / "another")
    assert seen[2 * number : 2 * number + 3] == seen[:3] and not {*seen[2 * number + 3 :]} & {*seen[: 2 * number]}


@pytest.mark.slow
def test_workers_do_not_change_scores(runs, tmp_path):
    settings = {"corruptions": "gaussian_noise", "severities": 3}
    alone = evaluate(runs / "first", **settings, output_dir=tmp_path / "alone")
    workers = evaluate(runs / "first", **settings, output_dir=tmp_path / "workers", dataloader_num_workers=2)
    assert alone == workers


@pytest.mark.slow
def test_settings_precedence(runs, tmp_path):
    described = dense_data.read_config("loveda") | {"crop_size": 40, "window": None, "stride": 20}
    described["data"]["root"] = "nowhere"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(described))
    file = {"data": tmp_path / "config.yaml", "data_root": runs / "loveda", "split": "train"}
    recorded = evaluate(runs / "first", **one(output_dir=tmp_path / "recorded"))
    assert recorded["models"][0]["settings"] == recorded["models"][0]["settings"] | {"window": 48, "test_flip": True}
    of_file = evaluate(runs / "first", **one(output_dir=tmp_path / "file"), **file)
    used = {"window": 40, "stride": 20, "test_flip": False, "metric": "mean_iou"}
    assert of_file["models"][0]["settings"].items() >= used.items()
    assert of_file["images"] == 6 and of_file["data"]["root"] == str(runs / "loveda")
    given = evaluate(runs / "first", **one(output_dir=tmp_path / "given"), **file, metric="dice", stride=40)
    assert given["models"][0]["settings"].items() >= (used | {"stride": 40, "metric": "dice"}).items()
    assert given["score"] == "mean_dice"

    without = tmp_path / "without_record"
    shutil.copytree(runs / "first", without, ignore=shutil.ignore_patterns("run.json"))
    found = evaluate(without, **one(output_dir=tmp_path / "no"), **file)
    assert found["models"][0]["clean"] == of_file["models"][0]["clean"]
    with pytest.raises(ValueError, match="without_record .*--data"):
        evaluate(without, **one(output_dir=tmp_path / "none"))


def test_part_of_a_volume_has_no_surfaces(runs, tmp_path):
    """Compare metrics of a part and of the whole volume; surface metrics need all slices."""
    labels = np.random.default_rng(0).integers(0, 7, (48, 48, 6), dtype=np.uint8)
    for name, values in (("image", 30 * labels), ("mask", labels)):
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1, 3, 1])), tmp_path / f"{name}_a.nii.gz")
    names = ViTPForSemanticSegmentation.config_class.from_pretrained(runs / "first").id2label.values()
    data = {"root": str(tmp_path), "volumes": {"plane": "axial", "window": [0, 200]}}
    data |= {"classes": [{"name": name} for name in names]}
    data["splits"] = {"test": {"image": "image_{case}.nii.gz", "mask": "mask_{case}.nii.gz"}}
    words = {"data": json.dumps(data).replace(" ", ""), "split": "test", "metric": "dice"}
    part = evaluate(runs / "first", **one(output_dir=tmp_path / "part"), **words, limit=4)
    assert part["images"] == 4 and 0 < part["models"][0]["clean"]["score"] < 1
    whole = evaluate(runs / "first", **one(output_dir=tmp_path / "whole"), **words)
    measured = [set(found["models"][0]["clean"]["metrics"]) for found in (part, whole)]
    assert measured[0] < measured[1] and "mean_hausdorff_95" in measured[1] - measured[0]


def test_changed_image_raises_error(runs, tmp_path):
    shutil.copytree(runs / "loveda", tmp_path / "data")
    settings = one(output_dir=tmp_path / "out", data_root=tmp_path / "data")
    evaluate(runs / "first", **settings)
    image = next((tmp_path / "data/Val").glob("*/images_png/*.png"))
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="different files"):
        evaluate(runs / "first", **settings)


def test_invalid_data_raise_one_line(runs, tmp_path):
    def says(message, *names, **settings):
        with pytest.raises(ValueError, match=message):
            evaluate(*(runs / name for name in names), **one(output_dir=tmp_path / "out", **settings))
        assert not (tmp_path / "out").exists()

    says("Split 'test' needs masks", "first", split="test")
    says("'tset'", "first", split="tset")
    says("change and .*first differ", "first", "change")
    says("2 classes .*7 classes of .*first", "first", data="levir_cd", data_root=runs / "levir_cd")
    two = dense_data.read_config("levir_cd")["data"] | {"root": str(runs / "levir_cd")}
    two["splits"] = {"test": {"image": "test/A/{name}.png", "mask": "test/label/{name}.png"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": two, "test_split": "test"}))
    says("change takes 2 image.s.", "change", data=tmp_path / "config.yaml")
    says("stride=64", "first", stride=64)


CONDITIONS = ["--corruptions", "rotation", "gaussian_noise", "--severities", "5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_folders(folder / "data", {"train": 4, "test": 6})
    settings = {"test_split": "test", "max_steps": 15, "save_strategy": "no", "learning_rate": 3e-3, "num_pictures": 0}
    assert finetune_classification.main(small_arguments({}, folder / "data", folder / "model", **settings)) == 0
    return folder


@pytest.mark.slow
def test_classifier_scores_match_loop(run, tmp_path):
    words = ["--models", str(run / "model"), *CONDITIONS, "--output_dir", str(tmp_path), "--score", "auroc"]
    assert evaluate_robustness.main(words) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())["models"][0]
    tested = json.loads((run / "model" / "metrics.json").read_text())["test"]
    for name, value in found["clean"]["metrics"].items():
        assert value == tested[f"test_{name}"]

    data = ClassificationData.from_dict({"root": str(run / "data")})
    data.find_classes(["train"])
    samples = data.open(["test"])
    model = ViTPForImageClassification.from_pretrained(run / "model").eval()
    processor = ViTPImageProcessor.from_pretrained(run / "model")
    for condition in found["conditions"]:
        right = []
        for index in range(len(samples)):
            sample, name = samples[index], condition["corruption"]
            seed = keyed_generator(0, sample["id"], name, 0).initial_seed()
            image = corrupt(sample["image"], name, 5, seed)
            pixels = processor(image, input_data_format="channels_first", return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                right.append((model(pixels).logits.argmax() == sample["label"]).item())
        assert condition["metrics"]["accuracy"] == pytest.approx(np.mean(right))

    data = json.dumps({"root": str(run / "data"), "classes": ["field", "water"]})
    for wrong, message in ((["--window", "32"], "window: .*model"), (["--data", data], "'water'.*'forest'")):
        with pytest.raises(ValueError, match=message):
            evaluate_robustness.main([*words, *wrong])
