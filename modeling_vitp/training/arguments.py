"""Arguments of pretraining and fine-tuning, with checks of their values. Importing them loads no heavy library."""

import argparse
import difflib
import json
import math
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from trl import ScriptArguments

from ..command.paths import Shard, find_data, read_section
from ..command.settings import check_type
from .requirements import Requirement

# Where the fields of TRL's `SFTConfig` are defined.
SFT_MODULES = ("transformers.training_args", "trl.trainer.base_config", "trl.trainer.sft_config")


class Arguments:
    """Base of argument classes.

    A mapping in a configuration file is given as JSON on the command line. Limits and choices also apply to each item
    of a list; `None` is not checked.

    Attributes:
        file_fields: names of mapping fields that also accept the name of a file.
        limits: interval of each numeric field, such as `"[0, 1)"`, see [`check_within`].
        choices: allowed values of each field.
        unsupported: reason by the name of a library's option that may not be set.

    Raises:
        ValueError: if a value is not allowed; the message names the field, its value and the allowed values.
    """

    file_fields: ClassVar[tuple[str, ...]] = ()
    limits: ClassVar[dict[str, str]] = {}
    choices: ClassVar[dict[str, Sequence[str]]] = {}
    unsupported: ClassVar[dict[str, str]] = {}

    def __post_init__(self):
        self._read_mappings()
        limits, choices, unsupported = {}, {}, {}
        for cls in reversed(type(self).__mro__):  # a subclass takes precedence
            limits |= vars(cls).get("limits", {})
            choices |= vars(cls).get("choices", {})
            unsupported |= vars(cls).get("unsupported", {})
        for name, interval in limits.items():
            check_within(name, getattr(self, name), interval)
        for name, known in choices.items():
            value = getattr(self, name)
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if item is not None and item not in known:
                    raise ValueError(f"Expected {name} to be one of {', '.join(known)}, got {item!r}.")
        for name, reason in unsupported.items():
            if getattr(self, name, None):  # older TRL lacks some
                raise ValueError(f"{name}={getattr(self, name)} is not supported: {reason}")
        if hasattr(super(), "__post_init__"):
            super().__post_init__()

    def _read_mappings(self) -> None:
        # Mapping fields of library classes may name a file: only fields of this package are parsed here.
        own = [cls for cls in type(self).__mro__ if issubclass(cls, Arguments)]
        names = {name for cls in own for name in vars(cls).get("__annotations__", {})}
        types = get_type_hints(type(self))  # the parser changes the types stored in the fields
        for name in names & {item.name for item in fields(self)}:
            value = getattr(self, name)
            if value == "" and dict in get_args(types[name]):
                value = None  # as on a command line that replaces the mapping of a configuration
                setattr(self, name, value)
            if isinstance(value, str) and dict in get_args(types[name]):
                if value.lstrip().startswith(("{", "[")) or name not in self.file_fields:
                    setattr(self, name, read_mapping(name, value))
            is_mapping = types[name] == dict | str | None and name not in self.file_fields
            check_type(name, getattr(self, name), dict | None if is_mapping else types[name])
        check_inherited(self, names)


def check_keys(name: str, value: Mapping | None, arguments: type) -> None:
    """Raise a `ValueError` that names a key of a mapping that is no field of the arguments, with the nearest field."""
    known = [item.name for item in fields(arguments)]
    for key in value or ():
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"Known: {', '.join(known)}."
            raise ValueError(f"{name}: unknown key {key!r}. {hint}")


def check_inherited(item: Any, own: Collection[str] = ()) -> None:
    """Convert whole floats of integer fields, and check the types of scalar fields, which library classes do not do.

    Raises:
        ValueError: if a field of one scalar type has a value of another type from a YAML file.
    """
    types = get_type_hints(type(item))
    for name, default in {found.name: found.default for found in fields(item) if found.name not in own}.items():
        value, kind = getattr(item, name), types[name]
        kinds = set(get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind])
        if isinstance(value, float) and int in kinds and float not in kinds:
            if not value.is_integer():
                raise ValueError(f"{name} must be an integer, got {value!r}.")
            setattr(item, name, int(value))
        elif isinstance(value, bool) and bool not in kinds and str in kinds:  # as YAML reads `eval_strategy: no`
            check_type(name, value, str)
        elif kinds <= {str, bool, int, float, type(None)} and value is not default:
            if value is None or isinstance(value, (bool, int, float, str, list, dict)):
                check_type(name, value, kind)


