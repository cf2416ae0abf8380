"""Arguments of pretraining and distillation. Importing them loads no heavy library."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trl import ScriptArguments

from ..command.paths import expanded_home, find_data, read_section
from ..command.settings import (
    DropRate,
    JsonText,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Settings,
    Share,
    check_value,
)
from ..instructions.arguments import AnnotationOptions
from ..training.arguments import Part, PlanArguments, RunArguments
from .requirements import Requirement

# Where the fields of TRL's `SFTConfig` are defined.
SFT_MODULES = ("transformers.training_args", "trl.trainer.base_config", "trl.trainer.sft_config")


@dataclass
class ProbeData(Settings):
    """Images with masks that a backbone is probed on.

    Attributes:
        data: `data` of the configuration, with `root`.
    """

    config: str = field(metadata={"help": "Configuration with `data` as for finetune_segmentation: a name or a file."})
    root: str | None = field(default=None, metadata={"help": "Folder of the images. By default that of `config`."})
    train_split: str = field(default="train", metadata={"help": "Training split of the probes."})
    test_split: str = field(default="test", metadata={"help": "Scored split of the probes."})

    def __post_init__(self):
        super().__post_init__()
        data = read_section(self.config, "data")
        if self.root is not None:
            data["root"] = self.root
        self.data = expanded_home(data)


@dataclass
class PretrainArguments(PlanArguments, ScriptArguments):
    """Arguments of the training data, the start of the model, and its frozen parts."""

    advanced = ("plugins", "require", "unfreeze_vision_layers", "lora_on_vision", "drop_path_rate", "vision_image_size")

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
    columns: dict | JsonText | None = field(
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
    annotation_options: AnnotationOptions | JsonText | None = field(
        default=None,
        metadata={
            "help": "Options of annotations as JSON: those of `make_instructions` (names, kinds, window, collages …), "
            "and scale, turn and mosaics, see recipes/pretrain.md."
        },
    )
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "Python files that register layouts of labeled images, see docs/extending.md."},
    )
    from_scratch: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": "Model and tokenizer with random weights, as JSON: `vision_config`, `text_config`, `vocab_size` "
            "and optionally `image_processor`. Replaces model_name_or_path; '{}' for none."
        },
    )
    vision_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a pretrained ViT, such as facebook/dinov2-base, or of a vision-language model "
            "whose ViT is taken, combined with language_model. With from_scratch, the initial weights of its ViT. "
            "Replaces model_name_or_path."
        },
    )
    language_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the causal LM that vision_model is combined with; the projector is new."
        },
    )
    vision_image_size: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Side of a tile in pixels for vision_model, whose position embeddings are interpolated to it. By "
            "default the size of the ViT."
        },
    )
    probe_data: ProbeData | JsonText | None = field(
        default=None,
        metadata={
            "help": "Images with masks for probes of the backbone at the end of the run, compared with the backbone at "
            "its start, as JSON: `config` (name of a fine-tuning configuration), `root`, `train_split` and "
            "`test_split`, see recipes/pretrain.md. By default no probes."
        },
    )
    require: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": "Scores that the run must reach at its end, as JSON by their keys in metrics.json, such as "
            '\'{"probe.least_gain.linear": "> 0.02"}\'. Otherwise its exit status is 1.'
        },
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Parts of the model that do not train: vision, projector, language_model; '' for none. For LoRA on "
            "the language model, set use_peft instead. By default all parts train."
        },
    )
    unfreeze_vision_layers: NonNegativeInt = field(
        default=0, metadata={"help": "Number of last layers of a frozen ViT that still train. 0: none."}
    )
    lora_on_vision: bool = field(
        default=False,
        metadata={
            "help": "With use_peft: train LoRA on the ViT's layers too, instead of the whole ViT. Default: false."
        },
    )
    drop_path_rate: DropRate | None = field(
        default=None,
        metadata={
            "help": "Stochastic depth rate of the ViT's last layer. By default that of the model; the authors' release "
            "has 0.1."
        },
    )
    max_patches: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tiles per sample, shared by its images. By default that of the image processor; "
            "the authors' release has 12 or 6."
        },
    )
    input_spec: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": "Input spec of images that are not 8-bit RGB, as JSON: `bands`, `window`, `percentiles`, `gamma`. "
            "With `band_names`, the ViT's RGB weights are spread over these bands."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.from_scratch = self.from_scratch or None
        self.freeze = [part for part in self.freeze if part]
        check_value("freeze", self.freeze, list[Part])
        self._check_data()
        for score, text in (self.require or {}).items():
            Requirement.parse(score, text)
        if self.columns:
            self.columns = {role: str(name) for role, name in self.columns.items()}
        if self.dry_run and self.annotations is not None:
            raise ValueError(
                "dry_run needs a mixture, and the configuration has annotations. Store their questions with vitp "
                "make_instructions, and name that folder in a mixture."
            )
        if self.dry_run and self.mixture is None:
            raise ValueError(
                "dry_run needs a mixture, and the configuration has dataset_name. Give the data set as a mixture: "
                f"--dataset_name '' --mixture {shlex.quote(json.dumps(self.as_mixture()))}."
            )

    def _check_data(self) -> None:
        """Find the training data; raise a `ValueError` if there are none or several, or an option needs others."""
        self.dataset_name = self.dataset_name or None
        self.annotations = self.annotations or None
        self.mixture = self.mixture or None
        sources = []
        for name in ("dataset_name", "annotations", "mixture"):
            if getattr(self, name) is not None:
                sources.append(name)
        if not sources:
            raise ValueError("The training data are missing: set --config, dataset_name, annotations or mixture.")
        if len(sources) > 1:
            settings = []
            for name in sources:
                value = getattr(self, name)
                settings.append(f"{name}={value!r}" if isinstance(value, str) else name)
            raise ValueError(
                f"{' and '.join(settings)} are both set. Remove one of them, for example with --{sources[0]} ''."
            )
        needed_sources = {
            "annotation_options": "annotations",
            "image_root": "dataset_name",
            "columns": "dataset_name",
            "prompt": "dataset_name",
        }
        for name, source in needed_sources.items():
            is_set = getattr(self, name) not in (None, AnnotationOptions())
            if is_set and getattr(self, source) is None:
                raise ValueError(f"{name} needs {source}. Remove it; a source of a mixture has settings of its own.")
        self.labels = None
        if self.annotations is not None:
            self.annotations = find_data(self.annotations)
            if not Path(self.annotations).is_dir():
                raise ValueError(f"annotations={self.annotations!r}: folder not found.")
            self.labels = self.annotation_options or AnnotationOptions()
        if self.dataset_name is not None:
            self.dataset_name = find_data(self.dataset_name)
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise ValueError(f"image_root={self.image_root!r}: folder not found.")

    def as_mixture(self) -> dict:
        """Return `dataset_name` as the one source of a mixture, in the keys of its file."""
        from ..instructions.sources import Source, base_of, source_of

        source = source_of(
            self.dataset_name,
            base_of(self.dataset_train_split),
            self.dataset_config,
            self.image_root,
            columns=self.columns or {},
            prompt=self.prompt,
        )
        defaults = vars(Source("mine"))
        settings = {}
        for key, value in vars(source).items():
            if value != defaults[key]:
                settings[key] = value
        settings["name"] = "mine"
        return {"sources": [settings]}


@dataclass
class VRLArguments(RunArguments):
    """Arguments that [`~modeling_vitp.ViTPTrainingConfig`] adds to TRL's settings."""

    advanced = (
        "patch_drop_end",
        "loss_reduction",
        "interpolation_alpha",
        "answer_mask_ratio",
        "color_jitter",
        "allow_text_only",
    )

    vrl_drop_ratio: DropRate = field(
        default=0.75,
        metadata={"help": "Share of each sample's visual tokens that VRL drops during training, in [0, 1)."},
    )
    vrl_apply_prob: Probability = field(
        default=1.0,
        metadata={"help": "Share of samples that VRL is applied to. The authors' release is equivalent to 1 - ratio."},
    )
    vrl_warmup_steps: NonNegativeInt | None = field(
        default=None,
        metadata={
            "help": "Number of first optimizer steps in which VRL drops no tokens. By default half of all steps with "
            "from_scratch, else 0."
        },
    )
    patch_drop_ratio: DropRate = field(
        default=0.0,
        metadata={
            "help": "Share of each tile's patches that is dropped before the ViT during training, in [0, 1). VRL then "
            "drops among the rest, and both ratios are of all visual tokens. 0: none."
        },
    )
    patch_drop_end: Probability = field(
        default=0.1,
        metadata={"help": "Share of the optimizer steps, at the end and at least one, in which no patch is dropped."},
    )
    interpolation_alpha: Probability = field(
        default=1.0,
        metadata={
            "help": "Share of the way of the weights from the start (0) to the trained ViT (1), at which the backbone "
            "is exported at the end, see recipes/export_backbone.md. The whole model keeps the trained ViT."
        },
    )
    answer_mask_ratio: Probability = field(
        default=0.0,
        metadata={
            "help": "Probability that an answer token is masked in the input during training, so that the model has to "
            "predict the next tokens from the image. 0: no masking."
        },
    )
    color_jitter: dict | JsonText | None = field(
        default=None,
        metadata={
            "help": "Random gamma, gain and bias of each channel of the training images, and share of gray ones, such "
            'as \'{"gamma": 0.5, "gain": 0.35, "bias": 0.15, "gray": 0.2}\', the values that \'{}\' stands for. '
            "Default: none."
        },
    )
    max_length: PositiveInt | None = field(
        default=4096,
        metadata={
            "help": "Maximum sequence length after VRL, in tokens. Answers beyond it are truncated with a warning."
        },
    )
    part_learning_rates: dict[Part, NonNegativeFloat] | JsonText | None = field(
        default=None,
        metadata={
            "help": 'Learning rates of parts of the model as JSON, such as \'{"vision": 1e-5, "projector": 1e-3}\'. '
            "Parts: vision, projector, language_model. By default learning_rate for all."
        },
    )
    projector_steps: NonNegativeInt = field(
        default=0,
        metadata={
            "help": "Number of first optimizer steps that train only the projector, for a new projector. 0: none."
        },
    )
    loss_reduction: Literal["token", "sample"] = field(
        default="token",
        metadata={
            "help": "What counts the same in the loss of a step: each answer 'token' (the default), or each 'sample', "
            "whose loss is the mean over its answer tokens."
        },
    )
    allow_text_only: bool = field(
        default=False,
        metadata={"help": "Whether to train without any image, from which a ViT does not learn. Default: false."},
    )
    on_error: Literal["raise", "skip"] = field(
        default="raise",
        metadata={
            "help": "Behavior on an invalid training row: 'raise' (the default) stops and names the row, 'skip' logs "
            "and counts it and uses another row instead. Evaluation always stops."
        },
    )

    def patch_drop_steps(self, num_steps: int) -> int:
        """Return the number of first optimizer steps of a run of `num_steps` in which patches are dropped."""
        num_last_steps = max(1, round(self.patch_drop_end * num_steps))
        return max(0, num_steps - num_last_steps)


