"""What is done with the outputs of a run once they are on the disk: what fails then costs none of them."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from ..command.errors import one_line

logger = logging.getLogger(__name__)


def attempt(output_dir: str | Path, what: str, step: Callable[..., object], *args) -> int:
    """Carries out what a run is complete without, such as a card or a plot: 0, or 1 and one line if it fails."""
    try:
        step(*args)
    except Exception as error:  # whatever a library raises: the run is not lost for it
        cause = one_line(f"{type(error).__name__}: {error}").rstrip(".")
        logger.error("The run is complete in %s, but %s failed: %s.", output_dir, what, cause)
        return 1
    return 0


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.writing")
    written.write_text(text)
    os.replace(written, path)
