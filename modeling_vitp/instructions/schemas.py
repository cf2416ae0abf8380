"""Schemas of instruction rows: how each is recognized by its columns, and read as a conversation.

A schema is declared once, by [`schema`] before the function that reads its turns. Data sets, sources of mixtures, their
validation and the trainer look it up here.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Json,
    List,
    Value,
    load_dataset,
    load_dataset_builder,
)
from datasets.builder import Key
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..images.reading import IMAGE_SUFFIXES, OF_THE_WEB, below, is_url
from ..processing_vitp import GIVEN
from .rows import FEATURES, check_image_part, content_id, split_at_places, undecoded

ROLE_OF = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Schema:
    """A schema of rows.

    Args:
        name: as it is printed.
        columns: that a data set needs for it. Of two that fit, one that needs all that the other needs is meant.
        turns: returns the turns of the conversation, from a row that has these columns.
    """

    name: str
    columns: tuple[str, ...]
    turns: Callable[[dict[str, Any]], list[dict]]


SCHEMAS: list[Schema] = []


def schema(name: str, *columns: str) -> Callable:
    """Register the decorated function as the reader of a schema, see [`Schema`]; one of the same name is replaced."""

    def register(turns: Callable) -> Callable:
        SCHEMAS[:] = [one for one in SCHEMAS if one.name != name] + [Schema(name, columns, turns)]
        return turns

    return register


@schema("messages", "messages")
def listed_turns(row: dict) -> list[dict]:
    return as_list(row["messages"])


@schema("prompts and completions", "prompt", "completion")
def completed_turns(row: dict) -> list[dict]:
    """Read texts as a question and its answer. As for TRL, no answer in a prompt is learned."""
    parts = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        turns = row[name]
        turns = [{"role": role, "content": turns}] if isinstance(turns, str) else as_list(turns)
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"the {name} is {str(turns)[:80]!r}, neither a text nor a list of turns.")
        parts.append(turns)
    prompt, completion = parts
    return [*({**turn, GIVEN: True} if isinstance(turn, dict) else turn for turn in prompt), *completion]


@schema("InternVL conversations", "conversations", "image", "width", "height")
@schema("LLaVA conversations", "conversations", "image")
@schema("ShareGPT conversations", "conversations")
def conversation_turns(row: dict) -> list[dict]:
    return as_list(row["conversations"])


@schema("questions and answers", "question", "answer")
def question_turns(row: dict) -> list[dict]:
    answer = row["answer"]
    question, answer = as_text(row["question"], "question"), "" if answer is None else as_text(answer, "answer")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


OF_IMAGES = {"image", "width", "height"}  # columns of a schema that hold no text
BESIDE = ("system", "video", "videos")  # what is read of a row beside its turns
IMAGES = ("images", "image")  # of a row that has both columns, those of the one that is not empty
RENAME = "Rename or leave out columns, or give the data as a source of a mixture, with `columns`."


def text_columns() -> list[str]:
    """Return the columns that hold the texts of a row in any schema."""
    return list(dict.fromkeys(name for schema in SCHEMAS for name in schema.columns if name not in OF_IMAGES))


def recognize(
    names: Iterable[str], mapped: Mapping[str, str] | None = None, prompt: str | None = None, remedy: str = RENAME
) -> tuple[Schema, dict[str, str]]:
    """Return the schema of rows with columns of these names, and which column is what in it.

    Args:
        mapped: what a user says of columns with other names.
        prompt: the question of rows that have an answer alone.
        remedy: what to do if it cannot be told.

    Raises:
        ValueError: lists the columns and what each schema needs, if none fits, or several do.
    """
    names, mapped = list(names), mapped or {}
    there = {*names, *mapped, *(["question"] if prompt is not None else [])}
    said = set(text_columns()) & set(mapped)
    fitting = [schema for schema in SCHEMAS if set(schema.columns) <= there and said <= set(schema.columns)]
    fitting = [one for one in fitting if not any(set(one.columns) < set(other.columns) for other in fitting)]
    if len(fitting) != 1:
        kinds = " and ".join(schema.name for schema in fitting)
        what = f"are those of {kinds} at once" if fitting else "make no conversation"
        needed = "; ".join(f"{schema.name} need {', '.join(schema.columns)}" for schema in SCHEMAS)
        raise ValueError(f"the columns {names} {what}. {remedy} {needed}.")
    roles = (*fitting[0].columns, *BESIDE)
    columns = {role: role for role in roles if role in names and role not in OF_IMAGES} | {
        role: column for role, column in mapped.items() if role in (*roles, "id", "images")
    }
    images = {} if "images" in columns else dict(zip(IMAGES, [name for name in IMAGES if name in names]))
    return fitting[0], {**images, **columns}


def as_list(turns: Any) -> Any:
    """Return turns as a list, where a sequence of structures is stored by column."""
    return [dict(zip(turns, values)) for values in zip(*turns.values())] if isinstance(turns, dict) else turns


class Written(str):
    """A number that is no whole one as it was written, so that an answer in a column of its own keeps its zeros."""


def parse_json(line: bytes, where: str) -> Any:
    """Parse a line of JSON, numbers with a point as [`Written`]; a `ValueError` names the place."""
    try:
        return json.loads(line, parse_float=Written)
    except (ValueError, RecursionError) as error:
        hint = ": save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{where} is no JSON: {error}{hint}") from None  # which all there is to say is in


def as_text(value: str | int, role: str) -> str:
    """Return a question or an answer as text; raise a `ValueError` if its type does not keep its spelling."""
    if isinstance(value, (int, Written)):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"the {role} is {str(value)[:80]!r}, stored as a {type(value).__name__}, so that how it was written is "
            "lost (3 may have become 3.0, a date have got a time). Store it as text."
        )
    return value


def check_text(text: Any, what: str) -> str:
    """Return the text; raise a `ValueError` if a table of rows does not hold it as it is.

    Rows share a column: beside a number, `datasets` makes numbers of other rows' texts, and of the number a text.
    """
    if not isinstance(text, str) or isinstance(text, Written):
        kind = "float" if isinstance(text, Written) else type(text).__name__
        raise ValueError(f"{what} is {str(text)[:80]!r}, of type {kind}; write it as text, in quotes.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half of a surrogate pair in it, \\u{ord(text[error.start]):x}.") from error
    return text


def check_unmerged(features: Features | dict | None) -> None:
    """Raise a `ValueError` that names a column of which the texts are no longer as they were written.

    Where the values of a column differ in type from row to row, the JSON reader of `datasets` parses its texts: beside
    a 3, "007" becomes 7.
    """

    def holds_json(feature: Any) -> bool:
        if isinstance(feature, (dict, list)):
            return any(map(holds_json, feature.values() if isinstance(feature, dict) else feature))
        return isinstance(feature, Json) or (hasattr(feature, "feature") and holds_json(feature.feature))

    for name, feature in (features or {}).items():
        if holds_json(feature):
            raise ValueError(
                f"the column {name!r} has texts in some rows, and numbers or other things in others, of which the "
                "reader has changed the texts. Write every one as text, in quotes."
            )


def after_system(system: Any, turns: list[dict]) -> list[dict]:
    """Put what a row says as `system` before its turns; raise a `ValueError` if they begin with another system turn."""
    if not system or not isinstance(turns, list):
        return turns
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if first.get("role", first.get("from")) != "system":
        return [{"role": "system", "content": system}, *turns]
    said = first.get("content", first.get("value"))
    if said not in (system, [{"type": "text", "text": system}]):
        raise ValueError(f"its `system` is {str(system)[:80]!r}, but its first turn {str(said)[:80]!r}: leave one out.")
    return turns


def messages_of(turns: list[dict], num_images: int) -> list[dict]:
    """Convert turns of any of the usual shapes to messages of parts, `<image>` in a question to a place of an image.

    Images without a place go before the first question. Boxes and all other text stay as they are. The parts of an
    answer that is `given`, and not to be learned, are of that type.

    Raises:
        ValueError: if a role is unknown, or the number of places is not the number of images.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"the messages are {str(turns)[:80]!r}, not a list of turns.")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"message {index} is {str(turn)[:80]!r}, but a role and a content are needed.")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLE_OF:
            raise ValueError(f"message {index} has the role {role!r}; known are {', '.join(ROLE_OF)}.")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            parts = [message_part(part, index) for part in content]
        else:
            content = check_text(content, f"the content of message {index}")
            is_answer = ROLE_OF[role] == "assistant"
            parts = [{"type": "text", "text": content}] if is_answer else split_at_places(content)
        if turn.get(GIVEN) and ROLE_OF[role] == "assistant":
            parts = [{**part, "type": GIVEN} for part in parts]
        messages.append({"role": ROLE_OF[role], "content": parts})
    num_places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_places == 0 and num_images:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError("there is no question that its images could go before.")
        first["content"] = [{"type": "image", "text": None} for _ in range(num_images)] + first["content"]
    elif num_places != num_images:
        raise ValueError(f"it has {num_images} image(s), but {num_places} image place(s) in its messages.")
    return messages


