"""Images a second of a data loader with our collator, with bare decode and resize, and with TRL's collator."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from transformers import GotOcr2ImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_vitp.convert.checkpoint import native_processor
from modeling_vitp.convert.export import image_settings
from modeling_vitp.instructions import collator as collating
from modeling_vitp.instructions.collator import ViTPDataCollator
from modeling_vitp.instructions.raw_tiles import RawTileProcessor, normalize_tiles
from modeling_vitp.instructions.rows import load_images
from modeling_vitp.processing_vitp import ViTPProcessor

SIZES = ((512, 512), (800, 800), (1024, 768), (600, 400))  # of synthetic images, in pixels


def bare_collator(processor: ViTPProcessor) -> Callable[[list[dict]], torch.Tensor]:
    """Return a collator that only decodes and resizes, with the resampling of the image processor."""
    settings = processor.image_processor
    height, width = settings.size["height"], settings.size["width"]

    def resize(image: torch.Tensor, size: list[int]) -> torch.Tensor:
        return tv.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)

    def collate(rows: list[dict]) -> torch.Tensor:
        total = torch.zeros(())
        for row in rows:
            images = load_images(row)
            for image in images:
                pixels = tv.pil_to_tensor(image.convert("RGB"))
                most = max(settings.max_patches // len(images), 1)
                columns, lines = get_optimal_tiled_canvas(image.size[::-1], (height, width), 1, most)
                total += resize(pixels, [height * lines, width * columns])[0, 0, 0]
                if columns * lines > 1:
                    total += resize(pixels, [height, width])[0, 0, 0]
        return total

    return collate


def stock_collator(processor: ViTPProcessor) -> Callable[[list[dict]], dict]:
    """Return TRL's collator with transformers' InternVL processor, with our tokenizer and tiles."""
    with tempfile.TemporaryDirectory() as folder:
        processor.tokenizer.save_pretrained(folder)
        image_processor = GotOcr2ImageProcessor(**image_settings(processor.image_processor))
        stock = native_processor(Path(folder), image_processor, processor)
    collator = DataCollatorForVisionLanguageModeling(stock, assistant_only_loss=True)
    return lambda rows: collator([{**row, "images": load_images(row)} for row in rows])


@contextmanager
def timed(owner: object, name: str, seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the time of each call of a function to the seconds of a part."""
    function = getattr(owner, name)

    def timing(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - start

    with patch.object(owner, name, timing):
        yield


def seconds_by_part(collator: ViTPDataCollator, rows: list[dict], batch_size: int) -> dict[str, float]:
    """Return the seconds of one process for all rows, by part.

    The part "normalize" runs on the device in training, here the CPU, and does not belong to the loader.
    """
    collator, parts = collator.with_raw_tiles(), ("read and decode", "to a tensor", "resize", "tokenize", "collate")
    functions = [
        (collating, "load_images"),
        (tv, "pil_to_tensor"),
        (RawTileProcessor, "resize"),
        (type(collator.processor.tokenizer), "__call__"),
        (collating, "stack"),
    ]
    seconds = dict.fromkeys([*parts, "draw, template, check", "normalize"], 0.0)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    collator(batches[0])
    with ExitStack() as stack:
        for part, function in zip(parts, functions):
            stack.enter_context(timed(*function, seconds, part))
        for batch in batches:
            start, before = time.perf_counter(), sum(seconds[part] for part in parts)
            tiles = collator(batch)["pixel_values"]
            end, known = time.perf_counter(), sum(seconds[part] for part in parts) - before
            seconds["draw, template, check"] += end - start - known
            normalize_tiles(tiles, collator.processor.image_processor)
            seconds["normalize"] += time.perf_counter() - end
    return seconds


def images_per_second(
    dataset: Dataset, collator: Callable, batch_size: int, num_workers: int, num_images: int
) -> float:
    """Measure one pass without the start of the workers: the clock starts with the first batch."""
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collator)
    batches = iter(loader)
    next(batches)
    start, seen = time.perf_counter(), 0
    for _ in batches:
        seen += 1
    first = batch_size / len(dataset)
    return num_images * (1 - first) / (time.perf_counter() - start)


def synthetic_mixture(folder: Path, num_rows: int, side: int | None = None) -> dict:
    """Write JPEG files with two questions each as InternVL JSON Lines; the image size is `side` or one of `SIZES`."""
    sizes = SIZES if side is None else ((side, side),)
    generator = np.random.default_rng(0)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(num_rows):
            width, height = sizes[number % len(sizes)]
            gradient = np.linspace(0, 200, width)[None, :, None] + generator.integers(0, 55, (height, width, 3))
            PIL.Image.fromarray(gradient.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
            box = "<ref>ship</ref><box>[[102, 640, 231, 707]]</box>"
            turns = [("human", "<image>\nHow many ships are in the harbor?"), ("gpt", "There are 4 ships.")]
            turns += [("human", "Where is the largest one?"), ("gpt", box)]
            conversation = [{"from": role, "value": value} for role, value in turns]
            file.write(json.dumps({"image": f"{number}.jpg", "conversations": conversation}) + "\n")
    source = {"name": "synthetic", "annotation": "rows.jsonl", "image_root": "."}
    return {"root": str(folder), "sources": [source]}
