"""Segmentation and change detection under corruptions: scored as their fine-tuning scores its test split."""

from functools import cached_property
from typing import Any

import evaluate
from torch.utils.data import Subset
from transformers import AutoConfig, PreTrainedConfig

from ..auto.registry import find_model
from ..convert.tensor_files import check_finite
from ..dense.arguments import SCORED_WITH, DenseModelArguments
from ..dense.data import DenseData, MaskedImages
from ..dense.trainer import DenseTrainer, DenseTrainingArguments, files_or_rows, load_image_processor
from ..images.corruptions import CorruptedImages
from ..images.large import weights_digest
from ..input_spec import InputSpec
from ..metrics.report import metric_path
from ..training.fingerprint import fingerprint
from .arguments import RobustnessArguments
from .recorded_task import RecordedTask


class DenseTask(RecordedTask):
    """A fine-tuned model and the images it is scored on; see [`~modeling_vitp.evaluation.robustness.Task`].

    Args:
        name: folder or Hub id of the model.
        args: of the command.

    Raises:
        ValueError: if it is not known what to score on, the data are not complete or have no masks, or the model has
            other classes or takes another number of images.
    """

    def __init__(self, name: str, args: RobustnessArguments):
        super().__init__(name, args)
        config = AutoConfig.from_pretrained(name)
        entry = find_model(config.model_type)
        self.model_class = entry.model_class
        data = DenseData.from_dict(self.described)
        self.encoding, self.image_spec = data.encoding, data.image_spec
        self.samples = data.open([self.split])
        self._check(config, self.samples)
        files = fingerprint(files_or_rows(self.samples))
        self.data = {"data": self.described, "split": self.split, "limit": args.limit, "files": files}
        self.samples = self.limited(self.samples, args.limit)

        found = {
            name: self.configuration.get(name) for name in ("crop_size", "metric", *SCORED_WITH)
        } | args.scored_with
        found = {name: value for name, value in found.items() if value is not None}
        self.metric = found.pop("metric", entry.metric)
        main_score = evaluate.load(metric_path(self.metric), num_labels=len(self.encoding.names)).main_score
        self.score = args.score or main_score
        if self.score is None:
            raise ValueError(f"The metric {self.metric} has no `main_score`. Set --score to one of its values.")
        loading = {"dataloader_num_workers": args.dataloader_num_workers, "report_to": "none", "disable_tqdm": True}
        self.args = DenseTrainingArguments(output_dir=args.output_dir, do_train=False, **loading, **found)
        if self.args.world_size > 1:
            raise ValueError("The robustness of a model is evaluated in one process: start it without a launcher.")

    def _check(self, config: PreTrainedConfig, samples: MaskedImages) -> None:
        if InputSpec.from_dict(self.image_spec).band_names is not None:
            raise ValueError(f"{self.name} takes other bands than red, green and blue, which alone can be corrupted.")
        names, classes = self.encoding.names, list(config.id2label.values())
        unnamed = [f"LABEL_{index}" for index in range(len(names))]  # as in converted checkpoints
        if classes not in (names, unnamed):
            raise ValueError(f"{self.name} has {len(classes)} classes, {classes}, but the data {len(names)}: {names}.")
        if samples.mask(0) is None:
            raise ValueError(f"Split {self.split!r} has no masks, so nothing can be scored.")
        given, taken = len(samples[0]["images"]), self.model_class.images_per_sample
        if given != taken:
            raise ValueError(f"{self.name} takes {taken} image(s), but a sample of split {self.split!r} has {given}.")

    @cached_property
    def trainer(self) -> DenseTrainer:
        model = self.model_class.from_pretrained(self.name)
        check_finite(model.state_dict(), self.name)
        processor = load_image_processor(DenseModelArguments(model_name_or_path=self.name), self.image_spec)
        trainer = DenseTrainer(model, self.args, self.encoding, self.metric, processing_class=processor)
        if isinstance(self.samples, Subset):
            trainer.surfaces = None  # they are of whole volumes
        return trainer

    @property
    def settings(self) -> dict[str, Any]:
        used = {name: getattr(self.args, name) for name in SCORED_WITH}
        return used | {"metric": self.metric, "weights": weights_digest(self.trainer.model)}

    def corrupted(self, corruption: str, severity: int) -> CorruptedImages:
        return CorruptedImages(self.samples, corruption, severity, self.seed)