def read_mapping(name: str, text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        raise ValueError(f"Expected {name} to be a mapping in JSON, such as '{{\"key\": 1}}', got {text!r}.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected {name} to be JSON, got {text[:80]!r}: {error}.") from error


def check_within(name: str, value: float | Sequence[float] | None, interval: str) -> None:
    """Raise a `ValueError` if a number, or any number of a list, is outside an interval.

    Args:
        interval: interval in mathematical notation. `[` and `]` include the end, `(` and `)` exclude it: `"(0, inf)"`
            is any finite number above 0. No interval contains NaN.
    """
    opening, low, high, closing = re.fullmatch(r"([\[(])\s*(\S+),\s*(\S+?)\s*([\])])", interval).groups()
    for number in value if isinstance(value, (list, tuple)) else [] if value is None else [value]:
        above = number >= float(low) if opening == "[" else number > float(low)
        below = number <= float(high) if closing == "]" else number < float(high)
        if not (above and below) or math.isnan(number):
            raise ValueError(f"Expected {name} in {interval}, got {value!r}.")


def within(interval: str, kind: type = int) -> Callable[[str], float]:
    """Return an argparse type for numbers in an interval."""

    def number(text: str) -> float:
        try:
            value = kind(text)
            check_within("the number", value, interval)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} in {interval}, got {text!r}") from None
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
    """Arguments of all trainers: precision, batch size, signals, resuming and logged predictions."""

    limits = {"watch_samples": "[0, inf)", "global_batch_size": "[1, inf)", "stop_at_step": "[1, inf)"}
    choices = {"save_on_signal": ("SIGTERM", "SIGINT", "SIGHUP", "none")}

    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bfloat16. By default true on hardware with native bfloat16, else false."},
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass, which saves memory and costs time. By default the "
            "value of gradient_checkpointing, which is true for pretraining and false for fine-tuning."
        },
    )
    activation_checkpointing_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Options of activation checkpointing as JSON, such as {"every_n_layers": 2}.'},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples per optimizer step over all processes. gradient_accumulation_steps is computed from it. "
            "By default, gradient_accumulation_steps is used."
        },
    )
    save_on_signal: list[str] = field(
        default_factory=lambda: ["SIGTERM", "SIGINT", "SIGHUP"],
        metadata={
            "help": "Signals that save a checkpoint at the end of the step and stop the run: SIGTERM (sent by a "
            "scheduler), SIGINT (Ctrl-C; a second one stops at once), SIGHUP (a closed terminal, except under nohup), "
            "or none. Default: all three."
        },
    )
    stop_at_step: int | None = field(
        default=None,
        metadata={
            "help": "Step after which the run saves a checkpoint and stops, as on a signal. The same command without "
            "this option resumes it. By default the run does not stop."
        },
    )
    allow_changed_data: bool = field(
        default=False,
        metadata={"help": "Resume with a warning if the training data have changed. By default, resuming then fails."},
    )

    watch_samples: int = field(
        default=4,
        metadata={
            "help": "Number of samples whose predictions and features are drawn before training and at each evaluation "
            "(without evaluation, at each checkpoint), to `watch` in output_dir and to report_to. 0: none."
        },
    )

    def __post_init__(self):
        if isinstance(self.save_on_signal, str):
            self.save_on_signal = self.save_on_signal.split()
        super().__post_init__()
        self.save_on_signal = [name for name in self.save_on_signal if name != "none"]


