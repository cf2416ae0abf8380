"""Cost estimate of fine-tuning, compared with steps on real tensors."""

import json

import pytest
import torch
from classification_data import write_folders
from tiny_models import VISION_16

from modeling_vitp import (
    ViTPForImageClassification,
    ViTPForInstanceSegmentation,
    ViTPForObjectDetection,
    ViTPForOrientedObjectDetection,
    ViTPForSemanticSegmentation,
    ViTPVisionConfig,
    ViTPVisionModel,
)
from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.pretraining.model_patches import checkpoint_activations
from modeling_vitp.pretraining.plan import INTERNVL2_5_1B
from modeling_vitp.recipes import finetune_change_detection, finetune_classification, finetune_detection
from modeling_vitp.tasks.classification.trainer import loss_without_values as classification_loss
from modeling_vitp.tasks.detection.trainer import loss_without_values as detection_loss
from modeling_vitp.tasks.segmentation.trainer import loss_without_values as segmentation_loss
from modeling_vitp.training.costs import count_operations, measure_step

SAMPLES, SIDE = 2, 128
VISION = VISION_16 | {"num_hidden_layers": 5}
ADAPTER = {"deformable_heads": 4, "spatial_prior_channels": 8, "interaction_layers": [[0, 1], [2, 2], [3, 3], [4, 4]]}
UPERNET = {"hidden_size": 16, "auxiliary_channels": 16}
DETECTOR = {"neck_channels": 16, "head_hidden_size": 32, "rpn_candidates_train": 200, "rpn_proposals_train": 200}
DETECTOR |= {"roi_samples": 64}
HEADS = {
    ViTPForImageClassification: {},
    ViTPForSemanticSegmentation: UPERNET,
    ViTPForOrientedObjectDetection: DETECTOR,
    ViTPForInstanceSegmentation: DETECTOR,
}
LOSSES = {
    ViTPForImageClassification: classification_loss,
    ViTPForSemanticSegmentation: segmentation_loss,
    ViTPForOrientedObjectDetection: detection_loss,
    ViTPForInstanceSegmentation: detection_loss,
}


def build(model_class):
    vit = ViTPVisionModel(ViTPVisionConfig(**VISION))
    options = {} if model_class is ViTPForImageClassification else {"backbone_kwargs": ADAPTER}
    return model_class.from_backbone(vit, id2label={0: "a", 1: "b", 2: "c"}, **options, **HEADS[model_class]).train()


def real_loss(model):
    """Return the loss of random images with labels, of detectors with 16 objects each."""
    pixels = torch.rand(SAMPLES, 3, SIDE, SIDE)
    if not isinstance(model, ViTPForObjectDetection):
        return LOSSES[type(model)](model, SAMPLES, SIDE)
    centers, sides = torch.rand(16, 2) * 0.6 + 0.2, torch.rand(16, 2) * 0.2 + 0.1
    corners = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    objects = {
        "class_labels": torch.zeros(16, dtype=torch.long),
        "boxes": torch.cat([centers, sides], 1),
        "corners": centers[:, None] + corners * sides[:, None],
        "masks": torch.ones(16, SIDE, SIDE),
    }
    return model(pixels, labels=[objects] * SAMPLES).loss