def message_part(part: Any, index: int) -> dict:
    """Return a part of message `index`: a text, or the place of an image."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": check_text(part.get("text"), f"a text in message {index}")}
    if kind not in ("image", "image_url"):
        raise ValueError(
            f"message {index} has the part {str(part)[:80]!r}, but {{'type': 'text', 'text': …}} or "
            "{'type': 'image'} is needed."
        )
    check_image_part(part, index)
    return {"type": "image", "text": None}


def encoded_image(image: Any, image_root: str | None) -> dict:
    """Return an image of a row, which may be a path, bytes or both, undecoded; a path may not lead out of
    `image_root`."""
    if isinstance(image, str):
        if is_url(image) and not OF_THE_WEB.match(image):
            raise ValueError(f"an image is {image[:80]!r}, neither a path nor a URL of the web.")
        image = {"path": image, "bytes": None}
    elif isinstance(image, bytes):
        image = {"path": None, "bytes": image}
    path, content = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (None, None)
    if not (path or content) or not isinstance(path or "", str) or not isinstance(content or b"", bytes):
        raise ValueError(f"an image is {str(image)[:80]!r}, neither a path nor encoded bytes.")
    check_text(path or "", "the path of an image")
    if image.get("bytes") is None and image_root is not None and not is_url(path):
        image = {**image, "path": str(below(image_root, path, "image_root"))}
    return {"path": image.get("path"), "bytes": image.get("bytes")}


def row_of(source: str, row_id: str, images: list[dict], messages: list[dict], error: str | None = None) -> dict:
    error = error and error.encode(errors="backslashreplace").decode()  # Arrow takes no half of a surrogate pair
    return {"id": row_id, "images": images, "messages": messages, "source": source, "error": error}


@dataclass(frozen=True)
class RowReader:
    """Makes conversations of the stored rows of a data set.

    Args:
        schema: of the rows.
        columns: which column is what.
        source: name of the source that the rows are of.
        prompt: the question where there is no column of questions.
        image_root: that paths of images are relative to, and do not leave.
        label: names of the classes, where the answer is one.
        is_packed: whether the rows are samples of a WebDataset, each of which is read by its own fields.
        mapped: see [`recognize`], for these fields.
    """

    schema: Schema
    columns: dict[str, str]
    source: str | None = None
    prompt: str | None = None
    image_root: str | None = None
    label: ClassLabel | None = None
    is_packed: bool = False
    mapped: Mapping[str, str] | None = None

    @classmethod
    def of(
        cls,
        stored: Mapping[str, Any],
        mapped: Mapping[str, str] | None = None,
        remedy: str = RENAME,
        **options,
    ) -> "RowReader":
        """Return a reader for rows with these columns, each with its feature or `None`; `options` are fields of the
        class.

        Raises:
            ValueError: see [`recognize`]; or if reading them has changed texts.
        """
        is_packed = KEY in stored
        names = unpacked_names(stored) if is_packed else list(stored)
        unknown = [column for column in (mapped or {}).values() if column not in names]
        if unknown:
            raise ValueError(f"it has no column {unknown[0]!r}, only {names}.")
        schema, columns = recognize(names, mapped, options.get("prompt"), remedy)
        label = stored.get(columns.get("answer"))
        label = label if isinstance(label, ClassLabel) else None
        reader = cls(schema, columns, label=label, is_packed=is_packed, mapped=mapped, **options)
        check_unmerged({name: stored[name] for name in reader.stored_columns(stored)})
        return reader

    @property
    def name(self) -> str:
        return f"{self.schema.name} in a WebDataset" if self.is_packed else self.schema.name

    def stored_columns(self, names: Iterable[str]) -> list[str]:
        """Return those that are read, of those that there are."""
        return list(names if self.is_packed else dict.fromkeys(self.columns.values()))

    def __call__(self, stored: dict[str, Any], number: int | None = None, image_root: str | None = None) -> dict:
        """Read one row; what is wrong with it goes into its `error`.

        Args:
            number: its id if it has none. Without a number either, the id is a hash of the content.
            image_root: of this row.
        """
        if self.is_packed:
            return self.unpacked(stored, number, image_root)
        row_id = stored.get(self.columns.get("id"))
        row_id = number if row_id is None else row_id
        error = None
        try:
            if any(stored.get(self.columns.get(role)) for role in ("video", "videos")):
                raise ValueError("it is a video; frames can be given as a list of images.")
            images = [encoded_image(image, image_root or self.image_root) for image in self.images_of(stored)]
            row = {role: stored[column] for role, column in self.columns.items() if column in stored}
            if "answer" in self.schema.columns:
                row.setdefault("question", self.prompt)
                if self.label is not None and row["answer"] is not None:
                    row["answer"] = self.label.int2str(row["answer"])
            messages = messages_of(after_system(row.get("system"), self.schema.turns(row)), len(images))
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            images, messages, error = [], [], str(problem)
        row_id = content_id({"messages": messages or str(stored)}) if row_id is None else str(row_id)
        return row_of(self.source, row_id, images, messages, error)

    def unpacked(self, sample: dict[str, Any], number: int | None, image_root: str | None) -> dict:
        """As `__call__`, of a sample of a WebDataset."""
        options = {"source": self.source, "prompt": self.prompt, "image_root": self.image_root}
        try:
            row = unpack(sample)
            reader = RowReader.of(dict.fromkeys(row), self.mapped, **options)
        except ValueError as problem:
            name = sample[KEY] if number is None or "id" in self.columns else number
            return row_of(self.source, str(name), [], [], f"sample {sample[KEY]} of {sample.get(URL)}: {problem}")
        return reader(row, number, image_root)

    def images_of(self, stored: dict[str, Any]) -> list:
        """Return the images of a row, of whichever of its columns has them; a `ValueError` if two have different
        ones."""
        stored = [stored.get(self.columns.get(role)) for role in IMAGES]
        images, others = ([] if one is None or one == "" else one if isinstance(one, list) else [one] for one in stored)
        if images and any(image not in images for image in others):
            raise ValueError("it has images under `images` and another under `image`: put all of them under `images`.")
        return images or others

    def batch(self, batch: dict[str, list]) -> dict[str, list]:
        """Read a batch of stored columns, with the numbers of the rows in one of them; the transform of a `Dataset`."""
        rows = [
            self({name: values[index] for name, values in batch.items()}, number)
            for index, number in enumerate(batch[NUMBERS])
        ]
        return {name: [row[name] for row in rows] for name in FEATURES}


# WebDataset's archives. What a sample has beside its files is its key and its archive. The files are a list, or as
# `datasets` reads them a column for each ending that the first samples have.
KEY, URL, MEMBERS = "__key__", "__url__", "members"
JSON = "json"
TEXTS, NUMBER_FILES = {"txt", "text", "transcript"}, {"cls", "cls2", "index", "inx", "id"}
VIDEOS = {"mkv", "mp4", "avi", "mpeg", "mpg", "mov"}


def is_image(member: str) -> bool:
    return PurePath(f"_.{member}").suffix.lower() in IMAGE_SUFFIXES


def unpacked_names(stored: Mapping[str, Any]) -> list[str]:
    """Return the names that [`unpack`] gives, of a sample or of the columns of all."""
    if MEMBERS in stored:
        return list(unpack(stored))
    fields = list(stored[JSON]) if isinstance(stored.get(JSON), Mapping) else []
    members = [name for name in stored if name not in (KEY, URL, JSON)]
    images = ["images"] if any(map(is_image, members)) else []
    fields = [name for name in fields if not images or name not in ("image", "images")]
    return list(dict.fromkeys(["id", *fields, *(name for name in members if not is_image(name)), *images]))


def unpack(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample of a WebDataset as a row: its key as `id`, the fields of its JSON, texts by their endings, and
    all of its images as `images`, which are those that the JSON names.

    Raises:
        ValueError: if a file of it cannot be read.
    """
    if MEMBERS in stored:
        members = {member["name"]: decode_member(stored[KEY], **member) for member in as_list(stored[MEMBERS])}
    else:
        members = {name: value for name, value in stored.items() if name not in (KEY, URL)}
    fields = members.pop(JSON, None) or {}
    if not isinstance(fields, dict):
        raise ValueError(f"its JSON holds {str(fields)[:80]!r}, and no row.")
    images = [members.pop(name) for name in list(members) if is_image(name)]
    videos = [name for name in members if ending(name) in VIDEOS and members[name] is not None]
    row = {"id": stored[KEY], **members, **fields}
    if images:
        row.pop("image", None)
        row["images"] = [image for image in images if image is not None]
    return {**row, "videos": videos} if videos else row


