"""Tasks of the robustness evaluation: fine-tuned models with their test images, clean or corrupted."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import evaluate
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
)

from ..auto.registry import find_model
from ..cards.record import read_record
from ..convert.tensor_files import check_finite
from ..image_processing_vitp import ViTPImageProcessor
from ..image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ..images.corruptions import CorruptedImages, move_mask
from ..images.large import weights_digest
from ..input_spec import InputSpec
from ..metrics.report import metric_path
from ..modeling_vitp_classification import ViTPForImageClassification
from ..tasks.arguments import BackboneArguments
from ..tasks.classification import arguments as classification
from ..tasks.classification import trainer as classifying
from ..tasks.classification.data import ClassificationData
from ..tasks.detection import arguments as detection
from ..tasks.detection.augmentation import moved
from ..tasks.detection.data import DetectionData
from ..tasks.detection.trainer import TASK_MODELS, ViTPDetectionTrainer, ViTPDetectionTrainingConfig
from ..tasks.loading import load_image_processor
from ..tasks.segmentation import arguments as dense
from ..tasks.segmentation.data import DenseData, MaskedImages
from ..tasks.segmentation.trainer import ViTPSegmentationTrainer, ViTPSegmentationTrainingConfig
from ..training.resuming import fingerprint_data
from .arguments import RobustnessArguments


class ProgressCallback(TrainerCallback):
    """Callback that reports the number of images of each batch.

    Args:
        update: function that is called with the number.
        num_images: number of all images.
        images_per_step: number of images of each batch but the last one.
    """

    def __init__(self, update: Callable[[int], Any], num_images: int, images_per_step: int):
        self.update = update
        self.remaining_images = num_images
        self.images_per_step = images_per_step

    def on_prediction_step(self, args, state, control, **kwargs):
        images_in_step = min(self.images_per_step, self.remaining_images)
        self.remaining_images -= images_in_step
        self.update(images_in_step)


class RobustnessTask:
    """Base class of the tasks: a fine-tuned model with its test images.

    Settings that are missing in the arguments are taken from the configuration that they name, or else from the record
    of the model's run. A subclass sets `samples`, `data`, `score` and `args`, and implements `trainer`.

    Args:
        name: folder or Hub id of the model.
        args: arguments of the command.

    Attributes:
        data: description of the images and annotations, which must be the same for all models.
        move: function that moves the annotations of a sample, see
            [`~modeling_vitp.images.corruptions.CorruptedImages`].
        score: key of the metric that is compared.
        args: training arguments with the evaluation settings.
        samples: clean images with their annotations.
        trainer: trainer of the model. It is loaded on first use, so that one model at a time is in memory.

    Raises:
        ValueError: If the test data are unknown or incomplete, or the model does not match them.
    """

    scored_with: tuple[str, ...]
    images_per_step = 1
    move = staticmethod(move_mask)
    data: dict[str, Any]
    score: str
    samples: Dataset
    trainer: Trainer

    def __init__(self, name: str, args: RobustnessArguments):
        self.name = name
        self.seed = args.seed
        self.configuration = args.configuration or recorded_configuration(name)
        self.described = args.data or self.configuration.get("data")
        self.split = args.split or self.configuration.get("test_split") or self.configuration.get("eval_split")
        for option, setting in (("data", self.described), ("split", self.split)):
            if setting is None:
                raise ValueError(f"{name} has no record of the {option} it was scored on. Set --{option}.")
        if args.data_root:
            self.described = {**self.described, "root": args.data_root}

    def _set_samples(self, samples: Dataset, files: Any, limit: int | None) -> None:
        self.samples = samples
        if limit is not None and limit < len(samples):
            indices = [number * len(samples) // limit for number in range(limit)]
            self.samples = Subset(samples, indices)
        self.data = {
            "data": self.described,
            "split": self.split,
            "limit": limit,
            "files": fingerprint_data(files),
        }

    def _check_bands_and_classes(self, config: PreTrainedConfig, names: list[str], input_spec: dict | None) -> None:
        if input_spec is not None and InputSpec.from_dict(input_spec).band_names is not None:
            raise ValueError(f"Corruptions need the bands red, green and blue, but {self.name} takes other bands.")
        classes = list(config.id2label.values())
        default_names = [f"LABEL_{index}" for index in range(len(names))]  # Converted checkpoints have such names.
        if classes not in (names, default_names):
            raise ValueError(
                f"Expected the {len(names)} classes of the data, {names}, got {len(classes)} classes of {self.name}: "
                f"{classes}."
            )

    def _scoring_settings(self, args: RobustnessArguments, *more: str) -> dict[str, Any]:
        names = [*more, *self.scored_with]
        unsupported_names = sorted(set(args.scored_with) - set(names))
        if unsupported_names:
            raise ValueError(f"{', '.join(unsupported_names)}: not supported for {self.name}. Leave it out.")
        settings = {
            "output_dir": args.output_dir,
            "do_train": False,
            "dataloader_num_workers": args.dataloader_num_workers,
            "report_to": "none",
            "disable_tqdm": True,
        }
        for name in names:
            setting = args.scored_with.get(name, self.configuration.get(name))
            if setting is not None:
                settings[name] = setting
        return settings

    @property
    def settings(self) -> dict[str, Any]:
        """Settings on which the scores depend in addition to the data: those of prediction, and a hash of weights."""
        settings = {name: getattr(self.args, name) for name in self.scored_with}
        settings["weights"] = weights_digest(self.trainer.model)
        return settings

    @property
    def greater_is_better(self) -> bool:
        """Return whether a higher score is better."""
        return self.trainer.greater_is_better(self.score)

    def __len__(self) -> int:
        return len(self.samples)

    def evaluate(self, corruption: str | None, severity: int, update: Callable[[int], Any]) -> dict[str, float]:
        """Return all metrics of corrupted images.

        Random draws depend on the seed, the image and the corruption alone. Annotations move with the images, see
        [`~modeling_vitp.images.corruptions.motion`].

        Args:
            corruption: name of the corruption; `None` for clean images.
            severity: severity from 1 to 5.
            update: function that is called with the number of images after each batch.
        """
        samples = self.samples
        if corruption is not None:
            samples = CorruptedImages(samples, corruption, severity, self.seed, self.move)
        progress = ProgressCallback(update, len(samples), self.images_per_step)
        self.trainer.add_callback(progress)
        try:
            loader = self.trainer.get_eval_dataloader(samples)
            output = self.trainer.evaluation_loop(loader, self.name, metric_key_prefix="test")
        finally:
            self.trainer.remove_callback(progress)
        return {name.removeprefix("test_"): value for name, value in output.metrics.items()}


def recorded_configuration(name: str) -> dict[str, Any]:
    """Return the evaluation settings in the record of a model's run, as a fine-tuning configuration."""
    record = read_record(name).get("evaluated_on") or {}
    settings = record.get("scored_with") or {}
    return {
        "data": record.get("data"),
        "test_split": record.get("test"),
        "eval_split": record.get("eval"),
        **settings,
    }


