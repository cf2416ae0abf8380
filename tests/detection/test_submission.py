"""Detections as DOTA's server takes them."""

import json
import zipfile

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from modeling_vitp.detection.prediction import first_at_top_left, merge, write_task1
from modeling_vitp.rotated_boxes import corners

EVALUATION = FIXTURES / "rotated_evaluation"


def test_merged_files_are_those_of_mmrotate_line_by_line(tmp_path):
    expected = json.loads((EVALUATION / "expected.json").read_text())["merge"]
    patches = load_file(EVALUATION / "patches.safetensors")
    parts = {}
    for patch in expected["patches"]:
        image, _, place = patch.split("__", 2)
        found = [patches[f"{patch}.{label}"] for label in range(2)]
        labels = torch.cat([torch.full((len(boxes),), label) for label, boxes in enumerate(found)])
        found = torch.cat(found)
        detections = {"corners": corners(found[:, :5]), "scores": found[:, 5], "labels": labels}
        parts.setdefault(image, []).append((detections, tuple(int(start) for start in place.split("___"))))
    merged = {image: merge(*zip(*some), nms_threshold=0.1) for image, some in parts.items()}
    archive = write_task1(merged, expected["classes"], tmp_path / "Task1", expected=["P0001", "P0002"])
    with zipfile.ZipFile(archive) as packed:
        assert sorted(packed.namelist()) == sorted(expected["files"])
        for name, text in expected["files"].items():
            assert packed.read(name).decode() == text == (tmp_path / "Task1" / name).read_text()


def test_the_first_corner_is_that_of_mmrotate():
    fixture = load_file(FIXTURES / "rotated_ops" / "expected.safetensors")
    ordered = first_at_top_left(corners(fixture["convert.boxes"].double()).numpy())
    expected = fixture["submission.corners"][:, :8].reshape(-1, 4, 2).double()
    torch.testing.assert_close(torch.from_numpy(ordered), expected, rtol=0, atol=1e-4)


def test_images_that_are_missing_or_foreign_are_refused(tmp_path):
    nothing = {"corners": torch.zeros(0, 4, 2), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
    with pytest.raises(ValueError, match=r"without detections for \['P0002'\], and with some for \['P0003'\]"):
        write_task1({"P0001": nothing, "P0003": nothing}, ["ship"], tmp_path / "Task1", ["P0001", "P0002"])
    write_task1({"P0001": nothing}, ["ship", "plane"], tmp_path / "Task1", ["P0001"])
    assert {path.name: path.read_text() for path in (tmp_path / "Task1").iterdir()} == {
        "Task1_ship.txt": "",
        "Task1_plane.txt": "",
    }
