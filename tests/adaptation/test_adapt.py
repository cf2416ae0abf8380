"""`vitp adapt` from labels to a bundle on small data: figures, resuming, controls and bad input."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from classification_data import picture_of, write_folders
from dense_data import BACKBONE, HEAD
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, average_precision_score
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from vision_families import save_language_model, save_vit
from vision_language_models import save_vlm

from modeling_vitp import adapt
from modeling_vitp.adaptation import runs
from modeling_vitp.adaptation.report import AdaptationReport
from modeling_vitp.command.errors import RunStopped
from modeling_vitp.data.annotation_files import read_list
from modeling_vitp.evaluation.comparison import Progress
from modeling_vitp.modeling_vitp_backbone import resize_backbone
from modeling_vitp.recipes import finetune_classification, probe

NAMES = ("field", "forest", "river", "town")
VISION = {"image_size": [32, 32], "patch_size": [8, 8], "hidden_size": 48, "num_hidden_layers": 2}
SMALL = {"num_attention_heads": 3, "intermediate_size": 96, "initializer_range": 0.1}
TEXT = {"hidden_size": 48, "num_hidden_layers": 1, "num_key_value_heads": 3, "tie_word_embeddings": True}
FROM_SCRATCH = {
    "vocab_size": 300,
    "vision_config": {**VISION, **SMALL, "attention_bias": True, "layer_scale_init_value": 1.0},
    "text_config": {**TEXT, **SMALL},
    "image_processor": {"max_patches": 1},
}
PRETRAINING = {"from_scratch": FROM_SCRATCH, "learning_rate": 3e-3, "bf16": False, "watch_samples": 0}
SETTINGS = {
    "pretraining": PRETRAINING | {"activation_checkpointing": False},
    "fine_tuning": {"bf16": False},
    "steps": 60,
    "fine_tuning_steps": 4,
    "seeds": [0, 1],
    "learning_rates": [1e-3, 3e-3],
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Return a folder with images of four classes in colors, without splits."""
    folder = tmp_path_factory.mktemp("labels") / "fields"
    write_folders(folder, {"": 24}, NAMES)
    return folder


@pytest.fixture(scope="module")
def adapted(classes, tmp_path_factory):
    """Return the report and the folder of an adaptation from scratch."""
    folder = tmp_path_factory.mktemp("adapted") / "out"
    return adapt(classes, baselines=["random", "mae"], output_dir=folder, label_fractions=[0.5], **SETTINGS), folder


def test_report_has_all_models_and_a_bundle(adapted):
    report, folder = adapted
    assert [entry["model"] for entry in report.fine_tuned if entry["labels"] == 1] == [
        name for name in ("adapted", "random", "mae") for _ in range(2)
    ]
    assert len(report.fine_tuned) == 12 and {entry["probe"] for entry in report.frozen} == {"20-NN", "linear"}
    assert sum(report.data["images"].values()) == 96 and report.controls["overlap"] == 0
    assert AdaptationReport.load(folder / "bundle").fine_tuned == report.fine_tuned
    backbone = AutoModel.from_pretrained(folder / "bundle")
    trained = AutoModel.from_pretrained(folder / "pretraining" / "backbone")
    assert all(value.equal(trained.state_dict()[name]) for name, value in backbone.state_dict().items())
    mae = json.loads((folder / "progress.json").read_text())["mae"]["result"]
    assert mae["steps"] > 1 and mae["operations"] > 1e9


def test_figures_equal_those_of_the_separate_commands(adapted, tmp_path):
    report, folder = adapted
    entry = next(entry for entry in report.fine_tuned if entry["model"] == "mae" and entry["seed"] == 1)
    name = f"labels_100_rate_{entry['learning_rate']:g}_seed_1"
    config = folder / "fine_tuning" / "mae" / f"{name}.yaml"
    options = ["--test_split", "test", "--output_dir", str(tmp_path / "run")]
    assert not finetune_classification.main(["--config", str(config), *options])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["test_accuracy"] == entry["score"]
    config = folder / "frozen" / "mae.yaml"
    assert not probe.main(["--config", str(config), "--output_dir", str(tmp_path / "probe")])
    results = json.loads((tmp_path / "probe" / "metrics.json").read_text())["results"]
    scores = [one["score"] for one in report.frozen if one["model"] == "mae"]
    assert [one["scores"]["accuracy"]["mean"] for one in results] == scores


