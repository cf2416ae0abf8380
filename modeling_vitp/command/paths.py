"""Paths and Hub ids in the arguments of commands, and files of the package."""

import difflib
import logging
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
from huggingface_hub import constants

from .errors import WrongPath, is_offline

logger = logging.getLogger(__name__)
PACKAGE = Path(__file__).parents[1]
# The Gradio app is in the installed package, but beside the package in a clone.
SPACE = PACKAGE / "space" if (PACKAGE / "space").is_dir() else PACKAGE.parent / "space"
RECIPES = "modeling_vitp.recipes"
# Arguments that name a folder or a Hub id.
PATH_ARGUMENTS = {"model_name_or_path", "vision_model", "language_model", "dataset_name", "backbones", "processor"}
PATH_ARGUMENTS |= {"model", "models", "checkpoint", "source", "teacher", "student", "start"}
# Arguments that name a local file or folder.
LOCAL_ARGUMENTS = {"images", "root", "data_root", "probe_root", "split_list", "names"}
FILE_SUFFIXES = (".safetensors", ".yaml", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".tar")
SECONDS = 5  # timeout of the connection to the Hub


def check_paths(arguments: Sequence[object]) -> None:
    """Check the folders and Hub ids of a command before slow work begins.

    Raises:
        WrongPath: if a value looks like a folder that does not exist (the message names the nearest one), is the
            folder of an unfinished run, or is a file instead of a model.
        ConnectionError: if a value is a Hub id that the command opens, and the Hub does not answer.
    """
    ids, is_dry_run = [], any(getattr(item, "dry_run", False) for item in arguments)
    for item in arguments:
        if getattr(item, "output_dir", None):
            check_not_file("output_dir", item.output_dir)
        for name in sorted((PATH_ARGUMENTS | LOCAL_ARGUMENTS) & vars(item).keys()):
            value = getattr(item, name)
            for path in value if isinstance(value, list) else [value]:
                if not isinstance(path, (str, Path)) or not str(path):
                    continue
                if Path(path).exists():
                    if name in PATH_ARGUMENTS - {"dataset_name"}:
                        check_finished(name, Path(path))
                        check_folder(name, Path(path))
                elif name in LOCAL_ARGUMENTS:
                    raise WrongPath(f"{name}={not_there(str(path))}")
                elif is_dry_run and name == "model_name_or_path":
                    continue  # the estimate assumes its shape
                elif looks_like_path(path) or (name == "dataset_name" and "/" not in path and hint_nearest(Path(path))):
                    more = "" if "/" in path else " The Hub is searched for NAMESPACE/NAME."
                    raise WrongPath(f"{name}={not_there(path)}{more}")
                elif not is_dry_run or name == "start":  # whose shape a plan of `adapt` needs
                    if hint := hint_nearest(Path(path)):
                        logger.warning("%s=%r is searched on the Hub: folder not found%s", name, path, hint)
                    ids.append((name, path))
    if ids:
        # The environment decides, except that a program may connect its clients to another Hub.
        for name, path in ids if is_offline() and constants.HF_HUB_OFFLINE else ():
            cached = Path(constants.HF_HUB_CACHE, f"models--{path.split('@')[0].replace('/', '--')}")
            if name != "dataset_name" and not cached.exists():
                raise WrongPath(
                    f"{name}={path!r}: file or folder not found, and HF_HUB_OFFLINE is set, so the Hub is not "
                    "searched. Pass a folder, or unset HF_HUB_OFFLINE."
                )
        check_hub(ids[0][1])


def check_folder(name: str, path: Path) -> None:
    """Raise [`WrongPath`] if a model is a file; only `source` may be a file, with weights."""
    if path.is_file() and not (name == "source" and path.suffix == ".safetensors"):
        expected = "a folder, a Hub id or a .safetensors file" if name == "source" else "a folder or a Hub id"
        raise WrongPath(f"{name}={str(path)!r} is a file. Expected {expected}.")


def check_not_file(name: str, folder: str | Path) -> None:
    """Raise [`WrongPath`] if an output folder or one of its parents is a file."""
    for path in (Path(folder), *Path(folder).parents):
        if path.is_file():
            raise WrongPath(f"{name}={str(folder)!r}: {path} is a file. Set a folder.")


def check_finished(name: str, folder: Path) -> None:
    """Raise [`WrongPath`] if a folder has checkpoints of a run but no model yet."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    if checkpoints and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        last = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        raise WrongPath(
            f"{name}={str(folder)!r}: the run in this folder is not finished. Run its command again to resume, or use "
            f"its last checkpoint, {last}."
        )


def check_new(target: str | Path) -> None:
    """Raise a `ValueError` if the output folder of a command exists and is not empty."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} already exists. Pass a new folder.")


