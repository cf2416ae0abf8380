"""Annotated images in several layouts, and an oracle that recomputes answers about them."""

import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import rasterio.warp
import shapely
from datasets import load_dataset
from georeferenced import ROTATED, UTM, apply, feature, save_geojson, save_geotiff
from PIL import Image

from modeling_vitp.recipes import make_instructions

WIDTH, HEIGHT = 320, 240
SINGULAR = {"planes": "plane", "ships": "ship", "storage tanks": "storage tank", "buses": "bus"}
LABELS = ["plane", "ship", "storage-tank", "Bus"]
QUARTERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}


def noise(path, seed, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize(size)
    save_geotiff(path, np.asarray(picture), ROTATED) if path.suffix == ".tif" else picture.save(path, compress_level=1)


def random_objects(seed):
    """Return classes and corners (4, 2) of rotated boxes; many of one class or few of several."""
    rng = np.random.default_rng(seed)
    objects = []
    for label in rng.choice(LABELS, int(rng.integers(0, 4)), replace=False):
        for _ in range(int(rng.integers(1, 5))):
            centre, angle = rng.uniform((20, 20), (WIDTH - 20, HEIGHT - 20)), rng.uniform(0, np.pi)
            axis = np.array([np.cos(angle), np.sin(angle)])
            long, short = axis * rng.uniform(1, 30), axis[::-1] * [-1, 1] * rng.uniform(0.5, 15)
            corners = np.array(
                [centre + long + short, centre + long - short, centre - long - short, centre - long + short]
            )
            objects.append((str(label), corners.round(1)))
    return objects


def write_coco(root, split, names):
    images, annotations = [], []
    for index, name in enumerate(names):
        noise(root / "images" / f"{split}2017" / f"{name}.png", int(name))
        images.append({"id": index, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT})
        for label, corners in random_objects(int(name)):
            (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
            box = [left, top, right - left, bottom - top]
            annotations.append(
                {"id": len(annotations), "image_id": index, "category_id": LABELS.index(label), "bbox": box}
            )
    contents = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index, "name": label} for index, label in enumerate(LABELS)],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(contents))
    (root / "annotations" / f"captions_{split}2017.json").write_text(json.dumps({"images": images, "annotations": []}))


def write_voc(root, split, names):
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    (root / "Annotations").mkdir(exist_ok=True)
    for name in names:
        noise(root / "JPEGImages" / f"{name}.png", int(name))
        objects = ""
        for label, corners in random_objects(int(name)):
            sides = zip(("xmin", "ymin", "xmax", "ymax"), [*corners.min(0), *corners.max(0)])
            box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
            objects += f"<object><name>{label}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>\n"
        text = f"<annotation><filename>{name}.png</filename>\n{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)


def write_dota(root, split, names):
    (root / split / "labelTxt").mkdir(parents=True)
    for name in names:
        noise(root / split / "images" / f"{name}.png", int(name))
        objects = random_objects(int(name))
        lines = [" ".join(f"{value:.1f}" for value in corners.flatten()) + f" {label} 0" for label, corners in objects]
        (root / split / "labelTxt" / f"{name}.txt").write_text("\n".join(["imagesource:none", "gsd:0.5", *lines]))


def write_yolo(root, split, names):
    """Write boxes, oriented boxes and pentagons; images without objects have no file."""
    (root / "labels" / split).mkdir(parents=True)
    (root / "data.yaml").write_text(f"path: ../elsewhere\ntrain: images/train\ntest: images/test\nnames: {LABELS}\n")
    for name in names:
        noise(root / "images" / split / f"{name}.png", int(name))
        lines = ""
        for index, (label, corners) in enumerate(random_objects(int(name))):
            low, high = corners.min(0), corners.max(0)
            pentagon = [*corners, (corners[3] + corners[0]) / 2]
            points = ([(low + high) / 2, high - low], corners, pentagon)[index % 3] / np.array([WIDTH, HEIGHT])
            lines += f"{LABELS.index(label)} {' '.join(f'{number:.9f}' for number in points.flatten())}\n"
        if lines:
            (root / "labels" / split / f"{name}.txt").write_text(lines)


def write_geojson(root, split, names):
    """Write polygons in longitude and latitude over rotated GeoTIFFs in UTM."""
    for name in names:
        noise(root / split / "images" / f"{name}.tif", int(name))
        objects = random_objects(int(name))
        features = [feature(corners, ROTATED, **{"class": label}) for label, corners in objects]
        save_geojson(root / split / "labels" / f"{name}.geojson", features)


