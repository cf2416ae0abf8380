import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco
from launching import run_without_package
from original_detectors import DETECTORS, folder_of, original_detector, pixel_mask
from pictures import picture
from safetensors.torch import load_file
from transformers import AutoImageProcessor, pipeline

from modeling_vitp import ViTPDetectionImageProcessor, ViTPImageProcessor
from modeling_vitp.modeling_vitp_detection import ViTPDetectionOutput
from modeling_vitp.rotated_boxes import corners
from modeling_vitp.tasks.detection.augmentation import resized_size

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SQUARE = [[4.0, 6.0], [24.0, 6.0], [24.0, 16.0], [4.0, 16.0]]
SHIP = {"category_id": 1, "bbox": [4.0, 6.0, 20.0, 10.0]}


def annotated(*objects: dict) -> dict:
    return {"image_id": 7, "annotations": list(objects)}


def test_boxes_are_shares_of_unpadded_image():
    images = [picture(40, 30, 0), picture(50, 20, 1)]
    batch = ViTPDetectionImageProcessor()(images, [annotated(SHIP), annotated()], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 30, 50) and batch["pixel_values"].dtype == torch.float32
    for image, pixels, mask in zip(images, batch["pixel_values"], batch["pixel_mask"]):
        wanted = np.zeros((3, 30, 50))
        wanted[:, : image.height, : image.width] = ((np.array(image) / 255 - MEAN) / STD).transpose(2, 0, 1)
        np.testing.assert_allclose(pixels, wanted, atol=1e-6)
        assert mask.nonzero().amax(0).tolist() == [image.height - 1, image.width - 1]
        assert mask.sum() == image.height * image.width
    ship, nothing = batch["labels"]
    assert ship["class_labels"].tolist() == [1]
    torch.testing.assert_close(ship["boxes"], torch.tensor([[14 / 40, 11 / 30, 20 / 40, 10 / 30]]))
    assert nothing["class_labels"].shape == (0,) and nothing["boxes"].shape == (0, 4)
    assert nothing["corners"].shape == (0, 4, 2) and "corners" not in ship


def test_resized_images_have_sizes_of_training():
    generator, found = np.random.default_rng(0), []
    processor = ViTPDetectionImageProcessor(do_resize=True, size={"max_height": 160, "max_width": 160})
    for height, width in generator.integers(20, 400, (80, 2)).tolist():
        (pixels,) = processor([np.zeros((height, width, 3), np.uint8)], return_tensors="pt")["pixel_values"]
        rounded = [int(Fraction(160 * side, max(height, width)) + Fraction(1, 2)) for side in (height, width)]
        found.append(rounded)
        assert list(pixels.shape[1:]) == rounded == list(resized_size((height, width), 160, keep_ratio=True))
    assert len({tuple(size) for size in found}) > 50


def test_object_with_flag_of_no_crowd_is_kept():
    for flag in ("0", 0, False, None, "false"):
        given = annotated({**SHIP, "iscrowd": flag}, {**SHIP, "iscrowd": "1"}, {**SHIP, "iscrowd": 1})
        (label,) = ViTPDetectionImageProcessor()(picture(40, 30), given, return_tensors="pt")["labels"]
        assert label["class_labels"].tolist() == [1]


def test_corners_follow_boxes_when_stretched():
    turned = corners(torch.tensor([[20.0, 15.0, 16.0, 8.0, 0.5]]))[0]
    given = annotated({"category_id": 0, "corners": turned.flatten().tolist()}, {"category_id": 2, "corners": SQUARE})
    processor = ViTPDetectionImageProcessor(do_resize=True, size={"height": 90, "width": 80})
    (label,) = processor(picture(40, 30), given, return_tensors="pt")["labels"]
    torch.testing.assert_close(label["corners"][0], turned / torch.tensor([40, 30]))
    torch.testing.assert_close(label["corners"][1], torch.tensor(SQUARE) / torch.tensor([40, 30]))
    torch.testing.assert_close(label["boxes"][1], torch.tensor([14 / 40, 11 / 30, 20 / 40, 10 / 30]))
    assert label["size"].tolist() == [90, 80] and label["class_labels"].tolist() == [0, 2]


