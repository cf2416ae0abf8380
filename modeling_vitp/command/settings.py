"""Declared settings: the annotation of a field has its type and range, the field its default and help.

    @dataclass
    class CropSettings(Settings):
        size: PositiveInt = field(default=512, metadata={"help": "Side of the crops in pixels."})
        flip: Probability = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
        on_error: Literal["raise", "skip"] = field(default="raise", metadata={"help": "Behavior on an invalid image."})

A new instance validates its fields by their declarations. [`from_mapping`] creates an instance from a mapping of a YAML
file, [`~transformers.HfArgumentParser`] from a command line, and [`add_options`] adds fields to an `argparse` parser.
"""

import argparse
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from inspect import get_annotations
from itertools import repeat
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import nearest_name

Dataclass = TypeVar("Dataclass")
WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", Any: "any value"}


@dataclass(frozen=True)
class Interval:
    """Range of a number, for `Annotated`. NaN is in no interval.

    Args:
        text: interval in mathematical notation. `[` and `]` include the end, `(` and `)` exclude it: `"(0, inf)"` has
            all finite numbers above 0.
    """

    text: str

    def __contains__(self, number: float) -> bool:
        match = re.fullmatch(r"([\[(])\s*(\S+),\s*(\S+?)\s*([\])])", self.text)
        opening, low, high, closing = match.groups()
        is_above = number >= float(low) if opening == "[" else number > float(low)
        is_below = number <= float(high) if closing == "]" else number < float(high)
        return is_above and is_below

    def __str__(self) -> str:
        return f"in {self.text}"


class OnlyOnCommandLine:
    """Mark of a text that [`Settings`] has replaced before it validates values."""

    def __contains__(self, text: str) -> bool:
        return False


PositiveInt = Annotated[int, Interval("[1, inf)")]
NonNegativeInt = Annotated[int, Interval("[0, inf)")]
PositiveFloat = Annotated[float, Interval("(0, inf)")]
NonNegativeFloat = Annotated[float, Interval("[0, inf)")]
Probability = Annotated[float, Interval("[0, 1]")]
Share = Annotated[float, Interval("(0, 1]")]
DropRate = Annotated[float, Interval("[0, 1)")]
Percentile = Annotated[float, Interval("[0, 100]")]
# JSON of a mapping on the command line, as in `dict | JsonText | None`. In `dict | str | None`, a text that does not
# begin like JSON is kept: the name of a file.
JsonText = Annotated[str, OnlyOnCommandLine()]


class Settings:
    """Base of dataclasses whose fields declare their type, range, choices, default and help.

    Choices are a `Literal`, ranges an [`Interval`], mappings with known keys another dataclass. A mapping is given as
    JSON on the command line. A whole float of an integer field becomes an integer.

    A subclass that a dataclass of a library is combined with may annotate fields of the library with a range. Other
    fields of a library are checked only if they are of a scalar type. Rules between fields are in `__post_init__` of a
    subclass, after that of this class.

    Attributes:
        unsupported: reason by the name of a library's option that may not be set.
        advanced: names of fields that the short help of a command leaves out.

    Raises:
        ValueError: if a value is not as declared; the message names the field, the declaration and the value.
    """

    unsupported: ClassVar[dict[str, str]] = {}
    advanced: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        declarations = own_fields(type(self))
        for name, declaration in declarations.items():
            value = getattr(self, name)
            value = read_command_line(name, value, declaration)
            value = convert(name, value, declaration)
            object.__setattr__(self, name, value)  # a dataclass may be frozen
        check_library_fields(self, declarations)
        for name, reason in unsupported_options(type(self)).items():
            value = getattr(self, name, None)  # some releases of a library lack the option
            if value:
                raise ValueError(f"{name}={value} is not supported: {reason}")
        if hasattr(super(), "__post_init__"):
            super().__post_init__()


def unsupported_options(cls: type) -> dict[str, str]:
    """Return `unsupported` of a [`Settings`] class and the classes that it inherits from."""
    reasons: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        reasons.update(vars(base).get("unsupported", {}))
    return reasons


def advanced_options(cls: type) -> set[str]:
    """Return `advanced` of a [`Settings`] class and the classes that it inherits from."""
    names: set[str] = set()
    for base in cls.__mro__:
        names.update(vars(base).get("advanced", ()))
    return names


