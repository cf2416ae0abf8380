"""The classifier that fine-tuning starts from, and its image processor."""

from transformers import PreTrainedConfig

from ..configuration_vitp_classification import ViTPImageClassificationConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp_classification import ViTPForImageClassification
from ..training.backbone_start import load_on_backbone
from .arguments import ClassificationModelArguments

KINDS = {False: "single_label_classification", True: "multi_label_classification"}


def classes_of(args: ClassificationModelArguments) -> list[str] | None:
    """The names of the classes of the fine-tuned model that is given; `None` where it is none."""
    if args.model_name_or_path is None:
        return None
    settings = PreTrainedConfig.get_config_dict(args.model_name_or_path, revision=args.model_revision)[0]
    if settings.get("model_type") != ViTPImageClassificationConfig.model_type:
        return None
    return list(ViTPImageClassificationConfig.from_dict(settings).id2label.values())


def load_classifier(
    args: ClassificationModelArguments,
    names: list[str],
    multi_label: bool,
    image_size: int,
    input_spec: dict | None = None,
) -> ViTPForImageClassification:
    """See [`~modeling_vitp.training.backbone_start.load_on_backbone`]; positions are resampled to the image size.

    Raises:
        ValueError: as there, and if a fine-tuned model is of the other kind, of one label or several.
    """
    kind = KINDS[multi_label]
    settings = {"image_size": image_size, "problem_type": kind}
    model = load_on_backbone(ViTPForImageClassification, args, names, input_spec=input_spec, **settings)
    if model.config.problem_type != kind:
        raise ValueError(
            f"{args.model_name_or_path} is of {model.config.problem_type}, and the data are of {kind}: see "
            "`multi_label` in `data`."
        )
    return model


def load_image_processor(
    args: ClassificationModelArguments, input_spec: dict | None, image_size: int
) -> ViTPImageProcessor:
    """With the backbone's mean and standard deviation, the input spec of the data, and the size of training."""
    own = {"input_spec": input_spec, "size": {"height": image_size, "width": image_size}}
    if args.model_name_or_path is None:
        return ViTPImageProcessor(**own)
    return ViTPImageProcessor.from_backbone(args.model_name_or_path, revision=args.model_revision, **own)
