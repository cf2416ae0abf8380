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
from operator import itemgetter
from pathlib import Path, PurePath
from string import ascii_uppercase
from typing import Any, NamedTuple

import yaml
from datasets.data_files import SPLIT_KEYWORDS
from tqdm.auto import tqdm

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.conversations import check_messages, message_texts
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

LOCATE = ("Where is {phrase}?", "Give the box of {phrase}.", "Locate {phrase} in the image.")
DESCRIBE = ("Describe the image.", "What does the image show?", "Write a caption for the image.")
UNUSABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)
MAX_PRINTED = 20  # printed unusable rows; all of them are written to a file

PUBLIC_SETS: dict[str, type["PublicSet"]] = {}


def register_public_set(name: str) -> Callable[[type["PublicSet"]], type["PublicSet"]]:
    """Return a decorator that registers a set for `make_public_set` under a name."""

    def register(kind: type["PublicSet"]) -> type["PublicSet"]:
        kind.name = name
        PUBLIC_SETS[name] = kind
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
    sets = load_public_sets()
    if name in sets:
        return sets[name]
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise WrongArguments(
            f"unknown public set {name!r}. Expected a Python file or one of {', '.join(sorted(sets))}."
        )
    sets_of_package = dict(sets)
    spec = importlib.util.spec_from_file_location(f"public_set_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A set of the file may have the name of a set of the package.
    sets_of_file = [kind for key, kind in sets.items() if sets_of_package.get(key) is not kind]
    sets.clear()  # The file's set is not kept in the registry.
    sets.update(sets_of_package)
    if len(sets_of_file) != 1:
        raise WrongArguments(f"expected one class with @register_public_set in {path}, found {len(sets_of_file)}.")
    return sets_of_file[0]


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
        layout_source: files or descriptions from which the layout is known.
        paper_rows: rounded number of rows in the paper's table.
        annotations: patterns of the annotation files, relative to the folder.
        image_root: folder of the image names in the annotations, relative to the folder of the data set.
        splits: splits to train on. Files whose path contains the name of another split are never read.
        is_subsampled: whether to draw at most `paper_rows` rows.
        modality, tasks, general: as in a mixture.
        caution: warning that is printed for the set.
    """

    name: str
    title: str
    license: str
    obtain: str
    layout: str
    layout_source: str
    paper_rows: int | None = None
    annotations: tuple[str, ...] = ()
    image_root: str = ""
    splits: tuple[str, ...] = ("train",)
    is_subsampled: bool = False
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
        questions = texts[::2]
        answers = texts[1::2]
        yield self.row(entry.get("id"), images, zip(questions, answers))

    def text(self, text: str) -> str:
        """Convert a text of a LLaVA conversation; by default it is kept."""
        return text

    def held_out_images(self) -> Iterable[str]:
        """Return the annotations' names of images that are also in a held-out split."""
        return ()

    def row(
        self,
        row_id: Any,
        images: str | Stored | Sequence[str | Stored],
        turns: Iterable[tuple[str, str]],
    ) -> Row:
        """Return a row, given the annotations' names of its images."""
        if not isinstance(images, list):
            images = [images]
        images_of_row = []
        for image in images:
            if not isinstance(image, Stored):
                image = str(PurePath(self.image_root, image))
            images_of_row.append(image)
        return Row(
            id="" if row_id is None else str(row_id),
            images=tuple(images_of_row),
            turns=tuple(turns),
        )

    def locate(self, image: str, box: Box, phrase: str) -> tuple[str, str]:
        """Return a question for the location of a phrase, and its answer; the box is in pixels.

        Raises:
            ValueError: if the phrase is empty or the box lies outside of the image.
        """
        phrase = " ".join(phrase.split())
        if not phrase:
            raise ValueError("the phrase to locate is empty")
        template = one_of(LOCATE, image + phrase)
        question = template.format(phrase=f"<ref>{phrase}</ref>")
        return question, self.box(image, box, phrase)

    def describe(self, image: str, caption: str) -> tuple[str, str]:
        """Return a question for a description of an image, and the description."""
        return one_of(DESCRIBE, image + caption), caption

    def classify(self, image: str, label: str) -> tuple[str, str]:
        """Return a question for the class of an image, and the class name in plain words."""
        templates = PHRASINGS["scene"]["classification"]
        questions = [template for template in templates if "{" not in template]
        return one_of(questions, image), plain_words(label)

    def choose(self, question: str, choices: Iterable[str], right: str) -> tuple[str, str]:
        """Return a question with lettered choices, and the letter and text of the right choice.

        Raises:
            ValueError: if the right answer is not among the choices.
        """
        choices = [choice.strip() for choice in choices]
        right = right.strip()
        if right not in choices:
            raise ValueError(f"the answer {right!r} must be one of the choices {choices}")
        lines = []
        for letter, choice in zip(ascii_uppercase, choices):
            lines.append(f"{letter}. {choice}")
        lettered_question = "\n".join([question.strip(), *lines])
        return lettered_question, lines[choices.index(right)]

    def box(self, image: str, box: Box, phrase: str = "") -> str:
        """Format a box in pixels for an answer, cut to the image.

        Raises:
            ValueError: if the box lies outside of the image.
        """
        height, width = self.size(image)
        visible_box = clip(box, (0, 0, width, height))
        if box_area(visible_box) <= 0:
            raise ValueError(f"the box {list(box)} has no area inside {image} of {width} x {height} pixels")
        return write_boxes([visible_box], (height, width), phrase)

    def _size(self, image: str) -> tuple[int, int]:
        """Read height and width of an image, given its name in the annotations, from the file header."""
        path = below(self.folder, PurePath(self.image_root, image))
        return image_size(str(path))

    def files(self, pattern: str) -> list[Path]:
        """Return the sorted files of a pattern, without those of held-out splits.

        Raises:
            ValueError: if no file is found.
        """
        files = []
        for path in sorted(self.folder.glob(pattern)):
            if path.is_file() and not self.is_held_out(path):
                files.append(path)
        if not files:
            raise self.missing(pattern)
        return files

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
        text = read_text(self._file(name, held_out))
        lines = [line.strip() for line in text.splitlines()]
        return list(filter(None, lines))

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
                    archive_name = path.relative_to(self.folder).with_suffix("")
                    files = (member for member in archive if member.isfile())
                    # The files of a sample follow each other, and have the same name up to the first dot.
                    for key, members in groupby(files, lambda member: member.name.partition(".")[0]):
                        sample = {"key": str(archive_name / key)}
                        for member in members:
                            _, _, suffix = member.name.partition(".")
                            sample[suffix] = archive.extractfile(member).read()
                        yield Entry(f"{path}, {key}", sample)
            except (tarfile.TarError, OSError, EOFError) as error:
                yield Entry(str(path), ValueError(f"the archive is damaged: {error}"))

    def is_held_out(self, path: Path | str) -> bool:
        """Return whether a path contains the name of a split that is not used for training."""
        relative_path = Path(path).relative_to(self.folder)
        words = set(re.split(r"[^a-z]+", str(relative_path).lower()))
        for split, split_names in SPLIT_KEYWORDS.items():
            if str(split) not in self.splits and not words.isdisjoint(split_names):
                return True
        return False

    def check(self, path: Path) -> None:
        """Raise [`HeldOut`] for a file of a split that is not used for training."""
        if self.is_held_out(path):
            raise HeldOut(f"{path} does not belong to {' or '.join(self.splits)} and is not read.")


def one_of(phrasings: Sequence[str], key: str) -> str:
    """Return one of several phrasings, chosen by the hash of a key, so that all runs choose the same."""
    digest = hashlib.sha256(key.encode()).digest()
    number = int.from_bytes(digest[:8])
    return phrasings[number % len(phrasings)]


@dataclass
class Conversion:
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


def make_rows(public_set: PublicSet, output_dir: Path, keep_shared: bool = False) -> Conversion:
    """Write the rows of a set to `NAME.jsonl`, in the order of the data; the file is replaced when it is complete.

    A row has the fields `id`, `images` and `messages`. Image files are not copied; images of tables are written to the
    folder `NAME`. Unusable rows are counted and listed in `NAME.unused.txt`.

    Args:
        keep_shared: whether to keep rows on images that are also in a held-out split.

    Raises:
        ValueError: if no row can be used or files are missing.
    """
    conversion = Conversion(output_dir / f"{public_set.name}.jsonl", public_set.folder)
    shared_images = None if keep_shared else read_shared_images(public_set)
    rows = counted_rows(public_set, conversion, shared_images)
    if public_set.is_subsampled:
        rows = draw_rows(rows, public_set.paper_rows)
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished_file = conversion.annotation.with_suffix(".unfinished")
    write_rows(
        public_set,
        rows,
        conversion,
        annotation_file=unfinished_file,
        image_folder=output_dir / public_set.name,
    )
    if conversion.rows == 0:
        unfinished_file.unlink()
        first_reason = f"; {conversion.unused[0]}" if conversion.unused else ""
        raise ValueError(f"{public_set.folder}: no row of {public_set.title} can be used{first_reason}")
    os.replace(unfinished_file, conversion.annotation)
    conversion.unused_file.unlink(missing_ok=True)
    if conversion.unused:
        lines = "\n".join(conversion.unused)
        conversion.unused_file.write_text(f"{lines}\n", encoding="utf-8")
    return conversion


def read_shared_images(public_set: PublicSet) -> set[PurePath]:
    """Return the images that are also in a held-out split, relative to the folder of the set and without suffix."""
    shared_images = set()
    for name in read_parts(public_set, public_set.held_out_images):
        path = PurePath(public_set.image_root, name)
        shared_images.add(path.with_suffix(""))
    return shared_images


def write_rows(
    public_set: PublicSet,
    rows: Iterable[tuple[str, Row]],
    conversion: Conversion,
    annotation_file: Path,
    image_folder: Path,
) -> None:
    """Write the usable rows and the images of tables, and count rows and images in `conversion`."""
    image_hashes = set()  # The names of the images of a large set would take more memory.

    @lru_cache(maxsize=100_000)
    def check_file(image: str) -> None:
        image_size(str(below(public_set.folder, image)))

    with open(annotation_file, "w", encoding="utf-8") as file:
        for place, row in tqdm(rows, desc=public_set.name, disable=None):
            try:
                for image in row.images:
                    if isinstance(image, Stored):
                        image_size(image.encoded)
                    else:
                        check_file(image)
                line = encode_row(row, strict="grounding" in public_set.tasks)
                for image in row.images:
                    if isinstance(image, Stored):
                        write_image(image, image_folder)
                        conversion.image_root = image_folder
            except UNUSABLE as error:
                conversion.unused.append(f"{place}: {describe_error(error)}")
                continue
            file.write(f"{line}\n")
            conversion.rows += 1
            image_hashes.update(map(hash, names_of_images(row)))
    conversion.images = len(image_hashes)


def write_image(image: Stored, folder: Path) -> None:
    """Write the file of a stored image, whose name must not lead out of the folder."""
    path = below(folder, image.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.content)


def names_of_images(row: Row) -> list[str]:
    """Return the file names of the images of a row."""
    return [image.name if isinstance(image, Stored) else image for image in row.images]


def read_parts(public_set: PublicSet, read: Callable[[], Iterable]) -> Iterator:
    """Yield the results of a reader of the set. Raise a `ValueError` if the files have an unexpected form."""
    try:
        yield from read()
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{public_set.folder}: the files of {public_set.title} have an unexpected form: {describe_error(error)}"
        ) from error


