"""Mixtures as they are written down, and what is wrong with them."""

import json
import logging

import pytest
from paths import CONFIGS
from sample_rows import write_annotations

from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.instructions.sources import read_source


@pytest.fixture
def folder(tmp_path):
    return write_annotations(tmp_path)


@pytest.fixture
def meta(folder):
    entries = {
        "first": {"root": "images", "annotation": "a.jsonl", "repeat_time": 0.25, "length": 10, "data_augment": True},
        "second": {
            "root": "images",
            "annotation": "a.jsonl",
            "repeat_time": 3,
            "length": 10,
            "data_augment": False,
            "max_dynamic_patch": 6,
            "force_image_size": 224,
        },
    }
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder


def test_a_released_meta_json_is_a_mixture(meta, monkeypatch, caplog):
    monkeypatch.chdir(meta)
    with caplog.at_level(logging.WARNING):
        first, second = load_mixture("meta.json").sources
    assert (first.name, first.rate, first.rows, first.max_patches) == ("first", 0.25, 10, None)
    assert (second.rate, second.max_patches, second.image_size) == (3, 6, 224)
    assert not first.jpeg_degradation and not first.first_rows
    assert len(read_source(second)) == 10
    warnings = [record.getMessage() for record in caplog.records]
    assert [message.split(" in ")[-1].split(".")[0] for message in warnings] == ["first", "second", "first"]
    for message, words in zip(
        warnings, ("a rate below 1 takes random rows, there", "image_size is applied", "data_augment")
    ):
        assert "The released code differs" in message and words.split(",")[0] in message

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        first, second = load_mixture({"released_compatible": True, "sources": [{"meta": "meta.json"}]}).sources
    assert first.first_rows and first.jpeg_degradation and not second.jpeg_degradation
    assert second.image_size is None
    assert len(caplog.records) == 3
    assert all("released_compatible: " in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "s", "anotation": "a.jsonl"}, "source 's': unknown key 'anotation'"),
        ({"annotation": "a.jsonl"}, "source 0: a source needs a name"),
        ({"name": "s"}, "exactly one of dataset .* it has none"),
        ({"name": "s", "annotation": "a.jsonl", "folder": "b"}, r"exactly one of .* \['folder', 'annotation'\]"),
        ({"name": "s", "annotation": "a.jsonl", "rate": 0}, "rate is 0; it must be above 0"),
        ({"name": "s", "annotation": "a.jsonl", "rate": "2x"}, "rate is '2x', but needs a value of type int or float"),
        ({"name": "s", "annotation": "a.jsonl", "max_patches": True}, "max_patches is True, but needs .* int"),
        ({"name": "s", "annotation": "a.jsonl", "columns": {"images": "x"}}, "columns has no meaning .* annotation"),
        ({"name": "s", "folder": "b", "columns": {"picture": "x"}}, r"not for \['picture'\]"),
        ({"name": "s", "folder": "b", "revision": "main"}, "revision has no meaning for a source with folder"),
        ({"name": "s", "folder": "b", "streaming": True}, "a streaming source needs `rows`"),
        ({"name": "s", "folder": "b", "input_spec": {"band": 1}}, r"input_spec: unknown field\(s\) \['band'\]"),
        ({"name": "s", "annotation": "a.parquet"}, "source 's': the annotation a.parquet is no JSON: .* as `dataset`"),
        ({"meta": "meta.json"}, "meta JSON meta.json cannot be read"),
        ("s", "source 0 is 's', not a mapping"),
    ],
)
def test_mistakes_in_a_mixture_are_named(entry, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_mixture({"sources": [entry]})


def test_mistakes_in_a_mixture_file_are_named(tmp_path):
    entry = "{name: s, folder: b}"
    path = tmp_path / "mixture.yaml"
    for content, message in {
        f"sources: [{entry}, {entry}]": r"the source names \['s'\] are used more than once",
        f"sources: [{entry}]\nresample: never": "resample is 'never'",
        f"sources: [{entry}]\nsource: 1": "mixture.yaml: unknown key 'source'",
        "sources: []": "mixture.yaml: a mixture has a list of `sources`",
        "sources: [": "mixture.yaml is no YAML",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_mixture(path)
    with pytest.raises(ValueError, match="There is no mixture file"):
        load_mixture(tmp_path / "none.yaml")
    path.write_text(f"output_dir: x\nmixture:\n  defaults: {{rate: 2}}\n  sources: [{entry}]")
    assert load_mixture(path).sources[0].rate == 2


def test_the_mixture_of_the_page_is_one(meta, monkeypatch):
    page = (CONFIGS / "README.md").read_text()
    block = page.split("```yaml\nmixture:")[1].split("```")[0]
    (meta / "data").mkdir()
    (meta / "meta.json").rename(meta / "data" / "released_meta.json")
    (meta / "mixture.yaml").write_text("mixture:" + block)
    monkeypatch.chdir(meta)
    names = [source.name for source in load_mixture("mixture.yaml").sources]
    assert names == ["mine", "ships", "grounding", "general", "first", "second"]
