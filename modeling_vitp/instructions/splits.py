"""The data that a recipe or a command names: splits as conversations, or sources to be read."""

import contextlib
import dataclasses
import itertools
import re
from pathlib import Path

import yaml
from datasets import Dataset, IterableDataset, ReadInstruction
from trl import ScriptArguments

from ..command.paths import looks_like_path, not_there, read_yaml
from .conversations import to_conversations
from .folders import LISTS, annotations, has_images, holds_rows, image_root
from .json_lines import first_with_images
from .mixture_file import Mixture, Source, load_mixture
from .schemas import RENAME
from .sources import REMEDY, load_rows, read_source, schema_of

ENDLESS = 2**62
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.yaml)(?<!\.yml)(?<!\.json)")


def open_splits(
    args: ScriptArguments, root: str | None = None
) -> tuple[dict[str, Dataset | IterableDataset], list[str]]:
    """The splits to train and to evaluate on that there are, by the names that are given, and the names of all splits.

    A name may be that of a part, as `train[:100]`.

    Args:
        root: folder that the paths of images are relative to.

    Raises:
        ValueError: if there is no split to train on, or its rows are in no known schema, or in several.
    """
    name = args.dataset_name
    splits = json_sources(Path(name), root, args.dataset_streaming) or load_rows(args)
    opened = {}
    for part in (args.dataset_train_split, args.dataset_test_split):
        if base_of(part) in splits:
            try:
                opened[part] = take(conversations(splits[base_of(part)], root), part)
            except ValueError as error:
                said = re.sub(r"^Source '.*?: (?=the columns )", "", str(error)).replace(REMEDY, RENAME)
                raise ValueError(f"{name}, split {part!r}: {said}") from error
    if args.dataset_train_split not in opened:
        raise ValueError(
            f"{name} has no split {args.dataset_train_split!r}, only {sorted(splits)}: give dataset_train_split."
        )
    return opened, sorted(splits)


def conversations(split: Source | Dataset | IterableDataset, root: str | None) -> Dataset | IterableDataset:
    if not isinstance(split, Source):
        return to_conversations(split, root)
    rows = read_source(split)
    rows.info.description = schema_of(split)
    return rows


def json_sources(place: Path, root: str | None, streaming: bool) -> dict[str, Source]:
    """The sources, by split, that a file or a folder of JSON is read by; none where `datasets` reads it.

    `datasets` takes a folder for one of images where these are more, and leaves out the JSON beside them.
    """
    if place.is_file() and place.suffix.lower() in LISTS:
        root = root or image_root(place, place.parent, first_with_images(place))
        return {"train": Source(place.stem, annotation=str(place), image_root=root, streaming=streaming)}
    if not place.is_dir() or not (root or has_images(place)):
        return {}
    source = Source(place.resolve().name, folder=str(place), image_root=root, streaming=streaming)
    return {split: dataclasses.replace(source, split=split) for split in annotations(place)}


def source_of(name: str, split: str, config: str | None, root: str | None) -> Source:
    """The source that reads what a `dataset_name` names; see [`json_sources`]."""
    stored = Source(Path(name).name, dataset=name, config=config, split=split, image_root=root)
    return json_sources(Path(name), root, False).get(split, stored)


def base_of(part: str) -> str:
    return part.partition("[")[0]


def take(rows: Dataset | IterableDataset, part: str) -> Dataset | IterableDataset:
    """The rows of a part of a split: such as `train[:100]` or, if their number is known, `train[10%:]`, or of a sum.

    Raises:
        ValueError: if a part is none of a stream, or has no row.
    """
    if base_of(part) == part:
        return rows
    is_stream = isinstance(rows, IterableDataset)
    if is_stream and any(mark in part for mark in "%-+"):
        raise ValueError("of a stream, whose length is not known, a part is given by two numbers from its start.")
    length = ENDLESS if is_stream else len(rows)
    wanted = ReadInstruction.from_spec(part).to_absolute({base_of(part): length})
    ranges = [range(each.from_ or 0, length if each.to is None else min(each.to, length)) for each in wanted]
    if is_stream:
        first, last = ranges[0].start, ranges[0].stop
        return rows.skip(first) if last == ENDLESS else rows.skip(first).take(last - first)
    if not any(ranges):
        raise ValueError(f"{part} has no row, since {base_of(part)} has {length}.")
    return rows.select(ranges[0] if len(ranges) == 1 else list(itertools.chain(*ranges)))


def load_sources(name: str) -> Mixture:
    """What is to be read by a name: a mixture's file, a recipe's that has one or a `dataset_name`, or what that takes.

    Raises:
        ValueError: if it is none of these; see [`~modeling_vitp.instructions.mixture_file.load_mixture`].
    """
    place, fields = Path(name), {}
    if place.is_file() and place.suffix in (".yaml", ".yml"):
        with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):  # which `load_mixture` tells
            fields = read_yaml(place)
        fields = fields if isinstance(fields, dict) and "mixture" not in fields else {}
        name = fields.get("dataset_name")
    elif place.is_file():
        name = name if place.suffix != ".json" or holds_rows(place) else None
    elif place.suffix in (".yaml", ".yml"):
        name = None
    elif not place.is_dir() and (looks_like_path(name) or not HUB_ID.fullmatch(name)):
        raise ValueError(not_there(name))
    if not isinstance(name, str):
        return load_mixture(place)
    split = fields.get("dataset_train_split", "train")
    return Mixture((source_of(name, split, fields.get("dataset_config"), fields.get("image_root")),))
