"""Instructions about trees, made from boxes while training.

A row has an `image`, the `boxes` of its trees (`[left, top, right, bottom]`, pixels) and an `id`; see
`recipes/data/aerial_trees`. Training cuts, turns and asks afresh, so that every answer is true of the pixels that the
model sees.

What teaches the ViT to see is the map: one token for each visual token, in their order, so that a small language model
finds the place at once, and on collages, where no answer can be guessed from its own beginning. The other tasks need
what a map of neighbouring pixels does not: single crowns, how large they are, and how many.
"""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets

from modeling_vitp.instructions.boxes import GRID, grid_box
from modeling_vitp.recipes.data.build_tree_masks import check_apart

from .views import CROP, TreeScene, collage, view_of

QUARTERS = ("top left", "top right", "bottom left", "bottom right")
COUNT = "How many trees are there?"
LOCATE = "Where is the largest tree?"
MAP = "Map the trees."
CELLS = 7  # along each side of a map
MAP_WORDS = (
    "abcdefghijklmnop"  # of a cell, by which of its four quarters are tree; in capitals if a tree is centred there
)
BOX_STEP = 20  # of corners, on the grid of 1000: a tree is 40 to 200 wide

TURNS = 5


def prepare(datasets: DatasetDict, repeats: int = 64) -> tuple[Dataset, Dataset]:
    """Training rows, each window `repeats` times an epoch under an id of its own, and test rows with questions.

    Raises:
        ValueError: if a training row shows ground of a row to test on, by where it lies and not by its name.
    """
    for split in ("test", "second_scene"):
        check_apart(datasets["train"], datasets[split])
    test = datasets["test"]
    messages = [question_turn(COUNT, str(len(boxes))) for boxes in test["boxes"]]
    return repeat(datasets["train"], repeats), test.add_column("messages", messages)


def repeat(rows: Dataset, repeats: int = 64) -> Dataset:
    """Each row `repeats` times, under an id of its own."""
    names = rows["id"]
    ids = [f"{name}#{copy}" for copy in range(repeats) for name in names]
    return concatenate_datasets([rows.remove_columns("id")] * repeats).add_column("id", ids)


def window_id(row_id: str) -> str:
    """The window that a row repeats."""
    return row_id.partition("#")[0]


