"""Views that are drawn while training: pixels and answers, each recomputed from the files and the stated crops."""

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from annotated_images import (
    KINDS,
    LABELS,
    LAYOUTS,
    NAMES,
    SINGULAR,
    check,
    fine_map_of,
    kind_of,
    map_of,
    reader_of,
    scene,
    write_coco,
)
from pictures import picture, write_bands
from PIL import Image

from modeling_vitp import ViTPDataCollator
from modeling_vitp.input_spec import InputSpec
from modeling_vitp.instructions.arguments import AnnotationOptions
from modeling_vitp.instructions.from_annotations import drawing
from modeling_vitp.instructions.from_annotations.source import LabelSource
from modeling_vitp.vrl import keyed_generator

MIXED = {"window": 200, "mosaics": 0.5, "collages": 1, "collage_grid": [2, 7], "collage_size": 280, "turns": 10}
PAINTED = {"window": 64, "mosaics": 0.5, "collages": 1, "collage_grid": [2, 7], "collage_size": 84, "turns": 10}
NUMBERS = [60, pytest.param(500, marks=pytest.mark.slow)]
SIZES = [(96, 128), (128, 96), (100, 110), (90, 140), (130, 130), (97, 113)]  # Height and width.
COLORS = {1: (250, 10, 10), 2: (10, 250, 10), 3: (1, 2, 3)}


def opened(root, seed=3, **options):
    return LabelSource.open(root, AnnotationOptions(**options)).draw(seed)


def drawn_views(drawn, number, images=True):
    """Yield view, pictures and turns for rows of several epochs."""
    rows, seen = drawn.rows(), 0
    for epoch in range(number):
        for row in rows:
            key = 0, row["id"], epoch
            view, exchanges = drawn.draw(row, keyed_generator(*key))
            example = drawn(row, keyed_generator(*key)) if images else {"messages": drawing.messages_of(exchanges)}
            messages = example["messages"]
            assert [message["role"] for message in messages] == ["user", "assistant"] * len(exchanges)
            turns = [(q["content"], a["content"]) for q, a in zip(messages[::2], messages[1::2])]
            yield view, example.get("images"), turns
            seen += 1
            if seen == number:
                return


def placed(view):
    """Return each crop with its left and top in the view."""
    side = round(len(view.crops) ** 0.5)
    assert side**2 == len(view.crops)
    height, width = view.size[0] // side, view.size[1] // side
    for index, crop in enumerate(view.crops):
        left, top, right, bottom = crop.window
        assert (bottom - top, right - left) == (height, width)
        assert 0 <= left < right <= crop.image.size[1] and 0 <= top < bottom <= crop.image.size[0]
        yield crop, index % side * width, index // side * height


def composed(view, source_of):
    """Return the pixels of a view, each looked up at its origin in the source `(height, width, ...)` of its crop."""
    canvas = None
    for crop, x, y in placed(view):
        source = source_of(crop.image)
        left, top, right, bottom = crop.window
        is_transposed, flips_x, flips_y = crop.turn
        height, width = bottom - top, right - left
        rows, columns = np.mgrid[:height, :width]
        if flips_y:
            rows = height - 1 - rows
        if flips_x:
            columns = width - 1 - columns
        if is_transposed:
            rows, columns = columns, rows
        if canvas is None:
            canvas = np.zeros((*view.size, *source.shape[2:]), source.dtype)
        canvas[y : y + height, x : x + width] = source[top + rows, left + columns]
    return canvas


def moved(box, crop, x, y):
    """Return a box in pixels of the image in the view, clipped to the crop."""
    left, top, right, bottom = crop.window
    points = []
    for px, py in (box[:2], box[2:]):
        px, py = min(max(px, left), right) - left, min(max(py, top), bottom) - top
        if crop.turn[0]:
            px, py = py, px
        if crop.turn[1]:
            px = right - left - px
        if crop.turn[2]:
            py = bottom - top - py
        points.append((px + x, py + y))
    (x0, y0), (x1, y1) = points
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]


