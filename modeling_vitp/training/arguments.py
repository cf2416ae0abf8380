"""Arguments of the pretraining, of which `--help` tells before anything heavy is imported."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from trl import ScriptArguments

from ..command.yaml_files import read_yaml
from .command_line import find_config, find_data, find_task
from .run_arguments import RunArguments
from .values import Arguments

# Where the fields of TRL's `SFTConfig` are defined.
SFT_MODULES = ("transformers.training_args", "trl.trainer.base_config", "trl.trainer.sft_config")


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
        """What `dataset_name` is as the one source of a mixture, in the keys of its file."""
        from ..instructions.mixture_file import Source
        from ..instructions.splits import base_of, source_of

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
