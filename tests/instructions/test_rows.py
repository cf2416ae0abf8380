"""Stored and prepared rows: ids, encoded images, image sizes, image places."""

import copy
import io
import socket

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, IterableDataset, List, Value, load_from_disk
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture
from PIL import Image
from sample_rows import ANSWER, BUDGET, USER, assert_same, encoded_image, make_rows, turn
from tiny_models import TOKENS_PER_TILE
from torch.utils.data import DataLoader

from modeling_vitp import ViTPImageProcessor, ViTPProcessor
from modeling_vitp.data.rows import content_of, image_size
from modeling_vitp.instructions.collator import ViTPDataCollator
from modeling_vitp.instructions.rows import content_id, load_images, prepare_rows
from modeling_vitp.instructions.schemas import messages_of, to_conversations


@pytest.fixture(scope="module")
def processor(tokenizer):
    image_processor = ViTPImageProcessor(size={"height": 56, "width": 56}, max_patches=BUDGET)
    return ViTPProcessor(image_processor, tokenizer, image_seq_length=TOKENS_PER_TILE)


MESSAGES = List({"role": Value("string"), "content": Value("string")})


def make_dataset(column="images", ids=None, feature=None, broken=False):
    """Return two rows with images (PNG of 30 x 20 pixels), and one without."""
    feature = feature or ImageFeature()
    rows = [[USER, {**ANSWER, "content": f"{row} trees"}] for row in range(3)]
    images = [{"bytes": encoded_image(picture(30, 20, seed)), "path": None} for seed in range(2)]
    if broken:
        images[1] = {"bytes": b"no image", "path": None}
    values = [[images[0]], images, []] if column == "images" else [*images, None]
    features = {"messages": MESSAGES, column: List(feature) if column == "images" else feature}
    columns = {"messages": rows, column: values}
    if ids is not None:
        columns, features = {"id": ids, **columns}, {"id": Value("string"), **features}
    return Dataset.from_dict(columns, features=Features(features))


@pytest.mark.parametrize(
    "image_of",
    [
        lambda seed: {"bytes": encoded_image(picture(30, 20, seed)), "path": None},
        lambda seed: {"bytes": None, "path": f"{seed}.png"},
        lambda seed: picture(30, 20, seed),
        lambda seed: np.full((2, 20, 30), seed, np.uint16),
    ],
    ids=["bytes", "path", "decoded", "array"],
)
def test_content_id_depends_on_images(image_of):
    ids = [content_id({"messages": [USER, ANSWER], "images": [image_of(seed)]}) for seed in (0, 1, 0)]
    assert ids[0] == ids[2] != ids[1] and content_id({"messages": [USER, ANSWER]}) not in ids


def test_streamed_rows_with_equal_texts_have_own_ids(tmp_path):
    """Rows that are converted and rows that are ready; ids do not depend on the folder of the images."""
    asked = Dataset.from_list([{"question": "Count.", "answer": "4", "image": f"{row}.png"} for row in range(8)])
    converted = [to_conversations(asked.to_iterable_dataset(), str(tmp_path / name)) for name in "ab"]
    ids = [[row["id"] for row in rows] for rows in converted]
    assert ids[0] == ids[1] and len(set(ids[0])) == 8
    same = [{"messages": [USER, ANSWER], "images": [picture(30, 20, seed)]} for seed in range(8)]
    ready = Dataset.from_list(same, features=Features({"messages": MESSAGES, "images": List(ImageFeature())}))
    ids = [[row["id"] for row in prepare_rows(ready.to_iterable_dataset())] for _ in range(2)]
    assert ids[0] == ids[1] and len(set(ids[0])) == 8


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ids", [None, ["x", "y", "z"]])
@pytest.mark.parametrize("column", ["images", "image"])
def test_prepared_rows_have_ids_and_encoded_images(processor, column, ids, streaming):
    dataset = make_dataset(column, ids)
    decoded = list(dataset)
    prepared = list(prepare_rows(dataset.to_iterable_dataset() if streaming else dataset))
    sample_ids = [row["id"] for row in prepared]
    assert sample_ids == (ids or [0, 1, 2]) if ids or not streaming else len(set(sample_ids)) == 3
    assert [row["messages"] for row in prepared] == [row["messages"] for row in decoded]
    encoded = [row[column] if column == "images" else [row[column]] for row in prepared]
    assert [len(images) for images in encoded] == ([1, 2, 0] if column == "images" else [1, 1, 1])
    for images in encoded:
        for image in images:
            assert image is None or set(image) == {"bytes", "path"}
    collator = ViTPDataCollator(processor)
    for row, plain, sample_id in zip(prepared, decoded, sample_ids):
        assert_same(collator([row]), collator([{**plain, "id": sample_id}]))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ids", [None, ["x", "y", "z"]])
def test_prepare_rows_keeps_original(ids, streaming):
    dataset = make_dataset(ids=ids)
    before = copy.deepcopy(dataset.features)
    original = dataset.to_iterable_dataset() if streaming else dataset
    prepare_rows(original)
    assert original.features == before and original.column_names == list(before)
    assert all(isinstance(image, Image.Image) for row in original for image in row["images"])


