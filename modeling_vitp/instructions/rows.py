"""Rows of instruction data: what they have, their ids, texts and images."""

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Features, Image, IterableDataset, Json, List, Value, Video
from datasets.utils.file_utils import xopen

from ..image_processing_vitp import ViTPImageProcessor
from ..images.reading import OF_THE_WEB, Picture, below, fetch, is_url, picture_size, read_picture
from ..input_spec import InputSpec
from ..messages import message_texts
from ..vrl import keyed_generator
from .settings import SampleTransform, makes_images

OF_THE_HUB = re.compile(r"(^|::)hf://")


def sample_id_of(example: dict[str, Any]) -> Any:
    sample_id = example.get("id")
    return content_id(example) if sample_id is None else sample_id


def content_id(example: dict[str, Any]) -> str:
    """The id of a row without one: a hash of its messages, the same in every worker, rank and order."""
    content = json.dumps(example.get("messages"), sort_keys=True, default=str)
    return "content:" + hashlib.sha256(content.encode()).hexdigest()[:16]


def images_of(example: dict[str, Any]) -> list:
    """The images of a row as they are stored, from `images` or `image`."""
    images = example.get("images")
    if images is None:
        images = [] if example.get("image") is None else [example["image"]]
    return list(images) if isinstance(images, (list, tuple)) else [images]


def load_images(example: dict[str, Any], spec: InputSpec | None = None) -> list:
    """The images of a row, see [`images_of`]: decoded unless they are images or arrays already.

    What Pillow does not read in full, of more than 8 bits or of other bands than colors, becomes an array of shape
    `(bands, height, width)`, for an [`InputSpec`]. One that is named by URL is fetched only if that is asked for, see
    [`~modeling_vitp.images.reading`].

    Args:
        spec: how they will be read, see [`~modeling_vitp.images.reading.read_picture`].
    """
    loaded = []
    for index, image in enumerate(images_of(example)):
        if isinstance(image, str):
            image = {"path": image, "bytes": None}
        if isinstance(image, dict):
            try:
                image = bands_first(read_picture(content_of(image), spec))
            except Exception as error:  # Pillow raises many kinds, SyntaxError among them, for a broken file
                origin = f" ({image['path']})" if isinstance(image, dict) and image.get("path") else ""
                said = str(error)
                if isinstance(error, FileNotFoundError) and error.filename:
                    place = os.path.abspath(error.filename)
                    said = f"No such file as {place}; `image_root` gives the folder that paths of images start from"
                raise ValueError(
                    f"image {index}{origin} cannot be read: {said}. Mend the file or take the row out."
                ) from error
        if isinstance(image, PIL.Image.Image) and 0 in image.size:
            raise ValueError(f"image {index} is empty: {image.width} x {image.height} pixels. Take the row out.")
        loaded.append(image)
    return loaded


def bands_first(picture: Picture) -> PIL.Image.Image | np.ndarray:
    """An array in the layout that the image processor sees to be that of its shape, without being told."""
    if isinstance(picture, PIL.Image.Image):
        return picture
    array = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
    try:
        if ViTPImageProcessor._bands_first(torch.as_tensor(array), None).shape == array.shape:
            return array
    except ValueError:
        pass
    raise ValueError(f"{array.shape[0]} bands of {array.shape[2]} x {array.shape[1]} pixels are too small an image")


def content_of(image: dict) -> bytes:
    """The encoded image, out of the row, its file or, if that is asked for, its URL."""
    content, path = image.get("bytes"), image.get("path")
    if content is not None:
        return content
    if not isinstance(path, str):
        raise ValueError(f"it has neither bytes nor a path, but {str(path)[:80]!r}.")
    if OF_THE_HUB.search(path):  # of a data set that is streamed, by the client of the Hub
        with xopen(path, "rb") as file:
            return file.read()
    return fetch(path) if is_url(path) else Path(path).read_bytes()


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


def undecoded(features: Features) -> Features:
    """The same features with images and videos left encoded."""

    def leave(feature):
        if isinstance(feature, (Image, Video)):
            return type(feature)(decode=False)
        if isinstance(feature, List) and isinstance(feature.feature, (Image, Video)):
            return List(leave(feature.feature))
        return feature

    return Features({name: leave(feature) for name, feature in features.items()})


def row_of(source: str, row_id: str, images: list[dict], messages: list[dict], error: str | None = None) -> dict:
    error = error and error.encode(errors="backslashreplace").decode()  # Arrow takes no half of a surrogate pair
    return {"id": row_id, "images": images, "messages": messages, "source": source, "error": error}


class Written(str):
    """A number that is no whole one as it was written, so that an answer in a column of its own keeps its zeros."""


