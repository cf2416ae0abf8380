"""The model that fine-tuning starts from."""

from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_vitp import ViTPVisionConfig
from ..convert.finite import check_finite
from ..image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ..modeling_vitp import ViTPVisionModel
from .arguments import DenseModelArguments


def load_dense_model(
    model_class: type[PreTrainedModel],
    args: DenseModelArguments,
    names: list[str],
    class_weights: list[float] | None = None,
) -> PreTrainedModel:
    """The model, in float32, with a fresh head unless it is one that was fine-tuned.

    Raises:
        ValueError: if not exactly one start is given, or a fine-tuned model has other classes.
    """
    if (args.model_name_or_path is None) == (args.from_scratch is None):
        raise ValueError(
            "Give either model_name_or_path, a pretrained backbone, or from_scratch, with --model_name_or_path '' if "
            "the configuration names a backbone."
        )
    id2label = dict(enumerate(names))
    revision = {"revision": args.model_revision}
    if args.from_scratch is not None:
        start, more = ViTPVisionModel(ViTPVisionConfig(**args.from_scratch)), {}
    else:
        start, more = args.model_name_or_path, revision
        model_type = PreTrainedConfig.get_config_dict(start, **revision)[0].get("model_type")
        if model_type == model_class.config_class.model_type:
            model = model_class.from_pretrained(start, **revision)
            if model.config.id2label != id2label:
                raise ValueError(f"{start} has the classes {list(model.config.id2label.values())}, not {names}.")
            check_finite(model.state_dict(), start)
            model.config.class_weights = class_weights
            return model
    backbone = {"drop_path_rate": args.drop_path_rate, **(args.backbone or {}), **more}
    head = {"class_weights": class_weights, **(args.head or {})}
    model = model_class.from_backbone(start, args.neck, id2label=id2label, backbone_kwargs=backbone, **head)
    check_finite(model.state_dict(), args.model_name_or_path or "from_scratch")
    return model


def load_image_processor(args: DenseModelArguments, input_spec: dict | None) -> ViTPSegmentationImageProcessor:
    """With the backbone's mean and standard deviation, and the input spec of the data."""
    if args.model_name_or_path is None:
        return ViTPSegmentationImageProcessor(input_spec=input_spec)
    return ViTPSegmentationImageProcessor.from_backbone(
        args.model_name_or_path, revision=args.model_revision, input_spec=input_spec
    )
