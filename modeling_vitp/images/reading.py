"""Readers of image files and URLs: Pillow for 8 bits, rasterio for more bits or bands, pydicom for DICOM.

Images are returned upright, rotated by their EXIF or TIFF orientation.
"""

import gzip
import hashlib
import io
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import huggingface_hub
import numpy as np
import PIL.Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
)

from ..image_decoding import (
    JPEG,
    JPEG_2000,
    PIL_8BIT_MODES,
    PNG,
    TIFF,
    is_reduced,
    is_reduced_jpeg_2000,
    open_file,
    open_raster,
    orientation_of,
    over_white,
    read_header,
    tiff_tags,
    turn,
    upright,
)

if TYPE_CHECKING:  # input_spec imports torch, which would slow down `--help`.
    from ..input_spec import InputSpec

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".dcm"}

# End marks of the formats that have one.
END_MARKS = {JPEG: b"\xff\xd9", PNG: b"IEND"}
TAIL = 4096  # Number of bytes at the end of a file in which the end mark is searched.

# Photometric interpretations of a TIFF that are neither gray nor RGB.
NO_COLORS = {0: "white as 0", 3: "a palette", 5: "inks (CMYK)", 8: "L*a*b*", 9: "L*a*b*"}
# Number of colors by photometric interpretation: RGB, CMYK, YCbCr and L*a*b*. All others have one.
NUM_COLORS = {2: 3, 5: 4, 6: 3, 8: 3}
VALUES = ("1", "L", "P", "I", "I;16", "I;16B", "F")  # Pillow modes with one number per pixel.

# Pillow image, or array of shape `(height, width)` or `(height, width, bands)`.
Picture = PIL.Image.Image | np.ndarray
Window = tuple[int, int, int, int]  # Left, top, right, bottom in pixels.

LIMIT_LOCK = threading.Lock()  # Of Pillow's limit for the size of images, which all threads share.
FETCH_VARIABLE = "VITP_FETCH_IMAGES"  # An environment variable, so that data loader workers see it too.
FETCH_BYTES = 32 << 20  # Limits for one image.
FETCH_SECONDS = 20
IS_URL = re.compile(r"[a-z][a-z0-9+.-]+:/+|[^/]*::[a-z]", re.IGNORECASE)
OF_THE_WEB = re.compile(r"https?://", re.IGNORECASE)


def read_image(
    path: Path,
    window: Window | None,
    spec: "InputSpec | None" = None,
    as_stored: bool = False,
) -> Picture:
    """Read an image file or a window of it. For an upright TIFF, only the window is read.

    Args:
        path: path of the file.
        window: window to read, or `None` for the whole image.
        spec: input spec of the image, see [`read_picture`].
        as_stored: whether to return the stored values, as for masks, instead of colors.

    Raises:
        ValueError: if the file is broken, or if a window is read in color from a TIFF that does not store colors.
    """
    if is_tiff(path):
        return read_tiff(path, window, spec, as_stored)
    if window is None:
        return decode(path, spec, as_stored)
    picture = decode_scene(path, spec, as_stored)
    if isinstance(picture, PIL.Image.Image):
        return picture.crop(window)
    return cut(picture, window)


def read_tiff(
    path: Path,
    window: Window | None,
    spec: "InputSpec | None",
    as_stored: bool,
) -> Picture:
    """Read a TIFF file or a window of it, with the arguments of [`read_image`].

    The result has the stored values of a mask, the bands that the spec names, or else the colors.
    """
    takes_bands = spec is not None and spec.takes_bands
    in_color = not as_stored and not takes_bands
    with read_errors(path), open_file(path) as file:
        tags = tiff_tags(file)
        is_deep = is_deep_tiff(tags)
        orientation = orientation_of(tags)
        needs_conversion = not stores_colors(tags) or EXTRASAMPLES in tags
    # Pillow converts palettes, inks and transparency, but reads no windows.
    if in_color and window is None and not is_deep and needs_conversion:
        return decode(path, spec)
    # The positions of a window are those in the upright image. They are the same in the file if it is stored upright.
    window_in_file = window if orientation == 1 else None
    with read_errors(path), open_raster(path) as file:
        check_count(file.count, spec)
        rows_and_columns = None
        if window_in_file is not None:
            left, top, right, bottom = window_in_file
            rows_and_columns = ((top, bottom), (left, right))
        stored_picture = bands_last(file.read(window=rows_and_columns))
        picture = turn(stored_picture, orientation)
    if window is not None and window_in_file is None:
        picture = cut(picture, window)
    if in_color:
        check_colors(path, tags)
        if not is_deep:
            picture = onto_white(picture)
    return picture


