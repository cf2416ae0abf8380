"""Push: what goes and what does not, and how it ends when the Hub fails."""

import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from pushed_runs import in_repo, push
from tiny_models import VISION
from transformers import AutoImageProcessor, AutoModelForImageClassification

from modeling_vitp import (
    ViTPForConditionalGeneration,
    ViTPForImageClassification,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)
from modeling_vitp.command.errors import WrongArguments


def writes(hub) -> list[str]:
    return [one.path for one in hub.requests if one.method not in ("GET", "HEAD")]


def test_what_goes_is_shown_and_a_dry_run_touches_nothing(hub, logged_in, folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    options = [folder, "tester/m", "--what", "model", "--license", "mit", "--private"]
    assert push(*options, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert writes(hub) == [] and hub.repo("tester/m") is None
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "visibility: private, new" in shown and "license: mit" in shown and "Nothing was sent" in shown

    assert push(*options) == 0
    files = in_repo(hub, "tester/m")
    assert hub.repo("tester/m").state["private"]
    lines = [line.split() for line in shown.splitlines() if line.startswith(" ")]
    listed = {words[1]: int(words[0].replace(",", "")) for words in lines if len(words) == 2}
    assert listed == {name: len(content) for name, content in files.items()}
    assert f"{sum(listed.values()):,} bytes in {len(listed)} files" in shown
    assert "visibility: private, new" in capsys.readouterr().out
    assert push(*options, "--dry_run") == 0
    assert "visibility: private\n" in capsys.readouterr().out


def test_branch_message_and_pull_request(hub, logged_in, folder, capsys):
    assert push(folder, "tester/m", "--what", "model", "--revision", "v2", "--commit_message", "Second") == 0
    assert "model.safetensors" not in hub.files("tester/m") and "model.safetensors" in hub.files("tester/m", "v2")
    assert hub.repo("tester/m").history("v2")[0][1]["summary"] == "Second"
    capsys.readouterr()
    assert push(folder, "tester/m", "--what", "model", "--create_pr", "--commit_message", "Please") == 0
    assert capsys.readouterr().out.strip().endswith("tester/m/discussions/1")
    assert "model.safetensors" not in hub.files("tester/m") and "model.safetensors" in hub.files(
        "tester/m", "refs/pr/1"
    )
    assert [one["title"] for one in hub.repo("tester/m").state["discussions"]] == ["Please"]
    with pytest.raises(WrongArguments, match="--create_pr is for main: give no --revision"):
        push(folder, "tester/m", "--what", "model", "--create_pr", "--revision", "v2")


def test_a_public_repo_is_not_taken_for_a_private_one(hub, logged_in, folder, capsys):
    hub.create("tester/m")
    assert push(folder, "tester/m", "--what", "model", "--private") == 1
    assert "tester/m is there and is public" in capsys.readouterr().err and set(hub.files("tester/m")) == {
        ".gitattributes"
    }


def test_weights_of_an_earlier_push_do_not_stay(hub, logged_in, folder, capsys):
    earlier = dict.fromkeys(("model-00001-of-00002.safetensors", "notes.txt", "deep/x.safetensors"), b"old")
    hub.create("tester/m", earlier)
    assert push(folder, "tester/m", "--what", "model") == 0
    assert "deleted model-00001-of-00002.safetensors" in capsys.readouterr().out
    assert {"notes.txt", "deep/x.safetensors", "model.safetensors"} < set(hub.files("tester/m"))
    assert "model-00001-of-00002.safetensors" not in hub.files("tester/m")


def test_the_processor_of_an_earlier_push_is_not_opened_in_place_of_that_of_a_backbone(hub, logged_in, folder):
    """transformers opens `processor_config.json` where there is one."""
    assert push(folder, "tester/m", "--what", "model") == 0
    assert "processor_config.json" in hub.files("tester/m")
    assert push(folder, "tester/m", "--what", "backbone") == 0
    assert "processor_config.json" not in hub.files("tester/m")
    assert "preprocessor_config.json" in hub.files("tester/m")


def test_models_and_processors_push_themselves(hub, logged_in, folder, tmp_path):
    ViTPForConditionalGeneration.from_pretrained(folder).push_to_hub("tester/full", private=True)
    ViTPProcessor.from_pretrained(folder).push_to_hub("tester/full")
    files = in_repo(hub, "tester/full")
    assert all(files[name] == (folder / name).read_bytes() for name in ("model.safetensors", "tokenizer.json"))
    pulled = ViTPForConditionalGeneration.from_pretrained("tester/full").state_dict()
    wanted = ViTPForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(pulled[name], wanted[name]) for name in wanted)
    assert ViTPProcessor.from_pretrained("tester/full").image_processor.max_patches == 6
    assert not any(logged_in.encode() in content for content in files.values())


def test_a_classifier_is_pushed_as_it_was_trained_and_pulled_by_auto_classes(hub, logged_in, tmp_path, capsys):
    torch.manual_seed(0)
    vit = ViTPVisionModel(ViTPVisionConfig(**VISION))
    names = {0: "field", 1: "forest", 2: "water"}
    model = ViTPForImageClassification.from_backbone(vit, id2label=names, problem_type="multi_label_classification")
    model.save_pretrained(tmp_path / "run")
    ViTPImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "train.csv").write_text("private")
    assert push(tmp_path / "run", "tester/fields", "--what", "model") == 0
    assert "train.csv" not in in_repo(hub, "tester/fields")
    pulled = AutoModelForImageClassification.from_pretrained("tester/fields")
    assert type(pulled) is ViTPForImageClassification and pulled.config.id2label == names
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in pulled.state_dict().items())
    assert AutoImageProcessor.from_pretrained("tester/fields").size == {"height": 56, "width": 56}


