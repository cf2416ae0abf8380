"""Folders of captions with one damaged file give rows, or an error of one line that names the file."""

import json
import random
import shutil
from pathlib import Path

import datasets
import pytest
from fuzzing import alter_file, check_outcomes, damage, limits, outcome
from pictures import picture
from row_formats import answer, save_images, write_archive, write_archives, write_llava, write_metadata
from sample_rows import encoded_image

from modeling_vitp.instructions.rows import load_images
from modeling_vitp.instructions.sources import Source, read_source

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Pillow warns about broken files.
]


def write_table(folder: Path, pictures, delimiter: str, suffix: str) -> None:
    lines = [f"image{delimiter}caption"]
    for number, name in enumerate(save_images(folder, pictures)):
        lines.append(f"{name}{delimiter}{answer(number)}")
    (folder / f"captions{suffix}").write_text("\n".join(lines) + "\n")


def write_csv(folder: Path, pictures) -> None:
    write_table(folder, pictures, ",", ".csv")


def write_tsv(folder: Path, pictures) -> None:
    write_table(folder, pictures, "\t", ".tsv")


def write_texts(folder: Path, pictures) -> None:
    for number, name in enumerate(save_images(folder, pictures)):
        (folder / name).with_suffix(".txt").write_text(answer(number))


def write_coco_captions(folder: Path, pictures) -> None:
    images, annotations = [], []
    for number, name in enumerate(save_images(folder / "images", pictures)):
        images.append({"id": number, "file_name": name, "width": 40, "height": 30})
        annotations.append({"id": number, "image_id": number, "caption": answer(number)})
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def write_archive_of_texts(folder: Path, pictures) -> None:
    files = {}
    for number, image in enumerate(pictures):
        files[f"{number}.png"] = encoded_image(image)
        files[f"{number}.txt"] = answer(number).encode()
    write_archive(folder / "train-0.tar", files)


def write_metadata_table(folder: Path, pictures) -> None:
    lines = ["file_name,text"]
    for number, name in enumerate(save_images(folder / "train", pictures)):
        lines.append(f"{name},{answer(number)}")
    (folder / "train" / "metadata.csv").write_text("\n".join(lines) + "\n")


WRITERS = [
    write_csv,
    write_tsv,
    write_texts,
    write_coco_captions,
    write_archive_of_texts,
    write_archives,
    write_metadata,
    write_metadata_table,
    write_llava,
]


def damage_one_file(rng: random.Random, folder: Path) -> Path:
    """Damage a file, seldom an image, and return its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    row_files = [path for path in files if path.suffix != ".png"]
    path = rng.choice(row_files if rng.random() < 0.85 else files)
    if rng.random() < 0.85:
        alter_file(rng, path)
    else:
        path.write_bytes(damage(rng, damage(rng, path.read_bytes())))
    return path


def test_damaged_captions_are_read_or_named(tmp_path):
    rng = random.Random(11)
    pictures = [picture(40, 30) for _ in range(4)]
    datasets.disable_progress_bars()
    results = []
    with limits():
        for number in range(150):
            folder = tmp_path / str(number)
            rng.choice(WRITERS)(folder, pictures)
            path = damage_one_file(rng, folder)
            source = Source("s", folder=str(folder), streaming=rng.random() < 0.4, rows=4)
            result = outcome(lambda: list(read_source(source)), path.name)  # noqa: B023 called at once
            results.append(result)
            if isinstance(result, ValueError):
                assert "\n" not in str(result)
                continue
            for row in result:
                if row["error"] is None:
                    outcome(lambda: load_images(row), "")  # noqa: B023
                else:
                    assert "\n" not in row["error"]
            shutil.rmtree(folder)
    datasets.enable_progress_bars()
    check_outcomes(results, 20)
