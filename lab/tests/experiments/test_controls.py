"""Control objectives use the same views, order and compute as the pretraining."""

import functools

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from paths import AERIAL_TREES, PLANS, TREES_BASE
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from lab.experiments.controls import PatchClassifier, Views, ViewTrainer
from lab.trees.instructions import TreeInstructions, repeat
from modeling_vitp import ViTPTrainingConfig, ViTPVisionConfig, ViTPVisionModel
from modeling_vitp.instructions.collator import STEP, ViTPDataCollator
from modeling_vitp.instructions.rows import sample_texts
from modeling_vitp.pretraining.loading import start_from_scratch
from modeling_vitp.pretraining.masked_autoencoder import MaskedAutoencoder
from modeling_vitp.training.batching import EpochBatchSampler, StepSampler


@pytest.fixture(scope="module")
def quickstart():
    """Return rows, instructions, model and processor of the pretraining."""
    settings = yaml.safe_load(TREES_BASE.read_text())
    train = load_dataset(str(AERIAL_TREES))["train"]
    rows, transform = repeat(train, 2), TreeInstructions(train)
    set_seed(0)
    model, processor = start_from_scratch(settings["from_scratch"], sample_texts(rows, transform, 0))
    return rows, transform, model.train(), processor


def test_views_equal_the_pretraining(quickstart):
    rows, transform, _, processor = quickstart
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.75, vrl_warmup_steps=5, seed=3, sample_transform=transform)
    views = Views(rows, transform, processor.image_processor, 14, seed=3)
    unlabeled = Views(rows, transform, processor.image_processor, None, seed=3)
    for epoch, place in ((0, 1), (1, 1), (4, 22), (4, 38)):
        collator.set_epoch(epoch)
        batch = collator([{**rows[place], STEP: 0}])
        item = views[epoch, place]
        assert torch.equal(item["pixel_values"], batch["pixel_values"][0])
        assert unlabeled[epoch, place].keys() == {"pixel_values", "id"}
        # The bits of a map word are the labels of the four groups of patches in a cell.
        assert item["labels"].shape == (196,) and set(item["labels"].tolist()) <= {0, 1}
        text = processor.tokenizer.decode(batch["input_ids"][0])
        if "Map the trees." in text:
            words = text.split("assistant\n")[1].split("<|im_end|>")[0].lower().split()
            quarters = [[(ord(word) - ord("a")) >> bit & 1 for bit in range(4)] for word in words]
            told = torch.tensor(quarters).view(7, 7, 2, 2).transpose(1, 2).reshape(196)
            assert (
                told == item["labels"]
            ).float().mean() > 0.95  # The size of the view is not a multiple of both grids.
    assert not torch.equal(views[0, 1]["pixel_values"], views[1, 1]["pixel_values"])


def test_optimizer_of_controls_must_match_on_resume(tmp_path):
    args = ViTPTrainingConfig(str(tmp_path), learning_rate=0.5, bf16=False, report_to="none")
    rows = Dataset.from_dict({"id": ["a"], "image": [None]})
    settings = ViewTrainer(nn.Linear(1, 1), args, Views(rows, None, None, None, seed=0)).run_settings()
    assert settings["fixed"]["learning_rate"] == 0.5 and "learning_rate" not in settings["free"]


def test_batches_equal_the_pretraining():
    ours, theirs = EpochBatchSampler(40, 8, seed=5), StepSampler(40, 8, seed=5)
    for epoch in range(2):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert [[row for _, row in batch] for batch in ours] == [[row for row, _ in batch] for batch in theirs]


def test_planned_steps_have_equal_compute(quickstart):
    """Count floating-point operations; backward counts twice, and half of the steps are without VRL."""
    rows, transform, model, processor = quickstart
    examples = [rows[index] for index in range(32)]

    def operations(model, inputs) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
        return counter.get_total_flops()

    batches = [
        ViTPDataCollator(processor, vrl_drop_ratio=ratio, sample_transform=transform)(examples) for ratio in (0, 0.75)
    ]
    model.set_attn_implementation("eager")
    quickstart = 400 * sum(operations(model, batch) for batch in batches) / 2
    vit, pixels = model.model.vision_tower, {"pixel_values": batches[0]["pixel_values"]}
    arms = yaml.safe_load((PLANS / "experiment_backbone.yaml").read_text())["arms"]
    labels = {"labels": torch.zeros(32, 196, dtype=torch.long)}
    mae = arms["MAE"]["max_steps"] * operations(MaskedAutoencoder(vit), pixels)
    supervised = arms["supervised"]["max_steps"] * operations(PatchClassifier(vit, 2), pixels | labels)
    assert mae == pytest.approx(quickstart, rel=0.03)
    assert supervised == pytest.approx(quickstart, rel=0.03)


def test_planned_steps_with_dropped_patches_have_equal_compute(quickstart):
    """VRL begins after half of the steps, and the last tenth of the steps sees every patch."""
    rows, transform, model, processor = quickstart
    model.set_attn_implementation("eager")
    examples = [rows[index] for index in range(32)]

    @functools.cache
    def operations(drop_ratio: float, patch_drop_ratio: float) -> int:
        ratios = {"vrl_drop_ratio": drop_ratio, "patch_drop_ratio": patch_drop_ratio}
        batch = ViTPDataCollator(processor, **ratios, sample_transform=transform)(examples)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch)
        return counter.get_total_flops()

    def whole(steps: int, patch_drop_ratio: float) -> int:
        drop_ratios = [0.0 if step < steps // 2 else 0.75 for step in range(steps)]
        patch_drop_ratios = [patch_drop_ratio if step < steps - round(steps / 10) else 0.0 for step in range(steps)]
        return sum(map(operations, drop_ratios, patch_drop_ratios))

    arms = yaml.safe_load((PLANS / "experiment_dropped_patches.yaml").read_text())["arms"]
    for settings in arms.values():
        if "max_steps" in (settings or {}):
            assert whole(settings["max_steps"], settings["patch_drop_ratio"]) == pytest.approx(
                whole(400, 0.0), rel=0.01
            )


PATCH, SIDE = 4, 6


def vit(**changes) -> ViTPVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    places = {"image_size": [SIDE * PATCH] * 2, "patch_size": [PATCH] * 2, "initializer_range": 0.3}
    return ViTPVisionModel(ViTPVisionConfig(**sizes | places | changes))


@pytest.fixture
def pixels():
    return torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))


def test_patch_classes_by_cross_entropy(pixels):
    model = PatchClassifier(vit(), num_classes=3)
    labels = torch.randint(3, (2, SIDE**2), generator=torch.Generator().manual_seed(3))
    labels[:, ::5] = -100
    outputs = model(pixels, labels)
    tokens = model.vit(pixels).last_hidden_state[:, 1:]
    losses = [
        -F.log_softmax(model.head(token), dim=-1)[label]
        for token, label in zip(tokens.flatten(0, 1), labels.flatten())
        if label >= 0
    ]
    torch.testing.assert_close(outputs.loss, torch.stack(losses).mean())
