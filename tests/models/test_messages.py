"""What makes a conversation unusable is named."""

import pytest

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
        ([USER, {"role": "tool", "content": "x"}], r"message 1 .*'tool'.*system, user, assistant"),
        ([{"content": "x"}], r"message 0 .*role.*system, user, assistant"),
        ([{"from": "human", "value": "x"}], r"message 0 .*role.*system, user, assistant"),
        (["How many?"], r"(?i)message 0"),
        ([{"role": "user", "content": ["How many?"]}], r"(?i)message 0"),
        ([{"role": "user", "content": 12}], r"(?i)message 0"),
        ([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "x"}]}], r"(?i)message 0 .*video"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], r"(?i)message 0"),
    ],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_conversations_that_cannot_be_rendered_are_refused(processor, conversation, message, tokenize):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, tokenize=tokenize)
