"""The twelve image corruptions of the paper's robustness table (REOBench's), at five fixed severities.

The parameters in `SEVERITIES` are those of REOBench's generating scripts (github.com/lx709/REOBench, folder "Corrupt
Image Generation", commit 0417584; the benchmark is arXiv 2505.16793). The code here is independent of theirs, so
corrupted images are like REOBench's, not equal to them. Known differences: random draws come from a seed; values are
rounded and not truncated; rotation and scaling are about the center of the image, where theirs are up to a pixel off;
Gaussian kernels of 3 to 7 pixels are sampled, where OpenCV has tables; motion blur does not shift rows; clouds have
other random gradients.

Sizes (kernels, stripes, shifts, the scale of clouds) are in pixels of the image that is given. REOBench's images are
256 to 1024 pixels on a side, so a large image should be brought to the size at which it is to be looked at before.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..image_processing_vitp_dense import IGNORE_INDEX
from ..vrl import keyed_generator

SEVERITIES: dict[str, dict[str, tuple[float, ...]]] = {
    "brightness_contrast": {"brightness": (0.0, 0.1, 0.2, 0.3, 0.4), "contrast": (1.0, 0.8, 0.6, 0.4, 0.2)},
    "cloud": {"density": (0.1, 0.15, 0.2, 0.25, 0.3)},
    "compression_artefacts": {"quality": (30, 25, 20, 15, 10)},
    "data_gaps": {"stripes": (2, 3, 4, 5, 6), "width": (3, 4, 5, 6, 7)},
    "gaussian_blur": {"kernel_size": (3, 5, 7, 9, 11)},
    "gaussian_noise": {"sigma": (0.04, 0.05, 0.06, 0.07, 0.08)},
    "haze": {"intensity": (0.2, 0.3, 0.4, 0.5, 0.6)},
    "motion_blur": {"kernel_size": (2, 4, 6, 8, 10)},
    "rotation": {"degrees": (30, 45, 60, 75, 90)},
    "salt_and_pepper": {"amount": (0.005, 0.01, 0.02, 0.03, 0.05)},
    "scale": {"factor": (0.9, 0.8, 0.7, 0.6, 0.5)},
    "translation": {"shift": (15, 20, 25, 30, 35)},
}
"""Parameters of each corruption at severities 1 to 5; the functions of this module say what they mean."""


def parameters(name: str, severity: int) -> dict[str, float]:
    """Return the parameters of a corruption at a severity from 1 to 5.

    Raises:
        ValueError: if there is no such corruption or severity.
    """
    if name not in SEVERITIES:
        raise ValueError(f"there is no corruption {name!r}; there are {', '.join(SEVERITIES)}.")
    if severity not in range(1, 6):
        raise ValueError(f"severity={severity}, but 1 to 5 is needed.")
    return {key: values[severity - 1] for key, values in SEVERITIES[name].items()}


def corrupt(image: np.ndarray | torch.Tensor, name: str, severity: int, seed: int = 0) -> np.ndarray | torch.Tensor:
    """Corrupt an image by one of `SEVERITIES`; the result depends on the arguments alone.

    With one seed, noise, clouds and gaps have the same random draws at every severity.

    Args:
        image: uint8 RGB of any size, an array of shape `(height, width, 3)` or a tensor of shape
            `(3, height, width)`.
        severity: from 1 to 5. `brightness_contrast` at 1 leaves the image as it is, by REOBench's parameters.

    Returns:
        A new image of the same type, shape, dtype and device.

    Raises:
        ValueError: if the image is another thing, or there is no such corruption or severity.
    """
    settings = parameters(name, severity)
    is_tensor = isinstance(image, torch.Tensor)
    pixels = image if is_tensor else torch.from_numpy(np.array(image)).movedim(-1, 0)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"the image is {image.dtype} of shape {tuple(image.shape)}, but a uint8 array (height, width, 3) or tensor "
            "(3, height, width) is needed."
        )
    matrix = motion(name, severity, *pixels.shape[1:], seed=seed)
    unit = pixels.cpu().float() / 255
    if matrix is None:
        unit = _CORRUPTIONS[name](unit, torch.Generator().manual_seed(seed), **settings)
    else:
        unit = _sample(unit, _inverse(matrix), "zeros" if name == "scale" else "reflection")
    corrupted = (255 * unit).round().clamp(0, 255).to(torch.uint8)
    return corrupted.to(image.device) if is_tensor else corrupted.movedim(0, -1).contiguous().numpy()


def motion(name: str, severity: int, height: int, width: int, seed: int = 0) -> torch.Tensor | None:
    """Return the matrix by which a geometric corruption moves the content of an image.

    - `rotation`: by `degrees` counter-clockwise about the center; what comes in is the image reflected.
    - `scale`: by `factor` about the center, so that a black frame appears.
    - `translation`: by `shift` pixels in x and in y, each to a side that the seed draws; reflected.

    Returns:
        A float64 matrix of shape `(2, 3)` that takes a place (x, y, 1) in the clean image to its place in the
        corrupted one, in coordinates that are -1 at the left or top edge of the image and 1 at the right or bottom
        edge. So it holds for a feature map of the image at any resolution. None for corruptions that move nothing.
    """
    settings = parameters(name, severity)
    if name == "rotation":
        cosine, sine = math.cos(math.radians(settings["degrees"])), math.sin(math.radians(settings["degrees"]))
        rows = [[cosine, sine * height / width, 0.0], [-sine * width / height, cosine, 0.0]]
    elif name == "scale":
        rows = [[settings["factor"], 0.0, 0.0], [0.0, settings["factor"], 0.0]]
    elif name == "translation":
        signs = 2 * torch.randint(2, (2,), generator=torch.Generator().manual_seed(seed)) - 1
        dx, dy = (settings["shift"] * signs).tolist()
        rows = [[1.0, 0.0, 2 * dx / width], [0.0, 1.0, 2 * dy / height]]
    else:
        return None
    return torch.tensor(rows, dtype=torch.float64)


def move_labels(labels: torch.Tensor, matrix: torch.Tensor, outside: int) -> torch.Tensor:
    """Move a map of labels as [`corrupt`] moves the image.

    Args:
        labels: of shape `(height, width)`, the size of the image, of any dtype.
        matrix: from [`motion`].
        outside: the label of pixels that show what was no place of the image, but reflected or black.

    Returns:
        Labels of the same shape, dtype and device: those of the nearest pixels.
    """
    height, width = labels.shape
    places = F.affine_grid(_inverse(matrix.cpu())[None], (1, 1, height, width), align_corners=False)[0]
    tolerance = 1e-9  # where a place lies between two pixels, it is one side's whatever the rounding
    places = ((places + 1) / 2 * places.new_tensor([width, height]) + tolerance).floor().long().to(labels.device)
    columns, rows = places.unbind(-1)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    moved = torch.full_like(labels, outside)
    moved[inside] = labels[rows[inside], columns[inside]]
    return moved


def undo_motion(features: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the feature map of a corrupted image back to the places of the clean image.

    Features are interpolated bilinearly between the centers of the four patches around a place.

    Args:
        features: floating-point, of shape `(channels, rows, columns)`; the map has to span the whole image.
        matrix: from [`motion`].

    Returns:
        The features, of the same shape, and a bool mask of shape `(rows, columns)`: the places that can be compared,
        whose counterpart lies between patch centers of the corrupted image. Elsewhere the features are repeated from
        the border and mean nothing.
    """
    rows, columns = features.shape[1:]
    x, y = F.affine_grid(matrix[None].cpu(), (1, 1, rows, columns), align_corners=False)[0].unbind(-1)
    tolerance = 1e-9
    valid = (x.abs() <= 1 - 1 / columns + tolerance) & (y.abs() <= 1 - 1 / rows + tolerance)
    return _sample(features, matrix, "border"), valid.to(features.device)


