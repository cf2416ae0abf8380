import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from modeling_vitp.tasks.segmentation.arguments import DenseSettings
from modeling_vitp.tasks.segmentation.augmentation import Augmentation, RandomScaledCrop, class_share, distort_colors


def augmentation(crop_size, scale=(0.5, 2.0), flip=(0.5, 0.0), fill=(0, 0, 0), of_colors=True, **changes):
    flips = dict(zip(("horizontal_flip", "vertical_flip"), flip))
    changed = DenseSettings(crop_size=crop_size, scale_range=[*scale], **flips, **changes)
    return Augmentation(changed, fill, of_colors)


def sample(height: int, width: int, num_images: int = 1):
    """Return images that encode the row in red, the column in green and the class in blue, with their mask."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = (rows // 4 + columns // 4) % 3
    image = torch.stack([rows, columns, mask * 60]).to(torch.uint8)
    return [tv_tensors.Image(image.clone()) for _ in range(num_images)], tv_tensors.Mask(mask.to(torch.uint8))


@given(
    st.integers(5, 70),
    st.integers(5, 70),
    st.integers(1, 50),
    st.sampled_from([(1.0, 1.0), (0.5, 2.0), (2.0, 2.0)]),
    st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_crops_of_images_and_mask_agree(height, width, size, scale, seed):
    images, mask = sample(height, width, 2)
    augment = augmentation(size, scale, flip=(0.5, 0.5), photometric=False, fill=(1, 2, 3))
    (before, after), cropped = augment(images, mask, seed)
    assert before.shape == (3, size, size) and cropped.shape == (size, size)
    assert torch.equal(before, after)
    outside = cropped == 255
    assert torch.equal(outside, (before == torch.tensor([1, 2, 3]).view(3, 1, 1)).all(0) & outside)
    assert not outside.all()
    if scale == (1.0, 1.0):
        # Each pixel is a pixel of the original with its class.
        kept = ~outside
        rows, columns = before[0][kept].long(), before[1][kept].long()
        assert torch.equal(mask[rows, columns], cropped[kept])
        assert kept.sum() == min(size, height) * min(size, width)
        assert len({*zip(rows.tolist(), columns.tolist())}) == kept.sum()


def test_crop_at_scale_two_is_enlarged():
    images, mask = sample(64, 64)
    (image,), cropped = augmentation(32, (2.0, 2.0), photometric=False, flip=(0, 0))(images, mask, 3)
    assert image[0].max().int() - image[0].min().int() in (15, 16)
    assert (image[2].float() / 60 - cropped).abs().median() < 0.05


@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_scaled_mask_is_aligned_with_image(factor):
    """Check the position of a vertical edge in image and mask, to a fraction of a pixel."""
    image = torch.zeros(1, 96, 96).where(torch.arange(96) < 48, 200.0).expand(3, -1, -1)
    mask = (torch.arange(96) >= 48).to(torch.uint8).expand(96, -1)
    crop, apart = RandomScaledCrop(40, (factor, factor), 0.75), []
    for seed in range(200):
        torch.manual_seed(seed)
        scaled, found = crop(tv_tensors.Image(image), tv_tensors.Mask(mask))
        labeled = found[0] != 255
        apart.append(((found[0] == 0) & labeled).sum().item() - (1 - scaled[0, 0, labeled] / 200).sum().item())
    assert abs(np.mean(apart)) < 0.1 and np.abs(apart).max() <= 0.6


def test_augmentation_depends_on_seed_alone():
    images, mask = sample(40, 40, 2)
    augment = augmentation(32, flip=(0.5, 0.5), exchange_time=0.5)
    torch.manual_seed(0)
    first = augment(images, mask, 5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = augment(images, mask, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip([*first[0], first[1]], [*again[0], again[1]]))
    assert not torch.equal(augment(images, mask, 6)[1], first[1])


def test_crops_limit_the_share_of_a_class():
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, 32:] = 1
    shares = {}
    for limit in (1.0, 0.75):
        crop = RandomScaledCrop(16, (1.0, 1.0), limit)
        torch.manual_seed(0)
        crops = [crop(tv_tensors.Image(torch.zeros(3, 64, 64)), tv_tensors.Mask(mask))[1] for _ in range(200)]
        shares[limit] = np.mean([class_share(crop) <= 0.75 for crop in crops])
    # A crop starts at one of 49 columns. At 9 of them each class has at least a quarter. Up to ten crops are drawn.
    assert shares[1.0] == pytest.approx(9 / 49, abs=0.08)
    assert shares[0.75] == pytest.approx(1 - (40 / 49) ** 10, abs=0.08)


@given(st.lists(st.sampled_from([0, 1, 2, 255]), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_class_share_counts_labeled_pixels(values):
    labeled = [value for value in values if value != 255]
    expected = max(map(labeled.count, labeled)) / len(labeled) if labeled else 1.0
    assert class_share(torch.tensor(values, dtype=torch.uint8)) == pytest.approx(expected)


def test_pairs_are_swapped_and_distorted():
    images = [tv_tensors.Image(torch.full((3, 8, 8), value, dtype=torch.uint8)) for value in (50, 200)]
    mask = tv_tensors.Mask(torch.zeros(8, 8, dtype=torch.uint8))
    exchange = augmentation(8, (1.0, 1.0), photometric=False, exchange_time=0.5)
    first = [exchange(images, mask, seed)[0][0].max().item() for seed in range(100)]
    assert {*first} == {50, 200}
    assert first.count(200) / 100 == pytest.approx(0.5, abs=0.15)
    never = augmentation(8, (1.0, 1.0), photometric=False)
    assert {never(images, mask, seed)[0][0].max().item() for seed in range(5)} == {50}
    same = [tv_tensors.Image(torch.full((3, 8, 8), 100, dtype=torch.uint8)) for _ in range(2)]
    colored = [augmentation(8, (1.0, 1.0))(same, mask, seed)[0] for seed in range(5)]
    assert any(not torch.equal(before, after) for before, after in colored)


def test_flips_have_their_probabilities():
    images, mask = sample(16, 16)
    augment = augmentation(16, (1.0, 1.0), flip=(0.5, 0.25), photometric=False)
    flipped = []
    for seed in range(150):
        (image,), _ = augment(images, mask, seed)
        flipped.append([image[1, 0, 0] > 0, image[0, 0, 0] > 0])
    flipped = np.array(flipped)
    assert flipped.mean(0) == pytest.approx([0.5, 0.25], abs=0.1)


def test_bands_are_jittered_one_by_one():
    mean = torch.linspace(0.3, 0.6, 5).view(5, 1, 1)
    image = (mean + 0.1 * torch.randn(5, 40, 40, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    fixed = {"scale": (1.0, 1.0), "flip": (0.0, 0.0), "of_colors": False}
    augment = augmentation(40, **fixed)
    kinds = set()
    for seed in range(12):
        (found,), _ = augment([tv_tensors.Image(image)], tv_tensors.Mask(torch.zeros(40, 40, dtype=torch.uint8)), seed)
        inside = ((found > 0.001) & (found < 0.999)).all(0)
        slopes, rests = [], []
        for band, original in zip(found, image):  # Each band is a linear function of the original.
            design = torch.stack([original[inside], torch.ones_like(original[inside])], 1)
            slope, base = torch.linalg.lstsq(design, band[inside][:, None]).solution[:, 0].tolist()
            assert (design @ torch.tensor([slope, base]) - band[inside]).abs().max() < 1e-4
            slopes.append(round(slope, 4)), rests.append(round(base, 4))
        assert 0.43 < min(slopes) <= max(slopes) < 1.69 and 0 <= found.min() <= found.max() <= 1
        changed = len({*slopes}) > 1
        kinds.add((changed, changed and any(abs(base) > 1e-3 for base in rests)))
    assert kinds == {(False, False), (True, False), (True, True)}


def test_bands_are_filled_with_their_mean():
    image, fill = torch.full((4, 8, 8), 0.5), [0.1, 0.2, 0.3, 0.4]
    augment = augmentation(16, (1.0, 1.0), flip=(0, 0), photometric=False, fill=fill, of_colors=False)
    (found,), mask = augment([tv_tensors.Image(image)], tv_tensors.Mask(torch.zeros(8, 8, dtype=torch.uint8)), 0)
    assert torch.allclose(found[:, -1, -1], torch.tensor(fill)) and mask[-1, -1] == 255


def test_rotation_turns_both_images_and_mask_alike():
    """Compare rotated pairs with a rotation of the coordinates, and their corners with black and ignored pixels."""
    rows, columns = np.mgrid[:81, :81]
    image = tv_tensors.Image(torch.tensor(np.stack([rows, columns, 0 * rows + 90]), dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.tensor(rows // 16 + 6 * (columns // 16), dtype=torch.uint8))
    augment = augmentation(81, (1.0, 1.0), flip=(0, 0), photometric=False, rotation=1.0, rotation_angle=40)
    angles = []
    for seed in range(40):
        (before, after), turned = augment([image, image], mask, seed)
        assert torch.equal(before, after)
        # The values are row and column numbers: their slope along a row gives the angle, to a degree.
        down, right = (before[:2, 40, 60].int() - before[:2, 40, 20].int()).numpy() / 40
        angles.append(np.degrees(np.arctan2(down, right)))
        cos, sin = np.cos(np.radians(angles[-1])), np.sin(np.radians(angles[-1]))
        at = np.stack([40 + cos * (rows - 40) + sin * (columns - 40), 40 + cos * (columns - 40) - sin * (rows - 40)])
        inside = ((at > 1) & (at < 79)).all(0)
        outside = ((at < -2) | (at > 82)).any(0)
        assert np.abs(before[:2].numpy() - at)[:, inside].max() < 2.5
        assert (turned.numpy()[outside] == 255).all() and not before.numpy()[:, outside].any()
        assert (turned.numpy()[inside] != 255).all()
        nearest = mask.numpy()[tuple(at.round().astype(int).clip(0, 80))]
        assert (turned.numpy() == nearest)[inside].mean() > 0.93
    assert -42 < min(angles) < -25 and 25 < max(angles) < 42


def test_reflections_have_four_axes():
    images, mask = sample(24, 24)
    pixels = np.stack([*images[0][:2], mask])
    axes = [pixels[:, ::-1], pixels[..., ::-1], pixels.transpose(0, 2, 1), pixels[:, ::-1, ::-1].transpose(0, 2, 1)]
    augment = augmentation(24, (1.0, 1.0), flip=(0, 0), photometric=False, reflection=0.8)
    mirrored = [augment(images, mask, seed) for seed in range(200)]
    mirrored = [np.stack([*image[:2], turned]) for (image,), turned in mirrored]
    shares = np.mean([[np.array_equal(found, expected) for expected in axes] for found in mirrored], axis=0)
    assert shares == pytest.approx([0.2] * 4, abs=0.08)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colors_change_in_hsv(name):
    """Compare colors with those of `colorsys`, for one change at a time."""
    strengths = {"brightness": 0.04, "contrast": 0.2, "saturation": 0.5, "hue": 0.1}
    pixels = torch.randint(10, 200, (3, 1, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.manual_seed(0)
    changes = []
    for _ in range(60):
        found = distort_colors(pixels, [strengths[name] * (name == other) for other in strengths])
        old, new = (image[:, 0].T.double().numpy() / 255 for image in (pixels, found))
        if name in ("brightness", "contrast"):
            change = (new - old).mean() if name == "brightness" else new.sum() / old.sum() - 1
            expected = old + change if name == "brightness" else old * (1 + change)
        else:
            colors = [colorsys.rgb_to_hsv(*color) for color in old]
            turns, factors = [], []
            for color, (hue, saturation, _) in zip(new, colors):
                new_hue, new_saturation, _ = colorsys.rgb_to_hsv(*color)
                turns.append((new_hue - hue + 0.5) % 1 - 0.5)
                factors.append(new_saturation / saturation)
            change = np.median(turns) if name == "hue" else np.median(factors) - 1
            turn, factor = (change, 1) if name == "hue" else (0, 1 + change)
            expected = [colorsys.hsv_to_rgb((h + turn) % 1, min(s * factor, 1), v) for h, s, v in colors]
        assert np.abs(new - np.clip(expected, 0, 1)).max() < 0.02
        changes.append(change)
    assert np.mean(np.abs(changes) < 0.002) == pytest.approx(0.5, abs=0.2)
    assert 0.6 * strengths[name] < np.abs(changes).max() < 1.05 * strengths[name]