def kind_of_view(view):
    grid = round(len(view.crops) ** 0.5)
    return "collage" if view.id.startswith("collage@") else "mosaic" if grid == 2 else "crop"


@pytest.fixture(scope="module", params=LAYOUTS)
def annotated(request, tmp_path_factory):
    """Return the folder of a layout and its independent reader."""
    root = tmp_path_factory.mktemp(request.param)
    write, _ = LAYOUTS[request.param]
    write(root, "train", NAMES["train"][:20])
    write(root, "test", NAMES["test"][:1])
    return root, reader_of(request.param, root)


def check_views(drawn, root, objects, number):
    """Recompute pixels and answers of drawn views; return their kinds and counts of what was drawn."""
    kinds, views, turns, grids, used = Counter(), Counter(), Counter(), set(), set()
    for view, (rendered,), asked in drawn_views(drawn, number):
        height, width = view.size
        views[kind_of_view(view)] += 1
        grids.add(len(view.crops))
        turns.update(crop.turn for crop in view.crops)
        used.update(Path(crop.image.id).stem for crop in view.crops)
        pixels = composed(view, lambda image: np.asarray(scene(root, Path(image.id).stem)))
        assert rendered.mode == "RGB" and (np.asarray(rendered) == pixels).all()

        inside, parts, slivers = [], [], set()
        for crop, x, y in placed(view):
            for label, box, area in objects(Path(crop.image.id).stem):
                cut = moved(box, crop, x, y)
                cut_area = (cut[2] - cut[0]) * (cut[3] - cut[1])
                share = cut_area / ((box[2] - box[0]) * (box[3] - box[1]))
                parts += [(label, cut)] if share > 0 else []
                if share >= 0.5:
                    inside.append((label, cut, min(area * share, cut_area)))
                elif share > 0:
                    slivers.add(label)
        assert asked and len(asked) <= (1 if kind_of_view(view) == "collage" else 10)
        for question, answer in asked:
            kinds[check(question, answer, inside, width, height, parts)] += 1
            kind, subject = kind_of(question)
            if answer in ("no", "0") or answer.startswith("There is no"):
                assert SINGULAR.get(subject, subject) not in slivers
            if kind == "one":
                assert not any(subject.endswith(label) for label in slivers)
    return kinds, views, turns, grids, used


@pytest.mark.parametrize("number", NUMBERS)
def test_answers_and_pixels_follow_from_crops(annotated, number):
    root, objects = annotated
    drawn = opened(root, **MIXED)
    kinds, views, turns, grids, used = check_views(drawn, root, objects, number)
    assert set(kinds) == KINDS
    assert len(turns) == 8 and grids == {1, 4, 49}
    assert abs(views["collage"] - number / 2) < 4 * (number / 4) ** 0.5
    assert abs(views["mosaic"] - views["crop"]) < 4 * (number / 2) ** 0.5
    assert used == set(NAMES["train"][:20])


@pytest.mark.parametrize(
    "options",
    [{}, {"map_side": 7, "max_boxes": 1, "scale": [0.3, 2.0]}, {"window": 1000, "turn": False}],
    ids=["defaults", "few boxes in views of any scale", "window larger than images"],
)
def test_answers_with_other_options(coco, options):
    _, views, turns, grids, _ = check_views(opened(coco, **options), coco, reader_of("coco", coco), 40)
    assert set(views) == {"crop"} and grids == {1}
    assert len(turns) == (8 if options.get("turn", True) else 1)


def paint(root, split, number, seed=0):
    """Write images whose colors encode column, row and class, and return the classes by name."""
    classes = {}
    for index in range(number):
        height, width = SIZES[index % len(SIZES)]
        rng, numbers = np.random.default_rng((seed, index)), np.zeros((height, width), np.uint8)
        for _ in range(int(rng.integers(0, 9))):
            top, left = (int(rng.integers(0, length - 10)) for length in (height, width))
            tall, wide = rng.integers(3, 50, 2).tolist()
            numbers[top : top + tall, left : left + wide] = rng.integers(0, 4)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
        pixels[..., 2] = 10 * (index % 25) + numbers
        (root / split / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / split / "images" / f"{index}.png")
        classes[f"{split}/{index}"] = numbers
    return classes


