"""Errors of declared settings, in Python, in YAML and on the command line."""

import argparse
import importlib
import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from paths import ROOT
from transformers import TrainingArguments
from wrong_settings import wrong_values, wrong_words

from modeling_vitp.command.errors import WrongArguments, refuse
from modeling_vitp.command.settings import (
    DropRate,
    Interval,
    JsonText,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Settings,
    add_options,
    convert,
    declarations_of,
    from_mapping,
    members_of,
    own_fields,
)
from modeling_vitp.images.pixels import ColorJitter
from modeling_vitp.instructions.arguments import AnnotationOptions
from modeling_vitp.instructions.mixture import MixtureFile
from modeling_vitp.instructions.sources import Source
from modeling_vitp.pretraining.arguments import PretrainArguments, ProbeData
from modeling_vitp.pretraining.config import ViTPTrainingConfig
from modeling_vitp.pretraining.masked_autoencoder import MaskedAutoencoderConfig
from modeling_vitp.tasks.detection.arguments import DotaSubmission
from modeling_vitp.tasks.segmentation.arguments import MaskSubmission
from modeling_vitp.training.command_line import parse
from modeling_vitp.training.config import BaseConfig, CheckpointingOptions

PACKAGE = ROOT / "modeling_vitp"
for path in sorted([*PACKAGE.glob("*/arguments.py"), *PACKAGE.glob("*/trainer.py"), *PACKAGE.glob("training/m*.py")]):
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def classes_with_fields(base: type) -> set[type]:
    """Return the subclasses of the package that declare fields of their own."""
    found = set()
    for cls in base.__subclasses__():
        found |= classes_with_fields(cls)
        if cls.__module__.startswith("modeling_vitp.") and "__annotations__" in vars(cls):
            found.add(cls)
    return found


CLASSES = sorted(classes_with_fields(Settings), key=lambda cls: cls.__name__)
MAPPINGS = [MixtureFile, Source, CheckpointingOptions]  # other dataclasses that are created from mappings
OPTIONS = [AnnotationOptions, DotaSubmission, MaskSubmission, ProbeData]  # in fields of other classes
IN_PYTHON = [BaseConfig, ColorJitter, MaskedAutoencoderConfig]
COMMANDS = [cls for cls in CLASSES if cls not in OPTIONS + IN_PYTHON]
LENIENT = ("class_weights", "save_on_signal")  # a single value is a list of it


def instance_of(cls: type, **settings: Any) -> Any:
    """Create an instance of a class, or of the configuration of a training for the ranges of `BaseConfig`."""
    cls = ViTPTrainingConfig if cls is BaseConfig else cls
    needed = {"output_dir": "out"} if issubclass(cls, TrainingArguments) else {}
    values = {"split": "r", "file": "r", "config": "loveda"}
    required = {name: value for name, value in values.items() if cls in OPTIONS and name in declarations_of(cls)}
    return cls(**{**required, **needed, **settings})


def declared_fields(cls: type) -> dict[str, Any]:
    """Return the declarations of the fields that a class itself declares."""
    declarations = own_fields(ViTPTrainingConfig) if cls is BaseConfig else declarations_of(cls)
    return {name: declarations[name] for name in vars(cls)["__annotations__"] if name in declarations}


