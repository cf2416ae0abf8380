"""Reading of checkpoints: recognition of the layout by the names of the tensors, and checks of each tensor."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import list_repo_files, snapshot_download
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..auto.registry import MODELS, ModelEntry, find_model
from ..cards.record import LICENSE_FILES, read_json
from ..configuration_vitp import ViTPConfig, ViTPVisionConfig
from ..configuration_vitp_dense import ViTPAdapterConfig, ViTPSegmentationConfig
from ..configuration_vitp_detection import ViTPObjectDetectionConfig
from ..conversations import CHAT_TEMPLATE, IMAGE_TOKEN
from ..image_processing_vitp import ViTPImageProcessor
from ..image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ..image_processing_vitp_detection import ViTPDetectionImageProcessor
from ..opening import check_fields, naming, without_remote_code
from ..processing_vitp import ViTPProcessor
from ..vision_towers import other_families
from .internvl import from_internvl_config
from .keys import BACKBONE, VISION_TOWER, locate_tensor, recognize_layout
from .original_config import (
    TensorShapes,
    adapter_from_original,
    chat_from_original,
    check_required,
    check_values,
    detection_from_original,
    detection_image_processor,
    segmentation_from_original,
    vision_from_original,
    vision_from_tensors,
)
from .tensor_files import StoredTensor, main_dtype, read_checkpoint

logger = logging.getLogger(__name__)

Config = ViTPConfig | ViTPVisionConfig | ViTPAdapterConfig | ViTPSegmentationConfig | ViTPObjectDetectionConfig
DenseImageProcessor = ViTPSegmentationImageProcessor | ViTPDetectionImageProcessor

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", *LICENSE_FILES]
UNUSED = "backbone.embeddings.cls_token"  # not used by the adapter
DETECTORS = ("original_detection", "original_cascade")
# Layouts that an argument of the conversion is for.
LAYOUTS_OF_OPTIONS = {
    "deformable_attention": ("original_adapter", "original_adapter_prefixed", "original_segmentation", *DETECTORS),
    "benchmark": DETECTORS,
}


@dataclass
class Checkpoint:
    """Checkpoint in our classes, with its tensors under the names of this package."""

    name: str
    root: Path  # of the card and the license
    folder: Path  # of the weights, their configuration and their tokenizer
    layout: str
    config: Config
    tensors: dict[str, StoredTensor]
    image_processor: ViTPImageProcessor | DenseImageProcessor
    processor: ViTPProcessor | None  # if there is a tokenizer

    @property
    def kind(self) -> str:
        return "original" if self.layout.startswith("original") else self.layout

    @property
    def entry(self) -> ModelEntry:
        return find_model(self.config.model_type)

    @property
    def original_layout(self) -> str | None:
        """Layout of the original code."""
        layout = self.entry.original_layout
        is_one_stage = layout == "original_cascade" and len(self.config.stage_iou_thresholds) == 1
        return "original_detection" if is_one_stage else layout

    @property
    def targets(self) -> list[str]:
        """Layouts that the checkpoint can be converted to."""
        layout = self.entry.layout
        if self.other_vit_family is not None:  # such a ViT keeps its own format
            return ["vitp"] if layout == "vitp" else []
        targets = [layout]
        backbone_config = getattr(self.config, "backbone_config", None)
        is_on_adapter = isinstance(backbone_config, ViTPAdapterConfig)
        if layout == "vitp":
            targets += ["backbone", "internvl"]
        if is_on_adapter:
            targets.append("adapter")
        if self.original_layout is not None and (is_on_adapter or backbone_config is None):
            targets.append("original")
        return targets

    @property
    def other_vit_family(self) -> str | None:
        """Model type of the ViT of a model, `None` if it is an InternViT."""
        backbone_config = getattr(self.config, "backbone_config", None)
        for vit_config in (
            getattr(self.config, "vision_config", None),
            getattr(self.config, "vit_config", None),
            backbone_config,
            getattr(backbone_config, "vit_config", None),
        ):
            if vit_config is not None and vit_config.model_type in other_families():
                return vit_config.model_type
        return None


def read_checkpoint_source(
    source: str,
    revision: str | None = None,
    image_token_id: int | None = None,
    deformable_attention: str | None = None,
    benchmark: str | None = None,
    file: str | None = None,
) -> Checkpoint:
    """Recognize a checkpoint and check that its tensors match its configuration."""
    root = local_path(source, revision, file)
    path = root if file is None else root / file
    folder = path if path.is_dir() else path.parent
    weights = read_checkpoint(path)
    with naming(folder, PreTrainedConfig):
        fields = read_json(folder / "config.json")
        check_fields(str(folder / "config.json"), fields)
    layout = layout_of(source, weights, fields.get("model_type"))
    for option, value in (("deformable_attention", deformable_attention), ("benchmark", benchmark)):
        layouts = LAYOUTS_OF_OPTIONS[option]
        if value is not None and layout not in layouts:
            raise ValueError(f"{option} is for the layouts {', '.join(layouts)}, but {source} has {layout!r}.")
    if deformable_attention is not None:
        check_values(fields, {"deformable_attention": deformable_attention}, "the argument of the conversion")
        fields = {**fields, "deformable_attention": deformable_attention}
    if layout == "original_adapter_prefixed":
        weights = without_head(source, weights)
    with naming(folder, PreTrainedConfig):
        config = read_config(layout, fields, weights, benchmark)
        config.dtype = fields.get("dtype") or fields.get("torch_dtype") or main_dtype(weights)
        model = meta_model(config)
    tensors = match_tensors(source, model, layout, weights)
    image_processor = read_image_processor(folder, layout, fields, config, benchmark)
    processor = None
    if isinstance(config, ViTPConfig) and has_any(folder, TOKENIZER_FILES):
        processor = read_processor(folder, layout, config, image_processor)
    if layout != "original":
        image_token_id = getattr(config, "image_token_id", None)
    elif image_token_id is None:
        image_token_id = fields.get("img_context_token_id")
    if isinstance(config, ViTPConfig):
        config.image_token_id = choose_image_token_id(source, config, processor, image_token_id)
    return Checkpoint(
        name=source,
        root=folder if file is None else root,
        folder=folder,
        layout=layout,
        config=config,
        tensors=tensors,
        image_processor=image_processor,
        processor=processor,
    )


def layout_of(source: str, weights: dict[str, StoredTensor], model_type: str | None) -> str:
    """Return the layout of a checkpoint. Raise a `ValueError` if it is unknown or not that of its model type."""
    layout = recognize_layout(set(weights))
    if layout is None:
        first_key = min(weights, default="none")
        is_lora = any(".lora_" in key for key in weights)
        advice = ""
        if is_lora:
            advice = (
                " This is a LoRA adapter, which is converted with its model. Pass the folder of the run with the "
                "merged model, or merge it with PEFT's `merge_and_unload` and save it with `save_pretrained`."
            )
        raise ValueError(
            "Expected a ViTP model, an InternVL model (transformers' or the original), the ViT of one, or a "
            f"ViT-Adapter on that ViT, got {source}, a {model_type or 'model'!r} with tensors such as {first_key!r}."
            f"{advice}"
        )
    if layout == "original":
        model_types = ["internvl_chat"]
    else:
        model_types = [name for name, entry in MODELS.items() if entry.layout == layout]
    if model_types and model_type not in model_types:
        raise ValueError(
            f"{source} has tensors of the layout {layout!r}. Expected model_type "
            f"{' or '.join(map(repr, model_types))} in its config.json, got {model_type!r}."
        )
    return layout


def has_any(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def without_head(source: str, weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the backbone of a model with an unsupported head, and log the omitted tensors."""
    backbone_weights = {}
    omitted_counts = Counter()
    for key, tensor in weights.items():
        if key.startswith(BACKBONE):
            backbone_weights[key] = tensor
        else:
            omitted_counts[key.split(".")[0]] += 1
    if omitted_counts:
        omitted_parts = [f"{name} ({number} tensors)" for name, number in sorted(omitted_counts.items())]
        logger.warning("%s: only the backbone is converted. Left out: %s.", source, ", ".join(omitted_parts))
    return backbone_weights


