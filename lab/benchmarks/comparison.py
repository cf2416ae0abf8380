"""Speed comparisons with other libraries on the same input and weights.

Features of a ViT, windows of a large image, a fine-tuning step, and conversion.
"""

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Config, UperNetConfig, UperNetForSemanticSegmentation

from lab.benchmarks import measuring
from lab.benchmarks.measuring import SHAPES
from modeling_vitp.convert.checkpoint import convert_checkpoint
from modeling_vitp.convert.keys import VISION_TOWER, locate_tensor
from modeling_vitp.convert.tensor_files import SINGLE_FILE
from modeling_vitp.convert.timm_folder import ARCHITECTURE, timm_model_args, weights_in_layout
from modeling_vitp.image_processing_vitp_dense import ViTPSegmentationImageProcessor
from modeling_vitp.modeling_vitp import ViTPVisionModel
from modeling_vitp.modeling_vitp_dense import ViTPForSemanticSegmentation
from modeling_vitp.tasks.segmentation.prediction import BLOCK, predict_large
from modeling_vitp.training.config import default_device

HEADER = ["", "runs", "s: min", "median", "max", "of ViTP's", "CPU time, s", "of ViTP's"]
PATCH = 14
WINDOW_BATCH = 4
PROFILE = {"driver": "GTiff", "dtype": "uint8", "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
PROFILE |= {"compress": "deflate", "transform": from_origin(500000, 4000000, 1, 1)}
NUM_LABELS, STEP_BATCH = 7, 2  # Batch norm of pooled maps needs two images.
OURS, SAME = "ViTP, UPerNet on ViT-Adapter", "transformers' UPerNet on the same ViT-Adapter"
PYRAMID, DINOV2 = "ViTP, UPerNet on the feature pyramid", "transformers' UPerNet on DINOv2"


@dataclass
class Comparison:
    """Calls of several libraries that compute the same result.

    Args:
        what: description of the computation and its input.
        calls: functions by name; ours is the first.
        check: function that takes the results by name and raises an `AssertionError` if they differ.
        absent: names of libraries that are not installed, with the package to install.
    """

    what: str
    calls: dict[str, Callable[[], Any]]
    check: Callable[[dict[str, Any]], None]
    absent: dict[str, str] = field(default_factory=dict)


def take_turns(comparison: Comparison, runs: int) -> dict[str, list[tuple[float, float]]]:
    """Check the results, then time each call `runs` times in turn.

    Returns:
        Wall-clock and CPU seconds of each run, by name. The first turn, whose results are checked, is not timed.
    """
    comparison.check({name: call() for name, call in comparison.calls.items()})
    seconds = {name: [] for name in comparison.calls}
    for _ in range(runs):
        for name, call in comparison.calls.items():
            start, start_of_cpu = measuring.now(), time.process_time()
            call()
            seconds[name].append((measuring.now() - start, time.process_time() - start_of_cpu))
    return seconds


def rows_of(comparison: Comparison, seconds: dict[str, list[tuple[float, float]]]) -> list[list[str]]:
    """Return a row of [`HEADER`] for each call and each library that is not installed."""
    rows, first = [], None
    for name, turns in seconds.items():
        clock, cpu = zip(*turns)
        medians = statistics.median(clock), statistics.median(cpu)
        first = first or medians
        ratios = [f"{mine / ours:.2f}" for mine, ours in zip(medians, first)]
        numbers = [f"{value:.3g}" for value in (min(clock), medians[0], max(clock))]
        rows.append([name, len(turns), *numbers, ratios[0], f"{medians[1]:.3g}", ratios[1]])
    for name, package in comparison.absent.items():
        rows.append([name, f"not installed: pip install {package}", *[""] * (len(HEADER) - 2)])
    return rows


def build_vit(shape: str, image_size: int, dtype: torch.dtype) -> ViTPVisionModel:
    """Build an InternViT with random weights and layer scale, on the accelerator if available."""
    return measuring.build_vit(shape, image_size, PATCH).to(default_device(), dtype).eval()


def timm_vit(vit: ViTPVisionModel) -> nn.Module:
    """Build timm's ViT with the same shape and weights."""
    from timm import create_model

    peer = create_model(ARCHITECTURE, num_classes=0, **timm_model_args(vit.config))
    peer.load_state_dict(weights_in_layout(vit, "timm"))
    return peer.to(vit.device, vit.dtype).eval()


def plain_features(pixels: torch.Tensor, weights: dict[str, torch.Tensor], num_heads: int, depth: int, eps: float):
    """Compute the last hidden states of the ViT with the arithmetic of InternViT's own code, without FlashAttention.

    Args:
        pixels: `(batch, channels, height, width)`, at the image size of the position embeddings.
        weights: weights under the names of InternViT's own code.

    Returns:
        `(batch, 1 + patches, hidden_size)`.
    """

    def of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def normed(states: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(states, states.shape[-1:], *of(name), eps)

    patches = F.conv2d(pixels, *of("embeddings.patch_embedding"), stride=PATCH).flatten(2).transpose(1, 2)
    first = weights["embeddings.class_embedding"].expand(len(pixels), -1, -1)
    states = torch.cat([first, patches], 1) + weights["embeddings.position_embedding"]
    for index in range(depth):
        layer = f"encoder.layers.{index}"
        fused = F.linear(normed(states, f"{layer}.norm1"), *of(f"{layer}.attn.qkv"))
        queries, keys, values = fused.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
        attended = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        states = states + F.linear(attended, *of(f"{layer}.attn.proj")) * weights[f"{layer}.ls1"]
        hidden = F.gelu(F.linear(normed(states, f"{layer}.norm2"), *of(f"{layer}.mlp.fc1")))
        states = states + F.linear(hidden, *of(f"{layer}.mlp.fc2")) * weights[f"{layer}.ls2"]
    return states


def compare_features(shape: str, dtype: torch.dtype, image_size: int = 448) -> Comparison:
    """Compare the computation of the features of one image.

    Args:
        shape: a key of [`~lab.benchmarks.measuring.SHAPES`].
        image_size: side in pixels, a multiple of 14.
    """
    vit = build_vit(shape, image_size, dtype)
    config, weights = vit.config, weights_in_layout(vit, "original_vision")
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(vit.device, dtype)
    plain = functools.partial(
        plain_features, pixels, weights, config.num_attention_heads, config.num_hidden_layers, config.layer_norm_eps
    )
    calls = {"ViTP, ViTPVisionModel": lambda: vit(pixels).last_hidden_state}
    absent = {}
    if find_spec("timm"):
        peer = timm_vit(vit)
        calls["timm, VisionTransformer"] = lambda: peer.forward_features(pixels)
    else:
        absent["timm, VisionTransformer"] = "timm"
    calls["the original's layers, plainly"] = plain

    def check(results: dict[str, torch.Tensor]) -> None:
        ours, *others = results.values()
        for other in others:
            apart = (other - ours).float().abs().max() / ours.float().abs().max()
            assert apart < (1e-5 if dtype == torch.float32 else 5e-2), f"features differ by {apart:.1e} of the largest"

    calls = {name: torch.inference_mode()(call) for name, call in calls.items()}
    return Comparison(f"features of an image of {image_size}²", calls, check, absent)


def build_narrow_model(shape: str, window: int, dtype: torch.dtype) -> ViTPForSemanticSegmentation:
    """Build a model with a narrow head, so that the time outside the model dominates."""
    vit = build_vit(shape, 448, torch.float32)
    narrow = {"hidden_size": 64, "use_auxiliary_head": False, "num_labels": 7}
    model = ViTPForSemanticSegmentation.from_backbone(
        vit, "pyramid", image_size=window, backbone_kwargs={"pyramid_channels": 64}, **narrow
    )
    return model.to(vit.device, dtype).eval()


def write_waves(path: Path, height: int, width: int) -> None:
    """Write a GeoTIFF of waves of several lengths and noise."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / length) + np.cos(columns / length) for length in (9, 23, 57)]
    pixels = 40 * (np.stack(waves) + 2) + random.integers(0, 96, (3, height, width))
    with rasterio.open(path, "w", **PROFILE, count=3, height=height, width=width) as file:
        file.write(pixels.astype(np.uint8))


def compare_windows(
    shape: str, dtype: torch.dtype, folder: Path, size: tuple[int, int] = (640, 832), window: int = 256
) -> Comparison:
    """Compare prediction in windows that overlap by a quarter, whose logits are averaged with equal weights.

    Args:
        shape: shape of the ViT, a key of [`~lab.benchmarks.measuring.SHAPES`].
        folder: folder for the image and the maps.
        size: height and width of the image.
        window: side of a window, a multiple of 32.
    """
    model, processor = build_narrow_model(shape, window, dtype), ViTPSegmentationImageProcessor()
    image, stride, numbers = folder / "scene.tif", window - window // 4, itertools.count()
    write_waves(image, *size)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels.to(model.device, model.dtype)).logits.float()

    def ours() -> Path:
        target = folder / f"{next(numbers)}.tif"
        settings = {"window": window, "stride": stride, "batch_size": WINDOW_BATCH}
        predict_large(model, processor, image, target, **settings)
        return target

    def whole(infer: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Path]:
        """Predict with the whole image and its logits in memory."""

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
    libraries = {
        "MONAI, sliding_window_inference": ("monai", lambda: monai_windows(forward, window, stride)),
        "TerraTorch, tiled_inference": ("terratorch", lambda: terratorch_windows(forward, window, stride)),
    }
    absent = {name: package for name, (package, _) in libraries.items() if not find_spec(package)}
    calls |= {name: whole(infer()) for name, (_, infer) in libraries.items() if name not in absent}

    def check(results: dict[str, Path]) -> None:
        maps = [rasterio.open(path).read(1) for path in results.values()]
        assert len(np.unique(maps[0])) > 1, "the map has a single class, so it does not test the windows"
        for other in maps[1:]:
            # The order of a sum changes its rounding, and with it the class of pixels with almost equal logits.
            assert (other != maps[0]).mean() < (1e-4 if dtype == torch.float32 else 1e-2), "the maps differ"

    return Comparison(f"classes of an image of {size[0]} x {size[1]}, windows of {window}²", calls, check, absent)


def monai_windows(forward: Callable, window: int, stride: int) -> Callable[[torch.Tensor], torch.Tensor]:
    from monai.inferers import sliding_window_inference

    overlap = (window - stride) / window
    return lambda pixels: sliding_window_inference(pixels, (window, window), WINDOW_BATCH, forward, overlap)


def terratorch_windows(forward: Callable, window: int, stride: int) -> Callable[[torch.Tensor], torch.Tensor]:
    from terratorch.tasks.tiled_inference import tiled_inference

    equal = {"delta": 0, "blend_overlaps": False, "padding": False}
    return lambda pixels: tiled_inference(forward, pixels, crop=window, stride=stride, batch_size=WINDOW_BATCH, **equal)


def on_dinov2(shape: str, image_size: int, **head) -> UperNetForSemanticSegmentation:
    """Build UPerNet on DINOv2, whose feature maps of four layers all have the stride of its patches, 14 pixels."""
    settings = dict(SHAPES[shape])
    settings["mlp_ratio"] = settings.pop("intermediate_size") // settings["hidden_size"]
    depth = settings["num_hidden_layers"]
    stages = [f"stage{depth * part // 4}" for part in (1, 2, 3, 4)]
    backbone = Dinov2Config(**settings, image_size=image_size, patch_size=14, out_features=stages)
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=NUM_LABELS, **head))


def on_same(model: ViTPForSemanticSegmentation, **head) -> UperNetForSemanticSegmentation:
    """Build transformers' UPerNet with copies of our backbone and heads."""
    peer = UperNetForSemanticSegmentation(UperNetConfig(num_labels=NUM_LABELS, **head))
    peer.backbone = copy.deepcopy(model.backbone)
    peer.decode_head, peer.auxiliary_head = copy.deepcopy(model.decode_head), copy.deepcopy(model.auxiliary_head)
    return peer


def compare_training_step(
    shape: str, dtype: torch.dtype, image_size: int = 224, adapter: dict | None = None, **head
) -> Comparison:
    """Compare a step of forward, backward and AdamW on two images, with bfloat16 autocast as in training.

    Args:
        shape: shape of the ViT, a key of [`~lab.benchmarks.measuring.SHAPES`].
        image_size: side in pixels, a multiple of 224.
        adapter, head: settings of the ViT-Adapter and of UPerNet.
    """
    device, vit = default_device(), build_vit(shape, image_size, torch.float32)
    ours = ViTPForSemanticSegmentation.from_backbone(
        vit, image_size=image_size, backbone_kwargs=adapter, num_labels=NUM_LABELS, **head
    )
    models = {
        OURS: ours,
        SAME: on_same(ours, **head),
        PYRAMID: ViTPForSemanticSegmentation.from_backbone(
            vit, "pyramid", image_size=image_size, num_labels=NUM_LABELS, **head
        ),
        DINOV2: on_dinov2(shape, image_size, **head),
    }
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randn(STEP_BATCH, 3, image_size, image_size, generator=draws).to(device)
    labels = torch.randint(NUM_LABELS, (STEP_BATCH, image_size, image_size), generator=draws).to(device)

    def check(results: dict[str, torch.Tensor]) -> None:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # Our losses are summed in float32.
        assert abs(results[SAME] - results[OURS]) < tolerance * results[OURS], "the losses of the same model differ"

    inputs, bf16 = {"pixel_values": pixels, "labels": labels}, dtype == torch.bfloat16
    calls = {name: measuring.training_step(model, inputs, device, bf16, fused=True) for name, model in models.items()}
    return Comparison(f"a step on {STEP_BATCH} images of {image_size}²", calls, check)


def compare_conversion(shape: str, dtype: torch.dtype, folder: Path) -> Comparison:
    """Compare the conversion of InternViT's own checkpoint, which splits the fused query, key and value tensors.

    Args:
        shape: a key of [`~lab.benchmarks.measuring.SHAPES`].
        folder: folder for the checkpoints.
    """
    vit, ours, source = build_vit(shape, 448, dtype).cpu(), folder / "vit", folder / "original"
    vit.save_pretrained(ours)
    convert_checkpoint(ours, source, "original", license="apache-2.0")
    size, numbers = (source / SINGLE_FILE).stat().st_size, itertools.count()

    def converted() -> Path:
        return convert_checkpoint(source, folder / f"converted{next(numbers)}") / SINGLE_FILE

    def copied() -> Path:
        target = folder / f"copied{next(numbers)}" / SINGLE_FILE
        target.parent.mkdir()
        save_file(load_file(source / SINGLE_FILE), target, {"format": "pt"})
        return target

    def check(results: dict[str, Path]) -> None:
        new, same = map(load_file, results.values())
        for name, tensor in new.items():
            key, part, parts = locate_tensor(VISION_TOWER + name, "original_vision")
            assert torch.equal(tensor, same[key].chunk(parts)[part] if parts > 1 else same[key]), f"{name} differs"
        assert sum(map(torch.numel, new.values())) == sum(map(torch.numel, same.values())), "tensors are missing"

    calls = {"ViTP, convert_checkpoint": converted, "safetensors, load_file and save_file": copied}
    return Comparison(f"a ViT of {size / 1e6:.0f} MB under other names", calls, check)
