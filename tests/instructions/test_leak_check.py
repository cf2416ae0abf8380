"""The check of a mixture for answers that are guessed from their own beginning."""

import json
import random
from functools import partial

import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value
from pictures import picture

from modeling_vitp.instructions import leak_check
from modeling_vitp.instructions.leak import Leak, measure_leak
from modeling_vitp.recipes import validate_data

FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)


def write(folder, answers):
    image = picture(30, 30)
    rows = [
        {
            "id": str(index),
            "images": [image],
            "messages": [{"role": "user", "content": "Map it."}, {"role": "assistant", "content": answer}],
        }
        for index, answer in enumerate(answers)
    ]
    folder.mkdir()
    Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "train.parquet")


@pytest.fixture
def mixture(tmp_path):
    rng = random.Random(0)
    write(tmp_path / "collages", [" ".join(rng.choices("abcdefgh", k=12)) for _ in range(200)])
    write(tmp_path / "stripes", [" ".join(rng.choice("abcdefgh") * 12) for _ in range(200)])
    write(tmp_path / "few", ["a b c"] * 20)
    sources = [{"name": name, "folder": name} for name in ("collages", "stripes", "few", "absent")]
    sources.append({"name": "stream", "folder": "stripes", "streaming": True, "rows": 200})
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({"root": str(tmp_path), "sources": sources}))
    return path


def test_sources_of_which_much_is_guessed_are_named_first(mixture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leak_check, "MAX_ROWS", 150)
    monkeypatch.setattr(leak_check, "measure_leak", partial(measure_leak, steps=50))
    card = tmp_path / "README.md"
    words = [str(mixture), "--num_workers", "0", "--output_dir", str(tmp_path / "out"), "--card", str(card)]
    assert validate_data.main([*words, "--check_leak", "--leak_seconds", "10000"]) == 1  # one source is not there
    sources = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]
    assert sources["few"]["leak"] is None and sources["absent"]["leak"] is None
    assert sources["collages"]["leak"]["guessed_share"] < 0.1
    for name in ("stripes", "stream"):
        leak = sources[name]["leak"]
        assert leak["rows"] == 30 and leak["guessed_share"] > 0.7
        assert leak["guessed_bits"] == pytest.approx(leak["hidden_bits"] - leak["visible_bits"])
    said = capsys.readouterr().out
    assert "fewer than 50 rows in all" in said and "`answer_mask_ratio`" in said
    named = said.partition("At least a tenth is guessed in ")[2].partition(":")[0]
    assert sorted(named.split(", ")) == ["stream", "stripes"]
    assert said.partition("At least a tenth")[0].splitlines()[-1] in card.read_text()


def test_without_the_option_nothing_is_measured(mixture, tmp_path, capsys):
    validate_data.main([str(mixture), "--num_workers", "0", "--output_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["sources"]["stripes"]["leak"] is None
    assert "guessed" not in capsys.readouterr().out


def test_what_is_said_of_a_source():
    leak = Leak(100, 4900, 2.31, 0.91, 0.35, 0.72, 0.02, 200, True)
    assert leak.guessed_bits == pytest.approx(1.40)
    text = leak_check.leak_text({"even": Leak(9, 90, 1.0, 1.0, 0.5, 0.5, 0.0, 200, True), "maps": leak, "few": None})
    assert "In maps, of the 2.31 bits that a token of an answer has given its question, 1.40 ± 0.02 are guessed" in text
    assert text.index("| maps |") < text.index("| even |") < text.index("| few |")
    assert "even" not in text.partition("At least a tenth")[2]
    empty = leak_check.leak_text({"fixed": Leak(9, 90, 0.01, 0.0, 1.0, 1.0, 0.0, 60, False)})
    assert "9, out of time at step 60" in empty and "In fixed answers follow from their questions" in empty
