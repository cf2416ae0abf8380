"""Trainer for semantic segmentation and change detection, with sliding-window evaluation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ...data.classes import LabelEncoding
from ...image_processing_vitp_dense import IGNORE_INDEX, ViTPSegmentationImageProcessor
from ...images.pixels import normalized
from ...metrics.base import gather_parts
from ...metrics.pixel_metrics import PixelMetric
from ...metrics.report import name_classes
from ...modeling_vitp_dense import find_head
from ...training.config import BaseConfig
from ...training.sample_trainer import AugmentedSamples
from ..arguments import BackboneArguments
from ..loading import check_start, load_on_backbone
from ..trainer import FineTuningTrainer
from .arguments import SCORED_WITH, DenseSettings
from .augmentation import Augmentation
from .pictures import draw_predictions
from .prediction import augmented, sliding_window

INPUTS = {1: ("pixel_values",), 2: ("pixel_values_before", "pixel_values_after")}


@dataclass
class ViTPSegmentationTrainingConfig(DenseSettings, BaseConfig, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the settings for semantic segmentation and change detection."""

    unsupported = {"label_smoothing_factor": "it is for image classification. Remove it."}

    def __post_init__(self):
        super().__post_init__()
        self.window = self.window or self.crop_size
        self.stride = self.stride or self.window
        if self.stride > self.window:
            raise ValueError(
                f"stride={self.stride} is larger than window={self.window}. `stride` must be at most `window` to cover "
                "every pixel."
            )


class TrainingSamples(AugmentedSamples):
    """Data set of augmented items of [`~modeling_vitp.tasks.segmentation.data.MaskedImages`]."""

    def __getitem__(self, index: tuple[int, int]) -> dict[str, torch.Tensor]:
        sample, generator = self.sample(index)
        images = [tv_tensors.Image(image) for image in sample["images"]]
        images, mask = self.augmentation(images, tv_tensors.Mask(sample["mask"]), generator.initial_seed())
        inputs = {}
        for name, image in zip(INPUTS[len(images)], images):
            inputs[name] = normalized(image, self.image_processor)
        inputs["labels"] = mask.as_subclass(torch.Tensor).long()
        inputs["id"] = sample["id"]
        return inputs


