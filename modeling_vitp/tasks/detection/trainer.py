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
MILESTONE_FACTOR = 0.1  # of the learning rate at each milestone


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
        sample = Sample(
            image=item["image"],
            corners=item["corners"],
            labels=item["labels"],
            masks=item.get("masks"),
        )
        sample = sample.take(~item["crowd"])
        sample = self.augmentation(sample, generator)
        return {
            "pixel_values": normalized(sample.image, self.image_processor),
            "labels": targets(sample, self.is_oriented),
            "id": item["id"],
        }


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch. Images and masks are padded at the right and at the bottom to the largest size."""
    sizes = [item["pixel_values"].shape for item in items]
    bands, largest_height, largest_width = np.max(sizes, axis=0).tolist()
    pixel_values = torch.zeros(len(items), bands, largest_height, largest_width)
    pixel_mask = torch.zeros(len(items), largest_height, largest_width, dtype=torch.int64)
    labels = []
    for index, item in enumerate(items):
        _, height, width = item["pixel_values"].shape
        pixel_values[index, :, :height, :width] = item["pixel_values"]
        pixel_mask[index, :height, :width] = 1
        labels_of_item = dict(item["labels"])
        if "masks" in labels_of_item:
            padding = (0, largest_width - width, 0, largest_height - height)
            labels_of_item["masks"] = torch.nn.functional.pad(labels_of_item["masks"], padding)
        labels.append(labels_of_item)
    return {
        "pixel_values": pixel_values,
        "pixel_mask": pixel_mask,
        "labels": labels,
    }


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
    free = ("lr_milestones", "warmup_start")

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
        self.task = task
        self.names = list(model.config.id2label.values())
        image_processor = processing_class or ViTPDetectionImageProcessor()
        self.band_names = getattr(image_processor, "band_names", None)  # Image processors of transformers lack it.
        if train_dataset is not None:
            rotates_by_any_angle = args.rotation and not set(self.names) <= set(args.right_angle_classes)
            if rotates_by_any_angle and not VARIANTS[task].has_outlines:
                logger.warning(
                    "rotation=%s enlarges horizontal boxes: each becomes the upright box around the rotated box, not "
                    "around the object. Set rotation to 0, or train with task='instances' on outlines.",
                    args.rotation,
                )
            train_dataset = TrainingSamples(
                train_dataset,
                Augmentation(args, self.names),
                image_processor,
                seed=args.seed if args.data_seed is None else args.data_seed,
                is_oriented=VARIANTS[task].is_oriented,
            )
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            **kwargs,
        )
        metric = metric or VARIANTS[task].default_metric
        metric_options = metric_options or {}
        self.metric_settings = {
            "metric": metric,
            "metric_options": metric_options,
        }
        self.metrics = self._load_metrics(metric, metric_options)
        self.metric = list(self.metrics.values())[-1]

    def _load_metrics(self, name: str, options: dict[str, Any]) -> dict[str, evaluate.Metric]:
        """Return the metrics by the prefix of their score names. The options are those of the metric of boxes."""
        box_metric = self.load_metric(name, BoxMetric, **options)
        if not VARIANTS[self.task].has_masks:
            return {"": box_metric}
        mask_metric = self.load_metric("coco_average_precision", masks=True)
        return {"box_": box_metric, "mask_": mask_metric}

    # Training

    def create_scheduler(
        self,
        num_training_steps: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> torch.optim.lr_scheduler.LRScheduler:
        args = self.args
        if self.lr_scheduler is None and args.lr_milestones is not None:
            steps_per_epoch = math.ceil(len(self._sampler) / args.gradient_accumulation_steps)
            milestones = [round(epochs * steps_per_epoch) for epochs in args.lr_milestones]
            warmup_steps = args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                warmup_factor = 1.0
                if warmup_steps:
                    progress = (1 - args.warmup_start) * step / warmup_steps
                    warmup_factor = min(1.0, args.warmup_start + progress)
                reached_milestones = sum(step >= milestone for milestone in milestones)
                return warmup_factor * MILESTONE_FACTOR**reached_milestones

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def main_score(self) -> str | None:
        prefix = list(self.metrics)[-1]
        return prefix + (self.metric.main_score or "")

    def greater_is_better(self, score: str) -> bool:
        for prefix, metric in self.metrics.items():
            if score.startswith(prefix) and not metric.greater_is_better(score.removeprefix(prefix)):
                return False
        return True

    def training_data(self) -> Any:
        return self.train_dataset.samples.files_or_rows()

    def data_settings(self) -> dict[str, Any]:
        return {**super().data_settings(), "task": self.task}

    def scoring_settings(self) -> dict[str, Any]:
        return {**super().scoring_settings(), **self.metric_settings}

    # Evaluation

    def draw(
        self,
        samples: list[dict[str, Any]],
        path: Path,
        maps: Sequence[np.ndarray] = (),
        is_test: bool = False,
    ) -> None:
        detections = []
        for sample in samples:
            detections += self.detect([sample["image"]], SHOWN)
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
        image_processor = self.processing_class
        model = self.accelerator.unwrap_model(self.model).eval()
        options = {"input_data_format": "channels_first", "return_tensors": "pt"}
        if isinstance(image_processor, InputSpecImageProcessor):
            options["input_spec"] = None  # The input spec has been applied on reading.
        inputs = [image_processor(images=[image], **options) for image in images]
        indices_of_shape: dict[torch.Size, list[int]] = {}
        for index, inputs_of_image in enumerate(inputs):
            shape = inputs_of_image["pixel_values"].shape
            indices_of_shape.setdefault(shape, []).append(index)
        detections: list[dict[str, Any]] = [{} for _ in images]
        for indices in indices_of_shape.values():
            batch = {}
            for name in inputs[indices[0]]:
                tensors = [inputs[index][name] for index in indices]
                batch[name] = torch.cat(tensors).to(self.args.device)
            with self.compute_loss_context_manager():
                outputs = model(**batch)
            sizes = [tuple(images[index].shape[-2:]) for index in indices]
            processed = post_process(image_processor, outputs, threshold, sizes)
            for index, detections_of_image in zip(indices, processed):
                detections[index] = detections_of_image
        return detections

    def score(self, batches: Iterable, is_test: bool) -> dict[str, float]:
        for items in batches:
            for item in items:
                if "labels" not in item:
                    raise ValueError(f"Expected annotations for every evaluation sample, {item['id']} has none.")
            detections = self.detect([item["image"] for item in items])
            predictions = []
            references = []
            image_ids = []
            case_ids = []
            for item, detections_of_image in zip(items, detections):
                predictions.append(without_padding(detections_of_image, item))
                references.append(reference(item, self.task))
                image_ids.append(item["id"])
                case_ids.append(item["case"])
            for metric in self.metrics.values():
                metric.add_batch(
                    predictions=predictions,
                    references=references,
                    image_ids=image_ids,
                    case_ids=case_ids,
                )
        scores = {}
        for prefix, metric in self.metrics.items():
            for name, score in name_classes(metric.compute(), self.names).items():
                scores[prefix + name] = score
        return scores


def without_padding(detections: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    """Remove detections with their center in the padding of an image that is moved with its objects.

    See [`~modeling_vitp.tasks.detection.augmentation.moved`].
    """
    if "valid" not in item:
        return detections
    boxes = detections["boxes"].cpu()
    is_oriented = boxes.shape[1] == 5
    if is_oriented:
        centers = boxes[:, :2]
    else:
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    is_valid = lie_in(centers, item["valid"])
    valid_detections = {}
    for name, values in detections.items():
        if isinstance(values, torch.Tensor):
            valid_detections[name] = values.cpu()[is_valid]
        else:
            valid_detections[name] = list(compress(values, is_valid.tolist()))
    return valid_detections


def reference(item: dict[str, Any], task: str) -> dict[str, torch.Tensor]:
    """Return the objects of a sample in the format of the metrics."""
    objects = {
        "labels": item["labels"],
        "difficult": item["difficult"],
        "crowd": item["crowd"],
    }
    if VARIANTS[task].is_oriented:
        objects["corners"] = item["corners"]
        return objects
    if len(item["labels"]):
        boxes = enclosing_boxes(item["corners"])
    else:
        boxes = torch.zeros(0, 4)
    objects["boxes"] = boxes
    if VARIANTS[task].has_masks:
        objects["masks"] = item["masks"]
        areas = item["masks"].sum((1, 2))
    else:
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    has_no_area = item["area"].isnan()
    objects["area"] = torch.where(has_no_area, areas.double(), item["area"])
    return objects


TASK_MODELS = {
    "horizontal": ViTPForObjectDetection,
    "oriented": ViTPForOrientedObjectDetection,
    "instances": ViTPForInstanceSegmentation,
}


def check_detector(
    task: str,
    args: BackboneArguments,
    do_train: bool,
    detector: str = VITP,
) -> None:
    """Check the start of fine-tuning for a detector, see [`~modeling_vitp.tasks.loading.check_start`]."""
    if detector == VITP:
        model_class = TASK_MODELS[task]
    else:
        model_class, _ = DETECTORS[detector]
    check_start(model_class, args, do_train)


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
    args: BackboneArguments,
    settings: DetectionSettings,
    input_spec: dict | None,
    detector: str = VITP,
) -> BaseImageProcessor:
    """Load the image processor of a detector for the image size of training and the input spec of the data.

    See [`~modeling_vitp.tasks.loading.load_image_processor`].
    """
    side = settings.image_size
    if detector != VITP:
        check_settings(detector, side, settings.keep_ratio, input_spec)
        return image_processor_for(detector, args.model_name_or_path, args.model_revision, side)
    if settings.keep_ratio:
        size = {"max_height": side, "max_width": side}
    else:
        size = {"height": side, "width": side}
    return load_image_processor(
        ViTPDetectionImageProcessor,
        args,
        settings.do_train,
        input_spec=input_spec,
        do_resize=True,
        size=size,
    )


def loss_without_values(model: ViTPForObjectDetection, samples: int, size: int) -> torch.Tensor:
    """Return a loss of all outputs of a detector in training, on samples of `size` x `size` pixels without values.

    The boxes that the heads are trained on depend on values. Their number is the largest one, `roi_samples` per image.
    """
    config = model.config
    pixels = torch.zeros(samples, config.backbone_config.num_channels, size, size)
    feature_maps = model.run_backbone(pad_to_multiple(pixels, 32, 32)).feature_maps
    view = model.view(feature_maps)
    finest_map = view.maps[0]
    loss = view.logits.sum() + view.deltas.sum()
    for head in model.box_heads:
        logits, deltas = head(pooled_features(model, finest_map, config.roi_samples, BOX_CELLS))
        loss = loss + logits.sum() + deltas.sum()
    if isinstance(model, ViTPForInstanceSegmentation):
        positives = int(config.roi_samples * config.roi_positive_share)
        mask_logits = model.mask_head(pooled_features(model, finest_map, positives, MASK_CELLS))
        loss = loss + mask_logits.sum()
    return loss


def pooled_features(
    model: ViTPForObjectDetection,
    finest_map: torch.Tensor,
    boxes_per_image: int,
    cells: int,
) -> torch.Tensor:
    """Return the features of empty boxes in each image, pooled to `cells` x `cells`."""
    scale = 1 / STRIDES[0]
    if isinstance(model, ViTPForOrientedObjectDetection):
        boxes = torch.zeros(boxes_per_image, 5)
        return torch.cat([align_in_image(features[None], boxes, cells, scale) for features in finest_map])
    number_of_boxes = len(finest_map) * boxes_per_image
    boxes = torch.zeros(number_of_boxes, 4)
    image_indices = torch.zeros(number_of_boxes, dtype=torch.long)
    return model.align(finest_map, boxes, image_indices, cells, scale)
