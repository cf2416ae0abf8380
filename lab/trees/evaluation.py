"""Evaluation of backbone and answers on unseen ground, compared with controls."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from transformers import set_seed

from lab.data.build_tree_masks import write_test
from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor
from modeling_vitp.cards.sections import table
from modeling_vitp.data.boxes import Box
from modeling_vitp.evaluation.gains import gains_table, load_backbones, measure_gains
from modeling_vitp.images.pixels import IMAGE_PROCESSOR, ColorJitter, to_pixels
from modeling_vitp.instructions.collator import ViTPDataCollator
from modeling_vitp.tasks.segmentation.data import DenseData
from modeling_vitp.training.checkpointing import attempt

from .answers import (
    ask_all,
    best_constant_box,
    first_box,
    locate_by_map,
    losses_with_own_and_other_images,
    score_counts,
    score_largest,
    training_views,
    trees_in,
)
from .instructions import COUNT, LOCATE, MAP, format_box, largest, question_turn, write_map
from .views import TreeScene, view_of

SCORED = "test", "second_scene"  # the splits without training data
MAX_ERROR_RATIO = 0.8  # gate: largest ratio of the count error to that of each control
# Gate: smallest gain over the best control, in patch AUC for the probes and in IoU for the box of the maps.
MIN_GAINS = {"linear": 0.02, "nonlinear": 0.02, "grounding": 0.0}
HEADLINE_METRICS = {  # of each split, see `ModelEntry.headline_metrics`
    "backbone/scores/backbone/linear/patch_auc": "AUROC of a linear probe",
    "backbone/scores/backbone/nonlinear/patch_auc": "AUROC of a nonlinear probe",
    "count/mean_error": "Mean error of the count",
    "grounding_by_map/mean_iou": "Mean IoU of the box by maps",
}
PROBE_VIEWS = 6  # views of a training window for the probes
CLASSES = (
    {"name": "ground", "value": 0, "color": [120, 100, 60]},
    {"name": "tree", "value": 1, "color": [0, 160, 0]},
)


def evaluate(
    model: ViTPForConditionalGeneration, processor: ViTPProcessor, datasets: DatasetDict, output_dir: Path, seed: int
) -> dict:
    """Probe the backbone, ask the model, write pictures to `probe` and `predictions.png`, and return the metrics.

    Probes: a linear and a nonlinear probe predict crowns from the frozen backbone, from the backbone before training,
    from random weights, and from raw pixels, see [`~modeling_vitp.evaluation.gains`].

    Answers: the number of trees, the largest tree's box in words and by maps, and the loss on answers. The count is the
    median of `NUM_SAMPLES` sampled answers, because the median minimizes the mean absolute error; greedy decoding would
    give the mode. For the same reason, the box by maps is the one of `NUM_MAPS` boxes that is most similar to the
    others. One control is a constant: the median count, or the training box with the best mean IoU. The other control
    is the same model with swapped images: its answers assigned to other images, and its loss under teacher forcing.

    `summary`: the scores beside their controls, as tables in Markdown.

    `passed` is true if, on the unseen part of the big scene, the backbone and the box by maps exceed each of their
    controls by more than `MIN_GAINS`, and the count error is at most `MAX_ERROR_RATIO` of both controls' errors.
    `checks` has each of these requirements with the value that was reached.
    """
    set_seed(seed)
    measured = probe_backbone(datasets, output_dir, seed, model.device)
    counts, boxes = training_views(datasets["train"], seed)
    constant = best_constant_box(boxes)
    metrics, answers = {}, {}
    for split in SCORED:
        answers[split] = ask_all(model, processor, datasets[split], split)
        metrics[split] = {
            "num_images": len(datasets[split]),
            "backbone": measured[split],
            "count": score_counts(answers[split][COUNT], datasets[split], np.median(counts)),
            "grounding": score_largest(read_all(answers[split][LOCATE], datasets[split]), datasets[split], constant),
            "teacher_forcing": teacher_forced(model, processor, datasets[split]),
        }
    by_map = {split: locate_by_map(model, processor, datasets[split], split) for split in SCORED}
    for split, predicted in by_map.items():
        metrics[split]["grounding_by_map"] = score_largest(predicted, datasets[split], constant)
    shown = datasets["test"], answers["test"], by_map["test"], output_dir / "predictions.png"
    if attempt(output_dir, "the picture of predictions", draw_tree_predictions, *shown):
        metrics["failed"] = "predictions.png"
    summary = describe(metrics)
    return metrics | gate(metrics["test"]) | {"headline_metrics": HEADLINE_METRICS, "summary": summary}


def probe_backbone(
    datasets: DatasetDict, output_dir: Path, seed: int, device: str | torch.device, jitter: ColorJitter | None = None
) -> dict[str, dict]:
    """Probe `backbone` in the folder of a run and its controls; write pictures and return scores by split.

    Args:
        datasets: splits of the task.
        output_dir: folder of the run.
        seed: seed of the training views and of the random weights.
        device: device of the backbones.
        jitter: change of the colors of the training views. Default: their brightness and contrast alone.
    """
    folder = output_dir / ("probe" if jitter is None else "color_probe")
    data = write_probe_data(datasets, folder / "data", seed, jitter)
    backbones = load_backbones(output_dir / "backbone", output_dir / "backbone_at_start", seed, device)
    return measure_gains(data, "train", *SCORED, backbones=backbones, folder=folder)


def describe(metrics: dict) -> str:
    """Return the metrics as Markdown tables."""
    lines = []
    for split, ground in (("test", "Unseen ground of the big scene"), ("second_scene", "Another scene")):
        scores = metrics[split]
        count, boxes, forced = scores["count"], scores["grounding"], scores["teacher_forcing"]
        by_map = scores["grounding_by_map"]
        rows = [
            ["trees counted: mean error", count["mean_error"], count["mean_error_swapped_images"]],
            ["the largest tree's box: mean IoU", boxes["mean_iou"], boxes["mean_iou_swapped_images"]],
            ["the same, by its maps", by_map["mean_iou"], by_map["mean_iou_swapped_images"]],
            ["loss on counts", *forced["count"].values()],
            ["loss on maps", *forced["map"].values()],
        ]
        box = f"{boxes['mean_iou_blind_constant']:.2f}"
        blind = [f"{count['mean_error_constant_median']:.2f}", box, box, "", ""]
        rows = [[name, f"{own:.2f}", f"{other:.2f}", constant] for (name, own, other), constant in zip(rows, blind)]
        columns = ["the model's answers", "with its image", "with another image", "best constant"]
        lines += [f"\n{ground}: crowns, read from frozen features\n", gains_table(scores["backbone"])]
        lines += ["", table(columns, rows)]
    return "\n".join(lines).strip()


def gate(scores: dict) -> dict:
    """Compare the test scores with the thresholds; return `gate`, `passed` and each requirement with its value."""
    count, boxes, gains = scores["count"], scores["grounding_by_map"], scores["backbone"]["gains"]
    ratios = {
        "to_constant_median": count["mean_error"] / count["mean_error_constant_median"],
        "to_swapped_images": count["mean_error"] / count["mean_error_swapped_images"],
    }
    least = {probe: min(by_arm.values()) for probe, by_arm in gains.items()}
    least["grounding"] = boxes["mean_iou"] - max(boxes["mean_iou_blind_constant"], boxes["mean_iou_swapped_images"])
    names = {
        "to_constant_median": "count error / that of the training median",
        "to_swapped_images": "count error / that with swapped images",
        "linear": "AUROC of the linear probe above the best control",
        "nonlinear": "AUROC of the nonlinear probe above the best control",
        "grounding": "IoU of the box by maps above the best control",
    }
    checks = [
        {
            "name": names[key],
            "reached": ratio,
            "required": f"at most {MAX_ERROR_RATIO}",
            "passed": ratio <= MAX_ERROR_RATIO,
        }
        for key, ratio in ratios.items()
    ]
    checks += [
        {"name": names[key], "reached": least[key], "required": f"more than {gain}", "passed": least[key] > gain}
        for key, gain in MIN_GAINS.items()
    ]
    required = {"max_error_ratio": MAX_ERROR_RATIO, "min_gains": MIN_GAINS}
    reached = {"error_ratios": ratios, "least_gains": least}
    return {"gate": required | reached, "checks": checks, "passed": all(check["passed"] for check in checks)}


def teacher_forced(model: ViTPForConditionalGeneration, processor: ViTPProcessor, dataset: Dataset) -> dict:
    """Return the loss on counts and on maps, with own and with swapped images."""
    collator, losses = ViTPDataCollator(processor), {}
    for name, write in {
        "count": lambda ground: (COUNT, str(len(ground.boxes))),
        "map": lambda ground: (MAP, write_map(ground)),
    }.items():
        messages = [question_turn(*write(TreeScene.of(row["image"], row["boxes"]))) for row in dataset]
        rows = dataset.select_columns(["id", "image"]).add_column("messages", messages)
        losses[name] = losses_with_own_and_other_images(model, collator, rows)
    return losses


def read_all(answers: list[str], dataset: Dataset) -> list[Box | None]:
    return [first_box(answer, image.size[0]) for answer, image in zip(answers, dataset["image"])]


def draw_tree_predictions(
    dataset: Dataset,
    answers: dict[str, list[str]],
    by_map: list[Box | None],
    path: Path,
    columns: int = 4,
    rows: int = 2,
):
    """Draw test crops with all true boxes, the largest tree's true and predicted boxes, and the answers."""
    figure = Figure(figsize=(3.4 * columns, 4.1 * rows), layout="constrained")
    chosen = np.linspace(0, len(dataset) - 1, columns * rows).astype(int)
    for axis, index in zip(figure.subplots(rows, columns).flat, chosen):
        row = dataset[int(index)]
        boxes, size = trees_in(row)
        axis.imshow(row["image"])
        for box in boxes:
            outline_box(axis, box.clip(0, size), "white", 0.8)
        if len(boxes):
            outline_box(axis, largest(boxes, size), "lime", 2)
        for predicted, color in ((first_box(answers[LOCATE][index], size), "red"), (by_map[index], "deepskyblue")):
            if predicted is not None:
                outline_box(axis, predicted, color, 2)
        truth = format_box(largest(boxes, size), size) if len(boxes) else "no tree"
        axis.set_title(f"{COUNT} {answers[COUNT][index]} (true: {len(boxes)})", fontsize=9)
        strip = re.compile(r"</?(?:ref|box)>|tree")
        axis.set_xlabel(f"largest: {strip.sub('', answers[LOCATE][index])}\ntrue: {strip.sub('', truth)}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle("White: all trees. Green: the largest. The model's answer in words: red, by maps: blue.")
    figure.savefig(path, dpi=110)


def outline_box(axis, box: Box, color: str, width: float):
    left, top, right, bottom = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=color, lw=width))


