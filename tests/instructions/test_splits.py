"""What `dataset_name` names: files and folders of JSON beside images, tables, archives, and parts of their splits."""

import csv
import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset
from pictures import picture
from row_formats import FORMATS, answer, question, save_images, turns, write_archive
from sample_rows import encoded_image
from trl import ScriptArguments

from modeling_vitp.instructions.mixture import load_sources
from modeling_vitp.instructions.rows import images_of, load_images
from modeling_vitp.instructions.schemas import schema_name
from modeling_vitp.instructions.sources import (
    Source,
    annotation_files,
    is_in_lines,
    open_splits,
    read_source,
    split_in_path,
    warn_unread,
)

PICTURES = [picture(30, 20, seed) for seed in range(4)]


def train_rows(place, root=None, **options):
    args = ScriptArguments(dataset_name=str(place), **options)
    return open_splits(args, root)[0][args.dataset_train_split]


def spoken(rows):
    """Questions and answers, and the number of images, whatever form a conversation has."""
    texts = []
    for row in rows:
        assert not row.get("error"), row["error"]
        contents = [message["content"] for message in row["messages"]]
        parts = [one if isinstance(one, str) else "".join(part["text"] or "" for part in one) for one in contents]
        texts.append((*parts, len(images_of(row))))
    return texts


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_rows_by_its_name_and_as_a_source(tmp_path, name, streaming):
    write, told = FORMATS[name]
    write(tmp_path / "data", PICTURES)
    rows = train_rows(tmp_path / "data", dataset_streaming=streaming)
    expected = [(question(number), answer(number), 1) for number in range(4)]
    assert spoken(rows) == expected and schema_name(rows) == told
    assert spoken(read_source(Source("s", folder=str(tmp_path / "data"), streaming=streaming, rows=4))) == expected


@pytest.mark.parametrize(("part", "numbers"), [("train[:2]", [0, 1]), ("train[1:3]", [1, 2]), ("train[3:]", [3])])
@pytest.mark.parametrize("name", ["LLaVA", "questions and answers", "messages"])
def test_a_part_of_a_split(tmp_path, name, part, numbers):
    FORMATS[name][0](tmp_path / "data", PICTURES)
    for streaming in (False, True):
        rows = train_rows(tmp_path / "data", dataset_train_split=part, dataset_streaming=streaming)
        assert spoken(rows) == [(question(number), answer(number), 1) for number in numbers]
    if name == "LLaVA":
        rows = train_rows(tmp_path / "data", dataset_train_split="train[50%:]")
        assert [row["id"] for row in rows] == ["2", "3"]
        rows = train_rows(tmp_path / "data", dataset_train_split="train[3:]+train[:1]")
        assert [row["id"] for row in rows] == ["3", "0"]
        assert len(train_rows(tmp_path / "data", dataset_train_split="train[2:100]")) == 2
        with pytest.raises(ValueError, match=r"train\[4:\] has no row, since train has 4"):
            train_rows(tmp_path / "data", dataset_train_split="train[4:]")
        with pytest.raises(ValueError, match="of a stream, whose length is not known"):
            train_rows(tmp_path / "data", dataset_train_split="train[:1]+train[3:]", dataset_streaming=True)
        with pytest.raises(ValueError, match="of a stream, whose length is not known"):
            train_rows(tmp_path / "data", dataset_train_split="train[50%:]", dataset_streaming=True)


def test_a_file_of_json_with_its_images_beside_it_or_where_the_user_says(tmp_path):
    FORMATS["LLaVA"][0](tmp_path / "data", PICTURES)
    file = tmp_path / "data" / "llava_instruct.json"
    assert len(spoken(train_rows(file))) == 4
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text("\n".join(map(json.dumps, json.loads(file.read_text()))))
    rows = train_rows(moved, root=str(tmp_path / "data" / "images"))
    assert rows[3]["images"][0]["path"] == str(tmp_path / "data" / "images" / "003.png")
    assert schema_name(rows) == "LLaVA conversations"


