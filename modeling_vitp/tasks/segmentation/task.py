"""Semantic segmentation of images, and change detection on pairs of images of the same place."""

from typing import ClassVar

from tqdm import tqdm

from ..base import FineTuningOptions, Task, register_task
from .arguments import DenseArguments, DenseSettings

BACKGROUND = ("0", "0,0,0")  # value or color of masks that no question is about


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
    def data_class(self):
        from .data import DenseData

        return DenseData

    @property
    def probe_class(self):
        from .probe import SegmentationProbe

        return SegmentationProbe

    @property
    def scorer_class(self):
        from .robustness import DenseScorer

        return DenseScorer

    @property
    def layout_class(self):
        from ...data.layouts import Masks

        return Masks

    @property
    def entry(self):
        """Declaration of the model type."""
        from ...auto.registry import find_model

        return find_model(self.model_type)

    def check_start(self, options):
        from .trainer import check_dense_start

        check_dense_start(self.entry.model_class, options.start, options.training.do_train)

    def open_data(self, options):
        return self.data_class.from_arguments(options.data, options.training.output_dir)

    def check_splits(
        self,
        data,
        splits,
        options,
    ):
        for split in splits:
            data.split_settings(split)  # raises an error for an unknown split
        super().check_splits(data, splits, options)

    def check_samples(
        self,
        data,
        samples,
        options,
    ):
        from .data import count_pixels

        self.check_images(samples)
        if samples["train"] is None:
            return {}
        names = data.encoding.names
        num_workers = options.training.dataloader_num_workers
        train_pixels = count_pixels(samples["train"], names, num_workers)
        for role, kind in (("eval", "evaluation"), ("test", "test")):
            if samples[role] is not None:  # A bad mask would stop the run when it is scored.
                count_pixels(
                    samples[role],
                    names,
                    num_workers,
                    kind,
                )
        return {"train_pixels": train_pixels}

    def check_images(self, samples):
        """Raise a `ValueError` if samples are pairs of images instead of images, or the reverse."""
        expected_number = self.entry.model_class.images_per_sample
        for role_samples in samples.values():
            if role_samples is None:
                continue
            number = len(role_samples[0]["images"])
            if number != expected_number:
                raise ValueError(
                    f"Expected {expected_number} image(s) in a sample, got {number}. Use {self.other_command}."
                )

    def load_model(
        self,
        data,
        options,
        checked,
    ):
        from .data import class_weights
        from .trainer import load_dense_model, padded_side

        weights = None
        if "train_pixels" in checked:
            weights = class_weights(options.data.class_weights, checked["train_pixels"])
        model = load_dense_model(
            self.entry.model_class,
            options.start,
            data.encoding.names,
            class_weights=weights,
            input_spec=data.image_spec,
            image_size=padded_side(options.training.crop_size),
        )
        model.config.volume_plane = data.plane
        return model

    def create_trainer(
        self,
        model,
        data,
        samples,
        options,
    ):
        from ...image_processing_vitp_dense import ViTPSegmentationImageProcessor
        from ..loading import load_image_processor
        from .trainer import ViTPSegmentationTrainer

        image_processor = load_image_processor(
            ViTPSegmentationImageProcessor,
            options.start,
            input_spec=data.image_spec,
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

    def write_submission(
        self,
        trainer,
        data,
        options: FineTuningOptions,
    ):
        from .prediction import write_submission

        write_submission(trainer, data, options.data.submission)

    def loss(
        self,
        model,
        number,
        side,
    ):
        from .trainer import loss_without_values

        return loss_without_values(model, number, side)

    def next_commands(self, folder, data):
        suffix = ".tif" if data.plane is None else ".nii.gz"
        image_arguments = [f"IMAGE{suffix}"] * self.entry.model_class.images_per_sample
        return [f"vitp predict_large {folder} {' '.join(image_arguments)} --output CLASSES{suffix}"]

    def read_split(
        self,
        data,
        split,
        settings,
    ):
        from ...image_processing_vitp_dense import IGNORE_INDEX

        samples = self.data_class.from_dict(data).open_split(split)
        classes_by_image = {}
        for index, (files, _) in enumerate(tqdm(samples.rows, desc=f"masks of {split}", disable=None)):
            class_indices = set(samples.mask(index).unique().tolist())
            class_indices.discard(IGNORE_INDEX)
            classes_by_image[files.images[0]] = class_indices
        return classes_by_image

    def phrases(self, class_names, data):
        """Return the phrases of masks by value or color.

        The value 0 or color black is the background, which no question is about, unless `class_names` has a phrase for
        it. No question is about ignored values either.
        """
        phrases = {str(value): None for value in data.get("ignore", ())}
        known_classes = [item["name"] for item in data["classes"]]
        unknown_classes = sorted(class_names.keys() - set(known_classes))
        if unknown_classes:
            raise ValueError(
                f"class_names: class {unknown_classes[0]!r} not found. Classes: {', '.join(known_classes)}."
            )
        for item in data["classes"]:
            if "value" in item:
                key = str(item["value"])
            else:
                key = ",".join(str(level) for level in item["color"])
            default = None if key in BACKGROUND else item["name"]
            phrases[key] = class_names.get(item["name"], default)
        return phrases

    def fine_tuning_defaults(
        self,
        config,
        size,
        window,
    ):
        side_of_patches = min(size) // 32 * 32
        crop_size = min(max(side_of_patches, 32), 512)
        return {"crop_size": crop_size, "per_device_train_batch_size": 8}


@register_task("change_detection")
class ChangeDetectionTask(SegmentationTask):
    """Change detection on pairs of images of the same place."""

    model_type = "vitp_change_detection"
    other_command = "vitp finetune_segmentation"

    @property
    def layout_class(self):
        return None  # neither probes nor questions of `vitp adapt` read pairs
