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
from operator import itemgetter
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
BACKGROUND = "background"  # Word for the background of a map of words.
NO_CLASS = "none"  # Word for the background of a map of letters.
LETTERS = string.ascii_uppercase + string.ascii_lowercase
T = TypeVar("T")

IRREGULAR_PLURALS = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "foot": "feet",
}
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
        "classes": (
            "Which classes does the scene belong to?",
            "Name all classes of the scene.",
            "List the classes that are shown.",
        ),
        "presence": (
            "Is {label} a class of this scene?",
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
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


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
        self.subject = subject
        self.is_scene = subject == "scene"
        self.has_changes = "change_caption" in PHRASINGS[subject]
        self.wordings = wordings
        self.phrasings = {}
        for kind, templates in PHRASINGS[subject].items():
            self.phrasings[kind] = templates[:wordings]
        self.vocabulary = dict(sorted(vocabulary.items()))
        self.max_boxes = max_boxes
        self.seed = seed
        self.map_side = map_side
        self.signs = signs_of(self.vocabulary)

    def ask(self, kind: str, image: AnnotatedImage) -> list[Exchange]:
        """Return at most one exchange of a kind, or for `presence` at most one with yes and one with no."""
        generator = keyed_generator(self.seed, image.id, kind)
        exchanges = []
        for words, answer, asked_class in KINDS[kind](self, image, generator):
            template = pick(self.phrasings[kind], generator)
            question = template.format(**words)
            exchanges.append(Exchange(kind, question, answer, asked_class))
        return exchanges

    def absent(self, image: AnnotatedImage, generator: torch.Generator) -> str | None:
        """Return a random class that is absent from the image, or `None`."""
        visible = image.classes | image.cut
        candidates = [label for label in self.vocabulary if label not in visible]
        if not candidates:
            return None
        counts = [self.vocabulary[label] for label in candidates]
        weights = torch.tensor(counts, dtype=torch.float)
        index = torch.multinomial(weights, 1, generator=generator)
        return candidates[index.item()]


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
    if asker.has_changes:
        # A crop that shows less than half of a change has no region, but is not unchanged.
        is_clear = any(region.is_clear for region in image.regions)
        if is_clear or not image.visible:
            yield {}, "yes" if image.regions else "no", "change"
        return
    present_classes = {region.label for region in image.regions if region.is_clear}
    present_classes.update(image.labels or ())
    if present_classes:
        present_label = pick(sorted(present_classes), generator)
        yield words_for(present_label), "yes", present_label
    absent_label = asker.absent(image, generator)
    if absent_label is not None:
        yield words_for(absent_label), "no", absent_label


@register_kind("classification")
def classification(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    if not asker.is_scene:
        label = predominant_class(image)
        if label is not None:
            yield {}, label, None
        return
    if len(image.labels or ()) != 1:
        return
    (image_label,) = image.labels
    wrong_labels = [label for label in asker.vocabulary if label != image_label]
    wrong_options = shuffled(wrong_labels, generator)[: NUM_OPTIONS - 1]
    options = shuffled([image_label, *wrong_options], generator)
    yield {"options": listing(options, "or")}, image_label, None


@register_kind("classes")
def classes(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for all classes of an image with several or none; `classification` asks for a single one."""
    if image.labels is not None and len(image.labels) != 1:
        yield {}, ", ".join(image.labels) or "none", None


def predominant_class(image: AnnotatedImage) -> str | None:
    """Return the class whose area exceeds that of each other class and of the background by a margin, or `None`."""
    areas = Counter()
    for region in image.regions:
        areas[region.label] += region.area
    if not areas:
        return None
    height, width = image.size
    background_area = height * width - sum(areas.values())
    (label, area), *runners_up = areas.most_common(2)
    next_area = runners_up[0][1] if runners_up else 0
    if area >= MARGIN * max(next_area, background_area):
        return label
    return None


@register_kind("counting")
def counting(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    label, regions = class_or_absent(asker, image, generator)
    if label is not None:
        yield words_for(label), str(len(regions)), None


@register_kind("quarter_counting")
def quarter_counting(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the number of objects of a class whose centers lie in each quarter of the image."""
    label, regions = class_or_absent(asker, image, generator)
    if label is None:
        return
    counts = dict.fromkeys(QUARTERS, 0)
    for region in regions:
        counts[quarter_of(region, image.size)] += 1
    answer = ", ".join(f"{quarter} {count}" for quarter, count in counts.items())
    yield words_for(label), answer, None


@register_kind("grounding_one")
def grounding_one(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the only object of its class."""
    single_regions = []
    for label, regions in clear_classes(image).items():
        if len(regions) == 1 and label not in image.cut:
            single_regions += regions
    if single_regions:
        region = pick(single_regions, generator)
        answer = write_boxes([region.box], image.size, region.label)
        yield {"phrase": f"the {region.label}"}, answer, None


@register_kind("grounding_all")
def grounding_all(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for all objects of a class, in reading order."""
    if asker.has_changes:
        # Changes are of one class.
        label = next(iter(asker.vocabulary), None)
        regions = sorted(image.regions, key=reading_order)
        is_uncertain = not are_clear(regions) or (image.slivers and not regions)
        if is_uncertain:
            return
    else:
        label, regions = class_or_absent(asker, image, generator, asker.max_boxes)
    if label is None or len(regions) > asker.max_boxes:
        return
    if regions:
        phrase = label if len(regions) == 1 else plural(label)
        boxes = [region.box for region in regions]
        answer = write_boxes(boxes, image.size, phrase)
    else:
        answer = f"There is no {label}."
    yield words_for(label), answer, None


@register_kind("referring")
def referring(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for one of several objects of a class by its size or position."""
    references = []
    for label, regions in clear_classes(image).items():
        if label not in image.cut:
            references += references_to(regions, image.size)
    if references:
        phrase, region = pick(references, generator)
        answer = write_boxes([region.box], image.size, phrase)
        yield {"phrase": phrase}, answer, None


@register_kind("region_caption")
def region_caption(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the content of a box: its caption, or its class and whether it is the largest or smallest of several."""
    regions_by_class = clear_classes(image)
    candidates = []
    for regions in regions_by_class.values():
        candidates += [region for region in regions if has_place_alone(region, image)]
    if not candidates:
        return
    region = pick(candidates, generator)
    if region.caption is not None:
        caption = region.caption
    elif region.label in image.cut:
        caption = with_article(region.label)
    else:
        caption = class_and_size(region, regions_by_class[region.label], image.size)
    box = write_boxes([region.box], image.size)
    yield {"box": box}, caption, None


def has_place_alone(region: Region, image: AnnotatedImage) -> bool:
    """Return whether no other region of the image has almost the same box."""
    for candidate in image.regions:
        if candidate is region:
            continue
        if iou(region.box, candidate.box) > SAME_PLACE:
            return False
    return True


def class_and_size(region: Region, regions_of_class: list[Region], size: tuple[int, int]) -> str:
    """Return the class of a region, and whether the region is the largest or smallest of its class."""
    caption = with_article(region.label)
    for phrase, referent in references_to(regions_of_class, size):
        if referent is region and phrase.startswith(("the largest", "the smallest")):
            superlative = phrase.removesuffix(f" {region.label}")
            return f"{caption}, {superlative} of {len(regions_of_class)}"
    return caption


@register_kind("map")
def map_of_cells(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the class that covers most of each cell of a grid, with one word per cell."""
    covers = cell_covers(image, asker.map_side)
    signs = asker.signs
    if covers is None or not set(covers) <= signs.keys():
        return
    key = f"Write {listing(explained(signs), 'or')}."
    answer = " ".join(signs[cover] for cover in covers)
    yield {"side": asker.map_side, "key": key}, answer, None


@register_kind("fine_map")
def fine_map(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the quarters of each cell of a grid that a class covers, with one letter per cell.

    A letter from `a` to `p` counts the covered quarters of the cell: top left 1, top right 2, bottom left 4, bottom
    right 8. It is a capital if the center of an object of the class lies in the cell.
    """
    side = asker.map_side
    if not has_known_covers(image, 2 * side) or not asker.vocabulary:
        return
    covered_by_label = dict(covered_by_class(image))
    label = pick(sorted(covered_by_label) or list(asker.vocabulary), generator)
    covered = covered_by_label.get(label)
    if covered is None:
        covered = np.zeros(image.size, dtype=bool)
    letters = cover_letters(covered, side)
    if image.mask is None:
        for region in image.regions:
            if region.label == label:
                cell = cell_of_center(region, image.size, side)
                letters[cell] = letters[cell].upper()
    words = words_for(label)
    words["side"] = side
    yield words, " ".join(letters), None


def cover_letters(covered: np.ndarray, side: int) -> list[str]:
    """Return the letter of the covered quarters of each cell of a `side` x `side` grid, in reading order."""
    all_pixels = np.ones(covered.shape, dtype=bool)
    pixels_per_quarter = sum_per_cell(all_pixels, 2 * side)
    is_covered = 2 * sum_per_cell(covered, 2 * side) > pixels_per_quarter
    # The axes are row of cells, row of quarters in the cell, column of cells, column of quarters in the cell.
    quarters_of_rows = is_covered.reshape(side, 2, side, 2)
    quarters_of_cells = quarters_of_rows.transpose(0, 2, 1, 3).reshape(-1, 4)
    numbers = quarters_of_cells @ [1, 2, 4, 8]
    return [COVER_LETTERS[number] for number in numbers]


def cell_of_center(region: Region, size: tuple[int, int], side: int) -> int:
    """Return the cell of a `side` x `side` grid, counted in reading order, that contains the center of a region."""
    height, width = size
    x, y = region.center
    column = min(int(x * side / width), side - 1)
    row = min(int(y * side / height), side - 1)
    return row * side + column


@register_kind("change_caption")
def change_caption(asker: Asker, image: AnnotatedImage, generator: torch.Generator) -> Answers:
    """Ask for the change: one of the captions, or number, area and position of the changed regions."""
    if image.captions:
        yield {}, pick(image.captions, generator), None
    elif image.slivers:
        return  # The areas of the slivers are not known.
    elif not image.regions:
        yield {}, "Nothing has changed.", None
    elif are_clear(image.regions):
        yield {}, describe_change(image), None


def describe_change(image: AnnotatedImage) -> str:
    """Return number and area of the changed regions, and the quarter of the image with most of the area, if any."""
    height, width = image.size
    count = len(image.regions)
    label = image.regions[0].label
    total_area = sum(region.area for region in image.regions)
    percentage = 100 * total_area / (height * width)
    share = "less than 1%" if percentage < 1 else f"about {percentage:.0f}%"
    description = f"{count} {label if count == 1 else plural(label)}, {share} of the image"

    area_of_quarters = dict.fromkeys(QUARTERS, 0.0)
    for region in image.regions:
        if lies_in_one_quarter(region, image.size):
            area_of_quarters[quarter_of(region, image.size)] += region.area
    main_quarter = max(area_of_quarters, key=area_of_quarters.get)
    if 2 * area_of_quarters[main_quarter] >= MARGIN * total_area:
        description += f", most of it in the {main_quarter}"
    return f"{description}."


def vocabulary_of(images: Iterable[AnnotatedImage]) -> Counter[str]:
    """Return the number of images of each class."""
    vocabulary = Counter()
    for image in images:
        vocabulary.update(sorted(image.classes))
    return vocabulary


def make_conversations(
    images: Sequence[AnnotatedImage],
    asker: Asker,
    kinds: Sequence[str],
    turns: int,
) -> list[list[Exchange]]:
    """Return the exchanges about each image: at most `turns`, of random kinds, in random order.

    For each class, yes and no are equally frequent answers; surplus exchanges are removed.
    """
    conversations = [converse(image, asker, kinds, turns) for image in images]
    surplus = surplus_exchanges(conversations, asker.seed)
    balanced_conversations = []
    for index, conversation in enumerate(conversations):
        balanced = [exchange for exchange in conversation if (index, exchange) not in surplus]
        balanced_conversations.append(balanced)
    return balanced_conversations


def surplus_exchanges(conversations: Sequence[Sequence[Exchange]], seed: int) -> set[tuple[int, Exchange]]:
    """Return the presence exchanges whose removal makes yes and no equally frequent for each class.

    Each exchange is returned with the index of its conversation.
    """
    exchanges_by_class = defaultdict(lambda: {"yes": [], "no": []})
    for index, conversation in enumerate(conversations):
        for exchange in conversation:
            if exchange.kind == "presence":
                exchanges_by_answer = exchanges_by_class[exchange.about]
                exchanges_by_answer[exchange.answer].append((index, exchange))
    surplus = set()
    for label, exchanges_by_answer in exchanges_by_class.items():
        num_yes = len(exchanges_by_answer["yes"])
        num_no = len(exchanges_by_answer["no"])
        fewest = min(num_yes, num_no)
        for answer, exchanges in exchanges_by_answer.items():
            generator = keyed_generator(seed, label, answer)
            surplus.update(shuffled(exchanges, generator)[fewest:])
    return surplus


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
    exchanges = []
    for kind in kinds:
        exchanges += asker.ask(kind, image)
    generator = keyed_generator(asker.seed, image.id, "turns")
    conversation = shuffled(exchanges, generator)[:turns]
    if rates is None:
        return conversation
    generator = keyed_generator(asker.seed, image.id, "balance")
    balanced_conversation = []
    for exchange in conversation:
        rate = 1.0
        if exchange.kind == "presence":
            rate = rates.get((exchange.about, exchange.answer), 0.0)
        # A number is drawn for every exchange, so that the draw of one does not depend on the kinds before it.
        if draw_share(generator) < rate:
            balanced_conversation.append(exchange)
    return balanced_conversation


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
    asker: Asker,
    image: AnnotatedImage,
    generator: torch.Generator,
    most: int | None = None,
) -> tuple[str | None, list[Region]]:
    """Return a random class of the image with its regions, at most `most`, or sometimes an absent class."""
    is_negative = draw_share(generator) < NEGATIVE_SHARE
    if is_negative or not image.classes:
        absent_label = asker.absent(image, generator)
        if absent_label is not None or not image.classes:
            return absent_label, []
    regions_by_class = clear_classes(image)
    candidates = []
    for label, regions in regions_by_class.items():
        if most is None or len(regions) <= most:
            candidates.append(label)
    if not candidates:
        return None, []
    label = pick(candidates, generator)
    return label, regions_by_class[label]


def clear_classes(image: AnnotatedImage) -> dict[str, list[Region]]:
    """Return the regions, in reading order, of each class whose regions are all clear."""
    regions_by_class = defaultdict(list)
    # Sorting is stable, so that regions of the same label and position stay in the order of the annotation.
    for region in sorted(image.regions, key=reading_order):
        regions_by_class[region.label].append(region)
    clear_regions = {}
    for label, regions in sorted(regions_by_class.items()):
        if are_clear(regions):
            clear_regions[label] = regions
    return clear_regions


def are_clear(regions: Iterable[Region]) -> bool:
    return all(region.is_clear for region in regions)


def reading_order(region: Region) -> tuple[float, float]:
    """Return the sorting key of a region: its top, then its left."""
    x, y, _, _ = region.box
    return y, x


def references_to(regions: list[Region], size: tuple[int, int]) -> list[tuple[str, Region]]:
    """Return phrases that apply to exactly one of several regions of a class, by a margin, with that region."""
    if len(regions) < 2:
        return []
    peers_of_regions = []
    for region in regions:
        peers = [peer for peer in regions if peer is not region]
        peers_of_regions.append((region, peers))

    label = regions[0].label
    references = []
    for adjective, stands_out in comparisons_in(size).items():
        for region, peers in peers_of_regions:
            if all(stands_out(region, peer) for peer in peers):
                references.append((f"the {adjective} {label}", region))
    for quarter, quarter_box in quarters(size).items():
        for region, peers in peers_of_regions:
            if quarter_of(region, size) == quarter and are_outside(peers, quarter_box):
                references.append((f"the {label} in the {quarter}", region))
    return references


def comparisons_in(size: tuple[int, int]) -> dict[str, Callable[[Region, Region], bool]]:
    """Return, for each superlative, a function that returns whether it applies to the first of two regions.

    A position needs a margin between the centers, and the farthest side must be that of the same region.
    """
    height, width = size
    step_x = POSITION_MARGIN * width
    step_y = POSITION_MARGIN * height

    def is_larger(region, peer):
        has_larger_box = box_area(region.box) >= MARGIN * box_area(peer.box)
        return has_larger_box and region.area >= MARGIN * peer.area

    def is_smaller(region, peer):
        return is_larger(peer, region)

    def is_left(region, peer):
        has_margin = region.center[0] + step_x <= peer.center[0]
        return has_margin and region.box[0] < peer.box[0]

    def is_right(region, peer):
        has_margin = region.center[0] - step_x >= peer.center[0]
        return has_margin and region.box[2] > peer.box[2]

    def is_above(region, peer):
        has_margin = region.center[1] + step_y <= peer.center[1]
        return has_margin and region.box[1] < peer.box[1]

    def is_below(region, peer):
        has_margin = region.center[1] - step_y >= peer.center[1]
        return has_margin and region.box[3] > peer.box[3]

    return {
        "largest": is_larger,
        "smallest": is_smaller,
        "leftmost": is_left,
        "rightmost": is_right,
        "topmost": is_above,
        "bottommost": is_below,
    }


def are_outside(regions: Iterable[Region], area: Box) -> bool:
    """Return whether no box of the regions overlaps with an area."""
    for region in regions:
        overlap = clip(region.box, area)
        if box_area(overlap) > 0:
            return False
    return True


def quarters(size: tuple[int, int]) -> dict[str, Box]:
    """Return the box of each quarter of an image."""
    height, width = size
    middle_x = width / 2
    middle_y = height / 2
    boxes = (
        (0, 0, middle_x, middle_y),
        (middle_x, 0, width, middle_y),
        (0, middle_y, middle_x, height),
        (middle_x, middle_y, width, height),
    )
    return dict(zip(QUARTERS, boxes))


def quarter_of(region: Region, size: tuple[int, int]) -> str:
    """Return the quarter of the image that contains the center of the region's box."""
    height, width = size
    x, y = region.center
    is_right = x >= width / 2
    is_bottom = y >= height / 2
    return QUARTERS[2 * is_bottom + is_right]


def lies_in_one_quarter(region: Region, size: tuple[int, int]) -> bool:
    height, width = size
    x0, y0, x1, y1 = region.box
    crosses_vertical_line = x0 < width / 2 < x1
    crosses_horizontal_line = y0 < height / 2 < y1
    return not crosses_vertical_line and not crosses_horizontal_line


def draw_integer(stop: int, generator: torch.Generator) -> int:
    """Return a random integer from 0 to below `stop`."""
    return torch.randint(stop, (), generator=generator).item()


def draw_share(generator: torch.Generator) -> float:
    """Return a random number in [0, 1)."""
    return torch.rand((), generator=generator).item()


def pick(items: Sequence[T], generator: torch.Generator) -> T:
    return items[draw_integer(len(items), generator)]


def shuffled(items: Sequence[T], generator: torch.Generator) -> list[T]:
    order = torch.randperm(len(items), generator=generator)
    return [items[index] for index in order.tolist()]


def signs_of(phrases: Iterable[str]) -> dict[str | None, str]:
    """Return the word of each class, and of the background under `None`, in a map; a word is about one token.

    The words are the classes if all classes are single words, or else letters. If there are more classes than letters,
    the result is empty.
    """
    phrases = list(phrases)
    are_single_words = all(len(phrase.split()) < 2 for phrase in phrases)
    if are_single_words and BACKGROUND not in phrases:
        signs = dict(zip(phrases, phrases))
        signs[None] = BACKGROUND
    elif len(phrases) <= len(LETTERS):
        signs = dict(zip(phrases, LETTERS))
        signs[None] = NO_CLASS
    else:
        signs = {}
    return signs


def explained(signs: dict[str | None, str]) -> list[str]:
    """Return the explanation of each word of a map; the word for the background needs none."""
    explanations = []
    for phrase, sign in signs.items():
        if phrase is None or phrase == sign:
            explanations.append(sign)
        else:
            explanations.append(f"{sign} for {phrase}")
    return explanations


def cell_covers(image: AnnotatedImage, side: int) -> list[str | None] | None:
    """Return the class that covers most of each cell of a `side` x `side` grid, in reading order.

    A pixel belongs to the cell and to the boxes that contain its center. A pixel in boxes of several classes counts for
    each class. With equal counts, the background wins, then the first class in alphabetical order.

    Returns:
        Classes, with `None` for the background; or `None` if a region is not clear or a cell has no pixel, so that the
        annotation does not determine the answer.
    """
    if not has_known_covers(image, side):
        return None
    background = np.ones(image.size, dtype=bool)
    phrases = [None]
    counts_of_classes = []
    for phrase, covered in sorted(covered_by_class(image), key=itemgetter(0)):
        background &= ~covered
        phrases.append(phrase)
        counts_of_classes.append(sum_per_cell(covered, side).flatten())
    background_counts = sum_per_cell(background, side).flatten()
    # Of equal counts, argmax returns the first, so the background comes before the classes.
    indices = np.stack([background_counts, *counts_of_classes]).argmax(axis=0)
    return [phrases[index] for index in indices.tolist()]


def has_known_covers(image: AnnotatedImage, side: int) -> bool:
    """Return whether each cell of a `side` x `side` grid has a pixel, and the annotation says what covers it."""
    if min(image.size) < side:
        return False
    return image.mask is not None or are_clear(image.visible)


def sum_per_cell(covered: np.ndarray, side: int) -> np.ndarray:
    """Return the number of true pixels in each cell of a grid, int64 `(side, side)`.

    A pixel belongs to the cell that contains its center.
    """
    height, width = covered.shape
    first_rows = cell_starts(height, side)
    first_columns = cell_starts(width, side)
    sums_of_rows = np.add.reduceat(covered, first_rows, axis=0, dtype=np.int64)
    return np.add.reduceat(sums_of_rows, first_columns, axis=1)


def cell_starts(length: int, side: int) -> list[int]:
    """Return the first pixel of each of `side` cells along an axis of `length` pixels."""
    # The center of pixel p lies in cell c or after it if p + 1/2 >= c * length / side. The smallest such p is the
    # fraction (2 * c * length - side) / (2 * side), rounded up in integers by a negated floor division.
    starts = []
    for cell in range(side):
        numerator = 2 * cell * length - side
        starts.append(-(-numerator // (2 * side)))
    return starts


def covered_by_class(image: AnnotatedImage) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each visible class and the pixels that it covers, bool `(height, width)`."""
    if image.mask is not None:
        numbers, phrases = image.mask()
        for number in np.unique(numbers).tolist():
            if number > 0:
                yield phrases[number - 1], numbers == number
        return
    boxes_by_class = defaultdict(list)
    for region in image.visible:
        boxes_by_class[region.label].append(region.box)
    for label, boxes in boxes_by_class.items():
        covered = np.zeros(image.size, dtype=bool)
        for box in boxes:
            rows, columns = pixels_in(box)
            covered[rows, columns] = True
        yield label, covered


def pixels_in(box: Box) -> tuple[slice, slice]:
    """Return rows and columns of the pixels whose centers lie in a box."""
    # The center of pixel p is at p + 1/2. The first center at or after a side is that of the side - 1/2, rounded up.
    x0, y0, x1, y1 = (math.ceil(side - 0.5) for side in box)
    return slice(y0, y1), slice(x0, x1)


def words_for(label: str) -> dict[str, str]:
    return {
        "label": label,
        "labels": plural(label),
        "a_label": with_article(label),
    }


def with_article(label: str) -> str:
    has_vowel = label[:1].lower() in "aeiou"
    sounds_like_consonant = label.lower().startswith(("uni", "use", "util", "eu", "one"))
    article = "an" if has_vowel and not sounds_like_consonant else "a"
    return f"{article} {label}"


def plural(label: str) -> str:
    """Return a label with the plural of its last word, which may be a plural already, such as `buildings`."""
    *first_words, word = label.split(" ")
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
    return " ".join([*first_words, word])


def listing(items: Sequence[str], conjunction: str) -> str:
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {conjunction} {items[-1]}"
