"""Tests of the segmentation recipes with the benchmark configurations on generated data."""

import json
import shutil
import zipfile

import dense_data
import numpy as np
import pytest
import rasterio
import torch
from launching import launch
from pictures import write_bands
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Subset
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from modeling_vitp import (
    ViTPForChangeDetection,
    ViTPForSemanticSegmentation,
    ViTPSegmentationImageProcessor,
    export_backbone,
    predict_large,
)
from modeling_vitp.images.pixels import normalized
from modeling_vitp.recipes import finetune_change_detection
from modeling_vitp.recipes.finetune_segmentation import main
from modeling_vitp.tasks.segmentation.data import DenseData

pytestmark = pytest.mark.usefixtures("no_loss_picture")


def areas(output_dir, samples, model_class, window: int, stride: int) -> np.ndarray:
    """Return intersection and union of each class, `(2, num_classes)`, from the saved model and a loop over windows."""
    model = model_class.from_pretrained(output_dir).eval()
    processor = ViTPSegmentationImageProcessor.from_pretrained(output_dir)
    counts = np.zeros((2, model.config.num_labels))
    for index in range(len(samples)):
        sample = samples[index]
        pixels = [normalized(image, processor)[None] for image in sample["images"]]
        height, width = pixels[0].shape[-2:]
        total = torch.zeros(1, model.config.num_labels, height, width)
        seen = torch.zeros(height, width)
        tops = [*range(0, max(height - window, 0), stride), max(height - window, 0)]
        lefts = [*range(0, max(width - window, 0), stride), max(width - window, 0)]
        for top in tops:
            for left in lefts:
                part = (..., slice(top, top + window), slice(left, left + window))
                with torch.no_grad():
                    total[part] += model(*[image[part] for image in pixels]).logits
                seen[part] += 1
        prediction, mask = (total / seen).argmax(1)[0].numpy(), sample["mask"].numpy()
        for label in range(model.config.num_labels):
            mine, theirs = (prediction == label) & (mask != 255), mask == label
            counts[:, label] += (mine & theirs).sum(), (mine | theirs).sum()
    return counts


def train(name: str, folder, out: str = "out", recipe=main, **settings) -> dict:
    """Run a recipe on the data in `data` with a benchmark configuration, and return its metrics."""
    arguments = dense_data.smoke_arguments(name, folder / "data", folder / out, **{"num_pictures": 0, **settings})
    assert recipe(arguments) == 0
    return json.loads((folder / out / "metrics.json").read_text())


def benchmark(name: str, folder) -> dict:
    return dense_data.read_config(name)["data"] | {"root": str(folder / "data")}


def test_loveda_trains_scores_and_submits(tmp_path):
    """Check training on two splits, the submission, and the scores of the saved model."""
    dense_data.make_loveda(tmp_path / "data")
    settings = {"eval_split": "val", "train_splits": ["train"], "class_weights": "balanced"}
    metrics = train("loveda", tmp_path, **settings)
    samples = DenseData.from_dict(benchmark("loveda", tmp_path))
    both, either = areas(tmp_path / "out", samples.open(["val"]), ViTPForSemanticSegmentation, 64, 48)
    iou = np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)
    for name, value in zip(samples.encoding.names, iou):
        scored = metrics["eval"][f"eval_iou/{name}"]
        assert scored == pytest.approx(value, abs=0.02) if scored is not None else np.isnan(value)
    assert metrics["eval"]["eval_mean_iou"] == pytest.approx(np.nanmean(iou), abs=0.01)
    assert np.isfinite(metrics["train"]["train_loss"])

    stored = [np.array(Image.open(path)) for path in sorted((tmp_path / "data/Train").glob("*/masks_png/*.png"))]
    counted = {
        name: sum((mask == index + 1).sum() for mask in stored) for index, name in enumerate(samples.encoding.names)
    }
    assert metrics["train_pixels"] == counted
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(samples.encoding.names)}
    total = sum(counted.values())
    assert config["class_weights"] == pytest.approx([total / 7 / count for count in counted.values()])

    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        assert sorted(name for name in archive.namelist() if not name.endswith("/")) == ["0.png", "10.png"]
    mask = np.array(Image.open(tmp_path / "out/submission/10.png"))
    assert mask.shape == (64, 64) and mask.max() <= 6