def write_masks(root, classes, to_values):
    for name, numbers in classes.items():
        split, _, stem = name.partition("/")
        (root / split / "masks").mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_values(numbers)).save(root / split / "masks" / f"{stem}.png")


def to_colors(numbers):
    colors = np.zeros((*numbers.shape, 3), np.uint8)
    for number, color in COLORS.items():
        colors[numbers == number] = color
    return colors


WORDS = ("road", "tree", "house")
FORMATS = {
    "values": (lambda numbers: 5 * numbers, {"0": None, "5": "road", "10": "tree", "15": "house"}, WORDS),
    "three equal channels": (lambda n: np.stack([n] * 3, -1), dict(zip("0123", (None, *WORDS))), WORDS),
    "colors": (to_colors, {"0,0,0": None, "250,10,10": "road", "10,250,10": "tree", "1,2,3": "house"}, WORDS),
    "colors without names": (to_colors, None, ("class 250,10,10", "class 10,250,10", "class 1,2,3")),
}
LARGEST = "What covers the largest part", "Which class has the largest area", "What is most of the image"
PRESENCE = r"(?:Is there any|Can you see|Does the image show any) (.*?)(?: in the image)?\?"


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", FORMATS)
def test_label_maps_are_cropped_masks(tmp_path, name, number):
    to_values, names, words = FORMATS[name]
    classes = paint(tmp_path, "train", 12)
    write_masks(tmp_path, classes, to_values)
    kinds = ["presence", "map", "fine_map", "classification"]
    drawn = opened(tmp_path, names=names, kinds=kinds, **PAINTED)
    seen, turns, views = Counter(), Counter(), Counter()
    for view, (rendered,), asked in drawn_views(drawn, number):
        views[kind_of_view(view)] += 1
        turns.update(crop.turn for crop in view.crops)
        truth = composed(view, lambda image: classes[image.id])
        assert (np.asarray(rendered)[..., 2] % 10 == truth).all()
        labels = view.mask()
        phrases = np.array(["", *labels.phrases])
        assert (phrases[labels.numbers] == np.array(["", *words])[truth]).all()
        covered = {word: truth == index for index, word in enumerate(words, 1) if (truth == index).any()}
        for question, answer in asked:
            if question.startswith(LARGEST):
                seen["classification"] += 1
                areas = Counter({word: int(pixels.sum()) for word, pixels in covered.items()})
                (first, area), *others = areas.most_common()
                assert answer == first
                assert area >= 1.25 * max([(truth == 0).sum(), *(other for _, other in others)])
                continue
            presence = re.fullmatch(PRESENCE, question)
            if presence:
                seen[answer] += 1
                assert answer == ("yes" if presence[1] in covered else "no")
                continue
            kind, subject = kind_of(question)
            seen[kind] += 1
            if kind == "map":
                assert answer.split() == map_of(subject, covered, truth.shape)
            else:
                (word,) = [word for word in words if subject in (word, f"{word}s")]
                assert kind == "fine_map"
                assert answer.split() == fine_map_of(covered.get(word, np.zeros(truth.shape, bool)))
    assert set(seen) == {"classification", "yes", "no", "map", "fine_map"}
    assert len(turns) == 8 and set(views) == {"crop", "mosaic", "collage"}


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for split in ("train", "test"):
        for index in range(12):
            folder = root / split / ("AnnualCrop", "forest", "sea_lake")[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            height, width = SIZES[index % len(SIZES)]
            exif = Image.Exif()
            exif[0x0112] = 6 if index % 4 == 0 else 1  # Turned by 90 degrees for display.
            picture(width, height, index + 100 * (split == "test")).save(folder / f"{index}.png", exif=exif)
    return root


@pytest.mark.parametrize("number", NUMBERS)
def test_class_folders_are_never_turned(class_folders, number):
    drawn = opened(class_folders, **{**PAINTED, "window": 48})
    seen, windows, words = Counter(), set(), ["annual crop", "forest", "sea lake"]
    for view, (rendered,), asked in drawn_views(drawn, number):
        (crop,) = view.crops
        path = class_folders / crop.image.id
        label = {"AnnualCrop": words[0], "forest": words[1], "sea_lake": words[2]}[path.parent.name]
        stored = Image.open(path)
        upright = stored.transpose(Image.Transpose.ROTATE_270) if stored.getexif().get(0x0112) == 6 else stored
        assert rendered.tobytes() == upright.crop(crop.window).tobytes()
        windows.add(crop.window)
        for question, answer in asked:
            named = [word for word in words if word in question]
            if answer in ("yes", "no"):
                seen[answer] += 1
                assert (answer == "yes") == (named == [label]) and len(named) == 1
            else:
                seen[len(named)] += 1
                assert answer == label and len(named) in (0, 3)
    assert set(seen) == {"yes", "no", 0, 3} and len(windows) > 0.9 * number


def write_pairs(root, with_captions, number=8):
    """Write pairs of which the second is the first with inverted colors in random boxes."""
    for split in ("train", "test"):
        for folder in ("A", "B", "label"):
            (root / split / folder).mkdir(parents=True)
        captions = []
        for index in range(number):
            height, width = SIZES[index % len(SIZES)]
            rng, mask = np.random.default_rng((index, split == "test")), np.zeros((height, width), bool)
            for _ in range(index % 4):
                top, left = (int(rng.integers(0, length - 20)) for length in (height, width))
                mask[top : top + int(rng.integers(8, 20)), left : left + int(rng.integers(8, 20))] = True
            before = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            after = np.where(mask[..., None], 255 - before, before)
            for folder, pixels in (("A", before), ("B", after), ("label", 255 * mask.astype(np.uint8))):
                Image.fromarray(pixels).save(root / split / folder / f"{index}.png")
            sentences = [{"raw": f"Change {index} of {split}."}]
            captions.append({"filename": f"{index}.png", "split": split, "sentences": sentences})
        if with_captions:
            (root / f"{split}_captions.json").write_text(json.dumps({"images": captions}))


def test_pairs_share_crop_and_orientation(tmp_path):
    write_pairs(tmp_path, with_captions=False)
    drawn = opened(tmp_path, **{**PAINTED, "collages": 0, "window": 48})
    turns, answers = set(), Counter()
    for view, (before, after), asked in drawn_views(drawn, 120):
        turns.update(crop.turn for crop in view.crops)
        folders = {"A": np.asarray(before), "B": np.asarray(after)}
        for folder, pixels in folders.items():
            path = tmp_path / "train" / folder / f"{Path(view.crops[0].image.id).name}.png"
            assert (pixels == composed(view, lambda image, path=path: np.asarray(Image.open(path)))).all()
        is_changed = (folders["A"] != folders["B"]).any()
        for _, answer in asked:
            if answer in ("yes", "no"):
                answers[answer] += 1
                assert answer == ("yes" if is_changed else "no")
            elif answer in ("Nothing has changed.", "There is no changed region."):
                answers["nothing"] += 1
                assert not is_changed
            else:
                answers["other"] += 1
                assert is_changed
    assert len(turns) == 8 and min(answers[key] for key in ("yes", "no", "nothing", "other")) >= 5


def test_captioned_pairs_are_whole(tmp_path):
    write_pairs(tmp_path, with_captions=True)
    drawn, seen = opened(tmp_path, **PAINTED), set()
    for view, (before, after), asked in drawn_views(drawn, 40):
        (crop,) = view.crops
        index = Path(crop.image.id).name
        for folder, rendered in (("A", before), ("B", after)):
            assert rendered.tobytes() == Image.open(tmp_path / "train" / folder / f"{index}.png").tobytes()
        seen.update(answer for _, answer in asked if answer.startswith("Change "))
        assert all(answer == f"Change {index} of train." for _, answer in asked if answer.startswith("Change "))
    assert len(seen) == 8


def write_bands_with_boxes(root, suffix, bands, number=6, **entries):
    """Write 16-bit images with COCO labels, and return their bands `(bands, height, width)` by file name."""
    images, annotations, arrays = [], [], {}
    for index in range(number):
        rng, (height, width) = np.random.default_rng(index), SIZES[index % len(SIZES)]
        name = f"{index}{suffix}"
        arrays[name] = rng.integers(0, 2**16, (bands, height, width), dtype=np.uint16)
        write_bands(root / "train" / name, arrays[name])
        images.append({"id": index, "file_name": name, "width": width, "height": height})
        for _ in range(5):
            x, y, w, h = *rng.integers(0, 60, 2).tolist(), *rng.integers(5, 30, 2).tolist()
            annotation = {"id": len(annotations), "image_id": index, "category_id": 0, "bbox": [x, y, w, h], **entries}
            annotations.append(annotation)
    contents = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "ship"}]}
    (root / "train.json").write_text(json.dumps(contents))
    return arrays


