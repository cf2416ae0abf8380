"""Captions in each layout that a folder may have, names of image columns, and rows without images."""

import json

import pytest
from datasets import Dataset
from pictures import picture
from row_formats import write_archive, write_lines
from sample_rows import encoded_image
from training_run import make_rows, make_trainer
from trl import ScriptArguments

from modeling_vitp.instructions.schemas import CAPTION_QUESTIONS
from modeling_vitp.instructions.sources import open_splits
from modeling_vitp.pretraining.arguments import PretrainArguments
from modeling_vitp.pretraining.data import open_data
from modeling_vitp.recipes import validate_data

CAPTIONS = ["a green field", "two ships, a harbor", "a road"]
MESSAGES = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}]


def save_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        picture(40, 32, number).save(folder / f"{number}.png")
    return [(f"{number}.png", caption) for number, caption in enumerate(CAPTIONS)]


def write_csv(folder, name="train.csv", head="image,caption\n", images="images"):
    rows = save_images(folder / images)
    mark = "\t" if name.endswith("tsv") else ","
    text = head + "".join(f'{image}{mark}"{caption}"\n' for image, caption in rows)
    (folder / name).write_text(text)


def write_lists(folder):
    rows = [{"filename": image, "sentences": [{"raw": caption}]} for image, caption in save_images(folder)]
    (folder / "dataset.json").write_text(json.dumps(rows))


def write_metadata(folder):
    rows = save_images(folder / "train")
    write_lines(folder / "train" / "metadata.jsonl", [{"file_name": name, "caption": text} for name, text in rows])


def write_coco(folder):
    rows = save_images(folder / "train2017")
    images = [{"id": number, "file_name": name} for number, (name, _) in enumerate(rows)]
    captions = [{"id": 7 - number, "image_id": number, "caption": text} for number, text in enumerate(CAPTIONS)]
    (folder / "annotations").mkdir()
    file = folder / "annotations" / "captions_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": captions}))
    return file


def write_texts(folder, encoding="utf-8", newline="\n"):
    for name, text in save_images(folder / "train"):
        (folder / "train" / name).with_suffix(".txt").write_text(text + "\n", encoding, newline=newline)


def write_archives(folder, suffix, encoding="utf-8"):
    files = {}
    for number, caption in enumerate(CAPTIONS):
        text = caption if suffix == "txt" else json.dumps({"caption": caption})
        files[f"{number:03d}.png"] = encoded_image(picture(40, 32, number))
        files[f"{number:03d}.{suffix}"] = text.encode(encoding)
    write_archive(folder / "train-0000.tar", files)


LAYOUTS = {
    "CSV": write_csv,
    "CSV with other names": lambda folder: write_csv(folder, head="image_path,text\n", images="."),
    "CSV without a header": lambda folder: write_csv(folder, head=""),
    "TSV": lambda folder: write_csv(folder, "train.tsv", "image\tcaption\n"),
    "TSV without a header": lambda folder: write_csv(folder, "train.tsv", ""),
    "metadata.csv": lambda folder: write_csv(folder, "train/metadata.csv", "file_name,text\n", "train"),
    "metadata.jsonl": write_metadata,
    "JSON with lists": write_lists,
    "COCO": write_coco,
    "text files": write_texts,
    "text files of Windows": lambda folder: write_texts(folder, "utf-8-sig", "\r\n"),
    "WebDataset with texts": lambda folder: write_archives(folder, "txt"),
    "WebDataset with texts of Windows": lambda folder: write_archives(folder, "txt", "utf-8-sig"),
    "WebDataset with JSON": lambda folder: write_archives(folder, "json"),
}


def train_rows(folder, streaming=False, **settings):
    arguments = ScriptArguments(dataset_name=str(folder), dataset_streaming=streaming)
    return list(open_splits(arguments, **settings)[0]["train"])


def texts_of(row):
    return ["".join(part["text"] or "" for part in message["content"]) for message in row["messages"]]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_of_folder_are_read(layout, tmp_path, streaming):
    LAYOUTS[layout](tmp_path / "data")
    rows = train_rows(tmp_path / "data", streaming)
    assert [row["error"] for row in rows] == [None] * 3
    assert [texts_of(row)[1] for row in rows] == CAPTIONS
    assert {texts_of(row)[0] for row in rows} <= {*CAPTION_QUESTIONS}
    for number, row in enumerate(rows):
        (image,) = row["images"]
        assert image["bytes"] or image["path"].endswith(f"/{number}.png")


