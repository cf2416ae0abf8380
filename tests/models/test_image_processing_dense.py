import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image
from tiny_models import VISION
from torch.nn import functional as F
from transformers import AutoImageProcessor, SegformerImageProcessor, pipeline
from transformers.modeling_outputs import SemanticSegmenterOutput

from modeling_vitp import (
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
HEAD = {"hidden_size": 16, "use_auxiliary_head": False, "backbone_kwargs": {"pyramid_channels": 16}}
SIZES = [(30, 40), (25, 50), (30, 20)]  # height, width


def by_hand(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Normalize `(height, width, 3)` in [0, 255] and pad it to `(3, height, width)`."""
    result = np.zeros((3, height, width))
    result[:, : image.shape[0], : image.shape[1]] = ((image / 255 - MEAN) / STD).transpose(2, 0, 1)
    return result


def some_mask(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, (height, width), dtype=np.uint8)


def test_images_and_masks_are_padded_to_the_largest():
    images = [picture(width, height, seed) for seed, (height, width) in enumerate(SIZES)]
    masks = [some_mask(*size, seed) for seed, size in enumerate(SIZES)]
    batch = ViTPSegmentationImageProcessor()(images, masks, return_tensors="pt")
    assert batch.keys() == {"pixel_values", "labels"}
    assert (batch["pixel_values"].shape, batch["labels"].shape) == ((3, 3, 30, 50), (3, 30, 50))
    assert (batch["pixel_values"].dtype, batch["labels"].dtype) == (torch.float32, torch.int64)
    for image, mask, pixels, labels in zip(images, masks, batch["pixel_values"], batch["labels"]):
        np.testing.assert_allclose(pixels, by_hand(np.array(image), 30, 50), atol=1e-6)
        expected = np.full((30, 50), 255)
        expected[: mask.shape[0], : mask.shape[1]] = mask
        assert np.array_equal(labels, expected)


def test_masks_of_any_kind_are_class_indices(tmp_path):
    mask = some_mask(8, 9)
    palette = Image.fromarray(mask)
    palette.putpalette([200, 10, 10, 3, 3, 3, 0, 0, 250, 90, 80, 70])
    file = tmp_path / "mask.png"
    Image.fromarray(mask).save(file)
    bits_16, int64 = Image.fromarray(mask.astype(np.uint16)), torch.from_numpy(mask).long()
    for given in (palette, Image.fromarray(mask), bits_16, int64, str(file)):
        labels = ViTPSegmentationImageProcessor()(picture(9, 8), given, return_tensors="pt")["labels"]
        assert np.array_equal(labels[0], mask)


def test_reduced_labels_ignore_zero():
    mask = np.array([[0, 1], [3, 255]], dtype=np.uint8)
    labels = ViTPSegmentationImageProcessor(do_reduce_labels=True)(picture(2, 2), mask, return_tensors="pt")["labels"]
    assert labels.tolist() == [[[255, 0], [2, 255]]]


def test_do_resize_resizes_images_and_masks():
    processor = ViTPSegmentationImageProcessor(do_resize=True, size={"height": 16, "width": 32})
    batch = processor([picture(64, 48), picture(32, 16)], [some_mask(48, 64), some_mask(16, 32)], return_tensors="pt")
    assert (batch["pixel_values"].shape, batch["labels"].shape) == ((2, 3, 16, 32), (2, 16, 32))
    assert np.array_equal(batch["labels"][0], some_mask(48, 64)[1::3, 1::2])
    assert np.array_equal(batch["labels"][1], some_mask(16, 32))
    np.testing.assert_allclose(batch["pixel_values"][1], by_hand(np.array(picture(32, 16)), 16, 32), atol=1e-6)


def test_non_rgb_images_use_input_spec(tmp_path):
    ct = np.random.default_rng(0).integers(-1000, 1000, (20, 30), dtype=np.int16)
    processor = ViTPSegmentationImageProcessor(input_spec={"window": [-160, 240]})
    gray = 255 * np.clip((ct.astype(float) + 160) / 400, 0, 1)
    expected = by_hand(np.repeat(gray[..., None], 3, axis=2), 20, 30)
    np.testing.assert_allclose(processor(ct, return_tensors="pt")["pixel_values"][0], expected, atol=1e-5)

    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(again, ViTPSegmentationImageProcessor)
    np.testing.assert_allclose(again(ct, return_tensors="pt")["pixel_values"][0], expected, atol=1e-5)


def test_pairs_give_before_and_after():
    before = [picture(width, height, seed) for seed, (height, width) in enumerate(SIZES)]
    after = [picture(width, height, 9 + seed) for seed, (height, width) in enumerate(SIZES)]
    masks = [some_mask(*size) for size in SIZES]
    processor = ViTPSegmentationImageProcessor()
    batch = processor(before, masks, images_after=after, return_tensors="pt")
    assert batch.keys() == {"pixel_values_before", "pixel_values_after", "labels"}
    alone = processor(before, masks, return_tensors="pt")
    assert torch.equal(batch["pixel_values_before"], alone["pixel_values"])
    assert torch.equal(batch["pixel_values_after"], processor(after, return_tensors="pt")["pixel_values"])
    assert torch.equal(batch["labels"], alone["labels"])


def test_predictions_have_size_of_images():
    logits = torch.randn(2, 4, 12, 10)
    outputs = SemanticSegmenterOutput(logits=logits)
    processor = ViTPSegmentationImageProcessor()
    maps = processor.post_process_semantic_segmentation(outputs, [(12, 7), (5, 10)])
    for found, scores, (height, width) in zip(maps, logits, [(12, 7), (5, 10)], strict=True):
        assert np.array_equal(found, scores.numpy()[:, :height, :width].argmax(0))
    scored = processor.post_process_semantic_segmentation(outputs, [(12, 7), (5, 10)], return_segmentation_scores=True)
    assert torch.equal(scored[1].segmentation_scores, logits[1, :, :5])
    assert [found.shape for found in processor.post_process_semantic_segmentation(outputs)] == [(12, 10)] * 2

    resizing = ViTPSegmentationImageProcessor(do_resize=True)
    (found, _) = resizing.post_process_semantic_segmentation(outputs, [(24, 30), (5, 5)])
    assert torch.equal(found, F.interpolate(logits[:1], (24, 30), mode="bilinear")[0].argmax(0))

    with pytest.raises(ValueError, match="13 x 10"):
        processor.post_process_semantic_segmentation(outputs, [(13, 10), (5, 5)])
    with pytest.raises(ValueError, match="target_sizes"):
        processor.post_process_semantic_segmentation(outputs, [(12, 10)])


def test_resized_masks_are_not_cropped():
    """Compare with transformers' own method, which always interpolates."""
    torch.manual_seed(0)
    processor = ViTPSegmentationImageProcessor()
    size = {"height": 80, "width": 80}
    pixel_values = processor(picture(40, 40), do_resize=True, size=size, return_tensors="pt")["pixel_values"]
    outputs = SemanticSegmenterOutput(logits=torch.randn(1, 3, *pixel_values.shape[-2:]))
    with pytest.raises(ValueError, match="do_resize"):
        processor.post_process_semantic_segmentation(outputs, [(40, 40)])
    (found,) = processor.post_process_semantic_segmentation(outputs, [(40, 40)], do_resize=True)
    (expected,) = SegformerImageProcessor().post_process_semantic_segmentation(outputs, [(40, 40)])
    assert torch.equal(found, expected)
    of_another = ViTPSegmentationImageProcessor(do_resize=True)
    (cropped,) = of_another.post_process_semantic_segmentation(outputs, [(40, 50)], do_resize=False)
    assert torch.equal(cropped, outputs.logits[0, :, :40, :50].argmax(0))


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    vision = ViTPVisionModel(ViTPVisionConfig(**VISION))
    processor = ViTPImageProcessor(image_mean=[0.5, 0.4, 0.3], input_spec={"gamma": 0.5})
    return export_backbone(vision, tmp_path / "backbone", processor)


@torch.no_grad()
def test_pipeline_gives_masks_of_image_size(backbone, tmp_path):
    names = {0: "ground", 1: "tree", 2: "water"}
    model = ViTPForSemanticSegmentation.from_backbone(backbone, "pyramid", id2label=names, **HEAD).eval()
    for parameter in model.decode_head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    processor = ViTPSegmentationImageProcessor.from_backbone(backbone)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    segment = pipeline("image-segmentation", model=str(tmp_path / "model"), trust_remote_code=True)
    assert isinstance(segment.model, ViTPForSemanticSegmentation)
    for image in (picture(70, 50), picture(33, 90)):
        height, width = image.height, image.width
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        padded = F.pad(pixels, (0, -width % 32, 0, -height % 32))
        maps = model.decode_head(model.backbone(padded).feature_maps)
        logits = F.interpolate(maps, padded.shape[-2:], mode="bilinear")[0, :, :height, :width]
        expected = logits.argmax(0).numpy()
        found = segment(image)
        assert [names[index] for index in np.unique(expected)] == [part["label"] for part in found]
        for part in found:
            assert np.array_equal(np.array(part["mask"]) == 255, expected == model.config.label2id[part["label"]])
