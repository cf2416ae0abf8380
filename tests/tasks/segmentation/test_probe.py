"""Probes of masks: labels of patches, and the recipe."""

import copy
import json

import dense_data
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_backbones import save_backbone
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp.metrics.resampling import resample
from modeling_vitp.probing.few_labels import FewLabels
from modeling_vitp.recipes.probe import main
from modeling_vitp.tasks.segmentation.probe import interpolate, pixels_by_patch


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_pixel_counts_by_patch_match_loop(height, width, rows, columns):
    mask = np.random.default_rng(height * 10 + width).choice([0, 1, 2, 255], (height, width)).astype(np.uint8)
    expected = np.zeros((rows, columns, 3))
    for y in range(height):
        for x in range(width):
            if mask[y, x] != 255:
                expected[int((y + 0.5) / height * rows), int((x + 0.5) / width * columns), mask[y, x]] += 1
    assert np.array_equal(pixels_by_patch(mask, (rows, columns), 3), expected)


def test_logits_of_patches_are_interpolated():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])  # One row, two columns.
    # Between the patch centers, the first class falls from 2 to 0, and the second rises from 0 to 1.
    assert interpolate(logits, (1, 8)).argmax(0).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]


ALL = FewLabels(share=1.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return dense_data.loveda_probe(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return dense_data.probed_backbone(tmp_path_factory.mktemp("backbone"))


def read_metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_loveda_scores_match_scikit_learn(tmp_path, quick_probe):
    """Probe LoveDA by its configuration file, and compare with scikit-learn on features of transformers."""
    dense_data.make_loveda(tmp_path / "data", size=48)
    names = [str(save_backbone(tmp_path / kind, kind)) for kind in ("vitp", "dinov2")]
    arguments = ["--backbones", *names, "--data", str(dense_data.CONFIGS / "loveda.yaml"), "--test_split", "val"]
    arguments += ["--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--shares", "1", "0.5"]
    assert main(arguments) == 0
    metrics = read_metrics(tmp_path / "out")
    assert [(item["probe"], item["training_images"]) for item in metrics["results"]] == [
        (probe, images) for images in ([6], [3, 3, 3]) for probe in ("linear", "nonlinear")
    ] * 2
    files = {split: sorted((tmp_path / "data" / split).glob("*/images_png/*.png")) for split in ("Train", "Val")}
    masks = {
        split: [np.array(Image.open(str(path).replace("images_png", "masks_png"))).astype(int) - 1 for path in paths]
        for split, paths in files.items()
    }
    truth = np.concatenate([mask.ravel() for mask in masks["Val"]])
    counted = truth >= 0
    for name, prefix, result in zip(names, (1, 4), metrics["results"][::4]):
        model, processor = AutoModel.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)
        maps = {}
        for split, paths in files.items():
            images = [Image.open(path).resize((64, 64), Image.Resampling.BICUBIC) for path in paths]
            options = {"do_resize": False} | ({"do_center_crop": False} if prefix > 1 else {})
            with torch.no_grad():
                states = model(**processor(images, return_tensors="pt", **options)).last_hidden_state
            maps[split] = states[:, prefix:].unflatten(1, (4, 4))
        labels = np.concatenate([mask.ravel() for mask in masks["Train"]])
        pixel_features = maps["Train"].numpy().repeat(12, axis=1).repeat(12, axis=2).reshape(-1, 32)
        inputs, labels = pixel_features[labels >= 0], labels[labels >= 0]
        patches = maps["Train"].reshape(-1, 32).double().numpy()
        scaler = StandardScaler().fit(patches)
        regression = LogisticRegression(C=1 / (len(labels) * 0.01), max_iter=10000)
        regression.fit(scaler.transform(inputs), labels)
        predicted, scores, majority = [], [], []
        for features, mask in zip(maps["Val"], masks["Val"]):
            logits = regression.decision_function(scaler.transform(features.reshape(16, 32))).reshape(1, 4, 4, -1)
            for y, x in np.ndindex(4, 4):
                pixels = mask[y * 12 : y * 12 + 12, x * 12 : x * 12 + 12]
                if (pixels >= 0).any():
                    majority.append(np.bincount(pixels[pixels >= 0]).argmax())
                    scores.append(logits[0, y, x])
            upsampled = torch.nn.functional.interpolate(
                torch.tensor(logits).permute(0, 3, 1, 2), (48, 48), mode="bilinear", align_corners=False
            )
            predicted.append(regression.classes_[upsampled.argmax(1)[0].numpy()].ravel())
        predicted = np.concatenate(predicted)
        classes = sorted({*truth[counted]} | {*predicted[counted]})
        expected = jaccard_score(truth[counted], predicted[counted], labels=classes, average="macro")
        assert result["scores"]["mean_iou"]["mean"] == pytest.approx(expected, abs=0.01)
        odds = np.array(scores)
        odds = odds - np.log([np.exp(np.delete(odds, k, 1)).sum(1) for k in range(odds.shape[1])]).T
        known = {label: column for column, label in enumerate(regression.classes_)}
        areas = [roc_auc_score(np.array(majority) == k, odds[:, known[k]]) for k in np.unique(majority)]
        assert result["scores"]["patch_auc"]["mean"] == pytest.approx(np.mean(areas), abs=0.01)
        assert result["scores"]["mean_iou"]["mean"] > metrics["control"]["mean_iou"]
    largest = np.bincount(np.concatenate([mask[mask >= 0] for mask in masks["Train"]])).argmax()
    present = np.unique(truth[counted])
    assert metrics["control"]["mean_iou"] == pytest.approx((truth[counted] == largest).mean() / len(present))


def test_depths_and_controls_match_transformers(tmp_path, quick_probe):
    """Compare the features of each with transformers."""
    dense_data.make_loveda(tmp_path / "data", size=64)
    folder = save_backbone(tmp_path / "vitp", "vitp")
    arguments = ["--backbones", str(folder), "--data", str(dense_data.CONFIGS / "loveda.yaml"), "--test_split", "val"]
    arguments += ["--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--depths", "2"]
    assert main([*arguments, "--random_control", "true", "--pixel_control", "true"]) == 0
    results = read_metrics(tmp_path / "out")["results"]
    shown = [str(folder), f"{folder}, random weights", f"{folder}, pixels of its patches"]
    assert [item["backbone"] for item in results] == [name for name in shown for _ in range(2)]
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    paths = sorted((tmp_path / "data/Val").glob("*/images_png/*.png"))
    images = [Image.open(path) for path in paths]
    pixels = processor(images, do_resize=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    layers = len(states) - 1
    tokens = torch.cat([states[depth][:, 1:] for depth in (round(layers / 2), layers)], -1).unflatten(1, (4, 4))
    patches = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3)
    files = [np.load(path) for path in (tmp_path / "out/features").glob("*.npy")]
    files = [array for array in files if len(array) == len(paths)]
    assert len(files) == 3
    for expected in (tokens, patches):
        expected = expected.numpy()
        assert any(array.shape == expected.shape and np.allclose(array, expected, atol=1e-4) for array in files)
    with pytest.raises(ValueError, match=f"depths .*{layers}, .*{folder}"):
        main([*arguments[:-1], "9"])


def test_volumes_are_probed_with_shots(tmp_path, quick_probe):
    """Read volumes by the settings of the data, not by the input spec of a backbone."""
    dense_data.make_amos(tmp_path / "data")
    folder = save_backbone(tmp_path / "b", "vitp", {"window": [500, 600]})
    arguments = ["--backbones", str(folder), "--data", str(dense_data.CONFIGS / "amos2022.yaml"), "--shots", "1"]
    arguments += ["--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--seeds", "3"]
    assert main(arguments) == 0
    result, _ = read_metrics(tmp_path / "out")["results"]
    assert result["labels"] == "1 shot" and result["scores"]["mean_iou"]["spread"] is None
    assert 1 <= result["training_images"][0] <= 12
    features = [np.load(path) for path in (tmp_path / "out/features").glob("*.npy")]
    assert features[0].std(axis=(0, 1, 2)).max() > 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pair", "train_1 with 2 images"),
        ("no masks", "'test' has no masks"),
        ("same split", "'train'"),
        ("same file", "Rural/images_png/0.png .*'train' and 'val'"),
    ],
)
def test_invalid_mask_data_are_named(tmp_path, what, message):
    test_split = {"no masks": "test", "same split": "train"}.get(what, "val")
    data = dense_data.read_config("loveda")["data"]
    if what == "pair":
        data, test_split = dense_data.read_config("levir_cd")["data"], "test"
        dense_data.make_levir_cd(tmp_path / "data")
    else:
        dense_data.make_loveda(tmp_path / "data", size=48)
    if what == "same file":
        data["splits"]["val"] = data["splits"]["train"]
    arguments = ["--backbones", str(save_backbone(tmp_path / "b", "vitp")), "--test_split", test_split]
    arguments += ["--data", json.dumps(data), "--data_root", str(tmp_path / "data")]
    with pytest.raises(ValueError, match=message):
        main([*arguments, "--output_dir", str(tmp_path / "out")])


