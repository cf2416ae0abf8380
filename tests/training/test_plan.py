"""The plan of a run, against its parts computed apart."""

import contextlib
import io
import json
import re
import shlex
from types import SimpleNamespace

import pytest
import yaml
from pictures import picture

from modeling_vitp import ViTPConfig, ViTPTrainingConfig
from modeling_vitp.instructions.dry_run import summarize_sources
from modeling_vitp.instructions.mixture import load_mixture
from modeling_vitp.recipes import pretrain
from modeling_vitp.training.plan import (
    DEVICES,
    INTERNVL2_5_1B,
    BatchShape,
    Device,
    Setup,
    changes,
    describe_device,
    empty_batch,
    fastest_checkpointing,
    padding_of_samples,
    step_cost,
    work_of,
)

ARGUMENTS = ["--config", "remote_sensing_paper", "--dry_run", "--plan_device", "a40", "--plan_devices", "8"]


@pytest.fixture(scope="module")
def rows():
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert pretrain.main([*ARGUMENTS, "--plan_utilization", "0.5"]) == 0
    lines = [line for line in text.getvalue().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return text.getvalue(), {name: values for name, *values in cells}


@pytest.mark.slow
def test_memory_and_hours_are_those_of_the_longest_and_the_mean_sample(rows):
    text, table = rows
    assert "8 device(s), a40, 48 GiB, at 50% of 150 TFLOP/s; 8,000 steps" in text
    assert "in each of 8 process(es)" in text
    assert "InternVL2.5-1B is assumed" in text and "(13 tiles, 200 tokens of text)" in text
    assert "each device receives 6.57 GB with DDP and 50.2 GB with FSDP2 in a step" in text
    config = ViTPConfig(**INTERNVL2_5_1B)
    peak = step_cost(config, BatchShape(1, 13, 200, 0.75), 1)
    weights, gradients, optimizer, activations, total, room, tera, hours, device_hours = table["as configured"]
    parts = [peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.memory]
    assert [weights, gradients, optimizer, activations, total] == [f"{part / 2**30:.2f}" for part in parts]
    assert room == f"{48 - peak.memory / 2**30:.1f} left"
    assert float(hours) == pytest.approx(8000 * float(tera) / (0.5 * 149.7) / 3600, rel=0.01)
    assert float(device_hours) == pytest.approx(8 * float(hours), rel=0.01)


@pytest.mark.slow
def test_each_change_is_told_alone(rows):
    table = {name: [float(re.match(r"[\d.e+]+", cell).group()) for cell in cells] for name, cells in rows[1].items()}
    assert list(table) == [
        "as configured",
        "r = 0",
        "without activation checkpointing",
        "activation checkpointing of every 4th layer",
        "activation checkpointing of every 2nd layer",
        "LoRA on the language model",
    ]
    asked, full, kept, fourth, half, lora = table.values()
    assert kept[3] > fourth[3] > half[3] > asked[3] and kept[6] < fourth[6] < half[6] < asked[6]
    assert full[3] > asked[3] and full[6] > asked[6] and full[:3] == asked[:3]
    assert kept[3] > 3 * asked[3] and kept[6] < asked[6]
    assert lora[1] < asked[1] / 2 and lora[2] < asked[2] / 2


def test_what_is_off_is_compared_on_and_the_other_way_round():
    assert list(changes(Setup(0.9, 0, True), False)) == [
        "as configured",
        "r = 0",
        "r = 0.75",
        "activation checkpointing of every 4th layer",
        "activation checkpointing of every 2nd layer",
        "activation checkpointing",
        "without LoRA on the language model",
    ]
    assert not any("LoRA" in name for name in changes(Setup(0.0, 0, False), True))
    padded, free = (
        changes(Setup(0.75, 0, False, padding_free), False, is_padded=True) for padding_free in (False, True)
    )
    assert padded["without padding (padding_free)"] == Setup(0.75, 0, False, True)
    assert free["with padding"] == Setup(0.75, 0, False, False)


def test_a_device_that_is_not_known_is_named_with_those_that_are():
    with pytest.raises(ValueError, match="plan_device='tpu': known are a40, .*h100"):
        describe_device("tpu")
    with pytest.raises(ValueError, match="as 24GiB,71TFLOP/s"):
        describe_device("24GiB,0TFLOP/s")
    assert describe_device("H100")[1] == DEVICES["h100"]


@pytest.mark.parametrize(
    ("name", "memory", "known"),
    [
        ("NVIDIA A40", 45, "a40"),
        ("NVIDIA H100 80GB HBM3", 79, "h100"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA RTX A4000", 16, None),
        ("NVIDIA GeForce RTX 3090", 24, None),
        ("Tesla V100-SXM2-32GB", 32, None),
    ],
)
def test_the_device_of_this_machine_has_its_own_memory(monkeypatch, name, memory, known):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    properties = SimpleNamespace(name=name, total_memory=memory * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    told, device = describe_device(None)
    assert device == Device(memory, DEVICES[known or "a800"].operations)
    assert told == (name if known else f"{name} (of unknown speed, so as an A800: give --plan_device)")


@pytest.mark.parametrize(
    ("settings", "from_scratch", "undropped"),
    [
        ({}, False, 0),
        ({}, True, 0.5),
        ({"vrl_warmup_steps": 25}, True, 0.25),
        ({"vrl_warmup_steps": 0}, True, 0),
        ({"vrl_warmup_steps": 500}, False, 1),
        ({"vrl_apply_prob": 0.25}, False, 0.75),
        ({"vrl_warmup_steps": 50, "vrl_apply_prob": 0.5}, False, 0.75),
        ({"vrl_drop_ratio": 0.0}, True, 0),
    ],
    ids=str,
)
def test_work_is_that_of_the_longest_rows_and_of_those_that_vrl_leaves_whole(
    tmp_path, processor, settings, from_scratch, undropped
):
    """Of rows with four images, whose tiles are more than those of one, and of one with a long text."""
    pictures = [str(tmp_path / f"{index}.png") for index in range(4)]
    for index, path in enumerate(pictures):
        picture(56, 56, index).save(path)
    question = "Which?"
    asked, lengths = {"from": "human", "value": "<image>" * 4 + question}, [40, 4000, 40]
    lines = [{"image": pictures, "conversations": [asked, {"from": "gpt", "value": "a" * size}]} for size in lengths]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    source = {"name": "four", "annotation": str(tmp_path / "rows.jsonl"), "image_root": str(tmp_path)}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    summaries = summarize_sources(load_mixture(str(tmp_path / "mixture.yaml")), processor.image_processor)
    settings = {"max_steps": 100, "max_length": 700, "vrl_drop_ratio": 0.75, **settings}
    args = ViTPTrainingConfig(str(tmp_path), **settings)
    work = work_of(args, 1, summaries, from_scratch)
    tiles = sum(processor.image_processor.num_tiles([(56, 56)] * 4))
    assert (work.longest.tiles, work.mean.tiles) == (max(tiles, 7), tiles)
    characters = [len(question) + size for size in lengths]
    assert work.mean.text_tokens == round(sum(characters) / 3 / 4)
    assert work.longest.text_tokens == 700 < max(characters) / 4
    assert work.undropped == pytest.approx(undropped)


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 9), (True, 6)])
def test_steps_are_those_of_whole_epochs(tmp_path, drop_last, steps):
    """As Trainer counts them: of 10 rows in batches of 4 each epoch has three, or two."""
    summary = SimpleNamespace(effective=10, share=1, tiles=1, text_tokens=5, longest=(1, 5))
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "dataloader_drop_last": drop_last}
    assert work_of(ViTPTrainingConfig(str(tmp_path), **settings), 1, [summary], False).steps == steps


