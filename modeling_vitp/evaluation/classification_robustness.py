"""Classifiers of images under corruptions: scored as their fine-tuning scores its test split."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from transformers import AutoConfig

from ..classification.arguments import SCORED_WITH
from ..classification.data import ClassificationData
from ..classification.trainer import KINDS, ClassificationTrainer, ClassificationTrainingArguments, files_or_rows
from ..convert.tensor_files import check_finite
from ..image_processing_vitp import ViTPImageProcessor
from ..images.corruptions import CorruptedImages
from ..images.large import weights_digest
from ..modeling_vitp_classification import ViTPForImageClassification
from ..training.fingerprint import fingerprint
from .arguments import RobustnessArguments
from .recorded_task import RecordedTask

MAIN_SCORES = {False: "accuracy", True: "mean_average_precision"}


class ClassificationTask(RecordedTask):
    """A fine-tuned classifier and the images it is scored on; see [`~modeling_vitp.evaluation.robustness.Task`].

    Args:
        name: folder or Hub id of the model.
        args: of the command.

    Raises:
        ValueError: if it is not known what to score on, the data are not complete, the model has other classes, or
            what is given is for maps.
    """

    def __init__(self, name: str, args: RobustnessArguments):
        super().__init__(name, args)
        of_maps = sorted(set(args.scored_with) - {*SCORED_WITH})
        if of_maps:
            raise ValueError(f"{name} is a classifier of images, which has no {', '.join(of_maps)}.")
        data = ClassificationData.from_dict(self.described)
        config = AutoConfig.from_pretrained(name)
        classes = list(config.id2label.values())
        names = data.find_classes([], classes)
        if names != classes or config.problem_type != KINDS[data.multi_label]:
            raise ValueError(
                f"{name} has {len(classes)} classes, {classes}, of {config.problem_type}; the data {len(names)}, "
                f"{names}, of {KINDS[data.multi_label]}."
            )
        self.samples = data.open([self.split])
        files = fingerprint({"images": files_or_rows(self.samples), "labels": str(self.samples.labels.tolist())})
        self.data = {"data": self.described, "split": self.split, "limit": args.limit, "files": files}
        self.samples = self.limited(self.samples, args.limit)
        self.score = args.score or MAIN_SCORES[data.multi_label]
        self.processor = ViTPImageProcessor.from_pretrained(name)
        found = {name: self.configuration.get(name) for name in SCORED_WITH} | args.scored_with
        found = {name: value for name, value in found.items() if value is not None}
        found["image_size"] = self.processor.size["height"]
        loading = {"dataloader_num_workers": args.dataloader_num_workers, "report_to": "none", "disable_tqdm": True}
        self.args = ClassificationTrainingArguments(output_dir=args.output_dir, do_train=False, **loading, **found)
        if self.args.world_size > 1:
            raise ValueError("The robustness of a model is evaluated in one process: start it without a launcher.")

    @cached_property
    def trainer(self) -> ClassificationTrainer:
        model = ViTPForImageClassification.from_pretrained(self.name)
        check_finite(model.state_dict(), self.name)
        return ClassificationTrainer(model, self.args, processing_class=self.processor)

    @property
    def settings(self) -> dict[str, Any]:
        used = {name: getattr(self.args, name) for name in SCORED_WITH}
        return used | {"weights": weights_digest(self.trainer.model)}

    def corrupted(self, corruption: str, severity: int) -> CorruptedImages:
        return CorruptedImages(self.samples, corruption, severity, self.seed)

    def evaluate(self, corruption: str | None, severity: int, update: Callable[..., Any]) -> dict[str, float]:
        return super().evaluate(corruption, severity, partial(update, self.args.per_device_eval_batch_size))
