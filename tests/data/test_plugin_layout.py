"""Layout of a plugin, the one of `docs/extending.md`, in all commands that read labeled images."""

import json
import re

import numpy as np
import pytest
from datasets import load_dataset
from dense_data import BACKBONE, TINY, tiny_backbone
from paths import ROOT
from PIL import Image
from tiny_models import FROM_SCRATCH

from modeling_vitp import ViTPImageProcessor, export_backbone
from modeling_vitp.adaptation.labels import read_labels
from modeling_vitp.data.layouts import LAYOUTS, recognize_layout
from modeling_vitp.evaluation import pretraining
from modeling_vitp.instructions.from_annotations import labeled_views
from modeling_vitp.recipes import finetune_detection, make_instructions, pretrain, probe
from modeling_vitp.training.command_line import load_plugins

COLORS = {"ship": (230, 60, 60), "plane": (60, 60, 230)}
SIDE = 64
HEAD = {"neck_channels": 16, "head_hidden_size": 32, "rpn_candidates_train": 50, "rpn_candidates_eval": 50}
TRAINING = "--max_steps 2 --per_device_train_batch_size 2 --dataloader_num_workers 0 --report_to none --bf16 false"
TRAINING += " --save_strategy no --watch_samples 0 --logging_steps 1"


@pytest.fixture
def plugin(tmp_path, forget_plugins):
    """Return the file of the plugin, whose layout is forgotten after the test."""
    page = (ROOT / "docs" / "extending.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class LabelMe" in block]
    path = tmp_path / "labelme.py"
    path.write_text(block)
    return str(path)


def write_labels(root):
    """Write images with colored rectangles, and the corners of these as LabelMe does; return the boxes by image."""
    boxes = {}
    for split, number in {"train": 16, "test": 6}.items():
        (root / split).mkdir(parents=True)
        for index in range(number):
            name = f"{split}{index}"
            rng = np.random.default_rng([index, number])
            pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
            boxes[name] = []
            for label in rng.choice(list(COLORS), int(rng.integers(1, 4))):
                left, top = rng.integers(0, SIDE - 20, 2).tolist()
                width, height = rng.integers(8, 20, 2).tolist()
                pixels[top : top + height, left : left + width] = COLORS[label]
                boxes[name].append((str(label), [left, top, left + width, top + height]))
            Image.fromarray(pixels).save(root / split / f"{name}.png")
            shapes = []
            for label, (left, top, right, bottom) in boxes[name]:
                shapes.append({"label": label, "points": [[right, bottom], [left, top]], "shape_type": "rectangle"})
            contents = {"shapes": shapes, "imagePath": f"{name}.png", "imageHeight": SIDE, "imageWidth": SIDE}
            (root / split / f"{name}.json").write_text(json.dumps(contents))
    return boxes


def test_image_of_sparse_layout_needs_no_file(tmp_path, plugin):
    write_labels(tmp_path / "labels")
    (tmp_path / "labels" / "train" / "train0.json").unlink()
    load_plugins([plugin])
    layout = LAYOUTS["labelme"](tmp_path / "labels")
    paths = layout.split_images["train"]["train/train0"]
    with pytest.raises(ValueError, match="train0.png"):
        layout.annotate("train/train0", paths)

    class SparseLabelMe(LAYOUTS["labelme"]):
        is_sparse = True

        @classmethod
        def read_objects(cls, annotation, image, size):
            return super().read_objects(annotation, image, size) if annotation.exists() else []

    layout = SparseLabelMe(tmp_path / "labels")
    (image,) = layout.annotate("train/train0", paths)
    assert image.regions == ()
    (image,) = layout.annotate("train/train1", layout.split_images["train"]["train/train1"])
    assert image.regions


@pytest.mark.slow
def test_five_commands_read_layout_of_plugin(tmp_path, plugin, monkeypatch, quick_probe):
    boxes = write_labels(tmp_path / "labels")
    root = str(tmp_path / "labels")
    assert recognize_layout(root) is None

    out = tmp_path / "instructions"
    words = ["labelme", root, "--plugins", plugin, "--kinds", "counting", "--output_dir", str(out)]
    assert make_instructions.main(words) == 0
    assert recognize_layout(root) == "labelme"
    found = read_labels(root, tmp_path / "splits")
    assert (found.task, found.layout, sum(map(len, found.images.values()))) == ("detection", "labelme", 22)
    rows = load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 16
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        label = next((label for label in COLORS if label in question), None)
        assert int(answer) == sum(found == label for found, _ in boxes[row["id"].rpartition("/")[2]])

    monkeypatch.setattr(pretraining, "MOST_QUESTIONS", 2)
    monkeypatch.setattr(pretraining, "SAMPLES", {"count": 3, "fine_map": 2})
    monkeypatch.setattr(pretraining, "MOST_NEW_TOKENS", 3)
    monkeypatch.setattr(labeled_views, "MOST_VIEWS", 6)
    words = ["--annotations", root, "--plugins", plugin, "--from_scratch", json.dumps(FROM_SCRATCH)]
    words += ["--annotation_options", '{"kinds": ["counting"]}', "--dataset_test_split", "", "--eval_strategy", "no"]
    assert pretrain.main([*words, *TRAINING.split(), "--output_dir", str(tmp_path / "pretrained")]) == 0

    words = ["--data_root", root, "--plugins", plugin, "--from_scratch", json.dumps(TINY)]
    words += ["--backbone", json.dumps(BACKBONE), "--image_size", "64", "--num_pictures", "0", *TRAINING.split()]
    words += ["--head", json.dumps(HEAD)]
    assert finetune_detection.main([*words, "--output_dir", str(tmp_path / "tuned")]) == 0
    metrics = json.loads((tmp_path / "tuned" / "metrics.json").read_text())
    assert metrics["train_images"] == 16
    assert sum(metrics["train_objects"].values()) == sum(len(boxes[f"train{index}"]) for index in range(16))

    backbone = export_backbone(tiny_backbone(initializer_range=0.2), tmp_path / "backbone", ViTPImageProcessor())
    words = ["--backbones", str(backbone), "--data_root", root, "--task", "detection", "--plugins", plugin]
    assert probe.main([*words, "--seeds", "0", "--output_dir", str(tmp_path / "probed")]) == 0
    assert json.loads((tmp_path / "probed" / "metrics.json").read_text())["classes"] == ["plane", "ship"]
