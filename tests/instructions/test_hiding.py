"""Hidden answers, against a walk over the tokens of each sample."""

import pytest
import torch
from sample_rows import assert_same, make_rows
from tiny_models import TEXT, VISION
from torch.utils.data import DataLoader

from modeling_vitp.instructions.collator import ViTPDataCollator, mask_token_id
from modeling_vitp.training.loading import build_model, build_tokenizer
from modeling_vitp.vrl import keyed_generator


def collate(processor, rows, mask_ratio, drop_ratio=0.0, epoch=0, **options):
    collator = ViTPDataCollator(processor, vrl_drop_ratio=drop_ratio, answer_mask_ratio=mask_ratio, seed=5, **options)
    collator.set_epoch(epoch)
    return collator(rows)


def hidden_by_hand(ids, labels, mask_ratio, mask_id, end_id, *key):
    """Token by token: each labelled one draws a number, and is hidden by it unless it ends the turn."""
    generator = keyed_generator(*key, "answers")
    hidden = []
    for token, label in zip(ids, labels):
        if label != -100 and torch.rand(1, generator=generator, dtype=torch.float64).item() < mask_ratio:
            token = token if label == end_id else mask_id
        hidden.append(token)
    return hidden


@pytest.mark.parametrize("mask_ratio", [0.5, 1.0])
@pytest.mark.parametrize("drop_ratio", [0.0, 0.75])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_tokens_of_answers_are_hidden_and_all_else_stays(processor, padding_side, drop_ratio, mask_ratio):
    """One turn and many, many images and none."""
    rows, options = make_rows(), {"drop_ratio": drop_ratio, "epoch": 2, "padding_side": padding_side}
    whole, batch = collate(processor, rows, 0.0, **options), collate(processor, rows, mask_ratio, **options)
    mask_id, end_id = processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    expected = [
        hidden_by_hand(ids.tolist(), labels.tolist(), mask_ratio, mask_id, end_id, 5, row["id"], 2)
        for row, ids, labels in zip(rows, whole["input_ids"], whole["labels"])
    ]
    assert_same(batch, {**whole, "input_ids": torch.tensor(expected)})
    shown = batch["input_ids"][(batch["labels"] != -100) & (batch["input_ids"] != mask_id)]
    assert (shown == end_id).sum() == 6  # the answers of the four rows
    assert (shown != end_id).any() == (mask_ratio < 1)


def test_as_many_are_hidden_as_the_ratio_says(processor):
    rows = [{**make_rows()[3], "id": index} for index in range(400)]
    batch = collate(processor, rows, 0.3)
    is_answer = (batch["labels"] != -100) & (batch["labels"] != processor.tokenizer.eos_token_id)
    share = (batch["input_ids"] == processor.tokenizer.pad_token_id)[is_answer].double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / is_answer.sum().item()) ** 0.5)


def test_the_draw_depends_on_seed_id_and_epoch_alone(processor):
    rows = make_rows()
    alone = [collate(processor, [row], 0.5)["input_ids"][0].tolist() for row in rows]
    loader = DataLoader(
        rows, batch_size=1, num_workers=2, collate_fn=ViTPDataCollator(processor, answer_mask_ratio=0.5, seed=5)
    )
    assert [batch["input_ids"][0].tolist() for batch in loader] == alone
    epochs = {tuple(collate(processor, rows[2:3], 0.5, epoch=epoch)["input_ids"][0].tolist()) for epoch in range(4)}
    assert len(epochs) > 1 and tuple(alone[2]) in epochs


def test_what_is_hidden_of_a_cut_answer_is_what_is_hidden_of_the_whole_one(processor):
    row = make_rows()[2:3]
    whole = collate(processor, row, 0.5)
    length = whole["input_ids"].shape[1] - 4
    assert (whole["labels"][:, length:] != -100).any()
    cut = collate(processor, row, 0.5, max_length=length)
    for name in ("input_ids", "labels"):
        assert torch.equal(cut[name], whole[name][:, :length])


def test_nothing_is_hidden_in_evaluation_or_without_the_option(processor):
    rows = make_rows()
    collator = ViTPDataCollator(processor, answer_mask_ratio=0.9)
    assert_same(collator.for_evaluation()(rows), ViTPDataCollator(processor)(rows))
    with pytest.raises(ValueError, match=r"answer_mask_ratio=1.5 is outside \[0, 1\]"):
        ViTPDataCollator(processor, answer_mask_ratio=1.5)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({}, "<|endoftext|>"),
        ({"mask_token": "<mask>"}, "<mask>"),
        ({"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}, "<|endoftext|>"),  # as SmolLM2's
        ({"pad_token": "<|im_end|>"}, None),
    ],
    ids=str,
)
def test_the_token_that_stands_for_hidden_ones_is_none_that_ends_a_turn(tokens, expected):
    tokenizer = build_tokenizer(["How many trees?"], 400)
    _, processor = build_model(tokenizer, VISION, TEXT)
    tokenizer.add_special_tokens(tokens)
    if expected is None:
        with pytest.raises(ValueError, match="set tokenizer.mask_token"):
            ViTPDataCollator(processor, answer_mask_ratio=0.5)
        return
    assert tokenizer.convert_ids_to_tokens(mask_token_id(processor)) == expected


def test_an_end_that_the_chat_template_writes_by_its_name_does_not_stand_for_hidden_ones():
    tokenizer = build_tokenizer(["How many trees?"], 400)
    _, processor = build_model(tokenizer, VISION, TEXT)
    processor.chat_template = "{{ eos_token }}"
    assert mask_token_id(processor) == tokenizer.pad_token_id
    tokenizer.eos_token = tokenizer.pad_token
    with pytest.raises(ValueError, match="set tokenizer.mask_token"):
        mask_token_id(processor)
