"""Schemas of instruction rows: how a schema is recognized by its columns and converted to a conversation.

A schema is declared once, by the decorator [`schema`] on the function that returns its turns. Data sets, sources of
mixtures, their validation and the trainer look it up here.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import PIL.Image
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

from ..data.rows import undecoded
from ..images.reading import IMAGE_SUFFIXES, OF_THE_WEB, below, is_url
from ..processing_vitp import GIVEN, plain_message
from .rows import FEATURES, check_image_part, content_id, number_rows, split_at_places

ROLE_OF = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Schema:
    """Schema of instruction rows.

    Args:
        name: display name.
        columns: required columns. If two schemas match and one requires all columns of the other, it takes precedence.
        turns: function from a row with these columns to the turns of its conversation.
        is_last: whether every other schema that matches takes precedence.
    """

    name: str
    columns: tuple[str, ...]
    turns: Callable[[dict[str, Any]], list[dict]]
    is_last: bool = False


SCHEMAS: list[Schema] = []


def schema(name: str, *columns: str, is_last: bool = False) -> Callable:
    """Register the decorated function as the `turns` of a [`Schema`]; a schema with the same name is replaced."""

    def register(turns: Callable) -> Callable:
        SCHEMAS[:] = [other for other in SCHEMAS if other.name != name] + [Schema(name, columns, turns, is_last)]
        return turns

    return register


@schema("messages", "messages")
def listed_turns(row: dict) -> list[dict]:
    return turns_of(row["messages"])


@schema("prompts and completions", "prompt", "completion")
def completed_turns(row: dict) -> list[dict]:
    """Return a prompt and a completion as turns. Answers in the prompt are excluded from the loss, as in TRL."""
    parts = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        turns = row[name]
        turns = [{"role": role, "content": turns}] if isinstance(turns, str) else turns_of(turns)
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"the {name} must be a text or a list of turns, got {str(turns)[:80]!r}.")
        parts.append(turns)
    prompt, completion = parts
    return [*({**turn, GIVEN: True} if isinstance(turn, dict) else turn for turn in prompt), *completion]


@schema("InternVL conversations", "conversations", "image", "width", "height")
@schema("LLaVA conversations", "conversations", "image")
@schema("ShareGPT conversations", "conversations")
def conversation_turns(row: dict) -> list[dict]:
    return turns_of(row["conversations"])


@schema("questions and answers", "question", "answer")
def question_turns(row: dict) -> list[dict]:
    answer = row["answer"]
    question, answer = as_text(row["question"], "question"), "" if answer is None else as_text(answer, "answer")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CAPTION_QUESTIONS = (
    "Describe the image.",
    "What does the image show?",
    "Write a caption for the image.",
    "What can be seen in this image?",
    "Give a short description of the image.",
)


@schema("captions", "caption", is_last=True)
def caption_turns(row: dict) -> list[dict]:
    """Return a question and an answer for each caption of an image.

    The question is that of the row, or one of [`CAPTION_QUESTIONS`], chosen by the caption. Captions are a text, or a
    list of texts or of mappings with the text as `raw` or `caption`.
    """
    captions, turns = as_list(row["caption"]), []
    for caption in captions if isinstance(captions, list) else [captions]:
        if isinstance(caption, dict):
            caption = caption.get("raw", caption.get("caption"))
        text = check_text(caption, "the caption").strip()
        number = hashlib.sha256(text.encode()).digest()[0] + len(turns)
        question = row.get("question") or CAPTION_QUESTIONS[number % len(CAPTION_QUESTIONS)]
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return turns


# Other names of columns, in lowercase, that are recognized without `columns`.
OTHER_NAMES = dict.fromkeys(("captions", "text", "txt", "sentences"), "caption")
OTHER_NAMES |= dict.fromkeys(("img", "image_path", "img_path", "image_file"), "image")
OTHER_NAMES |= dict.fromkeys(("file_name", "filename", "filepath", "path"), "image")
OTHER_NAMES |= {name: name for name in ("image", "images", "caption")}
OF_IMAGES = {"image", "width", "height"}  # Columns of a schema that contain no text.
BESIDE = ("system", "video", "videos")  # Columns that are read in addition to those of the schema.
IMAGES = ("images", "image")  # If a row has both columns, the one that is not empty is used.


def text_columns() -> list[str]:
    """Return the text columns of all schemas."""
    return list(dict.fromkeys(name for schema in SCHEMAS for name in schema.columns if name not in OF_IMAGES))


def recognize(
    names: Iterable[str], mapped: Mapping[str, str] | None = None, prompt: str | None = None
) -> tuple[Schema, dict[str, str]]:
    """Return the schema that matches these column names, and a mapping from the schema's columns to the names.

    Args:
        mapped: mapping of the user from the schema's columns to other names.
        prompt: question of rows with an answer column only.

    Raises:
        ValueError: If no schema or several match. The message lists the columns, and those that each schema needs.
    """
    names, mapped = list(names), mapped or {}
    if not names:
        raise ValueError("expected rows, found none.")
    known = [*IMAGES, "id", *text_columns(), *BESIDE, *sorted(OF_IMAGES - {*IMAGES})]
    unknown = [role for role in mapped if role not in known]
    if unknown:
        raise ValueError(f"`columns`: unknown name {unknown[0]!r}. Known: {', '.join(dict.fromkeys(known))}.")
    requested = set(text_columns()) & set(mapped)
    renamed: dict[str, str] = {}
    for name in names:
        role = OTHER_NAMES.get(name.lower())
        same = IMAGES if role in IMAGES else (role,)
        if role and name not in mapped.values() and {*names, *mapped, *renamed}.isdisjoint(same):
            renamed[role] = name
    mapped = renamed | mapped
    available = {*names, *mapped, *(["question"] if prompt is not None else [])}
    matching = [schema for schema in SCHEMAS if requested <= set(schema.columns) <= available]
    matching = [one for one in matching if not any(set(one.columns) < set(other.columns) for other in matching)]
    matching = [one for one in matching if not one.is_last] or matching
    if len(matching) != 1:
        kinds = " and ".join(schema.name for schema in matching)
        found = f"match several schemas: {kinds}" if matching else "match no schema"
        needed = "; ".join(f"{schema.name} need {', '.join(schema.columns)}" for schema in SCHEMAS)
        hint = fitting(names, renamed) or needed
        raise ValueError(f"the columns {names} {found}. Rename or remove columns, or set `columns`. {hint}.")
    roles = (*matching[0].columns, *BESIDE)
    columns = {role: role for role in roles if role in names and role not in OF_IMAGES} | {
        role: column for role, column in mapped.items() if role in (*roles, "id", *IMAGES)
    }
    if columns.keys().isdisjoint(IMAGES):
        columns |= dict(zip(IMAGES, [name for name in IMAGES if name in names]))
    return matching[0], columns


def fitting(names: list[str], renamed: dict[str, str]) -> str:
    """Return the `columns` that would make a schema of unknown columns: one text is a caption, two are a question."""
    texts = [name for name in names if name.lower() not in (*OTHER_NAMES, *OF_IMAGES, *BESIDE, "id", "label", KEY)]
    roles = {1: ["caption"], 2: ["question", "answer"]}.get(len(texts))
    if roles is None:
        return ""
    columns = {role: name for role, name in renamed.items() if role in IMAGES} | dict(zip(roles, texts))
    return f"Perhaps: columns: {json.dumps(columns, ensure_ascii=False)}"


def looks_like_image(value: Any) -> bool:
    """Return whether a value is an encoded or decoded image, the name of an image file, or a list of them."""
    if isinstance(value, list):
        return bool(value) and all(map(looks_like_image, value))
    if isinstance(value, dict):
        return {"bytes", "path"} <= value.keys() and (value["bytes"] is not None or looks_like_image(value["path"]))
    if isinstance(value, str):
        return len(value) < 4096 and PurePath(value).suffix.lower() in IMAGE_SUFFIXES
    return isinstance(value, PIL.Image.Image)


def as_list(turns: Any) -> Any:
    """Return turns as a list of dictionaries, also if they are stored as a dictionary of lists."""
    return [dict(zip(turns, values)) for values in zip(*turns.values())] if isinstance(turns, dict) else turns


def turns_of(turns: Any) -> Any:
    """Return turns as [`as_list`] does, without the empty fields that they have if other turns have these fields."""
    turns = as_list(turns)
    return [plain_message(turn) for turn in turns] if isinstance(turns, list) else turns


class Written(str):
    """Text of a decimal number in JSON, which keeps trailing zeros of an answer."""


def parse_json(line: bytes, where: str) -> Any:
    """Parse JSON, with decimal numbers as [`Written`]; a `ValueError` names the location `where`."""
    try:
        return json.loads(line, parse_float=Written)
    except (ValueError, RecursionError) as error:
        hint = ": save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{where} is not valid JSON: {error}{hint}") from None


def as_text(value: str | int, role: str) -> str:
    """Return a question or an answer as text; raise a `ValueError` if its type does not preserve the spelling."""
    if isinstance(value, (int, Written)):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"the {role} must be a text, got {str(value)[:80]!r} of type {type(value).__name__}, which may differ from "
            "what was written (3.0 instead of 3, a date with a time). Store it as text."
        )
    return value


def check_text(text: Any, what: str) -> str:
    """Return the text; raise a `ValueError` if a table of rows would change it.

    All rows share a column: if one row has a number, `datasets` may convert the texts of other rows to numbers.
    """
    if not isinstance(text, str) or isinstance(text, Written):
        kind = "float" if isinstance(text, Written) else type(text).__name__
        raise ValueError(f"{what} must be a text, got {str(text)[:80]!r} of type {kind}. Put it in quotes.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} contains an unpaired surrogate, \\u{ord(text[error.start]):x}.") from error
    return text


def check_unmerged(features: Features | dict | None) -> None:
    """Raise a `ValueError` that names a column whose texts may have been changed by the reader.

    If the values of a column differ in type between rows, the JSON reader of `datasets` parses the texts: if one row
    has the number 3, "007" in another row becomes 7.
    """

    def holds_json(feature: Any) -> bool:
        if isinstance(feature, (dict, list)):
            return any(map(holds_json, feature.values() if isinstance(feature, dict) else feature))
        return isinstance(feature, Json) or (hasattr(feature, "feature") and holds_json(feature.feature))

    for name, feature in (features or {}).items():
        if holds_json(feature):
            raise ValueError(
                f"the column {name!r} has texts in some rows and other types in others, so that the reader may have "
                "changed the texts. Put every value in quotes."
            )


def after_system(system: Any, turns: list[dict]) -> list[dict]:
    """Prepend a system turn to the turns; raise a `ValueError` if they begin with a different system turn."""
    if not system or not isinstance(turns, list):
        return turns
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if first.get("role", first.get("from")) != "system":
        return [{"role": "system", "content": system}, *turns]
    content = first.get("content", first.get("value"))
    if content not in (system, [{"type": "text", "text": system}]):
        raise ValueError(
            f"its `system` is {str(system)[:80]!r}, but its first turn is {str(content)[:80]!r}. Remove one of them."
        )
    return turns


def messages_of(turns: list[dict], num_images: int) -> list[dict]:
    """Convert turns to messages with lists of parts; each `<image>` in a question becomes an image part.

    If no turn contains an image, the images are inserted before the first question. Boxes and all other text stay
    unchanged. The parts of an answer that is excluded from the loss have the type `given`.

    Raises:
        ValueError: If a role is unknown, or the number of image parts differs from the number of images.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"the messages must be a list of turns, got {str(turns)[:80]!r}.")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"message {index} must have a role and a content, got {str(turn)[:80]!r}.")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLE_OF:
            raise ValueError(f"message {index} has the unknown role {role!r}. Known roles: {', '.join(ROLE_OF)}.")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            parts = [message_part(part, index) for part in content]
        else:
            parts = [{"type": "text", "text": check_text(content, f"the content of message {index}")}]
        if ROLE_OF[role] != "assistant" and all(part["type"] == "text" for part in parts):
            parts = [piece for part in parts for piece in split_at_places(part["text"])]
        if turn.get(GIVEN) and ROLE_OF[role] == "assistant":
            parts = [{**part, "type": GIVEN} for part in parts]
        messages.append({"role": ROLE_OF[role], "content": parts})
    num_places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_places == 0 and num_images:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError("a row with images needs a question.")
        first["content"] = [{"type": "image", "text": None} for _ in range(num_images)] + first["content"]
    elif num_places != num_images:
        raise ValueError(f"it has {num_images} image(s), but {num_places} image place(s) in its messages.")
    return messages


