"""Miniatures of public data sets are converted to valid rows for the paper's mixtures."""

import hashlib
import json

import pytest
import yaml
from paths import CONFIGS
from pictures import picture
from public_set_data import MINIATURES, dior_rsvg, gaia, levir_cc, rsvqa, save_json, save_text, vrsbench
from row_formats import write_archive

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.instructions.dry_run import make_command
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.instructions.sources import read_source
from modeling_vitp.instructions.validation import validate
from modeling_vitp.recipes.datasets import make_public_set
from modeling_vitp.recipes.datasets.public_set import HeldOut, PublicSet, load_public_set, load_public_sets, make_rows

LEFT_OUT = {"test.txt", "test.jsonl", "valid.jsonl", "test.csv"}  # files that list held-out images
LEFT_OUT |= {f"{part}_test.jsonl" for part in ("rsvg", "dior_rsvg", "vrsbench", "geochat")}
DIGESTS = {  # hashes of the rows of each miniature
    "dior_rsvg": "4e51c3f767a0c4e0",
    "fit_rs": "eaf4f6d24edda465",
    "gaia": "c081dcf168fc5e99",
    "geochat": "4d7ce74ed9ee1d2f",
    "gmai_mmbench": "b451e2866037981e",
    "huatuo_oa": "2f2220e51cdb9944",
    "huatuo_vqa": "3dfa808ca75b8284",
    "isprs_sar": "72d251d02ef67a0c",
    "levir_cc": "20e7350283f8ba85",
    "million_aid": "cd92dcad0bbd9d25",
    "mini_internvl_general": "fec629893db697d4",
    "omnimedvqa": "aa4a682c2fdf8432",
    "open_i": "b97849aff15785cf",
    "pmc_oa": "1cb60e1dd88e871b",
    "pmc_vqa": "f38e99cedf0c27b1",
    "quilt_1m": "9f6e0699e9239baa",
    "quilt_instruct": "ebf7e811c249c6e8",
    "refgeo": "d46ccdd13cc24160",
    "rsvg": "e3bb88ea0583b0f3",
    "rsvqa": "012556300159dc3f",
    "rsvqa_lr": "35ae2bd099a95c8b",
    "sar_sentinel_1_2": "68ef02e9740bbc2d",
    "vhm": "7c956683c8187320",
    "vrsbench": "0370cc0802c06ffd",
}


def make(name, folder, output, **options):
    made = make_rows(load_public_set(name)(folder), output, **options)
    return made, [json.loads(line) for line in made.annotation.read_text().splitlines()]


@pytest.mark.parametrize("name", load_public_sets())
def test_miniature_becomes_valid_rows_without_test_split(name, tmp_path):
    folder = tmp_path / "data" / name
    expected = MINIATURES[name](folder)
    made, rows = make(name, folder, tmp_path / "a")
    assert (made.rows, made.unused) == (expected, []) and len(rows) == expected
    assert made.images == len({image for row in rows for image in row["images"]})
    assert hashlib.sha256(made.annotation.read_bytes()).hexdigest()[:16] == DIGESTS[name]
    kind = load_public_set(name)
    assert kind.title and kind.license and kind.obtain.startswith("https://") and kind.layout and kind.tasks
    for path in folder.rglob("*"):
        if path.is_file() and kind(folder).is_held_out(path) and path.name not in LEFT_OUT:
            path.write_bytes(b"nothing that is read")
    again, _ = make(name, folder, tmp_path / "b")
    assert made.annotation.read_bytes() == again.annotation.read_bytes()
    source = {"name": name, "annotation": str(made.annotation), "image_root": str(made.image_root)}
    report = validate(load_mixture({"sources": [{**source, "tasks": list(kind.tasks)}]}), 0)[0]
    assert report.passed and report.rows == expected and not any(report.counts.values()), report.examples


def test_held_out_files_are_not_read(tmp_path):
    dior_rsvg(tmp_path / "data")
    save_text(tmp_path / "data/Annotations/test/00009.xml", "no XML")
    public_set = load_public_set("dior_rsvg")(tmp_path / "data")
    for name in ("test.txt", "val.txt", "RSVQA_LR_test.json", "a/evaluation/list.txt"):
        with pytest.raises(HeldOut, match="is not read"):
            public_set.lines(name)
    assert len(public_set.files("Annotations/**/*.xml")) == 4


