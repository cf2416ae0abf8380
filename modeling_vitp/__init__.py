"""ViTP: visual instruction pretraining of a vision transformer inside a vision-language model (arXiv 2509.17562)."""

import importlib

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_vitp import ViTPConfig, ViTPVisionConfig
from .configuration_vitp_dense import (
    ViTPAdapterConfig,
    ViTPBackboneConfig,
    ViTPChangeDetectionConfig,
    ViTPFeaturePyramidConfig,
    ViTPSegmentationConfig,
)
from .convert.export import export_backbone
from .image_processing_vitp import InputSpec, ViTPImageProcessor
from .image_processing_vitp_dense import ViTPSegmentationImageProcessor
from .modeling_vitp import ViTPForConditionalGeneration, ViTPModel, ViTPVisionModel
from .modeling_vitp_adapter import ViTPAdapter
from .modeling_vitp_backbone import ViTPBackbone
from .modeling_vitp_dense import ViTPForChangeDetection, ViTPForSemanticSegmentation
from .modeling_vitp_feature_pyramid import ViTPFeaturePyramid
from .processing_vitp import ViTPProcessor
from .resize import resize_backbone

AutoConfig.register("vitp_vision", ViTPVisionConfig)
AutoConfig.register("vitp", ViTPConfig)
AutoModel.register(ViTPVisionConfig, ViTPVisionModel)
AutoModel.register(ViTPConfig, ViTPModel)
AutoModelForImageTextToText.register(ViTPConfig, ViTPForConditionalGeneration)
for _config in (ViTPConfig, ViTPVisionConfig):
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": ViTPImageProcessor})
AutoProcessor.register(ViTPConfig, ViTPProcessor)
for _config in (
    ViTPBackboneConfig,
    ViTPAdapterConfig,
    ViTPFeaturePyramidConfig,
    ViTPSegmentationConfig,
    ViTPChangeDetectionConfig,
):
    AutoConfig.register(_config.model_type, _config)
    _config.register_for_auto_class()
AutoBackbone.register(ViTPBackboneConfig, ViTPBackbone)
AutoBackbone.register(ViTPAdapterConfig, ViTPAdapter)
AutoBackbone.register(ViTPFeaturePyramidConfig, ViTPFeaturePyramid)
AutoModelForSemanticSegmentation.register(ViTPSegmentationConfig, ViTPForSemanticSegmentation)
AutoModel.register(ViTPChangeDetectionConfig, ViTPForChangeDetection)
for _config in (ViTPSegmentationConfig, ViTPChangeDetectionConfig):
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": ViTPSegmentationImageProcessor})
# Where the image-segmentation pipeline looks for what it supports; what is registered above it does not see.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[ViTPSegmentationConfig.model_type] = ViTPForSemanticSegmentation.__name__

# Saving writes the code beside the weights, so that `trust_remote_code=True` loads them without this package.
ViTPConfig.register_for_auto_class()
ViTPVisionConfig.register_for_auto_class()
ViTPVisionModel.register_for_auto_class("AutoModel")
ViTPModel.register_for_auto_class("AutoModel")
ViTPForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
ViTPBackbone.register_for_auto_class("AutoBackbone")
ViTPAdapter.register_for_auto_class("AutoBackbone")
ViTPFeaturePyramid.register_for_auto_class("AutoBackbone")
ViTPForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
ViTPForChangeDetection.register_for_auto_class("AutoModel")
ViTPImageProcessor.register_for_auto_class("AutoImageProcessor")
ViTPSegmentationImageProcessor.register_for_auto_class("AutoImageProcessor")
ViTPProcessor.register_for_auto_class("AutoProcessor")

# Imported when asked for. All but the conversion need the `recipes` extra (TRL, datasets, rasterio).
_LAZY = {
    "ViTPDataCollator": "instructions.collator",
    "ViTPTrainer": "training.pretraining",
    "ViTPTrainingConfig": "training.pretraining",
    "convert_checkpoint": "convert.checkpoint",
    "predict_large": "dense.large_images",
}

__all__ = [
    "InputSpec",
    "ViTPAdapter",
    "ViTPAdapterConfig",
    "ViTPBackbone",
    "ViTPBackboneConfig",
    "ViTPChangeDetectionConfig",
    "ViTPConfig",
    "ViTPFeaturePyramid",
    "ViTPFeaturePyramidConfig",
    "ViTPForChangeDetection",
    "ViTPForConditionalGeneration",
    "ViTPForSemanticSegmentation",
    "ViTPImageProcessor",
    "ViTPModel",
    "ViTPProcessor",
    "ViTPSegmentationConfig",
    "ViTPSegmentationImageProcessor",
    "ViTPVisionConfig",
    "ViTPVisionModel",
    "export_backbone",
    "resize_backbone",
    *_LAZY,
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs {error.name}: install the extra with pip install 'modeling-vitp[recipes]'."
        ) from error
