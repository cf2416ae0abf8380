"""Malformed inputs drawn with a seed, and checks of their outcome."""

import copy
import ctypes
import gc
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SECONDS = 20  # time limit of one input
BYTES = 1 << 30  # limit of the additional memory of all inputs of a test
ODD = [None, True, False, 0, 1, -1, 3, 2.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), 10**30, "", " "]
ODD += ["x", "nan", "0", "-1", "\0", "\ud800", "é" * 40, "<image>", "<image>" * 3, "../x", "/etc/passwd", "a" * 5000]
ODD += ["http://127.0.0.1:1/a.png", "file:///etc/passwd", "hf://datasets/a/b/c", "s3://b/a", "*", "[", "{", "%s", "{x}"]
WORDS = ["nan", "x", "", "1e999", "-5", "0", "7", "<", "</a>", "&x;", "é", "1_0", "0x1"]
ODD += [[], {}, [[]], [None], {"a": 1}, [1, 2, 3], [1, 2, 3, 4], ["x"], {"type": "text"}, {"": None}, [{}], [[1, 2]]]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every item in nested dictionaries and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutate(rng: random.Random, value: Any, changes: int = 1) -> Any:
    """Return a copy with items replaced, removed, added, repeated or renamed."""
    value = copy.deepcopy(value)
    for _ in range(changes):
        *path, last = rng.choice([place for place in places(value) if place] or [("",)])
        if last == "":
            return rng.choice(ODD)
        holder = value
        for key in path:
            holder = holder[key]
        way = rng.choice(["replace"] * 6 + ["remove", "repeat", "add", "rename", "wrap"])
        if way == "replace":
            holder[last] = copy.deepcopy(rng.choice(ODD))
        elif way == "remove":
            del holder[last]
        elif way == "wrap":
            holder[last] = rng.choice([[holder[last]], {"x": holder[last]}])
        elif isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last] if way == "repeat" else rng.choice(ODD)))
        elif way == "rename":
            holder[rng.choice(["x", "", "type", "id", f"{last}s"])] = holder.pop(last)
        else:
            holder[rng.choice(["x", "url", "path", "image_url", "root", "video"])] = copy.deepcopy(rng.choice(ODD))
    return value


def damage(rng: random.Random, content: bytes) -> bytes:
    """Return damaged file content, as after a disk error, a broken transfer or a wrong edit."""
    way = rng.choice(["cut", "flip", "zero", "insert", "empty", "swap", "head", "repeat"])
    place = rng.randrange(len(content) + 1)
    length = rng.choice([1, 2, 8, 100])
    if way == "empty":
        return rng.choice(
            [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"null", bytes(rng.randrange(256) for _ in range(50))]
        )
    if way == "head":
        place = rng.randrange(min(len(content), 64) + 1)
    if way in ("flip", "head"):
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in content[place : place + length])
        return content[:place] + flipped + content[place + length :]
    return {
        "cut": content[:place],
        "zero": content[:place] + bytes(length) + content[place + length :],
        "insert": content[:place] + bytes(rng.randrange(256) for _ in range(length)) + content[place:],
        "swap": content[place:] + content[:place],
        "repeat": content[:place] + content[max(place - length, 0) :],
    }[way]


def alter_file(rng: random.Random, path: Path) -> None:
    """Mutate the items of a JSON file, replace a word of a text or XML file, or damage the bytes of any file."""
    content = path.read_bytes()
    is_edited = rng.random() < 0.7
    if path.suffix.endswith("json") and is_edited:
        path.write_text(json.dumps(mutate(rng, json.loads(content), rng.choice([1, 1, 2]))))
    elif path.suffix in (".xml", ".txt") and is_edited:
        words = content.decode().replace("<", " <").replace(">", "> ").split(" ")
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        path.write_text(" ".join(words))
    else:
        path.write_bytes(damage(rng, content))


def check_outcomes(results: list, least: int) -> None:
    """Fail the test if too few inputs ended in an error, or too few in a result."""
    errors = sum(isinstance(result, Exception) for result in results)
    assert min(errors, len(results) - errors) > least, f"{errors} errors of {len(results)}"


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@contextmanager
def limits() -> Iterator[None]:
    """Fail the test if an input hangs or all inputs together take too much memory."""

    def stop(*_):
        raise AssertionError(f"an input took more than {SECONDS} s")

    # Free and return memory of earlier tests and reset the peak, because each of them would hide new allocations.
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    taken = peak_memory() - before
    assert taken < BYTES, f"{taken >> 20} MiB were taken"


@contextmanager
def one_input() -> Iterator[None]:
    """Fail the test if the block takes too long; use inside [`limits`]."""
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def outcome(action: Callable[[], Any], *named: str, kinds: tuple[type[Exception], ...] = (ValueError,)) -> Any:
    """Return the result of an action, or its error if the kind is expected and the message contains one of the names.

    All other errors are raised, because they are the bugs that these tests look for.
    """
    try:
        with one_input():
            return action()
    except kinds as error:
        # Subclasses of ValueError of other libraries, such as UnicodeDecodeError, do not name the input.
        assert type(error) in kinds, f"{type(error).__name__}: {error}"
        assert any(name in str(error) for name in named), f"names none of {named}: {error}"
        return error
