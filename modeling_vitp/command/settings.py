"""Checks of values that a user sets, in YAML or on the command line."""

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise a `ValueError` if a value, which may come from a YAML file, does not have the type of its field.

    Args:
        kind: class, union, or list, sequence or mapping type.
    """
    if not is_of(value, kind):
        shown = describe_type(kind)
        hint = " YAML does not read yes, no, on, off, numbers and dates as text: put names in quotes."
        hint = hint if "text" in shown and not all(isinstance(item, str) for item in scalars(value)) else ""
        raise ValueError(f"Expected {name} to be {shown}, got {str(value)[:80]!r}.{hint}")


def describe_type(kind: Any) -> str:
    """Return the words of an error message for a type, such as "a list, each item a mapping"."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(part) for part in parts if part is not type(None))
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    if origin in words or not isinstance(origin, type):
        return words.get(origin, "any value")
    if issubclass(origin, Mapping):
        return "a mapping"
    if not issubclass(origin, Sequence):
        return origin.__name__
    return f"a list, each item {describe_type(parts[0])}" if parts else "a list"


def scalars(value: Any) -> list[Any]:
    """Return all scalar values in a nested list or mapping, including the keys of mappings."""
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
