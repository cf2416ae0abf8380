"""The three detectors equal OpenMMLab's code on ViTP's neck and adapter, and meet the requirements of any detector."""

import pytest
import torch
import torchvision
from original_detectors import (
    DETECTORS,
    SIZES,
    folder_of,
    original_detector,
    original_labels,
    our_name,
    pixel_mask,
)
from paths import FIXTURES
from safetensors.torch import load_file
from tiny_models import VISION, VISION_16, adapter_config
from torch.nn import functional as F
from transformers import (
    AutoModelForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.modeling_outputs import BackboneOutput

from modeling_vitp import (
    ViTPAdapter,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)
from modeling_vitp.detection_boxes import IGNORED, match, trained_anchors
from modeling_vitp.pretraining.model_patches import checkpoint_activations
from modeling_vitp.rotated_boxes import corners

every_detector = pytest.mark.parametrize("name", DETECTORS)
TINY = {"neck_channels": 16, "head_hidden_size": 32, "num_labels": 3}


def expected_of(name: str) -> dict[str, torch.Tensor]:
    return load_file(folder_of(name) / "expected.safetensors")


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@every_detector
@torch.no_grad()
def test_neck_and_proposals_equal_original_code(name):
    model, expected = original_detector(name), expected_of(name)
    feature_maps = model.run_backbone(expected["pixel_values"]).feature_maps
    for level, features in enumerate(model.neck(feature_maps)):
        close(features, expected[f"neck.{level}"], 2e-5)
    view = model.view(feature_maps)
    assert torch.equal(torch.cat(view.anchors), expected["anchors"])
    for kind, found, values in (("logits", view.logits[..., None], 1), ("deltas", view.deltas, view.deltas.shape[-1])):
        theirs = [expected[f"rpn.{kind}.{level}"].permute(0, 2, 3, 1).reshape(2, -1, values) for level in range(5)]
        close(found, torch.cat(theirs, 1), 1e-4)
    config = model.config
    for image, found in enumerate(model.propose(view, SIZES, config.rpn_candidates_eval, config.rpn_proposals_eval)):
        boxes, scores = expected[f"proposals.{image}"].split([found[0].shape[1], 1], -1)
        close(found[0], boxes, 1e-3)
        close(found[1], scores[:, 0], 1e-5)


def boxes_in_pixels(outputs, image: int) -> torch.Tensor:
    """Return corners of oriented boxes, and x1, y1, x2, y2 of others."""
    size = SIZES[image].flip(0)
    if outputs.pred_corners is not None:
        return outputs.pred_corners[image] * size
    centers, sides = (outputs.pred_boxes[image] * size.repeat(2)).split(2, -1)
    return torch.cat([centers - sides / 2, centers + sides / 2], -1)


@every_detector
@torch.no_grad()
def test_detections_equal_original_code(name):
    """Compare in the original order, which sorts upright boxes by class first."""
    expected = expected_of(name)
    outputs = original_detector(name)(expected["pixel_values"], pixel_mask())
    for image in (0, 1):
        theirs, labels = expected[f"detections.{image}.boxes"], expected[f"detections.{image}.labels"]
        number = len(labels)
        assert (outputs.labels[image, number:] == -1).all() and (outputs.scores[image, number:] == 0).all()
        scores = outputs.scores[image, :number]
        assert torch.equal(scores, scores.sort(descending=True).values)
        boxes, order = theirs[:, :-1], torch.arange(number)
        if name == "oriented_rcnn":
            boxes = corners(boxes)
        else:
            order = outputs.labels[image, :number].argsort(stable=True)
        assert torch.equal(outputs.labels[image][order], labels)
        close(scores[order], theirs[:, -1], 1e-5)
        close(boxes_in_pixels(outputs, image)[order], boxes, 1e-3)


@every_detector
@torch.no_grad()
def test_matching_equals_original_code(name):
    """In the original code -2 is not sampled, -1 ignored, 0 background, and n + 1 object n."""
    model, expected = original_detector(name), expected_of(name)
    config = model.config
    view = model.view(model.run_backbone(expected["pixel_values"]).feature_maps)
    anchors, labels = torch.cat(view.anchors), original_labels(name)
    proposals = model.propose(view, SIZES, config.rpn_candidates_train, config.rpn_proposals_train)
    for image, size in enumerate(SIZES):
        boxes = model.read_objects(labels[image], size).boxes
        trained = trained_anchors(anchors, size, config.rpn_use_outside_anchors)
        matched = match(torchvision.ops.box_iou(model.upright(boxes), anchors[trained]), 0.7, 0.3, 0.3)
        found = torch.full_like(expected["assigned"][image], -2)
        found[trained] = torch.where(matched == IGNORED, -1, matched + 1)
        assert torch.equal(found, expected["assigned"][image])
        if name == "oriented_rcnn":
            close(proposals[image][0], expected[f"train_proposals.{image}"][:, :5], 1e-3)
            matched = match(model.overlaps(boxes, proposals[image][0]), 0.5, 0.5)
            assert torch.equal(matched + 1, expected[f"train_assigned.{image}"])


@every_detector
def test_losses_equal_original_code(name):
    expected = expected_of(name)
    outputs = original_detector(name).train()(expected["pixel_values"], pixel_mask(), original_labels(name))
    assert outputs.scores is None
    theirs = {
        "loss_rpn_class": expected["losses.loss_rpn_cls"].sum(),
        "loss_rpn_box": expected["losses.loss_rpn_bbox"].sum(),
    }
    for stage in range(3 if name == "cascade_rcnn" else 1):
        prefix = f"losses.s{stage}." if name == "cascade_rcnn" else "losses."
        theirs[f"loss_class_{stage}"] = expected[f"{prefix}loss_cls"]
        theirs[f"loss_box_{stage}"] = expected[f"{prefix}loss_bbox"]
    if name == "mask_rcnn":
        theirs["loss_mask"] = expected["losses.loss_mask"][0]
    assert outputs.loss_dict.keys() == theirs.keys()
    for key, loss in theirs.items():
        torch.testing.assert_close(outputs.loss_dict[key], loss, rtol=1e-5, atol=0, msg=key)
    torch.testing.assert_close(outputs.loss, expected["losses.total"], rtol=1e-5, atol=0)


@every_detector
def test_gradients_equal_original_code(name, monkeypatch):
    """Compare in double precision from the maps on, because rounding depends on the CPU.

    One unit of Mask R-CNN's mask head is exactly -1e-5, with values up to 19, and the original's float32 made it
    positive. The ReLU is patched to pass values this far below zero, because one gradient would otherwise differ by
    4e-5.
    """
    monkeypatch.setattr(F, "relu", lambda values: torch.where(values > -1.5e-5, values, 0))
    model, expected = original_detector(name).train().double(), expected_of(name)
    maps = load_file(FIXTURES / "vit_adapter_tiny_original" / "expected.safetensors")
    feature_maps = tuple(maps[f"map_stride_{stride}"].double() for stride in (4, 8, 16, 32))
    model.run_backbone = lambda pixel_values, **kwargs: BackboneOutput(feature_maps=feature_maps)
    model(expected["pixel_values"], pixel_mask(), original_labels(name)).loss.backward()
    weights = dict(model.named_parameters())
    names = [key for key in expected if key.startswith("grads.")]
    assert len(names) >= 4
    for key in names:
        gradient, theirs = weights[our_name(key.removeprefix("grads."))].grad, expected[key]
        assert (gradient - theirs).abs().max() / theirs.abs().max() < 1e-5, key


@torch.no_grad()
def test_flip_test_equals_original_code():
    expected = expected_of("mask_rcnn")
    model = original_detector("mask_rcnn", flip_test=True)
    image = expected["pixel_values"][:1]
    mirrored = BackboneOutput(feature_maps=tuple(expected[f"flip.maps.{level}"] for level in range(4)))  # arbitrary
    seen = [model.run_backbone(image), mirrored]
    (proposals,) = model.propose_by_all([model.view(outputs.feature_maps) for outputs in seen], SIZES[:1])
    close(proposals, expected["flip.proposals"][:, :4], 1e-3)
    model.run_backbone = lambda pixel_values, **kwargs: seen.pop(0)
    outputs = model(image)
    order = outputs.labels[0].argsort(stable=True)
    assert torch.equal(outputs.labels[0][order], expected["flip.labels"])
    close(outputs.scores[0][order], expected["flip.boxes"][:, 4], 1e-5)
    close(boxes_in_pixels(outputs, 0)[order], expected["flip.boxes"][:, :4], 1e-3)


@torch.no_grad()
def test_padded_image_is_mirrored_within_itself():
    """Mirrored detections of the mirrored image are equal."""
    model = original_detector("cascade_rcnn", flip_test=True)
    image = expected_of("cascade_rcnn")["pixel_values"][1:]
    mask = pixel_mask()[1:]
    mirrored = image.clone()
    mirrored[..., :90] = image[..., :90].flip(-1)
    found, again = model(image, mask), model(mirrored, mask)
    close(again.scores, found.scores, 1e-5)
    close(1 - again.pred_boxes[..., 0], found.pred_boxes[..., 0], 1e-5)
    close(again.pred_boxes[..., 1:], found.pred_boxes[..., 1:], 1e-5)


@every_detector
def test_batch_equals_single_images(name):
    model, expected, labels = original_detector(name), expected_of(name), original_labels(name)
    images, mask = expected["pixel_values"], pixel_mask()
    together = model(images, mask, labels)
    torch.testing.assert_close(together.loss, expected["losses.total"], rtol=1e-5, atol=0)
    assert torch.equal(together.scores, model(images, mask).scores)
    for image in (0, 1):
        alone = model(images[image : image + 1], mask[image : image + 1], labels[image : image + 1])
        number = alone.scores.shape[1]
        for key in ("scores", "pred_boxes", "pred_corners", "pred_masks"):
            if alone.get(key) is not None:
                close(together[key][image, :number], alone[key][0], 1e-4)
        assert torch.equal(together.labels[image, :number], alone.labels[0])


@every_detector
@torch.no_grad()
def test_image_is_padded_to_whole_strides(name):
    """Pass the second image without its padding, so that the model pads it to 96 pixels again and masks the padding."""
    model, images = original_detector(name), expected_of(name)["pixel_values"]
    padded = images[1:].clone()
    padded[..., 80:, :], padded[..., 90:] = 0, 0
    found, wanted = model(images[1:, :, :80, :90]), model(padded, pixel_mask()[1:])
    for key in ("scores", "labels", "pred_boxes"):
        close(found[key], wanted[key], 1e-5)


def without_objects(name: str, labels: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{key: value[:0] for key, value in label.items()} for label in labels]


@every_detector
def test_images_without_objects_train_all_parameters(name):
    """A distributed process would hang otherwise if its images have no objects."""
    model, expected = original_detector(name).train(), expected_of(name)
    labels = original_labels(name)
    outputs = model(expected["pixel_values"], pixel_mask(), without_objects(name, labels))
    assert outputs.loss.isfinite() and outputs.loss_dict["loss_box_0"] == 0
    outputs.loss.backward()
    without = [key for key, weight in model.named_parameters() if weight.grad is None]
    assert without == ["backbone.embeddings.cls_token"]
    mixed = model(expected["pixel_values"], pixel_mask(), [labels[0], *without_objects(name, labels[1:])])
    assert mixed.loss.isfinite() and mixed.loss_dict["loss_box_0"] > 0


@every_detector
@torch.no_grad()
def test_image_without_findings_has_no_detections(name):
    model, images = original_detector(name, score_threshold=1.0), expected_of(name)["pixel_values"]
    outputs = model(images)
    assert outputs.scores.shape == outputs.labels.shape == (2, 0) and outputs.pred_boxes.shape == (2, 0, 4)
    if name == "oriented_rcnn":
        assert outputs.pred_corners.shape == (2, 0, 4, 2)
    if name == "mask_rcnn":
        assert outputs.pred_masks.shape == (2, 0, 28, 28)
    assert model(torch.zeros(1, 3, 64, 64)).scores.shape == (1, 0)


def tiny_detector(name: str, **settings):
    torch.manual_seed(0)
    return DETECTORS[name](DETECTORS[name].config_class(backbone_config=adapter_config(), **(TINY | settings)))


def labels_over_the_border(name: str) -> list[dict[str, torch.Tensor]]:
    """Return labels of an image of 64 x 64 pixels: an object at the border, one over it, one around the whole image."""
    boxes = torch.tensor([[0.1, 0.5, 0.2, 0.4], [0.95, 0.9, 0.4, 0.5], [0.5, 0.5, 1.2, 1.2]])
    label = {"class_labels": torch.zeros(3, dtype=torch.long), "boxes": boxes}
    if name == "oriented_rcnn":
        turned = torch.cat([64 * boxes, torch.tensor([[0.0], [0.4], [1.0]])], -1)
        label["corners"] = corners(turned) / 64
    if name == "mask_rcnn":
        label["masks"] = torch.ones(3, 64, 64, dtype=torch.uint8)
    return [label]


@every_detector
def test_objects_over_border_train_one_class(name):
    model, labels = tiny_detector(name, num_labels=1), labels_over_the_border(name)
    image = torch.randn(1, 3, 64, 64)
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(4):
        loss = model(image, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
    assert losses[-1] < losses[0]


def test_sampling_depends_on_seed_alone():
    model = original_detector("oriented_rcnn", rpn_samples=8, roi_samples=6)
    labels, images = original_labels("oriented_rcnn"), expected_of("oriented_rcnn")["pixel_values"]
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(images, pixel_mask(), labels).loss.item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("name", "way"), [*((name, "weights") for name in DETECTORS), ("oriented_rcnn", "autocast")])
def test_coordinates_and_losses_stay_float32_in_bfloat16(name, way):
    model, expected, labels = original_detector(name), expected_of(name), original_labels(name)
    images = expected["pixel_values"]
    if way == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        outputs = model(images, pixel_mask(), labels)
        view = model.view(model.run_backbone(images).feature_maps)
        (boxes, scores), _ = model.propose(view, SIZES, 150, 60)
    assert {tensor.dtype for tensor in (*view.maps, *view.anchors, view.logits, view.deltas)} == {torch.float32}
    found = [outputs[key] for key in ("scores", "pred_boxes", "pred_corners", "pred_masks") if key in outputs]
    assert {tensor.dtype for tensor in (boxes, scores, *outputs.loss_dict.values(), *found)} == {torch.float32}
    torch.testing.assert_close(outputs.loss, expected["losses.total"], rtol=0.1, atol=0)
    outputs.loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_starts_from_exported_backbone(name, tmp_path):
    torch.manual_seed(0)
    vision = ViTPVisionModel(ViTPVisionConfig(**VISION))
    export_backbone(vision, tmp_path)
    neck, settings = "pyramid", {"pyramid_channels": 8}
    if name == "cascade_rcnn":
        neck, settings = "adapter", {"deformable_heads": 4, "spatial_prior_channels": 8}
    model = DETECTORS[name].from_backbone(
        tmp_path,
        neck,
        id2label={0: "ship"},
        image_size=96,
        backbone_kwargs=settings,
        neck_channels=16,
        head_hidden_size=32,
    )
    assert model.config.num_labels == 1 and model.config.backbone_config is model.backbone.config
    assert model.backbone.config.image_size == [96, 96]
    assert model.backbone.embeddings.position_embeddings.shape == (1, 1 + 36, 32)
    ours, theirs = model.backbone.encoder.layer[1].mlp.fc1.weight, vision.encoder.layer[1].mlp.fc1.weight
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 96, 96)).scores.shape[0] == 1


