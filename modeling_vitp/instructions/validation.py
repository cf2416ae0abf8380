"""Validation of a mixture, optionally in shards: each row of each source is read once and checked."""

import copy
import hashlib
import heapq
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..cards.sections import table
from ..command.paths import Shard
from ..conversations import check_messages, message_texts
from ..image_processing_vitp import ViTPImageProcessor
from ..opening import read_config_fields
from ..processing_vitp import ViTPProcessor
from .answer_prior import AnswerPrior
from .boxes import wrong_boxes
from .from_annotations.pipeline import explain_labels
from .mixture import Mixture, schema_of_part
from .overlap import Match, TestImages, opencv_in_one_thread, pixel_digest
from .rows import check_answers, load_images, num_image_parts, report_rows
from .sample_length import SampleLength, num_tiles
from .sources import Source, read_source

if "ipykernel" not in sys.modules:  # a notebook keeps its backend
    matplotlib.use("Agg")

BATCH_SIZE = 16
MAX_EXAMPLES = 20  # Rows in the report, for each problem of a source.
TOKENS_PER_BIN = 128

SHARD_SETTINGS = (  # Settings that must be the same in all shards.
    "mixture",
    "processor",
    "max_length",
    "vrl_drop_ratio",
    "max_patches",
    "input_spec",
    "against",
    "against_split",
)

ERRORS = {
    "malformed": "the row cannot be converted to a conversation",
    "image missing": "an image file is not found",
    "image unreadable": "an image file exists but cannot be decoded",
    "image not taken": "an image can be decoded, but the image processor does not support its bands",
    "image places": "the numbers of images and of image places differ",
    "empty answer": "an answer is empty or missing, or has an image",
    "box": "a box does not have four integers from 0 to 1000, or has an empty area",
    "too long": "more tokens than max_length after the drop: training would cut the answer or stop",
    "overlap": "an image is in the test set, whole or in part",
}

IMAGE_ERRORS = ("image missing", "image unreadable", "image places")
PIXELS_IN = re.compile(r"\d{4,}")
PIXELS = ", probably in pixels: boxes must be in thousandths of the image's width and height"

WARNINGS = {
    "duplicate": "the same images and messages as an earlier row of the mixture",
    "loose box": "four numbers in brackets that are not a valid box, in a source without the task grounding",
}


@dataclass
class RowReport:
    """Report of a row.

    Args:
        id: id of the row.
        problems: kind and description of each problem.
        tiles: number of tiles.
        tokens: number of tokens after the drop, or `None` if they cannot be counted.
        digest: hash of images and messages, or `None` if they cannot be read.
        matches: index of an image in the row, and a test image that it matches.
    """

    id: str
    problems: list[tuple[str, str]]
    tiles: int
    tokens: int | None
    digest: bytes | None
    matches: list[tuple[int, Match]]


