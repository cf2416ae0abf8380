"""Did the model learn to see? Counting and locating trees on unseen ground, against controls that do not look."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm
from transformers import set_seed

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor
from modeling_vitp.instructions.boxes import Box, iou, read_boxes
from modeling_vitp.training.outputs import attempt
from modeling_vitp.vrl import keyed_generator

from .instructions import COUNT, LOCATE, format_box, is_inside, largest, random_view

MAX_ERROR_RATIO = 0.8  # the gate: share of either control's count error that the model may make
NUM_SAMPLES = 51
VIEWS_PER_WINDOW = 50
BATCH_SIZE = 32
NUMBER = re.compile(r"\d+")


def evaluate(
    model: ViTPForConditionalGeneration, processor: ViTPProcessor, datasets: DatasetDict, output_dir: Path, seed: int
) -> dict:
    """Counts and locates trees in every test crop; writes `predictions.png` and returns the metrics.

    The count is the median of `NUM_SAMPLES` answers drawn from the model, which is what makes the mean absolute error
    least; greedy decoding would give the mode. (The constant that it is compared with is a median too.)

    The controls: the constant that is right for the training ground (the median count; the training box with the best
    mean IoU), and the model's own answers dealt to other images, half the split away. `passed` says whether the count
    error on the big scene's unseen part is at most `MAX_ERROR_RATIO` of both controls' errors.
    """
    set_seed(seed)
    counts, boxes = training_views(datasets["train"], seed)
    metrics, answers = {}, {}
    for split in ("test", "second_scene"):
        sampled = ask(
            model,
            processor,
            datasets[split],
            COUNT,
            description=f"{split}: {COUNT}",
            do_sample=True,
            top_k=0,
            num_return_sequences=NUM_SAMPLES,
            max_new_tokens=4,
        )
        answers[split] = {
            COUNT: [median_answer(sampled[i : i + NUM_SAMPLES]) for i in range(0, len(sampled), NUM_SAMPLES)],
            LOCATE: ask(model, processor, datasets[split], LOCATE, description=f"{split}: {LOCATE}"),
        }
        metrics[split] = {
            "num_images": len(datasets[split]),
            "count": score_counts(answers[split][COUNT], datasets[split], np.median(counts)),
            "grounding": score_boxes(answers[split][LOCATE], datasets[split], best_constant_box(boxes)),
        }
    shown = datasets["test"], answers["test"], output_dir / "predictions.png"
    if attempt(output_dir, "the picture of predictions", draw_predictions, *shown):
        metrics["failed"] = "predictions.png"
    count = metrics["test"]["count"]
    ratios = {
        "to_constant_median": count["mean_error"] / count["mean_error_constant_median"],
        "to_swapped_images": count["mean_error"] / count["mean_error_swapped_images"],
    }
    passed = all(ratio <= MAX_ERROR_RATIO for ratio in ratios.values())
    return metrics | {"gate": {"max_error_ratio": MAX_ERROR_RATIO, "error_ratios": ratios}, "passed": passed}


def training_views(dataset: Dataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and the largest trees' boxes in shares of the view, over random views of the training windows."""
    counts, boxes = [], []
    for row in dataset:
        generator = keyed_generator(seed, row["id"], "baseline")
        for _ in range(VIEWS_PER_WINDOW):
            view, trees = random_view(row["image"], row["boxes"], generator)
            counts.append(len(trees))
            if len(trees):
                boxes.append(largest(trees, view.size[0]) / view.size[0])
    return np.array(counts), np.array(boxes)


