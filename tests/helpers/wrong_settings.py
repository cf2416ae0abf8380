"""Values that are not as a setting declares, made from the declaration by other rules than those of the package."""

import math
import re
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from modeling_vitp.command.settings import Interval, JsonText

VALUES = [None, True, 3, 2.5, "x", [1], ["x"], {"x": 1}]  # as YAML reads them
# Values of `VALUES` that a type accepts.
ACCEPTED = {NoneType: [None], bool: [True], int: [3], float: [3, 2.5], str: ["x"], Any: VALUES}


def wrong_values(declaration: Any) -> list[Any]:
    """Return values of other types, beyond the ends of an interval, and with an unknown key or choice."""
    origin, arguments = get_origin(declaration) or declaration, get_args(declaration)
    if declaration == JsonText:
        return [value for value in VALUES if not isinstance(value, dict)]
    if origin in (Union, UnionType):
        first, *others = (wrong_values(member) for member in arguments if member is not NoneType)
        common = [value for value in first if all(holds(other, value) for other in others)]
        return [value for value in common if value is not None or NoneType not in arguments]
    if origin is Annotated:
        return wrong_values(arguments[0]) + outside(arguments[1], arguments[0])
    if origin is Literal:
        return [*VALUES, "no such choice"]
    if origin in ACCEPTED:
        return [value for value in VALUES if not holds(ACCEPTED[origin], value)]
    if is_dataclass(origin):
        return VALUES  # `x` is no field
    if issubclass(origin, dict):
        wrong_items = wrong_values(arguments[1]) if arguments else []
        return [value for value in VALUES if not isinstance(value, dict)] + [{"a": item} for item in wrong_items]
    wrong_lists = [[item] for item in wrong_values(arguments[0])]
    if origin is tuple and arguments[-1] is not Ellipsis:
        wrong_lists.append([3] * (len(arguments) + 1))
    return [value for value in VALUES if not isinstance(value, list)] + wrong_lists


def wrong_words(declaration: Any) -> list[str]:
    """Return words of a command line that are not as declared. Any word is a text."""
    origin, arguments = get_origin(declaration) or declaration, get_args(declaration)
    if declaration == JsonText:
        return ["x"]
    if origin in (Union, UnionType):
        members = [member for member in arguments if member is not NoneType]
        is_text = str in members
        words = [word for member in members for word in wrong_words(member)]
        return [word for word in words if word.startswith("[") or not is_text]
    if origin is Annotated:
        return [*wrong_words(arguments[0]), *map(str, outside(arguments[1], arguments[0]))]
    if origin is Literal:
        return ["no such choice"]
    if origin in (list, tuple):
        return wrong_words(arguments[0])
    if is_dataclass(origin):
        return ["[1]", '{"no such key": 1}']
    return [] if origin is str else ["[1]"]


def outside(interval: Interval, kind: type) -> list[float]:
    """Return the numbers next to an interval on both sides, its excluded ends among them."""
    opening, low, high, closing = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", interval.text).groups()
    numbers = [kind(low) - 1] + [kind(low)] * (opening == "(")
    if high != "inf":
        numbers += [kind(high) + 1] + [kind(high)] * (closing == ")")
    return numbers + [math.nan, math.inf] * (kind is float)


def holds(values: list[Any], wanted: Any) -> bool:
    """Return whether a list has a value of the same type; `True` is not 1."""
    return any(type(value) is type(wanted) and repr(value) == repr(wanted) for value in values)
