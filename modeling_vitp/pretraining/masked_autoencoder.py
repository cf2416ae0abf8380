"""Masked autoencoder of a ViT, a baseline of the pretraining: the same images, equal compute, no labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings, ViTMAEModelOutput

from ..command.settings import Interval, NonNegativeFloat, Probability, Share
from ..configuration_vitp import patch_grid
from ..convert.export import image_processor_of
from ..convert.tensor_files import check_finite
from ..modeling_vitp import CheckpointsOfOurs, build_vit
from ..modeling_vitp_backbone import open_vit, resize_backbone
from ..training import results
from ..training.checkpointing import check_free
from ..training.costs import count_operations
from ..vision_towers import pair, tower_of
from .distillation import ImageFiles, ViewConfig, ViTTrainer


@dataclass
class MaskedAutoencoderConfig(ViewConfig, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the crops, flips and optimizer of a masked autoencoder."""

    crop_area: list[Share] = field(default_factory=lambda: [0.2, 1.0])
    vertical_flip: Probability = 0.5
    learning_rate: NonNegativeFloat = 1.5e-4
    adam_beta2: Annotated[float, Interval("[0, 1)")] = 0.95


class VisiblePatches(nn.Module):
    """ViT that sees a random share of the patches of each image.

    Masked patches are removed after the embedding, so the layers run on visible patches only.

    Args:
        vit: ViT to train, of any family, see [`~modeling_vitp.register_tower`].
        config: configuration with `mask_ratio` and the width of the output norm. The norm belongs to the decoder and is
            discarded with it. Only ViTs without a final norm have it, such as InternVL's.
    """

    random_masking = ViTMAEEmbeddings.random_masking

    def __init__(self, vit: PreTrainedModel, config: ViTMAEConfig):
        super().__init__()
        self.config = config
        self.vit = vit
        norm_name = tower_of(vit.config).norm
        has_norm = norm_name is not None and not isinstance(vit.get_submodule(norm_name), nn.Identity)
        layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm = nn.Identity() if has_norm else layernorm

    def forward(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None, **kwargs) -> ViTMAEModelOutput:
        tower = tower_of(self.vit.config)
        num_prefix_tokens = tower.num_prefix_tokens(self.vit.config)
        height, width = patch_grid(self.vit.config, pixel_values.shape[-2:])
        patches = torch.arange(height * width, device=pixel_values.device).expand(len(pixel_values), -1)
        visible_patches, mask, ids_restore = self.random_masking(patches[..., None], noise)
        states = tower.encode_patches(self.vit, pixel_values, visible_patches[..., 0])
        states = self.layernorm(states)
        prefix, visible = states.tensor_split([num_prefix_tokens], dim=1)
        # The decoder takes one token before the patches: no registers, and zeros for a ViT without a CLS token.
        if num_prefix_tokens > 0:
            first_token = prefix[:, :1]
        else:
            first_token = torch.zeros_like(visible[:, :1])
        return ViTMAEModelOutput(
            torch.cat([first_token, visible], dim=1),
            mask=mask,
            ids_restore=ids_restore,
        )


class MaskedAutoencoder(CheckpointsOfOurs, ViTMAEForPreTraining):
    """Masked autoencoder (He et al., arXiv 2111.06377) with a ViT of any family as its encoder.

    75% of the patches are masked. A decoder of two layers, half as wide as the ViT, predicts their pixels, normalized
    in each patch. Decoder and loss are those of transformers. The input `pixel_values` is float32 of shape
    `(batch, channels, height, width)`; the `loss` is the mean squared error over the masked patches.

    Args:
        vit: ViT, which is trained in place.

    Raises:
        ValueError: if the image or the patches of the ViT are not square, or the image is not of whole patches.
    """

    def __init__(self, vit: PreTrainedModel):
        vit_config = vit.config
        height, width = pair(vit_config.image_size)
        patch_height, patch_width = pair(vit_config.patch_size)
        if height != width or patch_height != patch_width or height % patch_height:
            raise ValueError(
                f"A masked autoencoder needs square images of whole, square patches, got {height} x {width} and "
                f"{patch_height} x {patch_width}. Resize the ViT with modeling_vitp.resize_backbone."
            )
        shared_fields = {"intermediate_size": 4 * vit_config.hidden_size}
        for name in (
            "num_channels",
            "num_attention_heads",
            "intermediate_size",
            "initializer_range",
            "layer_norm_eps",
        ):
            if hasattr(vit_config, name):
                shared_fields[name] = getattr(vit_config, name)
        config = ViTMAEConfig(
            **shared_fields,
            hidden_size=vit_config.hidden_size,
            num_hidden_layers=0,
            image_size=height,
            patch_size=patch_height,
            decoder_hidden_size=vit_config.hidden_size // 2,
            decoder_intermediate_size=shared_fields["intermediate_size"] // 2,
            decoder_num_attention_heads=vit_config.num_attention_heads,
            decoder_num_hidden_layers=2,
            mask_ratio=0.75,
            norm_pix_loss=True,
            attn_implementation=vit_config._attn_implementation,
        )
        super().__init__(config)
        # The library resets the decoder's position embeddings to zero without a checkpoint.
        self.decoder.initialize_weights((height // patch_height) ** 2)
        self.vit = VisiblePatches(vit, config)


def train_masked_autoencoder(
    start: str | Path, images: Sequence[str | Path], args: MaskedAutoencoderConfig, image_size: int | None = None
) -> dict[str, Any]:
    """Train a ViT as a masked autoencoder, and export it with its image processor to `backbone` in the output folder.

    A run that was stopped resumes from its last checkpoint in the output folder, and ends with the same weights.

    Args:
        start: folder or Hub id of an exported backbone, or of a ViT of another family.
        images: image files of any format, and folders of image files. Bands and values are read as the image processor
            of the backbone says.
        args: training arguments.
        image_size: side of the images in pixels, to which the position embeddings are interpolated. Default: that of
            the ViT.

    Returns:
        The metrics, which are also in `metrics.json`.

    Raises:
        ValueError: if an image cannot be read, or the ViT is of no known family, see also [`MaskedAutoencoder`].
    """
    check_free(args.output_dir)
    set_seed(args.seed)
    vit = open_vit(start)
    check_finite(vit.state_dict(), start)
    if image_size is not None:
        vit = resize_backbone(vit, image_size=image_size)
    image_processor = image_processor_of(start, pair(vit.config.image_size))
    dataset = ImageFiles(images, image_processor.input_spec)
    model = MaskedAutoencoder(vit)
    trainer = ViTTrainer(model, vit, args, dataset, None, image_processor, model.config.image_size)
    trainer.record(None, [str(start)], [{"name": "images without labels", "images": len(dataset)}], None)
    metrics = results.train(trainer)
    if trainer.is_world_process_zero():
        results.finish(trainer)
    return metrics


def mae_steps(config: PreTrainedConfig, batch_size: int, operations: float) -> int:
    """Return the number of steps of a masked autoencoder that take a number of floating-point operations.

    No weights are needed.

    Args:
        config: configuration of the ViT, of any family.
        batch_size: images of a step, over all devices.
        operations: floating-point operations, forward and backward, such as those of
            [`~modeling_vitp.pretraining.plan.pretraining_operations`].
    """
    config = tower_of(config).prepare(config)
    with torch.device("meta"):
        model = MaskedAutoencoder(build_vit(config)).train()
    counter = count_operations()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        pixel_values = torch.zeros(batch_size, config.num_channels, *pair(config.image_size))
        with counter:
            model(pixel_values).loss.backward()
    return max(1, round(operations / counter.get_total_flops()))
