"""Files to pixels, whole or a window: 8 bits by Pillow, more depth or bands by rasterio, DICOM by pydicom.

Pixels are as the image is to be seen, turned as its EXIF data or the orientation of its TIFF says.
"""

import io
import os
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import rasterio
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from rasterio.errors import NotGeoreferencedWarning

from .windows import Window

if TYPE_CHECKING:  # which imports torch, and commands answer --help without
    from ..input_spec import InputSpec

# Of TIFF, by its tag 262.
NO_COLORS = {0: "white as 0", 3: "a palette", 5: "inks (CMYK)", 8: "L*a*b*", 9: "L*a*b*"}

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".dcm"}

PNG, TIFF = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how their files begin
JPEG_2000 = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"  # in a box, or the stream alone

JPEG_BEGINS, LAST = b"\xff\xd8\xff", 4096  # bytes at the end of a file, in which the mark of its end is looked for
ENDS = {JPEG_BEGINS: b"\xff\xd9", PNG: b"IEND"}

VALUES = ("1", "L", "P", "I", "I;16", "I;16B", "F")  # modes of Pillow whose pixels are one number, and no color

# What is read: by Pillow, or of a TIFF the array of shape `(height, width)` or `(height, width, bands)`.
Picture = PIL.Image.Image | np.ndarray


