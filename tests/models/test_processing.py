"""The processor's sequences equal a brute-force drop from the full encoding, and its tiles those of transformers."""

import copy
import functools
import json
from decimal import ROUND_CEILING, Decimal

import numpy as np
import pytest
import torch
import transformers
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from pictures import picture
from PIL import Image
from tiny_models import TOKENS_PER_TILE
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, GotOcr2ImageProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_vitp import ViTPImageProcessor, ViTPProcessor
from modeling_vitp.conversations import CHAT_TEMPLATE
from modeling_vitp.pretraining.loading import build_tokenizer

BUDGET = 6
ONE = [(100, 60)]
SEVERAL = [(56, 56), (170, 50), (40, 120)]
TEXT_ONLY = []
BATCHES = {
    "one image": [ONE],
    "several images": [SEVERAL],
    "text only": [TEXT_ONLY, TEXT_ONLY],
    "mixed": [ONE, TEXT_ONLY, SEVERAL, [(300, 20), (56, 56)]],
}


@pytest.fixture(scope="module")
def processor(tokenizer):
    image_processor = ViTPImageProcessor(size={"height": 56, "width": 56}, max_patches=BUDGET)
    return ViTPProcessor(image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)


def make_batch(layout):
    """Return images, nested by sample, and texts of very different length, for a list of lists of image sizes."""
    images = [[picture(*size, seed=10 * row + i) for i, size in enumerate(sizes)] for row, sizes in enumerate(layout)]
    texts = [f"{row} trees" * (3 * row + 1) + " <IMG_CONTEXT> or top?" * len(row_) for row, row_ in enumerate(layout)]
    return images, texts


def make_keys(layout):
    return [(0, f"sample-{row}", 0) for row in range(len(layout))]


def tile_with_transformers(images, budget=BUDGET):
    """Return the tiles of one sample's images, `(num_tiles, 3, 56, 56)`, and their number for each image."""
    tiler = GotOcr2ImageProcessor(
        size={"height": 56, "width": 56},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        crop_to_patches=True,
        max_patches=max(budget // max(len(images), 1), 1),
    )
    tiles = [tiler(image, return_tensors="pt") for image in images]
    if not tiles:
        return torch.zeros(0, 3, 56, 56), []
    return torch.cat([one["pixel_values"] for one in tiles]), [one["num_patches"].item() for one in tiles]


def number_kept(num_tokens, ratio):
    return int(((1 - Decimal(str(ratio))) * num_tokens).to_integral_value(ROUND_CEILING))


def unpad(output, row):
    real = np.asarray(output["attention_mask"][row]) == 1
    return {
        name: np.asarray(output[name][row])[real].tolist() for name in ("input_ids", "position_ids") if name in output
    }


def check_against_full_encoding(processor, layout, ratio, padding_side):
    """Recompute every part of the short encoding by loops from the full one and transformers' tiles."""
    images, texts = make_batch(layout)
    kwargs = {"padding": True, "padding_side": padding_side, "return_tensors": "pt", "vrl_keys": make_keys(layout)}
    if not any(images):
        images = None
    full = processor(images=images, text=texts, vrl_drop_ratio=0, **kwargs)
    short = processor(images=images, text=texts, vrl_drop_ratio=ratio, **kwargs)

    expected_tiles = [tile_with_transformers(sample) for sample in images or [[]] * len(layout)]
    if images is None:
        assert "pixel_values" not in short and "visual_token_indices" not in short
        indices = []
    else:
        assert torch.equal(short["pixel_values"], torch.cat([tiles for tiles, _ in expected_tiles]))
        assert torch.equal(full["pixel_values"], short["pixel_values"])
        assert short["visual_token_indices"].dtype == torch.int64
        indices = short["visual_token_indices"].tolist()
    assert indices == sorted(set(indices))

    num_visual_before = 0
    longest = 0
    for row, (_, num_tiles) in enumerate(expected_tiles):
        full_ids, actual = unpad(full, row)["input_ids"], unpad(short, row)
        num_visual = sum(num_tiles) * TOKENS_PER_TILE
        assert full_ids.count(processor.image_token_id) == num_visual
        kept = {i - num_visual_before for i in indices if num_visual_before <= i < num_visual_before + num_visual}
        assert len(kept) == number_kept(num_visual, ratio)
        expected_ids, expected_positions, ordinal = [], [], 0
        for position, token in enumerate(full_ids):
            if token == processor.image_token_id:
                ordinal += 1
                if ordinal - 1 not in kept:
                    continue
            expected_ids.append(token)
            expected_positions.append(position)
        assert actual["input_ids"] == expected_ids
        assert actual["position_ids"] == expected_positions
        padding = short["attention_mask"][row] == 0
        assert (short["input_ids"][row][padding] == processor.tokenizer.pad_token_id).all()
        assert (short["position_ids"][row][padding] == 0).all()
        if padding.any():
            assert padding[0 if padding_side == "left" else -1]
        longest = max(longest, len(expected_ids))
        num_visual_before += num_visual
    assert all(i < num_visual_before for i in indices)
    assert short["input_ids"].shape == short["position_ids"].shape == (len(layout), longest)
    return short


@pytest.mark.parametrize("ratio", [0.75, 0.99])
@pytest.mark.parametrize("name", BATCHES)
def test_short_encoding_is_full_one_without_dropped(processor, name, ratio):
    for padding_side in ("right", "left"):
        check_against_full_encoding(processor, BATCHES[name], ratio, padding_side)


SIZES = st.sampled_from([(56, 56), (112, 56), (56, 170), (60, 61), (200, 10)])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    layout=st.lists(st.lists(SIZES, max_size=3), min_size=1, max_size=4),
    ratio=st.integers(1, 99).map(lambda percent: percent / 100),
    padding_side=st.sampled_from(["left", "right"]),
)
def test_short_encoding_of_any_layout(processor, layout, ratio, padding_side):
    check_against_full_encoding(processor, layout, ratio, padding_side)


