"""Export of the backbone from its pretraining model to a folder that plain transformers loads."""

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLImageProcessor,
    Siglip2ImageProcessor,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..bands import describe_bands
from ..cards.record import METRICS, RECORD, copy_record, forget_sources, read_json
from ..configuration_vitp import ViTPVisionConfig, patch_grid
from ..configuration_vitp_dense import MULTI_SCALE_CONFIGS
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import LANGUAGE_MODELS, VISION_MODELS, ViTPForConditionalGeneration
from ..modeling_vitp_backbone import ViTPExportedBackbone, open_vit, open_vit_config
from ..opening import read_config_fields, way_to_vit
from ..processing_vitp import ViTPProcessor
from ..vision_parts import vision_part
from ..vision_towers import TOWERS, pair, tower_of
from .interpolation import interpolate_vit
from .tensor_files import check_finite, main_dtype, open_like_folder, read_tensors

TAKE_PATCHES = ("siglip2_vision_model", "qwen3_vl_vision")  # as input

logger = logging.getLogger(__name__)

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
    start: PreTrainedModel | str | Path | None = None,
    interpolation_alpha: float = 1.0,
) -> Path:
    """Write the vision tower of a model and its image processor to a folder of their own.

    The folder's `model_type` is `internvl_vision`, so that `AutoModel.from_pretrained(output_dir)` loads transformers'
    own `InternVLVisionModel` without remote code and without this package. `ViTPVisionModel.from_pretrained`, or
    `AutoModel` with `trust_remote_code=True`, loads it as [`ViTPVisionModel`], and `AutoBackbone` loads it from the Hub
    as [`ViTPBackbone`]. The features are the same to the bit. The image processor resizes an image to one tile without
    cutting it, so that feature extraction returns one row for each image. Of a checkpoint, the record and the license
    are copied.

    A ViT of another family keeps its own `model_type` and its own class of transformers or timm.

    An image processor with an input spec is saved as [`ViTPImageProcessor`] with its code, because transformers' own
    would ignore the spec and misread the images. `AutoImageProcessor` then needs `trust_remote_code=True`, unless this
    package is imported.

    Args:
        model: trained model (also wrapped by PEFT, loaded with `trust_remote_code=True`, or of transformers' InternVL),
            its vision model, or the folder or Hub id of a checkpoint (with its processor), or of another model of
            transformers with a ViT of a known family, such as a LLaVA, of which only the ViT is read.
        output_dir: folder to write, created if missing. An existing backbone of this function is replaced.
        image_processor: image processor of the training. Defaults to that of the checkpoint or, for a model, to
            ImageNet mean and std at the model's image size. Required for a ViT of another family than InternViT, and
            for other bands than red, green and blue.
        allow_nan: whether weights that are NaN or infinite are written. They raise an error by default.
        start: ViT before the training, to write weights between it and the trained one.
        interpolation_alpha: share of the way of the weights from `start` (0) to the trained ViT (1), see
            [`~modeling_vitp.interpolate_vit`].

    Returns:
        `output_dir` as a path.

    Raises:
        ValueError: if `model` or the checkpoint has another model type, such as a backbone or a detector, weights are
            NaN or infinite, a model with other bands has no image processor, the folder has other files, `start` and
            the trained ViT differ in their shapes, or `interpolation_alpha` is set without `start`.
    """
    if start is None and interpolation_alpha != 1:
        raise ValueError(f"interpolation_alpha={interpolation_alpha} needs `start`, the ViT before the training.")
    vision_model, image_processor = open_trained_vision_model(model, image_processor, allow_nan)
    if start is not None:
        vision_model = interpolate_vit(start, vision_model, interpolation_alpha)
    is_internvit = isinstance(vision_model, InternVLVisionModel)
    model_type = InternVLVisionConfig.model_type if is_internvit else vision_model.config.model_type
    check_output_dir(output_dir, model_type)
    if is_internvit:
        native = InternVLVisionModel(native_vision_config(vision_model.config)).to(vision_model.dtype)
        native.load_state_dict(vision_model.state_dict())
        native.config.auto_map = AUTO_MAP
        native.save_pretrained(output_dir)
        custom_object_save(ViTPExportedBackbone, output_dir)
    else:
        tower_of(vision_model.config).save(vision_model, output_dir)
    open_like_folder(output_dir)
    save_image_processor(output_dir, vision_model.config, image_processor)
    replace_record(model, output_dir)
    return Path(output_dir)