@dataclass
class PlanArguments(Arguments):
    """Arguments of the estimated cost of a run."""

    limits = {"plan_devices": "[1, inf)", "plan_utilization": "(0, 1]"}

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print the estimated cost of the run, for a pretraining with a summary of its mixture, and stop. "
            "Neither data nor Hub nor GPU is needed. Default: false."
        },
    )
    plan_device: str | None = field(
        default=None,
        metadata={
            "help": "GPU of the dry_run estimate: a40, a100, h100, rtx4090 …, or memory and speed such as "
            "24GiB,71TFLOP/s. By default the GPU of this machine. Without a GPU a40 for pretraining, as in the paper, "
            "and rtx4090 for fine-tuning, a card of 24 GiB."
        },
    )
    plan_devices: int = field(default=1, metadata={"help": "Number of GPUs of the dry_run estimate."})
    plan_utilization: float = field(
        default=0.4, metadata={"help": "Share of the GPU's peak speed that the dry_run estimate assumes, in (0, 1]."}
    )


@dataclass
class AnnotationOptions(Arguments):
    """Options of instructions that are drawn from labeled images, see [`DrawnInstructions`].

    Those that `vitp make_instructions` has too mean the same.
    """

    limits = {
        "turns": "[1, inf)",
        "wordings": "[1, inf)",
        "max_boxes": "[1, inf)",
        "map_side": "[1, inf)",
        "window": "[1, inf)",
        "overlap": "[0, inf)",
        "scale": "(0, inf)",
        "mosaics": "[0, 1]",
        "collages": "[0, inf)",
        "collage_grid": "[2, 16]",
        "collage_size": "[1, inf)",
        "percentiles": "[0, 100]",
    }
    choices = {"on_error": ("raise", "skip"), "plane": ("axial", "coronal", "sagittal")}

    layout: str | None = field(default=None, metadata={"help": "Layout of the folder. By default it is recognized."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    split_list: str | None = field(
        default=None, metadata={"help": "File with the names of the images to train on, one per line."}
    )
    files: str | None = field(
        default=None, metadata={"help": "File or folder of the labels, if the folder has several of them."}
    )
    names: dict | None = field(
        default=None, metadata={"help": "Phrase of each class, or of each value of masks; null leaves a class out."}
    )
    kinds: list[str] | None = field(
        default=None,
        metadata={"help": "Kinds of questions, of which those that the labels answer are asked. By default all."},
    )
    turns: int = field(default=5, metadata={"help": "Maximum number of questions about a view."})
    wordings: int | None = field(
        default=None, metadata={"help": "Number of wordings of each kind of question. By default all."}
    )
    max_boxes: int = field(default=20, metadata={"help": "Maximum number of boxes per answer."})
    map_side: int = field(default=7, metadata={"help": "Number of cells per side of a map."})
    window: int | None = field(
        default=None,
        metadata={"help": "Side of the views in pixels. By default the shorter side of each image."},
    )
    overlap: int = field(default=0, metadata={"help": "Overlap in pixels of the windows that are scored."})
    scale: list[float] = field(
        default_factory=lambda: [0.8, 1.2], metadata={"help": "Lowest and highest random factor of the side of a view."}
    )
    turn: bool = field(default=True, metadata={"help": "Whether views are turned and mirrored."})
    mosaics: float = field(
        default=0.0, metadata={"help": "Share of mosaics of four crops among the views of one image."}
    )
    collages: float = field(default=0.0, metadata={"help": "Number of collages for each view of one image."})
    collage_grid: list[int] = field(
        default_factory=lambda: [7], metadata={"help": "Numbers of crops per side of a collage, drawn for each."}
    )
    collage_size: int = field(default=448, metadata={"help": "Side of a collage in pixels."})
    on_error: str = field(default="raise", metadata={"help": "Behavior on invalid labels: raise or skip."})
    plane: str | None = field(default=None, metadata={"help": "Plane of the slices of volumes."})
    intensities: list[float] | None = field(
        default=None, metadata={"help": "Intensities of volumes that are shown as black and white."}
    )
    percentiles: list[float] | None = field(
        default=None, metadata={"help": "Percentiles of each volume that are shown as black and white."}
    )
    class_property: str | None = field(
        default=None, metadata={"help": "Property of GeoJSON or GeoPackage with the class."}
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.scale) != 2 or self.scale[0] > self.scale[1]:
            raise ValueError(f"Expected scale to be a low and a high factor, got {self.scale}.")
        if self.window is not None and self.overlap >= self.window:
            raise ValueError(f"Expected overlap below window={self.window}, got {self.overlap}.")


@dataclass
class PretrainArguments(PlanArguments, ScriptArguments):
    """Arguments of the training data, the start of the model, and its frozen parts."""

    file_fields = ("mixture", "probe_data")
    limits = {
        "unfreeze_vision_layers": "[0, inf)",
        "drop_path_rate": "[0, 1)",
        "max_patches": "[1, inf)",
        "vision_image_size": "[1, inf)",
    }

    mixture: dict | str | None = field(
        default=None,
        metadata={
            "help": "Mixture of sources with their rates, or the name of its file, see recipes/configs/README.md. "
            "Replaces dataset_name. The meta JSON of the authors' release is accepted unchanged."
        },
    )
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder that image paths in the rows of dataset_name are relative to. By default, the folder of "
            "the JSON file or its subfolder `images`."
        },
    )
    columns: dict | str | None = field(
        default=None,
        metadata={
            "help": 'Names of the columns of dataset_name as JSON, such as \'{"image": "photo", "caption": '
            '"alt_text"}\'. Columns of a CSV file without a header are numbers from 0. By default, common names.'
        },
    )
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "Question of every row of dataset_name, for captions or rows with an answer only. By default, one "
            "of five questions for a caption."
        },
    )
    annotations: str | None = field(
        default=None,
        metadata={
            "help": "Folder of labeled images, in a layout of `make_instructions`. New crops and conversations about "
            "their labels are drawn in each epoch. Replaces dataset_name."
        },
    )
    annotation_options: dict | str | None = field(
        default=None,
        metadata={
            "help": "Options of annotations as JSON: those of `make_instructions` (names, kinds, window, collages …), "
            "and scale, turn and mosaics, see recipes/pretrain.md."
        },
    )
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "Python files that register layouts of labeled images, see tests/README.md."},
    )
    from_scratch: dict | str | None = field(
        default=None,
        metadata={
            "help": "Model and tokenizer with random weights, as JSON: `vision_config`, `text_config`, `vocab_size` "
            "and optionally `image_processor`. Replaces model_name_or_path; '{}' for none."
        },
    )
    vision_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a pretrained ViT, such as facebook/dinov2-base, combined with language_model. "
            "With from_scratch, the initial weights of its ViT. Replaces model_name_or_path."
        },
    )
    language_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the causal LM that vision_model is combined with; the projector is new."
        },
    )
    vision_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of a tile in pixels for vision_model, whose position embeddings are interpolated to it. By "
            "default the size of the ViT."
        },
    )
    probe_data: dict | str | None = field(
        default=None,
        metadata={
            "help": "Images with masks for probes of the backbone at the end of the run, compared with the backbone at "
            "its start: `data` of a fine-tuning configuration as JSON, or its name. By default no probes."
        },
    )
    probe_root: str | None = field(
        default=None,
        metadata={"help": "Folder of the probe data. By default probe_data.root."},
    )
    probe_splits: list[str] = field(
        default_factory=lambda: ["train", "test"],
        metadata={"help": "Two splits of probe_data: the training split and the scored split of the probes."},
    )
    require: dict | str | None = field(
        default=None,
        metadata={
            "help": "Scores that the run must reach at its end, as JSON by their keys in metrics.json, such as "
            '\'{"probe.least_gain.linear": "> 0.02"}\'. Otherwise its exit status is 1.'
        },
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Freeze the ViT. Default: false."})
    freeze_projector: bool = field(default=False, metadata={"help": "Freeze the projector. Default: false."})
    freeze_language_model: bool = field(
        default=False,
        metadata={"help": "Freeze the language model. For LoRA on it, set use_peft instead. Default: false."},
    )
    unfreeze_vision_layers: int = field(
        default=0, metadata={"help": "Number of last layers of a frozen ViT that still train. 0: none."}
    )
    lora_on_vision: bool = field(
        default=False,
        metadata={
            "help": "With use_peft: train LoRA on the ViT's layers too, instead of the whole ViT. Default: false."
        },
    )
    drop_path_rate: float | None = field(
        default=None,
        metadata={
            "help": "Stochastic depth rate of the ViT's last layer. By default that of the model; the authors' release "
            "has 0.1."
        },
    )
    max_patches: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tiles per sample, shared by its images. By default that of the image processor; "
            "the authors' release has 12 or 6."
        },
    )
    input_spec: dict | str | None = field(
        default=None,
        metadata={
            "help": "Input spec of images that are not 8-bit RGB, as JSON: `bands`, `window`, `percentiles`, `gamma`. "
            "With `band_names`, the ViT's RGB weights are spread over these bands."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.from_scratch, self.dataset_name = self.from_scratch or None, self.dataset_name or None
        self.annotations, self.mixture = self.annotations or None, self.mixture or None
        if self.mixture is None and self.dataset_name is None and self.annotations is None:
            raise ValueError("The training data are missing: set --config, dataset_name, annotations or mixture.")
        given = {name: getattr(self, name) for name in ("dataset_name", "annotations", "mixture")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            shown = [f"{name}={value!r}" if isinstance(value, str) else name for name, value in given.items()]
            raise ValueError(
                f"{' and '.join(shown)} are both set. Remove one of them, for example with --{next(iter(given))} ''."
            )
        if self.annotations is not None:
            self.annotations = find_data(self.annotations)
            if not Path(self.annotations).is_dir():
                raise ValueError(f"annotations={self.annotations!r}: folder not found.")
        elif self.annotation_options:
            raise ValueError("annotation_options needs annotations. Remove annotation_options.")
        check_keys("annotation_options", self.annotation_options, AnnotationOptions)
        for score, text in (self.require or {}).items():
            Requirement.parse(score, text)
        self.labels = None if self.annotations is None else AnnotationOptions(**(self.annotation_options or {}))
        if self.dataset_name is not None:
            self.dataset_name = find_data(self.dataset_name)
        for name in ("image_root", "columns", "prompt"):
            if getattr(self, name) is not None and self.dataset_name is None:
                raise ValueError(f"{name} needs dataset_name. In a mixture, set it for each source.")
        self.columns = self.columns and {role: str(name) for role, name in self.columns.items()}
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise ValueError(f"image_root={self.image_root!r}: folder not found.")
        if self.dry_run and self.mixture is None:
            raise ValueError(
                "dry_run needs a mixture, and the configuration has dataset_name. Give the data set as a mixture: "
                f"--dataset_name '' --mixture {shlex.quote(json.dumps(self.as_mixture()))}."
            )
        if isinstance(self.probe_data, str):
            self.probe_data = read_section(self.probe_data, "data")
        if self.probe_data is not None and self.probe_root is not None:
            self.probe_data["root"] = self.probe_root
        if len(self.probe_splits) != 2:
            raise ValueError(f"probe_splits={self.probe_splits}: give two splits, for training and for scoring.")

    def as_mixture(self) -> dict:
        """Return `dataset_name` as the one source of a mixture, in the keys of its file."""
        from ..instructions.sources import Source, base_of, source_of

        split = base_of(self.dataset_train_split)
        settings = {"columns": self.columns or {}, "prompt": self.prompt}
        source = vars(source_of(self.dataset_name, split, self.dataset_config, self.image_root, **settings))
        changed = {key: value for key, value in source.items() if value != vars(Source("mine"))[key]}
        return {"sources": [{**changed, "name": "mine"}]}


@dataclass
class VRLArguments(RunArguments):
    """Arguments that [`~modeling_vitp.ViTPTrainingConfig`] adds to TRL's settings."""

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
        metadata={"help": "Share of each sample's visual tokens that VRL drops during training, in [0, 1)."},
    )
    vrl_apply_prob: float = field(
        default=1.0,
        metadata={"help": "Share of samples that VRL is applied to. The authors' release is equivalent to 1 - ratio."},
    )
    vrl_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of first optimizer steps in which VRL drops no tokens. By default half of all steps with "
            "from_scratch, else 0."
        },
    )
    answer_mask_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Probability that an answer token is masked in the input during training, so that the model has to "
            "predict the next tokens from the image. 0: no masking."
        },
    )
    color_jitter: dict | str | None = field(
        default=None,
        metadata={
            "help": "Random gamma, gain and bias of each channel of the training images, and share of gray ones, such "
            'as \'{"gamma": 0.5, "gain": 0.35, "bias": 0.15, "gray": 0.2}\', the values that \'{}\' stands for. '
            "Default: none."
        },
    )
    max_length: int | None = field(
        default=4096,
        metadata={
            "help": "Maximum sequence length after VRL, in tokens. Answers beyond it are truncated with a warning."
        },
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the ViT. By default learning_rate."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector. By default learning_rate."}
    )
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the language model. By default learning_rate."}
    )
    projector_steps: int = field(
        default=0,
        metadata={
            "help": "Number of first optimizer steps that train only the projector, for a new projector. 0: none."
        },
    )
    allow_text_only: bool = field(
        default=False,
        metadata={"help": "Whether to train without any image, from which a ViT does not learn. Default: false."},
    )
    on_error: str = field(
        default="raise",
        metadata={
            "help": "Behavior on an invalid training row: 'raise' (the default) stops and names the row, 'skip' logs "
            "and counts it and uses another row instead. Evaluation always stops."
        },
    )


