"""A checkpoint to another layout: [`convert_checkpoint`]."""

import json
import math
import shutil
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, metadata_load, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..configuration_vitp import ViTPConfig, ViTPVisionConfig
from ..configuration_vitp_dense import ViTPAdapterConfig, ViTPChangeDetectionConfig, ViTPSegmentationConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ..modeling_vitp import ViTPForConditionalGeneration, ViTPVisionModel
from ..modeling_vitp_adapter import ViTPAdapter
from ..modeling_vitp_dense import ViTPForChangeDetection, ViTPForSemanticSegmentation
from ..processing_vitp import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN, ViTPProcessor
from .export import AUTO_MAP, image_settings, native_vision_config, save_code_and_image_processor
from .keys import BACKBONE, VISION_TOWER, place, recognise
from .original_config import (
    INTERN_VIT_HEADS,
    chat_from_original,
    chat_to_original,
    vision_from_original,
    vision_to_original,
)
from .original_dense_config import adapter_from_original, adapter_to_original, segmentation_from_original
from .tensor_files import TensorBytes, read_checkpoint, write_checkpoint

logger = logging.get_logger(__name__)

# What a source may hold: the targets that can be made of it, the default first, and its layout in original names.
CONTENTS = {
    "vision-language model": (("vitp", "backbone", "internvl", "original"), "original"),
    "ViT": (("backbone", "original"), "original_vision"),
    "ViT-Adapter": (("adapter", "original"), "original_adapter"),
    "segmentation model": (("segmentation", "adapter", "original"), "original_segmentation"),
}

TARGETS = tuple(dict.fromkeys(target for targets, _ in CONTENTS.values() for target in targets))

MODELS = {
    ViTPConfig.model_type: ViTPForConditionalGeneration,
    ViTPVisionConfig.model_type: ViTPVisionModel,
    ViTPAdapterConfig.model_type: ViTPAdapter,
    ViTPSegmentationConfig.model_type: ViTPForSemanticSegmentation,
    ViTPChangeDetectionConfig.model_type: ViTPForChangeDetection,
}

Config = ViTPConfig | ViTPVisionConfig | ViTPAdapterConfig | ViTPSegmentationConfig

MODEL_TYPES = {
    "vitp": ("vitp",),
    "internvl": ("internvl",),
    "backbone": ("internvl_vision", "vitp_vision"),
    "original": ("internvl_chat",),
    "adapter": (ViTPAdapterConfig.model_type,),
    "segmentation": (ViTPSegmentationConfig.model_type, ViTPChangeDetectionConfig.model_type),
}

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")

LICENSE_FIELDS = ("license", "license_name", "license_link")

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", *LICENSE_FILES]

VIDEO_TOKEN = "<video>"

UNUSED = "backbone.embeddings.cls_token"  # which the adapter runs without

NAMED_TOKENS = {
    "start_image_token": IMAGE_START_TOKEN,
    "end_image_token": IMAGE_END_TOKEN,
    "context_image_token": IMAGE_TOKEN,
    "video_token": VIDEO_TOKEN,
}