def test_detector_initialization_equals_original_code():
    """Predictions are near zero, other layers Xavier-initialized, and the mask head He-initialized."""
    model = tiny_detector("mask_rcnn", neck_channels=64, head_hidden_size=64)
    spread = {
        model.rpn.objectness: 0.01,
        model.rpn.deltas: 0.01,
        model.box_heads[0].classifier: 0.01,
        model.box_heads[0].regressor: 0.001,
        model.box_heads[0].fc2: (2 / 128) ** 0.5,
        model.neck.outputs[0][0]: (2 / (128 * 9)) ** 0.5,
        model.mask_head.convolutions[3]: (2 / (64 * 9)) ** 0.5,
        model.mask_head.upsample: (2 / (64 * 4)) ** 0.5,
    }
    for layer, std in spread.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.2) and (layer.bias == 0).all()
    assert model.backbone.encoder.layer[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    norm = tiny_detector("cascade_rcnn").neck.laterals[0][1]
    assert (norm.weight == 1).all() and (norm.bias == 0).all() and norm.eps == 1e-5


def test_gradient_checkpointing_keeps_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_detector("mask_rcnn").train()
        if checkpointing:
            checkpoint_activations(model)
        torch.manual_seed(1)
        image = torch.randn(1, 3, 64, 64)
        model(image, labels=labels_over_the_border("mask_rcnn")).loss.backward()
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
    torch.testing.assert_close(*gradients)


DETR = {"d_model": 32, "num_queries": 10, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_layers": 2}
DETR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 2}
HYBRID = {"encoder_in_channels": [32] * 3, "decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32}
TRANSFORMERS_CONFIGS = {
    RTDetrV2ForObjectDetection: RTDetrV2Config(**DETR, **HYBRID),
    DFineForObjectDetection: DFineConfig(**DETR, **HYBRID),
    DeformableDetrForObjectDetection: DeformableDetrConfig(**DETR, encoder_layers=1),
}


@pytest.mark.parametrize(
    "model_class",
    [
        RTDetrV2ForObjectDetection,
        DeformableDetrForObjectDetection,
        pytest.param(DFineForObjectDetection, marks=pytest.mark.slow),
    ],
)
def test_detectors_of_transformers_train_on_adapter(model_class, tmp_path):
    torch.manual_seed(0)
    vision = ViTPVisionModel(ViTPVisionConfig(**VISION_16))
    small = {"deformable_heads": 4, "spatial_prior_channels": 8}
    adapter = ViTPAdapter.from_backbone(vision, out_features=["stride8", "stride16", "stride32"], **small)
    config = type(TRANSFORMERS_CONFIGS[model_class]).from_dict(
        TRANSFORMERS_CONFIGS[model_class].to_dict() | {"backbone_config": None}
    )
    config.backbone_config = adapter.config
    model = model_class(config)
    model.model.backbone.model.load_state_dict(adapter.state_dict())

    images = torch.randn(2, 3, 64, 64)
    objects = {
        "class_labels": torch.tensor([0, 1]),
        "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.4]]),
    }
    loss = model(images, labels=[objects] * 2).loss
    loss.backward()
    backbone = model.model.backbone.model
    assert loss.isfinite() and backbone.encoder.layer[0].mlp.fc1.weight.grad.abs().sum() > 0
    gate = backbone.interactions[0].injector.gate
    assert torch.equal(gate, adapter.interactions[0].injector.gate) and gate.grad.isfinite().all()

    model.eval().save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(again) is model_class and isinstance(again.model.backbone.model, ViTPAdapter)
    with torch.no_grad():
        torch.testing.assert_close(again(images).pred_boxes, model(images).pred_boxes)
