"""Batches of workers against those made in the process, also while others are held, and the memory they lie in."""

import copy
import gc
import io
import multiprocessing
import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from transformers import BatchFeature

from modeling_vitp.images import shared_batches
from modeling_vitp.images.shared_batches import MOST_FREE, ToStack, share_batch

NUM_BATCHES = 40
on_linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="other systems share memory as torch does")


def made(index: int) -> dict:
    """Tiles as they are cut out of a picture, their bands side by side, and what else batches have."""
    generator = np.random.default_rng(index)
    canvas = torch.from_numpy(generator.integers(0, 256, (40, 60, 3), np.uint8)).movedim(-1, 0)
    tiles = [tile for row in canvas.split(20, -2) for tile in row.split(20, -1)]
    boxes = torch.from_numpy(generator.random((int(generator.integers(0, 5)), 4)))
    return {
        "tiles": ToStack(tiles[: generator.integers(1, 7)] * int(generator.integers(1, 20))),
        "pixels": ToStack(list(torch.from_numpy(generator.random((3, 2, 5), np.float32)))),
        "half": ToStack([torch.tensor(index / 7).bfloat16()]),
        "input_ids": torch.from_numpy(generator.integers(0, 99, (2, generator.integers(0, 9)))),
        "step": torch.tensor(index),
        "is_kept": torch.from_numpy(generator.random(7) < 0.5)[::2],
        "labels": [{"boxes": boxes, "image_id": torch.tensor([index])}, {"masks": (boxes.T > 0.5, boxes)}],
        "sample_ids": ["a", str(index)],
        "longest": index,
    }


def expected(index: int) -> dict:
    return {
        name: default_collate(value.tensors) if isinstance(value, ToStack) else value
        for name, value in made(index).items()
    }


def collate(rows: list[int]) -> dict:
    (index,) = rows
    return share_batch(made(index))


def collate_further(rows: list[int]) -> dict:
    """As someone does who adds to a batch."""
    return {**collate(rows), "twice": torch.tensor(2 * rows[0])}


def assert_equal(batch: dict, index: int) -> None:
    assert type(batch) is dict
    batch.pop("twice", None)
    assert list(batch) == list(expected(index)) and batch["sample_ids"] == ["a", str(index)]
    tensors = {name: value for name, value in expected(index).items() if name != "sample_ids"}
    torch.testing.assert_close({name: batch[name] for name in tensors}, tensors, rtol=0, atol=0)


def loader(collate_fn=collate, num_workers=1, **kwargs) -> DataLoader:
    return DataLoader(range(NUM_BATCHES), batch_size=1, collate_fn=collate_fn, num_workers=num_workers, **kwargs)


def segments_of(batches) -> int:
    """How many pieces of shared memory the worker of a running loader has."""
    (worker,) = batches._workers
    return Path(f"/proc/{worker.pid}/maps").read_text().count("memfd:vitp-batch")


@pytest.mark.parametrize("collate_fn", [collate, collate_further])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_are_those_of_the_process_and_stay_so_while_they_are_held(collate_fn, num_workers):
    batches = list(loader(collate_fn, num_workers))
    for index, batch in enumerate(batches):
        assert batch.get("twice", 2 * index) == 2 * index
        assert_equal(batch, index)


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(context):
    numbers = [{"numbers": ToStack([torch.tensor([index, 1]), torch.tensor([2, 3])])} for index in range(20)]
    data = DataLoader(numbers, None, collate_fn=share_batch, num_workers=1, multiprocessing_context=context)
    for index, batch in enumerate(list(data)):
        assert batch["numbers"].tolist() == [[index, 1], [2, 3]]


def test_tiles_keep_their_bands_side_by_side():
    for batch in loader():
        assert batch["tiles"].permute(0, 2, 3, 1).is_contiguous() and batch["pixels"].is_contiguous()


def test_a_view_keeps_its_memory():
    parts = []
    for batch in loader():
        parts.append(batch["tiles"][0, :, 3:5])
        batch["pixels"] += 1  # what is done to one tensor is done to no other
        assert batch["is_kept"].untyped_storage().nbytes() < 64
    for index, part in enumerate(parts):
        assert torch.equal(part, expected(index)["tiles"][0, :, 3:5])


@on_linux
@pytest.mark.parametrize("collate_fn", [collate, collate_further])
def test_memory_is_used_again(collate_fn):
    batches, most = iter(loader(collate_fn, prefetch_factor=2)), 0
    for _ in range(NUM_BATCHES):
        next(batches)
        most = max(most, segments_of(batches))
    assert 1 <= most <= 2 + 2 + MOST_FREE  # under way, held here and being made, free


@on_linux
def test_memory_that_many_batches_took_goes_back():
    data = loader(persistent_workers=True)
    batches = iter(data)
    held = [next(batches) for _ in range(NUM_BATCHES)]
    assert segments_of(batches) >= NUM_BATCHES
    del held
    gc.collect()
    for index, batch in enumerate(batches := iter(data)):
        assert_equal(batch, index)
    assert segments_of(batches) <= 4 + MOST_FREE