@pytest.mark.slow
def test_the_token_is_sent_to_the_hub_and_stays_nowhere(hub, logged_in, folder, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path / "home", logged_in), "HF_DEBUG": "0"}
    command = [sys.executable, "recipes/push_to_hub.py", folder, "tester/m", "--what", "backbone"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert logged_in not in done.stdout + done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 20 and not any(logged_in.encode() in path.read_bytes() for path in left)


def test_a_folder_that_is_not_there_is_named_before_anything_is_written(hub, logged_in, folder):
    with pytest.raises(WrongArguments, match=f"checkpoint='{folder}/none': there is no such file or folder"):
        push(f"{folder}/none", "tester/m", "--what", "model")
    assert writes(hub) == []


def test_a_model_that_is_neither_here_nor_in_the_cache_is_named(capsys):
    """The session's tests have no Hub."""
    assert push("my_model", "tester/m", "--what", "model") == 1
    assert capsys.readouterr().err.startswith("error: my_model is no folder here, and cannot be had from the Hub: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{folder}", "a/b/c", "--what", "model"], "a/b/c"),
        (["tester/none", "tester/m", "--what", "model"], "tester/none cannot be downloaded"),
        (["{folder}/checkpoint-2", "tester/m", "--what", "model"], "has no config.json"),
        (["{backbone}", "tester/m", "--what", "model"], "Push it with --what backbone"),
        (["{folder}", "tester/m", "--what", "adapter"], "has no adapter"),
        (["{folder}", "tester/m", "--what", "space"], "loads its model from the Hub"),
        (["{folder}/checkpoint-2", "tester/m", "--what", "dataset"], "has no data in it"),
    ],
)
def test_mistakes_are_named_in_one_line(hub, logged_in, folder, capsys, words, says):
    backbone = export_backbone(folder, folder.parent / "backbone") if "{backbone}" in words else ""
    capsys.readouterr()
    assert push(*(word.format(folder=folder, backbone=backbone) for word in words)) == 1
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert writes(hub) == []
