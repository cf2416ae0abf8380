"""Detection in images of any size, with GeoJSON, COCO and DOTA submission files as output."""

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rasterio.features import shapes
from rasterio.io import DatasetReader
from rasterio.transform import AffineTransformer, GCPTransformer
from rasterio.warp import transform_geom
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from ...data.windows import areas
from ...detection_boxes import nms_by_label
from ...image_processing_vitp_detection import ViTPDetectionImageProcessor, mask_of
from ...images.large import LargeImage, LineFile, appears_whole, file_stamp, open_images, part_path, weights_digest
from ...images.reading import Window, window_starts
from ...rotated_boxes import intersections, rectangles, rotated_nms, smallest_rectangles
from .arguments import DotaSubmission
from .data import DetectionData, ObjectImages

if TYPE_CHECKING:
    from .trainer import ViTPDetectionTrainer

# Detected object: `label`, `score`, `box` (x1, y1, x2, y2) or `corners` (four x, y) in pixels of the image, and
# `polygons` for instances.
Found = dict[str, Any]
# Outline and holes, each a closed ring of x, y.
Polygon = list[list[list[float]]]

WINDOW = 1024  # Default window for image processors that do not resize.
NMS_THRESHOLD = 0.5  # Default for models without an NMS threshold, such as those of transformers.
CUT_SHARE = 0.7  # An object that a window border cuts is dropped if another object covers this share of it.
OUTWARDS = (-1, -1, 1, 1)  # Signs of the outward direction at the left, top, right and bottom side of a box.

WGS84 = "EPSG:4326"
DECIMALS = 9  # Of coordinates, a tenth of a millimeter if they are degrees.
PIXEL_DECIMALS, SCORE_DECIMALS = 3, 6


def outline(found: Found) -> list[Polygon]:
    """Return the polygons of the mask of an object, or the polygon of its box."""
    if "polygons" in found:
        return found["polygons"]
    if "corners" in found:
        corners = found["corners"]
    else:
        left, top, right, bottom = found["box"]
        corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return [[[*corners, corners[0]]]]


def polygons_of(mask: np.ndarray, left: int = 0, top: int = 0) -> list[Polygon]:
    """Return the outlines of the connected parts of a mask, along pixel edges.

    Parts that touch at a corner only are separate.

    Args:
        mask: bool of shape `(height, width)`.
        left, top: position of the mask in its image.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return []
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    left, top = left + int(columns[0]), top + int(rows[0])
    parts = shapes(mask.astype(np.uint8), mask=mask, connectivity=4)
    return [[[[left + x, top + y] for x, y in ring] for ring in part["coordinates"]] for part, _ in parts]


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
        points, crs = image.gcps
        self.transformer = GCPTransformer(points) if points else AffineTransformer(image.transform)
        self.crs = crs if points else image.crs
        if self.crs:
            self.coordinate_system = f"longitude and latitude on WGS 84 ({WGS84})"
        elif points or not image.transform.is_identity:
            self.coordinate_system = "unknown coordinates of the image, which has no CRS"
        else:
            self.coordinate_system = "pixels of the image, x to the right and y down from the top left corner"
        corners = outline({"box": [0, 0, image.width, image.height]})
        try:
            self.geometries([corners])
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
            geometries = transform_geom(self.crs, WGS84, geometries, precision=DECIMALS)
        return [wind_rings(geometry) for geometry in geometries]

    def geometry(self, polygons: list[Polygon]) -> dict[str, Any]:
        transformed = [[self.transform(ring) for ring in polygon] for polygon in polygons]
        if len(transformed) == 1:
            return {"type": "Polygon", "coordinates": transformed[0]}
        return {"type": "MultiPolygon", "coordinates": transformed}

    def transform(self, ring: list[list[float]]) -> list[list[float]]:
        xs, ys = np.transpose(ring).round(PIXEL_DECIMALS)
        return np.stack(self.transformer.xy(ys, xs, offset="ul"), 1).round(DECIMALS).tolist()


def wind_rings(geometry: dict[str, Any]) -> dict[str, Any]:
    """Return a geometry with counterclockwise outer rings and clockwise holes, for y upwards."""

    def ring(points: Sequence[Sequence[float]], is_hole: bool) -> list[Sequence[float]]:
        x, y = np.transpose(points)
        turns_left = (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0
        return list(points) if turns_left != is_hole else list(points)[::-1]

    def polygon(rings: Sequence) -> list:
        return [ring(points, index > 0) for index, points in enumerate(rings)]

    parts = geometry["coordinates"]
    return {**geometry, "coordinates": polygon(parts) if geometry["type"] == "Polygon" else list(map(polygon, parts))}


def write_geojson(parts: Iterable[list[Found]], image: DatasetReader, names: Sequence[str], path: Path) -> None:
    """Write a GeoJSON file with one feature per object, with the properties `class` and `score`.

    Args:
        parts: detected objects, in several lists.
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
        for part in parts:
            for found, geometry in zip(part, ground.geometries([outline(found) for found in part])):
                properties = {"class": names[found["label"]], "score": round(found["score"], SCORE_DECIMALS)}
                yield {"type": "Feature", "properties": properties, "geometry": geometry}

    write_list(path, head, "features", features())


