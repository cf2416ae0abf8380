"""Trainer for object detection and instance segmentation, with an optional milestone schedule."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel, Trainer, TrainingArguments

from ...image_processing_vitp import InputSpecImageProcessor
from ...image_processing_vitp_detection import ViTPDetectionImageProcessor
from ...images.pixels import normalized
from ...metrics.box_metrics import BoxMetric
from ...metrics.report import name_classes
from ...modeling_vitp_backbone import pad_to_multiple
from ...modeling_vitp_detection import (
    BOX_CELLS,
    MASK_CELLS,
    STRIDES,
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
)
from ...rotated_boxes import align_in_image, enclosing_boxes
from ...training.config import BaseConfig
from ...training.sample_trainer import AugmentedSamples
from ..arguments import BackboneArguments
from ..loading import check_start, load_image_processor, load_on_backbone
from ..trainer import FineTuningTrainer
from .arguments import SCORED_WITH, VARIANTS, VITP, DetectionSettings
from .augmentation import Augmentation, Sample, lie_in, targets
from .data import ObjectImages
from .one_stage import DETECTORS, check_settings, image_processor_for, on_backbone
from .pictures import SHOWN, draw_detections
from .prediction import post_process

logger = logging.getLogger(__name__)


@dataclass
class ViTPDetectionTrainingConfig(DetectionSettings, BaseConfig, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the settings for object detection and instance segmentation."""

    unsupported = {"label_smoothing_factor": "it is for image classification. Remove it."}


