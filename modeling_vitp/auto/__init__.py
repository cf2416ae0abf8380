"""The models under their public names, made known to transformers' Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from ..bands import spread_bands
from ..configuration_vitp import ViTPConfig, ViTPVisionConfig
from ..configuration_vitp_classification import ViTPImageClassificationConfig
from ..configuration_vitp_dense import (
    ViTPAdapterConfig,
    ViTPBackboneConfig,
    ViTPChangeDetectionConfig,
    ViTPFeaturePyramidConfig,
    ViTPSegmentationConfig,
)
from ..configuration_vitp_detection import (
    ViTPInstanceSegmentationConfig,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
)
from ..image_processing_vitp import ViTPImageProcessor
from ..image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ..image_processing_vitp_detection import ViTPDetectionImageProcessor
from ..input_spec import InputSpec
from ..modeling_vitp import ViTPForConditionalGeneration, ViTPModel, ViTPVisionModel
from ..modeling_vitp_adapter import ViTPAdapter
from ..modeling_vitp_backbone import ViTPBackbone
from ..modeling_vitp_classification import ViTPForImageClassification
from ..modeling_vitp_dense import ViTPForChangeDetection, ViTPForSemanticSegmentation
from ..modeling_vitp_detection import (
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
)
from ..modeling_vitp_multi_scale import ViTPFeaturePyramid
from ..processing_vitp import ViTPProcessor
from ..resize import resize_backbone

AutoConfig.register("vitp_vision", ViTPVisionConfig)
AutoConfig.register("vitp", ViTPConfig)
AutoModel.register(ViTPVisionConfig, ViTPVisionModel)
AutoModel.register(ViTPConfig, ViTPModel)
AutoModelForImageTextToText.register(ViTPConfig, ViTPForConditionalGeneration)
AutoModelForMultimodalLM.register(ViTPConfig, ViTPForConditionalGeneration)
for _config in (ViTPConfig, ViTPVisionConfig):
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": ViTPImageProcessor})
AutoProcessor.register(ViTPConfig, ViTPProcessor)
for _config in (
    ViTPBackboneConfig,
    ViTPAdapterConfig,
    ViTPFeaturePyramidConfig,
    ViTPImageClassificationConfig,
    ViTPSegmentationConfig,
    ViTPChangeDetectionConfig,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
    ViTPInstanceSegmentationConfig,
):
    AutoConfig.register(_config.model_type, _config)
    _config.register_for_auto_class()
AutoBackbone.register(ViTPBackboneConfig, ViTPBackbone)
AutoBackbone.register(ViTPAdapterConfig, ViTPAdapter)
AutoBackbone.register(ViTPFeaturePyramidConfig, ViTPFeaturePyramid)
AutoImageProcessor.register(ViTPImageClassificationConfig, image_processor_classes={"torchvision": ViTPImageProcessor})
AutoModelForImageClassification.register(ViTPImageClassificationConfig, ViTPForImageClassification)
AutoModelForSemanticSegmentation.register(ViTPSegmentationConfig, ViTPForSemanticSegmentation)
AutoModel.register(ViTPChangeDetectionConfig, ViTPForChangeDetection)
for _config in (ViTPSegmentationConfig, ViTPChangeDetectionConfig):
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": ViTPSegmentationImageProcessor})
# Where pipelines look for what they support; what is registered above they do not see.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[ViTPImageClassificationConfig.model_type] = (
    ViTPForImageClassification.__name__
)
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[ViTPSegmentationConfig.model_type] = ViTPForSemanticSegmentation.__name__
for _detector in (ViTPForObjectDetection, ViTPForOrientedObjectDetection, ViTPForInstanceSegmentation):
    AutoImageProcessor.register(
        _detector.config_class, image_processor_classes={"torchvision": ViTPDetectionImageProcessor}
    )
    AutoModelForObjectDetection.register(_detector.config_class, _detector)
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[_detector.config_class.model_type] = _detector.__name__
    _detector.register_for_auto_class("AutoModelForObjectDetection")
# A pipeline looks for a video processor too, and asks whether to run the repository's code unless it knows of none.
for _config in (
    ViTPConfig,
    ViTPVisionConfig,
    ViTPImageClassificationConfig,
    ViTPSegmentationConfig,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
    ViTPInstanceSegmentationConfig,
):
    AutoVideoProcessor.register(_config, video_processor_classes={})

# Saving writes the code beside the weights, so that `trust_remote_code=True` loads them without this package.
ViTPConfig.register_for_auto_class()
ViTPVisionConfig.register_for_auto_class()
ViTPVisionModel.register_for_auto_class("AutoModel")
ViTPModel.register_for_auto_class("AutoModel")
ViTPForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
ViTPBackbone.register_for_auto_class("AutoBackbone")
ViTPAdapter.register_for_auto_class("AutoBackbone")
ViTPFeaturePyramid.register_for_auto_class("AutoBackbone")
ViTPForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTPForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
ViTPForChangeDetection.register_for_auto_class("AutoModel")
ViTPImageProcessor.register_for_auto_class("AutoImageProcessor")
ViTPSegmentationImageProcessor.register_for_auto_class("AutoImageProcessor")
ViTPDetectionImageProcessor.register_for_auto_class("AutoImageProcessor")
ViTPProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "InputSpec",
    "ViTPAdapter",
    "ViTPAdapterConfig",
    "ViTPBackbone",
    "ViTPBackboneConfig",
    "ViTPChangeDetectionConfig",
    "ViTPConfig",
    "ViTPDetectionImageProcessor",
    "ViTPFeaturePyramid",
    "ViTPFeaturePyramidConfig",
    "ViTPForChangeDetection",
    "ViTPForConditionalGeneration",
    "ViTPForImageClassification",
    "ViTPForInstanceSegmentation",
    "ViTPForObjectDetection",
    "ViTPForOrientedObjectDetection",
    "ViTPForSemanticSegmentation",
    "ViTPImageClassificationConfig",
    "ViTPImageProcessor",
    "ViTPInstanceSegmentationConfig",
    "ViTPModel",
    "ViTPObjectDetectionConfig",
    "ViTPOrientedObjectDetectionConfig",
    "ViTPProcessor",
    "ViTPSegmentationConfig",
    "ViTPSegmentationImageProcessor",
    "ViTPVisionConfig",
    "ViTPVisionModel",
    "resize_backbone",
    "spread_bands",
]