def check_hub(repo_id: str) -> None:
    """Raise a `ConnectionError` if the Hub does not answer, which its clients report only after minutes.

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
    """Return the error message for a path that is neither a file nor a folder."""
    more = " For several data sets, use the sources of a `mixture`." if "," in path else ""
    nearest = hint_nearest(Path(path))
    if Path(path).name == "backbone" and not nearest:
        more += (
            " It is written by a pretraining. For published weights: vitp convert REPO FOLDER --file "
            "ckpts/NAME.safetensors, then --model_name_or_path FOLDER."
        )
    return f"{path!r}: file or folder not found{nearest or '.'}{more}"


def looks_like_path(text: str) -> bool:
    """Return whether a text cannot be a Hub id, or is one word that is similar to the name of a local folder."""
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/") or "," in text
    is_path |= Path(text).suffix in FILE_SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", text)
    # The ids of a family are similar: a folder OpenGVLab/InternVL3-1B says nothing about OpenGVLab/InternVL3-2B.
    return is_path or ("/" not in text and hint_nearest(Path(text), 0.75) != "")


def hint_nearest(path: Path, similarity: float = 0.6) -> str:
    """Return a hint with the most similar name in the same folder, or an empty string."""
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    found = difflib.get_close_matches(path.name, siblings, 1, similarity)
    return f", did you mean {str(path.parent / found[0])!r}?" if found else ""


def expand_home(arguments: Sequence[object]) -> None:
    """Replace a leading `~` of paths in the fields of arguments by the home folder."""
    for item in arguments:
        for name, value in vars(item).items():
            if (expanded := expanded_home(value)) != value:
                setattr(item, name, expanded)


def expanded_home(value: Any) -> Any:
    """Return a value, mapping or list with the home folder in place of a leading `~`."""
    if isinstance(value, (str, Path)):
        return type(value)(os.path.expanduser(value)) if str(value).startswith("~/") else value
    if isinstance(value, dict):
        return {name: expanded_home(part) for name, part in value.items()}
    return [expanded_home(part) for part in value] if isinstance(value, list) else value


def find_config(name: str) -> Path:
    """Return the path of a configuration: an existing file, or one of the package's configurations.

    Raises:
        WrongPath: if neither exists; the message has at most three similar names.
    """
    if Path(name).is_file():
        return Path(name)
    configs = {path.stem: path for path in Path(str(files(RECIPES))).joinpath("configs").glob("*.yaml")}
    stem = Path(name).stem
    if stem in configs:
        return configs[stem]
    if Path(name).is_dir():
        raise WrongPath(f"Expected a YAML file or a name of recipes/configs, got the folder {name!r}.")
    near = {path.stem: str(path) for path in Path(name).parent.glob("*.yaml")}
    matches = difflib.get_close_matches(stem, {*configs, *near}, 3, 0.6)
    found = " or ".join(repr(near.get(match, match)) for match in matches)
    hint = f"did you mean {found}?" if found else "pass a YAML file, or a name of recipes/configs."
    raise WrongPath(f"configuration {name!r} not found, as a file or in the package: {hint}")


def config_of_data(data: str | Path) -> Path | None:
    """Return the configuration that `data` names, or `None` if `data` is a folder or not found."""
    try:
        return None if Path(data).is_dir() else find_config(str(data))
    except WrongPath:
        return None


def find_data(name: str) -> str:
    """Return a folder or Hub id, with `recipes/…` replaced by the package's folder if it does not exist here."""
    packaged = Path(str(files(RECIPES))).joinpath(*Path(name).parts[1:])
    is_packaged = Path(name).parts[:1] == ("recipes",) and not Path(name).exists() and packaged.exists()
    return str(packaged) if is_packaged else name


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key.value, str):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    f"duplicate key {key.value!r}, first in line {seen[key.value] + 1}",
                    problem_mark=key.start_mark,
                )
            seen[key.value] = key.start_mark.line
        return node


def read_section(name: str, key: str) -> dict:
    """Return a mapping of the configuration `name`; raise a `ValueError` if it has no such mapping."""
    fields = read_yaml(find_config(name))
    if not isinstance(fields, dict) or not isinstance(fields.get(key), dict):
        raise ValueError(f"Expected a configuration with a mapping `{key}`, got {name!r}.")
    return fields[key]


def read_yaml(path: str | Path) -> Any:
    """Read a configuration or a mixture.

    Raises:
        YAMLError: if the file is not YAML, or a mapping has a duplicate key; the message names the line.
        ValueError: if the file is not text in UTF-8.
        OSError: if the file cannot be read.
    """
    with open(path, encoding="utf-8") as file:  # YAML errors name the file by this handle
        try:
            return yaml.load(file, UniqueKeyLoader)
        except UnicodeDecodeError as error:
            raise ValueError(f"Expected {path} to be a YAML file, encoded in UTF-8. Found: {error}.") from error


class Shard(NamedTuple):
    """Part `number`, from 1, of the `count` parts of a job, such as the tasks of a scheduler's array job."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `NUMBER/COUNT`. Raise a `ValueError` for invalid numbers."""
        found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"Expected a shard NUMBER/COUNT such as 1/8, got {text!r}.")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def all_of(cls, count: int) -> list["Shard"]:
        return [cls(number, count) for number in range(1, count + 1)]

    def part(self, length: int) -> range:
        """Return the shard's contiguous indices of `length`; the shards in order give all indices in order."""
        return range((self.number - 1) * length // self.count, self.number * length // self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
