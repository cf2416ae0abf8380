"""Image processor for dense tasks: images and masks at their own size, padded to the largest of a batch."""

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from transformers import BatchFeature, SegformerImageProcessor
from transformers.image_utils import ChannelDimension, ImageInput
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.segformer.image_processing_segformer import SegformerImageProcessorKwargs
from transformers.utils import TensorType

from .image_processing_vitp import InputSpecImageProcessor
from .input_spec import InputSpec

IGNORE_INDEX = 255


class ViTPSegmentationImageProcessorKwargs(SegformerImageProcessorKwargs, total=False):
    r"""Keyword arguments of [`ViTPSegmentationImageProcessor`].

    input_spec (`dict`, *optional*):
        Conversion of images that are not 8-bit RGB to the model's channels: the fields of [`InputSpec`].
    """

    input_spec: dict | None


class ViTPSegmentationImageProcessor(InputSpecImageProcessor, SegformerImageProcessor):
    """Image processor for [`ViTPForSemanticSegmentation`] and [`ViTPForChangeDetection`].

    Images keep their size unless `do_resize=True`, which resizes them to `size`. In a batch they are padded at the
    right and at the bottom to the largest: images with zeros after normalization, labels with 255, which the loss
    ignores.
    """

    valid_kwargs = ViTPSegmentationImageProcessorKwargs
    do_resize = False

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        images_after: ImageInput | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""Prepare images and their masks for a model.

        Args:
            images (`ImageInput`):
                One image or several, of any kind that the input spec covers. File paths are opened.
            segmentation_maps (`ImageInput`, *optional*):
                Masks of the images: class indices of shape `(height, width)`, as arrays, tensors, or grayscale or
                palette images.
            images_after (`ImageInput`, *optional*):
                Later images of the same places, for change detection.

        Returns:
            `pixel_values`, float32 of shape `(batch_size, num_channels, height, width)`, or for pairs
            `pixel_values_before` and `pixel_values_after`; with masks `labels`, int64 of shape
            `(batch_size, height, width)`.

        Raises:
            ValueError: if an image and its mask or its later image differ in size or number, or a mask does not have
                class indices.
        """
        return super().preprocess(images, segmentation_maps, image_like_kwargs={"images_after": images_after}, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        images_after: ImageInput | None,
        input_spec: dict | None,
        do_convert_rgb: bool | None,
        input_data_format: str | ChannelDimension | None,
        do_reduce_labels: bool,
        return_tensors: str | TensorType | None,
        do_rescale: bool,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> BatchFeature:
        def read(images: ImageInput) -> list[torch.Tensor]:
            return self._prepare_image_like_inputs(
                images,
                input_spec=input_spec,
                do_convert_rgb=do_convert_rgb,
                input_data_format=input_data_format,
                do_rescale=do_rescale,
                device=device,
            )

        def normalized(images: list[torch.Tensor]) -> list[torch.Tensor]:
            images = self._preprocess(images, do_reduce_labels=False, do_rescale=do_rescale, **kwargs)
            return self.pad(images)

        images = read(images)
        if images_after is None:
            data = {"pixel_values": normalized(images)}
        else:
            later_images = read(images_after)
            check_sizes(images, later_images, "image after")
            data = {
                "pixel_values_before": normalized(images),
                "pixel_values_after": normalized(later_images),
            }
        if segmentation_maps is not None:
            stored_masks = self.fetch_images(segmentation_maps, InputSpec())  # class indices, not bands
            stored_masks = self._prepare_images_structure(stored_masks, expected_ndims=2)
            masks = [read_mask(mask) for mask in stored_masks]
            check_sizes(images, masks, "mask")
            mask_options = {
                **kwargs,
                "do_rescale": False,
                "do_normalize": False,
                "resample": InterpolationMode.NEAREST_EXACT,
            }
            masks = self._preprocess(masks, do_reduce_labels=do_reduce_labels, **mask_options)
            padded_masks = self.pad(masks, fill_value=IGNORE_INDEX)
            data["labels"] = [mask[0].long() for mask in padded_masks]
        return BatchFeature(data, tensor_type=return_tensors)

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: list[tuple[int, int]] | None = None,
        return_segmentation_scores: bool = False,
        do_resize: bool | None = None,
    ) -> list:
        r"""Convert logits to maps of class indices.

        Args:
            outputs ([`~transformers.modeling_outputs.SemanticSegmenterOutput`]):
                Output of the model.
            target_sizes (`list[tuple[int, int]]`, *optional*):
                Original height and width of each image of the batch. The padding is cropped off or, with `do_resize`,
                the logits are interpolated.
            return_segmentation_scores (`bool`, defaults to `False`):
                Whether to return the logits too, as the parent does.
            do_resize (`bool`, *optional*):
                Whether the images were resized. Defaults to the processor's setting. Set it if the preprocessing call
                differed from that.

        Returns:
            A map of class indices for each image, int64 of shape `(height, width)`.

        Raises:
            ValueError: if a target size is larger than the logits, their number is not that of the images, or the
                largest differs from the logits' size and `do_resize` is not set.
        """
        is_resized = self.do_resize if do_resize is None else do_resize
        if is_resized or target_sizes is None:
            return super().post_process_semantic_segmentation(outputs, target_sizes, return_segmentation_scores)
        logits = outputs.logits
        if len(logits) != len(target_sizes):
            raise ValueError(f"Expected {len(logits)} target_sizes, one for each image, got {len(target_sizes)}.")
        logits_height, logits_width = logits.shape[-2:]
        largest_height = max(int(height) for height, _ in target_sizes)
        largest_width = max(int(width) for _, width in target_sizes)
        is_too_large = largest_height > logits_height or largest_width > logits_width
        is_different = largest_height != logits_height or largest_width != logits_width
        if is_too_large or (is_different and do_resize is None):
            raise ValueError(
                f"The logits are {logits_height} x {logits_width}, but the largest of target_sizes is {largest_height} "
                f"x {largest_width}. Pass the original sizes of the images, and set do_resize=True if the images were "
                "resized, False if they were padded further."
            )
        results = []
        for image_logits, (height, width) in zip(logits, target_sizes):
            cropped = SemanticSegmenterOutput(logits=image_logits[None, :, :height, :width])
            results += super().post_process_semantic_segmentation(cropped, None, return_segmentation_scores)
        return results


def read_mask(mask: ImageInput) -> torch.Tensor:
    """Return a mask as int64 of shape `(1, height, width)`."""
    if not isinstance(mask, torch.Tensor):
        mask = torch.from_numpy(np.array(mask))
    if mask.ndim != 2 or mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"Expected a mask of integer class indices of shape (height, width), got dtype "
            f"{str(mask.dtype).removeprefix('torch.')} and shape {tuple(mask.shape)}."
        )
    return mask[None].long()


def check_sizes(images: list[torch.Tensor], counterparts: list[torch.Tensor], kind: str) -> None:
    if len(images) != len(counterparts):
        raise ValueError(f"Expected one {kind} for each of {len(images)} images, got {len(counterparts)}.")
    for index, (image, counterpart) in enumerate(zip(images, counterparts)):
        height, width = image.shape[-2:]
        other_height, other_width = counterpart.shape[-2:]
        if height != other_height or width != other_width:
            raise ValueError(
                f"Image {index} is {height} x {width}, but its {kind} is {other_height} x {other_width} (height x "
                "width)."
            )


__all__ = ["ViTPSegmentationImageProcessor"]
