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

from ..conversations import GIVEN, plain_message
from ..data.rows import undecoded
from ..images.reading import IMAGE_SUFFIXES, OF_THE_WEB, below, is_url, said
from .rows import FEATURES, check_image_part, content_id, num_image_parts, number_rows, split_at_places

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
        other_schemas = [registered for registered in SCHEMAS if registered.name != name]
        # The list is changed in place, because other modules import it.
        SCHEMAS[:] = [*other_schemas, Schema(name, columns, turns, is_last)]
        return turns

    return register


@schema("messages", "messages")
def listed_turns(row: dict) -> list[dict]:
    return turns_of(row["messages"])


@schema("prompts and completions", "prompt", "completion")
def completed_turns(row: dict) -> list[dict]:
    """Return a prompt and a completion as turns. Answers in the prompt are excluded from the loss, as in TRL."""
    turns = []
    for turn in turns_of_column(row, "prompt", "user"):
        if isinstance(turn, dict):
            turn = {**turn, GIVEN: True}
        turns.append(turn)
    return turns + turns_of_column(row, "completion", "assistant")


def turns_of_column(row: dict, column: str, role: str) -> list:
    """Return the turns of a column, whose text is one turn of this role."""
    content = row[column]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    turns = turns_of(content)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"the {column} must be a text or a list of turns, got {str(turns)[:80]!r}.")
    return turns


@schema("InternVL conversations", "conversations", "image", "width", "height")
@schema("LLaVA conversations", "conversations", "image")
@schema("ShareGPT conversations", "conversations")
def conversation_turns(row: dict) -> list[dict]:
    return turns_of(row["conversations"])


@schema("questions and answers", "question", "answer")
def question_turns(row: dict) -> list[dict]:
    question = as_text(row["question"], "question")
    answer = ""
    if row["answer"] is not None:
        answer = as_text(row["answer"], "answer")
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
    captions = as_list(row["caption"])
    if not isinstance(captions, list):
        captions = [captions]
    turns = []
    for caption in captions:
        if isinstance(caption, dict):
            caption = caption.get("raw", caption.get("caption"))
        text = check_text(caption, "the caption").strip()
        question = row.get("question")
        if not question:
            number = hashlib.sha256(text.encode()).digest()[0] + len(turns)
            question = CAPTION_QUESTIONS[number % len(CAPTION_QUESTIONS)]
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": text})
    return turns


# Other names of columns, in lowercase, that are recognized without `columns`.
OTHER_NAMES = dict.fromkeys(("captions", "text", "txt", "sentences"), "caption")
OTHER_NAMES |= dict.fromkeys(("img", "image_path", "img_path", "image_file"), "image")
OTHER_NAMES |= dict.fromkeys(("file_name", "filename", "filepath", "path"), "image")
OTHER_NAMES |= {"image": "image", "images": "images", "caption": "caption"}
OF_IMAGES = {"image", "width", "height"}  # Columns of a schema that contain no text.
BESIDE = ("system", "video", "videos")  # Columns that are read in addition to those of the schema.
IMAGES = ("images", "image")  # If a row has both columns, the one that is not empty is used.


def text_columns() -> list[str]:
    """Return the text columns of all schemas."""
    columns = []
    for registered in SCHEMAS:
        for column in registered.columns:
            if column not in OF_IMAGES and column not in columns:
                columns.append(column)
    return columns


def recognize(
    names: Iterable[str],
    mapped: Mapping[str, str] | None = None,
    prompt: str | None = None,
) -> tuple[Schema, dict[str, str]]:
    """Return the schema that matches these column names, and a mapping from the schema's columns to the names.

    Args:
        mapped: mapping of the user from the schema's columns to other names.
        prompt: question of rows with an answer column only.

    Raises:
        ValueError: If no schema or several match. The message lists the columns, and those that each schema needs.
    """
    names = list(names)
    if not names:
        raise ValueError("expected rows, found none.")
    user_columns = dict(mapped or {})
    check_roles(user_columns)
    renamed = columns_with_other_names(names, user_columns)
    column_of = {**renamed, **user_columns}
    available = {*names, *column_of}
    if prompt is not None:
        available.add("question")
    requested = set(text_columns()) & set(user_columns)
    matching = matching_schemas(requested, available)
    if len(matching) != 1:
        if matching:
            problem = "match several schemas: " + " and ".join(candidate.name for candidate in matching)
        else:
            problem = "match no schema"
        hint = suggested_columns(names, renamed) or needed_columns()
        raise ValueError(f"the columns {names} {problem}. Rename or remove columns, or set `columns`. {hint}.")
    recognized = matching[0]
    return recognized, columns_to_read(recognized, names, column_of)


