"""Batches whose samples lie end to end, beside the samples one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_rows import BUDGET, make_rows
from tiny_models import TOKENS_PER_TILE

from modeling_vitp import ViTPImageProcessor, ViTPProcessor
from modeling_vitp.instructions.collator import ViTPDataCollator, flatten_batch


@pytest.fixture(scope="module")
def processor(tokenizer):
    image_processor = ViTPImageProcessor(size={"height": 56, "width": 56}, max_patches=BUDGET)
    return ViTPProcessor(image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_a_batch_has_its_samples_one_after_the_other(processor, ratio, side):
    options = {"vrl_drop_ratio": ratio, "padding_side": side}
    rows = [*make_rows(), None]
    alone = [ViTPDataCollator(processor, **options)([row]) for row in rows[:-1]]
    batch = ViTPDataCollator(processor, padding_free=True, **options)(rows)
    wanted = {"input_ids": [], "labels": [], "position_ids": []}
    starts = [0]
    for sample in alone:
        length = sample["input_ids"].shape[1]
        wanted["input_ids"] += sample["input_ids"][0].tolist()
        wanted["labels"] += [-100, *sample["labels"][0, 1:].tolist()]
        wanted["position_ids"] += sample["position_ids"][0].tolist() if ratio else list(range(length))
        starts.append(starts[-1] + length)
    for name, values in wanted.items():
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == [values], name
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == starts
    longest = max(end - start for start, end in zip(starts, starts[1:]))
    assert batch["max_length_q"] == batch["max_length_k"] == longest
    padded = ViTPDataCollator(processor, **options)(rows)
    assert set(batch) == set(padded) - {"attention_mask"} | set(wanted) | {
        f"{name}_{side}" for name in ("cu_seq_lens", "max_length") for side in "qk"
    }
    for name in set(padded) & {"pixel_values", "visual_token_indices"}:
        assert torch.equal(batch[name], padded[name])
    if ratio:
        assert (batch["position_ids"].diff() > 1).any()  # the gaps are there


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_no_first_token_is_a_label_and_no_other_label_is_lost(lengths, left):
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, longest - length if left else 0 : None if left else length] = 1
    ids = torch.arange(mask.numel()).view_as(mask)
    batch = flatten_batch({"input_ids": ids, "labels": ids.clone(), "attention_mask": mask})
    assert batch["input_ids"][0].tolist() == ids[mask == 1].tolist()
    at = 0
    for length in lengths:
        assert batch["labels"][0, at] == -100
        assert torch.equal(batch["labels"][0, at + 1 : at + length], batch["input_ids"][0, at + 1 : at + length])
        assert batch["position_ids"][0, at : at + length].tolist() == list(range(length))
        at += length
    assert at == batch["input_ids"].shape[1]


def test_evaluation_pads(processor):
    collator = ViTPDataCollator(processor, padding_free=True).for_evaluation()
    assert collator(make_rows())["attention_mask"].eq(0).any()


def test_padding_to_a_multiple_is_refused(processor):
    with pytest.raises(ValueError, match="pad_to_multiple_of=8: with padding_free nothing is padded"):
        ViTPDataCollator(processor, padding_free=True, pad_to_multiple_of=8)