def read_picture(content: bytes, spec: "InputSpec | None" = None, as_stored: bool = False) -> Picture:
    """Decode an image to a Pillow image, or to an array `(height, width[, bands])` if Pillow would lose information.

    Args:
        content: content of the image file.
        spec: input spec of the image. If it names bands, the fourth band of a TIFF is a band even if it is marked as
            transparency, as in many files with near infrared. If it sets a window or percentiles, DICOM is returned in
            its units, see [`~modeling_vitp.images.dicom.to_picture`]; otherwise DICOM is converted to 8 bits with the
            window of its tags.
        as_stored: whether to return the stored values of a mask instead of colors.

    Raises:
        Exception: if the content is broken. The type depends on the decoder.
    """
    if is_dicom(content):
        from .dicom import to_picture

        return to_picture(io.BytesIO(content), "DICOM", spec, as_stored)
    takes_bands = not as_stored and spec is not None and spec.takes_bands
    if not is_deep(content, takes_bands):
        return upright(PIL.Image.open(io.BytesIO(content)))
    with open_raster(content) as file:
        check_count(file.count, spec)
        limit = 2 * (PIL.Image.MAX_IMAGE_PIXELS or math.inf)  # The limit of Pillow.
        if file.width * file.height > limit:
            raise ValueError(f"expected at most {limit} pixels, got {file.width} x {file.height}")
        picture = bands_last(file.read())
    if content.startswith(JPEG_2000):
        return picture
    if not content.startswith(TIFF):
        picture = onto_white(picture)
    _, _, orientation = read_header(io.BytesIO(content))
    return turn(picture, orientation)


@contextmanager
def read_errors(name: str | Path, kind: str | None = None) -> Iterator[None]:
    """Convert the errors of a decoder, which are of many types, to a `ValueError` that names the file.

    Args:
        name: name of the file in the error.
        kind: expected content of the file in the error, such as `"JSON"`.
    """
    try:
        yield
    except Exception as error:
        names_the_file = isinstance(error, ValueError) and str(name) in str(error)
        if names_the_file:
            raise
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{name} not found.") from error
        expected_content = f" as {kind}" if kind else ""
        raise ValueError(f"{name} cannot be read{expected_content}: {said(error)}") from error


def decode(path: Path, spec: "InputSpec | None" = None, as_stored: bool = False) -> Picture:
    with read_errors(path):
        with open_file(path) as file:
            return read_picture(file.read(), spec, as_stored)


# The windows of one scene (image or pair, and mask) are often read one after another.
decode_scene = lru_cache(maxsize=3)(decode)


def is_deep(content: bytes, bands: bool = False) -> bool:
    """Return whether Pillow would lose bits or bands of an encoded image."""
    if content.startswith(PNG):
        has_16_bits = content[24:25] == b"\x10"
        is_gray = content[25:26] == b"\0"
        return has_16_bits and not is_gray
    if content.startswith(JPEG_2000):
        return is_reduced_jpeg_2000(content, bands)
    if content.startswith(TIFF):
        return is_deep_tiff(tiff_tags(io.BytesIO(content)), bands)
    return False


def is_deep_tiff(tags: ImageFileDirectory_v2, bands: bool = False) -> bool:
    """Return whether Pillow would lose bits or bands of a TIFF, by the tags of its first directory."""
    depths = tags.get(BITSPERSAMPLE, (1,))
    formats = tags.get(SAMPLEFORMAT, (1,))
    is_unsigned = set(formats) == {1}
    if max(depths) > 8 or not is_unsigned:
        return True
    num_samples = tags.get(SAMPLESPERPIXEL, 1)
    if bands and num_samples not in (1, 3):
        return True
    extra_samples = tuple(tags.get(EXTRASAMPLES, ()))
    has_only_transparency = extra_samples in ((), (1,), (2,))
    photometric = tags.get(PHOTOMETRIC_INTERPRETATION, 1)
    expected_colors = NUM_COLORS.get(photometric, 1)
    num_colors = num_samples - len(extra_samples)
    return not has_only_transparency or num_colors != expected_colors