def write_probe_data(
    datasets: Mapping[str, Dataset], folder: Path, seed: int, jitter: ColorJitter | None = None
) -> DenseData:
    """Write images and crown masks for the probes.

    The split `train` has views as in pretraining (rotated and jittered crops, no mosaics). The others have plain crops
    without overlap.
    """
    write_views(datasets["train"], folder / "train", seed, jitter)
    for split in datasets.keys() - {"train"}:
        write_test(datasets[split], folder / split)
    return DenseData(
        classes=CLASSES,
        splits={
            split: {
                "image": f"{split}/images/{{name}}.{'png' if split == 'train' else 'jpg'}",
                "mask": f"{split}/masks/{{name}}.png",
            }
            for split in datasets
        },
        root=str(folder),
        ignore=[255],
    )


def write_views(rows: Dataset, folder: Path, seed: int, jitter: ColorJitter | None) -> None:
    rng, colors = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(rows):
        ground = TreeScene.of(row["image"], row["boxes"])
        for number in range(PROBE_VIEWS):
            view = view_of(ground, 1, rng).jittered(rng)
            name = f"{index:06d}_{number}"  # Files are read in the order of their names.
            image = view.image
            if jitter is not None:
                image = to_pil_image(jitter([to_pixels(image, None)], IMAGE_PROCESSOR, colors)[0])
            image.save(folder / "images" / f"{name}.png")
            Image.fromarray(view.crowns.astype(np.uint8)).save(folder / "masks" / f"{name}.png")
