"""Detection in a GeoTIFF or PNG that need not fit into memory, to GeoJSON on the same ground or COCO's JSON."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from ..image_processing_vitp_detection import ViTPDetectionImageProcessor, mask_of
from ..images.large import LargeImage, open_images
from ..images.unfinished import LineFile, appears_whole, digest, fingerprint, part_of
from ..images.windows import Window, window_starts
from ..rotated_boxes import intersections, rectangles
from .tiles import best_of_overlapping
from .vectors import WRITERS, Found, Ground, polygons_of

WINDOW = 1024  # of a model whose image processor does not say what it was trained at
NMS_THRESHOLD = 0.5  # of a model without one, as transformers' own are
CUT_SHARE = 0.7  # of what a window's border has cut: so much of it in another object is a part of that
OUTWARDS = (-1, -1, 1, 1)  # the way out of a box over its left, top, right and bottom side


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
    depths and percentiles are as in [`~modeling_vitp.dense.large_images.predict_large`].

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
    part = part_of([output])
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
            "image": fingerprint(path),
            "model": digest(model),
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
