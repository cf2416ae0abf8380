"""Embeddings of images and of the windows of large images, stored as Parquet with their footprints (GeoParquet)."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import torch
from rasterio.crs import CRS
from rasterio.transform import Affine, AffineTransformer, GCPTransformer
from rasterio.warp import transform
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..command.paths import Shard
from ..data.geodata import split_at_antimeridian
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
from ..images.seen import report_images
from ..input_spec import InputSpec
from .backbones import Backbone, Preprocessing, collate_pixels

GROUP = 4096  # Number of images in a row group of the file, and in memory when the file is written.
WGS84 = "OGC:CRS84"  # Longitude and latitude, the CRS of geometries if the images differ in CRS.
POLYGON = np.dtype([("order", "u1"), ("head", "<u4", 3), ("ring", "<f8", (5, 2))])  # WKB of a polygon of four corners.
EDGE_SHARES = np.arange(16)[:, None] / 16  # Positions on an edge, between which no longitude changes by 180 degrees.

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
            if not points:
                crs = image.crs
            if points or not image.transform.is_identity:
                file.crs = crs.to_string() if crs else None
                file.ground = points or image.transform
            file.is_masked = is_tiff(path) and has_gaps(image, chosen_bands(image, spec))
        if file.ground is not None:
            check_upright(path)
        return file

    def corners(self, areas: np.ndarray) -> np.ndarray:
        """Return the corners of windows in the CRS of the image, float64 `(windows, 4, 2)`, from windows in pixels."""
        # Bottom left, bottom right, top right, top left: counterclockwise if north is up.
        columns = areas[:, [0, 2, 2, 0]].ravel()
        rows = areas[:, [3, 3, 1, 1]].ravel()
        transformer_class = AffineTransformer if isinstance(self.ground, Affine) else GCPTransformer
        with transformer_class(self.ground) as transformer:
            x, y = transformer.xy(rows, columns, offset="ul")
        return np.stack([x, y], axis=-1).reshape(-1, 4, 2)


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
        self.files = files
        self.window = window
        self.stride = stride
        self.spec = spec
        self.preprocessing = preprocessing
        # Index after the last item of each file.
        self.ends = np.cumsum([len(self.windows(file)) for file in files])

    def windows(self, file: ImageFile) -> list[Window | None]:
        if self.window is None:
            return [None]
        return windows_of(file.size, self.window, self.window - self.stride)

    def locate(self, index: int) -> tuple[ImageFile, Window | None]:
        """Return the file of an item, and its window unless it is the whole image."""
        file_index = int(np.searchsorted(self.ends, index, side="right"))
        file = self.files[file_index]
        index_from_end = index - self.ends[file_index]
        return file, self.windows(file)[index_from_end]

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.files else 0

    def __getitem__(self, index: int) -> torch.Tensor | str | None:
        file, window = self.locate(index)
        try:
            with read_errors(file.path):
                if window is not None and file.is_masked and not has_data(file.path, window):
                    return None
                picture = read_image(file.path, window, self.spec)
                spec = ranged(self.spec, file.path, is_part=window is not None)
                return self.preprocessing(to_pixels(picture, spec))
        except ValueError as error:
            return str(error)


def has_data(path: Path, window: Window) -> bool:
    left, top, right, bottom = window
    rows_and_columns = ((top, bottom), (left, right))
    with open_raster(path) as image:
        mask = image.dataset_mask(window=rows_and_columns)
    return bool(mask.any())


def collate(items: list[torch.Tensor | str | None]) -> tuple[torch.Tensor | None, np.ndarray, list[str]]:
    """Return the pixels of a batch, which items have pixels, and the error messages of the others."""
    images = []
    errors = []
    is_read = []
    for item in items:
        is_read.append(isinstance(item, torch.Tensor))
        if isinstance(item, torch.Tensor):
            images.append(item)
        elif item is not None:
            errors.append(item)
    pixels = collate_pixels(images)["pixel_values"] if images else None
    return pixels, np.array(is_read), errors


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
    shard: Shard | None = None,
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
        shard: part of the batches to embed, such as `Shard(3, 8)`. Its embeddings are stored beside `output`. When all
            shards are finished, the same call without a shard writes `output`.

    Returns:
        Number of rows, or of embeddings of the shard. Windows without data (nodata value, mask, or alpha of 0) have no
        row.

    Raises:
        ValueError: If `output` has a wrong suffix, the stride is not in [1, window], no image is found, an image cannot
            be read, features are not finite, an unfinished run had different arguments, or a shard is not finished.
        FileExistsError: If `output` exists.
        RunStopped: If another run writes `output`, or the shard.
    """
    output = Path(output)
    stride = check_embedding(backbone, output, window, stride, image_size)
    part_path([output])  # Raises an error before the computation starts.
    spec = backbone.reading(input_spec)
    fields = InputSpec.from_dict(spec)
    files = open_files(images, fields, bad_images)
    report_images(len(files), lambda index: files[index].path, None if spec is None else fields)
    data = ImageWindows(
        files,
        window,
        stride,
        None if spec is None else fields,
        Preprocessing(backbone.image_processor, image_size),
    )
    width = embedding_width(backbone, data, pooling, bad_images)
    settings = {
        "model": backbone.name,
        "revision": backbone.revision,
        "pooling": pooling,
        "image_size": image_size,
        "window": window,
        "stride": stride,
        "input_spec": spec,
    }
    made_of = {**settings, **digests_of(backbone, files), "dtype": dtype, "batch_size": batch_size}
    bytes_per_row = width * np.dtype(dtype).itemsize
    # Features depend slightly on the batch, so a shard has whole batches.
    with RowFile([output], made_of, len(data), shard, unit=batch_size, shape=(bytes_per_row,)) as rows:
        append_embeddings(
            rows,
            data,
            backbone,
            pooling=pooling,
            width=width,
            dtype=dtype,
            batch_size=batch_size,
            num_workers=num_workers,
            bad_images=bad_images,
            description=output.name,
        )
        if shard is not None:
            return len(rows)
        with appears_whole(output) as unfinished:
            number = write_parquet(unfinished, data, rows, width, dtype, settings, root)
        rows.delete()
    return number


