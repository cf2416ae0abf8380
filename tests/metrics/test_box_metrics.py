"""Tests of the average precision of Pascal VOC and COCO."""

import contextlib
import io
import json

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics_run import METRICS
from paths import FIXTURES
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

from modeling_vitp.rotated_boxes import corners

FOLDER = FIXTURES / "rotated_evaluation"
PLACES = ("boxes", "labels", "scores")


def load(name, **options):
    return evaluate.load(str(METRICS / name), **{"num_labels": 4, **options})


@pytest.fixture(scope="module")
def metrics():
    found = {kind: load("average_precision", interpolation=kind) for kind in ("11_points", "area")}
    return found | {"difficult_counts": load("average_precision", interpolation="area", difficult_counts=True)}


@pytest.mark.parametrize(
    ("iou", "interpolation", "places"),
    [(0.5, "11_points", "boxes"), (0.5, "area", "corners"), (0.75, "11_points", "corners"), (0.75, "area", "boxes")],
)
def test_rotated_boxes_score_like_mmrotate(iou, interpolation, places):
    given = load_file(FOLDER / "detections.safetensors")
    expected = json.loads((FOLDER / "expected.json").read_text())["map"]
    expected = expected[f"iou {iou}, {interpolation.replace('_', ' ')}"]
    metric = load("average_precision", iou_thresholds=(iou,), interpolation=interpolation)

    def side(prefix, *more):
        found = {key: given[f"{prefix}.{key}"] for key in ("boxes", "labels", *more)}
        return found if places == "boxes" else {**found, "corners": corners(found.pop("boxes").double())}

    for image in range(6):
        metric.add(prediction=side(image, "scores"), reference=side(f"{image}.gt"))
    result = metric.compute()
    assert result["map"] == pytest.approx(expected["map"], abs=1e-6)
    # mmrotate scores a class without objects 0 and leaves it out of the mean.
    values = [nan if not number else value for value, number in zip(expected["per_class"], expected["num_gts"])]
    np.testing.assert_allclose(result[f"per_category_ap_{100 * iou:g}"], values, rtol=0, atol=1e-6)


nan = float("nan")


