"""What ViTP's pretraining brings: tree crowns from a random ViT and from ViTs pretrained with and without VRL.

    python recipes/compare_pretraining.py --config recipes/configs/compare_aerial_trees.yaml

For each seed and share of the labels, ViTs are pretrained on instructions about the labelled windows, and they and a
random ViT are fine-tuned on the masks of the same windows, all with the same budget, schedule and augmentation. Seeds
draw the windows, the weights and the batches. Each start has the learning rate of fine-tuning that is best on a part of
the training ground that neither its pretraining nor its fine-tuning saw. The last checkpoint is scored, once, on the
test ground.

Started again with the same output folder, the comparison goes on: parts that are finished are not run again, and more
`seeds` add to it. `metrics.json` has every run and the summary.
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset, load_dataset
from transformers import set_seed
from trl import TrlParser

from modeling_vitp import ViTPTrainer, ViTPTrainingConfig, export_backbone
from modeling_vitp.instructions.rows import sample_texts
from modeling_vitp.recipes import finetune_segmentation
from modeling_vitp.recipes.data.build_tree_masks import overlaps, places, write_test, write_train
from modeling_vitp.recipes.tasks.trees.instructions import repeat, transform
from modeling_vitp.training.start import start_from_scratch

logger = logging.getLogger("compare")
RANDOM = "random"
TREES_TOLERANCE = 0.2  # a part of the windows has its share of the trees, give or take this much of it


@dataclass
class CompareArguments:
    output_dir: str = field(metadata={"help": "Where runs, metrics.json and the table go."})
    dataset_name: str = field(metadata={"help": "recipes/data/aerial_trees, or rows like these."})
    finetuning: str = field(metadata={"help": "Configuration of recipes/finetune_segmentation.py."})
    from_scratch: dict | str | None = field(metadata={"help": "The model to pretrain, see recipes/pretrain.py."})
    pretraining: dict | str | None = field(metadata={"help": "Settings of the pretraining, of ViTPTrainingConfig."})
    held_out_scene: str = field(metadata={"help": "Scene of the ground that learning rates are chosen on."})
    held_out_top: int = field(metadata={"help": "Training windows of that scene from here on, in pixels, are it."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "At least two."})
    label_shares: list[float] = field(default_factory=lambda: [1.0, 0.1], metadata={"help": "Of the windows."})
    drop_ratios: list[float] = field(default_factory=lambda: [0.0, 0.75], metadata={"help": "VRL, in pretraining."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Of fine-tuning, to choose from."}
    )

    def __post_init__(self):
        for name in ("from_scratch", "pretraining"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, json.loads(getattr(self, name)))
        if len(set(self.seeds)) < 2:
            raise ValueError(f"seeds={self.seeds}: a spread needs at least two.")
        known = {item.name for item in fields(ViTPTrainingConfig)} - {"output_dir", "seed", "vrl_drop_ratio"}
        unknown = sorted(set(self.pretraining) - known)
        if unknown:
            raise ValueError(
                f"pretraining: {unknown} are no settings of it; output, seed and drop ratio are told here."
            )


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
            metrics = {"learning_rates": learning_rates, "tuning": tuning, "summary": summarise(runs), "runs": runs}
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
        train_dataset = repeat(rows)
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


def once(folder: Path, run: Callable[[], None]) -> dict:
    """The `metrics.json` that a part leaves when it is finished; one without is run, from its beginning."""
    finished = folder / "metrics.json"
    if not finished.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        run()
        logger.info("%s: finished in %.0f s", folder, time.monotonic() - began)
    return json.loads(finished.read_text())


def check_apart(train: Dataset, test: Dataset) -> None:
    """Raises a `ValueError` if a row to train on shows ground of one to test on."""
    tested = list(zip(test["id"], places(test)))
    for name, place in zip(train["id"], places(train)):
        for other_name, other in tested:
            if overlaps(place, other):
                raise ValueError(f"{name} is trained on and shows ground of {other_name}, which is the test's.")


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


def summarise(runs: Sequence[dict]) -> list[dict]:
    """For each share of the labels and arm the mean and standard deviation (n - 1) of the IoU over seeds, and the same
    of the gain on the random ViT of the same seed and windows.
    """
    by_arm = {}
    for run in runs:
        by_arm.setdefault((run["label_share"], run["arm"]), {})[run["seed"]] = run["iou"]
    summary = []
    for (share, arm), scores in by_arm.items():
        gains = [iou - by_arm[share, RANDOM][seed] for seed, iou in scores.items()]
        row = {"label_share": share, "arm": arm, "seeds": list(scores)}
        for name, values in {"iou": list(scores.values()), "gain": gains}.items():
            is_spread = len(values) > 1
            row |= {f"{name}_mean": np.mean(values).item()}
            row |= {f"{name}_std": np.std(values, ddof=1).item() if is_spread else None}
        summary.append(row)
    return summary


def table(summary: Sequence[dict]) -> str:
    """The summary in Markdown: a row for each arm, and for each share of the labels IoU and gain."""
    shares = list(dict.fromkeys(row["label_share"] for row in summary))
    rows = {(row["label_share"], row["arm"]): row for row in summary}
    head = ["start"] + [title for share in shares for title in (f"{share:.0%} of labels", "gain on random")]
    lines = [head, ["---"] * len(head)]
    for arm in dict.fromkeys(row["arm"] for row in summary):
        cells = [rows[share, arm] for share in shares]
        lines.append([arm, *(text for row in cells for text in (spread(row, "iou"), spread(row, "gain", "+")))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(row: dict, name: str, sign: str = "") -> str:
    if name == "gain" and row["arm"] == RANDOM:
        return ""
    mean, std = row[f"{name}_mean"], row[f"{name}_std"]
    return f"{mean:{sign}.3f}" + ("" if std is None else f" ± {std:.3f}")


def check_settings(args: CompareArguments) -> None:
    """Parts belong together only if their settings are the same; other seeds may be added.

    Raises:
        ValueError: if the output folder has a comparison with other settings.
    """
    record = Path(args.output_dir) / "settings.json"
    finetuning = yaml.safe_load(Path(args.finetuning).read_text())
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "seeds")}
    settings = json.loads(json.dumps(settings | {"finetuning": finetuning, "first seed": args.seeds[0]}))
    if not record.is_file():
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings, indent=2) + "\n")
        return
    recorded = json.loads(record.read_text())
    changed = sorted(name for name in settings | recorded if settings.get(name) != recorded.get(name))
    if changed:
        raise ValueError(f"{record} is of a comparison with another {', '.join(changed)}: give another output_dir.")


def main(argv: list[str] | None = None) -> int:
    (args,) = TrlParser((CompareArguments,)).parse_args_and_config(argv)
    check_settings(args)
    datasets = load_dataset(args.dataset_name)
    metrics = Comparison(args, datasets["train"], datasets["test"]).run()
    print(f"\nIoU of trees on the test ground, mean ± standard deviation over the seeds {args.seeds}\n")
    print(table(metrics["summary"]))
    print("\nLearning rates, chosen on held-out training ground:", metrics["learning_rates"])
    print(f"Every run: {Path(args.output_dir) / 'metrics.json'}")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    sys.exit(main())
