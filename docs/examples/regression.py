"""Plugin for the task "regression": one number for each image, such as the number of trees or the age of a patient.

The data are a folder with images in train/, val/ and test/, and a file numbers.csv with the columns `file_name` (the
path of an image below the folder) and `number`.

    vitp finetune_regression --plugins regression.py --data_root FOLDER --model_name_or_path BACKBONE
    vitp probe --plugins regression.py --task regression --data_root FOLDER --backbones BACKBONE
    vitp adapt FOLDER --plugins regression.py --task regression --instructions ROWS
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from matplotlib.figure import Figure

from modeling_vitp import ViTPClassificationTrainer, ViTPForImageClassification
from modeling_vitp.data.files import find_samples
from modeling_vitp.data.layouts import Layout, register_layout
from modeling_vitp.images.pixels import shown
from modeling_vitp.metrics.base import DistributedMetric, group_by_case
from modeling_vitp.metrics.resampling import Score, Scores, resample
from modeling_vitp.tasks import ClassificationTask, register_task
from modeling_vitp.tasks.classification.data import ClassificationData, FileImages
from modeling_vitp.tasks.classification.probe import ClassificationProbe
from modeling_vitp.tasks.loading import load_on_backbone

NUMBERS = "numbers.csv"
OUTPUT = "number"  # name of the only output of the models


def read_numbers(root):
    """Return the number of each image by its path below the root."""
    with (root / NUMBERS).open(newline="") as file:
        return {row["file_name"]: float(row["number"]) for row in csv.DictReader(file)}


@register_layout("numbers")
class NumberLayout(Layout):
    """Images in a folder for each split, and a table of their numbers."""

    subject = "number"

    @classmethod
    def matches(cls, root):
        return (root / NUMBERS).is_file()

    def splits(self):
        splits = {}
        for file_name in read_numbers(self.root):
            split = file_name.partition("/")[0]
            splits.setdefault(split, {})[file_name] = (self.root / file_name,)
        return splits


class NumberedImages(FileImages):
    """Image files whose label is a number, float32."""

    def set_classes(self, names, multi_label):
        self.labels = torch.tensor([float(labels[0]) for labels in self.stored])
        return self


@dataclass(kw_only=True)
class NumberData(ClassificationData):
    """Setting `data` of the task."""

    def __post_init__(self):
        self.classes = None
        super().__post_init__()

    @classmethod
    def infer(cls, root):
        splits = {split: {"image": f"{split}/{{name}}.*"} for split in NumberLayout(root).splits()}
        return {"root": str(root), "splits": splits}

    @classmethod
    def complete(cls, settings):
        if "splits" in settings:
            return dict(settings)
        return {**cls.infer(Path(settings["root"])), **settings}

    def find_classes(self, train_splits, known=None):
        self.classes = [OUTPUT]
        return self.classes

    def _read_files(self, name):
        root = Path(self.root)
        numbers = read_numbers(root)
        samples = find_samples(root, self.split_settings(name), name)
        stored = []
        for sample in samples:
            file_name = sample.images[0].relative_to(root).as_posix()
            if file_name not in numbers:
                raise ValueError(f"{file_name} has no row in {root / NUMBERS}. Add one, or remove the image.")
            stored.append([str(numbers[file_name])])
        return NumberedImages(samples, stored, self.input_spec)


class NumberErrors(DistributedMetric):
    """Root mean squared error and mean absolute error, which are better when lower."""

    main_score = "rmse"
    lower_is_better = ("rmse", "mae")
    is_share = False  # reports show it as it is, not in points

    def __init__(self, **kwargs):
        self.kept = []
        super().__init__(**kwargs)

    def _info(self):
        features = Features({"predictions": Value("float64"), "references": Value("float64")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def add_batch(self, *, predictions, references, case_ids):
        """Add the predicted and true numbers of images, with the case of each image."""
        self.kept += zip(predictions.tolist(), references.tolist(), case_ids)

    def _join(self, parts):
        rows = [row for part in parts for row in part]
        self.errors = np.array([prediction - reference for prediction, reference, _ in rows])
        return group_by_case(case for _, _, case in rows)

    def _take(self, indices):
        return np.concatenate([self.errors[self.cases[index]] for index in indices])

    def _compute(self, errors):
        return {"rmse": float(np.sqrt(np.mean(errors**2))), "mae": float(np.mean(np.abs(errors)))}


class RegressionTrainer(ViTPClassificationTrainer):
    """Trainer of an image classifier with one output and the squared error as loss."""

    def create_metric(self):
        return NumberErrors(num_process=self.args.world_size, process_id=self.args.process_index)

    @torch.no_grad()
    def predict(self, images):
        """Return the predicted numbers, float32 of shape `(images,)`."""
        model = self.accelerator.unwrap_model(self.model).eval()
        with self.compute_loss_context_manager():
            return model(self.pixels_of(images)).logits[:, 0].float().cpu()

    def draw(self, samples, path, maps=(), is_test=False):
        figure = Figure(figsize=(2.8 * len(samples), 3.1), layout="constrained")
        axes = figure.subplots(1, len(samples), squeeze=False)[0]
        predictions = self.predict([sample["image"] for sample in samples])
        for axis, sample, prediction in zip(axes, samples, predictions):
            axis.imshow(shown(sample["image"], self.processing_class.band_names))
            axis.set_title(f"{sample['id']}\ntrue: {sample['label']:.3g}, predicted: {prediction:.3g}", fontsize=8)
            axis.axis("off")
        figure.savefig(path)


class RegressionProbe(ClassificationProbe):
    """Ridge regression on the mean of the patch tokens."""

    main_score = "r2"
    title = "R² of a ridge regression"
    control_name = "mean number"
    options = ("pooling",)

    @classmethod
    def open(cls, args):
        data = NumberData.from_dict(args.data)
        data.find_classes([args.train_split])
        data.check_disjoint([args.train_split, args.test_split])
        samples = {"train": data.open([args.train_split]), "test": data.open([args.test_split])}
        return cls(
            samples,
            [OUTPUT],
            data.input_spec,
            args.pooling,
            args.num_neighbours,
            args.temperature,
            args.l2,
            args.intervals,
        )

    @property
    def presence(self):
        return np.ones((len(self.samples["train"]), 1), dtype=bool)

    def control(self):
        return self.scores(np.full(len(self.labels["test"]), self.labels["train"].mean()))

    def scores(self, predicted):
        images_of_cases = group_by_case(self.cases)
        errors = (predicted - self.labels["test"]) ** 2
        deviations = (self.labels["test"] - self.labels["train"].mean()) ** 2
        resampled = []
        for cases in resample(len(images_of_cases)):
            images = np.concatenate([images_of_cases[case] for case in cases])
            resampled.append(float(1 - errors[images].sum() / deviations[images].sum()))
        value = float(1 - errors.sum() / deviations.sum())
        return Scores({"r2": value}, Score(value, resampled, len(images_of_cases)))

    def probe(self, backbone, draws, image_size, folder, **loading):
        train = self.features(backbone, "train", image_size, folder, **loading)
        test = self.features(backbone, "test", image_size, folder, **loading)
        results = {}
        for labels, subsets in draws.items():
            results["linear", labels] = []
            for subset in subsets:
                mean = train[subset].mean(0)
                deviation = train[subset].std(0) + 1e-6
                features = (train[subset] - mean) / deviation
                numbers = self.labels["train"][subset]
                penalty = self.l2 * len(subset) * np.eye(features.shape[1])
                weights = np.linalg.solve(features.T @ features + penalty, features.T @ (numbers - numbers.mean()))
                predicted = (test - mean) / deviation @ weights + numbers.mean()
                results["linear", labels].append(self.scores(predicted))
        return results


@register_task("regression")
class RegressionTask(ClassificationTask):
    """One number for each image."""

    min_classes = 1
    trainer_class = RegressionTrainer

    @property
    def data_class(self):
        return NumberData

    @property
    def probe_class(self):
        return RegressionProbe

    @property
    def layout_class(self):
        return NumberLayout

    def check_samples(self, data, samples, options):
        return {} if samples["train"] is None else {"train_images": len(samples["train"])}

    def load_model(self, data, options, checked):
        return load_on_backbone(
            ViTPForImageClassification,
            options.start,
            [OUTPUT],
            input_spec=data.input_spec,
            image_size=options.training.image_size,
            problem_type="regression",
        )

    def loss(self, model, number, side):
        channels = model.config.backbone_config.num_channels
        return model(torch.zeros(number, channels, side, side), labels=torch.zeros(number)).loss

    def next_commands(self, folder, data):
        return []

    def infer_data(self, root, layout):
        return NumberData.infer(root)

    def class_names(self, data, labels):
        return [OUTPUT]
