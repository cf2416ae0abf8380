import io
import pickle

import cv2
import numpy as np
import pytest
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from paths import AERIAL_TREES
from PIL import Image, ImageEnhance

from modeling_vitp.instructions import overlap
from modeling_vitp.instructions.from_annotations.collages import encode_collage
from modeling_vitp.instructions.rows import load_images

NUM_TEST_IMAGES = 5


@pytest.fixture(scope="module")
def aerial_trees(tmp_path_factory):
    return load_dataset(str(AERIAL_TREES), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def images(aerial_trees):
    return aerial_trees["second_scene"].select(range(NUM_TEST_IMAGES))["image"]


@pytest.fixture(scope="module")
def index(aerial_trees):
    rows = aerial_trees["second_scene"].select(range(NUM_TEST_IMAGES)).select_columns("image")
    return overlap.TestImages(rows.cast_column("image", ImageFeature(decode=False)), list("abcde"))


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def resize(image, factor):
    return image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)


WHOLE = {
    "re-encoded": lambda image: jpeg(image, 50),
    "half the size": lambda image: resize(image, 0.5),
    "twice the size": lambda image: resize(image, 2),
    "flipped": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "transposed": lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "grey": lambda image: image.convert("L"),
}
PARTS = {
    "half": lambda image: image.crop((30, 50, 188, 208)),
    "quarter": lambda image: image.crop((60, 20, 172, 132)),
    "quarter, re-encoded and enlarged": lambda image: jpeg(resize(image.crop((60, 20, 172, 132)), 2), 60),
    "half, mirrored": lambda image: image.crop((30, 50, 188, 208)).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_images_are_near_duplicates(index, images, name):
    for letter, image in list(zip("abcde", images))[:3]:
        (match,) = index.find(WHOLE[name](image))
        assert match.test_image == letter and match.kind == "near-duplicate" and match.score >= 0.8


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_crops(index, images, name):
    for letter, image in list(zip("abcde", images))[:3]:
        (match,) = index.find(PARTS[name](image))
        assert match.test_image == letter and match.kind == "crop" and match.score >= 0.8


def test_scene_matches_all_contained_test_images(index, images):
    """Search an image that contains two test images."""
    scene = Image.new("RGB", (520, 300), (90, 110, 70))
    scene.paste(images[1], (10, 20))
    scene.paste(images[4], (270, 40))
    assert [(match.test_image, match.kind) for match in index.find(scene)] == [("b", "crop"), ("e", "crop")]


def test_identical_pixels_match_as_same(index, images):
    buffer = io.BytesIO()
    images[2].save(buffer, format="PNG")
    (match,) = index.find(Image.open(buffer))
    assert match == overlap.Match("c", "same", 1.0)


def test_images_of_one_color_match_nothing():
    empty, faint = Image.new("RGB", (32, 32), (9, 9, 9)), Image.new("RGB", (32, 32))
    faint.putpixel((3, 4), (1, 0, 0))
    images = Dataset.from_dict({"image": [empty, faint]}).cast_column("image", ImageFeature(decode=False))
    index = overlap.TestImages(images, ["empty", "faint"])
    assert index.find(empty) == [] and index.find(faint) == [overlap.Match("faint", "same", 1.0)]


def test_palette_colors_are_compared():
    numbers = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colored = []
    for step in (1, 2):
        image = Image.fromarray(numbers, "P")
        image.putpalette([step * value for value in range(64) for _ in range(3)])
        colored.append(image)
    ones, others = map(overlap.pixel_digest, colored)
    assert ones != others and ones == overlap.pixel_digest(colored[0].convert("RGB"))
    colored[0].info["transparency"] = 3
    assert overlap.pixel_digest(colored[0]) == overlap.pixel_digest(colored[0].convert("RGBA")) != ones


@pytest.mark.parametrize("as_jpeg", [False, True])
def test_collage_crops_are_searched(index, images, aerial_trees, as_jpeg):
    """Search a collage; as a whole it matches nothing, because the other crops differ from the test image."""
    test = images[2].convert("RGB").crop((40, 70, 152, 182)).transpose(Image.Transpose.ROTATE_90)
    pieces = [image.convert("RGB").crop((50, 50, 162, 162)) for image in aerial_trees["train"][:3]["image"]]
    collage = Image.new("RGB", (224, 224))
    for piece, place in zip([*pieces, test], [(0, 0), (112, 0), (0, 112), (112, 112)]):
        collage.paste(piece, place)
    stored = {"bytes": encode_collage(collage, [{}] * 4, as_jpeg), "path": None}
    (loaded,) = load_images({"images": [stored]})
    assert [(match.test_image, match.kind) for match in index.find(loaded)] == [("c", "crop")]
    assert index.find(collage) == []


def test_other_images_match_nothing(index, aerial_trees):
    for image in [*aerial_trees["train"].select(range(0, 20, 4))["image"], Image.new("RGB", (64, 64), (5, 5, 5))]:
        assert index.find(image) == []
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    assert index.find(Image.fromarray(noise)) == []


def test_pickled_index_finds_the_same(index, images):
    copy = pickle.loads(pickle.dumps(index))
    crop = PARTS["half"](images[0])
    assert copy.find(crop) == index.find(crop) != []


def test_hashes_equal_those_of_rotated_images(images):
    """Compare hashes by sign changes and swapped axes with the hashes of rotated and flipped pixels."""
    pixels = overlap.gray_levels(images[0].resize((256, 256)))
    turned = overlap.orientations(pixels)
    expected = []
    for image in turned:
        low = cv2.dct(cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32))[:8, :8].flatten()
        expected.append([bool(value > np.median(low[1:])) for value in low[1:]])
    hashes = overlap.hash_orientations(pixels)
    for bits, value in zip(expected, hashes):
        unpacked = np.unpackbits(np.array([value]).view(np.uint8))[1:].astype(bool)
        assert (unpacked != bits).sum() <= 1  # A frequency at the median may differ.
    assert len({image.tobytes() for image in turned}) == 8


def test_correlation_equals_numpy():
    first, second = np.random.default_rng(0).random((2, 9, 7))
    assert overlap.correlation(first, second) == pytest.approx(np.corrcoef(first.flat, second.flat)[0, 1])
    assert overlap.correlation(first, np.ones_like(first)) == 0


def test_index_opens_folders_and_data_sets(tmp_path, images):
    (tmp_path / "files" / "deep").mkdir(parents=True)
    images[0].save(tmp_path / "files" / "deep" / "one.png")
    assert overlap.load_test_images(str(tmp_path / "files")).names == ["deep/one.png"]
    with pytest.raises(ValueError, match="--against_split 'val'"):
        overlap.load_test_images(str(tmp_path / "files"), "val")

    (tmp_path / "rows").mkdir()
    rows = {"id": ["x", "y"], "images": [[images[0], images[1]], [images[2]]]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows" / "test.parquet")
    index = overlap.load_test_images(str(tmp_path / "rows"))
    assert index.names == ["x[0]", "x[1]", "y[0]"]
    assert [match.test_image for match in index.find(images[1])] == ["x[1]"]
    (tmp_path / "files" / "two.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot be read"):
        overlap.load_test_images(str(tmp_path / "files"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No images found"):
        overlap.load_test_images(str(tmp_path / "empty"))