@dataclass
class Checkpoint:
    """What a source holds: its tensors under the names of this package, and the rest in our classes."""

    name: str
    folder: Path
    layout: str
    config: Config
    tensors: dict[str, TensorBytes]
    image_processor: ViTPImageProcessor | ViTPSegmentationImageProcessor
    processor: ViTPProcessor | None  # if there is a tokenizer

    @property
    def kind(self) -> str:
        return "original" if self.layout.startswith("original") else self.layout

    @property
    def contents(self) -> str:
        if isinstance(self.config, ViTPSegmentationConfig):
            return "segmentation model"
        if isinstance(self.config, ViTPAdapterConfig):
            return "ViT-Adapter"
        return "ViT" if isinstance(self.config, ViTPVisionConfig) else "vision-language model"


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    *,
    revision: str | None = None,
    license: str | None = None,
    image_token_id: int | None = None,
) -> Path:
    """Writes `source` in another layout to the new folder `target`, with configuration, tokenizer, image processor,
    generation configuration and a card that states the licence of the source.

    Args:
        source: Hub id, folder or safetensors file.
        target: must not exist yet, or be empty.
        to: `"vitp"`; `"backbone"`, the ViT alone, which `AutoModel` opens without remote code; `"internvl"`, which
            `AutoModelForImageTextToText` opens without remote code; `"segmentation"`, which
            [`ViTPForSemanticSegmentation`] or [`ViTPForChangeDetection`] opens; `"adapter"`, its [`ViTPAdapter`] alone;
            `"original"`, the names of InternVL's, ViT-Adapter's or OpenMMLab's own code. By default ours, with all that
            the source holds.
        revision: branch, tag or commit of a Hub id.
        license: the licence, if the source states none; one that contradicts the source is refused.
        image_token_id: the token that stands for an image, for a checkpoint of InternVL's own code without tokenizer.

    Raises:
        ValueError: if the source is damaged, of an unknown kind, lacks tensors or has others than its configuration
            asks for, or if `to` cannot say what it says. Nothing is written then.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: give a new folder.")
    checkpoint = read_source(str(source), revision, image_token_id)
    targets, _ = CONTENTS[checkpoint.contents]
    to = to or targets[0]
    if to not in TARGETS:
        raise ValueError(f"There is no target {to!r}, only {', '.join(TARGETS)}.")
    if to == checkpoint.kind:
        raise ValueError(f"{source} is of the kind {to!r} already.")
    if checkpoint.contents == "ViT" and to in ("vitp", "internvl"):
        raise ValueError(
            f"{source} holds a ViT alone, of which {to!r} cannot be made without a language model: convert it to "
            "'backbone', and compose that with a language model in recipes/pretrain.py."
        )
    if to not in targets:
        raise ValueError(f"{source} holds a {checkpoint.contents}, of which {to!r} cannot be made.")
    license_fields = read_license(checkpoint, license)

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        WRITERS[to](checkpoint, temporary)
        write_checkpoint(temporary, arrange(checkpoint, to))
        write_card(checkpoint, to, license_fields, temporary, target.name)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def read_source(source: str, revision: str | None = None, image_token_id: int | None = None) -> Checkpoint:
    """Recognises a checkpoint and checks that its tensors are those that its configuration asks for."""
    path = local_path(source, revision)
    folder = path if path.is_dir() else path.parent
    weights = read_checkpoint(path)
    fields = read_json(folder / "config.json")
    layout = recognise(set(weights))
    model_type = fields.get("model_type")
    if layout is None:
        raise ValueError(
            f"{source} holds a {model_type or 'model'!r} with tensors such as {min(weights, default='none')!r}, but a "
            "ViTP model, an InternVL model (transformers' or the original), the ViT of one, or a ViT-Adapter on that "
            "ViT is expected."
        )
    if layout in MODEL_TYPES and model_type not in MODEL_TYPES[layout]:
        raise ValueError(
            f"{source} has tensors of the kind {layout!r}, but the model_type in its config.json is {model_type!r} "
            f"and not {' or '.join(map(repr, MODEL_TYPES[layout]))}."
        )
    try:
        config = read_config(layout, fields, weights)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid: {error}") from error
    if layout == "original_adapter_prefixed":
        weights = without_head(source, weights)
    config.dtype = fields.get("dtype") or fields.get("torch_dtype") or main_dtype(weights)
    tensors = match_tensors(source, config, layout, weights)
    image_processor = read_image_processor(folder, layout, fields, config)
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
    """The backbone of a model whose head we do not have, such as a detector."""
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


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, but a JSON object is expected.")
    return fields


def read_config(layout: str, fields: dict, weights: dict[str, TensorBytes]) -> Config:
    """The configuration in our classes, from that of the source."""
    if layout == "original":
        return chat_from_original(fields)
    if layout in ("adapter", "segmentation"):
        return MODELS[fields["model_type"]].config_class.from_dict(fields)
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    if layout == "original_segmentation":
        return segmentation_from_original(fields, shapes)
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
        return vision_from_original(fields.get("vision_config") or guess_vision_config(weights, layout))
    if layout == "backbone":
        return ViTPVisionConfig.from_dict({**fields, "model_type": ViTPVisionConfig.model_type})
    for name in ("vision_config", "text_config"):
        if not isinstance(fields.get(name), dict):
            raise ValueError(f"config.json, of model_type {fields['model_type']!r}, has no {name}, which is expected.")
    if layout == "internvl":
        return from_internvl_config(InternVLConfig.from_dict(fields))
    return ViTPConfig.from_dict(fields)


def from_internvl_config(config: InternVLConfig) -> ViTPConfig:
    """The configuration of transformers' own model in ours."""
    fields = config.to_dict()
    for owner in (fields, fields["vision_config"]):
        for name in ("model_type", "architectures", "auto_map"):
            owner.pop(name, None)
    return ViTPConfig(**fields)


