"""Search for secrets, in archives and Parquet too: files with a secret, or that cannot be searched, are not sent."""

import bz2
import gzip
import io
import json
import logging
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pushed_runs import push

from modeling_vitp.hub.files import find_secret

TOKEN = "hf_" + "x1Y2" * 8 + "x1"
TEXT = b"x" * 100_000 + TOKEN.encode() + b"y" * 1000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("training_args.bin", b"\x80\x02}X%\x00\x00\x00" + TOKEN.encode() + b"q\x01"),
        ("config.json", json.dumps({"model_type": "vitp", "hub_token": TOKEN}).encode()),
        ("run.json", b'{"hub_token": "an-older-kind-of-token"}'),
        (".env", b"PASSWORD=1234"),
        ("notes.txt", b"x" * ((1 << 22) - 10) + TOKEN.encode()),
        ("key", b"-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("README.md", f"---\nlicense: mit\n---\n{TOKEN}".encode()),
    ],
)
def test_secret_stops_push_and_names_file(hub, logged_in, folder, capsys, caplog, name, content):
    caplog.set_level(logging.DEBUG)
    (folder / name).write_bytes(content)
    for options in ([], ["--dry_run"]):
        assert push(folder, "tester/m", "--what", "model", *options) == 1
        printed = capsys.readouterr()
        assert f"{name} (" in printed.err and printed.out == ""
        for text in (printed.err, caplog.text):
            assert TOKEN not in text and "1234" not in text and "older-kind" not in text
    assert hub.requests == []


def test_false_safetensors_file_is_searched(tmp_path):
    path = tmp_path / "model.safetensors"
    for content, kind in (("<!DOCTYPE html>", None), ("hf_", None), (f"Bearer hf_{'a' * 34}", "a Hugging Face token")):
        path.write_text(content)
        assert find_secret(path) == kind


def test_similar_strings_are_not_secrets(folder, tmp_path):
    for number, content in enumerate(
        (b'{"hub_token": "<HUB_TOKEN>"}', b'{"hub_token": null}', b"hf_hub_download", b"")
    ):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        assert find_secret(path) is None
    assert all(find_secret(path) is None for path in folder.iterdir() if path.is_file())


def zipped(content, name="notes.txt"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def tarred(content, name="notes.txt", mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


PACKERS = {
    "zip": zipped,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "tgz": lambda content: tarred(content, mode="w:gz"),
    "tar": tarred,
}


@pytest.mark.parametrize("kind", PACKERS)
def test_token_inside_an_archive_is_found(tmp_path, kind):
    for name in (f"a.{kind}", "data.bin"):
        (tmp_path / name).write_bytes(PACKERS[kind](TEXT))
        assert find_secret(tmp_path / name).startswith("a Hugging Face token")
        assert find_secret(name, PACKERS[kind](TEXT)).startswith("a Hugging Face token")
        (tmp_path / name).write_bytes(PACKERS[kind](TEXT.replace(TOKEN.encode(), b"")))
        assert find_secret(tmp_path / name) is None


ROW = {
    "text": lambda text: text,
    "bytes": lambda text: text.encode(),
    "messages": lambda text: [{"role": "user", "content": text}],
    "image": lambda text: {"bytes": text.encode(), "path": None},
    "pairs": lambda text: [[text]],
}


@pytest.mark.parametrize("compression", ["gzip", "none"])
@pytest.mark.parametrize("column", ROW)
def test_token_in_parquet_is_found(tmp_path, column, compression):
    texts = ["You are an assistant. " * 50] * 3000
    for secret in ("", TOKEN):
        texts[1234] = f"I use {secret}, do not tell."
        table = pa.table({"number": range(3000), column: [ROW[column](text) for text in texts]})
        pq.write_table(table, tmp_path / "a.parquet", compression=compression, write_statistics=False)
        found = find_secret(tmp_path / "a.parquet")
        assert found.startswith("a Hugging Face token") if secret else found is None
    if compression == "gzip":  # the content is not readable without decompression
        assert TOKEN.encode() not in (tmp_path / "a.parquet").read_bytes()
        assert found == "a Hugging Face token inside"


def test_damaged_parquet_is_not_sent(tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    assert find_secret(tmp_path / "a.parquet").startswith("an archive that cannot be searched: ")


def test_file_of_secrets_in_an_archive_is_found(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(b"PASSWORD=1", "deep/.env"))
    assert find_secret(tmp_path / "a.zip") == "a file of secrets inside, in .env"


@pytest.mark.parametrize("kind", ["cut", "7z", "zst"])
def test_unsearchable_archive_is_not_sent(tmp_path, kind):
    content = {
        "cut": zipped(TEXT)[:-30],
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(100),
        "zst": b"\x28\xb5\x2f\xfd" + bytes(100),
    }[kind]
    (tmp_path / "a.bin").write_bytes(content)
    assert find_secret(tmp_path / "a.bin").startswith("an archive that cannot be searched: ")
