"""Conversion of downloaded public data sets to checked rows for a mixture.

A set is a class that is registered with [`register_public_set`], in `remote_sensing.py`, `medical.py`, `general.py` or
a file of the user.
"""

import hashlib
import heapq
import importlib.util
import json
import os
import re
import sys
import tarfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePath
from string import ascii_uppercase
from typing import Any, NamedTuple

import yaml
from datasets.data_files import SPLIT_KEYWORDS
from tqdm.auto import tqdm

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.data.annotation_files import read_annotation, read_text
from modeling_vitp.data.annotations import plain_words
from modeling_vitp.data.boxes import Box, box_area, clip
from modeling_vitp.data.rows import image_size
from modeling_vitp.images.reading import IMAGE_SUFFIXES, below
from modeling_vitp.instructions.boxes import write_boxes, wrong_boxes
from modeling_vitp.instructions.from_annotations.questions import PHRASINGS
from modeling_vitp.instructions.rows import check_answers
from modeling_vitp.instructions.schemas import as_list, messages_of
from modeling_vitp.instructions.sources import numbered_rows
from modeling_vitp.processing_vitp import check_messages, message_texts

LOCATE = ("Where is {phrase}?", "Give the box of {phrase}.", "Locate {phrase} in the image.")
DESCRIBE = ("Describe the image.", "What does the image show?", "Write a caption for the image.")
UNUSABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)
MAX_PRINTED = 20  # printed unusable rows; all of them are written to a file

PUBLIC_SETS: dict[str, type["PublicSet"]] = {}


def register_public_set(name: str) -> Callable[[type["PublicSet"]], type["PublicSet"]]:
    """Return a decorator that registers a set for `make_public_set` under a name."""

    def register(kind: type["PublicSet"]) -> type["PublicSet"]:
        kind.name, PUBLIC_SETS[name] = name, kind
        return kind

    return register


def load_public_sets() -> dict[str, type["PublicSet"]]:
    """Return the sets of the package by name."""
    for module in ("remote_sensing", "medical", "general"):
        importlib.import_module(f"{__package__}.{module}")
    return PUBLIC_SETS


