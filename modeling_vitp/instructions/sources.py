"""Sources of instruction data: what a mixture file says about each, and its rows in one schema.

A row has an `id` that is unique in its source, `images` (paths or encoded bytes, never decoded), `messages` whose
content is a list of `{"type": "text" | "image", "text"}` parts, the name of its `source`, and an `error`: `None`, or
one line on what is wrong with the row. Whoever uses a row with an error decides whether to stop or to skip; reading
goes on.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HfHubHTTPError
from trl import ScriptArguments

from ..hub.failures import RETRIES, limit_waits, one_line, pause, seconds_to_wait, tried
from ..images.reading import IMAGE_SUFFIXES
from .json_lines import METADATA, download_line_files, entries, first_bad_line, line_files, parse, read_lines
from .mixture_file import Source
from .rows import FEATURES, Written, check_unmerged, encoded_image, messages_of, row_of, undecoded

logger = logging.getLogger(__name__)


def read_source(source: Source) -> Dataset | IterableDataset:
    """The rows of a source: map-style, or an iterable if `streaming`. See the module's docstring for the schema.

    JSON Lines are read once and kept in the cache of `datasets` until the file changes; images stay where they are.
    Those of the Hub that `datasets` cannot read, for a line that is damaged, are downloaded and read line by line.
    Transient HTTP errors and broken connections are tried again, with growing pauses.

    Raises:
        ValueError: names the source if it is not there, cannot be read, or lacks the columns.
    """
    missing = source.missing()
    if missing:
        raise ValueError(f"Source {source.name!r}: {missing}.")
    if source.streaming:
        return IterableDataset.from_generator(stream_rows, features=FEATURES, gen_kwargs={"source": source})
    try:
        if source.annotation:
            return Dataset.from_generator(
                annotation_rows,
                features=FEATURES,
                gen_kwargs={
                    "annotation": source.annotation,
                    "image_root": source.image_root,
                    "name": source.name,
                    "state": file_state(Path(source.annotation)),
                },
            )
        files, state = line_files(source), None
        if files:
            state = folder_cache(Path(source.folder or source.dataset))
        else:
            try:
                dataset = tried(partial(load_columns, source))
            except DatasetGenerationError:
                files = tried(partial(download_line_files, source))
                if not files:
                    raise
        if files:
            kwargs = {"source": source, "files": files, "state": state}
            return Dataset.from_generator(line_rows, features=FEATURES, gen_kwargs=kwargs)
    except Exception as error:  # of many readers; it is raised with the name of the source
        raise named(error, source) from error
    columns = find_columns(source, dataset.features)
    # A column of row numbers and a transform, not `map`, which would write a copy of every image.
    dataset = dataset.select_columns(list(columns.values())).add_column("row number", range(len(dataset)))
    dataset.info.features = undecoded(dataset.features)
    dataset.set_transform(partial(to_rows, source=source, columns=columns, features=dataset.features))
    return dataset


def named(error: Exception, source: Source, row: int | None = None) -> ValueError:
    """The error of a source on one line: its name, the row, and what the Hub, or else the first of the causes, says."""
    causes = [error]
    while causes[-1].__cause__ is not None and not isinstance(causes[-1], HfHubHTTPError):
        causes.append(causes[-1].__cause__)
    place = "" if row is None else f", row {row}"
    cause = " ".join(str(causes[-1]).split()) or type(causes[-1]).__name__
    return ValueError(f"Source {source.name!r}{place}: {source.location} cannot be read: {cause}")


def load_columns(source: Source) -> Dataset | IterableDataset:
    """The data set as it is stored."""
    if source.dataset:
        return load_dataset(
            source.dataset,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    folder = Path(source.folder)
    options = {"split": source.split, "streaming": source.streaming, "cache_dir": folder_cache(folder)}
    suffixes = {path.suffix.lower() for path in folder.rglob("*") if path.is_file()}
    if ".parquet" in suffixes:
        return load_dataset(str(folder), **options)
    if suffixes & IMAGE_SUFFIXES:
        return load_dataset("imagefolder", data_dir=str(folder), **options)
    raise ValueError(f"{folder} holds neither Parquet files nor images, only {sorted(suffixes) or 'nothing'}")


def find_columns(source: Source, features: Features | dict) -> dict[str, str]:
    """Which column holds what; raises a `ValueError` if that does not make a conversation."""
    names = list(features)
    unknown = [column for column in source.columns.values() if column not in names]
    if unknown:
        raise ValueError(f"Source {source.name!r}: {source.location} has no column {unknown[0]!r}, only {names}.")
    usual = {
        "images": ("images", "image"),
        "messages": ("messages", "conversations"),
        "question": ("question",),
        "answer": ("answer",),
    }
    columns = dict(source.columns)
    for role, candidates in usual.items():
        found = [name for name in candidates if name in names]
        if found and role not in columns:
            columns[role] = found[0]
    if "messages" in columns and not {"question", "answer"} & set(source.columns):
        columns.pop("question", None), columns.pop("answer", None)
    elif "answer" in columns and ("question" in columns or source.prompt):
        columns.pop("messages", None)
    else:
        raise ValueError(
            f"Source {source.name!r}: {source.location} has the columns {names}, which make no conversation. Say under "
            "`columns` which are the messages, or the question and the answer (or an answer column and a `prompt`)."
        )
    check_unmerged({name: features[name] for name in columns.values()}, f"Source {source.name!r}, {source.location}")
    return columns


def to_rows(batch: dict[str, list], source: Source, columns: dict[str, str], features: Features) -> dict[str, list]:
    """A batch of stored columns to the schema; the transform of a map-style source."""
    rows = [
        make_row({name: values[index] for name, values in batch.items()}, source, columns, features, number)
        for index, number in enumerate(batch["row number"])
    ]
    return {name: [row[name] for row in rows] for name in FEATURES}


def make_row(
    stored: dict,
    source: Source,
    columns: dict[str, str],
    features: Features | dict,
    number: int,
    image_root: str | None = None,
) -> dict:
    """One stored row to the schema; what is wrong with it goes into `error`. Images are below `image_root`, or else
    that of the source."""
    row_id = stored.get(columns.get("id"))
    row_id = str(number) if row_id is None else str(row_id)
    try:
        images = stored.get(columns.get("images")) if "images" in columns else None
        images = [] if images is None or images == "" else images if isinstance(images, list) else [images]
        images = [encoded_image(image, image_root or source.image_root) for image in images]
        if "messages" in columns:
            turns = stored[columns["messages"]]
        else:
            answer, label = stored[columns["answer"]], features[columns["answer"]]
            if isinstance(label, ClassLabel) and answer is not None:
                answer = label.int2str(answer)
            answer = "" if answer is None else as_text(answer, columns["answer"])
            question = source.prompt
            if "question" in columns:
                question = as_text(stored[columns["question"]], columns["question"])
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return row_of(source.name, row_id, images, messages_of(turns, len(images)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return row_of(source.name, row_id, [], [], str(error))


def as_text(value: str | int, column: str) -> str:
    """The value of a question or an answer; a `ValueError` if it was stored as what does not keep its spelling."""
    if isinstance(value, (int, Written)):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"the column {column!r} has {str(value)[:80]!r}, stored as a {type(value).__name__}, so that how it was "
            "written is lost (3 may have become 3.0, a date have got a time). Store it as text."
        )
    return value


def annotation_rows(annotation: str, image_root: str | None, name: str, state: str | None = None) -> Iterator[dict]:
    """Rows of an InternVL JSON Lines file, whose ids are line numbers, or of a JSON list of such rows.

    `state` is there for the cache: it changes when the file does.
    """
    with open(annotation, "rb") as file:
        is_list = Path(annotation).suffix == ".json"
        numbered = enumerate(parse_list(file.read(), annotation)) if is_list else entries(file, annotation)
        for number, entry in numbered:
            yield annotation_row(entry, image_root, name, str(number))


def parse_list(content: bytes, annotation: str) -> list:
    listed = parse(content, annotation)
    if not isinstance(listed, list):
        raise ValueError(f"{annotation} is no JSON list of rows, but a {type(listed).__name__}")
    return listed


def line_rows(source: Source, files: tuple[Path, ...], state: str | None = None) -> Iterator[dict]:
    """Rows of a source of JSON Lines; see [`annotation_rows`] for `state`."""
    names = dict.fromkeys(name for _, entry in read_lines(files) if isinstance(entry, dict) for name in entry)
    columns = find_columns(source, names)
    for number, (path, entry) in enumerate(read_lines(files)):
        if isinstance(entry, ValueError):
            yield row_of(source.name, str(number), [], [], str(entry))
        else:
            beside = str(path.parent) if path.name == METADATA else source.image_root
            yield make_row({name: entry.get(name) for name in names}, source, columns, names, number, beside)


def annotation_row(entry: dict | ValueError, image_root: str | None, name: str, row_id: str) -> dict:
    try:
        if isinstance(entry, ValueError):
            raise entry
        if not isinstance(entry, dict):
            raise ValueError(f"it is {str(entry)[:80]!r}, but a mapping with `conversations` is needed.")
        if entry.get("video"):
            raise ValueError("it is a video; frames can be given as a list of images.")
        images = entry.get("image") or []
        images = [encoded_image(image, image_root) for image in (images if isinstance(images, list) else [images])]
        turns = entry.get("conversations", entry.get("messages"))
        return row_of(name, row_id, images, messages_of(turns, len(images)))
    except (ValueError, TypeError, AttributeError) as error:
        return row_of(name, row_id, [], [], str(error))


def stream_rows(source: Source) -> Iterator[dict]:
    """The rows of a streaming source; broken off by a transient error, it goes on from the row where it was."""
    try:
        if source.annotation:
            yield from annotation_rows(source.annotation, source.image_root, source.name)
            return
        if files := line_files(source):
            yield from line_rows(source, files)
            return
    except (OSError, ValueError) as error:
        raise named(error, source) from error
    number = tries = 0
    while True:
        limit_waits()
        try:
            rows = itertools.islice(line_rows(source, files), number, None) if files else stored_rows(source, number)
            for row in rows:
                yield row
                number, tries = number + 1, 0
            return
        except Exception as error:  # as in `read_source`, if another try does not help
            wait = seconds_to_wait(error, tries)
            if wait is None and isinstance(error, (ValueError, DatasetGenerationError)) and not files:
                files = tried(partial(download_line_files, source))
                if files:
                    continue
            if wait is None or tries == RETRIES:
                raise named(error, source, number) from error
            pause(named(error, source, number), wait, tries)
            tries += 1


def stored_rows(source: Source, start: int) -> Iterator[dict]:
    """The rows of a stream as `datasets` reads it, from one on."""
    dataset = load_columns(source)
    if dataset.features is None:
        dataset = dataset._resolve_features()
    columns = find_columns(source, dataset.features)
    dataset = dataset.select_columns(list(columns.values())).decode(False)
    for number, stored in enumerate(all_rows(dataset.skip(start)), start):
        yield make_row(stored, source, columns, dataset.features, number)


def all_rows(stream: IterableDataset) -> Iterator[dict]:
    """The rows of a stream, all of them also in a worker of a data loader, where plain iteration gives a share."""
    for batch in stream.iter(batch_size=8):
        yield from (dict(zip(batch, values)) for values in zip(*batch.values()))


def file_state(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"


def folder_cache(folder: Path) -> str:
    """A cache for this state of a folder: `datasets` would go on using an older one if the folder has a card."""
    state = hashlib.sha256(str(folder.resolve()).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state.update(f"{path.relative_to(folder)}\0{file_state(path)}\0".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "folders" / state.hexdigest()[:16])


def load_rows(script_args: ScriptArguments) -> DatasetDict | IterableDatasetDict:
    """All splits of the data set that a recipe names instead of a mixture, as they are stored.

    Transient HTTP errors and broken connections are tried again, with growing pauses.

    Raises:
        ValueError: if it lacks the split to train on.
    """
    name = script_args.dataset_name
    load = partial(
        load_dataset,
        name,
        script_args.dataset_config,
        streaming=script_args.dataset_streaming,
        cache_dir=folder_cache(Path(name)) if Path(name).is_dir() else None,
    )
    try:
        splits = tried(load)
    except datasets.exceptions.DatasetGenerationError as error:
        if Path(name).is_dir():
            files = sorted(Path(name).rglob("*.jsonl"))
        else:
            split = script_args.dataset_train_split
            files = tried(partial(download_line_files, Source(name, dataset=name, split=split)))
        line = first_bad_line(files)
        hint = "As a source of a mixture it is one row, which can be skipped."
        cause = f"{line}. {hint}" if line else one_line(str(error.__cause__ or error))
        raise ValueError(f"{name} cannot be read: {cause}") from error
    if script_args.dataset_train_split not in splits:
        raise ValueError(
            f"{name} has no split {script_args.dataset_train_split!r}, only {sorted(splits)}: give dataset_train_split."
        )
    for split in (script_args.dataset_train_split, script_args.dataset_test_split):
        if split in splits:
            columns = {key: value for key, value in (splits[split].features or {}).items() if key in ("id", "messages")}
            check_unmerged(columns, f"{name}, split {split!r}")
    return splits
