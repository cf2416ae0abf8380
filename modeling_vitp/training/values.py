"""What values an argument may have: said where it is defined, and checked before anything else is done."""

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from ..command.shards import Shard


class Arguments:
    """Base of argument classes.

    What is a mapping in a configuration file is JSON on the command line. Numbers lie within their limits, and so does
    each of a list; `None` is no value.

    Attributes:
        file_fields: of the fields that are mappings, the ones that may name a file instead.
        limits: intervals by name of the field, such as `"[0, 1)"`, see [`check_within`].
        choices: values by name of the field.

    Raises:
        ValueError: names the field, its value and what it may be.
    """

    file_fields: ClassVar[tuple[str, ...]] = ()
    limits: ClassVar[dict[str, str]] = {}
    choices: ClassVar[dict[str, Sequence[str]]] = {}

    def __post_init__(self):
        self._read_mappings()
        own = [cls for cls in type(self).__mro__ if issubclass(cls, Arguments)]
        for name, interval in {k: v for cls in reversed(own) for k, v in vars(cls).get("limits", {}).items()}.items():
            check_within(name, getattr(self, name), interval)
        for name, known in {k: v for cls in reversed(own) for k, v in vars(cls).get("choices", {}).items()}.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r} is none of {', '.join(known)}.")
        if hasattr(super(), "__post_init__"):
            super().__post_init__()

    def _read_mappings(self) -> None:
        # Of libraries' classes that these are mixed into, a mapping may be a file.
        own = [cls for cls in type(self).__mro__ if issubclass(cls, Arguments)]
        names = {name for cls in own for name in vars(cls).get("__annotations__", {})}
        types = get_type_hints(type(self))  # those of the fields are changed by the parser
        for name in names & {item.name for item in fields(self)}:
            value = getattr(self, name)
            if isinstance(value, str) and dict in get_args(types[name]):
                if value.lstrip().startswith("{") or name not in self.file_fields:
                    setattr(self, name, read_mapping(name, value))
            check_type(name, getattr(self, name), types[name])
        for name in {item.name for item in fields(self)} - names:  # of libraries' classes, which take a float of YAML
            value, kinds = getattr(self, name), {types[name], *get_args(types[name])}
            if isinstance(value, float) and int in kinds and float not in kinds:
                if not value.is_integer():
                    raise ValueError(f"{name}={value!r} is no whole number.")
                setattr(self, name, int(value))


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raises a `ValueError` unless a value, which may come from a YAML file, is of the type of its field.

    Args:
        kind: a class, a union, or a list, sequence or mapping of such.
    """
    if not is_of(value, kind):
        shown = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")
        shown = shown.replace("collections.abc.", "")
        hint = " YAML reads yes, no, on, off, numbers and dates as other types: put names in quotes."
        hint = hint if "str" in shown and not all(isinstance(item, str) for item in scalars(value)) else ""
        raise ValueError(f"{name}={str(value)[:80]!r} is of the wrong type: {shown}.{hint}")


def scalars(value: Any) -> list[Any]:
    """What is in a value that is no list or mapping."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    return [item for part in value for item in scalars(part)] if isinstance(value, (list, tuple)) else [value]


def is_of(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(is_of(value, part) for part in parts)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(is_of(k, parts[0]) and is_of(v, parts[1]) for k, v in value.items())
    if origin is not None:
        return isinstance(value, (list, tuple)) and all(is_of(item, parts[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if kind is Sequence:
        return isinstance(value, (list, tuple))
    return isinstance(value, type(None) if kind is None else kind)


def read_mapping(name: str, text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        raise ValueError(f"{name}={text!r} is no mapping: give JSON, such as '{{\"key\": 1}}'.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: {text[:80]!r} is no JSON: {error}.") from error


def check_within(name: str, value: float | Sequence[float] | None, interval: str) -> None:
    """Raises a `ValueError` unless a number, or each of a list, is in an interval.

    Args:
        interval: as in mathematics: `[` and `]` with their end, `(` and `)` without; `"(0, inf)"` is any finite number
            above 0. NaN is in none.
    """
    opening, low, high, closing = re.fullmatch(r"([\[(])\s*(\S+),\s*(\S+?)\s*([\])])", interval).groups()
    for number in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
        above = number >= float(low) if opening == "[" else number > float(low)
        below = number <= float(high) if closing == "]" else number < float(high)
        if not (above and below) or math.isnan(number):
            raise ValueError(f"{name}={value!r} is not in {interval}.")


def within(interval: str, kind: type = int) -> Callable[[str], float]:
    """The type of an argument of argparse that is a number in an interval."""

    def number(text: str) -> float:
        try:
            value = kind(text)
            check_within("it", value, interval)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} in {interval}") from None
        return value

    return number


positive = within("[1, inf)")
not_negative = within("[0, inf)")


def shard(text: str) -> Shard:
    """The type of an argument of argparse that is a shard, `NUMBER/COUNT`."""
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