def test_splits_are_told_by_the_words_of_a_path(tmp_path):
    names = save_images(tmp_path / "images" / "train", PICTURES)
    for file, number in (("llava_train.json", 3), ("llava_val.json", 1)):
        rows = [{"image": f"train/{name}", "conversations": turns(0)} for name in names[:number]]
        (tmp_path / file).write_text(json.dumps(rows))
    assert {split: len(files) for split, files in annotation_files(tmp_path).items()} == {"train": 1, "validation": 1}
    opened, splits = open_splits(ScriptArguments(dataset_name=str(tmp_path), dataset_test_split="validation"))
    assert splits == ["train", "validation"]
    assert [len(opened[name]) for name in splits] == [3, 1] and len(spoken(opened["train"])) == 3
    with pytest.raises(ValueError, match=r"has no split 'all', only \['train', 'validation'\]"):
        train_rows(tmp_path, dataset_train_split="all")
    paths = "Training/a.json", "dev.json", "a/test/b.json", "restraint.json"
    assert [split_in_path(Path(path)) for path in paths] == ["train", "validation", "test", "train"]


def test_a_json_that_is_not_read_is_named(tmp_path, caplog):
    warn_unread.cache_clear()
    FORMATS["messages"][0](tmp_path, PICTURES)
    (tmp_path / "more.jsonl").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert annotation_files(tmp_path) == {}
    assert "more.jsonl is not read: the rows of the folder are in train.parquet." in caplog.text
    for name, content in {"classes.json": {"a": 1}, "lines.json": {"question": "q", "answer": "a"}}.items():
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in annotation_files(tmp_path / "images")["train"]] == ["lines.json"]
    assert "classes.json is not read: no list of conversations." in caplog.text
    (tmp_path / "images" / "lines.json").rename(tmp_path / "images" / "a.csv")
    (tmp_path / "images" / "a.csv").write_text("question,anwser\nq,a\n")
    with caplog.at_level(logging.WARNING):
        assert annotation_files(tmp_path / "images", {"completion": "answers"}) == {}
    assert "a.csv and 1 more are not read: no list of conversations." in caplog.text


def test_a_line_that_is_damaged_is_an_error_of_its_row_in_a_json_with_a_row_a_line_too(tmp_path):
    file = tmp_path / "rows.json"
    rows = [json.dumps({"question": question(number), "answer": answer(number)}) for number in range(3)]
    file.write_text("\n".join([rows[0], rows[1][:-9], rows[2]]))
    errors = [row["error"] for row in read_source(Source("s", annotation=str(file)))]
    assert errors[0] is errors[2] is None and "line 2 of" in errors[1]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_with_a_row_a_line_is_told_by_two_of_them_whatever_their_columns(tmp_path, indent):
    file = tmp_path / "rows.json"
    rows = [{"q": question(number), "a": answer(number)} for number in range(2)]
    file.write_text("\n".join(json.dumps(row, indent=indent) for row in rows))
    assert is_in_lines(file) is (indent is None)
    if indent is None:
        source = Source("s", folder=str(tmp_path), columns={"question": "q", "answer": "a"})
        assert spoken(read_source(source)) == [(row["q"], row["a"], 0) for row in rows]