def load_public_set(name: str) -> type["PublicSet"]:
    """Return a set by its name in the package, or by the path of a file that registers a set, such as `my_set.py`.

    Raises:
        WrongArguments: if the set or file is not found, or the file does not register exactly one set.
    """
    sets, path = load_public_sets(), Path(name)
    if name in sets:
        return sets[name]
    if path.suffix != ".py" or not path.is_file():
        raise WrongArguments(
            f"unknown public set {name!r}. Expected a Python file or one of {', '.join(sorted(sets))}."
        )
    before = dict(sets)
    spec = importlib.util.spec_from_file_location(f"public_set_{path.stem}", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    found = [kind for key, kind in sets.items() if before.get(key) is not kind]
    sets.clear()  # The file's set is not kept in the registry.
    sets.update(before)
    if len(found) != 1:
        raise WrongArguments(f"expected one class with @register_public_set in {path}, found {len(found)}.")
    return found[0]


class Stored(NamedTuple):
    """Encoded image of a table or archive."""

    name: str
    """Name of the file to which the image is written."""
    content: bytes

    @property
    def encoded(self) -> dict:
        """Image in the format of `datasets`."""
        return {"path": self.name, "bytes": self.content}


class Entry(NamedTuple):
    """Part of a file that is converted to rows."""

    place: str
    """File and line, for error messages."""
    content: Any
    """Content, or a `ValueError` if the entry cannot be read."""


class Row(NamedTuple):
    """Conversation about images."""

    id: str
    images: tuple[str | Stored, ...]
    """File names relative to the folder of the data set, or `Stored` images. A set does not mix both kinds."""
    turns: tuple[tuple[str, str], ...]
    """Questions with their answers. Without `<image>` in a question, the images are placed before the first."""


class HeldOut(ValueError):
    """Error for an entry of a split that is not used for training. The entry is skipped."""


class PublicSet:
    """Public data set. A set of LLaVA conversations only defines the fields; other sets also define `rows`.

    Args:
        folder: folder of the data set, with the files of `layout`.

    Fields:
        title: name of the data set.
        license: license of images and annotations, as stated on its page.
        obtain: download page.
        layout: files in the folder that are read, after archives are unpacked.
        seen: source of the layout.
        paper_rows: rounded number of rows in the paper's table.
        annotations: patterns of the annotation files, relative to the folder.
        image_root: folder of the image names in the annotations, relative to the folder of the data set.
        splits: splits to train on. Files whose path contains the name of another split are never read.
        drawn: whether to draw at most `paper_rows` rows.
        modality, tasks, general: as in a mixture.
        caution: warning that is printed for the set.
    """

    name: str
    title: str
    license: str
    obtain: str
    layout: str
    seen: str
    paper_rows: int | None = None
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
        """Yield the entries to convert; by default the rows of the files in `annotations`."""
        for pattern in self.annotations:
            for path in self.files(pattern):
                yield from self.table(path)

    def rows(self, entry: Any) -> Iterable[Row]:
        """Yield the rows of an entry; by default one row of a LLaVA conversation.

        Raises:
            ValueError, KeyError, TypeError, IndexError: if the entry cannot be used. It is reported and skipped.
        """
        images = entry.get("image") or []
        turns = as_list(entry["conversations"])
        if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError("questions and answers must alternate")
        texts = [self.text(turn["value"]) for turn in turns]
        yield self.row(entry.get("id"), images, zip(texts[::2], texts[1::2]))

    def text(self, text: str) -> str:
        """Convert a text of a LLaVA conversation; by default it is kept."""
        return text

    def held_out_images(self) -> Iterable[str]:
        """Return the annotations' names of images that are also in a held-out split."""
        return ()

    def row(self, row_id: Any, images: str | Stored | Sequence[str | Stored], turns: Iterable[tuple[str, str]]) -> Row:
        """Return a row, given the annotations' names of its images."""
        images = images if isinstance(images, list) else [images]
        named = [image if isinstance(image, Stored) else str(PurePath(self.image_root, image)) for image in images]
        return Row("" if row_id is None else str(row_id), tuple(named), tuple(turns))

    def locate(self, image: str, box: Box, phrase: str) -> tuple[str, str]:
        """Return a question for the location of a phrase, and its answer; the box is in pixels.

        Raises:
            ValueError: if the phrase is empty or the box lies outside of the image.
        """
        phrase = " ".join(phrase.split())
        if not phrase:
            raise ValueError("the phrase to locate is empty")
        question = one_of(LOCATE, image + phrase).format(phrase=f"<ref>{phrase}</ref>")
        return question, self.box(image, box, phrase)

    def describe(self, image: str, caption: str) -> tuple[str, str]:
        """Return a question for a description of an image, and the description."""
        return one_of(DESCRIBE, image + caption), caption

    def classify(self, image: str, label: str) -> tuple[str, str]:
        """Return a question for the class of an image, and the class name in plain words."""
        ways = [way for way in PHRASINGS["scene"]["classification"] if "{" not in way]
        return one_of(ways, image), plain_words(label)

    def choose(self, question: str, choices: Iterable[str], right: str) -> tuple[str, str]:
        """Return a question with lettered choices, and the letter and text of the right choice.

        Raises:
            ValueError: if the right answer is not among the choices.
        """
        choices, right = [choice.strip() for choice in choices], right.strip()
        if right not in choices:
            raise ValueError(f"the answer {right!r} must be one of the choices {choices}")
        lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices)]
        return "\n".join([question.strip(), *lines]), lines[choices.index(right)]

    def box(self, image: str, box: Box, phrase: str = "") -> str:
        """Format a box in pixels for an answer, cut to the image.

        Raises:
            ValueError: if the box lies outside of the image.
        """
        height, width = self.size(image)
        inside = clip(box, (0, 0, width, height))
        if box_area(inside) <= 0:
            raise ValueError(f"the box {list(box)} has no area inside {image} of {width} x {height} pixels")
        return write_boxes([inside], (height, width), phrase)

    def _size(self, image: str) -> tuple[int, int]:
        """Read height and width of an image, given its name in the annotations, from the file header."""
        return image_size(str(below(self.folder, PurePath(self.image_root, image))))

    def files(self, pattern: str) -> list[Path]:
        """Return the sorted files of a pattern, without those of held-out splits.

        Raises:
            ValueError: if no file is found.
        """
        found = [path for path in sorted(self.folder.glob(pattern)) if path.is_file() and not self.is_held_out(path)]
        if not found:
            raise self.missing(pattern)
        return found

    def missing(self, name: str) -> ValueError:
        """Return the error for a missing file."""
        return ValueError(
            f"{name} not found in {self.folder}. `vitp make_public_set {self.name}` shows the expected files of "
            f"{self.title}. Download: {self.obtain}"
        )

    def pictures(self, pattern: str) -> Iterator[Entry]:
        """Yield the images of a pattern, with names relative to the folder."""
        for path in self.files(pattern):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield Entry(str(path), str(path.relative_to(self.folder)))

    def table(self, path: Path, held_out: bool = False) -> Iterator[Entry]:
        """Yield the rows of a JSON list, JSON Lines, CSV or TSV. An unreadable file is an entry with its error.

        Args:
            held_out: whether the file lists held-out images. Such a file must be readable.

        Raises:
            ValueError: if a file of held-out images cannot be read.
        """
        if not held_out:
            self.check(path)
        try:
            for number, row in numbered_rows(path):
                if held_out and not isinstance(row, dict):
                    raise ValueError(f"expected a mapping in row {number} of the held-out {path}, got {str(row)[:80]}")
                yield Entry(f"{path}, row {number}", row)
        except (OSError, ValueError) as error:
            if held_out:
                raise
            yield Entry(str(path), ValueError(str(error)))

    def json(self, name: str) -> Any:
        """Return the content of a JSON file that is not a list of rows."""
        return read_annotation(self._file(name))

    def lines(self, name: str, held_out: bool = False) -> list[str]:
        """Return the stripped, non-empty lines of a text file; `held_out` is that of `table`."""
        return [line.strip() for line in read_text(self._file(name, held_out)).splitlines() if line.strip()]

    def _file(self, name: str, held_out: bool = False) -> Path:
        path = self.folder / name
        if not held_out:
            self.check(path)
        if not path.is_file():
            raise self.missing(name)
        return path

    def samples(self, pattern: str) -> Iterator[Entry]:
        """Yield the samples of WebDataset archives as content by suffix, with archive and sample name as `key`."""
        for path in self.files(pattern):
            try:
                with tarfile.open(path) as archive:
                    files = (member for member in archive if member.isfile())
                    for key, members in groupby(files, lambda member: member.name.partition(".")[0]):
                        name = str(path.relative_to(self.folder).with_suffix("") / key)
                        sample = {one.name.partition(".")[2]: archive.extractfile(one).read() for one in members}
                        yield Entry(f"{path}, {key}", {"key": name, **sample})
            except (tarfile.TarError, OSError, EOFError) as error:
                yield Entry(str(path), ValueError(f"the archive is damaged: {error}"))

    def is_held_out(self, path: Path | str) -> bool:
        """Return whether a path contains the name of a split that is not used for training."""
        words = set(re.split(r"[^a-z]+", str(Path(path).relative_to(self.folder)).lower()))
        return any(words & set(names) for split, names in SPLIT_KEYWORDS.items() if str(split) not in self.splits)

    def check(self, path: Path) -> None:
        """Raise [`HeldOut`] for a file of a split that is not used for training."""
        if self.is_held_out(path):
            raise HeldOut(f"{path} does not belong to {' or '.join(self.splits)} and is not read.")


