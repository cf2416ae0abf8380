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
from transformers import AutoConfig

from ..cards.sections import table
from ..command.paths import Shard
from ..image_processing_vitp import ViTPImageProcessor
from ..processing_vitp import ViTPProcessor, check_messages, message_texts
from .answer_prior import AnswerPrior
from .boxes import wrong_boxes
from .collator import SampleLength, num_tiles
from .mixture import Mixture, schema_of_part
from .overlap import Match, TestImages, opencv_in_one_thread, pixel_digest
from .rows import check_answers, load_images
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

    def add(self, row: RowReport, seen: set[bytes]) -> None:
        """Add a row to the counts, and its digest to `seen`, the digests of the earlier rows of the mixture."""
        self.rows += 1
        problems = [*row.problems, *([("duplicate", WARNINGS["duplicate"])] if row.digest in seen else [])]
        seen.update({row.digest} - {None})
        for place, match in row.matches:
            self.overlap.append({"id": row.id, "image": place, **vars(match)})
            problems.append(("overlap", f"image {place}: {match.kind} of {match.test_image}, {match.score:.2f}"))
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
    values, numbers = np.array(sorted(counts.items())).T
    shares = numbers.cumsum() / numbers.sum()
    return {
        "mean": round(float((values * numbers).sum() / numbers.sum()), 2),
        "median": int(values[np.searchsorted(shares, 0.5)]),
        "p95": int(values[np.searchsorted(shares, 0.95)]),
        "max": int(values[-1]),
        "counts": {int(value): int(number) for value, number in zip(values, numbers)},
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
        processor, self.length = self.processor, None
        self.image_processor = ViTPImageProcessor() if processor is None else copy.copy(processor.image_processor)
        self.image_processor.max_patches = self.max_patches or self.image_processor.max_patches
        if self.input_spec is not None:
            self.image_processor = self.image_processor.with_input_spec(self.input_spec)
        if processor is not None:
            processor = copy.copy(processor)
            processor.image_processor = self.image_processor
            self.length = SampleLength(processor, vrl_drop_ratio=self.vrl_drop_ratio)
        self._matches = {}  # Matches by image digest, because many rows share an image.

    def __call__(self, rows: list[dict]) -> list[RowReport]:
        return [self.check(row) for row in rows]

    def check(self, row: dict) -> RowReport:
        problems, images = [], []
        if row["error"]:
            kind = "image places" if "image place" in row["error"] else "malformed"
            return RowReport(row["id"], [(kind, row["error"])], 0, None, None, [])
        spec = self.source.spec_for(self.image_processor)
        for place, stored in enumerate(row["images"]):
            try:
                images += load_images({"images": [stored]}, spec)
            except ValueError as error:
                is_missing = isinstance(error.__cause__, FileNotFoundError)
                text = str(error).replace("image 0", f"image {place}", 1)
                problems.append(("image missing" if is_missing else "image unreadable", text))
                continue
            if getattr(images[-1], "mode", None) != "RGB":
                try:
                    self.image_processor(images[-1:], **self.source.images_kwargs)
                except ValueError as error:
                    problems.append(("image not taken", f"image {place}: {error}"))
        problems += self.check_messages(row)
        is_whole = len(images) == len(row["images"])
        tiles = sum(num_tiles(images, self.source, self.image_processor))
        tokens = None
        if self.length is not None and is_whole and not {"malformed", "image places"} & {kind for kind, _ in problems}:
            tokens = self.length.num_tokens(row["messages"], images, self.source)
            if self.max_length is not None and tokens > self.max_length:
                problems.append(("too long", f"{tokens} tokens, max_length={self.max_length}"))
        digests = [pixel_digest(image) for image in images]
        digest = None
        if is_whole:
            content = json.dumps(row["messages"], sort_keys=True).encode()
            digest = hashlib.sha256(b"".join(digests) + content).digest()[:16]
        return RowReport(row["id"], problems, tiles, tokens, digest, self.matches(images, digests))

    def check_messages(self, row: dict) -> list[tuple[str, str]]:
        messages, problems = row["messages"], []
        try:
            check_messages(messages)
        except ValueError as error:
            return [("malformed", str(error))]
        num_places = sum(part["type"] == "image" for message in messages for part in message["content"])
        if num_places != len(row["images"]):
            problems.append(("image places", f"{len(row['images'])} image(s), {num_places} image place(s)"))
        try:
            check_answers(messages)
        except ValueError as error:
            problems.append(("empty answer", str(error)))
        for index, message in enumerate(messages):
            wrong, loose = wrong_boxes("".join(message_texts(message)))
            if "grounding" in self.source.tasks:
                wrong, loose = wrong + loose, []
            problems += [
                ("box", f"message {index}: {box}{PIXELS if PIXELS_IN.search(box) else ''}") for box in wrong[:1]
            ]
            problems += [("loose box", f"message {index}: {box}") for box in loose[:1]]
        return problems

    def matches(self, images: list, digests: list[bytes]) -> list[tuple[int, Match]]:
        if self.test_images is None:
            return []
        found = []
        for place, (image, digest) in enumerate(zip(images, digests)):
            if digest not in self._matches:
                self._matches[digest] = self.test_images.find(image)
            found += [(place, match) for match in self._matches[digest]]
        return found


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
    seen, reports = set(), []
    for place, source in enumerate(mixture.sources):
        report = SourceReport(source.name)
        reports.append(report)
        checker = RowChecker(source, processor, test_images=test_images, **options)
        try:
            rows = read_source(source)
            report.schema = schema_of_part(source, rows)
            rows, numbers = part_of(rows, shard or Shard(1, 1))
            is_map_style = isinstance(rows, Dataset)
            workers = num_workers if is_map_style else min(num_workers, 1)
            loader = DataLoader(rows, BATCH_SIZE, num_workers=workers, collate_fn=checker)
            progress = tqdm(total=len(rows) if is_map_style else source.rows, desc=source.name, unit=" rows")
            with opencv_in_one_thread(), progress:
                for number, row in zip(numbers, itertools.chain.from_iterable(loader)):
                    report.add(row, seen)
                    progress.update()
                    if keep is not None:
                        keep(place, number, row)
        except Exception as error:  # A reader may raise any type; the other sources must still be validated.
            report.error = " ".join(str(error).split())
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
    rows, report = shard_files(folder, shard)
    folder.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    with rows.open("w") as file:

        def keep(source: int, number: int, row: RowReport) -> None:
            fields = vars(row) | {"digest": row.digest and row.digest.hex()}
            fields["matches"] = [[place, vars(match)] for place, match in row.matches]
            file.write(json.dumps([source, number, fields]) + "\n")

        reports = validate(mixture, num_workers, shard=shard, keep=keep, **options)
    save_reports(reports, settings, report)
    return reports


def merge_shards(mixture: Mixture, count: int, settings: Mapping[str, str], folder: Path) -> list[SourceReport]:
    """Return the merged reports of `count` shards, equal to those of one run over all rows.

    Raises:
        ValueError: If a shard is missing, or has other settings or sources.
    """
    shards = {shard: shard_files(folder, shard) for shard in Shard.all_of(count)}
    missing = [str(shard) for shard, (_, report) in shards.items() if not report.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {count} shards not found in {folder}. Run --shard {missing[0]} first.")
    reports = [SourceReport(source.name) for source in mixture.sources]
    for shard, (_, path) in shards.items():
        found = json.loads(path.read_text())
        changed = [name for name in SHARD_SETTINGS if found["settings"].get(name) != settings.get(name)]
        if changed or list(found["sources"]) != [report.name for report in reports]:
            difference = f"with another --{changed[0]}" if changed else "of other sources"
            raise ValueError(f"Shard {shard} in {folder} was created {difference}. Run --shard {shard} again.")
        for report, of_shard in zip(reports, found["sources"].values()):
            report.schema, report.error = report.schema or of_shard["schema"], report.error or of_shard["error"]
    seen = set()
    # The key is unique, so `merge` never compares the reports.
    for source, _, row in heapq.merge(*(read_shard(rows) for rows, _ in shards.values()), key=lambda row: row[:2]):
        reports[source].add(row, seen)
    return reports


def read_shard(path: Path) -> Iterator[tuple[int, int, RowReport]]:
    with path.open() as file:
        for source, number, fields in map(json.loads, file):
            fields["digest"] = fields["digest"] and bytes.fromhex(fields["digest"])
            fields["problems"] = [tuple(problem) for problem in fields["problems"]]
            fields["matches"] = [(place, Match(**match)) for place, match in fields["matches"]]
            yield source, number, RowReport(**fields)


def load_processor(name: str) -> ViTPProcessor:
    """Load the processor of a ViTP or transformers InternVL checkpoint, without its weights."""
    from ..convert.internvl import internvl_processor

    is_internvl = AutoConfig.from_pretrained(name).model_type == "internvl"
    return internvl_processor(name) if is_internvl else ViTPProcessor.from_pretrained(name)


def summary_table(reports: list[SourceReport]) -> str:
    """Return a Markdown table of all sources, with a column for each problem that was found."""
    kinds = [kind for kind in (*ERRORS, *WARNINGS) if any(report.counts[kind] for report in reports)]
    header = ["source", "rows", "tiles (mean)", "tokens (median, 95%, max)", *kinds, ""]
    lines = []
    for report in reports:
        tiles, tokens = histogram(report.tiles), histogram(report.tokens)
        lengths = f"{tokens['median']}, {tokens['p95']}, {tokens['max']}" if tokens else "not counted"
        verdict = "passed" if report.passed else report.error or "failed"
        cells = [report.name, report.rows, tiles["mean"] if tiles else "", lengths]
        lines.append([*cells, *(report.counts[kind] for kind in kinds), verdict])
    return table(header, lines)


def save_reports(reports: list[SourceReport], settings: dict[str, str], path: Path) -> bool:
    """Write the reports to a JSON file, and return whether all sources passed and any has images."""
    passed = all(report.passed for report in reports) and has_images(reports)
    sources = {report.name: report.to_dict() for report in reports}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"passed": passed, "settings": settings, "sources": sources}, indent=2) + "\n")
    return passed


