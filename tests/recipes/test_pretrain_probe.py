"""A pretraining of any data ends with what is read from its backbone on masks of the user's."""

import json

import dense_data
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoModel

from modeling_vitp.recipes.pretrain import main

VISION = {**dense_data.TINY, "image_size": [64, 64], "initializer_range": 0.2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def arguments(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(4)]
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "noise"}]
    features = Features({"image": Image(), "messages": List({"role": Value("string"), "content": Value("string")})})
    (tmp_path / "rows").mkdir()
    rows = Dataset.from_dict({"image": pictures, "messages": [turns] * 4}, features=features)
    rows.to_parquet(tmp_path / "rows" / "train.parquet")
    dense_data.make_loveda(tmp_path / "masks", size=64)
    scratch = {"vocab_size": 300, "vision_config": VISION, "text_config": {**TEXT, "intermediate_size": 32}}
    options = {"dataset_name": tmp_path / "rows", "from_scratch": json.dumps(scratch), "output_dir": tmp_path / "out"}
    options |= {"probe_data": "loveda", "probe_root": tmp_path / "masks", "max_steps": 2, "learning_rate": 1e-2}
    options |= {"per_device_train_batch_size": 2, "report_to": "none", "gradient_checkpointing": False, "bf16": False}
    options["watch_samples"] = 0
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def test_the_backbone_is_held_against_its_start(arguments, tmp_path, capsys):
    assert main([*arguments, "--probe_splits", "train", "val"]) == 0
    out = tmp_path / "out"
    measured = json.loads((out / "metrics.json").read_text())["probe"]
    assert set(measured["scores"]) == {"backbone", "at the start", "random weights", "pixels of a patch"}
    assert "| at the start |" in capsys.readouterr().out
    assert (out / "probe" / "val.png").is_file()
    trained, start = (AutoModel.from_pretrained(out / name).state_dict() for name in ("backbone", "backbone_at_start"))
    assert trained.keys() == start.keys()
    assert not torch.equal(trained["encoder.layer.0.mlp.fc1.weight"], start["encoder.layer.0.mlp.fc1.weight"])


def test_a_frozen_vit_has_gained_nothing(arguments, tmp_path):
    main([*arguments, "--probe_splits", "train", "val", "--freeze_vision", "true"])
    gains = json.loads((tmp_path / "out" / "metrics.json").read_text())["probe"]["gains"]
    assert gains["linear"]["at the start"] == gains["nonlinear"]["at the start"] == 0


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_start_that_it_began_with(arguments, tmp_path):
    arguments += ["--probe_splits", "train", "val", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    main(arguments)
    began = (tmp_path / "out/backbone_at_start/model.safetensors").read_bytes()
    main([*arguments, "--max_steps", "4"])
    assert (tmp_path / "out/backbone_at_start/model.safetensors").read_bytes() == began


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--probe_data", "lovda"], "no configuration 'lovda'.*loveda"),
        (["--probe_splits", "train"], "give two, to learn from and to be scored on"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(arguments, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*arguments, *options])
    assert not (tmp_path / "out").exists()
