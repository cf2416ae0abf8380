"""The twelve image corruptions of REOBench, used in the robustness table of the paper, at five severities.

The parameters in `SEVERITIES` are those of the REOBench scripts (github.com/lx709/REOBench, folder "Corrupt Image
Generation", commit 0417584; the benchmark is arXiv 2505.16793). The code is an independent implementation, so corrupted
images are similar to those of REOBench, but not equal. Known differences: random draws depend on a seed; values are
rounded instead of truncated; rotation and scaling are about the exact center of the image, in REOBench up to a pixel
off; Gaussian kernels of 3 to 7 pixels are sampled, in OpenCV they come from tables; motion blur does not shift rows;
clouds have different random gradients. REOBench saves its images as JPEG of quality 75 before they are scored, which
`jpeg_quality` of [`CorruptedImages`] does.

Sizes (kernels, stripes, shifts, the scale of clouds) are in pixels of the input image. The images of REOBench have
sides of 256 to 1024 pixels, so large images should be resized before they are corrupted.
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
from .reading import read_picture

SEVERITIES: dict[str, dict[str, tuple[float, ...]]] = {
    "brightness_contrast": {
        "brightness": (0.0, 0.1, 0.2, 0.3, 0.4),
        "contrast": (1.0, 0.8, 0.6, 0.4, 0.2),
    },
    "cloud": {"density": (0.1, 0.15, 0.2, 0.25, 0.3)},
    "compression_artefacts": {"quality": (30, 25, 20, 15, 10)},
    "data_gaps": {
        "stripes": (2, 3, 4, 5, 6),
        "width": (3, 4, 5, 6, 7),
    },
    "gaussian_blur": {"kernel_size": (3, 5, 7, 9, 11)},
    "gaussian_noise": {"sigma": (0.04, 0.05, 0.06, 0.07, 0.08)},
    "haze": {"intensity": (0.2, 0.3, 0.4, 0.5, 0.6)},
    "motion_blur": {"kernel_size": (2, 4, 6, 8, 10)},
    "rotation": {"degrees": (30, 45, 60, 75, 90)},
    "salt_and_pepper": {"amount": (0.005, 0.01, 0.02, 0.03, 0.05)},
    "scale": {"factor": (0.9, 0.8, 0.7, 0.6, 0.5)},
    "translation": {"shift": (15, 20, 25, 30, 35)},
}
"""Parameters of each corruption at severities 1 to 5, described by the functions of this module."""


def parameters(name: str, severity: int) -> dict[str, float]:
    """Return the parameters of a corruption at a severity from 1 to 5.

    Raises:
        ValueError: if the corruption or the severity is unknown.
    """
    if name not in SEVERITIES or severity not in range(1, 6):
        options = ", ".join(SEVERITIES)
        raise ValueError(
            f"Expected a corruption of {options} with a `severity` from 1 to 5, got {name!r} with {severity}."
        )
    settings = {}
    for parameter, values_by_severity in SEVERITIES[name].items():
        settings[parameter] = values_by_severity[severity - 1]
    return settings


def corrupt(
    image: np.ndarray | torch.Tensor,
    name: str,
    severity: int,
    seed: int = 0,
) -> np.ndarray | torch.Tensor:
    """Corrupt an image. The result depends on the arguments alone.

    With the same seed, noise, clouds and gaps have the same random draws at every severity.

    Args:
        image: uint8 RGB image of any size, an array of shape `(height, width, 3)` or a tensor of shape
            `(3, height, width)`.
        name: name of the corruption, a key of `SEVERITIES`.
        severity: severity from 1 to 5. With the parameters of REOBench, `brightness_contrast` at severity 1 does not
            change the image.
        seed: seed of the random draws.

    Returns:
        Corrupted image of the same type, shape, dtype and device.

    Raises:
        ValueError: if the image is not uint8 RGB, or if the corruption or the severity is unknown.
    """
    settings = parameters(name, severity)
    is_tensor = isinstance(image, torch.Tensor)
    if is_tensor:
        pixels = image
    else:
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels.movedim(-1, 0)
    is_rgb = pixels.ndim == 3 and pixels.shape[0] == 3
    is_empty = pixels.numel() == 0
    is_valid = pixels.dtype == torch.uint8 and is_rgb and not is_empty
    if not is_valid:
        shape = tuple(image.shape)
        raise ValueError(
            "Expected a uint8 array (height, width, 3) or tensor (3, height, width), got "
            f"{image.dtype} of shape {shape}."
        )
    _, height, width = pixels.shape
    matrix = motion(name, severity, height, width, seed=seed)
    unit = pixels.cpu().float() / 255
    if matrix is None:
        generator = torch.Generator().manual_seed(seed)
        unit = _CORRUPTIONS[name](unit, generator, **settings)
    else:
        padding_mode = "zeros" if name == "scale" else "reflection"
        unit = _sample(unit, _inverse(matrix), padding_mode)
    values = (255 * unit).round()
    values = values.clamp(0, 255)
    corrupted = values.to(torch.uint8)
    if is_tensor:
        return corrupted.to(image.device)
    corrupted = corrupted.movedim(0, -1)
    return corrupted.contiguous().numpy()


def motion(
    name: str,
    severity: int,
    height: int,
    width: int,
    seed: int = 0,
) -> torch.Tensor | None:
    """Return the matrix by which a geometric corruption moves the content of an image.

    - `rotation`: by `degrees` counterclockwise about the center, with reflection padding.
    - `scale`: by `factor` about the center, with black padding.
    - `translation`: by `shift` pixels in x and in y, in random directions, with reflection padding.

    Returns:
        Matrix from a position (x, y, 1) in the clean image to its position in the corrupted image, float64 of shape
        `(2, 3)`, or `None` for corruptions that are not geometric. Coordinates are -1 at the left or top edge and 1 at
        the right or bottom edge, so the matrix is valid for feature maps of any resolution.
    """
    settings = parameters(name, severity)
    if name == "rotation":
        angle = math.radians(settings["degrees"])
        cosine = math.cos(angle)
        sine = math.sin(angle)
        rows = [
            [cosine, sine * height / width, 0.0],
            [-sine * width / height, cosine, 0.0],
        ]
    elif name == "scale":
        factor = settings["factor"]
        rows = [
            [factor, 0.0, 0.0],
            [0.0, factor, 0.0],
        ]
    elif name == "translation":
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(2, (2,), generator=generator)
        signs = 2 * draws - 1
        shifts = settings["shift"] * signs
        dx, dy = shifts.tolist()
        rows = [
            [1.0, 0.0, 2 * dx / width],
            [0.0, 1.0, 2 * dy / height],
        ]
    else:
        return None
    return torch.tensor(rows, dtype=torch.float64)


def move_labels(labels: torch.Tensor, matrix: torch.Tensor, outside: int) -> torch.Tensor:
    """Move a map of labels as [`corrupt`] moves the image.

    Args:
        labels: labels of shape `(…, height, width)`, the size of the image, of any dtype.
        matrix: matrix of [`motion`].
        outside: label of pixels that come from the padding.

    Returns:
        Moved labels of the same shape, dtype and device, by nearest-neighbor sampling.
    """
    height, width = labels.shape[-2:]
    to_source = _inverse(matrix.cpu())
    source_x, source_y = _positions(to_source, height, width)
    columns = _pixel_indices(source_x, width)
    rows = _pixel_indices(source_y, height)
    columns = columns.to(labels.device)
    rows = rows.to(labels.device)
    is_inside_x = (columns >= 0) & (columns < width)
    is_inside_y = (rows >= 0) & (rows < height)
    is_inside = is_inside_x & is_inside_y

    source_rows = rows[is_inside]
    source_columns = columns[is_inside]
    moved = torch.full_like(labels, outside)
    moved[..., is_inside] = labels[..., source_rows, source_columns]
    return moved


def undo_motion(features: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the feature map of a corrupted image back to the positions of the clean image.

    Features are interpolated bilinearly between the centers of the four nearest patches.

    Args:
        features: floating-point features of the whole image, of shape `(channels, rows, columns)`.
        matrix: matrix of [`motion`].

    Returns:
        Features of the same shape, and a bool mask of shape `(rows, columns)` of the valid positions, whose counterpart
        lies between patch centers of the corrupted image. The features of other positions are repeated from the border
        and must be ignored.
    """
    rows, columns = features.shape[1:]
    x, y = _positions(matrix.cpu(), rows, columns)
    # The centers of the outermost patches are half a patch inside of the edges at -1 and 1.
    tolerance = 1e-9
    farthest_x = 1 - 1 / columns + tolerance
    farthest_y = 1 - 1 / rows + tolerance
    is_inside_x = x.abs() <= farthest_x
    is_inside_y = y.abs() <= farthest_y
    is_valid = is_inside_x & is_inside_y

    moved_features = _sample(features, matrix, "border")
    return moved_features, is_valid.to(features.device)


