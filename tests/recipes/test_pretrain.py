import json
import logging

import numpy as np
import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value
from paths import AERIAL_TREES
from pictures import write_bands
from tiny_models import FROM_SCRATCH, TEXT, VISION
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor
from modeling_vitp.recipes import pretrain


def run(folder, **settings):
    """`pretrain.main` on a configuration file, as a user would call it."""
    config = {
        "output_dir": str(folder / "run"),
        "from_scratch": FROM_SCRATCH,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "bf16": False,
        "watch_samples": 0,
        **settings,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return pretrain.main(["--config", str(file)])


def test_a_run_leaves_model_backbone_metrics_and_curves_and_is_a_start_for_the_next(data_folder, tmp_path, caplog):
    settings = {"dataset_name": str(data_folder), "save_steps": 1, "seed": 7, "input_spec": {"gamma": 0.5}}
    assert run(tmp_path, **settings) == 0
    output = tmp_path / "run"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["seed"] == 7
    assert {"train_loss", "train_runtime"} <= set(metrics["train"])
    assert metrics["eval"]["eval_loss"] > 0
    assert (output / "loss.png").stat().st_size > 1000
    assert (output / "backbone" / "model.safetensors").exists()
    assert ViTPProcessor.from_pretrained(output).image_processor.input_spec == {"gamma": 0.5}
    assert json.loads((output / "backbone" / "preprocessor_config.json").read_text())["input_spec"] == {"gamma": 0.5}

    with caplog.at_level(logging.INFO, logger="pretrain"):
        assert run(tmp_path, **settings, max_steps=3) == 0
    assert "Going on from" in caplog.text and "checkpoint-2" in caplog.text
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    losses = [logs["loss"] for logs in state["log_history"] if "loss" in logs]
    assert len(losses) == 3
    assert json.loads((output / "metrics.json").read_text())["train"]["train_loss"] == pytest.approx(sum(losses) / 3)

    settings = {"output_dir": str(tmp_path / "next"), "from_scratch": None, "model_name_or_path": str(output)}
    assert run(tmp_path, dataset_name=str(data_folder), drop_path_rate=0.2, max_patches=5, **settings) == 0
    model = ViTPForConditionalGeneration.from_pretrained(tmp_path / "next")
    assert model.config.vision_config.drop_path_rate == 0.2
    assert ViTPProcessor.from_pretrained(tmp_path / "next").image_processor.max_patches == 5
    settings |= {"model_name_or_path": str(output / "checkpoint-1"), "drop_path_rate": 0.2, "max_patches": 5}
    with pytest.raises(ValueError, match="weights that it starts from was '.*' and is "):
        run(tmp_path, dataset_name=str(data_folder), max_steps=3, **settings)


def test_a_run_on_a_mixture_counts_what_it_skips(data_folder, tmp_path, caplog):
    lines = (tmp_path / "text.jsonl", '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt"\n' * 3)
    lines[0].write_text(lines[1])
    mixture = {
        "root": str(tmp_path),
        "sources": [
            {"name": "trees", "folder": "data", "rate": 2, "system_prompt": "Count.", "max_patches": 1},
            {"name": "text", "annotation": "text.jsonl"},
        ],
    }
    assert (
        run(tmp_path, mixture=mixture, on_error="skip", num_train_epochs=1, max_steps=-1, dataloader_num_workers=1) == 0
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["skipped_rows"]["text"] >= 3 and set(metrics["skipped_rows"]) == {"text"}
    assert (
        f"Rows skipped since this run began or went on, by source: {json.dumps(metrics['skipped_rows'])}" in caplog.text
    )
    assert json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())["epoch"] == 1.0
    with pytest.raises(ValueError, match="Sample 'text/"):
        run(tmp_path, mixture=mixture, output_dir=str(tmp_path / "stops"), num_train_epochs=1, max_steps=-1)


@pytest.mark.slow
def test_a_run_that_misses_the_gate_says_so_and_fails(tmp_path, capsys):
    assert run(tmp_path, dataset_name=str(AERIAL_TREES), task="trees", max_steps=1) == 1
    task = json.loads((tmp_path / "run" / "metrics.json").read_text())["task"]
    assert task["passed"] is False
    assert set(task["gate"]["error_ratios"]) == {"to_constant_median", "to_swapped_images"}
    assert {"correlation", "mean_error_swapped_images"} <= set(task["second_scene"]["count"])
    assert set(task["gate"]["least_gains"]) == {"linear", "nonlinear", "grounding"}
    assert {"mean_iou", "mean_iou_blind_constant"} <= set(task["test"]["grounding"])
    assert set(task["test"]["grounding_by_map"]) == set(task["test"]["grounding"])
    assert (tmp_path / "run" / "predictions.png").stat().st_size > 10_000
    output = capsys.readouterr()
    assert "NOT passed" in output.err
    assert 'AutoModel.from_pretrained("' in output.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_name": None}, "either dataset_name or mixture"),
        ({"dataset_name": None, "mixture": {"sources": []}, "task": "trees"}, "with a mixture there is none"),
        ({"from_scratch": None}, "either model_name_or_path or from_scratch"),
        ({"model_name_or_path": "somewhere"}, "either model_name_or_path or from_scratch"),
        ({"from_scratch": {"vision_config": VISION, "text_config": TEXT}}, "there is no vocab_size, and"),
        ({"from_scratch": {**FROM_SCRATCH, "vocab": 3}}, "there is no 'vocab'; did you mean 'vocab_size'"),
        ({"vrl_drop_rate": 0.5}, "vrl_drop_rate"),
        ({"vrl_drop_ratio": 1.0}, r"vrl_drop_ratio=1.0 is not in \[0, 1\)"),
        ({"dataset_train_split": "training"}, "no split 'training', only"),
    ],
)
def test_mistakes_in_the_configuration_are_named(data_folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"dataset_name": str(data_folder), **settings})


