"""Parsing of recipe arguments from a YAML file and the command line, with errors before heavy imports."""

import argparse
import ast
import difflib
import gc
import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..command import errors
from ..command.errors import WrongArguments, WrongPath, program
from ..command.paths import check_not_file, check_paths, expand_home, find_config, read_yaml
from ..command.settings import Settings, check_library_fields

# Torch reads these variables when it is loaded. By default its threads spin for milliseconds while they wait for each
# other: if another process is busy, a step of the quickstart takes many times as long. Sleeping threads avoid this, but
# waking them takes a fifth of a step on an idle machine. Therefore threads spin for some microseconds and then sleep,
# as GNU OpenMP does if threads outnumber the cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

OWN_ARGUMENTS = {  # command: module of its arguments, and the class if the module has others
    "vitp pretrain": "modeling_vitp.pretraining.arguments:PretrainArguments",
    "vitp finetune_classification": "modeling_vitp.tasks.classification.arguments",
    "vitp finetune_segmentation": "modeling_vitp.tasks.segmentation.arguments",
    "vitp finetune_detection": "modeling_vitp.tasks.detection.arguments",
    "vitp distill": "modeling_vitp.pretraining.arguments:DistillationArguments",
    "vitp probe": "modeling_vitp.probing.arguments",
}
USUAL = """
usual options:
  --config NAME                      YAML file with any of the options: a path, or the name of a file of the package
{start}  --output_dir FOLDER                folder for model, scores and pictures (outputs/NAME of --config NAME)
  --max_steps N, --num_train_epochs N
  --learning_rate RATE, --per_device_train_batch_size N
"""
START = "  --model_name_or_path NAME          start of the training: a folder or a Hub id\n"
# Help of options of TRL; those that a command refuses, or that change nothing in it, are not shown.
HELP = {
    "dataset_name": "Training data: a folder, a file (JSON, CSV, Parquet, tar), or the id of a data set of the Hub.",
    "dataset_config": "Configuration of a data set of the Hub that has several.",
    "dataset_train_split": "Split to train on, or a part of it, such as train[:100]. Default: train.",
    "dataset_test_split": "Split to evaluate on. Default: test. Of annotations also '' for none.",
    "dataset_streaming": "Whether rows are read as they are needed, without a copy on disk. Default: false.",
    **dict.fromkeys(("ignore_bias_buffers", "load_in_8bit", "load_in_4bit", "lora_task_type"), argparse.SUPPRESS),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage", "trust_remote_code"),
        argparse.SUPPRESS,
    ),
}
INPUTS = ("model_name_or_path", "vision_model", "language_model", "dataset_name", "annotations", "data_root")
DATA = ("dataset_name", "annotations", "mixture")  # options of pretraining data, of which a run has one


