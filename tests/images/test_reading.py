"""Images are read from files, whole or in windows."""

import numpy as np
import pytest
import rasterio
from dense_data import TWO, labelled_folder, small_mask

from modeling_vitp.dense.data import DenseData


def test_a_tiff_of_many_bands_is_read_in_windows(tmp_path):
    rng = np.random.default_rng(0)
    bands, labels = rng.integers(0, 4000, (5, 20, 24), dtype=np.uint16), rng.integers(0, 2, (1, 20, 24), dtype=np.uint8)
    for name, array in (("image", bands), ("mask", labels)):
        settings = {"count": len(array), "height": 20, "width": 24, "dtype": array.dtype}
        with rasterio.open(tmp_path / f"{name}_1.tif", "w", "GTiff", **settings) as file:
            file.write(array)
    split = {"image": "image_{n}.tif", "mask": "mask_{n}.tif", "tile": {"size": 16, "overlap": 4}}
    spec = {"bands": [3, 2, 1], "window": [0, 3000]}
    samples = DenseData(classes=TWO, splits={"train": split}, root=str(tmp_path), input_spec=spec).open(["train"])
    sample = samples[3]
    assert sample["id"] == "1/8_4"
    expected = np.round(255 * np.clip(bands[[3, 2, 1], 4:, 8:] / 3000, 0, 1))
    assert np.abs(sample["images"][0].numpy() - expected).max() <= 1
    assert np.array_equal(sample["mask"], labels[0, 4:, 8:])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_broken_image(tmp_path, suffix):
    data = labelled_folder(tmp_path, {"a": small_mask(0, 1)})
    (tmp_path / "images/a.png").unlink()
    data.splits["train"]["image"] = f"images/{{name}}.{suffix}"
    (tmp_path / f"images/a.{suffix}").write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"images/a.{suffix} cannot be read"):
        data.open(["train"])[0]