class CorruptedImages(Dataset):
    """Samples of a downstream task with a corruption, drawn from the seed, the sample's id and the corruption alone.

    Both images of a pair are corrupted: moved alike, while noise, clouds and gaps are drawn for each. A mask moves with
    the images; pixels that come in from outside have no class.

    Args:
        samples: data set whose items have an `id`, and an `image`, or `images` and optionally a `mask`.
        corruption, severity: see [`corrupt`].
        seed: of the draws.
    """

    def __init__(self, samples: Dataset, corruption: str, severity: int, seed: int):
        self.samples, self.corruption, self.severity, self.seed = samples, corruption, severity, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        images, how = sample.get("images") or [sample["image"]], (self.corruption, self.severity)
        seeds = [
            keyed_generator(self.seed, sample["id"], self.corruption, place).initial_seed()
            for place in range(len(images))
        ]
        matrix = motion(*how, *images[0].shape[1:], seed=seeds[0])
        if matrix is not None:
            seeds = seeds[:1] * len(images)
            if "mask" in sample:
                sample = {**sample, "mask": move_labels(sample["mask"], matrix, IGNORE_INDEX)}
        corrupted = [corrupt(image, *how, seed) for image, seed in zip(images, seeds)]
        return {**sample, "images": corrupted} if "images" in sample else {**sample, "image": corrupted[0]}

    def mask(self, index: int) -> torch.Tensor | None:
        """Return the mask of a sample, moved with its images."""
        return self[index].get("mask")


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(torch.cat([matrix, matrix.new_tensor([[0.0, 0.0, 1.0]])]))[:2]


