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

from ..conversations import message_texts
from ..image_processing_vitp import ViTPImageProcessor
from ..vrl import num_language_tokens
from .mixture import Mixture, effective_rows
from .rows import load_images
from .sample_length import num_tiles
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
        most_tiles = self.most_tiles
        most_tokens = 0
        for tiles, tokens in self.samples:
            most_tiles = max(most_tiles, tiles)
            most_tokens = max(most_tokens, tokens)
        return most_tiles, math.ceil(most_tokens)

    def tokens(
        self,
        tokens_per_tile: int,
        drop_ratio: float,
        args: SFTConfig,
    ) -> float:
        """Return the mean number of tokens of a sample after the drop, while patches are dropped as in `args`."""
        num_visible = num_language_tokens(self.tiles, tokens_per_tile, 0.0, args.patch_drop_ratio)
        num_kept = num_language_tokens(self.tiles, tokens_per_tile, drop_ratio, args.patch_drop_ratio)
        mean_visual = args.vrl_apply_prob * num_kept + (1 - args.vrl_apply_prob) * num_visible
        return min(mean_visual + self.text_tokens, args.max_length or math.inf)


def summarize_sources(mixture: Mixture, image_processor: ViTPImageProcessor) -> list[SourceSummary]:
    """Return a summary of each source, from local files only.

    Args:
        image_processor: image processor that tiles the images; its `max_patches` is the default of a source.
    """
    summaries = [summarize_source(source, image_processor) for source in mixture.sources]
    total = sum(summary.effective for summary in summaries)
    for summary in summaries:
        summary.share = summary.effective / max(total, 1)
    return summaries


def summarize_source(source: Source, image_processor: ViTPImageProcessor) -> SourceSummary:
    """Return the summary of a source without its share."""
    missing = source.missing()
    num_rows = source.rows
    samples = []
    errors = []
    if not source.is_on_hub and missing is None:
        num_rows = count_rows(source)
        samples, errors = measure(source, image_processor)
    elif missing is None and num_rows is None:
        missing = "`rows` is not set, so its share is unknown"
    unusable = None
    if errors:
        unusable = f"{len(errors)} of the first {len(samples) + len(errors)}: {errors[0]}"
    upper_bound = most_tiles(source, image_processor)
    return SourceSummary(
        source,
        num_rows,
        effective=effective_rows(source, num_rows or 0),
        samples=samples or [(upper_bound, TEXT_TOKENS)],
        most_tiles=upper_bound,
        measured=bool(samples),
        missing=missing,
        unusable=unusable,
    )


def count_rows(source: Source) -> int:
    """Return the number of rows of a source on disk. The count of JSON Lines overrides `rows` of the mixture."""
    if source.annotation is not None and Path(source.annotation).suffix == ".jsonl":
        with open(source.annotation, "rb") as file:
            num_lines = sum(1 for line in file if line.strip())
        if num_lines:
            return num_lines
    if source.rows is not None:
        return source.rows
    return len(read_source(source))


def most_tiles(source: Source, image_processor: ViTPImageProcessor) -> int:
    """Return the maximum number of tiles of a sample of one image."""
    if source.image_size is not None:
        image_size = (source.image_size, source.image_size)
        return sum(image_processor.num_tiles([image_size], source.images_kwargs))
    limit = image_processor.max_patches_of_image(1, source.images_kwargs)
    return limit + 1 if limit > 1 else 1  # Several tiles have a thumbnail.


def measure(source: Source, image_processor: ViTPImageProcessor) -> tuple[list[tuple[int, float]], list[str]]:
    """Return tiles and text tokens of each valid row of the first rows, and the errors of the invalid ones."""
    samples = []
    errors = []
    stream = read_source(dataclasses.replace(source, streaming=True))
    for row in itertools.islice(stream, ROWS_READ):
        if row["error"]:
            errors.append(f"row {row['id']}: {row['error']}")
            continue
        try:
            images = load_images(row, source.spec_for(image_processor))
            tiles = sum(num_tiles(images, source, image_processor))
        except ValueError as error:
            errors.append(f"row {row['id']}: {error}")
            continue
        num_characters = 0
        for message in row["messages"]:
            num_characters += sum(map(len, message_texts(message)))
        samples.append((tiles, num_characters / CHARACTERS_PER_TOKEN))
    return samples, errors


