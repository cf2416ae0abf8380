"""Parsing of recipe arguments from a YAML file and the command line, with errors before heavy imports."""

import argparse
import ast
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
from ..command.settings import (
    Settings,
    advanced_options,
    check_library_fields,
    own_fields,
    unsupported_options,
)

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
    "the fine-tuning commands": "modeling_vitp.tasks.arguments",
    "vitp distill": "modeling_vitp.pretraining.arguments:DistillationArguments",
    "vitp probe": "modeling_vitp.probing.arguments",
}
USUAL = """
usual options:
  --config NAME                      YAML file with any of the options: a path, or the name of a file of the package
{start}  --output_dir FOLDER                folder for model, scores and pictures (outputs/NAME of --config NAME)
  --max_steps N, --num_train_epochs N
  --learning_rate RATE, --warmup_steps N, --per_device_train_batch_size N
  --logging_steps N, --report_to TOOL, --eval_strategy steps
  --save_steps N, --resume_from_checkpoint FOLDER
{hub}"""
START = "  --model_name_or_path NAME          start of the training: a folder or a Hub id\n"
HUB = "  --push_to_hub, --hub_model_id ID   upload of the model while it trains\n"
# Help of options of TRL.
HELP = {
    "dataset_name": "Training data: a folder, a file (JSON, CSV, Parquet, tar), or the id of a data set of the Hub.",
    "dataset_config": "Configuration of a data set of the Hub that has several.",
    "dataset_train_split": "Split to train on, or a part of it, such as train[:100]. Default: train.",
    "dataset_test_split": "Split to evaluate on. Default: test. Of annotations also '' for none.",
    "dataset_streaming": "Whether rows are read as they are needed, without a copy on disk. Default: false.",
}
# Options of libraries that every command refuses, or that change nothing in it. No help shows them.
WITHOUT_EFFECT = {
    "ignore_bias_buffers",
    "load_in_8bit",
    "load_in_4bit",
    "lora_task_type",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
    "trust_remote_code",
    "remove_unused_columns",
    "packing_strategy",
    "do_eval",
    "do_predict",
}
# Options of TRL that the short help leaves out, as those of `Settings.advanced`.
ADVANCED = {
    "dataset_streaming",
    "model_revision",
    "dtype",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
}
INPUTS = ("model_name_or_path", "vision_model", "language_model", "dataset_name", "annotations", "data_root")
DATA = ("dataset_name", "annotations", "mixture")  # options of pretraining data, of which a run has one