def counted_rows(
    public_set: PublicSet,
    conversion: Conversion,
    shared_images: set[PurePath] | None,
) -> Iterator[tuple[str, Row]]:
    """Yield the rows with file and line, and count held-out and unusable rows in `conversion`.

    Args:
        shared_images: images to skip, without suffix, in addition to those in folders of held-out splits; `None` skips
            no image.
    """
    for place, content in read_parts(public_set, public_set.entries):
        training_rows = []
        num_held_out = 0
        try:
            if isinstance(content, ValueError):
                raise content
            rows = list(public_set.rows(content))
            for row in rows:
                if shared_images is not None and has_held_out_image(row, public_set, shared_images):
                    num_held_out += 1
                else:
                    training_rows.append(row)
        except HeldOut:
            conversion.held_out += 1
            continue
        except UNUSABLE as error:
            conversion.unused.append(f"{place}: {describe_error(error)}")
            continue
        conversion.held_out += num_held_out
        for row in training_rows:
            yield place, row


def has_held_out_image(row: Row, public_set: PublicSet, shared_images: set[PurePath]) -> bool:
    """Return whether an image of a row is in a folder of a held-out split, or among the shared images."""
    for image in row.images:
        if isinstance(image, Stored):
            continue
        file = PurePath(image)
        if public_set.is_held_out(public_set.folder / file.parent) or file.with_suffix("") in shared_images:
            return True
    return False