def check_rules(mixture: Mixture, summaries: list[SourceSummary]) -> list[tuple[bool, str]]:
    """Return whether each of the paper's four rules for mixtures holds, with a description of the findings."""
    present = [summary for summary in summaries if summary.effective > 0]
    domain = [summary for summary in present if not summary.source.general]
    tasks = set()
    covered_modalities = set()
    grounding_share = 0
    for summary in domain:
        tasks.update(summary.source.tasks)
        covered_modalities.update(summary.source.modality)
        if "grounding" in summary.source.tasks:
            grounding_share += summary.share
    general_share = sum(summary.share for summary in present if summary.source.general)

    num_rows = sum(summary.effective for summary in present)
    diversity = f"{num_rows:,} rows from {len(present)} sources, {len(tasks)} tasks"
    is_diverse = False
    if present:
        largest = max(present, key=lambda summary: summary.share)
        diversity += f", at most {largest.share:.0%} from one ({largest.source.name})"
        is_diverse = largest.share <= 0.5 and len(tasks) > 1

    absent_modalities = [modality for modality in mixture.modalities if modality not in covered_modalities]
    if absent_modalities:
        modalities = f"no source of {', '.join(absent_modalities)}"
    elif mixture.modalities:
        modalities = f"every one has a source ({', '.join(mixture.modalities)})"
    else:
        modalities = "the mixture does not set `modalities`, those of the downstream tasks"

    if grounding_share:
        grounding = f"{grounding_share:.1%}"
    elif mixture.detection:
        grounding = "no source, so detection is not taught"
    else:
        grounding = "not needed without detection"
    general = f"{general_share:.1%}" if general_share else "no source against forgetting"
    return [
        (is_diverse, f"scale and diversity: {diversity}"),
        (bool(mixture.modalities) and not absent_modalities, f"modalities: {modalities}"),
        (grounding_share > 0 or not mixture.detection, f"grounding: {grounding}"),
        (general_share > 0, f"general data: {general}"),
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
    ratios = {"r = 0": 0.0, f"r = {training_args.vrl_drop_ratio:g}": training_args.vrl_drop_ratio}
    print_table(summaries, training_args, tokens_per_tile, ratios)
    print_step(
        summaries,
        training_args,
        tokens_per_tile,
        ratios,
        processes,
    )
    size = image_processor.size
    print(
        f"({tokens_per_tile} tokens per tile of {size['height']} x {size['width']} pixels. Text of local sources: the "
        f"valid rows of the first {ROWS_READ}, at {CHARACTERS_PER_TOKEN} characters per token. Other sources: "
        f"{TEXT_TOKENS} text tokens and the maximum number of tiles.)"
    )
    print_problems(summaries)
    print("\nThe four rules of a mixture:")
    for holds, text in check_rules(mixture, summaries):
        print(f"  {'ok     ' if holds else 'WARNING'}  {text}")
    return summaries


def print_table(
    summaries: list[SourceSummary],
    training_args: SFTConfig,
    tokens_per_tile: int,
    ratios: dict[str, float],
) -> None:
    """Print a line for each source, with its tokens at each drop ratio, and one for all."""
    header = ["source", "rows", "rate", "rows an epoch", "share %", "modality", "tasks", "tiles"]
    for name in ratios:
        header.append(f"tokens, {name}")
    lines = [header]
    for summary in summaries:
        source = summary.source
        bound = "" if summary.measured else "<= "
        cells = [
            source.name,
            "?" if summary.rows is None else f"{summary.rows:,}",
            f"{source.rate:g}",
            f"{summary.effective:,}",
            f"{100 * summary.share:.2f}",
            "general" if source.general else ", ".join(source.modality) or "?",
            ", ".join(source.tasks) or "?",
            f"{bound}{summary.tiles:.3g}",
        ]
        for ratio in ratios.values():
            cells.append(f"{bound}{summary.tokens(tokens_per_tile, ratio, training_args):.0f}")
        lines.append(cells)
    total = sum(summary.effective for summary in summaries)
    last_line = ["all", "", "", f"{total:,}", "100.00" if total else "0.00"]
    last_line += [""] * (len(header) - len(last_line))
    lines.append(last_line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    left_aligned = (header.index("source"), header.index("modality"), header.index("tasks"))
    for line in lines:
        cells = []
        for index, (cell, width) in enumerate(zip(line, widths)):
            cells.append(cell.ljust(width) if index in left_aligned else cell.rjust(width))
        print("  ".join(cells).rstrip())


def print_step(
    summaries: list[SourceSummary],
    training_args: SFTConfig,
    tokens_per_tile: int,
    ratios: dict[str, float],
    processes: int,
) -> None:
    """Print the samples and the expected tokens of an optimizer step."""
    total = sum(summary.effective for summary in summaries)
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    samples = batch * processes
    epochs = ""
    if training_args.max_steps > 0:
        num_epochs = training_args.max_steps * samples / max(total, 1)
        epochs = f" {training_args.max_steps:,} steps: {num_epochs:.2g} epochs."
    print(
        f"\nA step: {batch} samples in each of {processes} process(es), {samples} in all. "
        f"An epoch: {math.ceil(total / samples):,} steps.{epochs}"
    )
    bound = "" if all(summary.measured for summary in summaries) else "at most "
    for name, ratio in ratios.items():
        mean_tokens = 0
        for summary in summaries:
            mean_tokens += summary.share * summary.tokens(tokens_per_tile, ratio, training_args)
        print(f"Expected tokens a step, {name}: {bound}{mean_tokens * samples:,.0f}")


def print_problems(summaries: list[SourceSummary]) -> None:
    """Print what is missing or invalid, and the repos that are not checked."""
    missing = [f"  {summary.source.name}: {summary.missing}" for summary in summaries if summary.missing]
    print(f"\nMissing: {len(missing)} of {len(summaries)} sources", *missing, sep="\n")
    unusable = [f"  {summary.source.name}: {summary.unusable}" for summary in summaries if summary.unusable]
    if unusable:
        print("Invalid rows:", *unusable, sep="\n")
    hub_ids = set()
    for summary in summaries:
        if summary.source.is_on_hub:
            hub_ids.add(summary.source.hub or summary.source.dataset)
    if hub_ids:
        print(f"On the Hub, not checked: {', '.join(sorted(hub_ids))}")


def print_commands(summaries: list[SourceSummary]) -> None:
    """Print the commands that create the missing sources."""
    commands = []
    for summary in summaries:
        command = make_command(summary.source) if summary.missing else None
        if command is not None:
            commands.append(f"  {command}")
    if commands:
        print("\nCommands that create the missing sources (without its last argument, a command prints its inputs):")
        print("\n".join(commands))


def make_command(source: Source) -> str | None:
    """Return the command that creates the annotation of a source from its `image_root`, or `None`."""
    if source.make is None or source.annotation is None or source.image_root is None:
        return None
    path = Path(source.annotation)
    if path.suffix != ".jsonl":
        return None
    arguments = [*shlex.split(source.make), path.stem, source.image_root]
    if path.parent != Path(source.image_root).parent:
        arguments += ["--output_dir", str(path.parent)]
    return shlex.join(arguments)
