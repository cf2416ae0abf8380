"""Public model classes, and their registration with transformers' Auto classes.

A new model type is one [`register_model`] call, see `registry.py`.
"""

from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor

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
from ..modeling_vitp_backbone import ViTPBackbone, resize_backbone
from ..modeling_vitp_classification import ViTPForImageClassification
from ..modeling_vitp_dense import ViTPForChangeDetection, ViTPForSemanticSegmentation
from ..modeling_vitp_detection import (
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
)
from ..modeling_vitp_multi_scale import ViTPFeaturePyramid
from ..processing_vitp import ViTPProcessor
from ..vision_towers import VisionTower, other_families, register_tower
from .registry import ModelEntry, register_model

# Code of the model cards. `yours` marks the lines that readers replace.
BACKBONE_EXAMPLE = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

backbone = AutoModel.from_pretrained("{repo}"{trust})
image_processor = AutoImageProcessor.from_pretrained("{repo}"{trust_processor})

image = Image.new("RGB", (640, 480))  # yours
inputs = image_processor(image, return_tensors="pt")
features = backbone(**inputs).last_hidden_state  # (1, 1 + patches, width), the CLS token first
"""
TIMM_EXAMPLE = """
import timm
from PIL import Image

model = timm.create_model("{source}:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

image = Image.new("RGB", (640, 480))  # yours
features = model(transform(image)[None])  # (1, width), the mean of the patch tokens
"""
VIT_EXAMPLE = BACKBONE_EXAMPLE.replace(
    "(1, 1 + patches, width), the CLS token first", "(1, tokens, width), the patches last"
)
MAE_EXAMPLE = BACKBONE_EXAMPLE[: BACKBONE_EXAMPLE.index("features =")] + (
    """outputs = backbone(**inputs)
order = outputs.ids_restore[..., None]  # the model shuffles the patches
features = outputs.last_hidden_state[:, 1:].take_along_dim(order, 1)  # (1, patches, width)
"""
)
QWEN3_VL_EXAMPLE = BACKBONE_EXAMPLE[: BACKBONE_EXAMPLE.index("features =")] + (
    """outputs = backbone(inputs["pixel_values"], inputs["image_grid_thw"])
_, rows, columns = inputs["image_grid_thw"][0].tolist()
blocks = outputs.last_hidden_state.unflatten(0, (rows // 2, columns // 2, 2, 2))  # of two by two patches
features = blocks.transpose(1, 2).reshape(1, rows * columns, -1)  # (1, patches, width)
"""
)
MAPS_EXAMPLE = """
import torch
from transformers import AutoBackbone

backbone = AutoBackbone.from_pretrained("{repo}", trust_remote_code=True)
maps = backbone(torch.zeros(1, 3, 224, 224)).feature_maps
"""
CONVERSATION = """
image = Image.new("RGB", (640, 480))  # yours
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "How many ships are there?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
tokens = model.generate(**inputs, max_new_tokens=50)
answer = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
"""
ANSWER_EXAMPLE = (
    """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo}"{trust})
processor = AutoProcessor.from_pretrained("{repo}"{trust})
"""
    + CONVERSATION
)
LORA_EXAMPLE = (
    """
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{repo}")
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)
"""
    + CONVERSATION
)
CLASSIFICATION_EXAMPLE = """
from PIL import Image
from transformers import pipeline

classifier = pipeline("image-classification", model="{repo}", trust_remote_code=True)

image = Image.new("RGB", (640, 480))  # yours
found = classifier(image)  # labels with their scores, the highest first
"""
TASK_EXAMPLE = """
from PIL import Image
from transformers import AutoImageProcessor, AUTO_CLASS

model = AUTO_CLASS.from_pretrained("{repo}"{trust})
image_processor = AutoImageProcessor.from_pretrained("{repo}"{trust})

image = Image.new("RGB", (640, 480))  # yours
outputs = model(**image_processor(image, return_tensors="pt"))
"""
CHANGE_EXAMPLE = """
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("{repo}", trust_remote_code=True)

before, after = Image.new("RGB", (640, 480)), Image.new("RGB", (640, 480))  # yours
outputs = model(**image_processor(before, images_after=after, return_tensors="pt"))
changes = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[(480, 640)])[0]
"""


def task_example(auto_class: str, last_line: str) -> str:
    """Return code that runs a model of a task on one image; `last_line` turns its outputs into results."""
    return TASK_EXAMPLE.replace("AUTO_CLASS", auto_class) + last_line + "\n"


BOXES_EXAMPLE = task_example(
    "AutoModelForObjectDetection",
    "found = image_processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(480, 640)])[0]",
)
DENSE = {
    "image_processor_class": ViTPSegmentationImageProcessor,
    "pipeline_tag": "image-segmentation",
    "layout": "segmentation",
    "original_layout": "original_segmentation",
    "graph_outputs": ("logits",),
}
DETECTION = {
    "auto_class": "AutoModelForObjectDetection",
    "image_processor_class": ViTPDetectionImageProcessor,
    "pipeline_tag": "object-detection",
    "layout": "detection",
    "original_layout": "original_cascade",
    "task": "detection",
    "headline_metrics": {"map": "mAP", "map_50": "mAP@50", "map_75": "mAP@75"},
}
INSTANCES = {
    **DETECTION,
    "headline_metrics": {
        "mask_map": "Mask mAP",
        "mask_map_50": "Mask mAP@50",
        "box_map": "Box mAP",
        "box_map_50": "Box mAP@50",
    },
}
PRETRAINED = {
    "loss": "Loss",
    "probe/linear/patch_auc": "AUROC of a linear probe",
    "probe/nonlinear/patch_auc": "AUROC of a nonlinear probe",
    "probe/linear/accuracy": "Accuracy of a linear probe",
    "answers/count/mean_error": "Mean error of numbers",
    "answers/map/mean_iou": "Mean IoU of maps",
    "answers/grounding/mean_iou": "Mean IoU of boxes",
}
# Their code fixes the size of the image, or the number of patches, when it is traced.
WITHOUT_GRAPH = ("dinov2_with_registers", "siglip2_vision_model", "qwen3_vl_vision", "vit_mae")
EXAMPLES = {"vit_mae": MAE_EXAMPLE, "qwen3_vl_vision": QWEN3_VL_EXAMPLE}

register_model(
    ModelEntry(
        model_type="vitp",
        auto_class="AutoModelForImageTextToText",
        pipeline_tag="image-text-to-text",
        example=ANSWER_EXAMPLE,
        model_class=ViTPForConditionalGeneration,
        image_processor_class=ViTPImageProcessor,
        description="A vision-language model trained end to end with {paper} to pretrain its vision transformer.",
        layout="vitp",
        original_layout="original",
        headline_metrics=PRETRAINED,
    ),
)
register_model(
    ModelEntry(
        model_type="internvl",
        auto_class="AutoModelForImageTextToText",
        pipeline_tag="image-text-to-text",
        example=ANSWER_EXAMPLE,
        description="A vision-language model trained end to end with {paper}, in transformers' InternVL layout.",
        layout="internvl",
        headline_metrics=PRETRAINED,
    ),
)
register_model(
    ModelEntry(
        model_type="adapter",
        auto_class="AutoModelForImageTextToText",
        pipeline_tag="image-text-to-text",
        example=LORA_EXAMPLE,
        description="A LoRA adapter, with fully trained vision transformer and projector, trained with {paper}.",
        library_name="peft",
        push_as="adapter",
        headline_metrics=PRETRAINED,
    ),
)
register_model(
    ModelEntry(
        model_type="vitp_vision",
        auto_class="AutoModel",
        pipeline_tag="image-feature-extraction",
        example=BACKBONE_EXAMPLE,
        model_class=ViTPVisionModel,
        image_processor_class=ViTPImageProcessor,
        push_as=None,
        layout="backbone",
        original_layout="original_vision",
        graph_outputs=("last_hidden_state", "pooler_output"),
    ),
)
register_model(
    ModelEntry(
        model_type="internvl_vision",
        auto_class="AutoModel",
        pipeline_tag="image-feature-extraction",
        example=BACKBONE_EXAMPLE,
        description="A vision transformer as an image backbone, pretrained with {paper}.",
        push_as="backbone",
        layout="backbone",
        headline_metrics=PRETRAINED,
    ),
)
register_model(
    ModelEntry(
        model_type="timm_wrapper",
        auto_class="AutoModel",
        pipeline_tag="image-feature-extraction",
        example=TIMM_EXAMPLE,
        description="A vision transformer as an image backbone for timm, pretrained with {paper}.",
        library_name="timm",
        push_as="backbone",
        graph_outputs=("last_hidden_state",),
        headline_metrics=PRETRAINED,
    ),
)
for _model_type in other_families():
    if _model_type == "timm_wrapper":  # above
        continue
    register_model(
        ModelEntry(
            model_type=_model_type,
            auto_class="AutoModel",
            pipeline_tag="image-feature-extraction",
            example=EXAMPLES.get(_model_type, VIT_EXAMPLE),
            description="A vision transformer as an image backbone, trained further with {paper}.",
            push_as="backbone",
            graph_outputs=() if _model_type in WITHOUT_GRAPH else ("last_hidden_state",),
            headline_metrics=PRETRAINED,
        )
    )
register_model(
    ModelEntry(
        model_type="vitp_backbone",
        auto_class="AutoBackbone",
        pipeline_tag="image-feature-extraction",
        example=MAPS_EXAMPLE,
        model_class=ViTPBackbone,
    ),
)
register_model(
    ModelEntry(
        model_type="vitp_feature_pyramid",
        auto_class="AutoBackbone",
        pipeline_tag="image-feature-extraction",
        example=MAPS_EXAMPLE,
        model_class=ViTPFeaturePyramid,
    ),
)
register_model(
    ModelEntry(
        model_type="vitp_adapter",
        auto_class="AutoBackbone",
        pipeline_tag="image-feature-extraction",
        example=MAPS_EXAMPLE,
        model_class=ViTPAdapter,
        layout="adapter",
        original_layout="original_adapter",
    ),
)
register_model(
    ModelEntry(
        model_type="vitp_image_classification",
        auto_class="AutoModelForImageClassification",
        pipeline_tag="image-classification",
        example=CLASSIFICATION_EXAMPLE,
        model_class=ViTPForImageClassification,
        image_processor_class=ViTPImageProcessor,
        description="An image classifier on a backbone of {paper}.",
        task="classification",
        headline_metrics={
            "accuracy": "Accuracy",
            "macro_f1": "Macro F1",
            "auroc": "AUROC",
            "mean_average_precision": "mAP",
        },
        graph_outputs=("logits",),
    ),
)
register_model(
    ModelEntry(
        model_type="vitp_segmentation",
        task="segmentation",
        auto_class="AutoModelForSemanticSegmentation",
        example=task_example(
            "AutoModelForSemanticSegmentation",
            "classes = image_processor.post_process_semantic_segmentation(outputs, target_sizes=[(480, 640)])[0]",
        ),
        model_class=ViTPForSemanticSegmentation,
        description="A semantic segmentation model on a backbone of {paper}.",
        metric="mean_iou",
        headline_metrics={
            "mean_iou": "Mean IoU",
            "mean_accuracy": "Mean accuracy",
            "overall_accuracy": "Accuracy",
            "mean_dice_foreground": "Mean Dice",
            "mean_surface_dice": "Mean surface Dice",
            "mean_hausdorff_95": "95 % Hausdorff distance in mm",
        },
        **DENSE,
    ),
)
register_model(
    ModelEntry(
        model_type="vitp_change_detection",
        task="change_detection",
        auto_class="AutoModel",
        example=CHANGE_EXAMPLE,
        model_class=ViTPForChangeDetection,
        description="A change detection model, for pairs of images, on a backbone of {paper}.",
        metric="change_detection",
        headline_metrics={
            "f1": "F1",
            "precision": "Precision",
            "recall": "Recall",
            "iou": "IoU",
            "mean_iou": "Mean IoU",
        },
        **DENSE,
    ),
)
register_model(
    ModelEntry(
        model_type="vitp_object_detection",
        example=BOXES_EXAMPLE,
        model_class=ViTPForObjectDetection,
        description="An object detector on a backbone of {paper}.",
        graph_outputs=("scores", "labels", "pred_boxes"),
        **DETECTION,
    ),
)
register_model(
    ModelEntry(
        model_type="vitp_oriented_object_detection",
        example=task_example(
            "AutoModelForObjectDetection",
            "found = image_processor.post_process_oriented_object_detection(outputs, target_sizes=[(480, 640)])[0]",
        ),
        model_class=ViTPForOrientedObjectDetection,
        description="A detector with oriented boxes on a backbone of {paper}.",
        graph_outputs=("scores", "boxes"),
        **DETECTION,
    ),
)
register_model(
    ModelEntry(
        model_type="vitp_instance_segmentation",
        example=task_example(
            "AutoModelForObjectDetection",
            "found = image_processor.post_process_instance_segmentation(outputs, target_sizes=[(480, 640)])[0]",
        ),
        model_class=ViTPForInstanceSegmentation,
        description="An instance segmentation model on a backbone of {paper}.",
        graph_outputs=("scores", "labels", "pred_boxes", "pred_masks"),
        **INSTANCES,
    ),
)
for _model_type in ("rt_detr_v2", "d_fine", "deformable_detr"):
    register_model(
        ModelEntry(
            model_type=_model_type,
            auto_class="AutoModelForObjectDetection",
            pipeline_tag="object-detection",
            example="\nimport modeling_vitp  # the backbone, which transformers does not load from a repo: "
            "pip install modeling-vitp" + BOXES_EXAMPLE.replace("{trust}", ""),
            description="An object detector of transformers on a backbone of {paper}.",
            task="detection",
            headline_metrics=DETECTION["headline_metrics"],
        )
    )

# The model without its LM head, another Auto class of the whole model, and the processor.
AutoModel.register(ViTPConfig, ViTPModel)
AutoModelForMultimodalLM.register(ViTPConfig, ViTPForConditionalGeneration)
AutoProcessor.register(ViTPConfig, ViTPProcessor)
ViTPModel.register_for_auto_class("AutoModel")
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
    "VisionTower",
    "register_tower",
    "resize_backbone",
    "spread_bands",
]
