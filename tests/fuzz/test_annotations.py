"""Malformed annotations give instructions, or an error that names a file."""

import json
import random
import shutil

import pytest
from annotated_images import LAYOUTS, NAMES
from fuzzing import damage, limits, mutate, outcome
from PIL import Image

from modeling_vitp.data import layouts
from modeling_vitp.data.leaks import leave_out_copies
from modeling_vitp.data.splits import choose_split
from modeling_vitp.data.windows import windows_of
from modeling_vitp.instructions.from_annotations.encoding import image_bytes
from modeling_vitp.instructions.from_annotations.labels import annotate_all
from modeling_vitp.instructions.from_annotations.questions import PHRASINGS, Asker, make_conversations

pytestmark = pytest.mark.slow
# test_detection.py has the other layouts, whose files are read by the same code.
SUFFIX = {"coco": ".json", "masks": ".png", "changes": ".json", "geojson": ".geojson"}
VALUES = {"0": None, "255": "building"}


def write(kind, root):
    if kind in LAYOUTS:
        for split, names in NAMES.items():
            LAYOUTS[kind][0](root, split, names[:4])
        return
    for number in range(4):
        for folder in ("A", "B", "label") if kind == "changes" else ("images", "masks"):
            path = root / "train" / folder / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            is_mask = folder in ("label", "masks")
            image = Image.new("L" if is_mask else "RGB", (32, 24))
            image.paste(255, (2, 2, 12 + number, 20)) if is_mask else image.putpixel((number, 0), (255, 0, 0))
            image.save(path)
    if kind == "changes":
        images = [{"filename": f"{number}.png", "sentences": [{"raw": " A house. "}]} for number in range(4)]
        (root / "captions.json").write_text(json.dumps({"images": images}))


def instructions(kind, root, on_error="raise"):
    """Return instructions like the command."""
    layout = layouts.LAYOUTS[kind](root, VALUES if kind == "masks" else None)
    chosen, _ = leave_out_copies(*choose_split(layout, "train"))
    images = annotate_all(layout, chosen, on_error)
    if layout.subject == "objects":
        images = [window for image in images for window in windows_of(image, 200, 20)]
    asker = Asker(layout.subject, {label: 1 for image in images for label in image.classes})
    conversations = make_conversations(images, asker, list(PHRASINGS[layout.subject]), 5)
    for conversation in conversations:
        for message in (message for exchange in conversation for message in exchange.messages):
            assert isinstance(message["content"], str) and message["content"].strip()
    for image in images[:1]:
        image_bytes(image)
    return images


@pytest.mark.parametrize("kind", SUFFIX)
def test_malformed_annotation_is_named_or_skipped(tmp_path, kind):
    rng = random.Random(kind)
    root = tmp_path / "data"
    write(kind, root)
    sound = len(instructions(kind, root))
    files = sorted(path for path in root.rglob(f"*{SUFFIX[kind]}") if "images" not in path.parts[-2:-1])
    files = [path for path in files if kind != "masks" or path.parent.name == "masks"]
    counts = {"error": 0, "right": 0}
    with limits():
        for number in range(100):
            path = rng.choice(files)
            before = path.read_bytes()
            if SUFFIX[kind].endswith("json") and number % 3:
                path.write_text(json.dumps(mutate(rng, json.loads(before), rng.choice([1, 1, 2]))))
            else:
                path.write_bytes(damage(rng, before))
            found = outcome(lambda: instructions(kind, root), str(root))
            counts["error" if isinstance(found, ValueError) else "right"] += 1
            left = outcome(lambda: instructions(kind, root, "skip"), str(root))
            assert isinstance(left, ValueError) or isinstance(found, ValueError) or len(left) == len(found)
            path.write_bytes(before)
    assert min(counts.values()) > 2, counts
    assert len(instructions(kind, root)) == sound
    shutil.rmtree(root)
