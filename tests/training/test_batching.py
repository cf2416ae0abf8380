import io

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from pictures import picture
from tiny_models import TEXT, VISION
from training_run import FEATURES, make_trainer

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions.lengths import SampleLength
from modeling_vitp.instructions.rows import image_size, prepare_rows
from modeling_vitp.instructions.settings import SourceSettings
from modeling_vitp.training.batching import GlobalBatchSampler
from modeling_vitp.training.from_scratch import build_model


def row(index, sizes, answer="There are 12 trees."):
    images = [picture(*size, index) for size in sizes]
    messages = [{"role": "user", "content": "How many trees?"}, {"role": "assistant", "content": answer}]
    return {"id": str(index), "images": images, "messages": messages}


@pytest.fixture(scope="module")
def mixed_rows():
    """Samples of 0 to 13 tiles, a tenth of them text only; lengths differ tenfold."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(192):
        tiles = generator.integers(0, 13)
        sizes = [(56 * tiles, 56)] if tiles else []
        rows.append(row(index, sizes, "tree " * int(generator.integers(1, 20))))
    return prepare_rows(Dataset.from_list(rows, features=FEATURES))


@pytest.fixture(scope="module")
def collator(tokenizer):
    torch.manual_seed(0)
    _, processor = build_model(tokenizer, VISION, TEXT, {"max_patches": 12})
    return ViTPDataCollator(processor, vrl_drop_ratio=0.75)


@pytest.mark.parametrize("sizes", [[], [(56, 56)], [(300, 100)], [(100, 300), (56, 56), (224, 60)]], ids=str)
@pytest.mark.parametrize("options", [{}, {"vrl_drop_ratio": 0.0}, {"max_length": 20, "vrl_drop_ratio": 0.9}], ids=str)
def test_the_length_of_a_row_is_what_the_collator_makes_of_it(collator, sizes, options):
    collator = ViTPDataCollator(collator.processor, **{"vrl_drop_ratio": 0.75, **options})
    rows = prepare_rows(Dataset.from_list([row(1, sizes)], features=FEATURES))
    try:
        expected = len(collator.encode(rows[0])["input_ids"])
    except ValueError:
        assert "max_length" in options  # the prompt does not fit
        return
    assert SampleLength.of(collator)(rows[0]) == expected


def test_the_length_of_a_row_heeds_the_settings_of_its_source(collator):
    settings = {"a": SourceSettings(max_patches=2, system_prompt="You see trees."), "b": SourceSettings(image_size=112)}
    collator = ViTPDataCollator(collator.processor, source_settings=settings)
    for source in ("a", "b", "c"):
        example = {**row(1, [(300, 100)]), "source": source}
        assert SampleLength.of(collator)(example) == len(collator.encode(example)["input_ids"])


def test_the_size_of_an_image_is_read_without_decoding_it(monkeypatch, tmp_path):
    encoded = {}
    for name in ("PNG", "JPEG"):
        file = io.BytesIO()
        picture(30, 20).save(file, name)
        encoded[name] = file.getvalue()
    turned = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture(30, 20).save(turned, "JPEG", exif=exif)
    (tmp_path / "a.png").write_bytes(encoded["PNG"])
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size({"bytes": encoded["PNG"], "path": None}) == (20, 30)
    assert image_size({"bytes": encoded["JPEG"], "path": "x.jpg"}) == (20, 30)
    assert image_size({"bytes": turned.getvalue(), "path": None}) == (30, 20)
    assert image_size(str(tmp_path / "a.png")) == (20, 30)
    assert image_size(np.zeros((4, 20, 30))) == (20, 30)


def padding(collator, rows, strategy, batch_size=8, accumulation=8):
    lengths = [SampleLength.of(collator)(example) for example in rows]
    sampler = GlobalBatchSampler(
        len(rows), batch_size, accumulation, seed=0, strategy=strategy, lengths=lambda: lengths
    )
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    places = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths) / places


def test_batches_by_length_hold_little_padding(collator, mixed_rows):
    rows = list(mixed_rows)
    lengths = [SampleLength.of(collator)(example) for example in rows]
    shares = {name: padding(collator, rows, name) for name in ("random", "group_by_length", "batch_rebalance")}
    print(shares, min(lengths), max(lengths))
    assert shares["random"] > 0.25
    assert shares["group_by_length"] < 0.15
    assert shares["batch_rebalance"] < 0.15


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