@pytest.mark.parametrize(
    ("suffix", "bands", "spec"),
    [
        (".tif", 4, {"band_names": ["B02", "B03", "B04", "B08"], "window": [0, 65535]}),
        (".png", 1, {"window": [0, 65535]}),
    ],
)
def test_16_bit_values_are_kept(tmp_path, monkeypatch, processor, suffix, bands, spec):
    arrays = write_bands_with_boxes(tmp_path, suffix, bands)
    drawn = opened(tmp_path, **PAINTED)
    drawn.scenes.spec = InputSpec.from_dict(spec)
    turns, views = set(), set()
    for view, (rendered,), _ in drawn_views(drawn, 40):
        turns.update(crop.turn for crop in view.crops)
        views.add(kind_of_view(view))
        expected = composed(view, lambda image: arrays[image.id].transpose(1, 2, 0)).transpose(2, 0, 1)
        assert rendered.dtype == np.uint16 and rendered.shape == expected.shape
        assert (rendered == expected).all()
        with monkeypatch.context() as patched:
            patched.setattr(drawing, "CACHE_BYTES", 16)  # Only the window of a TIFF is read.
            assert (drawn.scenes.render(view)[0] == rendered).all()
    assert len(turns) == 8 and views == {"crop", "mosaic", "collage"}
    processor.image_processor = processor.image_processor.with_input_spec(spec)
    rows = [{**row, "epoch": 0} for row in list(drawn.rows())[:3]]
    batch = ViTPDataCollator(processor, sample_transform=drawn)(rows)
    assert batch["pixel_values"].shape[1] == (4 if bands == 4 else 3)
    assert torch.isfinite(batch["pixel_values"]).all() and batch["pixel_values"].std() > 0.1


