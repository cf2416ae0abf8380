"""The check of a mixture's sources for answers that are guessed from their own beginning, measured by `leak.py`."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..cards.sections import table
from ..messages import message_texts
from ..vrl import keyed_generator
from .leak import LITTLE, Leak, Text, encode, measure_leak, tokenizer_of
from .mixture_file import Source
from .sources import all_rows, read_source
from .validation import SourceReport

MAX_ROWS, MIN_ROWS = 2000, 50
MUCH = 0.1  # share of the bits from which on it is said that much is guessed


def texts_of(source: Source, seed: int) -> Iterator[list[Text]]:
    """The texts of at most `MAX_ROWS` rows without errors: random ones, or of a stream the first."""
    rows = read_source(source)
    if isinstance(rows, Dataset):
        generator = keyed_generator(seed, source.name, "leak")
        rows = rows.select(torch.randperm(len(rows), generator=generator)[:MAX_ROWS].tolist())
    else:
        rows = itertools.islice(all_rows(rows), MAX_ROWS)
    for row in rows:
        if row["error"] is None:
            yield [(one["role"] == "assistant", "".join(message_texts(one))) for one in row["messages"]]


def source_leak(
    source: Source, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0, seconds: float = math.inf
) -> Leak | None:
    """How far the answers of a source can be guessed; `None` if it has fewer than `MIN_ROWS` rows with answers."""
    texts = list(texts_of(source, seed))
    conversations = encode(texts, tokenizer_of(texts, tokenizer))
    if len(conversations) < MIN_ROWS:
        return None
    return measure_leak(conversations, seed, seconds=seconds, name=source.name)


def check_leaks(
    sources: Iterable[Source],
    reports: Sequence[SourceReport],
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    seconds: float,
) -> str:
    """Puts the `leak` of each source that can be read into its report, and says what was found."""
    leaks = {}
    for source, report in zip(sources, reports):
        if report.error is None:
            report.leak = leaks[source.name] = source_leak(source, tokenizer, seed, seconds)
    return leak_text(leaks)


def leak_text(leaks: Mapping[str, Leak | None]) -> str:
    """A table of what was measured, the source of which most is guessed first, and what can be done about it."""
    ranked = sorted(leaks, key=lambda name: -leaks[name].guessed_share if leaks[name] else 1)
    header = ["source", "held-out rows", "bits a token, given the question", "guessed from the answer before it", ""]
    header += ["right without it", "and with it"]
    return "\n\n".join([table(header, [cells(name, leaks[name]) for name in ranked]), *advice(leaks, ranked)])


def cells(name: str, leak: Leak | None) -> list:
    if leak is None:
        return [name, f"fewer than {MIN_ROWS} rows in all", *[""] * 5]
    rows = leak.rows if leak.in_time else f"{leak.rows}, out of time at step {leak.steps}"
    shares = (leak.guessed_share, leak.hidden_accuracy, leak.visible_accuracy)
    bits = [f"{leak.hidden_bits:.2f}", f"{leak.guessed_bits:.2f} ± {leak.error:.2f}"]
    return [name, rows, *bits, *(f"{share:.0%}" for share in shares)]


def advice(leaks: Mapping[str, Leak | None], ranked: Sequence[str]) -> Iterator[str]:
    measured = {name: leaks[name] for name in ranked if leaks[name] is not None}
    much = [name for name, leak in measured.items() if leak.guessed_share >= MUCH]
    if much:
        yield (
            f"In {much[0]}, {measured[much[0]]}. At least a tenth is guessed in {', '.join(much)}: there the loss "
            "falls without looking at the images. `answer_mask_ratio` of the training hides answers from the input of "
            "the language model; maps of collages (make_instructions) have answers whose beginning tells nothing."
        )
    little = [name for name, leak in measured.items() if leak.hidden_bits < LITTLE]
    if little:
        yield f"In {', '.join(little)} answers follow from their questions: nothing is learned from them by looking."
