"""The card of what is converted: the license of its source."""

import pytest
from huggingface_hub import metadata_load
from internvl_checkpoints import native_model, save_original

from modeling_vitp import convert_checkpoint

CARD = "---\nlicense: cc-by-nc-4.0\nbase_model: some/model\n---\n\n# A model\n"


def test_the_license_of_the_source_is_in_every_card_and_cannot_be_changed(tmp_path):
    source = save_original(native_model(), tmp_path / "source")
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("The terms.")
    vitp = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    folders = [vitp] + [convert_checkpoint(vitp, tmp_path / to, to) for to in ("internvl", "backbone", "original")]
    for folder in folders:
        card = metadata_load(folder / "README.md")
        assert card["license"] == "cc-by-nc-4.0"
        assert card["base_model"] == "some/model"
        assert "License of the source, and so of these weights: cc-by-nc-4.0" in (folder / "README.md").read_text()
        assert (folder / "LICENSE").read_text() == "The terms."
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match="licensed cc-by-nc-4.0: a conversion keeps that and cannot make it apache-2.0"
    ):
        convert_checkpoint(vitp, tmp_path / "free", "internvl", license="apache-2.0")
    assert sorted(tmp_path.iterdir()) == before


def test_a_license_of_another_name_keeps_its_name_and_link(tmp_path):
    source = save_original(native_model(), tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: acme\nlicense_link: https://acme.org\n---\n")
    card = metadata_load(convert_checkpoint(source, tmp_path / "vitp", image_token_id=5) / "README.md")
    assert (card["license"], card["license_name"], card["license_link"]) == ("other", "acme", "https://acme.org")


def test_a_source_without_a_license_says_so_until_one_is_given(tmp_path):
    source = save_original(native_model(), tmp_path / "source")
    vitp = convert_checkpoint(source, tmp_path / "vitp", image_token_id=5)
    assert metadata_load(vitp / "README.md")["license"] == "unknown"
    assert "states no license" in (vitp / "README.md").read_text()
    backbone = convert_checkpoint(vitp, tmp_path / "backbone", "backbone", license="cc-by-nc-4.0")
    assert metadata_load(backbone / "README.md")["license"] == "cc-by-nc-4.0"
    (source / "LICENSE.txt").write_text("The terms.")
    other = convert_checkpoint(source, tmp_path / "other", image_token_id=5)
    assert metadata_load(other / "README.md")["license_link"] == "LICENSE.txt"