def message_part(part: Any, index: int) -> dict:
    """Return a part of message `index`: a text or an image part."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": check_text(part.get("text"), f"a text in message {index}")}
    if kind not in ("image", "image_url"):
        raise ValueError(
            f"message {index}: expected a part {{'type': 'text', 'text': …}} or {{'type': 'image'}}, got "
            f"{str(part)[:80]!r}."
        )
    check_image_part(part, index)
    return {"type": "image", "text": None}


def encoded_image(image: Any, image_root: str | None) -> dict:
    """Return an undecoded image as a dictionary of path and bytes; a path may not lead out of `image_root`."""
    if isinstance(image, str):
        if is_url(image) and not OF_THE_WEB.match(image):
            raise ValueError(f"an image must be a path or an HTTP URL, got {image[:80]!r}.")
        image = {"path": image, "bytes": None}
    elif isinstance(image, bytes):
        image = {"path": None, "bytes": image}
    path, content = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (None, None)
    if not (path or content) or not isinstance(path or "", str) or not isinstance(content or b"", bytes):
        raise ValueError(f"an image must be a path or encoded bytes, got {str(image)[:80]!r}.")
    check_text(path or "", "the path of an image")
    if image.get("bytes") is None and image_root is not None and not is_url(path):
        image = {**image, "path": str(below(image_root, path, "image_root"))}
    return {"path": image.get("path"), "bytes": image.get("bytes")}


def row_of(source: str, row_id: str, images: list[dict], messages: list[dict], error: str | None = None) -> dict:
    error = error and error.encode(errors="backslashreplace").decode()  # Arrow rejects unpaired surrogates.
    return {"id": row_id, "images": images, "messages": messages, "source": source, "error": error}


@dataclass(frozen=True)
class RowReader:
    """Converter from the stored rows of a data set to conversations.

    Args:
        schema: schema of the rows.
        columns: mapping from the schema's columns to the stored ones.
        source: name of the source.
        prompt: question of every row, if the question column is missing.
        image_root: folder that image paths are relative to. Paths must not lead out of it.
        label: class names, if the answer is a class number.
        is_packed: whether the rows are samples of a WebDataset, each of which is read by its own fields.
        mapped: mapping of the user, see [`recognize`], for the fields of WebDataset samples.
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
        **options,
    ) -> "RowReader":
        """Return a reader for rows with these columns.

        Args:
            stored: column names with their features, or with `None` if a feature is unknown.
            options: fields of the class.

        Raises:
            ValueError: If the schema is not recognized, see [`recognize`], or texts may have been changed on reading.
        """
        is_packed = KEY in stored
        names = unpacked_names(stored) if is_packed else list(stored)
        unknown = [column for column in (mapped or {}).values() if column not in names]
        if unknown:
            raise ValueError(f"column {unknown[0]!r} not found. Found: {names}.")
        schema, columns = recognize(names, mapped, options.get("prompt"))
        label = stored.get(columns.get("answer"))
        label = label if isinstance(label, ClassLabel) else None
        reader = cls(schema, columns, label=label, is_packed=is_packed, mapped=mapped, **options)
        check_unmerged({name: stored[name] for name in (stored if is_packed else {*columns.values()})})
        return reader

    @property
    def name(self) -> str:
        return f"{self.schema.name} in a WebDataset" if self.is_packed else self.schema.name

    def stored_columns(self, names: Iterable[str]) -> list[str]:
        """Return the columns in `names` that the reader uses, or all if it has yet to look for images in them."""
        return list(names if self.is_packed or not self.reads_images else dict.fromkeys(self.columns.values()))

    @property
    def reads_images(self) -> bool:
        """Presence of a column of images."""
        return any(role in self.columns for role in IMAGES)

    def __call__(self, stored: dict[str, Any], number: int | None = None, image_root: str | None = None) -> dict:
        """Convert one row; if it is invalid, describe the problem in its `error`.

        Args:
            number: id of a row without an id. Without a number, the id is a hash of the content.
            image_root: image folder of this row, if it differs from the reader's.
        """
        if self.is_packed:
            return self.unpacked(stored, number, image_root)
        row_id = stored.get(self.columns.get("id"))
        row_id = number if row_id is None else row_id
        error = None
        try:
            if any(stored.get(self.columns.get(role)) for role in ("video", "videos")):
                raise ValueError("videos are not supported. Store frames as a list of images.")
            given = self.images_of(stored)
            images = [encoded_image(image, image_root or self.image_root) for image in given]
            row = {role: stored[column] for role, column in self.columns.items() if column in stored}
            row.setdefault("question", self.prompt)
            if self.label is not None and row["answer"] is not None:
                row["answer"] = self.label.int2str(row["answer"])
            unread = [] if self.reads_images else [name for name, value in stored.items() if looks_like_image(value)]
            if unread:
                raise ValueError(
                    f"the column {unread[0]!r} looks like image files, but is not read. Rename it to `image`, set "
                    f"`columns` to {json.dumps({'image': unread[0]})}, or remove it."
                )
            if "caption" in self.schema.columns and not images:
                raise ValueError("a caption needs an image, but the row has none. Add it or remove the row.")
            messages = messages_of(after_system(row.get("system"), self.schema.turns(row)), len(images))
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            images, messages, given, error = [], [], [], str(problem)
        if row_id is None:  # of paths as they are stored, so that the folder of the data may be moved
            row_id = content_id({"messages": messages or str(stored), "images": given})
        return row_of(self.source, str(row_id), images, messages, error)

    def unpacked(self, sample: dict[str, Any], number: int | None, image_root: str | None) -> dict:
        """Convert a sample of a WebDataset, see `__call__`."""
        options = {"source": self.source, "prompt": self.prompt, "image_root": self.image_root}
        try:
            row = unpack(sample)
            reader = RowReader.of(dict.fromkeys(row), self.mapped, **options)
        except ValueError as problem:
            name = sample[KEY] if number is None or "id" in self.columns else number
            return row_of(self.source, str(name), [], [], f"sample {sample[KEY]} of {sample.get(URL)}: {problem}")
        return reader(row, number, image_root)

    def images_of(self, stored: dict[str, Any]) -> list:
        """Return the images of a row from `images` or `image`; raise a `ValueError` if the two columns differ."""
        stored = [stored.get(self.columns.get(role)) for role in IMAGES]
        images, others = ([] if one is None or one == "" else one if isinstance(one, list) else [one] for one in stored)
        if images and any(image not in images for image in others):
            raise ValueError("`images` and `image` contain different images. Put all of them under `images`.")
        return images or others

    def batch(self, batch: dict[str, list]) -> dict[str, list]:
        """Convert a batch of stored columns, one of which has the row numbers; used as transform of a `Dataset`."""
        rows = [
            self({name: values[index] for name, values in batch.items()}, number)
            for index, number in enumerate(batch[NUMBERS])
        ]
        return {name: [row[name] for row in rows] for name in FEATURES}


