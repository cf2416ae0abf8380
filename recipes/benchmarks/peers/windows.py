"""The classes of a large image, window by window, from its file to a GeoTIFF: ours, MONAI's and TerraTorch's."""

import itertools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin

from modeling_vitp.dense.prediction import BLOCK, predict_large
from modeling_vitp.image_processing_vitp_dense import ViTPSegmentationImageProcessor
from modeling_vitp.modeling_vitp_dense import ViTPForSemanticSegmentation
from modeling_vitp.recipes.benchmarks.peers.features import build_vit
from modeling_vitp.recipes.benchmarks.peers.turns import Comparison

BATCH = 4
PROFILE = {"driver": "GTiff", "dtype": "uint8", "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
PROFILE |= {"compress": "deflate", "transform": from_origin(500000, 4000000, 1, 1)}


def build_model(shape: str, window: int, dtype: torch.dtype) -> ViTPForSemanticSegmentation:
    """A model with a narrow head, so that what is around the model counts."""
    vit = build_vit(shape, 448, torch.float32)
    narrow = {"hidden_size": 64, "use_auxiliary_head": False, "num_labels": 7}
    model = ViTPForSemanticSegmentation.from_backbone(
        vit, "pyramid", image_size=window, backbone_kwargs={"pyramid_channels": 64}, **narrow
    )
    return model.to(vit.device, dtype).eval()


def write_scene(path: Path, height: int, width: int) -> None:
    """A GeoTIFF of waves of several lengths and noise."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / length) + np.cos(columns / length) for length in (9, 23, 57)]
    pixels = 40 * (np.stack(waves) + 2) + random.integers(0, 96, (3, height, width))
    with rasterio.open(path, "w", **PROFILE, count=3, height=height, width=width) as file:
        file.write(pixels.astype(np.uint8))


def windows(
    shape: str, dtype: torch.dtype, folder: Path, size: tuple[int, int] = (640, 832), window: int = 256
) -> Comparison:
    """Windows that overlap by a quarter, whose logits are averaged with equal weights.

    Args:
        shape: of the ViT, one of [`~modeling_vitp.recipes.benchmarks.detection_speed.SHAPES`].
        folder: for the image and the maps.
        size: height and width of the image.
        window: side of a window, a multiple of 32.
    """
    model, processor = build_model(shape, window, dtype), ViTPSegmentationImageProcessor()
    image, stride, numbers = folder / "scene.tif", window - window // 4, itertools.count()
    write_scene(image, *size)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels.to(model.device, model.dtype)).logits.float()

    def ours() -> Path:
        target = folder / f"{next(numbers)}.tif"
        settings = {"window": window, "stride": stride, "batch_size": BATCH}
        predict_large(model, processor, image, target, **settings)
        return target

    def whole(infer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Path]:
        """With the image and its logits in memory."""

        @torch.inference_mode()
        def call() -> Path:
            target = folder / f"{next(numbers)}.tif"
            with rasterio.open(image) as file:
                pixels = torch.from_numpy(file.read())
            options = {"do_resize": False, "input_data_format": "channels_first", "return_tensors": "pt"}
            logits = infer(processor(pixels, **options).pixel_values)
            with rasterio.open(target, "w", **PROFILE, count=1, height=size[0], width=size[1]) as file:
                file.write(logits.argmax(1).to(torch.uint8).cpu().numpy())
            return target

        return call

    calls = {"ViTP, predict_large": ours}
    peers = {
        "MONAI, sliding_window_inference": ("monai", lambda: monai_windows(forward, window, stride)),
        "TerraTorch, tiled_inference": ("terratorch", lambda: terratorch_windows(forward, window, stride)),
    }
    absent = {name: package for name, (package, _) in peers.items() if not find_spec(package)}
    calls |= {name: whole(infer()) for name, (_, infer) in peers.items() if name not in absent}

    def check(results: dict[str, Path]) -> None:
        maps = [rasterio.open(path).read(1) for path in results.values()]
        assert len(np.unique(maps[0])) > 1, "the map has one class alone, which any windows would give"
        for other in maps[1:]:
            # Sums of other order round otherwise, which turns a class where two are alike.
            assert (other != maps[0]).mean() < (1e-4 if dtype == torch.float32 else 1e-2), "the maps differ"

    return Comparison(f"classes of an image of {size[0]} x {size[1]}, windows of {window}²", calls, check, absent)


def monai_windows(forward: Callable, window: int, stride: int) -> Callable[[torch.Tensor], torch.Tensor]:
    from monai.inferers import sliding_window_inference

    overlap = (window - stride) / window
    return lambda pixels: sliding_window_inference(pixels, (window, window), BATCH, forward, overlap)


def terratorch_windows(forward: Callable, window: int, stride: int) -> Callable[[torch.Tensor], torch.Tensor]:
    from terratorch.tasks.tiled_inference import tiled_inference

    equal = {"delta": 0, "blend_overlaps": False, "padding": False}
    return lambda pixels: tiled_inference(forward, pixels, crop=window, stride=stride, batch_size=BATCH, **equal)
