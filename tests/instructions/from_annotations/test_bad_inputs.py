"""Invalid annotations, images and options: the error names the item, and other images are still used."""

import json
import os

import nibabel
import numpy as np
import pytest
from annotated_images import LAYOUTS, NAMES, make, noise, write_voc
from PIL import Image

from modeling_vitp.data import layouts
from modeling_vitp.data.annotations import AnnotatedImage
from modeling_vitp.data.layouts.dota import dota_objects
from modeling_vitp.data.splits import choose_split
from modeling_vitp.instructions.from_annotations.collages import draw_collages, encode_collages
from modeling_vitp.instructions.from_annotations.labels import annotate_all
from modeling_vitp.recipes import make_instructions

NUM_IMAGES = 6
COCO_FILE = "annotations/instances_train2017.json"
SHAPE = (24, 20, 5)


def put(path, content):
    return lambda root: (root / path).write_bytes(content)


def remove(path):
    return lambda root: (root / path).unlink()


def coco(edit):
    def change(root):
        contents = json.loads((root / COCO_FILE).read_text())
        edit(contents)
        (root / COCO_FILE).write_text(json.dumps(contents))

    return change


def entry(kind, **fields):
    return coco(lambda contents: contents[kind][1].update(fields))


def voc(box=""):
    return put("Annotations/003.xml", f"<a><object><name>x</name>{box}</object></a>".encode())


def voc_box(xmin, ymin=1, xmax=9, ymax=9):
    sides = {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax}
    return f"<bndbox>{''.join(f'<{side}>{value}</{side}>' for side, value in sides.items())}</bndbox>"


def write_classes(root, split, names):
    for place, label in enumerate(("river", "forest")):
        for number in range(NUM_IMAGES // 2):
            noise(root / split / label / f"{number}.png", 10 * place + number, (16, 16))


def write_volumes(root, split, names):
    for case in "ab":
        for folder, values in (("images", np.arange(np.prod(SHAPE))), ("masks", np.arange(np.prod(SHAPE)) % 2)):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
            image = nibabel.Nifti1Image(values.reshape(SHAPE).astype(np.int16), np.eye(4))
            nibabel.save(image, root / split / folder / f"{case}.nii.gz")


def save_mask(path, mask):
    return lambda root: nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), root / path)


def turn(path):
    def change(root):
        exif = Image.Exif()
        exif[274] = 6
        Image.open(root / path).save(root / path, exif=exif)

    return change


def link_outside(root):
    noise(root.parent / "out.png", 5)
    (root / "images/link.png").symlink_to(root.parent / "out.png")


