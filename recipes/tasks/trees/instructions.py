"""Instructions about trees, made from boxes while training.

A row has an `image`, the `boxes` of its trees (`[left, top, right, bottom]`, pixels) and an `id`; see
`recipes/data/aerial_trees`. Training crops, flips and turns at random and asks afresh, so that every answer is true of
the pixels that the model sees. A tree belongs to a crop if the centre of its box lies in it.
"""

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from PIL import Image

from modeling_vitp.instructions.boxes import write_boxes

CROP = 224  # pixels of a test crop; training crops are CROP * scale
SCALES = (0.85, 1.15)
MOSAIC_SHARE = 0.7  # of the views
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
COUNT = "How many trees are there?"
LOCATE = "Where is the largest tree?"


def prepare(datasets: DatasetDict, repeats: int = 32) -> tuple[Dataset, Dataset]:
    """Training rows, each window `repeats` times an epoch under an id of its own, and test rows with questions."""
    test = datasets["test"]
    messages = [turn(COUNT, str(len(boxes))) for boxes in test["boxes"]]
    return repeat(datasets["train"], repeats), test.add_column("messages", messages)


def repeat(rows: Dataset, repeats: int = 32) -> Dataset:
    """Each row `repeats` times, under an id of its own."""
    ids = rows["id"]
    copies = [rows.remove_columns("id").add_column("id", [f"{name}#{copy}" for name in ids]) for copy in range(repeats)]
    return concatenate_datasets(copies)


def transform(example: dict, generator: torch.Generator) -> dict:
    """A random crop of the row's image in a random orientation, and a conversation about it."""
    image, boxes = random_view(example["images"][0], example["boxes"], generator)
    return {"images": [image], "messages": converse(boxes, image.size[0], generator)}


def random_view(
    image: Image.Image, boxes: list[list[int]], generator: torch.Generator
) -> tuple[Image.Image, np.ndarray]:
    """A random square view; boxes of shape (num_trees, 4), in pixels of the view, uncut.

    Some views are one crop, most are mosaics of four, each part flipped and turned by itself: a scene of this
    size has few different crops but many mosaics, and only a model that counts locally is right about all of them.
    """
    boxes = np.array(boxes, dtype=np.int64).reshape(-1, 4)
    parts = 2 if uniform(0, 1, generator) < MOSAIC_SHARE else 1  # along each side
    size = min(round(CROP * uniform(*SCALES, generator)), *image.size) // parts

    places = [[int(uniform(0, side - size + 1, generator)) for side in image.size] for _ in range(parts**2)]
    view, trees = Image.new("RGB", (size * parts, size * parts)), []
    for index, (left, top) in enumerate(places):
        part = image.crop((left, top, left + size, top + size))
        part, part_boxes = turn_at_random(part, inside(boxes, (left, top), size), generator)
        corner = (index % parts * size, index // parts * size)
        view.paste(part, corner)
        trees.append(part_boxes + corner * 2)
    return view, np.concatenate(trees)


def turn_at_random(image: Image.Image, boxes: np.ndarray, generator: torch.Generator) -> tuple[Image.Image, np.ndarray]:
    """One of the eight orientations of a square image."""
    size = image.size[0]
    if uniform(0, 1, generator) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = np.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], axis=1)
    for _ in range(int(uniform(0, 4, generator))):  # a quarter turn takes (x, y) to (y, size - x)
        image = image.transpose(Image.Transpose.ROTATE_90)
        boxes = np.stack([boxes[:, 1], size - boxes[:, 2], boxes[:, 3], size - boxes[:, 0]], axis=1)
    return image, boxes


def inside(boxes: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    """The boxes whose centres lie in the square of `size` pixels at `corner`, in its pixels."""
    boxes = boxes - [*corner, *corner]
    return boxes[is_inside(boxes, size)]


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def is_inside(boxes: np.ndarray, size: int) -> np.ndarray:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres >= 0) & (centres < size)).all(axis=1)