class ViTPSegmentationTrainer(FineTuningTrainer, Trainer):
    """Trainer for [`~modeling_vitp.ViTPForSemanticSegmentation`] and [`~modeling_vitp.ViTPForChangeDetection`].

    Differences from [`~transformers.Trainer`]:

    - The learning rate decays layer by layer, see [`~modeling_vitp.training.freezing.layer_decay_groups`].
    - Batches and augmentation depend on the seed and the epoch only, not on the number of processes and workers. A run
      that resumes from a checkpoint ends with the same weights as an uninterrupted run.
    - Evaluation predicts one image of any size at a time in windows, and accumulates counts instead of predictions.
      Each process evaluates a part of the images. `test_scales` and `test_flip` apply to the prefix `test` only.
    - After training, the metric `dice` also reports surface distances in millimeters for slices of volumes, if MONAI is
      installed.

    Args:
        model: segmentation or change detection model.
        args: training arguments, [`ViTPSegmentationTrainingConfig`].
        encoding: encoding of the masks, which also gives the class names of the metrics.
        metric: name of a folder of `modeling_vitp/metrics`, or path of a file with a subclass of
            [`~modeling_vitp.metrics.pixel_metrics.PixelMetric`].
        train_dataset, eval_dataset: instances of [`~modeling_vitp.tasks.segmentation.data.MaskedImages`].
        processing_class: image processor with the mean and standard deviation, saved with the model.

    Raises:
        ValueError: if a model with batch norm is trained on batches of one image in a single process.
    """

    counted = "pixels"
    scored_with = SCORED_WITH
    evaluates_one_by_one = True
    fixed = (
        "crop_size",
        "scale_range",
        "max_class_share",
        "horizontal_flip",
        "vertical_flip",
        "rotation",
        "rotation_angle",
        "reflection",
        "photometric",
        "photometric_strengths",
        "exchange_time",
    )

    def __init__(
        self,
        model: PreTrainedModel,
        args: ViTPSegmentationTrainingConfig,
        encoding: LabelEncoding,
        metric: str = "mean_iou",
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: ViTPSegmentationImageProcessor | None = None,
        **kwargs,
    ):
        self.encoding = encoding
        self.names = encoding.names
        self.metric_name = metric
        image_processor = processing_class or ViTPSegmentationImageProcessor()
        if train_dataset is not None:
            train_dataset = augmented_samples(train_dataset, args, image_processor)
        if args.world_size > 1 and args.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif train_dataset is not None and args.per_device_train_batch_size < 2 and has_batch_norm(model):
            raise ValueError(
                "`per_device_train_batch_size` must be at least 2 for a model with batch norm, got "
                f"{args.per_device_train_batch_size}. Halve `gradient_accumulation_steps` to keep the total batch size."
            )
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            **kwargs,
        )
        self.metric = self.load_metric(metric, PixelMetric, ignore_index=IGNORE_INDEX)
        self.metric.set_names(self.names)
        self.surfaces = None
        if self.metric.surface_metric and find_spec("monai"):
            self.surfaces = self.load_metric(self.metric.surface_metric, ignore_index=IGNORE_INDEX)

    # Training

    def scoring_settings(self) -> dict[str, Any]:
        return {**super().scoring_settings(), "metric": self.metric_name}

    def extra_settings(self) -> dict[str, Any]:
        return {**super().extra_settings(), "first and last value of each class in masks": self.encoding.codes()}

    def run_settings(self) -> dict[str, dict[str, Any]]:
        settings = super().run_settings()
        free_settings = {**settings["free"], "class_weights": self.model.config.class_weights}
        return {**settings, "free": free_settings}

    # Evaluation

    def greater_is_better(self, score: str) -> bool:
        if self.surfaces is not None and not self.surfaces.greater_is_better(score):
            return False
        return super().greater_is_better(score)

    def draw(
        self,
        samples: list[dict[str, Any]],
        path: Path,
        maps: Sequence[np.ndarray] = (),
        is_test: bool = False,
    ) -> None:
        predictions = [self.predict_labels(sample["images"], is_test) for sample in samples]
        draw_predictions(
            samples,
            predictions,
            self.encoding,
            path,
            maps,
            self.processing_class.band_names,
        )

    @torch.no_grad()
    def predict_labels(
        self,
        images: list[torch.Tensor],
        is_test: bool = False,
    ) -> np.ndarray:
        """Return class indices, uint8 of shape `(height, width)`.

        Args:
            images: one image, or the two of a pair, see [`~modeling_vitp.images.pixels.to_pixels`].
            is_test: whether `test_scales` and `test_flip` apply.
        """
        args = self.args
        model = self.accelerator.unwrap_model(self.model).eval()
        pixel_values = []
        for image in images:
            pixels = normalized(image.to(args.device), self.processing_class)
            pixel_values.append(pixels[None])

        def logits_of_windows(*windows: torch.Tensor) -> torch.Tensor:
            height, width = windows[0].shape[-2:]
            if args.pad_windows:
                # Zeros are the mean color. Only windows of small images are padded: the others have the full size.
                padding = (0, args.window - width, 0, args.window - height)
                windows = [nn.functional.pad(window, padding) for window in windows]
            with self.compute_loss_context_manager():
                logits = model(*windows).logits
            return logits[..., :height, :width]

        def predict(*pixel_values: torch.Tensor) -> torch.Tensor:
            return sliding_window(
                logits_of_windows,
                pixel_values,
                window=args.window,
                stride=args.stride,
                batch_size=args.per_device_eval_batch_size,
            )

        if is_test:
            predict = augmented(predict, args.test_scales, args.test_flip)
        logits = predict(*pixel_values)
        labels = logits.max(1).indices[0]  # On the CPU, `argmax` is ten times slower.
        return labels.to(torch.uint8).cpu().numpy()

    def score(self, batches: Iterable, is_test: bool) -> dict[str, float]:
        if self.args.world_size > 1:
            # The batch norm statistics differ between processes. All processes must score the model that is saved.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        surfaces = None if self.is_in_train else self.surfaces
        for sample in batches:
            if "mask" not in sample:
                raise ValueError(f"Expected a mask for every evaluation sample, {sample['id']} has none.")
            prediction = self.predict_labels(sample["images"], is_test)
            reference = sample["mask"].numpy()
            case = sample["case"]
            self.metric.add_batch(
                predictions=[prediction],
                references=[reference],
                case_ids=[case],
                group_ids=[sample.get("patient", case)],
            )
            if surfaces is not None and "spacing" in sample:
                surfaces.add_batch(
                    predictions=[prediction],
                    references=[reference],
                    case_ids=[case],
                    spacings=[sample["spacing"]],
                    places=[sample["place"]],
                )
        scores = name_classes(self.metric.compute(), self.names)
        if surfaces is not None:
            scores.update(self._surface_scores())
        return scores

    def _surface_scores(self) -> dict[str, float]:
        """Return the distances of the scored slices of volumes, except those of the background."""
        slices_of_processes = gather_parts(len(self.surfaces), self.args.world_size, "surface_distance")
        if not any(slices_of_processes):
            return {}
        scores = name_classes(self.surfaces.compute(), self.names)
        background = self.names[self.surfaces.background]
        return {key: score for key, score in scores.items() if not key.endswith(f"/{background}")}