def check_roles(user_columns: Mapping[str, str]) -> None:
    """Raise a `ValueError` that names a key of `columns` which no schema reads."""
    roles = [*IMAGES, "id", *text_columns(), *BESIDE]
    for role in sorted(OF_IMAGES):
        if role not in IMAGES:
            roles.append(role)
    for role in user_columns:
        if role not in roles:
            raise ValueError(f"`columns`: unknown name {role!r}. Known: {', '.join(dict.fromkeys(roles))}.")


def columns_with_other_names(names: list[str], user_columns: Mapping[str, str]) -> dict[str, str]:
    """Return the columns that are recognized by one of [`OTHER_NAMES`], by the schema's column that they replace."""
    renamed: dict[str, str] = {}
    for name in names:
        role = OTHER_NAMES.get(name.lower())
        if role is None or name in user_columns.values():
            continue
        equal_roles = IMAGES if role in IMAGES else (role,)
        if {*names, *user_columns, *renamed}.isdisjoint(equal_roles):
            renamed[role] = name
    return renamed


def matching_schemas(requested: set[str], available: set[str]) -> list[Schema]:
    """Return the schemas with all requested columns whose columns are available, without those of lower precedence."""
    complete = []
    for candidate in SCHEMAS:
        if requested <= set(candidate.columns) <= available:
            complete.append(candidate)
    largest = []
    for candidate in complete:
        if not any(set(candidate.columns) < set(rival.columns) for rival in complete):
            largest.append(candidate)
    preferred = [candidate for candidate in largest if not candidate.is_last]
    return preferred or largest


def columns_to_read(recognized: Schema, names: list[str], column_of: Mapping[str, str]) -> dict[str, str]:
    """Return the stored column of each of the schema's columns, and of the id, the images and those in [`BESIDE`]."""
    roles = (*recognized.columns, *BESIDE)
    columns = {}
    for role in roles:
        if role in names and role not in OF_IMAGES:
            columns[role] = role
    for role, column in column_of.items():
        if role in roles or role == "id" or role in IMAGES:
            columns[role] = column
    if columns.keys().isdisjoint(IMAGES):
        image_columns = [name for name in IMAGES if name in names]
        # One column of images is read as `images`, whichever of the two names it has.
        columns.update(zip(IMAGES, image_columns))
    return columns


def needed_columns() -> str:
    """Return a text with the columns that each schema needs."""
    return "; ".join(f"{registered.name} need {', '.join(registered.columns)}" for registered in SCHEMAS)


def suggested_columns(names: list[str], renamed: dict[str, str]) -> str:
    """Return the `columns` that make captions of one or two unknown columns; of two, one may be a number or name."""
    known_names = {*OTHER_NAMES, *OF_IMAGES, *BESIDE, "id", "label", KEY}
    texts = [name for name in names if name.lower() not in known_names]
    if len(texts) not in (1, 2):
        return ""
    images = {role: name for role, name in renamed.items() if role in IMAGES}
    if len(texts) == 2 and not images and not any(name in IMAGES for name in names):
        first, second = texts
        suggestions = [json.dumps({"image": first, "caption": second}, ensure_ascii=False)]
        suggestions.append(json.dumps({"image": second, "caption": first}, ensure_ascii=False))
        return f"Perhaps: columns: {' or '.join(suggestions)}"
    suggestions = [json.dumps({**images, "caption": name}, ensure_ascii=False) for name in texts]
    if len(texts) == 2:
        suggestions.append(json.dumps({**images, "question": texts[0], "answer": texts[1]}, ensure_ascii=False))
    return f"Perhaps: columns: {' or '.join(suggestions)}"


