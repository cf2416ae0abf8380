"""Exported backbones as models of torchgeo-bench, configured by `model/vitp.yaml`."""

import torch
from torchgeo_bench.datasets.base import BandSpec
from torchgeo_bench.models._input_units import InputUnit
from torchgeo_bench.models.interface import BenchModel

from modeling_vitp.probing.backbones import load_backbone


class ExportedBackbone(BenchModel):
    """Frozen backbone with one vector for each image, as in `vitp probe`.

    Args:
        bands: bands of the data set, as many as those of the backbone; torchgeo-bench passes them.
        folder: folder or Hub id of an exported backbone.
        pooling: `mean` of the patch tokens, `cls`, or `cls_mean`.
        options: further fields of the configuration, such as `normalization`. `model_native` is the mean and standard
            deviation of the backbone's image processor.
    """

    expected_input_unit = InputUnit.REFLECTANCE_0_1

    def __init__(
        self,
        bands: list[BandSpec],
        folder: str,
        pooling: str = "mean",
        **options,
    ):
        opened = load_backbone(folder)
        image_processor = opened.image_processor
        self.pretrain_mean = image_processor.image_mean
        self.pretrain_std = image_processor.image_std
        super().__init__(bands=bands, **options)
        self.opened = opened
        self.pooling = pooling
        self.backbone = opened.model  # Segmentation looks for its layers here.

    def _forward_patch_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.opened.pool(images, self.pooling)
