"""Graphs of the models of all tasks, compared with the models."""

import json

import onnxruntime
import pytest
import torch
from tiny_models import HEAD, VISION_16
from torch.nn import functional as F

from modeling_vitp import (
    ViTPDetectionImageProcessor,
    ViTPForChangeDetection,
    ViTPForImageClassification,
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPImageProcessor,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
)
from modeling_vitp.convert import onnx
from modeling_vitp.detection_boxes import nms_by_label
from modeling_vitp.rotated_boxes import corners, rotated_nms

BOXES = {"neck_channels": 16, "head_hidden_size": 32, "rpn_candidates_eval": 50, "rpn_proposals_eval": 60}
BOXES |= {"num_labels": 3}
TASKS = {
    "segmentation": (ViTPForSemanticSegmentation, ViTPSegmentationImageProcessor, HEAD),
    "change": (ViTPForChangeDetection, ViTPSegmentationImageProcessor, HEAD),
    "boxes": (ViTPForObjectDetection, ViTPDetectionImageProcessor, BOXES),
    "oriented": (ViTPForOrientedObjectDetection, ViTPDetectionImageProcessor, BOXES),
    "instances": (ViTPForInstanceSegmentation, ViTPDetectionImageProcessor, BOXES),
}
NECKS = {"adapter": {"deformable_heads": 4, "spatial_prior_channels": 8, "extra_extractors": 0}, "pyramid": {}}
SIZES = [(64, 64), (96, 160)]
LARGER_SIZES = [(96, 96), (256, 96)]


def write_model(folder, name, neck="pyramid"):
    """Write a tiny model of a task with random weights of order one, and return it."""
    torch.manual_seed(0)
    layers = {"adapter": 4, "pyramid": 1}[neck]  # the adapter has four interactions
    vit = ViTPVisionModel(ViTPVisionConfig(**VISION_16 | {"num_hidden_layers": layers}))
    names = {0: "house", 1: "tree", 2: "road"}
    if name == "classification":
        settings = {"id2label": names, "problem_type": "multi_label_classification"}
        model, image_processor = ViTPForImageClassification.from_backbone(vit, **settings), ViTPImageProcessor()
    else:
        model_class, image_processor_class, settings = TASKS[name]
        settings = {key: value for key, value in settings.items() if key != "num_labels"} | {"id2label": names}
        model = model_class.from_backbone(vit, neck, backbone_kwargs=NECKS[neck], **settings)
        image_processor = image_processor_class(image_mean=[0.1, 0.2, 0.3])
    with torch.no_grad():
        for key, weight in model.named_parameters():
            # Objectness must not be nearly equal everywhere, because its order decides on the proposals.
            weight.add_(torch.randn_like(weight) * (0.3 if key.startswith("rpn.objectness") else 0.1))
            if key.startswith(("mask_head", "neck")):  # outputs must not be 0 and 1 alone
                weight.mul_(0.3)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return model.eval()


def run_graph(file, size, batch, seed=1):
    """Return the outputs of a graph on noise by name, and its images."""
    session = onnxruntime.InferenceSession(file)
    generator = torch.Generator().manual_seed(seed)
    images = {one.name: torch.randn(batch, 3, *size, generator=generator) for one in session.get_inputs()}
    found = session.run(None, {name: image.numpy() for name, image in images.items()})
    names = [one.name for one in session.get_outputs()]
    return {name: torch.from_numpy(values) for name, values in zip(names, found)}, images


def assert_near(found, wanted):
    assert found.shape == wanted.shape and wanted.float().std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.float().std().item())


