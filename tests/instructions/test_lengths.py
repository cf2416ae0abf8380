"""Lengths of rows, without making them."""

import pytest
import torch
from datasets import Dataset
from sample_rows import sized_row
from tiny_models import TEXT, VISION
from training_run import FEATURES

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions.collator import SampleLength
from modeling_vitp.instructions.rows import SourceSettings, prepare_rows
from modeling_vitp.training.loading import build_model


@pytest.fixture(scope="module")
def collator(tokenizer):
    torch.manual_seed(0)
    _, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": 12})
    return ViTPDataCollator(processor, vrl_drop_ratio=0.75)


@pytest.mark.parametrize("sizes", [[], [(56, 56)], [(300, 100)], [(100, 300), (56, 56), (224, 60)]], ids=str)
@pytest.mark.parametrize("options", [{}, {"vrl_drop_ratio": 0.0}, {"max_length": 20, "vrl_drop_ratio": 0.9}], ids=str)
def test_the_length_of_a_row_is_what_the_collator_makes_of_it(collator, sizes, options):
    collator = ViTPDataCollator(collator.processor, **{"vrl_drop_ratio": 0.75, **options})
    rows = prepare_rows(Dataset.from_list([sized_row(1, sizes)], features=FEATURES))
    try:
        expected = len(collator.encode(rows[0])["input_ids"])
    except ValueError:
        assert "max_length" in options  # the prompt does not fit
        return
    assert SampleLength.of(collator)(rows[0]) == expected


def test_the_length_of_a_row_heeds_the_settings_of_its_source(collator):
    settings = {"a": SourceSettings(max_patches=2, system_prompt="You see trees."), "b": SourceSettings(image_size=112)}
    collator = ViTPDataCollator(collator.processor, source_settings=settings)
    for source in ("a", "b", "c"):
        example = {**sized_row(1, [(300, 100)]), "source": source}
        assert SampleLength.of(collator)(example) == len(collator.encode(example)["input_ids"])
