"""Failures of the Hub, on a server that fails on demand."""

import hashlib
import os
import shlex
import subprocess
import sys
import time

import pytest
from paths import ROOT
from pushed_runs import in_repo, push

COMMAND = "vitp push_to_hub"
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
    """Commit id of a push without failures, whose repo is deleted again."""
    assert push(folder, "tester/m", "--what", "model") == 0
    oid = hub.repo("tester/m").history("main")[0][0]
    del hub.repos["models", "tester/m"]
    hub.requests.clear()
    return oid


FAILURES = [{"status": 503}, {"status": 429, "retry_after": 7}, {"lost": True}]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_transient_failure_is_retried(hub, uninterrupted, folder, pauses, step, failure):
    failed = hub.fail(*STEPS[step], times=2, **failure)
    assert push(folder, "tester/m", "--what", "model") == 0
    assert hub.repo("tester/m").history("main")[0][0] == uninterrupted and failed.count >= 1
    if "status" in failure:
        assert failed.count == 2 and set(pauses) == ({8} if "retry_after" in failure else {1, 2})
    if step != "storage":
        assert len(hub.received("PUT", "/lfs/*")) == 1


def test_concurrent_commit_is_retried(hub, uninterrupted, folder, pauses):
    for status in (409, 412):
        hub.fail("POST", "*/commit/*", status)
    assert push(folder, "tester/m", "--what", "model") == 0
    assert hub.repo("tester/m").history("main")[0][0] == uninterrupted and pauses == [1, 2]


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, None, "hf auth login"),
        (404, "RepoNotFound", "refuses tester/m (404"),
        (429, None, "wait a few minutes"),
        (503, None, "not available (503)"),
        (None, None, "connection to the Hub failed"),
    ],
)
@pytest.mark.parametrize("step", ["preupload", "commit"])
def test_lasting_failure_is_explained_in_one_line(hub, uninterrupted, folder, pauses, capsys, step, status, code, says):
    failure = {"status": status, "code": code} if status else {"cut": 10}
    hub.fail(*STEPS[step], times=None, **failure)
    words = [str(folder), "tester/m", "--what", "model"]
    assert push(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert error.endswith(f"Go on with: {shlex.join(COMMAND.split() + words)}\n")
    assert in_repo(hub, "tester/m") == {}
    hub.failures.clear()
    sent = len(hub.received("PUT", "/lfs/*"))
    assert push(*words) == 0
    assert hub.repo("tester/m").history("main")[0][0] == uninterrupted
    assert len(hub.received("PUT", "/lfs/*")) == 1 and sent == (1 if step == "commit" else 0)


def test_gated_checkpoint_needs_no_write_access(hub, logged_in, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.create("org/gated", {"config.json": "{}"})
    hub.fail("*", "*config.json", 403, code="GatedRepo", times=None)
    assert push("org/gated", "tester/m", "--what", "backbone") == 1
    error = capsys.readouterr().err
    assert "org/gated" in error and "write access" not in error


def test_missing_access_is_explained(hub, folder, monkeypatch, capsys):
    for token, says in ((hub.token("read"), "write access"), ("hf_wrong", "hf auth login")):
        monkeypatch.setenv("HF_TOKEN", token)
        assert push(folder, "tester/m", "--what", "model") == 1
        error = capsys.readouterr().err
        assert says in error and token not in error and hub.repo("tester/m") is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert push(folder, "tester/m", "--what", "model") == 1
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_failed_update_leaves_main_unchanged(hub, logged_in, folder, pauses):
    hub.create("tester/m", {"model.safetensors": b"old", "config.json": "{}", "model-00001-of-00001.safetensors": b"o"})
    before = hub.files("tester/m")
    for step in ("preupload", "batch", "storage", "verify", "commit"):
        hub.fail(*STEPS[step], 500, times=None)
        assert push(folder, "tester/m", "--what", "model") == 1
        assert hub.files("tester/m") == before
        hub.failures.clear()
    assert push(folder, "tester/m", "--what", "model") == 0
    assert hub.files("tester/m")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_lost_answer_opens_no_second_pull_request(hub, logged_in, folder, pauses, capsys):
    hub.create("tester/m")
    hub.fail(*STEPS["commit"], lost=True)
    assert push(folder, "tester/m", "--what", "model", "--create_pr") == 1
    assert "If tester/m has no such pull request yet, go on with: " in capsys.readouterr().err
    assert len(hub.repo("tester/m").state["discussions"]) == 1
    hub.fail(*STEPS["commit"], 503, times=2)
    assert push(folder, "tester/m", "--what", "model", "--create_pr") == 0
    assert len(hub.repo("tester/m").state["discussions"]) == 2


@pytest.mark.slow
def test_killed_push_is_resumed(hub, uninterrupted, logged_in, folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes((64).to_bytes(8, "little") + b"{}".ljust(64))
    assert push(folder, "tester/whole", "--what", "model") == 0
    first, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("model-*")))
    stuck = hub.fail("PUT", f"/lfs/*/{second}", delay=600)
    environment = {**os.environ, **hub.environment(tmp_path / "home", logged_in)}
    command = [sys.executable, "recipes/push_to_hub.py", folder, "tester/m", "--what", "model"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while stuck.count == 0 or first not in hub.repo("tester/m").blobs:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert in_repo(hub, "tester/m") == {}
    hub.requests.clear()
    assert push(folder, "tester/m", "--what", "model") == 0
    assert [one.path.split("/")[-1] for one in hub.received("PUT", "/lfs/*")] == [second]
    files, whole = in_repo(hub, "tester/m"), in_repo(hub, "tester/whole")
    assert files.pop("README.md") == whole.pop("README.md").replace(b"whole", b"m") and files == whole


def test_long_wait_is_limited(hub, uninterrupted, folder, pauses, caplog):
    hub.fail(*STEPS["info"], status=429, retry_after=99999, times=1)
    assert push(folder, "tester/m", "--what", "model") == 0
    assert pauses == [300]
    assert "asks to wait for 99999 s" in caplog.text