def read_image(path: Path, window: Window | None, spec: "InputSpec | None" = None, as_stored: bool = False) -> Picture:
    """A file, or a window of it; of a TIFF, no more is read than the window.

    Args:
        spec: how it will be read, see [`read_picture`].
        as_stored: whether the values are wanted as they are stored, as those of a mask are, and no colors.

    Raises:
        ValueError: names the file, if it is broken, or a window is wanted of a TIFF that stores no colors as such.
    """
    if not is_tiff(path):
        picture = (decode if window is None else decode_scene)(path, spec, as_stored)
        if window is None:
            return picture
        return picture.crop(window) if isinstance(picture, PIL.Image.Image) else cut(picture, window)
    try:
        with path.open("rb") as file:
            tags = tiff_tags(file)
        of_colors = not as_stored and not (spec is not None and spec.takes_bands)
        is_plain = stores_colors(tags) and 338 not in tags  # without a fourth band, or transparency
        if of_colors and window is None and not is_plain and not is_deep_tiff(tags):
            return decode(path, spec)
        orientation, area = orientation_of(tags), None
        if window is not None and orientation == 1:
            area = ((window[1], window[3]), (window[0], window[2]))  # rows, columns
        with open_tiff(path) as file:
            picture = turn(bands_last(file.read(window=area)), orientation)
    except (rasterio.errors.RasterioError, MemoryError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if of_colors:
        check_colors(path, tags)
        if not is_deep_tiff(tags):
            picture = onto_white(picture)
    return picture if window is None or area is not None else cut(picture, window)


def read_picture(content: bytes, spec: "InputSpec | None" = None, as_stored: bool = False) -> Picture:
    """An encoded image: by Pillow what it reads in full, or else the array of shape `(height, width[, bands])`.

    Args:
        content: of a file.
        spec: how it will be read. If it is about bands, the fourth band of a TIFF is one also where it is marked as
            transparency, which it is in many files of red, green, blue and near infrared. If it says what is black and
            white, DICOM is given in its own units, see [`~modeling_vitp.images.dicom.to_picture`]; otherwise it is of
            8 bits, by the window in its tags.
        as_stored: whether a mask is read, whose values are no colors.

    Raises:
        Exception: of many kinds, if it is broken.
    """
    if is_dicom(content):
        from .dicom import to_picture

        return to_picture(io.BytesIO(content), "DICOM", spec, as_stored)
    if is_deep(content, not as_stored and spec is not None and spec.takes_bands):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.MemoryFile(content) as memory, memory.open() as file:
                if file.width * file.height > 2 * (PIL.Image.MAX_IMAGE_PIXELS or float("inf")):  # as Pillow does
                    raise ValueError(f"it has {file.width} x {file.height} pixels, more than are taken from one file")
                picture = bands_last(file.read())
        if content.startswith(TIFF):
            return turn(picture, orientation_of(tiff_tags(io.BytesIO(content))))
        if content.startswith(JPEG_2000):
            return picture
        with PIL.Image.open(io.BytesIO(content)) as image:
            return turn(onto_white(picture), header_orientation(image))
    image = PIL.Image.open(io.BytesIO(content))
    image.load()
    if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:
        image = PIL.ImageOps.exif_transpose(image)
    return image


def is_deep(content: bytes, bands: bool = False) -> bool:
    """Whether Pillow would lose bits or bands of an encoded image."""
    if content.startswith(PNG):
        return content[24:25] == b"\x10" and content[25:26] != b"\0"  # 16 bits, not grey
    if content.startswith(JPEG_2000):
        from ..image_processing_vitp import is_reduced_jpeg_2000

        return is_reduced_jpeg_2000(content, bands)
    return content.startswith(TIFF) and is_deep_tiff(tiff_tags(io.BytesIO(content)), bands)


def is_deep_tiff(tags: ImageFileDirectory_v2, bands: bool = False) -> bool:
    """The same of a TIFF, by its first directory."""
    depths, formats, extra = (tags.get(tag, default) for tag, default in ((258, (1,)), (339, (1,)), (338, ())))
    samples = tags.get(277, 1)
    with_color = samples - len(extra) == {2: 3, 5: 4, 6: 3, 8: 3}.get(tags.get(262, 1), 1)
    is_plain = max(depths) <= 8 and set(formats) == {1} and with_color and tuple(extra) in ((), (1,), (2,))
    return not is_plain or (bands and samples not in (1, 3))


def picture_size(file: BinaryIO) -> tuple[int, int]:
    """Height and width of what `read_picture` gives for the content of an open file, from its header."""
    head = file.read(132)
    file.seek(0)
    if is_dicom(head):
        return dicom_size(file)
    if head[:4] in TIFF:
        tags = tiff_tags(file)
        size, orientation = (int(tags[257]), int(tags[256])), orientation_of(tags)
    else:
        with PIL.Image.open(file) as image:
            size, orientation = (image.height, image.width), header_orientation(image)
    return size[::-1] if orientation >= 5 else size


def check_whole(file: BinaryIO) -> None:
    """Raises an error, of many kinds, if an open file does not begin as an image, or if one of JPEG or PNG is cut off.

    Their end has a mark. Only one that lacks it, maybe since something follows, is decoded.
    """
    picture_size(file)
    file.seek(0)
    head = file.read(len(PNG))
    mark = next((end for begins, end in ENDS.items() if head.startswith(begins)), None)
    if mark is not None:
        file.seek(max(file.seek(0, os.SEEK_END) - LAST, 0))
        if mark not in file.read():
            file.seek(0)
            read_picture(file.read())


def check_file(path: Path) -> None:
    """Raises a `ValueError` that names the file if it is no whole image, see [`check_whole`]."""
    try:
        with path.open("rb") as file:
            check_whole(file)
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read: {said(error)}. Mend the file or take it out.") from error


@cache
def stored_size(path: Path) -> tuple[int, int]:
    """Height and width of what `read_image` gives, from the header."""
    try:
        if is_tiff(path):
            with open_tiff(path) as image, path.open("rb") as file:
                size, orientation = (image.height, image.width), orientation_of(tiff_tags(file))
        elif is_dicom_file(path):
            with path.open("rb") as file:
                size, orientation = dicom_size(file), 1
        else:
            with open_image(path) as image:
                size, orientation = (image.height, image.width), header_orientation(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return size[::-1] if orientation >= 5 else size


def stored_orientation(path: Path) -> int:
    """From 1, upright, to 8, from the header, whatever the size of the image; 1 of a format that has none.

    Raises:
        ValueError: if a TIFF cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) in TIFF:
            file.seek(0)
            try:
                return orientation_of(tiff_tags(file))
            except (OSError, SyntaxError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
    most, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None  # no pixel is decoded
    try:
        with PIL.Image.open(path) as image:
            return header_orientation(image)
    except PIL.UnidentifiedImageError:
        return 1
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = most


def check_upright(path: Path) -> None:
    """Raises a `ValueError` that names a file that is not stored as it is to be seen: masks may be of either."""
    orientation = stored_orientation(path)
    if orientation != 1:
        raise ValueError(
            f"{path} is stored with orientation {orientation}, so not as it is to be seen: turn its pixels (as "
            "ImageMagick's -auto-orient does), or take the tag away if they are upright as they are."
        )


def tiff_tags(file: BinaryIO) -> ImageFileDirectory_v2:
    """The first directory of an open TIFF."""
    header = file.read(8)
    if header[2:3] == b"+" or header[3:4] == b"+":  # BigTIFF
        header += file.read(8)
    tags = ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    return tags


def header_orientation(image: PIL.Image.Image) -> int:
    """Of an opened image, without the method of PNG's subclass, which would decode it."""
    return orientation_of(PIL.Image.Image.getexif(image))


def said(error: Exception) -> str:
    """What an error of reading says, and of an image that is too large what to do."""
    if isinstance(error, PIL.Image.DecompressionBombError):
        return (
            f"its {error.args[0].split('(')[-1].split(')')[0]} are more than are decoded at once. As a TIFF, of which "
            "windows alone are read, it may have any size: gdal_translate -co TILED=YES -co COMPRESS=DEFLATE"
        )
    return str(error)


def orientation_of(tags) -> int:
    """From 1, upright, to 8, as EXIF and TIFF number them."""
    orientation = tags.get(PIL.ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """An array of shape `(height, width[, bands])` as it is to be seen."""
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    quarters = {3: 2, 6: -1, 7: 2, 8: 1}.get(orientation, 0)
    pixels = np.rot90(pixels, quarters)
    pixels = {2: np.fliplr, 4: np.flipud}.get(orientation, np.asarray)(pixels)
    return np.ascontiguousarray(pixels)


def bands_last(bands: np.ndarray) -> np.ndarray:
    return bands[0] if len(bands) == 1 else bands.transpose(1, 2, 0)


def onto_white(pixels: np.ndarray) -> np.ndarray:
    """An image of unsigned integers, of shape `(height, width, bands)`, without its transparency, if it has any."""
    if pixels.ndim == 2 or pixels.shape[2] not in (2, 4):
        return pixels
    flat = over_white(pixels[..., :-1], pixels[..., -1:])
    return flat[..., 0] if flat.shape[2] == 1 else flat


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Color of unsigned integers as it looks on white, where alpha of the same type says how much of it is seen."""
    white = np.iinfo(color.dtype).max
    share = alpha.astype(np.float64) / white
    return (color * share + white * (1 - share)).round().astype(color.dtype)


def cut(picture: np.ndarray, window: Window) -> np.ndarray:
    left, top, right, bottom = window
    return picture[top:bottom, left:right]


def whole_numbers(values: np.ndarray, name: str | Path) -> np.ndarray:
    """The values of a mask, int64; a `ValueError` that names it if they are none that a class can have."""
    if values.dtype.kind not in "buif":
        raise ValueError(f"The mask {name} has values of type {values.dtype}, which are no classes.")
    if values.dtype.kind == "f":
        odd = ~np.isfinite(values) | (values != np.rint(values))
        if odd.any():
            raise ValueError(
                f"The mask {name} has {odd.sum()} value(s) that are no whole numbers, {values[odd].flat[0]:g} for one: "
                "store the numbers of classes."
            )
    if values.size and not -(2**31) <= values.min() <= values.max() < 2**31:
        raise ValueError(f"The mask {name} has values up to {values.max()}, more than a class can have.")
    return values.astype(np.int64)


def is_dicom(head: bytes) -> bool:
    """Whether the first 132 bytes are those of a DICOM file, whatever its name."""
    return head[128:132] == b"DICM"


def is_dicom_file(path: Path) -> bool:
    with path.open("rb") as file:
        return is_dicom(file.read(132))


def dicom_size(file: BinaryIO) -> tuple[int, int]:
    """Height and width of an image in DICOM, from its tags."""
    from .dicom import open_dicom

    dataset = open_dicom(file, "DICOM", with_pixels=False)
    return dataset.Rows, dataset.Columns


def is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def open_tiff(path: Path) -> rasterio.DatasetReader:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(path)
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def open_image(path: Path) -> PIL.Image.Image:
    try:
        return PIL.Image.open(path)
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ValueError(f"{path} cannot be read: {said(error)}") from error


def stores_colors(tags: ImageFileDirectory_v2) -> bool:
    """Whether the stored values of a TIFF are grey, or red, green and blue."""
    return tags.get(262, 1) not in NO_COLORS and max(tags.get(258, (1,))) >= 8


def check_colors(path: Path, tags: ImageFileDirectory_v2) -> None:
    """Raises a `ValueError` that names a TIFF of which they are not."""
    if not stores_colors(tags):
        found = NO_COLORS.get(tags.get(262, 1), "less than 8 bits")
        raise ValueError(
            f"{path} stores {found}, and windows take its values as they are: save it in grey or red, green and blue "
            "(gdal_translate -expand rgb for a palette)."
        )


def decode(path: Path, spec: "InputSpec | None" = None, as_stored: bool = False) -> Picture:
    try:
        return read_picture(path.read_bytes(), spec, as_stored)
    except Exception as error:  # as in `open_image`
        raise ValueError(f"{path} cannot be read: {said(error)}") from error


# Windows of one scene are often read one after another: image or pair, and mask.
decode_scene = lru_cache(maxsize=3)(decode)


def below(root: str | Path, name: str | Path, key: str = "root") -> Path:
    """The file that data name, under its root, which the user gives by this key.

    Raises:
        ValueError: if the name leads out of the root, by `..`, as an absolute path or over a symbolic link.
    """
    path = Path(root) / name
    try:
        is_plain = path.name != ".." and not path.is_symlink()
        real = Path(real_path(path.parent), path.name) if is_plain else Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # a name too long, or with a zero in it
        raise ValueError(f"the name {str(name)[:80]!r} is that of no file: {error.__class__.__name__}.") from error
    if not real.is_relative_to(real_path(Path(root))):
        raise ValueError(
            f"the file {str(name)[:200]!r} is not below {root}, but is {real}. Copy it there, or give as "
            f"`{key}` a folder that all files are in, to which the names that are not absolute are relative."
        )
    return path


real_path = lru_cache(maxsize=4096)(os.path.realpath)


def image_files(folder: Path) -> list[Path]:
    """The images under a folder, by their suffixes."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]


def identity(path: Path) -> tuple[int, int]:
    """The same for a file, a link to it and another hard link."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino
