"""Classifiers under corruptions, against their fine-tuning's own test and a loop over images."""

import json

import numpy as np
import pytest
import torch
from classification_data import small_arguments, write_folders

from modeling_vitp import ViTPForImageClassification, ViTPImageProcessor
from modeling_vitp.classification.data import ClassificationData
from modeling_vitp.images.corruptions import corrupt
from modeling_vitp.recipes import evaluate_robustness, finetune_classification
from modeling_vitp.vrl import keyed_generator

pytestmark = pytest.mark.slow
CONDITIONS = ["--corruptions", "rotation", "gaussian_noise", "--severities", "5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_folders(folder / "data", {"train": 4, "test": 6})
    settings = {"test_split": "test", "max_steps": 15, "save_strategy": "no", "learning_rate": 3e-3, "num_pictures": 0}
    assert finetune_classification.main(small_arguments({}, folder / "data", folder / "model", **settings)) == 0
    return folder


def test_clean_images_score_as_in_the_run_and_corrupted_ones_as_in_a_loop(run, tmp_path):
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
    assert (tmp_path / "robustness.png").is_file()


def test_what_does_not_fit_is_said(run, tmp_path):
    words = ["--models", str(run / "model"), *CONDITIONS, "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="is a classifier of images, which has no window"):
        evaluate_robustness.main([*words, "--window", "32"])
    data = json.dumps({"root": str(run / "data"), "classes": ["field", "water"]})
    with pytest.raises(ValueError, match=r"has 2 classes, \['field', 'forest'\], .* the data 2, \['field', 'water'\]"):
        evaluate_robustness.main([*words, "--data", data])
