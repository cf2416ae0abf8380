"""HF `Trainer` for classifiers of images: layer-wise decay, augmentation by epoch, scores of whole images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from transformers import PreTrainedConfig, Trainer, TrainingArguments

from ..configuration_vitp_classification import ViTPImageClassificationConfig
from ..image_processing_vitp import ViTPImageProcessor
from ..images.pixels import normalized
from ..metrics.report import METRICS_FOLDER, name_classes
from ..modeling_vitp_classification import ViTPForImageClassification
from ..training.batching import share
from ..training.fine_tuning import FineTuner, load_on_backbone
from ..training.vitp_config import BaseConfig
from ..vrl import keyed_generator
from .arguments import SCORED_WITH, ClassificationModelArguments, ClassificationSettings
from .augmentation import Augmentation
from .data import ClassifiedImages, FileImages
from .pictures import draw_predictions


@dataclass
class ClassificationTrainingArguments(ClassificationSettings, BaseConfig, TrainingArguments):
    """[`~transformers.TrainingArguments`] with what fine-tuning for classes needs."""

    def __post_init__(self):
        super().__post_init__()
        self.remove_unused_columns = False  # the ids of samples, for a step that fails


class TrainingSamples(Dataset):
    """Augmented samples for a model. An index is a pair, epoch and place: what it gives is random by these alone.

    Args:
        samples: see [`~modeling_vitp.classification.data.ClassifiedImages`].
        image_processor: for mean and standard deviation.
    """

    def __init__(self, samples: Dataset, augmentation: Augmentation, image_processor: ViTPImageProcessor, seed: int):
        self.samples, self.augmentation = samples, augmentation
        self.image_processor, self.seed = image_processor, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        epoch, place = index
        sample = self.samples[place]
        seed = keyed_generator(self.seed, sample["id"], epoch, "augmentation").initial_seed()
        pixels = normalized(self.augmentation(sample["image"], seed), self.image_processor)
        return {"pixel_values": pixels, "labels": sample["label"], "id": sample["id"]}


def parts_of(samples: Dataset) -> list[ClassifiedImages]:
    """The splits that samples are of."""
    return list(samples.datasets) if isinstance(samples, ConcatDataset) else [samples]


def labels_of(samples: Dataset) -> torch.Tensor:
    """The classes of all samples, see [`~modeling_vitp.classification.data.encode`]."""
    return torch.cat([part.labels for part in parts_of(samples)])


def files_or_rows(samples: ClassifiedImages) -> Any:
    """What samples are read from: the paths of files, or rows."""
    return samples.paths() if isinstance(samples, FileImages) else samples.rows


class ClassificationTrainer(FineTuner, Trainer):
    """Trains [`~modeling_vitp.ViTPForImageClassification`].

    What differs from [`~transformers.Trainer`]:

    - the learning rate decays layer by layer, see [`~modeling_vitp.training.freezing.layer_decay_groups`];
    - batches and augmentation are functions of the seed and the epoch, whatever the number of processes and workers,
      and a run that goes on from a checkpoint ends as the run that never stopped;
    - evaluation resizes whole images as the image processor does. Each process has its part of the images.

    Args:
        model: a classifier.
        args: [`ClassificationTrainingArguments`].
        train_dataset, eval_dataset: see [`~modeling_vitp.classification.data.ClassifiedImages`].
        processing_class: the image processor, which also has the size that images are brought to.
    """

    counted = "images"
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
        args: ClassificationTrainingArguments,
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
        self.metric = evaluate.load(
            str(METRICS_FOLDER / "classification"),
            num_labels=len(self.names),
            multi_label=self.multi_label,
            num_process=args.world_size,
            process_id=args.process_index,
        )

    # Training

    def training_data(self) -> Any:
        samples = self.train_dataset.samples
        found = {f"split {number}": files_or_rows(part) for number, part in enumerate(parts_of(samples), start=1)}
        return {**found, "labels": str(labels_of(samples).tolist())}

    def record(
        self,
        argv: Sequence[str] | None,
        sources: Sequence[str | None],
        data: list[dict[str, Any]],
        evaluated_on: dict[str, Any] | None,
    ) -> None:
        scored_with = {name: getattr(self.args, name) for name in SCORED_WITH}
        super().record(argv, sources, data, evaluated_on and evaluated_on | {"scored_with": scored_with})

    def data_settings(self) -> dict[str, Any]:
        return super().data_settings() | {"pooling": self.model.config.pooling}

    # Evaluation

    def draw_samples(self, samples: list[dict[str, Any]], path: Path) -> None:
        images = [sample["image"] for sample in samples]
        maps = self.component_maps([[image] for image in images], path.parent)
        draw_predictions(samples, self.predict(images), self.names, path, maps, self.processing_class.band_names)

    def draw_results(self, samples: list[dict[str, Any]], path: Path) -> None:
        scores = self.predict([sample["image"] for sample in samples])
        draw_predictions(samples, scores, self.names, path, band_names=self.processing_class.band_names)

    def patch_features(self, image: torch.Tensor) -> torch.Tensor:
        pixels = self.pixels_of([image])
        rows, columns = (side // patch for side, patch in zip(pixels.shape[-2:], self.patch_size))
        with self.compute_loss_context_manager():
            tokens = self.accelerator.unwrap_model(self.model).backbone(pixels).last_hidden_state[0, 1:]
        return tokens.T.unflatten(1, (rows, columns))

    @property
    def patch_size(self) -> Sequence[int]:
        return self.accelerator.unwrap_model(self.model).config.backbone_config.patch_size

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """This process's part of the images, in lists of `per_device_eval_batch_size`; their sizes differ."""
        dataset, args = self.eval_dataset if eval_dataset is None else eval_dataset, self.args
        mine = Subset(dataset, share(range(len(dataset)), args.world_size, args.process_index))
        return DataLoader(
            mine, args.per_device_eval_batch_size, collate_fn=list, num_workers=args.dataloader_num_workers
        )

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


def classes_of(args: ClassificationModelArguments) -> list[str] | None:
    """The names of the classes of the fine-tuned model that is given; `None` where it is none."""
    if args.model_name_or_path is None:
        return None
    settings = PreTrainedConfig.get_config_dict(args.model_name_or_path, revision=args.model_revision)[0]
    if settings.get("model_type") != ViTPImageClassificationConfig.model_type:
        return None
    return list(ViTPImageClassificationConfig.from_dict(settings).id2label.values())


def load_classifier(
    args: ClassificationModelArguments,
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


def load_image_processor(
    args: ClassificationModelArguments, input_spec: dict | None, image_size: int
) -> ViTPImageProcessor:
    """With the backbone's mean and standard deviation, the input spec of the data, and the size of training."""
    own = {"input_spec": input_spec, "size": {"height": image_size, "width": image_size}}
    if args.model_name_or_path is None:
        return ViTPImageProcessor(**own)
    return ViTPImageProcessor.from_backbone(args.model_name_or_path, revision=args.model_revision, **own)