class DenseTask(RobustnessTask):
    """Task of segmentation and change-detection models, with the scores of fine-tuning."""

    scored_with = dense.SCORED_WITH

    def __init__(self, name: str, args: RobustnessArguments):
        super().__init__(name, args)
        config = AutoConfig.from_pretrained(name)
        entry = find_model(config.model_type)
        self.model_class = entry.model_class
        data = DenseData.from_dict(self.described)
        self.encoding = data.encoding
        self.image_spec = data.image_spec
        samples = data.open([self.split])
        self._check_bands_and_classes(config, self.encoding.names, self.image_spec)
        self._check_samples(samples)
        self._set_samples(samples, samples.files_or_rows(), args.limit)
        settings = self._scoring_settings(args, "crop_size", "metric")
        self.metric = settings.pop("metric", entry.metric)
        metric = evaluate.load(metric_path(self.metric), num_labels=len(self.encoding.names))
        self.score = args.score or metric.main_score
        if self.score is None:
            raise ValueError(f"The metric {self.metric} has no `main_score`. Set --score to one of its values.")
        self.args = ViTPSegmentationTrainingConfig(**settings)

    def _check_samples(self, samples: MaskedImages) -> None:
        if samples.mask(0) is None:
            raise ValueError(f"Split {self.split!r} needs masks for scoring.")
        num_images = len(samples[0]["images"])
        expected = self.model_class.images_per_sample
        if num_images != expected:
            raise ValueError(
                f"{self.name} takes {expected} image(s), but a sample of split {self.split!r} has {num_images}."
            )

    @cached_property
    def trainer(self) -> ViTPSegmentationTrainer:
        model = self.model_class.from_pretrained(self.name)
        check_finite(model.state_dict(), self.name)
        start = BackboneArguments(model_name_or_path=self.name)
        processor = load_image_processor(ViTPSegmentationImageProcessor, start, input_spec=self.image_spec)
        trainer = ViTPSegmentationTrainer(
            model,
            self.args,
            self.encoding,
            self.metric,
            processing_class=processor,
        )
        if isinstance(self.samples, Subset):
            trainer.surfaces = None  # Surface metrics need whole volumes.
        return trainer

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "metric": self.metric}


