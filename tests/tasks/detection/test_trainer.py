"""Tests of the detection trainer: training samples, batches and metrics."""

import json
from contextlib import redirect_stdout
from io import StringIO
from itertools import cycle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from detection_data import HEIGHT, NAMES, WIDTH, build_augmentation, write_coco, write_dota
from evaluate import load
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_models import adapter_config

from modeling_vitp.image_processing_vitp_detection import ViTPDetectionImageProcessor
from modeling_vitp.metrics.report import METRICS_FOLDER
from modeling_vitp.tasks.detection.data import DetectionData
from modeling_vitp.tasks.detection.trainer import (
    TASK_MODELS,
    TrainingSamples,
    ViTPDetectionTrainer,
    ViTPDetectionTrainingConfig,
    collate,
    reference,
)

IMAGES = ["a_001", "b_002", "empty_003"]


def open_samples(root, task, **split):
    write, form, annotations = write_coco, "coco", "instances.json"
    if task == "oriented":
        write, form, annotations = write_dota, "dota", "annfiles"
    write(root, IMAGES)
    splits = {"train": {"images": "images", "annotations": annotations, **split}}
    data = DetectionData.from_dict({"root": str(root), "format": form, "classes": NAMES, "splits": splits})
    return data.open(["train"], task)


def tiny_trainer(folder, task, **options):
    torch.manual_seed(0)
    model_class = TASK_MODELS[task]
    sizes = {"neck_channels": 16, "head_hidden_size": 32, "id2label": dict(enumerate(NAMES))}
    model = model_class(model_class.config_class(backbone_config=adapter_config(), **sizes))
    config = ViTPDetectionTrainingConfig(
        str(folder), report_to="none", bf16=False, use_cpu=True, per_device_eval_batch_size=1
    )
    return ViTPDetectionTrainer(model, config, task, **options)