def test_images_with_region_captions_are_not_turned(tmp_path):
    arrays = write_bands_with_boxes(tmp_path, ".tif", 4, caption="The ship on the left.")
    drawn, answers = opened(tmp_path, **{**PAINTED, "collages": 0}), Counter()
    for view, (rendered,), asked in drawn_views(drawn, 40):
        assert {crop.turn for crop in view.crops} == {(False, False, False)}
        expected = composed(view, lambda image: arrays[image.id].transpose(1, 2, 0))
        assert (rendered == expected.transpose(2, 0, 1)).all()
        for question, answer in asked:
            if kind_of(question)[0] == "caption":
                answers[kind_of_view(view), answer == "The ship on the left."] += 1
    assert answers["crop", True] > 5 and answers["mosaic", False] > 5
    assert not answers["crop", False] and not answers["mosaic", True]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, "train", NAMES["train"][:30])
    write_coco(root, "test", NAMES["test"][:1])
    return root


@pytest.fixture
def painted(tmp_path):
    classes = paint(tmp_path / "painted", "train", 12)
    write_masks(tmp_path / "painted", classes, lambda numbers: numbers)
    return tmp_path / "painted"


def digests_of(drawn, keys):
    """Return a digest of pixels and messages for each (row, epoch)."""
    rows, digests = drawn.rows(), {}
    for index, epoch in keys:
        example = drawn(rows[index], keyed_generator(0, rows[index]["id"], epoch))
        (rendered,) = example["images"]
        digests[index, epoch] = hashlib.sha256(rendered.tobytes() + str(example["messages"]).encode()).hexdigest()
    return digests


