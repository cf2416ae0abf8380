"""Layers that `torch_compile` compiles, beside the same run without."""

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from training_run import make_trainer, run
from transformers import TrainerCallback

pytestmark = pytest.mark.slow  # a minute of C++ compiler each

FILE = "checkpoint-40/model.safetensors"


class CountGraphs(TrainerCallback):
    """How often something had been compiled, after each step."""

    def __init__(self):
        self.frames, self.before = [], counters["frames"]["total"]

    def on_step_end(self, args, state, control, **kwargs):
        self.frames.append(counters["frames"]["total"] - self.before)


@pytest.mark.parametrize(
    ("backend", "checkpointing", "rounding"), [("inductor", False, 1e-2), ("aot_eager", True, 1e-6)]
)
def test_a_compiled_run_is_the_eager_one_to_rounding(tmp_path, backend, checkpointing, rounding):
    """Lengths and numbers of tiles change throughout; nothing is compiled once each kind of batch has been seen: padded
    or not, of no image, of one tile, of several. What rounding does to small gradients Adam makes large; a backend that
    leaves operations as they are has none.
    """
    torch._dynamo.reset()
    options = {"max_steps": 40, "save_steps": 40, "logging_steps": 1, "vrl_drop_ratio": 0.5}
    options |= {"activation_checkpointing": checkpointing}
    eager = make_trainer(tmp_path / "eager", **options)
    eager.train()
    compiled = make_trainer(tmp_path / "compiled", torch_compile_backend=backend, **options)
    count = CountGraphs()
    compiled.add_callback(count)
    compiled.train()
    assert count.frames[0] > 4
    assert count.frames[19] == count.frames[-1]
    assert counters["frames"]["ok"] == counters["frames"]["total"]  # none is given up as compiled too often
    logs = [[e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e] for trainer in (eager, compiled)]
    for wanted, actual in zip(*logs, strict=True):
        assert set(actual) == set(wanted)
        for name in [name for name in wanted if not name.endswith(("runtime", "per_second"))]:
            tolerance = min(rounding, 1e-4) if name.endswith("loss") else rounding
            assert actual[name] == pytest.approx(wanted[name], rel=tolerance), (wanted["step"], name)
    wanted, actual = (load_file(tmp_path / name / FILE) for name in ("eager", "compiled"))
    torch.testing.assert_close(actual, wanted, rtol=0, atol=rounding)


def test_a_compiled_run_that_is_killed_ends_as_the_run_that_never_stopped(tmp_path):
    whole = run(tmp_path / "whole", torch_compile=True)
    run(tmp_path / "killed", ("step", 3), torch_compile=True)
    assert run(tmp_path / "killed", torch_compile=True) == whole