def guess_vision_config(weights: dict[str, TensorBytes], layout: str) -> dict[str, Any]:
    """InternViT's configuration from its tensors, for a file that comes without one."""
    shapes = {key.removeprefix("vision_model."): tensor.shape for key, tensor in weights.items()}
    try:
        num_patches = shapes["embeddings.position_embedding"][1] - 1
        hidden_size, _, patch_size, _ = shapes["embeddings.patch_embedding.weight"]
        intermediate_size = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"There is no config.json, and the tensors are not those of an InternViT ({error})."
        ) from error
    if hidden_size not in INTERN_VIT_HEADS:
        raise ValueError(
            f"There is no config.json, and the number of heads of a ViT of width {hidden_size} cannot be seen from its "
            "tensors: put a config.json with vision_config beside it."
        )
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": len({key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")}),
        "num_attention_heads": INTERN_VIT_HEADS[hidden_size],
        "norm_type": "layer_norm" if "encoder.layers.0.norm1.bias" in shapes else "rms_norm",
        "qkv_bias": "encoder.layers.0.attn.qkv.bias" in shapes,
        "qk_normalization": "encoder.layers.0.attn.q_norm.weight" in shapes,
        "image_size": math.isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
    }


def main_dtype(weights: dict[str, TensorBytes]) -> str:
    """The dtype that most bytes have."""
    counts = Counter()
    for tensor in weights.values():
        counts[tensor.dtype] += tensor.num_bytes
    dtype = counts.most_common(1)[0][0]
    if dtype not in DTYPES:
        raise ValueError(f"The weights are of dtype {dtype}, but one of {[*DTYPES]} is expected.")
    return DTYPES[dtype]


def match_tensors(source: str, config: Config, layout: str, weights: dict[str, TensorBytes]) -> dict[str, TensorBytes]:
    """The tensors under our names.

    Raises:
        ValueError: with all keys that are missing, unknown or of a wrong shape.
    """
    model = meta_model(config)
    prefix = {ViTPVisionConfig: VISION_TOWER, ViTPAdapterConfig: BACKBONE}.get(type(config), "")
    expected = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {name: other for name, other in model.all_tied_weights_keys.items() if name in expected}
    optional = {*tied, UNUSED}
    places = {name: place(name, layout) for name in expected}
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
    """The model without memory for its weights, to know their names and shapes."""
    with torch.device("meta"):
        return MODELS[config.model_type](config)


def read_image_processor(
    folder: Path, layout: str, fields: dict, config: Config
) -> ViTPImageProcessor | ViTPSegmentationImageProcessor:
    if isinstance(config, (ViTPAdapterConfig, ViTPSegmentationConfig)):
        has_files = any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES)
        return ViTPSegmentationImageProcessor.from_pretrained(folder) if has_files else ViTPSegmentationImageProcessor()
    if not layout.startswith("original") and any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES):
        return ViTPImageProcessor.from_pretrained(folder)
    height, width = getattr(config, "vision_config", config).image_size
    image_processor = ViTPImageProcessor(size={"height": height, "width": width})
    if layout == "original":
        image_processor.min_patches = fields.get("min_dynamic_patch", 1)
        image_processor.max_patches = fields.get("max_dynamic_patch", 6) if fields.get("dynamic_image_size") else 1
    return image_processor


def read_processor(folder: Path, layout: str, config: ViTPConfig, image_processor: ViTPImageProcessor) -> ViTPProcessor:
    """Our processor around the tokenizer, with our chat template unless it is our checkpoint."""
    if layout == "vitp":
        return ViTPProcessor.from_pretrained(folder)
    return ViTPProcessor(image_processor, plain_tokenizer(folder), image_seq_length=config.image_seq_length)


def choose_image_token_id(source: str, config: ViTPConfig, processor: ViTPProcessor | None, given: int | None) -> int:
    """The id of the token that stands for an image; the original code takes it from the tokenizer."""
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


def arrange(checkpoint: Checkpoint, to: str) -> dict[str, list[TensorBytes]]:
    """The tensors under the names of the target, each as the blocks of rows that make it up."""
    layout = CONTENTS[checkpoint.contents][1] if to == "original" else to
    arranged = {}
    for name, tensor in checkpoint.tensors.items():
        found = place(name, layout)
        if found is not None:
            arranged.setdefault(found.key, {})[found.part] = tensor
    for key, blocks in arranged.items():
        if len({tensor.dtype for tensor in blocks.values()}) > 1:
            raise ValueError(f"{key} would be made of tensors of several dtypes.")
    return {key: [blocks[part] for part in sorted(blocks)] for key, blocks in arranged.items()}


