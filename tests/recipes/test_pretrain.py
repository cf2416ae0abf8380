"""Recipe `pretrain`: files of a run, probes of the backbone, and data formats."""

import json
import logging

import dense_data
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from paths import AERIAL_TREES, CONFIGS
from pictures import picture, write_bands
from row_formats import FORMATS
from tiny_models import FROM_SCRATCH
from transformers import AutoImageProcessor, AutoModel

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor, ViTPVisionModel
from modeling_vitp.recipes import pretrain
from modeling_vitp.recipes.pretrain import main


def run(folder, **settings):
    """Run `pretrain.main` with a configuration file."""
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


def test_run_leaves_results_and_is_start_for_next(data_folder, tmp_path, caplog):
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
    assert "Resuming from" in caplog.text and "checkpoint-2" in caplog.text
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    losses = [logs["loss"] for logs in state["log_history"] if "loss" in logs]
    assert len(losses) == 3
    assert json.loads((output / "metrics.json").read_text())["train"]["train_loss"] == pytest.approx(sum(losses) / 3)

    settings = {"output_dir": str(tmp_path / "next"), "from_scratch": None, "model_name_or_path": str(output)}
    options = {"dataset_name": str(data_folder), "drop_path_rate": 0.2, "max_patches": 5}
    assert run(tmp_path, max_steps=1, **options, **settings) == 0
    model = ViTPForConditionalGeneration.from_pretrained(tmp_path / "next")
    assert model.config.vision_config.drop_path_rate == 0.2
    assert ViTPProcessor.from_pretrained(tmp_path / "next").image_processor.max_patches == 5
    settings["model_name_or_path"] = str(output / "checkpoint-1")
    with pytest.raises(ValueError, match="weights that it starts from was '.*' and is "):
        run(tmp_path, max_steps=3, **options, **settings)


@pytest.mark.slow
def test_run_on_mixture_counts_skipped_rows(data_folder, tmp_path, caplog):
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
    assert f"by source: {json.dumps(metrics['skipped_rows'])}" in caplog.text
    assert json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())["epoch"] == 1.0
    with pytest.raises(ValueError, match="'text/"):
        run(tmp_path, mixture=mixture, output_dir=str(tmp_path / "stops"), num_train_epochs=1, max_steps=-1)


@pytest.mark.slow
def test_radar_rows_train_model_of_two_bands(tmp_path):
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

    with pytest.raises(ValueError, match="use_peft.*vitp convert"):
        run(tmp_path, **settings, output_dir=str(tmp_path / "lora"), use_peft=True)

    # A run can start from a model with the same bands, but not from a model with other bands.
    start = {"output_dir": str(tmp_path / "next"), "from_scratch": None, "model_name_or_path": str(output)}
    assert run(tmp_path, **settings | {"input_spec": None}, **start, max_steps=1) == 0
    with pytest.raises(ValueError, match="VV, VH.*HH"):
        run(
            tmp_path, **settings | {"input_spec": {"band_names": ["HH"]}}, **start | {"output_dir": str(tmp_path / "x")}
        )
    write_bands(path, array[[0, 1, 1]])
    with pytest.raises(ValueError, match="VV, VH.*3"):
        run(tmp_path, **settings, **start | {"output_dir": str(tmp_path / "y")})


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
    probe_data = {"config": "loveda", "root": str(tmp_path / "masks"), "test_split": "val"}
    options |= {"probe_data": json.dumps(probe_data), "max_steps": 2, "learning_rate": 1e-2}
    options |= {"per_device_train_batch_size": 2, "report_to": "none", "gradient_checkpointing": False, "bf16": False}
    options["watch_samples"] = 0
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.mark.slow
def test_probe_compares_backbone_with_start(arguments, tmp_path, capsys, quick_probe):
    assert main(arguments) == 0
    out = tmp_path / "out"
    measured = json.loads((out / "metrics.json").read_text())["probe"]
    assert set(measured["scores"]) == {"backbone", "at the start", "random weights", "pixels of a patch"}
    assert "| at the start |" in capsys.readouterr().out
    assert (out / "probe" / "val.png").is_file()
    trained, start = (AutoModel.from_pretrained(out / name).state_dict() for name in ("backbone", "backbone_at_start"))
    assert trained.keys() == start.keys()
    assert not torch.equal(trained["encoder.layer.0.mlp.fc1.weight"], start["encoder.layer.0.mlp.fc1.weight"])