def real_step(model_class, checkpointing):
    """Return a model after a step, bytes of the optimizer, bytes that autograd keeps, and backward operations."""
    torch.manual_seed(0)
    model = build(model_class)
    kept, own = {}, {weight.untyped_storage()._cdata for weight in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    if checkpointing:
        checkpoint_activations(model)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = real_loss(model)
    with count_operations() as counter:
        loss.backward()
    optimizer.step()
    moments = [state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    activations = sum(size for address, (size, _) in kept.items() if address not in own)
    return model, sum(moments), activations, counter.get_total_flops()


@pytest.mark.parametrize(
    ("model_class", "error"),
    [
        (ViTPForImageClassification, 0.02),
        pytest.param(ViTPForSemanticSegmentation, 0.02, marks=pytest.mark.slow),
        # The boxes of a real detector are fewer than the largest number in some steps.
        pytest.param(ViTPForOrientedObjectDetection, 0.05, marks=pytest.mark.slow),
        pytest.param(ViTPForInstanceSegmentation, 0.05, marks=pytest.mark.slow),
    ],
)
def test_cost_equals_a_real_step(model_class, error):
    loss = LOSSES[model_class]
    step = measure_step(build(model_class).to("meta"), lambda model: loss(model, SAMPLES, SIDE), bf16=False)
    for checkpointing in (False, True):
        model, optimizer, activations, backward = real_step(model_class, checkpointing)
        cost = step.cost(int(checkpointing))
        assert cost.weights == sum(weight.nbytes for weight in model.parameters())
        assert cost.gradients == sum(weight.grad.nbytes for weight in model.parameters() if weight.requires_grad)
        assert cost.optimizer == optimizer
        assert cost.backward == pytest.approx(backward, rel=error)
        if checkpointing:  # a layer is recomputed while the inputs of all are kept
            assert activations * (1 - error) < cost.activations < step.cost().activations
        else:
            assert cost.activations == pytest.approx(activations, rel=error)


def planned(capsys, recipe, *arguments):
    """Return the output of a dry run and the cells of its rows by name."""
    assert recipe.main([*arguments, "--dry_run"]) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return text, {name: cells for name, *cells in rows}


@pytest.mark.slow
def test_dry_run_prints_memory_and_hours(tmp_path, capsys):
    write_folders(tmp_path / "data", {"train": 24, "test": 2})
    folders = ["--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    options = ["--from_scratch", json.dumps(VISION), "--image_size", "64", "--per_device_train_batch_size", "2"]
    options += ["--num_train_epochs", "3", "--plan_device", "rtx4090", "--plan_devices", "2"]
    options += ["--global_batch_size", "16", "--test_split", "test"]
    text, rows = planned(capsys, finetune_classification, *folders, *options)
    assert "16 samples of 64 x 64 pixels, 2 at once" in text and not (tmp_path / "out").exists()
    names = ["bf16", "bf16, activation checkpointing", "float32", "float32, activation checkpointing"]
    header, _, *found = rows
    assert found == names and rows[header][-1] == "hours of 9 steps"  # 48 images in batches of 16, three times
    model = ViTPForImageClassification.from_backbone(ViTPVisionModel(ViTPVisionConfig(**VISION)), id2label=["a", "b"])
    step = measure_step(model.train().to("meta"), lambda model: classification_loss(model, 2, 64), bf16=True)
    for name in names[:2]:
        cost = step.cost(int(name.endswith("checkpointing"))).with_buckets(2)
        parts = [cost.weights, cost.gradients, cost.optimizer, cost.activations, cost.memory]
        assert rows[name][:5] == [f"{part / 2**30:.2f}" for part in parts]
        assert rows[name][5:7] == ["24.0 free", "fits"]
        assert rows[name][-1] == f"{9 * 4 * cost.operations / (0.4 * 165.2e12) / 3600:.3g}"
    assert float(rows["float32"][-1]) == pytest.approx(2 * float(rows["bf16"][-1]), rel=0.02)  # as of the device
    assert text.endswith("--bf16 true --activation_checkpointing false\n")


@pytest.mark.slow
def test_dry_run_needs_neither_data_nor_backbone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(INTERNVL2_5_1B, "vision_config", VISION)
    device = ["--neck", "pyramid", "--backbone", "{}", "--plan_device", "0.5GiB,10TFLOP/s"]
    text, rows = planned(capsys, finetune_detection, "--config", "ssdd", *device)
    assert "the shape of ViTP's ViT is assumed" in text and "the number of steps is unknown" in text
    assert "Nothing leaves 10%" in text and rows["GiB:"][-1] == "hours of 1,000 steps"
    assert rows["bf16"][5].endswith(" missing") and rows["float32"][-1] == "?"
    text, rows = planned(capsys, finetune_change_detection, "--config", "levir_cd", *device)
    assert rows["GiB:"][-1] == "hours of 80,000 steps"
    assert not any(tmp_path.iterdir())


def test_dry_run_refuses_detectors_of_transformers(tmp_path):
    data = ["--data", json.dumps({"root": str(tmp_path), "splits": {}, "classes": ["a"]})]
    with pytest.raises(WrongArguments, match="dry_run.*'rt_detr_v2'"):
        finetune_detection.main([*data, "--detector", "rt_detr_v2", "--dry_run", "true"])