def write_coco(parts: Iterable[list[Found]], image: DatasetReader, names: Sequence[str], path: Path) -> None:
    """Write a COCO file with a `score` for each annotation.

    `segmentation` has the outlines of the objects, without holes. Oriented boxes also have their `corners`.

    Args:
        parts, image, names, path: see [`write_geojson`].
    """
    head = {
        "images": [{"id": 1, "file_name": Path(image.name).name, "width": image.width, "height": image.height}],
        "categories": [{"id": label, "name": name} for label, name in enumerate(names, 1)],
    }

    def annotations() -> Iterator[dict]:
        number = count(1)
        for part in parts:
            for found in part:
                rings = [np.round(polygon[0][:-1], PIXEL_DECIMALS) for polygon in outline(found)]
                left, top, right, bottom = bounds_of(found)
                annotation = {
                    "id": next(number),
                    "image_id": 1,
                    "category_id": found["label"] + 1,
                    "bbox": np.round([left, top, right - left, bottom - top], PIXEL_DECIMALS).tolist(),
                    "area": round(sum(float(areas(ring[None])[0]) for ring in rings), PIXEL_DECIMALS),
                    "iscrowd": 0,
                    "segmentation": [ring.flatten().tolist() for ring in rings],
                    "score": round(found["score"], SCORE_DECIMALS),
                }
                yield annotation | ({"corners": rings[0].tolist()} if "corners" in found else {})

    write_list(path, head, "annotations", annotations())