def sampled(share: float, *samples: tuple[int, float]) -> SimpleNamespace:
    """What is asked of the summary of a source with these samples of tiles and tokens of text."""
    return SimpleNamespace(share=share, samples=list(samples))


def test_padding_is_that_of_batches_drawn_from_the_sources(tmp_path):
    """Two of three samples are short, of 4 + 20 tokens, one long, of 8 + 96 at r = 0: of the pairs of a batch 4/9 have
    one of each, and then 80 places of two rows are empty."""
    summaries = [sampled(2 / 3, (1, 20.0)), sampled(1 / 3, (2, 96.0))]

    def padding(ratio: float, devices: int = 1, **options) -> int:
        args = ViTPTrainingConfig(str(tmp_path), **{"per_device_train_batch_size": 2, "max_length": None} | options)
        return padding_of_samples(args, devices, summaries, 4, ratio)

    accumulation = {"gradient_accumulation_steps": 32}
    assert padding(0.0, **accumulation) == pytest.approx(4 / 9 * 80 / 2, abs=1.5)
    assert padding(0.75, **accumulation) == pytest.approx(4 / 9 * (98 - 21) / 2, abs=1.5)
    assert padding(0.0, devices=32) == pytest.approx(4 / 9 * 80 / 2, abs=1.5)
    assert padding(0.0, max_length=64, **accumulation) == pytest.approx(4 / 9 * 40 / 2, abs=1)
    assert padding(0.0, per_device_train_batch_size=1) == 0
    for strategy in ("batch_rebalance", "group_by_length"):
        assert padding(0.0, train_sampling_strategy=strategy, **accumulation) <= 2
    summaries = [sampled(0.0, (1, 20.0))]
    assert padding(0.0) == 0  # what is in it is not known


