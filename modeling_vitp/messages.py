"""Chat messages: roles, image tokens, the places of images, and what makes a conversation usable."""

from typing import Any

IMAGE_PLACE = "<image>"
GIVEN = "given"  # the type of a part of an answer that is not learned, as those in a prompt


def place_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with each `<image>` in the text of a question, as many public data sets have it, as an image place;
    and with what is given as text.
    """
    placed = []
    for message in messages:
        content = message["content"]
        if message["role"] != "assistant" and isinstance(content, str) and IMAGE_PLACE in content:
            message = {**message, "content": split_at_places(content)}
        elif is_given(message):
            message = {**message, "content": [{**part, "type": "text"} for part in content]}
        placed.append(message)
    return placed


def is_given(message: dict[str, Any]) -> bool:
    """Whether a message is an answer that is not learned."""
    content = message.get("content")
    parts = content if message["role"] == "assistant" and isinstance(content, list) else []
    return any(isinstance(part, dict) and part.get("type") == GIVEN for part in parts)


def split_at_places(text: str) -> list[dict[str, Any]]:
    """Text to parts, `<image>` to an image place. The newline after a place goes: the chat template writes one."""
    first, *rest = text.split(IMAGE_PLACE)
    parts = [{"type": "text", "text": first}] if first or not rest else []
    for piece in rest:
        parts.append({"type": "image", "text": None})
        piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def check_answers(messages: list[dict[str, Any]]) -> None:
    """Raises a `ValueError` if there is nothing to learn from, or an answer is empty or comes before any question."""
    answers = [(index, message) for index, message in enumerate(messages) if message["role"] == "assistant"]
    if all(is_given(message) for _, message in answers):
        raise ValueError("there is no assistant message to learn from. Add one or take the row out.")
    asked = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))
    for index, message in answers:
        if index < asked:
            raise ValueError(
                f"the answer in message {index} comes before any question, and sees neither it nor an image. Bring the "
                "messages into their order, or take the row out."
            )
        if not "".join(message_texts(message)).strip():
            raise ValueError(f"the answer in message {index} is empty. Fill it in or take the row out.")


IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<IMG_CONTEXT>", "<img>", "</img>"
ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: list[dict], allow_image_tokens: bool = False) -> None:
    """Raises a `ValueError` that names the message if a role is unknown or a text holds an image token literally."""
    if not messages:
        raise ValueError("there are no messages.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} is {message!r}, but {{'role', 'content'}} is needed.")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {index} has the role {message.get('role')!r}; known are {', '.join(ROLES)}.")
        check_content(message, index)
        for text in message_texts(message):
            token = next((t for t in (IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN) if t in text), None)
            if token is not None and not allow_image_tokens:
                raise ValueError(
                    f"message {index} holds the image token {token!r} literally. Take it out of the text and mark the "
                    "place of an image with {'type': 'image'}."
                )


def check_content(message: dict, index: int) -> None:
    """Raises a `ValueError` unless the content is a string or a list of text and image parts."""
    content = message.get("content")
    if isinstance(content, str) or (content is None and message["role"] == "assistant"):
        return
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"message {index} has the content {content!r}; a string or a list of parts is needed.")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "text", "image_url", GIVEN) or (
            kind in ("text", GIVEN) and not isinstance(part.get("text"), str)
        ):
            raise ValueError(
                f"message {index} has the part {part!r}, but {{'type': 'text', 'text': …}} or {{'type': 'image'}} is "
                "needed."
            )


def message_texts(message: dict) -> list[str]:
    """The texts of a message whose content is a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if part.get("text") is not None]
