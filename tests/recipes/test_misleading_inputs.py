"""Errors of likely mistakes name what was found and a remedy that works."""

import json

import pytest
from pictures import picture

from modeling_vitp.data.files import find_samples
from modeling_vitp.images.reading import stored_size
from modeling_vitp.instructions.rows import load_images
from modeling_vitp.instructions.sources import Source, read_source
from modeling_vitp.pretraining.loading import read_start
from modeling_vitp.training.command_line import hint_for


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("images/0.png", "image_root"),
        (r"C:\data\0.png", "with /"),
        ("An aerial view with 2 trees", "columns"),
    ],
)
def test_missing_image_has_a_remedy_that_works(tmp_path, path, remedy):
    with pytest.raises(ValueError, match=remedy):
        load_images({"images": [str(tmp_path / path)]})


def test_file_that_is_missing_is_named_once(tmp_path):
    with pytest.raises(ValueError) as refused:
        stored_size(tmp_path / "a.png")
    assert str(refused.value).count("a.png") == 1


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("image;caption\n0.png;a tree\n", "image;caption"),
        ("photo,alt_text\n0.png,a tree\n", '{"image": "photo", "caption": "alt_text"}'),
    ],
)
def test_table_with_other_columns_is_explained(tmp_path, table, named):
    picture(20, 20).save(tmp_path / "0.png")
    (tmp_path / "train.csv").write_text(table)
    with pytest.raises(ValueError) as refused:
        list(read_source(Source("s", folder=str(tmp_path))))
    assert named in str(refused.value)


def test_fine_tuned_start_is_not_converted(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vitp_segmentation"}))
    with pytest.raises(ValueError, match="vitp_segmentation") as refused:
        read_start(str(tmp_path))
    assert "convert" not in str(refused.value)


def test_unmatched_split_lists_the_folder(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="'val'.*train, validation"):
        find_samples(tmp_path, {"image": "val/{class}/{name}.png"}, "val")


def test_option_of_several_commands_names_all():
    hint = hint_for("data_root", {"dataset_name"})
    assert "fine-tuning" in hint and "vitp probe" in hint
