"""Image processor for detectors: images with their objects, and detections as boxes, corners and masks."""

import numpy as np
import torch
from torch.nn import functional as F
from transformers import BatchFeature, DetrImageProcessor
from transformers.image_transforms import center_to_corners_format
from transformers.image_utils import AnnotationFormat, ImageInput, SizeDict
from transformers.models.detr.image_processing_detr import DetrImageProcessorKwargs

from .image_processing_vitp import InputSpecImageProcessor
from .rotated_boxes import rectangles

Sizes = torch.Tensor | list[tuple[int, int]] | None


class ViTPDetectionImageProcessorKwargs(DetrImageProcessorKwargs, total=False):
    r"""Keyword arguments of [`ViTPDetectionImageProcessor`].

    input_spec (`dict`, *optional*):
        Conversion of images that are not 8-bit RGB to the model's channels: the fields of [`InputSpec`].
    """

    input_spec: dict | None


class ViTPDetectionImageProcessor(InputSpecImageProcessor, DetrImageProcessor):
    """Image processor for [`ViTPForObjectDetection`], its oriented variant and [`ViTPForInstanceSegmentation`].

    Images keep their size unless `do_resize=True`, which resizes them to `size`. In a batch they are padded at the
    right and at the bottom to the largest, with zeros after normalization, and `pixel_mask` marks the image. Unlike in
    DETR, boxes are relative to the image without its padding.
    """

    valid_kwargs = ViTPDetectionImageProcessorKwargs
    do_resize = False

    def preprocess(
        self,
        images: ImageInput,
        annotations: dict | list[dict] | None = None,
        return_segmentation_masks: bool | None = None,
        masks_path: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""Prepare images and their objects for a model.

        Args:
            images (`ImageInput`):
                One image or several, of any kind that the input spec covers. File paths are opened.
            annotations (`dict` or `list[dict]`, *optional*):
                Objects of each image as in COCO: `image_id`, and `annotations` with `category_id` and `bbox` (x, y,
                width, height in pixels), or for oriented boxes `corners` (four x, y in order around the box) instead of
                `bbox`. Crowds, and boxes without area within the image, are left out.
            return_segmentation_masks (`bool`, *optional*):
                Whether to return masks from the objects' `segmentation`: an array of the image's size, or COCO's
                polygons or run lengths, which need `faster-coco-eval`.

        Returns:
            `pixel_values`, float32 of shape `(batch_size, num_channels, height, width)`; `pixel_mask`, int64 of shape
            `(batch_size, height, width)`; with annotations `labels`, a dictionary for each image: `class_labels`,
            `boxes` (center x, center y, width, height, relative to the image), `corners` if the objects have them,
            `masks` if requested.

        Raises:
            ValueError: if an annotation does not have this format, a requested `segmentation` is empty, or some objects
                have corners and others do not.
        """
        return super().preprocess(images, annotations, return_segmentation_masks, masks_path, **kwargs)

    def prepare_annotation(
        self,
        image: torch.Tensor,
        target: dict,
        format: AnnotationFormat | None = None,
        return_segmentation_masks: bool | None = None,
        **kwargs,
    ) -> dict:
        if AnnotationFormat(format or self.format) != AnnotationFormat.COCO_DETECTION:
            return super().prepare_annotation(image, target, format, return_segmentation_masks, **kwargs)
        height, width = image.shape[-2:]
        numbered = {
            index: with_box(one)
            for index, one in enumerate(target["annotations"])
            if str(one.get("iscrowd") or 0).strip().lower() in ("0", "false")
        }
        numbered = {index: one for index, one in numbered.items() if meets(one["bbox"], height, width)}
        objects = [*numbered.values()]
        prepared = super().prepare_annotation(image, {**target, "annotations": objects}, format, False, **kwargs)
        if len({"corners" in one for one in objects}) > 1:
            raise ValueError(
                f"Expected `corners` for all objects of image {target['image_id']} or for none, got both kinds."
            )
        if not objects or "corners" in objects[0]:  # without objects, both kinds of labels are valid
            corners = np.array([one["corners"] for one in objects], np.float32).reshape(-1, 4, 2)
            prepared["corners"] = torch.from_numpy(corners).to(image.device)
        if return_segmentation_masks:
            masks = []
            for index, one in numbered.items():
                try:
                    masks.append(read_outline(one.get("segmentation"), height, width))
                except (ValueError, TypeError, RuntimeError) as error:  # faster-coco-eval raises several types
                    raise ValueError(f"object {index} of image {target['image_id']}: {error}") from error
            prepared["masks"] = torch.from_numpy(np.array(masks, np.uint8).reshape(-1, height, width)).to(image.device)
        return prepared

    def resize(self, image: torch.Tensor, size: SizeDict, *args, **kwargs) -> torch.Tensor:
        if size.max_height and size.max_width:  # the parent rounds down, unlike training
            height, width = fitted_size(image.shape[-2:], size.max_height, size.max_width)
            size = SizeDict(height=height, width=width)
        return super().resize(image, size, *args, **kwargs)

    def resize_annotation(
        self, annotation: dict, orig_size: tuple[int, int], target_size: tuple[int, int], *args, **kwargs
    ) -> dict:
        masks = annotation.get("masks")
        if masks is not None and not len(masks):  # the parent cannot stack an empty list
            annotation = {**annotation, "masks": masks.new_zeros(1, *masks.shape[1:])}
        resized = super().resize_annotation(annotation, orig_size, target_size, *args, **kwargs)
        if masks is not None:
            resized["masks"] = resized["masks"][: len(masks)]
        if "corners" in resized:
            ratios = [target_size[1] / orig_size[1], target_size[0] / orig_size[0]]
            resized["corners"] = resized["corners"] * resized["corners"].new_tensor(ratios)
        return resized

    def normalize_annotation(self, annotation: dict, image_size: tuple[int, int]) -> dict:
        normalized = super().normalize_annotation(annotation, image_size)
        if "corners" in normalized:
            height, width = image_size
            normalized["corners"] = normalized["corners"] / normalized["corners"].new_tensor([width, height])
        return normalized

    def pad(self, *args, **kwargs) -> tuple:
        return super().pad(*args, **{**kwargs, "update_bboxes": False})

    def post_process_object_detection(
        self, outputs, threshold: float = 0.5, target_sizes: Sizes = None
    ) -> list[dict[str, torch.Tensor]]:
        r"""Return the detections of each image above a score threshold.

        Args:
            outputs ([`ViTPDetectionOutput`]):
                Output of the model. Oriented objects are returned as their enclosing boxes.
            threshold (`float`, defaults to 0.5):
                Score that a detection must exceed. The model itself omits detections below its `score_threshold`.
            target_sizes (`torch.Tensor` of shape `(batch_size, 2)` or `list[tuple[int, int]]`, *optional*):
                Original height and width of the images. If not set, boxes are relative to the images.

        Returns:
            For each image `scores`, `labels` and `boxes` (x1, y1, x2, y2), by descending score.
        """
        return self._select(outputs, threshold, target_sizes)[0]

    def post_process_oriented_object_detection(
        self, outputs, threshold: float = 0.5, *, target_sizes: Sizes
    ) -> list[dict[str, torch.Tensor]]:
        r"""Return the oriented detections of each image above a score threshold.

        Args:
            outputs ([`ViTPDetectionOutput`]):
                Output of [`ViTPForOrientedObjectDetection`].
            threshold (`float`, defaults to 0.5):
                Score that a detection must exceed.
            target_sizes (`torch.Tensor` of shape `(batch_size, 2)` or `list[tuple[int, int]]`):
                Original height and width of the images.

        Returns:
            For each image `scores`, `labels`, `corners` `(n, 4, 2)` in pixels, and `boxes` `(n, 5)`: center x, center
            y, width, height and angle in radians, from -π/2 to π/2, clockwise on the screen. If the image was resized
            to another aspect ratio, the corners are not those of a rectangle, and the box is computed from three of
            them.
        """
        results, kept, scales = self._select(outputs, threshold, target_sizes)
        for result, corners, keep, scale in zip(results, outputs.pred_corners, kept, scales):
            result["corners"] = corners[keep] * scale
            result["boxes"] = rectangles(result["corners"])
        return results

    def post_process_instance_segmentation(
        self,
        outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        *,
        target_sizes: Sizes,
        return_run_lengths: bool = False,
    ) -> list[dict]:
        r"""Return the detections of each image above a score threshold, with their masks.

        Args:
            outputs ([`ViTPDetectionOutput`]):
                Output of [`ViTPForInstanceSegmentation`].
            threshold (`float`, defaults to 0.5):
                Score that a detection must exceed.
            mask_threshold (`float`, defaults to 0.5):
                Minimum probability of a pixel of the object.
            target_sizes (`torch.Tensor` of shape `(batch_size, 2)` or `list[tuple[int, int]]`):
                Original height and width of the images.
            return_run_lengths (`bool`, defaults to `False`):
                Whether to return masks as COCO's run lengths, which take less memory.

        Returns:
            For each image `scores`, `labels`, `boxes` (x1, y1, x2, y2) and `masks`: bool of shape `(n, height, width)`,
            or a list of dictionaries with `size` and `counts`.
        """
        results, kept, _ = self._select(outputs, threshold, target_sizes)
        for result, probabilities, keep, size in zip(results, outputs.pred_masks, kept, target_sizes):
            pasted = (
                paste_mask(probability, box, [int(side) for side in size]) >= mask_threshold
                for probability, box in zip(probabilities[keep], result["boxes"])
            )
            if return_run_lengths:
                result["masks"] = [run_lengths(mask.cpu().numpy()) for mask in pasted]
            else:
                empty = probabilities.new_zeros(0, *(int(side) for side in size), dtype=torch.bool)
                result["masks"] = torch.cat([empty, *(mask[None] for mask in pasted)])
        return results

    def _select(self, outputs, threshold: float, sizes: Sizes) -> tuple[list[dict], list[torch.Tensor], torch.Tensor]:
        """Return the results of each image, the masks that select them, and the scales of x and y."""
        scores, labels, boxes = outputs.scores, outputs.labels, center_to_corners_format(outputs.pred_boxes)
        if sizes is not None and len(sizes) != len(scores):
            raise ValueError(f"Expected {len(scores)} target_sizes, one for each image, got {len(sizes)}.")
        sizes = torch.ones(len(scores), 2) if sizes is None else torch.as_tensor(sizes)
        scales = sizes.flip(-1).to(boxes)
        kept = [(score > threshold) & (label >= 0) for score, label in zip(scores, labels)]
        results = [
            {
                "scores": scores[index][keep],
                "labels": labels[index][keep],
                "boxes": boxes[index][keep] * scale.repeat(2),
            }
            for index, (keep, scale) in enumerate(zip(kept, scales))
        ]
        return results, kept, scales


def with_box(annotation: dict) -> dict:
    """Return an object with a `bbox`, around its corners if it has these, and the `area` that the parent reads."""
    if "corners" in annotation:
        corners = np.array(annotation["corners"], np.float32).reshape(4, 2)
        annotation = {**annotation, "corners": corners, "bbox": [*corners.min(0), *np.ptp(corners, axis=0)]}
    if "bbox" not in annotation or len(annotation["bbox"]) != 4:
        raise ValueError(f"Expected an object with a `bbox` of 4 numbers, or `corners`, got {str(annotation)[:120]}.")
    return {"area": annotation["bbox"][2] * annotation["bbox"][3], **annotation, "iscrowd": 0}


def fitted_size(image_size: tuple[int, int], max_height: int, max_width: int) -> tuple[int, int]:
    """Return height and width of an image that fits into a rectangle with its aspect ratio, rounded as in mmcv."""
    scale = min(max_height / image_size[0], max_width / image_size[1])
    return tuple(max(1, int(side * scale + 0.5)) for side in image_size)


def meets(box: list[float], height: int, width: int) -> bool:
    """Return whether a box (x, y, width, height) has an area within the image, in float32 as the parent computes."""
    x, y, box_width, box_height = np.asarray(box, np.float32)
    return min(x + box_width, width) > max(x, 0) and min(y + box_height, height) > max(y, 0)


def read_outline(outline, height: int, width: int) -> np.ndarray:
    """Return a mask, or COCO's polygons or run lengths, as a uint8 mask `(height, width)`."""
    if outline is None:
        raise ValueError("Expected a `segmentation` to create the object's mask from, got none.")
    if isinstance(outline, (dict, list)):
        check_segmentation(outline, height, width)
        try:
            from faster_coco_eval.core import mask as coco
        except ImportError as error:
            raise ImportError("polygons and run lengths need faster-coco-eval: pip install faster-coco-eval") from error
        return coco.decode([coco.segmToRle(outline, width, height)])[..., 0]
    mask = np.asarray(outline)
    if mask.shape != (height, width):
        raise ValueError(f"Expected a mask of the image's shape {(height, width)}, got {mask.shape}.")
    return (mask > 0).astype(np.uint8)


def check_segmentation(outline: dict | list, height: int, width: int) -> None:
    """Raise a `ValueError` unless `outline` is a list of polygons, or run lengths of an image of this size."""
    if isinstance(outline, dict):
        if [*outline.get("size", ())] != [height, width]:
            raise ValueError(f"Expected run lengths of the image's size {[height, width]}, got {outline.get('size')}.")
    elif not outline:
        raise ValueError("Expected a `segmentation` to create the mask from, got an empty one. Remove the object.")
    elif not all(isinstance(one, (list, tuple, np.ndarray)) and len(one) >= 4 and len(one) % 2 == 0 for one in outline):
        raise ValueError(f"Expected `segmentation` as polygons [[x, y, x, y, …], …], got {str(outline)[:60]}.")


def paste_mask(probabilities: torch.Tensor, box: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Interpolate probabilities `(28, 28)` within a box at the pixel centers of an image, 0 outside."""
    height, width = size
    pasted = probabilities.new_zeros(height, width)
    x1, y1, x2, y2 = box.unbind()
    left, top = (int(side.floor().clamp(min=0)) for side in (x1 - 1, y1 - 1))
    right, bottom = int(x2.ceil().clamp(max=width - 1)) + 1, int(y2.ceil().clamp(max=height - 1)) + 1
    if right <= left or bottom <= top or not (x2 > x1 and y2 > y1):
        return pasted
    xs, ys = (torch.arange(start, end, device=box.device) + 0.5 for start, end in ((left, right), (top, bottom)))
    ys, xs = torch.meshgrid((ys - y1) / (y2 - y1) * 2 - 1, (xs - x1) / (x2 - x1) * 2 - 1, indexing="ij")
    grid = torch.stack([xs, ys], -1)[None]
    pasted[top:bottom, left:right] = F.grid_sample(probabilities[None, None], grid, align_corners=False)[0, 0]
    return pasted


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Return COCO's run lengths of a mask: column by column, beginning with zeros."""
    values = np.concatenate([[False], mask.astype(bool).ravel(order="F")])
    ends = np.concatenate([np.flatnonzero(values[1:] != values[:-1]), [mask.size]])
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def mask_of(lengths: dict[str, list[int]]) -> np.ndarray:
    """Return the mask of [`run_lengths`], bool of shape `(height, width)`."""
    values = np.repeat(np.arange(len(lengths["counts"])) % 2 == 1, lengths["counts"])
    return values.reshape(lengths["size"], order="F")


__all__ = ["ViTPDetectionImageProcessor"]