def local_path(source: str, revision: str | None, file: str | None = None) -> Path:
    """Return the path of a source, of which only one file is downloaded if `file` names it.

    Raises:
        ValueError: if the source cannot be downloaded, or the file to convert is missing or not named.
    """
    path = Path(source)
    is_on_hub = not path.exists()
    names = []
    try:
        if is_on_hub:
            path = download(source, revision, file)
        has_weights = path.is_file() or any(path.glob("*.safetensors"))
        if file is not None:
            has_weights = (path / file).is_file()
        if not has_weights and is_on_hub:
            names = list_repo_files(source, revision=revision)
        elif not has_weights:
            names = [name.relative_to(path).as_posix() for name in sorted(path.rglob("*.safetensors"))]
    except Exception as error:  # the HTTP package depends on the version of huggingface_hub
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected a file, a folder or an available Hub repo, got {source}: {reason}") from error
    weights_files = [name for name in names if name.endswith(".safetensors")]
    if not has_weights and (weights_files or file is not None):
        missing = "safetensors outside of folders" if file is None else f"file {file}"
        listed_files = ", ".join(weights_files) or "no safetensors"
        raise ValueError(f"{source} has no {missing}. Set file (--file). Found: {listed_files}.")
    return path


def download(repo_id: str, revision: str | None, file: str | None) -> Path:
    """Return the folder of a downloaded repo: with one checkpoint, or with `file` and its settings."""
    if file is None:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=HUB_FILES,
            ignore_patterns="*/*.safetensors",
        )
        return Path(folder)
    folder_in_repo = file[: file.rfind("/") + 1]
    patterns = [file, "README.md", *LICENSE_FILES]
    for pattern in HUB_FILES:
        if not pattern.endswith(("safetensors", "md")):
            patterns.append(folder_in_repo + pattern)
    folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    return Path(folder)


