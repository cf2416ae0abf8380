"""Dry run of a mixture: a table of its sources, expected tokens, missing files, and the paper's four rules.

Nothing is downloaded. If a source is on disk, its first rows are measured. Otherwise, or if none of these rows is
valid, the table has the maximum number of tiles and a fixed number of text tokens, marked with `<=`.
"""

import dataclasses
import itertools
import math
import shlex
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

TEXT_TOKENS = 200  # Assumed for a sample that cannot be read.
CHARACTERS_PER_TOKEN = 4
ROWS_READ = 32


@dataclasses.dataclass
class SourceSummary:
    """Summary of a source: one line of the table.

    Args:
        rows, effective: number of rows of the source, `None` if unknown, and number of its rows in an epoch.
        samples: tiles and text tokens of each valid row of the first rows, or one upper bound unless `measured`.
        most_tiles: maximum number of tiles of a sample of one image.
        measured: whether `samples` are of rows that were read.
        missing: message that names the missing path or setting, or `None`.
        unusable: number of invalid rows among the first rows, and the first error, or `None`.
        share: share of the rows of an epoch.
    """

    source: Source
    rows: int | None
    effective: int
    samples: list[tuple[int, float]]
    most_tiles: int
    measured: bool
    missing: str | None
    unusable: str | None
    share: float = 0.0

    @property
    def tiles(self) -> float:
        return float(np.mean([tiles for tiles, _ in self.samples]))

    @property
    def text_tokens(self) -> float:
        return float(np.mean([tokens for _, tokens in self.samples]))

    @property
    def longest(self) -> tuple[int, int]:
        """Maximum numbers of tiles and of text tokens of a sample."""
        tiles, tokens = map(max, zip(*self.samples))
        return max(tiles, self.most_tiles), math.ceil(tokens)

    def tokens(self, tokens_per_tile: int, drop_ratio: float, args: SFTConfig) -> float:
        """Return the mean number of tokens of a sample after the drop, with the VRL settings of `args`."""
        visual = round(self.tiles * tokens_per_tile)
        kept = args.vrl_apply_prob * num_kept_tokens(visual, drop_ratio) + (1 - args.vrl_apply_prob) * visual
        return min(kept + self.text_tokens, args.max_length or math.inf)


def summarize_sources(mixture: Mixture, image_processor: ViTPImageProcessor) -> list[SourceSummary]:
    """Return a summary of each source, from local files only.

    Args:
        image_processor: image processor that tiles the images; its `max_patches` is the default of a source.
    """
    summaries = []
    for source in mixture.sources:
        missing, rows, samples, errors = source.missing(), source.rows, [], []
        if not source.is_on_hub and missing is None:
            if source.annotation is not None and Path(source.annotation).suffix == ".jsonl":
                with open(source.annotation, "rb") as file:  # The count overrides `rows` of the mixture.
                    rows = sum(1 for line in file if line.strip()) or rows
            rows = len(read_source(source)) if rows is None else rows
            samples, errors = measure(source, image_processor)
        elif missing is None and rows is None:
            missing = "`rows` is not set, so its share is unknown"
        most = most_tiles(source, image_processor)
        summaries.append(
            SourceSummary(
                source,
                rows,
                effective=effective_rows(source, rows or 0),
                samples=samples or [(most, TEXT_TOKENS)],
                most_tiles=most,
                measured=bool(samples),
                missing=missing,
                unusable=f"{len(errors)} of the first {len(samples) + len(errors)}: {errors[0]}" if errors else None,
            )
        )
    total = sum(summary.effective for summary in summaries)
    for summary in summaries:
        summary.share = summary.effective / max(total, 1)
    return summaries


def most_tiles(source: Source, image_processor: ViTPImageProcessor) -> int:
    """Return the maximum number of tiles of a sample of one image."""
    if source.image_size is not None:
        return sum(image_processor.num_tiles([(source.image_size,) * 2], source.images_kwargs))
    limit = image_processor.max_patches_of_image(1, source.images_kwargs)
    return limit + 1 if limit > 1 else 1


def measure(source: Source, image_processor: ViTPImageProcessor) -> tuple[list[tuple[int, float]], list[str]]:
    """Return tiles and text tokens of each valid row of the first rows, and the errors of the invalid ones."""
    samples, errors = [], []
    for row in itertools.islice(read_source(dataclasses.replace(source, streaming=True)), ROWS_READ):
        try:
            if row["error"]:
                raise ValueError(row["error"])
            images = load_images(row, source.spec_for(image_processor))
            tiles = sum(num_tiles(images, source, image_processor))
        except ValueError as error:
            errors.append(f"row {row['id']}: {error}")
            continue
        characters = sum(len(text) for message in row["messages"] for text in message_texts(message))
        samples.append((tiles, characters / CHARACTERS_PER_TOKEN))
    return samples, errors


