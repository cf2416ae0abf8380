"""Images a second of the data loader: decode, tile and collate, beside bare decode and resize of the same images.

    python recipes/benchmark_loader.py --workers 2
    python recipes/benchmark_loader.py --mixture my_mixture.yaml --processor outputs/my_run

Both go through the same kind of data loader with the same workers, in turn, `--rounds` times; the median counts. The
bare loader decodes an image and resizes it to the canvas that its tiles cover and to the thumbnail, so to the pixels
that the model sees, and does nothing else. Without a mixture the images are photographs of noise and gradients, as JPEG
files of several sizes.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from modeling_vitp import ViTPDataCollator, ViTPImageProcessor, ViTPProcessor
from modeling_vitp.instructions.mixture import open_mixture
from modeling_vitp.instructions.mixture_file import load_mixture
from modeling_vitp.instructions.rows import load_images
from modeling_vitp.training.from_scratch import build_tokenizer

SIZES = ((512, 512), (800, 800), (1024, 768), (600, 400))  # of synthetic images, in pixels


def bare_collator(processor: ViTPProcessor) -> Callable[[list[dict]], torch.Tensor]:
    """Decode and resize, with the resampling of the image processor."""
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


def images_per_second(dataset: Dataset, collator: Callable, args: argparse.Namespace, num_images: int) -> float:
    """Over one pass, without the start of the workers: the clock starts with the first batch."""
    loader = DataLoader(dataset, batch_size=args.batch_size, num_workers=args.workers, collate_fn=collator)
    batches = iter(loader)
    next(batches)
    start, seen = time.perf_counter(), 0
    for _ in batches:
        seen += 1
    first = args.batch_size / len(dataset)
    return num_images * (1 - first) / (time.perf_counter() - start)


def synthetic_mixture(folder: Path, num_rows: int) -> dict:
    """JPEG files with two questions each, as InternVL JSON Lines."""
    generator = np.random.default_rng(0)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(num_rows):
            width, height = SIZES[number % len(SIZES)]
            gradient = np.linspace(0, 200, width)[None, :, None] + generator.integers(0, 55, (height, width, 3))
            PIL.Image.fromarray(gradient.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
            box = "<ref>ship</ref><box>[[102, 640, 231, 707]]</box>"
            turns = [("human", "<image>\nHow many ships are in the harbour?"), ("gpt", "There are 4 ships.")]
            turns += [("human", "Where is the largest one?"), ("gpt", box)]
            conversation = [{"from": role, "value": value} for role, value in turns]
            file.write(json.dumps({"image": f"{number}.jpg", "conversations": conversation}) + "\n")
    source = {"name": "synthetic", "annotation": "rows.jsonl", "image_root": "."}
    return {"root": str(folder), "sources": [source]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixture", help="mixture file of local sources; synthetic images if not given")
    parser.add_argument("--processor", help="folder or Hub id of a ViTPProcessor; 448 pixels, 12 tiles if not given")
    parser.add_argument("--rows", type=int, default=160, help="rows of a pass (160)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the data loader (2)")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a batch (4)")
    parser.add_argument("--vrl_drop_ratio", type=float, default=0.75)
    parser.add_argument("--rounds", type=int, default=3, help="passes of each kind (3)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        mixture = load_mixture(args.mixture or synthetic_mixture(Path(folder), args.rows))
        dataset = open_mixture(mixture, seed=0)
        dataset = [dataset[index] for index in range(min(args.rows, len(dataset)))]
        num_images = sum(len(row["images"]) for row in dataset)
        if args.processor:
            processor = ViTPProcessor.from_pretrained(args.processor)
        else:
            tokenizer = build_tokenizer(["How many ships are in the harbour? There are 4 ships."], vocab_size=400)
            processor = ViTPProcessor(ViTPImageProcessor(), tokenizer)
        collators = {
            "decode and resize": bare_collator(processor),
            "decode, tile, collate": ViTPDataCollator(
                processor,
                vrl_drop_ratio=args.vrl_drop_ratio,
                source_settings={source.name: source.settings for source in mixture.sources},
            ),
        }
        rates = {name: [] for name in collators}
        for _ in range(args.rounds):
            for name, collator in collators.items():
                rates[name].append(images_per_second(dataset, collator, args, num_images))
    print(f"{num_images} images, {args.workers} workers, batches of {args.batch_size}")
    print("| | images / s |\n|---|---|")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"| {name} | {median:.1f} |")
    print(f"ratio: {medians['decode, tile, collate'] / medians['decode and resize']:.2f}")


if __name__ == "__main__":
    main()
