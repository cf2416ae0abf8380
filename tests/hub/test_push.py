"""Pushes of models, backbones, data sets and the demo: pushed files, omitted files, and messages."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, SpaceCard
from paths import ROOT
from pushed_runs import in_repo, push
from tiny_models import VISION
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from modeling_vitp import (
    ViTPForConditionalGeneration,
    ViTPForImageClassification,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
    export_timm,
)
from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.hub.upload import push_folder


def writes(hub) -> list[str]:
    return [one.path for one in hub.requests if one.method not in ("GET", "HEAD")]


def test_model_is_pushed_without_run_files(hub, logged_in, folder):
    assert push(folder, "tester/m", "--what", "model") == 0
    files = in_repo(hub, "tester/m")
    wanted = "README.md chat_template.jinja config.json configuration_vitp.py generation_config.json metrics.json "
    wanted += "image_processing_vitp.py model.safetensors modeling_vitp.py processing_vitp.py processor_config.json "
    wanted += "bands.py image_decoding.py input_spec.py opening.py tokenizer.json tokenizer_config.json "
    wanted += "conversations.py vision_towers.py vrl.py"
    assert set(files) == set(wanted.split())
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_backbone_is_exported_before_push(hub, logged_in, folder, tmp_path):
    assert push(folder, "tester/b", "--what", "backbone") == 0
    exported = export_backbone(folder, tmp_path / "backbone")
    assert push(exported, "tester/again", "--what", "backbone") == 0
    one, two = in_repo(hub, "tester/b"), in_repo(hub, "tester/again")
    assert one["model.safetensors"] == two["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert one["config.json"] == two["config.json"] and set(one) == {*two, "metrics.json"}
    pulled = AutoModel.from_pretrained("tester/b").state_dict()
    tower = ViTPForConditionalGeneration.from_pretrained(folder).model.vision_tower.state_dict()
    assert all(torch.equal(pulled[name], tower[name]) for name in tower)
    # A model on the Hub is a valid source, like a folder.
    assert push(folder, "tester/m", "--what", "model") == 0
    assert push("tester/m", "tester/third", "--what", "backbone") == 0
    assert in_repo(hub, "tester/third")["model.safetensors"] == one["model.safetensors"]


def test_classifier_is_pulled_by_auto_classes(hub, logged_in, tmp_path):
    torch.manual_seed(0)
    vit = ViTPVisionModel(ViTPVisionConfig(**VISION))
    names = {0: "field", 1: "forest", 2: "/m/01g317"}  # the last one is an id of Open Images, and not a path
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


def test_models_and_processors_push_themselves(hub, logged_in, folder):
    ViTPForConditionalGeneration.from_pretrained(folder).push_to_hub("tester/full", private=True)
    ViTPProcessor.from_pretrained(folder).push_to_hub("tester/full")
    files = in_repo(hub, "tester/full")
    assert all(files[name] == (folder / name).read_bytes() for name in ("model.safetensors", "tokenizer.json"))
    assert ViTPProcessor.from_pretrained("tester/full").image_processor.max_patches == 6
    assert not any(logged_in.encode() in content for content in files.values())


def test_data_set_is_pushed_without_hidden_files(hub, logged_in, tmp_path, capsys):
    rows = tmp_path / "rows"
    (rows / "images").mkdir(parents=True)
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(rows / "train.parquet")
    for name in ("images/a.png", "LICENSE", ".hidden", "_cache.json"):
        (rows / name).write_bytes(b"content")
    assert push(rows, "tester/none", "--what", "dataset", "--license", "mit") == 0
    assert hub.api().dataset_info("tester/none").card_data.license == "mit"
    (rows / "README.md").write_text("---\nlicense: cc-by-4.0\nconfigs: []\n---\n# Rows\n")
    assert push(rows, "tester/rows", "--what", "dataset", "--license", "mit") == 1
    assert "Expected it, got mit" in capsys.readouterr().err
    assert push(rows, "tester/rows", "--what", "dataset", "--private") == 0
    assert in_repo(hub, "tester/rows", repo_type="dataset") == {
        "README.md": (rows / "README.md").read_bytes(),
        "train.parquet": (rows / "train.parquet").read_bytes(),
        "images/a.png": b"content",
        "LICENSE": b"content",
    }
    assert hub.repo("tester/rows", "dataset").state["private"]
    (rows / "images" / ".env").write_text("")
    assert push(rows, "tester/rows", "--what", "dataset") == 1
    assert "images/.env (a file of secrets)" in capsys.readouterr().err


def test_hidden_files_of_a_data_set_are_not_sent(hub, logged_in, tmp_path):
    (tmp_path / "rows" / "images").mkdir(parents=True)
    (tmp_path / "rows" / "train.jsonl").write_text('{"images": ["images/_a.png"]}')
    (tmp_path / "rows" / "images" / "_a.png").write_bytes(b"image")
    (tmp_path / "rows" / "_notes.jsonl").write_text("{}")
    assert push(tmp_path / "rows", "tester/rows", "--what", "dataset") == 0
    assert set(in_repo(hub, "tester/rows", repo_type="dataset")) == {"README.md", "train.jsonl", "images/_a.png"}


def test_data_set_with_a_linked_folder_is_refused(hub, logged_in, tmp_path, capsys):
    for name in ("rows", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"images": ["images/a.png"]}')
    (tmp_path / "rows" / "images").symlink_to(tmp_path / "elsewhere")
    assert push(tmp_path / "rows", "tester/rows", "--what", "dataset") == 1
    assert "rows/images" in capsys.readouterr().err and writes(hub) == []


def test_demo_card_names_model(hub, logged_in, tmp_path, monkeypatch):
    space = tmp_path / "space"
    monkeypatch.setattr("modeling_vitp.hub.upload.SPACE", space)
    (space / "__pycache__").mkdir(parents=True)
    (space / "__pycache__" / "app.pyc").touch()
    (space / "app.py").write_text("import gradio")
    (space / "requirements.txt").write_text("gradio")
    (space / "README.md").write_text("---\nsdk: gradio\nlicense: apache-2.0\nmodels: [x/y]\n---\n# Demo\n")
    for _ in range(2):
        assert push("tester/model", "tester/demo", "--what", "space") == 0
    files = in_repo(hub, "tester/demo", repo_type="space")
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_vitp").rglob("*.py")}
    assert files.keys() == {"README.md", "app.py", "requirements.txt"} | package
    assert {"modeling_vitp/__init__.py", "modeling_vitp/modeling_vitp.py", "modeling_vitp/convert/export.py"} <= package
    card = SpaceCard(files["README.md"].decode())
    assert card.data.models == card.data.preload_from_hub == ["tester/model"]
    assert card.data.sdk == "gradio" and "# Demo" in card.text
    state = hub.repo("tester/demo", "space").state
    assert state["variables"] == {"VITP_MODEL": "tester/model"} and state["sdk"] == "gradio"


def test_demo_has_the_model_of_a_folder(hub, logged_in, folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "mine", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert push(tmp_path / "mine", "tester/demo", "--what", "space", "--license", "mit") == 0
    files = in_repo(hub, "tester/demo", repo_type="space")
    assert hub.repo("tester/demo", "space").state["variables"] == {"VITP_MODEL": "models/mine"}
    card = SpaceCard(files["README.md"].decode()).data
    assert card.thumbnail == "https://huggingface.co/spaces/tester/demo/resolve/main/thumbnail.jpg"
    assert "thumbnail.jpg" in files and card.license == "apache-2.0" and not card.models
    assert ModelCard(files["models/mine/README.md"].decode()).data.license == "mit"
    sent = tmp_path / "space"
    for name, content in files.items():
        (sent / name).parent.mkdir(parents=True, exist_ok=True)
        (sent / name).write_bytes(content)
    original, found = (ViTPForConditionalGeneration.from_pretrained(one) for one in (folder, sent / "models/mine"))
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=0, atol=0)
    monkeypatch.setattr("modeling_vitp.hub.upload.MAX_PACKED", 1000)
    assert push(tmp_path / "mine", "tester/demo", "--what", "space", "--license", "mit") == 1
    assert "--what model" in capsys.readouterr().err


def test_dry_run_lists_files_and_sends_nothing(hub, logged_in, folder, capsys):
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
    assert push(*options, "--dry_run") == 0
    assert "visibility: private\n" in capsys.readouterr().out


def test_dry_run_does_not_wait_for_hub(hub, folder, pauses, capsys):
    failed = hub.fail("GET", "/api/models/tester/m", status=500, times=None)
    assert push(folder, "tester/m", "--what", "model", "--dry_run") == 0
    assert failed.count == 1 and pauses == [] and "visibility: unknown" in capsys.readouterr().out


def test_branch_message_and_pull_request(hub, logged_in, folder, capsys):
    assert push(folder, "tester/m", "--what", "model", "--revision", "v2", "--commit_message", "Second") == 0
    assert "model.safetensors" not in hub.files("tester/m") and "model.safetensors" in hub.files("tester/m", "v2")
    assert hub.repo("tester/m").history("v2")[0][1]["summary"] == "Second"
    capsys.readouterr()
    assert push(folder, "tester/m", "--what", "model", "--create_pr", "--commit_message", "Please") == 0
    assert capsys.readouterr().out.strip().endswith("tester/m/discussions/1")
    assert "model.safetensors" not in hub.files("tester/m")
    assert "model.safetensors" in hub.files("tester/m", "refs/pr/1")
    assert [one["title"] for one in hub.repo("tester/m").state["discussions"]] == ["Please"]
    with pytest.raises(WrongArguments, match="--create_pr"):
        push(folder, "tester/m", "--what", "model", "--create_pr", "--revision", "v2")


def test_public_repo_is_not_treated_as_private(hub, logged_in, folder, capsys):
    hub.create("tester/m")
    assert push(folder, "tester/m", "--what", "model", "--private") == 1
    assert "tester/m exists and is public" in capsys.readouterr().err and in_repo(hub, "tester/m") == {}
    with pytest.raises(ValueError, match="tester/m"):  # as the training pushes
        push_folder(hub.api(), folder, "tester/m", private=True)
    assert in_repo(hub, "tester/m") == {}


def test_option_without_an_effect_is_refused(hub, logged_in):
    with pytest.raises(WrongArguments, match="--base_model"):
        push("tester/model", "tester/m", "--what", "model", "--base_model", "org/base")
    with pytest.raises(WrongArguments, match="--license"):
        push("tester/model", "tester/m", "--what", "space", "--license", "mit")
    assert writes(hub) == []


def test_stale_files_of_an_earlier_push_are_deleted(hub, logged_in, folder, capsys):
    earlier = dict.fromkeys(("model-00001-of-00002.safetensors", "notes.txt", "deep/x.safetensors"), b"old")
    hub.create("tester/m", earlier)
    assert push(folder, "tester/m", "--what", "model", "--revision", "new", "--dry_run") == 0
    assert "deleted model-00001-of-00002.safetensors" in capsys.readouterr().out
    assert push(folder, "tester/m", "--what", "model") == 0
    assert "deleted model-00001-of-00002.safetensors" in capsys.readouterr().out
    files = set(hub.files("tester/m"))
    assert {"notes.txt", "deep/x.safetensors", "model.safetensors", "processor_config.json"} < files
    assert "model-00001-of-00002.safetensors" not in files
    # transformers prefers `processor_config.json`, also to the file of a backbone.
    assert push(folder, "tester/m", "--what", "backbone") == 0
    files = set(hub.files("tester/m"))
    assert "processor_config.json" not in files and "preprocessor_config.json" in files


@pytest.mark.parametrize(
    ("pushed", "deleted"),
    [
        ("train-00000", {"train-00001", "train-00001-of-00008-00000", "train-00002-of-00008-00000"}),
        ("train-00001-of-00008-00001", {"train-00000", "train-00001", "train-00001-of-00008-00000"}),
        ("test", {"test-00000-of-00002"}),
    ],
)
def test_rows_of_an_earlier_push_are_deleted(hub, logged_in, tmp_path, capsys, pushed, deleted):
    earlier = "train-00000 train-00001 train-00001-of-00008-00000 train-00002-of-00008-00000 test-00000-of-00002"
    hub.create("tester/rows", {f"{name}.parquet": b"old" for name in earlier.split()}, repo_type="dataset")
    (tmp_path / "rows").mkdir()
    Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "rows" / f"{pushed}.parquet")
    assert push(tmp_path / "rows", "tester/rows", "--what", "dataset") == 0
    files = in_repo(hub, "tester/rows", repo_type="dataset")
    assert {name.removesuffix(".parquet") for name in files} == {*earlier.split(), pushed, "README.md"} - deleted
    listed = capsys.readouterr().out
    assert all(f"deleted {name}.parquet" in listed for name in deleted)


def test_absolute_paths_are_refused(hub, logged_in, folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    text_config = {**config["text_config"], "_name_or_path": "/a/b"}
    changed = {**config, "_name_or_path": "/home/me/model", "text_config": text_config}
    (folder / "config.json").write_text(json.dumps(changed))
    assert push(folder, "tester/m", "--what", "model") == 0
    assert json.loads(hub.files("tester/m")["config.json"]) == config
    assert not any(str(folder.parent).encode() in content for content in hub.files("tester/m").values())

    for path in ("/home/me/teacher", "file:///data/teacher", "C:\\models\\teacher"):
        (folder / "config.json").write_text(json.dumps({**config, "vision_config": {"teacher": path}}))
        assert push(folder, "tester/n", "--what", "model") == 1
        assert "config.json has an absolute path under 'vision_config.teacher'" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# M\n\nSee https://a.b/c/d and /home/me/notes.\n")
    assert push(folder, "tester/n", "--what", "model") == 1
    assert "/home/me/notes" in capsys.readouterr().err and hub.repo("tester/n") is None


@pytest.mark.parametrize("where", ["README.md", "run.json"])
def test_weights_keep_their_license(hub, logged_in, folder, capsys, where):
    if where == "README.md":
        (folder / where).write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    else:
        (folder / where).write_text(json.dumps({"licenses": {"some/weights": {"license": "cc-by-nc-4.0"}}}))
    for what in ("model", "backbone"):
        assert push(folder, "tester/m", "--what", what, "--license", "apache-2.0") == 1
        assert "cc-by-nc-4.0" in capsys.readouterr().err and hub.repo("tester/m") is None
        assert push(folder, f"tester/{what}", "--what", what) == 0
        assert hub.api().model_info(f"tester/{what}").card_data.license == "cc-by-nc-4.0"
        capsys.readouterr()


@pytest.mark.parametrize(
    ("sources", "given", "result"),
    [
        (("apache-2.0", "cc-by-nc-4.0"), None, "cc-by-nc-4.0"),
        (("apache-2.0", "mit"), "mit", "mit"),
        (("cc-by-nc-4.0", "gpl-3.0"), None, None),
    ],
)
def test_licenses_of_several_sources(hub, logged_in, folder, capsys, sources, given, result):
    stated = {f"org/{number}": {"license": name} for number, name in enumerate(sources)}
    (folder / "run.json").write_text(json.dumps({"licenses": stated}))
    options = ["--license", given] if given else []
    assert push(folder, "tester/m", "--what", "model", *options) == (result is None)
    if result is None:
        error = capsys.readouterr().err
        assert all(f"{name} (org/{number})" in error for number, name in enumerate(sources))
        assert hub.repo("tester/m") is None
    else:
        assert hub.api().model_info("tester/m").card_data.license == result


def test_user_card_does_not_change_license(hub, logged_in, folder):
    (folder / "run.json").write_text(json.dumps({"licenses": {"org/start": {"license": "cc-by-nc-4.0"}}}))
    (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\n# A model\n")
    assert push(folder, "tester/m", "--what", "model") == 1 and hub.repo("tester/m") is None


@pytest.mark.slow
def test_token_is_not_stored(hub, logged_in, folder, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path / "home", logged_in), "HF_DEBUG": "0"}
    command = [sys.executable, "recipes/push_to_hub.py", folder, "tester/m", "--what", "backbone"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert logged_in not in done.stdout + done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 20 and not any(logged_in.encode() in path.read_bytes() for path in left)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tester/none", "tester/m", "--what", "model"], "tester/none cannot be downloaded"),
        (["{folder}/checkpoint-2", "tester/m", "--what", "model"], "config.json is missing"),
        (["{backbone}", "tester/m", "--what", "model"], "Push it with --what backbone"),
        (["{folder}/checkpoint-2", "tester/m", "--what", "dataset"], "data files"),
        (["{timm}", "tester/m", "--what", "space"], "needs timm"),
        (["{titled}", "tester/m", "--what", "dataset"], "README.md"),
    ],
)
def test_mistakes_are_named_in_one_line(hub, logged_in, folder, capsys, words, says):
    paths = {"folder": folder, "titled": folder}
    if "{backbone}" in words:
        paths["backbone"] = export_backbone(folder, folder.parent / "backbone")
    if "{timm}" in words:
        paths["timm"] = export_timm(folder, folder.parent / "timm")
    if "{titled}" in words:
        (folder / "README.md").write_text("---\ntitle: Ships: a model\n---\n")
    capsys.readouterr()
    assert push(*(word.format(**paths) for word in words)) == 1
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert writes(hub) == []
