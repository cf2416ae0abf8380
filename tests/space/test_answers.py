"""Answers and their probabilities, compared with InternVL of transformers; boxes drawn on images."""

import copy
import threading
import time

import numpy as np
import pytest
import torch
from answers import (
    COLORS,
    answer_log_probs,
    answers_by_drop_ratio,
    check_length,
    decode,
    draw_boxes,
    encode,
    greedy,
    greedy_answer,
    stream_answer,
    visual_features,
)
from internvl_oracle import blocked_mask, build_native, shake
from loading import FullModel
from pictures import picture
from PIL import Image, ImageColor
from tiny_models import TOKENS_PER_TILE
from tokenizers.processors import TemplateProcessing

from modeling_vitp.instructions.boxes import GridBox

QUESTION = "How many trees are there?"
NUM_TOKENS = 7 * TOKENS_PER_TILE


@pytest.fixture
def vivid(model):
    return shake(model).eval()


@pytest.fixture
def native(vivid):
    return build_native(vivid)


@pytest.fixture
def image():
    return picture(168, 112)


def test_question_is_encoded_as_in_training(processor, image):
    processor = copy.deepcopy(processor)
    end = ("<|im_end|>", processor.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{end[0]} $A", None, [end])
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}
    trained = processor.encode_conversation([message])["input_ids"]
    assert encode(processor, [image], QUESTION)["input_ids"][0, : len(trained)].tolist() == trained.tolist()


def native_log_probs(native, processor, image, answer, drop_ratio, seed):
    """Compute the answer token by token on the full sequence, with dropped tokens masked."""
    full = encode(processor, [image], QUESTION)
    short = encode(processor, [image], QUESTION, drop_ratio, seed)
    kept = short["position_ids"][0] if drop_ratio else torch.arange(full["input_ids"].shape[1])
    ids, log_probs = full["input_ids"], []
    for token in answer:
        survives = torch.zeros(1, ids.shape[1], dtype=torch.bool)
        survives[0, kept] = True
        survives[0, full["input_ids"].shape[1] :] = True
        mask = blocked_mask(torch.ones_like(ids), survives)
        logits = native(input_ids=ids, pixel_values=full["pixel_values"], attention_mask=mask).logits[0, -1].double()
        log_probs.append((logits - logits.logsumexp(0))[token])
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return torch.stack(log_probs)


@pytest.mark.parametrize(("drop_ratio", "seed"), [(0.0, 0), (0.5, 0), (0.75, 4)])
@torch.no_grad()
def test_answer_probability_equals_internvl(vivid, native, processor, image, drop_ratio, seed):
    inputs = encode(processor, [image], QUESTION, drop_ratio, seed)
    features = visual_features(vivid, inputs["pixel_values"])
    answer = torch.tensor(processor.tokenizer("There are 12 trees").input_ids + [processor.tokenizer.eos_token_id])
    log_probs, _ = answer_log_probs(vivid, inputs, features, answer)
    wanted = native_log_probs(native, processor, image, answer, drop_ratio, seed)
    assert (log_probs - wanted).abs().max() < 1e-4
    assert wanted.min() < -2  # low enough for a difference to be visible


