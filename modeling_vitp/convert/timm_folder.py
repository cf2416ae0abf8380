"""Export of the backbone to a folder that timm opens without this package: [`export_timm`]."""

import math
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from safetensors.torch import save_file
from torch import nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from ..cards.record import write_json
from ..image_processing_vitp import ViTPImageProcessor
from ..modeling_vitp import VISION_MODELS
from ..modeling_vitp_backbone import open_vit
from ..opening import read_config_fields
from .export import check_output_dir, open_trained_vision_model, replace_record, save_image_processor
from .keys import VISION_TOWER, arrange_tensors
from .tensor_files import SINGLE_FILE, open_like_folder

ARCHITECTURE = "vit_intern300m_patch14_448"  # entry of timm's registry; `model_args` set any other shape
MODEL_TYPE = "timm_wrapper"  # of transformers, whose `AutoModel` opens timm's folders too
NORM_LAYERS = {"layer_norm": "layernorm", "rms_norm": "rmsnorm"}
# Only values that timm's `VisionTransformer` has too. It normalizes queries and keys by head, InternViT over all heads.
NEEDED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_qk_norm": False,
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}


def export_timm(
    model: nn.Module | str | Path,
    output_dir: str | Path,
    image_processor: ViTPImageProcessor | None = None,
    allow_nan: bool = False,
) -> Path:
    """Write the vision tower of a model to a folder that `timm.create_model("local-dir:FOLDER")` opens.

    On the Hub, it is `hf-hub:ID`. The model returns the mean of the patch tokens, of shape `(batch, hidden_size)`, and
    with `features_only=True` the maps of [`ViTPBackbone`]. timm is not needed to write the folder.

    At the image size of the configuration, the features are those of this package within rounding. At other sizes they
    differ slightly, because timm interpolates the position embeddings with antialiasing.

    Args:
        model: model, folder or Hub id, as in [`export_backbone`], or an exported backbone.
        output_dir: folder to write, created if missing. An existing export of this function is replaced.
        image_processor: image processor of the training, as in [`export_backbone`].
        allow_nan: whether weights that are NaN or infinite are written. They raise an error by default.

    Returns:
        `output_dir` as a path.

    Raises:
        ValueError: in the cases of [`export_backbone`], and if timm's `VisionTransformer` lacks a setting of the ViT.
    """
    check_output_dir(output_dir, MODEL_TYPE)
    source = model
    if isinstance(model, (str, Path)):
        if read_config_fields(model).get("model_type") in VISION_MODELS:
            image_processor = image_processor or ViTPImageProcessor.from_pretrained(model)
            model = open_vit(model, dtype="auto")
    vision_model, image_processor = open_trained_vision_model(model, image_processor, allow_nan)
    if not isinstance(vision_model, InternVLVisionModel):
        raise ValueError(
            f"Expected an InternViT for the format of timm, got a {vision_model.config.model_type!r}. Export it for "
            "transformers instead (--format transformers); a ViT of timm is opened by timm then too."
        )
    config = timm_config(vision_model.config, image_processor)

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save_file(weights_in_layout(vision_model, "timm"), folder / SINGLE_FILE, {"format": "pt"})
    open_like_folder(folder)
    save_image_processor(folder, vision_model.config, image_processor)
    replace_record(source, folder)
    return folder


def timm_config(config: InternVLVisionConfig, image_processor: ViTPImageProcessor) -> dict[str, Any]:
    """Return timm's `config.json` of a ViT. Raise a `ValueError` if timm lacks one of its settings."""
    fields = {
        "architecture": ARCHITECTURE,
        "model_type": MODEL_TYPE,
        "num_classes": 0,
        "num_features": config.hidden_size,
        "model_args": timm_model_args(config),
        "pretrained_cfg": {
            "input_size": [config.num_channels, *config.image_size],
            "mean": [*image_processor.image_mean],
            "std": [*image_processor.image_std],
            "interpolation": Resampling(image_processor.resample).name.lower(),
            "crop_pct": 1.0,
            "crop_mode": "squash",  # to one tile, without cropping, as the image processor
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    band_names = getattr(config, "band_names", None)
    if band_names is not None:
        fields["band_names"] = [*band_names]
    return fields


def timm_model_args(config: InternVLVisionConfig) -> dict[str, Any]:
    """Return the arguments of timm's `VisionTransformer` for the shape of a ViT.

    Raises:
        ValueError: if the ViT has a setting that `VisionTransformer` lacks.
    """
    for name, only_value in NEEDED.items():
        value = getattr(config, name)
        if value != only_value:
            raise ValueError(
                f"Expected {name}={only_value!r}, the only value that timm's VisionTransformer supports, got "
                f"{value!r}. Export the backbone for transformers instead (--format transformers)."
            )
    width = config.hidden_size
    ratio = config.intermediate_size / width
    # timm multiplies and truncates, which may give one less than the intermediate size.
    if int(width * ratio) < config.intermediate_size:
        ratio = math.nextafter(ratio, math.inf)
    return {
        "img_size": [*config.image_size],
        "patch_size": [*config.patch_size],
        "in_chans": config.num_channels,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.attention_bias,
        "norm_layer": NORM_LAYERS[config.norm_type],
        "final_norm": False,
        "global_pool": "avg",
        "dynamic_img_size": True,
        "dynamic_img_pad": True,  # as `ViTPBackbone`
    }


def weights_in_layout(model: InternVLVisionModel, layout: str) -> dict[str, torch.Tensor]:
    """Return the weights of a ViT under the names of a layout of `keys.py`, with its fused queries, keys and values."""
    named_weights = {VISION_TOWER + name: weight for name, weight in model.state_dict().items()}
    blocks_by_key = arrange_tensors(named_weights, layout)
    return {key: torch.cat(blocks) for key, blocks in blocks_by_key.items()}
