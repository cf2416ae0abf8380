"""Images with their classes, under the corruptions of the paper's robustness table."""

from typing import Any

from torch.utils.data import Dataset

from ..images.corruptions import corrupt
from ..vrl import keyed_generator


class CorruptedImages(Dataset):
    """Samples with a corruption, which is drawn by the seed, the sample's id and the corruption alone.

    Args:
        samples: see [`~modeling_vitp.classification.samples.ClassifiedImages`].
        corruption, severity: see [`~modeling_vitp.images.corruptions.corrupt`].
    """

    def __init__(self, samples: Dataset, corruption: str, severity: int, seed: int):
        self.samples, self.corruption, self.severity, self.seed = samples, corruption, severity, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        seed = keyed_generator(self.seed, sample["id"], self.corruption, 0).initial_seed()
        return {**sample, "image": corrupt(sample["image"], self.corruption, self.severity, seed)}
