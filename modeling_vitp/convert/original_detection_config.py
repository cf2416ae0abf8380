"""OpenMMLab's two-stage detectors on ViT-Adapter as their tensors show them, and ours.

What kind a detector is and how wide it is follows from the shapes of its tensors; overlaps, thresholds, numbers of
proposals and the test-time flip do not. Those are a benchmark's, or the published models' where none is named, or what
`detector` in a `config.json` beside the weights says, under the names of our configuration.
"""

import logging
from typing import Any

from ..configuration_vitp_detection import (
    ViTPInstanceSegmentationConfig,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
)
from ..image_processing_vitp_detection import ViTPDetectionImageProcessor
from .benchmarks import BENCHMARKS
from .original_dense_config import adapter_from_original, adapter_to_original, count, named, ordered_names

logger = logging.getLogger(__name__)

# The numbers of deltas that a place of the region proposals has, three anchors each.
KINDS = {12: ViTPObjectDetectionConfig, 18: ViTPOrientedObjectDetectionConfig}
PER_STAGE = ("stage_iou_thresholds", "stage_loss_weights", "stage_box_stds")
VISIBLE_FIELDS = ("neck_channels", "neck_top_down", "head_hidden_size", "class_agnostic_boxes")


def detection_from_original(
    settings: dict[str, Any], shapes: dict[str, tuple[int, ...]], benchmark: str | None = None
) -> ViTPObjectDetectionConfig:
    """
    Args:
        settings: arguments of the original backbone's class, and `detector`; or nothing.
        shapes: of the tensors, under the names of the original code.
        benchmark: one of `BENCHMARKS`.

    Raises:
        ValueError: as [`adapter_from_original`]; if the tensors are no detector's that we have, or not the benchmark's.
    """
    prefix = "backbone."
    adapter = adapter_from_original(
        settings, {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    )
    stages = count(r"roi_head\.bbox_head\.(\d)\.", shapes)
    head = "roi_head.bbox_head.0" if stages else "roi_head.bbox_head"
    try:
        channels = shapes["neck.lateral_convs.0.conv.weight"][0]
        values = shapes["rpn_head.rpn_reg.weight"][0]
        hidden, labels = shapes[f"{head}.shared_fcs.0.weight"][0], shapes[f"{head}.fc_cls.weight"][0] - 1
        box_values = shapes[f"{head}.fc_reg.weight"][0]
    except KeyError as error:
        raise ValueError(
            f"The heads are not those of a two-stage detector of OpenMMLab: there is no {error}."
        ) from error
    config_class = (
        ViTPInstanceSegmentationConfig if "roi_head.mask_head.upsample.weight" in shapes else KINDS.get(values)
    )
    if config_class is None or (config_class.num_box_values == 4) != (values == 12):
        raise ValueError(f"rpn_reg gives {values} values a place, but 12 or, for oriented boxes, 18 are expected.")
    if labels < 1 or box_values not in (config_class.num_box_values, config_class.num_box_values * labels):
        raise ValueError(
            f"fc_reg gives {box_values} values, but {config_class.num_box_values}, for all {labels} classes or each, "
            "are expected."
        )
    shown = {
        "neck_channels": channels,
        "neck_top_down": "neck.lateral_convs.0.conv.bias" in shapes,
        "head_hidden_size": hidden,
        "class_agnostic_boxes": box_values == config_class.num_box_values,
    }
    hidden_settings = stage_settings(config_class, max(stages, 1)) | hidden_of(settings, shown)
    if benchmark is not None:
        hidden_settings |= benchmark_settings(benchmark, config_class, labels)
    elif "detector" not in settings:
        logger.warning(
            "What cannot be seen from the tensors (thresholds, overlaps, the names of the classes) is taken to be as "
            "in the published %s. Name the benchmark if the detector is one of %s.",
            config_class.model_type,
            ", ".join(BENCHMARKS),
        )
    if "id2label" not in hidden_settings:
        hidden_settings["num_labels"] = labels
    config = config_class(backbone_config=adapter, **shown, **hidden_settings)
    if config.num_labels != labels:
        raise ValueError(f"config.json names {config.num_labels} classes, but the head has {labels}.")
    return config


def stage_settings(config_class: type[ViTPObjectDetectionConfig], stages: int) -> dict[str, Any]:
    """Of as many stages as there are, one or those of the published detector."""
    published = {name: getattr(config_class, name) for name in PER_STAGE}
    if stages not in (1, len(published[PER_STAGE[0]])):
        raise ValueError(
            f"The detector has {stages} stages, but 1 or {len(published[PER_STAGE[0]])} are expected: of others the "
            "tensors do not say with which overlaps they were trained."
        )
    return {name: list(values[:stages]) for name, values in published.items()}


def hidden_of(settings: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """What `detector` says of what the tensors do not show; what they show, it may not say otherwise."""
    said = dict(settings.get("detector", {}))
    for name in VISIBLE_FIELDS:
        if said.get(name, shown[name]) != shown[name]:
            raise ValueError(f"config.json has {name}={said[name]}, but the tensors have {shown[name]}.")
        said.pop(name, None)
    if "id2label" in said:
        said |= named(ordered_names(said["id2label"]))
    return said


def benchmark_settings(benchmark: str, config_class: type[ViTPObjectDetectionConfig], labels: int) -> dict[str, Any]:
    known = BENCHMARKS[benchmark]
    if known.config_class is not config_class or len(known.names) != labels:
        raise ValueError(
            f"The tensors are of a {config_class.model_type} with {labels} classes, but the published detector of "
            f"{benchmark} is a {known.config_class.model_type} with {len(known.names)}."
        )
    if not known.order_is_certain:
        logger.warning(
            "The classes of %s are named in the order of the authors' code, which takes that of an annotation file "
            "that is not published: score the detector class by class before relying on the names.",
            benchmark,
        )
    return known.settings | named(known.names)


def detection_to_original(config: ViTPObjectDetectionConfig) -> dict[str, Any]:
    """The arguments of the original backbone's class, and `detector`: the rest under our own names.

    What is refused: see [`~modeling_vitp.convert.original_dense_config.adapter_to_original`].
    """
    own = set(ViTPObjectDetectionConfig.__annotations__) - {"backbone_config"}
    settings = {name: value for name, value in config.to_dict().items() if name in own}
    return adapter_to_original(config.backbone_config) | {"detector": settings | {"id2label": config.id2label}}


def detection_image_processor(
    config: ViTPObjectDetectionConfig, benchmark: str | None = None
) -> ViTPDetectionImageProcessor:
    """For images as the detector was trained on: stretched to its size, or for oriented boxes, which stretching
    bends, fitted into it and padded."""
    height, width = config.backbone_config.image_size
    resize = "fit" if isinstance(config, ViTPOrientedObjectDetectionConfig) else "stretch"
    if benchmark is not None:
        resize = BENCHMARKS[benchmark].resize
    size = {"height": height, "width": width}
    if resize == "stretch":
        return ViTPDetectionImageProcessor(do_resize=True, size=size)
    if resize == "fit":
        fitted = {"max_height": height, "max_width": width}
        return ViTPDetectionImageProcessor(do_resize=True, size=fitted, pad_size=size)
    return ViTPDetectionImageProcessor(pad_size=size)
