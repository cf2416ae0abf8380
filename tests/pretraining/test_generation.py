"""Generated answers to conversations in batches, and their pictures."""

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image as PILImage
from tiny_models import vivid_model

from modeling_vitp import ViTPDataCollator
from modeling_vitp.pretraining.generation import (
    MAX_NEW_TOKENS,
    answer_row,
    generate_answers,
)


@pytest.fixture(scope="module")
def vivid(tokenizer):
    return vivid_model(tokenizer)


def conversation(question: str, *images) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_batch_answers_equal_single_answers(vivid):
    asked = [
        conversation("How many trees are there?", picture(60, 56, 0)),
        conversation("Which?", picture(60, 56, 1), picture(112, 56, 2)),
        conversation("How many?"),
    ]
    together = generate_answers(*vivid, asked, max_new_tokens=8)
    assert together == [generate_answers(*vivid, [one], max_new_tokens=8)[0] for one in asked]
    assert len(set(together)) > 1 and all(together)


def test_answers_ignore_penalties_of_the_language_model(vivid, monkeypatch):
    asked = [conversation("How many trees are there?", picture(60, 56, 0))]
    plain = generate_answers(*vivid, asked, max_new_tokens=8)
    monkeypatch.setattr(vivid[0].generation_config, "repetition_penalty", 0.01)
    monkeypatch.setattr(vivid[0].generation_config, "num_beams", 2)
    assert generate_answers(*vivid, asked, max_new_tokens=8) == plain
    assert generate_answers(*vivid, asked, max_new_tokens=8, repetition_penalty=0.01) != plain


def test_samples_equal_num_return_sequences(vivid):
    """Answers are equal for the same seed. The shorter question is padded."""
    questions = ("Which?", "How many trees are there in the image?")
    asked = [conversation(question, picture(56, 56, seed)) for seed, question in enumerate(questions)]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4}
    torch.manual_seed(0)
    answers = generate_answers(*vivid, asked, samples=3, **options)
    torch.manual_seed(0)
    assert answers == generate_answers(*vivid, asked, num_return_sequences=3, **options)
    assert len(answers) == 6 and len(set(answers)) > 2


QUESTION, REFERENCE = "How many trees are there?", "There are 12 trees."


def row(image, answer=REFERENCE, question=QUESTION):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "none"}]
    return {"id": "a", "images": [] if image is None else [image], "messages": messages}


@pytest.fixture(scope="module")
def vivid_collator(vivid):
    model, processor = vivid
    return model, ViTPDataCollator(processor, vrl_drop_ratio=0.75).for_evaluation()


def test_turns_are_answered_greedily(vivid_collator):
    model, collator = vivid_collator
    image, answers = picture(112, 56, 3), []
    answered = answer_row(model, collator, row(image))
    first = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    for prompt in (first, [*first, *row(None)["messages"][1:3]]):
        text = collator.processor.apply_chat_template(prompt, add_generation_prompt=True)
        inputs = collator.processor(text=text, images=image, add_special_tokens=False, return_tensors="pt")
        ids, end = inputs["input_ids"], model.generation_config.eos_token_id
        start = ids.shape[1]
        for _ in range(MAX_NEW_TOKENS):
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] in (end if isinstance(end, list) else [end]):
                break
        answers.append(collator.processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    assert answered.answer == f"(1) {answers[0]} (2) {answers[1]}"
    assert (answered.question, answered.reference) == (f"(1) {QUESTION} (2) And?", f"(1) {REFERENCE} (2) none")
    assert answered.size == (56, 112)
    assert answer_row(model, collator, row(image, "7")).answer.startswith(f"(1) {answers[0]} (2) ")


def test_features_are_of_the_whole_image(vivid_collator):
    model, collator = vivid_collator
    image = PILImage.fromarray(np.tile(np.arange(0, 224, 2, dtype=np.uint8)[None, :, None], (56, 1, 3)))
    answered = answer_row(model, collator, row(image))
    pixels = collator.processor.image_processor(image, max_patches=1, return_tensors="pt")["pixel_values"]
    states = model.model.vision_tower(pixels).last_hidden_state
    assert pixels.shape == (1, 3, 56, 56) and answered.features.shape == (32, 4, 4)
    for place in range(16):
        assert torch.equal(answered.features[:, place // 4, place % 4], states[0, 1 + place])
    shown = np.asarray(image.resize((56, 56), PILImage.Resampling.BICUBIC)).astype(int)
    assert np.abs(answered.image - shown).max() <= 2
