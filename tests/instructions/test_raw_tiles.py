"""Tiles that are normalized on the device equal those of the image processor exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from sample_rows import assert_same
from tiny_models import TOKENS_PER_TILE
from training_run import make_rows, make_trainer

from modeling_vitp import ViTPImageProcessor, ViTPProcessor
from modeling_vitp.instructions.collator import ViTPDataCollator
from modeling_vitp.instructions.raw_tiles import RawTileProcessor, normalize_tiles

SIZE = {"height": 28, "width": 28}


@pytest.fixture(scope="module")
def processor(tokenizer):
    return ViTPProcessor(ViTPImageProcessor(size=SIZE, max_patches=6), tokenizer, image_seq_length=TOKENS_PER_TILE)


@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"]),
    max_patches=st.integers(1, 12),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_normalized_raw_tiles_are_exact(width, height, mode, max_patches, seed):
    plain = ViTPImageProcessor(size=SIZE, max_patches=max_patches)
    image = picture(width, height, seed).convert(mode)
    expected = plain([[image]], crop_to_patches=True, return_tensors="pt")
    raw = RawTileProcessor.of(plain)([[image]], crop_to_patches=True)
    tiles = torch.stack(raw["pixel_values"])
    assert tiles.dtype == torch.uint8 and raw["num_patches"] == expected["num_patches"].tolist()
    assert torch.equal(normalize_tiles(tiles, plain), expected["pixel_values"])


def test_batch_with_16_bit_sample_is_normalized(processor):
    rows = [dict(make_rows(8)[index]) for index in range(3)]
    deep = torch.randint(0, 60000, (3, 40, 60), dtype=torch.int32).to(torch.uint16).numpy()
    rows[1]["images"] = [deep] * len(rows[1]["images"])
    collator = ViTPDataCollator(processor)
    batch = collator.with_raw_tiles()(rows)
    assert batch["pixel_values"].dtype == torch.float32
    batch["pixel_values"] = normalize_tiles(batch["pixel_values"], processor.image_processor)
    assert_same(batch, collator(rows))


def test_raw_collator_shares_epoch_and_counts(processor):
    collator = ViTPDataCollator(processor, on_error="skip", replacement_rows=make_rows(2))
    raw = collator.with_raw_tiles()
    collator.set_epoch(3)
    raw([{"messages": []}])
    assert raw.epoch == 3 and collator.skipped == {"other rows": 1}


@pytest.mark.parametrize("changes", [{"do_normalize": False}, {"do_rescale": False}])
def test_processor_without_normalization_is_kept(tokenizer, changes):
    processor = ViTPProcessor(ViTPImageProcessor(size=SIZE, **changes), tokenizer, image_seq_length=TOKENS_PER_TILE)
    collator = ViTPDataCollator(processor)
    assert collator.with_raw_tiles() is collator


@pytest.mark.slow
def test_run_with_raw_tiles_is_exact(tmp_path, monkeypatch):
    def losses(folder):
        trainer = make_trainer(folder, save_strategy="no", logging_steps=1)
        seen = []
        prepare = trainer._prepare_inputs
        monkeypatch.setattr(trainer, "_prepare_inputs", lambda inputs: seen.append(inputs) or prepare(inputs))
        trainer.train()
        log = [
            (entry.get("loss"), entry.get("eval_loss"), entry.get("grad_norm")) for entry in trainer.state.log_history
        ]
        return log, {inputs["pixel_values"].dtype for inputs in seen if "pixel_values" in inputs}

    raw, dtypes = losses(tmp_path / "raw")
    assert dtypes == {torch.uint8}
    monkeypatch.setattr(ViTPDataCollator, "with_raw_tiles", lambda self: self)
    plain, dtypes = losses(tmp_path / "plain")
    assert dtypes == {torch.float32}
    assert raw == plain and any(loss is not None for _, loss, _ in raw)
