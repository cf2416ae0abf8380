"""From a folder of 60 real images in each format to a trained backbone, with one line of YAML."""

import json

import pytest
import torch
from datasets import Dataset
from paths import AERIAL_TREES
from row_formats import FORMATS
from tiny_models import FROM_SCRATCH

from modeling_vitp import ViTPVisionModel
from modeling_vitp.recipes import pretrain

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FORMATS if name != "LLaVA"]


@pytest.fixture(scope="module")
def scenes():
    """Aerial images of tree crowns."""
    return [row["image"] for row in Dataset.from_parquet(str(AERIAL_TREES / "test.parquet")).select(range(60))]


def train(folder, scenes, name, line):
    write, _ = FORMATS[name]
    write(folder / "data", scenes)
    (folder / "mine.yaml").write_text(line)
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "bf16": "false",
        "save_strategy": "no",
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    words += ["--from_scratch", json.dumps(FROM_SCRATCH), "--output_dir", str(folder / "run")]
    assert pretrain.main(["--config", str(folder / "mine.yaml"), *words]) == 0
    backbone = ViTPVisionModel.from_pretrained(folder / "run" / "backbone")
    assert all(torch.isfinite(weight).all() for weight in backbone.parameters())


@pytest.mark.parametrize("name", ["LLaVA", *SLOW])
def test_a_folder_in_any_format_is_trained_on(tmp_path, scenes, name, capsys):
    train(tmp_path, scenes, name, f"dataset_name: {tmp_path / 'data'}\n")
    assert f"reads: {FORMATS[name][1]}, 60 rows, 1 image a row\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_it_is_so_when_it_is_streamed_too(tmp_path, scenes, name, capsys):
    train(tmp_path, scenes, name, f"dataset_name: {tmp_path / 'data'}\ndataset_streaming: true\n")
    assert f"reads: {FORMATS[name][1]}, a stream, 1 image a row\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mixture_of_all_formats_is_trained_on(tmp_path, scenes, capsys):
    for name, (write, _) in FORMATS.items():
        write(tmp_path / name, scenes[:6])
    sources = ", ".join(f"{{name: {name}, folder: {name}}}" for name in FORMATS)
    train(tmp_path, scenes[:6], "LLaVA", f"mixture: {{root: {tmp_path}, sources: [{sources}]}}\n")
    output = capsys.readouterr().out
    for name, (_, told) in FORMATS.items():
        assert f"reads {name}: {told}, 6 rows, 1 image a row\n" in output
