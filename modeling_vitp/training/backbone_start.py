"""The model that fine-tuning starts from."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..bands import check_same_bands
from ..configuration_vitp import ViTPVisionConfig
from ..convert.finite import check_finite
from ..input_spec import InputSpec
from ..modeling_vitp import ViTPVisionModel
from ..modeling_vitp_multi_scale import NECKS
from .backbone_arguments import StartArguments
from .known_keys import check_config


def check_start(model_class: type[PreTrainedModel], args: StartArguments, do_train: bool = True) -> None:
    """Looks at what is said about the start, and opens nothing.

    Raises:
        ValueError: if not exactly one start is given, one with random weights is to be scored without training, or the
            ViT, the neck or the model has no setting of a name.
    """
    if (args.model_name_or_path is None) == (args.from_scratch is None):
        raise ValueError(
            "Give either model_name_or_path, a pretrained backbone or a fine-tuned model, or from_scratch. What the "
            "configuration has is taken back by --model_name_or_path '' or --from_scratch '{}'."
        )
    if args.from_scratch is not None and not do_train:
        raise ValueError(
            "do_train is false, and a model from_scratch has random weights, whose scores say nothing: give "
            "model_name_or_path, and take from_scratch back by --from_scratch '{}'."
        )
    check_config("from_scratch", args.from_scratch, ViTPVisionConfig)
    check_config("backbone", args.backbone, ViTPVisionConfig if args.neck is None else NECKS[args.neck].config_class)
    check_config("head", args.head, model_class.config_class, ("backbone_config", "id2label", "label2id"))


def load_on_backbone(
    model_class: type[PreTrainedModel],
    args: StartArguments,
    names: list[str],
    build: Callable[..., PreTrainedModel] | None = None,
    input_spec: dict | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """The model, in float32, with a fresh head unless it is one that was fine-tuned.

    Args:
        names: of the classes.
        build: makes a fresh model as its `from_backbone` does, which it is if not given.
        input_spec: of the data. If it names bands, the weights of a backbone for red, green and blue are spread over
            them, see [`~modeling_vitp.spread_bands`].
        settings: of a fresh model, before those of `args.head`; see its `from_backbone`.

    Raises:
        ValueError: as [`check_start`], or if a fine-tuned model has other classes, or the start is for other bands.
    """
    check_start(model_class, args)
    band_names = InputSpec.from_dict(input_spec).band_names
    id2label = dict(enumerate(names))
    revision = {"revision": args.model_revision}
    if args.from_scratch is not None:
        bands = {} if band_names is None else {"band_names": band_names}
        start, more = ViTPVisionModel(ViTPVisionConfig(**args.from_scratch | bands)), {}
    else:
        start, more = args.model_name_or_path, revision
        model_type = PreTrainedConfig.get_config_dict(start, **revision)[0].get("model_type")
        if model_type == model_class.config_class.model_type:
            model = model_class.from_pretrained(start, **revision)
            if model.config.id2label != id2label:
                raise ValueError(f"{start} has the classes {list(model.config.id2label.values())}, not {names}.")
            check_same_bands(start, model.config.backbone_config.band_names, "data: input_spec", band_names)
            check_finite(model.state_dict(), start)
            return model
    if band_names is not None:
        more = {**more, "band_names": band_names}
    backbone = {"drop_path_rate": args.drop_path_rate, **(args.backbone or {}), **more}
    head = {**settings, **(args.head or {})}
    build = build or model_class.from_backbone
    neck = {} if args.neck is None else {"neck": args.neck}
    model = build(start, **neck, id2label=id2label, backbone_kwargs=backbone, **head)
    name = args.model_name_or_path or "from_scratch"
    check_same_bands(name, model.config.backbone_config.band_names, "data: input_spec", band_names)
    check_finite(model.state_dict(), name)
    return model
