"""The schemas that rows come in, and which columns tell each.

This is the one place that knows them, for data sets, sources of mixtures, their validation and the trainer.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .turns import answering, completing, conversing, listed


@dataclass(frozen=True)
class Schema:
    """Args:
    name: as it is printed.
    columns: that a data set needs for it. Of two that fit, one that needs all that the other needs is meant.
    turns: of the conversation, from a row that has these columns.
    """

    name: str
    columns: tuple[str, ...]
    turns: Callable[[dict[str, Any]], list[dict]]


SCHEMAS = (
    Schema("messages", ("messages",), listed),
    Schema("prompts and completions", ("prompt", "completion"), completing),
    Schema("ShareGPT conversations", ("conversations",), conversing),
    Schema("LLaVA conversations", ("conversations", "image"), conversing),
    Schema("InternVL conversations", ("conversations", "image", "width", "height"), conversing),
    Schema("questions and answers", ("question", "answer"), answering),
)
SPOKEN = {"messages", "prompt", "completion", "conversations", "question", "answer"}
BESIDE = ("system", "video", "videos")  # what is read of a row beside its turns
IMAGES = ("images", "image")  # of a row that has both columns, those of the one that is not empty
NEEDED = "; ".join(f"{schema.name} need {', '.join(schema.columns)}" for schema in SCHEMAS)
RENAME = "Rename or leave out columns, or give the data as a source of a mixture, with `columns`."


def recognise(
    names: Iterable[str], mapped: Mapping[str, str] | None = None, prompt: str | None = None, remedy: str = RENAME
) -> tuple[Schema, dict[str, str]]:
    """The schema of rows with columns of these names, and which column is what in it.

    Args:
        mapped: what a user says of columns with other names.
        prompt: the question of rows that have an answer alone.
        remedy: what to do if it cannot be told.

    Raises:
        ValueError: lists the columns and what each schema needs, if none fits, or several do.
    """
    names, mapped = list(names), mapped or {}
    there = {*names, *mapped, *(["question"] if prompt is not None else [])}
    said = SPOKEN & set(mapped)
    fitting = [schema for schema in SCHEMAS if set(schema.columns) <= there and said <= set(schema.columns)]
    fitting = [one for one in fitting if not any(set(one.columns) < set(other.columns) for other in fitting)]
    if len(fitting) != 1:
        kinds = " and ".join(schema.name for schema in fitting)
        what = f"are those of {kinds} at once" if fitting else "make no conversation"
        raise ValueError(f"the columns {names} {what}. {remedy} {NEEDED}.")
    roles = (*fitting[0].columns, *BESIDE)
    columns = {role: role for role in roles if role in names and role not in ("image", "width", "height")} | {
        role: column for role, column in mapped.items() if role in (*roles, "id", "images")
    }
    images = {} if "images" in columns else dict(zip(IMAGES, [name for name in IMAGES if name in names]))
    return fitting[0], {**images, **columns}
