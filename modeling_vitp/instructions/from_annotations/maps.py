"""Maps: what covers most of each cell of a grid over an image, one word a cell."""

import math
import string
from collections.abc import Iterable, Iterator

import numpy as np

from .annotations import AnnotatedImage, Region

GROUND = "background"  # what no class covers
NO_CLASS, LETTERS = "none", string.ascii_uppercase + string.ascii_lowercase


def signs_of(phrases: Iterable[str]) -> dict[str | None, str]:
    """Class, and `None` for the ground -> the word that stands for it in a map, each about one token.

    That is the class itself if all of them are single words, and else a letter; none if letters do not suffice.
    """
    phrases = list(phrases)
    if GROUND not in phrases and not any(len(phrase.split()) > 1 for phrase in phrases):
        return {**{phrase: phrase for phrase in phrases}, None: GROUND}
    return {**dict(zip(phrases, LETTERS)), None: NO_CLASS} if len(phrases) <= len(LETTERS) else {}


def explained(signs: dict[str | None, str]) -> list[str]:
    """What a question says of each sign; that of the ground explains itself."""
    return [sign if phrase in (sign, None) else f"{sign} for {phrase}" for phrase, sign in signs.items()]


def cell_covers(image: AnnotatedImage, side: int) -> list[str | None] | None:
    """The class that covers most of each cell of a grid of `side` x `side`, in reading order; `None` for the ground.

    A pixel lies in the cell, and in the boxes, that its centre lies in. One in boxes of several classes counts for
    each; ground is what lies in none. Of equals the ground goes first, then what comes first in the alphabet.

    Returns:
        `None` if the annotation leaves it open: of boxes if a region is not clear, and if a cell has no pixel.
    """
    if min(image.size) < side or (image.mask is None and not all(region.is_clear for region in regions_seen(image))):
        return None
    starts = [[-((-2 * cell * length + side) // (2 * side)) for cell in range(side)] for length in image.size]

    def per_cell(covered: np.ndarray) -> np.ndarray:
        rows = np.add.reduceat(covered, starts[0], axis=0, dtype=np.int64)
        return np.add.reduceat(rows, starts[1], axis=1).flatten()

    ground, phrases, counts = np.ones(image.size, dtype=bool), [None], []
    for phrase, covered in sorted(covered_by_class(image), key=lambda pair: pair[0]):
        ground &= ~covered
        phrases.append(phrase)
        counts.append(per_cell(covered))
    most = np.stack([per_cell(ground), *counts]).argmax(axis=0)
    return [phrases[place] for place in most.tolist()]


def covered_by_class(image: AnnotatedImage) -> Iterator[tuple[str, np.ndarray]]:
    """Each class that is seen, and the pixels that it covers, bool of shape (height, width)."""
    if image.mask is not None:
        numbers, phrases = image.mask()
        yield from ((phrases[number - 1], numbers == number) for number in np.unique(numbers).tolist() if number)
        return
    regions = regions_seen(image)
    for label in {region.label for region in regions}:
        covered = np.zeros(image.size, dtype=bool)
        for region in regions:
            if region.label == label:
                left, top, right, bottom = (math.ceil(end - 0.5) for end in region.box)
                covered[top:bottom, left:right] = True
        yield label, covered


def regions_seen(image: AnnotatedImage) -> tuple[Region, ...]:
    return (*image.regions, *image.slivers)
