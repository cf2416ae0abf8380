"""When the Hub fails: tries again where that helps, and otherwise says why in one line."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

TRIES, LONGEST_WAIT = 5, 300
# RuntimeError is what the client makes of a failure to send one file.
FAILURES = (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled, LocalTokenNotFoundError, RuntimeError)
T = TypeVar("T")


def tried(step: Callable[[], T], after_lost_answer: bool = True) -> T:
    """Carries out a step; again where the Hub is busy or the connection broke, after 1, 2, 4 … s or what it asks."""
    for number in range(TRIES):
        try:
            return step()
        except (HfHubHTTPError, httpx2.TransportError) as error:
            wait = pause(error, number)
            is_answer = isinstance(error, HfHubHTTPError)
            if wait is None or number == TRIES - 1 or not (is_answer or after_lost_answer):
                raise
        time.sleep(wait)
    raise AssertionError


def pause(error: Exception, number: int) -> float | None:
    """Seconds to wait before the next try, `None` if another would end the same."""
    if not isinstance(error, HfHubHTTPError):
        return 2**number
    status = error.response.status_code
    if status == 429 and error.response.headers.get("Retry-After", "").isdigit():
        return min(int(error.response.headers["Retry-After"]) + 1, LONGEST_WAIT)
    return 2**number if status in (409, 412, 429) or status >= 500 else None


def explain(error: Exception, repo_id: str) -> str:
    """The cause of a failure, in one line."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{one_line(str(error))} {explain(error.__cause__, repo_id)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to reach the Hub"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: log in with `hf auth login`"
    if not isinstance(error, HfHubHTTPError):
        return f"the connection to the Hub failed ({type(error).__name__}: {one_line(str(error)) or 'no answer'})"
    status, said = error.response.status_code, one_line(error.server_message or "")
    said = f" ({status}: {said})" if said else f" ({status})"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated, and this user has no access{said}: ask for it on its page"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision{said}"
    if status == 401:
        return f"the Hub does not accept the token, or there is none{said}: log in with `hf auth login`"
    if status in (402, 403):
        return f"this token may not write to {repo_id}{said}: use one with write access, or open a pull request"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} is not there, or this user may not see it{said}"
    if status in (409, 412):
        return f"somebody else is changing {repo_id}{said}"
    if status == 429:
        return f"the Hub asks for fewer requests{said}: wait a few minutes"
    if status >= 500:
        return f"the Hub is out of order{said}: wait a few minutes"
    return f"the Hub refuses {repo_id}{said}"


def one_line(text: str) -> str:
    return " ".join(text.split())
