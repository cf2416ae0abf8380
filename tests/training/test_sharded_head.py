"""Our trainer under FSDP2, in two processes on CPUs: its gradients are those of one process, its collectives those of a
plain loop.
"""

import json

import pytest
import torch
from launching import launch

from modeling_vitp import ViTPConfig, ViTPForConditionalGeneration
from modeling_vitp.training.plan import traffic

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folders = {world: tmp_path_factory.mktemp(f"sharded-{world}") for world in (1, 2)}
    runs = {w: launch(w, folder / "output.txt", "sharded_run.py", str(folder)) for w, folder in folders.items()}
    for world, process in runs.items():
        assert process.wait(timeout=600) == 0, (folders[world] / "output.txt").read_text()[-3000:]
    return folders


def test_gradients_are_those_of_one_process_that_of_the_head_too(results):
    one, two = (torch.load(results[world] / "gradients.pt") for world in (1, 2))
    assert len(one) == len(two) == 3
    for expected, found in zip(one, two):
        assert expected.keys() == found.keys() and expected["lm_head.weight"].norm() > 0.1
        rounding = 1e-7 * sum(gradient.norm() ** 2 for gradient in expected.values()) ** 0.5
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), rounding), name


def test_a_step_has_the_collectives_of_a_plain_loop_and_counts_of_a_few_bytes(results):
    """A block's parameters are gathered for the forward pass and again for the backward pass, and its gradient is
    scattered once; what is left, embeddings and head, is gathered once or twice.
    """
    seen = json.loads((results[2] / "collectives.json").read_text())
    for ours, plain in zip(seen["1"], seen["plain"], strict=True):
        counts = [size for name, size in ours if name == "allgather"]
        assert sorted(one for one in ours if one[0] != "allgather") == sorted(plain)
        assert len(counts) <= 7 and max(counts) <= 48  # tokens and rows that all processes have, and TRL's metrics
        names = [name for name, _ in plain]
        numbers = [names.count(name) for name in ("allgather_base", "reduce_scatter_base", "all_reduce")]
        assert numbers == [14, 8, 1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_plan_tells_the_bytes_that_are_moved(results, accumulation):
    """Of a gather and a scatter between two, half of the whole is received; a collective has whole and half.

    Parameters of which the first side is odd are padded, the whole of these tiny ones by 1%.
    """
    steps = json.loads((results[2] / "collectives.json").read_text())[str(accumulation)]
    config = ViTPConfig.from_pretrained(results[2] / "model")
    trained = ViTPForConditionalGeneration(config).num_parameters()
    told = traffic(config, trained, 2, accumulation, itemsize=4)["FSDP2"]
    for step in steps:
        received = sum(size / 1.5 * 0.5 for name, size in step if name in ("allgather_base", "reduce_scatter_base"))
        assert received == pytest.approx(told, rel=0.015)
