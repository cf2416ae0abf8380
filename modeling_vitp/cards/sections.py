"""Sections, metadata and tables of README cards that are written by programs."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData


def set_section(path: Path, title: str, text: str) -> None:
    """Write a section `## title` to a card, in place of an existing one or at the end."""
    path.write_text(with_section(path.read_text() if path.exists() else "", title, text))


def with_section(card: str, title: str, text: str) -> str:
    """Return the text of a card with a section `## title`, in place of an existing one or at the end."""
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = section_pattern(title)
    if pattern.search(card):
        return pattern.sub(lambda match: section + ("\n" if match.end() < len(card) else ""), card)
    return f"{card.rstrip()}\n\n{section}".lstrip()


def section_pattern(title: str) -> re.Pattern[str]:
    return re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def set_metadata(path: Path, title: str, text: str, **metadata) -> None:
    """Write the metadata, title and introduction of a card, and keep its sections."""
    sections = None
    if path.exists():
        sections = re.search(r"^## .*", path.read_text(), re.MULTILINE | re.DOTALL)
    fields = {key: value for key, value in metadata.items() if value is not None}
    header = DatasetCardData(**fields).to_yaml()
    card = DatasetCard(f"---\n{header}\n---\n\n# {title}\n\n{text.strip()}\n")
    content = f"{str(card).rstrip()}\n"
    if sections is not None:
        content += f"\n{sections.group()}"
    path.write_text(content)


def table(header: list[str], rows: list[list]) -> str:
    """Return a Markdown table with escaped bars in its cells."""
    lines = []
    for row in (header, ["---"] * len(header), *rows):
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def without_folders(text: str) -> str:
    """Shorten the absolute paths in a text to their last part."""
    if re.match(r"~|/|[A-Za-z]:\\", text):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return re.sub(r"(?<![\w./])(?:~|/(?!/)|[A-Za-z]:\\)[^\s\"',:=]*[/\\]([^/\\\s\"',:=]+)", r"\1", text)


def without_tokens(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line without options for tokens of the Hub and their values."""
    words = []
    is_value = False  # whether the word before is an option for a token
    for word in arguments:
        option = word.split("=")[0]
        is_token = option.startswith("-") and option.endswith("token") and option not in ("--eos_token", "--pad_token")
        if not is_value and not is_token:
            words.append(word)
        is_value = is_token and "=" not in word
    return words


def portable_command(recipe: str, arguments: Sequence[str]) -> str:
    """Return a command line for a card: without tokens, and with absolute paths shortened to their last part."""
    words = ["vitp", recipe]
    for word in without_tokens(arguments):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(option + equals + without_folders(value))
    return shlex.join(words)


def command_of(recipe: str, argv: Sequence[str] | None) -> str:
    """Return the command of a recipe for a card, with the arguments of this process if `argv` is `None`."""
    return portable_command(recipe, sys.argv[1:] if argv is None else argv)
