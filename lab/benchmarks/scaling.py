"""Growth of time and memory with the size of an image, the rows of a stream and the rows of an epoch."""

import io
import itertools
import json
import multiprocessing
import statistics
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import rasterio
import torch
from accelerate.data_loader import SkipBatchSampler
from datasets import Dataset
from rasterio.windows import Window

from lab.benchmarks.measuring import most_resident
from modeling_vitp.configuration_vitp import ViTPVisionConfig
from modeling_vitp.conversations import message_texts
from modeling_vitp.convert.export import export_backbone
from modeling_vitp.image_processing_vitp import ViTPImageProcessor
from modeling_vitp.image_processing_vitp_dense import ViTPSegmentationImageProcessor
from modeling_vitp.images.pixels import to_pixels
from modeling_vitp.images.reading import read_picture
from modeling_vitp.instructions.from_annotations.storage import FEATURES
from modeling_vitp.instructions.mixture import load_mixture, open_mixture
from modeling_vitp.modeling_vitp import ViTPVisionModel
from modeling_vitp.probing.backbones import Backbone, extract, load_backbone
from modeling_vitp.tasks.segmentation.prediction import predict_large
from modeling_vitp.training.batching import GlobalBatchSampler, RankStream

STRIP, ROWS_A_FILE, SOURCE_ROWS, BATCH, BATCHES = 500, 5000, 10_000, 8, 1000
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION |= {"image_size": [224, 224], "patch_size": [16, 16], "attention_bias": True}


# Data for the measurements


def write_scene(path: Path, side: int) -> None:
    """Write a GeoTIFF of noise with three bands of 8 bits and `side` pixels a side."""
    draws = np.random.default_rng(0)
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8", "tiled": True}
    with rasterio.open(path, "w", photometric="RGB", **profile) as file:
        for top in range(0, side, STRIP):
            height = min(STRIP, side - top)
            file.write(draws.integers(0, 256, (3, height, side), dtype=np.uint8), window=Window(0, top, side, height))


def write_tiny_backbone(folder: Path) -> None:
    torch.manual_seed(0)
    export_backbone(ViTPVisionModel(ViTPVisionConfig(**VISION)), folder / "backbone", ViTPImageProcessor())


