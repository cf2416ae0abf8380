"""Error reports of commands: one line on stderr. An unexpected error also has a log file with its traceback."""

import argparse
import contextlib
import difflib
import errno
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import NoReturn

MISTAKE, FAILURE = 2, 1  # exit statuses
# Extra that installs a package, by the name of the imported module.
RECIPES = ("accelerate", "cv2", "datasets", "evaluate", "httpx2", "matplotlib", "nibabel", "peft", "rasterio", "trl")
EXTRAS = {
    **dict.fromkeys(RECIPES, "recipes"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    **dict.fromkeys(("monai", "pydicom"), "medical"),
    "gradio": "space",
    "pycocoevalcap": "captions",
}
# Errors of transformers' configurations, by name so that transformers is not imported.
OF_SETTINGS = ("StrictDataclassFieldValidationError", "StrictDataclassClassValidationError")
# Messages of torch about a device that does not exist.
OF_DEVICE = "Torch not compiled with|at start of device string|No CUDA GPUs|no NVIDIA driver|invalid device ordinal"
READ_TRACEBACK = "read the traceback; --debug prints it."  # remedy of unexpected errors
# Errors of a pipe or of a process of this machine, such as a worker of a DataLoader. Those of the Hub's clients have
# classes of their own.
PIPE_ERRORS = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)
CONNECTION_ERRORS = {
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "TransportError",
    "ConnectionError",
    "ProxyError",
    "LocalEntryNotFoundError",
}
LOG_DAYS = 7  # a log is kept
FILE_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class WrongArguments(ValueError):
    """Error in the command line or the configuration file, reported in one line.

    Args:
        message: text of the error.
        options: option or command that lists the available options.
    """

    def __init__(self, message: str, options: str = "--help"):
        super().__init__(message)
        self.options = options


class WrongPath(WrongArguments):
    """Error for a file or folder that is missing or unreadable; the list of options is not mentioned."""


