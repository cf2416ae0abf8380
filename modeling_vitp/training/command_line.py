"""Arguments of the recipes: from a YAML file and the command line, with errors before anything heavy is imported."""

import argparse
import ast
import ctypes
import difflib
import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..command import errors
from ..command.errors import WrongArguments, WrongPath, program
from ..command.paths import check_paths, expand_home, find_config, read_yaml

# Torch reads this when it is loaded. By default its threads spin for milliseconds while they wait for one another:
# beside any other busy process, a step of the quickstart takes many times as long. Threads that sleep wait steadily,
# but waking takes a fifth of a step where nothing else runs. So they spin for some microseconds, as GNU's OpenMP does
# where threads outnumber the cores, and then sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

OWN_ARGUMENTS = {  # command -> the module of its arguments
    "vitp pretrain": "modeling_vitp.training.arguments",
    "vitp finetune_classification": "modeling_vitp.classification.arguments",
    "vitp finetune_segmentation": "modeling_vitp.dense.arguments",
    "vitp finetune_detection": "modeling_vitp.detection.arguments",
    "vitp probe": "modeling_vitp.probing.arguments",
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
NEVER, LARGEST = -1, 2**25


def parse(
    argv: Sequence[str] | None,
    description: str,
    own: Sequence[type],
    whole: Sequence[str] = (),
    inherited: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Parse the arguments of a recipe into one instance of each class.

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
        TrlParser([load_class(name) for name in whole] or own, **texts).print_help()
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
        check_paths(parsed)
        if whole:
            parser = TrlParser([load_class(name) for name in whole], **texts)
            parser.error = errors.refuse
            parsed = parser.parse_args_and_config(words)
            expand_home(parsed)
            check_output(parsed)
            find_checkpoint(parsed)
    except ConnectionError:
        raise
    except (OSError, yaml.YAMLError) as error:
        raise WrongPath(" ".join(str(error).split())) from error
    except WrongArguments as error:
        error.options = options
        raise
    except ValueError as error:
        raise WrongArguments(" ".join(str(error).split()), options) from error
    register_models()
    return tuple(parsed)


def check_output(parsed: Sequence[Any]) -> None:
    """Raise a `ValueError` if a run that trains was given no folder, for which transformers has put in one of its own,
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
    """Put the last checkpoint of output_dir in place of `resume_from_checkpoint: true`.

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
    """Parse the arguments of a recipe that takes words and no configuration."""
    parser.prog, parser.error = program(), errors.refuse
    args = parser.parse_args(argv)
    expand_home([args])
    check_paths([args])
    register_models()
    return args


def register_models() -> None:
    """Make the models known to transformers' Auto classes, which a command leaves until its arguments are right."""
    from .. import auto  # noqa: F401


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a recipe as a program, see [`~modeling_vitp.command.errors.run_program`]; its progress is logged."""
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("training", "classification", "dense", "detection", "evaluation", "recipes"):
        logging.getLogger(f"modeling_vitp.{name}").setLevel(logging.INFO)
    errors.run_program(main)


def load_class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def with_config(words: list[str]) -> list[str]:
    """Return the words with the file of the configuration in place of its name."""
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
    """Raise a `ValueError` that names the nearest if an option is neither the recipe's nor inherited."""
    known = {name for module in inherited for name in field_names(module)}
    for word in remaining:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--") and not {name, name.removeprefix("no_")} & known:
            nearest = difflib.get_close_matches(name, {*own, *known}, 1, 0.6)
            others = [command for command, module in OWN_ARGUMENTS.items() if name in field_names(module)]
            hint = f": did you mean {nearest[0]!r}?" if nearest else "."
            hint = f": it belongs to {' and '.join(others)}." if others else hint
            longer = sorted(full for full in {*own, *known} if full.endswith(f"_{name}"))
            hint = f": did you mean {' or '.join(longer)}?" if 0 < len(longer) < 5 else hint
            raise ValueError(f"there is no option {name!r}{hint}")


@cache
def field_names(module: str) -> set[str]:
    """Return the fields of the classes of a module, from its source."""
    source = importlib.util.find_spec(module).origin
    classes = [node for node in ast.parse(Path(source).read_text()).body if isinstance(node, ast.ClassDef)]
    return {node.target.id for item in classes for node in item.body if isinstance(node, ast.AnnAssign)}


def keep_freed_memory() -> None:
    """Keep freed memory in this process and those that it forks, unless the environment configures malloc.

    By default the end of the heap goes back to the kernel whenever some tens of megabytes of it are free, so after
    every step, and each page of it has to be found and cleared again in the next. Tensors of 32 MiB and more, the most
    that glibc takes from the heap, still go back at once.
    """
    is_told = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or is_told or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_MMAP_THRESHOLD, LARGEST)