def picture_size(file: BinaryIO) -> tuple[int, int]:
    """Return height and width of an open image file as returned by `read_picture`, from its header."""
    is_of_dicom = is_dicom(file.read(132))
    file.seek(0)
    if is_of_dicom:
        from .dicom import open_dicom

        dataset = open_dicom(file, "DICOM", with_pixels=False)
        return dataset.Rows, dataset.Columns
    height, width, orientation = read_header(file)
    is_on_its_side = orientation >= 5
    if is_on_its_side:
        return width, height
    return height, width


@cache
def stored_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image file as returned by `read_image`, from its header."""
    with read_errors(path), open_file(path) as file:
        return picture_size(file)


def stored_orientation(path: Path) -> int:
    """Return the orientation of an image of any size from 1 (upright) to 8, and 1 for formats without orientation.

    Raises:
        ValueError: if the header cannot be read.
    """
    with LIMIT_LOCK:  # Another thread would read, and later restore, the limit that is lifted here.
        limit = PIL.Image.MAX_IMAGE_PIXELS
        PIL.Image.MAX_IMAGE_PIXELS = None  # No limit, because no pixel is decoded.
        try:
            if is_dicom_file(path):  # The preamble of DICOM may be the header of a TIFF.
                return 1
            with read_errors(path), open_file(path) as file, suppress(PIL.UnidentifiedImageError):
                _, _, orientation = read_header(file)
                return orientation
            return 1
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit


def check_upright(path: Path) -> None:
    """Raise a `ValueError` if an image is not stored upright, because the orientation of its mask would be unknown."""
    orientation = stored_orientation(path)
    if orientation != 1:
        raise ValueError(
            f"{path} is stored with orientation {orientation}, expected 1 (upright). Rotate the pixels (for example "
            "with -auto-orient of ImageMagick), or remove the tag if the pixels are upright already."
        )


def check_whole(file: BinaryIO) -> None:
    """Raise an error if an open file is not an image, or a truncated JPEG or PNG. Its type depends on the decoder.

    JPEG and PNG files have an end mark. Only a file without this mark is decoded.
    """
    picture_size(file)
    if lacks_end(file):
        file.seek(0)
        read_picture(file.read())


def lacks_end(file: BinaryIO) -> bool:
    """Return whether an open file is a JPEG or PNG without its end mark."""
    file.seek(0)
    head = file.read(len(PNG))
    for signature, end_mark in END_MARKS.items():
        if head.startswith(signature):
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL, 0))
            return end_mark not in file.read()
    return False


def check_file(path: Path) -> None:
    """Raise a `ValueError` if a file is not an image, or is truncated, see [`check_whole`]."""
    if path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path} is a volume, and an image was expected. Set `volumes` in `data`.")
    with read_errors(path), open_file(path) as file:
        check_whole(file)


def said(error: Exception) -> str:
    """Return the message of a reading error, with a remedy for images that are too large."""
    if isinstance(error, PIL.Image.DecompressionBombError):
        _, _, end_of_message = str(error).rpartition("(")
        size, _, _ = end_of_message.partition(")")
        return (
            f"its {size} exceed the limit for one image. Convert it to TIFF, of which single windows are read: "
            "gdal_translate -co TILED=YES -co COMPRESS=DEFLATE"
        )
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is not an image"
    if isinstance(error, KeyError):
        return f"missing key {error}"
    if isinstance(error, OSError) and "previous exception" in str(error) and error.__cause__ is not None:
        return str(error.__cause__)  # rasterio does not repeat the message of GDAL.
    return str(error) or type(error).__name__


def is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def has_8_bits(path: Path) -> bool:
    """Return whether Pillow keeps all bits and bands of an image: `False` for PNG and TIFF of more bits or bands."""
    if path.suffix.lower() not in (".png", ".tif", ".tiff"):
        return True
    try:
        with PIL.Image.open(path) as image:
            return image.mode in PIL_8BIT_MODES and not is_reduced(image, bands=True)
    except (OSError, PIL.Image.DecompressionBombError):
        return False


def check_count(number: int, spec: "InputSpec | None") -> None:
    """Raise a `ValueError` for an image of many bands that a spec does not take, before they are decoded."""
    if number > 4:
        from ..input_spec import InputSpec

        spec = spec or InputSpec()
        spec.check_number(number)


def stores_colors(tags: ImageFileDirectory_v2) -> bool:
    """Return whether the stored values of a TIFF are gray or RGB."""
    photometric = tags.get(PHOTOMETRIC_INTERPRETATION, 1)
    depths = tags.get(BITSPERSAMPLE, (1,))
    return photometric not in NO_COLORS and max(depths) >= 8


def check_colors(path: Path, tags: ImageFileDirectory_v2) -> None:
    """Raise a `ValueError` if the stored values of a TIFF are not gray or RGB."""
    if not stores_colors(tags):
        content = NO_COLORS.get(tags.get(PHOTOMETRIC_INTERPRETATION, 1), "less than 8 bits")
        raise ValueError(
            f"Expected a TIFF in gray or RGB to read windows, {path} stores {content}. Convert it, for example a "
            "palette with gdal_translate -expand rgb."
        )


def bands_last(bands: np.ndarray) -> np.ndarray:
    if len(bands) == 1:
        return bands[0]
    return bands.transpose(1, 2, 0)


def cut(picture: np.ndarray, window: Window) -> np.ndarray:
    left, top, right, bottom = window
    return picture[top:bottom, left:right]


def onto_white(pixels: np.ndarray) -> np.ndarray:
    """Blend an image of shape `(height, width, bands)` with white, and remove its transparency band, if any."""
    if pixels.ndim == 2 or pixels.shape[2] not in (2, 4):
        return pixels
    colors = over_white(pixels[..., :-1], pixels[..., -1:])
    is_gray = colors.shape[2] == 1
    return colors[..., 0] if is_gray else colors


def whole_numbers(values: np.ndarray, name: str | Path) -> np.ndarray:
    """Return the values of a mask as int64, and raise a `ValueError` if they are not integers."""
    if values.size == 0:
        return values.astype(np.int64)
    lowest = values.min()
    highest = values.max()
    is_whole = values.dtype.kind in "bui"
    if values.dtype.kind == "f":
        is_whole = (values == np.rint(values)).all()
    is_in_range = -(2**31) <= lowest and highest < 2**31  # False for NaN too.
    if not is_whole or not is_in_range:
        raise ValueError(
            f"The mask {name} must have integer values in the range of int32, such as class indices, got "
            f"{values.dtype} from {lowest:g} to {highest:g}."
        )
    return values.astype(np.int64)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the starts of windows along an axis: multiples of the stride, and a last window that ends with the axis.

    A window that is at least as long as the axis starts at 0 and is the only one.
    """
    return [*range(0, length - window, stride), max(length - window, 0)]


