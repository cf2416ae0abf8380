"""Registry of model types, where each is declared once.

Conversion, model cards, the Hub, the robustness evaluation and the Space look a model type up in `MODELS`.
[`register_model`] adds one, also from outside this package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoVideoProcessor, BaseImageProcessor, PreTrainedModel
from transformers.models.auto import modeling_auto

# Tables of the models that transformers' pipelines support.
PIPELINE_TABLES = {
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForSemanticSegmentation": modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    "AutoModelForObjectDetection": modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
}


@dataclass(frozen=True)
class ModelEntry:
    """Declaration of a model type.

    Args:
        model_type: value in `config.json`; `"adapter"` for a LoRA adapter.
        auto_class: name of the Auto class that loads the model.
        pipeline_tag: pipeline tag on the Hub.
        example: Python code of the model card. `{repo}` is the Hub id, `{source}` timm's prefix of it.
        model_class: model class of this package; `None` for transformers' own models.
        image_processor_class: image processor of this package; `None` for transformers' own models and for backbones.
        description: first sentence of the model card. `{paper}` is a link to ViTP.
        library_name: library on the Hub that loads the model.
        push_as: value of `vitp push_to_hub --what`; `None` if the model is exported before it is pushed.
        layout: layout of the tensor names, see `convert/keys.py`; `None` without conversion.
        original_layout: layout in the original code; `None` if the original code has no such model.
        task: name in `TASKS` of the downstream task that the model is fine-tuned for; `None` for other models.
        metric: default metric of that task.
        headline_metrics: titles of the metrics that cards and the end of a run show, by their names in `metrics.json`
            without the split. If a run has none of them, its metrics without a `/` in their names are shown.
        graph_outputs: names of the outputs of `vitp export_onnx`; empty if the model cannot be exported.
    """

    model_type: str
    auto_class: str
    pipeline_tag: str
    example: str
    model_class: type[PreTrainedModel] | None = None
    image_processor_class: type[BaseImageProcessor] | None = None
    description: str | None = None
    library_name: str = "transformers"
    push_as: str | None = "model"
    layout: str | None = None
    original_layout: str | None = None
    task: str | None = None
    metric: str | None = None
    headline_metrics: Mapping[str, str] = field(default_factory=dict)
    graph_outputs: tuple[str, ...] = ()


MODELS: dict[str, ModelEntry] = {}


def register_model(entry: ModelEntry) -> None:
    """Add a model type to `MODELS` and register its classes with transformers' Auto classes and pipelines."""
    MODELS[entry.model_type] = entry
    if entry.model_class is None:
        return
    config_class = entry.model_class.config_class
    AutoConfig.register(entry.model_type, config_class)
    getattr(transformers, entry.auto_class).register(config_class, entry.model_class)
    # Makes `save_pretrained` write the code beside the weights, for `trust_remote_code=True`.
    config_class.register_for_auto_class()
    entry.model_class.register_for_auto_class(entry.auto_class)
    if entry.image_processor_class is not None:
        AutoImageProcessor.register(config_class, image_processor_classes={"torchvision": entry.image_processor_class})
        entry.image_processor_class.register_for_auto_class("AutoImageProcessor")
        # Without an entry here, a pipeline looks for a video processor and asks whether to run the repo's code.
        AutoVideoProcessor.register(config_class, video_processor_classes={})
    if entry.auto_class in PIPELINE_TABLES:
        PIPELINE_TABLES[entry.auto_class][entry.model_type] = entry.model_class.__name__


def find_model(model_type: str | None) -> ModelEntry:
    """Return the declaration of a model type.

    Raises:
        ValueError: if the model type is not registered.
    """
    if model_type not in MODELS:
        raise ValueError(f"Unknown model_type {model_type!r}. Registered: {', '.join(sorted(MODELS))}.")
    return MODELS[model_type]