def read_coco(root, name):
    contents = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    (image,) = [image for image in contents["images"] if image["file_name"] == f"{name}.png"]
    labels = {category["id"]: category["name"] for category in contents["categories"]}
    for annotation in contents["annotations"]:
        if annotation["image_id"] == image["id"]:
            x, y, w, h = annotation["bbox"]
            yield labels[annotation["category_id"]], [x, y, x + w, y + h], w * h


def read_voc(root, name):
    text = (root / "Annotations" / f"{name}.xml").read_text()
    for label, *sides in re.findall(r"<name>(.*?)</name>.*?" + r"<\w{4}>([\d.-]+)</\w{4}>" * 4, text):
        x0, y0, x1, y1 = map(float, sides)
        yield label, [x0, y0, x1, y1], (x1 - x0) * (y1 - y0)


def read_dota(root, name):
    for line in (root / "train" / "labelTxt" / f"{Path(name).name}.txt").read_text().splitlines()[2:]:
        *numbers, label, _ = line.split()
        xs, ys = np.array(numbers[::2], float), np.array(numbers[1::2], float)
        area = abs(np.dot(xs, np.roll(ys, 1)) - np.dot(ys, np.roll(xs, 1))) / 2
        yield label, [xs.min(), ys.min(), xs.max(), ys.max()], area


def read_yolo(root, name):
    path = root / "labels" / "train" / f"{Path(name).name}.txt"
    for line in path.read_text().splitlines() if path.exists() else ():
        label, *numbers = line.split()
        xs, ys = np.array(numbers[::2], float) * WIDTH, np.array(numbers[1::2], float) * HEIGHT
        area = abs(np.dot(xs, np.roll(ys, 1)) - np.dot(ys, np.roll(xs, 1))) / 2
        if len(xs) == 2:
            (x, w), (y, h), area = xs, ys, xs[1] * ys[1]
            xs, ys = np.array([x - w / 2, x + w / 2]), np.array([y - h / 2, y + h / 2])
        yield LABELS[int(label)], [xs.min(), ys.min(), xs.max(), ys.max()], area


def read_geojson(root, name):
    for entry in json.loads((root / "train" / "labels" / f"{Path(name).name}.geojson").read_text())["features"]:
        (ring,) = entry["geometry"]["coordinates"]
        points = apply(~ROTATED, np.transpose(rasterio.warp.transform("EPSG:4326", UTM, *zip(*ring))))
        inside = shapely.Polygon(points) & shapely.box(0, 0, WIDTH, HEIGHT)
        yield entry["properties"]["class"], list(inside.bounds), inside.area


LAYOUTS = {"coco": (write_coco, read_coco), "voc": (write_voc, read_voc), "dota": (write_dota, read_dota)}
LAYOUTS |= {"yolo": (write_yolo, read_yolo), "geojson": (write_geojson, read_geojson)}
KINDS = set("presence counting quarter_counting all none one referring caption map fine_map".split())
NAMES = {"train": [f"{index:03}" for index in range(60)], "test": [f"{index:03}" for index in range(60, 66)]}


def reader_of(layout, root):
    """Return an independent reader of a layout: name -> [(label, box within the image, area), …]."""
    _, read = LAYOUTS[layout]
    ends = [WIDTH, HEIGHT] * 2

    @lru_cache
    def objects(name):
        return [
            (label.replace("-", " ").lower(), [min(max(side, 0), end) for side, end in zip(box, ends)], area)
            for label, box, area in read(root, name)
        ]

    return objects


def make(layout, root, output, *options):
    assert make_instructions.main([layout, str(root), "--output_dir", str(output), *map(str, options)]) == 0
    return load_dataset(str(output), cache_dir=f"{output}/.cache")


@lru_cache
def scene(root, name):
    (path,) = (path for path in root.rglob(f"{name}.*") if path.suffix in (".png", ".tif"))
    return Image.open(path).convert("RGB")