def one_of(ways: Sequence[str], key: str) -> str:
    """Return one of several phrasings, chosen by the hash of a key, so that all runs choose the same."""
    return ways[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % len(ways)]


@dataclass
class Made:
    """Result of the conversion of a public data set.

    Args:
        annotation: path of the written rows.
        image_root: folder of the images.
        rows: number of written rows.
        images: number of different images in these rows.
        held_out: number of rows on images of a held-out split.
        unused: entries and rows that cannot be used, with the reason.
    """

    annotation: Path
    image_root: Path
    rows: int = 0
    images: int = 0
    held_out: int = 0
    unused: list[str] = field(default_factory=list)

    @property
    def unused_file(self) -> Path:
        """Path of the file that lists `unused`."""
        return self.annotation.with_suffix(".unused.txt")


def make_rows(public_set: PublicSet, output_dir: Path, keep_shared: bool = False) -> Made:
    """Write the rows of a set to `NAME.jsonl`, in the order of the data; the file is replaced when it is complete.

    A row has the fields `id`, `images` and `messages`. Image files are not copied; images of tables are written to the
    folder `NAME`. Unusable rows are counted and listed in `NAME.unused.txt`.

    Args:
        keep_shared: whether to keep rows on images that are also in a held-out split.

    Raises:
        ValueError: if no row can be used or files are missing.
    """
    name = public_set.name
    made = Made(output_dir / f"{name}.jsonl", public_set.folder)
    names = [] if keep_shared else read_parts(public_set, public_set.held_out_images)
    shared = {PurePath(public_set.image_root, name).with_suffix("") for name in names}
    rows = counted_rows(public_set, made, None if keep_shared else shared)
    if public_set.drawn:
        rows = draw_rows(rows, public_set.paper_rows)
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished, extracted = made.annotation.with_suffix(".unfinished"), output_dir / name
    used = set()  # hashes of the image names

    @lru_cache(maxsize=100_000)
    def check_file(image: str) -> None:
        image_size(str(below(public_set.folder, image)))

    with open(unfinished, "w", encoding="utf-8") as file:
        for place, row in tqdm(rows, desc=name, disable=None):
            try:
                for image in row.images:
                    image_size(image.encoded) if isinstance(image, Stored) else check_file(image)
                line = encode_row(row, strict="grounding" in public_set.tasks)
                for image in row.images:
                    if isinstance(image, Stored):
                        path = below(extracted, image.name)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(image.content)
                        made.image_root = extracted
            except UNUSABLE as error:
                made.unused.append(f"{place}: {describe_error(error)}")
                continue
            file.write(line + "\n")
            used.update(hash(image.name if isinstance(image, Stored) else image) for image in row.images)
            made.rows, made.images = made.rows + 1, len(used)
    if not made.rows:
        unfinished.unlink()
        why = f"; {made.unused[0]}" if made.unused else ""
        raise ValueError(f"{public_set.folder}: no row of {public_set.title} can be used{why}")
    os.replace(unfinished, made.annotation)
    made.unused_file.unlink(missing_ok=True)
    if made.unused:
        made.unused_file.write_text("\n".join(made.unused) + "\n", encoding="utf-8")
    return made