def replace_record(model: nn.Module | str | Path, output_dir: str | Path) -> None:
    """Copy record, metrics and license of a checkpoint to its exported backbone, and remove those of another one."""
    forget_sources(Path(output_dir))
    for name in (RECORD, METRICS):
        (Path(output_dir) / name).unlink(missing_ok=True)
    if isinstance(model, (str, Path)):
        copy_record(model, output_dir)


def check_output_dir(output_dir: str | Path, model_type: str) -> None:
    """Raise a `ValueError` for a folder with files, unless it is an exported backbone of the model type."""
    folder = Path(output_dir)
    is_new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_new and not is_exported_backbone(folder, model_type):
        raise ValueError(f"{folder} exists and is not an exported backbone. Set a new output_dir.")


def is_exported_backbone(folder: Path, model_type: str) -> bool:
    """Return whether a folder has an exported backbone, and not a downloaded model, of a model type."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != model_type:
        return False
    # A downloaded model of the same type has another image processor, or lacks what an export adds.
    if model_type == InternVLVisionConfig.model_type:
        return config.get("auto_map") == AUTO_MAP
    if model_type in TAKE_PATCHES:
        return "image_size" in config
    image_processor = read_json(folder / "preprocessor_config.json")
    return image_processor.get("image_processor_type", "").startswith(("GotOcr2", "ViTP"))


def open_trained_vision_model(
    model: nn.Module | str | Path, image_processor: ViTPImageProcessor | None, allow_nan: bool
) -> tuple[PreTrainedModel, ViTPImageProcessor]:
    """Return the vision model to export and its image processor, see [`export_backbone`] for arguments and errors."""
    name = "the backbone"
    if isinstance(model, (str, Path)):
        name = str(model)
        fields = stored_fields(name)
        if vision_part(fields) is not None:
            model = open_vit(name, dtype="auto")
            if image_processor is None:
                image_processor = image_processor_of(name, pair(model.config.image_size))
        else:
            check_language_model(name, fields)
            if image_processor is None:
                image_processor = ViTPProcessor.from_pretrained(name).image_processor
            model = ViTPForConditionalGeneration.from_pretrained(name, dtype=trained_dtype(name))
    vision_model = trained_vision_model(model)
    band_names = getattr(vision_model.config, "band_names", None)
    if image_processor is None and isinstance(vision_model, InternVLVisionModel) and band_names is None:
        image_processor = ViTPImageProcessor()
    if image_processor is None:
        bands = "" if band_names is None else f" for {describe_bands(band_names)}"
        raise ValueError(
            f"The mean and standard deviation of a {vision_model.config.model_type!r}{bands} are not known. Pass "
            "image_processor, for example processor.image_processor of the training, or for bands "
            "image_processor=ViTPImageProcessor(input_spec={'band_names': [...], 'window': [...]})."
        )
    if not allow_nan:
        check_finite(vision_model.state_dict(), name)
    return vision_model, image_processor


def trained_dtype(name: str | Path) -> str:
    """Return the dtype of the fully trained weights beside a LoRA adapter, or `auto` without an adapter."""
    file = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return "auto"
    full_weights = {key: weight for key, weight in read_tensors(Path(file)).items() if "lora_" not in key}
    return main_dtype(full_weights) if full_weights else "auto"


def stored_fields(name: str) -> dict[str, Any]:
    """Return the content of a config.json, `{}` if it cannot be read, which is reported when the model is loaded."""
    try:
        return read_config_fields(name)
    except ValueError:
        return {}


def check_language_model(name: str, fields: dict[str, Any]) -> None:
    """Raise a `ValueError` with advice unless a config.json is that of a vision-language model with an InternViT."""
    model_type = fields.get("model_type")
    if model_type is None or model_type in LANGUAGE_MODELS:
        return
    advice = f"Export the model that it was trained from. {way_to_vit(name, fields)}"
    if model_type in VISION_MODELS:
        advice = "It is already a backbone: use it as it is."
    raise ValueError(f"Expected a vision-language model, got {name} of type {model_type!r}. {advice}")


def trained_vision_model(model: nn.Module) -> PreTrainedModel:
    """Return the vision model of a model; if it is wrapped by PEFT, a copy with merged adapters."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    # Checked by transformers' classes, because remote code defines its own subclasses of them.
    if isinstance(model, InternVLForConditionalGeneration):
        model = model.model
    if isinstance(model, InternVLModel):
        model = model.vision_tower
    model_type = getattr(model, "config_class", PreTrainedConfig).model_type
    if model_type not in TOWERS or model_type in MULTI_SCALE_CONFIGS:
        raise ValueError(
            f"Expected a vision-language model or a ViT, got a {type(model).__name__}. For a classifier, pass its "
            "`backbone`. For a model on a multi-scale backbone, save that with backbone.save_pretrained('FOLDER'), and "
            "pass ViTPVisionModel.from_pretrained('FOLDER')."
        )
    if any(is_wrapped_by_peft(module) for module in model.modules()):
        return without_adapters(copy.deepcopy(model))
    return model


