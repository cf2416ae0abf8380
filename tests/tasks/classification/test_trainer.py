"""Tests of the classification trainer: training samples, augmentation and prediction."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from classification_data import SMALL, write_folders
from torch.nn import functional as F

from modeling_vitp import ViTPForImageClassification, ViTPImageProcessor, ViTPVisionConfig, ViTPVisionModel
from modeling_vitp.metrics.resampling import resample
from modeling_vitp.tasks.classification.arguments import ClassificationSettings
from modeling_vitp.tasks.classification.augmentation import Augmentation
from modeling_vitp.tasks.classification.data import ClassificationData
from modeling_vitp.tasks.classification.trainer import (
    TrainingSamples,
    ViTPClassificationTrainer,
    ViTPClassificationTrainingConfig,
)

SPEC = {"window": [0, 100], "gamma": 0.5}
MEAN, STD = (np.array(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture
def trained(tmp_path):
    """Return a function from settings to a trainer of a tiny model on two classes with an input spec."""
    write_folders(tmp_path / "data", {"train": 4})
    data = ClassificationData.from_dict({"root": str(tmp_path / "data"), "input_spec": SPEC})
    names = dict(enumerate(data.find_classes(["train"])))
    torch.manual_seed(0)
    vision = ViTPVisionModel(ViTPVisionConfig(**SMALL["from_scratch"]))
    model = ViTPForImageClassification.from_backbone(
        vision, id2label=names, problem_type="single_label_classification"
    ).eval()

    def trainer(**settings) -> ViTPClassificationTrainer:
        args = ViTPClassificationTrainingConfig(
            output_dir=str(tmp_path / "out"), image_size=32, per_device_train_batch_size=4, report_to="none", **settings
        )
        processor = ViTPImageProcessor(size={"height": 32, "width": 32}, input_spec=SPEC)
        return ViTPClassificationTrainer(model, args, data.open(["train"]), processing_class=processor)

    return trainer


def test_samples_depend_on_seed_and_epoch(trained):
    def batches(epoch: int, **settings) -> list[torch.Tensor]:
        loader = trained(quarter_turns=0.5, **settings).get_train_dataloader()
        loader.set_epoch(epoch)
        return [batch["pixel_values"] for batch in loader]

    first = batches(0)
    assert [batch.shape for batch in first] == [(4, 3, 32, 32)] * 2
    assert all(torch.equal(one, other) for one, other in zip(first, batches(0)))
    assert not torch.equal(first[0], batches(1)[0])
    assert not torch.equal(first[0], batches(0, seed=7)[0])


def test_sample_is_normalized_after_augmentation(trained):
    samples = trained().train_dataset.samples
    item = TrainingSamples(samples, lambda image, seed: image, ViTPImageProcessor(), seed=0)[0, 1]
    expected = (samples[1]["image"].double().numpy() / 255 - MEAN) / STD
    np.testing.assert_allclose(item["pixel_values"], expected, atol=1e-5)
    assert item["labels"] == samples[1]["label"] and item["id"] == "field/1"


@torch.no_grad()
def test_input_spec_is_applied_once(trained):
    """Check predictions against the model with manually resized and normalized images."""
    trainer = trained()
    samples = trainer.train_dataset.samples
    images = [samples[index]["image"] for index in (0, 5)]
    assert not torch.equal(images[0], torch.full_like(images[0], 255))
    pixels = [F.interpolate(image[None].float(), (32, 32), mode="bicubic", antialias=True)[0] for image in images]
    pixels = torch.stack([(one.clamp(0, 255) / 255 - torch.tensor(MEAN)) / torch.tensor(STD) for one in pixels]).float()
    expected = trainer.model(pixels).logits.softmax(-1)
    torch.testing.assert_close(trainer.predict(images), expected, atol=5e-4, rtol=0)


def test_augmentation_rotates_flips_and_jitters():
    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).view(3, 16, 16)
    off = ClassificationSettings(image_size=16, crop_area=[1.0, 1.0], horizontal_flip=0.0, photometric=False)
    plain, turned = Augmentation(off), Augmentation(replace(off, quarter_turns=1.0))
    # Seeds whose crop is the whole image.
    square = [seed for seed in range(40) if torch.equal(plain(image, seed), image)]
    rotations = [torch.rot90(image, number, (1, 2)) for number in (1, 2, 3)]
    found = [[torch.equal(turned(image, seed), rotated) for rotated in rotations].index(True) for seed in square]
    assert set(found) == {0, 1, 2}
    mirrored = Augmentation(replace(off, horizontal_flip=1.0, vertical_flip=1.0))
    assert torch.equal(mirrored(image, square[0]), image.flip(1, 2))
    colored = Augmentation(replace(off, photometric=True))
    assert torch.equal(colored(image, square[0]), colored(image, square[0]))
    assert not torch.equal(colored(image, square[0]), image)


def test_split_is_scored_over_resamples(trained):
    trainer = trained()
    samples = trainer.train_dataset.samples
    metrics, score = trainer.evaluate(samples, metric_key_prefix="test"), trainer.metric.score_images()
    predicted = trainer.predict([samples[index]["image"] for index in range(len(samples))]).argmax(1)
    right = (predicted == samples.labels).double()
    assert metrics["test_accuracy"] == score.value == right.mean()
    expected = [right[draw].mean().item() for draw in torch.from_numpy(resample(len(samples)))]
    assert score.resampled == pytest.approx(expected)
