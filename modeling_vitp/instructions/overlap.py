"""Search for test images in the training data: identical images, near-duplicates, and crops.

Candidates come from two indices over the test images: a perceptual hash of the whole image in its eight flips and
90-degree rotations, and local features (SIFT) of the image and its mirror image, aligned by a similarity transform. A
candidate is accepted if the normalized cross-correlation of the aligned images is high.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from datasets import Dataset, List, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.rows import folder_cache
from ..images.reading import image_files
from ..input_spec import InputSpec
from .from_annotations.collages import split_collage
from .rows import load_images

HASH_SIDE = 8  # Frequencies in each direction, which give 64 bits.
HASH_DISTANCE = 12  # Maximum Hamming distance, in bits, of candidates.
HASH_CHECK_SIZE = (64, 64)
SIDE_LIMITS = (256, 1024)  # Limits of the long side, in pixels, for feature detection.
PIXELS_PER_FEATURE = 400
DESCRIPTOR_DISTANCE = 0.45  # Maximum distance of RootSIFT descriptors, which is at most sqrt(2).
NEIGHBORS = 8
MIN_MATCHES = 6
MAX_CANDIDATES = 20
TRANSFORM_ERROR = 4.0  # Maximum reprojection error in pixels.
MAX_SCALE = 16.0  # Maximum scale between the two images.
MIN_CORRELATION = 0.8
MIN_SHARED_SIDE = 24  # Minimum side, in pixels, of a reliable shared part.
MIN_CONTRAST = 4.0  # Minimum standard deviation in gray levels of an image that can be compared.
WHOLE = 0.8  # Minimum shared fraction of both images of a near-duplicate; below it, the match is a crop.


@dataclass(frozen=True)
class Match:
    """Test image that shares pixels with an image; `score` is the correlation of the shared part."""

    test_image: str
    kind: str  # "same", "near-duplicate" or "crop"
    score: float


@dataclass(frozen=True)
class Fingerprint:
    """Digest of the pixels of an image, its hash in eight orientations, and its features."""

    digest: bytes
    hashes: np.ndarray  # uint64 `(8,)`.
    points: np.ndarray  # float32 `(num_features, 2)`, in pixels of the gray levels.
    descriptors: np.ndarray  # RootSIFT, float32 `(num_features, 128)`.
    has_contrast: bool


def gray_levels(image: Image.Image) -> np.ndarray:
    """Return an image as uint8 gray levels, scaled to 8 bits and to a long side within `SIDE_LIMITS`."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        low, high = values.min(), values.max()
        pixels = ((values - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    else:
        pixels = np.asarray(image.convert("L"))
    side = max(pixels.shape)
    scale = min(max(side, SIDE_LIMITS[0]), SIDE_LIMITS[1]) / side
    if scale == 1:
        return pixels
    size = [max(round(length * scale), 1) for length in pixels.shape[::-1]]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def image_fingerprint(image: Image.Image, pixels: np.ndarray) -> Fingerprint:
    """Return the fingerprint of an image and its pixels from [`gray_levels`]."""
    sift = cv2.SIFT_create(nfeatures=max(pixels.size // PIXELS_PER_FEATURE, 50))
    points, descriptors = sift.detectAndCompute(pixels, None)
    if descriptors is None:
        descriptors = np.zeros((0, 128), dtype=np.float32)
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-6))
    return Fingerprint(
        pixel_digest(image),
        hash_orientations(pixels),
        np.array([point.pt for point in points], dtype=np.float32).reshape(-1, 2),
        descriptors,
        bool(pixels.std() >= MIN_CONTRAST),
    )


def as_picture(image: Image.Image | np.ndarray) -> Image.Image:
    """Return a Pillow image; an array of shape `(bands, height, width)` becomes the mean of its bands."""
    return image if isinstance(image, Image.Image) else Image.fromarray(image.mean(axis=0).astype(np.float32))


def pixel_digest(image: Image.Image | np.ndarray) -> bytes:
    if isinstance(image, np.ndarray):
        return hashlib.sha256(f"{image.dtype}{image.shape}".encode() + image.tobytes()).digest()[:16]
    if image.mode in ("P", "PA"):  # The pixels are indices of a palette.
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).digest()[:16]


def has_one_color(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool((pixels == pixels[0, 0]).all())


def hash_orientations(pixels: np.ndarray) -> np.ndarray:
    """Return the perceptual hashes of an image in its eight flips and 90-degree rotations, uint64 of shape (8,).

    A bit is set if a low frequency of the 32 x 32 image is above the median of all. A flip changes the sign of the odd
    frequencies and a transposition swaps the axes, so one transform suffices for all orientations.
    """
    small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:HASH_SIDE, :HASH_SIDE]
    signs = np.where(np.arange(HASH_SIDE) % 2, -1, 1)
    turned = [
        block * rows * columns for block in (low, low.T) for rows in (1, signs[:, None]) for columns in (1, signs)
    ]
    flat = np.stack(turned).reshape(8, -1)
    bits = flat[:, 1:] > np.median(flat[:, 1:], axis=1, keepdims=True)
    return np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1).view(np.uint64)[:, 0]


