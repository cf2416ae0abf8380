"""What a mixture amounts to: a table of its sources, expected tokens, what is missing, and the paper's four rules.

Nothing is fetched. Where a source can be read from disk, tiles and text are taken from its first rows; elsewhere tiles
are the most that the source allows and text is a fixed guess, which the table marks with `<=`. So it is where none of
the first rows can be used.
"""

import dataclasses
import itertools
import math
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
from trl import SFTConfig

from ..image_processing_vitp import ViTPImageProcessor
from ..processing_vitp import message_texts
from ..vrl import num_kept_tokens
from .collator import num_tiles
from .mixture import Mixture, effective_rows
from .rows import load_images
from .sources import Source, read_source

TEXT_TOKENS = 200  # a sample's, where it cannot be read
CHARACTERS_PER_TOKEN = 4
ROWS_READ = 32


@dataclasses.dataclass
class SourceSummary:
    """One line of the table; `tiles` and `text_tokens` are means of a sample, upper bounds unless `measured`, and
    `samples` those of the samples that were read, or these bounds, and `longest` the most of both in one sample.
    `unfit` tells how many of the first rows cannot be used, and why the first of them."""

    source: Source
    rows: int | None
    effective: int
    tiles: float
    text_tokens: float
    measured: bool
    missing: str | None
    unfit: str | None
    samples: list[tuple[int, float]]
    longest: tuple[int, int]
    share: float = 0.0

    def tokens(self, tokens_per_tile: int, drop_ratio: float, args: SFTConfig) -> float:
        """Of a sample on average, after the drop; `args` have VRL's settings, and the longest sequence."""
        visual = round(self.tiles * tokens_per_tile)
        kept = args.vrl_apply_prob * num_kept_tokens(visual, drop_ratio) + (1 - args.vrl_apply_prob) * visual
        return min(kept + self.text_tokens, args.max_length or math.inf)


def summarise(mixture: Mixture, image_processor: ViTPImageProcessor) -> list[SourceSummary]:
    """A summary of every source; reads only what lies on this machine.

    Args:
        image_processor: cuts images into tiles, at most its `max_patches` where a source says nothing.
    """
    summaries = []
    for source in mixture.sources:
        missing = source.missing()
        is_local = not source.is_on_hub and missing is None
        rows = (num_lines(source) if is_local else None) or source.rows
        if rows is None and is_local:
            rows = len(read_source(source))
        if rows is None and missing is None:
            missing = "`rows` is not given, so its share is unknown"
        seen, errors = measure(source, image_processor) if is_local else ([], [])
        most = most_tiles(source, image_processor)
        tiles, text_tokens = np.mean(seen, axis=0).tolist() if seen else (most, TEXT_TOKENS)
        longest = np.max([*seen, (most, 0 if seen else TEXT_TOKENS)], axis=0)
        summaries.append(
            SourceSummary(
                source,
                rows,
                effective=effective_rows(source, rows or 0),
                tiles=tiles,
                text_tokens=text_tokens,
                measured=bool(seen),
                missing=missing,
                unfit=f"{len(errors)} of the first {len(seen) + len(errors)}: {errors[0]}" if errors else None,
                samples=seen or [(most, TEXT_TOKENS)],
                longest=(int(longest[0]), math.ceil(longest[1])),
            )
        )
    total = sum(summary.effective for summary in summaries)
    for summary in summaries:
        summary.share = summary.effective / max(total, 1)
    return summaries


def num_lines(source: Source) -> int | None:
    """Rows of a local source of JSON Lines, whatever the mixture says; `None` of any other."""
    if source.annotation is None or Path(source.annotation).suffix != ".jsonl":
        return None
    with open(source.annotation, "rb") as file:
        return sum(1 for line in file if line.strip())


def most_tiles(source: Source, image_processor: ViTPImageProcessor) -> int:
    """Tiles of a sample of one image for which the source's budget is just enough."""
    if source.image_size is not None:
        return sum(image_processor.num_tiles([(source.image_size,) * 2], source.settings.images_kwargs))
    limit = image_processor.max_patches_of_image(1, source.settings.images_kwargs)
    return limit + 1 if limit > 1 else 1


