"""Files of a model, from a local folder or from the Hub."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checking import FILES, UnavailableModel, most_bytes
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id


@contextmanager
def fetched(name: str, source: str | None, max_gb: float, config_only: bool = False) -> Iterator[Path]:
    """Provide the folder of a model.

    Args:
        name: name of the model in the page.
        source: folder or Hub id of a model that the app was started with; `None` for a model that a visitor named. The
            latter must be public and limited in size, and its files are deleted after the block.
        max_gb: largest weights of a visitor's model, in GB.
        config_only: whether only the configuration is needed.

    Raises:
        UnavailableModel: if the model is not found or too large.
    """
    if source is not None and Path(source).is_dir():
        yield Path(source)
        return
    if source is not None:
        patterns = ["*.json"] if config_only else ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.py"]
        yield Path(snapshot_download(source, allow_patterns=patterns))
        return
    files, revision = files_of(name)
    wanted = [
        file for file in files if FILES.fullmatch(file) and not (config_only and not file.endswith("config.json"))
    ]
    gigabytes = sum(size for file, size in files.items() if file.endswith(".safetensors")) / 1e9
    if not 0 < gigabytes <= max_gb:
        raise UnavailableModel(
            f"{name} has {gigabytes:.1f} GB of safetensors, expected more than 0 and up to {max_gb:g}."
        )
    for file in wanted:
        most = most_bytes(file)
        if most is not None and files[file] > most:
            raise UnavailableModel(f"{name}: {file} is larger than {most / 1e6:g} MB.")
    with tempfile.TemporaryDirectory(prefix="visitor") as folder:
        for file in wanted:
            hf_hub_download(name, file, revision=revision, local_dir=folder, token=False, etag_timeout=10)
        yield Path(folder)


def files_of(name: str) -> tuple[dict[str, int], str | None]:
    """Return the file sizes of a public model, in bytes, and its commit. Names are Hub ids, never folders."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UnavailableModel(f"Expected a Hub id such as 'organization/model', got {name[:100]!r}.") from error
    if Path(name).exists():
        raise UnavailableModel(f"{name} is a folder. Only folders that the app was started with can be opened.")
    try:
        info = HfApi(token=False).model_info(name, files_metadata=True, timeout=10)
    except Exception as error:  # The HTTP library, and so its errors, differ between versions of the client.
        raise UnavailableModel(f"No public model {name!r} found on the Hub, or the Hub cannot be reached.") from error
    return {file.rfilename: file.size or 0 for file in info.siblings}, info.sha
