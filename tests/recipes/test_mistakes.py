"""What people get wrong, each in one line that names the thing, with the right status, soon, and nothing written."""

import json
import re
import sys
import time

import pytest
import yaml
from tiny_models import FROM_SCRATCH

from modeling_vitp.__main__ import main

PRETRAIN = ["pretrain", "--output_dir", "out", "--dataset_name", "data"]
DETECTION = ["finetune_detection", "--config", "dior_r", "--output_dir", "out"]
# The words, the status, and what the line says.
MISTAKES = {
    "a part of an option's name": (
        ["finetune_segmentation", "--config", "loveda", "--batch_size", "4"],
        2,
        "no option 'batch_size': did you mean .*per_device_eval_batch_size or per_device_train_batch_size",
    ),
    "a recipe's name": (["pretran"], 2, "there is no recipe 'pretran': did you mean 'pretrain'"),
    "no recipe at all": (["train_model"], 2, "there is no recipe 'train_model'"),
    "a configuration's name": (["pretrain", "--config", "quickstrt"], 2, "no configuration 'quickstrt'.*quickstart"),
    "a configuration that is no YAML": (["pretrain", "--config", "broken.yaml"], 2, "expected|mapping|scanning"),
    "a configuration's swapped letters": (
        ["pretrain", "--config", "quickstrat"],
        2,
        r"in the package: did you mean 'quickstart'\? \(",
    ),
    "a configuration like none": (["pretrain", "--config", "zzzz.yaml"], 2, r"a name of recipes/configs\. \("),
    "a configuration beside it": (["pretrain", "--config", "brokn"], 2, "did you mean 'broken.yaml'"),
    "two configurations": (["pretrain", "--config", "key.yaml", "--config", "key.yaml"], 2, "give --config once"),
    "a key of another command": (
        ["finetune_segmentation", "--config", "loveda", "--detector", "d_fine"],
        2,
        "no option 'detector': it belongs to vitp finetune_detection. Do: vitp finetune_segmentation --help_all lists",
    ),
    "a configuration without a name": (["pretrain", "--config"], 2, "--config needs a name"),
    "an option's name": (
        [*PRETRAIN, "--learning_rat", "1"],
        2,
        "no option 'learning_rat': did you mean 'learning_rate'",
    ),
    "a key of the configuration": (
        ["pretrain", "--config", "key.yaml"],
        2,
        "no option 'max_step': did you mean 'max_st",
    ),
    "an option of another recipe": (
        ["finetune_segmentation", "--config", "loveda", "--crop", "3"],
        2,
        "no option 'crop': did you mean 'crop_",
    ),
    "a word without an option": (["pretrain", "--config", "quickstart", "word"], 2, r"what is 'word'\?"),
    "a word for a number": ([*PRETRAIN, "--max_patches", "many"], 2, "max_patches.*invalid int"),
    "an option without its value": (["export_backbone", "model"], 2, "arguments are required: output_dir"),
    "a rate over 1": ([*PRETRAIN, "--vrl_drop_ratio", "75"], 2, r"vrl_drop_ratio=75.0"),
    "a negative size": ([*PRETRAIN, "--max_patches", "-2"], 2, r"max_patches=-2"),
    "JSON that is none": ([*PRETRAIN, "--from_scratch", "{]"], 2, "from_scratch: '{]' is no JSON"),
    "no data": (["pretrain", "--output_dir", "out"], 2, "Give either dataset_name or mixture"),
    "no folder to write to": (
        ["pretrain", "--dataset_name", "data", "--from_scratch", json.dumps(FROM_SCRATCH)],
        2,
        "output_dir is missing: give the folder",
    ),
    "no start": (PRETRAIN, 2, "Give either model_name_or_path or from_scratch"),
    "two starts, of which one can be taken back": (
        [*PRETRAIN, "--from_scratch", json.dumps(FROM_SCRATCH), "--model_name_or_path", "model"],
        2,
        "Give either model_name_or_path or from_scratch.*taken back by --from_scratch '{}'",
    ),
    "a start taken back": ([*PRETRAIN, "--from_scratch", "{}", "--model_name_or_path", "bert"], 2, "bert is a 'bert'"),
    "a key of a ViT from scratch": (
        [*PRETRAIN, "--from_scratch", json.dumps(FROM_SCRATCH | {"vision_config": {"num_hiden_layers": 2}})],
        2,
        r"from_scratch\.vision_config: there is no 'num_hiden_layers'; did you mean 'num_hidden_layers'\?",
    ),
    "a key of a detector": (
        [*DETECTION, "--model_name_or_path", "model", "--head", '{"neck_chanels": 32}'],
        2,
        r"head: there is no 'neck_chanels'; did you mean 'neck_channels'\?",
    ),
    "a score of random weights": (
        ["finetune_segmentation", "--config", "aerial_trees", "--from_scratch", '{"hidden_size": 8}']
        + ["--do_train", "false", "--output_dir", "out"],
        2,
        "do_train is false, and a model from_scratch has random weights.*give model_name_or_path",
    ),
    "two starts": (
        [*PRETRAIN, "--model_name_or_path", "model", "--vision_model", "model"],
        2,
        "belong together|Give eit",
    ),
    "half a composition": (
        [*PRETRAIN, "--vision_model", "model"],
        2,
        "vision_model and language_model belong together",
    ),
    "an unknown task": ([*PRETRAIN, "--task", "tree"], 2, "there is no task 'tree'"),
    "a mistyped path of a model": (
        [*PRETRAIN, "--model_name_or_path", "./modle"],
        2,
        r"no such .*did you mean 'model'",
    ),
    "an absolute path that is not there": (
        [*PRETRAIN, "--model_name_or_path", "/no/model"],
        2,
        "'/no/model': there is no",
    ),
    "a mistyped path of data": (
        ["pretrain", "--output_dir", "out", "--dataset_name", "./dta"],
        2,
        "did you mean 'data'",
    ),
    "a model's name that the Hub cannot have here": (
        [*PRETRAIN, "--model_name_or_path", "org/model"],
        1,
        "HF_HUB_OFFLINE is set",
    ),
    "a backbone to train on": ([*PRETRAIN, "--model_name_or_path", "vit"], 2, "vit is a backbone.*--vision_model"),
    "a folder without a model": ([*PRETRAIN, "--model_name_or_path", "empty"], 2, "empty"),
    "a folder without data": (["pretrain", "--output_dir", "out", "--dataset_name", "empty"], 2, "empty"),
    "rows in no schema, before the model is looked at": (
        ["pretrain", "--output_dir", "out", "--dataset_name", "texts", "--model_name_or_path", "bert"],
        2,
        r"texts, split 'train': the columns \['text', 'label'\] make no conversation.*questions and answers need",
    ),
    "a split to train on": ([*PRETRAIN, "--dataset_train_split", "trian"], 2, "no split 'trian'.*'?train"),
    "a split to evaluate on": ([*PRETRAIN, "--dataset_test_split", "tset"], 2, "no split 'tset', only test, train"),
    "a model of another kind": ([*PRETRAIN, "--model_name_or_path", "bert"], 2, "bert is a 'bert' model"),
    "a mixture that is not there": (["pretrain", "--output_dir", "out", "--mixture", "mix.yml"], 2, "mix.yml"),
    "a mixture without sources": (["validate_data", "empty.yaml"], 2, "empty.yaml|sources"),
    "a mixture's name": (["validate_data", "mixtures.yaml"], 2, "no mixture file mixtures.yaml"),
    "a classes file": (["finetune_segmentation", "--config", "lovda"], 2, "no configuration 'lovda'.*loveda"),
    "a dense model's data root": (
        ["finetune_segmentation", "--config", "loveda", "--model_name_or_path", "vit", "--output_dir", "out"],
        2,
        "loveda|LoveDA|data",
    ),
    "a classifier without data": (
        ["finetune_classification", "--model_name_or_path", "vit", "--output_dir", "out"],
        2,
        "Give data_root, a folder of images, or dataset_name",
    ),
    "a folder of images": (
        ["finetune_classification", "--model_name_or_path", "vit", "--output_dir", "out", "--data_root", "imags"],
        2,
        "no folder imags|imags.*no such",
    ),
    "a folder of images without classes": (
        ["finetune_classification", "--model_name_or_path", "vit", "--output_dir", "out", "--data_root", "empty"],
        2,
        "Split 'train' has no image: no file is like empty/train/{class}/{name}",
    ),
    "an option of maps for a classifier": (
        ["finetune_classification", "--crop_size", "3", "--data_root", "empty", "--output_dir", "out"],
        2,
        "no option 'crop_size': it belongs to vitp finetune_segmentation",
    ),
    "a probe of nothing": (["probe", "--dataset_name", "data"], 2, "backbones"),
    "a conversion of nothing": (["convert", "./modle", "out"], 2, "did you mean 'model'"),
    "a conversion to nothing": (["convert", "empty", "out", "--to", "vit"], 2, "--to: invalid choice: 'vit'"),
    "a conversion without words": (["convert"], 2, "required: source, target Do: vitp convert --help lists"),
    "a conversion of an empty folder": (["convert", "empty", "out"], 2, "holds no safetensors"),
    "a conversion onto something": (["convert", "bert", "data"], 2, "data exists already"),
    "a backbone of a ViT": (["export_backbone", "empty", "out"], 2, "empty has no processor"),
    "a backbone of a backbone": (["export_backbone", "vit", "out"], 2, "vit is a backbone already"),
    "a backbone of a detector": (
        ["export_backbone", "boxes", "out"],
        2,
        "boxes is a 'vitp_object_detection', and a vision-language model is expected: take the one that it was trained",
    ),
    "a backbone among a user's files": (["export_backbone", "model", "data"], 2, "data exists already: give a new"),
    "a graph of nothing": (["export_onnx", "empty", "a.onnx"], 2, "empty has no config.json"),
    "a graph of a model of another kind": (["export_onnx", "bert", "a.onnx"], 2, "bert is a 'bert'"),
    "a graph that is a folder": (["export_onnx", "bert", "data"], 2, "data: is a folder, and the file to write"),
    "a graph in a folder that is not there": (["export_onnx", "bert", "no/a.onnx"], 2, "no: there is no such folder"),
    "a scene for a model of another kind": (
        ["predict_large", "bert", "a.tif", "--output", "o.tif"],
        2,
        "bert is a bert",
    ),
    "a layout of annotations": (["make_instructions", "yolo", "empty", "out"], 2, "invalid choice: 'yolo'"),
    "a push of nothing": (["push_to_hub", "./modle", "org/name", "--what", "model"], 2, "did you mean 'model'"),
    "a push without a kind": (["push_to_hub", "model", "org/name"], 2, "arguments are required: --what"),
}


