"""Tests of the segmentation trainer: training samples."""

from types import SimpleNamespace

import dense_data
import numpy as np
import pytest
import torch

from modeling_vitp import ViTPForSemanticSegmentation, ViTPSegmentationImageProcessor
from modeling_vitp.tasks import TASKS
from modeling_vitp.tasks.arguments import BackboneArguments
from modeling_vitp.tasks.segmentation.data import DenseData
from modeling_vitp.tasks.segmentation.trainer import (
    TrainingSamples,
    ViTPSegmentationTrainer,
    ViTPSegmentationTrainingConfig,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    dense_data.make_loveda(root)
    return DenseData.from_dict(dense_data.read_config("loveda")["data"] | {"root": str(root)})


def test_samples_depend_on_seed_and_epoch(data, tmp_path):
    args = ViTPSegmentationTrainingConfig(output_dir=str(tmp_path / "out"), crop_size=32, per_device_train_batch_size=2)
    model = ViTPForSemanticSegmentation.from_backbone(
        dense_data.tiny_backbone(), num_labels=7, backbone_kwargs=dense_data.BACKBONE, **dense_data.HEAD
    )

    def batches(epoch: int, **changes):
        for name, value in changes.items():
            setattr(args, name, value)
        trainer = ViTPSegmentationTrainer(model, args, data.encoding, "mean_iou", train_dataset=data.open(["train"]))
        loader = trainer.get_train_dataloader()
        loader.set_epoch(epoch)
        return [batch["pixel_values"] for batch in loader]

    first = batches(0)
    assert [batch.shape for batch in first] == [(2, 3, 32, 32)] * 3
    assert all(torch.equal(one, other) for one, other in zip(first, batches(0)))
    assert not torch.equal(first[0], batches(1)[0])
    assert all(torch.equal(one, other) for one, other in zip(first, batches(0, dataloader_num_workers=1)))
    assert not torch.equal(first[0], batches(0, seed=7, dataloader_num_workers=0)[0])


def test_sample_is_normalized_after_augmentation(data):
    samples = data.open(["train"])
    item = TrainingSamples(
        samples, lambda images, mask, seed: (images, mask), ViTPSegmentationImageProcessor(), seed=0
    )[0, 1]
    pixels = samples[1]["images"][0].double().numpy() / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(item["pixel_values"], expected, atol=1e-5)
    assert item["labels"].dtype == torch.int64
    assert np.array_equal(item["labels"], samples[1]["mask"])


@pytest.mark.parametrize("pad_windows", [False, True])
@torch.no_grad()
def test_small_image_is_padded_to_the_window(data, tmp_path, pad_windows):
    torch.manual_seed(0)
    model = ViTPForSemanticSegmentation.from_backbone(
        dense_data.tiny_backbone(), num_labels=7, backbone_kwargs=dense_data.BACKBONE, **dense_data.HEAD
    )
    args = ViTPSegmentationTrainingConfig(output_dir=str(tmp_path / "out"), window=96, pad_windows=pad_windows)
    trainer = ViTPSegmentationTrainer(model, args, data.encoding, "mean_iou")
    image = torch.randint(0, 256, (3, 64, 40), dtype=torch.uint8)
    image_processor = ViTPSegmentationImageProcessor()
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    std = torch.tensor(image_processor.image_std)[:, None, None]
    pixels = (image / 255 - mean) / std
    if pad_windows:
        padded = torch.zeros(3, 96, 96)
        padded[:, :64, :40] = pixels
        pixels = padded
    logits = model.eval()(pixels[None]).logits[0, :, :64, :40]
    predicted = trainer.predict_labels([image])
    assert predicted.shape == (64, 40)
    assert np.mean(predicted == logits.argmax(0).numpy()) > 0.999  # of equal logits, either is right
    if pad_windows:
        other = model(pixels[None, :, :64, :40]).logits[0].argmax(0).numpy()
        assert np.mean(predicted == other) < 0.999


@pytest.mark.parametrize(("crop_size", "side"), [(64, 64), (80, 96)])
def test_positions_are_interpolated_once_to_the_crop(data, tmp_path, crop_size, side):
    """The model pads a crop of 80 pixels to 96."""
    backbone = dense_data.tiny_backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    start = BackboneArguments(model_name_or_path=str(tmp_path / "backbone"), backbone=dense_data.BACKBONE)
    options = SimpleNamespace(
        start=start, training=SimpleNamespace(crop_size=crop_size), data=SimpleNamespace(class_weights=None)
    )
    model = TASKS["segmentation"].load_model(data, options, {})
    grid = backbone.embeddings.position_embeddings[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resampled = torch.nn.functional.interpolate(grid, size=side // 16, mode="bicubic", align_corners=False)
    positions = model.backbone.embeddings.position_embeddings
    torch.testing.assert_close(positions[:, 1:], resampled.flatten(2).transpose(1, 2))
    assert positions.requires_grad and list(model.config.backbone_config.image_size) == [side, side]
