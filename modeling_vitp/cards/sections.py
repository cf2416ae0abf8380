"""Sections, metadata and tables of README cards that are written by programs."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

TOKENIZER_OPTIONS = ("--eos_token", "--pad_token")  # which name no token of the Hub


def set_section(path: Path, title: str, text: str) -> None:
    """Write a section `## title` to a card, in place of an existing one or at the end."""
    card = path.read_text() if path.exists() else ""
    card = with_section(card, title, text)
    path.write_text(card)


def with_section(card: str, title: str, text: str) -> str:
    """Return the text of a card with a section `## title`, in place of an existing one or at the end."""
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = section_pattern(title)
    if not pattern.search(card):
        return f"{card.rstrip()}\n\n{section}".lstrip()

    def section_at(match: re.Match[str]) -> str:
        is_last = match.end() == len(card)
        return section if is_last else f"{section}\n"

    return pattern.sub(section_at, card)


def section_pattern(title: str) -> re.Pattern[str]:
    return re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def set_metadata(path: Path, title: str, text: str, **metadata) -> None:
    """Write the metadata, title and introduction of a card, and keep its sections."""
    existing_text = path.read_text() if path.exists() else ""
    sections = re.search(r"^## .*", existing_text, re.MULTILINE | re.DOTALL)
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
        line = " | ".join(cells)
        lines.append(f"| {line} |")
    return "\n".join(lines)


def without_folders(text: str) -> str:
    """Shorten the absolute paths in a text to their last part."""
    if re.match(r"~|/|[A-Za-z]:\\", text):
        parts = re.split(r"[/\\]", text.rstrip("/\\"))
        return parts[-1]
    return re.sub(r"(?<![\w./])(?:~|/(?!/)|[A-Za-z]:\\)[^\s\"',:=]*[/\\]([^/\\\s\"',:=]+)", r"\1", text)


def without_tokens(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line without options for tokens of the Hub and their values."""
    words = []
    is_value = False  # whether the word before is an option for a token
    for word in arguments:
        option, equals, _ = word.partition("=")
        is_option = option.startswith("-")
        is_token = is_option and option.endswith("token") and option not in TOKENIZER_OPTIONS
        if not is_value and not is_token:
            words.append(word)
        is_value = is_token and not equals
    return words


def portable_command(recipe: str, arguments: Sequence[str]) -> str:
    """Return a command line for a card: without tokens, and with absolute paths shortened to their last part."""
    words = ["vitp", recipe]
    for word in without_tokens(arguments):
        option = ""
        value = word
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            option = name + equals
        words.append(option + without_folders(value))
    return shlex.join(words)


def command_of(recipe: str, argv: Sequence[str] | None) -> str:
    """Return the command of a recipe for a card, with the arguments of this process if `argv` is `None`."""
    return portable_command(recipe, sys.argv[1:] if argv is None else argv)
