"""Questions about annotated images, with answers that follow from the annotation alone.

Each kind of question is a function from an image to exchanges, or to none if the annotation does not determine the
answer. The question and its wording depend on the seed and the id of the image alone.
"""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ...data.annotations import AnnotatedImage, Region
from ...data.boxes import Box, box_area, clip, iou
from ...vrl import keyed_generator
from ..boxes import COVER_LETTERS, write_boxes

MARGIN = 1.25  # Minimum ratio of the areas of the largest region and the next, and likewise for the smallest.
POSITION_MARGIN = 0.05  # Minimum distance of the leftmost region from the next, as a share of the image's side.
SAME_PLACE = 0.5  # IoU above which a box is ambiguous between two objects.
NEGATIVE_SHARE = 0.2  # Share of counting and grounding questions that ask about absent classes.
NUM_OPTIONS = 4
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
BACKGROUND, NO_CLASS = "background", "none"  # Words for the background of a map, without and with letters.
LETTERS = string.ascii_uppercase + string.ascii_lowercase
T = TypeVar("T")

IRREGULAR_PLURALS = {"person": "people", "man": "men", "woman": "women", "child": "children", "foot": "feet"}
SAME_PLURALS = ("aircraft", "spacecraft", "sheep", "fish", "deer", "cattle", "series", "livestock", "people")
LOCATE_ONE = ("Where is {phrase}?", "Give the box of {phrase}.", "Locate <ref>{phrase}</ref> in the image.")
LOCATE_ALL = ("Find all {labels}.", "Mark every {label} in the image with a box.", "Give the boxes of all {labels}.")

MAP = (
    "What covers most of each cell of a grid of {side} x {side} over the image, row by row? {key}",
    "Divide the image into {side} rows of {side} cells and say what covers most of each, in reading order. {key}",
    "Map the image in {side} x {side} cells, from the top left to the bottom right. {key}",
)

FINE_MAP = (
    # One wording, so that the k-th letter is always as far from the k-th visual token.
    "Map the {labels} in {side} x {side} cells, with a letter for the covered quarters of each.",
)

CAPTION_REGION = (
    "What is in the region {box}?",
    "Describe the object at {box}.",
    "What does the box {box} show?",
)

PHRASINGS: dict[str, dict[str, tuple[str, ...]]] = {  # Templates by subject of the annotation and kind of question.
    "objects": {
        "presence": ("Is there {a_label} in the image?", "Can you see {a_label}?", "Does the image show {a_label}?"),
        "counting": (
            "How many {labels} are in the image?",
            "What is the number of {labels}?",
            "Count the {labels} in the image.",
        ),
        "quarter_counting": (
            "How many {labels} are in each quarter of the image?",
            "Count the {labels} in the top left, top right, bottom left and bottom right.",
        ),
        "grounding_one": LOCATE_ONE,
        "grounding_all": LOCATE_ALL,
        "referring": LOCATE_ONE,
        "region_caption": CAPTION_REGION,
        "map": MAP,
        "fine_map": FINE_MAP,
    },
    "scene": {
        "classification": (
            "What kind of scene is this?",
            "Which class does the scene belong to?",
            "Name the class of the scene.",
            "Which of these is shown: {options}?",
            "Choose the class of the scene from {options}.",
        ),
        "presence": (
            "Is {label} the class of this scene?",
            "Does the scene belong to the class {label}?",
            "Would you classify the scene as {label}?",
        ),
    },
    "regions": {
        "classification": (
            "What covers the largest part of the image?",
            "Which class has the largest area?",
            "What is most of the image, of all classes in it?",
        ),
        "presence": ("Is there any {label} in the image?", "Can you see {label}?", "Does the image show any {label}?"),
        "grounding_one": LOCATE_ONE,
        "grounding_all": (
            "Find all regions of {label}.",
            "Mark every region of {label} with a box.",
            "Give the boxes of all {label} regions.",
        ),
        "referring": LOCATE_ONE,
        "region_caption": CAPTION_REGION,
        "map": MAP,
        "fine_map": FINE_MAP,
    },
    "change": {
        "presence": (
            "Has anything changed between the two images?",
            "Is there a change from the first image to the second?",
            "Do the two images show a change?",
        ),
        "grounding_all": (
            "Find all {labels} in the second image.",
            "Mark every {label} with a box.",
            "Where did something change? Give the boxes of all {labels}.",
        ),
        "change_caption": (
            "What has changed between the two images?",
            "Describe the change from the first image to the second.",
            "Compare the two images: what is different in the second?",
        ),
    },
}


