"""Retries and one-line explanations of Hub failures."""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..command.errors import one_line

logger = logging.getLogger(__name__)
RETRIES, LONGEST_WAIT = 5, 300

# The client raises a RuntimeError if a file cannot be sent.
FAILURES = (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled, LocalTokenNotFoundError, RuntimeError)
# `datasets` raises errors of its own for `OfflineModeIsEnabled`, with its name in the text.
OFFLINE = re.compile("OfflineModeIsEnabled|HF_HUB_OFFLINE")
# What to do, by the status of the Hub's answer.
ADVICE = {
    401: ": log in with `hf auth login`",
    403: ": use a token with write access, or open a pull request",
    429: ": wait a few minutes",
}
T = TypeVar("T")


def retry(step: Callable[[], T], after_lost_answer: bool = True) -> T:
    """Call `step`, with retries after 1, 2, 4 … s (or as the Hub asks) if the Hub is busy or the connection fails.

    Args:
        step: function that reads or writes.
        after_lost_answer: whether to retry if no answer arrived, although the step may have succeeded.
    """
    for number in range(RETRIES):
        try:
            return step()
        except Exception as error:  # several clients have errors of their own
            if not after_lost_answer and status_of(error) is None:
                raise
            wait = seconds_to_wait(error, number)
            if wait is None:
                raise
            pause(error, wait, number)
    return step()


def pause(error: Exception, wait: float, number: int) -> None:
    """Log the error and wait before the next retry."""
    logger.warning("%s. Retrying in %g s (%d of %d).", one_line(str(error)), wait, number + 1, RETRIES)
    time.sleep(wait)


def seconds_to_wait(error: BaseException, number: int) -> float | None:
    """Return the seconds to wait before the next retry, or `None` if a retry cannot help.

    A retry can help if the error, or one of its causes, is a busy server or a broken connection.

    Args:
        error: error of a client of the Hub.
        number: number of retries so far.
    """
    if isinstance(error, httpx2.TransportError):
        return 2**number
    while error is not None:
        if isinstance(error, OfflineModeIsEnabled) or OFFLINE.search(str(error)):
            return None
        status = status_of(error)
        if status is not None:
            asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
            if status == 429 and asked.isdigit():
                if int(asked) > LONGEST_WAIT:
                    logger.warning("The server asks to wait for %s s, which exceeds the limit.", asked)
                return min(int(asked) + 1, LONGEST_WAIT)
            return 2**number if status in (408, 409, 412, 429) or status >= 500 else None
        is_network = type(error).__module__.partition(".")[0] in ("aiohttp", "httpx", "httpx2", "requests")
        if (is_network or isinstance(error, (ConnectionError, TimeoutError))) and error.__cause__ is None:
            return 2**number
        error = error.__cause__ or error.__context__
    return None


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error's response, or `None`."""
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
    return status if isinstance(status, int) else None


def explain_failure(error: Exception, repo_id: str) -> str:
    """Return the cause of a failure in one line."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{one_line(str(error))} {explain_failure(error.__cause__, repo_id)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to reach the Hub"
    if isinstance(error, LocalTokenNotFoundError):
        return "no token found: log in with `hf auth login`"
    if not isinstance(error, HfHubHTTPError):
        return f"the connection to the Hub failed ({type(error).__name__}: {one_line(str(error)) or 'no answer'})"
    status = error.response.status_code
    advice = ADVICE.get(status, "")
    return f"the Hub refuses {repo_id} ({status}: {one_line(error.server_message or str(error))}){advice}"