@dataclass
class StartArguments(Arguments):
    """Arguments of the start of fine-tuning: a pretrained backbone, a fine-tuned model, or random weights."""

    limits = {"drop_path_rate": "[0, 1)", "backbone_lora_r": "[0, inf)"}
    neck = None  # classification uses the ViT's features without a neck

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of an exported backbone, of a ViT such as facebook/dinov2-base, or of a model "
            "fine-tuned with this recipe; '' for none."
        },
    )
    model_revision: str = field(
        default="main",
        metadata={"help": "Branch, tag or commit of model_name_or_path on the Hub."},
    )
    from_scratch: dict | str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a ViT with random weights, as JSON. Replaces model_name_or_path; '{}' for none."
        },
    )
    backbone: dict | str | None = field(
        default=None, metadata={"help": "Fields of the backbone's configuration as JSON, such as deformable_heads."}
    )
    drop_path_rate: float = field(
        default=0.1,
        metadata={
            "help": "Stochastic depth rate of the ViT's last layer, ignored if its family has no stochastic depth or "
            "the ViT is frozen. A fine-tuned model keeps its own."
        },
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Freeze the ViT; the neck and the head train. Default: false."}
    )
    backbone_lora_r: int = field(
        default=0, metadata={"help": "Rank of LoRA on the layers of the ViT, whose own weights are frozen. 0: none."}
    )
    head: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of the model's configuration as JSON, such as hidden_size (of UPerNet) or pooling."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.model_name_or_path = self.model_name_or_path or None
        self.from_scratch = self.from_scratch or None


