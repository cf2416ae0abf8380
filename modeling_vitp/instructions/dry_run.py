"""What a mixture amounts to: a table of its sources, expected tokens, what is missing, and the paper's four rules.

Nothing is fetched. Where a source can be read from disk, tiles and text are taken from its first rows; elsewhere tiles
are the most that the source allows and text is a fixed guess, which the table marks with `<=`.
"""

import dataclasses
import itertools
import math
from collections import Counter

import PIL.Image
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from trl import SFTConfig

from ..messages import message_texts
from ..vrl import num_kept_tokens
from .mixture import effective_rows
from .mixture_file import Mixture, Source
from .rows import load_images
from .sources import read_source

TILE = (448, 448)
TOKENS_PER_TILE = 256  # of InternVL2.5 at 448 pixels
TEXT_TOKENS = 200  # a sample's, where it cannot be read
CHARACTERS_PER_TOKEN = 4
ROWS_READ = 32


@dataclasses.dataclass
class SourceSummary:
    """One line of the table; `tiles` and `text_tokens` are means of a sample, upper bounds unless `measured`."""

    source: Source
    rows: int | None
    effective: int
    tiles: float
    text_tokens: float
    measured: bool
    missing: str | None
    share: float = 0.0

    def tokens(self, drop_ratio: float, apply_prob: float, max_length: int | None) -> float:
        visual = round(self.tiles * TOKENS_PER_TILE)
        kept = apply_prob * num_kept_tokens(visual, drop_ratio) + (1 - apply_prob) * visual
        return min(kept + self.text_tokens, max_length or math.inf)


def summarise(mixture: Mixture, max_patches: int) -> list[SourceSummary]:
    """A summary of every source; reads only what lies on this machine."""
    summaries = []
    for source in mixture.sources:
        missing = source.missing()
        rows, is_local = source.rows, not source.is_on_hub and missing is None
        if rows is None and is_local:
            rows = len(read_source(source))
        if rows is None and missing is None:
            missing = "`rows` is not given, so its share is unknown"
        limit = source.max_patches or max_patches
        tiles, text_tokens = (measure(source, limit)) if is_local else (None, TEXT_TOKENS)
        summaries.append(
            SourceSummary(
                source,
                rows,
                effective=effective_rows(source, rows or 0),
                tiles=most_tiles(source, limit) if tiles is None else tiles,
                text_tokens=text_tokens,
                measured=is_local,
                missing=missing,
            )
        )
    total = sum(summary.effective for summary in summaries)
    for summary in summaries:
        summary.share = summary.effective / max(total, 1)
    return summaries


def most_tiles(source: Source, limit: int) -> int:
    if source.image_size is not None:
        return num_tiles((source.image_size, source.image_size), limit)
    return limit + 1 if limit > 1 else 1


def num_tiles(size: tuple[int, int], limit: int) -> int:
    """Tiles of an image of `(width, height)`, thumbnail included."""
    columns, rows = get_optimal_tiled_canvas(size[::-1], TILE, 1, limit)
    return columns * rows + (columns * rows > 1)


