import json
import shlex
import socket

import numpy as np
import pytest
from datasets import Dataset
from paths import CONFIGS
from pictures import picture, write_bands
from row_formats import FORMATS, answer, question

from modeling_vitp import ViTPImageProcessor
from modeling_vitp.instructions.dry_run import check_rules, summarize_sources
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.instructions.sources import Source
from modeling_vitp.pretraining import plan
from modeling_vitp.recipes import pretrain

# Published effective rows and shares in %: tables 2 and 8 of the paper, and the released meta files.
PUBLISHED = {
    "remote_sensing_paper": (13, None, {"dior_rsvg": 216_000, "vrsbench": 190_000, "levir_cc": 25_000}),
    "medical_paper": (10, None, {"gmai_mmbench": 100_000, "huatuo_vqa": 323_500, "quilt_1m": 72_300}),
    "remote_sensing_released": (36, 1.09e6, {"dior_rsvg_train": 19.94, "cls_rgb_Million-AID_CoT": 4.23}),
    "medical_released": (20, 1.05e6, {"gmai_mmbench_val": 8.68, "quilt_vqa": 1.22}),
    "general_released": (8, 1.02e6, {"dvqa_train_200k": 19.54, "ai2d_train_12k": 1.21}),
}


@pytest.fixture(autouse=True)
def no_plan(monkeypatch):
    """Skip the cost plan, which takes seconds and has its own tests."""
    monkeypatch.setattr(plan, "print_plan", lambda *args: None)


def dry_run(capsys, *arguments):
    assert pretrain.main([*arguments, "--dry_run"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_mixtures_dry_run_without_data(name, capsys, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the dry run asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    output = dry_run(capsys, "--config", str(CONFIGS / f"{name}.yaml"))
    num_sources, total, expected = PUBLISHED[name]
    assert f"Missing: {num_sources} of {num_sources} sources" in output
    assert output.count("obtain it from https://") == num_sources
    lines = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    for source, number in expected.items():
        assert f" {number:,} " in lines[source] if total is None else f" {number} " in lines[source]
    if total is not None:
        assert int(lines["all"].split()[1].replace(",", "")) == pytest.approx(total, rel=0.005)
    rules = [line for line in output.splitlines() if line.startswith(("  ok", "  WARNING"))]
    assert len(rules) == 4
    warned = [line.split()[1] for line in rules if "WARNING" in line]
    assert ("grounding:" in warned) == (name == "general_released") and "general" not in warned
    assert not warned or not name.endswith("paper")
    mixture = load_mixture(CONFIGS / f"{name}.yaml")
    assert all(source.first_rows == name.endswith("released") for source in mixture.sources)


def test_tokens_follow_from_tiles_rates_and_drop(capsys, tmp_path):
    """Run with a source whose tiles are known, and one with only a limit."""
    with open(tmp_path / "near.jsonl", "w") as file:
        for number, size in enumerate([(448, 448), (896, 448), (448, 1344)]):
            picture(*size).save(tmp_path / f"{number}.png")
            turns = [{"from": "human", "value": "<image>\n" + 40 * "q"}, {"from": "gpt", "value": 40 * "a"}]
            file.write(json.dumps({"image": f"{number}.png", "conversations": turns}) + "\n")
    near = {"name": "near", "annotation": "near.jsonl", "image_root": ".", "rate": 10, "modality": "optical"}
    far = {"name": "far", "dataset": "org/far", "rate": 0.1, "rows": 100, "max_patches": 6, "tasks": ["grounding"]}
    recipe = {
        "max_length": 4096,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 10,
        "mixture": {"root": str(tmp_path), "modalities": ["optical", "sar"], "sources": [near, far]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    output = dry_run(capsys, "--config", str(path), "--vrl_drop_ratio", "0.75")
    near_tiles, far_tiles = (1 + 3 + 4) / 3, 7
    near_tokens = [near_tiles * 256 + 20, near_tiles * 64 + 20]
    far_tokens = [far_tiles * 256 + 200, far_tiles * 64 + 200]
    for ratio, first, second in zip(("r = 0", "r = 0.75"), near_tokens, far_tokens):
        line = next(line for line in output.splitlines() if line.startswith(f"Expected tokens a step, {ratio}:"))
        tokens = float(line.split("at most ")[1].replace(",", ""))
        assert tokens == pytest.approx(6 * (30 * first + 10 * second) / 40, abs=6)
    assert "An epoch: 7 steps. 10 steps: 1.5 epochs." in output
    assert "Missing: 0 of 2 sources" in output


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, [True, True, True, True]),
        ({"a": {"rate": 9}}, [False, True, True, True]),
        ({"b": {"modality": "optical"}}, [True, False, True, True]),
        ({"a": {"tasks": ["vqa"]}}, [True, True, False, True]),
        ({"c": {"general": False}}, [True, True, True, False]),
        ({"a": {"general": True}}, [True, False, False, True]),
    ],
)
def test_four_rules_of_mixtures(changes, holds):
    entries = {
        "a": {"modality": "optical", "tasks": ["grounding", "caption"]},
        "b": {"modality": ["sar", "optical"], "tasks": ["caption", "vqa"]},
        "c": {"general": True, "tasks": ["caption"]},
    }
    sources = [
        {"name": name, "dataset": f"org/{name}", "rows": 100, **entry, **changes.get(name, {})}
        for name, entry in entries.items()
    ]
    modalities = ["sar"] if "a" not in changes or "general" not in changes["a"] else ["optical", "ct"]
    for detection in (True, False):
        mixture = load_mixture({"sources": sources, "modalities": modalities, "detection": detection})
        found = check_rules(mixture, summarize_sources(mixture, ViTPImageProcessor(max_patches=12)))
        assert [rule[0] for rule in found] == [*holds[:2], holds[2] or not detection, holds[3]]


def test_rows_of_folder_are_counted(tmp_path):
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}]
    Dataset.from_list([{"messages": messages}] * 7).to_parquet(tmp_path / "mine" / "train.parquet")
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"sources:\n  - {{name: mine, dataset: {tmp_path / 'mine'}, split: train, rate: 2}}\n")
    (summary,) = summarize_sources(load_mixture(mixture), ViTPImageProcessor(max_patches=12))
    assert (summary.rows, summary.effective, summary.missing) == (7, 14, None)