def parse(
    argv: Sequence[str] | None,
    description: str,
    own: Sequence[type],
    whole: Sequence[str] = (),
    inherited: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Parse the arguments of a recipe into one instance of each class.

    `--help` and errors in the recipe's own arguments or in option names need only `own`; heavy modules are imported
    afterwards.

    Args:
        argv: words of the command line, by default those of the process.
        description: docstring of the recipe.
        own: argument classes of the recipe, which are fast to import.
        whole: classes to parse into, as `module.Class`, if `own` has only a part of their fields.
        inherited: modules whose classes have the other fields. Their source is read without importing them.

    Raises:
        WrongArguments: if an option is unknown, or a class rejects its fields.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    epilog = "--config NAME reads these options from a YAML file: a path, or the name of a file of the package."
    if whole:
        epilog += " --help_all also shows the options of the libraries: --output_dir, --max_steps, --learning_rate …"
    has_start = any(hasattr(dataclass, "model_name_or_path") for dataclass in own)
    description += USUAL.format(start=START if has_start else "") if whole else ""
    texts = {"description": description, "epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}
    texts["prog"], texts["usage"] = program(), f"{program()} --config NAME [--OPTION VALUE ...]"
    parser = TrlParser(own, allow_abbrev=False, **texts)
    parser.error = errors.refuse
    if {"-h", "--help"} & set(words):
        for action in parser._actions:  # argparse has no public list of its options
            action.help = HELP.get(action.dest, action.help)
        parser.print_help()
        sys.exit(0)
    if "--help_all" in words:
        TrlParser([load_class(name) for name in whole] or own, **texts).print_help()
        sys.exit(0)
    options = "--help_all" if whole else "--help"
    try:
        words = with_given_data(with_config(words))
        check_words(parser, words, [item.name for dataclass in own for item in fields(dataclass)], inherited)
        *parsed, _, _ = parser.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
        for item in parsed:
            if not isinstance(item, Settings):
                check_library_fields(item)
        expand_home(parsed)
        check_paths(parsed)
        if whole:
            words = with_output(words)
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


def read_settings(settings: Mapping[str, Any], whole: Sequence[str]) -> tuple[Any, ...]:
    """Return one instance of each class from a mapping, which is read as a configuration of a command.

    Args:
        settings: fields of the classes.
        whole: classes, as `module.Class`.

    Raises:
        ValueError: if a field is unknown, or a class rejects its value.
    """
    parser = TrlParser([load_class(name) for name in whole], allow_abbrev=False)
    parser.error = errors.refuse
    unused_words = parser.set_defaults_with_config(**settings)
    known = {action.dest for action in parser._actions}  # argparse has no public list of its options
    for word in unused_words[::2]:
        name = word.removeprefix("--")
        raise WrongArguments(f"unknown option {name!r}{hint_for(name, known)}")
    try:
        parsed = parser.parse_args_into_dataclasses(args=[])
        expand_home(parsed)
        check_paths(parsed)
        check_output(parsed)
        find_checkpoint(parsed)
    except (OSError, ValueError) as error:
        raise WrongArguments(" ".join(str(error).split())) from error
    return parsed


def with_output(words: list[str]) -> list[str]:
    """Return the words with `outputs/CONFIGURATION` as output folder, if words and configuration have none."""
    if "--config" not in words or "--output_dir" in {word.partition("=")[0] for word in words}:
        return words
    config = Path(words[words.index("--config") + 1])
    return words if "output_dir" in (read_yaml(config) or {}) else [*words, "--output_dir", f"outputs/{config.stem}"]


def with_given_data(words: list[str]) -> list[str]:
    """Return the words with the data of the configuration removed if the words name others.

    Requirements of the configuration are removed too, because they are about its data.
    """
    if "--config" not in words:
        return words
    config = read_yaml(words[words.index("--config") + 1])
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    if not isinstance(config, dict) or not given & {*DATA}:
        return words
    replaced = [name for name in (*DATA, "require") if name in config and name not in given]
    if "annotations" not in given and "annotation_options" in config:
        replaced.append("annotation_options")
    if "require" in replaced:
        print("The configuration's `require` is left out: it is about its own data.", file=sys.stderr)
    return [*words, *(word for name in replaced for word in (f"--{name}", ""))]


def check_output(parsed: Sequence[Any]) -> None:
    """Raise a `ValueError` if a training run has no `output_dir`, or one that is a file, its start or its data.

    Transformers sets `output_dir` to "trainer_output" if it is missing.
    """
    folder = next((settings.output_dir for settings in parsed if hasattr(settings, "output_dir")), None)
    if folder == "trainer_output" and not getattr(parsed[0], "dry_run", False):
        raise ValueError("output_dir is missing: set the output folder of the run, --output_dir outputs/NAME.")
    if not folder:
        return
    check_not_file("output_dir", folder)
    for settings in parsed:
        for name in INPUTS:
            value = getattr(settings, name, None)
            if value and Path(value).exists() and Path(value).resolve() == Path(folder).resolve():
                raise ValueError(f"output_dir={folder!r} is {name}, which would be overwritten. Set a new folder.")


def find_checkpoint(parsed: Sequence[Any]) -> None:
    """Replace `resume_from_checkpoint: true` by the last checkpoint of `output_dir`.

    Raises:
        ValueError: if the folder has no complete checkpoint.
    """
    for settings in parsed:
        wanted = str(getattr(settings, "resume_from_checkpoint", None)).lower()
        if wanted in ("true", "false"):
            from .checkpointing import last_checkpoint

            last = last_checkpoint(settings.output_dir) if wanted == "true" else None
            if wanted == "true" and last is None:
                raise ValueError(
                    f"resume_from_checkpoint: no complete checkpoint found in {settings.output_dir}. Remove the "
                    "option: a run resumes automatically if its folder has a checkpoint."
                )
            settings.resume_from_checkpoint = last


def load_plugins(paths: Sequence[str]) -> None:
    """Run Python files that register decode heads, each of them once per process.

    Raises:
        ValueError: if a file is missing or raises an error.
    """
    for path in paths:
        file = Path(path).expanduser().resolve()
        name = f"vitp_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
        if name in sys.modules:
            continue
        if not file.is_file():
            raise ValueError(f"plugins: file {path} not found. Give Python files that register heads.")
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except Exception as error:  # the user's file may raise any error
            del sys.modules[name]
            raise ValueError(f"plugins: {path} failed: {type(error).__name__}: {error}") from error


def parse_words(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments of a recipe without a configuration file."""
    parser.prog = program()
    args = errors.parse_arguments(parser, argv)
    expand_home([args])
    check_paths([args])
    register_models()
    return args


def register_models() -> None:
    """Register the models with transformers' Auto classes, which commands do after checking their arguments."""
    from .. import auto  # noqa: F401


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a recipe as a program with logging, see [`~modeling_vitp.command.errors.run_program`]."""
    gc.set_threshold(10_000)  # With 700, going through the objects of the imports takes a fifth of their time.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING  # each line once for all processes
    for name in ("training", "pretraining", "tasks", "evaluation", "recipes"):
        logging.getLogger(f"modeling_vitp.{name}").setLevel(level)
    errors.run_program(main)


def load_class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def with_config(words: list[str]) -> list[str]:
    """Return the words with the name of the configuration replaced by its path."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words:
        return words
    if words.count("--config") > 1:
        raise ValueError("give --config once.")
    index = words.index("--config") + 1
    if index == len(words):
        raise ValueError("--config needs a name or a file.")
    config = find_config(words[index])
    read_yaml(config)  # raises an error on duplicate keys, of which the parser would use the last
    return [*words[:index], str(config), *words[index + 1 :]]


def check_words(parser: TrlParser, words: Sequence[str], own: Sequence[str], inherited: Sequence[str]) -> None:
    """Raise a `ValueError` if an option of the command line or of the configuration is unknown, or a word is left."""
    in_file, words = [], list(words)
    if "--config" in words:
        index = words.index("--config")
        settings = read_yaml(words[index + 1])
        settings = {str(name): value for name, value in settings.items()} if isinstance(settings, dict) else {}
        for name in (name for name in settings if "-" in name):
            raise ValueError(f"unknown option {name!r}: did you mean {name.replace('-', '_')!r}?")
        in_file = parser.set_defaults_with_config(**settings)
        del words[index : index + 2]
    _, remaining = parser.parse_known_args(words)
    for previous, word in zip([None, *remaining], remaining):
        # A word after an option of the libraries is its value; such an option may have several.
        if not word.startswith("-") and (previous is None or (not previous.startswith("-") and is_config(word))):
            hint = f"did you mean --config {word}?" if is_config(word) else "expected --OPTION VALUE."
            raise ValueError(f"unexpected word {word!r}: {hint}")
    check_names([name for name in in_file[::2] if name != "--env"] + remaining, [*own, "config"], inherited)


def is_config(word: str) -> bool:
    try:
        return find_config(word).is_file()
    except WrongPath:
        return False


def check_names(remaining: Sequence[str], own: Sequence[str], inherited: Sequence[str]) -> None:
    """Raise a `ValueError` that suggests the closest name if an option is neither the recipe's nor inherited."""
    known = {name for module in inherited for name in field_names(module)}
    for word in remaining:
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if word.startswith("--") and not {name, name.removeprefix("no_")} & known:
            raise ValueError(f"unknown option {name!r}{hint_for(name, {*own, *known})}")


def hint_for(name: str, known: Collection[str]) -> str:
    """Return the end of the error message for an unknown option, given the known options of the command."""
    if name == "dataset_name" and "data_root" in known:
        return ": set --data_root FOLDER, or dataset_name in `data`."
    longer = sorted(full for full in known if full.endswith(f"_{name}"))
    if 0 < len(longer) < 5:
        return f": did you mean {' or '.join(longer)}?"
    others = [command for command, module in OWN_ARGUMENTS.items() if name in field_names(module)]
    if others:
        return f": it belongs to {' and '.join(others)}."
    nearest = difflib.get_close_matches(name, known, 1, 0.6)
    return f": did you mean {nearest[0]!r}?" if nearest else "."


@cache
def field_names(module: str) -> set[str]:
    """Return the field names of all classes of a module, or of `MODULE:CLASS`, read from its source."""
    module, _, name = module.partition(":")
    source = importlib.util.find_spec(module).origin
    classes = [node for node in ast.parse(Path(source).read_text()).body if isinstance(node, ast.ClassDef)]
    classes = [node for node in classes if name in ("", node.name)]
    return {node.target.id for item in classes for node in item.body if isinstance(node, ast.AnnAssign)}