def move_mask(sample: dict[str, Any], matrix: torch.Tensor) -> dict[str, Any]:
    """Move the mask of a sample, if it has one. Pixels from the padding get the ignore index."""
    moved_sample = dict(sample)
    if "mask" in sample:
        moved_sample["mask"] = move_labels(sample["mask"], matrix, IGNORE_INDEX)
    return moved_sample


class CorruptedImages(Dataset):
    """Data set of corrupted samples of a downstream task, random by the seed, the id of a sample and the corruption.

    Both images of a pair get the same geometric corruption. Noise, clouds and gaps are drawn for each image.

    Args:
        samples: data set whose items have an `id`, and an `image`, or `images` and optionally a `mask`.
        corruption, severity: name and severity of the corruption, see [`corrupt`].
        seed: seed of the random draws.
        move: function that moves the annotations of a sample by a matrix of [`motion`].
        jpeg_quality: quality out of 100 of JPEG files, in which REOBench saves corrupted images. Default: none.
    """

    def __init__(
        self,
        samples: Dataset,
        corruption: str,
        severity: int,
        seed: int,
        move: Callable[[dict[str, Any], torch.Tensor], dict[str, Any]] = move_mask,
        jpeg_quality: int | None = None,
    ):
        self.samples = samples
        self.corruption = corruption
        self.severity = severity
        self.seed = seed
        self.move = move
        self.jpeg_quality = jpeg_quality

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        images = sample.get("images") or [sample["image"]]
        first_seed = self.seed_of_image(sample["id"], 0)
        _, height, width = images[0].shape
        matrix = motion(
            self.corruption,
            self.severity,
            height,
            width,
            seed=first_seed,
        )

        corrupted_images = []
        for position, image in enumerate(images):
            if matrix is None:
                seed = self.seed_of_image(sample["id"], position)
            else:
                seed = first_seed
            corrupted_image = corrupt(image, self.corruption, self.severity, seed)
            if self.jpeg_quality is not None:
                corrupted_image = compressed(corrupted_image, self.jpeg_quality)
            corrupted_images.append(corrupted_image)

        if matrix is None:
            corrupted_sample = dict(sample)
        else:
            corrupted_sample = dict(self.move(sample, matrix))
        if "images" in corrupted_sample:
            corrupted_sample["images"] = corrupted_images
        else:
            corrupted_sample["image"] = corrupted_images[0]
        return corrupted_sample

    def seed_of_image(self, sample_id: Any, position: int) -> int:
        """Return the seed of an image from the id of its sample and its position in the sample."""
        generator = keyed_generator(self.seed, sample_id, self.corruption, position)
        return generator.initial_seed()

    @property
    def cases(self) -> list[str]:
        return self.samples.cases

    def mask(self, index: int) -> torch.Tensor | None:
        """Return the mask of a sample, moved with its images, which are read only if they move."""
        is_moved = motion(self.corruption, self.severity, 1, 1) is not None
        if is_moved:
            return self[index].get("mask")
        return self.samples.mask(index)


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    last_row = matrix.new_tensor([[0.0, 0.0, 1.0]])
    square_matrix = torch.cat([matrix, last_row])
    return torch.linalg.inv(square_matrix)[:2]