def turns_of(row):
    messages = row["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    return [(q["content"], a["content"]) for q, a in zip(messages[::2], messages[1::2])]


def boxes_in(text):
    """Return phrase and boxes of a text, which must be exactly in InternVL's format."""
    phrase, boxes = re.fullmatch(r"<ref>(.*)</ref><box>\[(\[.*\])\]</box>", text).groups()
    boxes = [[int(number) for number in re.findall(r"\d+", box)] for box in re.findall(r"\[(.*?)\]", boxes)]
    assert text == f"<ref>{phrase}</ref><box>[" + ", ".join(str(box) for box in boxes) + "]</box>"
    return phrase, boxes


def same_place(grid, box, width=WIDTH, height=HEIGHT):
    """Return whether a grid box equals a box in pixels, to half a grid step, or to one step for an empty box."""
    exact = [side * 1000 / end for side, end in zip(box, [width, height] * 2)]
    x0, y0, x1, y1 = grid
    assert 0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000
    slack = [0.5 if exact[i + 2] - exact[i] > 1 else 1 for i in (0, 1)] * 2
    return all(abs(a - b) <= limit + 1e-6 for a, b, limit in zip(grid, exact, slack))


def kind_of(question):
    for kind, pattern in PATTERNS.items():
        match = re.fullmatch(pattern, question)
        if match:
            return kind, next((group for group in match.groups() if group), None)
    raise AssertionError(question)


PATTERNS = {
    "presence": r"(?:Is there|Can you see|Does the image show) an? (.*?)(?: in the image)?\?",
    "quarter_counting": r"(?:How many (.*) are in each quarter of the image\?"
    r"|Count the (.*) in the top left, top right, bottom left and bottom right\.)",
    "counting": r"(?:How many|What is the number of|Count the) (.*?)(?: are)?(?: in the image)?[.?]",
    "all": r"(?:Find all (.*)|Mark every (.*) in the image with a box|Give the boxes of all (.*))\.",
    "one": r"(?:Where is (.*)\?|Give the box of (.*)\.|Locate <ref>(.*)</ref> in the image\.)",
    "fine_map": r"(?:Map the (.*) in \d+ x \d+ cells, with a letter for the covered quarters of each"
    r"|Which quarters of each of \d+ x \d+ cells do (.*) cover\? Write a letter for each cell)\.",
    "map": r"(?:What covers most of each cell|Divide the image into|Map the image in) .*(?:\?|\.) Write (.*)\.",
    "caption": r"(?:What is in the region|Describe the object at|What does the box) <box>\[\[(.*)\]\]</box>.*",
}


def check(question, answer, objects, width=WIDTH, height=HEIGHT, parts=None):
    """Recompute the answer from the raw annotation with plain loops and return the kind of the question.

    `objects` are (label, box, area). `parts` are (label, box) of all visible parts, also of objects that do not count
    because most of them is outside; by default they are those of `objects`.
    """
    kind, subject = kind_of(question)
    if parts is None:
        parts = [(label, box) for label, box, _ in objects]
    if kind == "presence":
        assert answer == ("yes" if any(label == subject for label, _, _ in objects) else "no")
    elif kind == "counting":
        assert int(answer) == sum(label == SINGULAR[subject] for label, _, _ in objects)
    elif kind == "quarter_counting":
        counts = dict.fromkeys(QUARTERS.values(), 0)  # by right and bottom
        for label, (x0, y0, x1, y1), _ in objects:
            if label == SINGULAR[subject]:
                counts[int(x0 + x1 >= width), int(y0 + y1 >= height)] += 1
        assert answer == ", ".join(f"{name} {counts[place]}" for name, place in QUARTERS.items())
    elif kind == "all":
        label = SINGULAR.get(subject, subject)
        expected = sorted((box for name, box, _ in objects if name == label), key=lambda box: (box[1], box[0]))
        if not expected:
            assert answer == f"There is no {label}."
            return "none"
        phrase, boxes = boxes_in(answer)
        assert SINGULAR.get(phrase, phrase) == label and (phrase == label) == (len(boxes) == 1)
        assert len(boxes) == len(expected)
        assert all(same_place(grid, box, width, height) for grid, box in zip(boxes, expected))
    elif kind == "one":
        phrase, (grid,) = boxes_in(answer)
        (found,) = referents(subject, objects, width, height)
        assert same_place(grid, found, width, height)
        assert phrase in (subject, subject.removeprefix("the "))
        return "referring" if phrase == subject else "one"
    elif kind == "map":
        assert answer.split() == map_of(subject, covered_by(parts, width, height), (height, width))
    elif kind == "fine_map":
        label = SINGULAR[subject]
        covered = covered_by(parts, width, height).get(label, np.zeros((height, width), bool))
        centers = [((x0 + x1) / 2, (y0 + y1) / 2) for name, (x0, y0, x1, y1), _ in objects if name == label]
        assert answer.split() == fine_map_of(covered, centers)
    else:
        grid = [int(number) for number in subject.split(", ")]
        candidates = [entry for entry in objects if same_place(grid, entry[1], width, height)]
        label, extreme, count = re.fullmatch(r"an? ([a-z ]+?)(?:, the (largest|smallest) of (\d+))?", answer).groups()
        assert label in {name for name, _, _ in candidates}
        if extreme:
            assert int(count) == sum(name == label for name, _, _ in objects)
            (found,) = referents(f"the {extreme} {label}", objects, width, height)
            assert same_place(grid, found, width, height)
    return kind


def map_of(key, covered, size):
    """Return the words of a map from the pixels of each class; `key` is the question's description of the words."""
    signs = {}
    for word in re.split(", | or ", key):
        sign, _, label = word.partition(" for ")
        signs[label or (None if sign in ("none", "background") else sign)] = sign
    ground = ~np.any([np.zeros(size, bool), *covered.values()], axis=0)
    covered = {None: ground, **dict(sorted(covered.items()))}
    of_row, of_column = ((np.arange(length) + 0.5) // (length / 7) for length in size)
    cells = [
        {label: int(pixels[np.ix_(of_row == row, of_column == column)].sum()) for label, pixels in covered.items()}
        for row in range(7)
        for column in range(7)
    ]
    return [signs[max(counts, key=counts.get)] for counts in cells]


def fine_map_of(covered, centers=(), side=7):
    """Return the letters of a fine map from the pixels of a class, and the centers (x, y) of its objects."""
    height, width = covered.shape
    quarter_rows, quarter_columns = ((2 * np.arange(length) + 1) * side // length for length in (height, width))
    covered_pixels, all_pixels = np.zeros((2, 2 * side, 2 * side), int)
    np.add.at(covered_pixels, (quarter_rows[:, None], quarter_columns), covered)
    np.add.at(all_pixels, (quarter_rows[:, None], quarter_columns), 1)
    is_covered = 2 * covered_pixels > all_pixels
    letters = []
    for row in range(side):
        for column in range(side):
            number = sum(2**bit for bit in range(4) if is_covered[2 * row + bit // 2, 2 * column + bit % 2])
            has_center = any(
                column <= x * side / width < column + 1 and row <= y * side / height < row + 1 for x, y in centers
            )
            letter = "abcdefghijklmnop"[number]
            letters.append(letter.upper() if has_center else letter)
    return letters


def covered_by(boxes, width=WIDTH, height=HEIGHT):
    """Return a mask by label of the pixels whose centers lie in a box of the label, from (label, box) pairs."""
    y, x = np.mgrid[:height, :width] + 0.5
    covered = {label: np.zeros((height, width), bool) for label, _ in boxes}
    for label, (x0, y0, x1, y1) in boxes:
        covered[label] |= (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
    return covered


def referents(phrase, objects, width, height):
    """Return the boxes that a phrase may refer to."""
    words, place = re.fullmatch(r"the (.*?)(?: in the (top left|top right|bottom left|bottom right))?", phrase).groups()
    first, _, rest = words.partition(" ")
    position = {"leftmost": (0, 1), "topmost": (1, 1), "rightmost": (0, -1), "bottommost": (1, -1)}
    if first in ("largest", "smallest"):
        entries = [(area, (box[2] - box[0]) * (box[3] - box[1]), box) for name, box, area in objects if name == rest]
        best = max if first == "largest" else min
        assert best(entries, key=lambda entry: entry[0]) is best(entries, key=lambda entry: entry[1])
        areas = sorted((entry[0] for entry in entries), reverse=first == "largest")
        assert max(areas[0] / areas[1], areas[1] / areas[0]) >= 1.2
        return [best(entries, key=lambda entry: entry[0])[2]]
    if first in position:
        axis, sign = position[first]
        boxes = [box for name, box, _ in objects if name == rest]
        return [min(boxes, key=lambda box: sign * (box[axis] + box[axis + 2]))]
    boxes = [box for name, box, _ in objects if name == words]
    if place is not None:
        x, y = QUARTERS[place]
        left, top, right, bottom = x * width / 2, y * height / 2, (x + 1) * width / 2, (y + 1) * height / 2
        boxes = [b for b in boxes if b[0] < right and b[2] > left and b[1] < bottom and b[3] > top]
        for box in boxes:
            assert left <= (box[0] + box[2]) / 2 <= right and top <= (box[1] + box[3]) / 2 <= bottom
    return boxes