@pytest.mark.slow
def test_uavid_submission_has_mask_colors(tmp_path):
    """Check oblong images, color masks, six scales and mirrored images."""
    dense_data.make_uavid(tmp_path / "data")
    assert train("uavid", tmp_path, max_steps=1).keys() == {"seed", "train", "train_pixels"}
    colors = {tuple(item["color"]) for item in dense_data.read_config("uavid")["data"]["classes"]}
    for name in ("000000", "000100"):
        mask = np.array(Image.open(tmp_path / f"out/submission/seq21/Labels/{name}.png"))
        assert mask.shape == (54, 96, 3)
        assert {*map(tuple, mask.reshape(-1, 3).tolist())} <= colors


@pytest.mark.slow
@pytest.mark.parametrize("change", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_levir_cd_trains_and_scores(tmp_path, change):
    """Check the recipe also with change as the first class."""
    dense_data.make_levir_cd(tmp_path / "data", size=80)
    described = dense_data.read_config("levir_cd")["data"]
    described["classes"] = described["classes"][:: 1 if change else -1]
    settings = {"eval_split": None, "num_pictures": 1, "data": described}
    metrics = train("levir_cd", tmp_path, recipe=finetune_change_detection.main, **settings)["test"]
    data = DenseData.from_dict(described | {"root": str(tmp_path / "data")})
    both, either = areas(tmp_path / "out", data.open(["test"]), ViTPForChangeDetection, 64, 48)[:, change]
    assert metrics["test_iou"] == pytest.approx(both / either, abs=0.02)
    assert metrics["test_f1"] == pytest.approx(2 * both / (either + both), abs=0.02)
    assert (tmp_path / "out" / "predictions.png").is_file()


@pytest.mark.slow
def test_amos_trains_and_scores_by_volume(tmp_path):
    """Check two volumes of one patient, whose slices have the same indices."""
    dense_data.make_amos(tmp_path / "data")
    for kind, of_kind in (("images", "image"), ("labels", "mask")):
        for number, path in enumerate(sorted((tmp_path / "data").glob(f"{kind}*/*"))):
            place = tmp_path / "data" / path.parent.name[-2:] / ("p1" if number > 2 else f"t{number}") / f"{number}"
            place.mkdir(parents=True, exist_ok=True)
            path.rename(place / f"{of_kind}.nii.gz")
    splits = {
        name: {kind: f"{folder}/{{patient}}/{{visit}}/{kind}.nii.gz" for kind in ("image", "mask")}
        for name, folder in (("train", "Tr"), ("test", "Va"))
    }
    described = benchmark("amos2022", tmp_path) | {"splits": splits}
    metrics = train("amos2022", tmp_path, eval_split=None, data=described, resample_test=True)
    assert metrics["test_cases"] == 1 and len({*metrics["test_resampled"]}) == 1  # One patient is resampled.
    metrics = metrics["test"]
    samples = DenseData.from_dict(described).open(["test"])
    cases = [samples[index]["case"] for index in range(len(samples))]
    assert set(cases) == {"p1/3", "p1/4"} and set(samples.cases) == {"p1"}

    def dice(both, either):
        return np.divide(2 * both, both + either, out=np.full(16, np.nan), where=either > 0)

    areas_of_cases = []
    for case in ("p1/3", "p1/4"):
        slices = Subset(samples, [index for index, other in enumerate(cases) if other == case])
        areas_of_cases.append(areas(tmp_path / "out", slices, ViTPForSemanticSegmentation, 64, 48))
    dice_of_cases = [dice(*of_case) for of_case in areas_of_cases]
    assert metrics["test_mean_dice_by_case"] == pytest.approx(np.nanmean(np.nanmean(dice_of_cases, 0)), abs=0.01)
    assert metrics["test_mean_dice"] == pytest.approx(np.nanmean(dice(*sum(areas_of_cases))), abs=0.01)
    assert "test_mean_surface_dice" in metrics


def test_resumed_run_equals_uninterrupted_run(tmp_path, caplog):
    """Check a resumed run, whose backbone is in another folder, and changes that make it another run."""
    dense_data.make_loveda(tmp_path / "data")
    backbone = dense_data.tiny_backbone()
    for name in ("start", "moved", "other"):
        if name == "other":
            backbone.encoder.layer[1].mlp.fc1.weight.data += 0.01
        export_backbone(backbone, tmp_path / name)

    def run(out: str, start: str = "moved", max_steps: int = 5, **changes) -> None:
        settings = {"submission": None, "save_steps": 4, "eval_split": None, "from_scratch": {}, **changes}
        train("loveda", tmp_path, out, model_name_or_path=str(tmp_path / start), max_steps=max_steps, **settings)

    run("whole", "start")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "stopped" / "checkpoint-4")
    run("stopped", watch_samples=1)
    assert [path.name for path in (tmp_path / "stopped" / "watch").glob("*.png")] == ["step-000005.png"]
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)

    data = dense_data.read_config("loveda")["data"]
    values = [item["value"] for item in data["classes"]]
    classes = [item | {"value": value} for item, value in zip(data["classes"], values[::-1])]
    for changes, message in (
        ({"crop_size": 32}, "crop_size.*64.*32"),
        ({"start": "other"}, "weights"),
        ({"data": data | {"input_spec": {"gamma": 0.5}}}, "input_spec.*gamma"),
        ({"data": data | {"classes": classes}}, "value of each class"),
    ):
        with pytest.raises(ValueError, match=message):
            run("stopped", max_steps=6, **changes)
    run("stopped", max_steps=6, class_weights=[1, 2, 1, 1, 1, 1, 1])
    assert "class_weights" in caplog.text and "[1.0, 2.0, 1.0" in caplog.text