@pytest.fixture
def desk(tmp_path, monkeypatch, data_folder):
    """A folder with data, an empty folder, a model's configuration and some files that are wrong."""
    for name in ("model", "empty"):
        (tmp_path / name).mkdir()
    for name, model_type in {"bert": "bert", "vit": "internvl_vision", "boxes": "vitp_object_detection"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "broken.yaml").write_text("a: [1, 2\nb: }")
    (tmp_path / "key.yaml").write_text(
        yaml.safe_dump({"dataset_name": "data", "max_step": 3, "from_scratch": FROM_SCRATCH})
    )
    (tmp_path / "empty.yaml").write_text("{}")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.csv").write_text("text,label\na ship,1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.setattr(sys, "argv", ["vitp"])
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_soon_with_its_status_and_leaves_nothing(mistake, desk, capsys):
    words, status, says = MISTAKES[mistake]
    before = sorted(desk.rglob("*"))
    start = time.process_time()
    with pytest.raises(SystemExit) as end:
        main(words)
    seconds = time.process_time() - start
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^error: .*({says})", line), line
    assert end.value.code == status, line
    log = re.search(r"\(traceback: (.*error\.log)\)$", line)
    assert log and "Traceback" in open(log[1]).read()
    assert sorted(desk.rglob("*")) == before and seconds < 10


def test_the_traceback_is_printed_when_asked_for(desk, capsys):
    with pytest.raises(SystemExit):
        main(["pretran"])
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export_backbone", "empty", "out", "--debug"])
    assert "Traceback" in capsys.readouterr().err
