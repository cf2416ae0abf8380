"""Arguments of the recipes: from a YAML file and the command line, with errors before anything heavy is imported."""

import argparse
import ast
import difflib
import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..command import errors
from ..command.errors import WrongArguments, WrongPlace, program
from ..command.places import check_places, expand_home
from ..command.yaml_files import read_yaml
from . import threads  # noqa: F401
from .allocator import keep_freed_memory

RECIPES = "modeling_vitp.recipes"
OWN_ARGUMENTS = {  # command -> the module of its arguments
    "vitp pretrain": "modeling_vitp.training.arguments",
    "vitp finetune_classification": "modeling_vitp.classification.arguments",
    "vitp finetune_segmentation": "modeling_vitp.dense.arguments",
    "vitp finetune_detection": "modeling_vitp.detection.arguments",
    "vitp probe": "modeling_vitp.probing.arguments",
}


def find_config(name: str) -> Path:
    """The configuration of that name: a file, or where there is none one of those that come with the package.

    Raises:
        WrongPlace: names the nearest, three at most, if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    configs = {path.stem: path for path in Path(str(files(RECIPES))).joinpath("configs").glob("*.yaml")}
    stem = Path(name).stem
    if stem in configs:
        return configs[stem]
    near = {path.stem: str(path) for path in Path(name).parent.glob("*.yaml")}
    nearest = difflib.get_close_matches(stem, {*configs, *near}, 3, 0.6)
    found = " or ".join(repr(near.get(one, one)) for one in nearest)
    hint = f"did you mean {found}?" if found else "give a YAML file, or a name of recipes/configs."
    raise WrongPlace(f"there is no configuration {name!r}, as a file or in the package: {hint}")


def find_task(name: str) -> str:
    """The module of a task. Raises a `ValueError` that names those there are if it is none of them."""
    tasks = [path.name for path in Path(str(files(RECIPES)), "tasks").iterdir() if (path / "__init__.py").is_file()]
    if name not in tasks:
        raise ValueError(f"there is no task {name!r} in recipes/tasks, only {', '.join(sorted(tasks))}.")
    return f"{RECIPES}.tasks.{name}"


def find_data(name: str) -> str:
    """A folder or Hub id as it is; for `recipes/…`, where there is no such folder here, the one in the package."""
    packaged = Path(str(files(RECIPES))).joinpath(*Path(name).parts[1:])
    is_packaged = Path(name).parts[:1] == ("recipes",) and not Path(name).exists() and packaged.exists()
    return str(packaged) if is_packaged else name


def parse(
    argv: Sequence[str] | None,
    description: str,
    own: Sequence[type],
    whole: Sequence[str] = (),
    inherited: Sequence[str] = (),
) -> tuple[Any, ...]:
    """The arguments of a recipe, one instance of each class.

    `--help`, a mistake in the recipe's own arguments and a mistyped name need only `own`; all else is imported after.

    Args:
        argv: words of the command line; those of the process if `None`.
        description: the recipe's docstring.
        own: argument classes of the recipe, which cost little to import.
        whole: the classes to parse into, as `module.Class`, where those in `own` are only a part of them.
        inherited: modules whose classes have the other fields. They are read and not imported.

    Raises:
        WrongArguments: if an option is not known, or a class refuses its fields.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    epilog = "--config NAME gives all of these in a YAML file: one of yours, or of the package by its name."
    if whole:
        epilog += " --help_all shows those of the libraries, too: --output_dir, --max_steps, --learning_rate …"
    texts = {"description": description, "epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}
    texts["prog"] = program()
    parser = TrlParser(own, allow_abbrev=False, **texts)
    parser.error = errors.refuse
    if {"-h", "--help"} & set(words):
        parser.print_help()
        sys.exit(0)
    if "--help_all" in words:
        TrlParser([load(name) for name in whole] or own, **texts).print_help()
        sys.exit(0)
    options = "--help_all" if whole else "--help"
    try:
        words = with_config(words)
        *parsed, in_file, in_words = parser.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
        if in_words and not in_words[0].startswith("--"):
            raise ValueError(f"what is {in_words[0]!r}? Options begin with --, and their values follow.")
        check_names([*in_file, *in_words], [item.name for dataclass in own for item in fields(dataclass)], inherited)
        expand_home(parsed)
        check_places(parsed)
        if whole:
            parser = TrlParser([load(name) for name in whole], **texts)
            parser.error = errors.refuse
            parsed = parser.parse_args_and_config(words)
            expand_home(parsed)
            check_output(parsed)
            find_checkpoint(parsed)
    except ConnectionError:
        raise
    except (OSError, yaml.YAMLError) as error:
        raise WrongPlace(" ".join(str(error).split())) from error
    except WrongArguments as error:
        error.options = options
        raise
    except ValueError as error:
        raise WrongArguments(" ".join(str(error).split()), options) from error
    register_models()
    return tuple(parsed)


def check_output(parsed: Sequence[Any]) -> None:
    """Raises a `ValueError` if a run that trains was given no folder, for which transformers has put in one of its own,
    or one where a file is.
    """
    folders = [getattr(settings, "output_dir", None) for settings in parsed]
    if "trainer_output" in folders and not getattr(parsed[0], "dry_run", False):
        raise ValueError(
            "output_dir is missing: give the folder that the run is written to, --output_dir outputs/NAME."
        )
    for folder in filter(None, folders):
        files = [path for path in (Path(folder), *Path(folder).parents) if path.is_file()]
        if files:
            raise ValueError(
                f"output_dir={folder!r}: {files[0]} is a file: give the folder that the run is written to."
            )


def find_checkpoint(parsed: Sequence[Any]) -> None:
    """Puts the last checkpoint of output_dir in place of `resume_from_checkpoint: true`.

    Raises:
        ValueError: if there is none.
    """
    for settings in parsed:
        wanted = str(getattr(settings, "resume_from_checkpoint", None)).lower()
        if wanted in ("true", "false"):
            from .checkpointing import last_checkpoint

            last = last_checkpoint(settings.output_dir) if wanted == "true" else None
            if wanted == "true" and last is None:
                raise ValueError(
                    f"resume_from_checkpoint: there is no complete checkpoint in {settings.output_dir}. Leave the "
                    "option out: a run goes on by itself where there is one."
                )
            settings.resume_from_checkpoint = last


def load_plugins(paths: Sequence[str]) -> None:
    """Run Python files that register decode heads. Each file runs once in a process.

    Raises:
        ValueError: if a file is not found, or fails.
    """
    for path in paths:
        file = Path(path).expanduser().resolve()
        name = f"vitp_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
        if name in sys.modules:
            continue
        if not file.is_file():
            raise ValueError(f"plugins: {path} is not a file. Give Python files that register heads.")
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except Exception as error:  # whatever the user's file raises
            del sys.modules[name]
            raise ValueError(f"plugins: {path} failed: {type(error).__name__}: {error}") from error


def parse_words(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a recipe that takes words and no configuration."""
    parser.prog, parser.error = program(), errors.refuse
    args = parser.parse_args(argv)
    expand_home([args])
    check_places([args])
    register_models()
    return args


def register_models() -> None:
    """Makes the models known to transformers' Auto classes, which a command leaves until its arguments are right."""
    from .. import auto  # noqa: F401


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a recipe as a program, see [`~modeling_vitp.command.errors.run`]; its progress is logged."""
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("training", "classification", "dense", "detection", "evaluation", "recipes"):
        logging.getLogger(f"modeling_vitp.{name}").setLevel(logging.INFO)
    errors.run(main)


def load(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def with_config(words: list[str]) -> list[str]:
    """The words with the file of the configuration in place of its name."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words:
        return words
    if words.count("--config") > 1:
        raise ValueError("give --config once.")
    place = words.index("--config") + 1
    if place == len(words):
        raise ValueError("--config needs a name or a file.")
    config = find_config(words[place])
    read_yaml(config)  # the parser takes the last of two keys
    return [*words[:place], str(config), *words[place + 1 :]]


def check_names(remaining: Sequence[str], own: Sequence[str], inherited: Sequence[str]) -> None:
    """Raises a `ValueError` that names the nearest if an option is neither the recipe's nor inherited."""
    known = {name for module in inherited for name in field_names(module)}
    for word in remaining:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--") and not {name, name.removeprefix("no_")} & known:
            nearest = difflib.get_close_matches(name, {*own, *known}, 1, 0.6)
            others = [command for command, module in OWN_ARGUMENTS.items() if name in field_names(module)]
            hint = f": did you mean {nearest[0]!r}?" if nearest else "."
            hint = f": it belongs to {' and '.join(others)}." if others else hint
            longer = sorted(full for full in {*own, *known} if full.endswith(f"_{name}"))
            hint = f": did you mean {' or '.join(longer)}?" if 0 < len(longer) < 4 else hint
            raise ValueError(f"there is no option {name!r}{hint}")


@cache
def field_names(module: str) -> set[str]:
    """The fields of the classes of a module, from its source."""
    source = importlib.util.find_spec(module).origin
    classes = [node for node in ast.parse(Path(source).read_text()).body if isinstance(node, ast.ClassDef)]
    return {node.target.id for item in classes for node in item.body if isinstance(node, ast.AnnAssign)}