def check_rules(mixture: Mixture, summaries: list[SourceSummary]) -> list[tuple[bool, str]]:
    """Return whether each of the paper's four rules for mixtures holds, with a description of the findings."""
    present = [summary for summary in summaries if summary.effective > 0]
    domain = [summary for summary in present if not summary.source.general]
    tasks = {task for summary in domain for task in summary.source.tasks}
    found = f"{sum(summary.effective for summary in present):,} rows from {len(present)} sources, {len(tasks)} tasks"
    largest = max(present, key=lambda summary: summary.share, default=None)
    if largest is not None:
        found += f", at most {largest.share:.0%} from one ({largest.source.name})"
    is_diverse = largest is not None and largest.share <= 0.5 and len(tasks) > 1

    covered = {modality for summary in domain for modality in summary.source.modality}
    absent = [modality for modality in mixture.modalities if modality not in covered]
    modalities = f"every one has a source ({', '.join(mixture.modalities)})"
    if absent:
        modalities = f"no source of {', '.join(absent)}"
    elif not mixture.modalities:
        modalities = "the mixture does not set `modalities`, those of the downstream tasks"

    without = "no source, so detection is not taught" if mixture.detection else "not needed without detection"
    grounding = sum(summary.share for summary in domain if "grounding" in summary.source.tasks)
    general = sum(summary.share for summary in present if summary.source.general)
    return [
        (is_diverse, f"scale and diversity: {found}"),
        (bool(mixture.modalities) and not absent, f"modalities: {modalities}"),
        (grounding > 0 or not mixture.detection, f"grounding: {f'{grounding:.1%}' if grounding else without}"),
        (general > 0, f"general data: {f'{general:.1%}' if general else 'no source against forgetting'}"),
    ]


def print_mixture(
    mixture: Mixture,
    training_args: SFTConfig,
    image_processor: ViTPImageProcessor,
    tokens_per_tile: int,
    processes: int,
) -> list[SourceSummary]:
    """Print the table, expected tokens per step with and without VRL, missing files, and the rules."""
    summaries = summarize_sources(mixture, image_processor)
    total = sum(summary.effective for summary in summaries)
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
    lines.append(["all", "", "", f"{total:,}", "100.00" if total else "0.00", *[""] * (len(lines[0]) - 5)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:  # Names are left-aligned, numbers right-aligned.
        cells = [cell.ljust(w) if i in (0, 5, 6) else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        print("  ".join(cells).rstrip())

    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    samples = batch * processes
    epochs = f" {training_args.max_steps:,} steps: {training_args.max_steps * samples / max(total, 1):.2g} epochs."
    print(
        f"\nA step: {batch} samples in each of {processes} process(es), {samples} in all. "
        f"An epoch: {math.ceil(total / samples):,} steps.{epochs if training_args.max_steps > 0 else ''}"
    )
    bound = "" if all(summary.measured for summary in summaries) else "at most "
    for name, ratio in ratios.items():
        tokens = sum(item.share * item.tokens(tokens_per_tile, ratio, training_args) for item in summaries)
        print(f"Expected tokens a step, {name}: {bound}{tokens * samples:,.0f}")
    size = image_processor.size
    print(
        f"({tokens_per_tile} tokens per tile of {size['height']} x {size['width']} pixels. Text of local sources: the "
        f"valid rows of the first {ROWS_READ}, at {CHARACTERS_PER_TOKEN} characters per token. Other sources: "
        f"{TEXT_TOKENS} text tokens and the maximum number of tiles.)"
    )

    missing = [f"  {summary.source.name}: {summary.missing}" for summary in summaries if summary.missing]
    print(f"\nMissing: {len(missing)} of {len(summaries)} sources", *missing, sep="\n")
    unusable = [f"  {summary.source.name}: {summary.unusable}" for summary in summaries if summary.unusable]
    if unusable:
        print("Invalid rows:", *unusable, sep="\n")
    remote = sorted({item.source.hub or item.source.dataset for item in summaries if item.source.is_on_hub})
    if remote:
        print(f"On the Hub, not checked: {', '.join(remote)}")
    print("\nThe four rules of a mixture:")
    for holds, text in check_rules(mixture, summaries):
        print(f"  {'ok     ' if holds else 'WARNING'}  {text}")
    return summaries


def print_commands(summaries: list[SourceSummary]) -> None:
    """Print the commands that create the missing sources."""
    commands = [command for summary in summaries if summary.missing and (command := make_command(summary.source))]
    if commands:
        print("\nCommands that create the missing sources (without its last argument, a command prints its inputs):")
        print("\n".join(f"  {command}" for command in commands))


def make_command(source: Source) -> str | None:
    """Return the command that creates the annotation of a source from its `image_root`, or `None`."""
    path, root = Path(source.annotation or ""), source.image_root
    if source.make is None or path.suffix != ".jsonl" or root is None:
        return None
    elsewhere = [] if path.parent == Path(root).parent else ["--output_dir", str(path.parent)]
    return shlex.join([*shlex.split(source.make), path.stem, root, *elsewhere])