def looks_like_image(value: Any) -> bool:
    """Return whether a value is an encoded or decoded image, the name of an image file, or a list of them."""
    if isinstance(value, list):
        return bool(value) and all(map(looks_like_image, value))
    if isinstance(value, dict):
        if not {"bytes", "path"} <= value.keys():
            return False
        return value["bytes"] is not None or looks_like_image(value["path"])
    if isinstance(value, str):
        return len(value) < 4096 and PurePath(value).suffix.lower() in IMAGE_SUFFIXES
    return isinstance(value, PIL.Image.Image)


def as_list(turns: Any) -> Any:
    """Return turns as a list of dictionaries, also if they are stored as a dictionary of lists."""
    if not isinstance(turns, dict):
        return turns
    return [dict(zip(turns, fields)) for fields in zip(*turns.values())]


def turns_of(turns: Any) -> Any:
    """Return turns as [`as_list`] does, without the empty fields that they have if other turns have these fields."""
    turns = as_list(turns)
    if not isinstance(turns, list):
        return turns
    return [plain_message(turn) for turn in turns]


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
    for name, feature in (features or {}).items():
        if holds_json(feature):
            raise ValueError(
                f"the column {name!r} has texts in some rows and other types in others, so that the reader may have "
                "changed the texts. Put every value in quotes."
            )


def holds_json(feature: Any) -> bool:
    """Return whether a feature, or one inside of it, is JSON."""
    if isinstance(feature, dict):
        return any(map(holds_json, feature.values()))
    if isinstance(feature, list):
        return any(map(holds_json, feature))
    if hasattr(feature, "feature") and holds_json(feature.feature):
        return True
    return isinstance(feature, Json)


def after_system(system: Any, turns: list[dict]) -> list[dict]:
    """Prepend a system turn to the turns; raise a `ValueError` if they begin with a different system turn."""
    if not system or not isinstance(turns, list):
        return turns
    first_turn = {}
    if turns and isinstance(turns[0], dict):
        first_turn = turns[0]
    if first_turn.get("role", first_turn.get("from")) != "system":
        return [{"role": "system", "content": system}, *turns]
    content = first_turn.get("content", first_turn.get("value"))
    content_in_parts = [{"type": "text", "text": system}]
    if content != system and content != content_in_parts:
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
    messages = [message_of(turn, index) for index, turn in enumerate(turns)]
    num_places = num_image_parts(messages)
    if num_places == 0 and num_images:
        insert_images(messages, num_images)
    elif num_places != num_images:
        raise ValueError(f"it has {num_images} image(s), but {num_places} image place(s) in its messages.")
    return messages


def message_of(turn: Any, index: int) -> dict:
    """Return turn number `index` as a message with a list of parts."""
    if not isinstance(turn, dict):
        raise ValueError(f"message {index} must have a role and a content, got {str(turn)[:80]!r}.")
    stored_role = turn.get("role", turn.get("from"))
    if not isinstance(stored_role, str) or stored_role not in ROLE_OF:
        raise ValueError(f"message {index} has the unknown role {stored_role!r}. Known roles: {', '.join(ROLE_OF)}.")
    role = ROLE_OF[stored_role]
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [message_part(part, index) for part in content]
    else:
        parts = [{"type": "text", "text": check_text(content, f"the content of message {index}")}]
    if role == "assistant":
        if turn.get(GIVEN):
            parts = [{**part, "type": GIVEN} for part in parts]
    elif all(content_part["type"] == "text" for content_part in parts):
        text_parts = parts
        parts = []
        for text_part in text_parts:
            parts += split_at_places(text_part["text"])
    return {"role": role, "content": parts}


def insert_images(messages: list[dict], num_images: int) -> None:
    """Put image parts before the first question."""
    for message in messages:
        if message["role"] == "user":
            for _ in range(num_images):
                message["content"].insert(0, {"type": "image", "text": None})
            return
    raise ValueError("a row with images needs a question.")


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
    path = None
    content = None
    if isinstance(image, str):
        if is_url(image) and not OF_THE_WEB.match(image):
            raise ValueError(f"an image must be a path or an HTTP URL, got {image[:80]!r}.")
        path = image
    elif isinstance(image, bytes):
        content = image
    elif isinstance(image, dict):
        path = image.get("path")
        content = image.get("bytes")
    is_image_path = isinstance(path or "", str)
    is_encoded = isinstance(content or b"", bytes)
    if not (path or content) or not is_image_path or not is_encoded:
        raise ValueError(f"an image must be a path or encoded bytes, got {str(image)[:80]!r}.")
    check_text(path or "", "the path of an image")
    if content is None and image_root is not None and not is_url(path):
        path = str(below(image_root, path, "image_root"))
    return {"path": path, "bytes": content}