@pytest.mark.slow
def test_classification_graph_has_the_logits(tmp_path):
    model = write_model(tmp_path / "model", "classification")
    onnx.export_onnx(tmp_path / "model", tmp_path / "a.onnx")
    for size, batch in (((64, 64), 1), ((48, 112), 3)):
        found, images = run_graph(tmp_path / "a.onnx", size, batch)
        with torch.no_grad():
            assert_near(found["logits"], model(**images).logits)
    metadata = onnxruntime.InferenceSession(tmp_path / "a.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["problem_type"]) == "multi_label_classification"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "neck"), [("segmentation", "adapter"), ("change", "pyramid")])
def test_dense_graph_has_the_logits(tmp_path, name, neck):
    model = write_model(tmp_path / "model", name, neck)
    onnx.export_onnx(tmp_path / "model", tmp_path / "a.onnx")
    for batch, size in enumerate(SIZES, 1):
        found, images = run_graph(tmp_path / "a.onnx", size, batch)
        assert list(images) == onnx.Graph(model).inputs
        with torch.no_grad():
            assert_near(found["logits"], model(**images).logits)
    metadata = onnxruntime.InferenceSession(tmp_path / "a.onnx").get_modelmeta().custom_metadata_map
    metadata = {key: json.loads(value) for key, value in metadata.items()}
    assert metadata["image_mean"] == [0.1, 0.2, 0.3] and metadata["do_resize"] is False and "size" not in metadata
    assert metadata["id2label"] == {"0": "house", "1": "tree", "2": "road"}
    assert metadata["model_type"] == model.config.model_type


@pytest.mark.slow
@pytest.mark.parametrize(("name", "neck"), [("boxes", "pyramid"), ("instances", "adapter")])
def test_detection_graph_has_the_detections(tmp_path, name, neck):
    model = write_model(tmp_path / "model", name, neck)
    onnx.export_onnx(tmp_path / "model", tmp_path / "a.onnx")
    for size in LARGER_SIZES:
        found, images = run_graph(tmp_path / "a.onnx", size, 1)
        with torch.no_grad():
            wanted = model(**images)
        number = wanted.scores.shape[1]
        assert 0 < number <= found["scores"].shape[1] <= model.config.max_detections
        assert not (found["scores"][:, number:] > model.config.score_threshold).any()
        assert torch.equal(found.pop("labels")[:, :number], wanted.labels)
        for field, values in found.items():
            assert_near(values[:, :number], wanted[field])


@pytest.mark.slow
def test_oriented_graph_has_the_boxes_before_nms(tmp_path):
    model = write_model(tmp_path / "model", "oriented", "adapter")
    onnx.export_onnx(tmp_path / "model", tmp_path / "a.onnx")
    metadata = onnxruntime.InferenceSession(tmp_path / "a.onnx").get_modelmeta().custom_metadata_map
    threshold, overlap, most = (
        json.loads(metadata[key]) for key in ("score_threshold", "nms_threshold", "max_detections")
    )
    for size in LARGER_SIZES:
        found, images = run_graph(tmp_path / "a.onnx", size, 1)
        scores, boxes = found["scores"][0], found["boxes"][0, :, 0]
        rows, labels = (scores > threshold).nonzero().unbind(-1)
        kept = rotated_nms(boxes[rows], scores[rows, labels], overlap, labels)[:most]
        with torch.no_grad():
            wanted = model(**images)
        assert torch.equal(labels[kept], wanted.labels[0])
        assert_near(scores[rows, labels][kept], wanted.scores[0])
        assert_near(corners(boxes[rows[kept]]) / torch.tensor([size[1], size[0]]), wanted.pred_corners[0])


def test_nms_of_onnx_keeps_the_same_boxes(tmp_path):
    class Suppress(torch.nn.Module):
        def forward(self, boxes, scores, labels):
            return onnx.nms_by_label(boxes, scores, 0.4, labels)

    generator = torch.Generator().manual_seed(0)
    corner, sides = torch.rand(2, 200, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + sides], -1)
    scores = torch.randperm(200, generator=generator) / 200
    labels = torch.randint(0, 5, (200,), generator=generator)
    with torch.no_grad():
        program = torch.onnx.export(
            torch.export.export(Suppress(), (boxes, scores, labels)),
            custom_translation_table={torch.ops.modeling_vitp.nms_by_label.default: onnx.onnx_nms_by_label},
            dynamo=True,
            verbose=False,
        )
    program.save(tmp_path / "nms.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "nms.onnx")
    names = [one.name for one in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (boxes.numpy(), scores.numpy(), labels.numpy()))))
    wanted = nms_by_label(boxes, scores, 0.4, labels)
    assert found.tolist() == wanted.tolist() and 20 < len(found) < 180


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_adaptive_pooling_equals_that_of_torch(cells):
    for height, width in ((2, 2), (5, 7), (16, 13)):
        maps = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(onnx.pool_adaptively(maps, cells), F.adaptive_avg_pool2d(maps, cells))


@pytest.mark.parametrize("name", ["segmentation", "oriented", "instances"])
def test_replaced_functions_have_the_same_results(tmp_path, name):
    graph = onnx.Graph(write_model(tmp_path / "model", name)).eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 3, 96, 128, generator=generator) for _ in graph.inputs]
    with torch.no_grad():
        wanted = graph(*images)
        with onnx.any_size():
            found = graph(*images)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift, wanted", [(0.0, 0.0), (0.5, 0.5)])
def test_difference_of_detections_ignores_their_order(tmp_path, shift, wanted):
    graph = onnx.Graph(write_model(tmp_path / "model", "boxes")).eval()

    class Session:
        def run(self, names, images):
            outputs = graph(torch.from_numpy(images["pixel_values"]))
            order = torch.randperm(outputs[0].shape[1], generator=torch.Generator().manual_seed(0))
            scores, *others = (values[:, order] for values in outputs)
            scores = scores + shift * scores.std(correction=0)
            return [values.numpy() for values in (scores, *others)]

    assert onnx.difference(graph, Session(), (1, 96, 128)) == pytest.approx(wanted, abs=wanted / 2 + 1e-5)


def test_model_without_image_processor_is_named(tmp_path):
    write_model(tmp_path / "model", "segmentation")
    (tmp_path / "model/preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="model.*preprocessor_config.json"):
        onnx.export_onnx(tmp_path / "model", tmp_path / "a.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