@cache
def declarations_of(cls: type) -> dict[str, Any]:
    """Return the declared type of each field of a dataclass, with its ranges."""
    hints = get_type_hints(cls, include_extras=True)  # a parser changes the types that the fields store
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


@cache
def own_fields(cls: type) -> dict[str, Any]:
    """Return the declarations of a [`Settings`] class without those of library classes that it inherits from."""
    own_names = set()
    for base in cls.__mro__:
        if issubclass(base, Settings):
            own_names |= get_annotations(base).keys()
    return {name: declaration for name, declaration in declarations_of(cls).items() if name in own_names}


def from_mapping(cls: type[Dataclass], mapping: Mapping[str, Any], where: str) -> Dataclass:
    """Create a dataclass, and the dataclasses in its fields, from a mapping of a YAML file.

    Args:
        cls: any dataclass whose annotations are declarations; it need not be a [`Settings`].
        mapping: values by the names of the fields.
        where: name of the mapping in errors, such as `"data: splits: train"`.

    Raises:
        ValueError: if a key is unknown or missing, or a value is not as declared, or the class refuses the values.
    """
    check_value(where, mapping, cls)
    declarations = declarations_of(cls)
    check_keys(where, mapping, declarations, required_fields(cls))
    arguments = {}
    for name, value in mapping.items():
        arguments[name] = convert(f"{where}: {name}", value, declarations[name])
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def required_fields(cls: type) -> list[str]:
    """Return the names of the fields without a default."""
    names = []
    for field in fields(cls):
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if field.init and not has_default:
            names.append(field.name)
    return names


def check_keys(name: str, mapping: Mapping, known: Collection[str], required: Collection[str] = ()) -> None:
    """Raise a `ValueError` that names unknown keys of a mapping, each with the nearest known key, and missing ones."""
    problems = []
    for key in mapping:
        if key not in known:
            hint = f"Known: {', '.join(known)}."
            nearest = nearest_name(str(key), known)
            if nearest is not None:
                hint = f"Did you mean {nearest!r}?"
            problems.append(f"unknown key {key!r}. {hint}")
    missing_keys = [repr(key) for key in required if key not in mapping]
    if missing_keys:
        problems.append(f"missing {', '.join(missing_keys)}.")
    if problems:
        raise ValueError(f"{name}: {' '.join(problems)}")


def convert(name: str, value: Any, declaration: Any) -> Any:
    """Return a value in its declared form: mappings as dataclasses, lists as tuples, whole floats as integers.

    Raises:
        ValueError: if the value is not as declared.
    """
    is_whole_float = isinstance(value, float) and value.is_integer()
    if is_whole_float and not matches(value, declaration):
        integer = int(value)
        if matches(integer, declaration):  # the error of a wrong value has it as it was written
            value = integer
    check_value(name, value, declaration)
    return build(name, value, declaration)


def build(name: str, value: Any, declaration: Any) -> Any:
    """Return a value that matches its declaration, with the dataclasses and tuples of the declaration in it."""
    matching_members = [member for member in members_of(declaration) if matches(value, member)]
    declaration = matching_members[0]
    origin = origin_of(declaration)
    if is_dataclass(origin) and isinstance(value, Mapping):
        return from_mapping(origin, value, name)
    is_collection = isinstance(value, (Mapping, list, tuple))
    if not is_collection or not get_args(declaration):
        return value
    items = []
    for item_name, item, item_declaration in declared_items(name, value, declaration):
        items.append(build(item_name, item, item_declaration))
    if isinstance(value, Mapping):
        return dict(zip(value, items))
    return tuple(items) if origin is tuple else items


def check_value(name: str, value: Any, declaration: Any) -> None:
    """Raise a `ValueError` if a value, which may come from a YAML file, is not as declared."""
    if matches(value, declaration):
        return
    for member in members_of(declaration):
        for item_name, item, item_declaration in declared_items(name, value, member):
            check_value(item_name, item, item_declaration)  # names the wrong item
    expected = describe(declaration)
    advice = ""
    is_text = all(isinstance(scalar, str) for scalar in scalars_of(value))
    if "text" in expected and not is_text:
        advice = " YAML does not read yes, no, on, off, numbers and dates as text: put names in quotes."
    raise ValueError(f"Expected {name} to be {expected}, got {repr(value)[:80]}.{advice}")