def _positions(matrix: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and y of all pixels of a map, transformed by the matrix, each of shape `(height, width)`."""
    grid = F.affine_grid(
        matrix[None],
        (1, 1, height, width),
        align_corners=False,
    )
    x, y = grid[0].unbind(-1)
    return x, y


def _pixel_indices(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Return the indices of the pixels at positions from -1 to 1 along an axis of `length` pixels."""
    # Positions between two pixels always go to the same side, independent of rounding.
    tolerance = 1e-9
    shares = (positions + 1) / 2
    pixel_positions = shares * length + tolerance
    return pixel_positions.floor().long()


def _sample(maps: torch.Tensor, matrix: torch.Tensor, padding_mode: str) -> torch.Tensor:
    """Sample `maps`, `(channels, height, width)`, at the positions of the output, transformed by the matrix."""
    grid = F.affine_grid(
        matrix[None],
        (1, *maps.shape),
        align_corners=False,
    )
    sampled_maps = F.grid_sample(
        maps[None],
        grid.to(maps),
        mode="bilinear",
        padding_mode=padding_mode,
        align_corners=False,
    )
    return sampled_maps[0]


def _filter(
    image: torch.Tensor,
    kernel_y: torch.Tensor,
    kernel_x: torch.Tensor,
) -> torch.Tensor:
    """Correlate with a separable kernel and reflection padding, also if the padding is wider than the image."""
    filtered_columns = _filter_axis(image, kernel_y, axis=1)
    return _filter_axis(filtered_columns, kernel_x, axis=2)


def _filter_axis(image: torch.Tensor, kernel: torch.Tensor, axis: int) -> torch.Tensor:
    num_taps = len(kernel)
    margin_before = num_taps // 2
    margin_after = (num_taps - 1) // 2
    margins = [(0, 0)] * image.ndim
    margins[axis] = (margin_before, margin_after)
    # The reflection padding of torch must be narrower than the image, that of NumPy may be wider.
    padded_values = np.pad(image.numpy(), margins, mode="reflect")
    padded = torch.from_numpy(padded_values)

    length = image.shape[axis]
    filtered = torch.zeros_like(image)
    for tap, weight in enumerate(kernel.tolist()):
        shifted = padded.narrow(axis, tap, length)
        filtered = filtered + weight * shifted
    return filtered


def _gaussian_kernel(size: int, sigma: float) -> torch.Tensor:
    center = (size - 1) / 2
    distances = torch.arange(size) - center
    squared_distances = (distances / sigma) ** 2
    kernel = torch.exp(-0.5 * squared_distances)
    return kernel / kernel.sum()


def _perlin_noise(
    height: int,
    width: int,
    cell: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return Perlin noise ("Improving Noise", 2002) of shape `(height, width)`, with lattice cells of `cell` pixels."""
    rows = torch.arange(height)
    columns = torch.arange(width)
    y = rows[:, None] / cell
    x = columns[None] / cell
    row = y.long()
    column = x.long()
    # Positions inside of their lattice cell, from 0 to 1.
    y = y - row
    x = x - column
    num_rows = int(row.max()) + 2
    num_columns = int(column.max()) + 2
    turns = torch.rand(num_rows, num_columns, generator=generator)
    angle = 2 * math.pi * turns
    cosine = angle.cos()
    sine = angle.sin()

    def gradient(down: int, right: int) -> torch.Tensor:
        corner = (row + down, column + right)
        horizontal = cosine[corner] * (x - right)
        vertical = sine[corner] * (y - down)
        return horizontal + vertical

    def fade(t: torch.Tensor) -> torch.Tensor:
        polynomial = t * (6 * t - 15) + 10
        return t**3 * polynomial

    fade_x = fade(x)
    fade_y = fade(y)
    top_left = gradient(0, 0)
    top_right = gradient(0, 1)
    bottom_left = gradient(1, 0)
    bottom_right = gradient(1, 1)
    top = torch.lerp(top_left, top_right, fade_x)
    bottom = torch.lerp(bottom_left, bottom_right, fade_x)
    return torch.lerp(top, bottom, fade_y)


# The following functions corrupt a float32 image of shape (3, height, width) with values in [0, 1].


def brightness_contrast(image: torch.Tensor, _, brightness: float, contrast: float) -> torch.Tensor:
    """Multiply all values by `contrast` and add `brightness`."""
    return image * contrast + brightness


def cloud(image: torch.Tensor, generator: torch.Generator, density: float) -> torch.Tensor:
    """Add light gray clouds (0.9) with blurred edges, where Perlin noise in [0, 1] exceeds 1 - `density`.

    The noise has six octaves. The first one is 200 pixels wide, each further one is half as wide and half as strong.
    """
    _, height, width = image.shape
    noise = torch.zeros(height, width)
    for octave in range(6):
        scale = 0.5**octave
        octave_noise = _perlin_noise(height, width, 200 * scale, generator)
        noise = noise + scale * octave_noise
    lowest = noise.min()
    noise_range = noise.max() - lowest
    noise_range = noise_range.clamp(min=1e-12)
    unit_noise = (noise - lowest) / noise_range

    is_cloud = unit_noise > 1 - density
    cloud_map = is_cloud.float()[None]
    kernel = _gaussian_kernel(11, 5.0)
    opacity = _filter(cloud_map, kernel, kernel)
    light_gray = torch.tensor(0.9)
    return torch.lerp(image, light_gray, opacity)


def compression_artefacts(image: torch.Tensor, _, quality: int) -> torch.Tensor:
    """Compress as JPEG with a `quality` out of 100, with the chroma subsampling of Pillow."""
    values = (255 * image).round()
    return compressed(values.to(torch.uint8), quality).float() / 255


def compressed(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Return an RGB image, uint8 of shape `(3, height, width)`, after JPEG compression with a `quality` out of 100."""
    picture = PIL.Image.fromarray(image.movedim(0, -1).numpy())
    pixels = np.array(compress_jpeg(picture, quality))
    return torch.from_numpy(pixels).movedim(-1, 0)


def compress_jpeg(image: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    """Return an RGB image after JPEG compression with a `quality` out of 100."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return read_picture(buffer.getvalue())


def data_gaps(
    image: torch.Tensor,
    generator: torch.Generator,
    stripes: int,
    width: int,
) -> torch.Tensor:
    """Add black stripes of `width` pixels at a random angle, with `stripes` stripes along the image diagonal."""
    random_share = torch.rand((), generator=generator)
    angle = (math.pi * random_share).item()
    _, height, image_width = image.shape
    y = torch.arange(height)[:, None]
    x = torch.arange(image_width)
    cosine = math.cos(angle)
    sine = math.sin(angle)
    distances = x * cosine + y * sine
    diagonal = math.hypot(height, image_width)
    period = diagonal / stripes
    is_gap = distances % period < width
    return image.masked_fill(is_gap, 0.0)


def gaussian_blur(image: torch.Tensor, _, kernel_size: int) -> torch.Tensor:
    """Blur with a Gaussian kernel of `kernel_size` pixels and the OpenCV standard deviation, 0.15 × size + 0.35."""
    sigma = 0.15 * kernel_size + 0.35
    kernel = _gaussian_kernel(kernel_size, sigma)
    return _filter(image, kernel, kernel)


def gaussian_noise(image: torch.Tensor, generator: torch.Generator, sigma: float) -> torch.Tensor:
    """Add Gaussian noise of standard deviation `sigma`, for values in [0, 1]. The caller clips the result."""
    noise = torch.randn(image.shape, generator=generator)
    return image + sigma * noise


def haze(image: torch.Tensor, _, intensity: float) -> torch.Tensor:
    """Blend the image with white, with an opacity of `intensity`."""
    white = torch.ones(())
    return torch.lerp(image, white, intensity)


def motion_blur(image: torch.Tensor, _, kernel_size: int) -> torch.Tensor:
    """Average `kernel_size` horizontally adjacent pixels, half of them to the left of the pixel."""
    kernel_y = torch.ones(1)
    kernel_x = torch.full((kernel_size,), 1 / kernel_size)
    return _filter(image, kernel_y, kernel_x)


def salt_and_pepper(image: torch.Tensor, generator: torch.Generator, amount: float) -> torch.Tensor:
    """Set a share `amount` of the values of each channel to 0 or 1 with equal probability."""
    draws, salt_draws = torch.rand(2, *image.shape, generator=generator)
    salt_or_pepper = (salt_draws < 0.5).float()
    is_replaced = draws < amount
    return torch.where(is_replaced, salt_or_pepper, image)


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
