"""Scores of classification on clean or corrupted images."""

from functools import cached_property

from ...convert.tensor_files import check_finite
from ...image_processing_vitp import ViTPImageProcessor
from ...modeling_vitp_classification import ViTPForImageClassification
from ...opening import open_config
from ..robustness import RobustnessScorer
from ..robustness_arguments import RobustnessArguments
from .arguments import SCORED_WITH
from .data import ClassificationData
from .trainer import KINDS, ViTPClassificationTrainer, ViTPClassificationTrainingConfig


class ClassificationScorer(RobustnessScorer):
    """Scorer of image classifiers, with the scores of fine-tuning."""

    scored_with = SCORED_WITH
    main_scores = {False: "accuracy", True: "mean_average_precision"}  # By whether the data are multi-label.

    def __init__(self, name: str, args: RobustnessArguments):
        super().__init__(name, args)
        data = ClassificationData.from_dict(self.described)
        config = open_config(name)
        classes = list(config.id2label.values())
        problem_type = KINDS[data.multi_label]
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
        self.args = ViTPClassificationTrainingConfig(**settings)
        self.images_per_step = self.args.per_device_eval_batch_size

    @cached_property
    def trainer(self) -> ViTPClassificationTrainer:
        model = ViTPForImageClassification.from_pretrained(self.name)
        check_finite(model.state_dict(), self.name)
        return ViTPClassificationTrainer(model, self.args, processing_class=self.processor)
