"""Rows of instruction data: their ids, images and messages, and the settings of their source."""

import copy
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from ..command.settings import Interval
from ..conversations import GIVEN, message_texts, plain_message
from ..data.rows import content_of
from ..image_decoding import PIL_8BIT_MODES, to_rgb
from ..image_processing_vitp import ViTPImageProcessor
from ..images.corruptions import compress_jpeg
from ..images.reading import IMAGE_SUFFIXES, Picture, read_picture, said
from ..images.seen import NUM_IMAGES, report_images
from ..input_spec import InputSpec
from ..vrl import keyed_generator

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
    """Return the id of a row without one: a hash of its messages and images, the same in every worker, rank and order.

    Without the images, rows with the same answer would share the draws of VRL, which would then reveal the answer.
    """
    messages = json.dumps(example.get("messages"), sort_keys=True, default=str)
    digest = hashlib.sha256(messages.encode())
    for image in images_of(example):
        image_digest = hashlib.sha256(stored_bytes(image)).digest()
        digest.update(image_digest)
    return "content:" + digest.hexdigest()[:16]


def stored_bytes(image: Any) -> bytes:
    """Return the encoded bytes of an image, its path if the row has no bytes, or the pixels of a decoded image."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return image
    if image is None or isinstance(image, str):
        return str(image).encode(errors="backslashreplace")
    pixels = np.asarray(image)
    description = f"{pixels.shape} {pixels.dtype}"
    return description.encode() + pixels.tobytes()


def images_of(example: dict[str, Any]) -> list:
    """Return the images of a row as they are stored, from `images` or `image`."""
    images = example.get("images")
    if images is None:
        image = example.get("image")
        return [] if image is None else [image]
    if isinstance(images, (list, tuple)):
        return list(images)
    return [images]


def report_rows(rows: Dataset | IterableDataset, spec: InputSpec, name: str = "images") -> None:
    """Print how images of rows are seen, see [`~modeling_vitp.images.seen.describe_images`]: the first of a stream."""
    if not isinstance(rows, Dataset):
        rows = list(itertools.islice(rows, NUM_IMAGES))

    def source_of(index: int) -> bytes | Picture:
        stored, *_ = images_of(rows[index])
        if isinstance(stored, str):
            stored = {"path": stored, "bytes": None}
        return content_of(stored) if isinstance(stored, dict) else stored

    report_images(len(rows), source_of, spec, name)


def load_images(example: dict[str, Any], spec: InputSpec | None = None) -> list:
    """Return the decoded images of a row. Images and arrays are returned as they are.

    An image with more than 8 bits or with other bands than RGB becomes an array of shape `(bands, height, width)`, for
    an [`InputSpec`]. An image URL is fetched only if fetching is enabled, see [`~modeling_vitp.images.reading`].

    Args:
        spec: input spec of the images, see [`~modeling_vitp.images.reading.read_picture`].
    """
    images = []
    for index, image in enumerate(images_of(example)):
        if isinstance(image, str):
            image = {"path": image, "bytes": None}
        if isinstance(image, dict):
            image = decoded_image(image, index, spec)
        if isinstance(image, PIL.Image.Image) and 0 in image.size:
            raise ValueError(f"image {index} is empty: {image.width} x {image.height} pixels. Remove the row.")
        images.append(image)
    return images


def decoded_image(stored: dict[str, Any], index: int, spec: InputSpec | None) -> PIL.Image.Image | np.ndarray:
    """Return image number `index` of a row; raise a `ValueError` that names its path if it cannot be read."""
    try:
        return bands_first(read_picture(content_of(stored), spec))
    except Exception as error:  # Pillow raises many types for a broken file, SyntaxError among them.
        origin = f" ({stored['path']})" if stored.get("path") else ""
        reason = said(error)
        if isinstance(error, FileNotFoundError) and error.filename:
            remedy = "set `image_root` to the image folder"
            if "\\" in error.filename:
                remedy = "write the path with / and relative to the image folder"
            elif Path(error.filename).suffix.lower() not in IMAGE_SUFFIXES:
                remedy = "set `columns`, if this is not the name of an image"
            reason = f"file {os.path.abspath(error.filename)} not found; {remedy}"
        raise ValueError(
            f"image {index}{origin} cannot be read: {reason}. Repair the file or remove the row."
        ) from error


def bands_first(picture: Picture) -> PIL.Image.Image | np.ndarray:
    """Return an array as `(bands, height, width)`; raise a `ValueError` if the image processor would misread it."""
    if isinstance(picture, PIL.Image.Image):
        return picture
    array = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
    try:
        if ViTPImageProcessor._bands_first(torch.as_tensor(array), None).shape == array.shape:
            return array
    except ValueError:
        pass
    raise ValueError(f"the image is too small: {array.shape[0]} bands of {array.shape[2]} x {array.shape[1]} pixels")


def check_image_parts(messages: list[dict]) -> None:
    """Raise a `ValueError` if a message part contains an image, which belongs under the row's `images`."""
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            for content_part in content:
                check_image_part(content_part, index)