def read_config(layout: str, fields: dict, weights: dict[str, StoredTensor], benchmark: str | None = None) -> Config:
    """Return the configuration of the source in our classes."""
    if layout == "original":
        return chat_from_original(fields)
    if layout in ("adapter", "segmentation", "detection"):
        return find_model(fields["model_type"]).model_class.config_class.from_dict(fields)
    shapes = TensorShapes((key, tensor.shape) for key, tensor in weights.items())
    if layout == "original_segmentation":
        return segmentation_from_original(fields, shapes)
    if layout in DETECTORS:
        return detection_from_original(fields, shapes, benchmark)
    if layout.startswith("original_adapter"):
        return adapter_from_original(fields, shapes)
    if layout.startswith("original_vision"):
        if not fields:
            shapes = TensorShapes((key.removeprefix("vision_model."), shape) for key, shape in shapes.items())
            return vision_from_tensors(shapes)
        if fields.get("model_type") == "intern_vit_6b":
            return vision_from_original(fields)
        check_required(fields, ["vision_config"])
        return vision_from_original(fields["vision_config"])
    if layout == "backbone":
        return ViTPVisionConfig.from_dict({**fields, "model_type": ViTPVisionConfig.model_type})
    check_required(fields, ("vision_config", "text_config"))
    if layout == "internvl":
        return from_internvl_config(InternVLConfig.from_dict(fields))
    return ViTPConfig.from_dict(fields)