def test_columns_and_prompt_are_given(tmp_path):
    folder = tmp_path / "data"
    rows = save_images(folder)
    (folder / "train.csv").write_text(
        "".join(f'{name},{number},"{text}"\n' for number, (name, text) in enumerate(rows))
    )
    with pytest.raises(ValueError, match=r"\['0', '1', '2'\]"):
        train_rows(folder)
    found = train_rows(folder, columns={"image": "0", "caption": "2"}, prompt="What is there?")
    assert [texts_of(row) for row in found] == [["What is there?", text] for text in CAPTIONS]
    assert train_rows(folder / "train.csv", columns={"image": "0", "caption": "2"})[1]["images"]


@pytest.mark.parametrize("name", "image_path filename Image".split())
def test_common_names_of_images_are_read(name, tmp_path):
    rows = save_images(tmp_path)
    write_lines(tmp_path / "train.jsonl", [{name: image, "messages": MESSAGES} for image, _ in rows])
    assert [row["images"][0]["path"] for row in train_rows(tmp_path)] == [str(tmp_path / name) for name, _ in rows]


def test_unread_column_of_images_is_named(tmp_path):
    rows = [{"photo": name, "messages": MESSAGES} for name, _ in save_images(tmp_path / "lines")]
    write_lines(tmp_path / "lines" / "train.jsonl", rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / "train.parquet")
    for folder in (tmp_path / "lines", tmp_path / "parquet"):
        for streaming in (False, True):
            assert "'photo'" in train_rows(folder, streaming)[0]["error"]


def test_training_without_images_is_refused(tmp_path, capsys):
    rows = make_rows(4).remove_columns("images")
    unnamed = make_rows(4).rename_column("images", "photo")
    options = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    for refused, named in ((rows, "allow_text_only"), (unnamed, "'photo'")):
        with pytest.raises(ValueError, match=named):
            make_trainer(tmp_path / "run", train_rows=refused, **options).train()
    make_trainer(tmp_path / "run", allow_text_only=True, train_rows=rows, **options).train()
    rows.to_parquet(tmp_path / "train.parquet")
    arguments = [str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / "out"), "--num_workers", "0"]
    assert validate_data.main(arguments) == 1
    assert "No row has an image" in capsys.readouterr().out


def test_caption_without_an_image_is_named(tmp_path):
    """A text of a plain language data set is not the answer to a question about an image."""
    write_lines(tmp_path / "train.jsonl", [{"id": "a", "text": "plain text"}])
    (row,) = train_rows(tmp_path)
    assert "a caption needs an image" in row["error"] and row["messages"] == []


@pytest.mark.parametrize(
    "damage", [lambda annotation: annotation.update(image_id=7), lambda annotation: annotation.pop("id")]
)
def test_damaged_coco_captions_are_named(damage, tmp_path):
    file = write_coco(tmp_path / "data")
    content = json.loads(file.read_text())
    damage(content["annotations"][1])
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=file.name):
        train_rows(tmp_path / "data")


def test_captions_of_boxes_are_not_those_of_images(tmp_path):
    file = write_coco(tmp_path / "data")
    content = json.loads(file.read_text())
    content["annotations"][1] |= {"bbox": [1, 1, 5, 5], "category_id": 1}
    file.write_text(json.dumps(content))
    assert [texts_of(row)[1] for row in train_rows(tmp_path / "data")] == [CAPTIONS[0], CAPTIONS[2]]
    content = {**content, "annotations": content["annotations"][1:2], "categories": [{"id": 1, "name": "ship"}]}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="--annotations"):
        open_data(PretrainArguments(dataset_name=str(tmp_path / "data")), None, seed=0)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_caption_in_another_encoding_is_named(tmp_path, encoding):
    write_texts(tmp_path)
    (tmp_path / "train/1.txt").write_bytes("forêt".encode(encoding))
    assert ["1.txt" in (row["error"] or "") for row in train_rows(tmp_path)] == [False, True, False]
