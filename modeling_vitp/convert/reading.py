"""Read a checkpoint: recognize its layout by the names of its tensors, and check each tensor."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
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
from ..image_processing_vitp import ViTPImageProcessor
from ..image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ..image_processing_vitp_detection import ViTPDetectionImageProcessor
from ..opening import check_fields, naming
from ..processing_vitp import CHAT_TEMPLATE, IMAGE_TOKEN, ViTPProcessor
from .internvl import from_internvl_config
from .keys import BACKBONE, VISION_TOWER, locate_tensor, recognize_layout
from .original_config import (
    adapter_from_original,
    chat_from_original,
    detection_from_original,
    detection_image_processor,
    segmentation_from_original,
    vision_from_original,
    vision_from_tensors,
    with_deformable_attention,
)
from .tensor_files import TensorBytes, main_dtype, read_checkpoint

logger = logging.getLogger(__name__)

Config = ViTPConfig | ViTPVisionConfig | ViTPAdapterConfig | ViTPSegmentationConfig | ViTPObjectDetectionConfig
DenseImageProcessor = ViTPSegmentationImageProcessor | ViTPDetectionImageProcessor

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", *LICENSE_FILES]
UNUSED = "backbone.embeddings.cls_token"  # which the adapter runs without


@dataclass
class Checkpoint:
    """A checkpoint with its tensors under the names of this package, and the rest in our classes."""

    name: str
    folder: Path
    layout: str
    config: Config
    tensors: dict[str, TensorBytes]
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
        """The layout of the original code."""
        layout = self.entry.original_layout
        is_one_stage = layout == "original_cascade" and len(self.config.stage_iou_thresholds) == 1
        return "original_detection" if is_one_stage else layout

    @property
    def targets(self) -> list[str]:
        """What the checkpoint can be converted to, the default first."""
        targets = [self.entry.layout]
        if self.entry.layout == "vitp":
            targets += ["backbone", "internvl"]
        if isinstance(getattr(self.config, "backbone_config", None), ViTPAdapterConfig):
            targets.append("adapter")
        return targets + (["original"] if self.original_layout else [])


def read_checkpoint_source(
    source: str,
    revision: str | None = None,
    image_token_id: int | None = None,
    deformable_attention: str | None = None,
    benchmark: str | None = None,
) -> Checkpoint:
    """Recognize a checkpoint and check that its tensors are those that its configuration asks for."""
    path = local_path(source, revision)
    folder = path if path.is_dir() else path.parent
    weights = read_checkpoint(path)
    with naming(folder, PreTrainedConfig):
        fields = read_json(folder / "config.json")
        check_fields(str(folder / "config.json"), fields)
    layout = recognize_layout(set(weights))
    model_type = fields.get("model_type")
    if layout is None and any(".lora_" in key for key in weights):
        raise ValueError(
            f"{source} holds a LoRA adapter, which is converted within its model: give the folder of the run, which "
            "has the merged model, or what `merge_and_unload` of PEFT and `save_pretrained` make of it."
        )
    if layout is None:
        raise ValueError(
            f"{source} holds a {model_type or 'model'!r} with tensors such as {min(weights, default='none')!r}, but a "
            "ViTP model, an InternVL model (transformers' or the original), the ViT of one, or a ViT-Adapter on that "
            "ViT is expected."
        )
    types = ["internvl_chat"] if layout == "original" else [name for name in MODELS if MODELS[name].layout == layout]
    if types and model_type not in types:
        raise ValueError(
            f"{source} has tensors of the kind {layout!r}, but the model_type in its config.json is {model_type!r} "
            f"and not {' or '.join(map(repr, types))}."
        )
    if deformable_attention is not None:
        fields = with_deformable_attention(source, layout, fields, deformable_attention)
    if benchmark is not None and layout not in ("original_detection", "original_cascade"):
        raise ValueError(f"{source} is no detector of the original naming: a benchmark says nothing of it.")
    if layout == "original_adapter_prefixed":
        weights = without_head(source, weights)
    with naming(folder, PreTrainedConfig):
        config = read_config(layout, fields, weights, benchmark)
        config.dtype = fields.get("dtype") or fields.get("torch_dtype") or main_dtype(weights)
        model = meta_model(config)
    tensors = match_tensors(source, model, layout, weights)
    image_processor = read_image_processor(folder, layout, fields, config, benchmark)
    processor = None
    if isinstance(config, ViTPConfig) and any((folder / name).is_file() for name in TOKENIZER_FILES):
        processor = read_processor(folder, layout, config, image_processor)
    if layout == "original":
        given = image_token_id if image_token_id is not None else fields.get("img_context_token_id")
        config.image_token_id = choose_image_token_id(source, config, processor, given)
    elif processor is not None and processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"{source}: {IMAGE_TOKEN} is token {processor.image_token_id} of the tokenizer, but config.json says "
            f"image_token_id={config.image_token_id}."
        )
    return Checkpoint(source, folder, layout, config, tensors, image_processor, processor)


def without_head(source: str, weights: dict[str, TensorBytes]) -> dict[str, TensorBytes]:
    """Return the backbone of a model whose head we do not have; log what is left out."""
    left_out = weights.keys() - {key for key in weights if key.startswith(BACKBONE)}
    if left_out:
        counts = Counter(key.split(".")[0] for key in left_out)
        listed = ", ".join(f"{name} ({number} tensors)" for name, number in sorted(counts.items()))
        logger.warning("%s: only the backbone is converted. Left out: %s.", source, listed)
    return {key: tensor for key, tensor in weights.items() if key not in left_out}


def local_path(source: str, revision: str | None) -> Path:
    if Path(source).exists():
        return Path(source)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # of the HTTP package that the installed huggingface_hub is built on, too
        reason = " ".join(str(error).split())
        raise ValueError(f"{source} is neither a file or folder nor a Hub repo that can be had: {reason}") from error


def read_config(layout: str, fields: dict, weights: dict[str, TensorBytes], benchmark: str | None = None) -> Config:
    """Return the configuration of the source in our classes."""
    if layout == "original":
        return chat_from_original(fields)
    if layout in ("adapter", "segmentation", "detection"):
        config = find_model(fields["model_type"]).model_class.config_class.from_dict(fields)
        if layout == "detection" and not isinstance(config.backbone_config, ViTPAdapterConfig):
            raise ValueError("The detector's backbone is no ViT-Adapter, which the other layouts have.")
        return config
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    if layout == "original_segmentation":
        return segmentation_from_original(fields, shapes)
    if layout in ("original_detection", "original_cascade"):
        return detection_from_original(fields, shapes, benchmark)
    if layout.startswith("original_adapter"):
        return adapter_from_original(fields, {key.removeprefix(BACKBONE): shape for key, shape in shapes.items()})
    if layout.startswith("original_vision"):
        if fields.get("model_type") == "intern_vit_6b":
            return vision_from_original(fields)
        if fields and not isinstance(fields.get("vision_config"), dict):
            raise ValueError(
                f"config.json, of model_type {fields.get('model_type')!r}, has no vision_config, which is expected "
                "beside a ViT of the original naming."
            )
        if fields.get("vision_config"):
            return vision_from_original(fields["vision_config"])
        return vision_from_tensors({key.removeprefix("vision_model."): shape for key, shape in shapes.items()})
    if layout == "backbone":
        return ViTPVisionConfig.from_dict({**fields, "model_type": ViTPVisionConfig.model_type})
    for name in ("vision_config", "text_config"):
        if not isinstance(fields.get(name), dict):
            raise ValueError(f"config.json, of model_type {fields['model_type']!r}, has no {name}, which is expected.")
    if layout == "internvl":
        return from_internvl_config(InternVLConfig.from_dict(fields))
    return ViTPConfig.from_dict(fields)


def match_tensors(
    source: str, model: PreTrainedModel, layout: str, weights: dict[str, TensorBytes]
) -> dict[str, TensorBytes]:
    """Return the tensors under our names.

    Raises:
        ValueError: with all keys that are missing, unknown or of a wrong shape.
    """
    prefix = {"backbone": VISION_TOWER, "adapter": BACKBONE}.get(find_model(model.config.model_type).layout, "")
    expected = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {name: other for name, other in model.all_tied_weights_keys.items() if name in expected}
    optional = {*tied, UNUSED}
    places = {name: locate_tensor(name, layout) for name in expected}
    places = {name: found for name, found in places.items() if found is not None}

    tensors, missing, wrong = {}, set(), set()
    for name, (key, part, num_parts) in places.items():
        if key not in weights:
            if name not in optional:
                missing.add(key)
            continue
        shape = expected[name]
        needed = (shape[0] * num_parts, *shape[1:]) if num_parts > 1 else shape
        if weights[key].shape != needed:
            wrong.add(f"{key} is {list(weights[key].shape)} and not {list(needed)}")
            continue
        tensors[name] = weights[key].rows(part, num_parts)
    unknown = weights.keys() - {place.key for place in places.values()}
    problems = {"missing": missing, "unknown": unknown, "of a wrong shape": wrong}
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys)
        raise ValueError(f"{source} does not hold the tensors that its configuration asks for. {listed}")
    for name, other in tied.items():
        if name in tensors and not all(
            a == b for a, b in zip(tensors[name].read(), tensors[other].read(), strict=True)
        ):
            raise ValueError(
                f"{source}: the configuration ties {places[name].key} and {places[other].key}, but their weights "
                "differ. Set tie_word_embeddings to false in config.json."
            )
    return tensors


def meta_model(config: Config) -> PreTrainedModel:
    """Return the model without memory for its weights, for their names and shapes."""
    with torch.device("meta"):
        return find_model(config.model_type).model_class(config)


def read_image_processor(
    folder: Path, layout: str, fields: dict, config: Config, benchmark: str | None = None
) -> ViTPImageProcessor | DenseImageProcessor:
    has_files = any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES)
    if isinstance(config, ViTPObjectDetectionConfig):
        if has_files and benchmark is None:
            return ViTPDetectionImageProcessor.from_pretrained(folder)
        return detection_image_processor(config, benchmark)
    if isinstance(config, (ViTPAdapterConfig, ViTPSegmentationConfig)):
        return ViTPSegmentationImageProcessor.from_pretrained(folder) if has_files else ViTPSegmentationImageProcessor()
    if not layout.startswith("original") and has_files:
        return ViTPImageProcessor.from_pretrained(folder)
    height, width = getattr(config, "vision_config", config).image_size
    image_processor = ViTPImageProcessor(size={"height": height, "width": width})
    if layout == "original":
        image_processor.min_patches = fields.get("min_dynamic_patch", 1)
        image_processor.max_patches = fields.get("max_dynamic_patch", 6) if fields.get("dynamic_image_size") else 1
    return image_processor


def read_processor(folder: Path, layout: str, config: ViTPConfig, image_processor: ViTPImageProcessor) -> ViTPProcessor:
    """Return our processor with the tokenizer of the source, and our chat template unless the source is ours."""
    if layout == "vitp":
        return ViTPProcessor.from_pretrained(folder)
    if chat_template_of(folder) not in (None, CHAT_TEMPLATE):
        logger.warning(
            "%s has a chat template of its own, which does not come along: ViTP's takes its place, which has no system "
            "message and marks the answers for the loss. Give the processor a chat_template to keep another.",
            folder,
        )
    return ViTPProcessor(image_processor, plain_tokenizer(folder), image_seq_length=config.image_seq_length)


def chat_template_of(folder: Path) -> str | None:
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return read_json(settings).get("chat_template") if settings.is_file() else None


def choose_image_token_id(source: str, config: ViTPConfig, processor: ViTPProcessor | None, given: int | None) -> int:
    """Return the id of the token that stands for an image; the original code takes it from the tokenizer."""
    if processor is not None:
        if given not in (None, processor.image_token_id):
            raise ValueError(f"{source}: {IMAGE_TOKEN} is token {processor.image_token_id}, and not {given}.")
        return processor.image_token_id
    if given is None:
        logger.warning(
            "%s has no tokenizer, so the token that stands for an image is not known: give image_token_id, or set it "
            "in the configuration.",
            source,
        )
        return config.image_token_id
    return given


def plain_tokenizer(folder: Path, **kwargs) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, without what ties it to a processor or a folder."""
    with naming(folder, ProcessorMixin):
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    tokenizer._set_processor_class(None)
    for name in ("auto_map", "processor_class", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.chat_template = None
    return tokenizer