def converse(boxes: np.ndarray, size: int, generator: torch.Generator) -> list[dict]:
    """Five questions in turns of one conversation: the number of trees, at a random place, and four of other kinds.

    The kinds with long answers are rarer: the loss is a mean over tokens, and one box has as many as eight counts.
    """
    kinds = list(KINDS)
    chosen = torch.multinomial(torch.tensor(list(KINDS.values())), TURNS - 1, replacement=True, generator=generator)
    asked = [kinds[index] for index in chosen.tolist()]
    asked.insert(torch.randint(TURNS, (), generator=generator).item(), ask_count)
    return [message for ask in asked for message in turn(*ask(boxes, size, generator))]


def turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def quarter_counts(boxes: np.ndarray, size: int) -> list[int]:
    """Trees in each of `QUARTERS`, by the centres of their boxes."""
    is_right, is_bottom = ((boxes[:, :2] + boxes[:, 2:]) / 2 >= size / 2).T
    return np.bincount(2 * is_bottom + is_right, minlength=4).tolist()


def ask_count(boxes, size, generator):
    return COUNT, str(len(boxes))


def ask_quarter_count(boxes, size, generator):
    quarter = torch.randint(4, (), generator=generator).item()
    return f"How many trees are in the {QUARTERS[quarter]} quarter?", str(quarter_counts(boxes, size)[quarter])


def ask_every_quarter_count(boxes, size, generator):
    counts = zip(QUARTERS, quarter_counts(boxes, size))
    return "How many trees are in each quarter?", ", ".join(f"{quarter} {count}" for quarter, count in counts)


def ask_comparison(boxes, size, generator):
    """With a number close to the true one, on either side of it equally often."""
    number = max(len(boxes) + torch.randint(-3, 3, (), generator=generator).item(), 0)
    return f"Are there more than {number} trees?", "yes" if len(boxes) > number else "no"


def ask_presence(boxes, size, generator):
    """Yes and no equally often wherever the view allows both."""
    counts = np.array(quarter_counts(boxes, size))
    wanted = torch.rand((), generator=generator).item() < 0.5
    candidates = np.flatnonzero((counts > 0) == wanted)
    if len(candidates) == 0:
        candidates = np.arange(4)
    quarter = candidates[torch.randint(len(candidates), (), generator=generator).item()]
    return f"Is there a tree in the {QUARTERS[quarter]} quarter?", "yes" if counts[quarter] else "no"


def ask_location(boxes, size, generator):
    if len(boxes) == 0:
        return LOCATE, "There is no tree."
    return LOCATE, format_box(largest(boxes, size), size)


def ask_density(boxes, size, generator):
    return "How dense is the forest?", density(len(boxes), size)


def ask_description(boxes, size, generator):
    if len(boxes) == 0:
        return "Describe the image.", "An aerial image of open ground without trees."
    fullest = QUARTERS[int(np.argmax(quarter_counts(boxes, size)))]
    return "Describe the image.", f"An aerial image of {density(len(boxes), size)} forest, most trees in the {fullest}."


KINDS = {  # of question, and how often each is asked
    ask_quarter_count: 0.1,
    ask_every_quarter_count: 0.35,
    ask_comparison: 0.3,
    ask_presence: 0.1,
    ask_density: 0.07,
    ask_location: 0.05,
    ask_description: 0.03,
}

TURNS = 5


def density(count: int, size: int) -> str:
    """By trees in the area of a test crop: under 4 open, under 12 sparse, otherwise dense."""
    per_crop = count * (CROP / size) ** 2
    return "no" if count == 0 else "open" if per_crop < 4 else "sparse" if per_crop < 12 else "dense"


def largest(boxes: np.ndarray, size: int) -> np.ndarray:
    """The box with the largest visible area, cut at the border."""
    visible = boxes.clip(0, size)
    return visible[np.argmax((visible[:, 2] - visible[:, 0]) * (visible[:, 3] - visible[:, 1]))]


def format_box(box: np.ndarray, size: int) -> str:
    return write_boxes([box.tolist()], (size, size), "tree")
