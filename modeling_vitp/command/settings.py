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
import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from inspect import get_annotations
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
        opening, low, high, closing = re.fullmatch(r"([\[(])\s*(\S+),\s*(\S+?)\s*([\])])", self.text).groups()
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

    Raises:
        ValueError: if a value is not as declared; the message names the field, the declaration and the value.
    """

    unsupported: ClassVar[dict[str, str]] = {}

    def __post_init__(self):
        own = own_fields(type(self))
        for name, declaration in own.items():
            value = read_command_line(name, getattr(self, name), declaration)
            object.__setattr__(self, name, convert(name, value, declaration))  # a dataclass may be frozen
        check_library_fields(self, own)
        for cls in type(self).__mro__:
            for name, reason in vars(cls).get("unsupported", {}).items():
                if getattr(self, name, None):  # some releases of a library lack the option
                    raise ValueError(f"{name}={getattr(self, name)} is not supported: {reason}")
        if hasattr(super(), "__post_init__"):
            super().__post_init__()


@cache
def declarations_of(cls: type) -> dict[str, Any]:
    """Return the declared type of each field of a dataclass, with its ranges."""
    hints = get_type_hints(cls, include_extras=True)  # a parser changes the types that the fields store
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


@cache
def own_fields(cls: type) -> dict[str, Any]:
    """Return the declarations of a [`Settings`] class without those of library classes that it inherits from."""
    names = set()
    for base in cls.__mro__:
        if issubclass(base, Settings):
            names |= get_annotations(base).keys()
    return {name: declaration for name, declaration in declarations_of(cls).items() if name in names}


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
    check_keys(where, mapping, declarations)
    missing = [name for name in required_fields(cls) if name not in mapping]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(map(repr, missing))}.")
    values = {name: convert(f"{where}: {name}", value, declarations[name]) for name, value in mapping.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def required_fields(cls: type) -> list[str]:
    """Return the names of the fields without a default."""
    return [
        field.name
        for field in fields(cls)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    ]


def check_keys(name: str, mapping: Mapping, known: Collection[str]) -> None:
    """Raise a `ValueError` that names an unknown key of a mapping, and the nearest known key."""
    for key in mapping:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, 1)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Known: {', '.join(known)}."
            raise ValueError(f"{name}: unknown key {key!r}. {hint}")


def convert(name: str, value: Any, declaration: Any) -> Any:
    """Return a value in its declared form: mappings as dataclasses, lists as tuples, whole floats as integers.

    Raises:
        ValueError: if the value is not as declared.
    """
    is_whole = isinstance(value, float) and value.is_integer()
    if is_whole and matches(int(value), declaration) and not matches(value, declaration):
        value = int(value)
    check_value(name, value, declaration)
    return build(name, value, declaration)


def build(name: str, value: Any, declaration: Any) -> Any:
    """Return a value that matches its declaration, with the dataclasses and tuples of the declaration in it."""
    declaration = next(member for member in members_of(declaration) if matches(value, member))
    origin = get_origin(declaration) or declaration
    if is_dataclass(origin) and isinstance(value, Mapping):
        return from_mapping(origin, value, name)
    if not get_args(declaration) or not isinstance(value, (Mapping, list, tuple)):
        return value
    items = [build(*item) for item in declared_items(name, value, declaration)]
    if isinstance(value, Mapping):
        return dict(zip(value, items))
    return tuple(items) if origin is tuple else items


def check_value(name: str, value: Any, declaration: Any) -> None:
    """Raise a `ValueError` if a value, which may come from a YAML file, is not as declared."""
    if matches(value, declaration):
        return
    for member in members_of(declaration):
        for item in declared_items(name, value, member):
            check_value(*item)  # names the wrong item
    expected = describe(declaration)
    advice = ""
    if "text" in expected and not all(isinstance(scalar, str) for scalar in scalars_of(value)):
        advice = " YAML does not read yes, no, on, off, numbers and dates as text: put names in quotes."
    raise ValueError(f"Expected {name} to be {expected}, got {repr(value)[:80]}.{advice}")


def matches(value: Any, declaration: Any) -> bool:
    """Return whether a value has a declared type and is in its range. Lists of YAML match tuples."""
    origin, arguments = get_origin(declaration) or declaration, get_args(declaration)
    if origin is Any:
        return True
    if origin in (Union, UnionType):
        return any(matches(value, member) for member in arguments)
    if origin is Annotated:
        base, *limits = arguments
        return matches(value, base) and all(value in limit for limit in limits)
    if origin is Literal:
        return any(isinstance(value, type(choice)) and value == choice for choice in arguments)
    if is_dataclass(origin):
        return isinstance(value, (origin, Mapping))
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return False
        if arguments and not all(matches(key, arguments[0]) for key in value):
            return False
    elif issubclass(origin, Sequence) and origin is not str:
        if not isinstance(value, (list, tuple)):
            return False
        if is_fixed_tuple(declaration) and len(value) != len(arguments):
            return False
    elif not isinstance(value, origin):
        return False
    return all(matches(item, kind) for _, item, kind in declared_items("", value, declaration))


def members_of(declaration: Any) -> tuple[Any, ...]:
    """Return the members of a union, or else the declaration itself, without their ranges."""
    is_union = get_origin(declaration) in (Union, UnionType)
    members = get_args(declaration) if is_union else (declaration,)
    return tuple(get_args(member)[0] if get_origin(member) is Annotated else member for member in members)


def declared_items(name: str, value: Any, declaration: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and declaration of each item of a list or mapping, if the declaration is about items."""
    origin, arguments = get_origin(declaration), get_args(declaration)
    if isinstance(value, Mapping) and origin in (dict, Mapping):
        for key, item in value.items():
            yield f"{name}: {key}", item, arguments[1]
    elif isinstance(value, (list, tuple)) and origin in (list, tuple, Sequence):
        item_declarations = arguments if is_fixed_tuple(declaration) else arguments[:1] * len(value)
        for index, (item, item_declaration) in enumerate(zip(value, item_declarations)):
            yield f"{name}[{index}]", item, item_declaration


