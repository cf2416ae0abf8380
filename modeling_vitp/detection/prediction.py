"""Detection in images of any size, the vector files it writes, and the submission that DOTA's server takes."""

import json
import math
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

from ..detection_boxes import nms_by_label
from ..image_processing_vitp_detection import ViTPDetectionImageProcessor, mask_of
from ..images.large import LargeImage, LineFile, appears_whole, file_stamp, open_images, part_path, weights_digest
from ..images.reading import Window, window_starts
from ..rotated_boxes import intersections, rectangles, rotated_nms, smallest_rectangles

if TYPE_CHECKING:
    from .data import DetectionData, ObjectImages
    from .trainer import ViTPDetectionTrainer

# An object: `label`, `score`, and in pixels of the image `box` (x1, y1, x2, y2) or `corners` (four x, y), and of an
# instance its `polygons`.
Found = dict[str, Any]
# An outline and its holes, each a closed ring of x, y.
Polygon = list[list[list[float]]]

WINDOW = 1024  # of a model whose image processor does not say what it was trained at
NMS_THRESHOLD = 0.5  # of a model without one, as transformers' own are
CUT_SHARE = 0.7  # of what a window's border has cut: so much of it in another object is a part of that
OUTWARDS = (-1, -1, 1, 1)  # the way out of a box over its left, top, right and bottom side

WGS84 = "EPSG:4326"
DECIMALS = 9  # of a degree: a tenth of a millimetre
PIXEL_DECIMALS, SCORE_DECIMALS = 3, 6

MERGED = 0.1  # overlap up to which detections of a class are kept where windows are brought together


def outline(found: Found) -> list[Polygon]:
    """The polygons of an object: of its mask, or the one around its box."""
    if "polygons" in found:
        return found["polygons"]
    if "corners" in found:
        corners = found["corners"]
    else:
        left, top, right, bottom = found["box"]
        corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return [[[*corners, corners[0]]]]