def row_of(
    source: str,
    row_id: str,
    images: list[dict],
    messages: list[dict],
    error: str | None = None,
) -> dict:
    if error:
        error = error.encode(errors="backslashreplace").decode()  # Arrow rejects unpaired surrogates.
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
        for column in (mapped or {}).values():
            if column not in names:
                raise ValueError(f"column {column!r} not found. Found: {names}.")
        recognized, columns = recognize(names, mapped, options.get("prompt"))
        label = stored.get(columns.get("answer"))
        if not isinstance(label, ClassLabel):
            label = None
        reader = cls(
            recognized,
            columns,
            label=label,
            is_packed=is_packed,
            mapped=mapped,
            **options,
        )
        columns_read = stored if is_packed else set(columns.values())
        check_unmerged({name: stored[name] for name in columns_read})
        return reader

    @property
    def name(self) -> str:
        return f"{self.schema.name} in a WebDataset" if self.is_packed else self.schema.name

    def stored_columns(self, names: Iterable[str]) -> list[str]:
        """Return the columns in `names` that the reader uses, or all if it has yet to look for images in them."""
        if self.is_packed or not self.reads_images:
            return list(names)
        return list(dict.fromkeys(self.columns.values()))

    @property
    def reads_images(self) -> bool:
        """Presence of a column of images."""
        return not self.columns.keys().isdisjoint(IMAGES)

    def __call__(
        self,
        stored: dict[str, Any],
        number: int | None = None,
        image_root: str | None = None,
    ) -> dict:
        """Convert one row; if it is invalid, describe the problem in its `error`.

        Args:
            number: id of a row without an id. Without a number, the id is a hash of the content.
            image_root: image folder of this row, if it differs from the reader's.
        """
        if self.is_packed:
            return self.unpacked(stored, number, image_root)
        row_id = stored.get(self.columns.get("id"))
        if row_id is None:
            row_id = number
        error = None
        try:
            self.check_no_video(stored)
            stored_images = self.images_of(stored)
            images = [encoded_image(image, image_root or self.image_root) for image in stored_images]
            messages = self.messages(stored, len(images))
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            images = []
            messages = []
            stored_images = []
            error = str(problem)
        if row_id is None:
            # The hash is of the paths as they are stored, so that the folder of the data may be moved.
            row_id = content_id({"messages": messages or str(stored), "images": stored_images})
        return row_of(
            self.source,
            str(row_id),
            images,
            messages,
            error,
        )

    def check_no_video(self, stored: dict[str, Any]) -> None:
        for role in ("video", "videos"):
            if stored.get(self.columns.get(role)):
                raise ValueError("videos are not supported. Store frames as a list of images.")

    def messages(self, stored: dict[str, Any], num_images: int) -> list[dict]:
        """Return the messages of a row with `num_images` images."""
        row = {role: stored[column] for role, column in self.columns.items() if column in stored}
        row.setdefault("question", self.prompt)
        if self.label is not None and row["answer"] is not None:
            row["answer"] = self.label.int2str(row["answer"])
        if not self.reads_images:
            for name, value in stored.items():
                if looks_like_image(value):
                    raise ValueError(
                        f"the column {name!r} looks like image files, but is not read. Rename it to `image`, set "
                        f"`columns` to {json.dumps({'image': name})}, or remove it."
                    )
        if "caption" in self.schema.columns and num_images == 0:
            raise ValueError("a caption needs an image, but the row has none. Add it or remove the row.")
        turns = after_system(row.get("system"), self.schema.turns(row))
        return messages_of(turns, num_images)

    def unpacked(
        self,
        sample: dict[str, Any],
        number: int | None,
        image_root: str | None,
    ) -> dict:
        """Convert a sample of a WebDataset, see `__call__`."""
        try:
            row = unpack(sample)
            reader = RowReader.of(
                dict.fromkeys(row),
                self.mapped,
                source=self.source,
                prompt=self.prompt,
                image_root=self.image_root,
            )
        except ValueError as problem:
            row_id = sample[KEY] if number is None or "id" in self.columns else number
            error = f"sample {sample[KEY]} of {sample.get(URL)}: {problem}"
            return row_of(
                self.source,
                str(row_id),
                images=[],
                messages=[],
                error=error,
            )
        return reader(row, number, image_root)

    def images_of(self, stored: dict[str, Any]) -> list:
        """Return the images of a row from `images` or `image`; raise a `ValueError` if the two columns differ."""
        images_by_column = []
        for role in IMAGES:
            content = stored.get(self.columns.get(role))
            if content is None or content == "":
                content = []
            elif not isinstance(content, list):
                content = [content]
            images_by_column.append(content)
        images, single_images = images_by_column
        if not images:
            return single_images
        for image in single_images:
            if image not in images:
                raise ValueError("`images` and `image` contain different images. Put all of them under `images`.")
        return images

    def batch(self, batch: dict[str, list]) -> dict[str, list]:
        """Convert a batch of stored columns, one of which has the row numbers; used as transform of a `Dataset`."""
        converted_rows = []
        for index, number in enumerate(batch[NUMBERS]):
            stored = {name: column[index] for name, column in batch.items()}
            converted_rows.append(self(stored, number))
        converted_batch = {}
        for name in FEATURES:
            converted_batch[name] = [row[name] for row in converted_rows]
        return converted_batch


