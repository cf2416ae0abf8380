"""One-stage detectors of transformers on the ViTP feature maps at strides 8, 16 and 32."""

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

from ...bands import check_same_bands
from ...image_processing_vitp_detection import ViTPDetectionImageProcessor
from ...modeling_vitp_multi_scale import open_neck

DETECTORS: dict[str, tuple[type[PreTrainedModel], type[BaseImageProcessor]]] = {
    "rt_detr_v2": (RTDetrV2ForObjectDetection, RTDetrImageProcessor),
    "d_fine": (DFineForObjectDetection, RTDetrImageProcessor),
    "deformable_detr": (DeformableDetrForObjectDetection, DeformableDetrImageProcessor),
}
MAPS = ["stride8", "stride16", "stride32"]
LARGEST_STRIDE = 32


def check_settings(
    detector: str,
    image_size: int,
    keep_ratio: bool,
    input_spec: dict | None,
) -> None:
    """Raise a `ValueError` if a detector of transformers does not support the image settings.

    Images must be stretched to a square, because these models predict boxes relative to the padded image, and their
    image processors do not remove the padding.
    """
    if keep_ratio:
        raise ValueError(f"detector={detector!r} requires images stretched to a square. Set `keep_ratio: false`.")
    if image_size % LARGEST_STRIDE:
        raise ValueError(
            f"`image_size` must be a multiple of {LARGEST_STRIDE} for detector={detector!r}, got {image_size}."
        )
    if input_spec is not None:
        raise ValueError(
            f"data: `input_spec` is not supported by the image processor of detector={detector!r}. Use detector='vitp'."
        )


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
    """Build one of [`DETECTORS`] on a backbone, like [`~modeling_vitp.ViTPForObjectDetection.from_backbone`]."""
    backbone_kwargs = {**(backbone_kwargs or {}), "out_features": MAPS}
    pretrained = open_neck(backbone, neck, image_size, backbone_kwargs)
    if "encoder_in_channels" in vars(model_class.config_class):
        settings.setdefault("encoder_in_channels", pretrained.channels)
    config = model_class.config_class(
        backbone_config=pretrained.config,
        id2label=id2label,
        label2id={label: index for index, label in id2label.items()},
        **settings,
    )
    model = model_class(config)
    model.model.backbone.model = pretrained
    return model


def image_processor_for(
    detector: str,
    start: str | None,
    revision: str,
    side: int,
) -> BaseImageProcessor:
    """Return the transformers image processor of a detector, with the mean and standard deviation of the start.

    The image processor stretches images to a square of `side` pixels.
    """
    if start is None:
        pretrained = ViTPDetectionImageProcessor()
    else:
        pretrained = ViTPDetectionImageProcessor.from_backbone(start, revision=revision)
    check_same_bands(f"the image processor of {detector!r}", None, start, pretrained.band_names)
    _, image_processor_class = DETECTORS[detector]
    return image_processor_class(
        size={"height": side, "width": side},
        do_normalize=True,
        image_mean=pretrained.image_mean,
        image_std=pretrained.image_std,
    )
