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
        indices = []
        objects = []
        for index, annotation in enumerate(target["annotations"]):
            if is_crowd(annotation):
                continue
            annotation = with_box(annotation)
            if meets(annotation["bbox"], height, width):
                indices.append(index)
                objects.append(annotation)
        prepared = super().prepare_annotation(image, {**target, "annotations": objects}, format, False, **kwargs)

        num_with_corners = sum("corners" in annotation for annotation in objects)
        if 0 < num_with_corners < len(objects):
            raise ValueError(
                f"Expected `corners` for all objects of image {target['image_id']} or for none, got both kinds."
            )
        if num_with_corners == len(objects):  # without objects, both kinds of labels are valid
            corners = np.array([annotation["corners"] for annotation in objects], np.float32).reshape(-1, 4, 2)
            prepared["corners"] = torch.from_numpy(corners).to(image.device)
        if return_segmentation_masks:
            masks = []
            for index, annotation in zip(indices, objects):
                try:
                    masks.append(read_outline(annotation.get("segmentation"), height, width))
                except (ValueError, TypeError, RuntimeError) as error:  # faster-coco-eval raises several types
                    raise ValueError(f"object {index} of image {target['image_id']}: {error}") from error
            stacked_masks = np.array(masks, np.uint8).reshape(-1, height, width)
            prepared["masks"] = torch.from_numpy(stacked_masks).to(image.device)
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
            height_ratio = target_size[0] / orig_size[0]
            width_ratio = target_size[1] / orig_size[1]
            corners = resized["corners"]
            resized["corners"] = corners * corners.new_tensor([width_ratio, height_ratio])
        return resized

    def normalize_annotation(self, annotation: dict, image_size: tuple[int, int]) -> dict:
        normalized = super().normalize_annotation(annotation, image_size)
        if "corners" in normalized:
            height, width = image_size
            corners = normalized["corners"]
            normalized["corners"] = corners / corners.new_tensor([width, height])
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
        results, _, _ = self._select(outputs, threshold, target_sizes)
        return results

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
        results, selections, scales = self._select(outputs, threshold, target_sizes)
        for result, corners, selection, scale in zip(results, outputs.pred_corners, selections, scales):
            result["corners"] = corners[selection] * scale
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
        results, selections, _ = self._select(outputs, threshold, target_sizes)
        for result, probabilities, selection, size in zip(results, outputs.pred_masks, selections, target_sizes):
            height, width = (int(side) for side in size)
            masks = []
            for mask_probabilities, box in zip(probabilities[selection], result["boxes"]):
                mask = paste_mask(mask_probabilities, box, [height, width]) >= mask_threshold
                if return_run_lengths:  # Only one mask at a time is in memory.
                    masks.append(run_lengths(mask.cpu().numpy()))
                else:
                    masks.append(mask)
            if not return_run_lengths and masks:
                masks = torch.stack(masks)
            elif not return_run_lengths:
                masks = probabilities.new_zeros(0, height, width, dtype=torch.bool)
            result["masks"] = masks
        return results

    def _select(self, outputs, threshold: float, sizes: Sizes) -> tuple[list[dict], list[torch.Tensor], torch.Tensor]:
        """Return the results of each image, the masks that select them, and the scales of x and y."""
        num_images = len(outputs.scores)
        if sizes is None:
            sizes = torch.ones(num_images, 2)
        if len(sizes) != num_images:
            raise ValueError(f"Expected {num_images} target_sizes, one for each image, got {len(sizes)}.")
        boxes = center_to_corners_format(outputs.pred_boxes)
        scales = torch.as_tensor(sizes).flip(-1).to(boxes)  # width and height
        selections = []
        results = []
        for image_scores, image_labels, image_boxes, scale in zip(outputs.scores, outputs.labels, boxes, scales):
            selection = (image_scores > threshold) & (image_labels >= 0)
            selections.append(selection)
            results.append(
                {
                    "scores": image_scores[selection],
                    "labels": image_labels[selection],
                    "boxes": image_boxes[selection] * scale.repeat(2),
                }
            )
        return results, selections, scales


def is_crowd(annotation: dict) -> bool:
    flag = str(annotation.get("iscrowd") or 0)
    return flag.strip().lower() not in ("0", "false")


def with_box(annotation: dict) -> dict:
    """Return an object with a `bbox`, around its corners if it has these, and the `area` that the parent reads."""
    if "corners" in annotation:
        corners = np.array(annotation["corners"], np.float32).reshape(4, 2)
        annotation = {**annotation, "corners": corners, "bbox": [*corners.min(0), *np.ptp(corners, axis=0)]}
    box = annotation.get("bbox", ())
    if len(box) != 4:
        raise ValueError(f"Expected an object with a `bbox` of 4 numbers, or `corners`, got {str(annotation)[:120]}.")
    _, _, width, height = box
    return {"area": width * height, **annotation, "iscrowd": 0}


