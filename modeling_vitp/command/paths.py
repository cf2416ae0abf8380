"""Paths and Hub ids in the arguments of commands, and files of the package."""

import difflib
import logging
import math
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
PATH_ARGUMENTS = {
    "model_name_or_path",
    "vision_model",
    "language_model",
    "dataset_name",
    "backbones",
    "processor",
    "model",
    "models",
    "checkpoint",
    "source",
    "teacher",
    "student",
    "start",
}
# Arguments that name a local file or folder.
LOCAL_ARGUMENTS = {"images", "root", "data_root", "split_list", "names"}
FILE_SUFFIXES = (".safetensors", ".yaml", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".tar")
SECONDS = 5  # timeout of the connection to the Hub


def check_paths(arguments: Sequence[object]) -> None:
    """Check the folders and Hub ids of a command before slow work begins.

    Raises:
        WrongPath: if a value looks like a folder that does not exist (the message names the nearest one), is the
            folder of an unfinished run, or is a file instead of a model.
        ConnectionError: if a value is a Hub id that the command opens, and the Hub does not answer.
    """
    is_dry_run = any(getattr(item, "dry_run", False) for item in arguments)
    hub_ids: list[tuple[str, str]] = []
    for item in arguments:
        output_dir = getattr(item, "output_dir", None)
        if output_dir:
            check_not_file("output_dir", output_dir)
        names = (PATH_ARGUMENTS | LOCAL_ARGUMENTS) & vars(item).keys()
        for name in sorted(names):
            for path in paths_in(getattr(item, name)):
                is_assumed = is_dry_run and name == "model_name_or_path"  # a plan assumes the shape of its model
                if is_assumed and not Path(path).exists():
                    continue
                is_opened = not is_dry_run or name == "start"  # a plan of `adapt` needs the shape of its start
                if not is_local(name, path) and is_opened:
                    hub_ids.append((name, path))
    for name, path in hub_ids:
        hint = hint_nearest(Path(path))
        if hint:
            logger.warning("%s=%r is searched on the Hub: folder not found%s", name, path, hint)
    # The environment decides, except that a program may connect its clients to another Hub.
    if is_offline() and constants.HF_HUB_OFFLINE:
        for name, path in hub_ids:
            check_cached(name, path)
    elif hub_ids:
        check_hub(hub_ids[0][1])


def paths_in(value: Any) -> list[str]:
    """Return the paths and Hub ids in the value of an argument."""
    values = value if isinstance(value, list) else [value]
    paths = []
    for path in values:
        is_json = str(path).startswith("{")  # instead of a file
        if isinstance(path, (str, Path)) and str(path) and not is_json:
            paths.append(str(path))
    return paths


def is_local(name: str, path: str) -> bool:
    """Return whether a path exists; if it does not, it may be a Hub id.

    Raises:
        WrongPath: if it exists but is not what the argument expects, or does not exist and cannot be a Hub id.
    """
    if Path(path).exists():
        if name in PATH_ARGUMENTS - {"dataset_name"}:
            check_model(name, Path(path))
        return True
    is_word = "/" not in path
    is_like_folder = name == "dataset_name" and is_word and hint_nearest(Path(path)) != ""
    if name not in LOCAL_ARGUMENTS and not is_like_folder and not looks_like_path(path):
        return False
    hint = ""
    if name in PATH_ARGUMENTS and is_word:
        hint = " The Hub is searched for NAMESPACE/NAME."
    raise WrongPath(f"{name}={not_there(path)}{hint}")


def check_cached(name: str, repo_id: str) -> None:
    """Raise [`WrongPath`] if a model is not in the cache of an offline machine."""
    folder_name = f"models--{repo_id.split('@')[0].replace('/', '--')}"
    if name != "dataset_name" and not Path(constants.HF_HUB_CACHE, folder_name).exists():
        raise WrongPath(
            f"{name}={repo_id!r}: file or folder not found, and HF_HUB_OFFLINE is set, so the Hub is not searched. "
            "Pass a folder, or unset HF_HUB_OFFLINE."
        )