KEYS = [(index, epoch) for index in range(8) for epoch in range(2)]


def digests_in_process(drawn, keys, queue):
    queue.put(digests_of(drawn, keys))


@pytest.mark.parametrize("folder", ["coco", "painted"])
def test_view_depends_on_generator_alone(request, monkeypatch, folder):
    drawn = opened(request.getfixturevalue(folder), **PAINTED)
    digests = digests_of(drawn, KEYS)
    assert len(set(digests.values())) == len(KEYS)
    assert digests_of(drawn, KEYS[::-1]) == digests
    queue = multiprocessing.get_context("fork").SimpleQueue()
    fork = multiprocessing.get_context("fork").Process(target=digests_in_process, args=(drawn, KEYS[3:], queue))
    fork.start()
    assert queue.get() == {key: digests[key] for key in KEYS[3:]}
    fork.join()

    monkeypatch.setattr(drawing, "CACHE_BYTES", 300_000)  # A few images.
    copy = pickle.loads(pickle.dumps(drawn))
    assert digests_of(copy, KEYS[::-1]) == digests
    kept, all_of_them = (sum(map(drawing.number_of_bytes, one.scenes._stored.values())) for one in (copy, drawn))
    assert kept == copy.scenes._bytes <= 300_000 < all_of_them


@pytest.mark.slow
def test_view_is_same_in_new_process(painted, tmp_path):
    script = "import sys; from test_drawing import *; drawn = opened(sys.argv[1], **PAINTED); "
    script += "print(sorted(digests_of(drawn, KEYS).items()))"
    helpers = Path(sys.modules["annotated_images"].__file__).parent
    # Its hashes of texts differ from those of this process.
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": f"{helpers}:{Path(__file__).parent}"}
    command = [sys.executable, "-c", script, str(painted)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sorted(digests_of(opened(painted, **PAINTED), KEYS).items()))


def test_rows_are_windows_and_collages(coco):
    rows = opened(coco, **MIXED).rows()
    assert len(set(rows["id"])) == len(rows) == 30 * 4 * 2  # Four windows cover 320 x 240, and a collage for each.
    assert Counter(rows["image_index"]) == dict.fromkeys(range(30), 8)
    assert len(opened(coco, collages=0.5).rows()) == 45
    assert len(opened(coco, collages=1, kinds=["counting"]).rows()) == 30  # Collages are asked for maps alone.


def test_changed_label_changes_its_rows(coco, tmp_path):
    shutil.copytree(coco, tmp_path / "copy")
    path = tmp_path / "copy" / "annotations" / "instances_train2017.json"
    before = opened(tmp_path / "copy").rows()
    contents = json.loads(path.read_text())
    annotation = contents["annotations"][-1]
    annotation["bbox"][2] /= 2
    path.write_text(json.dumps(contents))
    after = opened(tmp_path / "copy").rows()
    changed = [one["image_index"] for one, other in zip(before, after) if one["labels"] != other["labels"]]
    assert changed == [annotation["image_id"]]
    assert before["id"] == after["id"]


def test_changed_mask_changes_its_rows(tmp_path):
    """A hole that moves changes neither the box nor the area of its region."""
    classes = paint(tmp_path, "train", 3)
    for numbers in classes.values():
        numbers[:20, :20] = 1
    classes["train/1"][5, 5] = 0
    write_masks(tmp_path, classes, lambda numbers: numbers)
    before = opened(tmp_path).rows()["labels"]
    classes["train/1"][5, 5:7] = 1, 0
    write_masks(tmp_path, classes, lambda numbers: numbers)
    after = opened(tmp_path).rows()["labels"]
    assert [one == other for one, other in zip(before, after)] == [True, False, True]


