"""The conversation of a row, whichever schema has it, as messages of parts."""

from typing import Any

from ..messages import GIVEN, split_at_places
from .rows import Written, check_image_part, check_text

ROLE_OF = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def as_list(turns: Any) -> Any:
    """Turns as a list, where a sequence of structures is stored by column."""
    return [dict(zip(turns, values)) for values in zip(*turns.values())] if isinstance(turns, dict) else turns


def listed(row: dict) -> list[dict]:
    return as_list(row["messages"])


def completing(row: dict) -> list[dict]:
    """Texts are a question and its answer. As for TRL, no answer in a prompt is learned."""
    parts = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        turns = row[name]
        turns = [{"role": role, "content": turns}] if isinstance(turns, str) else as_list(turns)
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"the {name} is {str(turns)[:80]!r}, neither a text nor a list of turns.")
        parts.append(turns)
    prompt, completion = parts
    return [*({**turn, GIVEN: True} if isinstance(turn, dict) else turn for turn in prompt), *completion]


def conversing(row: dict) -> list[dict]:
    return as_list(row["conversations"])


def answering(row: dict) -> list[dict]:
    answer = row["answer"]
    question, answer = as_text(row["question"], "question"), "" if answer is None else as_text(answer, "answer")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def as_text(value: str | int, role: str) -> str:
    """A question or an answer as text; a `ValueError` if it was stored as what does not keep its spelling."""
    if isinstance(value, (int, Written)):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"the {role} is {str(value)[:80]!r}, stored as a {type(value).__name__}, so that how it was written is "
            "lost (3 may have become 3.0, a date have got a time). Store it as text."
        )
    return value


def after_system(system: Any, turns: list[dict]) -> list[dict]:
    """Turns with what a row says as `system` before them; a `ValueError` if they begin with another system turn."""
    if not system or not isinstance(turns, list):
        return turns
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if first.get("role", first.get("from")) != "system":
        return [{"role": "system", "content": system}, *turns]
    said = first.get("content", first.get("value"))
    if said not in (system, [{"type": "text", "text": system}]):
        raise ValueError(f"its `system` is {str(system)[:80]!r}, but its first turn {str(said)[:80]!r}: leave one out.")
    return turns


def messages_of(turns: list[dict], num_images: int) -> list[dict]:
    """Turns of any of the usual shapes to messages of parts, `<image>` in a question to a place of an image.

    Images without a place go before the first question. Boxes and all other text stay as they are. The parts of an
    answer that is `given`, and not to be learned, are of that type.

    Raises:
        ValueError: if a role is unknown, or the number of places is not the number of images.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"the messages are {str(turns)[:80]!r}, not a list of turns.")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"message {index} is {str(turn)[:80]!r}, but a role and a content are needed.")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLE_OF:
            raise ValueError(f"message {index} has the role {role!r}; known are {', '.join(ROLE_OF)}.")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            parts = [part_of(part, index) for part in content]
        else:
            content = check_text(content, f"the content of message {index}")
            is_answer = ROLE_OF[role] == "assistant"
            parts = [{"type": "text", "text": content}] if is_answer else split_at_places(content)
        if turn.get(GIVEN) and ROLE_OF[role] == "assistant":
            parts = [{**part, "type": GIVEN} for part in parts]
        messages.append({"role": ROLE_OF[role], "content": parts})
    num_places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_places == 0 and num_images:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError("there is no question that its images could go before.")
        first["content"] = [{"type": "image", "text": None} for _ in range(num_images)] + first["content"]
    elif num_places != num_images:
        raise ValueError(f"it has {num_images} image(s), but {num_places} image place(s) in its messages.")
    return messages


def part_of(part: Any, index: int) -> dict:
    """A part of message `index`: a text, or the place of an image."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": check_text(part.get("text"), f"a text in message {index}")}
    if kind not in ("image", "image_url"):
        raise ValueError(
            f"message {index} has the part {str(part)[:80]!r}, but {{'type': 'text', 'text': …}} or "
            "{'type': 'image'} is needed."
        )
    check_image_part(part, index)
    return {"type": "image", "text": None}
