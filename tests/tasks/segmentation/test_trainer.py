"""Tests of the segmentation trainer: training samples."""

import dense_data
import numpy as np
import pytest
import torch

from modeling_vitp import ViTPForSemanticSegmentation, ViTPSegmentationImageProcessor
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
