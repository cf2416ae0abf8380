"""Data of pretraining: a mixture, a data set of conversations, or labeled images."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..cards.record import public_name
from ..data.annotations import AnnotatedImage
from ..image_processing_vitp import ViTPImageProcessor
from ..images.seen import report_images
from ..input_spec import InputSpec
from ..instructions.from_annotations.drawing import DrawnInstructions
from ..instructions.from_annotations.labels import describe_default_names
from ..instructions.from_annotations.pipeline import explain_labels
from ..instructions.from_annotations.source import LabelSource
from ..instructions.mixture import Mixture, describe_schemas, open_mixture
from ..instructions.rows import SourceSettings, images_of, prepare_rows, report_rows
from ..instructions.sources import LOOKED_AT, open_splits, read_source
from .arguments import PretrainArguments


@dataclass
class PretrainData:
    """Data sets of a pretraining.

    Args:
        train: training rows.
        eval: rows for evaluation during training.
        settings: encoding settings of each source of a mixture.
        transform: transform that draws views and conversations of labeled images.
        labels: folder of labeled images.
        test_images: labeled images of its test split.
    """

    train: Dataset | IterableDataset
    eval: Dataset | IterableDataset | None = None
    settings: dict[str, SourceSettings] | None = None
    transform: DrawnInstructions | None = None
    labels: LabelSource | None = None
    test_images: list[AnnotatedImage] = field(default_factory=list)

    def read_with(self, spec: InputSpec) -> None:
        """Set the input spec of labeled images, and store fixed windows of the test images as `eval`."""
        self.transform.scenes.spec = spec
        if self.test_images:
            self.eval = self.labels.store(self.transform, self.test_images)


def open_data(args: PretrainArguments, mixture: Mixture | None, seed: int, evaluates: bool = False) -> PretrainData:
    """Open the data sets of a pretraining, which evaluates on some rows during training if `evaluates` is true.

    Raises:
        ValueError: if the evaluation split is missing, or if a mixture does not allow one.
    """
    if mixture is not None:
        if evaluates:
            raise ValueError(
                "A mixture has no rows to evaluate on during training. Set eval_strategy: no, or train on a "
                "dataset_name with a dataset_test_split."
            )
        settings = {source.name: source for source in mixture.sources}
        return print_schemas(PretrainData(open_mixture(mixture, seed), settings=settings))
    if args.annotations is not None:
        return open_annotations(args, seed, evaluates)
    has_images = False
    problem = None
    try:
        splits, split_names = open_splits(args, args.image_root, args.columns, args.prompt)
        train_rows = splits[args.dataset_train_split]
        first_rows = itertools.islice(train_rows, LOOKED_AT)
        has_images = any(map(images_of, first_rows))
    except ValueError as error:
        problem = error
    if not has_images:
        advice = explain_labels(args.dataset_name)
        if advice is not None:
            raise ValueError(advice) from problem
    if problem is not None:
        raise problem
    eval_split = args.dataset_test_split
    if eval_split not in splits and (evaluates or eval_split != PretrainArguments.dataset_test_split):
        raise ValueError(
            f"No split {eval_split!r} in {args.dataset_name}. Found: {', '.join(split_names)}. Set "
            "dataset_test_split, or eval_strategy: no."
        )
    return print_schemas(PretrainData(train_rows, splits.get(eval_split)))


def open_annotations(args: PretrainArguments, seed: int, evaluates: bool = False) -> PretrainData:
    """Open labeled images, whose training views and conversations are drawn anew in every epoch.

    The test split, if the folder has one, is for scores: windows of its images with all their questions.

    Raises:
        ValueError: if a label is invalid, or the run evaluates and the folder has no test split.
    """
    root = Path(args.annotations)
    split = args.dataset_test_split
    labels = LabelSource.open(root, args.labels)
    has_test_split = split in labels.splits
    if not has_test_split and (evaluates or split not in ("", PretrainArguments.dataset_test_split)):
        raise ValueError(
            f"No split {split!r} in {root}. Found: {', '.join(labels.splits)}. Set dataset_test_split to one of them, "
            "or to '' and eval_strategy: no."
        )
    transform = labels.draw(seed)
    test_images = labels.images(split) if has_test_split else []
    rows = transform.rows()
    if PartialState().is_main_process:
        numbers = f"{len(transform.images)} images, {len(rows)} rows an epoch"
        print(f"draws: {labels.layout.name} labels, {numbers}; asks for {', '.join(labels.kinds)}")
        default_names = describe_default_names(labels.layout)
        if default_names is not None:
            print(default_names)
    return PretrainData(rows, transform=transform, labels=labels, test_images=test_images)


def print_schemas(data: PretrainData) -> PretrainData:
    """Print the format of the training rows in the main process, and return the data."""
    if PartialState().is_main_process:
        print(*describe_schemas(data.train), sep="\n")
    return data


def report_training_images(data: PretrainData, image_processor: ViTPImageProcessor) -> None:
    """Print how the images are seen, those of a mixture for each source, in the main process."""
    if not PartialState().is_main_process:
        return
    spec = SourceSettings().spec_for(image_processor)
    if data.transform is not None:
        images = data.transform.images
        report_images(len(images), lambda index: images[index].source(), spec)
    elif data.settings is None:
        report_rows(prepare_rows(data.train), spec)
    else:
        for source in data.settings.values():
            report_rows(read_source(source), source.spec_for(image_processor), f"images of {source.name}")


def describe_data(
    args: PretrainArguments, mixture: Mixture | None, dataset: Dataset | IterableDataset
) -> list[dict[str, object]]:
    """Return a description of the training data for the record of the run; `dataset` is a Hub id or `None`."""
    if args.annotations is not None:
        description = {
            "name": public_name(args.annotations),
            "dataset": None,
            "split": args.labels.split,
            "rows": len(dataset),
        }
        return [description]
    if mixture is None:
        is_local = Path(args.dataset_name).exists()
        description = {
            "name": public_name(args.dataset_name),
            "dataset": None if is_local else args.dataset_name,
            "split": args.dataset_train_split,
            "rows": len(dataset) if isinstance(dataset, Dataset) else None,
        }
        return [description]
    descriptions = []
    for source in mixture.sources:
        description = {
            "name": source.name,
            "dataset": source.dataset if source.is_on_hub else None,
            "rows": source.rows,
            "rate": source.rate,
            "modality": source.modality,
            "tasks": source.tasks,
        }
        descriptions.append(description)
    return descriptions


def describe_evaluation(args: PretrainArguments) -> dict[str, str] | None:
    """Return a description of the evaluation data for the record of the run."""
    if args.annotations is not None:
        return {"name": public_name(args.annotations), "eval": args.dataset_test_split}
    if args.dataset_name is None:
        return None
    description = {"name": public_name(args.dataset_name), "eval": args.dataset_test_split}
    if not Path(args.dataset_name).exists():
        description["dataset"] = args.dataset_name
    return description
