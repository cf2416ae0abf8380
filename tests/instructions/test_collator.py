"""Batches compared with a brute-force assembly from single samples; masked answers, padding-free batches, lengths."""

import copy
import logging

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from pictures import picture
from PIL import Image
from sample_rows import ANSWER, BUDGET, PLACE, USER, assert_same, encoded_image, make_rows, sized_row, text
from tiny_models import TEXT, TOKENS_PER_TILE, VISION
from torch.utils.data import DataLoader
from training_run import FEATURES

from modeling_vitp import ViTPDataCollator, ViTPImageProcessor, ViTPProcessor
from modeling_vitp.images.pixels import ColorJitter
from modeling_vitp.instructions.collator import flatten_batch, mask_token_id
from modeling_vitp.instructions.raw_tiles import normalize_tiles
from modeling_vitp.instructions.rows import SourceSettings, prepare_rows, sample_texts
from modeling_vitp.instructions.sample_length import SampleLength
from modeling_vitp.pretraining.loading import build_model, build_tokenizer
from modeling_vitp.vrl import keyed_generator


@pytest.fixture(scope="module")
def processor(tokenizer):
    image_processor = ViTPImageProcessor(size={"height": 56, "width": 56}, max_patches=BUDGET)
    return ViTPProcessor(image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)


def filled(row):
    """Return the messages with their images, which are at the start of the first user turn unless marked."""
    images = iter(row["images"])
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, str):
            first_user = message["role"] == "user" and not any(m["role"] == "user" for m in messages)
            content = [PLACE] * (len(row["images"]) if first_user else 0) + [text(content)]
        content = [{"type": "image", "image": next(images)} if part == PLACE else part for part in content]
        messages.append({**message, "content": content})
    return messages


def encode_alone(processor, row, ratio, seed=0, epoch=0, prob=1.0):
    """Return the lists of one row, from one call of the processor and a loop over the turns."""
    output = processor.apply_chat_template(
        [filled(row)],
        tokenize=True,
        return_dict=True,
        processor_kwargs={
            "vrl_drop_ratio": ratio,
            "vrl_apply_prob": prob,
            "vrl_keys": [(seed, row["id"], epoch)],
            "return_tensors": "pt",
        },
    )
    sample = {name: values[0].tolist() for name, values in output.items() if name in ("input_ids", "position_ids")}
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    labels, header, role = [], None, None
    for token in sample["input_ids"]:
        is_answer = role == "assistant" and header is None
        if token == start:
            header, role = [], None
        elif header is not None:
            header.append(token)
            if processor.tokenizer.decode(header).endswith("\n"):
                header, role = None, processor.tokenizer.decode(header).strip()
        labels.append(token if is_answer else -100)
        if token == end:
            role = None
    sample["labels"] = labels
    sample["tiles"] = output.get("pixel_values", torch.zeros(0, 3, 56, 56))
    sample["indices"] = output.get("visual_token_indices", torch.zeros(0, dtype=torch.int64)).tolist()
    return sample


def assemble(samples, pad_id, padding_side, multiple, with_positions):
    """Return the expected batch of samples from `encode_alone`, by loops."""
    length = max(len(sample["input_ids"]) for sample in samples)
    while length % multiple:
        length += 1
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": -100}
    if with_positions:
        batch["position_ids"], fill["position_ids"] = [], 0
    indices, tiles_before = [], 0
    for sample in samples:
        sample = {**sample, "attention_mask": [1] * len(sample["input_ids"])}
        for name in batch:
            padding = [fill[name]] * (length - len(sample["input_ids"]))
            batch[name].append(padding + sample[name] if padding_side == "left" else sample[name] + padding)
        indices += [index + tiles_before * TOKENS_PER_TILE for index in sample["indices"]]
        tiles_before += len(sample["tiles"])
    batch = {name: torch.tensor(values) for name, values in batch.items()}
    if tiles_before:
        batch["pixel_values"] = torch.cat([sample["tiles"] for sample in samples])
        if with_positions:
            batch["visual_token_indices"] = torch.tensor(indices)
    return batch


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 64])
@pytest.mark.parametrize("ratio", [0, 0.75])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2], [3], [2, 3, 0]])
def test_batch_equals_assembled_samples(processor, order, ratio, multiple, padding_side):
    rows = [make_rows()[i] for i in order]
    collator = ViTPDataCollator(
        processor, vrl_drop_ratio=ratio, padding_side=padding_side, pad_to_multiple_of=multiple, seed=5
    )
    collator.set_epoch(2)
    samples = [encode_alone(processor, row, ratio, seed=5, epoch=2) for row in rows]
    expected = assemble(samples, processor.tokenizer.pad_token_id, padding_side, multiple or 1, ratio > 0)
    assert_same(collator(rows), expected)


