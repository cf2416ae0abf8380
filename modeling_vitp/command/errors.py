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
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import NoReturn

import yaml

# Exit statuses.
MISTAKE = 2
FAILURE = 1
INTERRUPTED = 130
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
# Of a path of the user; other errors, such as a full disk, are failures.
PATH_ERRNOS = (
    errno.ENOENT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EFBIG,
)


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


def nearest_name(name: str, known: Collection[str]) -> str | None:
    """Return the known name that an unknown one most likely means, or `None` if no name is similar.

    A name with a spelling mistake comes first: `data_rot` means `data_root`, not `data`. Next comes the longest known
    name that begins the unknown one, because the rest is often a value of that option: `freeze_vision` means `freeze`
    with the value `vision`, not `unfreeze_vision_layers`. The most similar of all names comes last.
    """
    misspelled_names = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    if misspelled_names:
        return misspelled_names[0]
    beginning, separator, _ = name.rpartition("_")
    while separator:
        if beginning in known:
            return beginning
        beginning, separator, _ = beginning.rpartition("_")
    similar_names = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return similar_names[0] if similar_names else None


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line. Report an unknown option before a missing argument, with the closest known option."""
    parser.error = refuse
    known_options = parser._option_string_actions  # argparse has no public list of its options
    words = sys.argv[1:] if argv is None else argv
    for word in words:
        option = word.split("=")[0]
        is_known = any(name.startswith(option) for name in known_options)  # an option may be shortened
        if is_known or not option.startswith("--"):
            continue
        known_names = [known_option.lstrip("-") for known_option in known_options]
        nearest = nearest_name(option.removeprefix("--"), known_names)
        hint = "." if nearest is None else f": did you mean '--{nearest}'?"
        refuse(f"unknown option {option!r}{hint}")
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
    except BrokenPipeError as error:
        # The pipe may be the output, whose reader has ended, or another one.
        is_output_read = flush_output("\n")
        status = report_error(error, is_debug) if is_output_read else FAILURE
    except Exception as error:  # every error is reported in one line
        status = report_error(error, is_debug)
    flush_output()
    sys.exit(status)


def flush_output(end: str = "") -> bool:
    """Write the buffered output and `end`. If its reader has ended, such as `head`, drop it and return `False`."""
    try:
        print(end=end, flush=True)
    except BrokenPipeError:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())  # Python flushes again when it ends
        return False
    return True


def take_debug(words: list[str]) -> bool:
    """Remove a `--debug` without a value from a command line; with a value, it is transformers' option."""
    is_debug = False
    for index in reversed(range(len(words))):
        is_last = index == len(words) - 1
        has_value = not is_last and not words[index + 1].startswith("--")
        if words[index] == "--debug" and not has_value:
            del words[index]
            is_debug = True
    return is_debug


def report_error(error: BaseException, is_debug: bool = False) -> int:
    """Print an error in one line, and return the exit status. The line of an unexpected error names its log."""
    cause, remedy, status = explain_error(error)
    if is_debug:
        traceback.print_exception(error)
    line = f"error: {one_line(cause) or type(error).__name__}"
    if remedy:
        line += f" Do: {remedy}"
    log = write_log(error) if remedy == READ_TRACEBACK else None
    if log is not None:
        line += f" (traceback: {log})"
    print(line, file=sys.stderr)
    return status


def explain_error(error: BaseException) -> tuple[str, str | None, int]:
    """Return the message of an error, the remedy unless it is in the message, and the exit status."""
    if isinstance(error, KeyboardInterrupt):
        if error.args:
            return str(error), None, INTERRUPTED
        return "interrupted.", "run the same command again.", INTERRUPTED
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return str(error), None, status
    if isinstance(error, WrongPath):
        return str(error), None, MISTAKE
    if isinstance(error, WrongArguments):
        remedy = f"{program()} {error.options} lists the options."
        return str(error), remedy, MISTAKE
    if isinstance(error, ModuleNotFoundError):
        module = error.name or ""
        package = module.partition(".")[0]
        if package in EXTRAS:
            return f"{package} is not installed.", f"pip install 'modeling-vitp[{EXTRAS[package]}]'", FAILURE
    # Errors that a library raises for a missing package.
    is_of_package = isinstance(error, ImportError) and error.name is None
    if is_of_package or isinstance(error, PackageNotFoundError):
        return str(error), None, FAILURE
    is_of_torch = isinstance(error, (AssertionError, RuntimeError))
    if is_of_torch and re.search(OF_DEVICE, str(error)):
        return f"device: {error}", "set another device, for example cpu.", MISTAKE
    for cause in chain(error):
        explanation = explain_hub(cause)
        if explanation is not None:
            return explanation
    if type(error).__name__ in OF_SETTINGS:
        return str(error.__cause__ or error), None, MISTAKE
    if isinstance(error, OSError) and error.errno in PATH_ERRNOS and error.filename:
        return f"{error.filename}: {error.strerror}.", None, MISTAKE
    if is_mistake(error):
        return str(error), None, MISTAKE
    if isinstance(error, KeyError) and "metric_for_best_model" in str(error):  # of transformers, after an evaluation
        return str(error.args[0]), None, MISTAKE
    return f"{type(error).__name__}: {error}", READ_TRACEBACK, FAILURE


