"""Answer priors of answers with known entropies, and their report for a mixture."""

import json
import math
import random

import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture

from modeling_vitp.instructions import answer_prior
from modeling_vitp.instructions.answer_prior import (
    MAX_TOKENS,
    encode_texts,
    make_tokenize,
    measure_answer_prior,
)
from modeling_vitp.instructions.from_annotations.storage import FEATURES
from modeling_vitp.recipes import validate_data

WORDS = [f" {letter}" for letter in "abcdefghijklmnop"]
STEPS, ROWS = 60, 400


def talk(*turns):
    return [(place % 2 == 1, text) for place, text in enumerate(turns)]


def independent(rng):
    return talk("Map it.", "".join(rng.choices(WORDS, k=20)))


def chain(rng, states=4, length=20, stay=0.85):
    """Draw words, each of which equals the previous one with probability `stay`."""
    word, words = rng.choice(WORDS[:states]), []
    for _ in range(length):
        words.append(word)
        if rng.random() >= stay:
            word = rng.choice([other for other in WORDS[:states] if other != word])
    return talk("Map it.", "".join(words))


def asked(rng):
    word = rng.choice(WORDS)
    return talk(f"Say{word} thrice.", 3 * word)


def repeated(rng):
    return talk("Choose one.", 8 * rng.choice(WORDS[:8]))


def chain_bits(states=4, length=20, stay=0.85):
    a_step = -stay * math.log2(stay) - (1 - stay) * math.log2((1 - stay) / (states - 1))
    return (math.log2(states) + (length - 1) * a_step) / length


def measure(make, seed=0, **options):
    rng = random.Random(seed)
    texts = [make(rng) for _ in range(ROWS)]
    return measure_answer_prior(encode_texts(texts, make_tokenize(texts, None)), seed, **{"steps": STEPS, **options})


@pytest.mark.parametrize(
    ("make", "hidden", "visible", "tolerance"),
    [
        pytest.param(independent, 4, 4, 0.03, marks=pytest.mark.slow),
        pytest.param(chain, 2, chain_bits(), 0.15, marks=pytest.mark.slow),
        pytest.param(asked, 0, 0, 0.3, marks=pytest.mark.slow),
        (repeated, 3, 3 / 8, 0.2),
    ],
)
def test_answer_prior_matches_known_entropies(make, hidden, visible, tolerance):
    """Compare with known entropies; over five seeds, the errors were at most .013, .084, .161 and .108."""
    prior = measure(make)
    assert prior.hidden_bits == pytest.approx(hidden, abs=tolerance)
    assert prior.visible_bits == pytest.approx(visible, abs=tolerance)
    assert prior.guessed_bits == pytest.approx(hidden - visible, abs=max(3 * prior.error, 0.01) + tolerance / 2)
    assert prior.rows == 80 and prior.in_time and prior.steps == STEPS


def test_answer_prior_depends_on_seed_only():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (measure(repeated, steps=4), measure(repeated, steps=4), measure(repeated, 1, steps=4))
    assert first == again != other
    assert (torch.rand(3) == expected).all()


def test_training_respects_time_limit():
    prior = measure(repeated, steps=10**6, seconds=1.0)
    assert not prior.in_time and 0 < prior.steps < 10**4


def test_time_limit_that_is_not_reached_changes_nothing():
    assert measure(repeated, steps=20, seconds=10**4) == measure(repeated, steps=20, seconds=math.inf)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.tuples(st.booleans(), st.text(max_size=300)), max_size=4), min_size=1, max_size=4))
def test_only_answer_tokens_are_scored(texts):
    def tokenize(text):
        return [4 + byte for byte in text.encode(errors="replace")]

    encoded = encode_texts(texts, tokenize)
    kept = []
    for conversation in texts:
        flat = [(is_answer, token) for is_answer, text in conversation for token in [None, *tokenize(text)]]
        expected = [token for is_answer, token in flat[:MAX_TOKENS] if is_answer and token is not None]
        if expected:
            kept.append(expected)
    assert [one.tokens[one.answered].tolist() for one in encoded] == kept
    assert all(len(one.tokens) == len(one.answered) == len(one.positions) <= MAX_TOKENS for one in encoded)


def test_given_tokenizer_is_used(tokenizer):
    texts = [talk("How many trees?", " 12 trees"), talk("How many?", " 3")]
    tokenize = make_tokenize(texts, tokenizer)
    for text in ("How many trees?", " 12 trees", " 3"):
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(tokenize(text)) == len(own) and len(set(tokenize(text))) == len(set(own))
        assert min(tokenize(text)) >= 4


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


def write_mixture(tmp_path):
    rng = random.Random(0)
    write(tmp_path / "collages", [" ".join(rng.choices("abcdefgh", k=12)) for _ in range(200)])
    write(tmp_path / "stripes", [" ".join(rng.choice("abcdefgh") * 12) for _ in range(200)])
    write(tmp_path / "few", ["a b c"] * 20)
    sources = [{"name": name, "folder": name} for name in ("collages", "stripes", "few", "absent")]
    sources.append({"name": "stream", "folder": "stripes", "streaming": True, "rows": 200})
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({"root": str(tmp_path), "sources": sources}))
    return path


@pytest.mark.slow
def test_guessed_sources_are_named_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answer_prior, "MAX_ROWS", 150)
    monkeypatch.setattr(answer_prior, "STEPS", 50)
    card = tmp_path / "README.md"
    words = [
        str(write_mixture(tmp_path)),
        "--num_workers",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
        "--card",
        str(card),
    ]
    # One source is missing.
    assert validate_data.main([*words, "--num_workers", "0", "--answer_prior", "--answer_prior_seconds", "10000"]) == 1
    sources = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]
    assert sources["few"]["answer_prior"] is None and sources["absent"]["answer_prior"] is None
    assert sources["collages"]["answer_prior"]["guessed_share"] < 0.1
    for name in ("stripes", "stream"):
        prior = sources[name]["answer_prior"]
        assert prior["rows"] == 30 and prior["guessed_share"] > 0.7
        assert prior["guessed_bits"] == pytest.approx(prior["hidden_bits"] - prior["visible_bits"])
    said = capsys.readouterr().out
    assert "fewer than 50 rows in all" in said and "`answer_mask_ratio`" in said
    named = said.partition("At least a tenth is guessed in ")[2].partition(":")[0]
    assert sorted(named.split(", ")) == ["stream", "stripes"]
    assert said.partition("At least a tenth")[0].splitlines()[-1] in card.read_text()