@st.composite
def images(draw):
    """Draw images with upright boxes on a coarse grid, so that overlaps and scores are often equal."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes = draw(st.integers(1, 3))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        boxes = [np.sort(random.integers(0, 5, (random.integers(0, 7), 2, 2)), 1).reshape(-1, 4) for _ in range(2)]
        boxes = [one[(one[:, 2:] > one[:, :2]).all(1)] for one in boxes]
        labels = [random.integers(0, classes, len(one)) for one in boxes]
        prediction = {"boxes": boxes[0], "labels": labels[0], "scores": random.integers(0, 9, len(boxes[0])) / 8}
        marks = {name: random.random(len(boxes[1])) < 0.3 for name in ("difficult", "crowd")}
        reference = {"boxes": boxes[1], "labels": labels[1], **marks}
        found.append((prediction, reference))
    return found


def overlap(one, other):
    sides = [max(0, min(one[2 + axis], other[2 + axis]) - max(one[axis], other[axis])) for axis in (0, 1)]
    area = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return sides[0] * sides[1] / (area - sides[0] * sides[1])


def voc_by_a_loop(images, label, kind, difficult_counts):
    """Return the average precision of a class as in the development kit of Pascal VOC."""
    detections, number, taken = [], 0, set()
    for image, (prediction, reference) in enumerate(images):
        hard = reference["crowd"] if difficult_counts else reference["difficult"] | reference["crowd"]
        number += sum(one == label and not skip for one, skip in zip(reference["labels"], hard))
        for box, own, score in zip(*(prediction[key] for key in PLACES)):
            if own == label:
                detections.append((-score, len(detections), image, box, hard))
    right = []
    for _, _, image, box, hard in sorted(detections, key=lambda one: one[:2]):
        best, place = 0.0, None
        for index, other in enumerate(images[image][1]["boxes"]):
            if images[image][1]["labels"][index] == label and overlap(box, other) > best:
                best, place = overlap(box, other), index
        if best < 0.5:
            right.append(False)
        elif not hard[place]:
            right.append((image, place) not in taken)
            taken.add((image, place))
    if not number:
        return nan
    points = [(sum(right[: k + 1]), sum(right[: k + 1]) / (k + 1)) for k in range(len(right))]
    if kind == "11_points":
        return sum(max((p for r, p in points if 10 * r >= k * number), default=0) for k in range(11)) / 11
    return sum(max((p for r, p in points if r >= k), default=0) for k in range(1, number + 1)) / number


@settings(deadline=None, max_examples=40)
@given(images=images())
def test_average_precision_equals_loop(metrics, images):
    for name, metric in metrics.items():
        kind, counts = ("area", True) if name == "difficult_counts" else (name, False)
        result = metric.compute(predictions=[one for one, _ in images], references=[one for _, one in images])
        expected = [voc_by_a_loop(images, label, kind, counts) for label in range(4)]
        np.testing.assert_allclose(result["per_category_ap_50"], expected, rtol=0, atol=1e-12)


def test_upright_boxes_score_like_rotated_boxes():
    random = np.random.default_rng(0)
    upright, rotated = load("average_precision"), load("average_precision")
    for _ in range(5):
        low, sides = (np.tile(random.uniform(*range_, (6, 2)), (2, 1)) for range_ in ((0, 50), (5, 40)))
        low[6:] += random.uniform(0, 4, (6, 2))
        labels, scores = np.tile(random.integers(0, 4, 6), 2), random.random(6)
        boxes = np.concatenate([low, low + sides], 1)
        turned = np.concatenate([low + sides / 2, sides, np.zeros((12, 1))], 1)
        for metric, places in ((upright, boxes), (rotated, turned)):
            metric.add(
                prediction={"boxes": places[:6], "labels": labels[:6], "scores": scores},
                reference={"boxes": places[6:], "labels": labels[6:]},
            )
    expected = upright.compute()
    assert expected["map"] > 0
    np.testing.assert_allclose(rotated.compute()["per_category_ap_50"], expected["per_category_ap_50"], atol=1e-12)


def boxes_and_masks(random, number):
    """Return boxes in pixels, with masks that fill three quarters of them."""
    low = random.uniform(0, 150, (number, 2))
    boxes = np.concatenate([low, low + random.uniform(4, 120, (number, 2))], 1).round()
    masks = np.zeros((number, 256, 256), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int)):
        mask[top:bottom, left:right] = True
        mask[top : (top + bottom) // 2, left : (left + right) // 2] = False
    return boxes, masks


def a_data_set():
    """Return images with correct and wrong detections, a class without objects, a crowd, and empty images."""
    random = np.random.default_rng(0)
    predictions, references = [], []
    for image in range(10):
        objects, more = random.integers(0, 12), 0 if image == 3 else random.integers(0, 120)
        boxes, masks = boxes_and_masks(random, objects)
        labels = random.integers(0, 3, objects)
        references.append({"boxes": boxes, "masks": masks, "labels": labels, "crowd": random.random(objects) < 0.2})
        other_boxes, other_masks = boxes_and_masks(random, more)
        shift = random.integers(0, 6, (objects, 2))
        moved = [np.roll(mask, tuple(by[::-1]), (0, 1)) for mask, by in zip(masks, shift)]
        predictions.append(
            {
                "boxes": np.concatenate([boxes + np.tile(shift, 2), other_boxes]),
                "masks": np.concatenate([np.array(moved).reshape(-1, 256, 256), other_masks]),
                "labels": np.concatenate([labels, random.integers(0, 4, more)]),
                "scores": random.random(objects + more).round(2),
            }
        )
    return predictions, references


def scores_of_pycocotools(predictions, references, masks):
    images = [{"id": image, "height": 256, "width": 256} for image in range(1, len(references) + 1)]
    truth, found = [], []
    for image, sides in enumerate(zip(predictions, references), start=1):
        for side, entries in zip(sides, (found, truth)):
            runs = run_lengths.encode(np.asfortranarray(side["masks"].transpose(1, 2, 0).astype(np.uint8)))
            for place, (label, box) in enumerate(zip(side["labels"], side["boxes"])):
                entry = {"image_id": image, "category_id": int(label), "id": len(entries) + 1}
                sizes = box[2:] - box[:2]
                if masks:
                    entry |= {"segmentation": runs[place], "area": int(run_lengths.area(runs[place]))}
                else:
                    entry |= {"bbox": [*box[:2], *sizes], "area": sizes.prod()}
                if entries is truth:
                    entry["iscrowd"] = int(side["crowd"][place])
                else:
                    entry["score"] = side["scores"][place]
                entries.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = {"images": images, "annotations": truth, "categories": [{"id": label} for label in range(4)]}
        data.createIndex()
        scoring = COCOeval(data, data.loadRes(found), "segm" if masks else "bbox")
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return scoring.stats, scoring.eval["precision"][..., 0, 2]


@pytest.mark.parametrize("masks", [False, True])
def test_coco_scores_equal_pycocotools(masks):
    predictions, references = a_data_set()
    metric = load("coco_average_precision", masks=masks)
    for prediction, reference in zip(predictions, references):
        metric.add(prediction=prediction, reference=reference)
    result = metric.compute()
    expected, precision = scores_of_pycocotools(predictions, references, masks)
    assert list(result)[:12] == (
        "map map_50 map_75 map_small map_medium map_large mar_1 mar_10 mar_100 mar_small mar_medium mar_large".split()
    )
    expected[expected == -1] = nan  # pycocotools returns -1 without objects of a size.
    np.testing.assert_allclose(list(result.values())[:12], expected, rtol=0, atol=1e-12)
    by_class = [values[values > -1].mean() if (values > -1).any() else nan for values in precision.transpose(2, 0, 1)]
    np.testing.assert_allclose(result["per_category_ap"], by_class, rtol=0, atol=1e-12)
    assert np.isnan(result["per_category_ap"][3]) and not np.isnan(result["per_category_ap_50"][:3]).any()


def test_masks_may_be_run_lengths():
    predictions, references = a_data_set()
    dense = load("coco_average_precision", masks=True).compute(predictions=predictions, references=references)
    for side in (*predictions, *references):
        side["masks"] = run_lengths.encode(np.asfortranarray(side["masks"].transpose(1, 2, 0).astype(np.uint8)))
    encoded = load("coco_average_precision", masks=True).compute(predictions=predictions, references=references)
    np.testing.assert_equal(encoded, dense)


@pytest.mark.parametrize("name", ["average_precision", "coco_average_precision"])
def test_order_of_images_does_not_matter(name):
    predictions, references = a_data_set()
    for prediction in predictions:
        prediction["scores"] = np.round(prediction["scores"], 1)  # Many scores are equal.
    results = []
    for order in (range(10), reversed(range(10))):
        metric = load(name)
        for place in order:
            metric.add_batch(
                predictions=[predictions[place]], references=[references[place]], image_ids=[f"image {place}"]
            )
        results.append(metric.compute())
    np.testing.assert_equal(*results)


@pytest.mark.parametrize("name", ["average_precision", "coco_average_precision"])
def test_no_detections_score_0_and_no_objects_nan(name):
    nothing = {"boxes": [], "labels": [], "scores": []}
    something = {"boxes": torch.tensor([[1.0, 2, 30, 40]], dtype=torch.bfloat16), "labels": torch.tensor([1])}
    something["scores"] = torch.tensor([0.5])
    found = load(name).compute(predictions=[something], references=[something])
    assert found["map"] == found["map_50"] == found["per_category_ap_50"][1] == 1
    missed = load(name).compute(predictions=[nothing], references=[something])
    assert missed["map"] == 0 and np.isnan(missed["per_category_ap_50"][0])
    assert np.isnan(load(name).compute(predictions=[something], references=[nothing])["map"])
    with pytest.raises(ValueError, match=name):
        load(name).compute()


def test_only_matches_and_scores_are_kept():
    metric = load("average_precision")
    random = np.random.default_rng(0)
    low = random.uniform(0, 100, (1000, 2))
    boxes = np.concatenate([low, low + 10], 1)
    labels = random.integers(0, 4, 1000)
    metric.add(prediction={"boxes": boxes, "labels": labels, "scores": random.random(1000)},
               reference={"boxes": boxes, "labels": labels})  # fmt: skip
    ((_, kept),) = metric.kept.values()
    assert sum(array.nbytes for array in kept) == 1000 * (4 + 8 + 1) + 4 * 8


BOX = {"boxes": [[0, 0, 2, 2]], "labels": [0], "scores": [0.5]}
MASKS = {**BOX, "masks": np.ones((1, 4, 4))}


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "message"),
    [
        ("average_precision", {**BOX, "labels": [4]}, BOX, r"labels.* of the prediction .*\[4\]"),
        ("average_precision", BOX, {**BOX, "labels": [0.5]}, "labels.* of the reference"),
        ("average_precision", {**BOX, "scores": [nan]}, BOX, "scores.* of the prediction .*finite"),
        ("average_precision", {**BOX, "scores": [1, 2]}, BOX, r"scores.* of the prediction .*\[2\]"),
        ("average_precision", {**BOX, "boxes": [[1, 1, 2, 2, 0]]}, BOX, "rotated boxes"),
        ("coco_average_precision", BOX, {**BOX, "boxes": [[1, 1, 2, 2, 0]]}, r"boxes.* got \[1, 5\]"),
        ("coco_average_precision", BOX, {**BOX, "area": [1, 2]}, r"area.* of the reference .*\[2\]"),
        ("coco_average_precision", MASKS, {**BOX, "masks": np.ones((1, 4, 5))}, r"masks .*\[\(4, 4\), \(4, 5\)\]"),
        ("coco_average_precision", MASKS, BOX, "masks in the reference"),
    ],
)
def test_bad_images_are_refused(name, prediction, reference, message):
    metric = load(name, masks=True) if "masks" in prediction else load(name)
    with pytest.raises(ValueError, match="image 'P7': .*" + message):
        metric.add_batch(predictions=[prediction], references=[reference], image_ids=["P7"])


def test_unknown_interpolation_and_repeated_image_are_refused():
    with pytest.raises(ValueError, match="interpolation.*'101'"):
        load("average_precision", interpolation="101")
    metric = load("average_precision")
    metric.add_batch(predictions=[BOX], references=[BOX], image_ids=["P0"])
    with pytest.raises(ValueError, match="image 'P0'"):
        metric.add_batch(predictions=[BOX], references=[BOX], image_ids=["P0"])
    with pytest.raises(ValueError, match="'predictions': 1, 'references': 2"):
        metric.add_batch(predictions=[BOX], references=[BOX, BOX])
