"""Retries and one-line explanations of Hub failures."""

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..command.errors import one_line

logger = logging.getLogger(__name__)
RETRIES = 5
LONGEST_WAIT = 300  # seconds

# The client raises a RuntimeError if a file cannot be sent.
FAILURES = (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled, LocalTokenNotFoundError, RuntimeError)
NETWORK_PACKAGES = ("aiohttp", "httpx", "httpx2", "requests")
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
            wait = seconds_to_wait(error, number)
            is_lost_answer = status_of(error) is None
            if wait is None or (is_lost_answer and not after_lost_answer):
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
        if status == 429:
            return requested_wait(error) or 2**number
        if status is not None:
            is_temporary = status in (408, 409, 412) or status >= 500
            return 2**number if is_temporary else None
        package = type(error).__module__.partition(".")[0]
        is_of_network = package in NETWORK_PACKAGES or isinstance(error, (ConnectionError, TimeoutError))
        if is_of_network and error.__cause__ is None:
            return 2**number
        error = error.__cause__ or error.__context__
    return None


def requested_wait(error: BaseException) -> int | None:
    """Return the seconds that a busy server asks to wait, up to the limit, or `None` if it names none."""
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", {})
    seconds = headers.get("Retry-After", "")
    if not seconds.isdigit():
        return None
    if int(seconds) > LONGEST_WAIT:
        logger.warning("The server asks to wait for %s s, which exceeds the limit.", seconds)
    return min(int(seconds) + 1, LONGEST_WAIT)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error's response, or `None`."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None:  # aiohttp's errors have it themselves
        status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def explain_failure(error: Exception, repo_id: str) -> str:
    """Return the cause of a failure in one line."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{one_line(str(error))} {explain_failure(error.__cause__, repo_id)}"
    if isinstance(error, HFValidationError):
        return one_line(str(error))
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to reach the Hub"
    if isinstance(error, LocalTokenNotFoundError):
        return "no token found: log in with `hf auth login`"
    if not isinstance(error, HfHubHTTPError):
        return f"the connection to the Hub failed ({type(error).__name__}: {one_line(str(error)) or 'no answer'})"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated, and this user has no access ({error.response.status_code}): request it on its page"
    status = error.response.status_code
    if status >= 500:
        return f"the Hub is not available ({status}): wait a few minutes"
    advice = ADVICE.get(status, "")
    return f"the Hub refuses {repo_id} ({status}: {one_line(error.server_message or str(error))}){advice}"
