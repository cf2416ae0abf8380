"""Scores of segmentation and change detection on clean or corrupted images."""

from functools import cached_property
from typing import Any

import evaluate
from torch.utils.data import Subset

from ...auto.registry import find_model
from ...convert.tensor_files import check_finite
from ...image_processing_vitp_dense import ViTPSegmentationImageProcessor
from ...metrics.report import metric_path
from ...opening import open_config
from ..arguments import BackboneArguments
from ..loading import load_image_processor
from ..robustness import RobustnessScorer
from ..robustness_arguments import RobustnessArguments
from .arguments import SCORED_WITH
from .data import DenseData, MaskedImages
from .trainer import ViTPSegmentationTrainer, ViTPSegmentationTrainingConfig


class DenseScorer(RobustnessScorer):
    """Scorer of segmentation and change-detection models, with the scores of fine-tuning."""

    scored_with = SCORED_WITH

    def __init__(self, name: str, args: RobustnessArguments):
        super().__init__(name, args)
        config = open_config(name)
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