def measure(source: Source, limit: int) -> tuple[float, float]:
    """Mean tiles and text tokens over the first rows of a local source that can be used."""
    tiles, text_tokens, used = 0, 0.0, 0
    for row in itertools.islice(read_source(dataclasses.replace(source, streaming=True)), ROWS_READ):
        try:
            sizes = [(source.image_size,) * 2 if source.image_size else size for size in image_sizes(row)]
        except ValueError:
            continue
        tiles += sum(num_tiles(size, max(limit // len(sizes), 1)) for size in sizes)
        text_tokens += sum(len(text) for message in row["messages"] for text in message_texts(message))
        used += 1
    if used == 0:
        return most_tiles(source, limit), TEXT_TOKENS
    return tiles / used, text_tokens / used / CHARACTERS_PER_TOKEN


def image_sizes(row: dict) -> list[tuple[int, int]]:
    if row["error"]:
        raise ValueError(row["error"])
    return [image.size for image in load_images(row) if isinstance(image, PIL.Image.Image)]


def check_rules(mixture: Mixture, summaries: list[SourceSummary]) -> list[tuple[bool, str]]:
    """The paper's four rules for a mixture: whether each holds, and what was found."""
    present = [summary for summary in summaries if summary.effective > 0]
    domain = [summary for summary in present if not summary.source.general]
    tasks = Counter(task for summary in domain for task in summary.source.tasks)
    total = sum(summary.effective for summary in present)
    largest = max(present, key=lambda summary: summary.share, default=None)
    is_diverse = largest is not None and largest.share <= 0.5 and len(tasks) > 1
    found = f"{total:,} rows from {len(present)} sources, {len(tasks)} tasks"
    if largest is not None:
        found += f", at most {largest.share:.0%} from one ({largest.source.name})"
    rules = [(is_diverse, f"scale and diversity: {found}")]

    covered = {modality for summary in domain for modality in summary.source.modality}
    absent = [modality for modality in mixture.modalities if modality not in covered]
    if not mixture.modalities:
        rules.append((False, "modalities: the mixture does not say which the downstream tasks need (`modalities`)"))
    elif absent:
        rules.append((False, f"modalities: no source of {', '.join(absent)}"))
    else:
        rules.append((True, f"modalities: every one has a source ({', '.join(mixture.modalities)})"))

    share = sum(summary.share for summary in domain if "grounding" in summary.source.tasks)
    rules.append(
        (share > 0, f"grounding: {share:.1%}" if share else "grounding: no source, so detection is not taught")
    )
    share = sum(summary.share for summary in present if summary.source.general)
    rules.append((share > 0, f"general data: {share:.1%}" if share else "general data: no source against forgetting"))
    return rules


def print_mixture(mixture: Mixture, training_args: SFTConfig, max_patches: int | None) -> None:
    """Prints the table, expected tokens a step with and without VRL, what is missing, and the rules."""
    summaries = summarise(mixture, max_patches or 12)
    length, probability = training_args.max_length, training_args.vrl_apply_prob
    ratios = {"r = 0": 0.0, f"r = {training_args.vrl_drop_ratio:g}": training_args.vrl_drop_ratio}
    header = ["source", "rows", "rate", "rows an epoch", "share %", "modality", "tasks", "tiles"]
    lines = [[*header, *(f"tokens, {name}" for name in ratios)]]
    for summary in summaries:
        source, bound = summary.source, "" if summary.measured else "<= "
        tokens = [f"{bound}{summary.tokens(ratio, probability, length):.0f}" for ratio in ratios.values()]
        lines.append(
            [
                source.name,
                "?" if summary.rows is None else f"{summary.rows:,}",
                f"{source.rate:g}",
                f"{summary.effective:,}",
                f"{100 * summary.share:.2f}",
                "general" if source.general else ", ".join(source.modality) or "?",
                ", ".join(source.tasks) or "?",
                f"{bound}{summary.tiles:.3g}",
                *tokens,
            ]
        )
    total = sum(summary.effective for summary in summaries)
    lines.append(["all", "", "", f"{total:,}", "100.00" if total else "0.00", *[""] * (len(lines[0]) - 5)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    is_number = [False, True, True, True, True, False, False, True, True, True]
    for line in lines:
        cells = [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, is_number)]
        print("  ".join(cells).rstrip())

    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    processes = training_args.world_size
    print(f"\nA step: {batch} samples in each of {processes} process(es), {batch * processes} in all.", end=" ")
    print(f"An epoch: {math.ceil(total / (batch * processes)):,} steps.", end=" ")
    if training_args.max_steps > 0:
        epochs = training_args.max_steps * batch * processes / max(total, 1)
        print(f"{training_args.max_steps:,} steps: {epochs:.2g} epochs.")
    else:
        print()
    bound = "" if all(summary.measured for summary in summaries) else "at most "
    for name, ratio in ratios.items():
        tokens = sum(summary.share * summary.tokens(ratio, probability, length) for summary in summaries)
        print(f"Expected tokens a step, {name}: {bound}{tokens * batch * processes:,.0f}")
    print(
        f"({TOKENS_PER_TILE} tokens a tile. Text: {CHARACTERS_PER_TOKEN} characters a token in the first {ROWS_READ} "
        f"rows where a source lies here; elsewhere {TEXT_TOKENS} tokens are assumed, and the most tiles.)"
    )

    missing = [(summary.source.name, summary.missing) for summary in summaries if summary.missing]
    remote = [summary.source.dataset for summary in summaries if summary.source.is_on_hub]
    print(f"\nMissing: {len(missing)} of {len(summaries)} sources")
    for name, what in missing:
        print(f"  {name}: {what}")
    if remote:
        print(f"On the Hub, not looked up: {', '.join(remote)}")
    print("\nThe four rules of a mixture:")
    for holds, text in check_rules(mixture, summaries):
        print(f"  {'ok     ' if holds else 'WARNING'}  {text}")