def test_mean_iou_of_resamples_equals_scikit_learn(task, backbone, tmp_path, quick_probe):
    everything, images = {ALL: [np.arange(len(task.samples["train"]))]}, len(task.samples["test"])
    task = copy.copy(task)
    task.intervals = True
    heads = task.fit(backbone, everything, None, tmp_path)
    (scores,) = task.score(heads, backbone, None, tmp_path)["linear", ALL]
    assert scores.main.value == scores["mean_iou"] and len(scores.main.resampled) == 1000
    features, masks = task.features(backbone, "test", None, tmp_path), list(task.masks("test"))
    predicted = [
        interpolate(heads["linear", ALL][0](torch.tensor(maps)), mask.shape).argmax(0).numpy()
        for maps, mask in zip(features, masks)
    ]
    order = sorted(range(images), key=task.samples["test"].cases.__getitem__)
    for draw, resampled in list(zip(resample(images), scores.main.resampled))[:5]:
        chosen = [order[index] for index in draw]
        truth, found = (np.concatenate([maps[index].ravel() for index in chosen]) for maps in (masks, predicted))
        counted = truth != 255
        classes = np.union1d(truth[counted], found[counted])
        expected = jaccard_score(truth[counted], found[counted], labels=classes, average="macro")
        assert resampled == pytest.approx(expected)