def test_best_checkpoint_has_best_main_score(tmp_path):
    dense_data.make_loveda(tmp_path / "data", size=48)
    settings = {"train_splits": ["train"], "eval_split": "val", "submission": None, "test_scales": [1.0]}
    settings |= {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    metrics = train("loveda", tmp_path, **settings)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    scores = [logs["eval_mean_iou"] for logs in state["log_history"] if "eval_mean_iou" in logs]
    assert len(scores) == 2 and metrics["eval"]["eval_mean_iou"] == max(scores)
    # The class weights of the training's configuration do not matter to a scoring.
    again = {"model_name_or_path": str(tmp_path / "out"), "from_scratch": None, "class_weights": "balanced"}
    metrics = train("loveda", tmp_path, "scored", **settings | again, do_train=False)
    assert metrics["eval"]["eval_mean_iou"] == max(scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_split": "train"}, "'train'|train_splits|test_split"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_split": "train"}, "'train'|eval_split"),
        ({"eval_strategy": "steps", "eval_steps": 1, "eval_split": None}, "eval_strategy.*eval_split"),
        ({"from_scratch": None}, "model_name_or_path"),
        ({"per_device_train_batch_size": 7, "submission": None}, "6.*7|7.*6"),
        ({"per_device_train_batch_size": 1, "submission": None}, "per_device_train_batch_size"),
        ({"train_splits": ["test"]}, "has no masks"),
        ({"submission": {"split": "test", "file": "{image}.png"}}, "submission.*'image'"),
        ({"submission": {"split": "tset", "file": "{name}.png"}}, "'tset'"),
        ({"submission": {"split": "a", "file": "b"}, "data": {"dataset_name": "x"}}, "dataset_name"),
    ],
)
def test_bad_recipe_settings_are_refused(tmp_path, changes, message):
    dense_data.make_loveda(tmp_path / "data", size=16)
    with pytest.raises(ValueError, match=message):
        train("loveda", tmp_path, **{"train_splits": ["train"], "save_steps": 1, **changes})


@pytest.mark.parametrize("split", ["eval_split", "test_split"])
def test_bad_mask_of_scored_split_is_refused_before_training(tmp_path, split):
    dense_data.make_loveda(tmp_path / "data", size=16)
    path = sorted(tmp_path.glob("data/Val/**/masks_png/*.png"))[-1]
    Image.fromarray(np.full((16, 16), 99, np.uint8)).save(path)
    with pytest.raises(ValueError, match=f"{path.name} has 256 pixel.*: 99"):
        train("loveda", tmp_path, train_splits=["train"], save_steps=1, submission=None, **{split: "val"})
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_number_of_images_must_fit_the_model(tmp_path):
    dense_data.make_loveda(tmp_path / "data", size=16)
    with pytest.raises(ValueError, match="2 image.* got 1.*finetune_segmentation"):
        train("loveda", tmp_path, recipe=finetune_change_detection.main, submission=None)


@pytest.mark.slow
def test_two_processes_score_like_one(tmp_path):
    """Train in two processes, and score the model in one and in two processes."""
    dense_data.make_loveda(tmp_path / "data")
    settings = {"submission": None, "num_pictures": 0, "train_splits": ["train"], "test_split": "val"}

    def run_two(name: str, **changes) -> dict:
        words = dense_data.smoke_arguments("loveda", tmp_path / "data", tmp_path / name, **settings | changes)
        output = tmp_path / f"{name}.txt"
        assert launch(2, output, "dense_run.py", words[1]) == [0, 0], output.read_text()[-3000:]
        return json.loads((tmp_path / name / "metrics.json").read_text())

    trained = run_two("trained")
    assert np.isfinite(trained["train"]["train_loss"])
    saved = {"from_scratch": None, "model_name_or_path": str(tmp_path / "trained"), "do_train": False}
    scores = []
    for metrics in (train("loveda", tmp_path, "scored-1", **settings | saved), run_two("scored-2", **saved)):
        scores.append({key: value for key, value in metrics["test"].items() if "iou" in key or "accuracy" in key})
    assert len(scores[0]) == 3 + 2 * 7
    assert scores[0] == scores[1]
    # Batch norm statistics differ between training processes. The saved statistics are scored.
    assert scores[0] == {key: value for key, value in trained["test"].items() if key in scores[0]}


