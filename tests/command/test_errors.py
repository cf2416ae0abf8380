"""Errors of the Hub and of missing packages, each explained in one line."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import hf_hub_download
from paths import ROOT

import modeling_vitp
from modeling_vitp import ViTPProcessor
from modeling_vitp.cards import record
from modeling_vitp.command.errors import WrongPath, explain_error, nearest_name, run_program, write_log
from modeling_vitp.command.paths import check_paths, expand_home, looks_like_path, read_yaml


class Given:
    def __init__(self, place, **more):
        self.model_name_or_path = place
        vars(self).update(more)


def told(action):
    with pytest.raises(Exception) as caught:
        action()
    what, remedy, status = explain_error(caught.value)
    return " ".join(f"{what} {remedy}".split()), status


def test_wrong_id_is_named(hub, logged_in):
    wrong = told(lambda: hf_hub_download("org/nothing", "config.json"))
    assert wrong[1] == 2 and "org/nothing" in wrong[0]
    opened = told(lambda: ViTPProcessor.from_pretrained("org/nothing"))
    assert opened[1] == 2 and "org/nothing" in opened[0]


def test_silent_hub_is_reported_quickly(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    line, status = told(lambda: check_paths([Given("org/model")]))
    assert status == 1 and "the Hub cannot be reached (for org/model: 127.0.0.1" in line and "HF_HUB_OFFLINE=1" in line
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_paths([Given("org/model", dry_run=True), Given(None)])
    with pytest.raises(WrongPath, match="model_name_or_path='gpt2'.*HF_HUB_OFFLINE"):
        check_paths([Given("gpt2")])


@pytest.mark.parametrize("place", ["./a", "/a/b", "~/a", "a/b/c", "a/", "weights.safetensors"])
def test_path_is_not_treated_as_hub_id(place):
    assert looks_like_path(place) and not looks_like_path("org/model-1.5@v1") and not looks_like_path("gpt2")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ImportError("FlashAttention2 is not installed."), 1),
        (PackageNotFoundError("deepspeed"), 1),
        (RuntimeError("Expected one of cpu, cuda device type at start of device string: gpu"), 2),
        (AssertionError("Torch not compiled with CUDA enabled"), 2),
        (KeyError("The `metric_for_best_model` training argument is set to 'eval_x', which is not found"), 2),
    ],
)
def test_missing_package_or_device_needs_no_traceback(error, status):
    what, remedy, found = explain_error(error)
    assert error.args[0] in what and found == status and "traceback" not in str(remedy)


def test_old_versions_are_refused_at_import(monkeypatch):
    modeling_vitp._check_versions()
    with monkeypatch.context() as patch:
        patch.setattr(modeling_vitp.importlib.metadata, "version", lambda name: "4.57.1")
        with pytest.raises(ImportError, match=r"transformers 5\.20 .*4\.57\.1"):
            modeling_vitp._check_versions()
    monkeypatch.setattr(modeling_vitp.sys, "version_info", (3, 10, 14))
    with pytest.raises(ImportError, match=r"Python 3\.11"):
        modeling_vitp._check_versions()


def test_newer_releases_are_named_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(record, "version", lambda name: f"{record.NEWEST_TESTED.get(name, '1.0')}.9")
    record.warn_about_newer_releases()
    assert not caplog.records
    monkeypatch.setattr(record, "version", lambda name: "5.99.0")
    record.warn_about_newer_releases()
    (line,) = caplog.messages
    for name, newest in record.NEWEST_TESTED.items():
        assert f"{name} 5.99.0" in line and newest in line


def test_readme_has_the_newest_tested_releases():
    for release in record.NEWEST_TESTED.values():
        assert f" to {release}" in (ROOT / "README.md").read_text()


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    given = Given("~/model")
    given.data, given.target, given.other = {"root": "~/data", "splits": ["~/a", 3]}, Path("~/out"), "a~/b"
    expand_home([given])
    check_paths([given])
    assert given.model_name_or_path == str(tmp_path / "model") and given.target == tmp_path / "out"
    assert given.data == {"root": f"{tmp_path}/data", "splits": [f"{tmp_path}/a", 3]} and given.other == "a~/b"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("freeze_vision", "freeze"),
        ("freeze_language_model", "freeze"),
        ("unfreeze_vision_layer", "unfreeze_vision_layers"),
        ("data_rot", "data_root"),
        ("data_root_folder", "data_root"),
        ("data_folder", "data"),
        ("output", "output_dir"),
        ("wavelength", None),
    ],
)
def test_unknown_name_suggests_the_nearest(name, nearest):
    known = ["language_model", "unfreeze_vision_layers", "freeze", "data", "data_root", "output_dir"]
    assert nearest_name(name, known) == nearest


def test_duplicate_yaml_key_is_named(tmp_path):
    """YAML parsers take the last of duplicate keys."""
    file = tmp_path / "a.yaml"
    file.write_text("max_steps: 2\ndata: &data\n  root: x\n  splits: {a: b}\nmore:\n  <<: *data\n  root: y\n")
    assert read_yaml(file)["more"] == {"root": "y", "splits": {"a": "b"}}
    file.write_text("deep:\n  a: &a {x: 1}\n  b: &b\n    <<: *a\n    x: 2\ntop:\n  <<: *b\n  y: 3\n")
    assert read_yaml(file) == yaml.safe_load(file.read_text())
    file.write_text("a: 1\ndata:\n  root: x\n  kind: z\n  root: y\n")
    with pytest.raises(yaml.YAMLError, match=r"duplicate key 'root', first in line 3") as caught:
        read_yaml(file)
    assert "a.yaml" in str(caught.value) and "line 5" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "place", "nearest"),
    [
        ("model_name_or_path", "my_rum", "my_run"),
        ("dataset_name", "lava", "llava"),
        ("dataset_name", "llava,sharegpt", "sharegpt"),
    ],
)
def test_mistyped_path_names_the_nearest(tmp_path, monkeypatch, name, place, nearest):
    for folder in ("my_run", "llava", "sharegpt"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modeling_vitp.command.paths.check_hub", lambda place: pytest.fail(f"asked for {place}"))
    line, status = told(lambda: check_paths([SimpleNamespace(**{name: place})]))
    assert status == 2 and f"{place!r}: file or folder not found, did you mean '{nearest}'?" in line
    assert ("`mixture`" in line) == ("," in place)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("x"), 2), (FileNotFoundError(2, "gone", "a"), 2), (KeyError("x"), 1), (OSError(28, "full"), 1)],
)
def test_status_distinguishes_mistake_and_failure(error, status, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["vitp probe"])

    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        run_program(fail)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == status and ("(traceback: " in line) == (status == 1)
    logs = [log.read_text() for log in tmp_path.glob("vitp/error-*.log")]
    assert len(logs) == (status == 1) and all(type(error).__name__ in log for log in logs)


def test_log_has_no_token_and_one_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    secret, other = "hf_" + 34 * "x", "hf_" + 34 * "y"
    monkeypatch.setattr(sys, "argv", ["vitp pretrain", "--hub_token", "private", "--push_to_hub_token=own", secret])
    log = write_log(KeyError(other))
    log.chmod(0o644)
    assert write_log(KeyError(other)).stat().st_mode & 0o777 == 0o600
    assert not any(word in log.read_text() for word in ("private", "=own", secret, other))


def test_unfinished_run_is_refused(tmp_path):
    run = tmp_path / "run"
    for step in (8, 12):
        (run / f"checkpoint-{step}").mkdir(parents=True)
    what, status = told(lambda: check_paths([Given(str(run))]))
    assert "not finished" in what and status == 2
    assert what.removesuffix(" None").endswith("run/checkpoint-12.")
    check_paths([Given(str(run / "checkpoint-12"))])
    for name in ("config.json", "adapter_config.json"):
        (run / name).touch()
        check_paths([Given(str(run))])
        (run / name).unlink()