@dataclass(frozen=True)
class Exchange:
    """Question and answer; `about` is the class of a yes-or-no question."""

    kind: str
    question: str
    answer: str
    about: str | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


class Asker:
    """Generator of questions about the images of one data set.

    Args:
        subject: subject of the annotation, a key of `PHRASINGS`.
        vocabulary: number of images of each class. Absent classes for negative questions are drawn with this weight.
        max_boxes: maximum number of boxes in an answer; classes with more regions are not asked for.
        map_side: number of cells per side of a map.
        seed: seed of all draws.
        wordings: number of wordings of each kind of question, the first ones of `PHRASINGS`; all if `None`.
    """

    def __init__(
        self,
        subject: str,
        vocabulary: dict[str, int],
        max_boxes: int = 20,
        map_side: int = 7,
        seed: int = 0,
        wordings: int | None = None,
    ):
        self.subject, self.is_scene, self.wordings = subject, subject == "scene", wordings
        self.phrasings = {kind: texts[:wordings] for kind, texts in PHRASINGS[subject].items()}
        self.vocabulary, self.max_boxes, self.seed = dict(sorted(vocabulary.items())), max_boxes, seed
        self.map_side, self.signs = map_side, signs_of(self.vocabulary)

    def ask(self, kind: str, image: AnnotatedImage) -> list[Exchange]:
        """Return at most one exchange of a kind, or for `presence` at most one with yes and one with no."""
        generator = keyed_generator(self.seed, image.id, kind)
        return [
            Exchange(kind, pick(self.phrasings[kind], generator).format(**words), answer, about)
            for words, answer, about in KINDS[kind](self, image, generator)
        ]

    def absent(self, image: AnnotatedImage, generator: torch.Generator) -> str | None:
        """Return a random class that is absent from the image, or `None`."""
        visible = image.classes | image.cut
        candidates = {label: count for label, count in self.vocabulary.items() if label not in visible}
        if not candidates:
            return None
        chosen = torch.multinomial(torch.tensor(list(candidates.values()), dtype=torch.float), 1, generator=generator)
        return list(candidates)[chosen.item()]


Answers = Iterable[tuple[dict[str, str], str, str | None]]  # Words of the question, answer, class of a yes or no.
KINDS: dict[str, Callable[[Asker, AnnotatedImage, torch.Generator], Answers]] = {}


def register_kind(name: str) -> Callable:
    """Return a decorator that registers a function for a kind of question, a key of `PHRASINGS`."""

    def register(answers: Callable) -> Callable:
        KINDS[name] = answers
        return answers

    return register