class TreeInstructions:
    """Turns a row into a view of the ground and a conversation about it, drawn by the generator alone.

    Args:
        rows: the training rows, from all of which collages take their pieces. Their images are decoded once, here.
        collage_share: of the views; what is asked of them is the map.
        map_share: of the views, beside those; the others are asked about in words.
        mosaic_share: of the views that are no collage.
        kinds: how often questions in words are asked beside the number of trees, by the names of [`KINDS`]; those that
            are not named are asked as often as by default, beside each other.
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
            raise ValueError(f"task_options: there are no kinds of questions {unknown}, only {sorted(KINDS)}.")
        shares = {"collage_share": collage_share, "map_share": map_share, "mosaic_share": mosaic_share}
        wrong = {name: share for name, share in shares.items() if not 0 <= share <= 1}
        if wrong or collage_share + map_share > 1:
            raise ValueError(f"task_options: {wrong or shares} are no shares of one whole.")
        self.collage_share, self.map_share, self.mosaic_share = shares.values()
        self.grounds = {row["id"]: TreeScene.of(row["image"], row["boxes"]) for row in rows}
        self.kinds = {name: (kinds or {}).get(name, share) for name, share in SHARES.items()}
        self.settings = shares | {"kinds": self.kinds}

    def __call__(self, example: dict, generator: torch.Generator) -> dict:
        view, messages = self.draw(example, generator)
        return {"images": [view.image], "messages": messages}

    def draw(self, example: dict, generator: torch.Generator) -> tuple[TreeScene, list[dict]]:
        """The view with all that is known about its pixels, and the conversation about it."""
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
    """A word for each cell, row by row: which of its quarters are tree, and whether the centre of a tree lies in it."""
    quarters = cell_means(view.crowns, 2 * CELLS) > 0.5
    quarters = quarters.reshape(CELLS, 2, CELLS, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    words = [MAP_WORDS[index] for index in quarters @ [1, 2, 4, 8]]
    centres = (view.boxes[:, :2] + view.boxes[:, 2:]) / 2
    for column, row in (centres * CELLS // view.size).astype(int).clip(0, CELLS - 1):
        words[row * CELLS + column] = words[row * CELLS + column].upper()
    return " ".join(words)


def read_map(answer: str) -> np.ndarray:
    """Which quarters of its cells a map says are tree, bool of shape `(2 * CELLS, 2 * CELLS)`; none of those of a cell
    without a word, or with one that [`write_map`] does not write.
    """
    cells = np.zeros(CELLS**2, dtype=np.int64)
    words = answer.lower().split()[: len(cells)]
    cells[: len(words)] = [MAP_WORDS.index(word) if word in [*MAP_WORDS] else 0 for word in words]
    quarters = (cells[:, None] >> np.arange(4)) & 1
    return quarters.reshape(CELLS, CELLS, 2, 2).swapaxes(1, 2).reshape(2 * CELLS, 2 * CELLS) == 1


def cell_means(values: np.ndarray, cells: int) -> np.ndarray:
    """The mean in each of `cells` × `cells` parts of a square; a pixel is in the part of its centre."""
    place = (2 * np.arange(len(values)) + 1) * cells // (2 * len(values))
    starts = np.searchsorted(place, np.arange(cells))
    sums = np.add.reduceat(np.add.reduceat(values, starts, axis=0, dtype=np.int64), starts, axis=1)
    counts = np.bincount(place, minlength=cells)
    return sums / (counts[:, None] * counts)


def converse(view: TreeScene, shares: dict[str, float], rng: np.random.Generator) -> list[dict]:
    """Questions in turns of one conversation: the number of trees, at a random place, and others."""
    probabilities = np.array(list(shares.values())) / sum(shares.values())
    asked = [KINDS[name] for name in rng.choice(list(shares), TURNS - 1, p=probabilities)]
    asked.insert(rng.integers(TURNS), ask_count)
    return [message for ask in asked for message in question_turn(*ask(view, rng))]


def question_turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def quarter_counts(view: TreeScene) -> list[int]:
    """Trees in each of `QUARTERS`, by the centres of their boxes."""
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
    """With a number close to the true one, on either side of it equally often."""
    number = max(len(view.boxes) + rng.integers(-3, 3), 0)
    return f"Are there more than {number} trees?", "yes" if len(view.boxes) > number else "no"


def ask_presence(view, rng):
    """Yes and no equally often wherever the view allows both."""
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
SHARES = dict(zip(KINDS, (0.1, 0.2, 0.2, 0.1, 0.07, 0.3, 0.03)))  # how often each is asked


def density(view: TreeScene) -> str:
    """By trees in the area of a test crop: under 4 open, under 12 sparse, otherwise dense."""
    count = len(view.boxes)
    per_crop = count * (CROP / view.size) ** 2
    return "no" if count == 0 else "open" if per_crop < 4 else "sparse" if per_crop < 12 else "dense"


def largest(boxes: np.ndarray, size: int) -> np.ndarray:
    """The box with the largest visible area, cut at the border."""
    visible = boxes.clip(0, size)
    return visible[np.argmax((visible[:, 2] - visible[:, 0]) * (visible[:, 3] - visible[:, 1]))]


def format_box(box: Sequence[float], size: int) -> str:
    """As InternVL writes it, with corners rounded to `BOX_STEP`, each of which is one token then."""
    corners = [round(corner / BOX_STEP) * BOX_STEP for corner in grid_box(tuple(box), (size, size))]
    lows = [min(corner, GRID - BOX_STEP) for corner in corners[:2]]
    highs = [max(high, low + BOX_STEP) for low, high in zip(lows, corners[2:])]
    return f"<ref>tree</ref><box>[{lows + highs}]</box>"
