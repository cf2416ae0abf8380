"""ViTP: visual instruction pretraining of a vision transformer inside a vision-language model (arXiv 2509.17562)."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_vitp import ViTPConfig, ViTPVisionConfig
from .image_processing_vitp import InputSpec, ViTPImageProcessor
from .modeling_vitp import ViTPForConditionalGeneration, ViTPModel, ViTPVisionModel
from .processing_vitp import ViTPProcessor

AutoConfig.register("vitp_vision", ViTPVisionConfig)
AutoConfig.register("vitp", ViTPConfig)
AutoModel.register(ViTPVisionConfig, ViTPVisionModel)
AutoModel.register(ViTPConfig, ViTPModel)
AutoModelForImageTextToText.register(ViTPConfig, ViTPForConditionalGeneration)
for config_class in (ViTPConfig, ViTPVisionConfig):
    AutoImageProcessor.register(config_class, image_processor_classes={"torchvision": ViTPImageProcessor})
AutoProcessor.register(ViTPConfig, ViTPProcessor)