WRITERS = {name: write for name, (write, _) in LAYOUTS.items()} | {"folders": write_classes, "volumes": write_volumes}
VOC, DOTA, YOLO = "Annotations/003.xml", "train/labelTxt/003.txt", "labels/train/003.txt"
OF_ONE_IMAGE = [  # Layout, change that breaks it, and text that the error must match.
    ("voc", remove("JPEGImages/003.png"), r"003\.jpg"),
    ("voc", remove(VOC), r"annotation of .*003\.png was not found"),
    ("voc", put(VOC, b"<annotation"), VOC),
    ("voc", voc(), f"{VOC}, object 0"),
    ("voc", voc(voc_box(9, 9, 4, 12)), f"{VOC}, object 0"),
    *(("voc", voc(voc_box(side)), f"{VOC}, object 0") for side in ("nan", "a")),
    ("dota", put(DOTA, b"1 1 9 1 9 9 1 9"), f"{DOTA}, line 1"),
    ("dota", put(DOTA, b"nan 1 9 1 9 9 1 9 x 0"), f"{DOTA}, line 1"),
    *(
        ("yolo", put(YOLO, line), f"{YOLO}, line 1")
        for line in (b"0 1 1", b"9 0.5 0.5 0.1 0.1", b"0 160 120 20 20", b"0 nan 0.5 0.1 0.1", b"0 0 0 1 1 inf 0")
    ),
    ("geojson", put("train/images/003.tif", b"no"), r"003\.tif"),
    ("geojson", remove("train/labels/003.geojson"), r"003\.tif .*003\.geojson"),
    *(
        ("coco", entry("annotations", bbox=box), COCO_FILE)
        for box in ([1, 2, "x", 4], [1, 2, float("nan"), 4], [0, 0.2, 0.5, 1.0], None)
    ),
    *(("coco", entry("annotations", category_id=value), f"{COCO_FILE}.*category_id") for value in (99, None)),
    ("coco", entry("annotations", area=float("inf")), COCO_FILE),
    ("coco", entry("images", width=240, height=320), f"{COCO_FILE}: 240 x 320 pixels .*png, 320 x 240"),
    ("folders", lambda root: noise(root / "train/overview.png", 1), "train/overview.png"),
    ("folders", lambda root: noise(root / "train/river/2019/a.png", 1), "train/river/2019/a.png"),
    ("folders", lambda root: (root / "train/river/3.png").symlink_to(__file__), r"3\.png"),
    ("coco", turn("images/train2017/001.png"), r"001\.png .*orientation"),
    ("folders", lambda root: os.truncate(root / "train/river/1.png", 200), r"1\.png cannot be read"),
    ("volumes", remove("train/masks/a.nii.gz"), r"No mask .*a\.nii\.gz"),
    ("volumes", save_mask("train/masks/a.nii.gz", np.full(SHAPE, 2, np.uint8)), r"a\.nii\.gz has the value 2"),
    ("volumes", save_mask("train/masks/a.nii.gz", np.ones((24, 20, 4), np.uint8)), r"shape.*a\.nii\.gz"),
]
OF_ALL = [
    ("coco", entry("annotations", image_id="0"), COCO_FILE),
    ("coco", entry("images", file_name=None), COCO_FILE),
    ("coco", entry("categories", id=0), COCO_FILE),
    ("coco", coco(lambda contents: contents.pop("annotations")), f"{COCO_FILE} needs `annotations`"),
    (
        "coco",
        coco(lambda contents: contents["images"].append(contents["images"][0] | {"id": 99})),
        "file_name '000.png'",
    ),
    ("yolo", lambda root: os.rename(root / "labels", root / "texts"), "labels/train"),
    ("yolo", put("data.yaml", b"names: [a]\ntrain: images/train\nkpt_shape: [17, 3]"), "data"),
    ("volumes", lambda root: os.rename(root / "train/images/a.nii.gz", root / "train/images/b.nii"), "the same name"),
]


def written(tmp_path, layout, change):
    WRITERS[layout](tmp_path / "data", "train", NAMES["train"][:NUM_IMAGES])
    change(tmp_path / "data")
    options = {"names": {"0": None, "1": "liver"}, "intensities": (0, 9)} if layout == "volumes" else {}
    return layouts.LAYOUTS[layout](tmp_path / "data", **options)


@pytest.mark.parametrize(("layout", "change", "named"), OF_ONE_IMAGE)
def test_invalid_image_is_named_or_skipped(layout, change, named, tmp_path, capsys):
    read = written(tmp_path, layout, change)
    chosen, _ = choose_split(read, "train")
    with pytest.raises(ValueError, match=named):
        annotate_all(read, chosen)
    images = annotate_all(read, chosen, "skip")
    assert "is excluded" in capsys.readouterr().err
    assert len({image.paths for image in images}) == len(chosen) - 1