def test_bands_of_a_source_are_read(tmp_path):
    write_bands(tmp_path / "0.tif", np.zeros((12, 448, 896), np.uint16))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Sea."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "0.tif", "conversations": turns}))
    source = {"name": "sentinel2", "annotation": "rows.jsonl", "image_root": "."}
    source["input_spec"] = {"band_names": [f"B{number}" for number in range(12)], "window": [0, 10000]}
    mixture = load_mixture({"root": str(tmp_path), "sources": [source]})
    (summary,) = summarize_sources(mixture, ViTPImageProcessor())
    assert summary.unusable is None and summary.measured and summary.tiles == 3


def suggested(place, tmp_path, *options):
    """Return the mixture that the dry run suggests instead of a `dataset_name`."""
    with pytest.raises(ValueError) as refused:
        pretrain.main(["--dataset_name", str(place), "--output_dir", str(tmp_path / "out"), "--dry_run", *options])
    said = shlex.split(str(refused.value).removesuffix("."))
    assert said[-4:-1] == ["--dataset_name", "", "--mixture"]
    return load_mixture(json.loads(said[-1]))


@pytest.mark.parametrize("name", FORMATS)
def test_suggested_mixture_equals_data_set(name, tmp_path):
    """Suggest a mixture for the folder and for the file of a data set, whose images have one tile of 2 tokens."""
    FORMATS[name][0](tmp_path / "data", [picture(30, 20, seed) for seed in range(4)])
    files = [path for path in (tmp_path / "data").rglob("*") if path.suffix != ".png" and path.is_file()]
    processor = ViTPImageProcessor(max_patches=12)
    tiles = processor.num_tiles([(20, 30)])[0]
    characters = [len(question(number)) + len(answer(number)) for number in range(4)]
    for place in [tmp_path / "data", *(file for file in files if file.name != "metadata.jsonl")]:
        (summary,) = summarize_sources(suggested(place, tmp_path), processor)
        assert (summary.rows, summary.missing, summary.unusable, summary.measured) == (4, None, None, True)
        assert summary.tiles == tiles and summary.text_tokens == pytest.approx(sum(characters) / 16)


def test_suggested_mixture_has_split_and_root(tmp_path):
    FORMATS["LLaVA"][0](tmp_path / "data", [picture(30, 20)])
    moved = (tmp_path / "data" / "llava_instruct.json").rename(tmp_path / "rows.json")
    root = str(tmp_path / "data" / "images")
    (source,) = suggested(moved, tmp_path, "--image_root", root).sources
    assert source == Source("mine", annotation=str(moved), image_root=root)
    (source,) = suggested("org/x", tmp_path, "--dataset_train_split", "all[:9]", "--dataset_config", "c").sources
    assert source == Source("mine", dataset="org/x", split="all", config="c")


@pytest.mark.parametrize("found", [0, 1])
def test_invalid_rows_are_counted(found, capsys, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Trees."}]
    lines = [json.dumps({"image": f"{number}.png", "conversations": turns}) for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for number in range(found):
        picture(30, 20).save(tmp_path / f"{number}.png")
    mixture = {"sources": [{"name": "a", "annotation": str(tmp_path / "rows.jsonl"), "image_root": str(tmp_path)}]}
    output = dry_run(capsys, "--mixture", json.dumps(mixture), "--output_dir", str(tmp_path / "out"))
    first = f"row {1 + found}: image 0 ({tmp_path / f'{found}.png'}) cannot be read"
    assert f"Invalid rows:\n  a: {3 - found} of the first 3: {first}" in output
    assert ("<= " in output) == (": at most " in output) == (not found)


@pytest.mark.parametrize("start", ["from scratch", "folder"])
def test_tiles_and_tokens_match_start_model(start, capsys, tmp_path, model_and_processor):
    """Count 3 x 2 tiles of 56 pixels and a thumbnail for an image of 100 x 60 pixels."""
    model, processor = model_and_processor
    picture(100, 60).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Trees."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "0.png", "conversations": turns}) + "\n")
    mixture = {"sources": [{"name": "a", "annotation": str(tmp_path / "rows.jsonl"), "image_root": str(tmp_path)}]}
    arguments = ["--mixture", json.dumps(mixture), "--vrl_drop_ratio", "0.5", "--output_dir", str(tmp_path / "out")]
    if start == "folder":
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        arguments += ["--model_name_or_path", str(tmp_path / "model")]
    else:
        config = model.config.to_dict()
        settings = {"vision_config": config["vision_config"], "text_config": {}, "vocab_size": 400}
        arguments += ["--from_scratch", json.dumps(settings | {"image_processor": {"max_patches": 6}})]
    output = dry_run(capsys, *arguments)
    tiles = len(processor.image_processor(picture(100, 60), crop_to_patches=True)["pixel_values"])
    assert tiles == 7 and processor._get_num_multimodal_tokens([[60, 100]]).num_image_patches == [tiles]
    (line,) = [line for line in output.splitlines() if line.startswith("a ")]
    text = len("What?") + len("Trees.")
    assert [float(cell) for cell in line.split()[-3:]] == [tiles, round(28 + text / 4), round(14 + text / 4)]
    assert "(4 tokens per tile of 56 x 56 pixels." in output