@register_kind("presence")
def presence(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    if "change_caption" in asker.phrasings:
        # A crop that shows less than half of a change has no region, but is not unchanged.
        if any(region.is_clear for region in image.regions) or not image.visible:
            yield {}, "yes" if image.regions else "no", "change"
        return
    present = sorted({region.label for region in image.regions if region.is_clear} | ({image.label} - {None}))
    if present:
        label = pick(present, generator)
        yield words_for(label), "yes", label
    label = asker.absent(image, generator)
    if label is not None:
        yield words_for(label), "no", label


@register_kind("classification")
def classification(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    if asker.is_scene:
        if image.label is not None:
            others = [label for label in asker.vocabulary if label != image.label]
            options = [image.label, *shuffled(others, generator)[: NUM_OPTIONS - 1]]
            yield {"options": listing(shuffled(options, generator), "or")}, image.label, None
        return
    areas = Counter()
    for region in image.regions:
        areas[region.label] += region.area
    unnamed = image.size[0] * image.size[1] - sum(areas.values())
    ranked = [*areas.most_common(2), (None, 0)]
    if areas and ranked[0][1] >= MARGIN * max(ranked[1][1], unnamed):
        yield {}, ranked[0][0], None


@register_kind("counting")
def counting(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    label, regions = class_or_absent(asker, image, generator)
    if label is not None:
        yield words_for(label), str(len(regions)), None


@register_kind("quarter_counting")
def quarter_counting(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the number of objects of a class whose centers lie in each quarter of the image."""
    label, regions = class_or_absent(asker, image, generator)
    if label is not None:
        counts = Counter(quarter_of(region, image.size) for region in regions)
        yield words_for(label), ", ".join(f"{quarter} {counts[quarter]}" for quarter in QUARTERS), None


@register_kind("grounding_one")
def grounding_one(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the only object of its class."""
    single = [
        regions[0] for label, regions in clear_classes(image).items() if len(regions) == 1 and label not in image.cut
    ]
    if single:
        region = pick(single, generator)
        yield {"phrase": f"the {region.label}"}, write_boxes([region.box], image.size, region.label), None


@register_kind("grounding_all")
def grounding_all(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for all objects of a class, in reading order."""
    if "change_caption" in asker.phrasings:
        label, regions = next(iter(asker.vocabulary), None), list(image.regions)
        if not all(region.is_clear for region in regions) or (image.slivers and not regions):
            return
        regions.sort(key=lambda region: (region.box[1], region.box[0]))
    else:
        label, regions = class_or_absent(asker, image, generator, asker.max_boxes)
    if label is None or len(regions) > asker.max_boxes:
        return
    if regions:
        phrase = label if len(regions) == 1 else plural(label)
        yield words_for(label), write_boxes([region.box for region in regions], image.size, phrase), None
    else:
        yield words_for(label), f"There is no {label}.", None


@register_kind("referring")
def referring(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for one of several objects of a class by its size or position."""
    references = [
        (reference, region)
        for label, regions in clear_classes(image).items()
        if label not in image.cut
        for reference, region in references_to(regions, image.size)
    ]
    if references:
        phrase, region = pick(references, generator)
        yield {"phrase": phrase}, write_boxes([region.box], image.size, phrase), None


@register_kind("region_caption")
def region_caption(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the content of a box: its caption, or its class and whether it is the largest or smallest of several."""
    by_class = clear_classes(image)
    clear = [region for regions in by_class.values() for region in regions]
    alone = [
        region
        for region in clear
        if all(other is region or iou(region.box, other.box) <= SAME_PLACE for other in image.regions)
    ]
    if not alone:
        return
    region = pick(alone, generator)
    caption = region.caption
    if caption is None:
        regions = [] if region.label in image.cut else by_class[region.label]
        sizes = [
            phrase.removesuffix(f" {region.label}")
            for phrase, referent in references_to(regions, image.size)
            if referent is region and phrase.startswith(("the largest", "the smallest"))
        ]
        caption = f"{with_article(region.label)}, {sizes[0]} of {len(regions)}" if sizes else with_article(region.label)
    yield {"box": write_boxes([region.box], image.size)}, caption, None


@register_kind("map")
def map_of_cells(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the class that covers most of each cell of a grid, with one word per cell."""
    covers, signs = cell_covers(image, asker.map_side), asker.signs
    if covers is not None and set(covers) <= signs.keys():
        words = {"side": asker.map_side, "key": f"Write {listing(explained(signs), 'or')}."}
        yield words, " ".join(signs[cover] for cover in covers), None


@register_kind("fine_map")
def fine_map(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the quarters of each cell of a grid that a class covers, with one letter per cell.

    A letter from `a` to `p` counts the covered quarters of the cell: top left 1, top right 2, bottom left 4, bottom
    right 8. It is a capital if the center of an object of the class lies in the cell.
    """
    side = asker.map_side
    if min(image.size) < 2 * side or (image.mask is None and not all(region.is_clear for region in image.visible)):
        return
    covered_pixels = dict(covered_by_class(image))
    if not asker.vocabulary:
        return
    label = pick(sorted(covered_pixels) or list(asker.vocabulary), generator)
    covered = covered_pixels.get(label, np.zeros(image.size, dtype=bool))
    pixels_per_quarter = sum_per_cell(np.ones(image.size, dtype=bool), 2 * side)
    is_covered = 2 * sum_per_cell(covered, 2 * side) > pixels_per_quarter
    quarters_of_cells = is_covered.reshape(side, 2, side, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    letters = [COVER_LETTERS[number] for number in quarters_of_cells @ [1, 2, 4, 8]]
    for region in image.regions if image.mask is None else ():
        if region.label == label:
            height, width = image.size
            x, y = region.center
            column, row = min(int(x * side / width), side - 1), min(int(y * side / height), side - 1)
            cell = row * side + column
            letters[cell] = letters[cell].upper()
    yield {**words_for(label), "side": side}, " ".join(letters), None


@register_kind("change_caption")
def change_caption(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the change: one of the captions, or number, area and position of the changed regions."""
    if image.captions:
        yield {}, pick(image.captions, generator), None
        return
    if image.slivers:  # whose areas are not known
        return
    if not image.regions:
        yield {}, "Nothing has changed.", None
    elif all(region.is_clear for region in image.regions):
        count, label = len(image.regions), image.regions[0].label
        share = 100 * sum(region.area for region in image.regions) / (image.size[0] * image.size[1])
        text = f"{count} {label if count == 1 else plural(label)}, "
        text += "less than 1% of the image" if share < 1 else f"about {share:.0f}% of the image"
        areas = Counter(dict.fromkeys(QUARTERS, 0.0))
        for region in image.regions:
            if lies_in_one_quarter(region, image.size):
                areas[quarter_of(region, image.size)] += region.area
        ((place, most),) = areas.most_common(1)
        total = sum(region.area for region in image.regions)
        yield {}, f"{text}, most of it in the {place}." if 2 * most >= MARGIN * total else f"{text}.", None


def vocabulary_of(images: Iterable[AnnotatedImage]) -> Counter[str]:
    """Return the number of images of each class."""
    return Counter(label for image in images for label in sorted(image.classes))


def make_conversations(
    images: Sequence[AnnotatedImage], asker: Asker, kinds: Sequence[str], turns: int
) -> list[list[Exchange]]:
    """Return the exchanges about each image: at most `turns`, of random kinds, in random order.

    For each class, yes and no are equally frequent answers; surplus exchanges are removed.
    """
    conversations = [converse(image, asker, kinds, turns) for image in images]
    by_class = defaultdict(lambda: {"yes": [], "no": []})
    for index, conversation in enumerate(conversations):
        for exchange in conversation:
            if exchange.kind == "presence":
                by_class[exchange.about][exchange.answer].append((index, exchange))
    surplus = set()
    for label, answers in by_class.items():
        kept = min(map(len, answers.values()))
        for answer, found in answers.items():
            surplus.update(shuffled(found, keyed_generator(asker.seed, label, answer))[kept:])
    return [
        [exchange for exchange in conversation if (index, exchange) not in surplus]
        for index, conversation in enumerate(conversations)
    ]


def converse(
    image: AnnotatedImage,
    asker: Asker,
    kinds: Sequence[str],
    turns: int,
    rates: Mapping[tuple[str | None, str], float] | None = None,
) -> list[Exchange]:
    """Return at most `turns` exchanges about an image, of random kinds, in random order.

    Args:
        image: labeled image.
        asker: questions about the image.
        kinds: kinds of questions.
        turns: maximum number of exchanges.
        rates: shares of the presence exchanges to keep, see [`balancing_rates`]; all by default.
    """
    exchanges = [exchange for kind in kinds for exchange in asker.ask(kind, image)]
    chosen = shuffled(exchanges, keyed_generator(asker.seed, image.id, "turns"))[:turns]
    if rates is None:
        return chosen
    generator, kept = keyed_generator(asker.seed, image.id, "balance"), []
    for exchange in chosen:
        rate = rates.get((exchange.about, exchange.answer), 0.0) if exchange.kind == "presence" else 1.0
        if torch.rand((), generator=generator).item() < rate:
            kept.append(exchange)
    return kept


def balancing_rates(exchanges: Iterable[Exchange]) -> dict[tuple[str | None, str], float]:
    """Return the share of presence exchanges to keep, by class and answer, for equally frequent yes and no.

    A class with only one of the two answers gets the share 0.
    """
    counts = Counter((exchange.about, exchange.answer) for exchange in exchanges)
    rates = {}
    for (label, answer), count in counts.items():
        fewest = min(counts[label, "yes"], counts[label, "no"])
        rates[label, answer] = fewest / count
    return rates


def class_or_absent(
    asker: Asker, image: AnnotatedImage, generator: torch.Generator, most: int | None = None
) -> tuple[str | None, list[Region]]:
    """Return a random class of the image with its regions, at most `most`, or sometimes an absent class."""
    classes = {
        label: regions for label, regions in clear_classes(image).items() if most is None or len(regions) <= most
    }
    is_negative = torch.rand((), generator=generator).item() < NEGATIVE_SHARE
    if is_negative or not image.classes:
        absent = asker.absent(image, generator)
        if absent is not None or not image.classes:
            return absent, []
    if not classes:
        return None, []
    label = pick(list(classes), generator)
    return label, classes[label]


def clear_classes(image: AnnotatedImage) -> dict[str, list[Region]]:
    """Return the regions, in reading order, of each class whose regions are all clear."""
    by_label = defaultdict(list)
    for region in sorted(image.regions, key=lambda region: (region.box[1], region.box[0], region.label)):
        by_label[region.label].append(region)
    return {label: regions for label, regions in sorted(by_label.items()) if all(region.is_clear for region in regions)}


def references_to(regions: list[Region], size: tuple[int, int]) -> list[tuple[str, Region]]:
    """Return phrases that apply to exactly one of several regions of a class, by a margin, with that region."""
    if len(regions) < 2:
        return []
    label, (step_y, step_x) = regions[0].label, (POSITION_MARGIN * side for side in size)

    def is_larger(a, b):
        return a.area >= MARGIN * b.area and box_area(a.box) >= MARGIN * box_area(b.box)

    stands_out = {
        f"the largest {label}": is_larger,
        f"the smallest {label}": lambda a, b: is_larger(b, a),
        f"the leftmost {label}": lambda a, b: a.center[0] + step_x <= b.center[0] and a.box[0] < b.box[0],
        f"the rightmost {label}": lambda a, b: a.center[0] - step_x >= b.center[0] and a.box[2] > b.box[2],
        f"the topmost {label}": lambda a, b: a.center[1] + step_y <= b.center[1] and a.box[1] < b.box[1],
        f"the bottommost {label}": lambda a, b: a.center[1] - step_y >= b.center[1] and a.box[3] > b.box[3],
    }
    for quarter, area in quarters(size).items():
        stands_out[f"the {label} in the {quarter}"] = lambda a, b, quarter=quarter, area=area: (
            quarter_of(a, size) == quarter and box_area(clip(b.box, area)) == 0
        )
    return [
        (phrase, region)
        for phrase, differs in stands_out.items()
        for region in regions
        if all(differs(region, other) for other in regions if other is not region)
    ]


def quarters(size: tuple[int, int]) -> dict[str, Box]:
    height, width = size
    corners = [(left, top) for top in (0, height / 2) for left in (0, width / 2)]
    return {name: (x, y, x + width / 2, y + height / 2) for name, (x, y) in zip(QUARTERS, corners)}


def quarter_of(region: Region, size: tuple[int, int]) -> str:
    """Return the quarter of the image that contains the center of the region's box."""
    is_right, is_bottom = (center >= side / 2 for center, side in zip(region.center, size[::-1]))
    return QUARTERS[2 * is_bottom + is_right]


def lies_in_one_quarter(region: Region, size: tuple[int, int]) -> bool:
    sides = zip(region.box[:2], region.box[2:], size[::-1])
    return all(high <= side / 2 or low >= side / 2 for low, high, side in sides)


def pick(items: Sequence[T], generator: torch.Generator) -> T:
    return items[torch.randint(len(items), (), generator=generator).item()]


def shuffled(items: Sequence[T], generator: torch.Generator) -> list[T]:
    return [items[index] for index in torch.randperm(len(items), generator=generator).tolist()]


def signs_of(phrases: Iterable[str]) -> dict[str | None, str]:
    """Return the word of each class, and of the background under `None`, in a map; a word is about one token.

    The words are the classes if all classes are single words, or else letters. If there are more classes than letters,
    the result is empty.
    """
    phrases = list(phrases)
    if BACKGROUND not in phrases and not any(len(phrase.split()) > 1 for phrase in phrases):
        return {**{phrase: phrase for phrase in phrases}, None: BACKGROUND}
    return {**dict(zip(phrases, LETTERS)), None: NO_CLASS} if len(phrases) <= len(LETTERS) else {}


def explained(signs: dict[str | None, str]) -> list[str]:
    """Return the explanation of each word of a map; the word for the background needs none."""
    return [sign if phrase in (sign, None) else f"{sign} for {phrase}" for phrase, sign in signs.items()]


def cell_covers(image: AnnotatedImage, side: int) -> list[str | None] | None:
    """Return the class that covers most of each cell of a `side` x `side` grid, in reading order.

    A pixel belongs to the cell and to the boxes that contain its center. A pixel in boxes of several classes counts for
    each class. With equal counts, the background wins, then the first class in alphabetical order.

    Returns:
        Classes, with `None` for the background; or `None` if a region is not clear or a cell has no pixel, so that the
        annotation does not determine the answer.
    """
    if min(image.size) < side or (image.mask is None and not all(region.is_clear for region in image.visible)):
        return None
    ground, phrases, counts = np.ones(image.size, dtype=bool), [None], []
    for phrase, covered in sorted(covered_by_class(image), key=lambda pair: pair[0]):
        ground &= ~covered
        phrases.append(phrase)
        counts.append(sum_per_cell(covered, side).flatten())
    most = np.stack([sum_per_cell(ground, side).flatten(), *counts]).argmax(axis=0)
    return [phrases[index] for index in most.tolist()]


def sum_per_cell(covered: np.ndarray, side: int) -> np.ndarray:
    """Return the number of true pixels in each cell of a grid, int64 `(side, side)`.

    A pixel belongs to the cell that contains its center.
    """
    starts = [[-((-2 * cell * length + side) // (2 * side)) for cell in range(side)] for length in covered.shape]
    rows = np.add.reduceat(covered, starts[0], axis=0, dtype=np.int64)
    return np.add.reduceat(rows, starts[1], axis=1)


def covered_by_class(image: AnnotatedImage) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each visible class and the pixels that it covers, bool `(height, width)`."""
    if image.mask is not None:
        numbers, phrases = image.mask()
        yield from ((phrases[number - 1], numbers == number) for number in np.unique(numbers).tolist() if number)
        return
    regions = image.visible
    for label in {region.label for region in regions}:
        covered = np.zeros(image.size, dtype=bool)
        for region in regions:
            if region.label == label:
                left, top, right, bottom = (math.ceil(end - 0.5) for end in region.box)
                covered[top:bottom, left:right] = True
        yield label, covered


def words_for(label: str) -> dict[str, str]:
    return {"label": label, "labels": plural(label), "a_label": with_article(label)}


def with_article(label: str) -> str:
    is_vowel = label[:1].lower() in "aeiou" and not label.lower().startswith(("uni", "use", "util", "eu", "one"))
    return f"{'an' if is_vowel else 'a'} {label}"


def plural(label: str) -> str:
    """Return a label with the plural of its last word, which may be a plural already, such as `buildings`."""
    *before, word = label.split(" ")
    if word in IRREGULAR_PLURALS:
        word = IRREGULAR_PLURALS[word]
    elif word in SAME_PLURALS or re.search("[^isu]s$|[0-9]$", word):
        pass
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        word = word[:-1] + "ies"
    else:
        word += "s"
    return " ".join([*before, word])


def listing(items: Sequence[str], conjunction: str) -> str:
    return f" {conjunction} ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
