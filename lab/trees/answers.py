"""Answers of the model on every image of a split, and scores of counts and boxes, compared with blind controls."""

import re

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from scipy import ndimage
from tqdm.auto import tqdm

from modeling_vitp import ViTPForConditionalGeneration, ViTPProcessor
from modeling_vitp.data.boxes import Box, iou
from modeling_vitp.instructions.boxes import read_boxes
from modeling_vitp.instructions.collator import NO_LABEL, ViTPDataCollator
from modeling_vitp.pretraining.generation import generate_answers

from .instructions import CELLS, COUNT, LOCATE, MAP, largest, read_map
from .views import TreeScene, is_inside, view_of

NUM_SAMPLES = 51
NUM_MAPS = 12
VIEWS_PER_WINDOW = 50
BATCH_SIZE = 32
NUMBER = re.compile(r"\d+")


def ask_all(
    model: ViTPForConditionalGeneration, processor: ViTPProcessor, dataset: Dataset, split: str
) -> dict[str, list[str]]:
    """Return the answers to `COUNT` and `LOCATE`."""
    sampling = {"do_sample": True, "top_k": 0, "samples": NUM_SAMPLES, "max_new_tokens": 4}
    sampled = ask_about(model, processor, dataset, COUNT, description=f"{split}: {COUNT}", **sampling)
    return {
        COUNT: [median_answer(sampled[i : i + NUM_SAMPLES]) for i in range(0, len(sampled), NUM_SAMPLES)],
        LOCATE: ask_about(model, processor, dataset, LOCATE, description=f"{split}: {LOCATE}"),
    }


def locate_by_map(
    model: ViTPForConditionalGeneration, processor: ViTPProcessor, dataset: Dataset, split: str
) -> list[Box | None]:
    """Return the largest tree's box in each image, as the [`central_box`] of `NUM_MAPS` sampled maps."""
    sampling = {"do_sample": True, "top_k": 0, "samples": NUM_MAPS, "max_new_tokens": CELLS**2}
    maps = ask_about(model, processor, dataset, MAP, description=f"{split}: {MAP}", **sampling)
    images = (image for image in dataset["image"] for _ in range(NUM_MAPS))
    boxes = [map_box(answer, image.size[0]) for image, answer in zip(images, maps)]
    return [central_box(boxes[start : start + NUM_MAPS]) for start in range(0, len(boxes), NUM_MAPS)]


@torch.no_grad()
def ask_about(
    model: ViTPForConditionalGeneration,
    processor: ViTPProcessor,
    dataset: Dataset,
    question: str,
    description: str | None = None,
    **generate_kwargs,
) -> list[str]:
    """Return the answers to one question about each image, greedy by default, with all visual tokens."""
    model.eval()
    answers = []
    for start in tqdm(range(0, len(dataset), BATCH_SIZE), desc=description):
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image in dataset[start : start + BATCH_SIZE]["image"]
        ]
        answers += generate_answers(model, processor, conversations, **{"max_new_tokens": 48, **generate_kwargs})
    return answers