@pytest.mark.parametrize("saved", ["by nobody", "right"])
def test_batches_are_padded_left_by_default(processor, tmp_path, saved):
    """Padding is left as in transformers' InternVL, even if a tokenizer was saved with the default "right"."""
    if saved == "right":
        processor.save_pretrained(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "right"}))
        assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "right"
        processor = ViTPProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.padding_side == "left"  # read by pipelines
    texts, pad = ["top", "How many trees are there?"], processor.tokenizer.pad_token_id
    chats = [[{"role": "user", "content": text}] for text in texts]

    def encode_chats(**options):
        return processor.apply_chat_template(chats, tokenize=True, return_dict=True, processor_kwargs=options)

    for encode in (functools.partial(processor, text=texts), encode_chats):
        short, long = encode(padding=False)["input_ids"]
        missing = [pad] * (len(long) - len(short))
        assert missing
        assert encode(padding=True)["input_ids"] == [missing + short, long]
        assert encode(padding=True, padding_side="right")["input_ids"] == [short + missing, long]


def encode_row(processor, sample, text, key, **kwargs):
    return processor(images=[sample], text=[text], vrl_drop_ratio=0.5, vrl_keys=[key], **kwargs)


@pytest.mark.parametrize("order", [[3, 0, 2, 1], [2, 3]])
def test_draw_depends_on_key_alone(processor, order):
    layout = BATCHES["mixed"]
    images, texts = make_batch(layout)
    keys = make_keys(layout)
    torch.manual_seed(1)
    alone = [encode_row(processor, *row) for row in zip(images, texts, keys)]
    torch.manual_seed(2)
    batch = processor(
        images=[images[row] for row in order],
        text=[texts[row] for row in order],
        vrl_keys=[keys[row] for row in order],
        vrl_drop_ratio=0.5,
    )
    start = 0
    expected = []
    for row in order:
        expected += [i + start for i in alone[row].get("visual_token_indices", torch.tensor([])).tolist()]
        start += len(alone[row].get("pixel_values", [])) * TOKENS_PER_TILE
    assert batch["visual_token_indices"].tolist() == expected
    assert batch["position_ids"] == [alone[row]["position_ids"][0] for row in order]


def test_draw_differs_between_keys(processor):
    images, texts = make_batch([SEVERAL])
    state = torch.get_rng_state()
    draws = set()
    for key in ((0, "sample-0", 0), (1, "sample-0", 0), (0, "sample-1", 0), (0, "sample-0", 1), "a plain key"):
        output = encode_row(processor, images[0], texts[0], key)
        draws.add(tuple(output["visual_token_indices"].tolist()))
    assert len(draws) == 5
    assert torch.equal(state, torch.get_rng_state())