def polygons_of(mask: np.ndarray, left: int = 0, top: int = 0) -> list[Polygon]:
    """The edges of a mask's pixels, part by part; pixels that only touch at a corner are two parts.

    Args:
        mask: bool of shape `(height, width)`.
        left, top: where it lies in its image.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return []
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    left, top = left + int(columns[0]), top + int(rows[0])
    parts = shapes(mask.astype(np.uint8), mask=mask, connectivity=4)
    return [[[[left + x, top + y] for x, y in ring] for ring in part["coordinates"]] for part, _ in parts]


class Ground:
    """From pixels of an image to coordinates of GeoJSON.

    Attributes:
        coordinate_system: what the coordinates are: longitude and latitude if the image's are known, by its
            georeference or its ground control points; otherwise those that it has.

    Raises:
        ValueError: if the image's coordinates have no longitude and latitude.
    """

    def __init__(self, image: DatasetReader):
        points, crs = image.gcps
        self.transformer = GCPTransformer(points) if points else AffineTransformer(image.transform)
        self.crs = crs if points else image.crs
        if self.crs:
            self.coordinate_system = f"longitude and latitude on WGS 84 ({WGS84})"
        elif points or not image.transform.is_identity:
            self.coordinate_system = "that of the image, which does not name it (it has no CRS)"
        else:
            self.coordinate_system = "pixels of the image, x to the right and y down from its top left corner"
        corners = outline({"box": [0, 0, image.width, image.height]})
        try:
            self.decimals = self.decimals_of_a_pixel()
            self.geometries([corners])
        except Exception as error:  # GDAL has many kinds
            raise ValueError(
                f"{image.name}: its coordinates cannot be brought to longitude and latitude ({error}): write COCO's "
                "JSON, by the suffix .json."
            ) from error

    def decimals_of_a_pixel(self) -> int:
        """So many that a pixel, which may be a millionth of a degree, is told apart into thousandths."""
        (left, top), (right, bottom) = np.stack(self.transformer.xy([0, 1], [0, 1], offset="ul"), 1)
        side = max(abs(right - left), abs(bottom - top))
        return PIXEL_DECIMALS + max(math.ceil(-math.log10(side)), 0) if 0 < side < math.inf else DECIMALS

    def geometries(self, outlines: Sequence[list[Polygon]]) -> list[dict[str, Any]]:
        """Polygons in pixels as geometries of GeoJSON (RFC 7946): outer rings turn left, holes turn right."""
        geometries = [self.geometry(polygons) for polygons in outlines]
        if self.crs and geometries:
            geometries = transform_geom(self.crs, WGS84, geometries, precision=DECIMALS)
        return [wind_rings(geometry) for geometry in geometries]

    def geometry(self, polygons: list[Polygon]) -> dict[str, Any]:
        placed = [[self.place(ring) for ring in polygon] for polygon in polygons]
        if len(placed) == 1:
            return {"type": "Polygon", "coordinates": placed[0]}
        return {"type": "MultiPolygon", "coordinates": placed}

    def place(self, ring: list[list[float]]) -> list[list[float]]:
        xs, ys = np.transpose(ring)
        points = np.stack(self.transformer.xy(ys, xs, offset="ul"), 1)
        return (points if self.crs else points.round(self.decimals)).tolist()


def wind_rings(geometry: dict[str, Any]) -> dict[str, Any]:
    """A geometry whose outer rings turn left and whose holes turn right, with y upwards."""

    def ring(points: Sequence[Sequence[float]], is_hole: bool) -> list[Sequence[float]]:
        x, y = np.transpose(points)
        turns_left = (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0
        return list(points) if turns_left != is_hole else list(points)[::-1]

    def polygon(rings: Sequence) -> list:
        return [ring(points, index > 0) for index, points in enumerate(rings)]

    parts = geometry["coordinates"]
    return {**geometry, "coordinates": polygon(parts) if geometry["type"] == "Polygon" else list(map(polygon, parts))}


def write_geojson(parts: Iterable[list[Found]], image: DatasetReader, names: Sequence[str], path: Path) -> None:
    """A feature for each object, with the properties `class` and `score`.

    Args:
        parts: the objects, some at a time.
        image: the open file that they are in.
        names: of the classes.
        path: of the file.
    """
    ground = Ground(image)
    head = {
        "type": "FeatureCollection",
        "name": Path(image.name).stem,
        "coordinate_system": ground.coordinate_system,
    }

    def features() -> Iterator[dict]:
        for part in parts:
            for found, geometry in zip(part, ground.geometries([outline(one) for one in part])):
                properties = {"class": names[found["label"]], "score": round(found["score"], SCORE_DECIMALS)}
                yield {"type": "Feature", "properties": properties, "geometry": geometry}

    write_list(path, head, "features", features())


def write_coco(parts: Iterable[list[Found]], image: DatasetReader, names: Sequence[str], path: Path) -> None:
    """Annotations with a `score`; `segmentation` has the outlines, holes of masks filled, and `corners` those of
    oriented boxes.

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
                points = np.concatenate(rings) if "box" not in found else np.reshape(found["box"], (2, 2))
                low, high = points.min(0), points.max(0)
                annotation = {
                    "id": next(number),
                    "image_id": 1,
                    "category_id": found["label"] + 1,
                    "bbox": np.round([*low, *(high - low)], PIXEL_DECIMALS).tolist(),
                    "area": round(sum(map(area, rings)), PIXEL_DECIMALS),
                    "iscrowd": 0,
                    "segmentation": [ring.flatten().tolist() for ring in rings],
                    "score": round(found["score"], SCORE_DECIMALS),
                }
                yield annotation | ({"corners": rings[0].tolist()} if "corners" in found else {})

    write_list(path, head, "annotations", annotations())


