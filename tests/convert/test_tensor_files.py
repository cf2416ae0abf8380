"""Tensor files: shards, and memory of one shard at a time."""

import json
import os
import signal
import time

import pytest
import torch
from internvl_checkpoints import native_model, save_original
from launching import finish, start_program
from safetensors import safe_open
from tiny_models import TEXT, VISION
from transformers import InternVLConfig, InternVLForConditionalGeneration

from modeling_vitp import convert_checkpoint, export_backbone
from modeling_vitp.convert.tensor_files import read_tensors


def test_shards_and_their_index_must_agree(tmp_path):
    source = save_original(native_model(), tmp_path / "source", "40KB")
    index_file = source / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    key, shard = next(iter(index["weight_map"].items()))
    del index["weight_map"][key]
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"\[\], only in the shard \['{key}'\]"):
        convert_checkpoint(source, tmp_path / "target")
    (source / shard).unlink()
    with pytest.raises(ValueError, match=f"{shard} is not a valid"):
        convert_checkpoint(source, tmp_path / "target")
    index_file.write_text("{}")
    with pytest.raises(ValueError, match="index of safetensors shards.*model.safetensors.index.json"):
        convert_checkpoint(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Peak memory of a process after its imports and after the conversion. Not ru_maxrss, which a new process inherits from
# its parent.
MEASURE = """
import pathlib, sys
import modeling_vitp.convert.checkpoint as convert
status = pathlib.Path("/proc/self/status")
peak = lambda: next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
before = peak()
convert.convert_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], image_token_id=int(sys.argv[4]) or None)
print(before, peak())
"""


@pytest.mark.slow
def test_memory_is_that_of_one_shard(tmp_path):
    """Convert 1.2 GB in 5 shards from original to ViTP (cuts `qkv`) and back (joins it)."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16}
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 6}
    with torch.device("meta"):
        config = InternVLConfig(
            vision_config={**VISION, **vision},
            text_config={**TEXT, **text, "vocab_size": 50_000},
            image_seq_length=4,
            tie_word_embeddings=False,
        )
        model = InternVLForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        if tensor.dtype == torch.bfloat16:
            tensor.view(torch.int16).random_(0, 0x3F80)  # bits of numbers from 0 to 1; empty memory may contain NaN
    source = save_original(model, tmp_path / "source", "250MB")
    del model
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    assert sum(sizes) > 1e9 and len(sizes) >= 4

    output = tmp_path / "output.txt"
    for start, target, to, token in ((source, "vitp", "vitp", 7), (tmp_path / "vitp", "back", "original", 0)):
        words = ["-c", MEASURE, start, tmp_path / target, to, token]
        assert finish([start_program(words, output)]) == [0], output.read_text()
        before, after = map(int, output.read_text().splitlines()[-1].split())
        print(f"{to}: {(after - before) / 1e6:.0f} MB beyond the start; largest shard {max(sizes) / 1e6:.0f} MB")
        assert after - before <= 1.3 * max(sizes)
    for shard in source.glob("*.safetensors"):
        with safe_open(shard, "pt") as before, safe_open(tmp_path / "back" / shard.name, "pt") as after:
            assert set(before.keys()) == set(after.keys())
            assert all(
                torch.equal(before.get_tensor(key).view(torch.int16), after.get_tensor(key).view(torch.int16))
                for key in before.keys()
            )

    # A process that is killed while writing leaves nothing that looks like a checkpoint.
    for kind in (signal.SIGTERM, signal.SIGKILL):
        words = ["-m", "modeling_vitp.convert", source, tmp_path / "killed", "--image_token_id", "7"]
        process = start_program(words, output)
        while process.is_alive() and not list(tmp_path.glob(".killed.*/killed/*.safetensors")):
            time.sleep(0.01)
        os.kill(process.pid, kind)
        process.join()
        assert process.exitcode != 0
        assert not (tmp_path / "killed").exists()
        assert bool(list(tmp_path.glob(".killed.*"))) == (kind == signal.SIGKILL)


@pytest.mark.parametrize("mode", [0o700, 0o775])
def test_weights_have_the_mode_of_their_folder(tmp_path, model, mode):
    tmp_path.chmod(mode)
    export_backbone(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode & 0o666


def test_deeply_nested_header_is_named(tmp_path):
    header = b'{"a": ' + 100_000 * b"[" + 100_000 * b"]" + b"}"
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="a.safetensors is not a valid"):
        read_tensors(tmp_path / "a.safetensors")