def check_not_file(name: str, folder: str | Path) -> None:
    """Raise [`WrongPath`] if an output folder or one of its parents is a file."""
    for path in (Path(folder), *Path(folder).parents):
        if path.is_file():
            raise WrongPath(f"{name}={str(folder)!r}: {path} is a file. Set a folder.")


def check_model(name: str, path: Path) -> None:
    """Raise [`WrongPath`] if a model is a file, except weights as `source`, or the folder of an unfinished run."""
    problem = None
    is_weights = name == "source" and path.suffix == ".safetensors"
    if path.is_file() and not is_weights:
        problem = "is a file. Expected a folder or a Hub id (as `source` also a .safetensors file)."
    last_checkpoint = find_unfinished(path)
    if last_checkpoint is not None:
        problem = (
            "is the folder of a run that is not finished. Run its command again to resume, or use its last "
            f"checkpoint, {last_checkpoint}."
        )
    if problem is not None:
        raise WrongPath(f"{name}={str(path)!r} {problem}")


def find_unfinished(folder: Path) -> Path | None:
    """Return the last checkpoint in the folder of an unfinished run, or `None` for other paths."""
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return None
    checkpoints_by_step = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():
            checkpoints_by_step[int(step)] = path
    last_step = max(checkpoints_by_step, default=None)
    return checkpoints_by_step.get(last_step)


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
        default_port = 80 if address.scheme == "http" else 443
        port = address.port or default_port
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"for {repo_id}: {address.hostname}, {error}") from error


def not_there(path: str) -> str:
    """Return the error message for a path that is neither a file nor a folder."""
    nearest_hint = hint_nearest(Path(path))
    message = f"{path!r}: file or folder not found{nearest_hint or '.'}"
    if "," in path:
        message += " For several data sets, use the sources of a `mixture`."
    if Path(path).name == "backbone" and not nearest_hint:
        message += (
            " It is written by a pretraining. For published weights: vitp convert REPO FOLDER --file "
            "ckpts/NAME.safetensors, then --model_name_or_path FOLDER."
        )
    return message


def looks_like_path(text: str) -> bool:
    """Return whether a text cannot be a Hub id, or is one word that is similar to the name of a local folder."""
    if text.startswith((".", "/", "~")) or Path(text).suffix in FILE_SUFFIXES:
        return True
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", text)
    if not is_hub_id or text.count("/") > 1:  # several slashes are in a revision
        return True
    if "/" in text:  # ids of a family are similar: a folder of OpenGVLab/InternVL3-1B says nothing about InternVL3-2B
        return False
    return hint_nearest(Path(text), similarity=0.75) != ""


def hint_nearest(path: Path, similarity: float = 0.6) -> str:
    """Return a hint with the most similar name in the same folder, or an empty string."""
    if not path.parent.is_dir():
        return ""
    siblings = [sibling.name for sibling in path.parent.iterdir()]
    nearest_names = difflib.get_close_matches(path.name, siblings, n=1, cutoff=similarity)
    if not nearest_names:
        return ""
    nearest_path = path.parent / nearest_names[0]
    return f", did you mean {str(nearest_path)!r}?"


def expand_home(arguments: Sequence[object]) -> None:
    """Replace a leading `~` of paths in the fields of arguments by the home folder."""
    for item in arguments:
        for name, value in vars(item).items():
            expanded_value = expanded_home(value)
            if expanded_value != value:  # some objects refuse assignments
                setattr(item, name, expanded_value)


def expanded_home(value: Any) -> Any:
    """Return a value, mapping or list with the home folder in place of a leading `~`."""
    if isinstance(value, (str, Path)) and str(value).startswith("~/"):
        expanded_path = os.path.expanduser(value)
        return type(value)(expanded_path)
    if isinstance(value, dict):
        return {name: expanded_home(item) for name, item in value.items()}
    if isinstance(value, list):
        return [expanded_home(item) for item in value]
    return value