def measure(source: Source, image_processor: ViTPImageProcessor) -> tuple[list[tuple[int, float]], list[str]]:
    """Tiles and text tokens of each of the first rows of a local source that can be used, and errors of the others."""
    seen, errors = [], []
    for row in itertools.islice(read_source(dataclasses.replace(source, streaming=True)), ROWS_READ):
        try:
            if row["error"]:
                raise ValueError(row["error"])
            tiles = sum(num_tiles(load_images(row), source.settings, image_processor))
        except ValueError as error:
            errors.append(f"row {row['id']}: {error}")
            continue
        characters = sum(len(text) for message in row["messages"] for text in message_texts(message))
        seen.append((tiles, characters / CHARACTERS_PER_TOKEN))
    return seen, errors


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


def print_mixture(
    mixture: Mixture,
    training_args: SFTConfig,
    image_processor: ViTPImageProcessor,
    tokens_per_tile: int,
    processes: int,
) -> list[SourceSummary]:
    """Prints the table, expected tokens a step with and without VRL, what is missing, and the rules."""
    summaries = summarise(mixture, image_processor)
    ratios = {"r = 0": 0.0, f"r = {training_args.vrl_drop_ratio:g}": training_args.vrl_drop_ratio}
    header = ["source", "rows", "rate", "rows an epoch", "share %", "modality", "tasks", "tiles"]
    lines = [[*header, *(f"tokens, {name}" for name in ratios)]]
    for summary in summaries:
        source, bound = summary.source, "" if summary.measured else "<= "
        tokens = [f"{bound}{summary.tokens(tokens_per_tile, ratio, training_args):.0f}" for ratio in ratios.values()]
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
    print(f"\nA step: {batch} samples in each of {processes} process(es), {batch * processes} in all.", end=" ")
    print(f"An epoch: {math.ceil(total / (batch * processes)):,} steps.", end=" ")
    if training_args.max_steps > 0:
        epochs = training_args.max_steps * batch * processes / max(total, 1)
        print(f"{training_args.max_steps:,} steps: {epochs:.2g} epochs.")
    else:
        print()
    size = image_processor.size
    bound = "" if all(summary.measured for summary in summaries) else "at most "
    for name, ratio in ratios.items():
        tokens = sum(item.share * item.tokens(tokens_per_tile, ratio, training_args) for item in summaries)
        print(f"Expected tokens a step, {name}: {bound}{tokens * batch * processes:,.0f}")
    print(
        f"({tokens_per_tile} tokens a tile of {size['height']} x {size['width']} pixels. Text: {CHARACTERS_PER_TOKEN} "
        f"characters a token in those of the first {ROWS_READ} rows that can be used, where a source lies here; "
        f"elsewhere {TEXT_TOKENS} tokens are assumed, and the most tiles.)"
    )

    missing = [(summary.source.name, summary.missing) for summary in summaries if summary.missing]
    remote = [summary.source.dataset for summary in summaries if summary.source.is_on_hub]
    print(f"\nMissing: {len(missing)} of {len(summaries)} sources")
    for name, what in missing:
        print(f"  {name}: {what}")
    unfit = [f"  {summary.source.name}: {summary.unfit}" for summary in summaries if summary.unfit]
    if unfit:
        print("Rows that cannot be used:", *unfit, sep="\n")
    if remote:
        print(f"On the Hub, not looked up: {', '.join(remote)}")
    print("\nThe four rules of a mixture:")
    for holds, text in check_rules(mixture, summaries):
        print(f"  {'ok     ' if holds else 'WARNING'}  {text}")
    return summaries


def print_commands(summaries: list[SourceSummary]) -> None:
    """Print the commands that make the missing sources."""
    commands = [command for summary in summaries if summary.missing and (command := make_command(summary.source))]
    if commands:
        print("\nTo make the missing sources (each command without its last argument says what it needs):")
        print("\n".join(f"  {command}" for command in commands))


def make_command(source: Source) -> str | None:
    """Return the command that makes the annotation of a source from its `image_root`, `None` if none is known."""
    path, root = Path(source.annotation or ""), source.image_root
    if source.make is None or path.suffix != ".jsonl" or root is None:
        return None
    elsewhere = [] if path.parent == Path(root).parent else ["--output_dir", str(path.parent)]
    return shlex.join([*shlex.split(source.make), path.stem, root, *elsewhere])
