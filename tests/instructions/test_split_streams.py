"""Mixtures with `split_streams`, in which each worker of each process reads its own part."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from modeling_vitp import ViTPTrainer, ViTPTrainingConfig
from modeling_vitp.instructions import sources
from modeling_vitp.instructions.collator import STEP
from modeling_vitp.instructions.mixture import load_mixture, open_mixture
from modeling_vitp.training.batching import EARLIEST_STEP, StepStream

FILES, ROWS = 6, 10  # Number of files of the Parquet source, and of rows per file.
OTHERS = {"lines": 23, "stored": 9}
RATES = {"parquet": 1, "lines": 1, "stored": 2}
READERS = [(3, 2), (4, 1)]  # Processes and workers; the files cannot be divided among the last.


def conversation(number: int) -> dict:
    return {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": str(number)}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    (folder / "parquet").mkdir()
    for file in range(FILES):
        rows = [conversation(ROWS * file + row) | {"id": f"{file}-{row}"} for row in range(ROWS)]
        Dataset.from_list(rows).to_parquet(folder / "parquet" / f"train-{file:05d}.parquet")
    for name, number in OTHERS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(conversation(row)) + "\n" for row in range(number)))
    return folder


def opened(folder, seed=0, only=tuple(RATES), **fields):
    places = {"parquet": {"folder": "parquet"}} | {name: {"annotation": f"{name}.jsonl"} for name in OTHERS}
    rows = {"parquet": FILES * ROWS, **OTHERS}
    entries = [
        {"name": name, "rate": RATES[name], "rows": rows[name], "streaming": name != "stored", **places[name]}
        for name in only
    ]
    fields = {"split_streams": True, "shuffle_buffer": 8, **fields}
    return open_mixture(load_mixture({"root": str(folder), "sources": entries, **fields}), seed)


def content_of(row: dict) -> tuple[str, str]:
    """Return the source and the answer of a row, which are unique."""
    return row["source"], row["messages"][-1]["content"][0]["text"]


def pass_of(row: dict) -> int:
    """Return the pass over the source, from 0, of a row by its id; each pass has `rate` copies of a row."""
    copy = int(row["id"].partition("#")[2] or 1) - 1
    return copy // RATES[row["source"]]


def rows_of(stream, processes, process, workers, worker, monkeypatch):
    """Return the endless rows of a part."""
    with monkeypatch.context() as patch:
        info = SimpleNamespace(id=worker, num_workers=workers)
        patch.setattr(torch.utils.data, "get_worker_info", lambda: info)
        return iter(stream.of_process(processes, process))


def passes(rows, number: int) -> list[list[dict]]:
    """Return the rows of the first passes over a part."""
    return [list(group) for _, group in itertools.islice(itertools.groupby(rows, pass_of), number)]


def all_parts(folder, processes, workers, monkeypatch, number=2, **options):
    stream = opened(folder, **options)
    return [
        passes(rows_of(stream, processes, process, workers, worker, monkeypatch), number)
        for process in range(processes)
        for worker in range(workers)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), READERS)
def test_parts_yield_every_copy_once(folder, processes, workers, monkeypatch):
    parts = all_parts(folder, processes, workers, monkeypatch)
    expected = Counter(map(content_of, opened(folder, split_streams=False)))
    assert sum(expected.values()) == FILES * ROWS + OTHERS["lines"] + 2 * OTHERS["stored"]
    for number in range(2):
        rows = [row for part in parts for row in part[number]]
        assert Counter(map(content_of, rows)) == expected
        assert len({row["id"] for row in rows}) == len(rows) and set(map(pass_of, rows)) == {number}
    first, second = parts[0]
    assert list(map(content_of, first)) != list(map(content_of, second))


@pytest.mark.parametrize(("processes", "workers"), READERS)
def test_part_reads_its_own_files(folder, processes, workers, monkeypatch):
    read = []
    monkeypatch.setattr(sources, "all_rows", lambda rows: (read.append(row) or row for row in rows))
    by_part, seen = [], set()
    for process, worker in itertools.product(range(processes), range(workers)):
        read.clear()
        rows = rows_of(opened(folder, only=["parquet"]), processes, process, workers, worker, monkeypatch)
        seen |= set(map(content_of, passes(rows, 1)[0]))
        by_part.append(len(read))
    assert len(seen) == FILES * ROWS
    parts = processes * workers
    # To see the end of a pass, the shuffle buffer of the next pass is read.
    expected = FILES // parts * ROWS if FILES % parts == 0 else FILES * ROWS
    assert all(expected <= number <= 2 * expected for number in by_part)


def test_parts_match_loader_workers(folder, monkeypatch):
    for process in range(2):
        loader = DataLoader(
            opened(folder).of_process(2, process), batch_size=1, num_workers=2, collate_fn=lambda rows: rows[0]["id"]
        )
        workers = [rows_of(opened(folder), 2, process, 2, worker, monkeypatch) for worker in range(2)]
        expected = [next(workers[number % 2])["id"] for number in range(20)]
        assert list(itertools.islice(loader, 20)) == expected


def test_parts_depend_on_seed(folder, monkeypatch):
    parts = [rows_of(opened(folder, seed), 2, 0, 2, 0, monkeypatch) for seed in (0, 0, 1)]
    first, again, other = ([row["id"] for row in itertools.islice(part, 20)] for part in parts)
    assert first == again != other


def test_parts_of_one_stream_differ(folder):
    stream = opened(folder)
    parts = [stream.of_process(2, process) for process in range(2)]
    ids = [{row["id"] for row in itertools.islice(part, 30)} for part in parts]
    assert not ids[0] & ids[1]
    assert [row["id"] for row in stream] == [row["id"] for row in opened(folder, split_streams=False)]


def of_rate(folder, rate, seed=0, **fields):
    """Return a mixture of the Parquet source only."""
    entry = {"name": "parquet", "folder": "parquet", "rate": rate, "rows": FILES * ROWS, "streaming": True}
    return open_mixture(load_mixture({"root": str(folder), "sources": [entry], "split_streams": True, **fields}), seed)


@pytest.mark.parametrize("resample", ["epoch", "once"])
def test_part_draws_fractional_rate(folder, monkeypatch, resample):
    for process in range(3):
        stream = of_rate(folder, 0.5, resample=resample)
        first, second = passes(rows_of(stream, 3, process, 1, 0, monkeypatch), 2)
        assert len(first) == len(second) == FILES * ROWS // 6
        contents = [set(map(content_of, rows)) for rows in (first, second)]
        assert (contents[0] == contents[1]) == (resample == "once")


@pytest.mark.slow
def test_parts_round_tiny_rates_at_random(folder):
    seeds, parts, rate = 40, FILES, 0.03  # A pass has 0.3 rows of a part, and 1.8 rows of all parts.
    found = [
        sum(1 for row in rows._shuffled(0, parts, part, 0))
        for rows in (of_rate(folder, rate, seed) for seed in range(seeds))
        for part in range(parts)
    ]
    expected, spread = rate * ROWS, (rate * ROWS * (1 - rate * ROWS) / len(found)) ** 0.5
    assert np.mean(found) == pytest.approx(expected, abs=4 * spread)
    # A pass without rows does not end the stream.
    rows = of_rate(folder, rate).of_process(parts, 0)
    assert len({row["id"] for row in itertools.islice(rows, 5)}) == 5


@pytest.mark.parametrize("parts", [2, 4], ids=["files of its own", "every n-th row"])
def test_part_continues_after_broken_connection(folder, monkeypatch, parts):
    source = of_rate(folder, 1).mixture.sources[0]
    whole = list(sources.stream_rows(source, parts, 1))
    read, left = sources.all_rows, iter([3, 17])

    def breaking(rows):
        yield from itertools.islice(read(rows), next(left, None))
        raise ConnectionError("reset by peer")

    def until_it_holds(rows):
        return breaking(rows) if left.__length_hint__() else read(rows)

    pauses = []
    monkeypatch.setattr(sources, "all_rows", until_it_holds)
    monkeypatch.setattr(sources, "pause", lambda *args: pauses.append(args))
    assert list(sources.stream_rows(source, parts, 1)) == whole
    assert len(pauses) == 2


def test_damaged_part_names_the_source(folder, monkeypatch):
    source = of_rate(folder, 1).mixture.sources[0]

    def damaged(*_):
        raise ValueError("line 3 is not valid JSON")
        yield

    monkeypatch.setattr(sources, "stored_rows", damaged)
    monkeypatch.setattr(sources, "download_line_files", lambda _: pytest.fail("the rows of others would be read, too"))
    with pytest.raises(ValueError, match="Source 'parquet', row 0: .*line 3 is not valid JSON"):
        list(sources.stream_rows(source, 2, 1))


def test_split_streams_of_released_mixture_is_refused(folder):
    entry = {"name": "lines", "annotation": "lines.jsonl", "rows": 23, "rate": 0.5, "streaming": True}
    mixture = {"root": str(folder), "split_streams": True, "released_compatible": True, "sources": [entry]}
    with pytest.raises(ValueError, match="split_streams .*'lines'"):
        load_mixture(mixture)


def test_part_without_rows_raises_error(tmp_path, folder, monkeypatch):
    lines = (folder / "lines.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "lines.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(ValueError, match="split_streams: one of 3 workers"):
        next(rows_of(opened(tmp_path, only=["lines"]), 3, 2, 1, 0, monkeypatch))


@pytest.mark.slow
def test_resumed_run_reads_the_remaining_rows(folder, tmp_path, model, processor):
    def train(output, resume=None, **options):
        fields = {"max_steps": 10, "save_steps": 6, "per_device_train_batch_size": 16, "learning_rate": 1e-3}
        fields |= {"dataloader_num_workers": 2, "bf16": False, "gradient_checkpointing": False, "watch_samples": 0}
        config = ViTPTrainingConfig(str(output), allow_text_only=True, report_to="none", **fields)
        trainer = ViTPTrainer(model, config, train_dataset=opened(folder, **options), processing_class=processor)
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    start = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint = str(tmp_path / "run" / "checkpoint-6")
    whole = train(tmp_path / "run")
    model.load_state_dict(start)
    resumed = train(tmp_path / "run", resume=checkpoint)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(ValueError, match="how sources are mixed"):
        train(tmp_path / "run", resume=checkpoint, split_streams=False)


def test_trainer_assigns_parts_to_processes(folder, tmp_path, model, processor, monkeypatch):
    config = ViTPTrainingConfig(str(tmp_path), max_steps=1, bf16=False, report_to="none")
    trainer = ViTPTrainer(model, config, train_dataset=opened(folder), processing_class=processor)
    sharding = {"accumulation_steps": 2, "num_processes": 2, "process_index": 1, "drop_last": False}
    monkeypatch.setattr(trainer, "_sharding", lambda: dict(sharding))
    rows = trainer._rank_stream(trainer.train_dataset, 4)
    expected = itertools.islice(opened(folder).of_process(2, 1), 60)
    assert [row["id"] for row in itertools.islice(rows, 60)] == [row["id"] for row in expected]


def test_warmup_row_has_its_step(folder, monkeypatch):
    """Check steps of rows; batches come from endless workers in turn, so that each of two has every second batch."""
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=1, num_workers=2))
    stream = StepStream(opened(folder).of_process(1, 0), batch_size=2)
    stream.begin(10)
    steps = [(row[STEP], row[EARLIEST_STEP]) for row in itertools.islice(stream, 6)]
    assert steps == [(11, 11), (11, 11), (13, 13), (13, 13), (15, 15), (15, 15)]
