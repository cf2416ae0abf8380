"""Probes of a run on its labeled images: masks of views, and gains over the controls."""

import math

import dense_data
import numpy as np
import pytest
import torch
from annotated_images import NAMES, write_coco
from PIL import Image

from modeling_vitp import ViTPImageProcessor, ViTPVisionConfig, ViTPVisionModel, export_backbone
from modeling_vitp.data.annotations import AnnotatedImage, LabelMap, Region, regions_of
from modeling_vitp.evaluation.gains import BACKBONE, PIXELS, RANDOM, START, gains_table
from modeling_vitp.evaluation.pretraining import probe_labels
from modeling_vitp.evaluation.run_probes import views_data
from modeling_vitp.instructions.arguments import AnnotationOptions
from modeling_vitp.instructions.from_annotations import labeled_views
from modeling_vitp.instructions.from_annotations.labeled_views import class_mask, write_views
from modeling_vitp.instructions.from_annotations.source import LabelSource

NAMES_OF_CLASSES = ["road", "tree"]


def view_of(regions, slivers=(), size=(20, 24)):
    return AnnotatedImage("view", (), size, tuple(regions), slivers=tuple(slivers))


def random_boxes(seed):
    """Return (class, box, is_clear) for each of several objects; boxes have fractions of pixels, often halves."""
    rng = np.random.default_rng(seed)
    for _ in range(int(rng.integers(0, 6))):
        (left, right), (top, bottom) = (np.sort(rng.uniform(0, side, 2)).tolist() for side in (24, 20))
        if seed % 2:
            left, top, right, bottom = (math.floor(end) + 0.5 for end in (left, top, right, bottom))
        yield NAMES_OF_CLASSES[rng.integers(2)], (left, top, right, bottom), bool(rng.random() < 0.8)


def mask_by_loop(objects, size=(20, 24)):
    """Return the class of each pixel, whose center must lie in a box; 255 in boxes of two classes or unclear ones."""
    mask = np.zeros(size, int)
    for y in range(size[0]):
        for x in range(size[1]):
            here = [
                (label, is_clear)
                for label, (x0, y0, x1, y1), is_clear in objects
                if x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1
            ]
            labels = {label for label, _ in here}
            if len(labels) > 1 or not all(is_clear for _, is_clear in here):
                mask[y, x] = 255
            elif labels:
                mask[y, x] = 1 + NAMES_OF_CLASSES.index(labels.pop())
    return mask


def test_class_mask_matches_loop():
    seen = set()
    for seed in range(100):
        objects = list(random_boxes(seed))
        regions = [Region(label, box, 1.0, is_clear=is_clear) for label, box, is_clear in objects]
        expected = mask_by_loop(objects)
        assert (class_mask(view_of(regions[::2], regions[1::2]), NAMES_OF_CLASSES) == expected).all(), objects
        seen |= set(expected.flat)
    assert seen == {0, 1, 2, 255}


def test_class_mask_of_label_map_has_names_of_training():
    """Phrases of a mask are in the order of its names, and a tiny region of a mask is clear."""
    numbers = np.random.default_rng(0).integers(0, 3, (200, 150), dtype=np.int32)
    labels = LabelMap(numbers, ("tree", "road"))
    view = AnnotatedImage("view", (), numbers.shape, regions_of(labels), mask=lambda: labels)
    assert (class_mask(view, NAMES_OF_CLASSES) == np.array([0, 2, 1])[numbers]).all()


def test_classes_without_name_are_ignored():
    regions = [Region("tree", (0, 0, 4, 4), 16.0), Region("lake", (2, 0, 8, 4), 24.0)]
    mask = class_mask(view_of(regions), NAMES_OF_CLASSES)
    assert (mask[:4, :2] == 2).all() and (mask[:4, 2:8] == 255).all() and (mask[4:] == 0).all()