def has_images(reports: list[SourceReport]) -> bool:
    """Return whether a row of any source has an image."""
    return any(number for report in reports for number in report.tiles)


def print_reports(reports: list[SourceReport]) -> None:
    """Print the schemas, the table, and the first rows of each problem."""
    for report in reports:
        if report.schema is not None:
            print(f"reads {report.name}: {report.schema}")
    print(summary_table(reports))
    if not has_images(reports):
        print("No row has an image. Put images into a column `image` or `images`, or name it in `columns`.")
    for report in reports:
        for kind, examples in report.examples.items():
            for example in examples[:3]:
                print(f"{report.name}, row {example['id']}: {kind}: {example['problem']}")


def card_text(reports: list[SourceReport], against: str | None) -> str:
    """Return the section of the data card with the results."""
    kinds = {kind for report in reports for kind in report.counts}
    found = [f"- {kind}: {text}" for kind, text in (ERRORS | WARNINGS).items() if kind in kinds]
    paragraphs = [summary_table(reports), "\n".join(found)]
    if against:
        rows = sum(report.counts["overlap"] for report in reports)
        paragraphs.append(f"Rows that share an image, or a part of one, with the test images `{against}`: {rows}.")
    return "\n\n".join(filter(None, paragraphs))


def draw_histograms(reports: list[SourceReport], max_length: int | None, path: Path) -> None:
    """Draw histograms of tokens and tiles, with one row of plots per source."""
    figure, axes = plt.subplots(
        len(reports), 2, figsize=(9, 1.2 + 1.3 * len(reports)), layout="constrained", squeeze=False, sharex="col"
    )
    for (left, right), report in zip(axes, reports):
        if report.tokens:
            bins = np.arange(0, max(*report.tokens, max_length or 0) + TOKENS_PER_BIN, TOKENS_PER_BIN)
            left.hist(list(report.tokens), bins=bins, weights=list(report.tokens.values()))
        else:
            left.text(0.5, 0.5, "not counted", transform=left.transAxes, ha="center", va="center")
        if max_length is not None:
            left.axvline(max_length, color="tab:red", linewidth=1)
        right.bar(list(report.tiles), list(report.tiles.values()))
        right.xaxis.get_major_locator().set_params(integer=True)
        left.set_ylabel(report.name, rotation=0, ha="right", va="center", fontsize=8)
    axes[-1, 0].set_xlabel("tokens of a row, after the drop" + (" (red: max_length)" if max_length else ""))
    axes[-1, 1].set_xlabel("tiles of a row, thumbnails included")
    figure.savefig(path, dpi=110)
    plt.close(figure)