def test_draw_without_keys_uses_global_generator(processor):
    images, texts = make_batch([SEVERAL])
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(processor(images=images, text=texts, vrl_drop_ratio=0.5)["visual_token_indices"].tolist())
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("prob, fewest, most", [(0.0, 0, 0), (0.25, 7, 26), (1.0, 64, 64)])
def test_vrl_is_applied_to_share_of_samples(processor, prob, fewest, most):
    image, rows = picture(56, 56), 64
    output = processor(
        images=[[image]] * rows,
        text=["<IMG_CONTEXT>"] * rows,
        vrl_drop_ratio=0.75,
        vrl_apply_prob=prob,
        vrl_keys=list(range(rows)),
    )
    counts = [ids.count(processor.image_token_id) for ids in output["input_ids"]]
    assert set(counts) <= {1, TOKENS_PER_TILE}
    assert fewest <= counts.count(1) <= most
    per_row = (output["visual_token_indices"] // TOKENS_PER_TILE).bincount(minlength=rows)
    assert per_row.tolist() == counts


@pytest.mark.parametrize("name", ["mixed", "text only"])
def test_no_positions_or_indices_without_drop(processor, name):
    images, texts = make_batch(BATCHES[name])
    output = processor(images=images, text=texts, vrl_keys=make_keys(texts), padding=True, return_tensors="pt")
    assert set(output) - {"pixel_values"} == {"input_ids", "attention_mask"}
    assert ("pixel_values" in output) == (name != "text only")


def test_image_processor_shares_budget_by_sample(processor):
    """TRL's GRPO counts the tiles of each sample by this."""
    samples = [[picture(120, 60), picture(60, 120)], [picture(200, 60)], [], [picture(60, 60)] * 3]
    alone = [
        processor(images=sample, text="<IMG_CONTEXT>" * len(sample))["pixel_values"] for sample in samples if sample
    ]
    together = processor.image_processor(images=samples, crop_to_patches=True, return_tensors="pt")
    assert torch.equal(together["pixel_values"], torch.cat([torch.stack(list(tiles)) for tiles in alone]))
    groups = torch.split(together["num_patches"], [len(sample) for sample in samples])
    assert [group.sum().item() for group in groups] == [len(alone[0]), len(alone[1]), 0, len(alone[2])]


@pytest.mark.parametrize(("num_images", "budget"), [(1, None), (2, 8), (3, 8), (5, 1), (5, None)])
def test_images_share_tile_budget(processor, budget, num_images):
    images = [picture(224, 56, seed=i) for i in range(num_images)]
    kwargs = {} if budget is None else {"max_patches": budget}
    output = processor(images=images, text="<IMG_CONTEXT>" * num_images, **kwargs)
    tiles, num_tiles = tile_with_transformers(images, budget or BUDGET)
    assert torch.equal(output["pixel_values"], tiles)
    runs = processor.tokenizer.decode(output["input_ids"][0]).split("<img>")[1:]
    assert [run.count("<IMG_CONTEXT>") for run in runs] == [n * TOKENS_PER_TILE for n in num_tiles]


def test_share_is_at_least_min_patches(processor):
    images = [picture(224, 56, seed) for seed in range(3)]
    output = processor(images=images, text="<IMG_CONTEXT>" * 3, max_patches=6, min_patches=4)
    assert len(output["pixel_values"]) == 3 * (4 + 1)


@pytest.mark.parametrize(
    "images",
    [
        lambda pictures: pictures,
        lambda pictures: [pictures[:1], [], pictures[1:]],
        lambda pictures: np.stack([np.asarray(picture) for picture in pictures]),
        lambda pictures: torch.stack([torch.from_numpy(np.array(picture)).movedim(-1, 0) for picture in pictures]),
    ],
)
def test_flat_nested_and_stacked_images_are_equal(processor, images):
    pictures = [picture(60, 60, seed) for seed in range(3)]
    texts = ["<IMG_CONTEXT>", "none", "<IMG_CONTEXT> and <IMG_CONTEXT>"]
    output = processor(images=images(pictures), text=texts)
    tiles = [tile_with_transformers(pictures[:1])[0], tile_with_transformers(pictures[1:])[0]]
    assert torch.equal(output["pixel_values"], torch.cat(tiles))
    counts = [ids.count(processor.image_token_id) for ids in output["input_ids"]]
    assert counts == [len(tiles[0]) * TOKENS_PER_TILE, 0, len(tiles[1]) * TOKENS_PER_TILE]


@pytest.mark.parametrize("return_tensors, kind", [(None, list), ("np", np.ndarray)])
def test_return_tensors_changes_type_only(processor, return_tensors, kind):
    images, texts = make_batch([ONE])
    kwargs = {"images": images, "text": texts, "vrl_drop_ratio": 0.5, "vrl_keys": [0]}
    output = processor(return_tensors=return_tensors, **kwargs)
    expected = processor(return_tensors="pt", **kwargs)
    assert isinstance(output["input_ids"], kind) and isinstance(output["position_ids"], kind)
    if kind is not list:
        assert all(isinstance(value, kind) for value in output.values())
    assert set(output) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(np.asarray(output[name]), expected[name].numpy())


def test_other_modalities_are_refused(processor):
    for modality in ("videos", "audio"):
        with pytest.raises(ValueError, match=modality):
            processor(text="Describe the video.", **{modality: [np.zeros((2, 56, 56, 3), np.uint8)]})


@pytest.mark.parametrize("return_tensors, kind", [(None, torch.Tensor), ("np", np.ndarray)])
def test_images_without_text_are_only_tiled(processor, return_tensors, kind):
    pictures = [picture(170, 50), picture(56, 56)]
    output = processor(images=pictures, return_tensors=return_tensors)
    expected = torch.cat([tile_with_transformers([one])[0] for one in pictures])
    assert "input_ids" not in output
    assert isinstance(output["pixel_values"], kind)
    np.testing.assert_array_equal(np.asarray(output["pixel_values"]), expected.numpy())


SYSTEM = {"role": "system", "content": "Count."}
USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "There are 12."}
AS_PARTS = [
    {**message, "content": [{"type": "text", "text": message["content"]}]} for message in (SYSTEM, USER, ANSWER)
]
WITH_IMAGES = {
    "role": "user",
    "content": [
        {"type": "image", "image": picture(56, 56)},
        {"type": "text", "text": "Before"},
        {"type": "image", "image": picture(112, 56)},
        {"type": "text", "text": "and after?"},
    ],
}
RENDERED = "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"


