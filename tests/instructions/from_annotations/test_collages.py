"""Collages of images whose colors encode the origin of each pixel."""

import io
import json

import numpy as np
import pytest
from annotated_images import NAMES, make, turns_of, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_vitp.data.annotations import AnnotatedImage, Region, read_labels, regions_of
from modeling_vitp.instructions.from_annotations.collages import (
    draw_collages,
    encode_collages,
    split_collage,
    stated_crops,
)

SIZES = [(60, 90), (50, 40), (128, 70)]  # Height and width.
LABELS = ("tree", "road")


def painted(folder, suffix="png"):
    """Write images whose colors encode column, row, and the number of the image with the class."""
    rng, images = np.random.default_rng(0), []
    for number, (height, width) in enumerate(SIZES):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
        classes = np.zeros((height, width), dtype=np.uint8)
        regions = []
        for index in range(12):
            left, top = (int(rng.integers(0, end - 12)) for end in (width, height))
            right, bottom = left + int(rng.integers(3, 12)), top + int(rng.integers(3, 12))
            label = index % 2
            classes[top:bottom, left:right] = label + 1
            regions.append(Region(LABELS[label], (left, top, right, bottom), (right - left) * (bottom - top)))
        pixels[..., 2] = 10 * number + classes
        path = folder / f"{number}.{suffix}"
        Image.fromarray(pixels).save(path, quality=100)
        Image.fromarray(classes).save(folder / f"mask_{number}.png")
        images.append(AnnotatedImage(f"train/{number}", (path,), (height, width), tuple(regions)))
    return images


def with_masks(images, folder):
    names = {"0": None, "1": "tree", "2": "road"}
    for number, image in enumerate(images):
        mask = lambda number=number, size=image.size: read_labels(folder / f"mask_{number}.png", size, names)  # noqa: E731
        yield AnnotatedImage(image.id, image.paths, image.size, regions_of(mask()), mask=mask)