@pytest.mark.parametrize("place", ["", "a.json"])
def test_images_are_found_by_the_first_row_that_has_one(tmp_path, place):
    (name,) = save_images(tmp_path / "images", PICTURES[:1])
    rows = [{"question": question(0), "answer": answer(0)}] * 30
    (tmp_path / "a.json").write_text(json.dumps([*rows, {**rows[0], "image": name}]))
    assert list(train_rows(tmp_path / place))[30]["images"][0]["path"] == str(tmp_path / "images" / name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("file", ["train.csv", "rows.json", "rows.jsonl"])
def test_images_are_found_by_the_column_that_has_them(tmp_path, file, streaming):
    """`image` is no path here."""
    (name,) = save_images(tmp_path / "images", PICTURES[:1])
    rows = [{"question": question(0), "answer": answer(0), "image": "/3", "img": name}] * 2
    if file == "train.csv":
        (tmp_path / file).write_text("".join(",".join(row) + "\n" for row in (rows[0], *map(dict.values, rows))))
    else:
        (tmp_path / file).write_text("\n".join(map(json.dumps, rows)) if file == "rows.jsonl" else json.dumps(rows))
    source = Source("s", folder=str(tmp_path), columns={"images": "img"}, streaming=streaming, rows=2)
    rows = list(read_source(source))
    assert [row["images"][0]["path"] for row in rows] == [str(tmp_path / "images" / name)] * 2
    assert spoken(rows) == [(question(0), answer(0), 1)] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_image_and_images_in_one_folder_of_json(tmp_path, streaming):
    FORMATS["LLaVA"][0](tmp_path, PICTURES)
    FORMATS["ShareGPT"][0](tmp_path, PICTURES)
    assert [row[2] for row in spoken(train_rows(tmp_path, dataset_streaming=streaming))] == [1] * 8


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_json_that_cannot_be_used_are_rows_with_errors(tmp_path, streaming):
    names = save_images(tmp_path, PICTURES)
    rows = [{"image": name, "conversations": turns(0)} for name in [*names, "../outside.png", 3]]
    (tmp_path / "a.json").write_text(json.dumps([*rows, "no row", {"image": names[0]}]))
    found = list(train_rows(tmp_path, dataset_streaming=streaming))
    assert [row["error"] is None for row in found] == [True] * 4 + [False] * 4
    assert "is not below" in found[4]["error"] and "and no row" in found[6]["error"]


def test_many_json_that_are_not_read_are_one_line_and_checkpoints_are_passed_over(tmp_path, caplog):
    FORMATS["messages"][0](tmp_path, PICTURES)
    for name in ("b.json", "a.json", "run/checkpoint-3/0.json", "run/c.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert annotation_files(tmp_path) == {}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/a.json and 2 more are not read: the rows of the folder are in train.parquet."
    ]


def test_a_list_that_is_cut_off_is_told_with_its_file(tmp_path):
    (tmp_path / "llava.json").write_text(json.dumps([{"conversations": turns(0)}] * 3)[:-30])
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: {tmp_path}/llava.json is no JSON: .*Mend the"):
        train_rows(tmp_path)


def test_an_image_that_is_missing_is_told_with_where_it_was_looked_for(tmp_path, monkeypatch):
    (tmp_path / "llava.json").write_text(json.dumps([{"image": "0.png", "conversations": turns(0)}]))
    monkeypatch.chdir(tmp_path)
    (row,) = train_rows(tmp_path / "llava.json")
    with pytest.raises(ValueError, match=f"No such file as {tmp_path}/0.png; `image_root` gives .*. Mend"):
        load_images(row)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_is_read_as_json_beside_images_is(tmp_path, streaming):
    names = save_images(tmp_path / "images", PICTURES)
    rows = [("image", "question", "answer"), *((name, question(i), answer(i)) for i, name in enumerate(names))]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        file = tmp_path / f"train{suffix}"
        with open(file, "w", newline="") as opened:
            csv.writer(opened, delimiter=delimiter).writerows(rows)
        for place in (tmp_path, file):
            found = train_rows(place, dataset_streaming=streaming)
            assert spoken(found) == [(question(number), answer(number), 1) for number in range(4)]
            assert next(iter(found))["images"][0]["path"] == str(tmp_path / "images" / names[0])
        (one,) = load_sources(str(file)).sources
        assert len(spoken(read_source(one))) == 4
        file.unlink()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("q,a,image", {"columns": {"question": "q", "answer": "a"}}),
        ("label,a,image", {"columns": {"answer": "a"}, "prompt": question(0)}),
        ("label,answer,image", {"prompt": question(0)}),
        ("question,answer,image,messages", {"columns": {"question": "question", "answer": "answer"}}),
    ],
)
def test_a_csv_with_other_columns_is_read_by_what_the_source_says(tmp_path, header, options, streaming):
    (name,) = save_images(tmp_path / "images", PICTURES[:1])
    (tmp_path / "train.csv").write_text(f"{header}\n{question(0)},{answer(0)},{name}{',' * (header.count(',') - 2)}\n")
    (tmp_path / "classes.csv").write_text("id,name\n0,tree\n")
    rows = read_source(Source("s", folder=str(tmp_path), streaming=streaming, rows=1, **options))
    assert spoken(rows) == [(question(0), answer(0), 1)]


def test_a_file_of_parquet_is_a_data_set(tmp_path):
    FORMATS["messages"][0](tmp_path, PICTURES)
    (file,) = tmp_path.glob("*.parquet")
    assert len(spoken(train_rows(file))) == 4
    (one,) = load_sources(str(file)).sources
    assert len(spoken(read_source(one))) == 4
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="notes.txt is no .parquet, "):
        train_rows(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.tsv"])
def test_json_and_csv_as_the_data_set_of_a_source_are_an_error_that_says_where_they_go(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"question": question(0), "answer": answer(0)}) + "\n")
    said = f"{name} is no .parquet, .tar, .arrow: give it as `annotation`, with `image_root`.$"
    with pytest.raises(ValueError, match=said):
        read_source(Source("s", dataset=str(tmp_path / name)))