@pytest.mark.parametrize(
    "messages, add_generation_prompt, expected",
    [
        ([SYSTEM, USER], False, RENDERED),
        ([SYSTEM, USER], True, RENDERED + "<|im_start|>assistant\n"),
        ([SYSTEM, USER, ANSWER], False, RENDERED + "<|im_start|>assistant\nThere are 12.<|im_end|>\n"),
        (AS_PARTS, False, RENDERED + "<|im_start|>assistant\nThere are 12.<|im_end|>\n"),
        ([USER], False, "<|im_start|>user\nHow many?<|im_end|>\n"),
        (
            [WITH_IMAGES],
            True,
            "<|im_start|>user\n<IMG_CONTEXT>\nBefore<IMG_CONTEXT>\nand after?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_chat_template_renders_chatml(processor, messages, add_generation_prompt, expected):
    assert processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt) == expected


CONVERSATIONS = {
    "one turn": [USER, ANSWER],
    "many turns": [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "Still 12 trees?"}, USER, ANSWER],
    "many images": [WITH_IMAGES, ANSWER, WITH_IMAGES, {"role": "assistant", "content": "top left"}],
    "answer in parts": [WITH_IMAGES, {"role": "assistant", "content": [{"type": "text", "text": t} for t in "ab"]}],
    "answer like a template": [WITH_IMAGES, {"role": "assistant", "content": "{% user %}\nassistant\n12"}],
}


def answers_of(messages):
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    texts = [c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents]
    return "".join(text + "<|im_end|>" for text in texts)


@pytest.mark.parametrize(("ratio", "padding_side"), [(0, "right"), (0.75, "left")])
def test_assistant_mask_covers_answers_and_ends(processor, ratio, padding_side):
    conversations = list(CONVERSATIONS.values())
    output = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={
            "padding": True,
            "padding_side": padding_side,
            "vrl_drop_ratio": ratio,
            "vrl_keys": list(range(len(conversations))),
        },
    )
    assert set(output["assistant_masks"].unique().tolist()) == {0, 1}
    for messages, ids, mask in zip(conversations, output["input_ids"], output["assistant_masks"]):
        assert processor.tokenizer.decode(ids[mask == 1]) == answers_of(messages)


@pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="TRL 1.15 masks tokens outside of answers")
def test_trl_collator_trains_on_answers_and_ends(processor):
    pair = [picture(170, 50), picture(56, 56)]
    examples = [
        {"messages": [USER, ANSWER], "images": [picture(100, 60)]},
        {"messages": CONVERSATIONS["many turns"], "images": pair},
        {"messages": [USER, {"role": "assistant", "content": "none"}], "images": []},
    ]
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    batch = collator([dict(example) for example in examples])
    for example, labels in zip(examples, batch["labels"]):
        assert processor.tokenizer.decode(labels[labels != -100]) == answers_of(example["messages"])
    tiles = [tile_with_transformers(example["images"])[0] for example in examples]
    assert torch.equal(batch["pixel_values"], torch.cat(tiles))
    counts = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert counts == [len(one) * TOKENS_PER_TILE for one in tiles]


PLACE = "<IMG_CONTEXT>"


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="transformers 5.23 sanitizes")
@pytest.mark.parametrize(("token", "ratio"), [("<IMG_CONTEXT>", 0), ("<IMG_CONTEXT>", 0.75), ("</img>", 0.75)])
def test_sanitized_image_token_is_plain_text(processor, token, ratio):
    question = f"what is {token}?"
    content = [{"type": "image", "image": picture(100, 60)}, {"type": "text", "text": question}]
    output = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        sanitize_control_tokens=True,
        processor_kwargs={"vrl_drop_ratio": ratio},
    )
    ids = output["input_ids"][0]
    assert processor.tokenizer.decode(ids).endswith(f"</img>\n{question}<|im_end|>\n<|im_start|>assistant\n")
    num_tokens = len(tile_with_transformers([picture(100, 60)])[0]) * TOKENS_PER_TILE
    assert ids.count(processor.image_token_id) == number_kept(num_tokens, ratio)
    assert ids.count(processor.start_image_token_id) == ids.count(processor.end_image_token_id) == 1
    plain = processor.tokenizer.encode(question, split_special_tokens=True, add_special_tokens=False)
    assert str(plain)[1:-1] in str(ids)


@pytest.mark.parametrize("ratio, num_visual", [(0, 7 * TOKENS_PER_TILE), (0.5, 14)])
def test_truncation_may_cut_text_but_no_image_token(processor, ratio, num_visual):
    kwargs = {"images": [[], [picture(100, 60)]], "text": ["fine", f"{PLACE} How many trees?"]}
    kwargs |= {"truncation": True, "vrl_drop_ratio": ratio, "vrl_keys": [0, 1]}
    output = processor(max_length=num_visual + 2, **kwargs)
    assert len(output["input_ids"][1]) == num_visual + 2
    for max_length in (num_visual + 1, 1):
        with pytest.raises(ValueError, match="[Ss]ample 1 .*max_length"):
            processor(max_length=max_length, **kwargs)


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")])
def test_processor_survives_saving(chat_template, tmp_path):
    tokenizer = build_tokenizer(["How many trees are there?"], vocab_size=300)
    processor = ViTPProcessor(
        ViTPImageProcessor(size={"height": 28, "width": 28}, max_patches=4, input_spec={"bands": [2, 0, 1]}),
        tokenizer,
        image_seq_length=1,
        chat_template=chat_template,
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ViTPProcessor and type(loaded.image_processor) is ViTPImageProcessor
    assert loaded.image_seq_length == 1
    assert loaded.chat_template == (chat_template or CHAT_TEMPLATE)
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    kwargs["processor_kwargs"] = {"vrl_drop_ratio": 0.5, "vrl_keys": [7]}
    before = processor.apply_chat_template(CONVERSATIONS["many images"], **kwargs)
    after = loaded.apply_chat_template(CONVERSATIONS["many images"], **kwargs)
    assert set(before) == set(after) >= {"pixel_values", "position_ids", "visual_token_indices", "assistant_masks"}
    for name in before:
        assert torch.equal(before[name], after[name])


def test_input_spec_of_call_reaches_images(processor):
    array = np.full((56, 56), 300, dtype=np.int16)
    image = Image.fromarray(np.full((56, 56, 3), 51, dtype=np.uint8))
    output = processor(images=[array], text=PLACE, input_spec={"window": [200, 700]})
    torch.testing.assert_close(output["pixel_values"], tile_with_transformers([image])[0])


def test_model_inputs_are_named(processor):
    images, texts = make_batch([ONE])
    output = processor(images=images, text=texts, vrl_drop_ratio=0.5)
    assert set(output) <= set(processor.model_input_names)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(20, 300), st.integers(20, 300)), min_size=1, max_size=4),
    max_patches=st.sampled_from([None, 1, 2, 5, 12]),
)
def test_serving_engines_get_tiles_and_tokens(processor, sizes, max_patches):
    kwargs = {} if max_patches is None else {"max_patches": max_patches}
    images = [picture(width, height) for height, width in sizes]
    encoded = processor(images=[images], text="<IMG_CONTEXT>" * len(images), **kwargs)
    told = processor._get_num_multimodal_tokens([list(size) for size in sizes], **kwargs)
    assert sum(told.num_image_patches) == len(encoded["pixel_values"])
    assert sum(told.num_image_tokens) == encoded["input_ids"][0].count(processor.image_token_id)
    one_by_one = [processor.image_processor(image, crop_to_patches=True, **kwargs) for image in images[:1]]
    if len(sizes) == 1:
        assert told.num_image_patches == [len(one["pixel_values"]) for one in one_by_one]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


