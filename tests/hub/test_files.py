"""Secrets are found, and files that look like them are not."""

import json
import logging

import pytest
from pushed_runs import push

from modeling_vitp.hub.files import find_secret

TOKEN = "hf_" + "x1Y2" * 9


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
    assert push(folder, "tester/m", "--what", "model", *options) == 1
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