def draw_rows(rows: Iterator[tuple[str, Row]], most: int) -> list[tuple[str, Row]]:
    """Draw at most `most` rows and keep their order. The draw depends only on the content of the rows."""

    def with_digests() -> Iterator[tuple[bytes, int, str, Row]]:
        for index, (place, row) in enumerate(rows):
            digest = hashlib.sha256(repr(row).encode()).digest()
            yield digest, index, place, row

    # `nsmallest` reads a generator, and holds no more than the drawn rows with their images in memory.
    sample = heapq.nsmallest(most, with_digests())
    sample.sort(key=itemgetter(1))
    return [(place, row) for _, _, place, row in sample]


def encode_row(row: Row, strict: bool) -> str:
    """Return a row as a line of JSON.

    Args:
        strict: whether four numbers in brackets count as a box.

    Raises:
        ValueError: if the row cannot be used for training.
    """
    images = names_of_images(row)
    turns = []
    for pair in row.turns:
        for role, text in zip(("user", "assistant"), pair):
            # A text of another type is an error of `messages_of`.
            content = text.strip() if isinstance(text, str) else text
            turns.append({"role": role, "content": content})
    messages = messages_of(turns, len(images))
    check_messages(messages)
    check_answers(messages)
    for message in messages:
        text = "".join(message_texts(message))
        invalid_boxes, invalid_brackets = wrong_boxes(text)
        if invalid_boxes or (strict and invalid_brackets):
            first_box = (invalid_boxes + invalid_brackets)[0]
            raise ValueError(f"{first_box} must be a non-empty box on the grid of 0 to 1000")
    fields = {"id": row.id, "images": images, "messages": turns}
    return json.dumps(fields, ensure_ascii=False)