def median_answer(answers: list[str]) -> str:
    """Return the answer with the median number; the first answer if none has a number."""
    numbered = sorted((answer for answer in answers if NUMBER.search(answer)), key=read_number)
    return numbered[(len(numbered) - 1) // 2] if numbered else answers[0]


def read_number(answer: str) -> int | None:
    number = NUMBER.search(answer)
    return int(number.group()) if number else None


def score_counts(answers: list[str], dataset: Dataset, constant: float) -> dict:
    """Return mean absolute errors. An answer without a number counts as the constant."""
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


def score_largest(predicted: list[Box | None], dataset: Dataset, constant: np.ndarray) -> dict:
    """Return the mean IoU with the largest tree over images with a tree. An answer without a box scores 0."""
    scores, swapped, blind, missing = [], [], [], 0
    others = predicted[len(predicted) // 2 :] + predicted[: len(predicted) // 2]
    for box, other, row in zip(predicted, others, dataset):
        boxes, size = trees_in(row)
        if len(boxes):
            target = largest(boxes, size)
            missing += box is None
            scores.append(overlap(box, target))
            swapped.append(overlap(other, target))
            blind.append(iou(constant * size, target))
    return {
        "mean_iou": float(np.mean(scores)),
        "mean_iou_swapped_images": float(np.mean(swapped)),
        "mean_iou_blind_constant": float(np.mean(blind)),
        "answers_without_box": missing,
    }


def overlap(predicted: Box | None, target: Box) -> float:
    return 0.0 if predicted is None else iou(predicted, target)


def first_box(answer: str, size: int) -> Box | None:
    """Return the first box of an answer, in pixels."""
    boxes, _ = read_boxes(answer)
    return boxes[0].in_pixels((size, size)) if boxes else None


def map_box(answer: str, size: int) -> Box | None:
    """Return the bounding box, in pixels, of the largest connected tree area of a map."""
    parts, num_parts = ndimage.label(read_map(answer))
    if num_parts == 0:
        return None
    rows, columns = ndimage.find_objects(parts)[np.bincount(parts.flat)[1:].argmax()]
    side = size / len(parts)
    return columns.start * side, rows.start * side, columns.stop * side, rows.stop * side


def central_box(boxes: list[Box | None]) -> Box | None:
    """Return the box with the greatest mean IoU with all boxes, the counterpart of a median."""
    found = [box for box in boxes if box is not None]
    return max(found, key=lambda box: sum(iou(box, other) for other in found), default=None)


def best_constant_box(boxes: np.ndarray) -> np.ndarray:
    """Return the one of 200 training boxes with the best mean IoU with all training boxes, the best blind answer."""
    chosen = boxes[np.linspace(0, len(boxes) - 1, min(200, len(boxes))).astype(int)]
    return max(chosen, key=lambda candidate: np.mean([iou(candidate, box) for box in boxes]))


def trees_in(row: dict) -> tuple[np.ndarray, int]:
    size = row["image"].size[0]
    boxes = np.array(row["boxes"], dtype=np.int64).reshape(-1, 4)
    return boxes[is_inside(boxes, size)], size


def training_views(dataset: Dataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tree counts, and the largest trees' boxes relative to the view, of random training views."""
    counts, boxes = [], []
    for row in dataset:
        ground, rng = TreeScene.of(row["image"], row["boxes"]), np.random.default_rng(seed)
        for _ in range(VIEWS_PER_WINDOW):
            view = view_of(ground, 1, rng)
            counts.append(len(view.boxes))
            if len(view.boxes):
                boxes.append(largest(view.boxes, view.size) / view.size)
    return np.array(counts), np.array(boxes)


def losses_with_own_and_other_images(
    model: ViTPForConditionalGeneration, collator: ViTPDataCollator, rows: Dataset, batch_size: int = 32
) -> dict[str, float]:
    """Return the mean loss of an answer token under teacher forcing, with own and with swapped images.

    The loss can fall without using the image, because an answer can be guessed from its beginning: neighboring cells of
    a map are similar, and sentences repeat. The increase with swapped images shows how much the image is used. Each row
    gets the image of the row that is half the rows away.

    Args:
        collator: collator of [`~modeling_vitp.instructions.collator.ViTPDataCollator.for_evaluation`].
        rows: rows with `messages` and `image`.

    Returns:
        `loss` and `loss_swapped_images`, in nats.
    """
    others = rows.select_columns("image").select(np.roll(np.arange(len(rows)), -(len(rows) // 2)))
    swapped = concatenate_datasets([rows.remove_columns("image"), others], axis=1)
    named = {"loss": rows, "loss_swapped_images": swapped}
    return {name: mean_answer_loss(model, collator, dataset, batch_size, name) for name, dataset in named.items()}


@torch.no_grad()
def mean_answer_loss(
    model: ViTPForConditionalGeneration, collator: ViTPDataCollator, rows: Dataset, batch_size: int, description: str
) -> float:
    """Return the mean loss over all answer tokens of the rows."""
    was_training = model.training
    model.eval()
    total = number = 0
    for start in tqdm(range(0, len(rows), batch_size), desc=description):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        tokens = (batch["labels"][:, 1:] != NO_LABEL).sum().item()
        inputs = {name: values.to(model.device) for name, values in batch.items()}
        total += model(**inputs).loss.item() * tokens
        number += tokens
    model.train(was_training)
    return total / number