@pytest.mark.parametrize("converted", [False, True])
def test_selected_rows_are_numbered_without_a_copy(tmp_path, converted):
    dataset = make_dataset("image")
    if converted:
        dataset = dataset.remove_columns("messages").add_column("caption", ["a", "b", "c"])
    dataset.save_to_disk(tmp_path / "rows")
    dataset = load_from_disk(tmp_path / "rows")
    prepare = (lambda rows: prepare_rows(to_conversations(rows))) if converted else prepare_rows
    selected = [dataset.select(order) for order in ([2, 0], [0, 2], [2, 1])]
    files = set(tmp_path.rglob("*"))
    prepared = [prepare(rows) for rows in selected]
    assert [[int(row["id"]) for row in rows] for rows in prepared] == [[2, 0], [0, 2], [2, 1]]
    assert set(tmp_path.rglob("*")) == files and len({rows._fingerprint for rows in prepared}) == 3
    numbers = [rows.map(lambda row: {"n": int(row["id"])}).with_format(None)["n"][:] for rows in prepared]
    assert numbers == [[2, 0], [0, 2], [2, 1]]
    assert [int(row["id"]) for row in prepare(dataset.select([1, 1, 0]))] == [0, 1, 2]


@pytest.mark.parametrize("column", ["images", "image"])
def test_user_transform_reads_decoded_images(column):
    def sizes(batch):
        images = [rows if isinstance(rows, list) else [rows] for rows in batch[column]]
        return {"size": [[image and image.size for image in row] for row in images]}

    dataset = make_dataset(column)
    expected = dataset.with_transform(sizes)[:]
    assert prepare_rows(to_conversations(dataset.with_transform(sizes)))[:] == expected


@pytest.mark.parametrize("with_ids", [False, True])
def test_generated_rows_get_or_keep_ids(processor, with_ids):
    given = [row if with_ids else {**row, "id": None} for row in make_rows()[:2]]

    def generate():
        yield from ({name: value for name, value in row.items() if value is not None} for row in given)

    rows = list(prepare_rows(IterableDataset.from_generator(generate)))
    ids = [row["id"] for row in rows]
    assert ids == ["one", 2] if with_ids else len(set(ids)) == 2
    expected = [{**row, "id": sample_id} for row, sample_id in zip(given, ids)]
    assert_same(ViTPDataCollator(processor)(rows), ViTPDataCollator(processor)(expected))


@pytest.mark.parametrize("shuffle", [False, True])
def test_stream_ids_ignore_worker_and_order(shuffle):
    def ids(num_workers):
        stream = make_dataset().to_iterable_dataset(num_shards=3)
        stream = stream.shuffle(seed=num_workers, buffer_size=3) if shuffle else stream
        loader = DataLoader(prepare_rows(stream), batch_size=None, collate_fn=lambda row: row, num_workers=num_workers)
        return {row["messages"][1]["content"]: row["id"] for row in loader}

    expected = ids(0)
    assert len(set(expected.values())) == 3
    assert ids(2) == expected


def test_mode_of_image_column_is_kept(processor):
    dataset = make_dataset("image", feature=ImageFeature(mode="L"))
    assert dataset[0]["image"].mode == "L"
    collator = ViTPDataCollator(processor)
    assert_same(collator([prepare_rows(dataset)[0]]), collator([{**dataset[0], "id": 0}]))


def test_image_size_is_read_without_decoding(monkeypatch, tmp_path):
    encoded = {}
    for name in ("PNG", "JPEG"):
        file = io.BytesIO()
        picture(30, 20).save(file, name)
        encoded[name] = file.getvalue()
    turned = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture(30, 20).save(turned, "JPEG", exif=exif)
    (tmp_path / "a.png").write_bytes(encoded["PNG"])
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size({"bytes": encoded["PNG"], "path": None}) == (20, 30)
    assert image_size({"bytes": encoded["JPEG"], "path": "x.jpg"}) == (20, 30)
    assert image_size({"bytes": turned.getvalue(), "path": None}) == (30, 20)
    assert image_size(str(tmp_path / "a.png")) == (20, 30)
    assert image_size(np.zeros((4, 20, 30))) == (20, 30)


@settings(max_examples=50, deadline=None)
@given(
    pieces=st.lists(
        st.text("ab<>\n []", max_size=6).filter(lambda piece: "<image>" not in piece), min_size=1, max_size=4
    )
)
def test_image_placeholders_are_found_anywhere(pieces):
    messages = messages_of([turn("human", "<image>".join(pieces)), turn("gpt", "x")], len(pieces) - 1)
    rebuilt = "".join("<image>" if part["type"] == "image" else part["text"] for part in messages[0]["content"])
    assert rebuilt == "<image>".join([pieces[0], *(piece.removeprefix("\n") for piece in pieces[1:])])


@pytest.mark.parametrize("scheme", ["webhdfs", "ftp", "http"])
def test_chained_url_asks_no_server(scheme, monkeypatch):
    monkeypatch.delenv("VITP_FETCH_IMAGES", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        path = f"{scheme}://127.0.0.1:{server.getsockname()[1]}/a.png::hf://x"
        with pytest.raises(ValueError, match="image 0 .* cannot be read: "):
            load_images({"images": [{"path": path, "bytes": None}]})
        with pytest.raises(BlockingIOError):
            server.accept()


def test_file_in_archive_of_hub_is_opened(monkeypatch):
    monkeypatch.setattr("modeling_vitp.data.rows.xopen", lambda path, mode: io.BytesIO(path.encode()))
    for path in ("hf://datasets/a/b@main/c.png", "zip://d/e.png::hf://datasets/a/b/c.zip"):
        assert content_of({"path": path, "bytes": None}) == path.encode()
