"""Push: what goes and what does not, and how it ends when the Hub fails."""

import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from huggingface_hub import SpaceCard
from huggingface_hub.utils import disable_progress_bars
from paths import ROOT
from tiny_models import TEXT, VISION
from transformers import AutoModel

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor, export_backbone
from modeling_vitp.hub.files import find_secret
from modeling_vitp.recipes import push_to_hub
from modeling_vitp.training.from_scratch import build_model

TOKEN = "hf_" + "x1Y2" * 9
COMMAND = "vitp push_to_hub"


@pytest.fixture(scope="session")
def trained(tokenizer, tmp_path_factory):
    """A run's output folder, which is never changed."""
    torch.manual_seed(0)
    model, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": 6})
    folder = tmp_path_factory.mktemp("outputs") / "run"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it with everything else that a run, or its user, leaves there."""
    folder = tmp_path / "run"
    for path in trained.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "metrics.json").write_text('{"seed": 0, "eval": {"eval_loss": 0.5}}')
    (folder / "checkpoint-2").mkdir()
    for name in ("optimizer.pt", "training_args.bin", "predictions.png", "train.parquet", "checkpoint-2/optimizer.pt"):
        (folder / name).write_bytes(b"private")
    return folder


@pytest.fixture
def logged_in(hub, monkeypatch):
    """The token of the user, in the environment."""
    token = hub.token()
    monkeypatch.setenv("HF_TOKEN", token)
    return token


@pytest.fixture(autouse=True)
def no_progress_bars():
    """What is read from stderr is the program's; the Trainer of other tests shows the bars again."""
    disable_progress_bars()


def run(*words) -> int:
    return push_to_hub.main(list(map(str, words)))


def in_repo(hub, *args, **kwargs) -> dict[str, bytes]:
    files = hub.files(*args, **kwargs)
    del files[".gitattributes"]
    return files


def writes(hub) -> list[str]:
    return [one.path for one in hub.requests if one.method not in ("GET", "HEAD")]


