"""Failures that a test asks the server for."""

import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass
class Failure:
    """What goes wrong with the requests that it is for.

    Args:
        method: HTTP method, or `*`.
        path: pattern of the path, as in `fnmatch` (`*` also matches slashes), without the query.
        status: of the answer that is given instead; nothing is done.
        times: how many requests fail; `None` for all.
        after: how many requests pass before.
        code, message: `X-Error-Code` and `X-Error-Message` of the answer.
        retry_after: seconds, in its `Retry-After`.
        cut: the connection is closed after so many bytes of the body: the request's, or that of the answer if the
            request has none.
        lost: the request is carried out, but the connection is closed before the answer.
        delay: seconds until the answer.
    """

    method: str
    path: str
    status: int | None = None
    times: int | None = 1
    after: int = 0
    code: str | None = None
    message: str = "as the test wants it"
    retry_after: int | None = None
    cut: int | None = None
    lost: bool = False
    delay: float = 0.0
    count: int = field(default=0, init=False)  # requests that failed so far


class Failures:
    """The failures to come; each request takes the first that is for it."""

    def __init__(self):
        self.lock, self.waiting = threading.Lock(), []

    def add(self, failure: Failure) -> Failure:
        with self.lock:
            self.waiting.append(failure)
        return failure

    def clear(self) -> None:
        with self.lock:
            self.waiting.clear()

    def take(self, method: str, path: str) -> Failure | None:
        with self.lock:
            for failure in self.waiting:
                if failure.method not in ("*", method) or not fnmatchcase(path, failure.path):
                    continue
                if failure.after > 0:
                    failure.after -= 1
                elif failure.times is None or failure.count < failure.times:
                    failure.count += 1
                    return failure
        return None
