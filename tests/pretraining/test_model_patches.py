"""Training without padding, compiled layers, and sharded training."""

import copy
import json

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import launch
from safetensors.torch import load_file
from sample_rows import make_rows
from tiny_models import VISION, vivid_model
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from training_run import make_trainer, run
from transformers import TrainerCallback

from modeling_vitp import (
    ViTPConfig,
    ViTPDataCollator,
    ViTPForConditionalGeneration,
    ViTPTrainer,
    ViTPTrainingConfig,
)
from modeling_vitp.pretraining.model_patches import (
    attend_by_sequence,
    attention_by_sequence,
    check_attention,
    checkpoint_activations,
)
from modeling_vitp.pretraining.plan import traffic


@pytest.fixture
def model_and_processor(tokenizer):
    model, processor = vivid_model(tokenizer)
    return model.double(), processor


def batch_of(processor, rows, **options):
    batch = ViTPDataCollator(processor, **options)(rows)
    return {name: value.double() if name == "pixel_values" else value for name, value in batch.items()}


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.integers(0, 2**32 - 1),
)
def test_attention_by_sequence_equals_loops(lengths, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    total, size = sum(lengths), 8
    query, key, value = (
        torch.randn(1, number, total, size, generator=generator, dtype=torch.float64)
        for number in (heads[0], heads[1], heads[1])
    )
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads[0] // heads[1], True
    places = torch.tensor([0, *lengths]).cumsum(0).int()
    found, _ = attend_by_sequence(module, query, key, value, None, cu_seq_lens_q=places, scaling=0.3)
    assert found.shape == (1, total, heads[0], size)
    for head in range(heads[0]):
        other = head // module.num_key_value_groups
        for start, end in zip(places.tolist(), places.tolist()[1:]):
            for token in range(start, end):
                seen = slice(start, token + 1)
                weights = (key[0, other, seen] @ query[0, head, token] * 0.3).softmax(0)
                torch.testing.assert_close(found[0, token, head], weights @ value[0, other, seen])


def test_padding_free_logits_equal_single_samples(model_and_processor):
    model, processor = model_and_processor
    rows = make_rows()
    batch = batch_of(processor, rows, vrl_drop_ratio=0.75, padding_free=True)
    labels = batch.pop("labels")
    with torch.no_grad(), attention_by_sequence(model):
        found = model(**batch, use_cache=False).logits[0]
    start = 0
    for row in rows:
        alone = batch_of(processor, [row], vrl_drop_ratio=0.75)
        alone.pop("labels")
        with torch.no_grad():
            wanted = model(**alone, use_cache=False).logits[0]
        torch.testing.assert_close(found[start : start + len(wanted)], wanted, rtol=1e-9, atol=1e-9)
        start += len(wanted)
    assert start == len(found) == labels.shape[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_free_gradients_equal_padded_batch(model_and_processor, checkpointing):
    model, processor = model_and_processor
    model.train()
    for layer in model.model.vision_tower.encoder.layer:
        layer.drop_path.drop_prob = 0.0
    padded, free = copy.deepcopy(model), model
    if checkpointing:
        checkpoint_activations(free)

    def backward(one, **options):
        batch = batch_of(processor, make_rows(), vrl_drop_ratio=0.75, **options)
        labels = batch.pop("labels")[:, 1:].flatten()
        loss = cross_entropy(one(**batch, use_cache=False).logits[:, :-1].flatten(0, 1), labels)
        loss.backward()
        return loss

    wanted = backward(padded)
    with attention_by_sequence(free):
        found = backward(free, padding_free=True)
    torch.testing.assert_close(found, wanted)
    gradients = [{name: weight.grad for name, weight in one.named_parameters()} for one in (free, padded)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_padded_batches_and_generation_are_unchanged(model_and_processor):
    """Evaluation during training uses padded batches."""
    model, processor = model_and_processor
    for side in ("left", "right"):
        batch = batch_of(processor, make_rows(), padding_side=side)
        del batch["labels"]
        with torch.no_grad():
            wanted = model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)
            with attention_by_sequence(model):
                found = model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_flash_attention_gets_sequence_boundaries(model_and_processor, monkeypatch):
    """Loops replace the kernels, and record their arguments."""
    model, processor = model_and_processor
    batch = batch_of(processor, make_rows(), vrl_drop_ratio=0.75, padding_free=True)
    del batch["labels"]
    with torch.no_grad(), attention_by_sequence(model):
        wanted = model(**batch, use_cache=False).logits
    calls = []

    def attend(q, k, v, causal, softmax_scale=None):
        calls.append((causal, q.shape[1]))
        groups = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
        read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
        return read.transpose(1, 2)

    def by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        parts = zip(*(x.split(lengths) for x in (q, k, v)))
        return torch.cat([attend(*(x[None] for x in part), causal, softmax_scale)[0] for part in parts])

    kernels = (attend, by_sequence, None, None, None)
    functions = (flash._lazy_define_process_function(by_sequence), dict)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: (kernels, functions))
    for config in (model.config, model.config.vision_config, model.config.text_config):
        config._attn_implementation_internal = "flash_attention_2"
    check_attention(model)
    with torch.no_grad(), attention_by_sequence(model):
        found = model(**batch, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    vision_lengths = [length for causal, length in calls if not causal]
    assert vision_lengths == [17] * 3  # one call for all tiles in each layer
    assert [length for causal, length in calls if causal] == lengths * 2


def test_padding_free_run_equals_padded_run(tmp_path):
    options = {"stream": True, "logging_steps": 1, "per_device_train_batch_size": 3, "max_steps": 3, "eval_steps": 3}
    options |= {"save_strategy": "no", "vrl_warmup_steps": 1, "drop_path_rate": 0.0}
    padded = make_trainer(tmp_path / "padded", **options)
    free = make_trainer(tmp_path / "free", padding_free=True, **options)
    for trainer in (padded, free):
        trainer.train()
    for wanted, found in zip(padded.state.log_history, free.state.log_history, strict=True):
        for name in {"loss", "eval_loss"} & set(wanted):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4)
        if "loss" in wanted:
            assert found["num_tokens"] == wanted["num_tokens"]
            assert found["mean_token_accuracy"] == pytest.approx(wanted["mean_token_accuracy"])
            assert found["padding_share"] == 0 < wanted["padding_share"]
    assert free.args.padding_free and free.model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_killed_padding_free_run_is_exact(tmp_path):
    whole = run(tmp_path / "whole", padding_free=True)
    run(tmp_path / "killed", ("step", 3), padding_free=True)
    assert run(tmp_path / "killed", padding_free=True) == whole


def test_unsupported_attention_is_refused(model_and_processor):
    model, processor = model_and_processor
    batch = batch_of(processor, make_rows(), padding_free=True)
    with pytest.raises(ValueError, match="'sdpa'"):  # outside of training
        model(**batch)
    for attention in ("eager", "flex_attention"):
        model.config.text_config._attn_implementation_internal = attention
        for refused in (lambda: check_attention(model), lambda: model(**batch)):
            with pytest.raises(ValueError, match=attention):
                refused()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}