def write_rows(folder: Path, kind: str, number: int) -> None:
    """Write conversations about a small image as `parquet` or `webdataset`, in files of 5,000 rows."""
    folder.mkdir()
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")

    def turns(row: int) -> list[dict]:
        return [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": str(row)}]

    for start in range(0, number, ROWS_A_FILE):
        ids, stem = range(start, min(start + ROWS_A_FILE, number)), folder / f"train-{start // ROWS_A_FILE:05d}"
        if kind == "parquet":
            rows = [{"id": str(row), "images": [{"bytes": file.getvalue()}], "messages": turns(row)} for row in ids]
            Dataset.from_list(rows, features=FEATURES).to_parquet(f"{stem}.parquet")
            continue
        with tarfile.open(f"{stem}.tar", "w") as archive:
            for row in ids:
                fields = json.dumps({"id": str(row), "messages": turns(row)}).encode()
                for ending, content in (("jpg", file.getvalue()), ("json", fields)):
                    member = tarfile.TarInfo(f"{row:09d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


# Measured functions


class PatchClasses(torch.nn.Module):
    """Segmentation model of two classes: a linear layer on the patches of a backbone."""

    images_per_sample, device, dtype = 1, torch.device("cpu"), torch.float32
    config = SimpleNamespace(num_labels=2, id2label={0: "ground", 1: "tree"})

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone, self.head = backbone, torch.nn.Linear(VISION["hidden_size"], 2)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        logits = self.head(self.backbone.maps(pixel_values, 1)).permute(0, 3, 1, 2)
        return SimpleNamespace(logits=torch.nn.functional.interpolate(logits, pixel_values.shape[-2:], mode="bilinear"))


def predict(folder: Path, side: int) -> None:
    model, processor = PatchClasses(load_backbone(str(folder / "backbone"))), ViTPSegmentationImageProcessor()
    with tempfile.TemporaryDirectory(dir=folder) as output:
        predict_large(model, processor, folder / f"{side}.tif", Path(output) / "classes.tif", window=512, stride=384)


class Scene(torch.utils.data.Dataset):
    """Data set of one image, read as by the probes."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_pixels(read_picture(self.path.read_bytes()), None)


def extract_features(folder: Path, side: int) -> None:
    backbone = load_backbone(str(folder / "backbone"))
    image = Scene(folder / f"{side}.tif")
    with tempfile.TemporaryDirectory(dir=folder) as output:  # an empty folder, without files of earlier measurements
        extract(backbone, 1, image.__getitem__, lambda pixels: backbone.maps(pixels, 1), 224, str(side), Path(output))


def stream(folder: Path, number: int, processes: int, process: int, is_split: bool) -> list[int]:
    """Return the row numbers (the answers) that one process reads; of the first pass if streams are split."""
    source = {"name": folder.name, "folder": str(folder), "streaming": True, "rows": number}
    mixture = load_mixture({"root": str(folder), "sources": [source], "split_streams": bool(is_split)})
    if is_split:
        rows = RankStream(open_mixture(mixture, seed=0).of_process(processes, process), BATCH)
        rows = itertools.takewhile(lambda row: "#" not in row["id"], rows)
    else:
        rows = RankStream(open_mixture(mixture, seed=0), BATCH, num_processes=processes, process_index=process)
    return [int(message_texts(row["messages"][-1])[0]) for row in rows if row is not None]


def sampler(number: int) -> list[float]:
    """Return CPU seconds of the first batch of an epoch, of 1,000 more, and of resuming in the middle."""
    marks = [time.process_time()]
    batches = iter(GlobalBatchSampler(number, BATCH))
    next(batches)
    marks.append(time.process_time())
    deque(islice(batches, BATCHES), maxlen=0)
    marks.append(time.process_time())
    next(iter(SkipBatchSampler(GlobalBatchSampler(number, BATCH), skip_batches=number // BATCH // 2)))
    return np.diff([*marks, time.process_time()]).tolist()


def mixture(folder: Path, number: int) -> list[float]:
    """Return the times of [`sampler`] for the rows of a mixture, whose one source repeats few rows many times."""
    source = {"name": folder.name, "folder": str(folder), "rate": number / SOURCE_ROWS}
    opened = load_mixture({"root": str(folder), "sources": [source]})
    marks = [time.process_time()]
    rows = open_mixture(opened, seed=0)
    rows[0]
    marks.append(time.process_time())
    deque((rows[index] for index in range(min(BATCHES * BATCH, number))), maxlen=0)
    marks.append(time.process_time())
    del rows
    rows = open_mixture(opened, seed=0)
    rows.set_epoch(1)
    rows[number // 2]
    return np.diff([*marks, time.process_time()]).tolist()


def measure_call(case: str, *values: Path | int) -> dict:
    """Run a function above in this process and return wall-clock seconds, CPU seconds and peak memory in GiB."""
    calls = {
        "predict_large": predict,
        "features": extract_features,
        "stream": stream,
        "sampler": sampler,
        "mixture": mixture,
    }
    before, start, worked = most_resident(), time.perf_counter(), time.process_time()
    result = calls[case](*values)
    spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - worked}
    return {**spent, "peak": most_resident(), "before": before, "result": result}


# Tables of results


def in_processes(*calls: list) -> list[dict]:
    """Run [`measure_call`] for each call in a separate process, all at once, and return the results.

    The processes are forks of one that has imported this module and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(len(calls), maxtasksperchild=1) as pool:
        return pool.starmap(measure_call, calls, chunksize=1)


def median_and_range(values: Iterable[float], digits: str) -> str:
    """Format median, minimum and maximum of several values, or a single value."""
    values = list(values)
    median, low, high = (f"{value:{digits}}" for value in (statistics.median(values), min(values), max(values)))
    return median if len(values) == 1 else f"{median} ({low}, {high})"


def over_pixels(folder: Path, sides: list[int], runs: int) -> Iterator[list]:
    """Yield table rows: case, image size, CPU seconds a megapixel, peak memory in GiB."""
    write_tiny_backbone(folder)
    for side in sides:
        write_scene(folder / f"{side}.tif", side)
        # Pillow refuses larger images; probes read those with the option `tile`.
        cases = ("features", "predict_large") if side**2 <= 2 * PIL.Image.MAX_IMAGE_PIXELS else ("predict_large",)
        for case in cases:
            found = [in_processes([case, folder, side])[0] for _ in range(runs)]
            spent = median_and_range((one["cpu"] / side**2 * 1e6 for one in found), ".3f")
            yield [case, f"{side:,}²", spent, f"{max(one['peak'] for one in found):.2f}"]
        (folder / f"{side}.tif").unlink()


def over_rows(folder: Path, numbers: list[int], runs: int) -> Iterator[list]:
    """Yield table rows: stream, rows, processes, CPU microseconds a row, rows a second, peak memory in GiB.

    CPU time and memory are those of one process; rows a second are by wall clock, over all processes.

    Raises:
        RuntimeError: if a row is lost or repeated.
    """
    for number in numbers:
        for kind in ("parquet", "webdataset"):
            data = folder / f"{kind}-{number}"
            write_rows(data, kind, number)
            for processes, is_split in ((1, 0), (2, 0), (2, 1)):
                calls = [["stream", data, number, processes, process, is_split] for process in range(processes)]
                turns = [in_processes(*calls) for _ in range(runs)]
                if any(sorted(row for one in turn for row in one["result"]) != list(range(number)) for turn in turns):
                    raise RuntimeError(f"{kind}, {number} rows, {processes} processes: a row is lost or repeated.")
                worked = median_and_range((1e6 * max(one["cpu"] for one in turn) / number for turn in turns), ".0f")
                speed = median_and_range((number / max(one["seconds"] for one in turn) for turn in turns), ".0f")
                peak = max(one["peak"] for turn in turns for one in turn)
                name = f"stream of {kind}{', split' * is_split}"
                yield [name, f"{number:,}", processes, worked, speed, f"{peak:.2f}"]


def over_epochs(folder: Path, numbers: list[int], runs: int) -> Iterator[list]:
    """Yield table rows: case, rows, seconds to the first batch, for 1,000 more and to resume, additional GiB."""
    source = folder / "source"
    write_rows(source, "parquet", SOURCE_ROWS)
    for number in numbers:
        for case in (["sampler", number], ["mixture", source, number]):
            found = [in_processes(case)[0] for _ in range(runs)]
            seconds = [median_and_range(values, ".2f") for values in zip(*(one["result"] for one in found))]
            yield [case[0], f"{number:,}", *seconds, f"{max(one['peak'] - one['before'] for one in found):.2f}"]