def check_embedding(
    backbone: Backbone,
    output: Path,
    window: int | None,
    stride: int | None,
    image_size: int | None,
) -> int | None:
    """Return the stride of the windows. Raise a `ValueError` if an argument of [`embed_images`] is wrong."""
    if output.suffix != ".parquet":
        raise ValueError(f"Expected an output with the suffix .parquet, got {output}.")
    stride = window if stride is None else stride
    if stride is not None and not 1 <= stride <= (window or 0):
        raise ValueError(f"`stride` must be at least 1 and at most the window, got {stride=} and {window=}.")
    if image_size is not None:
        backbone.in_patches(image_size)
    return stride


def digests_of(backbone: Backbone, files: Sequence[ImageFile]) -> dict[str, str]:
    """Return what embeddings depend on beside the settings, which must not change when a run is resumed."""
    stamps = [file_stamp(file.path) for file in files]
    return {
        "images": hashlib.sha256(json.dumps(stamps).encode()).hexdigest(),
        "model": weights_digest(backbone.model),
        "model_dtype": str(backbone.model.dtype),
        "image processor": backbone.image_processor.to_json_string(),
    }


def report_bad_image(message: str, bad_images: str) -> None:
    """Raise an error for an image that cannot be read, or log that it is left out."""
    if bad_images == "raise":
        remedy = "Repair or remove the file, or set `bad_images` to 'skip' to leave it out."
        raise ValueError(f"{message.rstrip('.')}. {remedy}")
    logger.warning("Skipping an image: %s", message)


def open_files(images: Sequence[str | os.PathLike], spec: InputSpec, bad_images: str) -> list[ImageFile]:
    """Return the images whose headers can be read, and report the others."""
    files = []
    for path in tqdm(find_images(images), unit="file", desc="Reading headers", leave=False):
        try:
            files.append(ImageFile.open(path, spec))
        except ValueError as error:
            report_bad_image(str(error), bad_images)
    return files


