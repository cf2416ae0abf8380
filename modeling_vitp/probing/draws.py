"""The task that a probe is about, and which of its training images each draw of labels has."""

import numpy as np

from ..dense.data import DenseData
from ..detection.data import DetectionData
from .arguments import ProbeArguments
from .boxes import Boxes
from .classification import Classification
from .few_labels import Labels
from .segmentation import Segmentation


def open_task(args: ProbeArguments) -> Classification | Segmentation | Boxes:
    if args.data is not None:
        task, data = (Boxes, DetectionData) if args.annotations == "boxes" else (Segmentation, DenseData)
        splits = {"train": args.train_split, "test": args.test_split}
        return task(data.from_dict(args.data), splits, args.l2, args.depths)
    splits = {name: getattr(args, name) for name in ("train_split", "test_split", "test_share", "label_column")}
    names = "image_column input_spec pooling num_neighbours temperature l2".split()
    settings = {name: getattr(args, name) for name in names}
    return Classification.open(args.dataset_name, args.dataset_config, splits, **settings)


def draw_labels(args: ProbeArguments, task: Classification | Segmentation | Boxes) -> dict[Labels, list[np.ndarray]]:
    """The training images of each draw: one for each seed, or a single one where all are used."""
    few = [Labels(shots=shots) for shots in args.shots] + [Labels(share=share) for share in args.shares]
    draws = {}
    for labels in few or [Labels(share=1.0)]:
        seeds = args.seeds[:1] if labels.share == 1 else args.seeds
        draws[labels] = [labels.draw(task.presence, seed, task.names) for seed in seeds]
    return draws
