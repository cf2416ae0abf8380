"""Instructions about trees, generated from boxes during training.

A row has an `image`, the `boxes` of its trees (`[left, top, right, bottom]` in pixels) and an `id`, as in
`lab/data/aerial_trees`. Each epoch draws new crops, rotations and questions. The answers are computed from the
view, so they are correct for the pixels that the model sees.

The map task trains the ViT most: it has one answer token for each visual token, in the same order, so that a small
language model learns the correspondence quickly. On collages, an answer cannot be guessed from its beginning. The other
tasks need single crowns, their size and their number, which a map does not.
"""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets

from lab.data.build_tree_masks import check_apart
from modeling_vitp.instructions.boxes import GRID, grid_box

from .views import CROP, TreeScene, collage, view_of

QUARTERS = ("top left", "top right", "bottom left", "bottom right")
COUNT = "How many trees are there?"
LOCATE = "Where is the largest tree?"
MAP = "Map the trees."
CELLS = 7  # cells a side of a map
MAP_WORDS = (
    "abcdefghijklmnop"  # encode which quarters of a cell are tree; in capitals if a tree is centered in the cell
)
BOX_STEP = 20  # step of box corners on the grid of 1000; a tree is 40 to 200 wide

TURNS = 5


def prepare(datasets: DatasetDict) -> tuple[Dataset, Dataset]:
    """Return training rows, with each window 64 times an epoch under distinct ids, and test rows with questions.

    Raises:
        ValueError: if the ground of a training row overlaps that of a test row.
    """
    for split in ("test", "second_scene"):
        check_apart(datasets["train"], datasets[split])
    test = datasets["test"]
    messages = [question_turn(COUNT, str(len(boxes))) for boxes in test["boxes"]]
    return repeat(datasets["train"], 64), test.add_column("messages", messages)


def repeat(rows: Dataset, repeats: int) -> Dataset:
    """Repeat each row `repeats` times under distinct ids."""
    names = rows["id"]
    ids = [f"{name}#{copy}" for copy in range(repeats) for name in names]
    return concatenate_datasets([rows.remove_columns("id")] * repeats).add_column("id", ids)


def window_id(row_id: str) -> str:
    """Return the id of the window that a row repeats."""
    return row_id.partition("#")[0]


class TreeInstructions:
    """Transform that converts a row to a random view of the ground and a conversation about it.

    Args:
        rows: training rows, from which collages are assembled. Their images are decoded once.
        collage_share: share of the views that are collages, with a map as the answer.
        map_share: share of the views that are not collages and have a map as the answer. All other views have a
            conversation in words.
        mosaic_share: share of mosaics among the views that are not collages.
        kinds: relative frequencies of the questions in words, by the names of [`KINDS`], in addition to the question
            for the number of trees. Default: [`SHARES`].
    """

    makes_images = True

    def __init__(
        self,
        rows: Dataset,
        collage_share: float = 0.5,
        map_share: float = 0.2,
        mosaic_share: float = 0.5,
        kinds: dict[str, float] | None = None,
    ):
        unknown = sorted(set(kinds or {}) - set(KINDS))
        if unknown:
            raise ValueError(f"task_options: unknown kinds of questions {unknown}. Expected some of {sorted(KINDS)}.")
        shares = {"collage_share": collage_share, "map_share": map_share, "mosaic_share": mosaic_share}
        wrong = {name: share for name, share in shares.items() if not 0 <= share <= 1}
        if wrong or collage_share + map_share > 1:
            raise ValueError(f"task_options: shares must be in [0, 1] with a sum of at most 1, got {wrong or shares}.")
        self.collage_share, self.map_share, self.mosaic_share = shares.values()
        self.grounds = {row["id"]: TreeScene.of(row["image"], row["boxes"]) for row in rows}
        self.kinds = {name: (kinds or {}).get(name, share) for name, share in SHARES.items()}
        self.settings = shares | {"kinds": self.kinds}

    def __call__(self, example: dict, generator: torch.Generator) -> dict:
        view, messages = self.draw(example, generator)
        return {"images": [view.image], "messages": messages}

    def draw(self, example: dict, generator: torch.Generator) -> tuple[TreeScene, list[dict]]:
        """Draw a view with its annotation, and a conversation about it."""
        rng = np.random.default_rng(torch.randint(2**62, (), generator=generator).item())
        kind = rng.random()
        if kind < self.collage_share:
            view = collage(list(self.grounds.values()), rng)
            messages = question_turn(MAP, write_map(view))
        else:
            view = view_of(self.grounds[window_id(example["id"])], 2 if rng.random() < self.mosaic_share else 1, rng)
            is_map = kind < self.collage_share + self.map_share
            messages = question_turn(MAP, write_map(view)) if is_map else converse(view, self.kinds, rng)
        return view.jittered(rng), messages


