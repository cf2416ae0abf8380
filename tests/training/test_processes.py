"""Training on one process compared with training on two processes, started by `torchrun`."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import launch, torchrun
from paths import ROOT
from torch.utils.data import DataLoader
from training_run import FEATURES, make_rows, run_ranks

from modeling_vitp.training.batching import GlobalBatchSampler, RankStream
from modeling_vitp.training.checkpointing import last_checkpoint

ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
FILES, ROWS = 4, 5  # files of the split stream, and rows per file
TRAINED = ["accumulated", "rebalanced", "checkpointed", "padding_free", "stream", "warmup", "stream_warmup", "patches"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folders = {world: tmp_path_factory.mktemp(f"processes-{world}") for world in (1, 2)}
    for folder in folders.values():
        (folder / "rows").mkdir()
        for file in range(FILES):
            rows = make_rows(ROWS).to_list()
            for number, row in enumerate(rows):
                row["messages"][-1]["content"] = f"{file} and {number}"
            Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "rows" / f"train-{file:05d}.parquet")
    for world, folder in folders.items():
        codes = launch(world, folder / "output.txt", "distributed_run.py", str(folder))
        assert codes == [0] * world, (folder / "output.txt").read_text()[-3000:]
    return folders


def check_gradients(one: dict, two: dict) -> None:
    """Check that gradients are equal to 1e-5 of their norm, and that the gradients of the ViT are not zero.

    The gradient of a bias of keys is zero except for rounding, because attention does not change if all keys are
    shifted.
    """
    assert one.keys() == two.keys()
    rounding = 1e-7 * sum(gradient.norm() ** 2 for gradient in one.values()) ** 0.5
    for name, expected in one.items():
        assert (two[name] - expected).norm() <= 1e-5 * max(expected.norm(), rounding), name
    assert all(gradient.norm() > 0 for name, gradient in one.items() if "vision_tower.encoder" in name)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_two_processes_killed_while_saving_are_exact(tmp_path, stream):
    """`torchrun` starts a run on rows that is killed, and ends its other process. All others are faster forks."""

    def run(folder, **options):
        if stream or options.get("kill") != ["optimizer", 4]:
            return max(map(abs, run_ranks(2, tmp_path / folder, stream=stream, **options)))
        return torchrun(2, tmp_path / "output.txt", "training_run.py", str(tmp_path / folder), json.dumps(options))

    assert run("whole") == 0
    for stage, step in (("optimizer", 4), ("before the record", 6)):
        assert run("killed", kill=[stage, step]) != 0
    assert Path(last_checkpoint(tmp_path / "killed")).name == "checkpoint-4"
    assert run("killed") == 0
    whole, killed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert killed == whole


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)], ids=["more", "fewer"])
def test_first_log_equals_one_process(tmp_path, worlds):
    """The mean that is logged after the stop includes the step before it."""
    options = {"drop_path_rate": 0.0, "eval_strategy": "no", "lr_scheduler_type": "constant", "logging_steps": 3}

    def losses(folder, world, max_steps):
        changes = {"gradient_accumulation_steps": 2 // world, "max_steps": max_steps}
        assert run_ranks(world, tmp_path / folder, **options | changes) == [0] * world
        log = json.loads((tmp_path / folder / "summary.json").read_text())["log"]
        return [entry["loss"] for entry in log if "loss" in entry]

    whole = losses("whole", 1, 6)
    losses("stopped", worlds[0], 2)
    assert losses("stopped", worlds[1], 6) == pytest.approx(whole, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_ddp_step_equals_one_process(results, name):
    logs = {world: json.loads((folder / f"{name}.json").read_text()) for world, folder in results.items()}
    gradients = {world: torch.load(folder / f"{name}.pt") for world, folder in results.items()}
    assert len(gradients[1]) == len(gradients[2]) == 6
    for one, two in zip(logs[1]["log"], logs[2]["log"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
        assert two["learning_rate"] == one["learning_rate"]
        assert two.get("vrl_drop_ratio") == one.get("vrl_drop_ratio")
        assert two.get("patch_drop_ratio") == one.get("patch_drop_ratio")
    for one, two in zip(gradients[1], gradients[2]):
        check_gradients(one, two)
    if "warmup" in name:
        assert [entry["vrl_drop_ratio"] for entry in logs[2]["log"]] == [0.0] * 4 + [0.75] * 2
    if name == "patches":
        assert [entry["patch_drop_ratio"] for entry in logs[2]["log"]] == [0.5] * 4 + [0.0] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_uneven_epoch_is_shared_without_loss(results, name):
    everything = sorted(make_rows()["id"])
    for folder in results.values():
        ids = json.loads((folder / f"{name}.json").read_text())["ids"]
        assert len({len(batches) for batches in ids}) == 1
        num_batches = len(ids[0]) // 2  # for a stream, one more batch is read in advance
        for epoch in (slice(0, num_batches), slice(num_batches, 2 * num_batches)):
            seen = [row for batches in ids for batch in batches[epoch] for row in batch]
            assert sorted(seen) == everything


@pytest.mark.slow
def test_two_processes_train_on_split_stream(results):
    """Each process reads its own files. Its first ten rows are one pass, and then it starts again."""
    one, two = json.loads((results[2] / "split.json").read_text())
    assert one["weights"] == two["weights"]
    rows = [[row for batch in process["rows"] for row in batch] for process in (one, two)]
    first_pass = FILES * ROWS // 2
    assert min(len(own) for own in rows) >= first_pass + 2
    ids = [[row_id for row_id, _ in own] for own in rows]
    assert sorted(ids[0][:first_pass] + ids[1][:first_pass]) == sorted(f"rows/{row}" for row in range(FILES * ROWS))
    assert all(row_id.endswith("#2") for own in ids for row_id in own[first_pass:])
    files = [Counter(answer.partition(" ")[0] for _, answer in own[:first_pass]) for own in rows]
    assert all(set(own.values()) == {ROWS} for own in files)
    assert sorted([*files[0], *files[1]]) == [str(file) for file in range(FILES)]


@pytest.mark.slow
def test_evaluation_loss_equals_one_process(results):
    one, two = (json.loads((results[world] / "evaluated.json").read_text()) for world in (1, 2))
    assert two == one


@pytest.mark.slow
def test_uneven_evaluation_scores_each_row_once(results):
    one, two = (json.loads((results[world] / "scored.json").read_text()) for world in (1, 2))
    assert two == one
    assert all(len(rows) == 5 for rows in one.values()) and len(one) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_patches"])
def test_fsdp2_step_equals_one_process(results, name):
    one, two = (torch.load(results[world] / f"{name}.pt") for world in (1, 2))
    assert two["loss"].item() == pytest.approx(one["loss"].item(), abs=1e-6)
    assert all(gradient is not None for gradient in two["gradients"].values())
    check_gradients(one["gradients"], two["gradients"])


@settings(max_examples=50)
@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    processes=st.integers(1, 4),
    strategy=st.sampled_from(["random", "sequential", "group_by_length", "batch_rebalance"]),
    epoch=st.integers(0, 3),
)
def test_epoch_rows_are_in_one_batch_each(num_rows, batch_size, accumulation, processes, strategy, epoch):
    def batches(rank, number=processes, steps=accumulation):
        lengths = [1 + 37 * row % 50 for row in range(num_rows)]
        sampler = GlobalBatchSampler(
            num_rows, batch_size, steps, number, rank, seed=5, strategy=strategy, lengths=lambda: lengths
        )
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        return batches

    by_rank = [batches(rank) for rank in range(processes)]
    assert len({len(own) for own in by_rank}) == 1
    assert sorted(row for own in by_rank for batch in own for row in batch) == list(range(num_rows))
    # Each optimizer step has the rows of a single process with more accumulation steps.
    alone = batches(0, 1, accumulation * processes)
    for step in range(-(-num_rows // (batch_size * accumulation * processes))):
        part = slice(step * accumulation, (step + 1) * accumulation)
        together = [row for own in by_rank for batch in own[part] for row in batch]
        whole = alone[step * accumulation * processes : (step + 1) * accumulation * processes]
        assert sorted(together) == sorted(row for batch in whole for row in batch)


@pytest.mark.parametrize(("num_rows", "workers"), [(1, 2), (7, 0), (12, 0), (13, 2)])
def test_stream_is_shared_without_overlap_or_loss(num_rows, workers):
    stream = make_rows(num_rows).to_iterable_dataset(num_shards=min(num_rows, 3))
    by_rank = []
    for rank in range(3):
        share = RankStream(stream, 2, accumulation_steps=2, num_processes=3, process_index=rank)
        loader = DataLoader(share, batch_size=2, num_workers=workers, collate_fn=list)
        by_rank.append([[row["id"] for row in batch if row is not None] for batch in loader])
    assert len({len(batches) for batches in by_rank}) == 1
    assert len(by_rank[0]) % 2 == 0
    seen = [row for batches in by_rank for batch in batches for row in batch]
    assert sorted(seen) == sorted(f"row-{index}" for index in range(num_rows))


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_configurations(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == 8
    assert config.to_dict().items() >= yaml.safe_load(file.read_text()).items()
