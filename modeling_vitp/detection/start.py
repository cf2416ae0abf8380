"""The detector that fine-tuning starts from, and its image processor."""

from functools import partial

from transformers import BaseImageProcessor, PreTrainedModel

from ..image_processing_vitp_detection import ViTPDetectionImageProcessor
from ..modeling_vitp_detection import (
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
)
from ..training.backbone_start import check_start, load_on_backbone
from .arguments import VITP, DetectionModelArguments, DetectionSettings
from .one_stage import DETECTORS, check_settings, image_processor_for, on_backbone

MODELS = {
    "horizontal": ViTPForObjectDetection,
    "oriented": ViTPForOrientedObjectDetection,
    "instances": ViTPForInstanceSegmentation,
}


def check_detector(task: str, args: DetectionModelArguments, do_train: bool, detector: str = VITP) -> None:
    """See [`~modeling_vitp.training.backbone_start.check_start`]."""
    check_start(MODELS[task] if detector == VITP else DETECTORS[detector][0], args, do_train)


def load_detector(
    task: str,
    args: DetectionModelArguments,
    names: list[str],
    settings: DetectionSettings,
    detector: str = VITP,
    input_spec: dict | None = None,
) -> PreTrainedModel:
    """See [`~modeling_vitp.training.backbone_start.load_on_backbone`]; positions are resampled to the image size."""
    if detector == VITP:
        return load_on_backbone(MODELS[task], args, names, input_spec=input_spec, image_size=settings.image_size)
    model_class, _ = DETECTORS[detector]
    build = partial(on_backbone, model_class)
    return load_on_backbone(model_class, args, names, build, image_size=settings.image_size)


def load_image_processor(
    args: DetectionModelArguments, settings: DetectionSettings, input_spec: dict | None, detector: str = VITP
) -> BaseImageProcessor:
    """With the backbone's mean and standard deviation, the input spec of the data, and the size of training."""
    side = settings.image_size
    if detector != VITP:
        check_settings(detector, side, settings.keep_ratio, input_spec)
        return image_processor_for(detector, args.model_name_or_path, args.model_revision, side)
    size = {"max_height": side, "max_width": side} if settings.keep_ratio else {"height": side, "width": side}
    own = {"input_spec": input_spec, "do_resize": True, "size": size}
    if args.model_name_or_path is None:
        return ViTPDetectionImageProcessor(**own)
    return ViTPDetectionImageProcessor.from_backbone(args.model_name_or_path, revision=args.model_revision, **own)