# Columns of a WebDataset sample: key, archive, and its files. The files are a list (`members`) or, as `datasets` reads
# them, one column for each file extension of the first samples.
KEY, URL, MEMBERS = "__key__", "__url__", "members"
JSON = "json"
TEXTS, NUMBER_FILES = {"txt", "text", "transcript"}, {"cls", "cls2", "index", "inx", "id"}
VIDEOS = {"mkv", "mp4", "avi", "mpeg", "mpg", "mov"}


def is_image(member: str) -> bool:
    return PurePath(f"_.{member}").suffix.lower() in IMAGE_SUFFIXES


def unpacked_names(stored: Mapping[str, Any]) -> list[str]:
    """Return the field names that [`unpack`] returns for a sample, or for any sample with these columns."""
    if MEMBERS in stored:
        return list(unpack(stored))
    fields = list(stored[JSON]) if isinstance(stored.get(JSON), Mapping) else []
    members = [name for name in stored if name not in (KEY, URL, JSON)]
    images = ["images"] if any(map(is_image, members)) else []
    fields = [name for name in fields if not images or name not in ("image", "images")]
    return list(dict.fromkeys(["id", *fields, *(name for name in members if not is_image(name)), *images]))


def unpack(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample of a WebDataset as a row.

    The row has the key as `id`, the fields of the JSON file, texts by their file extension, and all images as `images`,
    which replace the image names in the JSON, in the order of [`in_order`].

    Raises:
        ValueError: If a file of the sample cannot be read.
    """
    if MEMBERS in stored:
        members = {member["name"]: decode_member(stored[KEY], **member) for member in as_list(stored[MEMBERS])}
    else:
        members = {name: value for name, value in stored.items() if name not in (KEY, URL)}
    fields = members.pop(JSON, None) or {}
    if not isinstance(fields, dict):
        raise ValueError(f"its JSON must be a mapping, got {str(fields)[:80]!r}.")
    images = {name: members.pop(name) for name in list(members) if is_image(name)}
    videos = [name for name in members if ending(name) in VIDEOS and members[name] is not None]
    row = {"id": stored[KEY], **members, **fields}
    if images:
        row.pop("image", None)
        images = {name: image for name, image in images.items() if image is not None}
        row["images"] = [images[name] for name in in_order([*images], fields)]
    return {**row, "videos": videos} if videos else row


def in_order(images: list[str], fields: Mapping[str, Any]) -> list[str]:
    """Return the image files of a sample in the order of its JSON.

    Images that the JSON does not list are ordered by number if their names differ in numbers alone. Others keep the
    order in which they are stored.
    """
    named = fields.get("images") or fields.get("image")
    listed = [
        max((image for image in images if re.search(rf"(^|[./]){re.escape(image)}$", str(name))), key=len, default="")
        for name in (named if isinstance(named, list) else [])
    ]
    if sorted(listed) == sorted(images):
        return listed
    if len({re.sub(r"\d+", "0", image) for image in images}) == 1:
        return sorted(images, key=lambda image: [int(part) for part in re.findall(r"\d+", image)])
    return images


def ending(member: str) -> str:
    return member.rpartition(".")[2].lower()


def decode_member(key: str, name: str, content: bytes) -> Any:
    """Return the content of a file of a sample: parsed JSON, text, number, encoded image with its name, or bytes."""
    if name == JSON:
        return parse_json(content, f"{key}.{name}")
    if is_image(name):
        return {"path": f"{key}.{name}", "bytes": content}
    if ending(name) in TEXTS:
        return content.decode("utf-8-sig")
    return int(content) if ending(name) in NUMBER_FILES else content


class Archives(WebDataset):
    """Builder for WebDataset archives. A sample has its key, its archive, and its encoded files by file extension.

    The builder of `datasets` takes the columns from the first samples and drops additional fields of later ones: images
    with another extension, a second image, fields of their JSON.
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
    split: str | None = None, streaming: bool = False, **location
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Load a data set with `load_dataset`, or a WebDataset with [`Archives`]."""
    found = load_dataset_builder(**location)
    if not isinstance(found, WebDataset):
        return load_dataset(**location, split=split, streaming=streaming)
    builder = Archives(
        cache_dir=location.get("cache_dir"),
        dataset_name=found.dataset_name,
        config_name=found.config.name,
        hash="1",  # Version of the cached format.
        base_path=found.base_path,
        repo_id=found.repo_id,
        data_files=found.config.data_files,
    )
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def columns_of(dataset: Dataset | IterableDataset) -> Mapping[str, Any]:
    """Return the columns with their features, or `None` for unknown ones; for a WebDataset, return its first sample."""
    columns = dataset.features or dict.fromkeys(dataset.column_names or next(iter(dataset), {}))
    if MEMBERS not in columns:
        return columns
    first = next(dataset.iter(batch_size=1), {KEY: [None], MEMBERS: [[]]})
    return {name: values[0] for name, values in first.items()}


NUMBERS = "row number"


def with_reader(dataset: Dataset | IterableDataset, reader: RowReader) -> Dataset | IterableDataset:
    """Return a data set whose rows `reader` converts on access; its description is the name of the schema.

    A map-style data set gets a column of row numbers and a transform, because `map` would write a copy of every image.
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
        dataset = number_rows(dataset.select_columns(columns), NUMBERS)
        dataset.info.features = undecoded(dataset.features)
        dataset.set_transform(reader.batch)
    dataset.info.description = reader.name
    return dataset


def to_conversations(
    dataset: Dataset | IterableDataset,
    image_root: str | None = None,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
) -> Dataset | IterableDataset:
    """Return rows in any of the schemas as conversations, with their `id` if they have one.

    Rows with `messages` of roles and contents are returned unchanged, and so is a data set with a user's transform.

    Args:
        image_root: folder that image paths are relative to.
        columns: names of columns, see [`~modeling_vitp.instructions.sources.Source`].
        prompt: question of every row, for captions or rows with an answer only.

    Raises:
        ValueError: If no schema or several match. The message lists the columns, and those that each schema needs.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"expected a `datasets.Dataset`, got {type(dataset).__name__}. Use load_dataset(…), or "
            "Dataset.from_list(rows, features=…) with a `datasets.Image` for each image."
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset
    stored = columns_of(dataset)
    mapped = ({"id": "id"} if KEY in stored or "id" in stored else {}) | (columns or {})
    reader = RowReader.of(stored, mapped, image_root=image_root, prompt=prompt)
    if columns or image_root is not None or reader.is_packed or reader.schema.name != "messages":
        return with_reader(dataset, reader)
    turn = stored["messages"].feature if isinstance(stored["messages"], List) else None
    has_roles = not isinstance(turn, Mapping) or "role" in turn
    is_ready = has_roles and len(set(IMAGES) & set(stored)) == 1 and set(BESIDE).isdisjoint(stored)
    return dataset if is_ready else with_reader(dataset, reader)


def schema_name(dataset: Dataset | IterableDataset) -> str:
    """Return the name of the schema in which the rows of a data set are stored."""
    names = {name for schema in SCHEMAS for name in (schema.name, RowReader(schema, {}, is_packed=True).name)}
    return dataset.info.description if dataset.info.description in names else SCHEMAS[0].name
