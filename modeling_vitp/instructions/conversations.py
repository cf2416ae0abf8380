"""Data sets whose rows are in any of the schemas, as data sets of conversations: rows are made when they are read."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset, List

from .archives import columns_of
from .row_reader import KEY, RowReader
from .rows import FEATURES, undecoded
from .schemas import BESIDE, IMAGES, SCHEMAS

NUMBERS = "row number"


def with_reader(dataset: Dataset | IterableDataset, reader: RowReader) -> Dataset | IterableDataset:
    """The same rows as `reader` makes them; what they are goes into the description.

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
        dataset.set_transform(partial(reader.batch, numbers=NUMBERS))
    dataset.info.description = reader.name
    return dataset


def to_conversations(dataset: Dataset | IterableDataset, image_root: str | None = None) -> Dataset | IterableDataset:
    """Rows in any of the schemas as conversations, with their `id` if they have one.

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
    """Whether messages are stored as turns with other fields than a role and a content."""
    turn = feature.feature if isinstance(feature, List) else None
    return isinstance(turn, Mapping) and "role" not in turn


def schema_name(dataset: Dataset | IterableDataset) -> str:
    """What the rows of a data set are."""
    names = {name for schema in SCHEMAS for name in (schema.name, RowReader(schema, {}, is_packed=True).name)}
    return dataset.info.description if dataset.info.description in names else SCHEMAS[0].name
