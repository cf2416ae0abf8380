"""What goes to and fro between the server and its routes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Request:
    """What was received; `hub.requests` keeps them, without their bodies."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    address: str  # the path as it was sent, quoted
    user: str | None = None
    scope: str | None = None
    received: int = 0  # bytes of the body
    status: int | None = None  # None if the connection was cut
    body: Iterator[bytes] = field(default=iter(()), repr=False)

    def read(self) -> bytes:
        return b"".join(self.body)

    def json(self) -> dict:
        return json.loads(self.read() or b"{}")


@dataclass
class Answer:
    """`content` is sent as JSON, if it is not a file."""

    content: dict | list | Path | bytes | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
