"""Rows of a public data set, checked one by one and written for a mixture: `NAME.jsonl`, and images out of tables."""

import hashlib
import heapq
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePath

from tqdm.auto import tqdm

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.images.reading import below
from modeling_vitp.instructions.boxes import wrong_boxes
from modeling_vitp.instructions.rows import check_answers, image_size
from modeling_vitp.instructions.schemas import messages_of
from modeling_vitp.processing_vitp import check_messages, message_texts
from modeling_vitp.recipes.datasets.public_set import HeldOut, PublicSet, Row, Stored

FOLDER = Path(__file__).parent / "public_sets"
UNUSABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)


@dataclass
class Made:
    """What has become of a public data set."""

    annotation: Path
    image_root: Path
    rows: int = 0
    held_out: int = 0
    """Rows about an image of a split that is held out."""
    unused: list[str] = field(default_factory=list)
    """What cannot be used, with why."""

    @property
    def listed(self) -> Path:
        """The file that has all of `unused`, if there is any."""
        return self.annotation.with_suffix(".unused.txt")


def public_set_names() -> list[str]:
    """Those of the package, which are the files of its folder."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load_public_set(name: str) -> type[PublicSet]:
    """The class of a set: by the name of a file in the package, or by the path of one, `my_set.py`.

    Raises:
        WrongArguments: if there is no such file, or no `Set` in it.
    """
    path = Path(name)
    if name in public_set_names():
        module = importlib.import_module(f"{__package__}.public_sets.{name}")
    elif path.suffix == ".py" and path.is_file():
        spec = importlib.util.spec_from_file_location(f"public_set_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        names = ", ".join(public_set_names())
        raise WrongArguments(f"there is no public set {name!r}, only {names}, or a file of Python of yours.")
    if not isinstance(getattr(module, "Set", None), type) or not issubclass(module.Set, PublicSet):
        raise WrongArguments(f"{path} has no class `Set` that is a PublicSet.")
    return module.Set


def make_rows(public_set: PublicSet, name: str, output_dir: Path, keep_shared: bool = False) -> Made:
    """Writes `NAME.jsonl`, a row a line in the order of the data, and puts it in its place when it is whole.

    A row is `{"id", "images", "messages"}`. Its images are files of the data set, which stay where they are; those out
    of tables are written to the folder `NAME`. What cannot be used is counted, and is listed in `NAME.unused.txt`.

    Args:
        keep_shared: whether rows stay of which the image is in a held-out split, too.

    Raises:
        ValueError: if no row can be used, or files are missing.
    """
    made = Made(output_dir / f"{name}.jsonl", public_set.folder)
    shared = None
    if not keep_shared:
        names = checked(public_set, public_set.held_out_images)
        shared = {PurePath(public_set.image_root, name).with_suffix("") for name in names}
    rows = counted_rows(public_set, shared, made)
    if public_set.drawn:
        rows = draw(rows, public_set.paper_rows)
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished, extracted = made.annotation.with_suffix(".unfinished"), output_dir / name
    check = lru_cache(maxsize=100_000)(partial(check_file, public_set.folder))
    with open(unfinished, "w", encoding="utf-8") as file:
        for place, row in tqdm(rows, desc=name, disable=None):
            try:
                for image in row.images:
                    image_size(image.encoded) if isinstance(image, Stored) else check(image)
                line = written(row, strict="grounding" in public_set.tasks)
                for image in row.images:
                    if isinstance(image, Stored):
                        save(image, extracted)
                        made.image_root = extracted
            except UNUSABLE as error:
                made.unused.append(f"{place}: {said(error)}")
                continue
            file.write(line + "\n")
            made.rows += 1
    if not made.rows:
        unfinished.unlink()
        why = f"; {made.unused[0]}" if made.unused else ""
        raise ValueError(f"{public_set.folder}: no row of {public_set.title} can be used{why}")
    os.replace(unfinished, made.annotation)
    made.listed.unlink(missing_ok=True)
    if made.unused:
        made.listed.write_text("\n".join(made.unused) + "\n", encoding="utf-8")
    return made


def counted_rows(public_set: PublicSet, shared: set[PurePath] | None, made: Made) -> Iterator[tuple[str, Row]]:
    """The rows with their places; what becomes none is counted.

    Args:
        shared: images that are left out, without their suffix, beside those in folders of held-out splits; `None`
            leaves out none.
    """

    def is_held_out(row: Row) -> bool:
        files = [PurePath(image) for image in row.images if isinstance(image, str)] if shared is not None else []
        return any(
            public_set.is_held_out(public_set.folder / file.parent) or file.with_suffix("") in shared for file in files
        )

    for place, content in checked(public_set, public_set.entries):
        try:
            if isinstance(content, ValueError):
                raise content
            found = list(public_set.rows(content))
            are_shared = [is_held_out(row) for row in found]
        except HeldOut:
            made.held_out += 1
            continue
        except UNUSABLE as error:
            made.unused.append(f"{place}: {said(error)}")
            continue
        made.held_out += sum(are_shared)
        yield from ((place, row) for row, is_shared in zip(found, are_shared) if not is_shared)


def checked(public_set: PublicSet, read: Callable[[], Iterable]) -> Iterator:
    """What a set reads of its files. Raises a `ValueError` if they are of another form than it reads."""
    try:
        yield from read()
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{public_set.folder}: the files of {public_set.title} are not as they were expected: {said(error)}"
        ) from error


def draw(rows: Iterator[tuple[str, Row]], most: int) -> list[tuple[str, Row]]:
    """As many of the rows, in their order; which depends on nothing but what they say."""
    keyed = ((hashlib.sha256(repr(row).encode()).digest(), n, place, row) for n, (place, row) in enumerate(rows))
    return [(place, row) for _, _, place, row in sorted(heapq.nsmallest(most, keyed), key=lambda item: item[1])]


def check_file(folder: Path, image: str) -> None:
    """Raises a `ValueError` if there is no such image, by its header."""
    image_size(str(below(folder, image)))


def save(image: Stored, folder: Path) -> None:
    path = below(folder, image.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.content)


def written(row: Row, strict: bool) -> str:
    """A row as a line of JSON.

    Args:
        strict: whether four numbers in brackets are taken for a box.

    Raises:
        ValueError: if training could not use it.
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
            raise ValueError(f"{(wrong + loose)[0]} is no box")
    return json.dumps({"id": row.id, "images": images, "messages": turns}, ensure_ascii=False)


def said(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
    return " ".join(f"{kind}{error}".split())