def test_masks_from_arrays_polygons_and_run_lengths():
    mask = np.zeros((30, 40), np.uint8)
    mask[6:16, 4:24] = 1
    polygon = np.array(SQUARE).flatten().tolist()
    runs = {"size": [30, 40], "counts": coco.encode(np.asfortranarray(mask))["counts"]}
    crowd = {**SHIP, "iscrowd": 1, "segmentation": runs}
    given = annotated(
        crowd, *({**SHIP, "segmentation": one} for one in (mask, torch.from_numpy(mask), [polygon], runs))
    )
    processor = ViTPDetectionImageProcessor()
    images, annotations = [picture(40, 30), picture(50, 60)], [given, annotated()]
    batch = processor(images, annotations, return_segmentation_masks=True, return_tensors="pt")
    masks = batch["labels"][0]["masks"]
    assert masks.shape == (4, 60, 50) and batch["labels"][1]["masks"].shape == (0, 60, 50)
    for found in masks:
        assert torch.equal(found[:30, :40].bool(), torch.from_numpy(mask).bool()) and not found[30:].any()
    processor = ViTPDetectionImageProcessor(do_resize=True, size={"height": 60, "width": 80})
    given = [given, annotated()]
    labels = processor([images[0]] * 2, given, return_segmentation_masks=True, return_tensors="pt")["labels"]
    resized, nothing = (label["masks"] for label in labels)
    assert nothing.shape == (0, 60, 80) and nothing.dtype == resized.dtype
    assert torch.equal(resized[0].bool(), torch.from_numpy(mask).bool().repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_boxes_are_clipped_or_left_out():
    """1500.3 and 1500.3 + 1e-5 are equal in float32, the dtype of the boxes."""
    boxes = [[1990, 20, 20, 20], [2001, 0, 5, 5], [3, 3, 0, 5], [1500.3, 6.0, 1e-5, 10.0]]
    objects = []
    for index, box in enumerate(boxes):
        mask = np.full((30, 2000), index == 0, np.uint8)
        objects.append({"category_id": index, "bbox": box, "segmentation": mask})
    image, options = np.zeros((30, 2000, 3), np.uint8), {"return_segmentation_masks": True, "return_tensors": "pt"}
    (label,) = ViTPDetectionImageProcessor()(image, annotated(*objects), **options)["labels"]
    torch.testing.assert_close(label["boxes"], torch.tensor([[1995 / 2000, 25 / 30, 10 / 2000, 10 / 30]]))
    assert label["class_labels"].tolist() == [0]
    assert label["masks"].shape == (1, 30, 2000) and label["masks"].all()


def test_processor_of_backbone_has_its_mean_and_spec(tmp_path):
    ViTPImageProcessor(image_mean=[0.1, 0.2, 0.3], input_spec={"bands": [0]}).save_pretrained(tmp_path)
    processor = ViTPDetectionImageProcessor.from_backbone(tmp_path, do_resize=True, size={"height": 96, "width": 96})
    assert (list(processor.image_mean), processor.input_spec) == ([0.1, 0.2, 0.3], {"bands": [0]})
    radar = np.random.default_rng(0).integers(0, 60000, (2, 30, 40), dtype=np.uint16)
    assert processor(radar, return_tensors="pt")["pixel_values"].shape == (1, 3, 96, 96)
    processor.save_pretrained(tmp_path / "again")
    assert AutoImageProcessor.from_pretrained(tmp_path / "again").input_spec == {"bands": [0]}


@torch.no_grad()
@pytest.mark.parametrize("name", DETECTORS)
def test_postprocessed_detections_equal_original_code(name):
    """Image 1 is an image of 160 x 180 pixels that was resized to half its size."""
    expected = load_file(folder_of(name) / "expected.safetensors")
    outputs = original_detector(name)(expected["pixel_values"], pixel_mask())
    processor, sizes = ViTPDetectionImageProcessor(), [(96, 96), (160, 180)]
    upright = processor.post_process_object_detection(outputs, 0.0, sizes)
    if name == "oriented_rcnn":
        results = processor.post_process_oriented_object_detection(outputs, 0.0, target_sizes=sizes)
    else:
        results = upright
    for image, result in enumerate(results):
        boxes, labels = expected[f"rescaled.{image}.boxes"], expected[f"rescaled.{image}.labels"]
        order = torch.arange(len(labels)) if name == "oriented_rcnn" else result["labels"].argsort(stable=True)
        assert torch.equal(result["labels"][order], labels)
        torch.testing.assert_close(result["scores"][order], boxes[:, -1], rtol=0, atol=1e-5)
        if name == "oriented_rcnn":
            torch.testing.assert_close(result["corners"], corners(boxes[:, :5]), rtol=0, atol=1e-3)
            torch.testing.assert_close(corners(result["boxes"]), result["corners"], rtol=0, atol=1e-3)
            enclosing = torch.cat([result["corners"].amin(1), result["corners"].amax(1)], -1)
            torch.testing.assert_close(upright[image]["boxes"], enclosing, rtol=0, atol=1e-3)
        else:
            torch.testing.assert_close(result["boxes"][order], boxes[:, :4], rtol=0, atol=1e-3)


@torch.no_grad()
def test_masks_equal_original_code():
    expected = load_file(folder_of("mask_rcnn") / "expected.safetensors")
    outputs = original_detector("mask_rcnn")(expected["pixel_values"], pixel_mask())
    processor = ViTPDetectionImageProcessor()
    for kind, sizes in (("detections", [(96, 96), (80, 90)]), ("rescaled", torch.tensor([[96, 96], [160, 180]]))):
        results = processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=sizes)
        as_runs = processor.post_process_instance_segmentation(
            outputs, 0.0, target_sizes=sizes, return_run_lengths=True
        )
        for image, (result, runs) in enumerate(zip(results, as_runs)):
            order = result["labels"].argsort(stable=True)
            theirs = expected[f"{kind}.{image}.masks"].bool()
            assert torch.equal(result["masks"][order], theirs)
            decoded = [coco.decode(coco.frPyObjects(one, *one["size"])) for one in runs["masks"]]
            assert np.array_equal(np.stack(decoded)[order], theirs.numpy())
    none = processor.post_process_instance_segmentation(outputs, 1.0, target_sizes=sizes)
    assert none[1]["masks"].shape == (0, 160, 180) and none[1]["boxes"].shape == (0, 4)