@dataclass
class SourceReport:
    """Report of a source; `error` is set if the source could not be read to its end."""

    name: str
    rows: int = 0
    schema: str | None = None
    error: str | None = None
    counts: Counter = field(default_factory=Counter)  # Number of rows by problem.
    examples: dict[str, list[dict]] = field(default_factory=dict)
    tiles: Counter = field(default_factory=Counter)  # Number of rows by number of tiles.
    tokens: Counter = field(default_factory=Counter)  # Number of rows by number of tokens after the drop.
    overlap: list[dict] = field(default_factory=list)
    answer_prior: AnswerPrior | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and not any(self.counts[kind] for kind in ERRORS)

    @property
    def has_image_files(self) -> bool:
        """Whether a row names an image file, also one that is missing or unreadable, or has a place for an image."""
        return max(self.tiles, default=0) > 0 or any(self.counts[kind] for kind in IMAGE_ERRORS)

    def add(self, row: RowReport, earlier_digests: set[bytes]) -> None:
        """Add a row to the counts, and its digest to `earlier_digests`, those of the earlier rows of the mixture."""
        self.rows += 1
        problems = list(row.problems)
        if row.digest in earlier_digests:
            problems.append(("duplicate", WARNINGS["duplicate"]))
        if row.digest is not None:
            earlier_digests.add(row.digest)
        for image_index, match in row.matches:
            self.overlap.append({"id": row.id, "image": image_index, **vars(match)})
            text = f"image {image_index}: {match.kind} of {match.test_image}, {match.score:.2f}"
            problems.append(("overlap", text))
        for kind, text in problems:
            examples = self.examples.setdefault(kind, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append({"id": row.id, "problem": text})
        self.counts.update({kind for kind, _ in problems})
        self.tiles[row.tiles] += 1
        if row.tokens is not None:
            self.tokens[row.tokens] += 1

    def to_dict(self) -> dict:
        return {
            "rows": self.rows,
            "schema": self.schema,
            "passed": self.passed,
            "error": self.error,
            "problems": {kind: self.counts[kind] for kind in (*ERRORS, *WARNINGS)},
            "examples": self.examples,
            "tiles": histogram(self.tiles),
            "tokens": histogram(self.tokens),
            "overlap": self.overlap,
            "answer_prior": self.answer_prior and self.answer_prior.to_dict(),
        }


def histogram(counts: Counter) -> dict | None:
    """Return the mean, median, 95th percentile, maximum and the counts of all values, or `None` without values."""
    if not counts:
        return None
    sizes, frequencies = np.array(sorted(counts.items())).T
    total = frequencies.sum()
    shares = frequencies.cumsum() / total
    mean = (sizes * frequencies).sum() / total
    return {
        "mean": round(float(mean), 2),
        "median": int(sizes[np.searchsorted(shares, 0.5)]),
        "p95": int(sizes[np.searchsorted(shares, 0.95)]),
        "max": int(sizes[-1]),
        "counts": {int(size): int(frequency) for size, frequency in zip(sizes, frequencies)},
    }


@dataclass
class RowChecker:
    """Checker for batches of rows of one source, which runs in the workers of a data loader.

    Args:
        source: source of the rows.
        processor: processor that counts tokens and sets the tile size. Without it, InternVL's tile size is used and
            tokens are not counted.
        max_length, vrl_drop_ratio, max_patches, input_spec: settings of the training. `max_patches` and `input_spec` of
            the source take precedence; the default is that of the processor.
        test_images: test images that must not be in the data.
    """

    source: Source
    processor: ViTPProcessor | None = None
    max_length: int | None = None
    vrl_drop_ratio: float = 0.0
    max_patches: int | None = None
    input_spec: dict[str, Any] | None = None
    test_images: TestImages | None = None

    def __post_init__(self):
        if self.processor is None:
            self.image_processor = ViTPImageProcessor()
        else:
            self.image_processor = copy.copy(self.processor.image_processor)
        if self.max_patches:
            self.image_processor.max_patches = self.max_patches
        if self.input_spec is not None:
            self.image_processor = self.image_processor.with_input_spec(self.input_spec)
        self.length = None
        if self.processor is not None:
            processor = copy.copy(self.processor)
            processor.image_processor = self.image_processor
            self.length = SampleLength(processor, vrl_drop_ratio=self.vrl_drop_ratio)
        self._matches = {}  # Matches by image digest, because many rows share an image.

    def __call__(self, rows: list[dict]) -> list[RowReport]:
        return list(map(self.check, rows))

    def check(self, row: dict) -> RowReport:
        if row["error"]:
            kind = "image places" if "image place" in row["error"] else "malformed"
            return RowReport(
                row["id"],
                [(kind, row["error"])],
                tiles=0,
                tokens=None,
                digest=None,
                matches=[],
            )
        images, problems = self.readable_images(row)
        problems += self.check_messages(row)
        is_complete = len(images) == len(row["images"])
        tiles = sum(num_tiles(images, self.source, self.image_processor))
        tokens = None
        kinds = {kind for kind, _ in problems}
        if self.length is not None and is_complete and kinds.isdisjoint({"malformed", "image places"}):
            tokens = self.length.num_tokens(row["messages"], images, self.source)
            if self.max_length is not None and tokens > self.max_length:
                problems.append(("too long", f"{tokens} tokens, max_length={self.max_length}"))
        image_digests = list(map(pixel_digest, images))
        digest = None
        if is_complete:
            content = json.dumps(row["messages"], sort_keys=True).encode()
            digest = hashlib.sha256(b"".join(image_digests) + content).digest()[:16]
        matches = self.matches(images, image_digests)
        return RowReport(
            row["id"],
            problems,
            tiles,
            tokens,
            digest,
            matches,
        )

    def readable_images(self, row: dict) -> tuple[list, list[tuple[str, str]]]:
        """Return the images of a row that can be decoded, and the problems of its images."""
        spec = self.source.spec_for(self.image_processor)
        images = []
        problems = []
        for index, stored in enumerate(row["images"]):
            try:
                [image] = load_images({"images": [stored]}, spec)
            except ValueError as error:
                is_missing = isinstance(error.__cause__, FileNotFoundError)
                text = str(error).replace("image 0", f"image {index}", 1)
                problems.append(("image missing" if is_missing else "image unreadable", text))
                continue
            images.append(image)
            if getattr(image, "mode", None) != "RGB":
                try:
                    self.image_processor([image], **self.source.images_kwargs)
                except ValueError as error:
                    problems.append(("image not taken", f"image {index}: {error}"))
        return images, problems

    def check_messages(self, row: dict) -> list[tuple[str, str]]:
        messages = row["messages"]
        problems = []
        try:
            check_messages(messages)
        except ValueError as error:
            return [("malformed", str(error))]
        num_places = num_image_parts(messages)
        if num_places != len(row["images"]):
            problems.append(("image places", f"{len(row['images'])} image(s), {num_places} image place(s)"))
        try:
            check_answers(messages)
        except ValueError as error:
            problems.append(("empty answer", str(error)))
        for index, message in enumerate(messages):
            for kind, text in self.box_problems("".join(message_texts(message))):
                problems.append((kind, f"message {index}: {text}"))
        return problems

    def box_problems(self, text: str) -> list[tuple[str, str]]:
        """Return the first invalid box of a text, and the first other brackets that may be meant as a box."""
        invalid_boxes, loose_boxes = wrong_boxes(text)
        if "grounding" in self.source.tasks:
            invalid_boxes = invalid_boxes + loose_boxes
            loose_boxes = []
        problems = []
        if invalid_boxes:
            hint = PIXELS if PIXELS_IN.search(invalid_boxes[0]) else ""
            problems.append(("box", f"{invalid_boxes[0]}{hint}"))
        if loose_boxes:
            problems.append(("loose box", loose_boxes[0]))
        return problems

    def matches(self, images: list, digests: list[bytes]) -> list[tuple[int, Match]]:
        """Return the test images that each image matches, with the index of the image."""
        if self.test_images is None:
            return []
        indexed_matches = []
        for index, (image, digest) in enumerate(zip(images, digests)):
            if digest not in self._matches:
                self._matches[digest] = self.test_images.find(image)
            for match in self._matches[digest]:
                indexed_matches.append((index, match))
        return indexed_matches


def validate(
    mixture: Mixture,
    num_workers: int,
    processor: ViTPProcessor | None = None,
    test_images: TestImages | None = None,
    shard: Shard | None = None,
    keep: Callable[[int, int, RowReport], None] | None = None,
    **options,
) -> list[SourceReport]:
    """Validate each row of each source once, and return a report of each source.

    A stream is read by one process. If a source cannot be read, its report has the error, and the other sources are
    still validated.

    Args:
        mixture: mixture whose sources are validated.
        num_workers: number of processes.
        processor, test_images, options: fields of [`RowChecker`].
        shard: part of the rows to validate, see [`part_of`]; all rows by default.
        keep: function that is called with the index of the source, the number of the row in it, and the row's report.
    """
    digests = set()
    reports = []
    for source_index, source in enumerate(mixture.sources):
        report = SourceReport(source.name)
        reports.append(report)
        checker = RowChecker(
            source,
            processor,
            test_images=test_images,
            **options,
        )
        try:
            rows = read_source(source)
            report.schema = schema_of_part(source, rows)
            report_rows(rows, source.spec_for(checker.image_processor), f"images of {source.name}")
            rows, numbers = part_of(rows, shard or Shard(1, 1))
            if isinstance(rows, Dataset):
                num_processes = num_workers
                num_rows = len(rows)
            else:
                num_processes = min(num_workers, 1)
                num_rows = source.rows
            loader = DataLoader(
                rows,
                BATCH_SIZE,
                num_workers=num_processes,
                collate_fn=checker,
            )
            progress = tqdm(total=num_rows, desc=source.name, unit=" rows")
            with opencv_in_one_thread(), progress:
                for number, row in zip(numbers, itertools.chain.from_iterable(loader)):
                    report.add(row, digests)
                    progress.update()
                    if keep is not None:
                        keep(source_index, number, row)
        except Exception as error:  # A reader may raise any type; the other sources must still be validated.
            report.error = " ".join(str(error).split())
        advice = None if report.has_image_files else explain_labels(source.location)
        if advice is not None:
            reports[-1] = SourceReport(source.name, error=advice)
    return reports


def part_of(rows: Dataset | IterableDataset, shard: Shard) -> tuple[Dataset | IterableDataset, Iterator[int]]:
    """Return the rows of a shard and their numbers: consecutive rows, or every n-th row of a stream."""
    if isinstance(rows, Dataset):
        numbers = shard.part(len(rows))
        return rows.select(numbers), iter(numbers)
    first = shard.number - 1
    if shard.count > 1:
        rows = rows.filter(lambda row, number: number % shard.count == first, with_indices=True)
    return rows, itertools.count(first, shard.count)


def shard_files(folder: Path, shard: Shard) -> tuple[Path, Path]:
    """Return the file with the reports of the rows, and that of the shard, which is written when the shard ends."""
    stem = f"{shard.number}-of-{shard.count}"
    return folder / f"{stem}.jsonl", folder / f"{stem}.json"


def validate_shard(
    mixture: Mixture, num_workers: int, shard: Shard, settings: Mapping[str, str], folder: Path, **options
) -> list[SourceReport]:
    """Validate a shard with [`validate`], and write its reports to `folder`."""
    rows_path, report_path = shard_files(folder, shard)
    folder.mkdir(parents=True, exist_ok=True)
    report_path.unlink(missing_ok=True)
    with rows_path.open("w") as file:

        def write_row(source_index: int, number: int, row: RowReport) -> None:
            fields = dict(vars(row))
            fields["digest"] = row.digest and row.digest.hex()
            fields["matches"] = [[image_index, vars(match)] for image_index, match in row.matches]
            file.write(json.dumps([source_index, number, fields]) + "\n")

        reports = validate(
            mixture,
            num_workers,
            shard=shard,
            keep=write_row,
            **options,
        )
    save_reports(reports, settings, report_path)
    return reports


def merge_shards(
    mixture: Mixture,
    count: int,
    settings: Mapping[str, str],
    folder: Path,
) -> list[SourceReport]:
    """Return the merged reports of `count` shards, equal to those of one run over all rows.

    Raises:
        ValueError: If a shard is missing, or has other settings or sources.
    """
    shards = list(Shard.all_of(count))
    missing_shards = []
    row_readers = []
    for shard in shards:
        rows_path, report_path = shard_files(folder, shard)
        row_readers.append(read_shard(rows_path))
        if not report_path.is_file():
            missing_shards.append(shard)
    if missing_shards:
        raise ValueError(
            f"{len(missing_shards)} of {count} shards not found in {folder}. Run --shard {missing_shards[0]} first."
        )
    reports = [SourceReport(source.name) for source in mixture.sources]
    for shard in shards:
        sources = sources_of_shard(shard, reports, settings, folder)
        for report, source_fields in zip(reports, sources.values()):
            report.schema = report.schema or source_fields["schema"]
            report.error = report.error or source_fields["error"]
    digests = set()
    # The numbers of source and row are unique, so `merge` never compares the reports.
    for source_index, _, row in heapq.merge(*row_readers, key=lambda row: row[:2]):
        reports[source_index].add(row, digests)
    return reports


def sources_of_shard(
    shard: Shard,
    reports: list[SourceReport],
    settings: Mapping[str, str],
    folder: Path,
) -> dict[str, dict]:
    """Return the fields of the reports of a shard by the name of their source.

    Raises:
        ValueError: If the shard has other settings or sources.
    """
    _, path = shard_files(folder, shard)
    content = json.loads(path.read_text())
    difference = None
    if list(content["sources"]) != [report.name for report in reports]:
        difference = "of other sources"
    for name in reversed(SHARD_SETTINGS):  # The first setting that differs is named.
        if content["settings"].get(name) != settings.get(name):
            difference = f"with another --{name}"
    if difference is not None:
        raise ValueError(f"Shard {shard} in {folder} was created {difference}. Run --shard {shard} again.")
    return content["sources"]


def read_shard(path: Path) -> Iterator[tuple[int, int, RowReport]]:
    with path.open() as file:
        for line in file:
            source_index, number, fields = json.loads(line)
            if fields["digest"] is not None:
                fields["digest"] = bytes.fromhex(fields["digest"])
            fields["problems"] = list(map(tuple, fields["problems"]))
            matches = []
            for image_index, match in fields["matches"]:
                matches.append((image_index, Match(**match)))
            fields["matches"] = matches
            yield source_index, number, RowReport(**fields)


def load_processor(name: str) -> ViTPProcessor:
    """Load the processor of a ViTP or transformers InternVL checkpoint, without its weights."""
    from ..convert.internvl import internvl_processor

    is_internvl = read_config_fields(name).get("model_type") == "internvl"
    return internvl_processor(name) if is_internvl else ViTPProcessor.from_pretrained(name)


def summary_table(reports: list[SourceReport]) -> str:
    """Return a Markdown table of all sources, with a column for each problem that was found."""
    counts_of_all = Counter()
    for report in reports:
        counts_of_all.update(report.counts)
    kinds = [kind for kind in (*ERRORS, *WARNINGS) if counts_of_all[kind]]
    header = ["source", "rows", "tiles (mean)", "tokens (median, 95%, max)", *kinds, ""]
    lines = []
    for report in reports:
        tiles = histogram(report.tiles)
        tokens = histogram(report.tokens)
        mean_tiles = "" if tiles is None else tiles["mean"]
        lengths = "not counted"
        if tokens is not None:
            lengths = f"{tokens['median']}, {tokens['p95']}, {tokens['max']}"
        verdict = "passed" if report.passed else report.error or "failed"
        counts = [report.counts[kind] for kind in kinds]
        lines.append([report.name, report.rows, mean_tiles, lengths, *counts, verdict])
    return table(header, lines)


def save_reports(reports: list[SourceReport], settings: dict[str, str], path: Path) -> bool:
    """Write the reports to a JSON file, and return whether all sources passed and any has images."""
    passed = all(report.passed for report in reports) and any(report.has_image_files for report in reports)
    sources = {report.name: report.to_dict() for report in reports}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"passed": passed, "settings": settings, "sources": sources}, indent=2) + "\n")
    return passed