@dataclass
class BackboneArguments(StartArguments):
    """Arguments of the start of fine-tuning for segmentation, change detection and detection."""

    choices = {"neck": ("adapter", "pyramid")}

    neck: str | None = field(
        default=None,
        metadata={
            "help": "Neck of the ViT: 'adapter' (ViT-Adapter) or 'pyramid' (faster). By default 'adapter', or for a "
            "fine-tuned model its own, which it keeps."
        },
    )


@dataclass
class FineTuningSettings(RunArguments):
    """Settings that all fine-tuning tasks add to [`~transformers.TrainingArguments`].

    The settings of layer-wise learning rate decay are the arguments of
    [`~modeling_vitp.training.freezing.layer_decay_groups`].
    """

    limits = {"layer_decay": "(0, 1]", "horizontal_flip": "[0, 1]", "vertical_flip": "[0, 1]"}

    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    vertical_flip: float = field(default=0.0, metadata={"help": "Probability of a vertical flip."})
    do_train: bool = field(
        default=True,
        metadata={"help": "Whether to train. If false, the model is only scored and its predictions are drawn."},
    )
    layer_decay: float = field(
        default=0.9,
        metadata={
            "help": "Factor between the learning rates of a ViT layer and of the next layer, in (0, 1]. 1: no decay."
        },
    )
    level_embeddings_at_input: bool = field(
        default=False,
        metadata={
            "help": "Whether the adapter's level embeddings have the learning rate of the patch and position "
            "embeddings, as in the authors' release. By default they have that of the adapter."
        },
    )
    position_weight_decay: bool = field(
        default=False,
        metadata={"help": "Whether position embeddings have weight decay, as in the authors' release. Default: false."},
    )


