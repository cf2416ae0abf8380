"""Rules of arguments beside their declarations, and devices and precisions of training."""

import os

import pytest
import torch
from transformers import TrainingArguments

from modeling_vitp import ViTPTrainingConfig
from modeling_vitp.tasks.classification.trainer import ViTPClassificationTrainingConfig
from modeling_vitp.tasks.detection.arguments import DetectionArguments
from modeling_vitp.tasks.detection.trainer import ViTPDetectionTrainingConfig
from modeling_vitp.tasks.segmentation.arguments import DenseArguments
from modeling_vitp.tasks.segmentation.trainer import ViTPSegmentationTrainingConfig
from modeling_vitp.training.config import default_device


def test_one_process_uses_one_gpu(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    args = ViTPTrainingConfig(str(tmp_path), bf16=False, per_device_train_batch_size=3, global_batch_size=6)
    assert (args.n_gpu, args.train_batch_size, args.gradient_accumulation_steps) == (1, 3, 2)
    assert "4 GPUs are visible" in caplog.text


def test_device_without_a_gpu_is_the_cpu(monkeypatch):
    # as of a CUDA build
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert default_device() == torch.device("cuda")


@pytest.mark.parametrize(
    ("launcher", "options", "wanted"),
    [
        ("bf16", {"bf16": False}, "no"),  # bf16 as in recipes/accelerate/ddp.yaml
        ("bf16", {"fp16": True}, "fp16"),
        ("fp16", {}, "fp16"),
    ],
)
def test_precision_is_that_of_the_options(tmp_path, monkeypatch, launcher, options, wanted):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    args = ViTPTrainingConfig(str(tmp_path / "out"), **options)
    assert args.mixed_precision == wanted and (args.bf16, args.fp16) == (wanted == "bf16", wanted == "fp16")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == ("no" if wanted == "no" else launcher)  # DeepSpeed reads it


@pytest.mark.parametrize("pins", [True, False])
def test_pinned_batches_are_copied_without_blocking(tmp_path, monkeypatch, pins):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)  # nothing is pinned on a CPU
    args = ViTPTrainingConfig(str(tmp_path / "out"), dataloader_pin_memory=pins, bf16=False)
    assert args.accelerator_config.non_blocking is pins


RULES = [  # what the declarations of `tests/command/test_settings.py` do not say
    (ViTPDetectionTrainingConfig, {}, {"image_size": 40}),
    (ViTPDetectionTrainingConfig, {}, {"lr_milestones": [2.0, 1.0]}),
    (DetectionArguments, {"data": {}}, {"metric": "accuracy"}),
    (ViTPSegmentationTrainingConfig, {}, {"scale_range": [2.0, 0.5]}),
    (ViTPSegmentationTrainingConfig, {}, {"photometric_strengths": [0.1, 0.2, 0.2]}),
    (ViTPSegmentationTrainingConfig, {}, {"restore_callback_states_from_checkpoint": True}),
    (ViTPClassificationTrainingConfig, {}, {"crop_area": [1.0, 0.5]}),
    (DenseArguments, {"data": {}}, {"metric": "vibes"}),
    (DenseArguments, {"data": {}}, {"class_weights": ["1", "-2"]}),
]


@pytest.mark.parametrize(("arguments", "others", "settings"), RULES, ids=lambda value: str(value)[-40:])
def test_value_against_a_rule_is_refused(arguments, others, settings, tmp_path):
    more = {"output_dir": str(tmp_path)} if issubclass(arguments, TrainingArguments) else {}
    arguments(**others, **more)
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        arguments(**{**others, **more, **settings})


def test_training_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        ViTPTrainingConfig(str(tmp_path), max_steps=0)
