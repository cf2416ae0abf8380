"""Embeddings of images and of the windows of large images, stored as Parquet with their footprints (GeoParquet)."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine, AffineTransformer, GCPTransformer
from rasterio.warp import transform
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..image_decoding import open_raster
from ..images.large import RowFile, appears_whole, chosen_bands, file_stamp, has_gaps, part_path, ranged, weights_digest
from ..images.pixels import to_pixels
from ..images.reading import (
    IMAGE_SUFFIXES,
    Window,
    check_upright,
    image_files,
    is_dicom_file,
    is_tiff,
    read_errors,
    read_image,
    stored_size,
    windows,
)
from ..input_spec import InputSpec
from .backbones import Backbone, Preprocessing, collate_pixels

GROUP = 4096  # Number of images in a row group of the file, and in memory when the file is written.
WGS84 = "OGC:CRS84"  # Longitude and latitude, the CRS of geometries if the images differ in CRS.
POLYGON = np.dtype([("order", "u1"), ("head", "<u4", 3), ("ring", "<f8", (5, 2))])  # WKB of a polygon of four corners.

logger = logging.getLogger(__name__)
windows_of = lru_cache(maxsize=4)(windows)


@dataclass(eq=False)
class ImageFile:
    """Image file with its georeference.

    Args:
        path: path of the file.
        size: height and width in pixels.
        crs: CRS of the georeference as `AUTHORITY:CODE` or WKT, or `None`.
        ground: affine transform or ground control points of the georeference, or `None`.
        is_masked: whether the file may have pixels without data.
    """

    path: Path
    size: tuple[int, int]
    crs: str | None = None
    ground: Affine | list | None = None
    is_masked: bool = False

    @classmethod
    def open(cls, path: Path, spec: InputSpec) -> "ImageFile":
        """Read the header of a file.

        Raises:
            ValueError: If the header cannot be read, or a georeferenced image is not stored upright.
        """
        file = cls(path, stored_size(path))
        if is_dicom_file(path):
            return file
        with open_raster(path) as image:
            points, crs = image.gcps
            crs = crs if points else image.crs
            if points or not image.transform.is_identity:
                file.crs, file.ground = crs.to_string() if crs else None, points or image.transform
            file.is_masked = is_tiff(path) and has_gaps(image, chosen_bands(image, spec))
        if file.ground is not None:
            check_upright(path)
        return file

    def corners(self, areas: np.ndarray) -> np.ndarray:
        """Return the corners of windows in the CRS of the image, float64 `(windows, 4, 2)`, from windows in pixels."""
        is_affine = isinstance(self.ground, Affine)
        columns, rows = areas[:, [0, 2, 2, 0]], areas[:, [3, 3, 1, 1]]  # Counterclockwise if north is up.
        with AffineTransformer(self.ground) if is_affine else GCPTransformer(self.ground) as transformer:
            return np.stack(transformer.xy(rows.ravel(), columns.ravel(), offset="ul"), -1).reshape(-1, 4, 2)


class ImageWindows(Dataset):
    """Data set of the inputs of a backbone: images, and the windows of images that are larger than a window.

    An item is float32 `(channels, height, width)`, an error message if the image cannot be read, or `None` for a window
    without data.

    Args:
        files: image files.
        window, stride: side and stride of the windows in pixels; `None` for whole images.
        spec: input spec of the images.
        preprocessing: preprocessing of the backbone.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        window: int | None,
        stride: int | None,
        spec: InputSpec | None,
        preprocessing: Preprocessing,
    ):
        self.files, self.window, self.stride, self.spec = files, window, stride, spec
        self.preprocessing = preprocessing
        self.ends = np.cumsum([len(self.windows(file)) for file in files])

    def windows(self, file: ImageFile) -> list[Window | None]:
        return [None] if self.window is None else windows_of(file.size, self.window, self.window - self.stride)

    def locate(self, index: int) -> tuple[ImageFile, Window | None]:
        """Return the file of an item, and its window unless it is the whole image."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.files[number], self.windows(self.files[number])[index - self.ends[number]]  # Counted from the end.

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.files else 0

    def __getitem__(self, index: int) -> torch.Tensor | str | None:
        file, window = self.locate(index)
        try:
            with read_errors(file.path):
                if window is not None and file.is_masked and not has_data(file.path, window):
                    return None
                picture = read_image(file.path, window, self.spec)
                return self.preprocessing(to_pixels(picture, ranged(self.spec, file.path, window is not None)))
        except ValueError as error:
            return str(error)


def has_data(path: Path, window: Window) -> bool:
    left, top, right, bottom = window
    with open_raster(path) as image:
        return bool(image.dataset_mask(window=((top, bottom), (left, right))).any())


def collate(items: list[torch.Tensor | str | None]) -> tuple[torch.Tensor | None, np.ndarray, list[str]]:
    """Return the pixels of a batch, which items have pixels, and the error messages of the others."""
    pixels = [item for item in items if isinstance(item, torch.Tensor)]
    is_read = np.array([isinstance(item, torch.Tensor) for item in items])
    errors = [item for item in items if isinstance(item, str)]
    return collate_pixels(pixels)["pixel_values"] if pixels else None, is_read, errors


def embed_images(
    backbone: Backbone,
    images: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    window: int | None = None,
    stride: int | None = None,
    pooling: str = "mean",
    image_size: int | None = None,
    input_spec: dict | None = None,
    dtype: str = "float32",
    batch_size: int = 32,
    num_workers: int = 0,
    bad_images: str = "raise",
    root: str | os.PathLike | None = None,
) -> int:
    """Embed images, or the windows of large images, and write a Parquet file with a row for each.

    Finished batches are written to `output` + `.part`. If a run is killed and started again with the same arguments, it
    resumes after the last finished batch and writes the same file, byte for byte, if the operations of the device are
    deterministic. Memory does not depend on the number of windows. The file appears under its name when it is complete.

    Args:
        backbone: backbone, see [`~modeling_vitp.probing.backbones.load_backbone`].
        images: image files, and folders whose image files are read in sorted order, also in subfolders.
        output: path of the file to write (`.parquet`). Its columns are `path`; the window in pixels as `col_off`,
            `row_off`, `width` and `height`; and `embedding`. If any image is georeferenced, the file is GeoParquet 1.0
            and also has the bounds `xmin`, `ymin`, `xmax` and `ymax` in the CRS of the image, its `crs`, and
            `geometry`, the polygon of the window. The CRS of the geometries is that of the images, or longitude and
            latitude if the images differ in CRS.
        window: side in pixels of the windows that larger images are cut into. Default: images are not cut.
        stride: stride of the windows in pixels. The last window of a row or column ends at the border. Default: the
            window.
        pooling: feature of an image, see [`~modeling_vitp.probing.backbones.Backbone.pool`].
        image_size: side in pixels of the square that images and windows are resized to, see
            [`~modeling_vitp.probing.backbones.Preprocessing`].
        input_spec: input spec of images that are not 8-bit RGB. Default: that of the backbone. With `percentiles`, all
            windows of an image have the window of the whole image.
        dtype: dtype of the stored embeddings, `float32` or `float16`.
        batch_size: number of images per batch.
        num_workers: number of processes that read images.
        bad_images: `"raise"` raises an error for an image that cannot be read; `"skip"` logs and leaves it out.
        root: folder that the column `path` is relative to. Default: paths as they are given.

    Returns:
        Number of rows. Windows without data (nodata value, mask, or alpha of 0) have no row.

    Raises:
        ValueError: If `output` has a wrong suffix, the stride is not in [1, window], no image is found, an image cannot
            be read, features are not finite, or an unfinished run had different arguments.
        FileExistsError: If `output` exists.
    """
    output = Path(output)
    if output.suffix != ".parquet":
        raise ValueError(f"Expected an output with the suffix .parquet, got {output}.")
    stride = window if stride is None else stride
    if stride is not None and not 1 <= stride <= (window or 0):
        raise ValueError(f"`stride` must be at least 1 and at most the window, got {stride=} and {window=}.")
    if image_size is not None:
        backbone.in_patches(image_size)
    part = part_path([output])
    spec = backbone.reading(input_spec)
    fields = InputSpec.from_dict(spec)

    def report(message: str) -> None:
        if bad_images == "raise":
            remedy = "Repair or remove the file, or set `bad_images` to 'skip' to leave it out."
            raise ValueError(f"{message.rstrip('.')}. {remedy}")
        logger.warning("Skipping an image: %s", message)

    files = []
    for path in tqdm(find_images(images), unit="file", desc="Reading headers", leave=False):
        try:
            files.append(ImageFile.open(path, fields))
        except ValueError as error:
            report(str(error))
    preprocessing = Preprocessing(backbone.image_processor, image_size)
    data = ImageWindows(files, window, stride, None if spec is None else fields, preprocessing)
    for item in (data[index] for index in range(len(data))):  # The first readable image gives the width.
        if isinstance(item, torch.Tensor):
            width = backbone.pool(item[None], pooling).shape[1]
            break
        if item is not None and bad_images == "raise":
            report(item)
    else:
        raise ValueError("None of the images can be read, or all of their windows are without data.")

    settings = {"model": backbone.name, "revision": backbone.revision, "pooling": pooling, "image_size": image_size}
    settings |= {"window": window, "stride": stride, "input_spec": spec}
    made_of = settings | {
        "images": hashlib.sha256(json.dumps([file_stamp(file.path) for file in files]).encode()).hexdigest(),
        "model": weights_digest(backbone.model),
        "model_dtype": str(backbone.model.dtype),
        "image processor": backbone.image_processor.to_json_string(),
        "dtype": dtype,
        "batch_size": batch_size,
    }
    shape = (width * np.dtype(dtype).itemsize,)
    with ExitStack() as stack:
        rows = stack.enter_context(RowFile(part, shape, made_of))
        progress = stack.enter_context(tqdm(total=len(data), initial=len(rows), unit="image", desc=output.name))
        done = len(rows) // batch_size * batch_size  # Features depend slightly on the batch, so batches are whole.
        remaining = Subset(data, range(done, len(data)))
        for pixels, is_read, errors in DataLoader(remaining, batch_size, num_workers=num_workers, collate_fn=collate):
            for message in errors:
                report(message)
            values = np.full((len(is_read), width), np.nan, dtype)  # A row of NaN is left out of the file.
            if pixels is not None:
                with np.errstate(over="ignore"):
                    values[is_read] = backbone.pool(pixels, pooling).cpu().numpy()
            if not np.isfinite(values[is_read]).all():
                raise ValueError(
                    f"Features of {backbone.name} are not finite in {dtype} in the batch that begins with "
                    f"{data.locate(done)[0].path}. Use float32 for the model and the embeddings."
                )
            new = values[len(rows) - done :]
            rows.append(new.view(np.uint8))
            progress.update(len(new))
            done += len(values)
        with appears_whole(output) as unfinished:
            number = write_parquet(unfinished, data, rows, width, dtype, settings, root)
    rows.delete()
    return number


def find_images(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Return files, and the image files of folders and their subfolders.

    Raises:
        ValueError: If a folder has no image files.
    """
    found = []
    for path in map(Path, paths):
        files = image_files(path) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"No image files found in {path}. Expected {', '.join(sorted(IMAGE_SUFFIXES))}.")
        found += files
    return found