@dataclass
class SplitArguments(PlanArguments):
    """Arguments of the data set and its splits for training and scoring."""

    limits = {"num_pictures": "[0, inf)"}

    data: dict | str | None = field(
        default=None,
        metadata={"help": "Classes, splits and files of the data set as JSON, see the page of the recipe."},
    )
    data_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the data set, by default data.root. Without splits in `data`, classes and splits are "
            "inferred from the folder."
        },
    )
    train_splits: list[str] = field(default_factory=lambda: ["train"], metadata={"help": "Splits to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split that is scored during training, according to eval_strategy, and at the end; '' for none. "
            "The last checkpoint is the result unless load_best_model_at_end is set, which selects by "
            "metric_for_best_model, by default the main score."
        },
    )
    test_split: str | None = field(
        default=None,
        metadata={"help": "Split that is scored once, at the end; '' for none."},
    )
    resample_test: bool = field(
        default=False,
        metadata={
            "help": "Whether to also write the main score of each resample of the test cases to metrics.json, for "
            "intervals of differences between models."
        },
    )
    num_pictures: int = field(default=4, metadata={"help": "Number of samples in predictions.png. 0: none."})
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "Python files that register decode heads or layouts of labeled images, see tests/README.md."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.has_default_splits = self.eval_split is None and self.test_split is None
        self.eval_split, self.test_split = self.eval_split or None, self.test_split or None
        if self.data_root is not None:
            self.data = {**(self.data or {}), "root": self.data_root}
        if self.data is None:
            raise ValueError("Expected a data set. Set `data_root` (a folder of annotated images) or `data`.")


