"""Export of the backbone from the model that it was trained in, to a folder that plain transformers opens."""

import copy
from pathlib import Path

from torch import nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedConfig,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..bands import describe_bands
from ..configuration_vitp import ViTPVisionConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import LANGUAGE_MODELS, VISION_MODELS, ViTPForConditionalGeneration
from ..modeling_vitp_backbone import ViTPExportedBackbone
from ..opening import naming, way_to_vit
from ..processing_vitp import ViTPProcessor
from .tensor_files import check_finite, main_dtype, open_like_folder, read_tensors

AUTO_MAP = {
    "AutoConfig": "configuration_vitp.ViTPVisionConfig",
    "AutoModel": "modeling_vitp.ViTPVisionModel",
    "AutoBackbone": "modeling_vitp_backbone.ViTPExportedBackbone",
}


def export_backbone(
    model: InternVLForConditionalGeneration | InternVLModel | InternVLVisionModel | str | Path,
    output_dir: str | Path,
    image_processor: ViTPImageProcessor | None = None,
    allow_nan: bool = False,
) -> Path:
    """Write the vision tower and its image processor to a folder of their own.

    The folder says `model_type: internvl_vision`, so `AutoModel.from_pretrained(output_dir)` opens it as transformers'
    own `InternVLVisionModel`, with no remote code and without this package; with `trust_remote_code=True`, or through
    `ViTPVisionModel.from_pretrained`, it opens as [`ViTPVisionModel`], and on the Hub through `AutoBackbone` as
    [`ViTPBackbone`]. Features are the same to the bit. The image processor resizes an image to one tile and does not
    cut it, so that feature extraction gives one row an image.

    An image processor with an input spec is saved as [`ViTPImageProcessor`] with its code, since transformers' own
    would ignore the spec and misread the images without a word; `AutoImageProcessor` then asks for
    `trust_remote_code=True`, unless this package is imported.

    Args:
        model: the trained model (also as PEFT has wrapped it), its vision model, or the folder or Hub id of a
            checkpoint (with its processor). A model that was loaded with `trust_remote_code=True` is one, and one of
            transformers' InternVL too.
        output_dir: created if missing.
        image_processor: the one of training; that of the checkpoint if `model` is one. ImageNet mean and std at the
            model's image size if there is none, which other bands than red, green and blue do not have.
        allow_nan: whether weights that are NaN or infinite are written; else they are a `ValueError`.

    Returns:
        `output_dir` as a path.

    Raises:
        ValueError: if a folder or Hub id holds another kind of model, such as a backbone or a detector, or `model` is
            one, or it takes other bands and there is no image processor for them.
    """
    name = str(model) if isinstance(model, (str, Path)) else "the backbone"
    if isinstance(model, (str, Path)):
        check_language_model(name)
        if image_processor is None:
            image_processor = ViTPProcessor.from_pretrained(model).image_processor
        model = ViTPForConditionalGeneration.from_pretrained(model, dtype=trained_dtype(model))
    vision_model = trained_vision_model(model)
    band_names = getattr(vision_model.config, "band_names", None)
    if image_processor is None and band_names is not None:
        raise ValueError(
            f"{name} takes {describe_bands(band_names)}, and nothing says how their values become the model's: give "
            "image_processor=ViTPImageProcessor(input_spec={'band_names': [...], 'window': [...]})."
        )
    if not allow_nan:
        check_finite(vision_model.state_dict(), name)

    native = InternVLVisionModel(native_vision_config(vision_model.config)).to(vision_model.dtype)
    native.load_state_dict(vision_model.state_dict())
    native.config.auto_map = AUTO_MAP
    native.save_pretrained(output_dir)
    open_like_folder(output_dir)
    save_code_and_image_processor(output_dir, vision_model.config, image_processor or ViTPImageProcessor())
    return Path(output_dir)


def trained_dtype(name: str | Path) -> str:
    """Return the dtype of the weights that trained in full beside a LoRA adapter, or `auto` without an adapter."""
    file = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    weights = read_tensors(Path(file)) if file else {}
    in_full = {key: weight for key, weight in weights.items() if "lora_" not in key}
    return main_dtype(in_full) if in_full else "auto"


def check_language_model(name: str) -> None:
    """Raise a `ValueError` that says what to do if a folder or Hub id holds no vision-language model."""
    try:
        with naming(name, PreTrainedConfig):
            fields = PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError):  # which opening it will report
        return
    model_type = fields.get("model_type")
    if model_type in [*VISION_MODELS]:
        raise ValueError(f"{name} is a backbone already, a {model_type!r}: use it as it is.")
    if model_type is not None and model_type not in [*LANGUAGE_MODELS]:
        raise ValueError(
            f"{name} is a {model_type!r}, and a vision-language model is expected: take the one that it was trained "
            f"from. {way_to_vit(name, fields)}"
        )


def trained_vision_model(model: nn.Module) -> InternVLVisionModel:
    """Return the vision model of a model; if PEFT has wrapped it, a copy with its adapters merged."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    # transformers' classes, of which ours are: those that remote code defines have the same names, but are others.
    if isinstance(model, InternVLForConditionalGeneration):
        model = model.model
    if isinstance(model, InternVLModel):
        model = model.vision_tower
    if getattr(model, "config_class", PreTrainedConfig).model_type not in VISION_MODELS:
        raise ValueError(
            f"a {type(model).__name__} is neither a vision-language model nor a ViT. Of a classifier give the "
            "`backbone`; of a model on maps at four strides save the `backbone`, backbone.save_pretrained('FOLDER'), "
            "and give ViTPVisionModel.from_pretrained('FOLDER')."
        )
    is_wrapped = any(hasattr(module, name) for module in model.modules() for name in ("modules_to_save", "base_layer"))
    return without_adapters(copy.deepcopy(model)) if is_wrapped else model


def without_adapters(module: nn.Module) -> nn.Module:
    """Remove PEFT's wrappers: merge LoRA, and keep the trained copy of modules that train in full."""
    if hasattr(module, "modules_to_save"):
        return without_adapters(module.modules_to_save[module.active_adapters[0]])
    if hasattr(module, "base_layer"):
        module.merge()
        return module.get_base_layer()
    for name, child in module.named_children():
        setattr(module, name, without_adapters(child))
    return module


def native_vision_config(config: ViTPVisionConfig) -> InternVLVisionConfig:
    """Return the configuration in transformers' own class; `drop_path_rate` and `band_names` stay as extra fields."""
    fields = config.to_dict()
    for name in ("model_type", "transformers_version", "architectures", "auto_map"):
        fields.pop(name, None)
    if fields.get("band_names") is None:
        fields.pop("band_names", None)
    return InternVLVisionConfig(**fields)


def save_code_and_image_processor(
    output_dir: str | Path, config: ViTPVisionConfig, image_processor: ViTPImageProcessor
) -> None:
    """Write the files of a backbone's folder beside its weights and configuration."""
    custom_object_save(ViTPExportedBackbone, output_dir)  # and what it imports, of which `ViTPVisionModel` is
    height, width = config.image_size
    settings = image_settings(image_processor) | {"size": {"height": height, "width": width}, "crop_to_patches": False}
    processor_class = ViTPImageProcessor if settings.get("input_spec") else GotOcr2ImageProcessor
    processor_class(**settings).save_pretrained(output_dir)


def image_settings(image_processor: ViTPImageProcessor) -> dict:
    """Return the settings of an image processor, for another class."""
    settings = image_processor.to_dict()
    return {name: settings[name] for name in ViTPImageProcessor.valid_kwargs.__annotations__ if name in settings}