def area(ring: np.ndarray) -> float:
    """Of a polygon `(points, 2)`."""
    x, y = ring.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def write_list(path: Path, head: dict[str, Any], name: str, items: Iterable[dict]) -> None:
    """JSON with a list at its end, item by item: one in a line."""
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
    """The objects in an image of any size.

    They are found in windows that overlap, and of those of a class that overlap by more than `nms_threshold` only the
    best is kept, as in the merging of DOTA's patches. What ends at a border of its window is left out if it lies in one
    of its class that goes on there, as another window has it. What is larger than the overlap of windows may be found
    in parts. A window without data is passed over.

    What is found in a row of windows goes to `output` + `.part`, to the disk itself, when the row is finished. A run
    that was killed and is started again, with the same arguments, goes on from there and ends with the same file, byte
    for byte, where the device's operations are deterministic. In memory there is one row of windows, and of the
    objects the boxes; the time of bringing these together grows with the square of their number in a class. Bands,
    depths and percentiles are as in [`~modeling_vitp.dense.prediction.predict_large`].

    Args:
        model: [`ViTPForObjectDetection`], [`ViTPForOrientedObjectDetection`], [`ViTPForInstanceSegmentation`] or one
            of [`~modeling_vitp.detection.one_stage.DETECTORS`], on the device to use.
        image_processor: the model's. If it resizes, a window is brought to its size, as tiles of that size are in
            training, and an image that is smaller than a window is seen at the same scale; transformers' own stretch
            it to the square.
        image: a file that GDAL reads (GeoTIFF, PNG ...).
        output: the file to write, with an object's polygon (of its box, its oriented box or its mask), class and
            score. `.geojson` (RFC 7946): in longitude and latitude (WGS 84), or if the image has no CRS in the
            coordinates that it has, which `coordinate_system` in the file says; `.json`: COCO's, in pixels.
        window: side of the windows in pixels; by default the image processor's size if it resizes, or else 1024.
        stride: from one window to the next; by default three quarters of the window.
        batch_size: windows of a row that go through the model together.
        threshold: objects have a higher score, and one above the model's own `score_threshold`.
        nms_threshold: objects of a class may overlap by so much; by default as much as in the model, or 0.5 if it is
            one of transformers' own, which have no such threshold.

    Raises:
        ValueError: if the suffix of `output` is another, the stride is larger than the window or below 1, an image is
            not as [`~modeling_vitp.images.large.open_images`] needs it, its coordinates have no longitude and
            latitude, or an unfinished run had other arguments.
        FileExistsError: if `output` exists.
    """
    path, output = Path(image), Path(output)
    if output.suffix not in WRITERS:
        raise ValueError(f"{output}: give it the suffix .geojson, or .json for COCO's format.")
    part = part_path([output])
    side = resized_side(image_processor)
    window = window or side or WINDOW
    stride = max(3 * window // 4, 1) if stride is None else stride
    if not 1 <= stride <= window or batch_size < 1:
        raise ValueError(f"{stride=} must be from 1 to the window, {window}, and {batch_size=} at least 1.")
    if nms_threshold is None:
        nms_threshold = getattr(model.config, "nms_threshold", NMS_THRESHOLD)
    is_ours = isinstance(image_processor, ViTPDetectionImageProcessor)
    reader = image_processor if is_ours else reader_like(image_processor, side)
    for name, value in (("threshold", threshold), ("nms_threshold", nms_threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is outside [0, 1].")
    model.eval()

    with ExitStack() as stack:
        (source,) = stack.enter_context(open_images([path], reader))
        if output.suffix == ".geojson":
            Ground(source.dataset)  # an error before anything is computed
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
            for some, windows in windows_with_data(source, top, lefts, window, batch_size):
                size = tuple(windows.shape[-2:])
                resizing = {"do_resize": False}
                if side is not None and is_ours:
                    resized = (max(1, round(length * side / window)) for length in size)
                    resizing = {"do_resize": True, "size": dict(zip(("height", "width"), resized))}
                elif side is not None:
                    resizing = {"do_resize": True}
                objects = detect(model, image_processor, source.inputs(windows, **resizing), size, threshold)
                for left, mine in zip(some, objects):
                    place = (left, top, left + window, top + window)
                    found += [marked(moved(one, left, top), place, (height, width)) for one in mine]
            lines.append(found)
            progress.update(len(lefts))

        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        with appears_whole(output) as unfinished:
            WRITERS[output.suffix](merged(lines, nms_threshold), source.dataset, names, unfinished)
    lines.delete()


def resized_side(image_processor: BaseImageProcessor) -> int | None:
    """The side of what an image processor makes of a square, `None` if that stays as it is."""
    return min(filter(None, dict(image_processor.size).values())) if image_processor.do_resize else None


def reader_like(image_processor: BaseImageProcessor, side: int | None) -> ViTPDetectionImageProcessor:
    """What makes of bands the pixels that an image processor of transformers makes of a picture."""
    shared = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
    size = {"height": side, "width": side}
    return ViTPDetectionImageProcessor(size=size, **{name: getattr(image_processor, name) for name in shared})


def windows_with_data(
    source: LargeImage, top: int, lefts: list[int], window: int, batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batches of the windows of a row: where they begin, and `(batch, bands, height, width)`."""
    bottom = min(top + window, source.dataset.height)
    rows = source.read(top, bottom)
    if source.is_masked:
        empty = source.has_no_data(top, bottom)
        lefts = [left for left in lefts if not empty[:, left : left + window].all()]
    for first in range(0, len(lefts), batch_size):
        some = lefts[first : first + batch_size]
        yield some, torch.cat([rows[..., left : left + window] for left in some])


def detect(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    inputs: dict[str, torch.Tensor],
    size: tuple[int, int],
    threshold: float,
) -> list[list[Found]]:
    """The objects of each window of a batch, in its pixels; of instances those that have a mask.

    Args:
        inputs: `pixel_values` and `pixel_mask`.
        size: height and width of the windows as they were.
    """
    outputs = model(inputs["pixel_values"].to(model.device, model.dtype), inputs["pixel_mask"].to(model.device))
    options = {"threshold": threshold, "target_sizes": [size] * len(inputs["pixel_values"])}
    if getattr(outputs, "pred_corners", None) is not None:
        results = image_processor.post_process_oriented_object_detection(outputs, **options)
    elif getattr(outputs, "pred_masks", None) is not None:
        results = image_processor.post_process_instance_segmentation(outputs, return_run_lengths=True, **options)
    else:
        results = image_processor.post_process_object_detection(outputs, **options)
    return [list(objects_of(result)) for result in results]


def objects_of(result: dict[str, Any]) -> Iterator[Found]:
    """Each object of what an image processor gives for a window."""
    key, name = ("corners", "corners") if "corners" in result else ("boxes", "box")
    values = [result[part].tolist() for part in ("labels", "scores", key)]
    for index, (label, score, place) in enumerate(zip(*values)):
        found = {"label": label, "score": score, name: place}
        if "masks" in result:
            found["polygons"] = polygons_of(mask_of(result["masks"][index]))
            if not found["polygons"]:
                continue
        yield found


def moved(found: Found, left: int, top: int) -> Found:
    """An object of a window in the image that it begins in at a place."""

    def shift(points: list) -> list:
        if isinstance(points[0], list):
            return [shift(part) for part in points]
        return [value + (top if index % 2 else left) for index, value in enumerate(points)]

    return found | {name: shift(found[name]) for name in ("box", "corners", "polygons") if name in found}


def bounds_of(found: Found) -> list[float]:
    """x1, y1, x2, y2 around an object."""
    if "box" in found:
        return found["box"]
    xs, ys = zip(*found["corners"])
    return [min(xs), min(ys), max(xs), max(ys)]


def marked(found: Found, window: Window, size: tuple[int, int]) -> Found:
    """An object with `cut`: at which sides, left, top, right and bottom, it ends, but for a pixel, at a border of its
    window that is none of the image.

    Args:
        window: where it was found.
        size: height and width of the image.
    """
    inner = [border != end for border, end in zip(window, (0, 0, *size[::-1]))]
    beyond = [sign * (bound - border) for sign, bound, border in zip(OUTWARDS, bounds_of(found), window)]
    return found | {"cut": [is_inner and far >= -1 for is_inner, far in zip(inner, beyond)]}


def are_parts(places: torch.Tensor, bounds: torch.Tensor, labels: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Which objects lie, but for a rest, in one of their class that goes on where their window has cut them.

    Args:
        places: x1, y1, x2, y2, `(n, 4)`, or the corners of rotated boxes, `(n, 4, 2)`.
        bounds: x1, y1, x2, y2 around them, `(n, 4)`.
        labels: `(n,)`.
        cut: at which sides, bool `(n, 4)`.
    """
    parts, turned = torch.zeros(len(places), dtype=torch.bool), rectangles(places) if places.ndim == 3 else None
    for index in cut.any(1).nonzero().flatten().tolist():
        mine, sides = bounds[index], cut[index]
        shared = (bounds[:, 2:].minimum(mine[2:]) - bounds[:, :2].maximum(mine[:2])).clamp(min=0).prod(1)
        goes_on = ((bounds - mine) * torch.tensor(OUTWARDS) > 1)[:, sides].all(1)
        others = (labels == labels[index]) & (shared > 0) & goes_on
        if turned is None:
            shared, whole = shared[others], (mine[2:] - mine[:2]).prod()
        else:
            shared = intersections(turned[index].expand(int(others.sum()), -1), turned[others])
            whole = turned[index, 2:4].prod()
        parts[index] = (shared >= CUT_SHARE * whole).any()
    return parts


def merged(rows: LineFile, nms_threshold: float) -> Iterator[list[Found]]:
    """The objects of each row of windows that no better one of their class overlaps by more than a threshold, without
    parts of others.
    """
    parts = []
    for row in rows:
        places = [found["corners"] if "corners" in found else found["box"] for found in row]
        values = [[found[name] for found in row] for name in ("score", "label", "cut")]
        if row:
            parts.append(
                [torch.tensor(one, dtype=torch.float64) for one in (*values, places, list(map(bounds_of, row)))]
            )
    kept = torch.zeros(sum(len(scores) for scores, *_ in parts), dtype=torch.bool)
    if parts:
        scores, labels, cut, places, bounds = map(torch.cat, zip(*parts))
        best = best_of_overlapping(places, scores, labels, nms_threshold)
        kept[best[~are_parts(places[best], bounds[best], labels[best], cut[best].bool())]] = True
    first = 0
    for row in rows:
        yield [found for found, keep in zip(row, kept[first : first + len(row)].tolist()) if keep]
        first += len(row)


__all__ = ["detect_large"]


def merge(
    detections: Sequence[dict[str, torch.Tensor]], starts: Sequence[tuple[int, int]], nms_threshold: float
) -> dict[str, torch.Tensor]:
    """The detections in the windows of one image, in the image: of those of a class that overlap, the best.

    Args:
        detections: of each window `scores` and `labels`, `(n,)`, and `boxes`, `(n, 4)` with x1, y1, x2, y2, or
            `corners`, `(n, 4, 2)`, in its pixels.
        starts: where each window begins, x and y.
        nms_threshold: detections may overlap by so much.

    Returns:
        The same of the image, by falling score.
    """
    key = "corners" if "corners" in detections[0] else "boxes"
    moved = []
    for one, start in zip(detections, starts, strict=True):
        offset = torch.tensor(start, dtype=one[key].dtype, device=one[key].device)
        moved.append(one[key] + (offset if key == "corners" else offset.repeat(2)))
    joined = {name: torch.cat([one[name] for one in detections]) for name in ("scores", "labels")} | {
        key: torch.cat(moved)
    }
    kept = best_of_overlapping(joined[key].double(), joined["scores"].double(), joined["labels"], nms_threshold)
    return {name: value[kept] for name, value in joined.items()}


def best_of_overlapping(
    places: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, nms_threshold: float
) -> torch.Tensor:
    """Indices of the detections that no better one of their class, which is kept itself, overlaps by more than a
    threshold; by falling score.

    Args:
        places: boxes `(n, 4)` with x1, y1, x2, y2, or corners `(n, 4, 2)`.
        scores, labels: `(n,)`.
    """
    if places.ndim == 3:
        return rotated_nms(smallest_rectangles(places), scores, nms_threshold, labels)
    return nms_by_label(places, scores, nms_threshold, labels)


def write_submission(trainer: "ViTPDetectionTrainer", data: "DetectionData", settings: dict[str, Any]) -> None:
    """The detections of a split in `Task1` in the output folder, those in windows of one image merged; see
    [`write_task1`].
    """
    samples = data.open([settings["split"]], trainer.task)
    detections = detect_whole(trainer, samples, settings.get("nms", MERGED))
    archive = write_task1(detections, trainer.names, Path(trainer.args.output_dir) / "Task1")
    print(f"For the server: {archive}")


def detect_whole(
    trainer: "ViTPDetectionTrainer", samples: "ObjectImages", nms_threshold: float
) -> dict[str, dict[str, torch.Tensor]]:
    """The detections in whole images, by their names."""
    parts: dict[str, list] = {}
    for index, place in enumerate(samples.places):
        (found,) = trainer.detect([samples.image(index)])
        key = "corners" if "corners" in found else "boxes"
        found = {name: found[name].cpu() for name in ("scores", "labels", key)}
        parts.setdefault(place.whole, []).append((found, place.start))
    return {name: merge(*zip(*some), nms_threshold) for name, some in parts.items()}


def write_task1(
    detections: Mapping[str, Mapping[str, torch.Tensor]],
    names: Sequence[str],
    folder: str | Path,
    expected: Iterable[str] | None = None,
) -> Path:
    """Writes `Task1_<class>.txt` for each class to a folder, and all of them to a zip beside it.

    A line is `image score x1 y1 x2 y2 x3 y3 x4 y4`, corners with two decimals; images come by their names, and the
    detections of one as they are given.

    Args:
        detections: of each whole image, by its name, `scores` and `labels`, `(n,)`, and `corners`, `(n, 4, 2)` in
            pixels; see [`~modeling_vitp.detection.prediction.merge`] for images that were cut into windows.
        names: of the classes.
        folder: is created, or replaced.
        expected: names of all images that the server scores.

    Returns:
        The zip archive.

    Raises:
        ValueError: if an image is missing, or is none that is expected.
    """
    if expected is not None and set(expected) != set(detections):
        missing, more = sorted(set(expected) - set(detections)), sorted(set(detections) - set(expected))
        raise ValueError(f"submission: without detections for {missing[:5]}, and with some for {more[:5]}.")
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
    """The same corners `(n, 4, 2)`, in the same direction, from where they are nearest to those of the upright box
    around them, which start at its top left.
    """
    if not len(corners):
        return corners.reshape(0, 4, 2)
    left, top, right, bottom = *corners.min(1).T, *corners.max(1).T
    upright = np.stack([[left, top], [right, top], [right, bottom], [left, bottom]]).transpose(2, 0, 1)
    starts = np.stack([np.roll(corners, -start, 1) for start in range(4)])
    distances = np.linalg.norm(starts - upright, axis=-1).sum(-1)  # (4, n)
    return starts[distances.argmin(0), np.arange(len(corners))]
