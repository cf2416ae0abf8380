"""Allowed values of arguments."""

import math
import os
import sys
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from modeling_vitp import ViTPTrainingConfig
from modeling_vitp.classification.trainer import ViTPClassificationTrainingConfig
from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.command.settings import check_type
from modeling_vitp.dense.arguments import DenseArguments
from modeling_vitp.dense.trainer import ViTPSegmentationTrainingConfig
from modeling_vitp.detection.arguments import DetectionArguments
from modeling_vitp.detection.trainer import ViTPDetectionTrainingConfig
from modeling_vitp.probing.arguments import ProbeArguments
from modeling_vitp.recipes import embed, make_instructions, predict_large, validate_data
from modeling_vitp.training.arguments import Arguments, BackboneArguments, PretrainArguments, check_within
from modeling_vitp.training.vitp_config import default_device

ENDS = {"[": lambda x, a: x >= a, "(": lambda x, a: x > a, "]": lambda x, a: x <= a, ")": lambda x, a: x < a}


@given(
    st.floats(allow_nan=True),
    st.sampled_from("[("),
    st.sampled_from([0, 1, 0.5, -1]),
    st.sampled_from([1, 2.5, math.inf]),
    st.sampled_from("])"),
)
def test_interval_ends_are_inclusive_or_exclusive(number, opening, low, high, closing):
    inside = not math.isnan(number) and ENDS[opening](number, low) and ENDS[closing](number, high)
    interval = f"{opening}{low}, {high}{closing}"
    if inside:
        check_within("x", number, interval)
        check_within("x", [low, number][-1:], interval)
    else:
        with pytest.raises(ValueError, match=r"x in [\[(]"):
            check_within("x", [number], interval)


@dataclass
class Base(Arguments):
    limits = {"share": "[0, 1]"}
    share: float = 0.5


@dataclass
class Mixed(Base):
    limits = {"sizes": "[1, inf)"}
    choices = {"kind": ("a", "b")}
    sizes: list[int] = field(default_factory=list)
    kind: str | None = None
    more: dict | str | None = None


