"""Opens models of each kind from a folder whose files were checked by `checking.py`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checking import UnavailableModel, check_memory, check_weights
from computing import BUILDING, device
from opened import FineTuned, FullModel, LoadedBackbone
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_vitp import (
    ViTPAdapter,
    ViTPBackbone,
    ViTPConfig,
    ViTPFeaturePyramid,
    ViTPForConditionalGeneration,
    ViTPImageProcessor,
    ViTPProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
)
from modeling_vitp.auto.registry import MODELS
from modeling_vitp.convert.internvl import from_internvl, internvl_processor
from modeling_vitp.detection.one_stage import DETECTORS
from modeling_vitp.processing_vitp import CHAT_TEMPLATE

FULL, BACKBONE, FINE_TUNED = "full model", "backbone", "fine-tuned model"
LANGUAGE_MODELS = ("qwen2", "qwen3", "llama", "mistral", "phi3", "gemma2", "gemma3_text")
WITH_MAPS = {one.config_class.model_type: one for one in (ViTPBackbone, ViTPAdapter, ViTPFeaturePyramid)}
ON_PATCHES = ("internvl_vision", "vitp_vision", *WITH_MAPS)
REFERENCES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "clip_vision_model", "siglip")
REFERENCES += ("siglip_vision_model", "vit", "vit_mae", "ijepa")
OURS = {
    name: (entry.model_class, entry.image_processor_class)
    for name, entry in MODELS.items()
    if entry.image_processor_class is not None and name not in ("vitp", "vitp_vision")
}
HEADS = OURS | DETECTORS
KINDS = {"vitp": FULL, "internvl": FULL} | dict.fromkeys(ON_PATCHES + REFERENCES, BACKBONE)
KINDS |= dict.fromkeys(HEADS, FINE_TUNED)


def kind_of(name: str, config: dict[str, Any]) -> str:
    """Return the kind of a model, or raise [`UnavailableModel`] if its type is not supported."""
    model_type = config.get("model_type")
    if model_type not in KINDS:
        raise UnavailableModel(f"{name} has the model type {str(model_type)[:60]!r}, which this app does not support.")
    return KINDS[model_type]


def open_full(name: str, folder: Path, is_trusted: bool) -> FullModel:
    """Open a full model with its processor.

    Args:
        is_trusted: whether the model was named when the app was started. Otherwise its chat template is replaced.
    """
    config = ViTPConfig.get_config_dict(folder)[0]
    language = config["text_config"].get("model_type")
    if not is_trusted and language not in LANGUAGE_MODELS:
        raise UnavailableModel(
            f"{name}: expected one of the language models {', '.join(LANGUAGE_MODELS)}, got {str(language)[:60]!r}."
        )
    if config["model_type"] == "vitp":
        model = load(name, folder, ViTPForConditionalGeneration)
        processor = ViTPProcessor.from_pretrained(folder, local_files_only=True)
    else:
        model = from_internvl(load(name, folder, InternVLForConditionalGeneration))
        processor = internvl_processor(str(folder), local_files_only=True)
    lengths = processor.image_seq_length, model.config.image_seq_length
    if lengths[0] != lengths[1]:
        raise UnavailableModel(
            f"{name}: the processor has {lengths[0]} visual tokens a tile, but the model has {lengths[1]}."
        )
    if not is_trusted:
        processor.chat_template, processor.tokenizer.chat_template = CHAT_TEMPLATE, None
    model.set_attn_implementation("eager")
    return FullModel(name, model.eval().to(device()), processor)


def open_backbone(name: str, folder: Path, trust_remote_code: bool = False) -> LoadedBackbone:
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model = load(name, folder, WITH_MAPS.get(model_type, AutoModel), **options).get_encoder(modality="image")
    processors = ViTPImageProcessor if model_type in ON_PATCHES else AutoImageProcessor
    return LoadedBackbone.of(name, model, processors.from_pretrained(folder, local_files_only=True))


def open_fine_tuned(name: str, folder: Path) -> FineTuned:
    model_type = PreTrainedConfig.get_config_dict(folder)[0]["model_type"]
    model_class, processors = HEADS[model_type]
    image_processor = processors.from_pretrained(folder, local_files_only=True)
    input_spec = getattr(image_processor, "input_spec", None)
    if input_spec is not None:
        bands = image_processor.band_names
        image_processor.input_spec = bands and {"band_names": bands}
    return FineTuned(name, load(name, folder, model_class).eval().to(device()), image_processor, input_spec)


def load(name: str, folder: Path, model_class: Any, **options) -> PreTrainedModel:
    """Load a model and check that its weights fit into memory, are complete and are finite.

    Weights are loaded in float32, because another dtype would change the default dtype of other threads meanwhile. On
    an accelerator they are converted to the dtype in which they were saved.
    """
    configs = model_class.config_class if hasattr(model_class, "config_class") else AutoConfig
    config = configs.from_pretrained(folder, **options)
    saved_in = config.dtype or torch.float32
    check_memory(name, model_class, config)
    model, loading = model_class.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_weights` reports them together with missing weights.
        **options,
    )
    check_weights(name, model, loading)
    return model if device().type == "cpu" else model.to(saved_in)


def vit_of(name: str, one: FullModel | FineTuned) -> LoadedBackbone:
    """Return the ViT inside another model, sharing its weights."""
    if isinstance(one, FullModel):
        return LoadedBackbone.of(name, one.model.model.vision_tower, one.processor.image_processor)
    model = one.model.backbone if hasattr(one.model, "backbone") else one.model.model.backbone.model
    return replace(LoadedBackbone.of(name, model, one.image_processor), input_spec=one.input_spec)


def random_twin(name: str, trained: LoadedBackbone, seed: int = 1) -> LoadedBackbone:
    """Return the same ViT with randomly initialized weights."""
    config = type(trained.model.config).from_dict(trained.model.config.to_dict())
    model_class = type(trained.model)
    if isinstance(trained.model, InternVLVisionModel) and not trained.is_padded:
        # Its own initialization has zero position embeddings, see ViTPVisionModel.
        config = ViTPVisionConfig.from_dict(config.to_dict() | {"model_type": ViTPVisionConfig.model_type})
        model_class = ViTPVisionModel
    with BUILDING, torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)
    return replace(trained, name=name, model=model.eval().to(device(), trained.model.dtype))
