"""Damaged images and masks are read as they are, or raise an error that names the file."""

import io
import random
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
from dense_data import TWO
from fuzzing import check_outcomes, damage, limits, outcome
from pictures import picture, write_bands

from modeling_vitp import InputSpec
from modeling_vitp.data.rows import image_size
from modeling_vitp.images.reading import read_image, stored_size
from modeling_vitp.instructions.overlap import as_picture, gray_levels, image_fingerprint
from modeling_vitp.instructions.rows import SourceSettings, load_images
from modeling_vitp.tasks.segmentation.data import DenseData

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Pillow and rasterio warn about broken files.
]
RNG = np.random.default_rng(0)


def originals(folder: Path) -> list[Path]:
    """Return one file of each type."""
    image = picture(40, 30)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "a.jpg")
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "turned.png", exif=exif)
    for name, mode in (("rgb", "RGB"), ("rgba", "RGBA"), ("grey", "L"), ("la", "LA"), ("palette", "P"), ("bit", "1")):
        image.convert(mode).save(folder / f"{name}.png")
    PIL.Image.fromarray(RNG.integers(0, 65536, (30, 40), dtype=np.uint16)).save(folder / "deep.png")
    cv2.imwrite(str(folder / "deep_rgb.png"), RNG.integers(0, 65536, (30, 40, 3), dtype=np.uint16))
    cv2.imwrite(str(folder / "deep_rgba.png"), RNG.integers(0, 65536, (30, 40, 4), dtype=np.uint16))
    for suffix in ("gif", "bmp", "webp"):
        image.save(folder / f"a.{suffix}")
    image.save(folder / "pillow.tif", tiffinfo={274: 8})
    image.convert("P").save(folder / "palette.tif")
    image.convert("CMYK").save(folder / "cmyk.tif")
    for dtype in ("uint8", "uint16", "int16", "float32", "float64", "complex64"):
        for count in (1, 3, 4, 13):
            bands = RNG.integers(0, 200, (count, 30, 40)).astype(dtype)
            write_bands(folder / f"{dtype}_{count}.tif", bands, compress=["deflate", "none"][count % 2])
    return sorted(folder.iterdir())


def test_damaged_image_is_read_or_named(tmp_path):
    rng = random.Random(5)
    (tmp_path / "sound").mkdir()
    files = originals(tmp_path / "sound")
    square = SourceSettings(image_size=16)
    results = []
    with limits():
        for number in range(500):
            original = rng.choice(files)
            path = tmp_path / f"{number}{original.suffix}"
            content = original.read_bytes()
            path.write_bytes(content if number < 20 else damage(rng, content))
            stored = {"path": None, "bytes": path.read_bytes()}
            ways = [
                outcome(lambda: load_images({"images": [str(path)]})[0], str(path)),  # noqa: B023 called at once
                outcome(lambda: load_images({"images": [stored]}, InputSpec(bands=(0, 1, 2)))[0], "image 0 "),  # noqa: B023
                outcome(lambda: read_image(path, None), str(path)),  # noqa: B023
                outcome(lambda: read_image(path, (1, 2, 9, 10)), str(path)),  # noqa: B023
            ]
            sizes = [
                outcome(lambda: image_size(str(path)), "an image"),  # noqa: B023
                outcome(lambda: stored_size(path), str(path)),  # noqa: B023
            ]
            results.append(ways[0])
            for found in ways[:2]:
                if not isinstance(found, ValueError):
                    outcome(lambda: square.apply([found], None), "")  # noqa: B023
                    shown = outcome(lambda: as_picture(found), "complex")  # noqa: B023
                    if not isinstance(shown, ValueError):
                        image_fingerprint(shown, gray_levels(shown))
            if not isinstance(ways[0], ValueError) and not isinstance(sizes[0], ValueError):
                assert image_size(ways[0]) == sizes[0]
            if not isinstance(ways[2], ValueError) and not isinstance(sizes[1], ValueError):
                height, width = (np.asarray(ways[2]).shape)[:2]
                assert (height, width) == sizes[1]
            path.unlink()
    check_outcomes(results, 50)


def test_damaged_mask_is_read_or_named(tmp_path):
    rng = random.Random(6)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    labels = RNG.integers(0, 2, (30, 40), dtype=np.uint8)
    PIL.Image.fromarray(labels).save(tmp_path / "grey.png")
    PIL.Image.fromarray(labels).convert("P").save(tmp_path / "palette.png")
    PIL.Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "deep.png")
    for dtype in ("uint8", "int16", "uint32", "float32", "float64", "complex64"):
        write_bands(tmp_path / f"{dtype}.tif", labels[None].astype(dtype))
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    results = []
    with limits():
        for number in range(200):
            original = rng.choice(files)
            suffix, content = original.suffix, original.read_bytes()
            picture(40, 30).save(tmp_path / "images" / f"{number}.png")
            mask = tmp_path / "masks" / f"{number}{suffix}"
            mask.write_bytes(content if number < len(files) else damage(rng, content))
            split = {"image": f"images/{{name:{number}}}.png", "mask": f"masks/{{name}}{suffix}"}
            data = DenseData(classes=TWO, splits={"train": split}, root=str(tmp_path))
            found = outcome(lambda: data.open(["train"])[0]["mask"], str(mask))  # noqa: B023
            results.append(found)
            if not isinstance(found, ValueError):
                assert found.shape == labels.shape and set(np.unique(found)) <= {0, 1}
            mask.unlink()
    check_outcomes(results, 25)


def test_damaged_encoded_image_is_named(tmp_path):
    """Read encoded bytes of any type, including empty bytes, an image without pixels and text."""
    rng = random.Random(7)
    file = io.BytesIO()
    picture(40, 30).save(file, "PNG")
    for content in (b"", b"\0", b"GIF89a", b"II*\0", b"MM\0*" + bytes(20), b"\x89PNG\r\n\x1a\n" + bytes(18), b"text"):
        outcome(lambda: load_images({"images": [{"bytes": content, "path": None}]}), "image 0 ")  # noqa: B023
        outcome(lambda: image_size({"bytes": content, "path": None}), "an image")  # noqa: B023
    for _ in range(150):
        content = damage(rng, file.getvalue())
        outcome(lambda: load_images({"images": [{"bytes": content, "path": None}]}), "image 0 ")  # noqa: B023
