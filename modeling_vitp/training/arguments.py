"""Arguments of pretraining and fine-tuning, with checks of their values; importing them loads nothing heavy."""

import argparse
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from trl import ScriptArguments

from ..command.paths import Shard, find_config, find_data, find_task, read_yaml

# Where the fields of TRL's `SFTConfig` are defined.
SFT_MODULES = ("transformers.training_args", "trl.trainer.base_config", "trl.trainer.sft_config")


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
    """Raise a `ValueError` unless a value, which may come from a YAML file, is of the type of its field.

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
    """Return the values in a value that are no list or mapping."""
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
    """Raise a `ValueError` unless a number, or each of a list, is in an interval.

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
    """Return an argparse type for numbers in an interval."""

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
    """Read a shard, `NUMBER/COUNT`, as an argparse type."""
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@dataclass
class RunArguments(Arguments):
    """How a run stops and goes on, and what is seen of it meanwhile."""

    limits = {"watch_samples": "[0, inf)", "global_batch_size": "[1, inf)"}

    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bfloat16. By default wherever the hardware computes it faster than float32."},
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Compute activations again in the backward pass, which takes less memory and more time."},
    )
    activation_checkpointing_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Options of activation checkpointing, such as {"every_n_layers": 2}.'},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples of an optimizer step over all processes. gradient_accumulation_steps follows from it, the "
            "number of processes and per_device_train_batch_size."
        },
    )
    save_on_signal: list[str] = field(
        default_factory=lambda: ["SIGTERM"],
        metadata={
            "help": "Signals at which the run saves at the end of its step and stops with the command that goes on: "
            "SIGTERM (a scheduler's notice) and SIGINT (Ctrl-C; a second one stops at once), or none."
        },
    )
    allow_changed_data: bool = field(
        default=False,
        metadata={
            "help": "Goes on from a checkpoint though the data are not those that it was trained on, with a warning."
        },
    )

    watch_samples: int = field(
        default=4,
        metadata={
            "help": "Predictions and features of so many samples are drawn before training and at each evaluation, "
            "or at each checkpoint without any, to `watch` in output_dir and where report_to says; 0 for none."
        },
    )

    def __post_init__(self):
        if isinstance(self.save_on_signal, str):
            self.save_on_signal = self.save_on_signal.split()
        unknown = set(self.save_on_signal) - {"SIGTERM", "SIGINT", "none"}
        if unknown:
            raise ValueError(f"save_on_signal takes SIGTERM and SIGINT, or none; not {', '.join(sorted(unknown))}.")
        if hasattr(super(), "__post_init__"):
            super().__post_init__()

    @property
    def saving_signals(self) -> list[str]:
        return [name for name in self.save_on_signal if name != "none"]