def test_finished_adaptation_is_not_run_again(adapted, classes, monkeypatch):
    report, folder = adapted
    monkeypatch.setattr(runs, "logged", None)
    settings = SETTINGS | {"label_fractions": [0.5]}
    again = adapt(classes, baselines=["random", "mae"], output_dir=folder, **settings)
    assert (again.fine_tuned, again.verdict) == (report.fine_tuned, report.verdict)
    with pytest.raises(ValueError, match="fine_tuning_steps"):
        adapt(classes, baselines=["random", "mae"], output_dir=folder, **settings | {"fine_tuning_steps": 5})


@pytest.fixture
def without_onnx(monkeypatch):
    """Leave the graph out of the bundle: that of `adapted` has one, and `test_bundle.py` compares its features."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


def test_interrupted_adaptation_ends_as_an_undisturbed_one(adapted, classes, tmp_path, monkeypatch, without_onnx):
    """The run is stopped after each of several parts, and once before the result of a part is stored."""
    report, _ = adapted
    stops = ["instructions/train", "pretraining/look", "pretraining/run", "controls", "fine_tuning/random"]
    result, write = Progress.result, Progress.result

    def interrupted(self, part, run):
        is_new = part not in self.parts
        found = result(self, part, run)
        if is_new and stops and part.startswith(stops[0]):
            if stops.pop(0) == "pretraining/run":  # killed before the result was stored
                del self.parts[part]
                self.path.write_text(json.dumps(self.parts))
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Progress, "result", interrupted)
    settings = SETTINGS | {"label_fractions": [0.5], "output_dir": tmp_path / "out"}
    for _ in range(len(stops)):
        with pytest.raises(KeyboardInterrupt):
            adapt(classes, baselines=["random", "mae"], **settings)
    again = adapt(classes, baselines=["random", "mae"], **settings)
    assert write is result and not stops
    assert [again.fine_tuned, again.frozen, again.controls] == [report.fine_tuned, report.frozen, report.controls]


def test_unchanged_backbone_is_not_called_better(adapted, classes, tmp_path, without_onnx):
    """With a learning rate of 0, the adapted backbone is its start."""
    _, folder = adapted
    pretraining = SETTINGS["pretraining"] | {"learning_rate": 0.0}
    start = folder / "mae" / "backbone"
    settings = SETTINGS | {"steps": 2, "pretraining": pretraining, "learning_rates": [1e-3]}
    with pytest.raises(RunStopped, match="Keep mae: on the validation images"):
        adapt(classes, start=start, baselines=["start"], output_dir=tmp_path / "out", **settings)
    settings["force"] = True
    report = adapt(classes, start=start, baselines=["start"], output_dir=tmp_path / "out", **settings)
    difference = report.differences()["mae"]
    assert (difference.mean, difference.low, difference.high, difference.is_clear) == (0.0, 0.0, 0.0, False)
    assert report.verdict.startswith("Keep mae: no difference to the adapted backbone was found")


def test_vit_of_vision_language_model_is_adapted(classes, tmp_path, quick_prior, without_onnx):
    save_vlm(tmp_path / "vlm", "qwen3_vl")
    save_language_model(tmp_path / "lm")
    settings = SETTINGS | {"pretraining": {"bf16": False, "watch_samples": 0}, "learning_rates": [1e-3], "seeds": [0]}
    settings |= {"steps": 4, "force": True, "language_model": str(tmp_path / "lm"), "baselines": ["start", "mae"]}
    report = adapt(classes, start=tmp_path / "vlm", output_dir=tmp_path / "out", **settings)
    assert {entry["model"] for entry in report.fine_tuned} == {"adapted", "vlm", "mae"}
    assert AutoModel.from_pretrained(tmp_path / "out" / "bundle").config.model_type == "qwen3_vl_vision"


def test_chosen_rate_is_trained_as_in_one_run(classes, tmp_path, quick_prior, without_onnx):
    """The run of the chosen rate has the weights of an undisturbed run, and the backbone lies on the line to them."""
    save_vit(tmp_path / "vit", "dinov2")
    save_language_model(tmp_path / "lm")
    settings = SETTINGS | {"pretraining": {"bf16": False, "watch_samples": 0}, "learning_rates": [1e-3], "seeds": [0]}
    settings |= {"steps": 20, "force": True, "language_model": str(tmp_path / "lm"), "baselines": ["start"]}
    out = tmp_path / "out"
    report = adapt(classes, start=tmp_path / "vit", output_dir=out, **settings)
    assert sorted(path.name for path in out.glob("pretraining*") if path.is_dir()) == ["pretraining"]
    chosen = json.loads((out / "progress.json").read_text())["pretraining/look"]["result"]["chosen"]
    rate = (1e-5, 5e-5)[chosen]
    configuration = yaml.safe_load((out / f"pretraining_rate_{rate:g}.yaml").read_text())
    assert configuration.pop("stop_at_step") == 2 and configuration["part_learning_rates"]["vision"] == rate
    del configuration["output_dir"]
    runs.run_pretraining(configuration, tmp_path / "undisturbed")
    undisturbed = load_file(tmp_path / "undisturbed" / "model.safetensors")
    trained = load_file(out / "pretraining" / "model.safetensors")
    assert undisturbed.keys() == trained.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in undisturbed.items())

    alpha = float(report.controls["interpolation"].split()[0])
    start = resize_backbone(AutoModel.from_pretrained(tmp_path / "vit"), image_size=report.plan["image_size"])
    pretrained = AutoModel.from_pretrained(tmp_path / "undisturbed" / "backbone").state_dict()
    backbone = AutoModel.from_pretrained(out / "bundle").state_dict()
    for name, weight in start.state_dict().items():
        torch.testing.assert_close(backbone[name], torch.lerp(weight, pretrained[name], alpha))


def test_model_that_learns_shuffled_labels_does_not_look(adapted, classes, tmp_path, quick_prior, without_onnx):
    report, _ = adapted
    shuffled = tmp_path / "shuffled"
    files = sorted(classes.rglob("*.png"))
    order = np.random.default_rng(0).permutation(len(files))
    for index, path in enumerate(files):
        target = shuffled / files[order[index]].parent.name / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    settings = SETTINGS | {"learning_rates": [1e-3], "fine_tuning_steps": 2, "force": True}
    blind = adapt(shuffled, baselines=["random"], output_dir=tmp_path / "out", **settings)
    assert report.looks_at_images() and "looks at the image" not in report.verdict
    assert not blind.looks_at_images() and "not shown that the language model looks at the image" in blind.verdict


def test_plan_follows_the_measured_costs(classes, tmp_path, capsys, quick_prior):
    settings = SETTINGS | {"steps": None, "fine_tuning_steps": None, "seeds": None}
    settings |= {"baselines": ["random"], "output_dir": tmp_path / "out", "dry_run": True}
    assert adapt(classes, budget="10min", **settings) is None
    costs = json.loads((tmp_path / "out" / "progress.json").read_text())["plan/costs"]["result"]
    assert 0 < costs["step"] < 60
    assert "of 10min" in capsys.readouterr().out and "plan" not in Progress(tmp_path / "out" / "progress.json").parts
    with pytest.raises(ValueError, match="budget: 0 s are left, too short for one step"):
        adapt(classes, budget="0.1s", **settings)


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return an image that resembles no other, uint8 `(side, side)`."""
    coarse = Image.fromarray(rng.integers(0, 256, (side // 6, side // 6)).astype(np.uint8))
    return np.array(coarse.resize((side, side), Image.Resampling.BICUBIC))


def test_test_images_in_the_training_data_are_refused(tmp_path):
    """A test image that was stored again as JPEG is found in the training data."""
    rng = np.random.default_rng(0)
    for index in range(16):
        split = "test" if index < 4 else "val" if index < 8 else "train"
        path = tmp_path / "data" / split / NAMES[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture(rng, 200)).convert("RGB").save(path)
    with Image.open(tmp_path / "data" / "test" / NAMES[0] / "0.png") as image:
        for quality in (80, 90):
            image.save(tmp_path / "data" / "train" / NAMES[0] / f"copy_{quality}.jpg", quality=quality)
    with pytest.raises(ValueError, match=r"^1 test image.*0\.png.*Take them out\."):
        adapt(tmp_path / "data", output_dir=tmp_path / "out", **SETTINGS)


def small_masks(folder: Path) -> None:
    """Write 30 images with a bright nucleus on a dark texture, and their masks."""
    rng = np.random.default_rng(0)
    for index in range(30):
        mask = np.zeros((64, 64), np.uint8)
        row, column, height, width = *rng.integers(14, 50, 2), *rng.integers(6, 13, 2)
        rows, columns = np.mgrid[:64, :64]
        mask[((rows - row) / height) ** 2 + ((columns - column) / width) ** 2 <= 1] = 1
        image = (texture(rng, 64) // 2 + 100 * mask).astype(np.uint8)
        for name, pixels in (("images", image), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert("RGB" if name == "images" else "L").save(folder / name / f"{index:03d}.png")


def test_masks_are_compared(adapted, tmp_path, without_onnx):
    small_masks(tmp_path / "data")
    fine_tuning = {"bf16": False, "backbone": BACKBONE, "head": HEAD}
    settings = SETTINGS | {"fine_tuning": fine_tuning, "fine_tuning_steps": 6, "learning_rates": [1e-3], "steps": 20}
    start = adapted[1] / "pretraining"
    settings["pretraining"] = {name: value for name, value in settings["pretraining"].items() if name != "from_scratch"}
    settings["force"] = True  # A few steps need not improve the start.
    report = adapt(tmp_path / "data", start=start, baselines=["start"], output_dir=tmp_path / "out", **settings)
    assert report.metric == "mean_iou" and report.start == "pretraining"
    assert {entry["model"] for entry in report.fine_tuned} == {"adapted", "pretraining"}
    assert report.verdict and report.controls["answers"]


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_table_of_classes_is_adapted(tmp_path, quick_prior, without_onnx, is_multi_label):
    """Compare a test score with scikit-learn's of the fine-tuned model in the bundle."""
    rng = np.random.default_rng(0)
    labels = {}
    root = tmp_path / "data"
    for index in range(96):
        classes = np.flatnonzero(rng.random(4) < [0.6, 0.4, 0.4, 0.25]).tolist() if is_multi_label else [index % 4]
        labels[f"{index}.png"] = [NAMES[label] for label in classes]
        root.mkdir(exist_ok=True)
        picture_of(classes, rng).save(root / f"{index}.png")
    rows = [f"{name},{'|'.join(names)}" for name, names in labels.items()]
    (root / "labels.csv").write_text("\n".join(["image,label", *rows]))
    settings = SETTINGS | {"steps": 20, "learning_rates": [1e-3], "force": True}
    report = adapt(root, baselines=["random"], output_dir=tmp_path / "out", **settings)

    fine_tuned = tmp_path / "out" / "bundle" / "fine_tuned"
    model = AutoModelForImageClassification.from_pretrained(fine_tuned).eval()
    processor = AutoImageProcessor.from_pretrained(fine_tuned)
    names = read_list(tmp_path / "out" / "splits" / "test.txt")
    inputs = processor([Image.open(root / name) for name in names], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    truth = np.array([[label in labels[name] for label in model.config.id2label.values()] for name in names])
    if is_multi_label:
        metric, title, unit = "mean_average_precision", "mean average precision", "mAP"
        occurring = truth.any(0)
        expected = average_precision_score(truth[:, occurring], logits[:, occurring], average="macro")
    else:
        metric, title, unit = "accuracy", "accuracy", "accuracy"
        expected = accuracy_score(truth.argmax(1), logits.argmax(1))
    assert (report.metric, report.frozen[0]["metric"]) == (metric, title)
    assert report.fine_tuned[0]["model"] == "adapted" and report.fine_tuned[0]["score"] == pytest.approx(expected)
    assert f"points of {unit}" in report.verdict and title in report.sections()["Frozen"][0]
    assert report.classes == list(NAMES) and report.controls["answers"]