def write_list(path: Path, head: dict[str, Any], name: str, items: Iterable[dict]) -> None:
    """Write a JSON object with a list as its last entry. The items are written one per line, without keeping them."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{json.dumps(head, ensure_ascii=False)[:-1]}, "{name}": [')
        for index, item in enumerate(items):
            file.write((",\n" if index else "\n") + json.dumps(item, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")


WRITERS = {".geojson": write_geojson, ".json": write_coco}


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

    Raises:
        ValueError: if `output` has a wrong suffix, the stride is larger than the window or below 1, the image is not
            supported (see [`~modeling_vitp.images.large.open_images`]), its coordinates cannot be transformed to
            longitude and latitude, or an unfinished run had different arguments.
        FileExistsError: if `output` exists.
    """
    path, output = Path(image), Path(output)
    if output.suffix not in WRITERS:
        raise ValueError(f"Expected an output with the suffix .geojson, or .json for COCO format, got {output}.")
    part = part_path([output])
    side = resized_side(image_processor)
    window = window or side or WINDOW
    stride = max(3 * window // 4, 1) if stride is None else stride
    if not 1 <= stride <= window or batch_size < 1:
        raise ValueError(
            f"`stride` must be in [1, {window}], the window, and `batch_size` at least 1, got {stride=}, {batch_size=}."
        )
    if nms_threshold is None:
        nms_threshold = getattr(model.config, "nms_threshold", NMS_THRESHOLD)
    is_ours = isinstance(image_processor, ViTPDetectionImageProcessor)
    reader = image_processor if is_ours else reader_like(image_processor, side)
    for name, value in (("threshold", threshold), ("nms_threshold", nms_threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
    model.eval()

    with ExitStack() as stack:
        (source,) = stack.enter_context(open_images([path], reader))
        if output.suffix == ".geojson":
            Ground(source.dataset)  # Raises an error before the computation starts.
        made_of = {
            "image": file_stamp(path),
            "model": weights_digest(model),
            "image processor": image_processor.to_json_string(),
            "window": window,
            "stride": stride,
            "batch_size": batch_size,
            "threshold": threshold,
            "merging": CUT_SHARE,
        }
        lines = stack.enter_context(LineFile(part, made_of))
        height, width = source.dataset.shape
        tops, lefts = (window_starts(length, window, stride) for length in (height, width))
        progress = stack.enter_context(
            tqdm(total=len(tops) * len(lefts), initial=len(lines) * len(lefts), unit="window", desc=output.name)
        )
        for top in tops[len(lines) :]:
            found = []
            for starts, windows in windows_with_data(source, top, lefts, window, batch_size):
                size = tuple(windows.shape[-2:])
                resizing = {"do_resize": False}
                if side is not None and is_ours:
                    resized = (max(1, round(length * side / window)) for length in size)
                    resizing = {"do_resize": True, "size": dict(zip(("height", "width"), resized))}
                elif side is not None:
                    resizing = {"do_resize": True}
                objects = detect(model, image_processor, source.inputs(windows, **resizing), size, threshold)
                for left, detected in zip(starts, objects):
                    area = (left, top, left + window, top + window)
                    found += [marked(moved(item, left, top), area, (height, width)) for item in detected]
            lines.append(found)
            progress.update(len(lefts))

        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        with appears_whole(output) as unfinished:
            WRITERS[output.suffix](merged(lines, nms_threshold), source.dataset, names, unfinished)
    lines.delete()


def resized_side(image_processor: BaseImageProcessor) -> int | None:
    """Return the side to which an image processor resizes a square image, or `None` if it does not resize."""
    return min(filter(None, dict(image_processor.size).values())) if image_processor.do_resize else None


def reader_like(image_processor: BaseImageProcessor, side: int | None) -> ViTPDetectionImageProcessor:
    """Return an image processor for bands with the pixel values of an image processor of transformers."""
    shared = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
    size = {"height": side, "width": side}
    return ViTPDetectionImageProcessor(size=size, **{name: getattr(image_processor, name) for name in shared})


def windows_with_data(
    source: LargeImage, top: int, lefts: list[int], window: int, batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield batches of the windows of a row: their left borders, and their pixels `(batch, bands, height, width)`."""
    bottom = min(top + window, source.dataset.height)
    rows = source.read(top, bottom)
    if source.is_masked:
        empty = source.has_no_data(top, bottom)
        lefts = [left for left in lefts if not empty[:, left : left + window].all()]
    for first in range(0, len(lefts), batch_size):
        batch = lefts[first : first + batch_size]
        yield batch, torch.cat([rows[..., left : left + window] for left in batch])


def detect(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    inputs: dict[str, torch.Tensor],
    size: tuple[int, int],
    threshold: float,
) -> list[list[Found]]:
    """Return the objects of each window of a batch, in pixels of the window. Instances with an empty mask are removed.

    Args:
        model: detector.
        image_processor: image processor of the model.
        inputs: model inputs with `pixel_values` and `pixel_mask`.
        size: height and width of the windows before resizing.
        threshold: score above which objects are returned.
    """
    outputs = model(inputs["pixel_values"].to(model.device, model.dtype), inputs["pixel_mask"].to(model.device))
    sizes = [size] * len(inputs["pixel_values"])
    return [list(objects_of(result)) for result in post_process(image_processor, outputs, threshold, sizes)]


def post_process(
    image_processor: BaseImageProcessor, outputs: ModelOutput, threshold: float, sizes: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Return the detections in images of `sizes` `(height, width)` as the image processor does for the task.

    Masks are run lengths, see [`~modeling_vitp.image_processing_vitp_detection.mask_of`].
    """
    if getattr(outputs, "pred_corners", None) is not None:
        return image_processor.post_process_oriented_object_detection(outputs, threshold, target_sizes=sizes)
    if getattr(outputs, "pred_masks", None) is not None:
        return image_processor.post_process_instance_segmentation(
            outputs, threshold, target_sizes=sizes, return_run_lengths=True
        )
    return image_processor.post_process_object_detection(outputs, threshold, target_sizes=sizes)


def objects_of(result: dict[str, Any]) -> Iterator[Found]:
    """Yield the objects in the post-processed output of a window."""
    key, name = ("corners", "corners") if "corners" in result else ("boxes", "box")
    values = [result[part].tolist() for part in ("labels", "scores", key)]
    for index, (label, score, box) in enumerate(zip(*values)):
        found = {"label": label, "score": score, name: box}
        if "masks" in result:
            found["polygons"] = polygons_of(mask_of(result["masks"][index]))
            if not found["polygons"]:
                continue
        yield found


def moved(found: Found, left: int, top: int) -> Found:
    """Move an object from a window, which starts at `left`, `top`, to the image."""

    def shift(points: list) -> list:
        if isinstance(points[0], list):
            return [shift(part) for part in points]
        return [value + (top if index % 2 else left) for index, value in enumerate(points)]

    return found | {name: shift(found[name]) for name in ("box", "corners", "polygons") if name in found}


def bounds_of(found: Found) -> list[float]:
    """Return the upright box around an object, x1, y1, x2, y2."""
    if "box" in found:
        return found["box"]
    xs, ys = zip(*found["corners"])
    return [min(xs), min(ys), max(xs), max(ys)]


def marked(found: Found, window: Window, size: tuple[int, int]) -> Found:
    """Add `cut` to an object: the sides (left, top, right, bottom) at which a window border may have cut it.

    These are the sides within one pixel of a window border that is not also an image border.

    Args:
        found: detected object, in pixels of the image.
        window: window in which the object was detected.
        size: height and width of the image.
    """
    inner = [border != end for border, end in zip(window, (0, 0, *size[::-1]))]
    distances = [sign * (bound - border) for sign, bound, border in zip(OUTWARDS, bounds_of(found), window)]
    return found | {"cut": [is_inner and distance >= -1 for is_inner, distance in zip(inner, distances)]}


def are_parts(places: torch.Tensor, bounds: torch.Tensor, labels: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Return which cut objects are parts of another object of their class that continues beyond the cut.

    Args:
        places: boxes x1, y1, x2, y2, `(n, 4)`, or corners of rotated boxes, `(n, 4, 2)`.
        bounds: upright boxes around the objects, `(n, 4)`.
        labels: class indices, `(n,)`.
        cut: sides at which the objects are cut, bool `(n, 4)`.
    """
    parts, rotated = torch.zeros(len(places), dtype=torch.bool), rectangles(places) if places.ndim == 3 else None
    for index in cut.any(1).nonzero().flatten().tolist():
        box, sides = bounds[index], cut[index]
        shared = (bounds[:, 2:].minimum(box[2:]) - bounds[:, :2].maximum(box[:2])).clamp(min=0).prod(1)
        continues = ((bounds - box) * torch.tensor(OUTWARDS) > 1)[:, sides].all(1)
        others = (labels == labels[index]) & (shared > 0) & continues
        if rotated is None:
            shared, own_area = shared[others], (box[2:] - box[:2]).prod()
        else:
            shared = intersections(rotated[index].expand(int(others.sum()), -1), rotated[others])
            own_area = rotated[index, 2:4].prod()
        parts[index] = (shared >= CUT_SHARE * own_area).any()
    return parts


def merged(rows: LineFile, nms_threshold: float) -> Iterator[list[Found]]:
    """Yield the objects of each row of windows after non-maximum suppression, without parts of other objects."""
    parts = []
    for row in rows:
        places = [found["corners"] if "corners" in found else found["box"] for found in row]
        values = [[found[name] for found in row] for name in ("score", "label", "cut")]
        if row:
            values += [places, list(map(bounds_of, row))]
            parts.append([torch.tensor(value, dtype=torch.float64) for value in values])
    kept = torch.zeros(sum(len(scores) for scores, *_ in parts), dtype=torch.bool)
    if parts:
        scores, labels, cut, places, bounds = map(torch.cat, zip(*parts))
        best = best_of_overlapping(places, scores, labels, nms_threshold)
        kept[best[~are_parts(places[best], bounds[best], labels[best], cut[best].bool())]] = True
    first = 0
    for row in rows:
        yield [found for found, keep in zip(row, kept[first : first + len(row)].tolist()) if keep]
        first += len(row)


def merge(
    detections: Sequence[dict[str, torch.Tensor]], starts: Sequence[tuple[int, int]], nms_threshold: float
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
    moved = []
    for window, start in zip(detections, starts, strict=True):
        offset = torch.tensor(start, dtype=window[key].dtype, device=window[key].device)
        moved.append(window[key] + (offset if key == "corners" else offset.repeat(2)))
    joined = {name: torch.cat([window[name] for window in detections]) for name in ("scores", "labels")}
    joined[key] = torch.cat(moved)
    kept = best_of_overlapping(joined[key].double(), joined["scores"].double(), joined["labels"], nms_threshold)
    return {name: value[kept] for name, value in joined.items()}


def best_of_overlapping(
    places: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, nms_threshold: float
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


def write_submission(trainer: "ViTPDetectionTrainer", data: DetectionData, settings: DotaSubmission) -> None:
    """Write the merged detections of a split to `Task1` in the output folder, see [`write_task1`]."""
    samples = data.open([settings.split], trainer.task)
    detections = detect_whole(trainer, samples, settings.nms)
    archive = write_task1(detections, trainer.names, Path(trainer.args.output_dir) / "Task1")
    print(f"Submission for the DOTA server: {archive}")


def detect_whole(
    trainer: "ViTPDetectionTrainer", samples: ObjectImages, nms_threshold: float
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the merged detections of whole images, by image id."""
    parts: dict[str, list] = {}
    for index, place in enumerate(samples.places):
        (found,) = trainer.detect([samples.image(index)])
        key = "corners" if "corners" in found else "boxes"
        found = {name: found[name].cpu() for name in ("scores", "labels", key)}
        parts.setdefault(place.whole, []).append((found, place.start))
    return {name: merge(*zip(*windows), nms_threshold) for name, windows in parts.items()}


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
    for image, found in sorted(detections.items()):
        corners = first_at_top_left(found["corners"].double().cpu().numpy())
        for label, score, points in zip(found["labels"].tolist(), found["scores"].tolist(), corners):
            numbers = " ".join(f"{value:.2f}" for value in points.flatten())
            lines[names[label]].append(f"{image} {score} {numbers}\n")
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in names:
            path = folder / f"Task1_{name}.txt"
            path.write_text("".join(lines[name]))
            packed.write(path, path.name)
    return archive


def first_at_top_left(corners: np.ndarray) -> np.ndarray:
    """Return corners `(n, 4, 2)` in the same direction, starting with the top left one.

    The start is chosen so that the corners are nearest to those of the upright box around them, which start at the top
    left.
    """
    if not len(corners):
        return corners.reshape(0, 4, 2)
    left, top, right, bottom = *corners.min(1).T, *corners.max(1).T
    upright = np.stack([[left, top], [right, top], [right, bottom], [left, bottom]]).transpose(2, 0, 1)
    starts = np.stack([np.roll(corners, -start, 1) for start in range(4)])
    distances = np.linalg.norm(starts - upright, axis=-1).sum(-1)  # Shape (4, n).
    return starts[distances.argmin(0), np.arange(len(corners))]