def is_mistake(error: BaseException) -> bool:
    """Return whether the user's settings, files or data cause an error, by its type."""
    if isinstance(error, OSError):
        # An error without a number is raised by a library with a message of its own.
        return error.errno is None or error.errno in PATH_ERRNOS
    return isinstance(error, (ValueError, yaml.YAMLError))


def program() -> str:
    """Return the name of the command, whether it was started as `vitp NAME`, as a file or as a module.

    A program that is not part of `vitp` sets `sys.argv[0]` to `python -m MODULE`.
    """
    word = sys.argv[0]
    if word.startswith("python -m "):
        return word
    path = Path(word)
    name = path.stem
    if name == "__main__":
        name = path.parent.name
    if name in ("modeling_vitp", "vitp"):
        return "vitp"
    # The first word is "vitp probe" if the command was started as such, and "probe" if it was started as a file.
    recipe = name.removeprefix("vitp ")
    return f"vitp {recipe}"


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    yielded = set()  # a cause may lead back to its error
    while error is not None and id(error) not in yielded:
        yielded.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def explain_hub(error: BaseException) -> tuple[str, str, int] | None:
    """Explain errors of the Hub's clients as [`explain_error`] does, by class names that several packages share."""
    class_names = {cls.__name__ for cls in type(error).__mro__}
    text = one_line(str(error))
    details = text or type(error).__name__
    # `datasets` has the name of the client's error only in its text.
    is_switched_off = "OfflineModeIsEnabled" in class_names or "OfflineModeIsEnabled" in text
    is_not_cached = "LocalEntryNotFoundError" in class_names
    if is_switched_off or (is_not_cached and is_offline()):
        cause = f"HF_HUB_OFFLINE is set, and a required file is not on this machine ({details})."
        return cause, "unset it, or pass a folder.", FAILURE
    is_connection_error = not class_names.isdisjoint(CONNECTION_ERRORS)
    if is_connection_error and not isinstance(error, PIPE_ERRORS):
        cause = f"the Hub cannot be reached ({details})."
        return cause, "check the connection, or pass folders and set HF_HUB_OFFLINE=1.", FAILURE
    return None


def is_offline() -> bool:
    """Return whether access to the Hub is switched off."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def write_log(error: BaseException) -> Path | None:
    """Write the traceback, without tokens, to a file of the user outside of the command's output; return its path.

    Files older than `LOG_DAYS` are deleted.
    """
    now = time.localtime()
    date = time.strftime("%Y-%m-%d %H:%M:%S", now)
    command = " ".join(sys.argv)
    trace = "".join(traceback.format_exception(error))
    text = f"{date} {command}\n{trace}"
    text = re.sub(r"(--?\w*token[ =])\S+|hf_[A-Za-z0-9]{16,}", r"\1…", text)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    user_folder = Path(cache, "vitp").expanduser()
    fallback = Path(tempfile.gettempdir(), f"vitp-{os.getuid()}")
    for folder in (user_folder, fallback):
        with contextlib.suppress(OSError):  # the folder is not writable
            folder.mkdir(parents=True, exist_ok=True)
            delete_old_logs(folder)
            # The file has a name of its own, and only the user can read it.
            prefix = time.strftime("error-%Y%m%d-%H%M%S-", now)
            handle, path = tempfile.mkstemp(suffix=".log", prefix=prefix, dir=folder)
            with open(handle, "w", errors="backslashreplace") as file:
                file.write(text)
            return Path(path)
    return None


def delete_old_logs(folder: Path) -> None:
    oldest_time = time.time() - LOG_DAYS * 86400
    for log in folder.glob("error*.log"):
        with contextlib.suppress(OSError):  # another process deletes it
            if log.stat().st_mtime < oldest_time:
                log.unlink()


def one_line(text: str) -> str:
    return " ".join(text.split())
