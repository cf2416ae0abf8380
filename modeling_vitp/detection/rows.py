"""Images with objects from the rows of a `datasets` data set, in whatever columns they are."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets

from ..instructions.from_annotations.formats import AnnotatedObject
from ..instructions.rows import image_size
from .annotations import AnnotatedFile

BOX_FORMATS = ("xywh", "xyxy")


def read_rows(
    rows: datasets.Dataset, columns: Mapping[str, str], box_format: str, name: str
) -> Iterator[AnnotatedFile]:
    """The images of a data set of rows.

    Args:
        rows: with images undecoded; see [`find_columns`].
        columns: under `image`, `boxes`, and optionally `id`, `labels`, `corners`, `crowd`, `difficult`, `area` and
            `masks` the columns or, with a dot, the fields of a column that has all objects of an image.
        box_format: of `boxes`: `"xywh"` or `"xyxy"`, from the left and from the top, in pixels.
        name: of the split, for errors.

    Raises:
        ValueError: names the row, if something in it is not as it should be, or two have one id.
    """
    lists = {key: column for key, column in columns.items() if key not in ("image", "id")}
    tops = {column.split(".")[0] for column in (*lists.values(), *filter(None, [columns.get("id")]))}
    names = getattr(feature_of(rows.features, columns.get("labels", "")), "names", None)
    seen: dict[str, int] = {}
    for index, row in enumerate(rows.select_columns(sorted(tops | {columns["image"]}))):
        row_id = str(row[columns["id"]]) if "id" in columns else str(index)
        where = f"row {row_id} of split {name!r}"
        if (first := seen.setdefault(row_id, index)) != index:
            raise ValueError(
                f"Split {name!r}: rows {first} and {index} have the same {columns['id']!r}, {row_id}. Give each its "
                "own, or name another column under `columns`, as `id`."
            )
        try:
            size = image_size(row[columns["image"]])
            values = {key: values_of(row, column) for key, column in lists.items()}
            if values.get("area", ()) is None:
                del values["area"]
            found = list(row_objects(values, names, box_format, where))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        yield AnnotatedFile(row_id, index, size, found)


def row_objects(
    values: Mapping[str, Sequence], names: Sequence[str] | None, box_format: str, where: str
) -> Iterator[AnnotatedObject]:
    lengths = {key: len(value) for key, value in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists of its objects are of different lengths: {lengths}.")
    for index in range(next(iter(lengths.values()))):
        item = {key: value[index] for key, value in values.items()}
        label = item.get("labels", 0)
        if names is not None and isinstance(label, int):
            if not 0 <= label < len(names):
                raise ValueError(f"object {index} has the label {label}, which is none of the {len(names)} names.")
            label = names[label]
        corners = None
        if "corners" in item:
            flat = [number for part in item["corners"] for number in (part if isinstance(part, list) else [part])]
            corners = tuple(zip(flat[::2], flat[1::2], strict=True))
            if len(corners) != 4:
                raise ValueError(f"object {index} has {len(flat)} numbers for four corners.")
            box = (min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2]))
        else:
            left, top, right, bottom = item["boxes"]
            box = (left, top, left + right, top + bottom) if box_format == "xywh" else (left, top, right, bottom)
        yield AnnotatedObject(
            f"{where}, object {index}",
            label,
            box,
            corners,
            bool(item.get("difficult")),
            bool(item.get("crowd")),
            item.get("area"),
            segmentation=item.get("masks"),
        )


def find_columns(
    features: datasets.Features, given: Mapping[str, str], name: str, is_oriented: bool = False
) -> dict[str, str]:
    """The columns of rows that [`read_rows`] reads: those given, and by their usual names.

    Usual are `image`, `id` (or `image_id`), and `objects` with fields `bbox` (or `boxes`, `corners`), `category` (or
    `label`, `labels`, `categories`), `iscrowd` (or `crowd`), `difficult`, `area` and `segmentation`.
    """
    usual = {"image": ("image",), "id": ("id", "image_id")}
    usual |= {"boxes": ("objects.bbox", "objects.boxes"), "corners": ("objects.corners",)}
    usual["labels"] = tuple(f"objects.{field}" for field in ("category", "label", "labels", "categories"))
    usual["crowd"] = ("objects.iscrowd", "objects.crowd")
    usual |= {"difficult": ("objects.difficult",), "area": ("objects.area",), "masks": ("objects.segmentation",)}
    unknown = set(given) - usual.keys()
    if unknown:
        raise ValueError(f"columns: unknown {sorted(unknown)}; there are {sorted(usual)}.")
    columns = {}
    for key, candidates in usual.items():
        wanted = (given[key],) if key in given else candidates
        found = [column for column in wanted if feature_of(features, column) is not None]
        if key in given and not found:
            raise ValueError(f"Split {name!r} has no column {given[key]!r}, only {sorted(features)}.")
        columns |= {key: found[0]} if found else {}
    if "image" not in columns or not {"boxes", "corners"} & columns.keys():
        raise ValueError(
            f"Split {name!r} has no column of images, or none of boxes: {sorted(features)}; see `columns`."
        )
    if {"boxes", "corners"} <= columns.keys():
        del columns["boxes" if is_oriented else "corners"]
    return columns


def feature_of(features: Any, column: str) -> Any:
    """The feature of a column, or of a field of the objects in it; `None` if there is none."""
    for part in column.split("."):
        features = getattr(features, "feature", features)
        if not isinstance(features, dict) or part not in features:
            return None
        features = features[part]
    return getattr(features, "feature", features)


def values_of(row: Mapping, column: str) -> list:
    """The values of a column, or of a field of its objects, which are a mapping of lists or a list of mappings."""
    top, _, field = column.partition(".")
    value = row[top]
    if not field:
        return value
    return value[field] if isinstance(value, Mapping) else [item[field] for item in value]
