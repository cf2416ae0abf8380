"""Tests of the classification recipe with the benchmark configurations on generated data."""

import json
import shutil

import classification_data
import dense_data
import numpy as np
import pytest
import sklearn.metrics
import torch
from classification_data import small_arguments, write_folders
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from vision_families import save_vit

from modeling_vitp import ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.modeling_vitp_backbone import open_vit
from modeling_vitp.recipes.finetune_classification import main
from modeling_vitp.tasks.classification.data import ClassificationData

pytestmark = pytest.mark.usefixtures("no_loss_picture")
SPLITS = {"train": 6, "val": 2, "test": 3}
PROJECTIONS = ("proj.weight", "projection_layer.weight")
HEAD_WEIGHTS = {f"{part}.{name}" for part in ("layernorm", "classifier") for name in ("weight", "bias")}


def opened(name: str, root, split: str):
    data = ClassificationData.from_dict(dense_data.read_config(name)["data"] | {"root": str(root)})
    data.find_classes(["train"])
    return data, data.open([split])


def train(config: dict, folder, out: str = "out", **settings) -> dict:
    """Run the recipe on the data in `data`, and return its metrics."""
    settings = {"num_pictures": 0, **settings}
    assert main(small_arguments(config, folder / "data", folder / out, **settings)) == 0
    return json.loads((folder / out / "metrics.json").read_text())


def scores_of_pipeline(output_dir, samples, names: list[str]) -> np.ndarray:
    """Return the scores of the saved model from the transformers pipeline."""
    classify = pipeline("image-classification", model=str(output_dir), top_k=len(names))
    found = []
    for index in range(len(samples)):
        image = Image.fromarray(samples[index]["image"].permute(1, 2, 0).numpy())
        scores = {item["label"]: item["score"] for item in classify(image)}
        found.append([scores[name] for name in names])
    return np.array(found)