@pytest.mark.slow
def test_recipe_learns_colors(tmp_path):
    """Check that the recipe learns classes that differ by color alone."""
    dense_data.make_loveda(tmp_path / "data")
    settings = {"submission": None, "train_splits": ["train"], "test_split": "val", "per_device_train_batch_size": 3}
    settings |= {"max_steps": 250, "warmup_steps": 10, "save_steps": 1000, "learning_rate": 1e-2}
    settings |= {"scale_range": [0.8, 1.25], "photometric": False, "test_scales": [1.0]}
    metrics = train("loveda", tmp_path, **settings)["test"]
    assert metrics["test_mean_iou"] > 0.55
    assert metrics["test_overall_accuracy"] > 0.75


@pytest.mark.slow
def test_sentinel_2_trains_from_rgb_backbone(tmp_path):
    """Check training, figures, scores, and prediction of a scene with 12 bands."""
    dense_data.make_sen1floods11(tmp_path / "data")
    export_backbone(dense_data.tiny_backbone(), tmp_path / "backbone")
    start = {"model_name_or_path": str(tmp_path / "backbone"), "from_scratch": {}, "num_pictures": 1}
    arguments = dense_data.smoke_arguments("sen1floods11_sentinel2", tmp_path / "data", tmp_path / "out", **start)
    assert main(arguments) == 0
    data = dense_data.read_config("sen1floods11_sentinel2")["data"]
    names, processor = data["input_spec"]["band_names"], AutoImageProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    assert processor.band_names == model.config.backbone_config.band_names == names and len(processor.image_std) == 12
    assert np.isfinite(json.loads((tmp_path / "out/metrics.json").read_text())["test"]["test_mean_iou"])
    assert (tmp_path / "out" / "predictions.png").is_file()

    scene = np.random.default_rng(0).integers(0, 9000, (13, 64, 64), dtype=np.uint16)
    write_bands(tmp_path / "scene.tif", scene)
    predict_large(model, processor, tmp_path / "scene.tif", tmp_path / "classes.tif", window=64, stride=64)
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = (scene[[*range(10), 11, 12]].clip(0, 10000) / 10000 - mean) / std
    expected = model(torch.from_numpy(pixels[None]).float()).logits[0].argmax(0)
    with rasterio.open(tmp_path / "classes.tif") as file:
        assert (file.read(1) == expected.numpy()).mean() > 0.999
    write_bands(tmp_path / "three.tif", scene[:3])
    with pytest.raises(ValueError, match="three.tif .* 3 band"):
        predict_large(model, processor, tmp_path / "three.tif", tmp_path / "other.tif")

    other = [*arguments, "--output_dir", str(tmp_path / "other"), "--from_scratch", "{}", "--model_name_or_path"]
    with pytest.raises(ValueError, match=r"12 bands \(B01.*B12\).*input_spec"):
        main([*other, str(tmp_path / "out"), "--data", json.dumps(data | {"input_spec": {"bands": [3, 2, 1]}})])
    with pytest.raises(ValueError, match=r"S1Hand.tif: .*2 bands \(VV, VH\).* 3"):
        for path in (tmp_path / "data").rglob("*S1Hand.tif"):
            write_bands(path, np.zeros((3, 64, 64), np.float32))
        main(dense_data.smoke_arguments("sen1floods11_sar", tmp_path / "data", tmp_path / "sar"))


@pytest.mark.slow
def test_change_detection_trains_on_band_pairs(tmp_path):
    dense_data.make_sen1floods11(tmp_path / "data")
    data = dense_data.read_config("sen1floods11_sar")["data"]
    for split in data["splits"].values():
        split["before"] = split["after"] = split.pop("image")
    train("sen1floods11_sar", tmp_path, recipe=finetune_change_detection.main, data=data, watch_samples=1)
    assert (tmp_path / "out" / "watch" / "step-000000.png").is_file()
    model = ViTPForChangeDetection.from_pretrained(tmp_path / "out")
    assert model.config.backbone_config.band_names == ["VV", "VH"]
    samples = DenseData.from_dict(data | {"root": str(tmp_path / "data")}).open(["test"])
    assert [image.shape for image in samples[0]["images"]] == [(2, 64, 64)] * 2
