"""The backbone, out of the model it was trained in: a folder that plain transformers opens."""

from pathlib import Path

from transformers import GotOcr2ImageProcessor, InternVLVisionConfig, InternVLVisionModel
from transformers.dynamic_module_utils import custom_object_save

from .configuration_vitp import ViTPVisionConfig
from .image_processing_vitp import ViTPImageProcessor
from .modeling_vitp import ViTPForConditionalGeneration, ViTPModel, ViTPVisionModel
from .processing_vitp import ViTPProcessor

AUTO_MAP = {"AutoConfig": "configuration_vitp.ViTPVisionConfig", "AutoModel": "modeling_vitp.ViTPVisionModel"}


def export_backbone(
    model: ViTPForConditionalGeneration | ViTPModel | ViTPVisionModel | str | Path,
    output_dir: str | Path,
    image_processor: ViTPImageProcessor | None = None,
) -> Path:
    """Writes the vision tower and its image processor to a folder of their own.

    The folder says `model_type: internvl_vision`, so `AutoModel.from_pretrained(output_dir)` opens it as transformers'
    own `InternVLVisionModel`, with no remote code and without this package; with `trust_remote_code=True`, or through
    `ViTPVisionModel.from_pretrained`, it opens as [`ViTPVisionModel`]. Features are the same to the bit. The image
    processor resizes an image to one tile and does not cut it, so that feature extraction gives one row an image.

    An image processor with an input spec is saved as [`ViTPImageProcessor`] with its code, since transformers' own
    would ignore the spec and misread the images without a word; `AutoImageProcessor` then asks for
    `trust_remote_code=True`, unless this package is imported.

    Args:
        model: the trained model, its vision model, or the folder or Hub id of a checkpoint (with its processor).
        output_dir: created if missing.
        image_processor: the one of training; that of the checkpoint if `model` is one. ImageNet mean and std at the
            model's image size if there is none.

    Returns:
        `output_dir` as a path.
    """
    if isinstance(model, (str, Path)):
        if image_processor is None:
            image_processor = ViTPProcessor.from_pretrained(model).image_processor
        model = ViTPForConditionalGeneration.from_pretrained(model)
    vision_model = next(module for module in model.modules() if isinstance(module, ViTPVisionModel))

    native = InternVLVisionModel(native_vision_config(vision_model.config)).to(vision_model.dtype)
    native.load_state_dict(vision_model.state_dict())
    native.config.auto_map = AUTO_MAP
    native.save_pretrained(output_dir)
    save_code_and_image_processor(output_dir, vision_model.config, image_processor or ViTPImageProcessor())
    return Path(output_dir)


def native_vision_config(config: ViTPVisionConfig) -> InternVLVisionConfig:
    """The same configuration as transformers' own class; `drop_path_rate` stays as a field that it carries along."""
    fields = config.to_dict()
    for name in ("model_type", "transformers_version", "architectures", "auto_map"):
        fields.pop(name, None)
    return InternVLVisionConfig(**fields)


def save_code_and_image_processor(
    output_dir: str | Path, config: ViTPVisionConfig, image_processor: ViTPImageProcessor
) -> None:
    """What a backbone's folder has beside its weights and configuration."""
    custom_object_save(ViTPVisionModel, output_dir)
    height, width = config.image_size
    settings = image_settings(image_processor) | {"size": {"height": height, "width": width}, "crop_to_patches": False}
    processor_class = ViTPImageProcessor if settings.get("input_spec") else GotOcr2ImageProcessor
    processor_class(**settings).save_pretrained(output_dir)


def image_settings(image_processor: ViTPImageProcessor) -> dict:
    """The settings of an image processor, for another class to take."""
    settings = image_processor.to_dict()
    return {name: settings[name] for name in ViTPImageProcessor.valid_kwargs.__annotations__ if name in settings}
