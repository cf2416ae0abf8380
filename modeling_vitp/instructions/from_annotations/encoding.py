"""Windows of large scenes with their part of the annotation, and encoded images for rows."""

import io
import warnings
from functools import lru_cache
from pathlib import Path

import rasterio
from PIL import Image, UnidentifiedImageError
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

from ...data.annotations import AnnotatedImage
from ...image_decoding import is_reduced
from ...images.reading import Window, is_dicom_file, is_tiff, open_raster, read_errors, read_picture

PNG_TYPES = {  # Bands and dtype of TIFFs that PNG can store.
    (1, "uint8"),
    (3, "uint8"),
    (1, "uint16"),
}
JPEG_QUALITY = 95


def image_bytes(image: AnnotatedImage) -> list[dict]:
    """Return the encoded files of an image for `datasets`; a window is encoded again.

    The window of a JPEG is a JPEG. The window of a TIFF is a TIFF if PNG cannot store its bands or depth. Other windows
    are PNGs. Slices of DICOM files and volumes are stored as PNG, without the metadata about the patient.
    """
    return [encode_file(image, path) for path in image.paths]


def encode_file(image: AnnotatedImage, path: Path) -> dict:
    """Return one of the files of an image, see [`image_bytes`]."""
    is_stored_image = image.window is None and image.picture is None
    if is_stored_image and not is_dicom_file(path):
        return {"bytes": path.read_bytes(), "path": path.name}
    if image.window is not None and is_tiff(path):
        content = tiff_window(path, image.window)
        if content is not None:
            return {"bytes": content, "path": f"{path.stem}.tif"}
    picture, is_jpeg = scene_of(image, path)
    if image.window is not None:
        picture = picture.crop(image.window)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG" if is_jpeg else "PNG", quality=JPEG_QUALITY)
    if image.picture is None:
        stem = path.stem
    else:
        stem = image.id.replace("/", "_")
    suffix = "jpg" if is_jpeg else "png"
    return {"bytes": buffer.getvalue(), "path": f"{stem}.{suffix}"}


def tiff_window(path: Path, window: Window) -> bytes | None:
    """Return a window of a TIFF as TIFF, or `None` if PNG can store the window and Pillow can decode the file."""
    x0, y0, x1, y1 = window
    with read_errors(path), open_raster(path) as scene, rasterio.MemoryFile() as memory, warnings.catch_warnings():
        dtype = scene.dtypes[0]
        if (scene.count, dtype) in PNG_TYPES and opens(path):
            return None
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(
            driver="GTiff",
            height=y1 - y0,
            width=x1 - x0,
            count=scene.count,
            dtype=dtype,
            nodata=scene.nodata,
            compress="deflate",
        ) as file:
            file.colorinterp = scene.colorinterp  # by default, GDAL marks a fourth 8-bit band as transparency
            pixels = scene.read(window=((y0, y1), (x0, x1)))
            file.write(pixels)
            file.descriptions = scene.descriptions
            if ColorInterp.palette in scene.colorinterp:
                file.write_colormap(1, scene.colormap(1))
        return memory.read()


def opens(path: Path) -> bool:
    """Return whether Pillow can decode a TIFF: its type is supported and the image is not too large."""
    try:
        with Image.open(path):
            return True
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return False


def scene_of(image: AnnotatedImage, path: Path) -> tuple[Image.Image, bool]:
    """Return the Pillow image of the whole scene, and whether it is a JPEG."""
    if image.picture is not None:
        return image.picture(), False
    return open_scene(path)


@lru_cache(maxsize=1)
def open_scene(path: Path) -> tuple[Image.Image, bool]:
    """Decode a scene, which is cached for the next window, and return it with whether it is a JPEG."""
    with read_errors(path):
        if is_dicom_file(path):
            return read_picture(path.read_bytes()), False
        with Image.open(path) as scene:
            if is_reduced(scene, bands=True):
                raise ValueError(
                    f"{path} has more bits or bands than Pillow keeps. Collages need 8-bit RGB. For windows, convert "
                    "the image to TIFF, for example with gdal_translate."
                )
            scene.load()
            return scene, scene.format == "JPEG"
