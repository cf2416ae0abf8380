"""Loading of the model that a fine-tuning starts from."""

import json
import logging
from collections.abc import Callable
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
        found = read_config_fields(args.model_name_or_path, revision=args.model_revision)
        if found.get("model_type") != model_class.config_class.model_type:
            raise ValueError(
                f"do_train is false, but {args.model_name_or_path} is of type {found.get('model_type')!r}. Expected a "
                f"fine-tuned model of type {model_class.config_class.model_type!r}."
            )
    check_config("from_scratch", args.from_scratch, ViTPVisionConfig)
    has_neck, neck = isinstance(args, BackboneArguments), args.neck or "adapter"
    keys = {name: known_keys(backbone.config_class) for name, backbone in NECKS.items()} if has_neck else {}
    for name, found in keys.items():
        if others := sorted({*(args.backbone or {})} & found - keys[neck]):
            raise ValueError(
                f"backbone: {others} are settings of neck: {name}, but neck is {neck}. To remove the settings in the "
                "configuration, add --backbone '{}'."
            )
    check_config("backbone", args.backbone, NECKS[neck].config_class if has_neck else ViTPVisionConfig)
    check_config("head", args.head, model_class.config_class, ("backbone_config", "id2label", "label2id"))
    for place in ("from_scratch", "backbone", "head"):
        for name, value in (getattr(args, place) or {}).items():
            if name.endswith(("_size", "_channels", "_layers", "_heads")) and value == 0:
                raise ValueError(f"{place}.{name} must be at least 1, got 0.")


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
    name, revision = args.model_name_or_path, {"revision": args.model_revision}
    band_names, id2label = InputSpec.from_dict(input_spec).band_names, dict(enumerate(names))
    found = {} if name is None else read_config_fields(name, **revision)
    if found.get("model_type") == model_class.config_class.model_type:
        model = load_fine_tuned(model_class, args, id2label)
    else:
        bands = {} if band_names is None else {"band_names": band_names}
        if name is None:
            start, more = ViTPVisionModel(ViTPVisionConfig(**args.from_scratch | bands)), bands
        else:
            start, more = name, revision | bands
        drop_path_rate = 0.0 if args.freeze_backbone and not args.backbone_lora_r else args.drop_path_rate
        backbone = {"drop_path_rate": drop_path_rate, **(args.backbone or {}), **more}
        head = {**settings, **(args.head or {})}
        neck = {} if args.neck is None else {"neck": args.neck}
        build = build or model_class.from_backbone
        model = build(start, **neck, id2label=id2label, backbone_kwargs=backbone, **head)
    own_bands = getattr(model.config.backbone_config, "band_names", None)
    check_same_bands(name or "from_scratch", own_bands, "data: input_spec", band_names)
    if model.device.type != "meta":  # the model of a dry run has no values
        check_finite(model.state_dict(), name or "from_scratch")
    if args.freeze_backbone or args.backbone_lora_r:
        freeze_vit(model, args.backbone_lora_r)
    return model


def load_fine_tuned(
    model_class: type[PreTrainedModel], args: StartArguments, id2label: dict[int, str]
) -> PreTrainedModel:
    """Load a fine-tuned model in float32 with the settings in `args.head`.

    Raises:
        ValueError: if its classes, its neck or the settings in `args.backbone` are not the model's own.
    """
    start, settings = args.model_name_or_path, {"dtype": torch.float32, **(args.head or {})}
    model, found = model_class.from_pretrained(
        start, revision=args.model_revision, output_loading_info=True, **settings
    )
    if missing := found["missing_keys"]:
        raise ValueError(f"head: {args.head} needs weights that {start} lacks, such as {min(missing)}.")
    if model.config.id2label != id2label:
        found, expected = [*model.config.id2label.values()], [*id2label.values()]
        raise ValueError(f"Expected {start} to have classes {expected}, found {found}.")
    own = model.config.backbone_config.to_dict()
    if args.neck is not None and own["model_type"] != NECKS[args.neck].config_class.model_type:
        raise ValueError(
            f"neck: {args.neck} differs from that of {start}, a fine-tuned model, which keeps its own. Remove the "
            "option, or set the other neck."
        )
    given = json.loads(json.dumps(args.backbone or {}))
    if differ := sorted(name for name, value in given.items() if json.loads(json.dumps(own.get(name))) != value):
        raise ValueError(
            f"backbone: {differ} differ from {start}, a fine-tuned model, which keeps its backbone. Set them to "
            f"{ {name: own.get(name) for name in differ} }, or remove them with --backbone '{{}}'."
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
        own, _ = image_processor_class.get_image_processor_dict(args.model_name_or_path, revision=args.model_revision)
        resizing = {name: own[name] for name in ("do_resize", "size") if own.get(name) is not None}
        if differ := [name for name, value in resizing.items() if settings.get(name, value) != value]:
            logger.warning("Scoring with %s of the model: %s.", " and ".join(differ), [own[name] for name in differ])
        settings |= resizing
    return image_processor_class.from_backbone(args.model_name_or_path, revision=args.model_revision, **settings)