def orientations(pixels: np.ndarray) -> list[np.ndarray]:
    """Return an image in its eight orientations, in the order of `hash_orientations`."""
    return [
        np.ascontiguousarray(block[:: 1 - 2 * flip_rows, :: 1 - 2 * flip_columns])
        for block in (pixels, pixels.T)
        for flip_rows in (0, 1)
        for flip_columns in (0, 1)
    ]


@contextmanager
def opencv_in_one_thread() -> Iterator[None]:
    """Limit OpenCV to one thread while processes are forked, which would otherwise deadlock."""
    number = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(number)


class TestImages:
    """Index of test images, to find those that share pixels with another image.

    Args:
        images: rows of undecoded images, see `load_images`.
        names: names of the images.
        num_workers: number of processes that compute the fingerprints.
        spec: input spec of the images.

    Raises:
        ValueError: If an image cannot be read; the message names it.
    """

    __test__ = False  # Otherwise pytest collects the class because of its name.

    def __init__(self, images: Dataset, names: Sequence[str], num_workers: int = 0, spec: InputSpec | None = None):
        self.images, self.names, self.spec = images, names, spec
        loader = DataLoader(range(len(names)), batch_size=8, num_workers=num_workers, collate_fn=self._fingerprints)
        with opencv_in_one_thread():
            prints = [found for batch in tqdm(loader, desc="Test images", unit=" batches of 8") for found in batch]
        self.by_digest = {print_.digest: index for index, print_ in enumerate(prints[::2])}
        self.has_contrast = np.array([print_.has_contrast for print_ in prints[::2]])
        self.hashes = np.stack([print_.hashes[0] for print_ in prints[::2]])
        self.points = np.concatenate([print_.points for print_ in prints])
        self.descriptors = np.concatenate([print_.descriptors for print_ in prints])
        self.owners = np.repeat(np.arange(len(prints)), [len(print_.points) for print_ in prints])
        self._index = self._build_index()  # Built before processes are forked, so that they share it.

    def _build_index(self) -> "cv2.flann.Index | None":
        if len(self.descriptors) <= NEIGHBORS:
            return None
        cv2.setRNGSeed(0)
        return cv2.flann.Index(self.descriptors, {"algorithm": 1, "trees": 4})  # Algorithm 1 is k-d trees.

    def __getstate__(self):
        return self.__dict__ | {"_index": None}  # OpenCV's index cannot be pickled.

    def __setstate__(self, state):
        self.__dict__ = state
        self._index = self._build_index()

    def _fingerprints(self, indices: list[int]) -> list[Fingerprint]:
        """Return the fingerprints of images, each followed by that of its mirror image."""
        images = [self._decode(index, mirrored) for index in indices for mirrored in (False, True)]
        return [image_fingerprint(image, gray_levels(image)) for image in images]

    def _decode(self, index: int, mirrored: bool) -> Image.Image:
        image = as_picture(*load_images(self.images[index], self.spec))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    def _gray(self, owner: int) -> np.ndarray:
        return gray_levels(self._decode(owner // 2, owner % 2 == 1))

    def find(self, image: Image.Image) -> list[Match]:
        """Return the best match of an image with each test image that shares pixels with it, in order of the index.

        If the metadata of the image describes a collage, each crop of the collage is searched as well.
        """
        image, found = as_picture(image), {}
        for part in (image, *split_collage(image)):
            for index, kind, score in self._matches(part):
                if index not in found or (score > found[index][1] and found[index][0] != "same"):
                    found[index] = (kind, score)
        return [Match(self.names[index], kind, round(score, 3)) for index, (kind, score) in sorted(found.items())]

    def _matches(self, image: Image.Image) -> Iterator[tuple[int, str, float]]:
        pixels = gray_levels(image)
        own = image_fingerprint(image, pixels)
        if own.digest in self.by_digest and not has_one_color(image):  # empty tiles are equal in all data
            yield self.by_digest[own.digest], "same", 1.0
        if own.has_contrast:
            yield from self._same_picture(pixels, own)
            yield from self._shared_part(pixels, own)

    def _same_picture(self, pixels: np.ndarray, own: Fingerprint):
        distances = np.bitwise_count(self.hashes[:, None] ^ own.hashes)
        for index in np.flatnonzero((distances.min(axis=1) <= HASH_DISTANCE) & self.has_contrast).tolist():
            turned = orientations(pixels)[int(distances[index].argmin())]
            pair = turned, self._gray(2 * index)
            score = correlation(*(cv2.resize(image, HASH_CHECK_SIZE, interpolation=cv2.INTER_AREA) for image in pair))
            if score >= MIN_CORRELATION:
                yield index, "near-duplicate", score

    def _shared_part(self, pixels: np.ndarray, own: Fingerprint):
        """Yield matches of image parts: features vote for test images, and the aligned pixels are compared."""
        if len(own.points) < MIN_MATCHES or self._index is None:
            return
        neighbors, distances = self._index.knnSearch(own.descriptors, NEIGHBORS, params={"checks": 32})
        is_close = distances <= DESCRIPTOR_DISTANCE**2
        queries, targets = np.nonzero(is_close)[0], neighbors[is_close]
        owners = self.owners[targets]
        votes = Counter(dict(zip(*np.unique(np.unique(np.stack([owners, queries]), axis=1)[0], return_counts=True))))
        for owner, count in votes.most_common(MAX_CANDIDATES):
            if count < MIN_MATCHES:
                return
            chosen = owners == owner
            match = self._compare(pixels, own.points[queries[chosen]], self.points[targets[chosen]], int(owner))
            if match is not None:
                yield match

    def _compare(self, pixels: np.ndarray, points: np.ndarray, test_points: np.ndarray, owner: int):
        """Align two images by a similarity transform of the matched points and correlate the aligned pixels."""
        transform, inliers = cv2.estimateAffinePartial2D(
            points, test_points, method=cv2.RANSAC, ransacReprojThreshold=TRANSFORM_ERROR
        )
        if transform is None or inliers.sum() < MIN_MATCHES:
            return None
        test = self._gray(owner)
        scale = float(np.hypot(*transform[:, 0]))
        if not 1 / MAX_SCALE <= scale <= MAX_SCALE:
            return None
        if scale > 1:  # The images are compared at the coarser of the two resolutions.
            test, pixels, transform = pixels, test, cv2.invertAffineTransform(transform)
        ratio = min(scale, 1 / scale)
        size = test.shape[::-1]
        blurred = cv2.GaussianBlur(pixels, (0, 0), 0.5 / ratio) if ratio < 0.8 else pixels
        warped = cv2.warpAffine(blurred, transform, size, flags=cv2.INTER_LINEAR)
        covered = cv2.warpAffine(np.ones_like(pixels), transform, size, flags=cv2.INTER_NEAREST).astype(bool)
        area = covered.sum()
        if area < MIN_SHARED_SIDE**2 or test[covered].std() < MIN_CONTRAST:
            return None
        score = correlation(*(cv2.GaussianBlur(image, (0, 0), 1)[covered] for image in (warped, test)))
        if score < MIN_CORRELATION:
            return None
        shares = area / test.size, area / ratio**2 / pixels.size
        return owner // 2, "near-duplicate" if min(shares) >= WHOLE else "crop", score


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the normalized cross-correlation of two arrays of the same shape; 0 if either is constant."""
    first, second = (values.astype(np.float64) - values.mean() for values in (first, second))
    norm = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / norm) if norm > 0 else 0.0


def load_test_images(
    where: str, split: str | None = None, num_workers: int = 0, spec: InputSpec | None = None
) -> TestImages:
    """Return an index of a folder of images, or of a split of a data set (a folder of Parquet files, or a Hub id).

    Args:
        split: split of a data set; `test` by default.
        num_workers: number of processes that compute the fingerprints.
        spec: input spec of the images.

    Raises:
        ValueError: If no images are found, one of them cannot be read, or a split of a folder of images is requested.
    """
    folder = Path(where)
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        if split is not None:
            raise ValueError(
                f"{where} is a folder of images, which has no splits, got --against_split {split!r}. Use the folder of "
                "the split, without --against_split."
            )
        files = image_files(folder)
        images = Dataset.from_dict({"image": list(map(str, files))})
        names = [path.relative_to(folder).as_posix() for path in files]
    else:
        splits, split = load_dataset(where, cache_dir=folder_cache(where)), split or "test"
        if split not in splits:
            raise ValueError(f"Split {split!r} not found in {where}. Found: {sorted(splits)}.")
        images, names = image_rows(splits[split], where)
    if not names:
        raise ValueError(f"No images found in {where}.")
    return TestImages(images.cast_column("image", ImageFeature(decode=False)), names, num_workers, spec)


def image_rows(dataset: Dataset, where: str) -> tuple[Dataset, list[str]]:
    """Return a data set with one image per row, and the names of the images."""
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", list(range(len(dataset))))
    if "image" in dataset.column_names:
        return dataset.select_columns("image"), list(map(str, dataset["id"]))
    if "images" not in dataset.column_names:
        raise ValueError(f"No column 'image' or 'images' in {where}. Found: {', '.join(dataset.column_names)}.")

    def flatten(rows):
        pairs = [(row_id, index) for row_id, images in zip(rows["id"], rows["images"]) for index in range(len(images))]
        images = [image for images in rows["images"] for image in images]
        return {"image": images, "name": [f"{row_id}[{index}]" for row_id, index in pairs]}

    lists = dataset.select_columns(["id", "images"]).cast_column("images", List(ImageFeature(decode=False)))
    flat = lists.map(flatten, batched=True, remove_columns=["id", "images"])
    return flat.select_columns("image"), flat["name"]