def check_image_part(part: dict, index: int) -> None:
    """Raise a `ValueError` if a part of message `index` contains an image."""
    image_keys = [key for key in ("image_url", "url", "path", "base64") if part.get(key) is not None]
    if isinstance(part.get("image"), (str, bytes, dict)):
        image_keys.append("image")
    if part.get("type") == "image_url":
        image_keys.append("image_url")
    if image_keys:
        raise ValueError(
            f"message {index} has a part that contains an image ({image_keys[0]}). Put the image under `images`, as a "
            "path or bytes, and mark its position with {'type': 'image'}."
        )


def check_answers(messages: list[dict[str, Any]]) -> None:
    """Raise a `ValueError` if no answer is trained on, or one is empty, has an image or precedes all questions."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if all(map(is_given, answers)):
        raise ValueError("no assistant message to train on. Add one or remove the row.")
    has_question = False
    for index, message in enumerate(messages):
        if message["role"] == "user":
            has_question = True
        if message["role"] != "assistant":
            continue
        problem = None
        if not has_question:
            problem = "comes before the first question. Reorder the messages"
        elif message.get("content") and has_place(message):
            problem = "has an image. Move it to a question"
        elif not "".join(message_texts(message)).strip():
            problem = "is empty. Add its text"
        if problem is not None:
            raise ValueError(f"the answer in message {index} {problem} or remove the row.")


def num_image_parts(messages: list[dict[str, Any]]) -> int:
    """Return the number of image parts of messages whose contents are lists of parts."""
    num_parts = 0
    for message in messages:
        for content_part in message["content"]:
            if content_part["type"] == "image":
                num_parts += 1
    return num_parts


def is_given(message: dict[str, Any]) -> bool:
    """Return whether a message is an answer that is excluded from the loss."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, list):
        return False
    for content_part in content:
        if isinstance(content_part, dict) and content_part.get("type") == GIVEN:
            return True
    return False