@torch.no_grad()
def ask(
    model: ViTPForConditionalGeneration,
    processor: ViTPProcessor,
    dataset: Dataset,
    question: str,
    description: str | None = None,
    **generate_kwargs,
) -> list[str]:
    """The model's answers to one question about each image, greedy by default, every visual token kept."""
    model.eval()
    answers = []
    for start in tqdm(range(0, len(dataset), BATCH_SIZE), desc=description):
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image in dataset[start : start + BATCH_SIZE]["image"]
        ]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)
        generated = model.generate(**inputs, **{"max_new_tokens": 48, "do_sample": False, **generate_kwargs})
        answers += processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def median_answer(answers: list[str]) -> str:
    """The answer with the median of the numbers in `answers`; the first if there is no number."""
    numbered = sorted((answer for answer in answers if NUMBER.search(answer)), key=read_number)
    return numbered[(len(numbered) - 1) // 2] if numbered else answers[0]


def read_number(answer: str) -> int | None:
    number = NUMBER.search(answer)
    return int(number.group()) if number else None


def score_counts(answers: list[str], dataset: Dataset, constant: float) -> dict:
    """Mean absolute errors; an answer without a number counts as the constant."""
    true = np.array([len(boxes) for boxes in dataset["boxes"]])
    numbers = [read_number(answer) for answer in answers]
    predicted = np.array([constant if number is None else number for number in numbers])
    swapped = np.roll(predicted, len(predicted) // 2)
    has_spread = predicted.std() > 0 and true.std() > 0
    return {
        "mean_error": float(np.abs(predicted - true).mean()),
        "mean_error_constant_median": float(np.abs(constant - true).mean()),
        "mean_error_swapped_images": float(np.abs(swapped - true).mean()),
        "constant_median": float(constant),
        "correlation": float(np.corrcoef(predicted, true)[0, 1]) if has_spread else 0.0,
        "answers_without_number": sum(number is None for number in numbers),
    }


def score_boxes(answers: list[str], dataset: Dataset, constant: np.ndarray) -> dict:
    """Mean IoU with the largest tree, over the images with a tree; an answer without a box scores 0."""
    scores, blind, missing = [], [], 0
    for answer, row in zip(answers, dataset):
        boxes, size = trees_in(row)
        if len(boxes):
            target, predicted = largest(boxes, size), first_box(answer, size)
            missing += predicted is None
            scores.append(0.0 if predicted is None else iou(predicted, target))
            blind.append(iou(constant * size, target))
    return {
        "mean_iou": float(np.mean(scores)),
        "mean_iou_blind_constant": float(np.mean(blind)),
        "answers_without_box": missing,
    }


def first_box(answer: str, size: int) -> Box | None:
    """The first box of an answer, in pixels."""
    boxes, _ = read_boxes(answer)
    return boxes[0].in_pixels((size, size)) if boxes else None


def best_constant_box(boxes: np.ndarray, candidates: int = 200) -> np.ndarray:
    """The training box with the best mean IoU with all of them: the strongest answer that does not look."""
    chosen = boxes[np.linspace(0, len(boxes) - 1, min(candidates, len(boxes))).astype(int)]
    return max(chosen, key=lambda candidate: np.mean([iou(candidate, box) for box in boxes]))


def trees_in(row: dict) -> tuple[np.ndarray, int]:
    size = row["image"].size[0]
    boxes = np.array(row["boxes"], dtype=np.int64).reshape(-1, 4)
    return boxes[is_inside(boxes, size)], size


def draw_predictions(dataset: Dataset, answers: dict[str, list[str]], path: Path, columns: int = 4, rows: int = 2):
    """Test crops with all true boxes, the largest tree's true and predicted box, and the answers."""
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 4.1 * rows), layout="constrained")
    chosen = np.linspace(0, len(dataset) - 1, columns * rows).astype(int)
    for axis, index in zip(axes.flat, chosen):
        row = dataset[int(index)]
        boxes, size = trees_in(row)
        axis.imshow(row["image"])
        for box in boxes:
            outline(axis, box.clip(0, size), "white", 0.8)
        if len(boxes):
            outline(axis, largest(boxes, size), "lime", 2)
        predicted = first_box(answers[LOCATE][index], size)
        if predicted is not None:
            outline(axis, predicted, "red", 2)
        truth = format_box(largest(boxes, size), size) if len(boxes) else "no tree"
        axis.set_title(f"{COUNT} {answers[COUNT][index]} (true: {len(boxes)})", fontsize=9)
        strip = re.compile(r"</?(?:ref|box)>|tree")
        axis.set_xlabel(f"largest: {strip.sub('', answers[LOCATE][index])}\ntrue: {strip.sub('', truth)}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle("Unseen ground. White: all trees. Green: the largest. Red: where the model says it is.")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def outline(axis, box: Box, color: str, width: float):
    left, top, right, bottom = box
    axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, ec=color, lw=width))