def test_columns_that_make_no_conversation_are_told_with_the_split(tmp_path):
    for columns in ({"text": ["a"]}, {"messages": [[]], "question": ["q"], "answer": ["a"]}):
        Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(ValueError, match=f"{tmp_path}, split 'train': the columns .* Rename or leave out"):
            train_rows(tmp_path)
    (tmp_path / "train.parquet").unlink()
    save_images(tmp_path, PICTURES)
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a"}]))
    with pytest.raises(ValueError, match=f"^{tmp_path}, split 'train': the columns .* Rename or leave out"):
        train_rows(tmp_path)


def test_what_is_validated_is_a_mixture_or_what_a_recipe_names(tmp_path):
    FORMATS["LLaVA"][0](tmp_path / "data", PICTURES)
    FORMATS["messages"][0](tmp_path / "tables", PICTURES)
    recipe, mixture = tmp_path / "recipe.yaml", tmp_path / "mixture.yaml"
    recipe.write_text(f"dataset_name: {tmp_path / 'data'}\nmax_steps: 3\n")
    mixture.write_text(f"mixture: {{sources: [{{name: s, folder: {tmp_path / 'data'}}}]}}\n")
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"m": {"root": str(tmp_path), "annotation": str(tmp_path / "none.jsonl")}}))
    file = tmp_path / "data" / "llava_instruct.json"
    for name in (tmp_path / "data", tmp_path / "tables", recipe, mixture, file):
        (source,) = load_sources(str(name)).sources
        assert len(read_source(source)) == 4
    assert load_sources(str(meta)).sources[0].name == "m"
    assert load_sources("my-org/my-data").sources == (Source("my-data", dataset="my-org/my-data"),)
    for name in ("mixtures.yaml", "none/mixture.yaml"):
        with pytest.raises(ValueError, match=f"no mixture file {name}"):
            load_sources(name)
    for name in (f"{tmp_path}/dat", f"{tmp_path}/data,tables"):
        with pytest.raises(ValueError, match=f"{name}': there is no such file or folder, did you mean '{tmp_path}/"):
            load_sources(name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["prompts and completions", "WebDataset"])
def test_a_data_set_on_the_hub_is_read_as_a_folder_is(tmp_path, hub, name, streaming):
    FORMATS[name][0](tmp_path / "data", PICTURES)
    hub.create("org/data", {path.name: path for path in (tmp_path / "data").iterdir()}, "dataset")
    rows = train_rows("org/data", dataset_streaming=streaming)
    assert spoken(rows) == [(question(number), answer(number), 1) for number in range(4)]
    assert schema_name(rows) == FORMATS[name][1]


SAID = {"question": question(0), "answer": answer(0)}


def late(*samples):
    """The files of seven samples with an image, as many as `datasets` looks at and more, and of those of `samples`."""
    files = {}
    for number, sample in enumerate([{"png": encoded_image(PICTURES[0])}] * 7 + list(samples)):
        sample = {"json": json.dumps(SAID).encode(), **sample}
        files |= {f"{number:03d}.{name}": content for name, content in sample.items()}
    return files


@pytest.mark.parametrize("streaming", [False, True])
def test_a_sample_of_a_web_dataset_has_what_those_before_it_lack(tmp_path, streaming):
    image = encoded_image(PICTURES[1])
    told = json.dumps({**SAID, "system": "Count."}).encode()
    files = late(
        {"jpg": image}, {"0.png": image, "1.png": image}, {}, {"json": told}, {"mp4": b"video"}, {"json": b"{"}
    )
    write_archive(tmp_path / "train.tar", files)
    source = Source("s", folder=str(tmp_path), streaming=streaming, rows=13)
    for rows in (train_rows(tmp_path, dataset_streaming=streaming), read_source(source)):
        rows = list(rows)
        assert [len(row["images"]) for row in rows] == [1] * 8 + [2] + [0] * 4
        assert rows[7]["images"][0] == {"path": "007.jpg", "bytes": image}
        assert [message["role"] for message in rows[10]["messages"]] == ["system", "user", "assistant"]
        assert [number for number, row in enumerate(rows) if row["error"]] == [11, 12]
        assert "it is a video" in rows[11]["error"]
        assert rows[12]["error"].startswith(f"sample 012 of {tmp_path / 'train.tar'}: 012.json is no JSON")


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_of_a_web_dataset_may_differ_from_the_first_on(tmp_path, streaming):
    write_archive(tmp_path / "train.tar", dict(reversed(late({"jpg": encoded_image(PICTURES[1])}, {}).items())))
    assert [row[2] for row in spoken(train_rows(tmp_path, dataset_streaming=streaming))] == [0] + [1] * 8
