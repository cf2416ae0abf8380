"""Detection of objects: boxes, oriented boxes, or boxes with masks."""

from ..base import Task, register_task
from .arguments import VARIANTS, VITP, DetectionArguments, DetectionSettings


@register_task("detection")
class DetectionTask(Task):
    """Detection of objects."""

    arguments = DetectionArguments
    settings = DetectionSettings
    training_config = "modeling_vitp.tasks.detection.trainer.ViTPDetectionTrainingConfig"
    variants = tuple(VARIANTS)
    min_classes = 1
    cuts_large_images = True

    @property
    def data_class(self):
        from .data import DetectionData

        return DetectionData

    @property
    def probe_class(self):
        from .probe import DetectionProbe

        return DetectionProbe

    @property
    def scorer_class(self):
        from .robustness import DetectionScorer

        return DetectionScorer

    @property
    def layout_class(self):
        from ...data.layouts import ObjectLayout

        return ObjectLayout

    def check_start(self, options):
        from .trainer import check_detector

        check_detector(options.data.task, options.start, options.training.do_train, options.data.detector)

    def open_data(self, options):
        data = self.data_class.from_arguments(options.data, options.training.output_dir)
        if options.data.submission is not None:
            data.split_settings(options.data.submission.split)  # raises an error for an unknown split
        return data

    def check_splits(self, data, splits, options):
        data.check_disjoint(splits, options.data.task)

    def open_split(self, data, name, options):
        return data.open([name], options.data.task)

    def training_samples(self, data, options):
        from .data import with_few_empty

        samples = data.open(options.data.train_splits, options.data.task)
        return with_few_empty(samples, options.data.empty_share, options.training.seed)

    def check_samples(self, data, samples, options):
        train_samples = samples["train"]
        if train_samples is None:
            return {}
        return {"train_images": len(train_samples), "train_objects": train_samples.count(data.names.names)}

    def load_model(self, data, options, checked):
        from .trainer import load_detection_image_processor, load_detector

        if options.data.detector != VITP:
            # Image processors of transformers support less: errors come before the weights are loaded.
            load_detection_image_processor(options.start, options.training, data.input_spec, options.data.detector)
        return load_detector(
            options.data.task,
            options.start,
            data.names.names,
            options.training,
            options.data.detector,
            data.input_spec,
        )

    def create_trainer(self, model, data, samples, options):
        from .trainer import ViTPDetectionTrainer, load_detection_image_processor

        image_processor = load_detection_image_processor(
            options.start, options.training, data.input_spec, options.data.detector
        )
        return ViTPDetectionTrainer(
            model,
            options.training,
            options.data.task,
            options.data.metric,
            options.data.metric_options,
            train_dataset=samples["train"],
            eval_dataset=samples["eval"],
            processing_class=image_processor,
        )

    def write_submission(self, trainer, data, options):
        from .prediction import write_submission

        write_submission(trainer, data, options.data.submission)

    def score_controls(self, trainer, data, samples, options):
        from .controls import blind_scores

        if not options.data.blind_controls:
            return {}
        all_training_samples = data.open(options.data.train_splits, options.data.task)
        return blind_scores(trainer, samples["test"], all_training_samples)

    def loss(self, model, number, side):
        from .trainer import loss_without_values

        return loss_without_values(model, number, side)

    def next_commands(self, folder, data):
        return [f"vitp predict_large {folder} IMAGE.tif --output OBJECTS.geojson"]

    def read_split(self, data, split, settings):
        whole_images = self.data_class.from_dict(data).without_tiles()
        classes = {}
        for place in whole_images.open_split(split, settings.get("task", "horizontal")).places:
            classes[place.image] = set(place.objects.labels[~place.objects.crowd].tolist())
        return classes

    def variant_settings(self, variant, layout):
        if variant not in self.variants:
            variant = "oriented" if layout.is_oriented else "horizontal"
        return {"task": variant} if VARIANTS[variant].has_outlines else {}

    def fine_tuning_defaults(self, config, size, window):
        longest_side = max(size) if window is None else window
        side = min(-(-longest_side // 32) * 32, 1024)
        return {"image_size": side, "per_device_train_batch_size": 4}