def test_what_goes_is_shown_and_a_dry_run_touches_nothing(hub, logged_in, folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    options = [folder, "tester/m", "--what", "model", "--license", "mit", "--private"]
    assert run(*options, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert writes(hub) == [] and hub.repo("tester/m") is None
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "visibility: private, new" in shown and "licence: mit" in shown and "Nothing was sent" in shown

    assert run(*options) == 0
    files = in_repo(hub, "tester/m")
    assert hub.repo("tester/m").state["private"]
    lines = [line.split() for line in shown.splitlines() if line.startswith(" ")]
    listed = {words[1]: int(words[0].replace(",", "")) for words in lines if len(words) == 2}
    assert listed == {name: len(content) for name, content in files.items()}
    assert f"{sum(listed.values()):,} bytes in {len(listed)} files" in shown
    assert "visibility: private, new" in capsys.readouterr().out
    assert run(*options, "--dry_run") == 0
    assert "visibility: private\n" in capsys.readouterr().out


def test_only_what_belongs_to_a_model_goes(hub, logged_in, folder):
    assert run(folder, "tester/m", "--what", "model") == 0
    files = in_repo(hub, "tester/m")
    wanted = "README.md chat_template.jinja config.json configuration_vitp.py generation_config.json metrics.json "
    wanted += "image_processing_vitp.py model.safetensors modeling_vitp.py processing_vitp.py processor_config.json "
    wanted += "messages.py tokenizer.json tokenizer_config.json vrl.py"
    assert set(files) == set(wanted.split())
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_backbone_is_taken_out_of_a_model_or_sent_as_it_is(hub, logged_in, folder, tmp_path):
    assert run(folder, "tester/b", "--what", "backbone") == 0
    exported = export_backbone(folder, tmp_path / "backbone")
    assert run(exported, "tester/again", "--what", "backbone") == 0
    one, two = in_repo(hub, "tester/b"), in_repo(hub, "tester/again")
    assert one["model.safetensors"] == two["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert one["config.json"] == two["config.json"] and set(one) == {*two, "metrics.json"}
    pulled = AutoModel.from_pretrained("tester/b").state_dict()
    tower = ViTPForConditionalGeneration.from_pretrained(folder).model.vision_tower.state_dict()
    assert all(torch.equal(pulled[name], tower[name]) for name in tower)
    # A model on the Hub is as good a start as a folder.
    assert run(folder, "tester/m", "--what", "model") == 0
    assert run("tester/m", "tester/third", "--what", "backbone") == 0
    assert in_repo(hub, "tester/third")["model.safetensors"] == one["model.safetensors"]


def test_branch_message_and_pull_request(hub, logged_in, folder, capsys):
    assert run(folder, "tester/m", "--what", "model", "--revision", "v2", "--commit_message", "Second") == 0
    assert "model.safetensors" not in hub.files("tester/m") and "model.safetensors" in hub.files("tester/m", "v2")
    assert hub.repo("tester/m").history("v2")[0][1]["summary"] == "Second"
    capsys.readouterr()
    assert run(folder, "tester/m", "--what", "model", "--create_pr", "--commit_message", "Please") == 0
    assert capsys.readouterr().out.strip().endswith("tester/m/discussions/1")
    assert "model.safetensors" not in hub.files("tester/m") and "model.safetensors" in hub.files(
        "tester/m", "refs/pr/1"
    )
    assert [one["title"] for one in hub.repo("tester/m").state["discussions"]] == ["Please"]
    with pytest.raises(SystemExit):
        run(folder, "tester/m", "--what", "model", "--create_pr", "--revision", "v2")


def test_a_public_repo_is_not_taken_for_a_private_one(hub, logged_in, folder, capsys):
    hub.create("tester/m")
    assert run(folder, "tester/m", "--what", "model", "--private") == 1
    assert "tester/m is there and is public" in capsys.readouterr().err and set(hub.files("tester/m")) == {
        ".gitattributes"
    }


def test_weights_of_an_earlier_push_do_not_stay(hub, logged_in, folder, capsys):
    earlier = dict.fromkeys(("model-00001-of-00002.safetensors", "notes.txt", "deep/x.safetensors"), b"old")
    hub.create("tester/m", earlier)
    assert run(folder, "tester/m", "--what", "model") == 0
    assert "deleted model-00001-of-00002.safetensors" in capsys.readouterr().out
    assert {"notes.txt", "deep/x.safetensors", "model.safetensors"} < set(hub.files("tester/m"))
    assert "model-00001-of-00002.safetensors" not in hub.files("tester/m")


def test_a_data_set_goes_whole_but_for_what_is_hidden(hub, logged_in, tmp_path, capsys):
    rows = tmp_path / "rows"
    (rows / "images").mkdir(parents=True)
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(rows / "train.parquet")
    for name in ("images/a.png", "LICENSE", ".hidden", "_cache.json"):
        (rows / name).write_bytes(b"content")
    assert run(rows, "tester/none", "--what", "dataset", "--license", "mit") == 0
    assert hub.api().dataset_info("tester/none").card_data.license == "mit"
    (rows / "README.md").write_text("---\nlicense: cc-by-4.0\nconfigs: []\n---\n# Rows\n")
    assert run(rows, "tester/rows", "--what", "dataset", "--license", "mit") == 1
    assert "cannot be pushed under mit" in capsys.readouterr().err
    assert run(rows, "tester/rows", "--what", "dataset", "--private") == 0
    files = in_repo(hub, "tester/rows", repo_type="dataset")
    assert files == {
        "README.md": (rows / "README.md").read_bytes(),
        "train.parquet": (rows / "train.parquet").read_bytes(),
        "images/a.png": b"content",
        "LICENSE": b"content",
    }
    assert hub.repo("tester/rows", "dataset").state["private"]
    assert "licence: cc-by-4.0" in capsys.readouterr().out
    (rows / "images" / ".env").write_text("")
    assert run(rows, "tester/rows", "--what", "dataset") == 1
    assert "images/.env (a file of secrets)" in capsys.readouterr().err


def test_the_demo_goes_with_the_name_of_its_model(hub, logged_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modeling_vitp.hub.contents.SPACE", tmp_path / "space")
    (tmp_path / "space" / "__pycache__").mkdir(parents=True)
    (tmp_path / "space" / "__pycache__" / "app.pyc").touch()
    (tmp_path / "space" / "app.py").write_text("import gradio")
    assert run("tester/model", "tester/demo", "--what", "space") == 1
    assert "space/ has no README.md, requirements.txt" in capsys.readouterr().err
    (tmp_path / "space" / "requirements.txt").write_text("gradio")
    (tmp_path / "space" / "README.md").write_text("---\nsdk: gradio\nlicense: apache-2.0\nmodels: [x/y]\n---\n# Demo\n")
    for _ in range(2):
        assert run("tester/model", "tester/demo", "--what", "space") == 0
    files = in_repo(hub, "tester/demo", repo_type="space")
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_vitp").rglob("*.py")}
    assert files.keys() == {"README.md", "app.py", "requirements.txt"} | package
    assert {"modeling_vitp/__init__.py", "modeling_vitp/modeling_vitp.py", "modeling_vitp/convert/export.py"} <= package
    card = SpaceCard(files["README.md"].decode())
    assert card.data.models == ["tester/model"] and card.data.sdk == "gradio" and "# Demo" in card.text
    card.validate()
    state = hub.repo("tester/demo", "space").state
    assert state["variables"] == {"VITP_MODEL": "tester/model"} and state["sdk"] == "gradio"


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


# Secrets and paths


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("training_args.bin", b"\x80\x02}X%\x00\x00\x00" + TOKEN.encode() + b"q\x01"),
        ("config.json", json.dumps({"model_type": "vitp", "hub_token": TOKEN}).encode()),
        ("run.json", b'{"hub_token": "an-older-kind-of-token"}'),
        ("notebook.ipynb", json.dumps({"cells": [{"source": [f'login(token="{TOKEN}")']}]}).encode()),
        (".env", b"PASSWORD=1234"),
        ("deep/.env.local", b""),
        ("notes.txt", b"x" * ((1 << 22) - 10) + TOKEN.encode()),
        ("key", b"-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("README.md", f"---\nlicense: mit\n---\n{TOKEN}".encode()),
    ],
)
@pytest.mark.parametrize("options", [[], ["--dry_run"]], ids=["push", "dry_run"])
def test_a_secret_stops_a_push_and_is_named_by_file(hub, logged_in, folder, capsys, caplog, name, content, options):
    caplog.set_level(logging.DEBUG)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    assert run(folder, "tester/m", "--what", "model", *options) == 1
    printed = capsys.readouterr()
    assert f"{name} (" in printed.err and printed.err.startswith("error: nothing was sent")
    assert printed.err.count("\n") == 1 and printed.out == ""
    for text in (printed.err, caplog.text):
        assert TOKEN not in text and "1234" not in text and "older-kind" not in text
    assert hub.requests == []


def test_a_file_that_is_no_safetensors_is_searched_all_the_same(tmp_path):
    path = tmp_path / "model.safetensors"
    for content, kind in (("<!DOCTYPE html>", None), ("hf_", None), (f"Bearer hf_{'a' * 34}", "a Hugging Face token")):
        path.write_text(content)
        assert find_secret(path) == kind


def test_what_looks_like_a_secret_and_is_none(folder, tmp_path):
    for number, content in enumerate(
        (b'{"hub_token": "<HUB_TOKEN>"}', b'{"hub_token": null}', b"hf_hub_download", b"")
    ):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        assert find_secret(path) is None
    assert all(find_secret(path) is None for path in folder.iterdir() if path.is_file())


@pytest.mark.slow
def test_the_token_is_sent_to_the_hub_and_stays_nowhere(hub, logged_in, folder, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path / "home", logged_in), "HF_DEBUG": "0"}
    command = [sys.executable, "recipes/push_to_hub.py", folder, "tester/m", "--what", "backbone"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert logged_in not in done.stdout + done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 20 and not any(logged_in.encode() in path.read_bytes() for path in left)


def test_absolute_paths_do_not_go(hub, logged_in, folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    changed = {
        **config,
        "_name_or_path": "/home/me/model",
        "text_config": {**config["text_config"], "_name_or_path": "/a/b"},
    }
    (folder / "config.json").write_text(json.dumps(changed))
    assert run(folder, "tester/m", "--what", "model") == 0
    assert json.loads(hub.files("tester/m")["config.json"]) == config
    assert not any(str(folder.parent).encode() in content for content in hub.files("tester/m").values())

    for path in ("/home/me/teacher", "~/my models/teacher", "file:///data/teacher", "C:\\models\\teacher"):
        (folder / "config.json").write_text(json.dumps({**config, "vision_config": {"teacher": path}}))
        assert run(folder, "tester/n", "--what", "model") == 1
        assert "config.json has an absolute path under 'vision_config.teacher'" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# M\n\nSee https://a.b/c/d and /home/me/notes.\n")
    assert run(folder, "tester/n", "--what", "model") == 1
    assert "README.md, has an absolute path, /home/me/notes. Make" in capsys.readouterr().err
    assert hub.repo("tester/n") is None


# Licence


@pytest.mark.parametrize("where", ["README.md", "run.json"])
def test_weights_keep_their_licence(hub, logged_in, folder, capsys, where):
    if where == "README.md":
        (folder / where).write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    else:
        (folder / where).write_text(json.dumps({"licences": {"some/weights": {"license": "cc-by-nc-4.0"}}}))
    for what in ("model", "backbone"):
        assert run(folder, "tester/m", "--what", what, "--license", "apache-2.0") == 1
        assert "cc-by-nc-4.0" in capsys.readouterr().err and hub.repo("tester/m") is None
    for what in ("model", "backbone"):
        assert run(folder, f"tester/{what}", "--what", what) == 0
        assert hub.api().model_info(f"tester/{what}").card_data.license == "cc-by-nc-4.0"
        assert "licence: cc-by-nc-4.0" in capsys.readouterr().out


def test_licences_of_several_sources(hub, logged_in, folder, capsys):
    def sources(*licenses):
        stated = {f"org/{number}": {"license": name} for number, name in enumerate(licenses)}
        (folder / "run.json").write_text(json.dumps({"licences": stated}))

    sources("apache-2.0", "cc-by-nc-4.0")
    assert run(folder, "tester/a", "--what", "model") == 0
    assert hub.api().model_info("tester/a").card_data.license == "cc-by-nc-4.0"
    sources("apache-2.0", "mit")
    assert run(folder, "tester/b", "--what", "model") == 1
    assert "apache-2.0 (org/0), mit (org/1). Give one: --license" in capsys.readouterr().err
    assert run(folder, "tester/b", "--what", "model", "--license", "mit") == 0
    sources("cc-by-nc-4.0", "gpl-3.0")
    assert run(folder, "tester/c", "--what", "model") == 1
    # What a user writes into the card does not change it either.
    sources("cc-by-nc-4.0")
    (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\n# A model\n")
    assert run(folder, "tester/c", "--what", "model") == 1 and hub.repo("tester/c") is None


# Mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{folder}", "a/b/c", "--what", "model"], "a/b/c"),
        (["{folder}/none", "tester/m", "--what", "model"], "neither a folder nor a Hub id"),
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
    assert run(*(word.format(folder=folder, backbone=backbone) for word in words)) == 1
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert writes(hub) == []


# Failures of the Hub

STEPS = {
    "info": ("GET", "/api/models/tester/m"),
    "card": ("POST", "/api/validate-yaml"),
    "create": ("POST", "/api/repos/create"),
    "preupload": ("POST", "*/preupload/*"),
    "batch": ("POST", "*/batch"),
    "storage": ("PUT", "/lfs/*"),
    "verify": ("POST", "*/verify"),
    "commit": ("POST", "*/commit/*"),
}


@pytest.fixture
def uninterrupted(hub, logged_in, folder):
    """The id of the commit of a push that nothing happened to, in a repo that is gone."""
    assert run(folder, "tester/m", "--what", "model") == 0
    oid = hub.repo("tester/m").history("main")[0][0]
    hub.storage.delete(hub.repo("tester/m"))
    hub.requests.clear()
    return oid


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "failure", [{"status": 503}, {"status": 429, "retry_after": 7}, {"lost": True}, {"delay": 0.3}], ids=str
)
def test_what_passes_is_tried_again(hub, uninterrupted, folder, pauses, step, failure):
    failed = hub.fail(*STEPS[step], times=2, **failure)
    assert run(folder, "tester/m", "--what", "model") == 0
    assert hub.repo("tester/m").history("main")[0][0] == uninterrupted and failed.count >= 1
    if "status" in failure:
        assert failed.count == 2 and set(pauses) == ({8} if "retry_after" in failure else {1, 2})
    if "delay" in failure:
        assert pauses == []
    elif step != "storage":
        assert len(hub.received("PUT", "/lfs/*")) == 1


def test_what_somebody_else_changes_meanwhile_is_tried_again(hub, uninterrupted, folder, pauses):
    for status in (409, 412):
        hub.fail("POST", "*/commit/*", status)
    assert run(folder, "tester/m", "--what", "model") == 0
    assert hub.repo("tester/m").history("main")[0][0] == uninterrupted and pauses == [1, 2]


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, None, "hf auth login"),
        (403, None, "may not write to tester/m"),
        (404, "RepoNotFound", "tester/m is not there"),
        (404, "RevisionNotFound", "no such revision"),
        (409, None, "somebody else is changing tester/m"),
        (429, None, "fewer requests"),
        (500, None, "out of order"),
        (None, None, "connection to the Hub failed"),
    ],
)
@pytest.mark.parametrize("step", ["preupload", "commit"])
def test_what_does_not_pass_is_said_in_one_line_with_the_command_to_go_on(
    hub, uninterrupted, folder, pauses, capsys, step, status, code, says
):
    failure = {"status": status, "code": code} if status else {"cut": 10}
    hub.fail(*STEPS[step], times=None, **failure)
    words = [str(folder), "tester/m", "--what", "model"]
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert error.endswith(f"Go on with: {shlex.join(COMMAND.split() + words)}\n")
    assert in_repo(hub, "tester/m") == {}
    hub.failures.clear()
    sent = len(hub.received("PUT", "/lfs/*"))
    assert run(*words) == 0
    assert hub.repo("tester/m").history("main")[0][0] == uninterrupted
    assert len(hub.received("PUT", "/lfs/*")) == 1 and sent == (1 if step == "commit" else 0)


def test_a_token_that_may_only_read_or_is_wrong(hub, folder, monkeypatch, capsys):
    for token, says in ((hub.token("read"), "may not write to tester/m"), ("hf_wrong", "does not accept the token")):
        monkeypatch.setenv("HF_TOKEN", token)
        assert run(folder, "tester/m", "--what", "model") == 1
        error = capsys.readouterr().err
        assert says in error and token not in error and hub.repo("tester/m") is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(folder, "tester/m", "--what", "model") == 1
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_main_is_as_it_was_when_an_update_fails(hub, logged_in, folder, pauses):
    hub.create("tester/m", {"model.safetensors": b"old", "config.json": "{}", "model-00001-of-00001.safetensors": b"o"})
    before = hub.files("tester/m")
    for step in ("preupload", "batch", "storage", "verify", "commit"):
        hub.fail(*STEPS[step], 500, times=None)
        assert run(folder, "tester/m", "--what", "model") == 1
        assert hub.files("tester/m") == before
        hub.failures.clear()
    assert run(folder, "tester/m", "--what", "model") == 0
    assert hub.files("tester/m")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_lost_answer_does_not_open_two_pull_requests(hub, logged_in, folder, pauses, capsys):
    hub.create("tester/m")
    hub.fail(*STEPS["commit"], lost=True)
    assert run(folder, "tester/m", "--what", "model", "--create_pr") == 1
    assert "If tester/m has no such pull request yet, go on with: " in capsys.readouterr().err
    assert len(hub.repo("tester/m").state["discussions"]) == 1
    hub.fail(*STEPS["commit"], 503, times=2)
    assert run(folder, "tester/m", "--what", "model", "--create_pr") == 0
    assert len(hub.repo("tester/m").state["discussions"]) == 2


@pytest.mark.slow
def test_a_killed_push_goes_on_and_ends_the_same(hub, uninterrupted, logged_in, folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes((64).to_bytes(8, "little") + b"{}".ljust(64))
    assert run(folder, "tester/whole", "--what", "model") == 0
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("model-*")))
    stuck = hub.fail("PUT", f"/lfs/*/{second}", delay=600)
    environment = {**os.environ, **hub.environment(tmp_path / "home", logged_in)}
    command = [sys.executable, "recipes/push_to_hub.py", folder, "tester/m", "--what", "model"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while stuck.count == 0 or not hub.repo("tester/m").blob(first).exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert in_repo(hub, "tester/m") == {}
    hub.requests.clear()
    assert run(folder, "tester/m", "--what", "model") == 0
    assert [one.path.split("/")[-1] for one in hub.received("PUT", "/lfs/*")] == [second]
    files, whole = in_repo(hub, "tester/m"), in_repo(hub, "tester/whole")
    assert files.pop("README.md") == whole.pop("README.md").replace(b"whole", b"m") and files == whole
