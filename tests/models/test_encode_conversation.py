"""`encode_conversation` against `apply_chat_template` of the same processor."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import picture
from tiny_models import TOKENS_PER_TILE
from tokenizers.processors import TemplateProcessing

from modeling_vitp import ViTPDataCollator, ViTPImageProcessor, ViTPProcessor
from modeling_vitp.processing_vitp import CHAT_TEMPLATE

SIZE = {"height": 28, "width": 28}
TEXTS = st.text("ab é猫\n<|im_end|>", min_size=1, max_size=12).filter(str.strip)
QUESTION = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "4 trees"}
PICTURE = {"type": "image", "image": picture(60, 40, 0)}


@pytest.fixture(scope="module")
def processor(tokenizer):
    return ViTPProcessor(ViTPImageProcessor(size=SIZE, max_patches=6), tokenizer, image_seq_length=TOKENS_PER_TILE)


@st.composite
def conversations(draw):
    """One to four turns with up to three images anywhere in the questions, which are texts or parts."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 120), st.integers(1, 120)), max_size=3))
    questions = [[{"type": "text", "text": draw(TEXTS)}] for _ in range(draw(st.integers(1, 4)))]
    for seed, size in enumerate(sizes):
        image = picture(*size, seed).convert(draw(st.sampled_from(["RGB"] * 3 + ["L", "RGBA"])))
        question = draw(st.sampled_from(questions))
        question.insert(draw(st.integers(0, len(question))), {"type": "image", "image": image})
    messages = []
    for question in questions:
        answer = draw(TEXTS)
        answer = answer if draw(st.booleans()) else [{"type": "text", "text": answer}]
        if len(question) == 1 and draw(st.booleans()):
            question = question[0]["text"]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def check(processor, messages, ratio=0.5, prob=1.0, images_kwargs=None):
    """Of errors only that there is one both ways: one names the conversation of a batch."""
    key, images_kwargs = (3, "a row", 1), images_kwargs or {}
    options = {"vrl_drop_ratio": ratio, "vrl_apply_prob": prob, "vrl_keys": [key], "add_special_tokens": False}
    try:
        expected = processor.apply_chat_template(
            [messages],
            tokenize=True,
            return_dict=True,
            return_tensors=None,
            return_assistant_tokens_mask=True,
            processor_kwargs=options | images_kwargs,
        )
    except ValueError:
        with pytest.raises(ValueError):
            processor.encode_conversation(messages, images_kwargs, ratio, prob, key)
        return None
    found = processor.encode_conversation(messages, images_kwargs, ratio, prob, key)
    assert found["input_ids"].tolist() == expected["input_ids"][0]
    assert (found["answers"] > 0).tolist() == list(map(bool, expected["assistant_masks"][0]))
    assert (ratio > 0) is ("position_ids" in found) is ("position_ids" in expected)
    assert ratio == 0 or found["position_ids"].tolist() == expected["position_ids"][0]
    assert ("pixel_values" in found) is ("pixel_values" in expected)
    if "pixel_values" in found:
        assert torch.equal(torch.stack(found["pixel_values"]), expected["pixel_values"])
        assert ratio == 0 or torch.equal(found["visual_token_indices"], expected["visual_token_indices"])
    return found


@given(
    messages=conversations(),
    ratio=st.sampled_from([0, 0.3, 0.75, 0.99]),
    images_kwargs=st.sampled_from([{}, {"max_patches": 2}, {"input_spec": {"window": [0, 100]}}]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_conversation_is_the_one_of_the_chat_template(processor, messages, ratio, images_kwargs):
    found = check(processor, messages, ratio, 0.8, images_kwargs)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    for number, content in enumerate(answers, start=1):
        text = content if isinstance(content, str) else content[0]["text"]
        said = processor.tokenizer.decode(found["input_ids"][found["answers"] == number])
        assert said == f"{text}<|im_end|>"


@pytest.mark.parametrize(
    "messages",
    [
        [QUESTION, ANSWER | {"tool_calls": [{"name": "count"}]}],
        [{"role": "user", "content": [PICTURE]}, {"role": "tool", "content": "<img>"}, ANSWER],
        [QUESTION | {"content": "<IMG_CONTEXT>"}, ANSWER],
        [QUESTION | {"content": "</img>"}, ANSWER],
    ],
)
def test_conversation_that_cannot_be_encoded_is_an_error(processor, messages):
    assert check(processor, messages) is None


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
        "{{ bos_token }}" + CHAT_TEMPLATE,
        CHAT_TEMPLATE.replace("<IMG_CONTEXT>\\n", "Image: <IMG_CONTEXT>."),
        CHAT_TEMPLATE + "</img>",
        CHAT_TEMPLATE + "<IMG_CONTEXT>",
    ],
)
def test_other_chat_templates(processor, template):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    other = ViTPProcessor(processor.image_processor, tokenizer, TOKENS_PER_TILE, chat_template=template)
    for content in ([PICTURE, {"type": "text", "text": "How many?"}], "How many?"):
        check(other, [{"role": "user", "content": content}, ANSWER])


def test_what_a_tokenizer_adds_by_itself_is_left_out(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    end = ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{end[0]} $A {end[0]}", None, [end])
    adds = ViTPProcessor(processor.image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)
    messages = [{"role": "user", "content": [PICTURE]}, ANSWER]
    check(adds, messages)
    # Somebody else's call has set the tokenizer to cut and to pad.
    adds.tokenizer("a", truncation=True, max_length=3, padding="max_length")
    check(adds, messages)


def test_tokenizer_that_cuts_by_itself_does_not_cut_for_training(processor):
    cuts = copy.deepcopy(processor)
    cuts.tokenizer.init_kwargs |= {"truncation": True, "max_length": 12}
    row = {"id": 1, "images": [PICTURE["image"]], "messages": [QUESTION, ANSWER]}
    found, expected = (ViTPDataCollator(one, vrl_drop_ratio=0.5).encode(row) for one in (cuts, processor))
    assert torch.equal(found["input_ids"], expected["input_ids"])