def fitted_size(image_size: tuple[int, int], max_height: int, max_width: int) -> tuple[int, int]:
    """Return height and width of an image that fits into a rectangle with its aspect ratio, rounded as in mmcv."""
    height, width = image_size
    scale = min(max_height / height, max_width / width)
    fitted_height = int(height * scale + 0.5)
    fitted_width = int(width * scale + 0.5)
    return max(1, fitted_height), max(1, fitted_width)


def meets(box: list[float], height: int, width: int) -> bool:
    """Return whether a box (x, y, width, height) has an area within the image, in float32 as the parent computes."""
    x, y, box_width, box_height = np.asarray(box, np.float32)
    has_width = min(x + box_width, width) > max(x, 0)
    has_height = min(y + box_height, height) > max(y, 0)
    return has_width and has_height


def read_outline(outline, height: int, width: int) -> np.ndarray:
    """Return a mask, or COCO's polygons or run lengths, as a uint8 mask `(height, width)`."""
    if not is_outline(outline, height, width):
        is_array = hasattr(outline, "shape")
        content = f"an array of shape {tuple(outline.shape)}" if is_array else str(outline)[:60]
        raise ValueError(
            "Expected a `segmentation` to create the object's mask from: a mask or run lengths of the image's size "
            f"{(height, width)}, or one or more polygons [[x, y, x, y, …], …], got {content}."
        )
    if not isinstance(outline, (dict, list)):
        return (np.asarray(outline) > 0).astype(np.uint8)
    try:
        from faster_coco_eval.core import mask as coco
    except ImportError as error:
        raise ImportError("polygons and run lengths need faster-coco-eval: pip install faster-coco-eval") from error
    encoded_mask = coco.segmToRle(outline, width, height)
    return coco.decode([encoded_mask])[..., 0]


def is_outline(outline, height: int, width: int) -> bool:
    """Return whether an outline is a list of polygons, or run lengths or a mask of an image of this size."""
    if isinstance(outline, dict):
        return list(outline.get("size", ())) == [height, width]
    if not isinstance(outline, list):
        return np.shape(outline) == (height, width)
    for polygon in outline:
        if not isinstance(polygon, (list, tuple, np.ndarray)) or len(polygon) < 4 or len(polygon) % 2 != 0:
            return False
    return len(outline) > 0


def paste_mask(probabilities: torch.Tensor, box: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Interpolate probabilities `(28, 28)` within a box at the pixel centers of an image, 0 outside."""
    height, width = size
    pasted = probabilities.new_zeros(height, width)
    x1, y1, x2, y2 = box.unbind()
    left = int((x1 - 1).floor().clamp(min=0))
    top = int((y1 - 1).floor().clamp(min=0))
    right = int(x2.ceil().clamp(max=width - 1)) + 1
    bottom = int(y2.ceil().clamp(max=height - 1)) + 1
    has_area = x2 > x1 and y2 > y1
    if right <= left or bottom <= top or not has_area:
        return pasted
    pixel_x = torch.arange(left, right, device=box.device) + 0.5
    pixel_y = torch.arange(top, bottom, device=box.device) + 0.5
    # Positions in the box, from -1 to 1, where `grid_sample` reads the probabilities.
    relative_x = (pixel_x - x1) / (x2 - x1) * 2 - 1
    relative_y = (pixel_y - y1) / (y2 - y1) * 2 - 1
    grid_y, grid_x = torch.meshgrid(relative_y, relative_x, indexing="ij")
    grid = torch.stack([grid_x, grid_y], -1)[None]
    sampled = F.grid_sample(probabilities[None, None], grid, align_corners=False)
    pasted[top:bottom, left:right] = sampled[0, 0]
    return pasted


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Return COCO's run lengths of a mask: column by column, beginning with zeros."""
    pixels = mask.astype(bool).ravel(order="F")
    values = np.concatenate([[False], pixels])
    changes = np.flatnonzero(values[1:] != values[:-1])
    ends = np.concatenate([changes, [mask.size]])
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def mask_of(lengths: dict[str, list[int]]) -> np.ndarray:
    """Return the mask of [`run_lengths`], bool of shape `(height, width)`."""
    counts = lengths["counts"]
    is_object = np.arange(len(counts)) % 2 == 1
    pixels = np.repeat(is_object, counts)
    return pixels.reshape(lengths["size"], order="F")


__all__ = ["ViTPDetectionImageProcessor"]