def print_reports(reports: list[SourceReport]) -> None:
    """Print the schemas, the table, and the first rows of each problem."""
    for report in reports:
        if report.schema is not None:
            print(f"reads {report.name}: {report.schema}")
    print(summary_table(reports))
    if all(report.error is None and not report.has_image_files for report in reports):
        print("No row has an image. Put images into a column `image` or `images`, or name it in `columns`.")
    for report in reports:
        for kind, examples in report.examples.items():
            for example in examples[:3]:
                print(f"{report.name}, row {example['id']}: {kind}: {example['problem']}")


def card_text(reports: list[SourceReport], against: str | None) -> str:
    """Return the section of the data card with the results."""
    paragraphs = [summary_table(reports)]
    counts_of_all = Counter()
    for report in reports:
        counts_of_all.update(report.counts)
    descriptions = []
    for kind, text in {**ERRORS, **WARNINGS}.items():
        if kind in counts_of_all:
            descriptions.append(f"- {kind}: {text}")
    if descriptions:
        paragraphs.append("\n".join(descriptions))
    if against:
        num_rows = sum(report.counts["overlap"] for report in reports)
        paragraphs.append(f"Rows that share an image, or a part of one, with the test images `{against}`: {num_rows}.")
    return "\n\n".join(paragraphs)


