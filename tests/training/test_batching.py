import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from sample_rows import sized_row
from tiny_models import TEXT, VISION
from training_run import FEATURES, make_trainer

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions.collator import SampleLength
from modeling_vitp.instructions.mixture import load_mixture, open_mixture
from modeling_vitp.instructions.rows import prepare_rows
from modeling_vitp.training.batching import EpochBatchSampler, GlobalBatchSampler
from modeling_vitp.training.loading import build_model


@pytest.fixture(scope="module")
def mixed_rows():
    """Samples of 0 to 13 tiles, a tenth of them text only; lengths differ tenfold."""
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


def padding(collator, rows, strategy, batch_size=8, accumulation=8, encoded_by=None):
    """The share of padding in batches by the lengths of one collator, of rows that it or another one encodes."""
    lengths = [SampleLength.of(collator)(example) for example in rows]
    sampler = GlobalBatchSampler(
        len(rows), batch_size, accumulation, seed=0, strategy=strategy, lengths=lambda: lengths
    )
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    if encoded_by is not None:
        lengths = [SampleLength.of(encoded_by)(example) for example in rows]
    places = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths) / places


def test_without_a_batch_there_is_nothing_to_train_on():
    with pytest.raises(ValueError, match=r"7 sample\(s\) to train on are less than the 8 of one step"):
        GlobalBatchSampler(7, 4, 2, drop_last=True).check_not_empty()
    GlobalBatchSampler(7, 4, 2).check_not_empty()


def test_a_run_that_would_train_on_nothing_is_told(tmp_path):
    trainer = make_trainer(tmp_path, num_rows=3, dataloader_drop_last=True, max_steps=2)
    with pytest.raises(ValueError, match=r"3 sample\(s\) to train on are less than the 4 of one step"):
        trainer.train()


def test_batches_by_length_hold_little_padding(collator, mixed_rows):
    rows = list(mixed_rows)
    lengths = [SampleLength.of(collator)(example) for example in rows]
    shares = {name: padding(collator, rows, name) for name in ("random", "group_by_length", "batch_rebalance")}
    print(shares, min(lengths), max(lengths))
    assert shares["random"] > 0.25
    assert shares["group_by_length"] < 0.15
    assert shares["batch_rebalance"] < 0.15


def test_batches_by_lengths_after_the_drop_hold_less_padding_without_it_too(collator, mixed_rows):
    """As in VRL's warm-up."""
    rows, without = list(mixed_rows), ViTPDataCollator(collator.processor)
    strategies = ("random", "group_by_length", "batch_rebalance")
    shares = {name: padding(collator, rows, name, encoded_by=without) for name in strategies}
    print(shares)
    assert shares["random"] > 0.25
    assert max(shares["group_by_length"], shares["batch_rebalance"]) < 0.18


def test_the_trainer_batches_by_length_and_logs_the_padding(mixed_rows, tmp_path):
    shares = {}
    for strategy in ("random", "batch_rebalance"):
        trainer = make_trainer(
            tmp_path / strategy,
            max_steps=1,
            logging_steps=1,
            eval_strategy="no",
            save_strategy="no",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=8,
            train_sampling_strategy=strategy,
        )
        trainer.train_dataset = mixed_rows
        batches = []
        get_batch_samples = trainer.get_batch_samples

        def keeping(*args, kept=batches, get=get_batch_samples):
            samples = get(*args)
            kept.extend(batch["attention_mask"] for batch in samples[0])
            return samples

        trainer.get_batch_samples = keeping
        trainer.train()
        shares[strategy] = next(entry for entry in trainer.state.log_history if "loss" in entry)["padding_share"]
        masks = torch.cat([mask.flatten() for mask in batches]).double()
        assert shares[strategy] == pytest.approx(1 - masks.mean().item())
    assert shares["batch_rebalance"] < 0.15 < shares["random"]


def test_rows_without_messages_need_a_column_of_lengths(mixed_rows, tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "eval_strategy": "no"}
    trainer = make_trainer(tmp_path, **options)
    bare = mixed_rows.remove_columns("messages")
    with pytest.raises(ValueError, match="needs rows with 'messages', or the length of each in a column 'length'"):
        trainer._lengths(bare)
    assert trainer._lengths(bare.add_column("length", list(range(192)))) == list(range(192))


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_mixtures_of_folders_are_batched_by_length(data_folder, tmp_path, collator, strategy):
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"root": str(tmp_path), "sources": [{"name": "trees", "folder": "data"}]}))
    rows = open_mixture(load_mixture(str(mixture)), 0)
    trainer = make_trainer(tmp_path / "run", train_sampling_strategy=strategy, eval_strategy="no")
    measured = trainer._lengths(rows)
    assert measured == [SampleLength.of(trainer.data_collator)(row) for row in rows]
    assert min(measured) > 4


def test_rows_are_measured_once_and_not_in_each_epoch(tmp_path, monkeypatch):
    trainer, measured = make_trainer(tmp_path, train_sampling_strategy="group_by_length", eval_strategy="no"), []
    measure = SampleLength.__call__
    monkeypatch.setattr(SampleLength, "__call__", lambda self, row: measured.append(row["id"]) or measure(self, row))
    trainer.train()
    assert trainer.state.epoch > 2 and sorted(measured) == sorted(row["id"] for row in trainer.train_dataset)


def test_evaluation_does_not_ask_for_lengths(tmp_path):
    trainers = [
        make_trainer(tmp_path / strategy, train_sampling_strategy=strategy)
        for strategy in ("random", "group_by_length")
    ]
    one, other = (trainer.evaluate()["eval_loss"] for trainer in trainers)
    assert one == other


@pytest.mark.parametrize("num_rows", [1, 2, 5, 7, 8, 9])
def test_no_batch_of_images_is_empty_in_any_process_and_every_one_is_seen(num_rows):
    """Three processes, of two batches of one row a step."""
    batches = []
    for rank in range(3):
        sampler = EpochBatchSampler(num_rows, 1, accumulation_steps=2, num_processes=3, process_index=rank, seed=4)
        sampler.set_epoch(3)
        batches.append(list(sampler))
        assert len(batches[-1]) == len(sampler) == -(-num_rows // 3)
    assert all(len(batch) == 1 and batch[0][0] == 3 for own in batches for batch in own)
    seen = [batch[0][1] for own in batches for batch in own]
    assert set(seen) == set(range(num_rows)) and len(seen) == -(-num_rows // 3) * 3