def match_tensors(
    source: str, model: PreTrainedModel, layout: str, weights: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors under our names.

    Raises:
        ValueError: with all keys that are missing, unknown or of a wrong shape.
    """
    prefix = {"backbone": VISION_TOWER, "adapter": BACKBONE}.get(find_model(model.config.model_type).layout, "")
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied_names = {name: source_name for name, source_name in model.all_tied_weights_keys.items() if name in shapes}
    tensors = {}
    known_keys = set()
    missing_keys = set()
    wrong_shapes = set()
    for name, shape in shapes.items():
        location = locate_tensor(name, layout)
        if location is None:
            continue
        key = location.key
        known_keys.add(key)
        if key not in weights:
            if name not in tied_names and name != UNUSED:
                missing_keys.add(key)
            continue
        stored_shape = shape
        if location.num_blocks > 1:
            stored_shape = (shape[0] * location.num_blocks, *shape[1:])
        if weights[key].shape == stored_shape:
            tensors[name] = weights[key].rows(location.block_index, location.num_blocks)
        else:
            wrong_shapes.add(f"{key} is {list(weights[key].shape)}, expected {list(stored_shape)}")
    problems = []
    for problem, keys in (
        ("missing", missing_keys),
        ("unknown", weights.keys() - known_keys),
        ("of a wrong shape", wrong_shapes),
    ):
        if keys:
            problems.append(f"{problem}: {', '.join(sorted(keys))}")
    if problems:
        raise ValueError(f"The tensors of {source} do not match its configuration. {'; '.join(problems)}")
    for name, source_name in tied_names.items():
        if name in tensors and not is_same(tensors[name], tensors[source_name]):
            key = locate_tensor(name, layout).key
            source_key = locate_tensor(source_name, layout).key
            raise ValueError(
                f"{source}: the configuration ties {key} and {source_key}, but their weights differ. Set "
                "tie_word_embeddings to false in config.json."
            )
    return tensors


def is_same(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two tensors are the same to the bit; NaN is the same as itself."""
    return torch.equal(first.load().view(torch.uint8), second.load().view(torch.uint8))


def meta_model(config: Config) -> PreTrainedModel:
    """Return the model on the meta device, for the names and shapes of its weights."""
    with torch.device("meta"):
        return find_model(config.model_type).model_class(config)


def read_image_processor(
    folder: Path,
    layout: str,
    fields: dict,
    config: Config,
    benchmark: str | None = None,
) -> ViTPImageProcessor | DenseImageProcessor:
    """Return the image processor of a checkpoint, or a new one if it has none or that of another code."""
    has_files = has_any(folder, IMAGE_PROCESSOR_FILES)
    if isinstance(config, ViTPObjectDetectionConfig):
        if has_files and benchmark is None:
            return ViTPDetectionImageProcessor.from_pretrained(folder)
        return detection_image_processor(config, benchmark)
    if isinstance(config, (ViTPAdapterConfig, ViTPSegmentationConfig)):
        return ViTPSegmentationImageProcessor.from_pretrained(folder) if has_files else ViTPSegmentationImageProcessor()
    if not layout.startswith("original") and has_files:
        return ViTPImageProcessor.from_pretrained(folder)
    height, width = getattr(config, "vision_config", config).image_size
    original_settings = read_json(folder / "preprocessor_config.json")
    normalization = {}
    for name in ("image_mean", "image_std"):
        if name in original_settings:
            normalization[name] = original_settings[name]
    image_processor = ViTPImageProcessor(size={"height": height, "width": width}, **normalization)
    if layout == "original":
        uses_tiles = fields.get("dynamic_image_size")
        image_processor.min_patches = fields.get("min_dynamic_patch", 1)
        image_processor.max_patches = fields.get("max_dynamic_patch", 6) if uses_tiles else 1
    return image_processor


def read_processor(folder: Path, layout: str, config: ViTPConfig, image_processor: ViTPImageProcessor) -> ViTPProcessor:
    """Return our processor with the source's tokenizer. The chat template is ours unless the source is a ViTP model."""
    if layout == "vitp":
        return ViTPProcessor.from_pretrained(folder)
    if chat_template_of(folder) not in (None, CHAT_TEMPLATE):
        logger.warning(
            "The chat template of %s is replaced by ViTP's, which has no system message and marks the answers for the "
            "loss. Set the processor's chat_template to keep another one.",
            folder,
        )
    return ViTPProcessor(image_processor, plain_tokenizer(folder), image_seq_length=config.image_seq_length)


def chat_template_of(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return read_json(folder / "tokenizer_config.json").get("chat_template")


def choose_image_token_id(
    source: str,
    config: ViTPConfig,
    processor: ViTPProcessor | None,
    stated_id: int | None,
) -> int:
    """Return the id of the image token, which the original code reads from the tokenizer."""
    if processor is not None:
        if stated_id not in (None, processor.image_token_id):
            raise ValueError(
                f"{source}: {IMAGE_TOKEN} is token {processor.image_token_id} of the tokenizer, but image_token_id is "
                f"{stated_id}."
            )
        return processor.image_token_id
    if stated_id is None:
        logger.warning(
            "%s has no tokenizer, so its image token is unknown. Set image_token_id, or set it in the configuration "
            "afterwards.",
            source,
        )
        return config.image_token_id
    return stated_id


def plain_tokenizer(folder: Path, **kwargs) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, without references to a processor or a folder."""
    with naming(folder, ProcessorMixin):
        tokenizer = without_remote_code(AutoTokenizer.from_pretrained, folder, **kwargs)
    tokenizer._set_processor_class(None)
    for name in ("auto_map", "processor_class", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.chat_template = None
    return tokenizer
