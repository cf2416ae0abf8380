"""Sections and commands of cards."""

import pytest

from modeling_vitp.cards.sections import portable_command, set_section


def test_a_section_of_a_card_is_replaced_and_the_others_stay(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# Name\n\n## One\n\nold\n\n## Two\n\nstays\n")
    set_section(card, "One", "new")
    set_section(card, "Three", "added")
    assert card.read_text() == (
        "---\nlicense: mit\n---\n\n# Name\n\n## One\n\nnew\n\n## Two\n\nstays\n\n## Three\n\nadded\n"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "/home/me/my.yaml"], "--config my.yaml"),
        (["--hub_token", "hf_x", "--seed", "1"], "--seed 1"),
        (["--hub_token=hf_x", "--hub_token", "hf_y"], ""),
        (["--output_dir=~/out/a", "--mixture", '{"root": "/data/b"}'], '--output_dir=a --mixture \'{"root": "b"}\''),
        (["--data_root", "/home/jane doe/patient study/x/", "--a=C:\\my data\\b"], "--data_root x --a=b"),
        (["--endpoint", "https://hf.co/a/b/c"], "--endpoint https://hf.co/a/b/c"),
        (["--dataset_name", "org/ships", "--dir", "a/b"], "--dataset_name org/ships --dir a/b"),
    ],
)
def test_a_recorded_command_has_no_token_and_no_place(words, expected):
    assert portable_command("pretrain", words) == f"vitp pretrain {expected}".strip()