def windows(image_size: tuple[int, int], size: int, overlap: int) -> list[Window | None]:
    """Return windows of at most `size` x `size` that cover an image, or `[None]` if the image is not larger."""
    height, width = image_size
    if not 0 <= overlap < size:
        raise ValueError(f"tile: `overlap` must be in [0, {size}), the size, got {overlap}.")
    if max(width, height) <= size:
        return [None]
    areas = []
    for top in window_starts(height, size, size - overlap):
        for left in window_starts(width, size, size - overlap):
            right = min(left + size, width)
            bottom = min(top + size, height)
            areas.append((left, top, right, bottom))
    return areas


def is_dicom(head: bytes) -> bool:
    """Return whether the first 132 bytes of a file are those of DICOM."""
    return head[128:132] == b"DICM"


def is_dicom_file(path: Path) -> bool:
    with open_file(path) as file:
        return is_dicom(file.read(132))


def patient_of(path: Path) -> str | None:
    """Return the patient of a DICOM file, or else its study or series; `None` for other files.

    Args:
        path: path of a file, or of the folder of a series.
    """
    file = first_dicom_file(path)
    if file is None:
        return None
    import pydicom

    tags = ["PatientID", "StudyInstanceUID", "SeriesInstanceUID"]
    try:
        dataset = pydicom.dcmread(file, specific_tags=tags, stop_before_pixels=True)
    except Exception:  # A broken file raises an error when it is read.
        return None
    for tag in tags:
        value = str(dataset.get(tag) or "")
        if value.strip():
            return f"{tag} {value}"
    return None


