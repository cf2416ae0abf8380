"""Answers to conversations, several at a time."""

import pytest
import torch
from pictures import picture
from tiny_models import vivid_model

from modeling_vitp.training.generation import generate_answers


@pytest.fixture(scope="module")
def vivid(tokenizer):
    return vivid_model(tokenizer)


def conversation(question: str, *images) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_a_batch_is_answered_as_each_conversation_alone_whatever_the_number_of_images(vivid):
    asked = [
        conversation("How many trees are there?", picture(60, 56, 0)),
        conversation("Which?", picture(60, 56, 1), picture(112, 56, 2)),
        conversation("How many?"),
    ]
    together = generate_answers(*vivid, asked, max_new_tokens=8)
    assert together == [generate_answers(*vivid, [one], max_new_tokens=8)[0] for one in asked]
    assert len(set(together)) > 1 and all(together)


@pytest.mark.parametrize(
    "questions", [("How many?", "How many?"), ("Which?", "How many trees are there in the image?")]
)
def test_samples_are_those_of_prompts_that_are_read_for_each(vivid, questions):
    """By the same seed; the shorter question of two is padded."""
    asked = [conversation(question, picture(56, 56, seed)) for seed, question in enumerate(questions)]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4}
    torch.manual_seed(0)
    answers = generate_answers(*vivid, asked, samples=3, **options)
    torch.manual_seed(0)
    assert answers == generate_answers(*vivid, asked, num_return_sequences=3, **options)
    assert len(answers) == 6 and len(set(answers)) > 2
