"""A checkpoint in another layout, beside reading and writing the same bytes with safetensors."""

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling_vitp.convert.checkpoint import convert_checkpoint
from modeling_vitp.convert.keys import VISION_TOWER, place
from modeling_vitp.convert.tensor_files import SINGLE_FILE
from modeling_vitp.recipes.benchmarks.peers.features import build_vit
from modeling_vitp.recipes.benchmarks.peers.turns import Comparison


def conversion(shape: str, dtype: torch.dtype, folder: Path) -> Comparison:
    """A ViT of InternViT's own naming to ours: queries, keys and values, which are one tensor there, are three here.

    Args:
        shape: one of [`~modeling_vitp.recipes.benchmarks.detection_speed.SHAPES`].
        folder: for the checkpoints.
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
            key, part, parts = place(VISION_TOWER + name, "original_vision")
            assert torch.equal(tensor, same[key].chunk(parts)[part] if parts > 1 else same[key]), f"{name} differs"
        assert sum(map(torch.numel, new.values())) == sum(map(torch.numel, same.values())), "tensors are missing"

    calls = {"ViTP, convert_checkpoint": converted, "safetensors, load_file and save_file": copied}
    return Comparison(f"a ViT of {size / 1e6:.0f} MB under other names", calls, check)