def model_with(name: str, attention: str = "sdpa", **options) -> ViTPForConditionalGeneration:
    text = {"model_type": name, "intermediate_size": 64, "num_key_value_heads": 2, **SIZES, **options}
    with torch.device("meta"):
        model = ViTPForConditionalGeneration(ViTPConfig(vision_config=VISION, text_config=text))
    if attention == "flash_attention_2":  # not installed, and not called
        model.config.text_config._attn_implementation_internal = attention
    return model


def test_sliding_window_needs_flash_attention():
    """SDPA applies the window by the mask, which is not used here."""
    for name in ("qwen2", "qwen3", "llama"):
        check_attention(model_with(name))
    check_attention(model_with("mistral", sliding_window=None))
    qwen2 = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    for name, options in [
        ("mistral", {"sliding_window": 16}),
        ("starcoder2", {"sliding_window": 16}),
        ("qwen2", qwen2),
    ]:
        with pytest.raises(ValueError, match=f"{name}.*sliding-window"):
            check_attention(model_with(name, **options))
        check_attention(model_with(name, "flash_attention_2", **options))


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_recurrent_layers_are_refused(attention):
    for name, options in [("lfm2", {"layer_types": ["conv", "full_attention"]}), ("bamba", {"mamba_n_heads": 4})]:
        with pytest.raises(ValueError, match=name):
            check_attention(model_with(name, attention, **options))


def test_padding_collator_is_refused(tmp_path):
    plain = make_trainer(tmp_path / "plain")
    options = {"processing_class": plain.processing_class, "train_dataset": plain.train_dataset}
    pads, free = (ViTPDataCollator(plain.processing_class, padding_free=padding_free) for padding_free in (False, True))

    def trainer(collator, **settings):
        args = ViTPTrainingConfig(str(tmp_path / "given"), report_to="none", bf16=False, **settings)
        return ViTPTrainer(plain.model, args, data_collator=collator, **options)

    with pytest.raises(ValueError, match="data_collator"):
        trainer(pads, padding_free=True)
    assert trainer(free).run_settings()["free"]["padding_free"] is True
    assert trainer(pads).run_settings()["free"]["padding_free"] is None


