"""Reads stored rows: to the schema of [`~modeling_vitp.instructions.sources`], by that which their columns tell."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from datasets import ClassLabel

from ..images.reading import IMAGE_SUFFIXES
from .rows import FEATURES, check_unmerged, content_id, encoded_image, row_of
from .schemas import IMAGES, RENAME, Schema, recognise
from .turns import after_system, answering, messages_of

# What a sample of a WebDataset has beside its files, each of which is a column with the ending for its name.
KEY, URL, JSON = "__key__", "__url__", "json"


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
        is_packed: whether the rows are samples of a WebDataset.
    """

    schema: Schema
    columns: dict[str, str]
    source: str | None = None
    prompt: str | None = None
    image_root: str | None = None
    label: ClassLabel | None = None
    is_packed: bool = False

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
        reader = cls(schema, columns, label=label, is_packed=is_packed, **options)
        check_unmerged({name: stored[name] for name in reader.stored_columns(stored)})
        return reader

    @property
    def name(self) -> str:
        return f"{self.schema.name} in a WebDataset" if self.is_packed else self.schema.name

    def stored_columns(self, names: Iterable[str]) -> list[str]:
        """Those that are read, of those that there are."""
        return [name for name in names if name != URL] if self.is_packed else list(dict.fromkeys(self.columns.values()))

    def __call__(self, stored: dict[str, Any], number: int | None = None, image_root: str | None = None) -> dict:
        """One row; what is wrong with it goes into its `error`.

        Args:
            number: its id if it has none. Without a number either, the id is a hash of the content.
            image_root: of this row.
        """
        stored = unpack(stored) if self.is_packed else stored
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
    """The names that [`unpack`] gives."""
    fields = list(stored[JSON]) if isinstance(stored.get(JSON), Mapping) else []
    members = [name for name in stored if name not in (KEY, URL, JSON)]
    images = ["images"] if any(map(is_image, members)) else []
    fields = [name for name in fields if not images or name not in ("image", "images")]
    return list(dict.fromkeys(["id", *fields, *(name for name in members if not is_image(name)), *images]))


def unpack(stored: dict[str, Any]) -> dict[str, Any]:
    """A sample of a WebDataset as a row: its key as `id`, the fields of its JSON, texts by their endings, and all
    of its images as `images`, which are those that the JSON names.
    """
    members = {name: value for name, value in stored.items() if name not in (KEY, URL, JSON)}
    images = [members.pop(name) for name in list(members) if is_image(name)]
    row = {"id": stored[KEY], **members, **(stored.get(JSON) or {})}
    if images:
        row.pop("image", None)
        row["images"] = [image for image in images if image is not None]
    return row
