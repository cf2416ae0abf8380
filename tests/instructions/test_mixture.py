"""Mixtures: rows of an epoch compared with decimals and counts, settings of sources, skipped rows."""

import io
import json
import logging
import math
import shutil
import subprocess
import sys
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import huggingface_hub
import numpy as np
import prepared_folders
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from PIL import Image
from sample_rows import write_annotations
from tiny_models import TOKENS_PER_TILE
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from modeling_vitp import ViTPDataCollator, ViTPTrainer, ViTPTrainingConfig
from modeling_vitp.instructions.mixture import (
    MixtureDataset,
    MixtureStream,
    draw_from_stream,
    draw_rows,
    effective_rows,
    load_mixture,
    open_mixture,
)
from modeling_vitp.instructions.rows import SourceSettings, degrade, images_of
from modeling_vitp.instructions.sources import Source, read_source
from modeling_vitp.training.resuming import fingerprint_data

SIZES = {"a": 37, "b": 80, "c": 21, "d": 5, "e": 64}


RATES = {"a": 0.05, "b": 0.3, "c": 1, "d": 10, "e": 2.5}


def rounded(rows: int, rate: float) -> int:
    """Return the number of rows, rounded half up in decimals."""
    return int((rows * Decimal(str(rate))).to_integral_value(ROUND_HALF_UP))


COUNTS = {name: rounded(SIZES[name], RATES[name]) for name in SIZES}


