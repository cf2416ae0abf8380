"""Sources of instruction data: what a mixture file says about each, and its rows in one schema.

A row has an `id` that is unique in its source, `images` (paths or encoded bytes, never decoded), `messages` whose
content is a list of `{"type": "text" | "image", "text"}` parts, the name of its `source`, and an `error`: `None`, or
one line on what is wrong with the row. Whoever uses a row with an error decides whether to stop or to skip; reading
goes on.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
)
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from trl import ScriptArguments

from .collator import SourceSettings, split_at_places

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image(decode=False)),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "source": Value("string"),
        "error": Value("string"),
    }
)
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
COLUMNS = ("id", "images", "messages", "question", "answer")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"}
RETRIES = 5


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a mixture. It lives in exactly one of `dataset`, `folder` and `annotation`.

    Args:
        name: unique in the mixture; the ids of its rows start with it.
        rate: passes over the source in one epoch: above 1 repeats, below 1 takes a part.
        dataset: Hub id, with `config`, `split` and `revision`.
        folder: local folder of Parquet files, or of images with a `metadata.jsonl` or a folder per class.
        annotation: InternVL's JSON Lines file (or a JSON list of the same rows), with its `image_root`.
        image_root: folder that the paths of images are relative to.
        streaming: rows are read as they are needed; nothing is stored on disk.
        columns: which columns of the data set are the `id`, `images`, `messages`, or, for a data set without messages,
            the `question` and the `answer`.
        prompt: the question of every row of a source that has an answer column alone.
        rows: number of rows, where it is known before the source is read: the dry run goes by it, and so does the
            share of a streaming source, which needs it (an estimate is enough).
        obtain: page where the data can be had.
        modality: what the images were taken with: optical, sar, ct …, one or several.
        tasks: what is asked: caption, vqa, grounding …
        general: whether it is general data, against forgetting.
        max_patches, image_size, system_prompt, input_spec, jpeg_degradation: see [`SourceSettings`].
        first_rows: a rate below 1 takes the first rows instead of random ones, as the released code does.
    """

    name: str
    rate: float = 1.0
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    folder: str | None = None
    annotation: str | None = None
    image_root: str | None = None
    streaming: bool = False
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    prompt: str | None = None
    rows: int | None = None
    obtain: str | None = None
    modality: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    general: bool = False
    max_patches: int | None = None
    image_size: int | None = None
    system_prompt: str | None = None
    input_spec: dict | None = None
    jpeg_degradation: bool = False
    first_rows: bool = False

    @property
    def settings(self) -> SourceSettings:
        return SourceSettings(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SourceSettings)})

    @property
    def location(self) -> str:
        return self.dataset or self.folder or self.annotation

    @property
    def is_on_hub(self) -> bool:
        return self.dataset is not None and not Path(self.dataset).is_dir()

    def missing(self) -> str | None:
        """What has to be there before the source can be read and is not, with the page where it can be had."""
        for path in (self.folder, self.annotation, self.image_root):
            if path is not None and not Path(path).exists():
                return f"{path} is not there" + (f"; obtain it from {self.obtain}" if self.obtain else "")
        return None


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture file.

    Args:
        sources: what is mixed.
        resample: "epoch" draws the part of a source with a fractional rate afresh in every epoch, "once" keeps it.
        modalities: the imaging modalities of the downstream tasks; each needs a source.
        shuffle_buffer: rows that a stream is shuffled in.
    """

    sources: tuple[Source, ...]
    resample: str = "epoch"
    modalities: tuple[str, ...] = ()
    shuffle_buffer: int = 1000


MIXTURE_KEYS = {"sources": list, "resample": str, "modalities": list, "shuffle_buffer": int} | {
    "root": str,
    "defaults": dict,
    "released_compatible": bool,
}
SOURCE_KEYS = {
    "name": str,
    "rate": (int, float),
    "dataset": str,
    "config": str,
    "split": str,
    "revision": str,
    "folder": str,
    "annotation": str,
    "image_root": str,
    "streaming": bool,
    "columns": dict,
    "prompt": str,
    "rows": int,
    "obtain": str,
    "modality": (str, list),
    "tasks": list,
    "general": bool,
    "max_patches": int,
    "image_size": int,
    "system_prompt": str,
    "input_spec": dict,
}
# The keys of the released meta JSON, and what they are called here.
META_KEYS = {
    "root": "image_root",
    "annotation": "annotation",
    "repeat_time": "rate",
    "length": "rows",
    "max_dynamic_patch": "max_patches",
    "force_image_size": "image_size",
    "data_augment": "data_augment",
}


def load_mixture(mixture: str | Path | dict) -> Mixture:
    """Reads a mixture file and checks every key of it, without touching any data.

    Args:
        mixture: a YAML file with `sources`, a recipe with such a mapping (or the path of such a file) under `mixture`,
            a released meta JSON, or the mapping itself.

    Raises:
        ValueError: names the file, the source and the key that is wrong.
    """
    origin = "mixture"
    if not isinstance(mixture, dict):
        origin, path = str(mixture), Path(mixture)
        if not path.is_file():
            raise ValueError(f"There is no mixture file {path}.")
        if path.suffix == ".json":
            mixture = {"sources": [{"meta": origin}]}
        else:
            try:
                mixture = yaml.safe_load(path.read_text())
            except yaml.YAMLError as error:
                raise ValueError(f"{path} is no YAML: {error}") from error
            if isinstance(mixture, dict) and "mixture" in mixture:
                mixture = mixture["mixture"]
                if isinstance(mixture, str):
                    return load_mixture(mixture)
    if not isinstance(mixture, dict) or not mixture.get("sources"):
        raise ValueError(f"{origin}: a mixture has a list of `sources`.")
    check_keys(mixture, MIXTURE_KEYS, origin)
    if mixture.get("resample", "epoch") not in ("epoch", "once"):
        raise ValueError(f"{origin}: resample is {mixture['resample']!r}, not 'epoch' or 'once'.")
    released_compatible, root = mixture.get("released_compatible", False), Path(mixture.get("root", ""))
    defaults = mixture.get("defaults", {})
    check_keys(defaults, SOURCE_KEYS, f"{origin}, defaults")

    entries = []
    for index, entry in enumerate(mixture["sources"]):
        if not isinstance(entry, dict):
            raise ValueError(f"{origin}: source {index} is {entry!r}, not a mapping with a name and a location.")
        if "meta" in entry:
            entries += meta_entries(entry, root, f"{origin}, source {index}")
        else:
            entries.append(entry)
    if released_compatible or any("data_augment" in entry for entry in entries):
        warn_of_differences(entries, released_compatible)
    sources = [
        make_source({**defaults, **entry}, root, released_compatible, f"{origin}, source {entry.get('name', index)!r}")
        for index, entry in enumerate(entries)
    ]
    names = [source.name for source in sources]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{origin}: the source names {repeated} are used more than once.")
    options = {key: mixture[key] for key in ("resample", "shuffle_buffer") if key in mixture}
    return Mixture(tuple(sources), modalities=tuple(mixture.get("modalities", ())), **options)


def check_keys(fields: dict, known: dict, origin: str) -> None:
    """Raises a `ValueError` that names an unknown key or a value of the wrong type."""
    for key, value in fields.items():
        if key not in known:
            raise ValueError(f"{origin}: unknown key {key!r}; known are {', '.join(known)}.")
        kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{origin}: {key} is {value!r}, but needs a value of type {wanted}.")


def make_source(entry: dict, root: Path, released_compatible: bool, origin: str) -> Source:
    """Checks one entry of a mixture."""
    entry = dict(entry)
    data_augment = entry.pop("data_augment", False)
    check_keys(entry, SOURCE_KEYS, origin)
    if not entry.get("name"):
        raise ValueError(f"{origin}: a source needs a name.")
    locations = [key for key in ("dataset", "folder", "annotation") if entry.get(key)]
    if len(locations) != 1:
        raise ValueError(
            f"{origin}: give exactly one of dataset (a Hub id), folder, annotation (InternVL JSON Lines) and meta "
            f"(a released meta JSON); it has {locations or 'none'}."
        )
    allowed = {"config": {"dataset"}, "revision": {"dataset"}, "split": {"dataset", "folder"}}
    allowed |= {"columns": {"dataset", "folder"}, "prompt": {"dataset", "folder"}}
    for key, kinds in allowed.items():
        if key in entry and locations[0] not in kinds:
            raise ValueError(f"{origin}: {key} has no meaning for a source with {locations[0]}.")
    if entry.get("streaming") and "rows" not in entry:
        raise ValueError(f"{origin}: a streaming source needs `rows`, about how many it has, to be mixed in its share.")
    for key in ("rate", "rows", "max_patches", "image_size"):
        if key in entry and not entry[key] > 0:
            raise ValueError(f"{origin}: {key} is {entry[key]!r}; it must be above 0.")
    unknown = set(entry.get("columns", {})) - set(COLUMNS)
    if unknown:
        raise ValueError(f"{origin}: columns are mapped for {', '.join(COLUMNS)}, not for {sorted(unknown)}.")
    if released_compatible and entry.get("rate", 1) > 1 and entry["rate"] != int(entry["rate"]):
        raise ValueError(f"{origin}: rate is {entry['rate']}, but the released code repeats whole sources only.")
    for key in ("folder", "annotation", "image_root"):
        if entry.get(key):
            entry[key] = str(root / entry[key])
    modality = entry.get("modality", ())
    entry["modality"] = (modality,) if isinstance(modality, str) else tuple(modality)
    entry["tasks"] = tuple(entry.get("tasks", ()))
    if released_compatible:
        entry |= {"image_size": None, "jpeg_degradation": data_augment, "first_rows": True}
    source = Source(**entry)
    try:
        source.settings.check()
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return source


def meta_entries(entry: dict, root: Path, origin: str) -> list[dict]:
    """The entries of a released meta JSON, in this module's keys; the other keys of `entry` go to each of them."""
    path = root / entry["meta"]
    common = {key: value for key, value in entry.items() if key != "meta"}
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{origin}: the meta JSON {path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{origin}: {path} is no meta JSON: it must map names to sources.")
    entries = []
    for name, fields in meta.items():
        unknown = set(fields) - set(META_KEYS)
        missing = {"root", "annotation"} - set(fields)
        if unknown or missing:
            raise ValueError(
                f"{origin}: {name!r} in {path} has unknown keys {sorted(unknown)} and lacks {sorted(missing)}."
            )
        renamed = {META_KEYS[key]: value for key, value in fields.items() if value is not None}
        entries.append({**common, "data_augment": False, **renamed, "name": name})
    return entries


def warn_of_differences(entries: list[dict], released_compatible: bool) -> None:
    """One warning for each thing that the released code does otherwise than the mixture reads."""
    differences = {
        "a rate below 1 takes {} rows": ("random", "the first", lambda entry: entry.get("rate", 1) < 1),
        "image_size is {}": ("applied", "not read", lambda entry: entry.get("image_size")),
        "data_augment {}": (
            "is not applied, because the file does not say how",
            "degrades images by JPEG compression of random quality",
            lambda entry: entry.get("data_augment"),
        ),
    }
    for text, (ours, theirs, concerns) in differences.items():
        names = [str(entry.get("name")) for entry in entries if concerns(entry)]
        if names and released_compatible:
            logger.warning("released_compatible: %s, not %s, in %s.", text.format(theirs), ours, ", ".join(names))
        elif names:
            logger.warning(
                "The released code differs: here %s, there %s, in %s. released_compatible: true does as it does.",
                text.format(ours),
                theirs,
                ", ".join(names),
            )


def read_source(source: Source) -> Dataset | IterableDataset:
    """The rows of a source: map-style, or an iterable if `streaming`. See the module's docstring for the schema.

    JSON Lines are read once and kept in the cache of `datasets` until the file changes; images stay where they are.
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
        dataset = retry(partial(load_columns, source), source.name)
    except Exception as error:
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


def undecoded(features: Features) -> Features:
    """The same features with images left encoded."""

    def leave(feature):
        if isinstance(feature, Image):
            return Image(decode=False)
        if isinstance(feature, List) and isinstance(feature.feature, Image):
            return List(Image(decode=False))
        return feature

    return Features({name: leave(feature) for name, feature in features.items()})


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
    return columns


def to_rows(batch: dict[str, list], source: Source, columns: dict[str, str], features: Features) -> dict[str, list]:
    """A batch of stored columns to the schema; the transform of a map-style source."""
    rows = [
        make_row({name: values[index] for name, values in batch.items()}, source, columns, features, number)
        for index, number in enumerate(batch["row number"])
    ]
    return {name: [row[name] for row in rows] for name in FEATURES}


def make_row(stored: dict, source: Source, columns: dict[str, str], features: Features, number: int) -> dict:
    """One stored row to the schema; what is wrong with it goes into `error`."""
    row_id = str(stored[columns["id"]]) if "id" in columns else str(number)
    try:
        images = stored.get(columns.get("images")) if "images" in columns else None
        images = [] if images is None or images == "" else images if isinstance(images, list) else [images]
        images = [encoded_image(image, source.image_root) for image in images]
        if "messages" in columns:
            turns = stored[columns["messages"]]
        else:
            answer, label = stored[columns["answer"]], features[columns["answer"]]
            if isinstance(label, ClassLabel) and answer is not None:
                answer = label.int2str(answer)
            answer = "" if answer is None else str(answer)
            question = str(stored[columns["question"]]) if "question" in columns else source.prompt
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return row_of(source.name, row_id, images, normalise(turns, len(images)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return row_of(source.name, row_id, [], [], str(error))


def row_of(source: str, row_id: str, images: list[dict], messages: list[dict], error: str | None = None) -> dict:
    return {"id": row_id, "images": images, "messages": messages, "source": source, "error": error}


def encoded_image(image: Any, image_root: str | None) -> dict:
    """An image of a row, which may be a path, bytes or both, undecoded."""
    if isinstance(image, str):
        image = {"path": image, "bytes": None}
    elif isinstance(image, bytes):
        image = {"path": None, "bytes": image}
    if not isinstance(image, dict) or not (image.get("path") or image.get("bytes")):
        raise ValueError(f"an image is {str(image)[:80]!r}, neither a path nor encoded bytes.")
    if image.get("bytes") is None and image_root is not None:
        image = {**image, "path": str(Path(image_root) / image["path"])}
    return {"path": image.get("path"), "bytes": image.get("bytes")}


def normalise(turns: list[dict], num_images: int) -> list[dict]:
    """Turns of any of the usual shapes to messages of parts, `<image>` in a question to a place of an image.

    Images without a place go before the first question. Boxes and all other text stay as they are.

    Raises:
        ValueError: if a role is unknown, or the number of places is not the number of images.
    """
    if isinstance(turns, dict):  # a sequence of structures, stored by column
        turns = [dict(zip(turns, values)) for values in zip(*turns.values())]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"the messages are {str(turns)[:80]!r}, not a list of turns.")
    messages = []
    for index, turn in enumerate(turns):
        role = turn.get("role", turn.get("from"))
        if role not in ROLES:
            raise ValueError(f"message {index} has the role {role!r}; known are {', '.join(ROLES)}.")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, str):
            is_answer = ROLES[role] == "assistant"
            parts = [{"type": "text", "text": content}] if is_answer else split_at_places(content)
        elif isinstance(content, list):
            parts = [{"type": part.get("type"), "text": part.get("text")} for part in content]
        else:
            raise ValueError(f"message {index} has the content {str(content)[:80]!r}; text is needed.")
        messages.append({"role": ROLES[role], "content": parts})
    num_places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_places == 0 and num_images:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError("there is no question that its images could go before.")
        first["content"] = [{"type": "image", "text": None} for _ in range(num_images)] + first["content"]
    elif num_places != num_images:
        raise ValueError(f"it has {num_images} image(s), but {num_places} image place(s) in its messages.")
    return messages


def annotation_rows(annotation: str, image_root: str | None, name: str, state: str | None = None) -> Iterator[dict]:
    """Rows of an InternVL JSON Lines file, whose ids are line numbers, or of a JSON list of such rows.

    `state` is there for the cache: it changes when the file does.
    """
    with open(annotation, "rb") as file:
        if Path(annotation).suffix == ".json":
            entries = enumerate(json.load(file))
            for number, entry in entries:
                yield annotation_row(entry, image_root, name, str(number))
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                yield row_of(name, str(number), [], [], f"line {number} of {annotation} is no JSON: {error}")
                continue
            yield annotation_row(entry, image_root, name, str(number))


def annotation_row(entry: dict, image_root: str | None, name: str, row_id: str) -> dict:
    try:
        if entry.get("video"):
            raise ValueError("it is a video; frames can be given as a list of images.")
        images = entry.get("image") or []
        images = [encoded_image(image, image_root) for image in (images if isinstance(images, list) else [images])]
        turns = entry.get("conversations", entry.get("messages"))
        return row_of(name, row_id, images, normalise(turns, len(images)))
    except (ValueError, TypeError, AttributeError) as error:
        return row_of(name, row_id, [], [], str(error))


def stream_rows(source: Source) -> Iterator[dict]:
    """The rows of a streaming source; broken off by a transient error, it goes on from the row where it was."""
    if source.annotation:
        try:
            yield from annotation_rows(source.annotation, source.image_root, source.name)
        except (OSError, ValueError) as error:
            raise named(error, source) from error
        return
    number = tries = 0
    while True:
        try:
            dataset = load_columns(source)
            if dataset.features is None:
                dataset = dataset._resolve_features()
            columns = find_columns(source, dataset.features)
            dataset = dataset.select_columns(list(columns.values())).decode(False)
            for stored in all_rows(dataset.skip(number)):
                yield make_row(stored, source, columns, dataset.features, number)
                number, tries = number + 1, 0
            return
        except Exception as error:
            tries += 1
            if not is_transient(error) or tries > RETRIES:
                raise named(error, source, number) from error
            pause(error, source.name, tries)


def all_rows(stream: IterableDataset) -> Iterator[dict]:
    """The rows of a stream, all of them also in a worker of a data loader, where plain iteration gives a share."""
    for batch in stream.iter(batch_size=8):
        yield from (dict(zip(batch, values)) for values in zip(*batch.values()))


def retry(read: Callable[[], Any], name: str) -> Any:
    """Calls `read`, again after a transient error."""
    for tries in range(1, RETRIES + 1):
        try:
            return read()
        except Exception as error:
            if not is_transient(error):
                raise
            pause(error, name, tries)
    return read()


def pause(error: Exception, name: str, tries: int) -> None:
    seconds = 2.0 ** (tries - 1)
    logger.warning("Source %r: %s. Trying again in %g s (%d of %d).", name, error, seconds, tries, RETRIES)
    time.sleep(seconds)


def is_transient(error: BaseException | None) -> bool:
    """Whether the error, or what caused it, is a server that is busy or a connection that broke."""
    while error is not None:
        if isinstance(error, OfflineModeIsEnabled):
            return False
        status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
        if isinstance(status, int):
            return status in (408, 429) or status >= 500
        is_network = type(error).__module__.partition(".")[0] in ("aiohttp", "httpx", "httpx2", "requests")
        if (is_network or isinstance(error, (ConnectionError, TimeoutError))) and error.__cause__ is None:
            return True
        error = error.__cause__ or error.__context__
    return False


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
    splits = retry(load, name)
    if script_args.dataset_train_split not in splits:
        raise ValueError(
            f"{name} has no split {script_args.dataset_train_split!r}, only {sorted(splits)}: give dataset_train_split."
        )
    return splits
