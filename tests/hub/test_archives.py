"""Secrets are found inside of archives, and archives that cannot be looked into are not sent."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pushed_runs import push

from modeling_vitp.hub import files
from modeling_vitp.hub.files import find_secret

TOKEN = b"hf_" + b"x1Y2" * 8 + b"x1"
TEXT = b"x" * 100_000 + TOKEN + b"y" * 1000


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
    "zip in tgz": lambda content: tarred(zipped(content), mode="w:gz"),
    "gz in zip": lambda content: zipped(gzip.compress(content)),
}


@pytest.mark.parametrize("kind", PACKERS)
def test_a_token_inside_of_an_archive_is_found_whatever_its_name(tmp_path, kind):
    for name in (f"a.{kind}", "data.bin"):
        (tmp_path / name).write_bytes(PACKERS[kind](TEXT))
        assert find_secret(tmp_path / name).startswith("a Hugging Face token")
        assert find_secret(name, PACKERS[kind](TEXT)).startswith("a Hugging Face token")
        (tmp_path / name).write_bytes(PACKERS[kind](TEXT.replace(TOKEN, b"")))
        assert find_secret(tmp_path / name) is None


ROW = {
    "text": lambda text: text,
    "bytes": lambda text: text.encode(),
    "messages": lambda text: [{"role": "user", "content": text}],
    "image": lambda text: {"bytes": text.encode(), "path": None},
    "pairs": lambda text: [[text]],
}


@pytest.mark.parametrize("compression", ["gzip", "zstd", "snappy", "none"])
@pytest.mark.parametrize("column", ROW)
def test_a_token_in_a_page_of_parquet_is_found_and_images_and_repeated_texts_are_none(tmp_path, column, compression):
    texts = ["You are an assistant. " * 50] * 3000
    for secret in ("", TOKEN.decode()):
        texts[1234] = f"I use {secret}, do not tell."
        table = pa.table({"number": range(3000), column: [ROW[column](text) for text in texts]})
        pq.write_table(table, tmp_path / "a.parquet", compression=compression, write_statistics=False)
        found = find_secret(tmp_path / "a.parquet")
        assert found.startswith("a Hugging Face token") if secret else found is None
    if compression == "gzip":  # of which nothing is as it was
        assert TOKEN not in (tmp_path / "a.parquet").read_bytes()
        assert found == "a Hugging Face token inside"


def test_parquet_that_cannot_be_read_is_not_sent(tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    assert find_secret(tmp_path / "a.parquet").startswith("an archive that cannot be searched: ")


def test_a_file_of_secrets_is_known_by_its_name_in_an_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(b"PASSWORD=1", "deep/.env"))
    assert find_secret(tmp_path / "a.zip") == "a file of secrets inside, in .env"


@pytest.mark.parametrize("kind", ["cut", "7z", "zst", "bomb", "deep"])
def test_what_cannot_be_looked_into_is_not_sent(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "MIN_LIMIT", 1 << 20)
    deep = TEXT
    for _ in range(6):
        deep = zipped(deep)
    content = {
        "cut": zipped(TEXT)[:-30],
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(100),
        "zst": b"\x28\xb5\x2f\xfd" + bytes(100),
        "bomb": gzip.compress(bytes(1 << 26)),
        "deep": deep,
    }[kind]
    (tmp_path / "a.bin").write_bytes(content)
    assert find_secret(tmp_path / "a.bin").startswith("an archive that cannot be searched: ")


def test_a_push_with_a_token_in_an_archive_is_refused(hub, logged_in, folder, capsys):
    (folder / "logs.tgz").write_bytes(PACKERS["tgz"](TEXT))
    assert push(folder, "tester/m", "--what", "model") == 1
    assert "logs.tgz (a Hugging Face token inside, in notes.txt)" in capsys.readouterr().err
    assert hub.requests == []
