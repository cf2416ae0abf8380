"""Trainer for image classification, with layer-wise learning rate decay and reproducible augmentation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from ...configuration_vitp_classification import ViTPImageClassificationConfig
from ...data.settings import parts_of
from ...image_processing_vitp import ViTPImageProcessor
from ...images.pixels import normalized
from ...metrics.base import DistributedMetric
from ...metrics.report import name_classes
from ...modeling_vitp_classification import ViTPForImageClassification
from ...opening import read_config_fields
from ...training.config import BaseConfig
from ...training.sample_trainer import AugmentedSamples
from ...vision_towers import pair, tower_of
from ..arguments import StartArguments
from ..loading import load_on_backbone
from ..trainer import FineTuningTrainer
from .arguments import SCORED_WITH, ClassificationSettings
from .augmentation import Augmentation
from .pictures import draw_predictions


@dataclass
class ViTPClassificationTrainingConfig(ClassificationSettings, BaseConfig, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the settings for fine-tuning on image classification."""


class TrainingSamples(AugmentedSamples):
    """Data set of augmented items of [`~modeling_vitp.tasks.classification.data.ClassifiedImages`]."""

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        sample, generator = self.sample(index)
        image = self.augmentation(sample["image"], generator.initial_seed())
        return {
            "pixel_values": normalized(image, self.image_processor),
            "labels": sample["label"],
            "id": sample["id"],
        }


def labels_of(samples: Dataset) -> torch.Tensor:
    """Return the labels of all samples, see [`~modeling_vitp.tasks.classification.data.encode`]."""
    return torch.cat([part.labels for part in parts_of(samples)])


