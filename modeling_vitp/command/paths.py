"""Folders, files and Hub ids that commands are given, and the files of the package that they read."""

import difflib
import os
import re
import socket
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import yaml

from .errors import WrongPath, is_offline

PACKAGE = Path(__file__).parents[1]
# The Gradio app lies in the package where that is installed, and beside it in a clone.
SPACE = PACKAGE / "space" if (PACKAGE / "space").is_dir() else PACKAGE.parent / "space"
RECIPES = "modeling_vitp.recipes"
# Arguments that name a folder or a Hub id.
PATH_ARGUMENTS = {"model_name_or_path", "vision_model", "language_model", "dataset_name", "backbones", "processor"}
PATH_ARGUMENTS |= {"model", "checkpoint", "source"}
FILE_SUFFIXES = (".safetensors", ".yaml", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".tar")
SECONDS = 5  # that the Hub may take to answer


def check_paths(arguments: Sequence[object]) -> None:
    """Check the folders and Hub ids of a command before anything slow is done with them.

    Raises:
        WrongPath: if a value looks like a folder that does not exist, with the nearest one, or is the folder of a run
            that has not finished.
        ConnectionError: if a value is a Hub id, the command is not a dry run, and the Hub does not answer.
    """
    ids = []
    for item in arguments:
        for name in sorted(PATH_ARGUMENTS & vars(item).keys()):
            value = getattr(item, name)
            for path in value if isinstance(value, list) else [value]:
                if not isinstance(path, str):
                    continue
                if Path(path).exists():
                    if name != "dataset_name":
                        check_finished(name, Path(path))
                elif looks_like_path(path) or (name == "dataset_name" and hint_nearest(Path(path))):
                    raise WrongPath(f"{name}={not_there(path)}")
                else:
                    ids.append(path)
    if ids and not any(getattr(item, "dry_run", False) for item in arguments):
        check_hub(ids[0])


def check_finished(name: str, folder: Path) -> None:
    """Raise [`WrongPath`] if a folder has checkpoints of a run and no model yet."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    if checkpoints and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        last = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        raise WrongPath(
            f"{name}={str(folder)!r}: the run in it has not finished. Give the command that started it again to go on; "
            f"its last checkpoint is {last}."
        )


def check_new(target: str | Path) -> None:
    """Raise a `ValueError` if the folder that a command is to write exists and is not empty."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: give a new folder.")


def check_hub(repo_id: str) -> None:
    """Raise a `ConnectionError` if the Hub does not answer, which its clients find out after minutes only.

    Behind a proxy, or with `HF_HUB_OFFLINE`, nothing is checked.
    """
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if is_offline() or address.scheme in getproxies():
        return
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"for {repo_id}: {address.hostname}, {error}") from error


def not_there(path: str) -> str:
    """Return the message about a path that is neither a file nor a folder."""
    several = " Several data sets are the sources of a `mixture`." if "," in path else ""
    return f"{path!r}: there is no such file or folder{hint_nearest(Path(path)) or '.'}{several}"


def looks_like_path(text: str) -> bool:
    """Return whether a text cannot be the Hub id of a model or data set, or is nearly the name of a folder here."""
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/") or "," in text
    return is_path or Path(text).suffix in FILE_SUFFIXES or ("/" in text and hint_nearest(Path(text)) != "")


def hint_nearest(path: Path) -> str:
    """Return a hint that names the entry of the same folder with the nearest name, or an empty text."""
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, siblings, 1, 0.6)
    return f", did you mean {str(path.parent / found[0])!r}?" if found else ""


def expand_home(arguments: Sequence[object]) -> None:
    """Replace the `~` that paths in the fields of arguments begin with by the home folder."""
    for item in arguments:
        for name, value in vars(item).items():
            if (expanded := expanded_home(value)) != value:
                setattr(item, name, expanded)


def expanded_home(value: Any) -> Any:
    """Return a value, or what is in a mapping or list, with the home folder in place of `~`."""
    if isinstance(value, (str, Path)):
        return type(value)(os.path.expanduser(value)) if str(value).startswith("~/") else value
    if isinstance(value, dict):
        return {name: expanded_home(part) for name, part in value.items()}
    return [expanded_home(part) for part in value] if isinstance(value, list) else value


def find_config(name: str) -> Path:
    """Return the configuration of that name: a file, or else one of those that come with the package.

    Raises:
        WrongPath: if neither exists; names the nearest ones, at most three.
    """
    if Path(name).is_file():
        return Path(name)
    configs = {path.stem: path for path in Path(str(files(RECIPES))).joinpath("configs").glob("*.yaml")}
    stem = Path(name).stem
    if stem in configs:
        return configs[stem]
    near = {path.stem: str(path) for path in Path(name).parent.glob("*.yaml")}
    matches = difflib.get_close_matches(stem, {*configs, *near}, 3, 0.6)
    found = " or ".join(repr(near.get(match, match)) for match in matches)
    hint = f"did you mean {found}?" if found else "give a YAML file, or a name of recipes/configs."
    raise WrongPath(f"there is no configuration {name!r}, as a file or in the package: {hint}")


def find_task(name: str) -> str:
    """Return the module of a task in `recipes/tasks`.

    Raises:
        ValueError: if the task does not exist; lists those that do.
    """
    tasks = [path.name for path in Path(str(files(RECIPES)), "tasks").iterdir() if (path / "__init__.py").is_file()]
    if name not in tasks:
        raise ValueError(f"there is no task {name!r} in recipes/tasks, only {', '.join(sorted(tasks))}.")
    return f"{RECIPES}.tasks.{name}"


def find_data(name: str) -> str:
    """Return a folder or Hub id as it is; for `recipes/…` without such a folder here, the folder in the package."""
    packaged = Path(str(files(RECIPES))).joinpath(*Path(name).parts[1:])
    is_packaged = Path(name).parts[:1] == ("recipes",) and not Path(name).exists() and packaged.exists()
    return str(packaged) if is_packaged else name


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, of which its parent takes the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key.value, str):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    f"the key {key.value!r} is there already, in line {seen[key.value] + 1}",
                    problem_mark=key.start_mark,
                )
            seen[key.value] = key.start_mark.line
        return node


def read_yaml(path: str | Path) -> Any:
    """Read a configuration or a mixture.

    Raises:
        YAMLError: if the file is not YAML, or a mapping in it has a key twice; names the line.
        OSError: if the file cannot be read.
    """
    with open(path, encoding="utf-8") as file:  # errors name the file by this
        return yaml.load(file, UniqueKeyLoader)


class Shard(NamedTuple):
    """Part `number`, counted from 1, of the `count` parts of a job, such as the tasks of a scheduler's array."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `NUMBER/COUNT`. Raises a `ValueError` if there is no such part."""
        found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"{text!r} is no shard: of eight they are 1/8, 2/8 … 8/8.")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def all_of(cls, count: int) -> list["Shard"]:
        return [cls(number, count) for number in range(1, count + 1)]

    def part(self, length: int) -> range:
        """Return its indices of `length`: contiguous, so that all shards in their order give all indices in order."""
        return range((self.number - 1) * length // self.count, self.number * length // self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
