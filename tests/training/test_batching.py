import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pushed_runs import train
from sample_rows import sized_row
from tiny_models import FROM_SCRATCH, TEXT, VISION
from training_run import FEATURES, OPTIONS, make_rows, make_trainer, run

from modeling_vitp import ViTPDataCollator, ViTPTrainingConfig
from modeling_vitp.instructions.collator import STEP
from modeling_vitp.instructions.mixture import load_mixture, open_mixture
from modeling_vitp.instructions.raw_tiles import normalize_tiles
from modeling_vitp.instructions.rows import prepare_rows
from modeling_vitp.instructions.sample_length import SampleLength
from modeling_vitp.pretraining.loading import build_model
from modeling_vitp.training import base_trainer
from modeling_vitp.training.batching import (
    EpochBatchSampler,
    GlobalBatchSampler,
    StepSampler,
)
from modeling_vitp.training.callbacks import take_names
from modeling_vitp.training.checkpointing import last_checkpoint, publish_checkpoint
from modeling_vitp.training.resuming import default_warmup

RATIO = 0.75  # drop ratio of `training_run`
PERSISTENT = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
ONCE = {"logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}


@pytest.fixture(scope="module")
def mixed_rows():
    """Return samples of 0 to 13 tiles, a tenth of them without images; lengths differ by a factor of ten."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(192):
        tiles = generator.integers(0, 13)
        sizes = [(56 * tiles, 56)] if tiles else []
        rows.append(sized_row(index, sizes, "tree " * int(generator.integers(1, 20))))
    return prepare_rows(Dataset.from_list(rows, features=FEATURES))


@pytest.fixture(scope="module")
def collator(tokenizer):
    torch.manual_seed(0)
    _, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": 12})
    return ViTPDataCollator(processor, vrl_drop_ratio=0.75)


def test_run_without_batches_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, num_rows=3, dataloader_drop_last=True, max_steps=2)
    with pytest.raises(ValueError, match="4 training samples.*got 3"):
        trainer.train()


def test_named_template_has_the_same_lengths(collator, mixed_rows, monkeypatch):
    rows = list(mixed_rows)[:4]
    expected = [SampleLength.of(collator)(row) for row in rows]
    named = {"default": collator.processor.chat_template, "other": ""}
    monkeypatch.setattr(collator.processor, "chat_template", named)
    assert min(expected) > 0 and [SampleLength.of(collator)(row) for row in rows] == expected


def test_batches_by_length_have_little_padding(collator, mixed_rows):
    """The second shares are of batches that are encoded without the drop, as during VRL's warm-up."""
    with_drop = [SampleLength.of(collator)(row) for row in mixed_rows]
    without_drop = [SampleLength.of(ViTPDataCollator(collator.processor))(row) for row in mixed_rows]
    for strategy in ("random", "group_by_length", "batch_rebalance"):
        sampler = GlobalBatchSampler(
            len(with_drop), 8, accumulation_steps=8, seed=0, strategy=strategy, lengths=lambda: with_drop
        )
        batches = list(sampler)
        assert sorted(index for batch in batches for index in batch) == list(range(len(with_drop)))
        shares = []
        for lengths in (with_drop, without_drop):
            places = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
            shares.append(1 - sum(lengths) / places)
        if strategy == "random":
            assert min(shares) > 0.25
        else:
            assert shares[0] < 0.15 and shares[1] < 0.18


@pytest.mark.slow
def test_trainer_batches_by_length_and_logs_padding(mixed_rows, tmp_path):
    shares = {}
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, **ONCE}
    for strategy in ("random", "batch_rebalance"):
        trainer = make_trainer(tmp_path / strategy, train_sampling_strategy=strategy, **options)
        trainer.train_dataset = mixed_rows
        masks = []
        get_batch_samples = trainer.get_batch_samples

        def keeping(*args, masks=masks, get=get_batch_samples):
            samples = get(*args)
            masks.extend(batch["attention_mask"].flatten() for batch in samples[0])
            return samples

        trainer.get_batch_samples = keeping
        trainer.train()
        shares[strategy] = next(entry for entry in trainer.state.log_history if "loss" in entry)["padding_share"]
        assert shares[strategy] == pytest.approx(1 - torch.cat(masks).double().mean().item())
    assert shares["batch_rebalance"] < 0.15 < shares["random"]