def ending(member: str) -> str:
    return member.rpartition(".")[2].lower()


def decode_member(key: str, name: str, content: bytes) -> Any:
    """Decode a file of a sample: what a JSON holds, a text, a number, an image with its name, or else bytes."""
    if name == JSON:
        return parse_json(content, f"{key}.{name}")
    if is_image(name):
        return {"path": f"{key}.{name}", "bytes": content}
    if ending(name) in TEXTS:
        return content.decode()
    return int(content) if ending(name) in NUMBER_FILES else content


class Archives(WebDataset):
    """Builder of WebDataset's samples as their key, their archive and their files, encoded, each with its ending for a
    name.

    The builder of `datasets` takes for columns what the first samples have, and drops what later ones have beside that:
    images of another ending, a second image, fields of their JSON.
    """

    DECODERS = {}

    def _info(self) -> DatasetInfo:
        files = List({"name": Value("string"), "content": Value("large_binary")})
        return DatasetInfo(features=Features({KEY: Value("string"), URL: Value("string"), MEMBERS: files}))

    def _generate_examples(self, tar_paths: list[str], tar_iterators: list[Iterable]) -> Iterator[tuple[Key, dict]]:
        for number, (path, files) in enumerate(zip(tar_paths, tar_iterators)):
            for index, sample in enumerate(self._get_pipeline_from_tar(path, files)):
                origin = {name: sample.pop(name) for name in (KEY, URL)}
                members = [{"name": name, "content": content} for name, content in sample.items()]
                yield Key(number, index), {**origin, MEMBERS: members}


