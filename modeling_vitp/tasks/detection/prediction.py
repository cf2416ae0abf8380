"""Detection in images of any size, with GeoJSON, COCO and DOTA submission files as output."""

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
import shapely.geometry
import torch
from rasterio.features import shapes
from rasterio.io import DatasetReader
from rasterio.transform import AffineTransformer, GCPTransformer
from rasterio.warp import transform_geom
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from ...command.paths import Shard
from ...data.geodata import split_at_antimeridian
from ...data.windows import areas
from ...detection_boxes import nms_by_label
from ...image_processing_vitp_detection import ViTPDetectionImageProcessor, mask_of
from ...images.large import LargeImage, LineFile, appears_whole, file_stamp, open_images, part_path, weights_digest
from ...images.reading import Window, window_starts
from ...images.seen import report_images
from ...input_spec import InputSpec
from ...rotated_boxes import intersections, rectangles, rotated_nms, smallest_rectangles
from .arguments import DotaSubmission

if TYPE_CHECKING:
    from .data import DetectionData, ObjectImages
    from .trainer import ViTPDetectionTrainer

# Detected object: `label`, `score`, `box` (x1, y1, x2, y2) or `corners` (four x, y) in pixels of the image, and
# `polygons` for instances.
Detection = dict[str, Any]
# Outline and holes, each a closed ring of x, y.
Polygon = list[list[list[float]]]

WINDOW = 1024  # Default window for image processors that do not resize.
NMS_THRESHOLD = 0.5  # Default for models without an NMS threshold, such as those of transformers.
CUT_SHARE = 0.7  # An object that a window border cuts is dropped if another object covers this share of it.
OUTWARDS = (-1, -1, 1, 1)  # Signs of the outward direction at the left, top, right and bottom side of a box.

WGS84 = "EPSG:4326"
DECIMALS = 9  # Of coordinates, a tenth of a millimeter if they are degrees.
PIXEL_DECIMALS, SCORE_DECIMALS = 3, 6


