"""The task that a probe is about, and which of its training images each draw of labels has."""

import numpy as np

from ..dense.data import DenseData
from .arguments import ProbeArguments
from .classification import Classification
from .few_labels import Labels
from .segmentation import Segmentation


def open_task(args: ProbeArguments) -> Classification | Segmentation:
    if args.data is not None:
        data = DenseData.from_dict(args.data)
        return Segmentation(data, {"train": args.train_split, "test": args.test_split}, args.l2, args.depths)
    splits = {name: getattr(args, name) for name in ("train_split", "test_split", "test_share", "label_column")}
    names = "image_column input_spec pooling num_neighbours temperature l2".split()
    settings = {name: getattr(args, name) for name in names}
    return Classification.open(args.dataset_name, args.dataset_config, splits, **settings)


def draw_labels(args: ProbeArguments, task: Classification | Segmentation) -> dict[Labels, list[np.ndarray]]:
    """The training images of each draw: one for each seed, or a single one where all are used."""
    few = [Labels(shots=shots) for shots in args.shots] + [Labels(share=share) for share in args.shares]
    draws = {}
    for labels in few or [Labels(share=1.0)]:
        seeds = args.seeds[:1] if labels.share == 1 else args.seeds
        draws[labels] = [labels.draw(task.presence, seed, task.names) for seed in seeds]
    return draws