# Columns of a WebDataset sample: key, archive, and its files. The files are a list (`members`) or, as `datasets` reads
# them, one column for each file extension of the first samples.
KEY = "__key__"
URL = "__url__"
MEMBERS = "members"
JSON = "json"
TEXTS = {"txt", "text", "transcript"}
NUMBER_FILES = {"cls", "cls2", "index", "inx", "id"}
VIDEOS = {"mkv", "mp4", "avi", "mpeg", "mpg", "mov"}


def is_image(member: str) -> bool:
    return PurePath(f"_.{member}").suffix.lower() in IMAGE_SUFFIXES


def unpacked_names(stored: Mapping[str, Any]) -> list[str]:
    """Return the field names that [`unpack`] returns for a sample, or for any sample with these columns."""
    if MEMBERS in stored:
        try:
            return list(unpack(stored))
        except ValueError as error:
            raise ValueError(f"sample {stored[KEY]} of {stored[URL]}: {error}") from None
    members = dict(stored)
    for name in (KEY, URL, JSON):
        members.pop(name, None)
    has_images = any(map(is_image, members))
    names = ["id"]
    if isinstance(stored.get(JSON), Mapping):
        for name in stored[JSON]:
            if not (has_images and name in IMAGES):
                names.append(name)
    names += [name for name in members if not is_image(name)]
    if has_images:
        names.append("images")
    return list(dict.fromkeys(names))


