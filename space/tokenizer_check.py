"""Check of a visitor's tokenizer, run as a program of its own.

    python tokenizer_check.py FOLDER

It prints what is wrong, or nothing. The tokenizer is foreign data for native code, which cannot be interrupted and ends
its process if memory runs out. [`checking.check_tokenizer`] runs this program and kills it at the time limit.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import limits

# Pre-tokenization patterns of GPT-2, Qwen2, Llama 3 and this package. Other patterns may backtrack without end.
SPLITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+",
)
TRIALS = ("a", " ", "é", "\ufdfa", "\U0001f333", "a é\n1.")  # U+FDFA becomes 18 characters in NFKD.


def mappings(value: Any) -> Iterator[dict]:
    """Yield every mapping in a JSON value, at any depth."""
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, list):
        items = value
    else:
        items = ()
    for item in items:
        yield from mappings(item)
    if isinstance(value, dict):
        yield value


def complaint(fields: dict[str, Any]) -> str | None:
    """Return what is wrong with the fields of a tokenizer.json."""
    model = fields["model"]
    if model.get("type", "BPE") != "BPE":
        return f"is of the type {str(model['type'])[:60]!r}, expected BPE"
    steps = {key: step for key, step in fields.items() if key not in ("model", "added_tokens")}
    num_characters = len(json.dumps(steps))
    if num_characters > limits.TOKENIZER_STEPS:
        return f"has steps of {num_characters:,} characters, expected at most {limits.TOKENIZER_STEPS:,}"
    added_tokens = fields.get("added_tokens") or []
    lists = {"vocabulary": model["vocab"], "merges": model["merges"], "added tokens": added_tokens}
    for name, entries in lists.items():
        if len(entries) > limits.TOKENS:
            return f"has {len(entries):,} {name}, expected at most {limits.TOKENS:,}"
        if any(len(str(entry)) > limits.STRING for entry in entries):
            return f"has {name} of more than {limits.STRING:,} characters"
    return complaint_about_steps(steps)


def complaint_about_steps(steps: dict[str, Any]) -> str | None:
    """Return what is wrong with the steps of a tokenizer other than its model, such as its normalizer."""
    for step in mappings(steps):
        if step.get("Regex", SPLITS[0]) not in SPLITS:
            return "splits text by an unknown regular expression"
        replaced_text = ""
        if step.get("type") == "Replace":
            replaced_text = str(step.get("pattern").get("String", ""))
        if len(str(step.get("content", ""))) > len(replaced_text):
            return "replaces text by longer text"
    first_steps = mappings([steps.get("normalizer"), steps.get("pre_tokenizer")])
    types = [step.get("type") for step in first_steps]
    if types.count("ByteLevel") > 1:
        return "has several byte-level steps, each of which may double the text"
    return None


def failed_trial(folder: Path) -> str | None:
    """Tokenize long questions and return what is wrong with the result."""
    from tokenizers import Tokenizer  # after the limit on the memory has been set

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TRIALS:
        text = (text * limits.QUESTION)[: limits.QUESTION]
        ids = tokenizer.encode(text).ids
        if len(ids) > limits.TOKENS_OF_QUESTION:
            return f"makes {len(ids):,} tokens of {len(text):,} characters"
        length = len(tokenizer.decode(ids, skip_special_tokens=False))
        if length > limits.STRING * max(len(ids), 1):
            return f"decodes {len(ids):,} tokens to {length:,} characters"
    return None


if __name__ == "__main__":
    import resource

    os.nice(10)  # Answers to other visitors go first.
    resource.setrlimit(resource.RLIMIT_AS, (limits.TOKENIZER_BYTES, limits.TOKENIZER_BYTES))
    path = Path(sys.argv[1])
    fields = json.loads((path / "tokenizer.json").read_text())
    print(complaint(fields) or failed_trial(path) or "")
