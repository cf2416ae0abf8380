"""Loading of the model that a fine-tuning starts from."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from ..bands import check_same_bands
from ..configuration_vitp import ViTPVisionConfig, known_keys
from ..convert.tensor_files import check_finite
from ..input_spec import InputSpec
from ..modeling_vitp import ViTPVisionModel
from ..modeling_vitp_multi_scale import NECKS
from ..opening import read_config_fields
from ..pretraining.loading import check_config
from ..training.freezing import freeze_vit
from .arguments import BackboneArguments, StartArguments

logger = logging.getLogger(__name__)


def check_start(model_class: type[PreTrainedModel], args: StartArguments, do_train: bool = True) -> None:
    """Check the arguments of the start. No file is opened, except the start's configuration without training.

    Raises:
        ValueError: if not exactly one start is given, if random weights would be scored without training, or if a field
            of the configurations is unknown.
    """
    if (args.model_name_or_path is None) == (args.from_scratch is None):
        raise ValueError(
            "Give either model_name_or_path, a pretrained backbone or a fine-tuned model, or from_scratch. To remove "
            "the one in the configuration, add --model_name_or_path '' or --from_scratch '{}'."
        )
    if args.from_scratch is not None and not do_train:
        raise ValueError(
            "do_train is false, but from_scratch gives random weights, which are not scored. Set model_name_or_path, "
            "and remove from_scratch with --from_scratch '{}'."
        )
    if not do_train:
        model_type = read_config_fields(args.model_name_or_path, revision=args.model_revision).get("model_type")
        expected_type = model_class.config_class.model_type
        if model_type != expected_type:
            raise ValueError(
                f"do_train is false, but {args.model_name_or_path} is of type {model_type!r}. Expected a fine-tuned "
                f"model of type {expected_type!r}."
            )
    check_config("from_scratch", args.from_scratch, ViTPVisionConfig)
    backbone_config_class = ViTPVisionConfig
    if isinstance(args, BackboneArguments):
        neck = args.neck or "adapter"
        backbone_config_class = NECKS[neck].config_class
        check_settings_of_neck(args.backbone or {}, neck)
    check_config("backbone", args.backbone, backbone_config_class)
    check_config("head", args.head, model_class.config_class, ("backbone_config", "id2label", "label2id"))
    for section in ("from_scratch", "backbone", "head"):
        for name, value in (getattr(args, section) or {}).items():
            if name.endswith(("_size", "_channels", "_layers", "_heads")) and value == 0:
                raise ValueError(f"{section}.{name} must be at least 1, got 0.")


def check_settings_of_neck(backbone: Mapping[str, Any], neck: str) -> None:
    """Raise a `ValueError` if fields of a backbone's configuration are those of another neck."""
    neck_keys = known_keys(NECKS[neck].config_class)
    for other_neck, backbone_class in NECKS.items():
        foreign_keys = backbone.keys() & known_keys(backbone_class.config_class) - neck_keys
        if foreign_keys:
            raise ValueError(
                f"backbone: {sorted(foreign_keys)} are settings of neck: {other_neck}, but neck is {neck}. To remove "
                "the settings in the configuration, add --backbone '{}'."
            )