def write_vitp(checkpoint: Checkpoint, folder: Path) -> None:
    config = checkpoint.config
    config.architectures = [ViTPForConditionalGeneration.__name__]
    custom_object_save(meta_model(config), folder, config=config)
    config.save_pretrained(folder)
    (checkpoint.processor or checkpoint.image_processor).save_pretrained(folder)
    if checkpoint.processor is not None:
        drop_video_token(folder, config.text_config.vocab_size)
    copy_generation_config(checkpoint, folder)


def write_internvl(checkpoint: Checkpoint, folder: Path) -> None:
    refuse_input_spec(checkpoint, "internvl")
    fields = checkpoint.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "vision_config"):
        fields.pop(name, None)
    config = InternVLConfig(vision_config=native_vision_config(checkpoint.config.vision_config), **fields)
    config.architectures = ["InternVLForConditionalGeneration"]
    config.save_pretrained(folder)
    settings = image_settings(checkpoint.image_processor)
    settings.pop("input_spec", None)
    image_processor = GotOcr2ImageProcessor(**settings)
    if checkpoint.processor is None:
        image_processor.save_pretrained(folder)
    else:
        # What transformers' processor asks the tokenizer for by name. The video token is replaced before encoding, so
        # it needs no embedding.
        tokenizer = plain_tokenizer(checkpoint.folder, model_specific_special_tokens=NAMED_TOKENS)
        same = {name: settings[name] for name in ("size", "image_mean", "image_std") if name in settings}
        InternVLProcessor(
            image_processor,
            tokenizer,
            InternVLVideoProcessor(**same),
            image_seq_length=checkpoint.config.image_seq_length,
            chat_template=checkpoint.processor.chat_template,
        ).save_pretrained(folder)
    copy_generation_config(checkpoint, folder)


def write_backbone(checkpoint: Checkpoint, folder: Path) -> None:
    vision_config = getattr(checkpoint.config, "vision_config", checkpoint.config)
    config = native_vision_config(vision_config)
    config.architectures = ["InternVLVisionModel"]
    config.dtype = checkpoint.config.dtype
    config.auto_map = AUTO_MAP
    config.save_pretrained(folder)
    save_code_and_image_processor(folder, vision_config, checkpoint.image_processor)


def write_dense(checkpoint: Checkpoint, folder: Path, config: ViTPAdapterConfig | ViTPSegmentationConfig) -> None:
    model = meta_model(config)
    config.architectures = [type(model).__name__]
    config.dtype = checkpoint.config.dtype
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    checkpoint.image_processor.save_pretrained(folder)


def write_segmentation(checkpoint: Checkpoint, folder: Path) -> None:
    write_dense(checkpoint, folder, checkpoint.config)


def write_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    write_dense(checkpoint, folder, getattr(checkpoint.config, "backbone_config", checkpoint.config))


def write_original(checkpoint: Checkpoint, folder: Path) -> None:
    refuse_input_spec(checkpoint, "original")
    config, image_processor = checkpoint.config, checkpoint.image_processor
    if checkpoint.contents in ("ViT-Adapter", "segmentation model"):
        write_json(folder / "config.json", adapter_to_original(getattr(config, "backbone_config", config)))
        return
    if checkpoint.contents == "ViT":
        fields = vision_to_original(config)
    else:
        fields = chat_to_original(config, image_processor.min_patches, image_processor.max_patches)
        copy_generation_config(checkpoint, folder)
    write_json(folder / "config.json", {**fields, "torch_dtype": str(config.dtype).removeprefix("torch.")})
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": image_processor.size["height"],
            "crop_size": image_processor.size["height"],
            "do_center_crop": True,
            "do_resize": True,
            "do_normalize": True,
            "image_mean": list(image_processor.image_mean),
            "image_std": list(image_processor.image_std),
            "resample": 3,
        },
    )
    if checkpoint.processor is not None:
        write_tokenizer_of_version_4(checkpoint, folder)


WRITERS = {
    "vitp": write_vitp,
    "backbone": write_backbone,
    "internvl": write_internvl,
    "segmentation": write_segmentation,
    "adapter": write_adapter,
    "original": write_original,
}


def refuse_input_spec(checkpoint: Checkpoint, to: str) -> None:
    if checkpoint.image_processor.input_spec:
        raise ValueError(
            f"{checkpoint.name} reads images with input_spec={checkpoint.image_processor.input_spec}, which {to!r} "
            "cannot say: its users would misread the images. Save the processor with input_spec=None first, and "
            "convert images yourself."
        )


def copy_generation_config(checkpoint: Checkpoint, folder: Path) -> None:
    file = checkpoint.folder / "generation_config.json"
    if file.is_file():
        shutil.copyfile(file, folder / file.name)


