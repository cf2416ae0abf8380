"""Batches of every schema and setting against recorded ones, from the files of a data source to the collator.

`GOLDEN_BATCHES=write pytest tests/instructions/test_golden_batches.py` records them anew.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, write_bands
from PIL import Image
from row_formats import FORMATS, messages, turns, write_lines
from sample_rows import ANNOTATIONS, assert_same
from tiny_models import TOKENS_PER_TILE
from trl import ScriptArguments

from modeling_vitp import ViTPImageProcessor, ViTPProcessor
from modeling_vitp.instructions.collator import STEP, ViTPDataCollator
from modeling_vitp.instructions.mixture import load_mixture, open_mixture
from modeling_vitp.instructions.raw_tiles import normalize_tiles
from modeling_vitp.instructions.rows import prepare_rows
from modeling_vitp.instructions.sources import open_splits

RECORDED = Path(__file__).parents[1] / "fixtures" / "golden_batches" / "batches.json"
SIZES = [(100, 60), (60, 56), (40, 120), (56, 56)]
GOOD = [*ANNOTATIONS[:4], ANNOTATIONS[6]]  # Boxes, two images, text only, an image without a place, an empty one.

# Settings of the sources of a mixture.
SETTINGS = {
    "max_patches": {"max_patches": 2},
    "image_size": {"image_size": 112},
    "system_prompt": {"system_prompt": "You count trees."},
    "rate below 1": {"rate": 0.5},
    "rate above 1": {"rate": 2.5},
    "input_spec": {"input_spec": {"window": [0, 4000]}},
}
# Settings of a collator.
OPTIONS = {
    "no VRL": {"vrl_drop_ratio": 0.0},
    "VRL of some": {"vrl_apply_prob": 0.5},
    "VRL in its warm-up": {"vrl_warmup_steps": 2},
    "hidden answers": {"answer_mask_ratio": 0.5},
    "answers cut": {"max_length": 110},
    "left": {"padding_side": "left", "pad_to_multiple_of": 16},
    "padding-free": {"padding_free": True},
}


def pictures():
    return [picture(*size, seed) for seed, size in enumerate(SIZES)]


def write_annotations(folder: Path, **settings) -> dict:
    """Write InternVL JSON Lines with images of several shapes, and return their source."""
    (folder / "images" / "sub").mkdir(parents=True)
    for name, image in zip(("0.png", "sub/1.png"), pictures()):
        image.save(folder / "images" / name)
    write_lines(folder / "rows.jsonl", GOOD)
    paths = {"annotation": str(folder / "rows.jsonl"), "image_root": str(folder / "images")}
    return {"name": folder.name, **paths, **settings}


def write_deep(folder: Path, **settings) -> dict:
    """Write 16-bit images with messages, and return their source."""
    rows = []
    for number in range(3):
        bands = np.random.default_rng(number).integers(0, 5000, (3, 60, 80 + number), dtype=np.uint16)
        write_bands(folder / f"{number}.tif", bands)
        rows.append({"id": f"deep{number}", "image": f"{number}.tif", "conversations": turns(number)})
    write_lines(folder / "rows.jsonl", rows)
    paths = {"annotation": str(folder / "rows.jsonl"), "image_root": str(folder)}
    return {"name": folder.name, **paths, **settings}


def write_released(folder: Path) -> dict:
    """Write a released meta JSON with JPEG degradation."""
    write_annotations(folder)
    fields = {"root": str(folder / "images"), "annotation": str(folder / "rows.jsonl"), "repeat_time": 0.6}
    meta = {"degraded": {**fields, "data_augment": True, "max_dynamic_patch": 3}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return {"released_compatible": True, "sources": [{"meta": str(folder / "meta.json")}]}


def rows_of_split(name, root=None, streaming=False):
    arguments = ScriptArguments(dataset_name=str(name), dataset_test_split="none", dataset_streaming=streaming)
    return list(prepare_rows(open_splits(arguments, root)[0]["train"]))


def write_kinds(folder: Path) -> str:
    """Return a gray image, a palette image, a transparent image and a photo with an EXIF rotation."""
    kinds = {"L.png": "L", "P.png": "P", "RGBA.png": "RGBA"}
    for name, mode in kinds.items():
        pictures()[0].convert(mode).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 40), (200, 40, 90)).save(folder / "turned.jpg", exif=exif, quality=95)
    rows = [{"images": [name], "messages": messages(n)} for n, name in enumerate([*kinds, "turned.jpg"])]
    write_lines(folder / "rows.jsonl", rows)
    return str(folder / "rows.jsonl")


def batches(folder, processor):
    """Yield name, rows, collator options and epoch of each batch."""

    def mixed(name, mixture, epoch=0):
        mixture = load_mixture(mixture)
        opened = open_mixture(mixture, seed=3)
        opened.set_epoch(epoch)
        settings = {source.name: source for source in mixture.sources}
        return f"{name}, epoch {epoch}", list(opened), {"source_settings": settings}, epoch

    for name, (write, _) in FORMATS.items():
        write(folder / name, pictures())
        yield name, rows_of_split(folder / name), {}, 0
    streamed = rows_of_split(folder / "messages", streaming=True)
    # The ids of a stream are hashes of encoded images, which depend on the version of Pillow.
    yield "streamed", [{**row, "id": number} for number, row in enumerate(streamed)], {}, 1
    (folder / "kinds").mkdir()
    yield "kinds of images", rows_of_split(write_kinds(folder / "kinds"), str(folder / "kinds")), {}, 0
    source = write_annotations(folder / "annotated")
    for name, options in OPTIONS.items():
        _, rows, settings, _ = mixed(name, {"sources": [source]})
        yield name, [{**row, STEP: 1} for row in rows], settings | options, 0
    plain = {"sources": [{**source, "name": name, **settings} for name, settings in SETTINGS.items()]}
    for epoch in (0, 1):
        yield mixed("mixture", plain, epoch)
    yield mixed("once", plain | {"resample": "once"}, 1)
    streamed = [{**source, "name": "stream", "streaming": True, "rows": 5, "rate": 1.5}, source]
    for epoch in (0, 1):
        yield mixed("stream", {"sources": streamed, "shuffle_buffer": 3}, epoch)
    yield mixed("deep", {"sources": [write_deep(folder / "deep", input_spec={"window": [0, 4000]})]})
    yield mixed("released", write_released(folder / "released"))


def tensors(batch):
    return {name: torch.as_tensor(values) for name, values in batch.items()}


def record(batch) -> dict:
    """Return a digest of integers, or statistics of pixels."""
    recorded = {}
    for name, values in batch.items():
        found = {"shape": list(values.shape), "dtype": str(values.dtype)}
        if values.is_floating_point():
            numbers = values.double().flatten()
            found["statistics"] = [numbers.mean().item(), numbers.std().item(), *numbers[:: len(numbers) // 6].tolist()]
        else:
            found["sha256"] = hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:16]
        recorded[name] = found
    return recorded


def test_batches_equal_recorded_ones(tokenizer, tmp_path):
    image_processor = ViTPImageProcessor(size={"height": 56, "width": 56}, max_patches=6)
    processor = ViTPProcessor(image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)
    found = {}
    for name, rows, options, epoch in batches(tmp_path, processor):
        collator = ViTPDataCollator(processor, **{"vrl_drop_ratio": 0.75, "seed": 5, **options})
        collator.set_epoch(epoch)
        assert rows and name not in found
        batch, raw = tensors(collator(rows)), tensors(collator.with_raw_tiles()(rows))
        raw["pixel_values"] = normalize_tiles(raw["pixel_values"], image_processor)
        assert_same(raw, batch)
        found[name] = record(batch)
    if os.environ.get("GOLDEN_BATCHES") == "write":
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(RECORDED.read_text())
    assert list(found) == list(expected)
    for name, wanted in expected.items():
        for values in wanted.values():
            if "statistics" in values:
                values["statistics"] = pytest.approx(values["statistics"], rel=1e-5, abs=1e-5)
        assert found[name] == wanted, name