def matches(value: Any, declaration: Any) -> bool:
    """Return whether a value has a declared type and is in its range. Lists of YAML match tuples."""
    origin = origin_of(declaration)
    arguments = get_args(declaration)
    if origin is Any:
        return True
    if origin in (Union, UnionType):
        return any(matches(value, member) for member in arguments)
    if origin is Annotated:
        base, *intervals = arguments
        return matches(value, base) and all(value in interval for interval in intervals)
    if origin is Literal:
        return any(isinstance(value, type(choice)) and value == choice for choice in arguments)
    if is_dataclass(origin):
        return isinstance(value, (origin, Mapping))
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and items_match(value, declaration)
    if issubclass(origin, Sequence) and origin is not str:
        return isinstance(value, (list, tuple)) and items_match(value, declaration)
    return isinstance(value, origin)


def origin_of(declaration: Any) -> Any:
    """Return a declared class without its arguments, such as `list` of `list[int]`."""
    return get_origin(declaration) or declaration


def items_match(value: Mapping | list | tuple, declaration: Any) -> bool:
    """Return whether the items of a mapping or list, and the keys of a mapping, are as declared."""
    arguments = get_args(declaration)
    if isinstance(value, Mapping) and arguments:
        for key in value:
            if not matches(key, arguments[0]):
                return False
    if is_fixed_tuple(declaration) and len(value) != len(arguments):
        return False
    for _, item, item_declaration in declared_items("", value, declaration):
        if not matches(item, item_declaration):
            return False
    return True


def members_of(declaration: Any) -> tuple[Any, ...]:
    """Return the members of a union, or else the declaration itself, without their ranges."""
    declared_members = (declaration,)
    if get_origin(declaration) in (Union, UnionType):
        declared_members = get_args(declaration)
    members = []
    for member in declared_members:
        if get_origin(member) is Annotated:
            member = get_args(member)[0]
        members.append(member)
    return tuple(members)


