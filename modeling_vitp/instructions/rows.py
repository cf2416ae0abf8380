"""Rows of instruction data: their ids, images and messages, and the settings of their source."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value, Video
from datasets.utils.file_utils import xopen

from ..image_processing_vitp import PIL_8BIT_MODES, ViTPImageProcessor, to_rgb
from ..images.reading import Picture, fetch, is_url, picture_size, read_picture
from ..input_spec import InputSpec
from ..processing_vitp import GIVEN, message_texts
from ..vrl import keyed_generator

OF_THE_HUB = re.compile(r"(^|::)hf://")
IMAGE_PLACE = "<image>"

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


def sample_id_of(example: dict[str, Any]) -> Any:
    sample_id = example.get("id")
    return content_id(example) if sample_id is None else sample_id


def content_id(example: dict[str, Any]) -> str:
    """Return the id of a row without one: a hash of its messages, the same in every worker, rank and order."""
    content = json.dumps(example.get("messages"), sort_keys=True, default=str)
    return "content:" + hashlib.sha256(content.encode()).hexdigest()[:16]


def images_of(example: dict[str, Any]) -> list:
    """Return the images of a row as they are stored, from `images` or `image`."""
    images = example.get("images")
    if images is None:
        images = [] if example.get("image") is None else [example["image"]]
    return list(images) if isinstance(images, (list, tuple)) else [images]


def load_images(example: dict[str, Any], spec: InputSpec | None = None) -> list:
    """Return the images of a row, see [`images_of`]: decoded unless they are images or arrays already.

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
    """Return an array in the layout that the image processor sees to be that of its shape, without being told."""
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
    """Return the encoded image, out of the row, its file or, if that is asked for, its URL."""
    content, path = image.get("bytes"), image.get("path")
    if content is not None:
        return content
    if not isinstance(path, str):
        raise ValueError(f"it has neither bytes nor a path, but {str(path)[:80]!r}.")
    if OF_THE_HUB.search(path):  # of a data set that is streamed, by the client of the Hub
        with xopen(path, "rb") as file:
            return file.read()
    return fetch(path) if is_url(path) else Path(path).read_bytes()


def image_size(image: Any) -> tuple[int, int]:
    """Return height and width of an image of a row as it is seen, by its header and EXIF data if it is encoded."""
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


def check_image_parts(messages: list[dict]) -> None:
    """Raise a `ValueError` if a part of a message names an image itself, in place of the row's `images`."""
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


def check_answers(messages: list[dict[str, Any]]) -> None:
    """Raise a `ValueError` if there is nothing to learn from, or an answer is empty or comes before any question."""
    answers = [(index, message) for index, message in enumerate(messages) if message["role"] == "assistant"]
    if all(is_given(message) for _, message in answers):
        raise ValueError("there is no assistant message to learn from. Add one or take the row out.")
    asked = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))
    for index, message in answers:
        if index < asked:
            raise ValueError(
                f"the answer in message {index} comes before any question, and sees neither it nor an image. Bring the "
                "messages into their order, or take the row out."
            )
        if not "".join(message_texts(message)).strip():
            raise ValueError(f"the answer in message {index} is empty. Fill it in or take the row out.")


def is_given(message: dict[str, Any]) -> bool:
    """Return whether a message is an answer that is not learned."""
    content = message.get("content")
    parts = content if message["role"] == "assistant" and isinstance(content, list) else []
    return any(isinstance(part, dict) and part.get("type") == GIVEN for part in parts)


def place_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace each `<image>` in the text of a question by an image part, and mark given parts as text."""
    placed = []
    for message in messages:
        content = message["content"]
        if message["role"] != "assistant" and isinstance(content, str) and IMAGE_PLACE in content:
            message = {**message, "content": split_at_places(content)}
        elif is_given(message):
            message = {**message, "content": [{**part, "type": "text"} for part in content]}
        placed.append(message)
    return placed


def split_at_places(text: str) -> list[dict[str, Any]]:
    """Split text into parts at `<image>`. The newline after a place goes: the chat template writes one."""
    first, *rest = text.split(IMAGE_PLACE)
    parts = [{"type": "text", "text": first}] if first or not rest else []
    for piece in rest:
        parts.append({"type": "image", "text": None})
        piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


SampleTransform = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]


def makes_images(transform: SampleTransform | None) -> bool:
    """Return whether a transform says that it does without the images of a row, which then are not read."""
    return getattr(transform, "makes_images", False)


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """How the rows of one source of a mixture are encoded; `None` leaves it to the processor.

    Args:
        max_patches: most tiles of a sample; its images share them.
        image_size: side of the square, in pixels, that every image is resampled to before it is cut into tiles: the
            tile size of the model gives one tile, twice as much four and a thumbnail.
        system_prompt: for conversations that have no system message of their own.
        input_spec: how images that are not 8-bit RGB are read, see [`InputSpec`].
        jpeg_degradation: whether training images go through JPEG compression of a random quality from 75 to 100.
    """

    max_patches: int | None = None
    image_size: int | None = None
    system_prompt: str | None = None
    input_spec: dict | None = None
    jpeg_degradation: bool = False

    @property
    def images_kwargs(self) -> dict[str, Any]:
        """Return what the image processor is told of the source."""
        kwargs = {"max_patches": self.max_patches, "input_spec": self.input_spec}
        return {name: value for name, value in kwargs.items() if value is not None}

    def spec_for(self, image_processor: ViTPImageProcessor) -> InputSpec:
        """Return the input spec of the source, or that of the image processor if the source has none."""
        fields, names = self.input_spec or image_processor.input_spec, image_processor.band_names
        return InputSpec.from_dict(fields if names is None else {"band_names": names, **fields})

    def apply(self, images: list, generator: torch.Generator) -> list:
        """Return the images of a sample as the source wants them seen."""
        if self.jpeg_degradation:
            images = [degrade(image, generator) for image in images]
        if self.image_size is not None:
            images = [to_square(image, self.image_size) for image in images]
        return images

    def with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with the system prompt of the source in front, unless they have one of their own."""
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


