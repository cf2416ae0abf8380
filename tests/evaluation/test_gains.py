"""Gains over controls, compared with scikit-learn, and their table."""

import functools
import itertools

import dense_data
import numpy as np
import pytest
import torch
from pictures import write_bands
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel

from modeling_vitp import ViTPImageProcessor, ViTPVisionConfig, ViTPVisionModel, export_backbone, spread_bands
from modeling_vitp.evaluation import gains
from modeling_vitp.evaluation.gains import (
    BACKBONE,
    PIXELS,
    RANDOM,
    START,
    gains_table,
    load_backbones,
    measure_gains,
    token_similarity,
)
from modeling_vitp.probing.heads import fit_nonlinear
from modeling_vitp.tasks.segmentation import probe as segmentation_probe
from modeling_vitp.tasks.segmentation.data import DenseData

PATCH, SIDE = 16, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write images whose patches have class 1 if the left half is brighter; the mean is uninformative."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 6)):
        for index in range(number):
            labels = rng.integers(0, 2, (4, 4))
            pixels = rng.normal(128, 25, (SIDE, SIDE, 3))
            halves = np.kron(2 * labels - 1, np.repeat([[1, -1]], PATCH, 0).repeat(PATCH // 2, 1))
            pixels += 12 * halves[..., None]
            mask = np.kron(labels, np.ones((PATCH, PATCH))).astype(np.uint8)
            mask[:, :3] = 255
            dense_data.save(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), root / split / f"image/{index}.png")
            dense_data.save(Image.fromarray(mask), root / split / f"mask/{index}.png")
    splits = {
        split: {"image": f"{split}/image/{{name}}.png", "mask": f"{split}/mask/{{name}}.png"}
        for split in ("train", "test")
    }
    return DenseData(classes=dense_data.TWO, splits=splits, root=str(root), ignore=[255])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Write the folder of a run whose pretraining is another random draw of weights."""
    folder = tmp_path_factory.mktemp("run")
    for name, seed in (("backbone", 1), ("backbone_at_start", 2)):
        torch.manual_seed(seed)
        model = ViTPVisionModel(ViTPVisionConfig(**dense_data.TINY, initializer_range=0.2))
        export_backbone(model, folder / name, ViTPImageProcessor())
    return folder


@pytest.fixture(scope="module")
def measured(data, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    arms = load_backbones(run / "backbone", run / "backbone_at_start", seed=3)
    with pytest.MonkeyPatch.context() as patch:  # No test compares the scores of nonlinear probes.
        patch.setattr(segmentation_probe, "fit_nonlinear", functools.partial(fit_nonlinear, steps=5))
        return measure_gains(data, "train", "test", backbones=arms, folder=folder)["test"], folder


def patches_of(data, split: str, features) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features of each patch, its label, and its number of labeled pixels."""
    inputs, labels, weights = [], [], []
    for sample in data.open([split]):
        maps = features(sample["images"][0])
        mask = sample["mask"].numpy()
        for row, column in np.ndindex(4, 4):
            pixels = mask[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            inputs.append(maps[row, column])
            labels.append(pixels[pixels != 255][0])
            weights.append((pixels != 255).sum())
    return np.array(inputs, dtype=np.float64), np.array(labels), np.array(weights)


def normalized(image: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (image / 255 - mean) / std


def bare(image: torch.Tensor) -> np.ndarray:
    pixels = normalized(image)
    patches = pixels.unflatten(1, (4, PATCH)).unflatten(3, (4, PATCH))
    return patches.permute(1, 3, 0, 2, 4).flatten(2).numpy()


def states_of(folder):
    model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def features(image: torch.Tensor) -> np.ndarray:
        states = model(normalized(image)[None], output_hidden_states=True).hidden_states
        return torch.cat([state[0, 1:] for state in states[1:]], -1).unflatten(0, (4, 4)).numpy()

    return features


@pytest.mark.parametrize("arm", [BACKBONE, START, PIXELS])
def test_linear_probe_auc_matches_scikit_learn(arm, data, run, measured):
    """Use the concatenated tokens of all four layers, or the pixels of patches."""
    folders = {BACKBONE: "backbone", START: "backbone_at_start"}
    features = bare if arm == PIXELS else states_of(run / folders[arm])
    inputs, labels, weights = patches_of(data, "train", features)
    scaler = StandardScaler().fit(inputs)
    regression = LogisticRegression(C=1 / (weights.sum() * 0.01), tol=1e-8, max_iter=10000)
    regression.fit(scaler.transform(inputs), labels, sample_weight=weights)
    queries, truth, _ = patches_of(data, "test", features)
    expected = roc_auc_score(truth, regression.decision_function(scaler.transform(queries)))
    assert measured[0]["scores"][arm]["linear"]["patch_auc"] == pytest.approx(expected, abs=0.01)


def test_gains_are_differences_to_controls(measured):
    scores, gains = measured[0]["scores"], measured[0]["gains"]
    assert list(scores) == [BACKBONE, START, RANDOM, PIXELS]
    for probe in ("linear", "nonlinear"):
        assert gains[probe].keys() == {START, RANDOM, PIXELS}
        for control, gain in gains[probe].items():
            assert gain == scores[BACKBONE][probe]["patch_auc"] - scores[control][probe]["patch_auc"]
    assert measured[0]["control"]["mean_iou"] < 0.5


@pytest.mark.slow
def test_same_backbone_has_no_gain(data, run, tmp_path, quick_probe):
    arms = load_backbones(run / "backbone", run / "backbone", seed=3)
    measured = measure_gains(data, "train", "test", backbones=arms, folder=tmp_path)["test"]
    assert measured["gains"]["linear"][START] == measured["gains"]["nonlinear"][START] == 0


def test_backbone_reads_and_shows_its_own_bands(data, tmp_path, monkeypatch, quick_probe):
    names, scenes, rng = ["B02", "B03", "B04", "B08"], [], np.random.default_rng(0)
    for split, number in (("train", 3), ("test", 2)):
        for index in range(number):
            scenes.append(rng.integers(0, 3000, (4, SIDE, SIDE), dtype=np.uint16))
            write_bands(tmp_path / split / f"image/{index}.tif", scenes[-1])
            dense_data.save(Image.open(f"{data.root}/{split}/mask/{index}.png"), tmp_path / split / f"mask/{index}.png")
    processor = ViTPImageProcessor(input_spec={"band_names": names, "window": [0, 3000]})
    folder = export_backbone(spread_bands(dense_data.tiny_backbone(), names), tmp_path / "backbone", processor)
    splits = {split: {**files, "image": f"{split}/image/{{name}}.tif"} for split, files in data.splits.items()}
    data = DenseData(classes=dense_data.TWO, splits=splits, root=str(tmp_path), ignore=[255])
    drawn = []
    monkeypatch.setattr(gains, "draw_panels", lambda rows, path: drawn.extend(rows))
    measured = measure_gains(data, "train", "test", backbones=load_backbones(folder, folder, 0), folder=tmp_path)
    assert measured["test"]["gains"]["linear"][START] == 0
    for row, bands in zip(drawn, scenes[3:], strict=True):
        assert abs(row[0][1] - 255 * (bands[[2, 1, 0]].transpose(1, 2, 0) / 3000)).max() < 1


def test_random_weights_depend_on_the_seed(run):
    name = "encoder.layer.0.attention.q_proj.weight"
    weights = []
    for seed, model in ((3, RANDOM), (3, RANDOM), (4, RANDOM), (3, START)):
        models = load_backbones(run / "backbone", run / "backbone_at_start", seed)
        weights.append(models[model].model.state_dict()[name])
    first, again, *others = weights
    assert torch.equal(first, again) and not any(torch.equal(first, other) for other in others)


def test_gains_table_and_plot(measured):
    scores, folder = measured
    assert f"{scores['scores'][PIXELS]['nonlinear']['patch_auc']:.3f}" in gains_table(scores).splitlines()[-1]
    assert [path.name for path in folder.iterdir()] == ["test.png"]  # Feature files are deleted.


def test_token_similarity_is_mean_over_pairs(measured):
    features = np.random.default_rng(0).normal(size=(3, 2, 3, 4)).astype(np.float32)
    tokens = features.reshape(3, 6, 4)
    expected = []
    for image in tokens:
        for i, j in itertools.permutations(range(6), 2):
            expected.append(image[i] @ image[j] / np.linalg.norm(image[i]) / np.linalg.norm(image[j]))
    assert token_similarity(features) == pytest.approx(np.mean(expected), abs=1e-6)
    assert token_similarity(np.ones((1, 2, 2, 3), np.float32)) == pytest.approx(1)
    assert measured[0]["token_similarity"].keys() == {BACKBONE, START, RANDOM}
