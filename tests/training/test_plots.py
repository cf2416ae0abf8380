"""Pictures of a run."""

import warnings

import pytest
from PIL import Image

from modeling_vitp.training.results import draw_losses


@pytest.mark.parametrize("log_history", [[], [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}]])
def test_a_run_of_any_length_is_drawn_without_a_warning(log_history, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_losses(log_history, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (660, 440)
