"""Commands on 16-bit TIFFs of a small range, as of Sentinel-2: they warn, and use the range with the proposed spec."""

import importlib
import json
import re

import numpy as np
import pytest
from other_backbones import save_backbone
from pictures import write_bands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("field", "forest"):
            (folder / "images" / split / label).mkdir(parents=True)
            for number in range(3):
                pixels = generator.integers(200, 3000, (3, 64, 64)).astype(np.uint16)
                write_bands(folder / "images" / split / label / f"{number}.tif", pixels)
    rows = [f"{label}/{number}.tif,What is it?,A {label}." for label in ("field", "forest") for number in range(3)]
    (folder / "images" / "train" / "rows.csv").write_text("\n".join(["image,question,answer", *rows]))
    save_backbone(folder / "vit", "vitp")
    return folder


def run(folder, name, spec, output):
    images, vit = folder / "images", str(folder / "vit")
    options = [] if spec is None else ["--input_spec", json.dumps(spec)]
    if name == "validate_data":
        words = [str(images / "train"), "--num_workers", "0", "--output_dir", str(output), *options]
    elif name == "embed":
        words = [vit, str(images), "--output", f"{output}.parquet", "--device", "cpu", *options]
    elif name == "probe":
        words = ["--backbones", vit, "--dataset_name", str(images), "--output_dir", str(output), "--image_size", "64"]
        words += ["--device", "cpu", *options]
    else:
        splits = {split: {"image": f"{split}/{{class}}/{{name}}.tif"} for split in ("train", "test")}
        data = {"root": str(images), "splits": splits, "input_spec": spec}
        words = ["--model_name_or_path", vit, "--data", json.dumps(data), "--train_splits", "train", "--max_steps", "1"]
        words += ["--eval_strategy", "no", "--output_dir", str(output), "--use_cpu", "true", "--image_size", "64"]
    importlib.import_module(f"modeling_vitp.recipes.{name}").main(words)


@pytest.mark.parametrize("name", ["validate_data", "embed", "probe", "finetune_classification"])
def test_command_warns_and_its_proposal_uses_the_range(folder, tmp_path, capsys, name):
    run(folder, name, None, tmp_path / "dark")
    text = capsys.readouterr().out
    assert "uint16, 3 band(s)" in text and "WARNING" in text
    spec = json.loads(re.search(r"input_spec to (.*)\.$", text, re.MULTILINE)[1])
    assert spec["window"] == pytest.approx([228, 2972], abs=30)
    run(folder, name, spec, tmp_path / "bright")
    text = capsys.readouterr().out
    assert "uint16, 3 band(s)" in text and "WARNING" not in text