def test_rows_without_messages_need_length_column(mixed_rows, tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "eval_strategy": "no"}
    trainer = make_trainer(tmp_path, **options)
    bare = mixed_rows.remove_columns("messages")
    with pytest.raises(ValueError, match="train_sampling_strategy.*'messages'.*'length'"):
        trainer._lengths(bare)
    assert trainer._lengths(bare.add_column("length", list(range(192)))) == list(range(192))


def test_mixtures_of_folders_are_batched_by_length(data_folder, tmp_path):
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"root": str(tmp_path), "sources": [{"name": "trees", "folder": "data"}]}))
    rows = open_mixture(load_mixture(str(mixture)), 0)
    trainer = make_trainer(tmp_path / "run", train_sampling_strategy="batch_rebalance", eval_strategy="no")
    measured = trainer._lengths(rows)
    assert measured == [SampleLength.of(trainer.data_collator)(row) for row in rows]
    assert min(measured) > 4


def test_evaluation_does_not_depend_on_strategy(tmp_path):
    strategies = ("random", "group_by_length")
    trainers = [make_trainer(tmp_path / name, train_sampling_strategy=name) for name in strategies]
    assert trainers[0].evaluate()["eval_loss"] == trainers[1].evaluate()["eval_loss"]


@pytest.mark.parametrize("num_rows", [1, 5, 9])
def test_epoch_sampler_uses_all_rows_without_empty_batches(num_rows):
    """Three processes have two batches of one row per step."""
    batches = []
    for rank in range(3):
        sampler = EpochBatchSampler(num_rows, 1, accumulation_steps=2, num_processes=3, process_index=rank, seed=4)
        sampler.set_epoch(3)
        batches.append(list(sampler))
        assert len(batches[-1]) == len(sampler) == -(-num_rows // 3)
    assert all(len(batch) == 1 and batch[0][0] == 3 for own in batches for batch in own)
    seen = [batch[0][1] for own in batches for batch in own]
    assert set(seen) == set(range(num_rows)) and len(seen) == -(-num_rows // 3) * 3


@settings(max_examples=40)
@given(
    num_rows=st.integers(1, 40),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    processes=st.integers(1, 3),
    strategy=st.sampled_from(["random", "sequential", "group_by_length", "batch_rebalance"]),
    drop_last=st.booleans(),
)
def test_map_rows_have_their_step(num_rows, batch_size, accumulation, processes, strategy, drop_last):
    options = {"seed": 5, "strategy": strategy, "drop_last": drop_last}
    options["lengths"] = lambda: [1 + 37 * row % 50 for row in range(num_rows)]
    for rank in range(processes):
        where = num_rows, batch_size, accumulation, processes, rank
        plain, sampler = GlobalBatchSampler(*where, **options), StepSampler(*where, **options)
        step = 0
        for epoch in range(3):
            plain.set_epoch(epoch)
            sampler.set_epoch(epoch)
            batches, pairs = list(plain), list(sampler)
            assert [[row for row, _ in batch] for batch in pairs] == batches
            while pairs:
                assert {number for batch in pairs[:accumulation] for _, number in batch} <= {step}
                del pairs[:accumulation]
                step += 1


@pytest.fixture
def warmup_collator(processor):
    return ViTPDataCollator(processor, vrl_drop_ratio=RATIO, vrl_warmup_steps=3, seed=5)


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name


def test_warmup_batches_have_no_drop(processor, warmup_collator):
    rows = [row for row in make_rows() if row["images"]][:3]
    for step in range(6):
        ratio = 0.0 if step < 3 else RATIO
        expected = ViTPDataCollator(processor, vrl_drop_ratio=ratio, seed=5)(rows)
        assert_same(warmup_collator([{**row, STEP: step} for row in rows]), expected)
        assert warmup_collator.drop_ratios_at(step)["vrl_drop_ratio"] == ratio
    assert ("position_ids" in expected) and warmup_collator([None])["labels"].eq(-100).all()
    with pytest.raises(ValueError, match="'row-0'.*vrl_warmup_steps"):
        warmup_collator(rows)
    assert_same(warmup_collator.for_evaluation()(rows), ViTPDataCollator(processor)(rows))


def test_patches_are_dropped_in_first_steps(processor):
    rows = [row for row in make_rows() if row["images"]][:3]
    settings = {"vrl_drop_ratio": RATIO, "vrl_warmup_steps": 1, "patch_drop_ratio": 0.5, "patch_drop_steps": 3}
    collator = ViTPDataCollator(processor, **settings, seed=5)
    num_tokens = processor.image_seq_length
    for step in range(5):
        ratio = 0.0 if step < 1 else RATIO
        patch_ratio = 0.5 if step < 3 else 0.0
        batch = collator([{**row, STEP: step} for row in rows])
        expected = ViTPDataCollator(processor, vrl_drop_ratio=ratio, patch_drop_ratio=patch_ratio, seed=5)(rows)
        assert_same(batch, expected)
        num_tiles = len(batch["pixel_values"])
        if patch_ratio:
            assert batch["visible_token_indices"].shape == (num_tiles, num_tokens // 2)
            assert len(batch["visual_token_indices"]) == num_tiles * num_tokens * min(0.5, 1 - ratio)
            tile = batch["visual_token_indices"] // num_tokens
            token = batch["visual_token_indices"] % num_tokens
            assert (batch["visible_token_indices"][tile] == token[:, None]).any(1).all()
        else:
            assert "visible_token_indices" not in batch
    with pytest.raises(ValueError, match="'row-0'.*patch_drop_steps"):
        collator(rows)
    with pytest.raises(ValueError, match="patch_drop_ratio"):
        ViTPDataCollator(processor, patch_drop_ratio=1.0)
    assert_same(collator.for_evaluation()(rows), ViTPDataCollator(processor)(rows))


def test_length_counts_dropped_patches(processor):
    rows = [row for row in make_rows() if row["images"]]
    for ratio, patch_ratio in ((0.0, 0.5), (RATIO, 0.5), (0.5, 0.75)):
        collator = ViTPDataCollator(processor, vrl_drop_ratio=ratio, patch_drop_ratio=patch_ratio)
        for row in prepare_rows(Dataset.from_list(rows, features=FEATURES)):
            assert SampleLength.of(collator)(row) == len(collator.encode(row)["input_ids"])


def test_replacement_row_has_the_step(processor):
    rows = list(make_rows())
    settings = {"seed": 5, "on_error": "skip", "replacement_rows": rows}
    broken = {**rows[0], "messages": []}
    collator = ViTPDataCollator(processor, vrl_drop_ratio=RATIO, vrl_warmup_steps=3, **settings)
    for step, ratio in ((2, 0.0), (3, RATIO)):
        expected = ViTPDataCollator(processor, vrl_drop_ratio=ratio, **settings)([broken, rows[1]])
        assert_same(collator([{**broken, STEP: step}, {**rows[1], STEP: step}]), expected)


def batches_of(folder, **options):
    """Return the batches of each optimizer step of a run, the logged ratios, and the number of repeated encodings."""
    trainer = make_trainer(folder, **{**ONCE, **options})
    found = SimpleNamespace(steps=[[] for _ in range(trainer.args.max_steps)], log=[], num_again=0)
    finalize = trainer._finalize

    def count(batch, number):
        settled = finalize(batch, number)
        found.num_again += settled is not batch
        return settled

    def keep(batches):
        found.steps[trainer.state.global_step] += map(dict, batches)
        return take_names(batches)

    trainer._finalize = count
    with patch.object(base_trainer, "take_names", keep):
        trainer.train()
    found.log = [entry.get("vrl_drop_ratio") for entry in trainer.state.log_history if "loss" in entry]
    found.patch_log = [entry.get("patch_drop_ratio") for entry in trainer.state.log_history if "loss" in entry]
    found.processor = trainer.processing_class
    return found


LOADING = {
    "map": {},
    "map, two workers that stay": PERSISTENT,
    "map, by length": {"train_sampling_strategy": "group_by_length"},
    "map, balanced": {"train_sampling_strategy": "batch_rebalance"},
    "stream": {"stream": True},
    "stream, by length": {"stream": True, "train_sampling_strategy": "group_by_length"},
    # One worker has two of three shards and ends one step after the other.
    "stream, uneven workers": {"stream": True, "num_shards": 3, **PERSISTENT},
}
FAST = [("map", 5), ("stream", 2)]
SLOW = [("map, two workers that stay", 3), ("map, by length", 2), ("map, balanced", 5), ("stream, by length", 3)]
SLOW += [("stream, uneven workers", 2), ("stream, uneven workers", 3), ("stream, uneven workers", 5)]


@pytest.mark.parametrize(
    ("loading", "warmup"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_each_step_equals_a_collator_without_warmup(tmp_path, loading, warmup):
    """An epoch has three steps. The warm-up ends in the first epoch, at its end, or in the second epoch."""
    rows = {row["id"]: row for row in make_rows()}
    found = batches_of(tmp_path / "warmup", vrl_warmup_steps=warmup, **LOADING[loading])
    assert len(found.steps) == 8
    seen = [[], [], []]
    for step, batches in enumerate(found.steps):
        collator = ViTPDataCollator(
            found.processor, max_length=4096, vrl_drop_ratio=0.0 if step < warmup else RATIO, seed=42
        )
        for batch in batches:
            collator.set_epoch(step // 3)
            ids = batch.pop("sample_ids")
            if "pixel_values" in batch:
                batch["pixel_values"] = normalize_tiles(batch["pixel_values"], found.processor.image_processor)
            assert_same(batch, collator([rows[name] for name in ids]))
            seen[step // 3] += ids
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(rows)
    assert found.log == [0.0] * warmup + [RATIO] * (8 - warmup)
    assert found.num_again == (loading == "stream, uneven workers" and warmup == 3)
    always = batches_of(tmp_path / "always", **LOADING[loading])
    assert always.log == [None] * 8 and always.num_again == 0
    assert [name for step in always.steps for batch in step for name in batch["sample_ids"]] == sum(seen, [])


@pytest.mark.parametrize(
    "loading", ["map", *(pytest.param(name, marks=pytest.mark.slow) for name in LOADING if name != "map")]
)
def test_each_step_drops_patches_until_the_end(tmp_path, loading):
    """An epoch has three steps, and the last two of eight steps see every patch."""
    rows = {row["id"]: row for row in make_rows()}
    settings = {"patch_drop_ratio": 0.5, "patch_drop_end": 0.2, "vrl_warmup_steps": 2}
    found = batches_of(tmp_path / "dropped", **settings, **LOADING[loading])
    for step, batches in enumerate(found.steps):
        collator = ViTPDataCollator(
            found.processor,
            max_length=4096,
            vrl_drop_ratio=0.0 if step < 2 else RATIO,
            patch_drop_ratio=0.5 if step < 6 else 0.0,
            seed=42,
        )
        for batch in batches:
            collator.set_epoch(step // 3)
            ids = batch.pop("sample_ids")
            if "pixel_values" in batch:
                batch["pixel_values"] = normalize_tiles(batch["pixel_values"], found.processor.image_processor)
            assert_same(batch, collator([rows[name] for name in ids]))
    assert found.patch_log == [0.5] * 6 + [0.0] * 2


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_run_killed_around_last_dropped_patches_is_exact(tmp_path, stream):
    options = {"patch_drop_ratio": 0.5, "patch_drop_end": 0.4, "save_steps": 1, "stream": stream}
    options |= {"num_shards": 3, **PERSISTENT} if stream else {}
    whole = run(tmp_path / "whole", **options)
    for kill in [("optimizer", 5), ("step", 7)]:
        run(tmp_path / "killed", kill, **options)
    assert run(tmp_path / "killed", **options) == whole
    assert [entry["patch_drop_ratio"] for entry in whole["log"] if "loss" in entry] == [0.5, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_run_killed_around_warmup_end_is_exact(tmp_path, stream):
    options = {"vrl_warmup_steps": 5, "save_steps": 1, "stream": stream, "answer_mask_ratio": 0.5}
    options |= {"num_shards": 3, **PERSISTENT} if stream else {}
    whole = run(tmp_path / "whole", **options)
    for kill in [("optimizer", 5), ("step", 7)]:
        run(tmp_path / "killed", kill, **options)
    assert run(tmp_path / "killed", **options) == whole
    assert [entry["vrl_drop_ratio"] for entry in whole["log"] if "loss" in entry] == [0.0, RATIO]


def warmups_of(folder, **config):
    """Run the recipe, and return `vrl_warmup_steps` of its model, its record and its checkpoint."""
    folder.mkdir(exist_ok=True)
    assert train(folder, **{"max_steps": 3} | config) == 0
    output = folder / "out"
    checkpoint = Path(last_checkpoint(output))
    return (
        json.loads((output / "config.json").read_text())["vrl_warmup_steps"],
        json.loads((output / "run.json").read_text())["settings"]["vrl_warmup_steps"],
        json.loads((checkpoint / "checkpoint.json").read_text())["settings"]["fixed"]["vrl_warmup_steps"],
    )


@pytest.mark.slow
def test_default_warmup_is_half_from_scratch(data_folder, tmp_path):
    scratch = {"from_scratch": FROM_SCRATCH, "dataset_name": str(data_folder)}
    assert warmups_of(tmp_path, **scratch) == (1, 1, 1)
    assert warmups_of(tmp_path, **scratch, max_steps=6) == (1, 1, 1)  # the run is resumed
    with pytest.raises(ValueError, match="vrl_warmup_steps was 1 and is None"):
        warmups_of(tmp_path, **scratch, max_steps=6, vrl_warmup_steps=0)
    assert warmups_of(tmp_path / "vit", **scratch, vision_model=str(tmp_path / "out" / "backbone")) == (1, 1, 1)
    start = {"model_name_or_path": str(tmp_path / "out"), "dataset_name": str(data_folder)}
    assert warmups_of(tmp_path / "next", **start) == (0, None, None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| first optimizer steps, without VRL | 1 |" in card
    assert "without VRL" not in (tmp_path / "next" / "out" / "README.md").read_text()


def test_default_warmup_counts_epochs(tmp_path):
    args = ViTPTrainingConfig(str(tmp_path), **OPTIONS | {"max_steps": -1, "num_train_epochs": 2.5})
    rows = make_rows()  # three steps per epoch; the Trainer counts 8 in 2.5 epochs
    assert default_warmup(args, rows) == 4
    assert make_trainer(tmp_path, max_steps=-1, num_train_epochs=2.5, **ONCE).train().global_step == 8
    args.max_steps = 9
    assert default_warmup(args, rows.to_iterable_dataset()) == 4
    args.max_steps, args.dataloader_drop_last = -1, True  # two steps per epoch, 5 in total
    assert default_warmup(args, rows) == 2
    for step, recorded in ((1, {"vrl_warmup_steps": 7}), (2, {})):
        (tmp_path / f"checkpoint-{step}").mkdir()
        publish_checkpoint(tmp_path / f"checkpoint-{step}", {"fixed": recorded, "free": {}})
        assert default_warmup(args, rows) == recorded.get("vrl_warmup_steps", 0)