@pytest.mark.slow
def test_resumed_run_keeps_its_start(arguments, tmp_path, quick_probe):
    arguments += ["--save_steps", "2", "--lr_scheduler_type", "constant"]
    main(arguments)
    began = (tmp_path / "out/backbone_at_start/model.safetensors").read_bytes()
    main([*arguments, "--max_steps", "4"])
    assert (tmp_path / "out/backbone_at_start/model.safetensors").read_bytes() == began


def test_backbone_is_exported_between_start_and_trained_vit(data_folder, tmp_path):
    settings = {"dataset_name": str(data_folder), "seed": 7, "max_steps": 1, "watch_samples": 0}
    assert run(tmp_path, **settings, interpolation_alpha=0.25) == 0
    output = tmp_path / "run"
    model = ViTPForConditionalGeneration.from_pretrained(output)
    trained = model.model.vision_tower.state_dict()
    start = AutoModel.from_pretrained(output / "backbone_at_start").state_dict()
    backbone = AutoModel.from_pretrained(output / "backbone").state_dict()
    for name, weight in backbone.items():
        torch.testing.assert_close(weight, torch.lerp(start[name], trained[name], 0.25))
    assert any(not torch.equal(start[name], trained[name]) for name in start)


@pytest.fixture(scope="module")
def scenes():
    """Return aerial images of tree crowns."""
    return [row["image"] for row in Dataset.from_parquet(str(AERIAL_TREES / "test.parquet")).select(range(12))]


def train(folder, scenes, name, line):
    write, _ = FORMATS[name]
    write(folder / "data", scenes)
    (folder / "mine.yaml").write_text(line)
    words = "--max_steps 2 --per_device_train_batch_size 2 --report_to none --bf16 false --save_strategy no".split()
    words += ["--from_scratch", json.dumps(FROM_SCRATCH), "--output_dir", str(folder / "run")]
    assert pretrain.main(["--config", str(folder / "mine.yaml"), *words]) == 0
    backbone = ViTPVisionModel.from_pretrained(folder / "run" / "backbone")
    assert all(torch.isfinite(weight).all() for weight in backbone.parameters())


@pytest.mark.slow
def test_folder_in_format_is_trained_on(tmp_path, scenes, capsys):
    train(tmp_path, scenes, "LLaVA", f"dataset_name: {tmp_path / 'data'}\n")
    assert f"{FORMATS['LLaVA'][1]}, {len(scenes)} rows" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["messages in JSON Lines", "WebDataset"])
def test_stream_in_format_is_trained_on(tmp_path, scenes, name, capsys):
    train(tmp_path, scenes, name, f"dataset_name: {tmp_path / 'data'}\ndataset_streaming: true\n")
    assert f"{FORMATS[name][1]}, a stream" in capsys.readouterr().out


@pytest.mark.slow
def test_mixture_of_all_formats_is_trained_on(tmp_path, scenes, capsys):
    for name, (write, _) in FORMATS.items():
        write(tmp_path / name, scenes[:6])
    sources = ", ".join(f"{{name: {name}, folder: {name}}}" for name in FORMATS)
    train(tmp_path, scenes[:6], "LLaVA", f"mixture: {{root: {tmp_path}, sources: [{sources}]}}\n")
    output = capsys.readouterr().out
    for name, (_, description) in FORMATS.items():
        assert f"{name}: {description}, 6 rows" in output


@pytest.mark.slow
def test_quickstart_trains_on_other_data_without_its_requirements(tmp_path, capsys):
    folder = tmp_path / "captions"
    folder.mkdir()
    for number in range(4):
        picture(60, 50, number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"Field number {number} beside a road.")
    options = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"]
    options += ["--dataloader_persistent_workers", "false", "--output_dir", str(tmp_path / "out")]
    assert main(["--config", str(CONFIGS / "quickstart.yaml"), "--dataset_name", str(folder), *options]) == 0
    shown = capsys.readouterr().out
    assert "reads: captions, 4 rows, 1 image a row" in shown
    assert (tmp_path / "out/backbone/model.safetensors").is_file()
    assert json.loads((tmp_path / "out/metrics.json").read_text())["requirements"] == []