def write_json(path: Path, fields: dict[str, Any], ensure_ascii: bool = True) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=ensure_ascii) + "\n", encoding="utf-8")


def plain_tokenizer(folder: Path, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, without what ties it to a processor or a place."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    for name in ("auto_map", "processor_class", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.chat_template = None
    return tokenizer


def drop_video_token(folder: Path, vocab_size: int) -> None:
    """Takes the video token out of the tokenizer saved in `folder` if the model has no embedding for it.

    transformers' InternVL replaces it before encoding; elsewhere, a text that holds it would stop the model.
    """
    state, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    kept = [token for token in state["added_tokens"] if token["content"] != VIDEO_TOKEN or token["id"] < vocab_size]
    if kept == state["added_tokens"]:
        return
    write_json(folder / "tokenizer.json", {**state, "added_tokens": kept}, ensure_ascii=False)
    named = config.pop("model_specific_special_tokens", {})
    config = {name: value for name, value in config.items() if name not in named}
    if "extra_special_tokens" in config:
        config["extra_special_tokens"] = [token for token in config["extra_special_tokens"] if token != VIDEO_TOKEN]
    write_json(folder / "tokenizer_config.json", config, ensure_ascii=False)


def write_tokenizer_of_version_4(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer for transformers 4, which the original code runs on; its slow classes need files of their own."""
    tokenizer = plain_tokenizer(checkpoint.folder)
    tokenizer.save_pretrained(folder)
    drop_video_token(folder, checkpoint.config.text_config.vocab_size)
    tokenizer.backend_tokenizer.model.save(str(folder))
    added = {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json")["added_tokens"]}
    write_json(folder / "added_tokens.json", added, ensure_ascii=False)
    config = read_json(folder / "tokenizer_config.json")
    config.pop("backend", None)
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", config, ensure_ascii=False)


def read_license(checkpoint: Checkpoint, given: str | None) -> dict[str, str]:
    """The licence fields of the source's card; the given licence if the source states none."""
    card = card_metadata(checkpoint.folder)
    fields = {name: card[name] for name in LICENSE_FIELDS if card.get(name)}
    if fields.get("license") == "unknown":
        fields = {}
    files = license_files(checkpoint.folder)
    if not fields and files and given is None:
        return {"license": "other", "license_name": "license-of-the-source", "license_link": files[0].name}
    if given is not None and fields.get("license", given) != given:
        raise ValueError(
            f"{checkpoint.name} is licensed {fields['license']}: a conversion keeps that and cannot make it {given}."
        )
    if not fields and given is None:
        logger.warning(
            "%s states no licence (neither a card nor a licence file): find out what it is, and give it as `license`.",
            checkpoint.name,
        )
        return {"license": "unknown"}
    return fields or {"license": given}


def card_metadata(folder: Path) -> dict[str, Any]:
    file = folder / "README.md"
    return (metadata_load(file) or {}) if file.is_file() else {}


def license_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in LICENSE_FILES for file in folder.glob(pattern))


def write_card(checkpoint: Checkpoint, to: str, license_fields: dict[str, str], folder: Path, name: str) -> None:
    """A card with the licence of the source, and the licence files themselves."""
    for file in license_files(checkpoint.folder):
        shutil.copyfile(file, folder / file.name)
    base_model = card_metadata(checkpoint.folder).get("base_model")
    data = ModelCardData(
        **license_fields,
        base_model=base_model if Path(checkpoint.name).exists() else checkpoint.name,
        library_name="transformers",
        pipeline_tag=pipeline_tag(checkpoint, to),
        tags=["vitp"],
    )
    source = Path(checkpoint.name).name if Path(checkpoint.name).exists() else checkpoint.name
    licence = license_fields.get("license_name", license_fields["license"])
    if licence == "unknown":
        terms = "The source states no licence. Find out what it is before you use or pass on these weights."
    else:
        terms = f"Licence of the source, and so of these weights: {licence}."
    card = ModelCard(
        f"---\n{data}\n---\n\n# {name}\n\nThe weights of `{source}` (layout: {checkpoint.kind}), the same to the bit, "
        f"in the layout `{to}`, converted with `python -m modeling_vitp.convert`.\n\n{terms}\n"
    )
    card.save(folder / "README.md")


def pipeline_tag(checkpoint: Checkpoint, to: str) -> str:
    if to in ("backbone", "adapter") or checkpoint.contents in ("ViT", "ViT-Adapter"):
        return "image-feature-extraction"
    return "image-text-to-text" if checkpoint.contents == "vision-language model" else "image-segmentation"