def embedding_width(backbone: Backbone, data: ImageWindows, pooling: str, bad_images: str) -> int:
    """Return the number of features of an image, which the first readable image gives.

    Raises:
        ValueError: If no image can be read.
    """
    for index in range(len(data)):
        item = data[index]
        if isinstance(item, torch.Tensor):
            features = backbone.pool(item[None], pooling)
            return features.shape[1]
        if item is not None and bad_images == "raise":  # Skipped images are logged when all images are read.
            report_bad_image(item, bad_images)
    raise ValueError("None of the images can be read, or all of their windows are without data.")


def append_embeddings(
    rows: RowFile,
    data: ImageWindows,
    backbone: Backbone,
    pooling: str,
    width: int,
    dtype: str,
    batch_size: int,
    num_workers: int,
    bad_images: str,
    description: str,
) -> None:
    """Append the embeddings of all items that are not yet in the file. The row of an item without pixels is NaN."""
    # Features depend slightly on the batch, so a batch that was written in part is embedded again as a whole.
    num_embedded = len(rows) // batch_size * batch_size
    remaining = Subset(data, rows.indices[num_embedded:])
    loader = DataLoader(remaining, batch_size, num_workers=num_workers, collate_fn=collate)
    with tqdm(total=len(rows.indices), initial=len(rows), unit="image", desc=description) as progress:
        for pixels, is_read, errors in loader:
            for message in errors:
                report_bad_image(message, bad_images)
            embeddings = np.full((len(is_read), width), np.nan, dtype)
            if pixels is not None:
                with np.errstate(over="ignore"):
                    embeddings[is_read] = backbone.pool(pixels, pooling).cpu().numpy()
            if not np.isfinite(embeddings[is_read]).all():
                file, _ = data.locate(rows.indices[num_embedded])
                raise ValueError(
                    f"Features of {backbone.name} are not finite in {dtype} in the batch that begins with "
                    f"{file.path}. Use float32 for the model and the embeddings."
                )
            missing_embeddings = embeddings[len(rows) - num_embedded :]
            rows.append(missing_embeddings.view(np.uint8))
            progress.update(len(missing_embeddings))
            num_embedded += len(embeddings)


