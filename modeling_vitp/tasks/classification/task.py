"""Classification of images, with one or several classes per image."""

from ..arguments import StartArguments
from ..base import FineTuningOptions, Task, register_task
from .arguments import ClassificationArguments, ClassificationSettings


@register_task("classification")
class ClassificationTask(Task):
    """Classification of images."""

    arguments = ClassificationArguments
    settings = ClassificationSettings
    start = StartArguments
    training_config = "modeling_vitp.tasks.classification.trainer.ViTPClassificationTrainingConfig"
    keeps_patches = True
    draws_questions = False  # A crop may not show what the class of an image is about.

    @property
    def data_class(self):
        from .data import ClassificationData

        return ClassificationData

    @property
    def probe_class(self):
        from .probe import ClassificationProbe

        return ClassificationProbe

    @property
    def scorer_class(self):
        from .robustness import ClassificationScorer

        return ClassificationScorer

    @property
    def layout_class(self):
        from ...data.layouts import ClassLayout

        return ClassLayout

    @property
    def trainer_class(self):
        """Class of the trainer."""
        from .trainer import ViTPClassificationTrainer

        return ViTPClassificationTrainer

    def check_start(self, options):
        from ...modeling_vitp_classification import ViTPForImageClassification
        from ..loading import check_start

        check_start(ViTPForImageClassification, options.start, options.training.do_train)

    def find_classes(self, data, options: FineTuningOptions) -> list[str]:
        """Return the classes of the training splits, or those of the fine-tuned model that is scored."""
        from .trainer import classes_of

        train_splits = options.data.train_splits if options.training.do_train else []
        return data.find_classes(train_splits, classes_of(options.start))

    def open_split(self, data, name, options):
        self.find_classes(data, options)
        return super().open_split(data, name, options)

    def training_samples(self, data, options):
        self.find_classes(data, options)
        return super().training_samples(data, options)

    def check_samples(self, data, samples, options):
        from .data import check_trained, count
        from .trainer import labels_of

        if samples["train"] is None:
            return {}
        names = data.classes
        counts = count(labels_of(samples["train"]), names)
        scored = {options.data.eval_split: samples["eval"], options.data.test_split: samples["test"]}
        for split, of_split in scored.items():
            if of_split is not None:
                check_trained(counts, count(labels_of(of_split), names), split, data.is_listed)
        return {"train_images": counts}

    def load_model(self, data, options, checked):
        from .trainer import load_classifier

        names = self.find_classes(data, options)
        return load_classifier(options.start, names, data.multi_label, options.training.image_size, data.input_spec)

    def create_trainer(self, model, data, samples, options):
        from ...image_processing_vitp import ViTPImageProcessor
        from ..loading import load_image_processor

        side = options.training.image_size
        image_processor = load_image_processor(
            ViTPImageProcessor,
            options.start,
            options.training.do_train,
            input_spec=data.input_spec,
            size={"height": side, "width": side},
        )
        return self.trainer_class(
            model,
            options.training,
            train_dataset=samples["train"],
            eval_dataset=samples["eval"],
            processing_class=image_processor,
        )

    def loss(self, model, number, side):
        from .trainer import loss_without_values

        return loss_without_values(model, number, side)

    def next_commands(self, folder, data):
        return [f"vitp evaluate_robustness --models {folder}"]

    def infer_data(self, root, layout):
        for images in layout.splits().values():
            for image_id, paths in images.items():
                layout.annotate(image_id, paths)  # raises an error for labels that cannot be read
        return self.data_class.infer(root)

    def read_split(self, data, split, settings):
        opened_split = self.data_class.from_dict(data).open_split(split)
        classes = {}
        for sample, names in zip(opened_split.samples, opened_split.stored):
            classes[sample.images[0]] = set(names)
        return classes

    def class_names(self, data, labels):
        from .data import names_of

        class_sets = []
        for split_labels in labels.values():
            class_sets += split_labels.values()
        return names_of(class_sets)

    def fine_tuning_defaults(self, config, size, window):
        from ...vision_towers import pair

        return {"image_size": pair(config.image_size)[0], "per_device_train_batch_size": 64}
