"""The model that fine-tuning starts from."""

from transformers import PreTrainedModel

from ..image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ..training.backbone_start import load_on_backbone
from .arguments import DenseModelArguments


def load_dense_model(
    model_class: type[PreTrainedModel],
    args: DenseModelArguments,
    names: list[str],
    class_weights: list[float] | None = None,
    input_spec: dict | None = None,
) -> PreTrainedModel:
    """See [`~modeling_vitp.training.backbone_start.load_on_backbone`]; `class_weights` are those of the loss."""
    model = load_on_backbone(model_class, args, names, input_spec=input_spec, class_weights=class_weights)
    if "class_weights" not in (args.head or {}):
        model.config.class_weights = class_weights
    return model


def load_image_processor(args: DenseModelArguments, input_spec: dict | None) -> ViTPSegmentationImageProcessor:
    """With the backbone's mean and standard deviation, and the input spec of the data."""
    if args.model_name_or_path is None:
        return ViTPSegmentationImageProcessor(input_spec=input_spec)
    return ViTPSegmentationImageProcessor.from_backbone(
        args.model_name_or_path, revision=args.model_revision, input_spec=input_spec
    )