def is_wrapped_by_peft(module: nn.Module) -> bool:
    return hasattr(module, "modules_to_save") or hasattr(module, "base_layer")


def without_adapters(module: nn.Module) -> nn.Module:
    """Remove PEFT's wrappers: merge LoRA, and keep the trained copy of fully trained modules."""
    if hasattr(module, "modules_to_save"):
        return without_adapters(module.modules_to_save[module.active_adapters[0]])
    if hasattr(module, "base_layer"):
        module.merge()
        return module.get_base_layer()
    for name, child in module.named_children():
        setattr(module, name, without_adapters(child))
    return module


def native_vision_config(config: ViTPVisionConfig) -> InternVLVisionConfig:
    """Return the configuration in transformers' own class, with `drop_path_rate` and `band_names` as extra fields."""
    fields = config.to_dict()
    for name in ("model_type", "transformers_version", "architectures", "auto_map"):
        fields.pop(name, None)
    if fields.get("band_names") is None:
        fields.pop("band_names", None)
    return InternVLVisionConfig(**fields)


def save_image_processor(output_dir: str | Path, config: PreTrainedConfig, image_processor: ViTPImageProcessor) -> None:
    """Write the image processor of a backbone, which resizes each image to one tile."""
    height, width = pair(config.image_size)
    statistics = {"image_mean": image_processor.image_mean, "image_std": image_processor.image_std}
    if config.model_type == "siglip2_vision_model":
        num_patches = math.prod(patch_grid(config))
        Siglip2ImageProcessor(
            patch_size=config.patch_size,
            max_num_patches=num_patches,
            **statistics,
        ).save_pretrained(output_dir)
        return
    if config.model_type == "qwen3_vl_vision":
        Qwen2VLImageProcessor(
            patch_size=config.patch_size,
            temporal_patch_size=config.temporal_patch_size,
            merge_size=config.spatial_merge_size,
            size={"shortest_edge": height * width, "longest_edge": height * width},  # numbers of pixels
            **statistics,
        ).save_pretrained(output_dir)
        return
    settings = image_settings(image_processor)
    settings["size"] = {"height": height, "width": width}
    settings["crop_to_patches"] = False
    processor_class = ViTPImageProcessor if settings.get("input_spec") else GotOcr2ImageProcessor
    processor_class(**settings).save_pretrained(output_dir)


def image_processor_of(vision_model: str | Path, size: Sequence[int], **settings: Any) -> ViTPImageProcessor:
    """Return the image processor of a backbone, or a new one if the backbone has none.

    Args:
        vision_model: folder or Hub id of the backbone.
        size: height and width of a tile in pixels.
        settings: settings that replace those of the backbone.
    """
    height, width = size
    settings["size"] = {"height": height, "width": width}
    model_type = open_vit_config(vision_model).model_type
    has_file = False
    for file in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME):  # the second of vision-language models
        if cached_file(vision_model, file, _raise_exceptions_for_missing_entries=False):
            has_file = True
    if has_file and model_type in VISION_MODELS:
        return ViTPImageProcessor.from_pretrained(vision_model, **settings)
    if has_file or model_type == "timm_wrapper":
        return ViTPImageProcessor.from_backbone(vision_model, **settings)
    logger.warning("%s has no image processor: mean and standard deviation of ImageNet are used.", vision_model)
    return ViTPImageProcessor(**settings)


def image_settings(image_processor: ViTPImageProcessor) -> dict:
    """Return the settings of an image processor that another class accepts."""
    settings = image_processor.to_dict()
    setting_names = ViTPImageProcessor.valid_kwargs.__annotations__
    return {name: settings[name] for name in setting_names if name in settings}