def write_parquet(
    path: Path,
    data: ImageWindows,
    rows: RowFile,
    width: int,
    dtype: str,
    settings: dict,
    root: str | os.PathLike | None,
) -> int:
    """Write the rows of all items that were read, in row groups, and return their number."""
    metadata, crs = {"vitp": json.dumps(settings)}, None
    fields = [("path", pa.string())] + [(name, pa.int32()) for name in ("col_off", "row_off", "width", "height")]
    grounded = [file for file in data.files if file.ground is not None]
    if grounded:
        fields += [(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")]
        fields += [("crs", pa.string()), ("geometry", pa.binary())]
        names = {file.crs for file in grounded} - {None}
        crs = WGS84 if len(names) > 1 else next(iter(names), None)
        column = {"encoding": "WKB", "geometry_types": ["Polygon"]}
        column["crs"] = None if crs is None else CRS.from_string(crs).to_dict(projjson=True)
        geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": column}}
        metadata["geo"] = json.dumps(geo)
    fields.append(("embedding", pa.list_(pa.from_numpy_dtype(dtype), width)))
    schema, number = pa.schema(fields, metadata), 0
    with pq.ParquetWriter(path, schema, use_dictionary=["path", "crs"]) as writer:
        for first, stored in rows.read(GROUP):
            values = stored.view(dtype)
            kept = np.flatnonzero(~np.isnan(values[:, 0]))
            if not len(kept):
                continue
            located = [data.locate(first + index) for index in kept]
            areas = np.array([window or (0, 0, *file.size[::-1]) for file, window in located])
            paths = [file.path if root is None else os.path.relpath(file.path, root) for file, _ in located]
            columns = [list(map(str, paths)), *areas[:, :2].T, *(areas[:, 2:] - areas[:, :2]).T]
            if grounded:
                columns += zip(*footprints([file for file, _ in located], areas, crs))
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema)]
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values[kept].ravel()), width))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            number += len(kept)
    return number


def footprints(files: Sequence[ImageFile], areas: np.ndarray, crs: str | None) -> Iterator[tuple]:
    """Yield the bounds of windows and their CRS as in the image, and their polygons in `crs` as WKB."""
    first = 0
    for file, group in groupby(files):
        last = first + len(list(group))
        if file.ground is None:
            yield from [(None,) * 6] * (last - first)
        else:
            corners = file.corners(areas[first:last])
            bounds = np.concatenate([corners.min(1), corners.max(1)], 1).tolist()
            if file.crs not in (crs, None):
                corners = np.stack(transform(file.crs, crs, *corners.reshape(-1, 2).T)[:2], -1).reshape(corners.shape)
            polygons = np.zeros(len(corners), POLYGON)
            polygons["order"], polygons["head"] = 1, (3, 1, 5)  # Little endian; a polygon of one ring of five points.
            polygons["ring"] = np.concatenate([corners, corners[:, :1]], 1)
            for bound, polygon in zip(bounds, polygons):
                yield *bound, file.crs, polygon.tobytes() if file.crs or crs is None else None
        first = last


__all__ = ["embed_images"]