def test_rows_on_test_images_are_excluded(tmp_path):
    dior_rsvg(tmp_path / "data")
    made, rows = make("dior_rsvg", tmp_path / "data", tmp_path)
    assert made.held_out == 1 and [row["id"] for row in rows] == ["0", "1", "6"]
    question, answer = (message["content"] for message in rows[0]["messages"])
    assert answer == "<ref>The ship 0 at the pier</ref><box>[[62, 125, 312, 375]]</box>"  # 2, 3, 10, 9 of 32 x 24
    assert "<ref>The ship 0 at the pier</ref>" in question
    made, rows = make("dior_rsvg", tmp_path / "data", tmp_path, keep_shared=True)
    assert made.held_out == 0 and [row["id"] for row in rows] == ["0", "1", "3", "6"]


WITH_LISTS = [
    name for name, kind in load_public_sets().items() if kind.held_out_images is not PublicSet.held_out_images
]


@pytest.mark.parametrize("name", WITH_LISTS)
def test_unreadable_held_out_list_raises(name, tmp_path):
    MINIATURES[name](tmp_path / "data")
    lists = [path for path in (tmp_path / "data").rglob("*") if path.name in LEFT_OUT]
    assert lists
    for path in lists:
        content = path.read_bytes()
        path.write_text("nothing,that is\nread")
        with pytest.raises(ValueError, match=path.name):
            make(name, tmp_path / "data", tmp_path / "out")
        path.write_text('{"a": 1}\n' if path.suffix == ".jsonl" else "a\n1\n")
        with pytest.raises(ValueError, match=f"{path.name}|unexpected form: KeyError"):
            make(name, tmp_path / "data", tmp_path / "out")
        path.write_bytes(content)


def test_object_without_expression_is_not_used(tmp_path):
    dior_rsvg(tmp_path / "data")
    path = tmp_path / "data/Annotations/00001.xml"
    path.write_text(path.read_text().replace("The ship 0 at the pier", " "))
    _, rows = make("dior_rsvg", tmp_path / "data", tmp_path)
    assert len(rows) == 2 and "<ref></ref>" not in str(rows)