def read_parts(public_set: PublicSet, read: Callable[[], Iterable]) -> Iterator:
    """Yield the results of a reader of the set. Raise a `ValueError` if the files have an unexpected form."""
    try:
        yield from read()
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{public_set.folder}: the files of {public_set.title} have an unexpected form: {describe_error(error)}"
        ) from error


def counted_rows(public_set: PublicSet, made: Made, shared: set[PurePath] | None) -> Iterator[tuple[str, Row]]:
    """Yield the rows with file and line, and count held-out and unusable rows in `made`.

    Args:
        shared: images to skip, without suffix, in addition to those in folders of held-out splits; `None` skips no
            image.
    """

    def is_held_out(row: Row) -> bool:
        files = [PurePath(image) for image in row.images if isinstance(image, str)] if shared is not None else []
        return any(
            public_set.is_held_out(public_set.folder / file.parent) or file.with_suffix("") in shared for file in files
        )

    for place, content in read_parts(public_set, public_set.entries):
        try:
            if isinstance(content, ValueError):
                raise content
            found = [(row, is_held_out(row)) for row in list(public_set.rows(content))]
        except HeldOut:
            made.held_out += 1
            continue
        except UNUSABLE as error:
            made.unused.append(f"{place}: {describe_error(error)}")
            continue
        made.held_out += sum(is_out for _, is_out in found)
        yield from ((place, row) for row, is_out in found if not is_out)