@pytest.mark.parametrize(("layout", "change", "named"), OF_ALL)
def test_invalid_data_set_is_named(layout, change, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        read = written(tmp_path, layout, change)
        annotate_all(read, choose_split(read, "train")[0])


@pytest.mark.parametrize("way", ["../out.png", "absolute", "link.png"])
def test_coco_file_name_must_stay_below_root(tmp_path, way):
    name = str(tmp_path / "out.png") if way == "absolute" else way
    read = written(tmp_path, "coco", link_outside)
    inside = tmp_path / "data/images/train2017/000.png"  # The path is absolute and below the root.
    coco(lambda contents: contents["images"][0].update(file_name=str(inside)))(tmp_path / "data")
    entry("images", file_name=name)(tmp_path / "data")
    chosen, _ = choose_split(read, "train")
    with pytest.raises(ValueError, match="data"):
        annotate_all(read, chosen)
    images = annotate_all(read, chosen, "skip")
    assert [image.paths[0].name for image in images] == [f"00{number}.png" for number in (0, 2, 3, 4, 5)]


def test_command_skips_invalid_annotation(tmp_path, capsys):
    write_voc(tmp_path / "data", "train", NAMES["train"][:12])
    (tmp_path / "data" / VOC).write_text("<annotation")
    rows = make("voc", tmp_path / "data", tmp_path / "out", "--on_error", "skip")["train"]
    assert "003.xml" in capsys.readouterr().err
    assert "003" not in rows["id"] and len(rows) > 5
    with pytest.raises(ValueError, match=r"003\.xml"):
        make("voc", tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["folders", "--kinds", "counting"], "folders: counting"),
        (["folders", "--collages", "1"], "--collages"),
        (["masks", "--window", "9"], "--window"),
        (["voc", "--window", "9", "--overlap", "9"], "overlap .* 9"),
        (["masks", "--intensities", "0", "9"], "intensities"),
        (["voc", "--class_property", "species"], "class_property"),
    ],
)
def test_wrong_options_are_named(words, named, tmp_path):
    layout, *options = words
    with pytest.raises(ValueError, match=named):
        make_instructions.main([layout, str(tmp_path), "--output_dir", str(tmp_path / "out"), *options])


@pytest.mark.parametrize(("output", "named"), [("data/made", "data overlap"), (".", "overlap"), ("other", "a.txt")])
def test_output_folder_of_other_files_is_refused(output, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_voc(tmp_path / "data", "train", NAMES["train"][:3])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"--output_dir.*{named}"):
        make_instructions.main(["voc", "data", "--output_dir", output])
    assert sorted(tmp_path.rglob("*")) == before


def test_class_that_does_not_occur_is_named(tmp_path):
    write_voc(tmp_path / "data", "train", NAMES["train"][:12])
    (tmp_path / "names.json").write_text(json.dumps({"shpi": None, "ship": "boat"}))
    with pytest.raises(ValueError, match="--names.*'shpi'"):
        make("voc", tmp_path / "data", tmp_path / "out", "--names", tmp_path / "names.json")
    with pytest.raises(ValueError, match="--names.*'shpi'"):  # JSON as in a configuration
        make("voc", tmp_path / "data", tmp_path / "out", "--names", (tmp_path / "names.json").read_text())


def deep_collage(root):
    Image.fromarray(np.zeros((90, 90), dtype=np.uint16)).save(root / "deep.png")
    deep = AnnotatedImage("deep", (root / "deep.png",), (90, 90))
    return list(encode_collages(draw_collages([deep], 1, 84, (7,), seed=0)))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda root: layouts.Volumes(root, percentiles=(99, 1)), "`percentiles`"),
        (lambda root: layouts.Coco(root).splits(), "No COCO JSON"),
        (lambda root: layouts.Coco(root / "nowhere"), "nowhere not found"),
        (lambda root: dota_objects("gsd:0.3\n1 1 9 1 9 9 1 9 ship 0\n1 2 3", "P1.txt"), "P1.txt, line 3"),
        (lambda root: draw_collages([AnnotatedImage("small", (), (90, 140))], 1, 300, (2,), seed=0), "150 pixels"),
        (deep_collage, r"deep\.png: .*I;16"),
    ],
)
def test_invalid_argument_is_named(call, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        call(tmp_path)