@torch.no_grad()
def test_masks_of_flip_test_equal_original_code():
    expected = load_file(folder_of("mask_rcnn") / "expected.safetensors")
    model, image = original_detector("mask_rcnn", flip_test=True), expected["pixel_values"][:1]
    seen = [model.run_backbone(image), type(model.run_backbone(image))()]
    seen[1].feature_maps = tuple(expected[f"flip.maps.{level}"] for level in range(4))
    model.run_backbone = lambda pixel_values, **kwargs: seen.pop(0)
    (result,) = ViTPDetectionImageProcessor().post_process_instance_segmentation(
        model(image), 0.0, target_sizes=[(96, 96)]
    )
    order = result["labels"].argsort(stable=True)
    assert torch.equal(result["masks"][order], expected["flip.masks"].bool())


def test_mask_is_pasted_into_box():
    """Pasting ones into a box of whole pixels gives the box, also across the border."""
    boxes = torch.tensor(
        [[10.0, 4.0, 20.0, 9.0], [-5.0, -5.0, 7.0, 7.0], [35.0, 25.0, 50.0, 50.0], [5.0, 5.0, 5.0, 9.0]]
    )
    size = torch.tensor([40.0, 30.0]).repeat(2)
    shares = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], -1) / size
    outputs = ViTPDetectionOutput(
        scores=torch.ones(1, 4),
        labels=torch.zeros(1, 4).long(),
        pred_boxes=shares[None],
        pred_masks=torch.ones(1, 4, 28, 28),
    )
    (result,) = ViTPDetectionImageProcessor().post_process_instance_segmentation(outputs, target_sizes=[(30, 40)])
    for (x1, y1, x2, y2), mask in zip(boxes.int().tolist(), result["masks"]):
        wanted = torch.zeros(30, 40, dtype=torch.bool)
        wanted[max(y1, 0) : y2, max(x1, 0) : x2] = True
        assert torch.equal(mask, wanted)
    with pytest.raises(ValueError, match="target_sizes"):
        ViTPDetectionImageProcessor().post_process_object_detection(outputs, target_sizes=[(30, 40)] * 2)


@torch.no_grad()
@pytest.mark.parametrize("name", DETECTORS)
def test_pipeline_equals_model(name, tmp_path):
    names = {index: f"kind {index}" for index in range(4)}
    model = original_detector(name)
    model.config.id2label = names if name != "mask_rcnn" else {index: names[index] for index in range(3)}
    model.save_pretrained(tmp_path)
    processor = ViTPDetectionImageProcessor()
    processor.save_pretrained(tmp_path)
    image = picture(90, 80)
    image.save(tmp_path / "image.png")
    outputs = model(**processor(image, return_tensors="pt"))
    (wanted,) = processor.post_process_object_detection(outputs, 0.1, [(80, 90)])
    found = pipeline("object-detection", model=str(tmp_path))(str(tmp_path / "image.png"), threshold=0.1)
    expected = [
        {
            "label": f"kind {label}",
            "score": pytest.approx(score),
            "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(int, box))),
        }
        for label, score, box in zip(wanted["labels"].tolist(), wanted["scores"].tolist(), wanted["boxes"].tolist())
    ]
    assert found == expected and len(found) > 2


@torch.no_grad()
@pytest.mark.slow
def test_saved_detectors_open_without_this_package(tmp_path):
    picture(90, 80).save(tmp_path / "image.png")
    expected = {}
    for name in DETECTORS:
        model, processor = original_detector(name), ViTPDetectionImageProcessor()
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        outputs = model(**processor(picture(90, 80), return_tensors="pt"))
        (wanted,) = processor.post_process_object_detection(outputs, 0.1, [(80, 90)])
        expected[name] = wanted["scores"].tolist()
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    script = """
import json
from transformers import pipeline
for name, scores in json.load(open("expected.json")).items():
    found = pipeline("object-detection", model=name, trust_remote_code=True)("image.png", threshold=0.1)
    assert len(found) == len(scores) and all(abs(a["score"] - b) < 1e-5 for a, b in zip(found, scores)), name
"""
    run_without_package(script, tmp_path)
