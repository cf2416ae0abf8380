"""Scores of detection on clean or corrupted images."""

from functools import cached_property, partial

from transformers import AutoImageProcessor, AutoModelForObjectDetection

from ...convert.tensor_files import check_finite
from ...opening import open_config, without_remote_code
from ..robustness import RobustnessScorer
from ..robustness_arguments import RobustnessArguments
from .arguments import SCORED_WITH, VARIANTS
from .augmentation import moved
from .data import DetectionData
from .trainer import TASK_MODELS, ViTPDetectionTrainer, ViTPDetectionTrainingConfig


class DetectionScorer(RobustnessScorer):
    """Scorer of detectors for horizontal boxes, oriented boxes or instances, with the scores of fine-tuning."""

    scored_with = SCORED_WITH

    def __init__(self, name: str, args: RobustnessArguments):
        super().__init__(name, args)
        config = open_config(name)
        self.task = "horizontal"  # Detectors of transformers have horizontal boxes.
        for task, model_class in TASK_MODELS.items():
            if model_class.config_class.model_type == config.model_type:
                self.task = task
        self.move = partial(moved, is_oriented=VARIANTS[self.task].is_oriented)
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
        model = without_remote_code(AutoModelForObjectDetection.from_pretrained, self.name)
        check_finite(model.state_dict(), self.name)
        processor = without_remote_code(AutoImageProcessor.from_pretrained, self.name)
        return ViTPDetectionTrainer(model, self.args, self.task, **self.metric, processing_class=processor)