def test_most_frequent_classes_are_named(coco, tmp_path, monkeypatch):
    monkeypatch.setattr(labeled_views, "MOST_CLASSES", 2)
    drawn, test = opened(coco, window=64)
    names = write_views(drawn, test, tmp_path / "views", seed=0)
    data = views_data(tmp_path / "views", names)
    counts = sorted(drawn.asker.vocabulary.values())
    assert names[0] == "background" and len(names) == 3
    assert sorted(drawn.asker.vocabulary[name] for name in names[1:]) == counts[-2:]
    values = {int(value) for sample in data.open(["test"]) for value in sample["mask"].unique()}
    assert 255 in values and values <= {0, 1, 2, 255}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, "train", NAMES["train"][:6])
    write_coco(root, "test", NAMES["test"][:3])
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Write the folder of a run whose pretraining is another random draw of weights."""
    folder = tmp_path_factory.mktemp("run")
    for name, seed in (("backbone", 1), ("backbone_at_start", 2)):
        torch.manual_seed(seed)
        model = ViTPVisionModel(ViTPVisionConfig(**dense_data.TINY, initializer_range=0.2))
        export_backbone(model, folder / name, ViTPImageProcessor())
    return folder


def opened(root, **options):
    source = LabelSource.open(root, AnnotationOptions(**options))
    return source.draw(0), source.images("test")


def test_written_images_and_masks_agree(tmp_path):
    """Colors of the images tell the class of each pixel."""
    colors = np.array([[90, 90, 90], [200, 10, 10], [10, 200, 10]], dtype=np.uint8)
    for split, number in (("train", 5), ("test", 2)):
        for index in range(number):
            rng = np.random.default_rng((index, number))
            numbers = rng.integers(0, 3, (8, 10)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
            dense_data.save(Image.fromarray(colors[numbers]), tmp_path / split / "images" / f"{index}.png")
            dense_data.save(Image.fromarray(numbers), tmp_path / split / "masks" / f"{index}.png")
    options = {"window": 40, "mosaics": 0.5, "collages": 1}
    drawn, test = opened(tmp_path, names={"0": None, "1": "tree", "2": "road"}, **options)
    names = write_views(drawn, test, tmp_path / "views", seed=0)
    data = views_data(tmp_path / "views", names)
    expected = [names.index(name) for name in ("background", "tree", "road")]
    sizes = {"train": set(), "test": set()}
    for split, number in (("train", 5 * 40), ("test", 2 * 6)):
        samples = data.open([split])
        assert len(samples) == number
        for sample in samples:
            image, mask = np.asarray(sample["images"][0]), sample["mask"].numpy()
            sizes[split].add(mask.shape)
            assert (image == colors[np.argsort(expected)][mask].transpose(2, 0, 1)).all()
    assert len(sizes["train"]) > 5 and sizes["test"] == {(40, 40)}
    assert all(height == width for height, width in sizes["train"])


@pytest.mark.slow
def test_boxes_are_probed(coco, run, tmp_path, monkeypatch, quick_probe):
    monkeypatch.setattr(labeled_views, "MOST_VIEWS", 6)
    measured = probe_labels(*opened(coco, window=64), run, 3, "cpu")
    controls = [START, RANDOM, PIXELS]
    assert list(measured["scores"]) == [BACKBONE, *controls]
    for probe in ("linear", "nonlinear"):
        of_backbone = measured["scores"][BACKBONE][probe]["patch_auc"]
        gains = {name: of_backbone - measured["scores"][name][probe]["patch_auc"] for name in controls}
        assert measured["gains"][probe] == gains
        assert measured["least_gain"][probe] == min(gains.values())
    assert sorted(path.name for path in (run / "probe").iterdir()) == ["test.png"]


def test_class_folders_are_probed(run, tmp_path):
    """Classes differ in color, which any backbone can tell."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for index in range(10):
            pixels = np.full((64, 64, 3), 60 + 120 * (index % 2)) + rng.integers(-20, 20, (64, 64, 3))
            folder = tmp_path / split / ("dark", "bright")[index % 2]
            dense_data.save(Image.fromarray(pixels.astype(np.uint8)), folder / f"{index}.png")
    measured = probe_labels(*opened(tmp_path), run, 3, "cpu")
    controls = [START, RANDOM]
    assert list(measured["scores"]) == [BACKBONE, *controls]
    assert measured["gains"].keys() == measured["least_gain"].keys() >= {"linear"}
    for probe, gains in measured["gains"].items():
        assert gains.keys() == set(controls)
        assert measured["least_gain"][probe] == min(gains.values())
        for scores in measured["scores"].values():
            assert scores[probe]["accuracy"] > 0.9
    assert measured["control"]["accuracy"] == 0.5


def test_several_classes_are_probed(run, tmp_path):
    """Classes are colors of the halves of an image, in which a patch sees one color."""
    rng = np.random.default_rng(0)
    rows = ["file,labels,split"]
    for index in range(24):
        pixels = rng.integers(0, 40, (64, 64, 3))
        pixels[:, :32, 0] += 180 * (index % 2)
        pixels[:, 32:, 1] += 180 * (index // 2 % 2)
        dense_data.save(Image.fromarray(pixels.astype(np.uint8)), tmp_path / f"{index}.png")
        names = ["red"] * (index % 2) + ["green"] * (index // 2 % 2)
        rows.append(f"{index}.png,{'|'.join(names)},{'test' if index > 15 else 'train'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    measured = probe_labels(*opened(tmp_path), run, 3, "cpu")
    for scores in measured["scores"].values():
        assert scores["linear"]["mean_average_precision"] == 1.0
    assert measured["control"]["mean_average_precision"] == 0.5
    assert "linear: mean average precision" in gains_table(measured)