@dataclass
class ViewSettings(RunArguments):
    """Settings of the random views of unlabeled images that a ViT is trained on, and of its optimizer."""

    limits = {"crop_area": "(0, 1]", "horizontal_flip": "[0, 1]", "vertical_flip": "[0, 1]"}

    crop_area: list[float] = field(
        default_factory=lambda: [0.25, 1.0],
        metadata={"help": "Smallest and largest area of a training crop, as a fraction of the image area."},
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    vertical_flip: float = field(default=0.0, metadata={"help": "Probability of a vertical flip."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of AdamW. Default: 0.001."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule. Default: cosine."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Number of warm-up steps, or their share of all steps if below 1."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW. Default: 0.05."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images per batch of a device."})

    def __post_init__(self):
        super().__post_init__()
        if len(self.crop_area) != 2 or self.crop_area[0] > self.crop_area[1]:
            raise ValueError(f"Expected `crop_area` to be the smallest and largest area, got {self.crop_area}.")


@dataclass
class DistillationSettings(ViewSettings):
    """Settings that distillation adds to [`~transformers.TrainingArguments`], and its defaults for a small ViT."""

    limits = {"teacher_image_size": "[1, inf)"}

    teacher_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the teacher's input in pixels, a multiple of its patch size. By default that of the "
            "student's input, rounded up to whole patches of the teacher."
        },
    )


@dataclass
class DistillationArguments(Arguments):
    """Arguments of the teacher, the student and the images of distillation."""

    file_fields = ("student_config",)

    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of an exported backbone, or of a ViT of another family."},
    )
    student_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a student with random weights: fields as JSON, with `model_type` for another "
            "family than vitp_vision, or a folder or Hub id with a config.json. By default a ViT-S with the image and "
            "patch size of the teacher."
        },
    )
    student: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a ViT whose weights the student starts from. Replaces student_config."},
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Training images: image files, and folders with image files, also in subfolders."},
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Images on which student and teacher are compared, at the end and according to eval_strategy: "
            "files and folders. By default none."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.student = self.student or None
        missing = [name for name in ("teacher", "data") if not getattr(self, name)]
        if missing:
            raise ValueError(f"{missing[0]} is missing: give --teacher BACKBONE and --data IMAGES.")
        if self.student and self.student_config:
            raise ValueError("Expected student, whose weights are loaded, or student_config, got both. Remove one.")