@pytest.mark.parametrize("drop_ratio", [0.0, 0.75])
@torch.no_grad()
def test_greedy_answer_matches_full_model_at_each_step(vivid, processor, image, drop_ratio):
    inputs = encode(processor, [image], QUESTION, drop_ratio, seed=1)
    features = visual_features(vivid, inputs["pixel_values"])
    answer = greedy_answer(vivid, inputs, features, max_new_tokens=6)
    whole = vivid.generate(**inputs, **greedy(vivid, 6))
    assert answer.tolist() == whole[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer_log_probs(vivid, inputs, features, answer)[1].tolist() == answer.tolist()


def test_answers_by_drop_ratio_match_separate_answers(vivid, processor, image):
    ratios, seeds = (0.5, 0.0, 0.95), (0, 3)
    answers = list(
        answers_by_drop_ratio(FullModel("vivid", vivid, processor), image, QUESTION, ratios, seeds, max_new_tokens=5)
    )
    draws = [(0.0, 0), (0.5, 0), (0.5, 3), (0.95, 0), (0.95, 3)]
    assert [(answer.drop_ratio, answer.seed) for answer in answers] == draws
    assert [answer.num_visual_tokens for answer in answers] == [NUM_TOKENS, 14, 14, 2, 2]
    full = None
    for answer in answers:
        inputs = encode(processor, [image], QUESTION, answer.drop_ratio, answer.seed)
        assert answer.sequence_length == inputs["input_ids"].shape[1]
        outputs = vivid.generate(**inputs, **greedy(vivid, 5), return_dict_in_generate=True, output_logits=True)
        ids = outputs.sequences[0, inputs["input_ids"].shape[1] :]
        assert answer.text == decode(processor, ids)
        steps = torch.stack(outputs.logits)[:, 0].softmax(-1)
        assert answer.probability == pytest.approx(steps[range(len(ids)), ids].prod().item(), rel=1e-3)
        full = ids if full is None else full
        features = visual_features(vivid, inputs["pixel_values"])
        log_probs, _ = answer_log_probs(vivid, inputs, features, full)
        assert answer.full_probability == pytest.approx(log_probs.sum().exp().item(), rel=1e-3)
    assert len({answer.text for answer in answers}) > 1


def test_stream_ends_with_greedy_answer_for_two_images(vivid, processor, image):
    inputs = encode(processor, [image, picture(56, 112, 1)], "What is at <box>[[1, 2, 3, 4]]</box>?")
    ids = vivid.generate(**inputs, **greedy(vivid, 12))[0, inputs["input_ids"].shape[1] :]
    parts = list(stream_answer(vivid, processor, inputs, max_new_tokens=12))
    assert parts[-1].strip() == decode(processor, ids)
    assert all(later.startswith(earlier) for earlier, later in zip(parts, parts[1:]))
    box = processor.tokenizer.convert_tokens_to_ids("<box>")
    assert (inputs["input_ids"] == box).sum() == 1  # Boxes are encoded as in training.


def test_answers_keep_only_box_marks(processor):
    ids = processor.tokenizer("<ref>tree</ref><box>[[1, 2, 3, 4]]</box></img><|im_end|><|endoftext|>").input_ids
    assert decode(processor, ids) == "<ref>tree</ref><box>[[1, 2, 3, 4]]</box>"


def test_closing_the_stream_ends_the_generation(vivid, processor, image):
    threads = threading.active_count()
    stream = stream_answer(vivid, processor, encode(processor, [image], QUESTION), max_new_tokens=100_000)
    next(stream)
    assert threading.active_count() == threads + 1
    start = time.perf_counter()
    stream.close()
    assert threading.active_count() == threads and time.perf_counter() - start < 10


def test_generation_error_is_raised_by_the_stream(vivid, processor, image, monkeypatch):
    def fail(**arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vivid, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_answer(vivid, processor, encode(processor, [image], QUESTION)))


def test_processor_input_spec_is_applied_once(processor, image):
    wanted = encode(processor, [image], QUESTION)["pixel_values"]
    processor.image_processor.input_spec = {"window": [0, 100]}
    assert encode(processor, [image], QUESTION)["pixel_values"].equal(wanted)


def test_long_prompt_raises(model, processor, image):
    inputs = encode(processor, [image], QUESTION)
    model.config.text_config.max_position_embeddings = inputs["input_ids"].shape[1] + 10
    check_length(model, inputs, 10)
    with pytest.raises(ValueError, match="limit of"):
        check_length(model, inputs, 11)


def test_image_tokens_are_never_answered(vivid, processor, image):
    """An image token in an answer would be read as an image in the next turn."""
    inputs = encode(processor, [image], QUESTION)
    features = visual_features(vivid, inputs["pixel_values"])
    image_token = vivid.config.image_token_id
    with torch.no_grad():
        vivid.lm_head.weight[image_token] = 5 * vivid.lm_head.weight[greedy_answer(vivid, inputs, features, 1)[0]]
    raw = vivid.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
    assert raw == image_token
    answer = greedy_answer(vivid, inputs, features, 4)
    assert image_token not in answer.tolist()
    assert answer_log_probs(vivid, inputs, features, answer)[1].tolist() == answer.tolist()


@pytest.mark.parametrize("size", [(200, 100), (1, 60)])
def test_box_outlines_its_pixels(size):
    width, height = size
    box = GridBox(250, 500, 750, 1000)
    drawn = np.array(draw_boxes(Image.new("RGB", size, "#000080"), [box]))
    left, top, right, bottom = width // 4, height // 2, max(3 * width // 4, width // 4 + 1), height
    colored = (drawn == ImageColor.getrgb(COLORS[0])).all(-1)
    assert colored[bottom - 1, left:right].all() and colored[top:bottom, left].all()
    assert colored[top:bottom, right - 1].all() and colored[top, left:right].all()
    assert not colored[:, right:].any() or width < 100  # A label without room may extend to the right.
    if width > 100:
        assert (drawn[top + 4 : bottom - 4, left + 4 : right - 4] == (0, 0, 128)).all()
