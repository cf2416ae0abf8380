"""Arguments that name a folder or a Hub id, looked at before anything that takes long is done with them."""

import difflib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from .errors import WrongPlace, is_offline

PLACES = {"model_name_or_path", "vision_model", "language_model", "dataset_name", "backbones", "processor", "model"}
PLACES |= {"checkpoint", "source"}
SECONDS = 5  # that the Hub may take to answer


def check_places(arguments: Sequence[object]) -> None:
    """Looks at what the arguments of a command are to be read from; not at the Hub where nothing will be.

    Raises:
        WrongPlace: if one looks like a folder that is not there, of which it names the nearest, or has a run that has
            not finished.
        ConnectionError: if one is a Hub id, and the Hub does not answer.
    """
    ids = []
    for item in arguments:
        for name in sorted(PLACES & vars(item).keys()):
            value = getattr(item, name)
            for place in value if isinstance(value, list) else [value]:
                if not isinstance(place, str) or Path(place).exists():
                    if isinstance(place, str) and name != "dataset_name":
                        check_finished(name, Path(place))
                    continue
                if looks_like_path(place) or (name == "dataset_name" and nearest(Path(place))):
                    raise WrongPlace(f"{name}={not_there(place)}")
                ids.append(place)
    if ids and not any(getattr(item, "dry_run", False) for item in arguments):
        check_hub(ids[0])


def expand_home(arguments: Sequence[object]) -> None:
    """Puts the home folder in place of the `~` that a file or folder begins with, also in mappings and lists."""
    for item in arguments:
        for name, value in vars(item).items():
            if (expanded := expanded_home(value)) != value:
                setattr(item, name, expanded)


def expanded_home(value: Any) -> Any:
    if isinstance(value, (str, Path)):
        return type(value)(os.path.expanduser(value)) if str(value).startswith("~/") else value
    if isinstance(value, dict):
        return {name: expanded_home(part) for name, part in value.items()}
    return [expanded_home(part) for part in value] if isinstance(value, list) else value


def check_finished(name: str, folder: Path) -> None:
    """Raises [`WrongPlace`] if a folder has checkpoints of a run, and not yet its model."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    if checkpoints and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        last = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        raise WrongPlace(
            f"{name}={str(folder)!r}: the run in it has not finished. The command that started it goes on with it; its "
            f"last checkpoint is {last}."
        )


def not_there(place: str) -> str:
    """What is said of a place that is neither a file nor a folder."""
    several = " Several data sets are the sources of a `mixture`." if "," in place else ""
    return f"{place!r}: there is no such file or folder{nearest(Path(place)) or '.'}{several}"


def check_new(target: str | Path) -> None:
    """Raises a `ValueError` if a folder that a command is to write is there, with something in it."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: give a new folder.")


def looks_like_path(place: str) -> bool:
    """Whether a word can be no id of a model or a data set on the Hub, or is nearly that of a folder here."""
    is_nearly = "/" in place and nearest(Path(place)) != ""
    is_file = Path(place).suffix in (".safetensors", ".yaml", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".tar")
    is_path = place.startswith((".", "/", "~")) or place.count("/") > 1 or place.endswith("/")
    return is_path or is_nearly or is_file or "," in place


def nearest(path: Path) -> str:
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, siblings, 1, 0.6)
    return f", did you mean {str(path.parent / found[0])!r}?" if found else ""


def check_hub(place: str) -> None:
    """The Hub's clients try for minutes. Behind a proxy nothing is known, and offline they say so at once."""
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if is_offline() or address.scheme in getproxies():
        return
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"for {place}: {address.hostname}, {error}") from error
