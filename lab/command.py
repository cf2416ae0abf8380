"""Entry points of the laboratory: their start, their configurations, and runs of entry points in this process."""

import contextlib
import importlib
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

import vitp_command
from modeling_vitp.command import paths
from modeling_vitp.command.errors import RunStopped

ROOT = Path(__file__).parents[1]
TREES_BASE = "lab/trees/quickstart.yaml"  # base of most experiments
CONFIG_FOLDERS = (ROOT / "lab" / "experiments" / "configs", ROOT / "lab" / "configs")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point that was started by `python -m`, with the log lines of the laboratory."""
    sys.argv[0] = f"python -m {sys.modules['__main__'].__spec__.name}"
    logging.getLogger("lab").setLevel(logging.INFO)
    vitp_command.run(main)


def find_config(name: str) -> Path:
    """Return the path of a configuration: a file, one of the laboratory's by name, or one of the package's.

    Raises:
        WrongPath: if there is no such configuration.
    """
    for path in (Path(name), ROOT / name, *(folder / f"{Path(name).stem}.yaml" for folder in CONFIG_FOLDERS)):
        if path.is_file():
            return path
    return paths.find_config(name)


def with_config(argv: Sequence[str] | None) -> list[str]:
    """Return the words of a command line, by default those of the process, with the path of `--config NAME`."""
    words = list(sys.argv[1:] if argv is None else argv)
    for index, word in enumerate(words):
        if word.startswith("--config="):
            words[index] = f"--config={find_config(word.removeprefix('--config='))}"
        elif index > 0 and words[index - 1] == "--config":
            words[index] = str(find_config(word))
    return words


def run_module(module: str, settings: dict[str, Any], output: Path, check: bool = True) -> dict[str, Any]:
    """Run or resume an entry point that writes `metrics.json`, and return the metrics.

    The configuration and the output of the entry point are kept beside its output folder.

    Args:
        module: full name of the module, which has a function `main`.
        settings: configuration without `output_dir`.
        output: output folder.
        check: whether an exit status other than 0, such as that of a failed gate, is an error.

    Raises:
        RunStopped: if the exit status is not 0 and `check` is true.
    """
    from modeling_vitp.training.checkpointing import write_whole  # slow to import

    main = importlib.import_module(module).main
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = settings | {"output_dir": str(output)}
    write_whole(config_of(output), yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    words = ["--config", str(config_of(output))]
    log = output.with_name(f"{output.name}.log")
    with log.open("a") as file, contextlib.redirect_stdout(file):
        print(f"\n$ python -m {module} {shlex.join(words)}")
        status = main(words)
    if status and check:
        raise RunStopped(f"{module} failed, see the end of {log}.", status)
    return json.loads((output / "metrics.json").read_text())


def config_of(output: Path) -> Path:
    """Return the configuration file of [`run_module`]."""
    return output.with_name(f"{output.name}.yaml")