@dataclass
class PretrainArguments(Arguments, ScriptArguments):
    """What is trained on, and what a model is made of."""

    file_fields = ("mixture", "probe_data")
    limits = {"unfreeze_vision_layers": "[0, inf)", "drop_path_rate": "[0, 1)", "max_patches": "[1, inf)"}
    limits |= {"plan_devices": "[1, inf)", "plan_utilization": "(0, 1]"}

    mixture: dict | str | None = field(
        default=None,
        metadata={
            "help": "Instead of dataset_name: a mixture of sources with their rates, or the file that holds one, see "
            "recipes/configs/README.md. A released meta JSON can be given as it is."
        },
    )
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder that the paths of images in the rows of dataset_name are relative to. Not needed for JSON "
            "that has them beside it or in the folder `images`."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Prints what the mixture amounts to and what the run costs, and stops; needs neither data nor Hub "
            "nor GPU."
        },
    )
    plan_device: str | None = field(
        default=None,
        metadata={
            "help": "For dry_run, the GPU that time and memory are told for: a40, a100, a800, h100 …, or any other as "
            "24GiB,71TFLOP/s; that of this machine, or the paper's a800."
        },
    )
    plan_devices: int = field(default=1, metadata={"help": "For dry_run, how many of them."})
    plan_utilization: float = field(
        default=0.4, metadata={"help": "For dry_run, the share of its operations a second that is reached."}
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "Module under recipes/tasks that turns annotated rows into instructions while training and scores "
            "the model at the end. Not needed for a data set of conversations."
        },
    )
    task_options: dict | str | None = field(
        default=None, metadata={"help": "Settings of the task's instructions, see its `transform`."}
    )
    from_scratch: dict | str | None = field(
        default=None,
        metadata={
            "help": "Instead of model_name_or_path: `vision_config`, `text_config`, `vocab_size` and, optionally, "
            "`image_processor` of a model and tokenizer to build; '{}' for none."
        },
    )
    vision_model: str | None = field(
        default=None,
        metadata={
            "help": "Instead of model_name_or_path: a pretrained backbone, to be trained with language_model; or with "
            "from_scratch, whose ViT then has its weights."
        },
    )
    language_model: str | None = field(
        default=None,
        metadata={"help": "The causal LM that vision_model is joined to, by a projector that starts fresh."},
    )
    probe_data: dict | str | None = field(
        default=None,
        metadata={
            "help": "Images with masks, on which the run ends with what can be read from its backbone beside what it "
            "began with: `data` of a configuration of fine-tuning, or the name of one."
        },
    )
    probe_root: str | None = field(default=None, metadata={"help": "Where they are, instead of probe_data.root."})
    probe_splits: list[str] = field(
        default_factory=lambda: ["train", "test"],
        metadata={"help": "The splits of probe_data that probes learn from and are scored on."},
    )
    freeze_vision: bool = field(default=False, metadata={"help": "The ViT does not train."})
    freeze_projector: bool = field(default=False, metadata={"help": "The projector does not train."})
    freeze_language_model: bool = field(
        default=False, metadata={"help": "The language model does not train. For LoRA on it, give use_peft instead."}
    )
    unfreeze_vision_layers: int = field(
        default=0, metadata={"help": "How many of the last layers of a frozen ViT train all the same."}
    )
    drop_path_rate: float | None = field(
        default=None,
        metadata={"help": "Stochastic depth of the ViT, growing linearly over its layers. The paper uses 0.1."},
    )
    max_patches: int | None = field(
        default=None, metadata={"help": "Most tiles of a sample; its images share them. The paper uses 12, or 6."}
    )
    input_spec: dict | str | None = field(
        default=None,
        metadata={
            "help": "How images that are not 8-bit RGB are read: `bands`, `window`, `percentiles`, `gamma`; with "
            "`band_names` the ViT's weights are spread over these bands."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.from_scratch, self.dataset_name = self.from_scratch or None, self.dataset_name or None
        if (self.mixture is None) == (self.dataset_name is None):
            raise ValueError("Give either dataset_name or mixture in the configuration: what is trained on.")
        if self.dataset_name is not None:
            self.dataset_name = find_data(self.dataset_name)
        if self.image_root is not None and (self.dataset_name is None or self.task is not None):
            raise ValueError("image_root is of the rows of dataset_name; a mixture has one for each source.")
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise ValueError(f"image_root={self.image_root!r}: there is no such folder.")
        if self.dry_run and self.mixture is None:
            raise ValueError(
                "dry_run is about a mixture, and the configuration has none. That of the one data set is given by "
                f"--dataset_name '' --mixture {shlex.quote(json.dumps(self.as_mixture()))}."
            )
        if self.task is not None:
            find_task(self.task)
        if isinstance(self.probe_data, str):
            self.probe_data = read_yaml(find_config(self.probe_data))["data"]
        if self.probe_data is not None and self.probe_root is not None:
            self.probe_data["root"] = self.probe_root
        if len(self.probe_splits) != 2:
            raise ValueError(f"probe_splits={self.probe_splits}: give two, to learn from and to be scored on.")
        if self.task_options and self.task is None:
            raise ValueError("task_options are the settings of a task: give task.")
        if self.mixture is not None and self.task is not None:
            raise ValueError("A task makes its own instructions from dataset_name; with a mixture there is none.")

    def as_mixture(self) -> dict:
        """Return `dataset_name` as the one source of a mixture, in the keys of its file."""
        from ..instructions.sources import Source, base_of, source_of

        split = base_of(self.dataset_train_split)
        source = vars(source_of(self.dataset_name, split, self.dataset_config, self.image_root))
        said = {key: value for key, value in source.items() if value != vars(Source("mine"))[key]}
        return {"sources": [{**said, "name": "mine"}]}


@dataclass
class VRLArguments(RunArguments):
    """What [`~modeling_vitp.ViTPTrainingConfig`] adds to TRL's settings."""

    limits = {
        "vrl_drop_ratio": "[0, 1)",
        "vrl_apply_prob": "[0, 1]",
        "vrl_warmup_steps": "[0, inf)",
        "answer_mask_ratio": "[0, 1]",
        "max_length": "[1, inf)",
        "vision_learning_rate": "[0, inf)",
        "projector_learning_rate": "[0, inf)",
        "language_model_learning_rate": "[0, inf)",
        "projector_steps": "[0, inf)",
    }
    choices = {"on_error": ("raise", "skip")}

    vrl_drop_ratio: float = field(
        default=0.75,
        metadata={"help": "VRL: share of each sample's visual tokens that is dropped in training, in [0, 1)."},
    )
    vrl_apply_prob: float = field(
        default=1.0,
        metadata={"help": "VRL: share of the samples it is applied to. The authors' release amounts to 1 - ratio."},
    )
    vrl_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "VRL: optimizer steps at the beginning in which nothing is dropped. If not given, half of all for "
            "a model from_scratch, also on a vision_model, and none for others."
        },
    )
    answer_mask_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a token of an answer is hidden from the input in training, so that it has to be "
            "read off the image and not off the answer's beginning."
        },
    )
    max_length: int | None = field(
        default=4096,
        metadata={"help": "Longest sequence after the drop, in tokens. Only answers are cut to it, with a warning."},
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the ViT; learning_rate if not given."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; learning_rate if not given."}
    )
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the language model; learning_rate if not given."}
    )
    projector_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps at the beginning in which only the projector learns, for a fresh one."},
    )
    on_error: str = field(
        default="raise",
        metadata={
            "help": "What training does with a row that cannot be used: 'raise' stops and names it, 'skip' logs and "
            "counts it and takes another in its place. Evaluation always stops."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "The collator picks the columns it needs, the sample id among them."},
    )


