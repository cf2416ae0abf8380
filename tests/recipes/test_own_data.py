"""The README's commands from captions and masks to a map, on folders made for them."""

import numpy as np
import pytest
import rasterio
from page_blocks import call, commands, read_page, small
from pictures import picture, write_bands
from PIL import Image


@pytest.mark.slow
def test_readme_leads_from_captions_to_a_map(tmp_path, monkeypatch):
    """A caption names the half of the image that is bright, and so does the mask."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my_captions", "my_fields/train/images", "my_fields/train/masks", "my_fields/test/images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "my_fields/test/masks").mkdir()
    for number in range(8):
        half = ("left", "right")[number % 2]
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :32] = half == "left"
        mask[:, 32:] = half == "right"
        pixels = np.asarray(picture(64, 64, number)) // 2 + 120 * mask[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"my_captions/{number}.png")
        (tmp_path / f"my_captions/{number}.txt").write_text(f"A field in the {half} half.")
        split = "test" if number > 5 else "train"
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"my_fields/{split}/images/{number}.png")
        Image.fromarray(mask).save(tmp_path / f"my_fields/{split}/masks/{number}.png")
    write_bands(tmp_path / "scene.tif", np.asarray(picture(100, 80)).transpose(2, 0, 1))

    (block,) = [block.text for block in read_page("README.md")[1] if "my_captions" in block.text]
    words = [command.split()[1:] for command in commands(block)]
    assert len(words) <= 8 and not any(word.endswith(".yaml") for command in words for word in command)
    for name, *options in words:
        assert call(name, options + small(name, options), monkeypatch) in (0, None), name
    with rasterio.open(tmp_path / "classes.tif") as file:
        assert file.shape == (80, 100) and set(np.unique(file.read(1))) <= {0, 1}
    assert (tmp_path / "outputs/my_maps/data.yaml").is_file()
