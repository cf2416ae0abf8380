"""`eva`, the command of kaiko-eva, with exported backbones as the model `vitp`."""

import torch
from eva.__main__ import main
from eva.vision.models.networks.backbones import backbone_registry
from torch import nn

from modeling_vitp.probing.backbones import load_backbone


@backbone_registry.register("vitp")
class ExportedBackbone(nn.Module):
    """Frozen backbone with one vector for each image, as in `vitp probe`, or with a map of its patch tokens.

    Args:
        folder: folder or Hub id of an exported backbone.
        pooling: `mean` of the patch tokens, `cls`, or `cls_mean`.
        out_indices: 1 for a list of one map, as tasks of segmentation expect, or `None` for vectors.

    Raises:
        ValueError: If `out_indices` is neither 1 nor `None`.
    """

    def __init__(
        self,
        folder: str,
        pooling: str = "mean",
        out_indices: int | None = None,
    ):
        super().__init__()
        if out_indices not in (1, None):
            raise ValueError(f"Expected out_indices 1 (the last map) or None, got {out_indices}. Set OUT_INDICES=1.")
        self.opened = load_backbone(folder)
        self.pooling = pooling
        self.has_maps = out_indices == 1
        self.model = self.opened.model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        if self.has_maps:
            _, patch_tokens = self.opened.tokens(pixels)
            return [patch_tokens.permute(0, 3, 1, 2)]
        return self.opened.pool(pixels, self.pooling)


if __name__ == "__main__":
    main()