def place_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace each `<image>` in a question by an image part, and set the type of given parts to text.

    Empty fields are removed. A table has them if other rows have these fields, and TRL and chat templates would take an
    empty `image` of a part for an image.
    """
    has_places = any(map(has_place, messages))
    placed = []
    for message in messages:
        message = plain_message(message)
        content = message["content"]
        if isinstance(content, list):
            fixed_fields = {"type": "text"} if is_given(message) else {}
            parts = [{**plain_message(part), **fixed_fields} for part in content]
            message = {**message, "content": parts}
        elif has_places and message["role"] != "assistant" and isinstance(content, str):
            # TRL would also put all images before the first question, if that remains a string.
            message = {**message, "content": split_at_places(content)}
        placed.append(message)
    return placed


def has_place(message: dict[str, Any]) -> bool:
    """Return whether a message has the place of an image."""
    content = message["content"]
    if isinstance(content, str):
        return message["role"] != "assistant" and IMAGE_PLACE in content
    for content_part in content or ():
        if isinstance(content_part, dict) and content_part.get("type") == "image":
            return True
    return False


def split_at_places(text: str) -> list[dict[str, Any]]:
    """Split text into parts at `<image>`, without the newline after it, which the chat template writes."""
    if IMAGE_PLACE not in text:
        return [{"type": "text", "text": text}]
    before, *texts_after = text.split(IMAGE_PLACE)
    parts = []
    if before:
        parts.append({"type": "text", "text": before})
    for following in texts_after:
        parts.append({"type": "image", "text": None})
        following = following.removeprefix("\n")
        if following:
            parts.append({"type": "text", "text": following})
    return parts


SampleTransform = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]


def makes_images(transform: SampleTransform | None) -> bool:
    """Return whether a transform creates its own images, so that those of the row are not read."""
    return getattr(transform, "makes_images", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Encoding settings for the rows of one source of a mixture; `None` uses the setting of the processor.

    Args:
        max_patches: maximum number of tiles of a sample, shared by its images.
        image_size: side of the square, in pixels, that each image is resampled to before tiling. The tile size of the
            model gives one tile; twice the tile size gives four tiles and a thumbnail.
        system_prompt: system prompt of conversations without a system message.
        input_spec: fields of the [`InputSpec`] for images that are not 8-bit RGB.
        jpeg_degradation: whether training images are JPEG-compressed with a random quality from 75 to 100.
    """

    max_patches: Annotated[int, Interval("[1, 100000]")] | None = None
    image_size: Annotated[int, Interval("[1, 100000]")] | None = None
    system_prompt: str | None = None
    input_spec: dict | None = None
    jpeg_degradation: bool = False

    @property
    def images_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for the image processor."""
        kwargs = {}
        if self.max_patches is not None:
            kwargs["max_patches"] = self.max_patches
        if self.input_spec is not None:
            kwargs["input_spec"] = self.input_spec
        return kwargs

    def spec_for(self, image_processor: ViTPImageProcessor) -> InputSpec:
        """Return the input spec of the source, or that of the image processor if the source has none."""
        fields = self.input_spec or image_processor.input_spec
        if image_processor.band_names is not None:
            fields = {"band_names": image_processor.band_names, **fields}
        return InputSpec.from_dict(fields)

    def apply(self, images: list, generator: torch.Generator) -> list:
        """Return the images of a sample after JPEG degradation and resampling, as far as they are set."""
        if self.jpeg_degradation:
            images = [degrade(image, generator) for image in images]
        if self.image_size is not None:
            images = [to_square(image, self.image_size) for image in images]
        return images

    def with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with the system prompt of the source in front, unless they start with a system message."""
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


def degrade(image: PIL.Image.Image, generator: torch.Generator) -> PIL.Image.Image:
    """Return the image after JPEG compression with a random quality from 75 to 100; transparency becomes white."""
    is_picture = isinstance(image, PIL.Image.Image)
    if not is_picture or image.mode not in PIL_8BIT_MODES:
        kind = f"mode {image.mode}" if is_picture else f"{len(image)} bands of {image.dtype}"
        raise ValueError(f"jpeg_degradation needs 8-bit images, got {kind}. Remove the setting from the source.")
    quality = torch.randint(75, 101, (), generator=generator).item()
    return compress_jpeg(to_rgb(image), quality)


def to_square(image: PIL.Image.Image | np.ndarray, size: int) -> PIL.Image.Image | np.ndarray:
    """Resample an image, or an array of shape `(bands, height, width)`, to `size` x `size` pixels."""
    if not isinstance(image, PIL.Image.Image):
        return np.stack([resample_band(band, size) for band in np.asarray(image)])
    if image.mode in ("1", "P", "PA"):  # Pillow resamples these modes without interpolation.
        image = image.convert("RGBA")
    return image.resize((size, size), PIL.Image.Resampling.BICUBIC)


def resample_band(band: np.ndarray, size: int) -> np.ndarray:
    """Resample an array of shape `(height, width)`; its dtype and its range of values are kept."""
    if not np.isfinite(band).all():
        raise ValueError("image_size cannot resample an image with values that are not finite. Fill them first.")
    picture = PIL.Image.fromarray(band.astype(np.float32))
    square = picture.resize((size, size), PIL.Image.Resampling.BICUBIC)
    # Bicubic interpolation overshoots at edges.
    resampled = np.clip(np.asarray(square, dtype=np.float64), band.min(), band.max())
    if band.dtype.kind in "bui":
        resampled = np.rint(resampled)
    return resampled.astype(band.dtype)


