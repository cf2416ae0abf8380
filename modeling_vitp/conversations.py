"""Conversations: chat messages, their checks, and the tokens of their answers."""

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

IMAGE_TOKEN = "<IMG_CONTEXT>"
IMAGE_START_TOKEN = "<img>"
IMAGE_END_TOKEN = "</img>"
IMAGE_TOKENS = (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN)
ROLES = ("system", "user", "assistant", "tool")
GIVEN = "given"  # type of a part of an answer that is not learned, such as text of the prompt

# ChatML, as in InternVL2.5 and Qwen2.5. The loss is computed on the text between the generation markers: the answers
# and their end-of-turn tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def plain_messages(conversation: Any) -> Any:
    """Convert messages to dictionaries without empty fields, as newer transformers does."""
    messages = getattr(conversation, "messages", conversation)
    if not isinstance(messages, (list, tuple)):
        return messages
    return [plain_message(message) for message in messages]


def plain_message(message: Any) -> Any:
    """Convert a message or a part of one to a dictionary without empty fields."""
    if hasattr(message, "model_dump"):  # pydantic
        message = message.model_dump()
    elif dataclasses.is_dataclass(message):
        message = dataclasses.asdict(message)
    if not isinstance(message, Mapping):
        return message
    return {name: value for name, value in message.items() if value is not None}


def check_messages(messages: list[dict], allow_image_tokens: bool = False) -> None:
    """Raise a `ValueError` that names the message if a role is unknown or a text has a literal image token."""
    if not messages:
        raise ValueError("expected messages, got an empty list.")
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(
                f"message {index} has the role {role!r}. Expected a dictionary with a `content` and with one of the "
                f"roles {', '.join(ROLES)}."
            )
        check_content(message, index)
        if allow_image_tokens:
            continue
        for token in IMAGE_TOKENS:
            if any(token in text for text in message_texts(message)):
                raise ValueError(
                    f"message {index} has the literal image token {token!r}. Remove it, and mark the position of an "
                    "image with {'type': 'image'}."
                )


def check_content(message: dict, index: int) -> None:
    """Raise a `ValueError` unless the content is a string or a list of text and image parts."""
    content = message.get("content")
    if isinstance(content, str) or (content is None and message["role"] == "assistant"):
        return
    wrong_parts = [content]
    if isinstance(content, (list, tuple)):
        wrong_parts = [part for part in content if not is_part(part)]
    if wrong_parts:
        raise ValueError(
            f"message {index} has the content {wrong_parts[0]!r}. Expected a string, or a list of parts "
            "{'type': 'text', 'text': …} and {'type': 'image'}."
        )


def is_part(part: Any) -> bool:
    """Return whether a part of a message is an image or a text."""
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    if kind in ("text", GIVEN):
        return isinstance(part.get("text"), str)
    return kind in ("image", "image_url")


def message_texts(message: dict) -> list[str]:
    """Return the texts of a message whose content is a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part.get("text") is not None]


def check_tool_calls(messages: list[dict], template: str) -> None:
    """Raise a `ValueError` if a message has tool calls that the chat template does not render."""
    if "tool_calls" in template:
        return
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            raise ValueError(
                f"message {index} has tool_calls, which the chat template does not render. Write them into its "
                "content, or set a chat_template that renders them."
            )


def message_images(messages: list[dict[str, Any]]) -> list:
    """Return the images of all messages, in order."""
    images = []
    for message in messages:
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        for part in content:
            if isinstance(part, dict) and part["type"] == "image":
                images.append(part["image"])
    return images


def number_answers(
    text: str,
    spans: list[tuple[int, int]],
    starts: np.ndarray,
    ends: np.ndarray,
) -> np.ndarray:
    """Return the number of each token's answer, from 1, or 0 outside of answers.

    Args:
        text: conversation without image start and end tokens.
        spans: first and last position of each answer in `text`.
        starts, ends: first and last position of each token in the text with image start and end tokens.
    """
    image_ends = [match.end() for match in re.finditer(IMAGE_TOKEN, text)]
    added_by_image = len(IMAGE_START_TOKEN) + len(IMAGE_END_TOKEN)
    answers = np.zeros_like(starts)
    # The tokens of an answer are searched between these, because a conversation may have thousands of answers.
    latest_ends = np.maximum.accumulate(ends)
    earliest_starts = np.minimum.accumulate(starts[::-1])[::-1]
    for number, (start, end) in enumerate(spans, start=1):
        start += added_by_image * bisect_right(image_ends, start)
        end += added_by_image * bisect_right(image_ends, end)
        first = latest_ends.searchsorted(start, "right")
        last = earliest_starts.searchsorted(end)
        is_in_answer = (starts[first:last] < end) & (ends[first:last] > start)
        answers[first:last][is_in_answer] = number
    return answers


class ChatProcessor(ProcessorMixin):
    """Processor that checks messages before its chat template renders them."""

    def check_template(self) -> None:
        """Raise a `ValueError` that names the line if the chat template is not valid."""
        try:
            render_jinja_template([[]], chat_template=self.template())
        except TemplateSyntaxError as error:
            raise ValueError(f"chat_template, line {error.lineno}: {error.message}.") from error
        except Exception:  # The template expects messages.
            pass

    def template(self, name: str | None = None) -> str:
        """Return the chat template of a name, the argument itself if it is a template, or the default template."""
        templates = self.chat_template
        if not isinstance(templates, dict):
            templates = {"default": templates}
        return templates.get(name or "default", name)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        **kwargs,
    ):
        """Render chat messages and, with `tokenize=True`, encode them.

        See [`~transformers.ProcessorMixin.apply_chat_template`]. VRL options go into `processor_kwargs`, in which
        `add_special_tokens` defaults to `False`, as in training: the template has all special tokens. Messages are
        dictionaries, or dataclasses or pydantic models with the same fields.

        Raises:
            ValueError: if a conversation is empty, a role is unknown, a text has a literal image token, or a message
                has tool calls that the chat template does not render (the default template does not).
        """
        if not conversation:
            raise ValueError("Conversation 0: expected messages, got an empty list.")
        is_batch = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        conversations = conversation if is_batch else [conversation]
        conversations = [plain_messages(messages) for messages in conversations]
        template = self.template(chat_template)
        if kwargs.get("tokenize"):
            options = kwargs.get("processor_kwargs") or {}
            if "add_special_tokens" not in options.get("text_kwargs", {}):
                options = {"add_special_tokens": False, **options}
            kwargs["processor_kwargs"] = options
        allow_image_tokens = bool(kwargs.get("sanitize_control_tokens"))
        for row, messages in enumerate(conversations):
            try:
                check_messages(messages, allow_image_tokens)
                check_tool_calls(messages, template)
            except ValueError as error:
                raise ValueError(f"Conversation {row}: {error}") from error
        plain_conversation = conversations if is_batch else conversations[0]
        try:
            return super().apply_chat_template(plain_conversation, chat_template, **kwargs)
        except TemplateError as error:
            raise self.not_rendered(error) from error

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and first and last position of each answer in it."""
        template = self.template()
        check_tool_calls(messages, template)
        try:
            (text,), (spans,) = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise self.not_rendered(error) from error
        return text, spans

    def not_rendered(self, error: TemplateError) -> ValueError:
        name = self.tokenizer.name_or_path
        return ValueError(f"The chat_template of {name} cannot render the messages: {error}")
