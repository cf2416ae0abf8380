import json

import pytest
from PIL import Image

from modeling_vitp.command.errors import WrongArguments
from modeling_vitp.recipes.benchmarks import benchmark_loader
from modeling_vitp.recipes.benchmarks.loading_speed import SIZES, synthetic_mixture


@pytest.mark.parametrize(("side", "sizes"), [(None, SIZES), (70, ((70, 70),))])
def test_sizes_of_synthetic_images(tmp_path, side, sizes):
    (source,) = synthetic_mixture(tmp_path, 5, side)["sources"]
    rows = [json.loads(line) for line in (tmp_path / source["annotation"]).read_text().splitlines()]
    assert [Image.open(tmp_path / row["image"]).size for row in rows] == [sizes[i % len(sizes)] for i in range(5)]


def test_mixture_and_side_exclude_each_other():
    with pytest.raises(WrongArguments, match="--side: not allowed with argument --mixture"):
        benchmark_loader.main(["--mixture", "my.yaml", "--side", "70"])