def unpack(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample of a WebDataset as a row.

    The row has the key as `id`, the fields of the JSON file, texts by their file extension, and all images as `images`,
    which replace the image names in the JSON, in the order of [`in_order`].

    Raises:
        ValueError: If a file of the sample cannot be read.
    """
    if MEMBERS in stored:
        members = {}
        for member in as_list(stored[MEMBERS]):
            members[member["name"]] = decode_member(stored[KEY], member["name"], member["content"])
    else:
        members = dict(stored)
        members.pop(KEY)
        members.pop(URL, None)
    fields = members.pop(JSON, None) or {}
    if not isinstance(fields, dict):
        raise ValueError(f"its JSON must be a mapping, got {str(fields)[:80]!r}.")
    image_names = list(filter(is_image, members))
    images = {}
    for name in image_names:
        image = members.pop(name)
        if image is not None:
            images[name] = image
    row = {"id": stored[KEY], **members, **fields}
    if image_names:
        row.pop("image", None)
        row["images"] = [images[name] for name in in_order(list(images), fields)]
    videos = []
    for name, content in members.items():
        if ending(name) in VIDEOS and content is not None:
            videos.append(name)
    if videos:
        row["videos"] = videos
    return row


def in_order(images: list[str], fields: Mapping[str, Any]) -> list[str]:
    """Return the image files of a sample in the order of its JSON.

    Images that the JSON does not list are ordered by number if their names differ in numbers alone. Others keep the
    order in which they are stored.
    """
    listed_names = fields.get("images") or fields.get("image")
    if not isinstance(listed_names, list):
        listed_names = []
    listed_images = [image_with_name(name, images) for name in listed_names]
    if sorted(listed_images) == sorted(images):
        return listed_images
    names_without_numbers = {re.sub(r"\d+", "0", image) for image in images}
    if len(names_without_numbers) == 1:
        return sorted(images, key=numbers_in)
    return images


def image_with_name(name: Any, images: list[str]) -> str:
    """Return the longest of the images with which a name ends, or an empty text."""
    longest_image = ""
    for image in images:
        is_end = re.search(rf"(^|[./]){re.escape(image)}$", str(name)) is not None
        if is_end and len(image) > len(longest_image):
            longest_image = image
    return longest_image


def numbers_in(name: str) -> list[int]:
    return list(map(int, re.findall(r"\d+", name)))


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
            try:
                for index, sample in enumerate(self._get_pipeline_from_tar(path, files)):
                    row = {KEY: sample.pop(KEY), URL: sample.pop(URL)}
                    row[MEMBERS] = [{"name": name, "content": content} for name, content in sample.items()]
                    yield Key(number, index), row
            except Exception as error:  # The type depends on the damage. The cause is told in the message.
                raise ValueError(f"{path} cannot be read: {said(error)}") from None


def load_stored(
    split: str | None = None, streaming: bool = False, **location
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Load a data set with `load_dataset`, or a WebDataset with [`Archives`]."""
    default_builder = load_dataset_builder(**location)
    if not isinstance(default_builder, WebDataset):
        return load_dataset(**location, split=split, streaming=streaming)
    builder = Archives(
        cache_dir=location.get("cache_dir"),
        dataset_name=default_builder.dataset_name,
        config_name=default_builder.config.name,
        hash="1",  # Version of the cached format.
        base_path=default_builder.base_path,
        repo_id=default_builder.repo_id,
        data_files=default_builder.config.data_files,
    )
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def columns_of(dataset: Dataset | IterableDataset) -> Mapping[str, Any]:
    """Return the columns with their features, or `None` for unknown ones; for a WebDataset, return its first sample."""
    columns = dataset.features
    if not columns:
        names = dataset.column_names or next(iter(dataset), {})
        columns = dict.fromkeys(names)
    if MEMBERS not in columns:
        return columns
    empty_batch = {KEY: [None], MEMBERS: [[]]}
    first_batch = next(dataset.iter(batch_size=1), empty_batch)
    return {name: column[0] for name, column in first_batch.items()}


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
    mapped = {}
    if KEY in stored or "id" in stored:
        mapped["id"] = "id"
    mapped.update(columns or {})
    reader = RowReader.of(
        stored,
        mapped,
        image_root=image_root,
        prompt=prompt,
    )
    has_options = bool(columns) or image_root is not None
    if not has_options and not reader.is_packed and reader.schema.name == "messages" and are_messages(stored):
        return dataset
    return with_reader(dataset, reader)


def are_messages(stored: Mapping[str, Any]) -> bool:
    """Return whether rows with these columns can be encoded without a [`RowReader`]."""
    turn = None
    if isinstance(stored["messages"], List):
        turn = stored["messages"].feature
    has_roles = not isinstance(turn, Mapping) or "role" in turn
    num_image_columns = len(set(IMAGES) & set(stored))
    return has_roles and num_image_columns == 1 and set(BESIDE).isdisjoint(stored)


def schema_name(dataset: Dataset | IterableDataset) -> str:
    """Return the name of the schema in which the rows of a data set are stored."""
    description = dataset.info.description
    for registered in SCHEMAS:
        name_in_webdataset = RowReader(registered, {}, is_packed=True).name
        if description in (registered.name, name_in_webdataset):
            return description
    return SCHEMAS[0].name