def normalized(image):
    """Return the pixels of an image with the mean and standard deviation of ImageNet."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return (image.double().numpy() / 255 - mean[:, None, None]) / std[:, None, None]


def test_sample_is_normalized_with_relative_boxes(tmp_path):
    samples = open_samples(tmp_path, "horizontal")
    augmentation = build_augmentation(WIDTH, flips=(0, 0, 0))
    training = TrainingSamples(samples, augmentation, ViTPDetectionImageProcessor(), 0, False)
    item, raw = training[0, 1], samples[1]
    np.testing.assert_allclose(item["pixel_values"], normalized(raw["image"]), atol=1e-5)
    low, high = raw["corners"].amin(1), raw["corners"].amax(1)
    boxes = torch.cat([(low + high) / 2, high - low], 1) / torch.tensor([WIDTH, HEIGHT] * 2)
    torch.testing.assert_close(item["labels"]["boxes"], boxes)


def test_input_spec_is_applied_once(tmp_path):
    """Check that the model inputs in evaluation are the normalized samples."""
    image = open_samples(tmp_path, "horizontal")[1]["image"]
    processor = ViTPDetectionImageProcessor(input_spec={"window": [0, 100], "gamma": 0.5})
    trainer = tiny_trainer(tmp_path, "horizontal", processing_class=processor)
    with mock.patch.object(trainer.model, "forward", wraps=trainer.model.forward) as forward:
        trainer.detect([image])
    np.testing.assert_allclose(forward.call_args.kwargs["pixel_values"][0], normalized(image), atol=1e-5)


def test_samples_depend_on_seed_and_epoch(tmp_path):
    samples, processor = open_samples(tmp_path, "oriented"), ViTPDetectionImageProcessor()
    augmentation = build_augmentation(64, flips=(0.25, 0.25, 0.25), rotation=0.7)

    def draws(seed, epoch):
        training = TrainingSamples(samples, augmentation, processor, seed, True)
        return [training[epoch, place]["pixel_values"] for place in range(2)]

    first = draws(0, 0)
    assert all(torch.equal(one, other) for one, other in zip(first, draws(0, 0)))
    assert not all(torch.equal(one, other) for one, other in zip(first, draws(0, 1)))
    assert not all(torch.equal(one, other) for one, other in zip(first, draws(1, 0)))


def test_scores_do_not_depend_on_batch_size(tmp_path):
    trainer = tiny_trainer(tmp_path, "horizontal")
    model = trainer.model.eval()
    sizes = [(64, 96), (96, 64), (64, 96), (96, 96), (64, 64), (96, 64)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    alone = []
    for image in images:  # an oracle without the trainer: one image, no padding
        inputs = trainer.processing_class(images=[image], input_data_format="channels_first", return_tensors="pt")
        with torch.no_grad():
            alone.append(model(inputs["pixel_values"]).scores[0])
    for batch_size in (3, 6):
        found = []
        for start in range(0, len(images), batch_size):
            found += trainer.detect(images[start : start + batch_size])
        for one, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(one["scores"], expected[expected > 0], atol=1e-5, rtol=0)
    assert sum(map(len, alone)) > 20


def test_batch_is_padded_with_masks(tmp_path):
    samples, processor = open_samples(tmp_path, "instances"), ViTPDetectionImageProcessor()
    items = []
    for size in (48, 96):
        augmentation = build_augmentation(size, flips=(0, 0, 0))
        items.append(TrainingSamples(samples, augmentation, processor, 0, False)[0, 0])
    batch = collate(items)
    assert batch["pixel_values"].shape == (2, 3, 80, 96) and batch["pixel_mask"].shape == (2, 80, 96)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [40 * 48, 80 * 96]
    assert torch.equal(batch["pixel_values"][0, :, :40, :48], items[0]["pixel_values"])
    assert not batch["pixel_values"][0, :, 40:].any() and not batch["pixel_values"][0, :, :, 48:].any()
    masks = batch["labels"][0]["masks"]
    assert masks.shape[1:] == (80, 96) and torch.equal(masks[:, :40, :48], items[0]["labels"]["masks"])
    assert not masks[:, 40:].any() and masks.any()
    torch.testing.assert_close(batch["labels"][0]["boxes"], batch["labels"][1]["boxes"])


def test_oriented_annotations_reach_the_metrics(tmp_path):
    for item in open_samples(tmp_path, "oriented"):
        found = reference(item, "oriented")
        for name in ("labels", "corners", "difficult", "crowd"):
            assert torch.equal(found[name], item[name])


def test_options_are_those_of_the_metric_of_boxes(tmp_path):
    options = {"metric": "average_precision", "metric_options": {"interpolation": "area"}}
    metrics = tiny_trainer(tmp_path, "instances", **options).metrics
    assert metrics["box_"].interpolation == "area" and metrics["mask_"].masks
    with pytest.raises(ValueError, match="metric_options.*interp"):
        tiny_trainer(tmp_path, "oriented", metric_options={"interp": 1})


@pytest.mark.parametrize("task", ["horizontal", "instances"])
def test_annotated_area_determines_object_size(tmp_path, task):
    """Check that the annotated area, not that of the box, determines the object size, as in pycocotools."""
    write_coco(tmp_path, IMAGES)
    contents = json.loads((tmp_path / "instances.json").read_text())
    annotations = contents["annotations"]
    for annotation, area in zip(annotations, cycle([500, 5000, 20_000])):
        annotation["area"] = area
    without = annotations[0].pop("area")
    (tmp_path / "instances.json").write_text(json.dumps(contents))
    splits = {"train": {"images": "images", "annotations": "instances.json"}}
    data = DetectionData.from_dict({"root": str(tmp_path), "format": "coco", "classes": NAMES, "splits": splits})
    samples, masks = data.open(["train"], task), task == "instances"
    metric = load(str(METRICS_FOLDER / "coco_average_precision"), num_labels=2, masks=masks)
    image_ids = {Path(image["file_name"]).stem: image["id"] for image in contents["images"]}
    categories = {category["name"]: category["id"] for category in contents["categories"]}
    found, random = [], np.random.default_rng(0)
    for index in range(len(samples)):
        item = samples[index]
        there = reference(item, task)
        places = {"boxes": there["boxes"] + random.integers(0, 3)}
        if masks:
            places = {"masks": there["masks"].roll(1, 2)}
        scores = torch.from_numpy(random.random(len(there["labels"])))
        metric.add(prediction={"labels": there["labels"], "scores": scores, **places}, reference=there)
        for number, (label, score) in enumerate(zip(there["labels"].tolist(), scores.tolist())):
            entry = {"image_id": image_ids[item["id"]], "category_id": categories[NAMES[label]], "score": score}
            if masks:
                entry["segmentation"] = run_lengths.encode(np.asfortranarray(places["masks"][number].numpy()))
            else:
                left, top, right, bottom = places["boxes"][number].tolist()
                entry["bbox"] = [left, top, right - left, bottom - top]
            found.append(entry)
    annotations[0]["area"] = 100  # A small area, like that of the box and of the mask.
    assert without == 500 and annotations[0]["bbox"][2] * annotations[0]["bbox"][3] < 32**2
    for annotation in annotations:
        annotation["id"] += 1  # pycocotools treats the id 0 as no match.
    with redirect_stdout(StringIO()):
        truth = COCO()
        truth.dataset = contents
        truth.createIndex()
        scoring = COCOeval(truth, truth.loadRes(found), "segm" if masks else "bbox")
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    result = metric.compute()
    expected = np.where(scoring.stats == -1, np.nan, scoring.stats)
    np.testing.assert_allclose(list(result.values())[:12], expected, atol=1e-9)
    assert len({result["map_small"], result["map_medium"], result["map_large"]}) > 1


@pytest.mark.parametrize(("task", "main"), [("oriented", "map"), ("instances", "mask_map")])
def test_split_is_scored_over_resamples_of_images(tmp_path, monkeypatch, task, main):
    def detect(self, images):
        """Return the first object of each window."""
        found = {key: values[:1] for key, values in next(truth).items() if key not in ("area", "difficult", "crowd")}
        return [found | {"scores": torch.full((len(found["labels"]),), 0.5)}]

    samples = open_samples(tmp_path, task, tile={"size": 48, "overlap": 8})
    truth = iter([reference(item, task) for item in samples])
    trainer = tiny_trainer(tmp_path, task)
    monkeypatch.setattr(ViTPDetectionTrainer, "detect", detect)
    metrics, score = trainer.evaluate(samples, metric_key_prefix="test"), trainer.metric.score_images()
    assert len(trainer.metric.cases) == 3 < len(samples)
    assert metrics[f"test_{main}"] == score.value and 0 < score.value < 1
    assert len(score.resampled) == 200 and min(score.resampled) < score.value < max(score.resampled)