def test_yes_and_no_are_equally_frequent(coco):
    """The shares of answers are estimated from 500 views, whose error adds to that of 2,000 draws."""
    drawn = opened(coco, window=160, kinds=["presence"])
    answers = {}
    for _, _, asked in drawn_views(drawn, 2000, images=False):
        for question, answer in asked:
            answers.setdefault(kind_of(question)[1], Counter())[answer] += 1
    assert set(answers) == {label.replace("-", " ").lower() for label in LABELS}
    for counts in answers.values():
        number = counts.total()
        assert number > 200
        assert abs(counts["yes"] / number - 0.5) < 4 * (0.25 / number + 1 / number) ** 0.5, answers


@pytest.mark.slow
def test_unbalanced_class_is_balanced(tmp_path):
    """A class in nearly every view would be a reason to answer yes without looking."""
    classes = paint(tmp_path, "train", 30)
    for index, numbers in enumerate(classes.values()):
        numbers[numbers == 1] = 0
        if index % 10:
            numbers[::8] = 1
    write_masks(tmp_path, classes, lambda numbers: numbers)
    drawn = opened(tmp_path, window=64, kinds=["presence"])
    plain, balanced = Counter(), Counter()
    for view, _, asked in drawn_views(drawn, 600, images=False):
        plain.update(exchange.answer for exchange in drawn.asker.ask("presence", view) if exchange.about == "class 1")
        balanced.update(answer for question, answer in asked if "class 1" in question)
    assert plain["yes"] > 2 * plain["no"] > 0
    number = balanced.total()
    assert number > 50 and abs(balanced["yes"] / number - 0.5) < 4 * (1.25 / number) ** 0.5


def test_slices_of_volumes(tmp_path):
    rng, volumes = np.random.default_rng(0), {}
    for case in ("a", "b"):
        mask = np.zeros((50, 40, 4), np.int16)  # Columns, rows, slices.
        for label in (1, 2):
            left, top = rng.integers(0, 20, 2)
            mask[left : left + 18, top : top + 15, label - 1 : label + 2] = label
        values = (rng.normal(0, 100, mask.shape) + 300 * mask).astype(np.int16)
        volumes[case] = values, mask
        for kind, array in (("images", values), ("masks", mask)):
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
            image = nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0]))
            nibabel.save(image, tmp_path / "train" / kind / f"{case}.nii.gz")
    names = {"0": None, "1": "liver", "2": "spleen"}
    drawn = opened(tmp_path, names=names, window=24, collages=0.5, collage_size=42, kinds=["map"])

    def slice_of(image, index):
        case, _, name = image.id.rpartition("/")
        return volumes[case][index][:, :, int(name.removeprefix("axial_"))].T

    seen = set()
    for view, (rendered,), ((question, answer),) in drawn_views(drawn, 20):
        truth = composed(view, lambda image: slice_of(image, 1))
        covered = {label: truth == value for value, label in ((1, "liver"), (2, "spleen")) if (truth == value).any()}
        assert answer.split() == map_of(kind_of(question)[1], covered, truth.shape)
        seen.update(answer.split())
        assert rendered.mode == "RGB"
        for crop, x, y in placed(view):
            values = volumes[crop.image.id.rpartition("/")[0]][0]
            low, high = np.percentile(values, [1, 99])
            part = composed(view, lambda image: slice_of(image, 0))[y : y + crop.side, x : x + crop.side]
            expected = 255 * ((part - low) / (high - low)).clip(0, 1)
            shown = np.asarray(rendered)[y : y + crop.side, x : x + crop.side]
            assert abs(shown - expected[..., None]).max() <= 1
    assert seen == {"background", "liver", "spleen"}