def draw_rows(rows: Iterator[tuple[str, Row]], most: int) -> list[tuple[str, Row]]:
    """Draw at most `most` rows and keep their order. The draw depends only on the content of the rows."""
    keyed = ((hashlib.sha256(repr(row).encode()).digest(), n, place, row) for n, (place, row) in enumerate(rows))
    return [(place, row) for _, _, place, row in sorted(heapq.nsmallest(most, keyed), key=lambda item: item[1])]


def encode_row(row: Row, strict: bool) -> str:
    """Return a row as a line of JSON.

    Args:
        strict: whether four numbers in brackets count as a box.

    Raises:
        ValueError: if the row cannot be used for training.
    """
    images = [image.name if isinstance(image, Stored) else image for image in row.images]
    turns = [
        {"role": role, "content": text.strip() if isinstance(text, str) else text}
        for pair in row.turns
        for role, text in zip(("user", "assistant"), pair)
    ]
    messages = messages_of(turns, len(images))
    check_messages(messages)
    check_answers(messages)
    for message in messages:
        wrong, loose = wrong_boxes("".join(message_texts(message)))
        if wrong or (strict and loose):
            raise ValueError(f"{(wrong + loose)[0]} must be a non-empty box on the grid of 0 to 1000")
    return json.dumps({"id": row.id, "images": images, "messages": turns}, ensure_ascii=False)


def describe_error(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
    return " ".join(f"{kind}{error}".split())


def print_sets() -> None:
    """Print a line for each set of the package."""
    sets = load_public_sets()
    for name, kind in sorted(sets.items()):
        print(f"{name:<{max(map(len, sets))}}  {kind.title}; {kind.license}: {kind.obtain}")


def print_set(kind: type[PublicSet], name: str) -> None:
    """Print the files that are read of a set and its download page."""
    splits = " and ".join(kind.splits)
    print(f"{kind.title}\nlicense: {kind.license}\nobtain: {kind.obtain}\ntrained on: {splits}\nlayout ({kind.seen}):")
    print(textwrap.indent(textwrap.dedent(kind.layout).strip(), "  "))
    print(f"then: vitp make_public_set {name} DATA_DIR")
    if kind.caution:
        print(f"Caution: {kind.caution}")


def print_result(kind: type[PublicSet], made: Made) -> None:
    """Print the numbers of rows and images, and the unused rows with reasons; write the set's mixture."""
    for line in made.unused[:MAX_PRINTED]:
        print(f"not used: {line}", file=sys.stderr)
    if made.unused:
        print(f"{len(made.unused):,} not used, all in {made.unused_file}", file=sys.stderr)
    if made.held_out:
        print(f"{made.held_out:,} held out: in a held-out split, or on an image of a held-out split")
    print(f"{made.annotation}: {made.rows:,} rows, {made.images:,} images")
    if kind.paper_rows is not None and not 0.9 < made.rows / kind.paper_rows < 1.1:
        print(f"For its share of the paper's mixture, multiply its rate there by {kind.paper_rows / made.rows:.3g}.")
    print(f"{write_mixture(kind, made)}: a mixture of this set; its source can be copied to other mixtures")
    if kind.caution:
        print(f"Caution: {kind.caution}")


def write_mixture(kind: type[PublicSet], made: Made) -> Path:
    """Write `NAME.yaml`, a mixture of this set alone, with title and license."""
    source = {"name": made.annotation.stem, "annotation": str(made.annotation), "image_root": str(made.image_root)}
    source |= {"rows": made.rows, "tasks": list(kind.tasks), "obtain": kind.obtain}
    source |= {"general": True} if kind.general else {"modality": list(kind.modality)}
    path = made.annotation.with_suffix(".yaml")
    text = yaml.safe_dump({"sources": [source]}, sort_keys=False, allow_unicode=True)
    path.write_text(f"# {kind.title}\n# license: {kind.license}\n{text}", encoding="utf-8")
    return path
