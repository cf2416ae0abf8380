"""Semantic segmentation of images, and change detection on pairs of images of the same place."""

from typing import ClassVar

from ..base import FineTuningOptions, Task, register_task
from .arguments import DenseArguments, DenseSettings


@register_task("segmentation")
class SegmentationTask(Task):
    """Semantic segmentation of images.

    Attributes:
        model_type: model type of its models.
        other_command: command for the data of the other subclass, which the error names.
    """

    arguments = DenseArguments
    settings = DenseSettings
    training_config = "modeling_vitp.tasks.segmentation.trainer.ViTPSegmentationTrainingConfig"
    image_side = "crop_size"
    model_type: ClassVar[str] = "vitp_segmentation"
    other_command: ClassVar[str] = "vitp finetune_change_detection"

    @property
    def entry(self):
        """Declaration of the model type."""
        from ...auto.registry import find_model

        return find_model(self.model_type)

    def check_start(self, options):
        from .trainer import check_dense_start

        check_dense_start(self.entry.model_class, options.start, options.training.do_train)

    def open_data(self, options):
        from .data import DenseData

        return DenseData.from_arguments(options.data, options.training.output_dir)

    def check_splits(self, data, splits, options):
        for split in splits:
            data.split_settings(split)  # raises an error for an unknown split
        super().check_splits(data, splits, options)

    def check_samples(self, data, samples, options):
        from .data import count_pixels

        self.check_images(samples)
        if samples["train"] is None:
            return {}
        names, num_workers = data.encoding.names, options.training.dataloader_num_workers
        pixels = count_pixels(samples["train"], names, num_workers)
        for role, kind in (("eval", "evaluation"), ("test", "test")):
            if samples[role] is not None:  # A bad mask would stop the run when it is scored.
                count_pixels(samples[role], names, num_workers, kind)
        return {"train_pixels": pixels}

    def check_images(self, samples):
        """Raise a `ValueError` if samples are pairs of images instead of images, or the reverse."""
        expected = self.entry.model_class.images_per_sample
        for of_role in samples.values():
            if of_role is None:
                continue
            number = len(of_role[0]["images"])
            if number != expected:
                raise ValueError(f"Expected {expected} image(s) in a sample, got {number}. Use {self.other_command}.")

    def load_model(self, data, options, checked):
        from .data import class_weights
        from .trainer import load_dense_model

        weights = None
        if "train_pixels" in checked:
            weights = class_weights(options.data.class_weights, checked["train_pixels"])
        model_class = self.entry.model_class
        model = load_dense_model(model_class, options.start, data.encoding.names, weights, data.image_spec)
        model.config.volume_plane = data.plane
        return model

    def create_trainer(self, model, data, samples, options):
        from ...image_processing_vitp_dense import ViTPSegmentationImageProcessor
        from ..loading import load_image_processor
        from .trainer import ViTPSegmentationTrainer

        image_processor = load_image_processor(
            ViTPSegmentationImageProcessor, options.start, input_spec=data.image_spec
        )
        return ViTPSegmentationTrainer(
            model,
            options.training,
            data.encoding,
            options.data.metric or self.entry.metric,
            train_dataset=samples["train"],
            eval_dataset=samples["eval"],
            processing_class=image_processor,
        )

    def write_submission(self, trainer, data, options: FineTuningOptions):
        from .prediction import write_submission

        write_submission(trainer, data, options.data.submission)

    def loss(self, model, number, side):
        from .trainer import loss_without_values

        return loss_without_values(model, number, side)


@register_task("change_detection")
class ChangeDetectionTask(SegmentationTask):
    """Change detection on pairs of images of the same place."""

    model_type = "vitp_change_detection"
    other_command = "vitp finetune_segmentation"
