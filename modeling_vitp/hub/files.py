"""Selection of the files of a folder for the Hub, and search for secrets in them, in archives and Parquet too."""

import bz2
import gzip
import io
import lzma
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

# Files of a model's folder that are uploaded, without subfolders. All other files of a run stay: optimizer states,
# training arguments, pictures of the data, submissions.
MODEL_FILES = (
    "config.json generation_config.json adapter_config.json *.safetensors *.safetensors.index.json tokenizer.json "
    "tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "chat_template.jinja preprocessor_config.json processor_config.json video_preprocessor_config.json "
    "README.md LICENSE* LICENCE* NOTICE* metrics.json loss.png"
).split()
PACKAGE = Path(__file__).parents[1]
# Code that is saved with a model: the top level of the package.
MODEL_FILES += sorted({path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"})
SECRET_FILES = ".env .env.* *.env .netrc .git-credentials .pypirc *.pem id_rsa* id_ed25519* stored_tokens".split()
SECRET_FILE = "a file of secrets"
# Kind of the secret, a byte string that it always contains, and its pattern.
SECRETS = (
    ("a Hugging Face token", b"hf_", rb"hf_[A-Za-z0-9]{34}"),
    ("a Hugging Face token", b"api_org_", rb"api_org_[A-Za-z0-9]{34}"),
    ("a token", b"token", rb'"(?:hub|hf|push_to_hub|access|auth)_?token\\*"\s*:\s*\\*"[^"<\\]'),
    ("a GitHub token", b"gh", rb"gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22}"),
    ("an API key", b"sk-", rb"(?<![\w-])sk-[\w-]{32}"),
    ("an API key", b"AKIA", rb"(?<![A-Za-z0-9+/])AKIA[0-9A-Z]{16}(?![A-Za-z0-9+/])"),
    ("a private key", b"PRIVATE KEY-----", rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
)
LONGEST_HEADER = 100_000_000  # maximum bytes of a safetensors header
CHUNK = 1 << 22  # bytes
OVERLAP = 1 << 10
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
UNSUPPORTED = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # 7z, RAR, zstd, LZ4
ZIP = b"PK\x03\x04"
PARQUET = b"PAR1"
TAR = b"ustar"
TAR_OFFSET = 257
ROWS = 100  # of Parquet in one batch


def model_files(folder: str | Path) -> dict[str, Path]:
    """Return the files of a model's folder that belong to the model, by name."""
    paths = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and matches_any(path.name, MODEL_FILES):
            paths[path.name] = path
    return paths


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def all_files(folder: str | Path) -> dict[str, Path]:
    """Return the files in a folder by relative path, except git's and Python's caches and a run's checkpoints."""
    paths = {}
    for path in sorted(Path(folder).rglob("*")):
        relative_path = path.relative_to(folder)
        is_cached = not {".git", "__pycache__", ".cache"}.isdisjoint(relative_path.parts)
        folders = relative_path.parts[:-1]
        is_in_checkpoint = any(name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") for name in folders)
        if path.is_file() and not is_cached and not is_in_checkpoint:
            paths[relative_path.as_posix()] = path
    return paths


def check_no_secrets(folder: str | Path) -> None:
    """Raise a `ValueError` that names each file with a secret, but not the secret itself."""
    files_with_secrets = []
    for name, path in all_files(folder).items():
        kind = find_secret(path)
        if kind is not None:
            files_with_secrets.append(f"{name} ({kind})")
    if files_with_secrets:
        raise ValueError(
            f"Nothing was sent: {folder} has secrets in {', '.join(files_with_secrets)}. Remove them, and revoke those "
            "that others may have seen."
        )


def find_secret(path: str | Path, content: bytes | None = None) -> str | None:
    """Return the kind of secret in a file, or `None`. Only the header of safetensors files is read.

    Archives, compressed files (zip, tar, gzip, bzip2, xz) and Parquet are searched, regardless of their name; archives
    in archives are not unpacked. A file that cannot be searched (encrypted, damaged, of another format) counts as a
    secret.

    Args:
        path: path of the file, whose name is checked too.
        content: content to search instead of the file's.
    """
    if is_secret_name(str(path)):
        return SECRET_FILE
    is_safetensors = Path(path).suffix == ".safetensors"
    with io.BytesIO(content) if content is not None else Path(path).open("rb") as file:
        chunks = [read_safetensors_header(file)] if is_safetensors else overlapping_chunks(file)
        for chunk in chunks:
            kind = secret_in(chunk)
            if kind is not None:
                return kind
        return None if is_safetensors else find_packed_secret(file)


def find_packed_secret(file: BinaryIO) -> str | None:
    """Return the kind of secret inside a compressed file, or `None`; also `None` for other files."""
    if read_start(file).startswith(UNSUPPORTED):
        return "an archive that cannot be searched: its format is not supported"
    try:
        for name, chunk in unpack_file(file):
            kind = SECRET_FILE if is_secret_name(name) else secret_in(chunk)
            if kind is not None:
                return f"{kind} inside, in {Path(name).name}" if name else f"{kind} inside"
    except Exception as error:  # several types: damaged, encrypted, unknown method
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"an archive that cannot be searched: {reason}"
    return None


def is_secret_name(path: str) -> bool:
    return matches_any(Path(path).name, SECRET_FILES)


def secret_in(content: bytes) -> str | None:
    """Return the kind of the first secret in a content, or `None`."""
    for kind, marker, pattern in SECRETS:
        # Most contents lack the marker, which is found faster than a pattern.
        if marker in content and re.search(pattern, content):
            return kind
    return None


def read_safetensors_header(file: BinaryIO) -> bytes:
    """Return the header of a safetensors file."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    return start + file.read(min(length, LONGEST_HEADER))


def overlapping_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the content in chunks that overlap, so that a secret across a border is found."""
    tail = b""
    while chunk := file.read(CHUNK):
        yield tail + chunk
        tail = chunk[-OVERLAP:]


def unpack_file(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield name and content, in chunks, of the members of a compressed file; nothing for other files."""
    start = read_start(file)
    if start.startswith(ZIP):
        yield from zip_members(file)
    elif start.startswith(PARQUET):
        for values in parquet_values(file):
            yield "", values
    elif start[TAR_OFFSET:] == TAR:
        yield from tar_members(file)
    for magic, open_compressed in COMPRESSED.items():
        if start.startswith(magic):
            with open_compressed(file) as content:
                if read_start(content)[TAR_OFFSET:] == TAR:
                    yield from tar_members(content)
                else:
                    for chunk in overlapping_chunks(content):
                        yield "", chunk


def read_start(file: BinaryIO) -> bytes:
    """Return the bytes that show the format of a file, which is then at its beginning again."""
    file.seek(0)
    start = file.read(TAR_OFFSET + len(TAR))
    file.seek(0)
    return start


def zip_members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            yield member.filename, member.comment
            with archive.open(member) as content:
                for chunk in overlapping_chunks(content):
                    yield member.filename, chunk


def tar_members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            yield member.name, b""
            if member.isfile():
                for chunk in overlapping_chunks(archive.extractfile(member)):
                    yield member.name, chunk


def parquet_values(file: BinaryIO) -> Iterator[bytes]:
    """Yield the strings and bytes of a Parquet file, without duplicates within a column of a batch."""
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(file).iter_batches(ROWS):
        for column in batch.columns:
            for texts in strings_in(column):
                yield b"\n".join(texts)


def strings_in(array) -> Iterator[list[bytes]]:
    """Yield the distinct values of each array of strings or bytes in an Arrow array."""
    from pyarrow import BaseExtensionType, large_binary, types

    array_type = array.type
    is_list = types.is_list(array_type) or types.is_large_list(array_type) or types.is_fixed_size_list(array_type)
    is_text = types.is_string(array_type) or types.is_large_string(array_type)
    is_bytes = types.is_binary(array_type) or types.is_large_binary(array_type)
    if isinstance(array_type, BaseExtensionType):
        yield from strings_in(array.storage)
    elif types.is_dictionary(array_type):
        yield from strings_in(array.dictionary)
    elif types.is_struct(array_type):
        for index in range(array_type.num_fields):
            yield from strings_in(array.field(index))
    elif types.is_map(array_type):
        yield from strings_in(array.keys)
        yield from strings_in(array.items)
    elif is_list:
        yield from strings_in(array.values)
    elif is_text or is_bytes:
        distinct_texts = array.drop_null().unique()
        yield distinct_texts.cast(large_binary()).to_pylist()
