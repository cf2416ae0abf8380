"""Search for test images in the training data: identical images, near-duplicates, and crops.

Candidates come from two indices over the test images: a perceptual hash of the whole image in its eight flips and
90-degree rotations, and local features (SIFT) of the image and its mirror image, aligned by a similarity transform. A
candidate is accepted if the normalized cross-correlation of the aligned images is high.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
        numbers = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        low = numbers.min()
        gain = 255 / max(numbers.max() - low, 1e-6)
        pixels = ((numbers - low) * gain).astype(np.uint8)
    else:
        pixels = np.asarray(image.convert("L"))
    height, width = pixels.shape
    longest_side = max(height, width)
    shortest_allowed, longest_allowed = SIDE_LIMITS
    scale = min(max(longest_side, shortest_allowed), longest_allowed) / longest_side
    if scale == 1:
        return pixels
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(pixels, size, interpolation=interpolation)


def image_fingerprint(image: Image.Image, pixels: np.ndarray) -> Fingerprint:
    """Return the fingerprint of an image and its pixels from [`gray_levels`]."""
    sift = cv2.SIFT_create(nfeatures=max(pixels.size // PIXELS_PER_FEATURE, 50))
    points, descriptors = sift.detectAndCompute(pixels, None)
    if descriptors is None:
        descriptors = np.zeros((0, 128), dtype=np.float32)
    # RootSIFT: the square root of the normalized descriptor.
    sums = np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-6)
    coordinates = [point.pt for point in points]
    return Fingerprint(
        digest=pixel_digest(image),
        hashes=hash_orientations(pixels),
        points=np.array(coordinates, dtype=np.float32).reshape(-1, 2),
        descriptors=np.sqrt(descriptors / sums),
        has_contrast=bool(pixels.std() >= MIN_CONTRAST),
    )


def as_picture(image: Image.Image | np.ndarray) -> Image.Image:
    """Return a Pillow image; an array of shape `(bands, height, width)` becomes the mean of its bands."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image.mean(axis=0).astype(np.float32))


def pixel_digest(image: Image.Image | np.ndarray) -> bytes:
    if isinstance(image, np.ndarray):
        description = f"{image.dtype}{image.shape}"
    else:
        if image.mode in ("P", "PA"):  # The pixels are indices of a palette.
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        description = f"{image.mode}{image.size}"
    return hashlib.sha256(description.encode() + image.tobytes()).digest()[:16]