def test_trainer_refuses_what_has_no_padding_free_form(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        make_trainer(tmp_path, padding_free=True, neftune_noise_alpha=5.0)
    monkeypatch.setattr("modeling_vitp.pretraining.trainer.check_attention", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, padding_free=True)
    make_trainer(tmp_path)


FILE = "checkpoint-40/model.safetensors"


class CountGraphs(TrainerCallback):
    """Callback that records the number of compilations after each step."""

    def __init__(self):
        self.frames, self.before = [], counters["frames"]["total"]

    def on_step_end(self, args, state, control, **kwargs):
        self.frames.append(counters["frames"]["total"] - self.before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "checkpointing", "rounding"), [("inductor", False, 1e-2), ("aot_eager", True, 1e-6)]
)
def test_compiled_run_equals_eager_run(tmp_path, backend, checkpointing, rounding):
    """Lengths and numbers of tiles change, but nothing is compiled again after each type of batch has occurred.

    The types are batches with and without padding, and without images, with one tile and with several tiles. Adam
    amplifies rounding of small gradients, which a large `adam_epsilon` limits. The backend `aot_eager` does not change
    the operations.
    """
    torch._dynamo.reset()
    options = {"max_steps": 40, "save_steps": 40, "logging_steps": 1, "vrl_drop_ratio": 0.5}
    options |= {"activation_checkpointing": checkpointing, "adam_epsilon": 1e-4}
    eager = make_trainer(tmp_path / "eager", **options)
    eager.train()
    compiled = make_trainer(tmp_path / "compiled", torch_compile_backend=backend, **options)
    count = CountGraphs()
    compiled.add_callback(count)
    compiled.train()
    assert count.frames[0] > 4
    assert count.frames[19] == count.frames[-1]
    assert counters["frames"]["ok"] == counters["frames"]["total"]  # no function reaches the limit of recompilations
    logs = [[e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e] for trainer in (eager, compiled)]
    for wanted, actual in zip(*logs, strict=True):
        assert set(actual) == set(wanted)
        for name in [name for name in wanted if not name.endswith(("runtime", "per_second"))]:
            tolerance = min(rounding, 1e-4) if name.endswith("loss") else rounding
            assert actual[name] == pytest.approx(wanted[name], rel=tolerance), (wanted["step"], name)
    wanted, actual = (load_file(tmp_path / name / FILE) for name in ("eager", "compiled"))
    torch.testing.assert_close(actual, wanted, rtol=0, atol=rounding)


@pytest.mark.slow
def test_killed_compiled_run_is_exact(tmp_path):
    whole = run(tmp_path / "whole", torch_compile=True)
    run(tmp_path / "killed", ("step", 3), torch_compile=True)
    assert run(tmp_path / "killed", torch_compile=True) == whole


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folders = {world: tmp_path_factory.mktemp(f"sharded-{world}") for world in (1, 2)}
    for world, folder in folders.items():
        codes = launch(world, folder / "output.txt", "sharded_run.py", str(folder))
        assert codes == [0] * world, (folder / "output.txt").read_text()[-3000:]
    return folders


@pytest.mark.slow
def test_sharded_gradients_equal_one_process(results):
    one, two = (torch.load(results[world] / "gradients.pt") for world in (1, 2))
    assert len(one) == len(two) == 3
    for expected, found in zip(one, two):
        assert expected.keys() == found.keys() and expected["lm_head.weight"].norm() > 0.1
        rounding = 1e-7 * sum(gradient.norm() ** 2 for gradient in expected.values()) ** 0.5
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), rounding), name


@pytest.mark.slow
def test_sharded_evaluation_and_saving_equal_one_process(results):
    """The second process evaluates no row, and runs the ViT without images."""
    one, two = (json.loads((results[world] / "evaluated.json").read_text()) for world in (1, 2))
    assert two == pytest.approx(one, abs=1e-6)
    one, two = (ViTPForConditionalGeneration.from_pretrained(results[world] / "saved") for world in (1, 2))
    for expected, found in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_sharded_step_equals_collectives_of_loop(results):
    """Parameters of a block are gathered twice, and its gradients are scattered once.

    The embeddings and the head are gathered once or twice.
    """
    seen = json.loads((results[2] / "collectives.json").read_text())
    for ours, plain in zip(seen["1"], seen["plain"], strict=True):
        counts = [size for name, size in ours if name == "allgather"]
        assert sorted(one for one in ours if one[0] != "allgather") == sorted(plain)
        assert len(counts) <= 7 and max(counts) <= 48  # tokens and rows that all processes have, and TRL's metrics
        names = [name for name, _ in plain]
        numbers = [names.count(name) for name in ("allgather_base", "reduce_scatter_base", "all_reduce")]
        assert numbers == [14, 8, 1]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_plan_traffic_equals_transferred_bytes(results, accumulation):
    """In a gather and a scatter between two processes, each receives half; the recorded size is one and a half.

    Parameters with an odd first dimension are padded, which adds 1% for this tiny model.
    """
    steps = json.loads((results[2] / "collectives.json").read_text())[str(accumulation)]
    config = ViTPConfig.from_pretrained(results[2] / "model")
    trained = ViTPForConditionalGeneration(config).num_parameters()
    expected = traffic(config, trained, 2, accumulation, itemsize=4)["FSDP2"]
    for step in steps:
        received = sum(size / 1.5 * 0.5 for name, size in step if name in ("allgather_base", "reduce_scatter_base"))
        assert received == pytest.approx(expected, rel=0.015)