def find_images(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Return files, and the image files of folders and their subfolders.

    Raises:
        ValueError: If a folder has no image files.
    """
    files = []
    for path in map(Path, paths):
        files_of_path = image_files(path) if path.is_dir() else [path]
        if not files_of_path:
            raise ValueError(f"No image files found in {path}. Expected {', '.join(sorted(IMAGE_SUFFIXES))}.")
        files += files_of_path
    return files


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
    georeferenced_files = [file for file in data.files if file.ground is not None]
    has_geometry = bool(georeferenced_files)
    crs = common_crs(georeferenced_files)
    schema = table_schema(settings, width, dtype, has_geometry, crs)
    num_rows = 0
    with pq.ParquetWriter(path, schema, use_dictionary=["path", "crs"]) as writer:
        for first, stored_rows in rows.read(GROUP):
            embeddings = stored_rows.view(dtype)
            indices = np.flatnonzero(~np.isnan(embeddings[:, 0]))
            if not len(indices):
                continue
            files = []
            areas = []
            for index in indices:
                file, window = data.locate(first + index)
                height, width_of_file = file.size
                files.append(file)
                areas.append(window or (0, 0, width_of_file, height))
            areas = np.array(areas)
            columns = columns_of(files, areas, root)
            if has_geometry:
                columns += zip(*footprints(files, areas, crs))
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema)]
            flat_embeddings = pa.array(embeddings[indices].ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat_embeddings, width))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            num_rows += len(indices)
    return num_rows


def common_crs(files: Sequence[ImageFile]) -> str | None:
    """Return the CRS of the geometries: that of the images, or longitude and latitude if they differ in CRS."""
    names = {file.crs for file in files} - {None}
    if not names:
        return None
    if len(names) > 1:
        return WGS84
    return names.pop()


@lru_cache
def is_geographic(crs: str | None) -> bool:
    return crs is not None and CRS.from_string(crs).is_geographic


def table_schema(settings: dict, width: int, dtype: str, has_geometry: bool, crs: str | None) -> pa.Schema:
    """Return the columns of the file with their types, and its metadata, as described in [`embed_images`]."""
    metadata = {"vitp": json.dumps(settings)}
    fields = [("path", pa.string())]
    for name in ("col_off", "row_off", "width", "height"):
        fields.append((name, pa.int32()))
    if has_geometry:
        for name in ("xmin", "ymin", "xmax", "ymax"):
            fields.append((name, pa.float64()))
        fields.append(("crs", pa.string()))
        fields.append(("geometry", pa.binary()))
        geometry = {
            "encoding": "WKB",
            "geometry_types": ["Polygon", "MultiPolygon"] if is_geographic(crs) else ["Polygon"],
            "crs": None if crs is None else CRS.from_string(crs).to_dict(projjson=True),
        }
        geo = {
            "version": "1.0.0",
            "primary_column": "geometry",
            "columns": {"geometry": geometry},
        }
        metadata["geo"] = json.dumps(geo)
    fields.append(("embedding", pa.list_(pa.from_numpy_dtype(dtype), width)))
    return pa.schema(fields, metadata)


def columns_of(files: Sequence[ImageFile], areas: np.ndarray, root: str | os.PathLike | None) -> list[Sequence]:
    """Return the paths, and the offsets and sizes of the windows."""
    paths = []
    for file in files:
        path = file.path if root is None else os.path.relpath(file.path, root)
        paths.append(str(path))
    left, top, right, bottom = areas.T
    return [paths, left, top, right - left, bottom - top]


def footprints(files: Sequence[ImageFile], areas: np.ndarray, crs: str | None) -> Iterator[tuple]:
    """Yield the bounds of windows and their CRS as in the image, and their polygons in `crs` as WKB."""
    first = 0
    for file, group in groupby(files):
        num_windows = len(list(group))
        areas_of_file = areas[first : first + num_windows]
        first += num_windows
        if file.ground is None:
            no_footprint = (None,) * 6
            yield from [no_footprint] * num_windows
            continue
        corners = file.corners(areas_of_file)
        bounds = np.concatenate([corners.min(1), corners.max(1)], axis=1).tolist()
        polygons = [None] * num_windows
        if file.crs is not None or crs is None:
            polygons = polygons_of(corners, file.crs, crs)
        for bounds_of_window, polygon in zip(bounds, polygons):
            yield *bounds_of_window, file.crs, polygon


def transformed(points: np.ndarray, source: str | None, crs: str | None) -> np.ndarray:
    """Return points, of shape `(…, 2)`, from one CRS in another."""
    if source == crs:
        return points
    x, y, *_ = transform(source, crs, points[..., 0].ravel(), points[..., 1].ravel())
    return np.stack([x, y], axis=-1).reshape(points.shape)


def polygons_of(corners: np.ndarray, source: str | None, crs: str | None) -> list[bytes]:
    """Return polygons with four corners each, `(polygons, 4, 2)` in the CRS `source`, in another CRS as WKB."""
    corners_in_crs = transformed(corners, source, crs)
    polygons = np.zeros(len(corners), POLYGON)
    polygons["order"] = 1  # Little endian.
    polygons["head"] = (3, 1, 5)  # A polygon of one ring of five points.
    polygons["ring"] = np.concatenate([corners_in_crs, corners_in_crs[:, :1]], axis=1)
    contents = [polygon.tobytes() for polygon in polygons]
    if not is_geographic(crs):
        return contents
    longitudes = corners_in_crs[..., 0]
    crosses = np.abs(longitudes).max(axis=1) > 180
    is_wrapped = source != crs
    if is_wrapped:
        crosses |= np.ptp(longitudes, axis=1) > 180
    for index in np.flatnonzero(crosses):
        starts = corners[index][:, None]
        ends = np.roll(starts, -1, axis=0)
        outline = (starts + EDGE_SHARES * (ends - starts)).reshape(-1, 2)
        polygon = shapely.Polygon(transformed(outline, source, crs))
        contents[index] = shapely.to_wkb(split_at_antimeridian(polygon, is_wrapped))
    return contents


__all__ = ["embed_images"]
