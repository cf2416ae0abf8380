"""The card of a data set that is made."""

from annotated_images import NAMES, make, write_voc


def test_a_second_split_joins_the_folder_and_its_card(tmp_path):
    root = tmp_path / "data"
    for split, names in NAMES.items():
        write_voc(root, split, names)
    make("voc", root, tmp_path / "out")
    both = make("voc", root, tmp_path / "out", "--split", "test", "--license", "mit")
    assert set(both) == {"train", "test"} and set(both["test"]["id"]) <= set(NAMES["test"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("license: mit") < card.index("# Instructions from data") < card.index("## Split `train`")
    assert card.count("## Split `test`") == card.count("# Instructions from") == 1