def declared_items(name: str, value: Any, declaration: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and declaration of each item of a list or mapping, if the declaration is about items."""
    origin = get_origin(declaration)
    arguments = get_args(declaration)
    if isinstance(value, Mapping) and origin in (dict, Mapping):
        for key, item in value.items():
            yield f"{name}: {key}", item, arguments[1]
    elif isinstance(value, (list, tuple)) and origin in (list, tuple, Sequence):
        item_declarations = repeat(arguments[0])
        if is_fixed_tuple(declaration):  # a list of another length is an error of its own
            item_declarations = arguments
        for index, (item, item_declaration) in enumerate(zip(value, item_declarations)):
            yield f"{name}[{index}]", item, item_declaration


def is_fixed_tuple(declaration: Any) -> bool:
    return get_origin(declaration) is tuple and get_args(declaration)[-1] is not Ellipsis


def describe(declaration: Any) -> str:
    """Return the words of an error message for a declaration, such as "a number in [0, 1)"."""
    origin = origin_of(declaration)
    arguments = get_args(declaration)
    if origin in (Union, UnionType):
        return " or ".join(describe(member) for member in arguments if member not in (NoneType, JsonText))
    if origin is Annotated:
        base, *intervals = arguments
        return " ".join([describe(base), *map(str, intervals)])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in WORDS:
        return WORDS[origin]
    if is_mapping(declaration):
        if not arguments or arguments[1] is Any:
            return "a mapping"
        keys = f"each key {describe(arguments[0])}, " if get_origin(arguments[0]) is Literal else ""
        return f"a mapping, {keys}each value {describe(arguments[1])}"
    if not issubclass(origin, Sequence):
        return origin.__name__
    if not arguments:
        return "a list"
    length = f" of {len(arguments)}" if is_fixed_tuple(declaration) else ""
    return f"a list{length}, each item {describe(arguments[0])}"


def scalars_of(value: Any) -> list[Any]:
    """Return all scalar values in a nested list or mapping, including the keys of mappings."""
    if isinstance(value, Mapping):
        return scalars_of([*value, *value.values()])
    if isinstance(value, (list, tuple)):
        return [scalar for item in value for scalar in scalars_of(item)]
    return [value]


def read_command_line(name: str, value: Any, declaration: Any) -> Any:
    """Return the mapping for a text of the command line: its JSON, or `None` for an empty text."""
    members = get_args(declaration)
    takes_mapping = any(is_mapping(member) for member in members)
    if not takes_mapping or not isinstance(value, str):
        return value
    if value == "":
        return None  # replaces the mapping of a configuration
    takes_file = str in members
    is_json = value.lstrip().startswith(("{", "["))
    if takes_file and not is_json:
        return value
    return read_mapping(name, value)


def is_mapping(declaration: Any) -> bool:
    origin = origin_of(declaration)
    return isinstance(origin, type) and (is_dataclass(origin) or issubclass(origin, Mapping))


def read_mapping(name: str, text: str) -> dict[str, Any]:
    """Read the JSON of a mapping. Raise a `ValueError` that names the setting if it is anything else."""
    mapping = None
    reason = ""
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f" ({error})"
    if not isinstance(mapping, dict):
        raise ValueError(
            f"Expected {name} to be a mapping in JSON, such as '{{\"key\": 1}}', got {text[:80]!r}{reason}."
        )
    return mapping


def check_library_fields(item: Any, skipped_names: Collection[str] = ()) -> None:
    """Check the types of scalar fields of a library's dataclass, which does not do so, and convert whole floats.

    Defaults and values of Python types that YAML does not have are not checked.

    Args:
        item: dataclass of a library, or one that inherits from it.
        skipped_names: names of fields that are not checked here.
    """
    scalar_types = {str, bool, int, float, NoneType}
    yaml_types = (NoneType, bool, int, float, str, list, dict)
    declarations = declarations_of(type(item))
    for field in fields(item):
        name = field.name
        value = getattr(item, name)
        if name in skipped_names or name not in declarations or value is field.default:
            continue
        declaration = declarations[name]
        declared_types = set(members_of(declaration))
        takes_text = str in declared_types and bool not in declared_types
        if takes_text and isinstance(value, bool):  # as YAML reads `eval_strategy: no`
            check_value(name, value, str)
        elif declared_types <= scalar_types and isinstance(value, yaml_types):
            value = convert(name, value, declaration)
            setattr(item, name, value)


def add_options(parser: argparse.ArgumentParser, cls: type, names: Sequence[str]) -> None:
    """Add fields of a settings class to a parser as options, with their type, choices, default and help.

    A list takes several values, a tuple as many as it has items, a mapping JSON, and a boolean true, false or no value.
    The default is shown at the end of the help.
    """
    fields_by_name = {field.name: field for field in fields(cls)}
    declarations = declarations_of(cls)
    required_names = required_fields(cls)
    for name in names:
        field = fields_by_name[name]
        options = parser_options(declarations[name])
        options["help"] = field.metadata["help"]
        options["required"] = name in required_names
        if name not in required_names:
            default = field.default
            if field.default_factory is not MISSING:
                default = field.default_factory()
            options["default"] = default
            if isinstance(default, (list, tuple)):
                default = " ".join(map(str, default))
            if default not in (None, ""):
                options["help"] += f" Default: {default}."
        parser.add_argument(f"--{name}", **options)


def parser_options(declaration: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for the type of a field."""
    member = members_of(declaration)[0]
    origin = origin_of(member)
    arguments = get_args(member)
    if origin is Literal:
        return {"choices": arguments}
    if origin in (list, tuple):
        length = len(arguments) if is_fixed_tuple(member) else "+"
        return {"nargs": length, "type": option_type(arguments[0])}
    if origin is bool:
        return {"nargs": "?", "const": True, "type": option_type(declaration)}
    return {"type": option_type(declaration)}


def option_type(declaration: Any) -> Callable[[str], Any]:
    """Return the `type` of an `argparse` option for a declaration, such as [`PositiveInt`]."""

    def read(text: str) -> Any:
        for member in members_of(declaration):
            with suppress(ValueError):
                value = read_text(text, member)
                if matches(value, declaration):
                    return value
        raise argparse.ArgumentTypeError(f"expected {describe(declaration)}, got {text!r}")

    return read


def read_text(text: str, value_type: Any) -> Any:
    """Return the value of a text of the command line as a type; raise a `ValueError` if it has another type."""
    if value_type in (int, float):
        return value_type(text)
    if value_type is bool:
        return {"true": True, "false": False}.get(text.lower())
    if is_mapping(value_type):
        return read_mapping("the option", text)
    return text


def check_no_duplicates(name: str, values: list) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must not contain duplicates, got {values}.")