@pytest.mark.parametrize("name", ["eurosat", pytest.param("resisc45", marks=pytest.mark.slow)])
def test_single_label_benchmarks_match_scikit_learn(tmp_path, name):
    """Check the scores against scikit-learn with the predictions of the saved model in a pipeline."""
    classification_data.MAKERS[name](tmp_path / "data")
    settings = {"watch_samples": int(name == "eurosat"), "num_pictures": 1}
    metrics = train(dense_data.read_config(name), tmp_path, **settings)
    data, samples = opened(name, tmp_path / "data", "test")
    assert sum(metrics["train_images"].values()) == len(data.open(["train"]))
    scores = scores_of_pipeline(tmp_path / "out", samples, data.classes)
    truth, found = samples.labels.numpy(), scores.argmax(1)
    test = metrics["test"]
    assert test["test_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, found))
    assert test["test_macro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, found, average="macro"))
    expected = sklearn.metrics.roc_auc_score(truth, scores / scores.sum(1, keepdims=True), multi_class="ovr")
    assert test["test_auroc"] == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / "out" / "predictions.png").is_file()
    if name == "eurosat":
        assert metrics["eval"]["eval_accuracy"] >= 0
        assert (tmp_path / "out" / "watch" / "step-000002.png").is_file()


@pytest.mark.slow
def test_bigearthnet_trains_from_rgb_backbone(tmp_path):
    """Check the scores against the saved model with inputs of its image processor."""
    classification_data.MAKERS["bigearthnet_v2"](tmp_path / "data")
    vit = ViTPVisionModel(ViTPVisionConfig(**classification_data.SMALL["from_scratch"]))
    export_backbone(vit, tmp_path / "backbone")
    settings = {"model_name_or_path": str(tmp_path / "backbone"), "from_scratch": {}, "photometric": True}
    settings |= {"watch_samples": 1, "num_pictures": 1}
    metrics = train(dense_data.read_config("bigearthnet_v2"), tmp_path, **settings)["test"]
    data, samples = opened("bigearthnet_v2", tmp_path / "data", "test")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    names, windows = data.input_spec["band_names"], np.array(data.input_spec["window"])[:, :, None, None]
    assert model.config.backbone_config.band_names == processor.band_names == names
    low, high = windows[:, 0], windows[:, 1]
    stored = [(sample["image"].numpy() * (high - low) + low).astype(np.float32) for sample in samples]
    with torch.no_grad():
        scores = model(**processor(stored, return_tensors="pt")).logits.sigmoid().numpy()
    truth = samples.labels.numpy()
    kept = [k for k in range(len(data.classes)) if 0 < truth[:, k].sum() < len(truth)]
    expected = sklearn.metrics.roc_auc_score(truth[:, kept], scores[:, kept], average="macro")
    assert metrics["test_auroc"] == pytest.approx(expected, abs=1e-6)
    for name in ("predictions.png", "watch/step-000002.png"):
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.slow
def test_multi_label_benchmark_matches_scikit_learn(tmp_path):
    name = "chest_xray14"
    classification_data.MAKERS[name](tmp_path / "data")
    metrics = train(dense_data.read_config(name), tmp_path)["test"]
    data, samples = opened(name, tmp_path / "data", "test")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and len(config["id2label"]) == len(data.classes)
    # The image processor has the input spec of the samples.
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor.get("input_spec") == data.input_spec
    shutil.copytree(tmp_path / "out", tmp_path / "plain")
    (tmp_path / "plain" / "preprocessor_config.json").write_text(json.dumps(processor | {"input_spec": None}))
    scores = scores_of_pipeline(tmp_path / "plain", samples, data.classes)
    truth, found = samples.labels.numpy(), scores > 0.5
    kept = [k for k in range(len(data.classes)) if 0 < truth[:, k].sum() < len(truth)]
    assert metrics["test_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, found))
    assert metrics["test_auroc"] == pytest.approx(
        sklearn.metrics.roc_auc_score(truth[:, kept], scores[:, kept], average="macro"), abs=1e-6
    )


@pytest.mark.slow
def test_recipe_learns_and_writes_a_card(tmp_path):
    write_folders(tmp_path / "data", SPLITS, ("field", "forest", "water"))
    settings = {"test_split": "test", "max_steps": 40, "save_steps": 40, "learning_rate": 5e-3, "photometric": False}
    metrics = train({}, tmp_path, **settings)
    assert metrics["train_images"] == {"field": 6, "forest": 6, "water": 6}
    assert metrics["test"]["test_accuracy"] == 1 and metrics["test"]["test_macro_f1"] == 1
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("pipeline_tag: image-classification", 'pipeline("image-classification"', "macro_f1"):
        assert text in card

    # The model is scored again without the training data.
    shutil.rmtree(tmp_path / "data" / "train")
    again = {"model_name_or_path": str(tmp_path / "out"), "from_scratch": None, "do_train": False}
    scored = train({}, tmp_path, "scored", **again, test_split="test")
    assert scored["test"]["test_auroc"] == metrics["test"]["test_auroc"]


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    write_folders(tmp_path / "data", SPLITS)
    settings = {"max_steps": 5, "save_steps": 4, "quarter_turns": 0.5, "vertical_flip": 0.5}
    settings["from_scratch"] = classification_data.SMALL["from_scratch"] | {"hidden_dropout_prob": 0.1}
    train({}, tmp_path, "whole", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "stopped" / "checkpoint-4")
    train({}, tmp_path, "stopped", **settings, watch_samples=1)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    with pytest.raises(ValueError, match="crop_area"):
        train({}, tmp_path, "stopped", **settings, crop_area=[0.9, 1.0])
    next((tmp_path / "data/train/field").iterdir()).unlink()
    with pytest.raises(ValueError, match="data|samples"):
        train({}, tmp_path, "stopped", **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_split": "train"}, "train"),
        ({"from_scratch": None}, "model_name_or_path"),
        ({"image_size": 30}, "image_size.*patch_size"),
        ({"data": {"classes": ["a", "a"]}}, "classes"),
        ({"head": {"poling": "cls"}}, "poling.*pooling"),
        ({"backbone": {"deformable_heads": 2}}, "deformable_heads"),
        ({"label_smoothing_factor": 0.1, "data": {"multi_label": True}}, "label_smoothing_factor"),
    ],
)
def test_bad_recipe_settings_are_refused(tmp_path, changes, message):
    write_folders(tmp_path / "data", {"train": 2, "test": 1})
    with pytest.raises(ValueError, match=message):
        train({}, tmp_path, **{"test_split": "test", **changes})


@pytest.mark.parametrize("lora_r", [0, 2], ids=["frozen", "LoRA"])
@pytest.mark.parametrize("family", ["vitp", pytest.param("siglip_vision_model", marks=pytest.mark.slow)])
def test_frozen_vit_and_lora_on_it(tmp_path, family, lora_r):
    """The ViT stays as it is, or changes by LoRA in its linear layers alone, also in a resumed run."""
    write_folders(tmp_path / "data", SPLITS)
    start = tmp_path / "start"
    if family == "vitp":
        torch.manual_seed(0)
        export_backbone(ViTPVisionModel(ViTPVisionConfig(**classification_data.SMALL["from_scratch"])), start)
    else:
        save_vit(start, family)
    settings = {"model_name_or_path": str(start), "from_scratch": None, "image_size": 64 if family != "vitp" else 32}
    settings |= {"freeze_backbone": not lora_r, "backbone_lora_r": lora_r, "max_steps": 4}
    train({}, tmp_path, "whole", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    train({}, tmp_path, "stopped", **settings)

    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    before = open_vit(start).state_dict()
    assert whole.keys() == stopped.keys() == {f"backbone.{name}" for name in before} | HEAD_WEIGHTS
    changed = {name for name, weight in before.items() if not torch.equal(weight, whole[f"backbone.{name}"])}
    linear = {name for name in before if "layer" in name and name.endswith((*PROJECTIONS, "fc1.weight", "fc2.weight"))}
    linear = {name for name in linear if not name.startswith("head.")}
    assert changed == (linear if lora_r else set())
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    for name in changed:
        assert torch.linalg.matrix_rank(whole[f"backbone.{name}"] - before[name], rtol=1e-3) <= lora_r
    with pytest.raises(ValueError, match="freeze_backbone|backbone_lora_r"):
        changes = {"freeze_backbone": False, "backbone_lora_r": 0, "resume_from_checkpoint": "True"}
        train({}, tmp_path, "stopped", **settings | changes)
