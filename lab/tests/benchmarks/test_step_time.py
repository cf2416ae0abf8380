"""Measured peak memory of training steps, compared with the estimate of a dry run."""

import pytest
from launching import finish, start_program

from lab.benchmarks.step_time import ANSWER_TOKENS, CASES, TEXT_TOKENS, options_of
from modeling_vitp import ViTPConfig
from modeling_vitp.pretraining.plan import BatchShape, step_cost

MEASURE = """
import torch
from lab.benchmarks import step_time
layer, conv = torch.nn.TransformerEncoderLayer(64, 4, 64), torch.nn.Conv2d(3, 64, 14, 14)  # loads kernels
layer(conv(torch.randn(1, 3, 56, 56)).flatten(2).mT).sum().backward()
before = step_time.most_resident()
step_time.has_fast_bf16 = lambda: False
step_time.gemm_peak = step_time.seconds_of_parts = lambda *_: None  # are measured after the peak
print(step_time.time_steps("{case}", "small", {tiles}, 1, 2, {every})["peak"] - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "tiles", "every"),
    [
        ("ViTP, r = 0.75", 7, 0),
        ("ViTP, r = 0", 7, 0),
        ("ViTP, r = 0", 12, 0),
        ("ViTP, r = 0.75", 12, 1),
        ("ViTP, r = 0", 12, 2),
        ("ViTP, r = 0.75, half of the patches", 12, 0),
    ],
)
def test_peak_memory_equals_measurement(tmp_path, case, tiles, every):
    script, output = MEASURE.format(case=case, tiles=tiles, every=every), tmp_path / "output.txt"
    assert finish([start_program(["-c", script], output)]) == [0], output.read_text()
    drop_ratio, patch_drop_ratio = CASES[case]
    shape = BatchShape(1, tiles, TEXT_TOKENS, drop_ratio, ANSWER_TOKENS, patch_drop_ratio=patch_drop_ratio)
    cost = step_cost(ViTPConfig(**options_of("small")), shape, every, bf16=False)
    assert cost.memory / 2**30 == pytest.approx(float(output.read_text().splitlines()[-1]), rel=0.1)