def opened(collages):
    return [np.asarray(Image.open(io.BytesIO(files[0]["bytes"])).convert("RGB")) for files in encode_collages(collages)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("painted")


@pytest.fixture(scope="module")
def images(folder):
    return painted(folder)


def test_pixels_and_boxes_match_listed_crops(images):
    by_id, turns, grids, places = {image.id: image for image in images}, set(), set(), set()
    collages = draw_collages(images, 40, 84, (2, 3, 7), seed=1)
    for collage, pixels, (stored,) in zip(collages, opened(collages), encode_collages(collages)):
        said = stated_crops(Image.open(io.BytesIO(stored["bytes"])))
        grid = round(len(said) ** 0.5)
        side = 84 // grid
        grids.add(grid)
        assert collage.size == pixels.shape[:2] == (grid * side,) * 2
        seen = {"regions": [], "slivers": []}
        for index, piece in enumerate(said):
            y, x = side * (index // grid), side * (index % grid)
            left, top, right, bottom = piece["window"]
            source = by_id[piece["image"]]
            assert 0 <= left < right <= source.size[1] and 0 <= top < bottom <= source.size[0] and right - left == side
            part = pixels[y : y + side, x : x + side].astype(int)
            assert (part[..., 2] // 10 == int(source.id[-1])).all()
            assert set(part[..., 0].flat) == set(range(left, right))
            assert set(part[..., 1].flat) == set(range(top, bottom))
            step_x, step_y = part[0, 1] - part[0, 0], part[1, 0] - part[0, 0]
            turns.add((*step_x[:2], *step_y[:2]))
            places.add((piece["image"], left, top))
            for region in source.regions:
                x0, y0, x1, y1 = (int(end) for end in region.box)
                inside = (part[..., 0] >= x0) & (part[..., 0] < x1) & (part[..., 1] >= y0) & (part[..., 1] < y1)
                if inside.any():
                    rows, columns = np.nonzero(inside)
                    box = (columns.min() + x, rows.min() + y, columns.max() + x + 1, rows.max() + y + 1)
                    is_half = 2 * inside.sum() >= (x1 - x0) * (y1 - y0)
                    seen["regions" if is_half else "slivers"].append((region.label, tuple(map(int, box))))
        for kind, expected in seen.items():
            found = [(region.label, tuple(map(int, region.box))) for region in getattr(collage, kind)]
            assert found == expected
    assert len(turns) == 8 and grids == {2, 3, 7}
    assert len(places) > 300


def test_masks_match_collage_pixels(folder, images):
    collages = draw_collages(list(with_masks(images, folder)), 10, 84, (3, 7), seed=2)
    for collage, pixels in zip(collages, opened(collages)):
        assert (collage.mask().numbers == pixels[..., 2] % 10).all()
        assert sum(region.area for region in collage.regions) == (pixels[..., 2] % 10 > 0).sum()


def test_all_positions_are_equally_likely(images):
    """Compare the number of crops of an image with the number of possible positions in it."""
    pieces = [crop for collage in draw_collages(images, 60, 70, (7,), seed=3) for crop in collage.crops]
    places = [(height - 9) * (width - 9) for height, width in SIZES]
    for image, number in zip(images, places):
        share, expected = sum(piece.image is image for piece in pieces) / len(pieces), number / sum(places)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / len(pieces)) ** 0.5
    turned = np.mean([piece.turn for piece in pieces], axis=0)
    assert (abs(turned - 0.5) < 4 * 0.5 / len(pieces) ** 0.5).all()


def test_collages_depend_on_seed_only(images):
    first, second = (opened(draw_collages(images, number, 84, (2, 7), seed=4)) for number in (3, 5))
    assert all((one == other).all() for one, other in zip(first, second))
    others = opened(draw_collages(images, 3, 84, (2, 7), seed=5))
    assert not any(one.shape == other.shape and (one == other).all() for one, other in zip(first, others))


def test_small_images_are_excluded(images):
    collages = draw_collages(images, 20, 100, (2,), seed=0)
    assert {piece.image.id for collage in collages for piece in collage.crops} == {"train/0", "train/2"}


def test_jpeg_collages_list_their_crops(tmp_path):
    (stored,) = next(encode_collages(draw_collages(painted(tmp_path, "jpg"), 1, 84, (7,), seed=0)))
    image = Image.open(io.BytesIO(stored["bytes"]))
    assert image.format == "JPEG" and len(stated_crops(image)) == 49 and len(split_collage(image)) == 49
    assert stored["path"] == "000000.jpg"


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    st.one_of(st.binary(), st.text(), st.integers(), st.lists(st.integers()).map(lambda a: json.dumps({"collage": a})))
)
def test_any_metadata_text_is_accepted(said):
    image = Image.new("RGB", (8, 8))
    image.info["comment"] = said
    assert len(split_collage(image)) in (0, *(n * n for n in range(1, 9)))


def test_collages_of_training_images_have_questions(tmp_path):
    root = tmp_path / "data"
    write_coco(root, "train", NAMES["train"][:20])
    write_coco(root, "test", NAMES["test"])
    options = "--collages", "1.5", "--collage_grid", "2", "7", "--collage_size", "140", "--kinds", "map", "counting"
    rows = make("coco", root, tmp_path / "out", *options)["train"]
    collages = [row for row in rows if row["id"].startswith("collages/")]
    assert len(rows) - len(collages) == 20 and len(collages) == 30
    assert {len(stated_crops(row["images"][0])) for row in collages} == {4, 49}
    used = {piece["image"].split("/")[-1].split(".")[0] for row in collages for piece in stated_crops(row["images"][0])}
    assert used <= set(NAMES["train"][:20]) and len(used) > 15
    maps = [answer for row in collages for question, answer in turns_of(row) if " cell" in question]
    assert len(maps) == 30 and {len(answer.split()) for answer in maps} == {49}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from 20 images and 30 collages of crops" in card and "--collage_grid 2 7" in card
    again = make("coco", root, tmp_path / "again", *options)["train"]
    assert again["messages"] == rows["messages"]
