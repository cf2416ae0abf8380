"""Tests of corrupted images with masks."""

import dense_data
import pytest
import torch

from modeling_vitp.dense.data import DenseData
from modeling_vitp.images.corruptions import SEVERITIES, CorruptedImages, motion


@pytest.fixture(scope="module")
def loveda(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loveda")
    dense_data.make_loveda(folder, size=64)
    return folder


class Painted(torch.utils.data.Dataset):
    """Data set of image pairs with one color per class, and their mask."""

    def __init__(self, samples):
        self.samples = samples
        self.colors = torch.tensor([[0, 0, 0], [0, 0, 255], [0, 255, 0], [255, 0, 0], *[[255, 255, 255]] * 252])

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        mask = sample["mask"] % 4
        painted = self.colors[mask.long()].to(torch.uint8).permute(2, 0, 1)
        return sample | {"mask": mask, "images": [painted, painted.clone()]}

    def mask(self, index):
        return self[index]["mask"]


@pytest.mark.parametrize("corruption", SEVERITIES)
def test_mask_moves_with_corrupted_pair(loveda, corruption):
    """Check that the mask matches the nearest colors after a motion, except for mixed colors, and else is unchanged."""
    data = DenseData.from_dict(dense_data.read_config("loveda")["data"] | {"root": str(loveda)})
    painted = Painted(data.open(["val"]))
    for severity in range(1, 6):
        corrupted = CorruptedImages(painted, corruption, severity, seed=3)
        for index, (sample, clean) in enumerate(zip(corrupted, painted)):
            assert sample["mask"].shape == clean["mask"].shape and sample["mask"].dtype == torch.uint8
            before, after = sample["images"]
            known = sample["mask"] != 255
            shown = (before.permute(1, 2, 0)[:, :, None].int() - painted.colors[:4]).abs().sum(-1).argmin(-1)
            agreement = (shown == sample["mask"])[known].float().mean().item()
            if motion(corruption, severity, 64, 64) is None:
                assert torch.equal(sample["mask"], clean["mask"])
            else:
                assert torch.equal(before, after)
                assert agreement > (0.999 if corruption == "translation" else 0.93) and known.float().mean() > 0.15
            is_random = corruption in ("cloud", "data_gaps", "gaussian_noise", "salt_and_pepper")
            assert torch.equal(before, after) != is_random
            assert torch.equal(corrupted.mask(index), sample["mask"])