def prepare_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Give every row an id and leave images encoded, so that the collator can name a broken sample.

    A data set with a user's transform keeps its decoded images, because the transform reads them.
    """
    encoded_features = {}
    is_custom = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    if not is_custom:
        encoded_features = undecoded_images(dataset.features or {})
    has_ids = dataset.column_names is not None and "id" in dataset.column_names
    if has_ids and not encoded_features:
        return dataset
    if isinstance(dataset, Dataset):
        if not has_ids:
            dataset = number_rows(dataset, "id")
        # For a list of images, `cast_column` would write an unchanged copy of the whole data set.
        dataset = dataset.select_columns(dataset.column_names)
        dataset.info.features = Features({**dataset.features, **encoded_features})
        return dataset
    for name, feature in encoded_features.items():
        dataset = dataset.cast_column(name, feature)
    if not has_ids:
        # In a stream the row number depends on the worker, the rank and the shuffle buffer, so a hash is used.
        features = dataset.features
        if features:
            features = Features({"id": Value("string"), **features})
        dataset = dataset.map(lambda row: {"id": content_id(row), **row}, features=features)
    return dataset


def undecoded_images(features: Features | dict) -> dict[str, Image | List]:
    """Return features without decoding for the columns of decoded images or lists of them."""
    encoded_features = {}
    for name, feature in features.items():
        if is_decoded(feature):
            encoded_features[name] = Image(decode=False)
        elif isinstance(feature, List) and is_decoded(feature.feature):
            encoded_features[name] = List(Image(decode=False))
    return encoded_features


def number_rows(dataset: Dataset, name: str) -> Dataset:
    """Add a column of row numbers. The rows of a selection or a shuffle keep their numbers before it.

    `add_column` would apply the selection and so write a copy of all images. It does so only if rows are selected
    repeatedly, because such rows need different numbers.
    """
    indices = dataset._indices
    if indices is None or len(indices.column(0).unique()) < len(dataset):
        return dataset.add_column(name, range(len(dataset)))
    unselected = copy.copy(dataset)
    unselected._indices = None
    # The fingerprint of the numbered data set depends on that of the selection.
    numbered = unselected.add_column(name, range(len(unselected)))
    numbered._indices = indices
    return numbered


def is_decoded(feature) -> bool:
    return isinstance(feature, Image) and feature.mode is None and feature.decode


def describe_rows(dataset: Dataset | IterableDataset, num_rows: int = 8) -> str:
    """Describe a data set by its number of rows and a hash of a few, or a stream by its name and columns."""
    if isinstance(dataset, IterableDataset):
        info = dataset.info
        return f"stream {info.dataset_name} {info.config_name} {dataset.split} {sorted(dataset.column_names or [])}"
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0)
    digest = hashlib.sha256()
    if len(dataset):
        for index in range(num_rows):
            row = dataset[index * len(dataset) // num_rows]
            # Of the messages alone, because a user's transform may change the images at random.
            messages_id = content_id({"messages": row.get("messages")})
            digest.update(f"{row.get('id')}{messages_id}".encode())
    return f"{len(dataset)} rows, {digest.hexdigest()[:16]}"


def sample_texts(
    dataset: Dataset | IterableDataset,
    sample_transform: SampleTransform | None,
    seed: int,
    num_samples: int = 2000,
) -> Iterator[str]:
    """Yield the texts of the first rows' messages, after the transform, to train a tokenizer."""
    for row in itertools.islice(prepare_rows(dataset), num_samples):
        generator = keyed_generator(seed, row.get("id"), "tokenizer")
        if hasattr(sample_transform, "messages"):  # which needs no pixels
            row = {"messages": sample_transform.messages(row, generator)}
        elif sample_transform is not None:
            images = [] if makes_images(sample_transform) else load_images(row)
            row = sample_transform({**row, "images": images}, generator)
        for message in row["messages"]:
            yield from message_texts(message)