def test_broken_image_is_reported_and_skipped(tmp_path, capsys):
    folder = tmp_path / "data" / "dior_rsvg"
    dior_rsvg(folder)
    (folder / "JPEGImages/00001.jpg").write_bytes(b"no picture")
    assert make_public_set.main(["dior_rsvg", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.err.count("not used: ") == 2 and "00001.jpg" in said.err
    assert "dior_rsvg.jsonl: 1 rows, 1 images\n" in said.out and "27,000" not in said.out
    assert (tmp_path / "data/dior_rsvg.unused.txt").read_text().count("00001.jpg") == 2
    picture(32, 24).save(folder / "JPEGImages/00001.jpg")
    assert make_public_set.main(["dior_rsvg", str(folder)]) == 0
    assert not (tmp_path / "data/dior_rsvg.unused.txt").exists()


def test_broken_file_is_reported_and_skipped(tmp_path):
    gaia(tmp_path / "gaia")
    content = (tmp_path / "gaia/val/00000.tar").read_bytes()
    (tmp_path / "gaia/train/00001.tar").write_bytes(content[: len(content) // 2])
    write_archive(
        tmp_path / "gaia/train/00002.tar", {"1.png": b"no image", "1.json": b'{"id": 1, "captions": ["Sea."]}'}
    )
    write_archive(tmp_path / "gaia/train/00003.tar", {"2.png": b"no image", "2.json": b"{"})
    made, rows = make("gaia", tmp_path / "gaia", tmp_path / "out")
    assert made.rows >= 4 and {row["id"] for row in rows} >= {"train-0", "train-1", "val-0", "val-1"}
    assert [any(name in line for line in made.unused) for name in ("00001.tar", "00002.tar", "00003.tar")] == [True] * 3
    assert sorted(made.image_root.rglob("*.png")) == sorted(made.image_root / row["images"][0] for row in rows)

    vrsbench(tmp_path / "vrsbench")
    save_text(tmp_path / "vrsbench/VRSBench_train.json", "[{")
    with pytest.raises(ValueError, match="no row of VRSBench .* can be used; .*VRSBench_train.json"):
        make("vrsbench", tmp_path / "vrsbench", tmp_path)
    assert not list(tmp_path.glob("vrsbench*.*"))


def test_draw_depends_on_content_alone(tmp_path, monkeypatch):
    rsvqa(tmp_path)
    questions = [
        {"id": n, "active": True, "img_id": n % 3, "question": f"Q{n}?", "answers_ids": [n]} for n in range(30)
    ]
    answers = [{"id": n, "active": True, "answer": n} for n in range(30)]
    monkeypatch.setattr(load_public_set("rsvqa"), "paper_rows", 7)
    drawn = []
    for order in (1, -1):
        save_json(tmp_path / "USGS_split_train_questions.json", {"questions": questions[::order]})
        save_json(tmp_path / "USGS_split_train_answers.json", {"answers": answers})
        drawn.append([row["id"] for row in make("rsvqa", tmp_path, tmp_path / "out")[1]])
    assert len(drawn[0]) == 7 and drawn[0] == drawn[1][::-1] and drawn[0] == sorted(drawn[0], key=int)


def test_change_pairs_have_image_placeholders(tmp_path):
    levir_cc(tmp_path)
    made, rows = make("levir_cc", tmp_path, tmp_path / "out")
    assert made.held_out == 2 and {row["id"].partition("_")[0] for row in rows} == {"train"}
    for row in rows:
        assert [image.split("/")[2] for image in row["images"]] == ["A", "B"]
        assert row["messages"][0]["content"].count("<image>") == 2


MY_SET = """
from modeling_vitp.recipes.datasets.public_set import PublicSet, register_public_set

@register_public_set("my_set")
class MySet(PublicSet):
    title, license, obtain, seen = "Mine", "mit", "https://example.org", "the files"
    layout = "a.json"
    annotations = ("*.json",)
    modality, tasks = ("optical",), ("vqa",)
"""


def test_custom_set_is_loaded_from_file(tmp_path, capsys):
    save_text(tmp_path / "my_set.py", MY_SET)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    rows = [{"id": 1, "image": "a.png", "conversations": turns}, {"conversations": turns[:1]}, {"image": "b.png"}, [1]]
    rows.append({"id": 5, "image": "/elsewhere/a.png", "conversations": turns})
    save_json(tmp_path / "data/a.json", rows)
    save_json(tmp_path / "data/val.json", rows)
    picture(8, 8).save(tmp_path / "data/a.png")
    assert make_public_set.main([str(tmp_path / "my_set.py"), str(tmp_path / "data")]) == 0
    said = capsys.readouterr()
    assert "my_set.jsonl: 1 rows" in said.out and "4 not used" in said.err
    (source,) = load_mixture(tmp_path / "my_set.yaml").sources
    assert (source.name, source.rows, source.missing()) == ("my_set", 1, None)


def test_wrong_arguments_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_text(tmp_path / "empty.py", "")
    for name in ("dior", "../rows", "empty.py"):
        with pytest.raises(WrongArguments, match=name):
            load_public_set(name)
    with pytest.raises(WrongArguments, match="nowhere"):
        make_public_set.main(["rsvg", str(tmp_path / "nowhere")])
    (tmp_path / "rsvg").mkdir()
    with pytest.raises(ValueError, match="metainfo/rsvg_train.jsonl not found"):
        make("rsvg", tmp_path / "rsvg", tmp_path)
    save_json(tmp_path / "LevirCCcaptions.json", [1])
    with pytest.raises(ValueError, match="LEVIR-CC"):
        make("levir_cc", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["remote_sensing_paper", "medical_paper"])
def test_commands_of_dry_run_build_the_mixtures(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["mixture"]
    sources = load_mixture(settings).sources
    assert all(source.missing() for source in sources)
    for source in sources:
        kind = load_public_set(source.name)
        assert (source.obtain, source.rows, source.tasks) == (kind.obtain, kind.paper_rows, kind.tasks), source.name
        assert source.general == kind.general and (source.general or source.modality == kind.modality)
        MINIATURES[source.name](tmp_path / source.image_root)
    for source in sources:
        command = make_command(source).split()
        assert make_public_set.main(command[2:]) == 0
    for source in load_mixture(settings).sources:
        assert source.missing() is None
        assert not [row["error"] for row in read_source(source) if row["error"]]
