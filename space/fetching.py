"""The files of a model: in the folder that the app was started with, or from the Hub."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checking import FILES, UnavailableModel, most_bytes
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id


@contextmanager
def fetched(name: str, place: str | None, max_gb: float, config_only: bool = False) -> Iterator[Path]:
    """The folder of a model.

    Args:
        name: as visitors see it.
        place: where it is, a folder or a Hub id, if the app was started with it; `None` for one that a visitor named.
            That is a public model on the Hub, and its files, which are limited in size, are gone after the block.
        config_only: whether only its configuration is needed.

    Raises:
        UnavailableModel: if there is no such model, or it is too large.
    """
    if place is not None and Path(place).is_dir():
        yield Path(place)
        return
    if place is not None:
        patterns = ["*.json"] if config_only else ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.py"]
        yield Path(snapshot_download(place, allow_patterns=patterns))
        return
    files, revision = files_of(name)
    wanted = [
        file for file in files if FILES.fullmatch(file) and not (config_only and not file.endswith("config.json"))
    ]
    gigabytes = sum(size for file, size in files.items() if file.endswith(".safetensors")) / 1e9
    if not 0 < gigabytes <= max_gb:
        raise UnavailableModel(f"{name} has {gigabytes:.1f} GB of safetensors; up to {max_gb:g} GB are opened.")
    for file in wanted:
        most = most_bytes(file)
        if most is not None and files[file] > most:
            raise UnavailableModel(f"{name}: {file} has more than {most / 1e6:g} MB.")
    with tempfile.TemporaryDirectory(prefix="visitor") as folder:
        for file in wanted:
            hf_hub_download(name, file, revision=revision, local_dir=folder, token=False, etag_timeout=10)
        yield Path(folder)


def files_of(name: str) -> tuple[dict[str, int], str | None]:
    """The sizes of the files of a public model, in bytes, and its commit. Names are Hub ids, never folders."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UnavailableModel(f"{name[:100]!r} is no Hub id such as 'organisation/model'.") from error
    if Path(name).exists():
        raise UnavailableModel(f"{name} is a folder; folders are opened only if the app was started with them.")
    try:
        info = HfApi(token=False).model_info(name, files_metadata=True, timeout=10)
    except Exception as error:  # of the client and of the HTTP library below it, which changes with its versions
        raise UnavailableModel(f"there is no public model {name!r} on the Hub, or it cannot be reached.") from error
    return {file.rfilename: file.size or 0 for file in info.siblings}, info.sha