def find_config(name: str) -> Path:
    """Return the path of a configuration: an existing file, or one of the package's configurations.

    Raises:
        WrongPath: if neither exists; the message has at most three similar names.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged_configs = configs_in(packaged_recipes() / "configs")
    if path.stem in packaged_configs:
        return packaged_configs[path.stem]
    hint = "pass a YAML file, or a name of recipes/configs."
    if path.is_dir():
        hint = f"it is a folder, {hint}"
    else:
        sibling_configs = configs_in(path.parent)
        known_names = packaged_configs.keys() | sibling_configs.keys()
        similar_names = difflib.get_close_matches(path.stem, known_names, n=3, cutoff=0.6)
        if similar_names:
            suggestions = [repr(str(sibling_configs.get(similar_name, similar_name))) for similar_name in similar_names]
            hint = f"did you mean {' or '.join(suggestions)}?"
    raise WrongPath(f"configuration {name!r} not found, as a file or in the package: {hint}")


def configs_in(folder: Path) -> dict[str, Path]:
    """Return the YAML files in a folder by their names without suffix."""
    return {path.stem: path for path in folder.glob("*.yaml")}


def packaged_recipes() -> Path:
    """Return the folder of the recipes, in a clone or in the installed package."""
    return Path(str(files(RECIPES)))


def config_of_data(data: str | Path) -> Path | None:
    """Return the configuration that `data` names, or `None` if `data` is a folder or not found."""
    try:
        return None if Path(data).is_dir() else find_config(str(data))
    except WrongPath:
        return None


def find_data(name: str) -> str:
    """Return a folder or Hub id, with `recipes/…` replaced by the package's folder if it does not exist here."""
    path = Path(name)
    if path.parts[:1] != ("recipes",) or path.exists():
        return name
    packaged_path = packaged_recipes() / path.relative_to("recipes")
    return str(packaged_path) if packaged_path.exists() else name


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            is_merge = key.tag == "tag:yaml.org,2002:merge"
            if is_merge or not isinstance(key.value, str):
                continue
            if key.value in first_lines:
                raise yaml.MarkedYAMLError(
                    f"duplicate key {key.value!r}, first in line {first_lines[key.value] + 1}",
                    problem_mark=key.start_mark,
                )
            first_lines[key.value] = key.start_mark.line
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
        YAMLError: if the file is not YAML in UTF-8, or a mapping has a duplicate key; the message names the place.
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:  # YAML errors name the file by this handle
        return yaml.load(file, UniqueKeyLoader)


class Shard(NamedTuple):
    """Part `number`, from 1, of the `count` parts of a job, such as the tasks of a scheduler's array job."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `NUMBER/COUNT`. Raise a `ValueError` for invalid numbers."""
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if match is not None:
            shard = cls(number=int(match[1]), count=int(match[2]))
            if 1 <= shard.number <= shard.count:
                return shard
        raise ValueError(f"Expected a shard NUMBER/COUNT such as 1/8, got {text!r}.")

    @classmethod
    def all_of(cls, count: int) -> list["Shard"]:
        return [cls(number, count) for number in range(1, count + 1)]

    def part(self, length: int, unit: int = 1) -> range:
        """Return the shard's contiguous indices of `length`; the shards in order give all indices in order.

        Args:
            length: number of indices of all shards.
            unit: number of indices that stay in one shard, such as those of a batch.
        """
        num_units = math.ceil(length / unit)
        start = (self.number - 1) * num_units // self.count
        end = self.number * num_units // self.count
        return range(length)[start * unit : end * unit]

    def hint(self, results: str | Path) -> str:
        """Return the message of a finished shard whose results the command without a shard joins."""
        return f"Shard {self}: {results}. When all shards are finished, run the same command without --shard."

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
