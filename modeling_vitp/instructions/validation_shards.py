"""A validation in shards: what each has found in its rows, in files, and the report of all of them."""

import heapq
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..command.paths import Shard
from .mixture_file import Mixture
from .overlap import Match
from .validation import RowReport, SourceReport, save_reports, validate

# What decides what is found, and so has to be the same in all shards.
OF_ROWS = (
    "mixture",
    "processor",
    "max_length",
    "vrl_drop_ratio",
    "max_patches",
    "input_spec",
    "against",
    "against_split",
)


def shard_files(folder: Path, shard: Shard) -> tuple[Path, Path]:
    """What it found in each row, and its own report, which is there if the shard has ended."""
    stem = f"{shard.number}-of-{shard.count}"
    return folder / f"{stem}.jsonl", folder / f"{stem}.json"


def validate_shard(
    mixture: Mixture, num_workers: int, shard: Shard, settings: Mapping[str, str], folder: Path, **options
) -> list[SourceReport]:
    """What is found in a shard, see [`~modeling_vitp.instructions.validation.validate`], which is left in `folder`."""
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
    """The reports that one run over all rows gives, from the files of `count` shards.

    Raises:
        ValueError: if a shard is not there, or had other settings or sources.
    """
    shards = {shard: shard_files(folder, shard) for shard in Shard.all_of(count)}
    missing = [str(shard) for shard, (_, report) in shards.items() if not report.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {count} shards are not in {folder}: give --shard {missing[0]} first.")
    reports = [SourceReport(source.name) for source in mixture.sources]
    for shard, (_, path) in shards.items():
        found = json.loads(path.read_text())
        changed = [name for name in OF_ROWS if found["settings"].get(name) != settings.get(name)]
        if changed or list(found["sources"]) != [report.name for report in reports]:
            what = f"with another --{changed[0]}" if changed else "of other sources"
            raise ValueError(f"Shard {shard} in {folder} was made {what}: give --shard {shard} again.")
        for report, of_shard in zip(reports, found["sources"].values()):
            report.schema, report.error = report.schema or of_shard["schema"], report.error or of_shard["error"]
    seen = set()
    # A row is compared by its source and its number alone, of which no two are the same.
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