def check_text(text: Any, what: str) -> str:
    """The text; a `ValueError` if it is none that a table of rows holds as it is.

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
    """Raises a `ValueError` that names a column of which the texts are no longer as they were written.

    Where the values of a column differ in type from row to row, the JSON reader of `datasets` parses its texts: beside
    a 3, "007" becomes 7.
    """
    for name, feature in (features or {}).items():
        if holds_json(feature):
            raise ValueError(
                f"the column {name!r} has texts in some rows, and numbers or other things in others, of which the "
                "reader has changed the texts. Write every one as text, in quotes."
            )


def holds_json(feature: Any) -> bool:
    if isinstance(feature, (dict, list)):
        return any(map(holds_json, feature.values() if isinstance(feature, dict) else feature))
    return isinstance(feature, Json) or (hasattr(feature, "feature") and holds_json(feature.feature))


def encoded_image(image: Any, image_root: str | None) -> dict:
    """An image of a row, which may be a path, bytes or both, undecoded; a path may not lead out of `image_root`."""
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


def check_image_parts(messages: list[dict]) -> None:
    """Raises a `ValueError` if a part of a message names an image itself, in place of the row's `images`."""
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            check_image_part(part, index)


def check_image_part(part: dict, index: int) -> None:
    named = [key for key in ("image_url", "url", "path", "base64") if part.get(key) is not None]
    named += ["image"] if isinstance(part.get("image"), (str, bytes, dict)) else []
    if named or part.get("type") == "image_url":
        raise ValueError(
            f"message {index} names an image in a part of its own ({(named or ['image_url'])[0]}). Put it under "
            "`images`, as a file or its bytes, and mark its place with {'type': 'image'}."
        )


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of an image of a row, as it is seen: an encoded one by its header, turned as its EXIF says."""
    if isinstance(image, str):
        image = {"path": image, "bytes": None}
    if isinstance(image, dict):
        is_file = image.get("bytes") is None and os.path.isfile(image.get("path") or "")
        try:
            with open(image["path"], "rb") if is_file else io.BytesIO(content_of(image)) as file:
                return picture_size(file)
        except Exception as error:  # as in `load_images`
            raise ValueError(f"an image cannot be read: {error}") from error
    if isinstance(image, PIL.Image.Image):
        return image.size[::-1]
    return tuple(ViTPImageProcessor._bands_first(torch.as_tensor(image), None).shape[1:])


def sample_texts(
    dataset: Dataset | IterableDataset, sample_transform: SampleTransform | None, seed: int, num_samples: int = 2000
) -> Iterator[str]:
    """Texts of the first rows' messages, after the transform, to train a tokenizer on."""
    for row in itertools.islice(prepare_rows(dataset), num_samples):
        if sample_transform is not None:
            row = {**row, "images": [] if makes_images(sample_transform) else load_images(row)}
            row = sample_transform(row, keyed_generator(seed, row.get("id"), "tokenizer"))
        for message in row["messages"]:
            yield from message_texts(message)


def prepare_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Gives every row an id, and leaves images encoded, so that the collator can name the sample that is broken."""
    encoded = {}
    for name, feature in (dataset.features or {}).items():
        if is_decoded(feature):
            encoded[name] = Image(decode=False)
        elif isinstance(feature, List) and is_decoded(feature.feature):
            encoded[name] = List(Image(decode=False))
    has_ids = dataset.column_names is not None and "id" in dataset.column_names
    if has_ids and not encoded:
        return dataset
    if isinstance(dataset, Dataset):
        if not has_ids:
            dataset = dataset.add_column("id", list(range(len(dataset))))
        # `cast_column` would write a copy of the whole data set for a list of images, though no byte of it changes.
        dataset = dataset.select_columns(dataset.column_names)
        dataset.info.features = Features({**dataset.features, **encoded})
        return dataset
    for name, feature in encoded.items():
        dataset = dataset.cast_column(name, feature)
    if not has_ids:
        # Not the row number, which in a stream depends on the worker, the rank and the shuffle buffer.
        features = dataset.features and Features({"id": Value("string"), **dataset.features})
        dataset = dataset.map(lambda row: {"id": content_id(row), **row}, features=features)
    return dataset


def describe_rows(dataset: Dataset | IterableDataset, num_rows: int = 8) -> str:
    """Tells data sets apart: by the number of rows and a few of them, or for a stream by its name and columns."""
    if isinstance(dataset, IterableDataset):
        info = dataset.info
        return f"stream {info.dataset_name} {info.config_name} {dataset.split} {sorted(dataset.column_names or [])}"
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0)
    rows = [dataset[index * len(dataset) // num_rows] for index in range(num_rows)] if len(dataset) else []
    digest = hashlib.sha256("".join(f"{row.get('id')}{content_id(row)}" for row in rows).encode()).hexdigest()
    return f"{len(dataset)} rows, {digest[:16]}"


def is_decoded(feature) -> bool:
    return isinstance(feature, Image) and feature.mode is None and feature.decode