class ViTPClassificationTrainer(FineTuningTrainer, Trainer):
    """Trainer for [`~modeling_vitp.ViTPForImageClassification`].

    Differences from [`~transformers.Trainer`]:

    - The learning rate decays layer by layer, see [`~modeling_vitp.training.freezing.layer_decay_groups`].
    - Batches and augmentation depend on the seed and the epoch only, not on the number of processes and workers. A run
      that resumes from a checkpoint ends with the same weights as an uninterrupted run.
    - Evaluation resizes whole images with the image processor. Each process evaluates a part of the images.

    Args:
        model: image classifier.
        args: training arguments, [`ViTPClassificationTrainingConfig`].
        train_dataset, eval_dataset: instances of [`~modeling_vitp.tasks.classification.data.ClassifiedImages`].
        processing_class: image processor, which also sets the size of evaluated images.
    """

    counted = "images"
    scored_with = SCORED_WITH
    fixed = (
        "image_size",
        "crop_area",
        "horizontal_flip",
        "vertical_flip",
        "quarter_turns",
        "photometric",
        "label_smoothing_factor",
    )

    def __init__(
        self,
        model: ViTPForImageClassification,
        args: ViTPClassificationTrainingConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: ViTPImageProcessor | None = None,
        **kwargs,
    ):
        self.names = list(model.config.id2label.values())
        self.multi_label = model.config.problem_type == "multi_label_classification"
        if self.multi_label and args.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` must be 0 for multi-label classification.")
        side = {"height": args.image_size, "width": args.image_size}
        image_processor = processing_class or ViTPImageProcessor(size=side)
        if train_dataset is not None:
            augmentation = Augmentation(args, of_colors=image_processor.band_names is None)
            seed = args.seed if args.data_seed is None else args.data_seed
            train_dataset = TrainingSamples(train_dataset, augmentation, image_processor, seed)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=image_processor,
            **kwargs,
        )
        self.metric = self.create_metric()

    def create_metric(self) -> DistributedMetric:
        """Return the metric with the main score."""
        return self.load_metric("classification", multi_label=self.multi_label)

    # Training

    def training_data(self) -> Any:
        return super().training_data() | {"labels": str(labels_of(self.train_dataset.samples).tolist())}

    def data_settings(self) -> dict[str, Any]:
        return super().data_settings() | {"pooling": self.model.config.pooling}

    # Evaluation

    def draw(
        self, samples: list[dict[str, Any]], path: Path, maps: Sequence[np.ndarray] = (), is_test: bool = False
    ) -> None:
        probabilities = self.predict([sample["image"] for sample in samples])
        draw_predictions(samples, probabilities, self.names, path, maps, self.processing_class.band_names)

    def patch_features(self, image: torch.Tensor) -> torch.Tensor:
        vit = self.accelerator.unwrap_model(self.model).backbone
        pixels = self.pixels_of([image])
        height, width = pixels.shape[-2:]
        patch_height, patch_width = pair(vit.config.patch_size)
        with self.compute_loss_context_manager():
            (tokens,) = tower_of(vit.config).patch_tokens(vit, pixels)
        return tokens.T.unflatten(1, (height // patch_height, width // patch_width))

    def pixels_of(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Return model inputs for images of any size, see [`~modeling_vitp.images.pixels.to_pixels`]."""
        band_names = self.processing_class.band_names
        inputs = self.processing_class(
            images=images,
            input_data_format="channels_first",
            return_tensors="pt",
            # The intensity window has been applied on reading, so it is left out of the input spec.
            input_spec=None if band_names is None else {"band_names": band_names},
        )
        return inputs["pixel_values"].to(self.args.device)

    @torch.no_grad()
    def predict(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Return class probabilities, float32 of shape `(images, classes)`, on the CPU.

        Args:
            images: images of any size, see [`~modeling_vitp.images.pixels.to_pixels`].
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        with self.compute_loss_context_manager():
            logits = model(self.pixels_of(images)).logits.float()
        probabilities = logits.sigmoid() if self.multi_label else logits.softmax(-1)
        return probabilities.cpu()

    def score(self, batches: Iterable, is_test: bool) -> dict[str, float]:
        for items in batches:
            self.metric.add_batch(
                predictions=self.predict([item["image"] for item in items]),
                references=torch.stack([item["label"] for item in items]),
                case_ids=[item["case"] for item in items],
            )
        return name_classes(self.metric.compute(), self.names)


KINDS = {False: "single_label_classification", True: "multi_label_classification"}


def classes_of(args: StartArguments) -> list[str] | None:
    """Return the class names of a fine-tuned classifier, or `None` if the given model is not one."""
    if args.model_name_or_path is None:
        return None
    settings = read_config_fields(args.model_name_or_path, revision=args.model_revision)
    if settings.get("model_type") != ViTPImageClassificationConfig.model_type:
        return None
    return list(ViTPImageClassificationConfig.from_dict(settings).id2label.values())


def load_classifier(
    args: StartArguments,
    names: list[str],
    multi_label: bool,
    image_size: int,
    input_spec: dict | None = None,
) -> ViTPForImageClassification:
    """Load an image classifier on a backbone, see [`~modeling_vitp.tasks.loading.load_on_backbone`].

    The position embeddings are resampled to the image size.

    Raises:
        ValueError: if the backbone cannot be loaded, or if a fine-tuned model is single-label and the data is
            multi-label, or the reverse.
    """
    kind = KINDS[multi_label]
    settings = {"image_size": image_size, "problem_type": kind}
    model = load_on_backbone(ViTPForImageClassification, args, names, input_spec=input_spec, **settings)
    if model.config.problem_type != kind:
        raise ValueError(
            f"{args.model_name_or_path} is a {model.config.problem_type} model, but the data requires {kind}. "
            "Change `multi_label` in `data`."
        )
    return model


def loss_without_values(model: ViTPForImageClassification, samples: int, size: int) -> torch.Tensor:
    """Return the loss of a model on samples of `size` x `size` pixels without values."""
    pixels = torch.zeros(samples, model.config.backbone_config.num_channels, size, size)
    labels = torch.zeros(samples, dtype=torch.long)
    if model.config.problem_type == "multi_label_classification":
        labels = torch.zeros(samples, model.config.num_labels)
    return model(pixels, labels=labels).loss