@pytest.mark.slow
def test_rows_of_radar_images_train_a_model_of_two_bands_and_its_backbone(tmp_path):
    names, rows = ["VV", "VH"], []
    rng = np.random.default_rng(0)
    for index in range(4):
        array = rng.normal(-12, 5, (2, 56, 60)).astype(np.float32)
        path = write_bands(tmp_path / "images" / f"{index}.tif", array)
        said = [{"role": "user", "content": "Is there water?"}, {"role": "assistant", "content": "yes, 3 lakes"}]
        rows.append({"images": [{"bytes": None, "path": str(path)}], "messages": said})
    feature = List({"role": Value("string"), "content": Value("string")})
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        features = Features({"images": List(Image(decode=False)), "messages": feature})
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    spec = {"band_names": names, "window": [-25, 0]}
    settings = {"dataset_name": str(tmp_path / "data"), "input_spec": spec, "watch_samples": 2, "save_steps": 2}
    assert run(tmp_path, **settings) == 0
    output = tmp_path / "run"
    assert (output / "watch" / "step-000000.png").is_file()
    model, processor = ViTPForConditionalGeneration.from_pretrained(output), ViTPProcessor.from_pretrained(output)
    assert model.config.vision_config.band_names == processor.image_processor.band_names == names
    backbone = AutoModel.from_pretrained(output / "backbone")
    inputs = AutoImageProcessor.from_pretrained(output / "backbone")(array, return_tensors="pt")
    mean, std = np.mean([0.485, 0.456, 0.406]), np.mean([0.229, 0.224, 0.225])
    assert inputs.pixel_values.shape == (1, 2, 56, 56) and backbone.config.band_names == names
    expected = ((array.mean() + 25) / 25 - mean) / std
    assert inputs.pixel_values.mean().item() == pytest.approx(expected, abs=0.1)
    assert backbone(**inputs).last_hidden_state.isfinite().all()

    with pytest.raises(ValueError, match="use_peft: .* vitp convert MODEL FOLDER --to vitp --input_spec"):
        run(tmp_path, **settings, output_dir=str(tmp_path / "lora"), use_peft=True)

    # A model of these bands is a start, and one of others is not.
    start = {"output_dir": str(tmp_path / "next"), "from_scratch": None, "model_name_or_path": str(output)}
    assert run(tmp_path, **settings | {"input_spec": None}, **start, max_steps=1) == 0
    with pytest.raises(ValueError, match=r"takes 2 bands \(VV, VH\), but the input spec has 1 band \(HH\)"):
        run(
            tmp_path, **settings | {"input_spec": {"band_names": ["HH"]}}, **start | {"output_dir": str(tmp_path / "x")}
        )
    write_bands(path, array[[0, 1, 1]])
    with pytest.raises(ValueError, match=r"the model takes 2 bands \(VV, VH\), but the image has 3"):
        run(tmp_path, **settings, **start | {"output_dir": str(tmp_path / "y")})