def has_one_color(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool((pixels == pixels[0, 0]).all())


def hash_orientations(pixels: np.ndarray) -> np.ndarray:
    """Return the perceptual hashes of an image in its eight flips and 90-degree rotations, uint64 of shape (8,).

    A bit is set if a low frequency of the 32 x 32 image is above the median of all. A flip changes the sign of the odd
    frequencies and a transposition swaps the axes, so one transform suffices for all orientations.
    """
    small = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    frequencies = cv2.dct(small)[:HASH_SIDE, :HASH_SIDE]
    column_signs = np.where(np.arange(HASH_SIDE) % 2, -1, 1)
    row_signs = column_signs[:, None]
    oriented = []
    for block in (frequencies, frequencies.T):
        oriented += [block, block * column_signs, block * row_signs, block * row_signs * column_signs]
    # The first frequency is the mean of the image, which says nothing about its structure.
    coefficients = np.stack(oriented).reshape(8, -1)[:, 1:]
    bits = coefficients > np.median(coefficients, axis=1, keepdims=True)
    padded_bits = np.pad(bits, ((0, 0), (1, 0)))
    return np.packbits(padded_bits, axis=1).view(np.uint64)[:, 0]


def orientations(pixels: np.ndarray) -> list[np.ndarray]:
    """Return an image in its eight orientations, in the order of `hash_orientations`."""
    oriented = []
    for block in (pixels, pixels.T):
        oriented += [block, block[:, ::-1], block[::-1], block[::-1, ::-1]]
    return list(map(np.ascontiguousarray, oriented))


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

    def __init__(
        self,
        images: Dataset,
        names: Sequence[str],
        num_workers: int = 0,
        spec: InputSpec | None = None,
    ):
        self.images = images
        self.names = names
        self.spec = spec
        loader = DataLoader(
            range(len(names)),
            batch_size=8,
            num_workers=num_workers,
            collate_fn=self._fingerprints,
        )
        fingerprints = []
        with opencv_in_one_thread():
            for batch in tqdm(loader, desc="Test images", unit=" batches of 8"):
                fingerprints += batch
        self.by_digest = {}
        has_contrast = []
        hashes = []
        for index, fingerprint in enumerate(fingerprints[::2]):  # Mirror images have the same hashes in another order.
            self.by_digest[fingerprint.digest] = index
            has_contrast.append(fingerprint.has_contrast)
            hashes.append(fingerprint.hashes[0])
        points = []
        descriptors = []
        num_features = []
        for fingerprint in fingerprints:
            points.append(fingerprint.points)
            descriptors.append(fingerprint.descriptors)
            num_features.append(len(fingerprint.points))
        self.has_contrast = np.array(has_contrast)
        self.hashes = np.stack(hashes)
        self.points = np.concatenate(points)
        self.descriptors = np.concatenate(descriptors)
        # The owner of a feature is the number of its fingerprint, which is odd for a mirror image.
        self.owners = np.repeat(np.arange(len(fingerprints)), num_features)
        self._index = self._build_index()  # Built before processes are forked, so that they share it.

    def _build_index(self) -> "cv2.flann.Index | None":
        if len(self.descriptors) <= NEIGHBORS:
            return None
        cv2.setRNGSeed(0)
        return cv2.flann.Index(self.descriptors, {"algorithm": 1, "trees": 4})  # Algorithm 1 is k-d trees.

    def __getstate__(self):
        return {**self.__dict__, "_index": None}  # OpenCV's index cannot be pickled.

    def __setstate__(self, state):
        self.__dict__ = state
        self._index = self._build_index()

    def _fingerprints(self, indices: list[int]) -> list[Fingerprint]:
        """Return the fingerprints of images, each followed by that of its mirror image."""
        fingerprints = []
        for index in indices:
            for mirrored in (False, True):
                image = self._decode(index, mirrored)
                fingerprints.append(image_fingerprint(image, gray_levels(image)))
        return fingerprints

    def _decode(self, index: int, mirrored: bool) -> Image.Image:
        [decoded] = load_images(self.images[index], self.spec)
        image = as_picture(decoded)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    def _gray(self, owner: int) -> np.ndarray:
        return gray_levels(self._decode(owner // 2, owner % 2 == 1))

    def find(self, image: Image.Image) -> list[Match]:
        """Return the best match of an image with each test image that shares pixels with it, in order of the index.

        If the metadata of the image describes a collage, each crop of the collage is searched as well.
        """
        image = as_picture(image)
        best_matches = {}
        pictures = [image, *split_collage(image)]
        for picture in pictures:
            for index, match in self._matches(picture):
                best = best_matches.get(index)
                if best is None or (match.score > best.score and best.kind != "same"):
                    best_matches[index] = match
        rounded_matches = []
        for index in sorted(best_matches):
            match = best_matches[index]
            rounded_matches.append(replace(match, score=round(match.score, 3)))
        return rounded_matches

    def _matches(self, image: Image.Image) -> Iterator[tuple[int, Match]]:
        """Yield the matches of an image, each with the index of its test image."""
        pixels = gray_levels(image)
        fingerprint = image_fingerprint(image, pixels)
        index = self.by_digest.get(fingerprint.digest)
        if index is not None and not has_one_color(image):  # empty tiles are equal in all data
            yield index, Match(self.names[index], "same", 1.0)
        if fingerprint.has_contrast:
            yield from self._same_picture(pixels, fingerprint)
            yield from self._shared_part(pixels, fingerprint)

    def _same_picture(self, pixels: np.ndarray, fingerprint: Fingerprint) -> Iterator[tuple[int, Match]]:
        """Yield matches of the whole image, in any of its orientations, whose hashes are similar."""
        distances = np.bitwise_count(self.hashes[:, None] ^ fingerprint.hashes)
        is_candidate = (distances.min(axis=1) <= HASH_DISTANCE) & self.has_contrast
        for index in np.flatnonzero(is_candidate).tolist():
            oriented = orientations(pixels)[int(distances[index].argmin())]
            test_pixels = self._gray(2 * index)
            score = correlation(for_hash_check(oriented), for_hash_check(test_pixels))
            if score >= MIN_CORRELATION:
                yield index, Match(self.names[index], "near-duplicate", score)

    def _shared_part(self, pixels: np.ndarray, fingerprint: Fingerprint) -> Iterator[tuple[int, Match]]:
        """Yield matches of image parts: features vote for test images, and the aligned pixels are compared."""
        if len(fingerprint.points) < MIN_MATCHES or self._index is None:
            return
        neighbors, distances = self._index.knnSearch(fingerprint.descriptors, NEIGHBORS, params={"checks": 32})
        is_close = distances <= DESCRIPTOR_DISTANCE**2
        queries, _ = np.nonzero(is_close)
        targets = neighbors[is_close]
        owners = self.owners[targets]
        # A feature of the image has one vote for an owner, however many of the owner's features are close to it.
        voting_owners, _ = np.unique(np.stack([owners, queries]), axis=1)
        candidates, counts = np.unique(voting_owners, return_counts=True)
        votes = Counter(dict(zip(candidates, counts)))
        for owner, count in votes.most_common(MAX_CANDIDATES):
            if count < MIN_MATCHES:
                return
            is_owned = owners == owner
            points = fingerprint.points[queries[is_owned]]
            test_points = self.points[targets[is_owned]]
            match = self._compare(pixels, points, test_points, int(owner))
            if match is not None:
                yield int(owner) // 2, match

    def _compare(
        self,
        pixels: np.ndarray,
        points: np.ndarray,
        test_points: np.ndarray,
        owner: int,
    ) -> Match | None:
        """Align two images by a similarity transform of the matched points and correlate the aligned pixels."""
        transform, inliers = cv2.estimateAffinePartial2D(
            points,
            test_points,
            method=cv2.RANSAC,
            ransacReprojThreshold=TRANSFORM_ERROR,
        )
        if transform is None or inliers.sum() < MIN_MATCHES:
            return None
        scale = float(np.hypot(*transform[:, 0]))
        if not 1 / MAX_SCALE <= scale <= MAX_SCALE:
            return None
        # The images are compared at the coarser of the two resolutions.
        if scale > 1:
            coarse = pixels
            fine = self._gray(owner)
            transform = cv2.invertAffineTransform(transform)
        else:
            coarse = self._gray(owner)
            fine = pixels
        ratio = min(scale, 1 / scale)
        height, width = coarse.shape
        blurred = fine
        if ratio < 0.8:
            blurred = cv2.GaussianBlur(fine, (0, 0), 0.5 / ratio)
        warped = cv2.warpAffine(blurred, transform, (width, height), flags=cv2.INTER_LINEAR)
        mask = cv2.warpAffine(np.ones_like(fine), transform, (width, height), flags=cv2.INTER_NEAREST)
        is_shared = mask.astype(bool)
        shared_area = is_shared.sum()
        if shared_area < MIN_SHARED_SIDE**2 or coarse[is_shared].std() < MIN_CONTRAST:
            return None
        smooth_warped = cv2.GaussianBlur(warped, (0, 0), 1)
        smooth_coarse = cv2.GaussianBlur(coarse, (0, 0), 1)
        score = correlation(smooth_warped[is_shared], smooth_coarse[is_shared])
        if score < MIN_CORRELATION:
            return None
        share_of_coarse = shared_area / coarse.size
        share_of_fine = shared_area / ratio**2 / fine.size
        kind = "near-duplicate" if min(share_of_coarse, share_of_fine) >= WHOLE else "crop"
        return Match(self.names[owner // 2], kind, score)


def for_hash_check(pixels: np.ndarray) -> np.ndarray:
    """Return an image at the size in which candidates of the hash are compared."""
    return cv2.resize(pixels, HASH_CHECK_SIZE, interpolation=cv2.INTER_AREA)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the normalized cross-correlation of two arrays of the same shape; 0 if either is constant."""
    first = first.astype(np.float64) - first.mean()
    second = second.astype(np.float64) - second.mean()
    norm = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / norm) if norm > 0 else 0.0


def load_test_images(
    where: str,
    split: str | None = None,
    num_workers: int = 0,
    spec: InputSpec | None = None,
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
        paths = image_files(folder)
        images = Dataset.from_dict({"image": list(map(str, paths))})
        names = [path.relative_to(folder).as_posix() for path in paths]
    else:
        splits = load_dataset(where, cache_dir=folder_cache(where))
        split = split or "test"
        if split not in splits:
            raise ValueError(f"Split {split!r} not found in {where}. Found: {sorted(splits)}.")
        images, names = image_rows(splits[split], where)
    if not names:
        raise ValueError(f"No images found in {where}.")
    undecoded_images = images.cast_column("image", ImageFeature(decode=False))
    return TestImages(undecoded_images, names, num_workers, spec)


def image_rows(dataset: Dataset, where: str) -> tuple[Dataset, list[str]]:
    """Return a data set with one image per row, and the names of the images."""
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", list(range(len(dataset))))
    if "image" in dataset.column_names:
        return dataset.select_columns("image"), list(map(str, dataset["id"]))
    if "images" not in dataset.column_names:
        raise ValueError(f"No column 'image' or 'images' in {where}. Found: {', '.join(dataset.column_names)}.")
    dataset = dataset.select_columns(["id", "images"])
    dataset = dataset.cast_column("images", List(ImageFeature(decode=False)))
    flat = dataset.map(one_image_per_row, batched=True, remove_columns=["id", "images"])
    return flat.select_columns("image"), flat["name"]


def one_image_per_row(rows: dict[str, list]) -> dict[str, list]:
    """Return a batch of images with their names, from a batch of lists of images with their ids."""
    names = []
    flat_images = []
    for row_id, images in zip(rows["id"], rows["images"]):
        for index, image in enumerate(images):
            names.append(f"{row_id}[{index}]")
            flat_images.append(image)
    return {"image": flat_images, "name": names}
