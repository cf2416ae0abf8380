"""Reads stored rows: to the schema of [`~modeling_vitp.instructions.sources`], by that which their columns tell."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from datasets import ClassLabel

from ..images.reading import IMAGE_SUFFIXES
from .json_lines import parse
from .rows import FEATURES, check_unmerged, content_id, encoded_image, row_of
from .schemas import IMAGES, RENAME, Schema, recognise
from .turns import after_system, answering, as_list, messages_of

# What a sample of a WebDataset has beside its files. These are a list, or as `datasets` reads them a column for each
# ending that the first samples have.
KEY, URL, MEMBERS = "__key__", "__url__", "members"
JSON = "json"
TEXTS, NUMBERS = {"txt", "text", "transcript"}, {"cls", "cls2", "index", "inx", "id"}
VIDEOS = {"mkv", "mp4", "avi", "mpeg", "mpg", "mov"}


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
        mapped: see [`recognise`], for these fields.
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
        """For rows with these columns, each with its feature or `None`; `options` are fields of the class.

        Raises:
            ValueError: see [`recognise`]; or if reading them has changed texts.
        """
        is_packed = KEY in stored
        names = unpacked_names(stored) if is_packed else list(stored)
        unknown = [column for column in (mapped or {}).values() if column not in names]
        if unknown:
            raise ValueError(f"it has no column {unknown[0]!r}, only {names}.")
        schema, columns = recognise(names, mapped, options.get("prompt"), remedy)
        label = stored.get(columns.get("answer"))
        label = label if isinstance(label, ClassLabel) else None
        reader = cls(schema, columns, label=label, is_packed=is_packed, mapped=mapped, **options)
        check_unmerged({name: stored[name] for name in reader.stored_columns(stored)})
        return reader

    @property
    def name(self) -> str:
        return f"{self.schema.name} in a WebDataset" if self.is_packed else self.schema.name

    def stored_columns(self, names: Iterable[str]) -> list[str]:
        """Those that are read, of those that there are."""
        return list(names if self.is_packed else dict.fromkeys(self.columns.values()))

    def __call__(self, stored: dict[str, Any], number: int | None = None, image_root: str | None = None) -> dict:
        """One row; what is wrong with it goes into its `error`.

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
            if self.schema.turns is answering:
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
        """The images of a row, of whichever of its columns has them; a `ValueError` if two have different ones."""
        stored = [stored.get(self.columns.get(role)) for role in IMAGES]
        images, others = ([] if one is None or one == "" else one if isinstance(one, list) else [one] for one in stored)
        if images and any(image not in images for image in others):
            raise ValueError("it has images under `images` and another under `image`: put all of them under `images`.")
        return images or others

    def batch(self, batch: dict[str, list], numbers: str) -> dict[str, list]:
        """A batch of stored columns, with the numbers of the rows in one of them; the transform of a `Dataset`."""
        rows = [
            self({name: values[index] for name, values in batch.items()}, number)
            for index, number in enumerate(batch[numbers])
        ]
        return {name: [row[name] for row in rows] for name in FEATURES}


def is_image(member: str) -> bool:
    return PurePath(f"_.{member}").suffix.lower() in IMAGE_SUFFIXES


def unpacked_names(stored: Mapping[str, Any]) -> list[str]:
    """The names that [`unpack`] gives, of a sample or of the columns of all."""
    if MEMBERS in stored:
        return list(unpack(stored))
    fields = list(stored[JSON]) if isinstance(stored.get(JSON), Mapping) else []
    members = [name for name in stored if name not in (KEY, URL, JSON)]
    images = ["images"] if any(map(is_image, members)) else []
    fields = [name for name in fields if not images or name not in ("image", "images")]
    return list(dict.fromkeys(["id", *fields, *(name for name in members if not is_image(name)), *images]))


def unpack(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A sample of a WebDataset as a row: its key as `id`, the fields of its JSON, texts by their endings, and all
    of its images as `images`, which are those that the JSON names.

    Raises:
        ValueError: if a file of it cannot be read.
    """
    if MEMBERS in stored:
        members = {member["name"]: decoded(stored[KEY], **member) for member in as_list(stored[MEMBERS])}
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


def decoded(key: str, name: str, content: bytes) -> Any:
    """A file of a sample: what a JSON holds, a text, a number, an image with its name, or else bytes."""
    if name == JSON:
        return parse(content, f"{key}.{name}")
    if is_image(name):
        return {"path": f"{key}.{name}", "bytes": content}
    if ending(name) in TEXTS:
        return content.decode()
    return int(content) if ending(name) in NUMBERS else content
