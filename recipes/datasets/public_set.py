"""Public data sets as they are downloaded: what one is, and how its files become rows.

Each has a file of its own in `public_sets/` (or anywhere), with a class `Set` that is a [`PublicSet`].
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePath
from string import ascii_uppercase
from typing import Any, NamedTuple

from datasets.data_files import SPLIT_KEYWORDS

from modeling_vitp.images.reading import IMAGE_SUFFIXES, below
from modeling_vitp.instructions.boxes import Box, box_area, clip, write_boxes
from modeling_vitp.instructions.from_annotations.formats import read_annotation, read_text
from modeling_vitp.instructions.from_annotations.layouts import plain_words
from modeling_vitp.instructions.from_annotations.questions import PHRASINGS
from modeling_vitp.instructions.rows import image_size
from modeling_vitp.instructions.schemas import as_list
from modeling_vitp.instructions.sources import numbered_rows

LOCATE = ("Where is {phrase}?", "Give the box of {phrase}.", "Locate {phrase} in the image.")
DESCRIBE = ("Describe the image.", "What does the image show?", "Write a caption for the image.")


class Stored(NamedTuple):
    """An image that lies in a table and has no file of its own."""

    name: str
    """Of the file that it is written to."""
    content: bytes

    @property
    def encoded(self) -> dict:
        """As `datasets` stores an image."""
        return {"path": self.name, "bytes": self.content}


class Entry(NamedTuple):
    """What a file holds that rows are made of."""

    place: str
    """File and line, for errors."""
    content: Any
    """A `ValueError` if it cannot be read."""


class Row(NamedTuple):
    """A conversation about images."""

    id: str
    images: tuple[str | Stored, ...]
    """Files are named from the folder of the data set. Those of a set are all files, or all out of tables."""
    turns: tuple[tuple[str, str], ...]
    """Questions with their answers; where none says `<image>`, the images go before the first."""


class HeldOut(ValueError):
    """What is of a split that is not trained on, and has to be left out."""


class PublicSet:
    """A public data set. A set of LLaVA conversations only fills in the fields; others say what a row is.

    Args:
        folder: the data set's, as `layout` shows it.

    Fields:
        title: what it is called.
        license: of images and annotations, as its page has it.
        obtain: the page where it can be had.
        layout: the files below its folder that are read, as they are once archives are unpacked.
        seen: what the layout was taken from.
        paper_rows: rows that the paper's table has, which rounds them.
        released_rows: rows that the released mixture has, where that is known.
        annotations: files with rows, as patterns from the folder.
        image_root: the folder, from the data set's, that annotations name images from.
        splits: that are trained on. What has the name of another, in that of its file or in a folder's, is never read.
        drawn: whether no more than `paper_rows` are used, drawn from all.
        modality, tasks, general: as in a mixture.
        caution: what is to be known before training on it.
    """

    title: str
    license: str
    obtain: str
    layout: str
    seen: str
    paper_rows: int | None = None
    released_rows: int | None = None
    annotations: tuple[str, ...] = ()
    image_root: str = ""
    splits: tuple[str, ...] = ("train",)
    drawn: bool = False
    modality: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    general: bool = False
    caution: str = ""

    def __init__(self, folder: Path):
        self.folder = folder
        self.size = lru_cache(maxsize=1000)(self._size)

    def entries(self) -> Iterable[Entry]:
        """What rows are made of, one after another; here the rows of the files of `annotations`."""
        for pattern in self.annotations:
            for path in self.files(pattern):
                yield from self.table(path)

    def rows(self, entry: Any) -> Iterable[Row]:
        """The rows that an entry becomes; here one, of a LLaVA conversation.

        Raises:
            ValueError, KeyError, TypeError, IndexError: if it cannot be used. It is named, and the others go on.
        """
        images = entry.get("image") or []
        images = images if isinstance(images, list) else [images]
        turns = as_list(entry["conversations"])
        if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError("questions and answers do not take turns")
        texts = [self.text(turn["value"]) for turn in turns]
        yield self.row(entry.get("id"), images, zip(texts[::2], texts[1::2]))

    def text(self, text: str) -> str:
        """What is written for a text of a LLaVA conversation: the same, unless boxes have another form there."""
        return text

    def held_out_images(self) -> Iterable[str]:
        """Names of images, as annotations have them, that are also in a split that is held out."""
        return ()

    def row(self, row_id: Any, images: str | Sequence[str | Stored], turns: Iterable[tuple[str, str]]) -> Row:
        """A row, with names of images as the annotations have them."""
        images = [images] if isinstance(images, (str, Stored)) else images
        named = [image if isinstance(image, Stored) else str(PurePath(self.image_root, image)) for image in images]
        return Row("" if row_id is None else str(row_id), tuple(named), tuple(turns))

    def locate(self, image: str, box: Box, phrase: str) -> tuple[str, str]:
        """A question where a phrase is in an image, and its answer; the box is in pixels.

        Raises:
            ValueError: if there is no phrase, or nothing of the box lies in the image.
        """
        phrase = " ".join(phrase.split())
        if not phrase:
            raise ValueError("there is no phrase to locate")
        question = one_of(LOCATE, image + phrase).format(phrase=f"<ref>{phrase}</ref>")
        return question, self.box(image, box, phrase)

    def describe(self, image: str, caption: str) -> tuple[str, str]:
        """A question for a description of an image, and the description."""
        return one_of(DESCRIBE, image + caption), caption

    def classify(self, image: str, label: str) -> tuple[str, str]:
        """A question what an image shows, and its answer: the class, as a folder or a file has it, in plain words."""
        ways = [way for way in PHRASINGS["scene"]["classification"] if "{" not in way]
        return one_of(ways, image), plain_words(label)

    def choose(self, question: str, choices: Iterable[str], right: str) -> tuple[str, str]:
        """A question with choices that have letters, and the letter and text of the right one.

        Raises:
            ValueError: if that is none of the choices.
        """
        choices, right = [choice.strip() for choice in choices], right.strip()
        if right not in choices:
            raise ValueError(f"the answer {right!r} is none of the choices {choices}")
        lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices)]
        return "\n".join([question.strip(), *lines]), lines[choices.index(right)]

    def box(self, image: str, box: Box, phrase: str = "") -> str:
        """A box in pixels of an image, as it is written in an answer, cut to the image.

        Raises:
            ValueError: if nothing of it lies in the image.
        """
        height, width = self.size(image)
        inside = clip(box, (0, 0, width, height))
        if box_area(inside) <= 0:
            raise ValueError(f"the box {list(box)} has no area inside {image} of {width} x {height} pixels")
        return write_boxes([inside], (height, width), phrase)

    def _size(self, image: str) -> tuple[int, int]:
        """Height and width of an image that the annotations name, from its header."""
        return image_size(str(below(self.folder, PurePath(self.image_root, image))))

    def files(self, pattern: str) -> list[Path]:
        """The files that a pattern finds, in order, without those of held-out splits.

        Raises:
            ValueError: says what the folder should look like, if there are none.
        """
        found = [path for path in sorted(self.folder.glob(pattern)) if path.is_file() and not self.is_held_out(path)]
        if not found:
            raise self.missing(pattern)
        return found

    def missing(self, name: str) -> ValueError:
        """The error of files that are not there."""
        return ValueError(
            f"{self.folder} has no {name}. `vitp make_public_set {type(self).__module__.rpartition('.')[2]}` shows "
            f"what is expected there, of {self.title}: {self.obtain}"
        )

    def pictures(self, pattern: str) -> Iterator[Entry]:
        """The images that a pattern finds, by their names from the folder."""
        for path in self.files(pattern):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield Entry(str(path), str(path.relative_to(self.folder)))

    def table(self, path: Path, held_out: bool = False) -> Iterator[Entry]:
        """The rows of a JSON list, JSON Lines, CSV or TSV; a file that is none is one entry, with its error.

        Args:
            held_out: whether it is read to leave out what is in it. All of it has to be readable then.

        Raises:
            ValueError: if something of what is held out is not known.
        """
        if not held_out:
            self.check(path)
        try:
            for number, row in numbered_rows(path):
                if held_out and not isinstance(row, dict):
                    raise ValueError(f"row {number} of {path}, which says what is held out, is none: {str(row)[:80]}")
                yield Entry(f"{path}, row {number}", row)
        except (OSError, ValueError) as error:
            if held_out:
                raise
            yield Entry(str(path), ValueError(str(error)))

    def json(self, name: str) -> Any:
        """What a JSON that is no list of rows holds. Raises a `ValueError` that names it if it is none."""
        path = self.folder / name
        self.check(path)
        if not path.is_file():
            raise self.missing(name)
        return read_annotation(path)

    def lines(self, name: str, held_out: bool = False) -> list[str]:
        """The lines of a text that are not empty, without the spaces around them; see `table` for `held_out`."""
        path = self.folder / name
        if not held_out:
            self.check(path)
        if not path.is_file():
            raise self.missing(name)
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]

    def samples(self, pattern: str) -> Iterator[Entry]:
        """The samples of WebDataset's archives: ending -> content, and under `key` the archive and the sample."""
        for path in self.files(pattern):
            try:
                with tarfile.open(path) as archive:
                    files = (member for member in archive if member.isfile())
                    for key, members in groupby(files, lambda member: member.name.partition(".")[0]):
                        name = str(path.relative_to(self.folder).with_suffix("") / key)
                        sample = {one.name.partition(".")[2]: archive.extractfile(one).read() for one in members}
                        yield Entry(f"{path}, {key}", {"key": name, **sample})
            except (tarfile.TarError, OSError, EOFError) as error:
                yield Entry(str(path), ValueError(f"it is no whole archive: {error}"))

    def is_held_out(self, path: Path | str) -> bool:
        """Whether a file is, by a word of its name or of its folders', of a split that is not trained on."""
        words = set(re.split(r"[^a-z]+", str(Path(path).relative_to(self.folder)).lower()))
        return any(words & set(names) for split, names in SPLIT_KEYWORDS.items() if str(split) not in self.splits)

    def check(self, path: Path) -> None:
        """Raises [`HeldOut`] for a file of a split that is not trained on."""
        if self.is_held_out(path):
            raise HeldOut(f"{path} is not of {' or '.join(self.splits)}, and is not read.")


def one_of(ways: Sequence[str], key: str) -> str:
    """One of several ways of asking, by a text that a question has of its own: the same in every run."""
    return ways[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % len(ways)]
