"""Conversations encoded by `apply_chat_template` and by `encode_conversation` are equal."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import picture
from tiny_models import TOKENS_PER_TILE
from tokenizers.processors import TemplateProcessing

from modeling_vitp import ViTPDataCollator, ViTPImageProcessor, ViTPProcessor
from modeling_vitp.conversations import CHAT_TEMPLATE
from modeling_vitp.vrl import draw_visible_tokens, keyed_generator

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
    """Draw one to four turns with up to three images anywhere in the questions, which are texts or parts."""
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
    """Compare both encodings. If one raises an error, the other has to raise one too, with any message."""
    key, images_kwargs = (3, "a row", 1), images_kwargs or {}
    options = {"vrl_drop_ratio": ratio, "vrl_apply_prob": prob, "vrl_keys": [key]}
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
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_conversation_equals_chat_template(processor, messages, ratio, images_kwargs):
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
def test_unencodable_conversation_is_an_error(processor, messages):
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
def test_other_chat_templates_are_encoded(processor, template):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    other = ViTPProcessor(processor.image_processor, tokenizer, TOKENS_PER_TILE, chat_template=template)
    for content in ([PICTURE, {"type": "text", "text": "How many?"}], "How many?"):
        check(other, [{"role": "user", "content": content}, ANSWER])


def test_added_special_tokens_are_left_out(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    end = ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{end[0]} $A {end[0]}", None, [end])
    adds = ViTPProcessor(processor.image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)
    messages = [{"role": "user", "content": [PICTURE]}, ANSWER]
    check(adds, messages)
    ids = adds.apply_chat_template([QUESTION], tokenize=True, processor_kwargs={"add_special_tokens": True})
    assert ids[0][0] == ids[0][-1] == end[1]
    # An earlier call may have switched on truncation and padding.
    adds.tokenizer("a", truncation=True, max_length=3, padding="max_length")
    check(adds, messages)


def test_truncation_of_tokenizer_is_ignored(processor):
    cuts = copy.deepcopy(processor)
    cuts.tokenizer.init_kwargs |= {"truncation": True, "max_length": 12}
    row = {"id": 1, "images": [PICTURE["image"]], "messages": [QUESTION, ANSWER]}
    found, expected = (ViTPDataCollator(one, vrl_drop_ratio=0.5).encode(row) for one in (cuts, processor))
    assert torch.equal(found["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<img>", "</img>"])
def test_literal_image_token_is_named(processor, token):
    text = f"what is {token}?"
    for content in (text, [{"type": "text", "text": text}]):
        conversations = [[QUESTION], [QUESTION, ANSWER, {"role": "user", "content": content}]]
        for tokenize in (False, True):
            with pytest.raises(ValueError, match=f"Conversation 1: message 2 .*{token}"):
                processor.apply_chat_template(conversations, tokenize=tokenize)


@pytest.mark.parametrize(
    "conversation, message",
    [
        ([[QUESTION], []], "Conversation 1"),
        ([QUESTION, {"role": "function", "content": "x"}], "message 1 .*'function'"),
        ([{"content": "x"}], "message 0 .*role"),
        (["How many?"], "(?i)message 0"),
        ([{"role": "user", "content": ["How many?"]}], "(?i)message 0"),
        ([{"role": "user", "content": 12}], "(?i)message 0"),
        ([QUESTION, {"role": "assistant", "tool_calls": [{"type": "function"}]}], "message 1 has tool_calls"),
        ([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "x"}]}], "(?i)message 0 .*video"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "(?i)message 0"),
    ],
)
def test_unrenderable_conversation_is_named(processor, conversation, message):
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(conversation, tokenize=tokenize)


def test_tool_answers_have_a_role(processor):
    rendered = processor.apply_chat_template([QUESTION, {"role": "tool", "content": "12"}], add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n")
    call = "{% for call in m.tool_calls or [] %}:{{ call.function.name }}{% endfor %}"
    template = "{% for m in messages %}{{ m.role }}" + call + "{% endfor %}"
    calls = [QUESTION, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "count"}}]}]
    assert processor.apply_chat_template(calls, chat_template=template) == "userassistant:count"


@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_dropped_patches_leave_a_part_of_the_conversation(processor, ratio):
    """The tokens and positions are those of the whole conversation without the image tokens that are not kept."""
    images = [{"type": "image", "image": picture(*size)} for size in ((60, 40), (28, 28))]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": "How many?"}]}, ANSWER]
    key = (3, "a row", 1)
    whole = processor.encode_conversation(messages)
    found = processor.encode_conversation(messages, vrl_drop_ratio=ratio, vrl_key=key, patch_drop_ratio=0.5)
    num_tiles = len(whole["pixel_values"])
    visible = found["visible_token_indices"]
    assert visible.shape == (num_tiles, TOKENS_PER_TILE // 2)
    expected = draw_visible_tokens(num_tiles, TOKENS_PER_TILE, 0.5, keyed_generator(*key, "patches"))
    assert torch.equal(visible, expected)
    kept = found["visual_token_indices"].tolist()
    visible_in_sample = [
        TOKENS_PER_TILE * tile + token for tile, tokens in enumerate(visible.tolist()) for token in tokens
    ]
    assert set(kept) <= set(visible_in_sample)
    assert len(kept) == num_tiles * TOKENS_PER_TILE // (4 if ratio else 2)
    is_image = whole["input_ids"] == processor.image_token_id
    image_number = is_image.cumsum() - 1
    is_kept = ~is_image | np.isin(image_number, kept)
    assert found["input_ids"].tolist() == whole["input_ids"][is_kept].tolist()
    assert found["answers"].tolist() == whole["answers"][is_kept].tolist()
    assert found["position_ids"].tolist() == np.flatnonzero(is_kept).tolist()
    assert all(map(torch.equal, found["pixel_values"], whole["pixel_values"]))


def test_dropped_patches_need_an_image(processor):
    found = processor.encode_conversation([QUESTION, ANSWER], patch_drop_ratio=0.5, vrl_key=(1,))
    assert found["position_ids"].tolist() == list(range(len(found["input_ids"])))
    assert not {"pixel_values", "visible_token_indices", "visual_token_indices"} & found.keys()