@dataclass
class ViewSettings(RunArguments):
    """Settings of the random views of unlabeled images that a ViT is trained on, and of its optimizer."""

    crop_area: list[Share] = field(
        default_factory=lambda: [0.25, 1.0],
        metadata={"help": "Smallest and largest area of a training crop, as a fraction of the image area."},
    )
    horizontal_flip: Probability = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    vertical_flip: Probability = field(default=0.0, metadata={"help": "Probability of a vertical flip."})
    learning_rate: NonNegativeFloat = field(
        default=1e-3, metadata={"help": "Initial learning rate of AdamW. Default: 0.001."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule. Default: cosine."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Number of warm-up steps, or their share of all steps if below 1."}
    )
    weight_decay: NonNegativeFloat = field(default=0.05, metadata={"help": "Weight decay of AdamW. Default: 0.05."})
    per_device_train_batch_size: PositiveInt = field(default=64, metadata={"help": "Images per batch of a device."})

    def __post_init__(self):
        super().__post_init__()
        if len(self.crop_area) != 2 or self.crop_area[0] > self.crop_area[1]:
            raise ValueError(f"Expected `crop_area` to be the smallest and largest area, got {self.crop_area}.")


@dataclass
class DistillationSettings(ViewSettings):
    """Settings that distillation adds to [`~transformers.TrainingArguments`], and its defaults for a small ViT."""

    teacher_image_size: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Side of the teacher's input in pixels, a multiple of its patch size. By default that of the "
            "student's input, rounded up to whole patches of the teacher."
        },
    )


@dataclass
class DistillationArguments(Settings):
    """Arguments of the teacher, the student and the images of distillation."""

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
        for name in ("teacher", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give --teacher BACKBONE and --data IMAGES.")
        if self.student and self.student_config:
            raise ValueError("Expected student, whose weights are loaded, or student_config, got both. Remove one.")
