"""Words and numbers in the report of an adaptation."""

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from ..metrics.resampling import Difference
from .arguments import RANDOM
from .pages import Strong, excludes_zero


def label(name: str) -> str:
    return "random weights" if name == RANDOM else name


def caption_of(file: str) -> str:
    """Return the name of a picture as words."""
    return re.sub(r"[_\W]+", " ", Path(file).stem)


def points(value: float, sign: str = "") -> str:
    """Return a score in points with one decimal and a minus sign."""
    rounded_points = round(100 * float(value), 1) + 0.0  # `+ 0.0` turns -0.0 to 0.0.
    return f"{rounded_points:{sign}.1f}".replace("-", "−")


def cell(difference: Difference | None, number: Callable[..., str] = points) -> str:
    """Return a difference with its interval for a table, in bold if the interval excludes 0.

    Args:
        difference: difference; `None` gives an empty cell.
        number: function that formats a score with a sign.
    """
    if difference is None:
        return ""
    text = f"{number(difference.mean, '+')} ({number(difference.low)} to {number(difference.high)})"
    return Strong(text) if excludes_zero(difference) else text


def duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