def describe_error(error: Exception) -> str:
    message = str(error)
    if not isinstance(error, ValueError):
        message = f"{type(error).__name__} {message}"
    return " ".join(message.split())


def print_sets() -> None:
    """Print a line for each set of the package."""
    sets = load_public_sets()
    width = max(map(len, sets))
    for name, kind in sorted(sets.items()):
        print(f"{name:<{width}}  {kind.title}; {kind.license}: {kind.obtain}")


def print_set(kind: type[PublicSet], name: str) -> None:
    """Print the files that are read of a set and its download page."""
    print(kind.title)
    print(f"license: {kind.license}")
    print(f"obtain: {kind.obtain}")
    print(f"trained on: {' and '.join(kind.splits)}")
    print(f"layout ({kind.layout_source}):")
    layout = textwrap.dedent(kind.layout).strip()
    print(textwrap.indent(layout, "  "))
    print(f"then: vitp make_public_set {name} DATA_DIR")
    if kind.caution:
        print(f"Caution: {kind.caution}")


def print_result(kind: type[PublicSet], conversion: Conversion) -> None:
    """Print the numbers of rows and images, and the unused rows with reasons; write the set's mixture."""
    for line in conversion.unused[:MAX_PRINTED]:
        print(f"not used: {line}", file=sys.stderr)
    if conversion.unused:
        print(f"{len(conversion.unused):,} not used, all in {conversion.unused_file}", file=sys.stderr)
    if conversion.held_out:
        print(f"{conversion.held_out:,} held out: in a held-out split, or on an image of a held-out split")
    print(f"{conversion.annotation}: {conversion.rows:,} rows, {conversion.images:,} images")
    if kind.paper_rows is not None:
        share = conversion.rows / kind.paper_rows
        if not 0.9 < share < 1.1:
            factor = kind.paper_rows / conversion.rows
            print(f"For its share of the paper's mixture, multiply its rate there by {factor:.3g}.")
    print(f"{write_mixture(kind, conversion)}: a mixture of this set; its source can be copied to other mixtures")
    if kind.caution:
        print(f"Caution: {kind.caution}")


def write_mixture(kind: type[PublicSet], conversion: Conversion) -> Path:
    """Write `NAME.yaml`, a mixture of this set alone, with title and license."""
    source = {
        "name": conversion.annotation.stem,
        "annotation": str(conversion.annotation),
        "image_root": str(conversion.image_root),
        "rows": conversion.rows,
        "tasks": list(kind.tasks),
        "obtain": kind.obtain,
    }
    if kind.general:
        source["general"] = True
    else:
        source["modality"] = list(kind.modality)
    path = conversion.annotation.with_suffix(".yaml")
    text = yaml.safe_dump({"sources": [source]}, sort_keys=False, allow_unicode=True)
    path.write_text(f"# {kind.title}\n# license: {kind.license}\n{text}", encoding="utf-8")
    return path