def error_of(create, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as found:
        create(*args, **kwargs)
    assert len(str(found.value).splitlines()) == 1
    return str(found.value)


def test_classes_are_found():
    assert len(CLASSES) > 20 and sum(len(declared_fields(cls)) for cls in CLASSES) > 200
    assert {PretrainArguments, *OPTIONS, *IN_PYTHON} <= {*CLASSES}
    # A dataclass in a field is in the tables above.
    for cls in CLASSES:
        for declaration in declared_fields(cls).values():
            for member in members_of(declaration):
                assert not is_dataclass(member) or member in OPTIONS


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_wrong_value_is_named(cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, declaration in declared_fields(cls).items():
        for value in [] if name in LENIENT else wrong_values(declaration):
            message = error_of(instance_of, cls, **{name: value})
            assert name in message and ("got" in message or "unknown" in message), (name, value, message)


def test_wrong_value_of_mapping_is_named():
    for cls in MAPPINGS:
        needed = {"name": "s", "sources": [{"name": "s"}]}
        needed = {name: value for name, value in needed.items() if name in declarations_of(cls)}
        for name, declaration in declarations_of(cls).items():
            for value in wrong_values(declaration):
                assert f"the file: {name}" in error_of(from_mapping, cls, {**needed, name: value}, "the file")
        (field_name, *_) = declarations_of(cls)
        assert f"'{field_name}x'. Did you mean" in error_of(from_mapping, cls, {**needed, f"{field_name}x": 1}, "it")


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_wrong_value_in_yaml_and_on_command_line_is_named(cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    for name, declaration in declared_fields(cls).items():
        if name in LENIENT:
            continue
        for value in wrong_values(declaration)[-1:]:
            config.write_text(yaml.safe_dump({name: value}))
            with pytest.raises(WrongArguments, match=name):
                parse(["--config", str(config)], "", (cls,))
        for word in wrong_words(declaration)[:1]:
            with pytest.raises(WrongArguments, match=name):
                parse([f"--{name}={word}"], "", (cls,))


def test_wrong_value_of_plain_option_is_named():
    for cls in OPTIONS:
        parser = argparse.ArgumentParser()
        parser.error = refuse
        add_options(parser, cls, [item.name for item in fields(cls)])
        for name, declaration in declarations_of(cls).items():
            for word in wrong_words(declaration):
                with pytest.raises(WrongArguments, match=f"--{name}: "):
                    parser.parse_args([f"--{name}={word}"])


def test_fields_are_declared_with_default_and_help():
    for cls in (*CLASSES, *MAPPINGS):
        for item in fields(cls):
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if default is not MISSING and item.name in declared_fields(cls):
                assert convert(item.name, default, declarations_of(cls)[item.name]) == default, (cls, item.name)
            if cls in (*COMMANDS, *OPTIONS) and item.name in vars(cls)["__annotations__"] and item.init:
                assert {*item.metadata} == {"help"} and item.metadata["help"], (cls, item.name)


def test_field_with_another_default_keeps_its_range():
    for cls in CLASSES:
        declared = declared_fields(cls)
        for base in set(cls.__mro__[1:]) & set(CLASSES):
            inherited = declared_fields(base)
            assert {name: declared[name] for name in declared.keys() & inherited.keys()}.items() <= inherited.items()


@hypothesis_settings(max_examples=50)
@given(
    st.floats(allow_nan=True),
    st.sampled_from("[("),
    st.sampled_from([0, 1, 0.5, -1]),
    st.sampled_from([1, 2.5, math.inf]),
    st.sampled_from("])"),
)
def test_interval_ends_are_inclusive_or_exclusive(number, opening, low, high, closing):
    is_above = number >= low if opening == "[" else number > low
    is_below = number <= high if closing == "]" else number < high
    assert (number in Interval(f"{opening}{low}, {high}{closing}")) == (is_above and is_below)


@dataclass
class Tile(Settings):
    size: PositiveInt
    overlap: NonNegativeInt = 0

    def __post_init__(self):
        super().__post_init__()
        if self.overlap >= self.size:
            raise ValueError(f"overlap must be below size={self.size}, got {self.overlap}.")


@dataclass
class Split(Settings):
    image: str
    tile: Tile | None = None


@dataclass
class Data(Settings):
    splits: dict[str, Split | str] = field(default_factory=dict, metadata={"help": "Splits."})
    ratio: DropRate = field(default=0.75, metadata={"help": "Drop ratio."})
    sizes: list[PositiveInt] = field(default_factory=lambda: [7], metadata={"help": "Sizes."})
    scale: tuple[float, float] = field(default=(0.5, 2.0), metadata={"help": "Scale."})
    flip: bool = field(default=False, metadata={"help": "Flip."})
    mode: Literal["raise", "skip"] = field(default="raise", metadata={"help": "Mode."})
    names: dict[str, str | None] | None = field(default=None, metadata={"help": "Names."})
    head: dict | JsonText | None = field(default=None, metadata={"help": "Head."})
    file: dict | str | None = field(default=None, metadata={"help": "File or mapping."})


@dataclass
class MoreData(Data):
    share: Probability = 1.0


def test_mapping_becomes_dataclasses_and_tuples():
    splits = {"train": {"image": "a", "tile": {"size": 8.0, "overlap": 2}}, "test": "name"}
    data = from_mapping(MoreData, {"splits": splits, "scale": [1, 2], "sizes": [3], "share": 0}, "data")
    assert data.splits == {"train": Split("a", Tile(8, 2)), "test": "name"} and data.scale == (1, 2)
    assert isinstance(data.splits["train"].tile.size, int)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ratios": 1}, "data: unknown key 'ratios'. Did you mean 'ratio'?"),
        ({"ratio": 1.5}, "Expected data: ratio to be a number in [0, 1), got 1.5."),
        ({"sizes": "x"}, "Expected data: sizes to be a list, each item an integer in [1, inf), got 'x'."),
        ({"scale": [1]}, "Expected data: scale to be a list of 2, each item a number, got [1]."),
        ({"mode": "hope"}, "Expected data: mode to be one of raise, skip, got 'hope'."),
        ({"names": {"a": False}}, "Expected data: names: a to be text, got False. YAML does not read"),
        ({"splits": {"train": {}}}, "data: splits: train: missing 'image'."),
        ({"splits": {"t": {"image": "a", "tile": {"size": 1, "overlap": 1}}}}, "data: splits: t: tile: overlap must"),
    ],
)
def test_error_names_place_declaration_and_value(settings, named):
    assert named in error_of(from_mapping, Data, settings, "data")


def test_text_of_command_line_is_json_of_a_mapping():
    assert Data(head='{"a": 1}').head == {"a": 1} and Data(head="").head is None
    assert (
        Data(file='{"a": 1}').file == {"a": 1} and Data(file="a.json").file == "a.json" and Data(file="").file is None
    )
    for settings in ({"head": "a.json"}, {"head": "[1]"}, {"file": "{"}, {"head": '{"a": 1'}):
        (name,) = settings
        assert name in error_of(Data, **settings)


def test_options_of_plain_parser_have_type_default_and_help(capsys):
    parser = argparse.ArgumentParser()
    add_options(parser, Data, ["ratio", "sizes", "scale", "flip", "mode", "names"])
    words = '--ratio 0.5 --sizes 1 2 --scale 1 2 --flip --mode skip --names {"a":null}'.split()
    assert Data(**vars(parser.parse_args(words))) == Data(
        ratio=0.5, sizes=[1, 2], scale=(1.0, 2.0), flip=True, mode="skip", names={"a": None}
    )
    assert Data(**vars(parser.parse_args(["--flip", "false"]))) == Data()
    parser.print_help()
    shown = capsys.readouterr().out
    assert "Scale. Default: 0.5 2.0." in shown and "{raise,skip}" in shown and "Names.\n" in shown


def test_library_fields_are_checked_and_unsupported_ones_refused(tmp_path):
    args = ViTPTrainingConfig(str(tmp_path / "out"), max_steps=20.0, bf16=False)
    assert args.max_steps == 20 and isinstance(args.max_steps, int)
    wrong = {
        "max_steps": 2.5,
        "save_total_limit": "many",
        "learning_rate": None,
        "eval_strategy": False,
        "save_on_signal": ["SIGUSR1"],
        "auto_find_batch_size": True,
        "enable_jit_checkpoint": True,
    }
    for name, value in wrong.items():
        assert name in error_of(ViTPTrainingConfig, str(tmp_path / "out"), bf16=False, **{name: value})