def write_map(view: TreeScene) -> str:
    """Write a word for each cell, row by row, that encodes its tree quarters and whether a tree is centered in it."""
    quarters = cell_means(view.crowns, 2 * CELLS) > 0.5
    quarters = quarters.reshape(CELLS, 2, CELLS, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    words = [MAP_WORDS[index] for index in quarters @ [1, 2, 4, 8]]
    centers = (view.boxes[:, :2] + view.boxes[:, 2:]) / 2
    for column, row in (centers * CELLS // view.size).astype(int).clip(0, CELLS - 1):
        words[row * CELLS + column] = words[row * CELLS + column].upper()
    return " ".join(words)


def read_map(answer: str) -> np.ndarray:
    """Return the tree quarters of a map, bool of shape `(2 * CELLS, 2 * CELLS)`.

    Cells with a missing or unknown word have no tree quarters.
    """
    cells = np.zeros(CELLS**2, dtype=np.int64)
    words = answer.lower().split()[: len(cells)]
    cells[: len(words)] = [MAP_WORDS.index(word) if word in [*MAP_WORDS] else 0 for word in words]
    quarters = (cells[:, None] >> np.arange(4)) & 1
    return quarters.reshape(CELLS, CELLS, 2, 2).swapaxes(1, 2).reshape(2 * CELLS, 2 * CELLS) == 1


def cell_means(values: np.ndarray, cells: int) -> np.ndarray:
    """Return the mean of each of `cells` × `cells` parts of a square. A pixel belongs to the part of its center."""
    part = (2 * np.arange(len(values)) + 1) * cells // (2 * len(values))
    starts = np.searchsorted(part, np.arange(cells))
    sums = np.add.reduceat(np.add.reduceat(values, starts, axis=0, dtype=np.int64), starts, axis=1)
    counts = np.bincount(part, minlength=cells)
    return sums / (counts[:, None] * counts)


def converse(view: TreeScene, shares: dict[str, float], rng: np.random.Generator) -> list[dict]:
    """Draw a conversation with the question for the number of trees, at a random turn, and other questions."""
    probabilities = np.array(list(shares.values())) / sum(shares.values())
    asked = [KINDS[name] for name in rng.choice(list(shares), TURNS - 1, p=probabilities)]
    asked.insert(rng.integers(TURNS), ask_count)
    return [message for ask in asked for message in question_turn(*ask(view, rng))]


def question_turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def quarter_counts(view: TreeScene) -> list[int]:
    """Return the number of trees in each of `QUARTERS`, by the centers of their boxes."""
    is_right, is_bottom = ((view.boxes[:, :2] + view.boxes[:, 2:]) / 2 >= view.size / 2).T
    return np.bincount(2 * is_bottom + is_right, minlength=4).tolist()


def ask_count(view, rng):
    return COUNT, str(len(view.boxes))


def ask_quarter_count(view, rng):
    quarter = rng.integers(4)
    return f"How many trees are in the {QUARTERS[quarter]} quarter?", str(quarter_counts(view)[quarter])


def ask_every_quarter_count(view, rng):
    counts = zip(QUARTERS, quarter_counts(view))
    return "How many trees are in each quarter?", ", ".join(f"{quarter} {count}" for quarter, count in counts)


def ask_comparison(view, rng):
    """Ask for a comparison with a number close to the true one, equally often above and below it."""
    number = max(len(view.boxes) + rng.integers(-3, 3), 0)
    return f"Are there more than {number} trees?", "yes" if len(view.boxes) > number else "no"


def ask_presence(view, rng):
    """Ask for a tree in a quarter, with yes and no equally often if the view allows both."""
    counts = np.array(quarter_counts(view))
    wanted = rng.random() < 0.5
    candidates = np.flatnonzero((counts > 0) == wanted)
    quarter = rng.choice(candidates if len(candidates) else 4)
    return f"Is there a tree in the {QUARTERS[quarter]} quarter?", "yes" if counts[quarter] else "no"


def ask_location(view, rng):
    if len(view.boxes) == 0:
        return LOCATE, "There is no tree."
    return LOCATE, format_box(largest(view.seen, view.size), view.size)


def ask_density(view, rng):
    return "How dense is the forest?", density(view)


def ask_description(view, rng):
    if len(view.boxes) == 0:
        return "Describe the image.", "An aerial image of open ground without trees."
    fullest = QUARTERS[int(np.argmax(quarter_counts(view)))]
    return (
        "Describe the image.",
        f"An aerial image of {density(view)} forest, most trees in the {fullest}.",
    )


KINDS = {
    "quarter count": ask_quarter_count,
    "count of every quarter": ask_every_quarter_count,
    "comparison": ask_comparison,
    "presence": ask_presence,
    "density": ask_density,
    "location": ask_location,
    "description": ask_description,
}
SHARES = dict(zip(KINDS, (0.1, 0.2, 0.2, 0.1, 0.07, 0.3, 0.03)))  # relative frequencies


def density(view: TreeScene) -> str:
    """Return the density by trees in the area of a test crop: under 4 open, under 12 sparse, otherwise dense."""
    count = len(view.boxes)
    per_crop = count * (CROP / view.size) ** 2
    return "no" if count == 0 else "open" if per_crop < 4 else "sparse" if per_crop < 12 else "dense"


def largest(boxes: np.ndarray, size: int) -> np.ndarray:
    """Return the box with the largest visible area, cut at the border."""
    visible = boxes.clip(0, size)
    return visible[np.argmax((visible[:, 2] - visible[:, 0]) * (visible[:, 3] - visible[:, 1]))]


def format_box(box: Sequence[float], size: int) -> str:
    """Format a box as InternVL does, with corners rounded to `BOX_STEP` so that each corner is a single token."""
    corners = [round(corner / BOX_STEP) * BOX_STEP for corner in grid_box(tuple(box), (size, size))]
    lows = [min(corner, GRID - BOX_STEP) for corner in corners[:2]]
    highs = [max(high, low + BOX_STEP) for low, high in zip(lows, corners[2:])]
    return f"<ref>tree</ref><box>[{lows + highs}]</box>"