@pytest.mark.parametrize("later", ["<image>\nWhat changed?", [PLACE, text("What changed?")]], ids=["text", "parts"])
def test_later_question_has_the_image(processor, later):
    asked = {"role": "user", "content": [text(USER["content"])]}
    rows = []
    for first, last in ((USER, later), (asked, [PLACE, text("What changed?")])):
        messages = [first, ANSWER, {"role": "user", "content": last}, ANSWER]
        rows.append({"id": 1, "images": [picture(56, 56, 1)], "messages": messages})
    collator = ViTPDataCollator(processor)
    assert_same(collator(rows[:1]), collator(rows[1:]))
    assert [SampleLength.of(collator)(row) for row in rows] == [collator(rows[:1])["input_ids"].shape[1]] * 2


def test_apply_prob_reaches_the_processor(processor):
    rows = [{**make_rows()[0], "id": i} for i in range(12)]
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.75, vrl_apply_prob=0.5)
    samples = [encode_alone(processor, row, 0.75, prob=0.5) for row in rows]
    assert len({len(sample["input_ids"]) for sample in samples}) == 2
    assert_same(collator(rows), assemble(samples, processor.tokenizer.pad_token_id, "right", 1, True))


@pytest.mark.parametrize("ratio", [0, 0.75])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_labels_are_answers_and_their_ends(processor, ratio, padding_side):
    rows = make_rows()
    batch = ViTPDataCollator(processor, vrl_drop_ratio=ratio, padding_side=padding_side)(rows)
    answers = [
        "There are 12 trees.<|im_end|>",
        "There are 12 trees.<|im_end|>12?<|im_end|>",
        "There are 12 trees.<|im_end|>Trees: 12 top left, 3 right.<|im_end|>",
        "none<|im_end|>",
    ]
    for labels, ids, answer in zip(batch["labels"], batch["input_ids"], answers):
        learned = labels != -100
        assert processor.tokenizer.decode(labels[learned]) == answer
        assert torch.equal(labels[learned], ids[learned])


def test_rows_are_not_changed(processor):
    rows = make_rows()
    encoded = {"bytes": encoded_image(picture(56, 56)), "path": None}
    rows += [{**rows[0], "images": [encoded]}, {"id": 5, "image": encoded, "messages": [USER, ANSWER]}]
    before = copy.deepcopy(rows)
    ViTPDataCollator(processor, vrl_drop_ratio=0.75, sample_transform=lambda row, generator: row)(rows)
    assert rows == before


def fingerprint(encoding):
    return {name: encoding[name].tolist() for name in ("input_ids", "position_ids", "visual_token_indices")}


def kept(processor, row, epoch=0, **kwargs):
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.75, **kwargs)
    collator.set_epoch(epoch)
    return fingerprint(collator.encode(row))


def test_draw_depends_on_seed_id_and_epoch(processor):
    row = make_rows()[2]
    first = kept(processor, row)
    torch.manual_seed(1234)
    assert kept(processor, row) == first
    assert kept(processor, {**row, "split": "train"}) == first
    assert kept(processor, row, epoch=1) != first
    assert kept(processor, row, seed=1) != first
    assert kept(processor, {**row, "id": "four"}) != first


def test_row_without_id_is_drawn_by_its_messages(processor):
    row = {name: value for name, value in make_rows()[2].items() if name != "id"}
    other = {**row, "messages": [{**row["messages"][0], "content": [PLACE, PLACE, PLACE]}, ANSWER]}
    first = kept(processor, row)
    assert kept(processor, {**row, "id": None}) == first
    assert kept(processor, copy.deepcopy(row)) == first
    assert kept(processor, row, epoch=1) != first
    assert kept(processor, other)["visual_token_indices"] != first["visual_token_indices"]


