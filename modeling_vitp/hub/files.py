"""What of a folder goes to the Hub, and what must never go."""

import io
import re
import struct
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .archives import Unsearchable, pieces, unpacked

# Of a model's folder, without its subfolders. Whatever else a run leaves there stays: optimiser states, training
# arguments, pictures of the data, submissions.
MODEL_FILES = (
    "config.json generation_config.json adapter_config.json *.safetensors *.safetensors.index.json tokenizer.json "
    "tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "chat_template.jinja preprocessor_config.json processor_config.json video_preprocessor_config.json "
    "README.md LICENSE* LICENCE* NOTICE* metrics.json loss.png"
).split()
PACKAGE = Path(__file__).parents[1]
# Code that travels with a model lies flat in the package.
MODEL_FILES += sorted({path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"})
SECRET_FILES = ".env .env.* *.env .netrc .git-credentials .pypirc *.pem id_rsa* id_ed25519* stored_tokens".split()
# What it is, bytes that it cannot be without, and its form.
SECRETS = (
    ("a Hugging Face token", b"hf_", rb"hf_[A-Za-z0-9]{34}"),
    ("a Hugging Face token", b"api_org_", rb"api_org_[A-Za-z0-9]{34}"),
    ("a token", b"token", rb'"(?:hub|hf|push_to_hub|access|auth)_?token\\*"\s*:\s*\\*"[^"<\\]'),
    ("a GitHub token", b"gh", rb"gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22}"),
    ("an API key", b"sk-", rb"(?<![\w-])sk-[\w-]{32}"),
    ("an API key", b"AKIA", rb"(?<![A-Za-z0-9+/])AKIA[0-9A-Z]{16}(?![A-Za-z0-9+/])"),
    ("a private key", b"PRIVATE KEY-----", rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
)
LONGEST_HEADER = 100_000_000  # of a safetensors file; what claims a longer one is none


def model_files(folder: str | Path) -> dict[str, Path]:
    """The files of a model's folder that belong to the model, by name."""
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return {path.name: path for path in paths if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES)}


def all_files(folder: str | Path) -> dict[str, Path]:
    """Every file in a folder by its path there, but for git's, Python's caches and the checkpoints of a run."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        parts = path.relative_to(folder).parts
        skipped = {".git", "__pycache__", ".cache"}.intersection(parts) or any(
            part.startswith(f"{PREFIX_CHECKPOINT_DIR}-") for part in parts[:-1]
        )
        if path.is_file() and not skipped:
            found["/".join(parts)] = path
    return found


def find_secret(path: str | Path, content: bytes | None = None) -> str | None:
    """What kind of secret a file holds, `None` if it has none. Of safetensors the header is read.

    Archives, compressed files (zip, tar, gzip, bzip2, xz) and Parquet are looked into, whatever their name; one that
    cannot be (encrypted, broken, of another kind) counts as a secret.

    Args:
        path: the file; its name counts too.
        content: its content, if that is not the file's.
    """
    if is_secret_name(str(path)):
        return "a file of secrets"
    for chunk in [content] if content is not None else read_chunks(Path(path)):
        if kind := secret_in(chunk):
            return kind
    if Path(path).suffix == ".safetensors":
        return None
    with io.BytesIO(content) if content is not None else Path(path).open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            for name, chunk in unpacked(file, size):
                if kind := "a file of secrets" if is_secret_name(name) else secret_in(chunk):
                    return f"{kind} inside, in {Path(name).name}" if name else f"{kind} inside"
        except Unsearchable as error:
            return f"an archive that cannot be searched: {error}"
    return None


def is_secret_name(path: str) -> bool:
    return any(fnmatch(Path(path).name, pattern) for pattern in SECRET_FILES)


def secret_in(content: bytes) -> str | None:
    return next((kind for kind, marker, form in SECRETS if marker in content and re.search(form, content)), None)


def read_chunks(path: Path) -> Iterable[bytes]:
    """The content as it lies in the file, see [`pieces`]."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            yield start + file.read(min(length, LONGEST_HEADER))
            return
        yield from pieces(file)


def check_no_secrets(folder: str | Path) -> None:
    """Raises a `ValueError` that names each file of a folder that has a secret in it, and never what it is."""
    found = {name: find_secret(path) for name, path in all_files(folder).items()}
    named = [f"{name} ({kind})" for name, kind in found.items() if kind is not None]
    if named:
        raise ValueError(
            f"nothing was sent, because there are secrets in {folder}: {', '.join(named)}. Take them out, and revoke "
            "what others may have seen."
        )