def degrade(image: PIL.Image.Image, generator: torch.Generator) -> PIL.Image.Image:
    """Return the image, where it is transparent on white, after JPEG compression of a quality from 75 to 100."""
    if not isinstance(image, PIL.Image.Image) or image.mode not in PIL_8BIT_MODES:
        kind = f"mode {image.mode}" if isinstance(image, PIL.Image.Image) else f"{len(image)} bands of {image.dtype}"
        raise ValueError(f"jpeg_degradation needs 8-bit images, not one of {kind}: leave it out of the source.")
    quality = torch.randint(75, 101, (), generator=generator).item()
    compressed = io.BytesIO()
    to_rgb(image).save(compressed, format="JPEG", quality=quality)
    return PIL.Image.open(compressed).convert("RGB")


def to_square(image: PIL.Image.Image | np.ndarray, size: int) -> PIL.Image.Image | np.ndarray:
    """Resample an image, or an array of shape `(bands, height, width)`, to `size` pixels a side."""
    if not isinstance(image, PIL.Image.Image):
        return np.stack([resample_band(band, size) for band in np.asarray(image)])
    if image.mode in ("1", "P", "PA"):  # which Pillow resamples without interpolation
        image = image.convert("RGBA")
    return image.resize((size, size), PIL.Image.Resampling.BICUBIC)


def resample_band(band: np.ndarray, size: int) -> np.ndarray:
    """Return an array of shape `(height, width)` resampled in its own type, without values beyond those that it has."""
    if not np.isfinite(band).all():
        raise ValueError("image_size cannot resample an image with values that are not finite: fill them before.")
    square = PIL.Image.fromarray(band.astype(np.float32)).resize((size, size), PIL.Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(square, dtype=np.float64), band.min(), band.max())
    return (np.rint(values) if band.dtype.kind in "bui" else values).astype(band.dtype)


def prepare_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Give every row an id, and leaves images encoded, so that the collator can name the sample that is broken."""
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


def is_decoded(feature) -> bool:
    return isinstance(feature, Image) and feature.mode is None and feature.decode


def undecoded(features: Features) -> Features:
    """Return the same features with images and videos left encoded."""

    def leave(feature):
        if isinstance(feature, (Image, Video)):
            return type(feature)(decode=False)
        if isinstance(feature, List) and isinstance(feature.feature, (Image, Video)):
            return List(leave(feature.feature))
        return feature

    return Features({name: leave(feature) for name, feature in features.items()})


def describe_rows(dataset: Dataset | IterableDataset, num_rows: int = 8) -> str:
    """Tell data sets apart: by the number of rows and a few of them, or for a stream by its name and columns."""
    if isinstance(dataset, IterableDataset):
        info = dataset.info
        return f"stream {info.dataset_name} {info.config_name} {dataset.split} {sorted(dataset.column_names or [])}"
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0)
    rows = [dataset[index * len(dataset) // num_rows] for index in range(num_rows)] if len(dataset) else []
    digest = hashlib.sha256("".join(f"{row.get('id')}{content_id(row)}" for row in rows).encode()).hexdigest()
    return f"{len(dataset)} rows, {digest[:16]}"


def sample_texts(
    dataset: Dataset | IterableDataset, sample_transform: SampleTransform | None, seed: int, num_samples: int = 2000
) -> Iterator[str]:
    """Return texts of the first rows' messages, after the transform, to train a tokenizer on."""
    for row in itertools.islice(prepare_rows(dataset), num_samples):
        if sample_transform is not None:
            row = {**row, "images": [] if makes_images(sample_transform) else load_images(row)}
            row = sample_transform(row, keyed_generator(seed, row.get("id"), "tokenizer"))
        for message in row["messages"]:
            yield from message_texts(message)