def augmented_samples(
    samples: Dataset, args: ViTPSegmentationTrainingConfig, image_processor: ViTPSegmentationImageProcessor
) -> TrainingSamples:
    """Return samples with augmentation, which pads them with the mean color."""
    has_colors = image_processor.band_names is None
    fill = image_processor.image_mean
    if has_colors:
        fill = [255 * value for value in fill]
    augmentation = Augmentation(args, fill, has_colors)
    seed = args.seed if args.data_seed is None else args.data_seed
    return TrainingSamples(
        samples,
        augmentation,
        image_processor,
        seed,
    )


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def check_dense_start(model_class: type[PreTrainedModel], args: BackboneArguments, do_train: bool) -> None:
    """Check the start of fine-tuning and the decode head, see [`~modeling_vitp.tasks.loading.check_start`]."""
    check_start(model_class, args, do_train)
    head_settings = args.head or {}
    decode_head = head_settings.get("decode_head", "upernet")
    find_head(decode_head, head_settings.get("decode_head_kwargs"))


def load_dense_model(
    model_class: type[PreTrainedModel],
    args: BackboneArguments,
    names: list[str],
    class_weights: list[float] | None = None,
    input_spec: dict | None = None,
    image_size: int | None = None,
) -> PreTrainedModel:
    """Load a model on a backbone, see [`~modeling_vitp.tasks.loading.load_on_backbone`].

    Args:
        class_weights: class weights of the loss.
        image_size: side in pixels for which a new model has position embeddings. They are interpolated to it once, and
            trained there, as in the authors' release.
    """
    model = load_on_backbone(
        model_class,
        args,
        names,
        input_spec=input_spec,
        class_weights=class_weights,
        image_size=image_size,
    )
    if "class_weights" not in (args.head or {}):
        model.config.class_weights = class_weights
    return model


def padded_side(side: int) -> int:
    """Return the side in pixels of a square that the model pads to a multiple of 32."""
    return side + -side % 32


def loss_without_values(model: PreTrainedModel, samples: int, size: int) -> torch.Tensor:
    """Return the loss of a model on samples of `size` x `size` pixels without values."""
    pixels = torch.zeros(
        samples,
        model.config.backbone_config.num_channels,
        size,
        size,
    )
    labels = torch.zeros(
        samples,
        size,
        size,
        dtype=torch.long,
    )
    images = [pixels] * model.images_per_sample
    return model(*images, labels=labels).loss