def is_fixed_tuple(declaration: Any) -> bool:
    return get_origin(declaration) is tuple and get_args(declaration)[-1] is not Ellipsis


def describe(declaration: Any) -> str:
    """Return the words of an error message for a declaration, such as "a number in [0, 1)"."""
    origin, arguments = get_origin(declaration) or declaration, get_args(declaration)
    if origin in (Union, UnionType):
        return " or ".join(describe(member) for member in arguments if member not in (NoneType, JsonText))
    if origin is Annotated:
        base, *limits = arguments
        return " ".join([describe(base), *map(str, limits)])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in WORDS:
        return WORDS[origin]
    if is_mapping(declaration):
        is_any = not arguments or arguments[1] is Any
        return "a mapping" if is_any else f"a mapping, each value {describe(arguments[1])}"
    if not issubclass(origin, Sequence):
        return origin.__name__
    if not arguments:
        return "a list"
    number = f" of {len(arguments)}" if is_fixed_tuple(declaration) else ""
    return f"a list{number}, each item {describe(arguments[0])}"


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
    return value if takes_file and not is_json else read_mapping(name, value)


def is_mapping(declaration: Any) -> bool:
    origin = get_origin(declaration) or declaration
    return isinstance(origin, type) and (is_dataclass(origin) or issubclass(origin, Mapping))


def read_mapping(name: str, text: str) -> dict[str, Any]:
    """Read the JSON of a mapping. Raise a `ValueError` that names the setting if it is anything else."""
    if not text.lstrip().startswith("{"):
        raise ValueError(f"Expected {name} to be a mapping in JSON, such as '{{\"key\": 1}}', got {text!r}.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected {name} to be JSON, got {text[:80]!r}: {error}.") from error


def check_library_fields(item: Any, own: Collection[str] = ()) -> None:
    """Check the types of scalar fields of a library's dataclass, which does not do so, and convert whole floats.

    Defaults and values of Python types that YAML does not have are not checked.

    Args:
        item: dataclass of a library, or one that inherits from it.
        own: names of fields that are not checked here.
    """
    scalar_types = {str, bool, int, float, NoneType}
    yaml_types = (NoneType, bool, int, float, str, list, dict)
    declarations = declarations_of(type(item))
    for field in fields(item):
        value = getattr(item, field.name)
        if field.name in own or field.name not in declarations or value is field.default:
            continue
        kinds = set(members_of(declarations[field.name]))
        if isinstance(value, bool) and str in kinds and bool not in kinds:  # as YAML reads `eval_strategy: no`
            check_value(field.name, value, str)
        elif kinds <= scalar_types and isinstance(value, yaml_types):
            setattr(item, field.name, convert(field.name, value, declarations[field.name]))


def add_options(parser: argparse.ArgumentParser, cls: type, names: Sequence[str]) -> None:
    """Add fields of a settings class to a parser as options, with their type, choices, default and help.

    A list takes several values, a tuple as many as it has items, a mapping JSON, and a boolean true, false or no value.
    The default is shown at the end of the help.
    """
    known = {field.name: field for field in fields(cls)}
    required = required_fields(cls)
    for name in names:
        field, declaration = known[name], declarations_of(cls)[name]
        options: dict[str, Any] = {"required": name in required, "help": field.metadata["help"]}
        if name not in required:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
            options["default"] = default
            options["help"] += "" if shown in (None, "") else f" Default: {shown}."
        member = members_of(declaration)[0]
        origin, arguments = get_origin(member) or member, get_args(member)
        if origin is Literal:
            options["choices"] = arguments
        elif origin in (list, tuple):
            options["nargs"] = len(arguments) if is_fixed_tuple(member) else "+"
            options["type"] = option_type(arguments[0])
        else:
            options["type"] = option_type(declaration)
        if origin is bool:
            options["nargs"] = "?"
            options["const"] = True
        parser.add_argument(f"--{name}", **options)


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


def read_text(text: str, kind: Any) -> Any:
    """Return the value of a text of the command line as a type; raise a `ValueError` if it has another type."""
    if kind in (int, float):
        return kind(text)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    return read_mapping("the option", text) if is_mapping(kind) else text