def parse(
    argv: Sequence[str] | None,
    description: str,
    recipe_classes: Sequence[type],
    all_classes: Sequence[str] = (),
    inherited_modules: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Parse the arguments of a recipe into one instance of each class.

    `--help` and errors in the recipe's own arguments or in option names need only `recipe_classes`; heavy modules are
    imported afterwards.

    Args:
        argv: words of the command line, by default those of the process.
        description: docstring of the recipe.
        recipe_classes: argument classes of the recipe, which are fast to import.
        all_classes: classes to parse into, as `module.Class`, if `recipe_classes` has only a part of their fields.
        inherited_modules: modules whose classes have the other fields. Their source is read without importing them.

    Raises:
        WrongArguments: if an option is unknown, or a class rejects its fields.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    texts = help_texts(description, recipe_classes, has_library_options=bool(all_classes))
    parser = TrlParser(recipe_classes, allow_abbrev=False, **texts)
    parser.error = errors.refuse
    if "-h" in words or "--help" in words:
        set_help(parser, recipe_classes, is_short=bool(all_classes))
        parser.print_help()
        sys.exit(0)
    if "--help_all" in words:
        classes = load_classes(all_classes) or recipe_classes
        parser = TrlParser(classes, **texts)
        set_help(parser, classes, is_short=False)
        parser.print_help()
        sys.exit(0)
    help_option = "--help_all" if all_classes else "--help"
    try:
        words = with_given_data(with_config(words))
        parsed = parse_recipe(parser, words, recipe_classes, inherited_modules)
        if all_classes:
            parsed = parse_all(with_output(words), all_classes, texts)
    except ConnectionError:
        raise
    except (OSError, yaml.YAMLError) as error:
        raise WrongPath(" ".join(str(error).split())) from error
    except WrongArguments as error:
        error.options = help_option
        raise
    except ValueError as error:
        raise WrongArguments(" ".join(str(error).split()), help_option) from error
    register_models()
    return tuple(parsed)


def set_help(parser: TrlParser, classes: Sequence[type], is_short: bool) -> None:
    """Set the help of options of TRL, and hide options that have no effect, and the advanced ones in the short help."""
    own_names: set[str] = set()
    hidden_names = set(WITHOUT_EFFECT)
    if is_short:
        hidden_names |= ADVANCED
    for cls in classes:
        if not issubclass(cls, Settings):
            continue
        own_names |= own_fields(cls).keys()
        hidden_names |= unsupported_options(cls).keys()
        if is_short:
            hidden_names |= advanced_options(cls)
    for action in parser._actions:  # argparse has no public list of its options
        if action.dest in hidden_names:
            action.help = argparse.SUPPRESS
        elif action.dest not in own_names:
            action.help = HELP.get(action.dest, action.help)


def help_texts(description: str, recipe_classes: Sequence[type], has_library_options: bool) -> dict[str, Any]:
    """Return the arguments of a parser that its help is made of."""
    epilog = "--config NAME reads these options from a YAML file: a path, or the name of a file of the package."
    if has_library_options:
        epilog += " --help_all shows all options, also those of the libraries."
        has_start = any(hasattr(dataclass, "model_name_or_path") for dataclass in recipe_classes)
        description += USUAL.format(start=START if has_start else "", hub=HUB if has_start else "")
    return {
        "description": description,
        "epilog": epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "prog": program(),
        "usage": f"{program()} --config NAME [--OPTION VALUE ...]",
    }


def parse_recipe(
    parser: TrlParser, words: Sequence[str], recipe_classes: Sequence[type], inherited_modules: Sequence[str]
) -> Sequence[Any]:
    """Parse a recipe's own arguments, and check them and the names of all options."""
    names = []
    for dataclass in recipe_classes:
        names += [item.name for item in fields(dataclass)]
    check_words(parser, words, names, inherited_modules)
    *parsed, _, _ = parser.parse_args_and_config(words, return_remaining_strings=True, separate_remaining_strings=True)
    for settings in parsed:
        if not isinstance(settings, Settings):
            check_library_fields(settings)
    expand_home(parsed)
    check_paths(parsed)
    return parsed


def parse_all(words: Sequence[str], all_classes: Sequence[str], texts: Mapping[str, Any]) -> Sequence[Any]:
    """Parse all arguments, with those of the libraries, and check their output folder and checkpoint."""
    parser = TrlParser(load_classes(all_classes), **texts)
    parser.error = errors.refuse
    parsed = parser.parse_args_and_config(words)
    expand_home(parsed)
    check_output(parsed)
    find_checkpoint(parsed)
    return parsed


def read_settings(settings: Mapping[str, Any], all_classes: Sequence[str]) -> tuple[Any, ...]:
    """Return one instance of each class from a mapping, which is read as a configuration of a command.

    Args:
        settings: fields of the classes.
        all_classes: classes, as `module.Class`.

    Raises:
        ValueError: if a field is unknown, or a class rejects its value.
    """
    parser = TrlParser(load_classes(all_classes), allow_abbrev=False)
    parser.error = errors.refuse
    unused_words = parser.set_defaults_with_config(**settings)
    if unused_words:
        name = unused_words[0].removeprefix("--")
        known_names = {action.dest for action in parser._actions}  # argparse has no public list of its options
        raise WrongArguments(f"unknown option {name!r}{hint_for(name, known_names)}")
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
    option_names = {word.partition("=")[0] for word in words}
    if "--config" not in words or "--output_dir" in option_names:
        return words
    config = Path(words[words.index("--config") + 1])
    if "output_dir" in (read_yaml(config) or {}):
        return words
    return [*words, "--output_dir", f"outputs/{config.stem}"]


def with_given_data(words: list[str]) -> list[str]:
    """Return the words with the data of the configuration removed if the words name others.

    Requirements of the configuration are removed too, because they are about its data.
    """
    if "--config" not in words:
        return words
    config = read_yaml(words[words.index("--config") + 1])
    options = set()
    for word in words:
        if word.startswith("--"):
            options.add(word.partition("=")[0].removeprefix("--"))
    if not isinstance(config, dict) or options.isdisjoint(DATA):
        return words
    replaced = []
    for name in (*DATA, "require"):
        if name in config and name not in options:
            replaced.append(name)
    if "annotations" not in options and "annotation_options" in config:
        replaced.append("annotation_options")
    if "require" in replaced:
        print("The configuration's `require` is left out: it is about its own data.", file=sys.stderr)
    new_words = list(words)
    for name in replaced:
        new_words += [f"--{name}", ""]
    return new_words


def check_output(parsed: Sequence[Any]) -> None:
    """Raise a `ValueError` if a training run has no `output_dir`, or one that is a file, its start or its data.

    Transformers sets `output_dir` to "trainer_output" if it is missing.
    """
    folder = None
    for settings in parsed:
        if hasattr(settings, "output_dir"):
            folder = settings.output_dir
            break
    if folder == "trainer_output" and not getattr(parsed[0], "dry_run", False):
        raise ValueError("output_dir is missing: set the output folder of the run, --output_dir outputs/NAME.")
    if not folder:
        return
    check_not_file("output_dir", folder)
    for settings in parsed:
        for name in INPUTS:
            path = getattr(settings, name, None)
            if not path or not Path(path).exists():
                continue
            if Path(path).resolve() == Path(folder).resolve():
                raise ValueError(f"output_dir={folder!r} is {name}, which would be overwritten. Set a new folder.")


def find_checkpoint(parsed: Sequence[Any]) -> None:
    """Replace `resume_from_checkpoint: true` by the last checkpoint of `output_dir`.

    Raises:
        ValueError: if the folder has no complete checkpoint.
    """
    for settings in parsed:
        choice = str(getattr(settings, "resume_from_checkpoint", None)).lower()
        if choice == "false":
            settings.resume_from_checkpoint = None
        elif choice == "true":
            from .checkpointing import last_checkpoint

            checkpoint = last_checkpoint(settings.output_dir)
            if checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: no complete checkpoint found in {settings.output_dir}. Remove the "
                    "option: a run resumes automatically if its folder has a checkpoint."
                )
            settings.resume_from_checkpoint = checkpoint


