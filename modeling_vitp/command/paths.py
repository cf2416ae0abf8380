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
        if getattr(item, "output_dir", None):
            check_not_file("output_dir", item.output_dir)
        for name in sorted((PATH_ARGUMENTS | LOCAL_ARGUMENTS) & vars(item).keys()):
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
    return [str(path) for path in values if isinstance(path, (str, Path)) and str(path)]


def is_local(name: str, path: str) -> bool:
    """Return whether a path exists; if it does not, it may be a Hub id.

    Raises:
        WrongPath: if it exists but is not what the argument expects, or does not exist and cannot be a Hub id.
    """
    if Path(path).exists():
        if name in PATH_ARGUMENTS - {"dataset_name"}:
            check_finished(name, Path(path))
            check_folder(name, Path(path))
        return True
    if name in LOCAL_ARGUMENTS:
        raise WrongPath(f"{name}={not_there(path)}")
    is_like_folder = name == "dataset_name" and "/" not in path and hint_nearest(Path(path)) != ""
    if looks_like_path(path) or is_like_folder:
        hint = "" if "/" in path else " The Hub is searched for NAMESPACE/NAME."
        raise WrongPath(f"{name}={not_there(path)}{hint}")
    return False


def check_cached(name: str, repo_id: str) -> None:
    """Raise [`WrongPath`] if a model is not in the cache of an offline machine."""
    folder_name = f"models--{repo_id.split('@')[0].replace('/', '--')}"
    if name != "dataset_name" and not Path(constants.HF_HUB_CACHE, folder_name).exists():
        raise WrongPath(
            f"{name}={repo_id!r}: file or folder not found, and HF_HUB_OFFLINE is set, so the Hub is not searched. "
            "Pass a folder, or unset HF_HUB_OFFLINE."
        )


def check_folder(name: str, path: Path) -> None:
    """Raise [`WrongPath`] if a model is a file; only `source` may be a file, with weights."""
    takes_weights = name == "source"
    is_weights = path.suffix == ".safetensors"
    if path.is_file() and not (takes_weights and is_weights):
        expected = "a folder, a Hub id or a .safetensors file" if takes_weights else "a folder or a Hub id"
        raise WrongPath(f"{name}={str(path)!r} is a file. Expected {expected}.")


def check_not_file(name: str, folder: str | Path) -> None:
    """Raise [`WrongPath`] if an output folder or one of its parents is a file."""
    for path in (Path(folder), *Path(folder).parents):
        if path.is_file():
            raise WrongPath(f"{name}={str(folder)!r}: {path} is a file. Set a folder.")


def check_finished(name: str, folder: Path) -> None:
    """Raise [`WrongPath`] if a folder has checkpoints of a run but no model yet."""
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return
    checkpoints_by_step = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():
            checkpoints_by_step[int(step)] = path
    if checkpoints_by_step:
        last_checkpoint = checkpoints_by_step[max(checkpoints_by_step)]
        raise WrongPath(
            f"{name}={str(folder)!r}: the run in this folder is not finished. Run its command again to resume, or use "
            f"its last checkpoint, {last_checkpoint}."
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
    # The ids of a family are similar: a folder OpenGVLab/InternVL3-1B says nothing about OpenGVLab/InternVL3-2B.
    return "/" not in text and hint_nearest(Path(text), similarity=0.75) != ""


def hint_nearest(path: Path, similarity: float = 0.6) -> str:
    """Return a hint with the most similar name in the same folder, or an empty string."""
    if not path.parent.is_dir():
        return ""
    siblings = [sibling.name for sibling in path.parent.iterdir()]
    nearest_names = difflib.get_close_matches(path.name, siblings, n=1, cutoff=similarity)
    if not nearest_names:
        return ""
    return f", did you mean {str(path.parent / nearest_names[0])!r}?"


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
        return type(value)(os.path.expanduser(value))
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
    if Path(name).is_file():
        return Path(name)
    packaged_configs = {path.stem: path for path in (packaged_recipes() / "configs").glob("*.yaml")}
    stem = Path(name).stem
    if stem in packaged_configs:
        return packaged_configs[stem]
    if Path(name).is_dir():
        raise WrongPath(f"Expected a YAML file or a name of recipes/configs, got the folder {name!r}.")
    sibling_configs = {path.stem: str(path) for path in Path(name).parent.glob("*.yaml")}
    known_names = {*packaged_configs, *sibling_configs}
    similar_names = difflib.get_close_matches(stem, known_names, n=3, cutoff=0.6)
    hint = "pass a YAML file, or a name of recipes/configs."
    if similar_names:
        suggestions = [repr(sibling_configs.get(similar_name, similar_name)) for similar_name in similar_names]
        hint = f"did you mean {' or '.join(suggestions)}?"
    raise WrongPath(f"configuration {name!r} not found, as a file or in the package: {hint}")


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
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if match is not None:
            shard = cls(number=int(match[1]), count=int(match[2]))
            if 1 <= shard.number <= shard.count:
                return shard
        raise ValueError(f"Expected a shard NUMBER/COUNT such as 1/8, got {text!r}.")

    @classmethod
    def all_of(cls, count: int) -> list["Shard"]:
        return [cls(number, count) for number in range(1, count + 1)]

    def part(self, length: int) -> range:
        """Return the shard's contiguous indices of `length`; the shards in order give all indices in order."""
        start = (self.number - 1) * length // self.count
        end = self.number * length // self.count
        return range(start, end)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
