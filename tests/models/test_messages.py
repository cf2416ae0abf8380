"""What makes a conversation unusable is named."""

from dataclasses import dataclass
from typing import Any

import pytest

from modeling_vitp.instructions.rows import check_answers

IMAGE_TOKENS = ["<IMG_CONTEXT>", "<img>", "</img>"]
USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "There are 12."}


@pytest.mark.parametrize("token", IMAGE_TOKENS)
@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize("as_part", [False, True])
def test_a_literal_image_token_in_a_message_is_refused(processor, token, tokenize, as_part):
    text = f"what is {token}?"
    bad = {"role": "user", "content": [{"type": "text", "text": text}] if as_part else text}
    with pytest.raises(ValueError, match=rf"Conversation 1: message 2 .*{token}.*literally.*'type': 'image'"):
        processor.apply_chat_template([[USER], [USER, ANSWER, bad]], tokenize=tokenize)


@pytest.mark.parametrize(
    "conversation, message",
    [
        ([], r"no messages"),
        ([[USER], []], r"Conversation 1: .*no messages"),
        ([USER, {"role": "function", "content": "x"}], r"message 1 .*'function'.*system, user, assistant"),
        ([{"content": "x"}], r"message 0 .*role.*system, user, assistant"),
        ([{"from": "human", "value": "x"}], r"message 0 .*role.*system, user, assistant"),
        (["How many?"], r"(?i)message 0"),
        ([{"role": "user", "content": ["How many?"]}], r"(?i)message 0"),
        ([{"role": "user", "content": 12}], r"(?i)message 0"),
        ([USER, {"role": "assistant", "tool_calls": [{"type": "function"}]}], r"message 1 has tool_calls"),
        ([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "x"}]}], r"(?i)message 0 .*video"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], r"(?i)message 0"),
    ],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_conversations_that_cannot_be_rendered_are_refused(processor, conversation, message, tokenize):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, tokenize=tokenize)


@dataclass
class Message:
    role: str
    content: Any
    tool_calls: list | None = None


@dataclass
class Part:
    type: str
    text: str | None = None


@pytest.mark.parametrize("batched", [False, True])
def test_messages_that_are_objects_are_those_that_are_dictionaries(processor, batched):
    """As other libraries give them; `content` must not be taken for a batch."""
    objects = [Message("user", [Part("image"), {"type": "text", "text": "How many?"}]), Message("assistant", "12")]
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    rows = [{"role": "user", "content": parts}, {"role": "assistant", "content": "12"}]
    found, wanted = (processor.apply_chat_template([each] if batched else each) for each in (objects, rows))
    assert found == wanted
    assert "<IMG_CONTEXT>\nHow many?" in (found[0] if batched else found)
    with pytest.raises(ValueError, match="Conversation 0: message 0 .*'robot'"):
        processor.apply_chat_template([Message("robot", "x")])


def test_answers_of_tools_are_messages_with_a_role_of_their_own(processor):
    rendered = processor.apply_chat_template([USER, {"role": "tool", "content": "12"}], add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n")
    call = "{% for call in m.tool_calls or [] %}:{{ call.function.name }}{% endfor %}"
    template = "{% for m in messages %}{{ m.role }}" + call + "{% endfor %}"
    calls = [USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "count"}}]}]
    assert processor.apply_chat_template(calls, chat_template=template) == "userassistant:count"


def test_an_answer_before_any_question_is_refused():
    """It would see neither the question nor the image."""
    check_answers([{"role": "system", "content": "Be brief."}, USER, ANSWER])
    with pytest.raises(ValueError, match="the answer in message 0 comes before any question"):
        check_answers([ANSWER, USER])