def load_stored(
    split: str | None = None, streaming: bool = False, **place
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Load as `load_dataset` does, but archives, which are read as [`Archives`]."""
    found = load_dataset_builder(**place)
    if not isinstance(found, WebDataset):
        return load_dataset(**place, split=split, streaming=streaming)
    builder = Archives(
        cache_dir=place.get("cache_dir"),
        dataset_name=found.dataset_name,
        config_name=found.config.name,
        hash="1",  # of what is stored in the cache
        base_path=found.base_path,
        repo_id=found.repo_id,
        data_files=found.config.data_files,
    )
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def columns_of(dataset: Dataset | IterableDataset) -> Mapping[str, Any]:
    """Return the columns with their features, or `None` where these are not known; of archives the first sample."""
    columns = dataset.features or dict.fromkeys(dataset.column_names or next(iter(dataset), {}))
    if MEMBERS not in columns:
        return columns
    first = next(dataset.iter(batch_size=1), {KEY: [None], MEMBERS: [[]]})
    return {name: values[0] for name, values in first.items()}


NUMBERS = "row number"


def with_reader(dataset: Dataset | IterableDataset, reader: RowReader) -> Dataset | IterableDataset:
    """Return the same rows as `reader` makes them when they are read; what they are goes into the description.

    Of a map-style data set by a column of row numbers and a transform, not by `map`, which would write a copy of every
    image.
    """
    if isinstance(dataset, IterableDataset):
        names = dataset.column_names or list(next(iter(dataset), {}))
        if dataset.features is not None:
            for name, feature in undecoded(dataset.features).items():
                if feature != dataset.features[name]:
                    dataset = dataset.cast_column(name, feature)
        dataset = dataset.map(reader, features=FEATURES, remove_columns=names)
    else:
        columns = reader.stored_columns(dataset.column_names)
        dataset = dataset.select_columns(columns).add_column(NUMBERS, range(len(dataset)))
        dataset.info.features = undecoded(dataset.features)
        dataset.set_transform(reader.batch)
    dataset.info.description = reader.name
    return dataset


def to_conversations(dataset: Dataset | IterableDataset, image_root: str | None = None) -> Dataset | IterableDataset:
    """Return rows in any of the schemas as conversations, with their `id` if they have one.

    What has `messages` of roles and contents stays as it is, and so does what a user's own transform makes.

    Args:
        image_root: that paths of images are relative to.

    Raises:
        ValueError: lists the columns, and those that each schema needs, if none or several fit.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"the rows are of type {type(dataset).__name__}, but a data set of `datasets` is needed: load_dataset(…), "
            "or Dataset.from_list(rows, features=…) with a `datasets.Image` for each image."
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset
    stored = columns_of(dataset)
    mapped = {"id": "id"} if KEY in stored or "id" in stored else None
    reader = RowReader.of(stored, mapped, image_root=image_root)
    is_ready = reader.schema.name == "messages" and not reader.is_packed and not has_other_turns(stored["messages"])
    is_ready = is_ready and not set(IMAGES) <= set(stored) and not set(BESIDE) & set(stored)
    return dataset if is_ready and image_root is None else with_reader(dataset, reader)


def has_other_turns(feature: Any) -> bool:
    """Return whether messages are stored as turns with other fields than a role and a content."""
    turn = feature.feature if isinstance(feature, List) else None
    return isinstance(turn, Mapping) and "role" not in turn


def schema_name(dataset: Dataset | IterableDataset) -> str:
    """Return the name of the schema that the rows of a data set were stored in."""
    names = {name for schema in SCHEMAS for name in (schema.name, RowReader(schema, {}, is_packed=True).name)}
    return dataset.info.description if dataset.info.description in names else SCHEMAS[0].name
