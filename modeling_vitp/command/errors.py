"""A command that cannot go on says so in one line; the traceback is in a file that the line names."""

import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

MISTAKE, FAILURE = 2, 1  # exit statuses
# Distributions of the extras, by the modules that they are imported as.
EXTRAS = dict.fromkeys(
    ("accelerate", "cv2", "datasets", "evaluate", "httpx2", "matplotlib", "nibabel", "peft", "rasterio", "trl"),
    "recipes",
)
EXTRAS |= {"gradio": "space", "monai": "medical", "pydicom": "medical"} | dict.fromkeys(
    ("onnx", "onnxruntime", "onnxscript"), "onnx"
)
EXTRAS["pycocoevalcap"] = "captions"
# What transformers' configurations raise of a field, and of fields together; by name, to import nothing.
OF_SETTINGS = ("StrictDataclassFieldValidationError", "StrictDataclassClassValidationError")
FILE_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class WrongArguments(ValueError):
    """A mistake on the command line or in the configuration file, in one line.

    Args:
        options: what lists those that there are.
    """

    def __init__(self, message: str, options: str = "--help"):
        super().__init__(message)
        self.options = options


class WrongPath(WrongArguments):
    """A file or folder that is not there or cannot be read, which no list of options mends."""


class RunStopped(RuntimeError):
    """A run that ends before its last step and exports nothing.

    Args:
        message: what happened, and what to do next.
        status: exit status of the command.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def refuse(message: str) -> NoReturn:
    """Raise [`WrongArguments`], in place of `ArgumentParser.error`, which prints the usage and ends the process."""
    raise WrongArguments(" ".join(message.split()))


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a command as a program and ends the process with its status; whatever it raises is one line.

    The status is 2 for what the user can mend in the command, its files or its data, 1 for a failure; an error with a
    `status` of its own, such as of a run that stopped, has that. `--debug` prints the traceback, too.
    """
    is_debug = take_debug(sys.argv)
    try:
        status = main()
    except KeyboardInterrupt as error:
        status = report_error(error, is_debug)
    except Exception as error:  # whatever it is, it is told in one line
        status = report_error(error, is_debug)
    sys.exit(status)


def take_debug(words: list[str]) -> bool:
    """Take a `--debug` without a value out of a command line; with one, it is transformers' option."""
    places = [index for index, word in enumerate(words) if word == "--debug"]
    ours = [index for index in places if words[index + 1 : index + 2] == [] or words[index + 1].startswith("--")]
    for index in reversed(ours):
        del words[index]
    return bool(ours)


def report_error(error: BaseException, is_debug: bool = False) -> int:
    """Print an error in one line and writes its traceback to the log; the exit status."""
    what, remedy, status = explain_error(error)
    log = write_log(error)
    if is_debug:
        traceback.print_exception(error)
    line = f"error: {one_line(what) or type(error).__name__}"
    line += f" Do: {remedy}" if remedy else ""
    print(f"{line} (traceback: {log})" if log else line, file=sys.stderr)
    return status


def explain_error(error: BaseException) -> tuple[str, str | None, int]:
    """Return what happened, what to do about it where the message does not say, and the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", "give the same command again to go on.", 130
    if hasattr(error, "status") and hasattr(error, "args") and isinstance(error.status, int):
        return str(error), None, error.status
    if isinstance(error, WrongArguments):
        remedy = None if isinstance(error, WrongPath) else f"{program()} {error.options} lists the options."
        return str(error), remedy, MISTAKE
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        if name in EXTRAS:
            return f"{name} is not installed.", f"pip install 'modeling-vitp[{EXTRAS[name]}]'", FAILURE
    of_hub = next((found for found in map(explain_hub, chain(error)) if found), None)
    if of_hub is not None:
        return of_hub
    if type(error).__name__ in OF_SETTINGS:
        return str(error.__cause__ or error), None, MISTAKE
    if isinstance(error, FILE_ERRORS):
        return f"{error.filename}: {error.strerror}." if error.filename else str(error), None, MISTAKE
    if isinstance(error, OSError) and error.errno is None or isinstance(error, ValueError):
        return str(error), None, MISTAKE
    what = f"{type(error).__name__}: {error}"
    return what, "look at the traceback; --debug prints it.", FAILURE


def program() -> str:
    """Return the name of the command, however it was called: as `vitp NAME`, as a file or as a module."""
    path = Path(sys.argv[0] if sys.argv else "vitp")
    name = path.parent.name if path.stem == "__main__" else path.stem
    return "vitp" if name == "modeling_vitp" else f"vitp {name.removeprefix('vitp')}".replace("  ", " ").strip()


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and what it was raised from."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def explain_hub(error: BaseException) -> tuple[str, str, int] | None:
    """Explain errors of the Hub's clients as [`explain_error`] does, by their names, which many packages share."""
    names = {cls.__name__ for cls in type(error).__mro__}
    found = re.search(r"(?:/api/(?:models|datasets|spaces)|//[^/]+(?:/datasets)?)/([\w.-]+/[\w.-]+)", str(error))
    repo = found[1] if found else "the repo"
    if found := re.search(r"Couldn't reach '(.+)' on the Hub \(OfflineModeIsEnabled\)", str(error)):
        what = f"{found[1]!r} is no file or folder, and HF_HUB_OFFLINE is set, so that it is not looked for on the Hub."
        return what, "give a folder, or unset HF_HUB_OFFLINE.", MISTAKE
    if "OfflineModeIsEnabled" in names or ("LocalEntryNotFoundError" in names and is_offline()):
        return "HF_HUB_OFFLINE is set, and not all that is needed is on this machine.", "unset it, or give a folder.", 1
    if "GatedRepoError" in names:
        return f"{repo} is gated.", "ask for access on its page, and log in with `hf auth login`.", MISTAKE
    if "RevisionNotFoundError" in names:
        return f"{repo} has no such revision.", "look at its branches and tags on its page.", MISTAKE
    if "RepositoryNotFoundError" in names:
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            return (
                f"{repo} is private, or not on the Hub.",
                "check the name; for a private repo, log in with `hf auth login`.",
                MISTAKE,
            )
        return f"{repo} is not on the Hub, or this user may not see it.", "check the name.", MISTAKE
    if names & {"DatasetNotFoundError"}:
        return one_line(str(error)), "check the name, or log in with `hf auth login`.", MISTAKE
    if names & {
        "ConnectError",
        "ConnectTimeout",
        "ReadTimeout",
        "TransportError",
        "ConnectionError",
        "ProxyError",
        "LocalEntryNotFoundError",
    }:
        return (
            f"the Hub cannot be reached ({one_line(str(error)) or type(error).__name__}).",
            "check the connection, or give folders and set HF_HUB_OFFLINE=1.",
            FAILURE,
        )
    return None


def is_offline() -> bool:
    """Return whether the Hub is not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def write_log(error: BaseException) -> Path | None:
    """Write the traceback to a file that lies outside of what the command writes, and return its path."""
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    for folder in (cache / "vitp", Path(tempfile.gettempdir()) / f"vitp-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "error.log"
            path.write_text(text, errors="backslashreplace")
            return path
        except OSError:
            continue
    return None


def one_line(text: str) -> str:
    return " ".join(text.split())
