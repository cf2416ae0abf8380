"""The published detectors' benchmarks: what their weights do not say.

The names of the classes are in the order of the heads, as the authors' code lists them. Where a detector was trained on
COCO's JSON, its code takes the order of that file's categories, and the file is not published: such an order is certain
only once the detector is scored class by class on labelled images.
"""

from dataclasses import dataclass, field
from typing import Any

from ..configuration_vitp_detection import (
    ViTPInstanceSegmentationConfig,
    ViTPObjectDetectionConfig,
    ViTPOrientedObjectDetectionConfig,
)

DIOR = (
    "airplane airport baseballfield basketballcourt bridge chimney dam Expressway-Service-area Expressway-toll-station "
    "golffield groundtrackfield harbor overpass ship stadium storagetank tenniscourt trainstation vehicle windmill"
)
DIOR_R = (
    "airplane airport baseballfield basketballcourt bridge chimney expressway-service-area expressway-toll-station dam "
    "golffield groundtrackfield harbor overpass ship stadium storagetank tenniscourt trainstation vehicle windmill"
)
DOTA = (
    "plane baseball-diamond bridge ground-track-field small-vehicle large-vehicle ship tennis-court basketball-court "
    "storage-tank soccer-ball-field roundabout harbor swimming-pool helicopter container-crane airport helipad"
)
SAR = "ship aircraft car tank bridge harbor"
# SSDD's one class in a head for the 80 of COCO, whose softmax has no exact counterpart with fewer.
SSDD = " ".join(["ship", *(f"unused-{index}" for index in range(1, 80))])


@dataclass(frozen=True)
class Benchmark:
    """
    Args:
        config_class: of its detector.
        names: of the classes, in the order of the head.
        resize: `"stretch"` or `"fit"` images to the detector's size, the second with padding; not if `None`.
        order_is_certain: whether the order of the names does not hang on a file that is not published.
        settings: of the configuration, where they are not its defaults.
    """

    config_class: type[ViTPObjectDetectionConfig]
    names: list[str]
    resize: str | None
    order_is_certain: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


BENCHMARKS = {
    "dior": Benchmark(ViTPObjectDetectionConfig, DIOR.split(), "stretch", order_is_certain=False),
    "dior_r": Benchmark(ViTPOrientedObjectDetectionConfig, DIOR_R.split(), "fit"),
    "dota_v2": Benchmark(ViTPOrientedObjectDetectionConfig, DOTA.split(), None),
    "sardet_100k": Benchmark(ViTPObjectDetectionConfig, SAR.split(), "stretch", order_is_certain=False),
    "rsar": Benchmark(ViTPOrientedObjectDetectionConfig, SAR.split(), "fit"),
    "ssdd": Benchmark(ViTPInstanceSegmentationConfig, SSDD.split(), "stretch", settings={"flip_test": True}),
}
