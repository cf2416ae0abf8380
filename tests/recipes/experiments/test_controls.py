"""Other objectives on the views of a pretraining: that views, order and compute are the same."""

import pytest
import torch
import yaml
from datasets import load_dataset
from paths import AERIAL_TREES, CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from modeling_vitp.instructions.collator import STEP, ViTPDataCollator
from modeling_vitp.instructions.rows import sample_texts
from modeling_vitp.recipes.experiments.controls import Encoding, MaskedAutoencoder, PatchClassifier, Views
from modeling_vitp.recipes.tasks.trees.instructions import TreeInstructions, repeat
from modeling_vitp.training.batching import EpochBatchSampler, StepSampler
from modeling_vitp.training.loading import start_from_scratch


@pytest.fixture(scope="module")
def quickstart():
    """Its rows, its instructions, its model and processor."""
    settings = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    train = load_dataset(str(AERIAL_TREES))["train"]
    rows, transform = repeat(train, 2), TreeInstructions(train)
    set_seed(0)
    model, processor = start_from_scratch(settings["from_scratch"], sample_texts(rows, transform, 0))
    return rows, transform, model.train(), processor


def test_views_equal_the_pretraining(quickstart):
    rows, transform, _, processor = quickstart
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.75, vrl_warmup_steps=5, seed=3, sample_transform=transform)
    views = Views(rows, Encoding(transform, processor.image_processor, 14), seed=3)
    unlabelled = Views(rows, Encoding(transform, processor.image_processor, None), seed=3)
    for epoch, place in ((0, 1), (1, 1), (4, 22), (4, 38)):
        collator.set_epoch(epoch)
        batch = collator([{**rows[place], STEP: 0}])
        item = views[epoch, place]
        assert torch.equal(item["pixel_values"], batch["pixel_values"][0])
        assert unlabelled[epoch, place].keys() == {"pixel_values", "id"}
        # A map says of each cell which of its quarters are tree: bit by bit the labels of the four groups of patches.
        assert item["labels"].shape == (196,) and set(item["labels"].tolist()) <= {0, 1}
        text = processor.tokenizer.decode(batch["input_ids"][0])
        if "Map the trees." in text:
            words = text.split("assistant\n")[1].split("<|im_end|>")[0].lower().split()
            quarters = [[(ord(word) - ord("a")) >> bit & 1 for bit in range(4)] for word in words]
            told = torch.tensor(quarters).view(7, 7, 2, 2).transpose(1, 2).reshape(196)
            assert (told == item["labels"]).float().mean() > 0.95  # the view is not a multiple of both grids
    assert not torch.equal(views[0, 1]["pixel_values"], views[1, 1]["pixel_values"])


def test_batches_equal_the_pretraining():
    ours, theirs = EpochBatchSampler(40, 8, seed=5), StepSampler(40, 8, seed=5)
    for epoch in range(2):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert [[row for _, row in batch] for batch in ours] == [[row for row, _ in batch] for batch in theirs]


def test_compute_is_equal_by_the_steps_of_the_plan(quickstart):
    """Floating-point operations, of which those backward are twice those forward; half of the steps are without VRL."""
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
    arms = yaml.safe_load((CONFIGS / "experiment_backbone.yaml").read_text())["arms"]
    labels = {"labels": torch.zeros(32, 196, dtype=torch.long)}
    mae = arms["MAE"]["max_steps"] * operations(MaskedAutoencoder(vit), pixels)
    supervised = arms["supervised"]["max_steps"] * operations(PatchClassifier(vit, 2), pixels | labels)
    assert mae == pytest.approx(quickstart, rel=0.03)
    assert supervised == pytest.approx(quickstart, rel=0.03)