def load_plugins(paths: Sequence[str]) -> None:
    """Run Python files that register tasks, layouts, heads or models, each of them once per process.

    Raises:
        ValueError: if a file is missing or raises an error.
    """
    for path in paths:
        file = Path(path).expanduser().resolve()
        path_hash = hashlib.sha256(str(file).encode()).hexdigest()
        name = f"vitp_plugin_{path_hash[:12]}"
        if name in sys.modules:
            continue
        if not file.is_file():
            raise ValueError(f"plugins: file {path} not found. Give Python files.")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
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
    sys.argv[0] = errors.program()  # `runpy` sets the file, which would be in the command that resumes
    gc.set_threshold(10_000)  # With 700, going through the objects of the imports takes a fifth of their time.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    is_first_process = os.environ.get("RANK", "0") == "0"  # which logs each line once for all processes
    level = logging.INFO if is_first_process else logging.WARNING
    for name in ("training", "pretraining", "tasks", "evaluation", "recipes"):
        logging.getLogger(f"modeling_vitp.{name}").setLevel(level)
    errors.run_program(main)


def load_classes(names: Sequence[str]) -> list[type]:
    """Import classes, given as `module.Class`."""
    classes = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        classes.append(getattr(importlib.import_module(module), attribute))
    return classes


def with_config(words: list[str]) -> list[str]:
    """Return the words with the name of the configuration replaced by its path."""
    words_apart = []
    for word in words:
        if word.startswith("--config="):
            words_apart += word.split("=", 1)
        else:
            words_apart.append(word)
    if "--config" not in words_apart:
        return words_apart
    if words_apart.count("--config") > 1:
        raise ValueError("give --config once.")
    index = words_apart.index("--config") + 1
    if index == len(words_apart):
        raise ValueError("--config needs a name or a file.")
    config = find_config(words_apart[index])
    read_yaml(config)  # raises an error on duplicate keys, of which the parser would use the last
    words_apart[index] = str(config)
    return words_apart