@on_linux
def test_an_epoch_that_is_left_early_takes_no_memory_along():
    data = loader(persistent_workers=True)
    for _ in range(20):
        batches = iter(data)
        next(batches)
    for index, batch in enumerate(batches := iter(data)):
        assert_equal(batch, index)
    assert segments_of(batches) <= 4 + MOST_FREE


def test_a_batch_of_another_class_stays_what_it_is():
    feature = BatchFeature({"pixel_values": torch.ones(2, 3)})
    data = DataLoader([feature] * 3, None, num_workers=1, collate_fn=share_batch)
    assert [type(batch) for batch in data] == [BatchFeature] * 3


def copied(rows: list[int]) -> dict:
    """A batch beside copies of it that are changed, of every kind."""
    (index,) = rows
    batch, file = share_batch({"values": torch.full((1000,), index)}), io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    copies = copy.deepcopy(batch), pickle.loads(pickle.dumps(batch)), torch.load(file, weights_only=False)
    for other in copies:
        other["values"] += 1
    batch["copies"] = [other["values"] for other in copies]
    return batch


def test_a_copy_in_a_worker_is_one():
    for index, batch in enumerate(loader(copied)):
        assert (batch["values"] == index).all()
        assert [set(values.tolist()) for values in batch["copies"]] == [{index + 1}] * 3


class Echo(torch.utils.data.IterableDataset):
    def __iter__(self):
        for index in range(30):
            batch = share_batch({"values": torch.full((1000,), index)})
            yield from (batch, batch)


def test_a_batch_that_is_sent_twice_is_there_twice():
    batches = DataLoader(Echo(), None, num_workers=1, prefetch_factor=3, collate_fn=lambda batch: batch)
    for index, batch in enumerate(batches):
        time.sleep(0.01)  # a step
        assert (batch["values"] == index // 2).all()
        del batch


def test_a_batch_that_cannot_be_received_says_what_may_help():
    class Handle:
        def detach(self):
            raise EOFError

    with pytest.raises(RuntimeError, match="too many files are open: raise `ulimit -n`, or share by names"):
        shared_batches._arrived(Handle(), {})


def without_some(rows: list[int]) -> dict:
    """Batches without a tensor, or from which all are taken again, among others."""
    (index,) = rows
    batch = share_batch({"index": index} if index % 3 == 0 else {"index": index, "values": torch.full((1000,), index)})
    if index % 3 == 1:
        batch.pop("values")
    return batch


def test_batches_that_hold_no_tensor_give_nothing_of_others_back():
    for batch in loader(without_some, prefetch_factor=6):
        time.sleep(0.01)  # a step, in which the worker makes others
        if batch["index"] % 3 == 2:
            assert (batch["values"] == batch["index"]).all()


class MadeByThreads(torch.utils.data.IterableDataset):
    def __iter__(self):
        def make(index: int) -> dict:
            return share_batch({"values": ToStack([torch.full((100,), index)] * 2), "index": index})

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(8) as pool:
            yield from pool.map(make, range(1500))
        sys.setswitchinterval(interval)


def test_threads_of_a_worker_share_no_memory():
    for batch in DataLoader(MadeByThreads(), None, num_workers=1, collate_fn=lambda batch: batch):
        assert (batch["values"] == batch["index"]).all()


@on_linux
def test_a_process_that_is_forked_keeps_what_it_was_given():
    context = multiprocessing.get_context("fork")
    goes_on, found = context.Event(), context.Queue()

    def look(index: int, batch: dict) -> None:
        goes_on.wait(60)
        found.put((index, torch.equal(batch["tiles"], expected(index)["tiles"])))

    lookers, batches = [], iter(loader(prefetch_factor=2))
    for index in range(NUM_BATCHES):
        batch = next(batches)
        if index % 3 == 0:
            lookers.append(context.Process(target=look, args=(index, batch)))
            lookers[-1].start()
        del batch
    goes_on.set()
    assert sorted(found.get(timeout=60) for _ in lookers) == [(index, True) for index in range(0, NUM_BATCHES, 3)]
    assert segments_of(batches) <= 4 + MOST_FREE < len(lookers)  # what was given to others is not kept here
    for looker in lookers:
        looker.join()


def test_torch_sends_batches_where_it_is_told_to_share_by_names():
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        for index, batch in enumerate(loader()):
            assert_equal(batch, index)
            assert batch["step"].is_shared()
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


@pytest.mark.parametrize("error", [AttributeError, PermissionError])
def test_where_files_in_memory_are_not_to_be_had_torch_sends_batches(monkeypatch, error):
    def memfd_create(name):
        raise error

    monkeypatch.setattr(os, "memfd_create", memfd_create, raising=False)
    shared_batches._has_memory_files.cache_clear()
    for index, batch in enumerate(loader()):
        assert_equal(batch, index)
        assert batch["step"].is_shared()
    shared_batches._has_memory_files.cache_clear()