def outline(detection: Detection) -> list[Polygon]:
    """Return the polygons of the mask of an object, or the polygon of its box."""
    if "polygons" in detection:
        return detection["polygons"]
    if "corners" in detection:
        corners = detection["corners"]
    else:
        x1, y1, x2, y2 = detection["box"]
        corners = [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
    ring = [*corners, corners[0]]
    return [[ring]]


def polygons_of(mask: np.ndarray) -> list[Polygon]:
    """Return the outlines of the connected parts of a mask, along pixel edges.

    Parts that touch at a corner only are separate.

    Args:
        mask: bool of shape `(height, width)`.
    """
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    # Only the rectangle around the object is searched, because most masks are far larger than their object.
    top = int(rows[0])
    left = int(columns[0])
    mask = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    polygons = []
    for geometry, _ in shapes(mask.astype(np.uint8), mask=mask, connectivity=4):
        rings = [shifted(ring, left, top) for ring in geometry["coordinates"]]
        polygons.append(rings)
    return polygons


def shifted(points: Sequence[Sequence[float]], left: float, top: float) -> list[list[float]]:
    """Return points x, y moved by `left`, `top`."""
    return [[left + x, top + y] for x, y in points]


class Ground:
    """Transform from pixels of an image to GeoJSON coordinates.

    Args:
        image: open image file.

    Attributes:
        coordinate_system: description of the coordinates. They are longitude and latitude if the image has a CRS,
            otherwise the coordinates of the image.

    Raises:
        ValueError: if the coordinates of the image cannot be transformed to longitude and latitude.
    """

    def __init__(self, image: DatasetReader):
        points, points_crs = image.gcps
        if points:
            self.transformer = GCPTransformer(points)
            self.crs = points_crs
        else:
            self.transformer = AffineTransformer(image.transform)
            self.crs = image.crs
        if self.crs:
            self.coordinate_system = f"longitude and latitude on WGS 84 ({WGS84})"
        elif points or not image.transform.is_identity:
            self.coordinate_system = "unknown coordinates of the image, which has no CRS"
        else:
            self.coordinate_system = "pixels of the image, x to the right and y down from the top left corner"
        whole_image = outline({"box": [0, 0, image.width, image.height]})
        try:
            self.geometries([whole_image])
        except Exception as error:  # GDAL raises many error types.
            raise ValueError(
                f"{image.name}: the coordinates cannot be transformed to longitude and latitude ({error}). Use the "
                "suffix .json for COCO output in pixels."
            ) from error

    def geometries(self, outlines: Sequence[list[Polygon]]) -> list[dict[str, Any]]:
        """Convert polygons in pixels to GeoJSON geometries (RFC 7946).

        Outer rings are counterclockwise, holes are clockwise.
        """
        geometries = [self.geometry(polygons) for polygons in outlines]
        if self.crs and geometries:
            geometries = transform_geom(
                self.crs,
                WGS84,
                geometries,
                precision=DECIMALS,
            )
            geometries = [within_180_degrees(geometry) for geometry in geometries]
        return [wind_rings(geometry) for geometry in geometries]

    def geometry(self, polygons: list[Polygon]) -> dict[str, Any]:
        transformed = []
        for polygon in polygons:
            rings = [self.transform(ring) for ring in polygon]
            transformed.append(rings)
        if len(transformed) == 1:
            return {"type": "Polygon", "coordinates": transformed[0]}
        return {"type": "MultiPolygon", "coordinates": transformed}

    def transform(self, ring: list[list[float]]) -> list[list[float]]:
        xs, ys = np.transpose(ring).round(PIXEL_DECIMALS)
        coordinates = self.transformer.xy(ys, xs, offset="ul")
        return np.stack(coordinates, 1).round(DECIMALS).tolist()


def within_180_degrees(geometry: dict[str, Any]) -> dict[str, Any]:
    """Split the polygons at the antimeridian that GDAL does not split: in degrees, and in projections of a pole."""
    parts = []
    is_split = False
    for polygon in shapely.get_parts(shapely.geometry.shape(geometry)):
        west, _, east, _ = polygon.bounds
        if east - west > 180 or west < -180 or east > 180:
            polygon = split_at_antimeridian(polygon, is_wrapped=True)
            is_split = True
        parts.extend(shapely.get_parts(polygon))
    if not is_split:
        return geometry
    polygons = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    return shapely.geometry.mapping(polygons)


def wind_rings(geometry: dict[str, Any]) -> dict[str, Any]:
    """Return a geometry with counterclockwise outer rings and clockwise holes, for y upwards."""
    if geometry["type"] == "Polygon":
        coordinates = wind_polygon(geometry["coordinates"])
    else:
        coordinates = [wind_polygon(rings) for rings in geometry["coordinates"]]
    return {**geometry, "coordinates": coordinates}


def wind_polygon(rings: Sequence[Sequence[Sequence[float]]]) -> list[list[Sequence[float]]]:
    """Return the rings of a polygon, the first one counterclockwise and the holes after it clockwise."""
    wound_rings = []
    for index, ring in enumerate(rings):
        is_hole = index > 0
        x, y = np.transpose(ring)
        doubled_area = (x[:-1] * y[1:] - x[1:] * y[:-1]).sum()  # Positive if the ring is counterclockwise.
        is_counterclockwise = doubled_area > 0
        points = list(ring)
        if is_counterclockwise == is_hole:
            points.reverse()
        wound_rings.append(points)
    return wound_rings


def write_geojson(
    rows: Iterable[list[Detection]],
    image: DatasetReader,
    names: Sequence[str],
    path: Path,
) -> None:
    """Write a GeoJSON file with one feature per object, with the properties `class` and `score`.

    Args:
        rows: detected objects, in several lists.
        image: open image file.
        names: names of the classes.
        path: path of the file to write.
    """
    ground = Ground(image)
    head = {
        "type": "FeatureCollection",
        "name": Path(image.name).stem,
        "coordinate_system": ground.coordinate_system,
    }

    def features() -> Iterator[dict]:
        for row in rows:
            geometries = ground.geometries([outline(detection) for detection in row])
            for detection, geometry in zip(row, geometries):
                properties = {
                    "class": names[detection["label"]],
                    "score": round(detection["score"], SCORE_DECIMALS),
                }
                yield {
                    "type": "Feature",
                    "properties": properties,
                    "geometry": geometry,
                }

    write_list(path, head, "features", features())


def write_coco(
    rows: Iterable[list[Detection]],
    image: DatasetReader,
    names: Sequence[str],
    path: Path,
) -> None:
    """Write a COCO file with a `score` for each annotation.

    `segmentation` has the outlines of the objects, without holes. Oriented boxes also have their `corners`.

    Args:
        rows, image, names, path: see [`write_geojson`].
    """
    image_entry = {
        "id": 1,
        "file_name": Path(image.name).name,
        "width": image.width,
        "height": image.height,
    }
    categories = [{"id": label, "name": name} for label, name in enumerate(names, 1)]
    head = {"images": [image_entry], "categories": categories}

    def annotations() -> Iterator[dict]:
        for annotation_id, detection in enumerate(chain.from_iterable(rows), 1):
            yield coco_annotation(detection, annotation_id)

    write_list(path, head, "annotations", annotations())


def coco_annotation(detection: Detection, annotation_id: int) -> dict[str, Any]:
    """Return the annotation of an object in the COCO format."""
    outer_rings = []
    area = 0
    for polygon in outline(detection):
        ring = np.round(polygon[0][:-1], PIXEL_DECIMALS)  # COCO does not repeat the first point.
        outer_rings.append(ring)
        area += float(areas(ring[None])[0])
    x1, y1, x2, y2 = bounds_of(detection)
    annotation = {
        "id": annotation_id,
        "image_id": 1,
        "category_id": detection["label"] + 1,
        "bbox": np.round([x1, y1, x2 - x1, y2 - y1], PIXEL_DECIMALS).tolist(),
        "area": round(area, PIXEL_DECIMALS),
        "iscrowd": 0,
        "segmentation": [ring.flatten().tolist() for ring in outer_rings],
        "score": round(detection["score"], SCORE_DECIMALS),
    }
    if "corners" in detection:
        annotation["corners"] = outer_rings[0].tolist()
    return annotation


def write_list(
    path: Path,
    head: dict[str, Any],
    name: str,
    items: Iterable[dict],
) -> None:
    """Write a JSON object with a list as its last entry. The items are written one per line, without keeping them."""
    # The closing brace of the head is cut off, so that the list becomes its last entry.
    opening = json.dumps(head, ensure_ascii=False)[:-1]
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{opening}, "{name}": [')
        separator = "\n"
        for item in items:
            file.write(separator)
            file.write(json.dumps(item, ensure_ascii=False, allow_nan=False))
            separator = ",\n"
        file.write("\n]}\n")


WRITERS = {".geojson": write_geojson, ".json": write_coco}


@dataclass(frozen=True)
class WindowSettings:
    """Settings of the detection in the windows of an image, see [`detect_large`]."""

    window: int
    stride: int
    batch_size: int
    threshold: float

    def __post_init__(self):
        if not 1 <= self.stride <= self.window or self.batch_size < 1:
            raise ValueError(
                f"`stride` must be in [1, {self.window}], the window, and `batch_size` at least 1, got "
                f"stride={self.stride}, batch_size={self.batch_size}."
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be in [0, 1], got {self.threshold}.")


@torch.inference_mode()
def detect_large(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    image: str | os.PathLike,
    output: str | os.PathLike,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    threshold: float = 0.3,
    nms_threshold: float | None = None,
    shard: Shard | None = None,
) -> None:
    """Detect the objects in an image of any size, and write a GeoJSON or COCO file.

    Objects are detected in overlapping windows and merged by non-maximum suppression per class, as in the merging of
    DOTA patches. An object that ends at a window border is removed if an object of the same class from another window
    covers it and continues beyond that border. Objects larger than the overlap of the windows may be detected in parts.
    Windows without data are skipped.

    After each row of windows, the detections are written to `output` + `.part`. If a run is killed and started again
    with the same arguments, it resumes after the last finished row and writes the same file, byte for byte, if the
    operations of the device are deterministic. One row of windows and the boxes of all detections are in memory. The
    time for merging grows with the square of the number of detections per class. Bands, bit depths and percentiles are
    handled as in [`~modeling_vitp.tasks.segmentation.prediction.predict_large`].

    Args:
        model: [`ViTPForObjectDetection`], [`ViTPForOrientedObjectDetection`], [`ViTPForInstanceSegmentation`] or one
            of [`~modeling_vitp.tasks.detection.one_stage.DETECTORS`], on the device to use.
        image_processor: image processor of the model. If it resizes, windows are resized to its size, and images
            smaller than a window are resized by the same factor. Image processors of transformers stretch such images
            to the square.
        image: path of an image that GDAL reads (GeoTIFF, PNG, ...).
        output: path of the file to write, with the polygon (of the box, oriented box or mask), class and score of each
            object. `.geojson` (RFC 7946) has longitude and latitude (WGS 84); if the image has no CRS, it has the
            coordinates of the image, which `coordinate_system` in the file describes. `.json` has COCO format in
            pixels.
        window: side of the windows in pixels. Default: the size of the image processor if it resizes, otherwise 1024.
        stride: stride of the windows in pixels. Default: three quarters of the window.
        batch_size: number of windows in one forward pass, all from the same row of windows.
        threshold: score above which objects are written. `score_threshold` of the model also applies.
        nms_threshold: largest IoU of two objects of the same class. Default: the threshold of the model, or 0.5 for
            models of transformers.
        shard: part of the rows of windows to detect, see
            [`~modeling_vitp.tasks.segmentation.prediction.predict_large`].

    Raises:
        ValueError: if `output` has a wrong suffix, the stride is larger than the window or below 1, the image is not
            supported (see [`~modeling_vitp.images.large.open_images`]), its coordinates cannot be transformed to
            longitude and latitude, an unfinished run had different arguments, or a shard is not finished.
        FileExistsError: if `output` exists.
        RunStopped: if another run writes `output`, or the shard.
    """
    path = Path(image)
    output = Path(output)
    if output.suffix not in WRITERS:
        raise ValueError(f"Expected an output with the suffix .geojson, or .json for COCO format, got {output}.")
    part_path([output])  # Raises an error before the computation starts.
    side = resized_side(image_processor)
    window = window or side or WINDOW
    if stride is None:
        stride = max(3 * window // 4, 1)
    settings = WindowSettings(window, stride, batch_size, threshold)
    if nms_threshold is None:
        nms_threshold = getattr(model.config, "nms_threshold", NMS_THRESHOLD)
    if not 0 <= nms_threshold <= 1:
        raise ValueError(f"`nms_threshold` must be in [0, 1], got {nms_threshold}.")
    if isinstance(image_processor, ViTPDetectionImageProcessor):
        reader = image_processor
    else:
        reader = reader_like(image_processor, side)
    model.eval()

    with ExitStack() as stack:
        (source,) = stack.enter_context(open_images([path], reader))
        report_images(1, lambda index: path, InputSpec.from_dict(reader.input_spec))
        if output.suffix == ".geojson":
            Ground(source.dataset)  # Raises an error before the computation starts.
        source_of_rows = {
            "image": file_stamp(path),
            "model": weights_digest(model),
            "image processor": image_processor.to_json_string(),
            **asdict(settings),
            "merging": CUT_SHARE,
        }
        tops = window_starts(source.dataset.height, settings.window, settings.stride)
        rows = stack.enter_context(LineFile([output], source_of_rows, len(tops), shard))
        detect_rows(model, image_processor, source, settings, tops, rows, description=output.name)
        if shard is not None:
            return
        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        write = WRITERS[output.suffix]
        with appears_whole(output) as unfinished_output:
            write(merged(rows, nms_threshold), source.dataset, names, unfinished_output)
        rows.delete()


def detect_rows(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    source: LargeImage,
    settings: WindowSettings,
    tops: list[int],
    rows: LineFile,
    description: str,
) -> None:
    """Append the objects of each row of windows, of which `tops` are the first rows, that `rows` lacks."""
    lefts = window_starts(source.dataset.width, settings.window, settings.stride)
    progress = tqdm(
        total=len(rows.indices) * len(lefts),
        initial=len(rows) * len(lefts),
        unit="window",
        desc=description,
    )
    with progress:
        for index in rows.indices[len(rows) :]:
            row = detect_row(model, image_processor, source, settings, tops[index], lefts)
            rows.append(row)
            progress.update(len(lefts))


def detect_row(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    source: LargeImage,
    settings: WindowSettings,
    top: int,
    lefts: list[int],
) -> list[Detection]:
    """Return the objects in a row of windows, in pixels of the image, with `cut` of [`marked`]."""
    window = settings.window
    detections = []
    for window_lefts, windows in windows_with_data(source, top, lefts, window, settings.batch_size):
        height, width = windows.shape[-2:]
        inputs = source.inputs(windows, **resizing(image_processor, height, width, window))
        objects_of_windows = detect(model, image_processor, inputs, (height, width), settings.threshold)
        for left, window_objects in zip(window_lefts, objects_of_windows):
            area = (left, top, left + window, top + window)
            for detection in window_objects:
                in_image = moved(detection, left, top)
                detections.append(marked(in_image, area, source.dataset.shape))
    return detections


def resizing(
    image_processor: BaseImageProcessor,
    height: int,
    width: int,
    window: int,
) -> dict[str, Any]:
    """Return the options of an image processor that resize a part of an image as they resize a whole window.

    Args:
        image_processor: image processor of the model.
        height, width: size of the part, smaller than a window in images smaller than a window.
        window: side of the windows.
    """
    side = resized_side(image_processor)
    if side is None:
        return {"do_resize": False}
    if not isinstance(image_processor, ViTPDetectionImageProcessor):
        return {"do_resize": True}
    size = {
        "height": max(1, round(height * side / window)),
        "width": max(1, round(width * side / window)),
    }
    return {"do_resize": True, "size": size}


def resized_side(image_processor: BaseImageProcessor) -> int | None:
    """Return the side to which an image processor resizes a square image, or `None` if it does not resize."""
    if not image_processor.do_resize:
        return None
    sides = dict(image_processor.size).values()
    return min(side for side in sides if side)


def reader_like(image_processor: BaseImageProcessor, side: int | None) -> ViTPDetectionImageProcessor:
    """Return an image processor for bands with the pixel values of an image processor of transformers."""
    return ViTPDetectionImageProcessor(
        size={"height": side, "width": side},
        do_rescale=image_processor.do_rescale,
        rescale_factor=image_processor.rescale_factor,
        do_normalize=image_processor.do_normalize,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
        resample=image_processor.resample,
    )


def windows_with_data(
    source: LargeImage,
    top: int,
    lefts: list[int],
    window: int,
    batch_size: int,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield batches of the windows of a row: their left borders, and their pixels `(batch, bands, height, width)`."""
    bottom = min(top + window, source.dataset.height)
    pixels = source.read(top, bottom)
    lefts_with_data = lefts
    if source.is_masked:
        is_empty = source.has_no_data(top, bottom)
        lefts_with_data = []
        for left in lefts:
            if not is_empty[:, left : left + window].all():
                lefts_with_data.append(left)
    for first in range(0, len(lefts_with_data), batch_size):
        batch_lefts = lefts_with_data[first : first + batch_size]
        windows = [pixels[..., left : left + window] for left in batch_lefts]
        yield batch_lefts, torch.cat(windows)


def detect(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    inputs: dict[str, torch.Tensor],
    size: tuple[int, int],
    threshold: float,
) -> list[list[Detection]]:
    """Return the objects of each window of a batch, in pixels of the window. Instances with an empty mask are removed.

    Args:
        model: detector.
        image_processor: image processor of the model.
        inputs: model inputs with `pixel_values` and `pixel_mask`.
        size: height and width of the windows before resizing.
        threshold: score above which objects are returned.
    """
    pixel_values = inputs["pixel_values"].to(model.device, model.dtype)
    pixel_mask = inputs["pixel_mask"].to(model.device)
    outputs = model(pixel_values, pixel_mask)
    sizes = [size] * len(pixel_values)
    processed = post_process(image_processor, outputs, threshold, sizes)
    return [list(objects_of(window_output)) for window_output in processed]


def post_process(
    image_processor: BaseImageProcessor,
    outputs: ModelOutput,
    threshold: float,
    sizes: list[tuple[int, int]],
) -> list[dict[str, Any]]:
    """Return the detections in images of `sizes` `(height, width)` as the image processor does for the task.

    Masks are run lengths, see [`~modeling_vitp.image_processing_vitp_detection.mask_of`].
    """
    if getattr(outputs, "pred_corners", None) is not None:
        return image_processor.post_process_oriented_object_detection(
            outputs,
            threshold,
            target_sizes=sizes,
        )
    if getattr(outputs, "pred_masks", None) is not None:
        return image_processor.post_process_instance_segmentation(
            outputs,
            threshold,
            target_sizes=sizes,
            return_run_lengths=True,
        )
    return image_processor.post_process_object_detection(
        outputs,
        threshold,
        target_sizes=sizes,
    )


def objects_of(window_output: dict[str, Any]) -> Iterator[Detection]:
    """Yield the objects in the post-processed output of a window."""
    labels = window_output["labels"].tolist()
    scores = window_output["scores"].tolist()
    if "corners" in window_output:
        key = "corners"
        places = window_output["corners"].tolist()
    else:
        key = "box"
        places = window_output["boxes"].tolist()
    for index, place in enumerate(places):
        detection = {
            "label": labels[index],
            "score": scores[index],
            key: place,
        }
        if "masks" in window_output:
            mask = mask_of(window_output["masks"][index])
            detection["polygons"] = polygons_of(mask)
            if not detection["polygons"]:
                continue
        yield detection


def moved(detection: Detection, left: int, top: int) -> Detection:
    """Move an object from a window, which starts at `left`, `top`, to the image."""
    detection = dict(detection)
    if "box" in detection:
        x1, y1, x2, y2 = detection["box"]
        detection["box"] = [x1 + left, y1 + top, x2 + left, y2 + top]
    if "corners" in detection:
        detection["corners"] = shifted(detection["corners"], left, top)
    if "polygons" in detection:
        polygons = []
        for polygon in detection["polygons"]:
            rings = [shifted(ring, left, top) for ring in polygon]
            polygons.append(rings)
        detection["polygons"] = polygons
    return detection


def bounds_of(detection: Detection) -> list[float]:
    """Return the upright box around an object, x1, y1, x2, y2."""
    if "box" in detection:
        return detection["box"]
    xs, ys = zip(*detection["corners"])
    return [min(xs), min(ys), max(xs), max(ys)]


def marked(detection: Detection, window: Window, size: tuple[int, int]) -> Detection:
    """Add `cut` to an object: the sides (left, top, right, bottom) at which a window border may have cut it.

    These are the sides within one pixel of a window border that is not also an image border.

    Args:
        detection: detected object, in pixels of the image.
        window: window in which the object was detected.
        size: height and width of the image.
    """
    height, width = size
    image_sides = (0, 0, width, height)
    object_sides = bounds_of(detection)
    cut_sides = []
    for window_side, image_side, object_side, outward in zip(window, image_sides, object_sides, OUTWARDS):
        is_image_border = window_side == image_side
        distance_outside = outward * (object_side - window_side)
        cut_sides.append(not is_image_border and distance_outside >= -1)
    return {**detection, "cut": cut_sides}


def are_parts(
    places: torch.Tensor,
    bounds: torch.Tensor,
    labels: torch.Tensor,
    cut: torch.Tensor,
) -> torch.Tensor:
    """Return which cut objects are parts of another object of their class that continues beyond the cut.

    Args:
        places: boxes x1, y1, x2, y2, `(n, 4)`, or corners of rotated boxes, `(n, 4, 2)`.
        bounds: upright boxes around the objects, `(n, 4)`.
        labels: class indices, `(n,)`.
        cut: sides at which the objects are cut, bool `(n, 4)`.
    """
    is_rotated = places.ndim == 3
    if is_rotated:
        rotated_boxes = rectangles(places)
    outwards = torch.tensor(OUTWARDS)
    low = bounds[:, :2]
    high = bounds[:, 2:]
    is_part = torch.zeros(len(places), dtype=torch.bool)
    for index in cut.any(1).nonzero().flatten().tolist():
        reaches_further = (bounds - bounds[index]) * outwards > 1
        continues = reaches_further[:, cut[index]].all(1)
        shared_sides = high.minimum(high[index]) - low.maximum(low[index])
        shared_areas = shared_sides.clamp(min=0).prod(1)
        has_same_label = labels == labels[index]
        is_candidate = has_same_label & (shared_areas > 0) & continues
        if is_rotated:
            candidates = rotated_boxes[is_candidate]
            repeated_box = rotated_boxes[index].expand(len(candidates), -1)
            shared_areas = intersections(repeated_box, candidates)
            object_area = rotated_boxes[index, 2:4].prod()
        else:
            shared_areas = shared_areas[is_candidate]
            object_area = (high[index] - low[index]).prod()
        is_part[index] = (shared_areas >= CUT_SHARE * object_area).any()
    return is_part


def merged(rows: LineFile, nms_threshold: float) -> Iterator[list[Detection]]:
    """Yield the objects of each row of windows after non-maximum suppression, without parts of other objects."""
    is_kept = are_kept(rows, nms_threshold)
    first = 0
    for row in rows:
        is_kept_in_row = is_kept[first : first + len(row)].tolist()
        yield list(compress(row, is_kept_in_row))
        first += len(row)


def are_kept(rows: LineFile, nms_threshold: float) -> torch.Tensor:
    """Return which objects of all rows remain after [`merged`]."""
    columns: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        if not row:
            continue
        place_key = "corners" if "corners" in row[0] else "box"
        columns_of_row = {
            "score": [detection["score"] for detection in row],
            "label": [detection["label"] for detection in row],
            "cut": [detection["cut"] for detection in row],
            "place": [detection[place_key] for detection in row],
            "bounds": [bounds_of(detection) for detection in row],
        }
        # Tensors need less memory than the lists of all rows would.
        for name, column in columns_of_row.items():
            columns.setdefault(name, []).append(torch.tensor(column, dtype=torch.float64))
    if not columns:
        return torch.zeros(0, dtype=torch.bool)
    scores = torch.cat(columns["score"])
    labels = torch.cat(columns["label"])
    cut = torch.cat(columns["cut"]).bool()
    places = torch.cat(columns["place"])
    bounds = torch.cat(columns["bounds"])
    best = best_of_overlapping(places, scores, labels, nms_threshold)
    is_part = are_parts(
        places[best],
        bounds[best],
        labels[best],
        cut[best],
    )
    is_kept = torch.zeros(len(scores), dtype=torch.bool)
    is_kept[best[~is_part]] = True
    return is_kept


def merge(
    detections: Sequence[dict[str, torch.Tensor]],
    starts: Sequence[tuple[int, int]],
    nms_threshold: float,
) -> dict[str, torch.Tensor]:
    """Merge the detections in the windows of one image by non-maximum suppression per class.

    Args:
        detections: detections of each window: `scores` and `labels`, `(n,)`, and `boxes` (x1, y1, x2, y2), `(n, 4)`, or
            `corners`, `(n, 4, 2)`, in pixels of the window.
        starts: position x, y of the top left corner of each window.
        nms_threshold: largest IoU of two detections of the same class.

    Returns:
        Detections in pixels of the image, by descending score.
    """
    key = "corners" if "corners" in detections[0] else "boxes"
    scores_of_windows = []
    labels_of_windows = []
    places_of_windows = []
    for window_detections, start in zip(detections, starts, strict=True):
        places = window_detections[key]
        offset = torch.tensor(start, dtype=places.dtype, device=places.device)
        if key == "boxes":
            offset = offset.repeat(2)
        scores_of_windows.append(window_detections["scores"])
        labels_of_windows.append(window_detections["labels"])
        places_of_windows.append(places + offset)
    scores = torch.cat(scores_of_windows)
    labels = torch.cat(labels_of_windows)
    places = torch.cat(places_of_windows)
    best = best_of_overlapping(places.double(), scores.double(), labels, nms_threshold)
    return {
        "scores": scores[best],
        "labels": labels[best],
        key: places[best],
    }


def best_of_overlapping(
    places: torch.Tensor,
    scores: torch.Tensor,
    labels: torch.Tensor,
    nms_threshold: float,
) -> torch.Tensor:
    """Return the indices that non-maximum suppression per class keeps, by descending score.

    Args:
        places: boxes x1, y1, x2, y2, `(n, 4)`, or corners, `(n, 4, 2)`.
        scores, labels: scores and class indices, `(n,)`.
        nms_threshold: largest IoU of two detections of the same class.
    """
    if places.ndim == 3:
        return rotated_nms(smallest_rectangles(places), scores, nms_threshold, labels)
    return nms_by_label(places, scores, nms_threshold, labels)


def write_submission(trainer: "ViTPDetectionTrainer", data: "DetectionData", settings: DotaSubmission) -> None:
    """Write the merged detections of a split to `Task1` in the output folder, see [`write_task1`]."""
    samples = data.open([settings.split], trainer.task)
    detections = detect_whole(trainer, samples, settings.nms)
    archive = write_task1(detections, trainer.names, Path(trainer.args.output_dir) / "Task1")
    print(f"Submission for the DOTA server: {archive}")


def detect_whole(
    trainer: "ViTPDetectionTrainer",
    samples: "ObjectImages",
    nms_threshold: float,
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the merged detections of whole images, by image id."""
    detections_of_image: dict[str, list[dict[str, torch.Tensor]]] = {}
    starts_of_image: dict[str, list[tuple[int, int]]] = {}
    for index, place in enumerate(samples.places):
        (detections,) = trainer.detect([samples.image(index)])
        key = "corners" if "corners" in detections else "boxes"
        on_cpu = {
            "scores": detections["scores"].cpu(),
            "labels": detections["labels"].cpu(),
            key: detections[key].cpu(),
        }
        detections_of_image.setdefault(place.whole_id, []).append(on_cpu)
        starts_of_image.setdefault(place.whole_id, []).append(place.start)
    merged_detections = {}
    for image_id, detections_of_windows in detections_of_image.items():
        starts = starts_of_image[image_id]
        merged_detections[image_id] = merge(detections_of_windows, starts, nms_threshold)
    return merged_detections


def write_task1(
    detections: Mapping[str, Mapping[str, torch.Tensor]],
    names: Sequence[str],
    folder: str | Path,
) -> Path:
    """Write `Task1_<class>.txt` for each class to a folder, and all files to a zip archive beside it.

    A line is `image score x1 y1 x2 y2 x3 y3 x4 y4`, with two decimals for the corners. Images are sorted by name. The
    detections of an image keep their order.

    Args:
        detections: detections of each whole image, by image name: `scores` and `labels`, `(n,)`, and `corners` in
            pixels, `(n, 4, 2)`. [`~modeling_vitp.tasks.detection.prediction.merge`] merges the windows of an image.
        names: names of the classes.
        folder: output folder, created or replaced.

    Returns:
        Path of the zip archive.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines: dict[str, list[str]] = {name: [] for name in names}
    for image, image_detections in sorted(detections.items()):
        labels = image_detections["labels"].tolist()
        scores = image_detections["scores"].tolist()
        corners = first_at_top_left(image_detections["corners"].double().cpu().numpy())
        for label, score, points in zip(labels, scores, corners):
            coordinates = " ".join(f"{coordinate:.2f}" for coordinate in points.flatten())
            lines[names[label]].append(f"{image} {score} {coordinates}\n")
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as archive_file:
        for name in names:
            path = folder / f"Task1_{name}.txt"
            path.write_text("".join(lines[name]))
            archive_file.write(path, path.name)
    return archive


def first_at_top_left(corners: np.ndarray) -> np.ndarray:
    """Return corners `(n, 4, 2)` in the same direction, starting with the top left one.

    The start is chosen so that the corners are nearest to those of the upright box around them, which start at the top
    left.
    """
    if not len(corners):
        return corners.reshape(0, 4, 2)
    x1, y1 = corners.min(1).T
    x2, y2 = corners.max(1).T
    upright = np.array(
        [
            [x1, y1],
            [x2, y1],
            [x2, y2],
            [x1, y2],
        ]
    )
    upright = upright.transpose(2, 0, 1)  # From the shape (4, 2, n) to (n, 4, 2).
    candidates = np.stack([np.roll(corners, -start, 1) for start in range(4)])
    distances = np.linalg.norm(candidates - upright, axis=-1).sum(-1)  # Shape (4, n).
    nearest = distances.argmin(0)
    return candidates[nearest, np.arange(len(corners))]