class RunStopped(RuntimeError):
    """Error for a run that ends before its last step and exports nothing.

    Args:
        message: cause, and what to do next.
        status: exit status of the command.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class TrainingDiverged(RunStopped):
    """Error for a run whose loss or weights are NaN or infinite."""


def refuse(message: str) -> NoReturn:
    """Raise [`WrongArguments`] instead of `ArgumentParser.error`, which prints the usage and ends the process."""
    raise WrongArguments(" ".join(message.split()))


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line. Report an unknown option before a missing argument, with the closest known option."""
    parser.error = refuse
    known = parser._option_string_actions  # argparse has no public list of its options
    for option in (word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")):
        if not any(name.startswith(option) for name in known):
            nearest = difflib.get_close_matches(option, known, 1, 0.7)
            refuse(f"unknown option {option!r}{f': did you mean {nearest[0]!r}?' if nearest else '.'}")
    return parser.parse_args(argv)


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a command as a program, report any error in one line, and end the process with an exit status.

    The status is 2 for errors in the command, its files or its data, and 1 for failures; an error with a `status`, such
    as that of a stopped run, has its own. `--debug` also prints the traceback.
    """
    is_debug = take_debug(sys.argv)
    try:
        status = main()
    except SystemExit as end:  # of `--help`
        status = end.code
    except KeyboardInterrupt as error:
        status = report_error(error, is_debug)
    except Exception as error:  # every error is reported in one line
        is_unread = isinstance(error, BrokenPipeError) and not flush_output("\n")
        status = FAILURE if is_unread else report_error(error, is_debug)
    flush_output()
    sys.exit(status)


def flush_output(end: str = "") -> bool:
    """Write the buffered output and `end`. If its reader has ended, such as `head`, drop it and return `False`."""
    try:
        print(end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        return False
    return True


def take_debug(words: list[str]) -> bool:
    """Remove a `--debug` without a value from a command line; with a value, it is transformers' option."""
    indices = [index for index, word in enumerate(words) if word == "--debug"]
    ours = [index for index in indices if words[index + 1 : index + 2] == [] or words[index + 1].startswith("--")]
    for index in reversed(ours):
        del words[index]
    return bool(ours)


def report_error(error: BaseException, is_debug: bool = False) -> int:
    """Print an error in one line, and return the exit status. The line of an unexpected error names its log."""
    what, remedy, status = explain_error(error)
    log = write_log(error) if remedy == READ_TRACEBACK else None
    if is_debug:
        traceback.print_exception(error)
    line = f"error: {one_line(what) or type(error).__name__}"
    line += f" Do: {remedy}" if remedy else ""
    print(f"{line} (traceback: {log})" if log else line, file=sys.stderr)
    return status


def explain_error(error: BaseException) -> tuple[str, str | None, int]:
    """Return the message of an error, the remedy unless it is in the message, and the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted.", None if error.args else "run the same command again.", 130
    if isinstance(getattr(error, "status", None), int):
        return str(error), None, error.status
    if isinstance(error, WrongArguments):
        remedy = None if isinstance(error, WrongPath) else f"{program()} {error.options} lists the options."
        return str(error), remedy, MISTAKE
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        if name in EXTRAS:
            return f"{name} is not installed.", f"pip install 'modeling-vitp[{EXTRAS[name]}]'", FAILURE
    # Errors that a library raises for a missing package.
    if isinstance(error, ImportError) and error.name is None or isinstance(error, PackageNotFoundError):
        return str(error), None, FAILURE
    if isinstance(error, (AssertionError, RuntimeError)) and re.search(OF_DEVICE, str(error)):
        return f"device: {error}", "set another device, for example cpu.", MISTAKE
    of_hub = next((found for found in map(explain_hub, chain(error)) if found), None)
    if of_hub is not None:
        return of_hub
    if type(error).__name__ in OF_SETTINGS:
        return str(error.__cause__ or error), None, MISTAKE
    if isinstance(error, FILE_ERRORS) or isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EFBIG):
        return f"{error.filename}: {error.strerror}." if error.filename else str(error), None, MISTAKE
    if isinstance(error, OSError) and error.errno is None or isinstance(error, ValueError):
        return str(error), None, MISTAKE
    if isinstance(error, KeyError) and "metric_for_best_model" in str(error):  # of transformers, after an evaluation
        return str(error.args[0]), None, MISTAKE
    what = f"{type(error).__name__}: {error}"
    return what, READ_TRACEBACK, FAILURE


def program() -> str:
    """Return the name of the command, whether it was started as `vitp NAME`, as a file or as a module.

    A program that is not part of `vitp` sets `sys.argv[0]` to `python -m MODULE`.
    """
    if sys.argv and sys.argv[0].startswith("python -m "):
        return sys.argv[0]
    path = Path(sys.argv[0] if sys.argv else "vitp")
    name = path.parent.name if path.stem == "__main__" else path.stem
    return "vitp" if name == "modeling_vitp" else f"vitp {name.removeprefix('vitp')}".replace("  ", " ").strip()


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def explain_hub(error: BaseException) -> tuple[str, str, int] | None:
    """Explain errors of the Hub's clients as [`explain_error`] does, by class names that several packages share."""
    names = {cls.__name__ for cls in type(error).__mro__}
    # `datasets` has the name of the client's error only in its text.
    is_switched_off = "OfflineModeIsEnabled" in names or "OfflineModeIsEnabled" in str(error)
    if is_switched_off or ("LocalEntryNotFoundError" in names and is_offline()):
        what = f"HF_HUB_OFFLINE is set, and a required file is not on this machine ({one_line(str(error))})."
        return what, "unset it, or pass a folder.", FAILURE
    if names & CONNECTION_ERRORS and not isinstance(error, PIPE_ERRORS):
        what = f"the Hub cannot be reached ({one_line(str(error)) or type(error).__name__})."
        return what, "check the connection, or pass folders and set HF_HUB_OFFLINE=1.", FAILURE
    return None


def is_offline() -> bool:
    """Return whether access to the Hub is switched off."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def write_log(error: BaseException) -> Path | None:
    """Write the traceback, without tokens, to a file of the user outside of the command's output; return its path.

    Files older than `LOG_DAYS` are deleted.
    """
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}"
    text = re.sub(r"(--?\w*token[ =])\S+|hf_[A-Za-z0-9]{16,}", r"\1…", text)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    for folder in (cache / "vitp", Path(tempfile.gettempdir()) / f"vitp-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("error*.log"):
                with contextlib.suppress(OSError):  # another process deletes it
                    if time.time() - old.stat().st_mtime > LOG_DAYS * 86400:
                        old.unlink()
            # The file has a name of its own, and only the user can read it.
            handle, path = tempfile.mkstemp(".log", f"error-{time.strftime('%Y%m%d-%H%M%S')}-", folder)
            with open(handle, "w", errors="backslashreplace") as file:
                file.write(text)
            return Path(path)
        except OSError:
            continue
    return None


def one_line(text: str) -> str:
    return " ".join(text.split())