def check_words(parser: TrlParser, words: Sequence[str], own: Sequence[str], inherited: Sequence[str]) -> None:
    """Raise a `ValueError` if an option of the command line or of the configuration is unknown, or a word is left."""
    words = list(words)
    names_in_file = []
    if "--config" in words:
        index = words.index("--config")
        names_in_file = set_defaults(parser, words[index + 1])
        del words[index : index + 2]
    _, remaining_words = parser.parse_known_args(words)
    previous = None
    for word in remaining_words:
        is_option = word.startswith("-")
        follows_value = previous is not None and not previous.startswith("-")
        # A word after an option of the libraries is its value; such an option may have several.
        if not is_option and (previous is None or (follows_value and is_config(word))):
            hint = f"did you mean --config {word}?" if is_config(word) else "expected --OPTION VALUE."
            raise ValueError(f"unexpected word {word!r}: {hint}")
        previous = word
    check_names(names_in_file + remaining_words, [*own, "config"], inherited)


def set_defaults(parser: TrlParser, config: str) -> list[str]:
    """Set the defaults of a parser from a configuration, and return the options that the parser does not have."""
    settings = read_yaml(config)
    if not isinstance(settings, dict):
        return []
    settings = {str(name): value for name, value in settings.items()}
    for name in settings:
        if "-" in name:
            raise ValueError(f"unknown option {name!r}: did you mean {name.replace('-', '_')!r}?")
    unused_words = parser.set_defaults_with_config(**settings)
    names = unused_words[::2]  # each is followed by its value
    return [name for name in names if name != "--env"]


def is_config(word: str) -> bool:
    try:
        return find_config(word).is_file()
    except WrongPath:
        return False


def check_names(remaining: Sequence[str], own: Sequence[str], inherited: Sequence[str]) -> None:
    """Raise a `ValueError` that suggests the closest name if an option is neither the recipe's nor inherited."""
    inherited_names = set()
    for module in inherited:
        inherited_names |= field_names(module)
    for word in remaining:
        if not word.startswith("--"):
            continue
        name = word.removeprefix("--").split("=")[0].replace("-", "_")
        if name not in inherited_names and name.removeprefix("no_") not in inherited_names:
            raise ValueError(f"unknown option {name!r}{hint_for(name, inherited_names.union(own))}")


def hint_for(name: str, known: Collection[str]) -> str:
    """Return the end of the error message for an unknown option, given the known options of the command."""
    if name == "dataset_name" and "data_root" in known:
        return ": set --data_root FOLDER, or dataset_name in `data`."
    longer_names = sorted(known_name for known_name in known if known_name.endswith(f"_{name}"))
    if 0 < len(longer_names) < 5:
        return f": did you mean {' or '.join(longer_names)}?"
    commands = []
    for command, module in OWN_ARGUMENTS.items():
        if name in field_names(module):
            commands.append(command)
    if commands:
        return f": it belongs to {' and '.join(commands)}."
    nearest = errors.nearest_name(name, known)
    return "." if nearest is None else f": did you mean {nearest!r}?"


@cache
def field_names(module: str) -> set[str]:
    """Return the field names of all classes of a module, or of `MODULE:CLASS`, read from its source."""
    module, _, class_name = module.partition(":")
    source = Path(importlib.util.find_spec(module).origin).read_text()
    names = set()
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.ClassDef) or class_name not in ("", statement.name):
            continue
        for field in statement.body:
            if isinstance(field, ast.AnnAssign):
                names.add(field.target.id)
    return names