class TrainingSamples(AugmentedSamples):
    """Data set of augmented items of [`~modeling_vitp.tasks.detection.data.ObjectImages`], without crowd objects."""

    def __init__(
        self,
        samples: ObjectImages,
        augmentation: Augmentation,
        image_processor: BaseImageProcessor,
        seed: int,
        is_oriented: bool,
    ):
        super().__init__(samples, augmentation, image_processor, seed)
        self.is_oriented = is_oriented

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        item, generator = self.sample(index)
        sample = Sample(item["image"], item["corners"], item["labels"], item.get("masks")).take(~item["crowd"])
        sample = self.augmentation(sample, generator)
        pixels = normalized(sample.image, self.image_processor)
        return {"pixel_values": pixels, "labels": targets(sample, self.is_oriented), "id": item["id"]}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch. Images and masks are padded at the right and at the bottom to the largest size."""
    height, width = (max(item["pixel_values"].shape[axis] for item in items) for axis in (1, 2))
    batch = {
        "pixel_values": torch.zeros(len(items), len(items[0]["pixel_values"]), height, width),
        "pixel_mask": torch.zeros(len(items), height, width, dtype=torch.int64),
        "labels": [dict(item["labels"]) for item in items],
    }
    for pixels, mask, item, label in zip(batch["pixel_values"], batch["pixel_mask"], items, batch["labels"]):
        own_height, own_width = item["pixel_values"].shape[1:]
        pixels[:, :own_height, :own_width] = item["pixel_values"]
        mask[:own_height, :own_width] = 1
        if "masks" in label:
            label["masks"] = torch.nn.functional.pad(label["masks"], (0, width - own_width, 0, height - own_height))
    return batch


class ViTPDetectionTrainer(FineTuningTrainer, Trainer):
    """Trainer for ViTP detectors, and for detectors of transformers that take DETR labels.

    Differences from [`~transformers.Trainer`]:

    - The learning rate decays layer by layer, see [`~modeling_vitp.training.freezing.layer_decay_groups`], and
      optionally at milestones.
    - Batches and augmentation depend on the seed and the epoch only, not on the number of processes and workers.
    - Evaluation scores images at their original size. Each process evaluates a part of the images.

    Args:
        model: one of [`~modeling_vitp.tasks.detection.trainer.TASK_MODELS`], or for horizontal boxes one of
            [`~modeling_vitp.tasks.detection.one_stage.DETECTORS`].
        args: training arguments, [`ViTPDetectionTrainingConfig`].
        task: `"horizontal"`, `"oriented"` or `"instances"`.
        metric: name of a folder of `modeling_vitp/metrics`, or path of a Python file. Default: the metric of the task.
        metric_options: arguments of the metric.
        train_dataset, eval_dataset: instances of [`~modeling_vitp.tasks.detection.data.ObjectImages`].
        processing_class: image processor, which also sets the size of evaluated images.
    """

    counted = "objects"
    scored_with = SCORED_WITH
    fixed = (
        "image_size",
        "keep_ratio",
        "horizontal_flip",
        "vertical_flip",
        "diagonal_flip",
        "rotation",
        "right_angle_classes",
    )
    free = ("lr_milestones", "lr_gamma", "warmup_start")

    def __init__(
        self,
        model: PreTrainedModel,
        args: ViTPDetectionTrainingConfig,
        task: str,
        metric: str | None = None,
        metric_options: dict[str, Any] | None = None,
        train_dataset: ObjectImages | None = None,
        eval_dataset: ObjectImages | None = None,
        processing_class: BaseImageProcessor | None = None,
        **kwargs,
    ):
        self.task, self.names = task, list(model.config.id2label.values())
        image_processor = processing_class or ViTPDetectionImageProcessor()
        self.band_names = getattr(image_processor, "band_names", None)  # Image processors of transformers lack it.
        if train_dataset is not None:
            if not VARIANTS[task].has_outlines and args.rotation and set(self.names) - set(args.right_angle_classes):
                logger.warning(
                    "rotation=%s enlarges horizontal boxes: each becomes the upright box around the rotated box, not "
                    "around the object. Set rotation to 0, or train with task='instances' on outlines.",
                    args.rotation,
                )
            augmentation = Augmentation(args, self.names)
            seed = args.seed if args.data_seed is None else args.data_seed
            is_oriented = VARIANTS[task].is_oriented
            train_dataset = TrainingSamples(train_dataset, augmentation, image_processor, seed, is_oriented)
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            **kwargs,
        )
        default = VARIANTS[task].default_metric
        self.metric_settings = {"metric": metric or default, "metric_options": metric_options or {}}
        self.metrics = self._load_metrics(metric or default, metric_options or {})
        self.metric = [*self.metrics.values()][-1]

    def _load_metrics(self, name: str, options: dict[str, Any]) -> dict[str, evaluate.Metric]:
        """Return the metrics by the prefix of their score names. The options are those of the metric of boxes."""
        if not VARIANTS[self.task].has_masks:
            return {"": self.load_metric(name, BoxMetric, **options)}
        masks = self.load_metric("coco_average_precision", masks=True)
        return {"box_": self.load_metric(name, BoxMetric, **options), "mask_": masks}

    # Training

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        args = self.args
        if self.lr_scheduler is None and args.lr_milestones is not None:
            epoch = math.ceil(len(self._sampler) / args.gradient_accumulation_steps)
            milestones = [round(epochs * epoch) for epochs in args.lr_milestones]
            warmup = args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                rise = min(1.0, args.warmup_start + (1 - args.warmup_start) * step / warmup) if warmup else 1.0
                return rise * args.lr_gamma ** sum(step >= milestone for milestone in milestones)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def main_score(self) -> str | None:
        return [*self.metrics][-1] + (self.metric.main_score or "")

    def greater_is_better(self, score: str) -> bool:
        for prefix, metric in self.metrics.items():
            if score.startswith(prefix) and not metric.greater_is_better(score.removeprefix(prefix)):
                return False
        return True

    def training_data(self) -> Any:
        return self.train_dataset.samples.files_or_rows()

    def data_settings(self) -> dict[str, Any]:
        return super().data_settings() | {"task": self.task}

    def scoring_settings(self) -> dict[str, Any]:
        return super().scoring_settings() | self.metric_settings

    # Evaluation

    def draw(
        self, samples: list[dict[str, Any]], path: Path, maps: Sequence[np.ndarray] = (), is_test: bool = False
    ) -> None:
        detections = [self.detect([sample["image"]], SHOWN)[0] for sample in samples]
        draw_detections(samples, detections, self.names, path, maps, self.band_names)

    @torch.no_grad()
    def detect(self, images: list[torch.Tensor], threshold: float = 0.0) -> list[dict[str, Any]]:
        """Return the detections in images as the `post_process_…` method of the image processor returns them.

        Coordinates are in pixels of the original images. Images of one size after resizing are predicted together,
        without padding, so that the detections of an image do not depend on the others.

        Args:
            images: images of any size, see [`~modeling_vitp.images.pixels.to_pixels`].
            threshold: score above which detections are returned.
        """
        processor, model = self.processing_class, self.accelerator.unwrap_model(self.model).eval()
        # The input spec has been applied on reading.
        own = {"input_spec": None} if isinstance(processor, InputSpecImageProcessor) else {}
        options = {"input_data_format": "channels_first", "return_tensors": "pt", **own}
        inputs = [processor(images=[image], **options) for image in images]
        same_size: dict[torch.Size, list[int]] = {}
        for index, one in enumerate(inputs):
            same_size.setdefault(one["pixel_values"].shape, []).append(index)
        found: dict[int, dict[str, Any]] = {}
        for indices in same_size.values():
            batch = {name: torch.cat([inputs[index][name] for index in indices]) for name in inputs[indices[0]]}
            with self.compute_loss_context_manager():
                outputs = model(**{name: values.to(self.args.device) for name, values in batch.items()})
            sizes = [tuple(images[index].shape[-2:]) for index in indices]
            found |= zip(indices, post_process(processor, outputs, threshold, sizes))
        return [found[index] for index in range(len(images))]

    def score(self, batches: Iterable, is_test: bool) -> dict[str, float]:
        for items in batches:
            unknown = [item["id"] for item in items if "labels" not in item]
            if unknown:
                raise ValueError(f"Expected annotations for every evaluation sample, {unknown[0]} has none.")
            predictions = self.detect([item["image"] for item in items])
            predictions = [without_padding(found, item) for found, item in zip(predictions, items)]
            references = [reference(item, self.task) for item in items]
            for metric in self.metrics.values():
                ids, cases = ([item[key] for item in items] for key in ("id", "case"))
                metric.add_batch(predictions=predictions, references=references, image_ids=ids, case_ids=cases)
        return {
            f"{begin}{key}": value
            for begin, metric in self.metrics.items()
            for key, value in name_classes(metric.compute(), self.names).items()
        }


def without_padding(found: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    """Remove detections with their center in the padding of an image that is moved with its objects.

    See [`~modeling_vitp.tasks.detection.augmentation.moved`].
    """
    if "valid" not in item:
        return found
    boxes = found["boxes"].cpu()
    is_oriented = boxes.shape[1] == 5
    chosen = lie_in(boxes[:, :2] if is_oriented else (boxes[:, :2] + boxes[:, 2:]) / 2, item["valid"])
    return {
        name: values.cpu()[chosen] if isinstance(values, torch.Tensor) else list(compress(values, chosen.tolist()))
        for name, values in found.items()
    }


def reference(item: dict[str, Any], task: str) -> dict[str, torch.Tensor]:
    """Return the objects of a sample in the format of the metrics."""
    objects = {name: item[name] for name in ("labels", "difficult", "crowd")}
    if VARIANTS[task].is_oriented:
        return objects | {"corners": item["corners"]}
    boxes = enclosing_boxes(item["corners"]) if len(item["labels"]) else torch.zeros(0, 4)
    objects |= {"boxes": boxes} | ({"masks": item["masks"]} if VARIANTS[task].has_masks else {})
    areas = item["masks"].sum((1, 2)) if VARIANTS[task].has_masks else (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return objects | {"area": torch.where(item["area"].isnan(), areas.double(), item["area"])}


TASK_MODELS = {
    "horizontal": ViTPForObjectDetection,
    "oriented": ViTPForOrientedObjectDetection,
    "instances": ViTPForInstanceSegmentation,
}


def check_detector(task: str, args: BackboneArguments, do_train: bool, detector: str = VITP) -> None:
    """Check the start of fine-tuning for a detector, see [`~modeling_vitp.tasks.loading.check_start`]."""
    check_start(TASK_MODELS[task] if detector == VITP else DETECTORS[detector][0], args, do_train)


def load_detector(
    task: str,
    args: BackboneArguments,
    names: list[str],
    settings: DetectionSettings,
    detector: str = VITP,
    input_spec: dict | None = None,
) -> PreTrainedModel:
    """Load a detector on a backbone, see [`~modeling_vitp.tasks.loading.load_on_backbone`].

    The position embeddings are resampled to the image size.
    """
    if detector == VITP:
        return load_on_backbone(TASK_MODELS[task], args, names, input_spec=input_spec, image_size=settings.image_size)
    model_class, _ = DETECTORS[detector]
    build = partial(on_backbone, model_class)
    return load_on_backbone(model_class, args, names, build, image_size=settings.image_size)


def load_detection_image_processor(
    args: BackboneArguments, settings: DetectionSettings, input_spec: dict | None, detector: str = VITP
) -> BaseImageProcessor:
    """Load the image processor of a detector for the image size of training and the input spec of the data.

    See [`~modeling_vitp.tasks.loading.load_image_processor`].
    """
    side = settings.image_size
    if detector != VITP:
        check_settings(detector, side, settings.keep_ratio, input_spec)
        return image_processor_for(detector, args.model_name_or_path, args.model_revision, side)
    size = {"max_height": side, "max_width": side} if settings.keep_ratio else {"height": side, "width": side}
    own = {"input_spec": input_spec, "do_resize": True, "size": size}
    return load_image_processor(ViTPDetectionImageProcessor, args, settings.do_train, **own)


def loss_without_values(model: ViTPForObjectDetection, samples: int, size: int) -> torch.Tensor:
    """Return a loss of all outputs of a detector in training, on samples of `size` x `size` pixels without values.

    The boxes that the heads are trained on depend on values. Their number is the largest one, `roi_samples` per image.
    """
    config = model.config
    pixels = torch.zeros(samples, config.backbone_config.num_channels, size, size)
    view = model.view(model.run_backbone(pad_to_multiple(pixels, 32, 32)).feature_maps)
    loss = view.logits.sum() + view.deltas.sum()

    def pool(number: int, cells: int) -> torch.Tensor:
        """Pool the features in `number` boxes of each image."""
        finest, scale = view.maps[0], 1 / STRIDES[0]
        if isinstance(model, ViTPForOrientedObjectDetection):
            boxes = torch.zeros(number, 5)
            return torch.cat([align_in_image(features[None], boxes, cells, scale) for features in finest])
        images = torch.zeros(samples * number, dtype=torch.long)
        return model.align(finest, torch.zeros(samples * number, 4), images, cells, scale)

    for head in model.box_heads:
        logits, deltas = head(pool(config.roi_samples, BOX_CELLS))
        loss = loss + logits.sum() + deltas.sum()
    if isinstance(model, ViTPForInstanceSegmentation):
        loss = loss + model.mask_head(pool(int(config.roi_samples * config.roi_positive_share), MASK_CELLS)).sum()
    return loss