def draw_histograms(reports: list[SourceReport], max_length: int | None, path: Path) -> None:
    """Draw histograms of tokens and tiles, with one row of plots per source."""
    figure, axes = plt.subplots(
        nrows=len(reports),
        ncols=2,
        figsize=(9, 1.2 + 1.3 * len(reports)),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    for (token_axes, tile_axes), report in zip(axes, reports):
        if report.tokens:
            longest = max(*report.tokens, max_length or 0)
            bins = np.arange(0, longest + TOKENS_PER_BIN, TOKENS_PER_BIN)
            token_axes.hist(list(report.tokens), bins=bins, weights=list(report.tokens.values()))
        else:
            token_axes.text(
                0.5,
                0.5,
                "not counted",
                transform=token_axes.transAxes,
                ha="center",
                va="center",
            )
        if max_length is not None:
            token_axes.axvline(max_length, color="tab:red", linewidth=1)
        tile_axes.bar(list(report.tiles), list(report.tiles.values()))
        tile_axes.xaxis.get_major_locator().set_params(integer=True)
        token_axes.set_ylabel(
            report.name,
            rotation=0,
            ha="right",
            va="center",
            fontsize=8,
        )
    token_label = "tokens of a row, after the drop"
    if max_length:
        token_label += " (red: max_length)"
    axes[-1, 0].set_xlabel(token_label)
    axes[-1, 1].set_xlabel("tiles of a row, thumbnails included")
    figure.savefig(path, dpi=110)
    plt.close(figure)
