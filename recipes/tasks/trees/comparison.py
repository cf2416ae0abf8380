"""Tree crowns from a random ViT and from ViTs pretrained with and without VRL, on the same windows."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import set_seed

from modeling_vitp import ViTPTrainer, ViTPTrainingConfig, export_backbone
from modeling_vitp.evaluation.arguments import CompareArguments
from modeling_vitp.evaluation.experiments import once, summarise_arms
from modeling_vitp.instructions.rows import sample_texts
from modeling_vitp.recipes import finetune_segmentation
from modeling_vitp.recipes.data.build_tree_masks import check_apart, places, write_test, write_train
from modeling_vitp.training.start import start_from_scratch

from .instructions import TreeInstructions, repeat

logger = logging.getLogger(__name__)
RANDOM = "random"
TREES_TOLERANCE = 0.2  # a part of the windows has its share of the trees, give or take this much of it


@dataclass
class Comparison:
    """The runs of a comparison, each in a folder of its own below `output_dir`."""

    args: CompareArguments
    train: Dataset
    test: Dataset

    def __post_init__(self):
        self.folder = Path(self.args.output_dir)
        self.arms = {RANDOM: None} | {f"ViTP, r = {ratio:g}": ratio for ratio in self.args.drop_ratios}
        for name, rows in {"train": self.train, "test": self.test}.items():
            missing = sorted({"id", "image", "boxes", "scene", "left", "top"} - set(rows.column_names))
            if missing:
                raise ValueError(
                    f"{self.args.dataset_name}, split {name}: no columns {missing}, which rows of trees have."
                )
        check_apart(self.train, self.test)

    def run(self) -> dict:
        """Runs what is not there yet, seed after seed, and returns the metrics of all of it."""
        learning_rates, tuning = self.tune()
        runs = []
        for seed in self.args.seeds:
            for share in self.args.label_shares:
                labelled = label_subset([len(boxes) for boxes in self.train["boxes"]], share, seed)
                rows = self.train.select(labelled)
                folder = self.folder / f"seed_{seed}" / f"labels_{share:g}"
                for arm in self.arms:
                    metrics = self.run_arm(arm, rows, self.test, seed, learning_rates[arm], folder)
                    runs.append(
                        {"seed": seed, "label_share": share, "arm": arm, "windows": list(rows["id"]), **metrics}
                    )
            metrics = {
                "learning_rates": learning_rates,
                "tuning": tuning,
                "summary": summarise_arms(runs, RANDOM),
                "runs": runs,
            }
            (self.folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        return metrics

    def tune(self) -> tuple[dict[str, float], list[dict]]:
        """The learning rate of each arm, and the runs it was chosen by: on all labels, with the first seed."""
        rows, held_out = split_held_out(self.train, self.args.held_out_scene, self.args.held_out_top)
        seed, folder = self.args.seeds[0], self.folder / "tuning"
        runs = [
            {"arm": arm, **self.run_arm(arm, rows, held_out, seed, rate, folder)}
            for arm in self.arms
            for rate in self.args.learning_rates
        ]
        best = {arm: max((run for run in runs if run["arm"] == arm), key=lambda run: run["iou"]) for arm in self.arms}
        return {arm: run["learning_rate"] for arm, run in best.items()}, runs

    def run_arm(
        self, arm: str, rows: Dataset, scored: Dataset, seed: int, learning_rate: float, folder: Path
    ) -> dict[str, float]:
        """Pretrains, unless the arm starts at random, fine-tunes and scores: `iou` of the trees and more."""
        data, ratio = folder / "data", self.arms[arm]
        name = "random" if ratio is None else f"r_{ratio:g}"
        start = ["--from_scratch", json.dumps(self.args.from_scratch["vision_config"])]
        metrics = {"learning_rate": learning_rate}
        if ratio is not None:
            pretrained = folder / f"pretraining_{name}"
            metrics["pretraining_loss"] = once(pretrained, lambda: self.pretrain(rows, ratio, seed, pretrained))["loss"]
            start = ["--model_name_or_path", str(pretrained / "backbone")]

        def finetune():
            write_train(rows, data / "train")
            write_test(scored, data / "test")
            settings = {"output_dir": output, "data_root": data, "seed": seed, "learning_rate": learning_rate}
            options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
            finetune_segmentation.main(["--config", self.args.finetuning, *options, *start])

        output = folder / f"finetuning_{name}_{learning_rate:g}"
        result = once(output, finetune)
        metrics |= {"iou": result["test"]["test_iou/tree"], "loss": result["train"]["train_loss"]}
        logger.info("%s, learning rate %g: IoU of trees %.3f (%s)", arm, learning_rate, metrics["iou"], output)
        return metrics

    def pretrain(self, rows: Dataset, drop_ratio: float, seed: int, folder: Path) -> None:
        """Visual instruction pretraining on the labels of `rows`, and on nothing else; leaves `backbone/`."""
        set_seed(seed)
        train_dataset, transform = repeat(rows), TreeInstructions(rows)
        model, processor = start_from_scratch(self.args.from_scratch, sample_texts(train_dataset, transform, seed))
        model.set_attn_implementation("eager")  # for a tiny ViT on a CPU faster than sdpa
        settings = {"save_strategy": "no", "report_to": "none", **self.args.pretraining}
        training_args = ViTPTrainingConfig(str(folder), seed=seed, vrl_drop_ratio=drop_ratio, **settings)
        trainer = ViTPTrainer(
            model, training_args, train_dataset=train_dataset, processing_class=processor, sample_transform=transform
        )
        loss = trainer.train().metrics["train_loss"]
        export_backbone(model, folder / "backbone", processor.image_processor)
        (folder / "metrics.json").write_text(json.dumps({"loss": loss}) + "\n")


def split_held_out(train: Dataset, scene: str, top: int) -> tuple[Dataset, Dataset]:
    """The rows that show nothing of a scene's ground below `top`, and those that show nothing else of it."""
    where = places(train)
    rows = [index for index, (name, box) in enumerate(where) if name != scene or box[3] <= top]
    held_out = [index for index, (name, box) in enumerate(where) if name == scene and box[1] >= top]
    if not rows or not held_out:
        raise ValueError(f"held_out_top={top} of {scene!r} leaves {len(rows)} windows and holds {len(held_out)} out.")
    return train.select(rows), train.select(held_out)


def label_subset(trees: Sequence[int], share: float, seed: int) -> list[int]:
    """Indices of a random share of the windows that has about the same share of the trees.

    Windows differ in trees from none to dozens: without the second condition a tenth of the labels may have no tree.

    Args:
        trees: number of trees in each window.
        share: in (0, 1].
        seed: of the draw.
    """
    if not 0 < share <= 1:
        raise ValueError(f"label_shares: {share} is not above 0 and at most 1.")
    generator = np.random.default_rng(seed)
    for _ in range(10_000):
        chosen = np.sort(generator.permutation(len(trees))[: max(round(share * len(trees)), 1)]).tolist()
        if abs(sum(trees[index] for index in chosen) / sum(trees) - share) <= TREES_TOLERANCE * share:
            return chosen
    raise ValueError(f"label_shares: no {share:.0%} of the windows have about that share of the trees.")