def load_on_backbone(
    model_class: type[PreTrainedModel],
    args: StartArguments,
    names: list[str],
    build: Callable[..., PreTrainedModel] | None = None,
    input_spec: dict | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Load the model in float32, with a new head unless it is a fine-tuned model.

    Args:
        names: names of the classes.
        build: function with the arguments of `model_class.from_backbone`, which is the default.
        input_spec: input spec of the data. If it names bands, the RGB weights of a backbone are spread over them, see
            [`~modeling_vitp.spread_bands`].
        settings: further arguments of `from_backbone`. Fields of `args.head` take precedence.

    Raises:
        ValueError: if [`check_start`] fails, a fine-tuned model has other classes or other weights than the settings
            need, or the start has other bands.
    """
    check_start(model_class, args)
    name = args.model_name_or_path
    band_names = InputSpec.from_dict(input_spec).band_names
    id2label = dict(enumerate(names))
    start_type = None
    if name is not None:
        start_type = read_config_fields(name, revision=args.model_revision).get("model_type")
    if start_type == model_class.config_class.model_type:
        model = load_fine_tuned(model_class, args, id2label)
    else:
        head = {**settings, **(args.head or {})}
        if args.neck is not None:
            head["neck"] = args.neck
        start, backbone = open_start(args, band_names)
        build = build or model_class.from_backbone
        model = build(start, id2label=id2label, backbone_kwargs=backbone, **head)
    start_name = name or "from_scratch"
    model_bands = getattr(model.config.backbone_config, "band_names", None)
    check_same_bands(start_name, model_bands, "data: input_spec", band_names)
    if model.device.type != "meta":  # the model of a dry run has no values
        check_finite(model.state_dict(), start_name)
    if args.freeze_backbone or args.backbone_lora_r:
        freeze_vit(model, args.backbone_lora_r)
    return model


def open_start(args: StartArguments, band_names: Sequence[str] | None) -> tuple[str | ViTPVisionModel, dict[str, Any]]:
    """Return a name, or a ViT with random weights, and the arguments `backbone_kwargs` of `from_backbone`."""
    is_frozen = args.freeze_backbone and not args.backbone_lora_r
    backbone = {"drop_path_rate": 0.0 if is_frozen else args.drop_path_rate}
    backbone.update(args.backbone or {})
    bands = {} if band_names is None else {"band_names": band_names}
    backbone.update(bands)
    if args.model_name_or_path is None:
        vit_config = ViTPVisionConfig(**{**args.from_scratch, **bands})
        return ViTPVisionModel(vit_config), backbone
    backbone["revision"] = args.model_revision
    return args.model_name_or_path, backbone


def load_fine_tuned(
    model_class: type[PreTrainedModel], args: StartArguments, id2label: dict[int, str]
) -> PreTrainedModel:
    """Load a fine-tuned model in float32 with the settings in `args.head`.

    Raises:
        ValueError: if its classes, its neck or the settings in `args.backbone` are not the model's own.
    """
    start = args.model_name_or_path
    settings = {"dtype": torch.float32, **(args.head or {})}
    model, loading_info = model_class.from_pretrained(
        start, revision=args.model_revision, output_loading_info=True, **settings
    )
    missing_weights = loading_info["missing_keys"]
    if missing_weights:
        raise ValueError(f"head: {args.head} needs weights that {start} lacks, such as {min(missing_weights)}.")
    if model.config.id2label != id2label:
        model_classes = list(model.config.id2label.values())
        expected_classes = list(id2label.values())
        raise ValueError(f"Expected {start} to have classes {expected_classes}, found {model_classes}.")
    model_backbone = model.config.backbone_config.to_dict()
    if args.neck is not None and model_backbone["model_type"] != NECKS[args.neck].config_class.model_type:
        raise ValueError(
            f"neck: {args.neck} differs from that of {start}, a fine-tuned model, which keeps its own. Remove the "
            "option, or set the other neck."
        )
    different_settings = {}
    for name, value in (args.backbone or {}).items():
        model_value = model_backbone.get(name)
        if json.dumps(value, sort_keys=True) != json.dumps(model_value, sort_keys=True):  # a tuple is a list in JSON
            different_settings[name] = model_value
    if different_settings:
        raise ValueError(
            f"backbone: {sorted(different_settings)} differ from {start}, a fine-tuned model, which keeps its "
            f"backbone. Set them to {different_settings}, or remove them with --backbone '{{}}'."
        )
    return model


def load_image_processor(
    image_processor_class: type[BaseImageProcessor], args: StartArguments, do_train: bool = True, **settings: Any
) -> BaseImageProcessor:
    """Return an image processor with the mean and standard deviation of the model that training starts from.

    Without `do_train`, images are also resized as in the training of the model, whatever the size in `settings`.
    """
    if args.model_name_or_path is None:
        return image_processor_class(**settings)
    if not do_train:
        stored_settings, _ = image_processor_class.get_image_processor_dict(
            args.model_name_or_path, revision=args.model_revision
        )
        for name in ("do_resize", "size"):
            value = stored_settings.get(name)
            if value is not None and settings.get(name, value) != value:
                logger.warning("Scoring with %s of the model: %s.", name, value)
            if value is not None:
                settings[name] = value
    return image_processor_class.from_backbone(args.model_name_or_path, revision=args.model_revision, **settings)
