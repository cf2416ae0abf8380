"""What an experiment asks of the trees beside pretrainings: other objectives, fewer labels, the worth of a backbone."""

import json
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict, load_dataset
from transformers import set_seed

from modeling_vitp.command.paths import find_data, read_yaml
from modeling_vitp.evaluation.comparison import once
from modeling_vitp.probing.backbones import Backbone, load_backbone
from modeling_vitp.probing.gains import DEPTHS
from modeling_vitp.probing.segmentation import Segmentation, probe_robustness
from modeling_vitp.recipes.experiments import controls
from modeling_vitp.recipes.experiments.arguments import ExperimentArguments
from modeling_vitp.recipes.experiments.variants import Experiment
from modeling_vitp.training.checkpointing import write_whole

from .evaluation import SCORED
from .finetuning import Finetuning, key
from .labels import label_subset, labelled_rows, write_splits
from .probe_data import VIEWS_PER_WINDOW, write_probe_data


class Downstream:
    """See [`~modeling_vitp.recipes.experiments.variants.Task`]."""

    def __init__(self, args: ExperimentArguments):
        self.args = args

    @cached_property
    def splits(self) -> DatasetDict:
        return load_dataset(find_data(read_yaml(self.args.base)["dataset_name"]))

    def control(self, argv: list[str]) -> int:
        return controls.main(argv)

    def labelled(self, dataset_name: str, share: float, seed: int, folder: Path) -> None:
        splits = load_dataset(find_data(dataset_name))
        write_splits({**splits, "train": labelled_rows(splits["train"], share, seed)}, folder)

    def score(self, experiment: Experiment, arm: str, seed: int, folder: Path) -> dict[str, Any]:
        args, found = self.args, {}
        if args.finetuning:
            found["finetuning"] = Finetuning(args.finetuning, self.splits).scores(experiment, arm, seed, folder)
        if args.probe_label_shares:
            name = "_".join(["probe", *(key("labels", share) for share in args.probe_label_shares)])
            found["probe"] = measured(folder / name, lambda: self.few_labels(folder, seed))
        if args.corruption_severities:
            name = "_".join(["corruptions", *map(str, args.corruption_severities)])
            found["corruptions"] = measured(folder / name, lambda: self.corruptions(folder, seed))
        return found

    def few_labels(self, folder: Path, seed: int) -> dict[str, dict[str, dict[str, float]]]:
        """By split, share of the windows and probe, the AUC of a patch, learned from the views of these windows."""
        trees = [len(boxes) for boxes in self.splits["train"]["boxes"]]
        draws, found = {}, {}
        for share in self.args.probe_label_shares:
            windows = np.array(label_subset(trees, share, seed))
            draws[share] = [(windows[:, None] * VIEWS_PER_WINDOW + np.arange(VIEWS_PER_WINDOW)).ravel()]
        tasks, backbone = self.frozen(folder, seed)
        with tempfile.TemporaryDirectory(dir=folder) as features:
            heads = tasks["test"].fit(backbone, draws, None, Path(features))
            for split, task in tasks.items():
                of_split = found[split] = {key("labels", share): {} for share in draws}
                for (probe, share), draw in task.score(heads, backbone, None, Path(features)).items():
                    of_split[key("labels", share)][probe] = draw[0]["patch_auc"]
        return found

    def corruptions(self, folder: Path, seed: int) -> dict[str, dict[str, dict]]:
        """See [`~modeling_vitp.probing.segmentation.probe_robustness`]; of the test."""
        tasks, backbone = self.frozen(folder, seed)
        return probe_robustness(tasks["test"], backbone, self.args.corruption_severities, seed, folder)

    def frozen(self, folder: Path, seed: int) -> tuple[dict[str, Segmentation], Backbone]:
        """What is read from the backbone of a run, for each split; and the backbone."""
        set_seed(seed)
        data = write_probe_data(self.splits, folder / "probe" / "data", seed)
        backbone = load_backbone(str(folder / "backbone"))
        depths = min(DEPTHS, backbone.model.config.num_hidden_layers)
        tasks = {split: Segmentation(data, {"train": "train", "test": split}, 1e-2, depths) for split in SCORED}
        return tasks, backbone


def measured(folder: Path, measure: Callable[[], dict]) -> dict:
    """What was measured, which is kept in the folder and not measured again."""

    def run() -> None:
        found = measure()
        folder.mkdir(parents=True)
        write_whole(folder / "metrics.json", json.dumps(found, indent=2) + "\n")

    return once(folder, run)
