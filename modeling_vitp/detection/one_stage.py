"""transformers' own one-stage detectors on ViTP's maps at strides 8, 16 and 32."""

from pathlib import Path
from typing import Any

from transformers import (
    BaseImageProcessor,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DFineForObjectDetection,
    InternVLVisionModel,
    PreTrainedModel,
    RTDetrImageProcessor,
    RTDetrV2ForObjectDetection,
)

from ..bands import check_same_bands
from ..image_processing_vitp_detection import ViTPDetectionImageProcessor
from ..modeling_vitp_multi_scale import open_neck

DETECTORS: dict[str, tuple[type[PreTrainedModel], type[BaseImageProcessor]]] = {
    "rt_detr_v2": (RTDetrV2ForObjectDetection, RTDetrImageProcessor),
    "d_fine": (DFineForObjectDetection, RTDetrImageProcessor),
    "deformable_detr": (DeformableDetrForObjectDetection, DeformableDetrImageProcessor),
}
MAPS = ["stride8", "stride16", "stride32"]
LARGEST_STRIDE = 32


def check_settings(detector: str, image_size: int, keep_ratio: bool, input_spec: dict | None) -> None:
    """Raises a `ValueError` if images are not whole squares, or are not what transformers' image processors read.

    Boxes of these models are shares of the square with its padding, which their image processors do not take off.
    """
    if keep_ratio:
        raise ValueError(f"detector={detector!r} takes images stretched to a square: give keep_ratio: false.")
    if image_size % LARGEST_STRIDE:
        raise ValueError(f"image_size={image_size} is no multiple of {LARGEST_STRIDE}, as {detector!r} needs it.")
    if input_spec is not None:
        raise ValueError(f"data: input_spec is for ViTP's own detectors; the image processor of {detector!r} has none.")


def on_backbone(
    model_class: type[PreTrainedModel],
    backbone: str | Path | InternVLVisionModel,
    neck: str = "adapter",
    *,
    id2label: dict[int, str],
    image_size: int | None = None,
    backbone_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """One of [`DETECTORS`] as [`~modeling_vitp.ViTPForObjectDetection.from_backbone`] makes ours."""
    pretrained = open_neck(backbone, neck, image_size, {**(backbone_kwargs or {}), "out_features": MAPS})
    if "encoder_in_channels" in vars(model_class.config_class):
        settings = {"encoder_in_channels": pretrained.channels, **settings}
    label2id = {label: index for index, label in id2label.items()}
    model = model_class(
        model_class.config_class(backbone_config=pretrained.config, id2label=id2label, label2id=label2id, **settings)
    )
    model.model.backbone.model = pretrained
    return model


def image_processor_for(detector: str, start: str | None, revision: str, side: int) -> BaseImageProcessor:
    """transformers' own for a detector: images stretched to a square, with the mean and deviation of the start."""
    own = ViTPDetectionImageProcessor()
    if start is not None:
        own = ViTPDetectionImageProcessor.from_backbone(start, revision=revision)
    check_same_bands(f"the image processor of {detector!r}", None, start, own.band_names)
    return DETECTORS[detector][1](
        size={"height": side, "width": side}, do_normalize=True, image_mean=own.image_mean, image_std=own.image_std
    )
