"""Parts of several benchmarks: shapes of a ViT, a training step, clock, peak memory, description of the device."""

import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_vitp.configuration_vitp import ViTPVisionConfig
from modeling_vitp.modeling_vitp import ViTPVisionModel

SHAPES = {
    "vit_s": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit_l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


def build_vit(shape: str, image_size: int, patch_size: int) -> ViTPVisionModel:
    """Build an InternViT of a shape, a key of [`SHAPES`], with random weights and layer scale."""
    torch.manual_seed(0)
    sides = {"image_size": [image_size] * 2, "patch_size": [patch_size] * 2}
    return ViTPVisionModel(ViTPVisionConfig(**SHAPES[shape], **sides, attention_bias=True))


def training_step(
    model: torch.nn.Module, inputs: dict, device: torch.device, bf16: bool, fused: bool | None
) -> Callable[[], torch.Tensor]:
    """Return a function that does forward, backward and AdamW on `inputs`, and returns the loss.

    Args:
        bf16: whether to compute in bfloat16 autocast.
        fused: whether to use the fused AdamW. `None` is PyTorch's choice, which `False` is not on a GPU.
    """
    model = model.to(device).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5, fused=fused)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def now() -> float:
    """Return the time in seconds after a GPU has finished its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def most_resident() -> float:
    """Return the peak resident memory of this process, in GiB.

    On Linux, `getrusage` is not used because it starts with the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def describe_device(device: torch.device) -> str:
    """Return device, its name or the number of threads, and the version of PyTorch."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{torch.get_num_threads()} thread(s), {platform.machine()}"
    return f"{device.type}, {where}; PyTorch {torch.__version__}"
