"""HF `Trainer` for classifiers of images: layer-wise decay, augmentation by epoch, scores of whole images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from ..configuration_vitp_classification import ViTPImageClassificationConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..images.pixels import normalized
from ..metrics.report import name_classes
from ..modeling_vitp_classification import ViTPForImageClassification
from ..training.arguments import StartArguments
from ..training.fine_tuning import AugmentedSamples, FineTuningTrainer, load_on_backbone
from ..training.fine_tuning_data import parts_of
from ..training.vitp_config import BaseConfig
from .arguments import SCORED_WITH, ClassificationSettings
from .augmentation import Augmentation
from .pictures import draw_predictions


@dataclass
class ViTPClassificationTrainingConfig(ClassificationSettings, BaseConfig, TrainingArguments):
    """[`~transformers.TrainingArguments`] with what fine-tuning for classes needs."""


class TrainingSamples(AugmentedSamples):
    """Augmented items of [`~modeling_vitp.classification.data.ClassifiedImages`]."""

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        sample, generator = self.sample(index)
        image = self.augmentation(sample["image"], generator.initial_seed())
        return {
            "pixel_values": normalized(image, self.image_processor),
            "labels": sample["label"],
            "id": sample["id"],
        }


def labels_of(samples: Dataset) -> torch.Tensor:
    """The classes of all samples, see [`~modeling_vitp.classification.data.encode`]."""
    return torch.cat([part.labels for part in parts_of(samples)])


class ViTPClassificationTrainer(FineTuningTrainer, Trainer):
    """Trains [`~modeling_vitp.ViTPForImageClassification`].

    What differs from [`~transformers.Trainer`]:

    - the learning rate decays layer by layer, see [`~modeling_vitp.training.freezing.layer_decay_groups`];
    - batches and augmentation are functions of the seed and the epoch, whatever the number of processes and workers,
      and a run that goes on from a checkpoint ends as the run that never stopped;
    - evaluation resizes whole images as the image processor does. Each process has its part of the images.

    Args:
        model: a classifier.
        args: [`ViTPClassificationTrainingConfig`].
        train_dataset, eval_dataset: see [`~modeling_vitp.classification.data.ClassifiedImages`].
        processing_class: the image processor, which also has the size that images are brought to.
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
            raise ValueError("label_smoothing_factor is for one label an image, and these may have several.")
        side = {"height": args.image_size, "width": args.image_size}
        image_processor = processing_class or ViTPImageProcessor(size=side)
        if train_dataset is not None:
            flips = args.horizontal_flip, args.vertical_flip
            colors = args.photometric, image_processor.band_names is None
            augmentation = Augmentation(args.image_size, args.crop_area, flips, args.quarter_turns, *colors)
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
        self.metric = self.load_metric("classification", multi_label=self.multi_label)

    # Training

    def training_data(self) -> Any:
        return super().training_data() | {"labels": str(labels_of(self.train_dataset.samples).tolist())}

    def data_settings(self) -> dict[str, Any]:
        return super().data_settings() | {"pooling": self.model.config.pooling}

    # Evaluation

    def draw(
        self, samples: list[dict[str, Any]], path: Path, maps: Sequence[np.ndarray] = (), is_test: bool = False
    ) -> None:
        scores = self.predict([sample["image"] for sample in samples])
        draw_predictions(samples, scores, self.names, path, maps, self.processing_class.band_names)

    def patch_features(self, image: torch.Tensor) -> torch.Tensor:
        pixels = self.pixels_of([image])
        rows, columns = (side // patch for side, patch in zip(pixels.shape[-2:], self.patch_size))
        with self.compute_loss_context_manager():
            tokens = self.accelerator.unwrap_model(self.model).backbone(pixels).last_hidden_state[0, 1:]
        return tokens.T.unflatten(1, (rows, columns))

    @property
    def patch_size(self) -> Sequence[int]:
        return self.accelerator.unwrap_model(self.model).config.backbone_config.patch_size

    def pixels_of(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Images of any size, see [`~modeling_vitp.images.pixels.to_pixels`], as the model takes them."""
        names = self.processing_class.band_names
        read = {"input_spec": None if names is None else {"band_names": names}}  # they are windowed already
        inputs = self.processing_class(images=images, input_data_format="channels_first", return_tensors="pt", **read)
        return inputs["pixel_values"].to(self.args.device)

    @torch.no_grad()
    def predict(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Probabilities of the classes, float32 of shape `(images, classes)`, on the CPU.

        Args:
            images: of any sizes, see [`~modeling_vitp.images.pixels.to_pixels`].
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        with self.compute_loss_context_manager():
            logits = model(self.pixels_of(images)).logits.float()
        return (logits.sigmoid() if self.multi_label else logits.softmax(-1)).cpu()

    def score(self, batches: Iterable, is_test: bool) -> dict[str, float]:
        for items in batches:
            scores = self.predict([item["image"] for item in items])
            self.metric.add_batch(predictions=scores, references=torch.stack([item["label"] for item in items]))
        return name_classes(self.metric.compute(), self.names)


KINDS = {False: "single_label_classification", True: "multi_label_classification"}


def classes_of(args: StartArguments) -> list[str] | None:
    """The names of the classes of the fine-tuned model that is given; `None` where it is none."""
    if args.model_name_or_path is None:
        return None
    settings = PreTrainedConfig.get_config_dict(args.model_name_or_path, revision=args.model_revision)[0]
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
    """See [`~modeling_vitp.training.fine_tuning.load_on_backbone`]; positions are resampled to the image size.

    Raises:
        ValueError: as there, and if a fine-tuned model is of the other kind, of one label or several.
    """
    kind = KINDS[multi_label]
    settings = {"image_size": image_size, "problem_type": kind}
    model = load_on_backbone(ViTPForImageClassification, args, names, input_spec=input_spec, **settings)
    if model.config.problem_type != kind:
        raise ValueError(
            f"{args.model_name_or_path} is of {model.config.problem_type}, and the data are of {kind}: see "
            "`multi_label` in `data`."
        )
    return model