def first_dicom_file(path: Path) -> Path | None:
    """Return the path of a DICOM file itself, or the first DICOM file of a folder, or `None`."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and is_dicom_file(file):
            return file
    return None


def content_digest(path: Path) -> bytes:
    """Return a hash of the content of a file, unpacked for gzipped NIfTI, or of all files of a folder in any order."""
    if path.is_dir():
        digests = []
        for file in path.iterdir():
            if file.is_file():
                digests.append(content_digest(file))
        joined_digests = b"".join(sorted(digests))
        return hashlib.sha256(joined_digests).digest()
    is_packed = path.name.lower().endswith(".nii.gz")
    open_content = gzip.open if is_packed else open_file
    with open_content(path) as file:
        digest = hashlib.file_digest(file, "sha256")
    return digest.digest()


def packed_key(path: Path) -> int:
    """Return the size of a file, or for gzip the checksum and size of its content, which any packer stores."""
    with open_file(path) as file:
        if file.read(2) != b"\x1f\x8b":
            return path.stat().st_size
        file.seek(-8, 2)
        return int.from_bytes(file.read(8), "little")


def below(root: str | Path, name: str | Path, key: str = "root") -> Path:
    """Return the path of a file that is named in data, relative to a root folder.

    Args:
        root: root folder.
        name: name of the file in the data.
        key: setting of the root folder, for errors.

    Raises:
        ValueError: if the file is outside the root: by `..`, as an absolute path or through a symbolic link.
    """
    path = Path(root) / name
    try:
        if path.name == ".." or path.is_symlink():
            real = Path(os.path.realpath(path))
        else:
            real = Path(real_path(path.parent), path.name)
    except (OSError, ValueError) as error:  # The name is too long, or contains a null character.
        raise ValueError(f"invalid file name {str(name)[:80]!r}: {error.__class__.__name__}.") from error
    if not real.is_relative_to(real_path(Path(root))):
        raise ValueError(
            f"the file {str(name)[:200]!r} is not below {root}, but is {real}. Copy the file there, or set `{key}` to "
            "a folder that contains all files. Relative names are relative to this folder."
        )
    return path


real_path = lru_cache(maxsize=4096)(os.path.realpath)


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder and its subfolders, by suffix."""
    return [path for path in visible_paths(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def visible_paths(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the paths below a folder whose name matches a pattern, without hidden files and folders.

    `tar` of macOS writes a file `._0.png` beside `0.png`, and Jupyter copies to `.ipynb_checkpoints`.
    """
    depth = len(folder.parts)
    paths = []
    for path in sorted(folder.rglob(pattern)):
        names_below_folder = path.parts[depth:]
        is_hidden = any(name.startswith(".") for name in names_below_folder)
        if not is_hidden:
            paths.append(path)
    return paths


def identity(path: Path) -> tuple[int, int]:
    """Return a key that is the same for a file, a link to it and another hard link."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def is_url(path: str) -> bool:
    """Return whether a path starts with a URL scheme, or a chain of schemes as in `fsspec`, and is not a local file."""
    return bool(IS_URL.match(path)) and not os.path.exists(path)


def fetch(url: str) -> bytes:
    """Fetch an image from a URL, with limits of size and time, if the user has enabled it.

    Raises:
        ValueError: if fetching is not enabled, the request fails, the server sends nothing for `FETCH_SECONDS`, or the
            image has more than `FETCH_BYTES` or is not complete after `FETCH_SECONDS`.
    """
    start_of_url = url[:200]
    is_enabled = os.environ.get(FETCH_VARIABLE, "0") not in ("", "0")
    if not OF_THE_WEB.match(url) or not is_enabled or huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{start_of_url} is a URL. Download the images and use file paths. Images are fetched from http(s) URLs "
            f"alone, with {FETCH_VARIABLE}=1 and without HF_HUB_OFFLINE in the environment."
        )
    import httpx2

    content = bytearray()
    deadline = time.monotonic() + FETCH_SECONDS
    try:
        with httpx2.stream(
            "GET",
            url,
            follow_redirects=True,
            timeout=FETCH_SECONDS,
            headers={"Accept-Encoding": "identity"},
        ) as response:
            response.raise_for_status()
            for chunk in response.iter_raw():
                content += chunk
                if len(content) > FETCH_BYTES or time.monotonic() > deadline:
                    raise ValueError(
                        f"it has more than {FETCH_BYTES >> 20} MiB, or was not complete after {FETCH_SECONDS} s"
                    )
    except Exception as error:
        message_in_one_line = " ".join(str(error).split())
        raise ValueError(f"{start_of_url} cannot be fetched: {message_in_one_line}") from error
    return bytes(content)
