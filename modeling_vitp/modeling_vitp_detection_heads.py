"""The parts of a detector that have weights: neck, region proposals, box head, mask head."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_vitp_detection import ViTPObjectDetectionConfig
from .modeling_vitp_adapter import ChannelLayerNorm

BOX_CELLS, MASK_CELLS = 7, 14  # of the features pooled for a box, either way


def starting(layer: nn.Module, std: float) -> nn.Module:
    """A layer whose weights start with this standard deviation, and not by Xavier as others do."""
    layer.initial_std = std
    return layer


class DetectionNeck(nn.Module):
    """Maps at strides 4 to 32 become five of one width, the last at stride 64.

    With a top-down path this is FPN (arXiv 1612.03144). Without one, the convolutions of each map have no bias and are
    followed by LayerNorm over the channels.
    """

    def __init__(self, config: ViTPObjectDetectionConfig, in_channels: list[int]):
        super().__init__()
        self.top_down, width = config.neck_top_down, config.neck_channels

        def layer(channels: int, kernel_size: int) -> nn.Module:
            convolution = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, bias=self.top_down)
            return nn.Sequential(convolution, *([] if self.top_down else [ChannelLayerNorm(width, eps=1e-5)]))

        self.laterals = nn.ModuleList(layer(channels, 1) for channels in in_channels)
        self.outputs = nn.ModuleList(layer(width, 3) for _ in in_channels)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        maps = [lateral(features) for lateral, features in zip(self.laterals, maps)]
        if self.top_down:
            for level in reversed(range(len(maps) - 1)):
                maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[-2:])
        maps = [output(features) for output, features in zip(self.outputs, maps)]
        return [*maps, F.max_pool2d(maps[-1], 1, stride=2)]


class RegionProposals(nn.Module):
    """For each anchor of all maps, is there an object, and the way from the anchor to its box (arXiv 1506.01497)."""

    def __init__(self, config: ViTPObjectDetectionConfig, num_deltas: int):
        super().__init__()
        width, anchors = config.neck_channels, len(config.anchor_ratios)
        self.num_deltas = num_deltas
        self.convolution = starting(nn.Conv2d(width, width, 3, padding=1), 0.01)
        self.objectness = starting(nn.Conv2d(width, anchors, 1), 0.01)
        self.deltas = starting(nn.Conv2d(width, anchors * num_deltas, 1), 0.01)

    def forward(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(batch_size, anchors)` and deltas `(batch_size, anchors, num_deltas)`, in float32."""
        hidden = [F.relu(self.convolution(features)) for features in maps]
        logits = [self.objectness(features).permute(0, 2, 3, 1).flatten(1) for features in hidden]
        deltas = [self.deltas(features).permute(0, 2, 3, 1).flatten(1) for features in hidden]
        return torch.cat(logits, 1).float(), torch.cat(deltas, 1).unflatten(1, (-1, self.num_deltas)).float()


class BoxHead(nn.Module):
    """Classes and boxes of the features pooled in boxes, `(boxes, channels, 7, 7)`."""

    def __init__(self, config: ViTPObjectDetectionConfig, num_deltas: int):
        super().__init__()
        width = config.head_hidden_size
        self.fc1 = nn.Linear(config.neck_channels * BOX_CELLS**2, width)
        self.fc2 = nn.Linear(width, width)
        self.classifier = starting(nn.Linear(width, config.num_labels + 1), 0.01)
        self.num_deltas = num_deltas
        boxes = 1 if config.class_agnostic_boxes else config.num_labels
        self.regressor = starting(nn.Linear(width, num_deltas * boxes), 0.001)

    def forward(self, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(boxes, num_labels + 1)`, background last, and deltas `(boxes, 1 or num_labels, num_deltas)`, in
        float32."""
        hidden = F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(1)))))
        logits, deltas = self.classifier(hidden), self.regressor(hidden)
        return logits.float(), deltas.unflatten(1, (-1, self.num_deltas)).float()


class MaskHead(nn.Module):
    """A mask for each class of the features pooled in boxes, `(boxes, channels, 14, 14)`."""

    def __init__(self, config: ViTPObjectDetectionConfig):
        super().__init__()
        width = config.neck_channels

        def by_he(layer: nn.Module) -> nn.Module:
            return starting(layer, math.sqrt(2 / (layer.weight.numel() / layer.weight.shape[1])))

        self.convolutions = nn.ModuleList(by_he(nn.Conv2d(width, width, 3, padding=1)) for _ in range(4))
        self.upsample = by_he(nn.ConvTranspose2d(width, width, 2, 2))
        self.classifier = by_he(nn.Conv2d(width, config.num_labels, 1))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits `(boxes, num_labels, 28, 28)`, in float32."""
        for convolution in self.convolutions:
            pooled = F.relu(convolution(pooled))
        return self.classifier(F.relu(self.upsample(pooled))).float()