def write_source(folder, name, num_rows):
    """Write a text-only source, whose answers and ids number the rows from 1."""
    with open(folder / f"{name}.jsonl", "w") as file:
        for row in range(1, num_rows + 1):
            turns = [{"from": "human", "value": "How many trees?"}, {"from": "gpt", "value": str(row)}]
            file.write(json.dumps({"conversations": turns}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    for name, size in SIZES.items():
        write_source(folder, name, size)
    return folder


def opened(folder, seed=0, streaming=(), rates=RATES, **fields):
    sources = []
    for name, rate in rates.items():
        entry = {"name": name, "annotation": f"{name}.jsonl", "rate": rate, "rows": SIZES[name]}
        sources.append(entry | ({"streaming": True} if name in streaming else {}))
    return open_mixture(load_mixture({"root": str(folder), "sources": sources, **fields}), seed)


def ids(dataset, epoch=0):
    dataset.set_epoch(epoch)
    return [row["id"] for row in dataset]


def copies_by_row(names):
    return Counter(name.partition("#")[0] for name in names)


@pytest.mark.parametrize("streaming", [(), ("a", "d"), tuple(SIZES)])
def test_epoch_has_exact_counts_by_seed(folder, streaming):
    first, again, other = (opened(folder, seed, streaming, shuffle_buffer=20) for seed in (0, 0, 1))
    assert isinstance(first, MixtureStream if streaming else MixtureDataset)
    for epoch in (0, 1):
        drawn = ids(first, epoch)
        assert Counter(name.partition("/")[0] for name in drawn) == COUNTS
        assert len(set(drawn)) == len(drawn)
        assert drawn == ids(again, epoch)
        assert drawn != ids(other, epoch)
        assert sorted(drawn) != sorted(ids(other, epoch))
        by_row = copies_by_row(drawn)
        for name, size in SIZES.items():
            rate = Decimal(str(RATES[name]))
            for row in range(1, size + 1):
                assert math.floor(rate) <= by_row[f"{name}/{row}"] <= math.ceil(rate)
    # Sources are mixed: the first quarter has rows of each large source.
    assert {name.partition("/")[0] for name in drawn[: len(drawn) // 4]} >= {"b", "c", "d", "e"}


@pytest.mark.parametrize("streaming", [(), tuple(SIZES)])
def test_part_is_redrawn_or_kept(folder, streaming):
    afresh = opened(folder, streaming=streaming)
    once = opened(folder, streaming=streaming, resample="once")
    assert sorted(ids(afresh, 0)) != sorted(ids(afresh, 1))
    assert sorted(ids(once, 0)) == sorted(ids(once, 1))
    assert ids(once, 0) != ids(once, 1)
    assert ids(afresh, 1) == ids(afresh, 1)


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 300),
    rate=st.decimals("0.001", "12", places=3).map(float),
    seed=st.integers(0, 100),
)
def test_draws_agree_with_decimal_rounding(num_rows, rate, seed):
    source = Source("s", rate=rate, annotation="s.jsonl")
    expected = rounded(num_rows, rate)
    assert effective_rows(source, num_rows) == expected
    rows, copies = draw_rows(source, num_rows, seed)
    drawn = list(zip(rows.tolist(), copies.tolist()))
    streamed = list(draw_from_stream(iter(range(num_rows)), source, seed))
    for pairs in (drawn, streamed):
        assert len(pairs) == len(set(pairs)) == expected
        counts = Counter(row for row, _ in pairs)
        assert all(sorted(c for r, c in pairs if r == row) == list(range(counts[row])) for row in counts)
        assert max(counts.values(), default=0) - min(counts.get(row, 0) for row in range(num_rows)) <= 1


@pytest.mark.parametrize("rate", [0.05, 0.6])
def test_rows_are_equally_likely(rate):
    source = Source("s", rate=rate, annotation="s.jsonl")
    num_rows, num_seeds = 40, 1000
    in_map, in_stream = np.zeros(num_rows), np.zeros(num_rows)
    for seed in range(num_seeds):
        in_map[draw_rows(source, num_rows, seed)[0].numpy()] += 1
        for row, _ in draw_from_stream(iter(range(num_rows)), source, seed):
            in_stream[row] += 1
    deviation = np.sqrt(rate * (1 - rate) * num_seeds)
    for counts in (in_map, in_stream):
        assert np.abs(counts - rate * num_seeds).max() < 4.5 * deviation


@pytest.mark.parametrize("streaming", [(), ("a", "b", "d")])
def test_released_compatible_takes_first_rows(folder, streaming):
    rates = {"a": 0.05, "b": 0.31, "d": 10}
    drawn = ids(opened(folder, streaming=streaming, rates=rates, released_compatible=True))
    expected = Counter(["a/1", *(f"b/{row}" for row in range(1, 25))])
    expected += Counter([f"d/{row}" for row in range(1, 6)] * 10)
    assert copies_by_row(drawn) == expected


def test_row_copies_have_unique_ids(folder):
    rows = [row for row in opened(folder) if row["id"].partition("#")[0] == "d/3"]
    assert sorted(row["id"] for row in rows) == sorted(["d/3", *(f"d/3#{copy}" for copy in range(2, 11))])
    assert {row["messages"][1]["content"][0]["text"] for row in rows} == {"3"}


def test_mixture_supports_index_slice_and_column(folder):
    dataset = opened(folder)
    whole = list(dataset)
    assert dataset[-1] == whole[-1] and dataset[3:5]["id"] == [whole[3]["id"], whole[4]["id"]]
    assert dataset["id"] == [row["id"] for row in whole]
    assert dataset.__getitems__([5, 2]) == [whole[5], whole[2]]
    with pytest.raises(IndexError, match=f"row {len(dataset)} "):
        dataset[len(dataset)]


def test_workers_share_a_stream_exactly(folder):
    stream = opened(folder, streaming=("b",))
    loader = DataLoader(stream, batch_size=4, num_workers=2, collate_fn=list, persistent_workers=True)
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        loaded = [row["id"] for batch in loader for row in batch]
        assert sorted(loaded) == sorted(ids(stream, epoch))


def test_persistent_workers_see_the_epoch(folder):
    dataset = opened(folder)
    loader = DataLoader(dataset, batch_size=8, num_workers=1, collate_fn=list, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert [row["id"] for batch in loader for row in batch] == ids(dataset, epoch)


def test_stream_keeps_few_rows_in_memory():
    alive = []

    class Row(dict):
        def __init__(self, number):
            super().__init__(id=str(number), source="s")
            alive.append(1)

        def __del__(self):
            alive.pop()

    source = Source("s", rate=0.05, rows=4000, streaming=True, annotation="s.jsonl")
    most = 0
    stream = draw_from_stream((Row(number) for number in range(4000)), source, 0)
    for _ in stream:
        most = max(most, len(alive))
    assert most <= 4


@pytest.mark.parametrize("rate", [0.0716845878, 1.000001])
def test_long_rate_of_stream_is_drawn_soon(rate):
    source, read = Source("s", rate=rate, streaming=True, annotation="s.jsonl"), []
    drawn = []
    for row, copy in draw_from_stream((read.append(number) or number for number in range(40_000)), source, 0):
        drawn.append((row, copy))
        if len(drawn) == 1:
            assert len(read) < 20_000
    assert len(drawn) == len(set(drawn)) == pytest.approx(40_000 * rate, abs=1)


def test_lengths_match_rows_of_epoch(folder):
    dataset = opened(folder)
    measured = []

    def measure(part):
        measured.append(len(part))
        return [f"{row['source']}/{row['id']}" for row in part]  # Texts are unique for each row.

    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert dataset.lengths(measure) == [row["id"].partition("#")[0] for row in dataset]
    assert sorted(measured) == sorted(SIZES.values())


@pytest.fixture
def trainer_of(model, processor, tmp_path):
    def make(dataset, **options):
        fields = {"per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "allow_text_only": True}
        fields |= {"bf16": False, "gradient_checkpointing": False}
        args = {name: options.pop(name) for name in list(options) if hasattr(ViTPTrainingConfig, name)}
        config = ViTPTrainingConfig(str(tmp_path / "run"), **{**fields, **args})
        return ViTPTrainer(model, config, train_dataset=dataset, processing_class=processor, **options)

    return make


class Forget(TrainerCallback):
    """Callback that forgets the rows that are checked before training."""

    def __init__(self, seen: list):
        self.seen = seen

    def on_train_begin(self, *args, **kwargs):
        self.seen.clear()


@pytest.mark.parametrize("streaming", [(), ("d", "a")])
def test_trainer_sees_each_epoch_of_a_mixture(folder, trainer_of, streaming):
    dataset = opened(folder, streaming=streaming, rates={"d": 0.8, "a": 0.05})
    trainer = trainer_of(dataset, max_steps=6, per_device_train_batch_size=3, vrl_drop_ratio=0.0)
    seen, encode = [], trainer.data_collator.encode
    trainer.data_collator.encode = lambda row: (seen.append(row["id"]), encode(row))[1]
    trainer.add_callback(Forget(seen))
    trainer.train()
    epochs = [seen[start : start + 6] for start in (0, 6, 12)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(ids(dataset, number)) for number in range(3)]
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1


@pytest.fixture
def image_rows(tmp_path):
    """Return rows with one image each, the second of which is truncated."""
    rows = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        picture(60, 56, seed=number).save(path)
        if number == 1:
            path.write_bytes(path.read_bytes()[:200])
        asked = [{"type": "image", "text": None}, {"type": "text", "text": "How many trees?"}]
        told = [{"type": "text", "text": str(number)}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        images = [{"path": str(path), "bytes": None}]
        rows.append({"id": f"s/{number}", "images": images, "messages": turns, "source": "s", "error": None})
    return rows


def test_source_settings_apply_to_encoding(processor, image_rows):
    row = image_rows[0]
    wide = {**row, "images": [picture(224, 56, seed=5)]}

    def encode(row, **fields):
        return ViTPDataCollator(processor, source_settings={"s": SourceSettings(**fields)}).encode(row)

    plain = ViTPDataCollator(processor).encode(wide)
    assert len(plain["pixel_values"]) == 5
    assert all(map(torch.equal, encode(wide)["pixel_values"], plain["pixel_values"]))
    assert len(encode(wide, max_patches=2)["pixel_values"]) == 3
    assert len(encode({**wide, "source": "t"}, max_patches=2)["pixel_values"]) == 5

    square = torch.stack(encode(wide, image_size=56)["pixel_values"])
    resampled = wide["images"][0].resize((56, 56), Image.Resampling.BICUBIC)
    assert torch.equal(
        square, processor.image_processor(resampled, crop_to_patches=True, return_tensors="pt")["pixel_values"]
    )
    assert len(encode(wide, image_size=112, max_patches=4)["pixel_values"]) == 5

    prompted = encode(row, system_prompt="Count trees.")
    text = processor.tokenizer.decode(prompted["input_ids"])
    assert text.startswith("<|im_start|>system\nCount trees.<|im_end|>\n<|im_start|>user\n")
    own = {**row, "messages": [{"role": "system", "content": "Mine."}, *row["messages"]]}
    assert "Count" not in processor.tokenizer.decode(encode(own, system_prompt="Count trees.")["input_ids"])

    deep = {**row, "images": [Image.fromarray(np.full((56, 56), 700, dtype=np.uint16))]}
    bright = torch.stack(encode(deep, input_spec={"window": [0, 700]})["pixel_values"])
    dark = torch.stack(encode(deep)["pixel_values"])
    assert (bright > 2).all() and (dark < -1).all()


def test_jpeg_degradation_depends_on_epoch(processor, image_rows):
    collator = ViTPDataCollator(processor, source_settings={"s": SourceSettings(jpeg_degradation=True)})
    plain = ViTPDataCollator(processor)([image_rows[0]])["pixel_values"]
    compressed = []
    for quality in range(75, 101):
        file = io.BytesIO()
        Image.open(image_rows[0]["images"][0]["path"]).save(file, format="JPEG", quality=quality)
        row = {**image_rows[0], "images": [{"bytes": file.getvalue(), "path": None}]}
        compressed.append(ViTPDataCollator(processor)([row])["pixel_values"])
    epochs = []
    for epoch in range(3):
        collator.set_epoch(epoch)
        epochs.append(collator([image_rows[0]])["pixel_values"])
        assert torch.equal(collator([image_rows[0]])["pixel_values"], epochs[-1])
        assert sum(torch.equal(epochs[-1], encoded) for encoded in compressed) == 1
    assert not all(torch.equal(epochs[0], other) for other in epochs[1:])
    assert torch.equal(collator.for_evaluation()([image_rows[0]])["pixel_values"], plain)


def test_jpeg_degradation_of_transparent_image_is_white(processor):
    """Compare with the transparency handling of the processor."""
    image = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    image.paste((40, 90, 40, 255), (0, 0, 56, 28))
    plain = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    found = processor.image_processor([degrade(image, torch.Generator())], return_tensors="pt")["pixel_values"]
    assert (found - plain).abs().mean() < 0.05 and plain.std() > 1


def test_images_share_max_patches_of_source(processor):
    pair = {
        "id": "p/0",
        "images": [picture(224, 56, seed=1), picture(224, 56, seed=2)],
        "messages": [{"role": "user", "content": "What changed?"}, {"role": "assistant", "content": "trees"}],
        "source": "p",
    }
    collator = ViTPDataCollator(processor, source_settings={"p": SourceSettings(max_patches=4)})
    encoded = collator.encode(pair)
    assert len(encoded["pixel_values"]) == 2 * (2 + 1)  # Each image has half of the budget and a thumbnail.
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 6 * TOKENS_PER_TILE


def test_skipped_row_is_counted_and_replaced(processor, image_rows, caplog):
    def collator(seed=0, rows=image_rows):
        return ViTPDataCollator(
            processor, source_settings={"s": SourceSettings()}, on_error="skip", replacement_rows=rows, seed=seed
        )

    skipping = collator()
    batch = skipping([image_rows[1]])  # All rows of the batch are skipped.
    assert skipping.skipped["s"] >= 1
    assert "Skipped a row of s. Sample 's/1': image 0" in caplog.text
    good = [ViTPDataCollator(processor)([row]) for row in (image_rows[0], image_rows[2], image_rows[3])]
    assert sum(torch.equal(batch["pixel_values"], other["pixel_values"]) for other in good) == 1
    assert torch.equal(collator()([image_rows[1]])["pixel_values"], batch["pixel_values"])
    draws = {collator(seed)([image_rows[1]])["pixel_values"].sum().item() for seed in range(8)}
    assert len(draws) > 1
    assert len(skipping(image_rows)["input_ids"]) == 4

    with pytest.raises(ValueError, match="Sample 's/1'"):
        collator(rows=[image_rows[1]])(image_rows)
    with pytest.raises(ValueError, match="Sample 's/1'"):
        skipping.for_evaluation()([image_rows[1]])


def test_skips_are_counted_across_workers(processor, image_rows):
    other = {**image_rows[1], "id": "u/1", "source": "u"}
    settings = {"s": SourceSettings()}
    collator = ViTPDataCollator(processor, source_settings=settings, on_error="skip", replacement_rows=[image_rows[0]])
    rows = [image_rows[0], image_rows[1], other, image_rows[2]] * 4
    list(DataLoader(rows, batch_size=2, num_workers=2, collate_fn=collator))
    assert collator.skipped == {"s": 4, "other rows": 4}


@pytest.mark.parametrize("streaming", [False, True])
def test_trainer_skips_or_raises(tmp_path, trainer_of, streaming):
    write_source(tmp_path, "good", 6)
    lines = (tmp_path / "good.jsonl").read_text().splitlines()
    lines[2] = lines[2][:-9]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"name": "bad", "annotation": "bad.jsonl", "rows": 6, "streaming": streaming}
    mixture = load_mixture({"root": str(tmp_path), "sources": [entry]})
    settings = {source.name: source for source in mixture.sources}
    trainer = trainer_of(open_mixture(mixture, 0), on_error="skip", max_steps=3, source_settings=settings)
    trainer.train()
    assert trainer.data_collator.skipped["bad"] >= 1
    with pytest.raises(ValueError, match=r"Sample 'bad/3': line 3 of .*bad\.jsonl"):
        trainer_of(open_mixture(mixture, 0), max_steps=3).train()


READ_STREAM = """
import json, os, sys
from pathlib import Path

from modeling_vitp.instructions.mixture import load_mixture, open_mixture

entry = {"name": "s", "folder": "part", "streaming": True, "rows": 20_000}
stream = open_mixture(load_mixture({"root": sys.argv[1], "sources": [entry]}), seed=0)
resident = {}
for number, _ in enumerate(stream, start=1):
    if number % 4000 == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident[number] = pages * os.sysconf("SC_PAGE_SIZE")
print(json.dumps(resident))
"""


@pytest.mark.slow
def test_long_stream_has_constant_memory(tmp_path):
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    schema = features.arrow_schema
    noise = np.random.default_rng(0)
    (tmp_path / "part").mkdir()
    for part in range(10):
        images = [{"bytes": noise.bytes(8000), "path": None} for _ in range(2000)]
        table = pa.table([images, ["q"] * 2000, ["a"] * 2000], schema=schema)
        pq.write_table(table, tmp_path / "part" / f"train-{part:05d}.parquet", row_group_size=500)
    del images, table
    if not Path("/proc/self/statm").exists():
        pytest.skip("the memory of a process is read from /proc")
    # A separate process is used because memory that earlier tests have freed would hide the growth.
    done = subprocess.run([sys.executable, "-c", READ_STREAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resident = {int(number): size for number, size in json.loads(done.stdout.splitlines()[-1]).items()}
    assert list(resident) == [4000, 8000, 12_000, 16_000, 20_000]
    print(resident)
    assert resident[20_000] - resident[4000] < 8 * 2**20  # The rows have 160 MB.


@pytest.fixture
def meta(tmp_path):
    folder = write_annotations(tmp_path)
    entry = {"root": "images", "annotation": "a.jsonl", "length": 10}
    second = {"repeat_time": 3, "data_augment": False, "max_dynamic_patch": 6, "force_image_size": 224}
    entries = {"first": {**entry, "repeat_time": 0.25, "data_augment": True}, "second": entry | second}
    (folder / "meta.json").write_text(json.dumps(entries), "utf-8-sig")  # as some editors on Windows save it
    return folder


def test_released_meta_json_is_loaded(meta, monkeypatch, caplog):
    monkeypatch.chdir(meta)
    with caplog.at_level(logging.WARNING):
        first, second = load_mixture("meta.json").sources
    assert (first.name, first.rate, first.rows, first.max_patches) == ("first", 0.25, 10, None)
    assert (second.rate, second.max_patches, second.image_size) == (3, 6, 224)
    assert not first.jpeg_degradation and not first.first_rows
    assert len(read_source(second)) == 10
    messages = [record.getMessage() for record in caplog.records]
    for message, setting in zip(messages, ("a rate below 1", "image_size", "data_augment"), strict=True):
        assert setting in message

    first, second = load_mixture({"released_compatible": True, "sources": [{"meta": "meta.json"}]}).sources
    assert first.first_rows and first.jpeg_degradation and not second.jpeg_degradation
    assert second.image_size is None


def test_annotations_of_meta_json_come_from_hub(hub, tmp_path, monkeypatch, caplog):
    meta = prepared_folders.write_released_annotations(tmp_path)
    local = open_mixture(load_mixture({"root": str(tmp_path), "sources": [{"meta": meta.name}]}), seed=0)
    files = {f"pretrain_data/rs_ann/{path.name}": path for path in (tmp_path / "data/rs_ann").iterdir()}
    hub.create("GreatBird/ViTP", files)
    shutil.rmtree(tmp_path / "data/rs_ann")

    source = {"meta": meta.name, "hub": "GreatBird/ViTP", "modality": "optical"}
    mixture = load_mixture({"root": str(tmp_path), "released_compatible": True, "sources": [source]})
    assert [source.missing() for source in mixture.sources] == [None, None] and mixture.sources[0].is_on_hub
    opened = open_mixture(mixture, seed=0)
    assert [list(part) for part in opened.parts] == [list(part) for part in local.parts]
    assert [source.jpeg_degradation for source in opened.mixture.sources] == [True, False]
    assert [len(part) for part in opened.parts] == [4, 4] and len(opened) == 4 * 5 + 2
    assert len(images_of(opened.parts[1][0])) == 2
    assert fingerprint_data(opened).keys() == fingerprint_data(local).keys()

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert len(open_mixture(mixture, seed=0)) == len(opened)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"annotation": "b.jsonl", "hub": "org/rows"}, "'s': .* b.jsonl .*org/rows, found 0"),
        ({"annotation": "c.jsonl", "hub": "datasets/org/rows"}, "c.jsonl .* datasets/org/rows, found 2"),
        ({"annotation": "b.jsonl", "hub": "org/none"}, "'s': .*b.jsonl .*org/none"),
        ({"folder": "rows", "hub": "org/rows"}, "hub .*folder"),
    ],
)
def test_annotation_not_found_on_hub_is_named(fields, message, hub, tmp_path):
    hub.create("org/rows", {"a.jsonl": b"{}\n"})
    hub.create("org/rows", {"1/c.jsonl": b"{}\n", "2/c.jsonl": b"{}\n"}, "dataset")
    with pytest.raises(ValueError, match=message):
        read_source(load_mixture({"root": str(tmp_path), "sources": [{"name": "s", **fields}]}).sources[0])