@dataclass
class StartArguments(Arguments):
    """Where fine-tuning starts: a pretrained backbone, a fine-tuned model, or random weights."""

    limits = {"drop_path_rate": "[0, 1)"}
    neck = None  # what makes maps of the ViT's features, if anything does

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of an exported backbone, or of a model fine-tuned with this recipe; '' for none."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    from_scratch: dict | str | None = field(
        default=None,
        metadata={"help": "Instead: configuration of a ViT with random weights, to compare with; '{}' for none."},
    )
    backbone: dict | str | None = field(
        default=None, metadata={"help": "More settings of the backbone's configuration, such as deformable_heads."}
    )
    drop_path_rate: float = field(default=0.1, metadata={"help": "Stochastic depth of the ViT."})
    head: dict | str | None = field(
        default=None,
        metadata={"help": "More settings of the model's configuration, such as hidden_size (of UPerNet) or pooling."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.model_name_or_path = self.model_name_or_path or None
        self.from_scratch = self.from_scratch or None


@dataclass
class BackboneArguments(StartArguments):
    """Where fine-tuning for maps and boxes starts."""

    choices = {"neck": ("adapter", "pyramid")}

    neck: str = field(default="adapter", metadata={"help": "'adapter' (ViT-Adapter) or 'pyramid' (faster)."})


@dataclass
class FineTuningSettings(RunArguments):
    """Settings that all fine-tunings add to transformers' own; those of the layer-wise decay of the learning rate are
    the arguments of [`~modeling_vitp.training.freezing.layer_decay_groups`].
    """

    limits = {"layer_decay": "(0, 1]", "horizontal_flip": "[0, 1]", "vertical_flip": "[0, 1]"}

    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    vertical_flip: float = field(default=0.0, metadata={"help": "Probability of a vertical flip."})
    do_train: bool = field(default=True, metadata={"help": "Whether to train, or only to score and to draw."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "There are none."})
    layer_decay: float = field(
        default=0.9,
        metadata={"help": "The learning rate of a layer of the ViT is this times that of the next one. 1: no decay."},
    )
    level_embeddings_at_input: bool = field(
        default=False,
        metadata={
            "help": "Whether the adapter's level embeddings learn at the rate of the patch and position embeddings, as "
            "in the authors' release, and not at that of the adapter."
        },
    )
    position_weight_decay: bool = field(
        default=False,
        metadata={"help": "Whether position embeddings have weight decay, as in the authors' release."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # a step that fails is named by the ids of its samples

    def layer_decay_settings(self) -> dict[str, float | bool | None]:
        """Return the settings for the record of a run; `None` for an option that is off."""
        options = ("level_embeddings_at_input", "position_weight_decay")
        return {"layer_decay": self.layer_decay} | {name: getattr(self, name) or None for name in options}


@dataclass
class SplitArguments(Arguments):
    """What is trained on, and what is scored."""

    limits = {"num_pictures": "[0, inf)"}

    data: dict | str | None = field(
        default=None,
        metadata={"help": "Classes, splits and files of the data set, see the page of the recipe."},
    )
    data_root: str | None = field(default=None, metadata={"help": "Where the data set is, instead of data.root."})
    train_splits: list[str] = field(default_factory=lambda: ["train"], metadata={"help": "What is trained on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "What is scored while training, with eval_strategy, and at the end. The last checkpoint is the "
            "result, unless load_best_model_at_end is set."
        },
    )
    test_split: str | None = field(default=None, metadata={"help": "What is scored once, at the end; '' for nothing."})
    num_pictures: int = field(default=4, metadata={"help": "Samples in the picture of predictions."})
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "Python files that register decode heads or annotation formats, see tests/README.md."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.eval_split, self.test_split = self.eval_split or None, self.test_split or None
        if self.data_root is not None:
            self.data = {**(self.data or {}), "root": self.data_root}
        if self.data is None:
            raise ValueError("Give `data` in the configuration: what is trained on.")
        if self.test_split is not None and self.test_split in {*self.train_splits, self.eval_split}:
            raise ValueError(f"Split {self.test_split!r} is the test's; it may not be trained or selected on.")