def _sample(maps: torch.Tensor, matrix: torch.Tensor, padding_mode: str) -> torch.Tensor:
    """Sample `maps`, `(channels, height, width)`, at the places to which the matrix takes those of the output."""
    grid = F.affine_grid(matrix[None], (1, *maps.shape), align_corners=False).to(maps)
    return F.grid_sample(maps[None], grid, mode="bilinear", padding_mode=padding_mode, align_corners=False)[0]


def _filter(image: torch.Tensor, kernel_y: torch.Tensor, kernel_x: torch.Tensor) -> torch.Tensor:
    """Correlate with a separable kernel, borders reflected without repeating the edge, also if they are wider."""
    for axis, kernel in ((1, kernel_y), (2, kernel_x)):
        margins = [(0, 0)] * 3
        margins[axis] = (len(kernel) // 2, (len(kernel) - 1) // 2)
        padded = torch.from_numpy(np.pad(image.numpy(), margins, mode="reflect"))
        image = sum(weight * padded.narrow(axis, tap, image.shape[axis]) for tap, weight in enumerate(kernel.tolist()))
    return image


def _gaussian_kernel(size: int, sigma: float) -> torch.Tensor:
    kernel = torch.exp(-0.5 * ((torch.arange(size) - (size - 1) / 2) / sigma) ** 2)
    return kernel / kernel.sum()


def _perlin_noise(height: int, width: int, cell: float, generator: torch.Generator) -> torch.Tensor:
    """Return Perlin noise ("Improving Noise", 2002) of shape `(height, width)`, its lattice `cell` pixels apart."""
    y, x = torch.arange(height)[:, None] / cell, torch.arange(width)[None] / cell
    row, column = y.long(), x.long()
    y, x = y - row, x - column
    angle = 2 * math.pi * torch.rand(int(row.max()) + 2, int(column.max()) + 2, generator=generator)
    cosine, sine = angle.cos(), angle.sin()

    def gradient(down: int, right: int) -> torch.Tensor:
        corner = row + down, column + right
        return cosine[corner] * (x - right) + sine[corner] * (y - down)

    def fade(t: torch.Tensor) -> torch.Tensor:
        return t**3 * (t * (6 * t - 15) + 10)

    top = torch.lerp(gradient(0, 0), gradient(0, 1), fade(x))
    bottom = torch.lerp(gradient(1, 0), gradient(1, 1), fade(x))
    return torch.lerp(top, bottom, fade(y))


# Each of the following takes and gives a float32 image of shape (3, height, width); [0, 1] is the range of a value.


def brightness_contrast(image: torch.Tensor, _, brightness: float, contrast: float) -> torch.Tensor:
    """Values times `contrast`, plus `brightness`."""
    return image * contrast + brightness


def cloud(image: torch.Tensor, generator: torch.Generator, density: float) -> torch.Tensor:
    """Light gray (0.9) where Perlin noise, from 0 to 1 over the image, exceeds 1 - `density`; its edges are blurred.

    The noise has six octaves, the first 200 pixels wide, each half as wide and half as strong as the one before.
    """
    octaves = (0.5**octave * _perlin_noise(*image.shape[1:], 200 * 0.5**octave, generator) for octave in range(6))
    noise = sum(octaves)
    noise = (noise - noise.min()) / (noise.max() - noise.min()).clamp(min=1e-12)
    kernel = _gaussian_kernel(11, 5.0)
    return torch.lerp(image, torch.tensor(0.9), _filter((noise > 1 - density).float()[None], kernel, kernel))


def compression_artefacts(image: torch.Tensor, _, quality: int) -> torch.Tensor:
    """JPEG of a `quality` out of 100, with Pillow's chroma subsampling."""
    buffer = io.BytesIO()
    pixels = (255 * image).round().to(torch.uint8).movedim(0, -1).numpy()
    PIL.Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return torch.from_numpy(np.array(PIL.Image.open(buffer))).movedim(-1, 0).float() / 255


def data_gaps(image: torch.Tensor, generator: torch.Generator, stripes: int, width: int) -> torch.Tensor:
    """Black stripes `width` pixels wide at a random angle, `stripes` of them along the image's diagonal."""
    angle = (math.pi * torch.rand((), generator=generator)).item()
    y, x = torch.arange(image.shape[1])[:, None], torch.arange(image.shape[2])
    across = x * math.cos(angle) + y * math.sin(angle)
    return image.masked_fill(across % (math.hypot(*image.shape[1:]) / stripes) < width, 0.0)


def gaussian_blur(image: torch.Tensor, _, kernel_size: int) -> torch.Tensor:
    """Gaussian of `kernel_size` pixels and the standard deviation that OpenCV takes for it, 0.15 × size + 0.35."""
    kernel = _gaussian_kernel(kernel_size, 0.15 * kernel_size + 0.35)
    return _filter(image, kernel, kernel)


def gaussian_noise(image: torch.Tensor, generator: torch.Generator, sigma: float) -> torch.Tensor:
    """Noise of standard deviation `sigma` (of 1, the whole range) on every value, then clipped."""
    return image + sigma * torch.randn(image.shape, generator=generator)


def haze(image: torch.Tensor, _, intensity: float) -> torch.Tensor:
    """A white layer of opacity `intensity`."""
    return torch.lerp(image, torch.ones(()), intensity)


def motion_blur(image: torch.Tensor, _, kernel_size: int) -> torch.Tensor:
    """The mean of `kernel_size` pixels in a row, half of them to the left of the pixel."""
    return _filter(image, torch.ones(1), torch.full((kernel_size,), 1 / kernel_size))


def salt_and_pepper(image: torch.Tensor, generator: torch.Generator, amount: float) -> torch.Tensor:
    """A share `amount` of all values, each channel by itself, becomes 0 or 1 with equal chance."""
    draw, salt = torch.rand(2, *image.shape, generator=generator)
    return torch.where(draw < amount, (salt < 0.5).float(), image)


_CORRUPTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "brightness_contrast": brightness_contrast,
    "cloud": cloud,
    "compression_artefacts": compression_artefacts,
    "data_gaps": data_gaps,
    "gaussian_blur": gaussian_blur,
    "gaussian_noise": gaussian_noise,
    "haze": haze,
    "motion_blur": motion_blur,
    "salt_and_pepper": salt_and_pepper,
}
