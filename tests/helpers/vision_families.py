"""Tiny random vision transformers of each family, as published models lie in folders."""

import timm
import torch
from tiny_models import TEXT
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Idefics3ImageProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessor,
    Qwen3VLVisionConfig,
    Qwen3VLVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMImageProcessor,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionTransformer
from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionConfig, SmolVLMVisionTransformer

from modeling_vitp.pretraining.loading import build_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
MLP = {"intermediate_size": 48}
SIZE = {"image_size": 64, "patch_size": 16}
TIMM = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "reg_tokens": 2}
QWEN3_VL = MLP | {"hidden_size": 32, "depth": 4, "num_heads": 2, "out_hidden_size": 16, "num_position_embeddings": 16}
QWEN3_VL |= {"patch_size": 16, "deepstack_visual_indexes": [1, 2]}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
# By family: model class, configuration, image processor, and the number of tokens before the patches.
FAMILIES = {
    "dinov2": (Dinov2Model, Dinov2Config(**SHAPE, image_size=56, patch_size=14), BitImageProcessor, 1),
    "dinov2_with_registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**SHAPE, image_size=56, patch_size=14, num_register_tokens=3),
        BitImageProcessor,
        4,
    ),
    "dinov3_vit": (
        DINOv3ViTModel,
        DINOv3ViTConfig(**SHAPE, **MLP, **SIZE, num_register_tokens=3, pos_embed_rescale=None),
        ViTImageProcessor,
        4,
    ),
    "siglip_vision_model": (SiglipVisionModel, SiglipVisionConfig(**SHAPE, **MLP, **SIZE), SiglipImageProcessor, 0),
    "siglip2_vision_model": (
        Siglip2VisionModel,
        Siglip2VisionConfig(**SHAPE, **MLP, num_patches=16, patch_size=16),
        Siglip2ImageProcessor,
        0,
    ),
    "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig(**SHAPE, **MLP, **SIZE), CLIPImageProcessor, 1),
    "idefics3_vision": (
        Idefics3VisionTransformer,
        Idefics3VisionConfig(**SHAPE, **MLP, **SIZE),
        Idefics3ImageProcessor,
        0,
    ),
    "smolvlm_vision": (
        SmolVLMVisionTransformer,
        SmolVLMVisionConfig(**SHAPE, **MLP, **SIZE),
        SmolVLMImageProcessor,
        0,
    ),
    "qwen3_vl_vision": (Qwen3VLVisionModel, Qwen3VLVisionConfig(**QWEN3_VL), Qwen2VLImageProcessor, 0),
    "vit": (ViTModel, ViTConfig(**SHAPE, **MLP, **SIZE), ViTImageProcessor, 1),
    "vit_mae": (
        ViTMAEForPreTraining,
        ViTMAEConfig(**SHAPE, **MLP, **SIZE, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                     decoder_num_attention_heads=2),
        ViTImageProcessor,
        1,
    ),
    "timm_wrapper": (
        TimmWrapperModel,
        TimmWrapperConfig(
            architecture="vit_tiny_patch16_224",
            model_args=TIMM,
            pretrained_cfg={"mean": MEAN, "std": STD, "input_size": [3, 64, 64]},
        ),
        None,
        3,
    ),
}  # fmt: skip
NAMES = [*FAMILIES]


def save_vit(folder, family: str):
    """Write a random model of a family, with weights that differ from the initialization, and return it."""
    model_class, config, processor_class, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "position_embeddings" not in name or family != "vit_mae":
                weight.add_(torch.randn(weight.shape) * 0.05)
    model.save_pretrained(folder)
    if processor_class is not None:
        processor_class(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return model


def save_clip(folder) -> CLIPModel:
    """Write a whole random CLIP."""
    torch.manual_seed(0)
    vision = FAMILIES["clip_vision_model"][1].to_dict()
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=SHAPE | MLP | {"vocab_size": 50})).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return model


def save_language_model(folder):
    """Write a tiny random causal LM with its tokenizer."""
    tokenizer = build_tokenizer(["How many trees are there? There are 12 trees in the top left quarter."], 400)
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**TEXT | {"vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def library_features(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the patch tokens as the library itself computes them, without this package."""
    family = model.config.model_type
    if family == "vit_mae":
        encoder = model.vit
        encoder.config.mask_ratio = 0.0
        outputs = encoder(pixel_values, interpolate_pos_encoding=True)
        states, order = outputs.last_hidden_state[:, 1:], outputs.ids_restore
        return torch.gather(states, 1, order[..., None].expand_as(states))
    if family == "siglip2_vision_model":
        size = model.config.patch_size
        patches = torch.nn.functional.unfold(pixel_values, size, stride=size).transpose(1, 2)
        patches = patches.unflatten(2, (3, size * size)).transpose(2, 3).flatten(2)
        grid = torch.tensor([[pixel_values.shape[-2] // size, pixel_values.shape[-1] // size]] * len(pixel_values))
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        return model(patches, pixel_attention_mask=mask, spatial_shapes=grid).last_hidden_state
    if family == "qwen3_vl_vision":
        patches, grids = blocks_of_patches(pixel_values)
        rows, columns = grids[0, 1:].tolist()
        states = model(patches, grids).last_hidden_state.unflatten(0, (-1, rows // 2, columns // 2, 2, 2))
        return states.transpose(2, 3).flatten(1, 4)
    if family == "timm_wrapper":
        vit = timm.create_model(model.config.architecture, num_classes=0, **TIMM, dynamic_img_size=True)
        vit.load_state_dict(model.timm_model.state_dict())
        return vit.eval().forward_features(pixel_values)[:, 3:]
    options = {} if family.startswith(("dinov", "idefics3", "smolvlm")) else {"interpolate_pos_encoding": True}
    return model(pixel_values, **options).last_hidden_state[:, FAMILIES[family][3] :]


def blocks_of_patches(pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the patches of images as Qwen3-VL takes them, two by two, and the grid of each image.

    A patch has its pixels twice, as two frames of a video.
    """
    number, _, height, width = pixel_values.shape
    patches = []
    for image in pixel_values:
        for top in range(0, height, 32):
            for left in range(0, width, 32):
                for row in (top, top + 16):
                    for column in (left, left + 16):
                        patch = image[:, row : row + 16, column : column + 16]
                        patches.append(torch.stack([patch, patch], dim=1).flatten())
    return torch.stack(patches), torch.tensor([[1, height // 16, width // 16]] * number)