class ClassificationTask(RobustnessTask):
    """Task of image classifiers, with the scores of fine-tuning."""

    scored_with = classification.SCORED_WITH
    main_scores = {False: "accuracy", True: "mean_average_precision"}  # By whether the data are multi-label.

    def __init__(self, name: str, args: RobustnessArguments):
        super().__init__(name, args)
        data = ClassificationData.from_dict(self.described)
        config = AutoConfig.from_pretrained(name)
        classes = list(config.id2label.values())
        problem_type = classifying.KINDS[data.multi_label]
        names = data.find_classes([], classes)
        if names != classes or config.problem_type != problem_type:
            raise ValueError(
                f"Expected the {len(names)} classes of the data, {names}, with {problem_type}, got {len(classes)} "
                f"classes of {name}, {classes}, with {config.problem_type}."
            )
        samples = data.open([self.split])
        files = {
            "images": samples.files_or_rows(),
            "labels": str(samples.labels.tolist()),
        }
        self._set_samples(samples, files, args.limit)
        self.score = args.score or self.main_scores[data.multi_label]
        self.processor = ViTPImageProcessor.from_pretrained(name)
        settings = self._scoring_settings(args)
        settings["image_size"] = self.processor.size["height"]
        self.args = classifying.ViTPClassificationTrainingConfig(**settings)
        self.images_per_step = self.args.per_device_eval_batch_size

    @cached_property
    def trainer(self) -> classifying.ViTPClassificationTrainer:
        model = ViTPForImageClassification.from_pretrained(self.name)
        check_finite(model.state_dict(), self.name)
        return classifying.ViTPClassificationTrainer(model, self.args, processing_class=self.processor)


class DetectionTask(RobustnessTask):
    """Task of detectors for horizontal boxes, oriented boxes or instances, with the scores of fine-tuning."""

    scored_with = detection.SCORED_WITH

    def __init__(self, name: str, args: RobustnessArguments):
        super().__init__(name, args)
        config = AutoConfig.from_pretrained(name)
        self.task = "horizontal"  # Detectors of transformers have horizontal boxes.
        for task, model_class in TASK_MODELS.items():
            if model_class.config_class.model_type == config.model_type:
                self.task = task
        self.move = partial(moved, is_oriented=detection.VARIANTS[self.task].is_oriented)
        data = DetectionData.from_dict(self.described)
        self._check_bands_and_classes(config, data.names.names, data.input_spec)
        samples = data.open([self.split], self.task)
        if any(place.objects is None for place in samples.places):
            raise ValueError(f"Split {self.split!r} needs annotations for scoring.")
        self._set_samples(samples, samples.files_or_rows(), args.limit)
        settings = self._scoring_settings(args, "metric", "metric_options")
        self.metric = {
            "metric": settings.pop("metric", None),
            "metric_options": settings.pop("metric_options", {}),
        }
        if args.metric is not None:
            self.metric["metric_options"] = {}  # The options of the run belong to its metric.
        self.data.update(task=self.task, **self.metric)
        self.args = ViTPDetectionTrainingConfig(**settings)
        self.images_per_step = self.args.per_device_eval_batch_size
        main_score = "mask_map" if self.task == "instances" else "map"
        self.score = args.score or main_score

    @cached_property
    def trainer(self) -> ViTPDetectionTrainer:
        model = AutoModelForObjectDetection.from_pretrained(self.name)
        check_finite(model.state_dict(), self.name)
        processor = AutoImageProcessor.from_pretrained(self.name)
        return ViTPDetectionTrainer(model, self.args, self.task, **self.metric, processing_class=processor)


# Tasks by the `robustness_task` of a registered model type.
TASKS = {"classification": ClassificationTask, "dense": DenseTask, "detection": DetectionTask}