def test_limits_and_choices_are_inherited():
    assert Mixed(more='{"a": 1}').more == {"a": 1} and Mixed(kind=None, sizes=[1, 2]).share == 0.5
    for settings in ({"share": 2}, {"sizes": [1, 0]}, {"kind": "c"}, {"more": "c"}, {"share": math.nan}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Mixed(**settings)


def test_whole_float_is_an_integer(tmp_path):
    args = ViTPTrainingConfig(str(tmp_path / "out"), max_steps=20.0, bf16=False)
    assert args.max_steps == 20 and isinstance(args.max_steps, int)
    with pytest.raises(ValueError, match="max_steps.*2.5"):
        ViTPTrainingConfig(str(tmp_path / "out"), max_steps=2.5, bf16=False)


def test_unquoted_yaml_names_are_refused():
    for value in ([True, False], [1, 1], {"name": False}):
        with pytest.raises(ValueError, match="classes.*put names in quotes"):
            check_type("classes", value, list[str])
    with pytest.raises(ValueError, match=r"size.* an integer,"):
        check_type("size", [64, 64], int)


def test_mapping_of_transformers_may_be_a_file(tmp_path):
    (tmp_path / "accelerator.json").write_text('{"even_batches": false}')
    args = ViTPTrainingConfig(str(tmp_path / "out"), accelerator_config=str(tmp_path / "accelerator.json"))
    assert args.accelerator_config.even_batches is False and args.accelerator_config.dispatch_batches is False


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
        ("bf16", {"bf16": True}, "bf16"),
        ("bf16", {"fp16": True}, "fp16"),
        ("fp16", {}, "fp16"),
        ("fp16", {"bf16": False}, "no"),
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


DATA = {"dataset_name": "org/data"}
PROBE = {"backbones": ["b"], **DATA}
MEANINGLESS = [
    (PretrainArguments, DATA, {"unfreeze_vision_layers": -1}),
    (PretrainArguments, DATA, {"drop_path_rate": 1.0}),
    (PretrainArguments, DATA, {"max_patches": 0}),
    (ViTPTrainingConfig, {}, {"vrl_drop_ratio": 1.0}),
    (ViTPTrainingConfig, {}, {"vrl_apply_prob": 1.5}),
    (ViTPTrainingConfig, {}, {"max_length": 0}),
    (ViTPTrainingConfig, {}, {"on_error": "hope"}),
    (ViTPTrainingConfig, {}, {"learning_rate": math.inf}),
    (ViTPTrainingConfig, {}, {"learning_rate": None}),
    (ViTPTrainingConfig, {}, {"max_steps": [1]}),
    (ViTPTrainingConfig, {}, {"max_steps": "many"}),
    (ViTPTrainingConfig, {}, {"eval_strategy": False}),
    (PretrainArguments, DATA, {"dataset_name": 3}),
    (ViTPTrainingConfig, {}, {"learning_rate": -1e-3}),
    (ViTPTrainingConfig, {}, {"weight_decay": -0.1}),
    (ViTPTrainingConfig, {}, {"adam_beta2": 1.0}),
    (ViTPTrainingConfig, {}, {"per_device_train_batch_size": 0}),
    (ViTPTrainingConfig, {}, {"gradient_accumulation_steps": 0}),
    (ViTPTrainingConfig, {}, {"num_train_epochs": 0}),
    (ViTPTrainingConfig, {}, {"dataloader_num_workers": -1}),
    (ViTPDetectionTrainingConfig, {}, {"image_size": -32}),
    (ViTPDetectionTrainingConfig, {}, {"rotation": 1.5}),
    (ViTPDetectionTrainingConfig, {}, {"lr_milestones": [0.0]}),
    (ViTPDetectionTrainingConfig, {}, {"lr_gamma": 0.0}),
    (ViTPDetectionTrainingConfig, {}, {"warmup_start": -0.5}),
    (DetectionArguments, {"data": {}}, {"empty_share": 2.0}),
    (DetectionArguments, {"data": {}}, {"num_pictures": -1}),
    (DetectionArguments, {"data": {}}, {"task": "vertical"}),
    (DetectionArguments, {"data": {}}, {"metric": "accuracy"}),
    (ViTPSegmentationTrainingConfig, {}, {"layer_decay": 0.0}),
    (ViTPSegmentationTrainingConfig, {}, {"crop_size": -64}),
    (ViTPSegmentationTrainingConfig, {}, {"scale_range": [2.0, 0.5]}),
    (ViTPSegmentationTrainingConfig, {}, {"scale_range": [0.0, 0.5]}),
    (ViTPSegmentationTrainingConfig, {}, {"max_class_share": 0.0}),
    (ViTPSegmentationTrainingConfig, {}, {"horizontal_flip": 2.0}),
    (ViTPSegmentationTrainingConfig, {}, {"exchange_time": -0.5}),
    (ViTPSegmentationTrainingConfig, {}, {"rotation_angle": 200.0}),
    (ViTPSegmentationTrainingConfig, {}, {"reflection": 1.5}),
    (ViTPSegmentationTrainingConfig, {}, {"color_jitter": [0.1, 0.2, 0.2]}),
    (ViTPSegmentationTrainingConfig, {}, {"color_jitter": [0.1, 0.2, 0.2, 0.6]}),
    (ViTPSegmentationTrainingConfig, {}, {"window": 0}),
    (ViTPSegmentationTrainingConfig, {}, {"stride": -1}),
    (ViTPSegmentationTrainingConfig, {}, {"test_scales": []}),
    (BackboneArguments, {}, {"neck": "giraffe"}),
    (BackboneArguments, {}, {"drop_path_rate": -0.1}),
    (ViTPClassificationTrainingConfig, {}, {"label_smoothing_factor": 2.0}),
    (DenseArguments, {"data": {}}, {"metric": "vibes"}),
    (DenseArguments, {"data": {}}, {"metric": 3}),
    (DenseArguments, {"data": {}}, {"submission": {"split": "test", "file": 3}}),
    (DenseArguments, {"data": {}}, {"num_pictures": -1}),
    (DenseArguments, {"data": {}}, {"class_weights": ["1", "-2"]}),
    (DenseArguments, {"data": {}}, {"class_weights": ["heavy"]}),
    (ProbeArguments, PROBE, {"shots": [0]}),
    (ProbeArguments, PROBE, {"shares": [1.5]}),
    (ProbeArguments, PROBE, {"test_share": 1.0}),
    (ProbeArguments, PROBE, {"temperature": 0.0}),
    (ProbeArguments, PROBE, {"num_neighbours": 0}),
    (ProbeArguments, PROBE, {"dtype": "int4"}),
    (ProbeArguments, PROBE, {"pooling": "max"}),
    (ViTPTrainingConfig, {}, {"auto_find_batch_size": True}),
    (ViTPTrainingConfig, {}, {"enable_jit_checkpoint": True}),
    (ViTPSegmentationTrainingConfig, {}, {"restore_callback_states_from_checkpoint": True}),
]


@pytest.mark.parametrize(("arguments", "others", "settings"), MEANINGLESS, ids=lambda value: str(value)[-40:])
def test_bad_value_is_refused(arguments, others, settings, tmp_path):
    more = {"output_dir": str(tmp_path)} if issubclass(arguments, TrainingArguments) else {}
    arguments(**others, **more)
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        arguments(**{**others, **more, **settings})


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (predict_large, "model scene.tif --output o --window 0"),
        (predict_large, "model scene.tif --output o --stride -5"),
        (predict_large, "model scene.tif --output o --scales 1 0"),
        (predict_large, "model scene.tif --output o --dtype int4"),
        (embed, "model scene.tif --output o --window 0"),
        (embed, "model scene.tif --output o --pooling max"),
        (embed, "model scene.tif --output o --dtype bfloat16"),
        (validate_data, "mixture.yaml --max_length 0"),
        (validate_data, "mixture.yaml --vrl_drop_ratio 1"),
        (validate_data, "mixture.yaml --num_workers -1"),
        (validate_data, "mixture.yaml --answer_prior --answer_prior_seconds 0"),
        (make_instructions, "voc ROOT --output_dir o --turns 0"),
        (make_instructions, "voc ROOT --output_dir o --map_side 0"),
        (make_instructions, "voc ROOT --output_dir o --collages -1"),
        (make_instructions, "voc ROOT --output_dir o --collages 1 --collage_grid 7 1"),
        (make_instructions, "voc ROOT --output_dir o --collages 1 --collage_size 0"),
        (make_instructions, "voc ROOT --output_dir o --window 8 --overlap 8"),
        (make_instructions, "voc ROOT --output_dir o --overlap -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.split(".")[-1],
)
def test_bad_command_line_value_is_refused(recipe, words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vitp"])
    (tmp_path / "ROOT").mkdir()
    monkeypatch.chdir(tmp_path)
    option = [word for word in words.split() if word.startswith("--")][-1]
    with pytest.raises(WrongArguments, match=option):
        recipe.main(words.split())