def test_attention_mask_is_optional(processor):
    images, texts = make_batch(BATCHES["mixed"])
    kwargs = {"images": images, "text": texts, "padding": True, "vrl_drop_ratio": 0.5, "vrl_keys": make_keys(texts)}
    whole, without = processor(**kwargs), processor(**kwargs, return_attention_mask=False)
    assert set(whole) - set(without) == {"attention_mask"}
    for name in ("input_ids", "position_ids"):
        assert whole[name] == without[name]


def test_default_device_is_not_used(processor):
    """Processors run on the CPU, also with `torch.set_default_device`."""
    images, texts = make_batch(BATCHES["mixed"])
    kwargs = {"images": images, "text": texts, "vrl_drop_ratio": 0.75, "vrl_keys": make_keys(texts)}
    expected = processor(**kwargs)
    with torch.device("meta"):
        output = processor(**kwargs)
    assert output["input_ids"] == expected["input_ids"]
    names = {"visual_token_indices"}
    if Version(transformers.__version__) >= Version("5.24"):  # 5.20 makes the tiles on the default device
        names.add("pixel_values")
    assert all(torch.equal(output[name], expected[name]) for name in names)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("ratio", [0, 0.99])
def test_tokens_match_replaced_text_and_offsets(processor, ratio, padding, added):
    """Image tokens are tokenized once and repeated, or all of them if rows are padded or offsets are requested."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    end = ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{end[0]} $A {end[0]}", None, [end])
    processor = ViTPProcessor(processor.image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)
    images, texts = make_batch(BATCHES["mixed"])
    wanted = {"add_special_tokens": added, "return_offsets_mapping": True, "return_special_tokens_mask": True}
    given = {"images": images, "text": texts, "vrl_drop_ratio": ratio, "vrl_keys": make_keys(texts), "padding": padding}
    output = processor(**given, **wanted, return_text_replacement_offsets=True)
    whole = []
    for row, (text, offsets) in enumerate(zip(texts, output["text_replacement_offsets"], strict=True)):
        written, end = "", 0
        for found in offsets:
            assert text[slice(*found["span"])] == found["text"] == "<IMG_CONTEXT>"
            written += text[end : found["span"][0]] + found["replacement"]
            assert written[slice(*found["new_span"])] == found["replacement"]
            end = found["span"][1]
        whole.append(written + text[end:])
        assert len(offsets) == len(images[row])
    expected = tokenizer(whole, padding=padding, padding_side="left", **wanted)
    for found in (output, processor(**given, **wanted)):
        assert {name: found[name] for name in expected} == dict(expected)
    assert set(output) >= {"attention_mask", "offset_mapping", "special_tokens_mask"}
    if ratio == 0.99:
        assert any("<img></img>" in text for text in whole)
    if not ratio:
        tiled = processor.image_processor(images[2], crop_to_patches=True, max_patches=BUDGET // len(images[2]))
        assert [processor.replace_image_token(tiled, index) for index in range(3)] == [
            found["replacement"] for found in output["text_replacement_offsets"][2]
        ]