def draw_brightness(row, generator):
    """Replace the images by one color, drawn from the generator."""
    shade = torch.randint(0, 256, (1,), generator=generator).item()
    return {**row, "images": [Image.new("RGB", image.size, (shade,) * 3) for image in row["images"]]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_match_draws_of_main_process(processor, num_workers):
    rows = make_rows()[:3] * 2
    rows = [{**row, "id": i} for i, row in enumerate(rows)]
    collator = ViTPDataCollator(processor, vrl_drop_ratio=0.75, sample_transform=draw_brightness)
    loader = DataLoader(
        rows, batch_size=2, collate_fn=collator, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    reference = ViTPDataCollator(processor, vrl_drop_ratio=0.75, sample_transform=draw_brightness)
    epochs = []
    for epoch in (0, 1, 5):
        collator.set_epoch(epoch)
        reference.set_epoch(epoch)
        epochs.append(list(loader))
        for i, batch in enumerate(epochs[-1]):
            assert_same(batch, reference(rows[2 * i : 2 * i + 2]))
    assert not torch.equal(epochs[0][1]["visual_token_indices"], epochs[1][1]["visual_token_indices"])
    assert not torch.equal(epochs[0][1]["pixel_values"], epochs[1][1]["pixel_values"])


def test_evaluation_neither_drops_nor_transforms(processor):
    calls = []
    collator = ViTPDataCollator(
        processor,
        max_length=400,
        vrl_drop_ratio=0.75,
        answer_mask_ratio=0.9,
        color_jitter={},
        sample_transform=lambda row, generator: calls.append(row) or row,
        padding_side="left",
        pad_to_multiple_of=16,
    )
    evaluation = collator.for_evaluation()
    rows = make_rows()
    samples = [encode_alone(processor, row, 0) for row in rows]
    assert_same(evaluation(rows), assemble(samples, processor.tokenizer.pad_token_id, "left", 16, False))
    assert not calls
    assert evaluation.max_length == 400
    assert collator.vrl_drop_ratio == 0.75 and collator.sample_transform is not None


def test_transform_gets_decoded_images(processor):
    image = picture(100, 60)
    changed = {"images": [image.rotate(90, expand=True)], "messages": [USER, {**ANSWER, "content": "1"}]}

    def transform(row, generator):
        (decoded,) = row["images"]
        assert isinstance(decoded, Image.Image) and decoded.mode == "RGB" and decoded.size == (100, 60)
        assert row["id"] == "one" and row["caption"] == "kept" and isinstance(generator, torch.Generator)
        return {**row, **changed}

    row = {**make_rows()[0], "caption": "kept", "images": [{"bytes": encoded_image(image), "path": None}]}
    actual = ViTPDataCollator(processor, sample_transform=transform)([row])
    assert_same(actual, ViTPDataCollator(processor)([{"id": "one", **changed}]))


class Drawing:
    """Transform that creates its own images."""

    makes_images = True

    def __init__(self, picture):
        self.picture = picture

    def __call__(self, row, generator):
        assert row["images"] == []
        return {"images": [self.picture], "messages": [USER, {**ANSWER, "content": row["image"]["path"]}]}


def test_images_are_not_read_for_makes_images(processor):
    row = {"id": "one", "image": {"bytes": None, "path": "nowhere.png"}, "messages": [USER, ANSWER]}
    actual = ViTPDataCollator(processor, sample_transform=Drawing(picture(60, 60)))([row])
    drawn = {"id": "one", "images": [picture(60, 60)], "messages": [USER, {**ANSWER, "content": "nowhere.png"}]}
    assert_same(actual, ViTPDataCollator(processor)([drawn]))
    with pytest.raises(ValueError, match=r"nowhere.png\) cannot be read"):
        ViTPDataCollator(processor, sample_transform=lambda row, generator: row)([row])
    rows = Dataset.from_list([row]).cast_column("image", datasets.Image())
    assert list(sample_texts(rows, Drawing(picture(60, 60)), seed=0))[-1] == "nowhere.png"


def test_transform_generator_depends_on_seed_id_and_epoch(processor):
    drawn = []

    def transform(row, generator):
        drawn.append(torch.randint(0, 2**40, (3,), generator=generator).tolist())
        return row

    def draw(row, seed=0, epoch=0, before=()):
        collator = ViTPDataCollator(processor, seed=seed, sample_transform=transform)
        collator.set_epoch(epoch)
        collator([*before, row])
        return drawn[-1]

    rows = make_rows()
    first = draw(rows[0])
    torch.manual_seed(99)
    assert draw(rows[0]) == draw(rows[0], before=rows[1:3]) == first
    others = [draw(rows[0], epoch=1), draw(rows[0], seed=1), draw({**rows[0], "id": "other"})]
    assert all(other != first for other in others) and len({str(other) for other in others}) == 3


def test_transform_does_not_shift_vrl(processor):
    row = make_rows()[2]
    assert kept(processor, row, sample_transform=draw_brightness) == kept(processor, row)


@pytest.mark.parametrize("form", ["path", "path in a dict", "bytes with a path", "array", "opened file"])
@pytest.mark.parametrize("column", ["images", "image", "images without a list"])
def test_image_in_any_form_and_column(processor, form, column, tmp_path):
    image = picture(100, 60)
    path = str(tmp_path / "scene.png")
    image.save(path)
    given = {
        "path": path,
        "path in a dict": {"path": path, "bytes": None},
        "bytes with a path": {"path": "gone.png", "bytes": encoded_image(image)},
        "array": np.asarray(image),
        "opened file": Image.open(path),
    }[form]
    column, images = {
        "images": ("images", [given]),
        "image": ("image", given),
        "images without a list": ("images", given),
    }[column]
    row = {"id": 1, "messages": [USER, ANSWER], column: images}
    sample = encode_alone(processor, {"id": 1, "messages": [USER, ANSWER], "images": [image]}, 0)
    expected = assemble([sample], processor.tokenizer.pad_token_id, "right", 1, False)
    assert_same(ViTPDataCollator(processor)([row]), expected)


@pytest.mark.parametrize("empty", [{}, {"images": []}, {"images": None}, {"image": None}])
def test_row_without_images_is_text_only(processor, empty):
    batch = ViTPDataCollator(processor, vrl_drop_ratio=0.75)([{"id": 1, "messages": [USER, ANSWER], **empty}])
    assert "pixel_values" not in batch and "visual_token_indices" not in batch
    assert batch["position_ids"].tolist() == [list(range(batch["input_ids"].shape[1]))]


def test_16_bit_images_do_not_saturate(processor):
    array = np.random.default_rng(0).integers(0, 65536, (56, 56), dtype=np.uint16)
    row = {"id": 1, "messages": [USER, ANSWER]}
    row["image"] = {"bytes": encoded_image(Image.fromarray(array)), "path": None}
    tile = ViTPDataCollator(processor)([row])["pixel_values"][0].numpy()
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)
    np.testing.assert_allclose(tile, (array / 65535 - mean) / std, rtol=0, atol=1e-5)


LONG_ANSWER = {"role": "assistant", "content": "12 trees, " * 30}


CUT = {
    "image": ([picture(100, 60)], [USER, ANSWER]),
    "image in a later turn": (
        [picture(100, 60)],
        [
            {"role": "user", "content": [text("How many?")]},
            LONG_ANSWER,
            {"role": "user", "content": [PLACE, text("and here?")]},
            ANSWER,
        ],
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_too_long_prompt_or_image_is_named(processor, name):
    images, messages = CUT[name]
    row = {"id": "bad-7", "images": images, "messages": messages}
    length = len(ViTPDataCollator(processor).encode(row)["input_ids"])
    max_length = 20 if name == "image" else length - 30
    with pytest.raises(ValueError, match=f"^Sample 'bad-7': .*max_length={max_length}: {length} tokens, 28 of them"):
        ViTPDataCollator(processor, max_length=max_length)([row])


@pytest.mark.parametrize("ratio", [0, 0.75])
def test_answers_are_cut_with_a_warning(processor, ratio, caplog):
    row = {"id": "long-7", "images": [picture(100, 60)], "messages": [USER, LONG_ANSWER]}
    whole = encode_alone(processor, row, ratio)
    short = make_rows()[3]
    limit = 100
    assert len(whole["input_ids"]) > limit
    with caplog.at_level(logging.WARNING):
        batch = ViTPDataCollator(processor, max_length=limit, vrl_drop_ratio=ratio)([short, row])
    cut = {**whole, **{name: whole[name][:limit] for name in ("input_ids", "labels", "position_ids") if name in whole}}
    samples = [encode_alone(processor, short, ratio), cut]
    assert_same(batch, assemble(samples, processor.tokenizer.pad_token_id, "right", 1, ratio > 0))
    assert (batch["labels"][1] != -100).sum() > 20
    (record,) = caplog.records
    assert "'long-7'" in record.getMessage()


@pytest.mark.parametrize("ratio", [0, 0.75])
def test_sequence_of_max_length_is_not_cut(processor, ratio, caplog):
    row = make_rows()[0]
    whole = encode_alone(processor, row, ratio)
    collator = ViTPDataCollator(processor, max_length=len(whole["input_ids"]), vrl_drop_ratio=ratio)
    assert collator([row])["input_ids"][0].tolist() == whole["input_ids"]
    assert not caplog.records


def test_max_length_applies_after_drop(processor):
    row = make_rows()[0]
    limit = len(encode_alone(processor, row, 0.75)["input_ids"])
    ViTPDataCollator(processor, max_length=limit, vrl_drop_ratio=0.75)([row])
    with pytest.raises(ValueError, match="does not fit"):
        ViTPDataCollator(processor, max_length=limit - 10)([row])


def test_template_without_generation_marks_raises_error(processor):
    template = processor.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain = ViTPProcessor(
        processor.image_processor, processor.tokenizer, processor.image_seq_length, chat_template=template
    )
    with pytest.raises(ValueError, match=r"Sample 'a': .*\{% generation %\}"):
        ViTPDataCollator(plain)([{"id": "a", "images": [], "messages": [USER, ANSWER]}])


def collate(processor, rows, mask_ratio, drop_ratio=0.0, epoch=0, **options):
    collator = ViTPDataCollator(processor, vrl_drop_ratio=drop_ratio, answer_mask_ratio=mask_ratio, seed=5, **options)
    collator.set_epoch(epoch)
    return collator(rows)


def hidden_by_hand(ids, labels, mask_ratio, mask_id, end_id, *key):
    """Return masked ids token by token: each labeled token draws a number, except that turn ends are kept."""
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
def test_only_answer_tokens_are_masked(processor, padding_side, drop_ratio, mask_ratio):
    """Mask samples with one and several turns, and with several images and none."""
    rows, options = make_rows(), {"drop_ratio": drop_ratio, "epoch": 2, "padding_side": padding_side}
    whole, batch = collate(processor, rows, 0.0, **options), collate(processor, rows, mask_ratio, **options)
    mask_id, end_id = processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    expected = [
        hidden_by_hand(ids.tolist(), labels.tolist(), mask_ratio, mask_id, end_id, 5, row["id"], 2)
        for row, ids, labels in zip(rows, whole["input_ids"], whole["labels"])
    ]
    assert_same(batch, {**whole, "input_ids": torch.tensor(expected)})
    shown = batch["input_ids"][(batch["labels"] != -100) & (batch["input_ids"] != mask_id)]
    assert (shown == end_id).sum() == 6  # The four rows have six answers.
    assert (shown != end_id).any() == (mask_ratio < 1)


def test_masked_tokens_depend_on_seed_id_and_epoch(processor):
    rows = make_rows()
    alone = [collate(processor, [row], 0.5)["input_ids"][0].tolist() for row in rows]
    loader = DataLoader(
        rows, batch_size=1, num_workers=2, collate_fn=ViTPDataCollator(processor, answer_mask_ratio=0.5, seed=5)
    )
    assert [batch["input_ids"][0].tolist() for batch in loader] == alone
    epochs = {tuple(collate(processor, rows[2:3], 0.5, epoch=epoch)["input_ids"][0].tolist()) for epoch in range(4)}
    assert len(epochs) > 1 and tuple(alone[2]) in epochs


def test_cut_answer_is_masked_like_whole(processor):
    row = make_rows()[2:3]
    whole = collate(processor, row, 0.5)
    length = whole["input_ids"].shape[1] - 4
    assert (whole["labels"][:, length:] != -100).any()
    cut = collate(processor, row, 0.5, max_length=length)
    for name in ("input_ids", "labels"):
        assert torch.equal(cut[name], whole[name][:, :length])


def test_color_jitter_depends_on_seed_id_and_epoch(processor):
    """Only pixels change, alike for raw and normalized tiles, in any batch and worker."""
    rows, jitter = make_rows()[:3], ColorJitter(gray=0.5)
    plain, collator = (ViTPDataCollator(processor, seed=5, color_jitter=one) for one in (None, vars(jitter)))
    for epoch in range(2):
        collator.set_epoch(epoch)
        whole, batch = plain(rows), collator(rows)
        parts = zip(rows, torch.split(whole["pixel_values"], [len(plain([row])["pixel_values"]) for row in rows]))
        tiles = [
            tile
            for row, part in parts
            for tile in jitter(list(part), processor.image_processor, keyed_generator(5, row["id"], epoch, "colors"))
        ]
        assert_same(batch, {**whole, "pixel_values": torch.stack(tiles)})
        raw = collator.with_raw_tiles()(rows)["pixel_values"]
        assert raw.dtype == torch.uint8
        scale = 255 * torch.tensor(processor.image_processor.image_std).min().item()
        assert (normalize_tiles(raw, processor.image_processor) - batch["pixel_values"]).abs().max() < 1.51 / scale
    loader = DataLoader(rows, batch_size=1, num_workers=2, collate_fn=collator)
    assert torch.equal(torch.cat([found["pixel_values"] for found in loader]), batch["pixel_values"])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({}, "<|endoftext|>"),
        ({"mask_token": "<mask>"}, "<mask>"),
        ({"pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}, "<|endoftext|>"),  # SmolLM2 has these tokens.
        ({"pad_token": "<|im_end|>"}, None),
    ],
    ids=str,
)
def test_mask_token_does_not_end_a_turn(tokens, expected):
    tokenizer = build_tokenizer(["How many trees?"], 400)
    _, processor = build_model(tokenizer, VISION, TEXT)
    tokenizer.add_special_tokens(tokens)
    if expected is None:
        with pytest.raises(ValueError, match="tokenizer.mask_token"):
            ViTPDataCollator(processor, answer_mask_ratio=0.5)
        return
    assert tokenizer.convert_ids_to_tokens(mask_token_id(processor)) == expected


def test_mask_token_is_not_the_eos_of_a_template():
    tokenizer = build_tokenizer(["How many trees?"], 400)
    _, processor = build_model(tokenizer, VISION, TEXT)
    for template in ("{{ eos_token }}", {"default": "{{ eos_token }}", "pad_token": ""}):
        processor.chat_template = template
        assert mask_token_id(processor) == tokenizer.pad_token_id


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_flat_batch_concatenates_samples(processor, ratio, side):
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
        assert (batch["position_ids"].diff() > 1).any()  # VRL leaves gaps.


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_flat_labels_omit_only_first_tokens(lengths, left):
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


def test_padding_free_evaluation_pads(processor):
    collator = ViTPDataCollator(processor, padding_free=True).for_evaluation()
    assert collator(make_rows())["attention_mask"].eq(0).any()


@pytest.fixture(scope="module")
def collator(tokenizer):
    torch.manual_seed(0)
    _, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": 12})
    return ViTPDataCollator(processor, vrl_drop_ratio=0.75)


@pytest.mark.parametrize("sizes", [[], [(56, 56)], [(300, 100)], [(100, 300), (56, 56), (224, 60)]], ids=str)
@pytest.mark.parametrize("options", [{}, {"vrl_drop_ratio": 0.0}, {"max_length": 20, "vrl_drop_ratio": 0.9}], ids=str)
def test_length_equals_encoded_row(collator, sizes, options):
    collator = ViTPDataCollator(collator.processor, **{"vrl_drop_ratio": 0.75, **options})
    rows = prepare_rows(Dataset.from_list([sized_row(1, sizes)], features=FEATURES))
    try:
        expected = len(collator.encode(rows[0])["input_ids"])
    except ValueError:
        assert "max_length" in options  # The prompt does not fit.
        return
    assert SampleLength.of(collator)(rows[0]) == expected


def test_length_follows_source_settings(collator):
    settings = {"a": SourceSettings(max_patches=2, system_prompt="You see trees."), "b": SourceSettings(image_size=112)}
    collator = ViTPDataCollator(collator.processor, source_settings=settings)
    for source in ("a", "b", "c"):
        example = {**sized_row(1, [(300, 100)]), "source": source}
        assert SampleLength.of(collator)(example) == len(collator.encode(example)["input_ids"])