def test_padding_is_places_without_labels():
    config = ViTPConfig(**INTERNVL2_5_1B)
    batch = empty_batch(config, BatchShape(2, 1, 30, 0.75, answer_tokens=10, padding=8))
    assert batch["input_ids"].shape == (2, 64 + 30 + 8) and batch["shift_labels"].shape == (1, 20)


@pytest.mark.parametrize("given", ["24GiB,71.5TFLOP/s", " 24.0 gib, 71.5 tflop/s"])
def test_another_device_is_told_by_its_memory_and_speed(given):
    assert describe_device(given) == ("as given", Device(24.0, 71.5e12))


@pytest.mark.slow
def test_it_is_told_by_how_much_a_run_does_not_fit(capsys):
    device = ["--plan_device", "8GiB,10TFLOP/s", "--plan_devices", "1"]
    arguments = [*ARGUMENTS[:3], *device, "--activation_checkpointing", "false"]
    assert pretrain.main(arguments) == 0
    cells = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| as configured")).split("|")
    peak = step_cost(ViTPConfig(**INTERNVL2_5_1B), BatchShape(1, 13, 200, 0.75))
    assert cells[7].strip() == f"{peak.memory / 2**30 - 8:.1f} too much"


# As configured it takes 15.9 GiB, with every second layer 22.9, every fourth 26.6, and without checkpointing 30.4.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "told"),
    [
        (48, "--activation_checkpointing false"),
        (31, "--activation_checkpointing true --activation_checkpointing_kwargs '{\"every_n_layers\": 4}'"),
        (26, "--activation_checkpointing true --activation_checkpointing_kwargs '{\"every_n_layers\": 2}'"),
        (24, None),
    ],
)
def test_the_fastest_checkpointing_that_fits_is_named(capsys, memory, told):
    assert pretrain.main([*ARGUMENTS[:3], "--plan_device", f"{memory}GiB,10TFLOP/s"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The fastest")]
    assert lines == ([] if told is None else [f"The fastest that leaves 10% of the device: {told}"])
    if told is not None:  # it is taken as it stands, and then no faster one is told
        assert pretrain.main([*ARGUMENTS[:3], "--plan_device", f"{memory}GiB,10TFLOP/s", *shlex.split(told)]) == 0
        assert "The fastest" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("room", "fastest"),
    [
        ({1: 9.0, 8: 4.0, 0: 3.0, 2: 8.0, 4: 7.0}, 0),
        ({1: 9.0, 8: 4.0, 0: 2.9, 2: 8.0, 4: 7.0}, 8),
        ({1: 9.0, 8: 2.0, 0: -1.0, 2: 8.0, 4: 3.0}, 4),
        ({1: 3.0, 2: 2.0, 0: -1.0}, 1),
        ({1: 2.9, 2: 2.0, 0: -1.0}, None),
    ],
)
def test_the_fastest_computes_again_what_it_must(room, fastest):
    assert fastest_checkpointing(room, 3.0) == fastest
