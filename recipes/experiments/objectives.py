"""What else a ViT can be pretrained by, to be compared with instructions: masked pixels, and a class for each patch."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings, ViTMAEModelOutput

from modeling_vitp.modeling_vitp import ViTPVisionModel


class VisiblePatches(nn.Module):
    """A ViT that sees a share of the patches of an image, a random draw for each image.

    Masked patches are left out after their embedding, so the layers run on the visible ones alone.

    Args:
        config: for `mask_ratio` and the normalization of the output, which the decoder reads and which is thrown away
            with it: a ViT of InternVL's kind has none of its own.
    """

    random_masking = ViTMAEEmbeddings.random_masking

    def __init__(self, vit: ViTPVisionModel, config: ViTMAEConfig):
        super().__init__()
        self.config, self.vit = config, vit
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None, **kwargs) -> ViTMAEModelOutput:
        embeddings = self.vit.embeddings(pixel_values)
        visible, mask, ids_restore = self.random_masking(embeddings[:, 1:], noise)
        states = self.vit.encoder(torch.cat([embeddings[:, :1], visible], dim=1)).last_hidden_state
        states = self.layernorm(self.vit.layernorm(states))
        return ViTMAEModelOutput(last_hidden_state=states, mask=mask, ids_restore=ids_restore)


class MaskedAutoencoder(ViTMAEForPreTraining):
    """A ViT of ViTP as the encoder of a masked autoencoder (He et al., arXiv 2111.06377).

    Three patches of four are masked; a decoder of two layers, half as wide as the ViT, says what their pixels are,
    normalized in each patch. The decoder and the loss are transformers'. Calling it with `pixel_values`, float32 of
    shape `(batch, channels, height, width)`, gives a `loss`, the mean squared error over the masked patches.

    Args:
        vit: is trained in place.

    Raises:
        ValueError: if its image or its patches are not square.
    """

    def __init__(self, vit: ViTPVisionModel):
        of = vit.config
        (height, width), (patch, patch_width) = of.image_size, of.patch_size
        if height != width or patch != patch_width:
            raise ValueError(
                f"A masked autoencoder needs square images and patches; those of the ViT are {height} x {width} and "
                f"{patch} x {patch_width}."
            )
        config = ViTMAEConfig(
            hidden_size=of.hidden_size,
            num_hidden_layers=0,
            num_attention_heads=of.num_attention_heads,
            intermediate_size=of.intermediate_size,
            initializer_range=of.initializer_range,
            layer_norm_eps=of.layer_norm_eps,
            image_size=height,
            patch_size=patch,
            decoder_hidden_size=of.hidden_size // 2,
            decoder_intermediate_size=of.intermediate_size // 2,
            decoder_num_attention_heads=of.num_attention_heads,
            decoder_num_hidden_layers=2,
            mask_ratio=0.75,
            norm_pix_loss=True,
            attn_implementation=of._attn_implementation,
        )
        super().__init__(config)
        # The library zeroes what it has set before, of a decoder without a checkpoint: it would not know places.
        self.decoder.initialize_weights((height // patch) ** 2)
        self.vit = VisiblePatches(vit, config)


class PatchClassifier(nn.Module):
    """A ViT with a linear layer that says of each patch which class it is of; see [`MaskedAutoencoder`] for `vit`."""

    def __init__(self, vit: ViTPVisionModel, num_classes: int):
        super().__init__()
        self.vit = vit
        self.head = nn.Linear(vit.config.hidden_size, num_classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> TokenClassifierOutput:
        """
        Args:
            pixel_values: float32 of shape `(batch, channels, height, width)`.
            labels: classes, int64 of shape `(batch, patches)`, row by row; -100 for a patch that has none.
        """
        logits = self.head(self.vit(pixel_values=pixel_values).last_hidden_state[:, 1:])
        return TokenClassifierOutput(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)
