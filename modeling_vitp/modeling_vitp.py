"""ViTP models: transformers' InternVL with stochastic depth in the ViT and with visual tokens gathered for VRL.

Every class overrides only what differs from its parent, and keeps the parent's parameter names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.auto import AutoModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import Dinov3ViTDropPath
from transformers.models.internvl.modeling_internvl import (
    InternVLCausalLMOutputWithPast,
    InternVLModelOutputWithPast,
    InternVLMultiModalProjector,
    InternVLVisionEmbeddings,
    InternVLVisionEncoder,
    InternVLVisionLayer,
    InternVLVisionModelOutputWithPooling,
    InternVLVisionPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .configuration_vitp import ViTPConfig, ViTPVisionConfig, patch_grid
from .opening import NamesItsFiles, naming, way_to_vit
from .vision_towers import TimmTower, pair, tower_of
from .vrl import flat_indices

# Model types that may be mistaken for a checkpoint of ours. Their parameters have other names, which transformers only
# reports: the model would keep its random weights.
LANGUAGE_MODELS = {"vitp": "ViTP's", "internvl": "transformers' InternVL", "internvl_chat": "InternVL's own code"}
VISION_MODELS = {"vitp_vision", "internvl_vision", "vitp_backbone"}
READ_POSITIONS = {"eager", "sdpa", "flex_attention"}  # detect packed sequences by their positions
CACHE = "cache" if "cache" in InternVLModelOutputWithPast.__dataclass_fields__ else "past_key_values"  # older name
SCORED_AT_ONCE = 512  # tokens whose float32 logits are in memory at a time
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class CheckpointsOfOurs(NamesItsFiles):
    """Mixin for models whose `from_pretrained` refuses checkpoints of another model type."""

    opens = frozenset()  # accepted model types besides its own

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a model from a folder or Hub id, as in transformers.

        Raises:
            ValueError: if the checkpoint is of another model type, whose weights have other names (a vision-language
                model for the ViT, a detector for its backbone …), or if a file, which is named, is damaged.
        """
        if pretrained_model_name_or_path is not None:
            options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            with naming(pretrained_model_name_or_path, cls):
                check_kind(cls, pretrained_model_name_or_path, options)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the model, as in transformers, with the names of its parameters."""
        # The older names of some ViTs, which transformers would write, are missed when a Trainer resumes.
        kwargs.setdefault("save_original_format", False)
        # FSDP2 makes the model an instance of a class of torch, whose code would be saved in place of the model's.
        sharded_class = type(self)
        for model_class in sharded_class.__mro__:
            if not model_class.__module__.startswith("torch."):
                sharded_class.__name__ = model_class.__name__
                sharded_class.__module__ = model_class.__module__
                break
        super().save_pretrained(save_directory, *args, **kwargs)


class TaskModel(CheckpointsOfOurs):
    """Base class of the models of tasks on a ViT, whose configuration has a `backbone_config`."""

    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def requested_outputs(self, kwargs: dict[str, Any]) -> dict[str, bool]:
        """Return whether hidden states and attentions are requested, by a call or else by the configuration."""
        requested = {}
        for name in ("output_hidden_states", "output_attentions"):
            requested[name] = kwargs.get(name)
            if requested[name] is None:
                requested[name] = getattr(self.config, name)
        return requested


def build_vit(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a ViT with random weights: a [`ViTPVisionModel`], or transformers' model of another family."""
    if config.model_type == ViTPVisionConfig.model_type:
        return ViTPVisionModel._from_config(config)
    vit = AutoModel.from_config(config)
    tower = tower_of(config)
    tower.freeze_unused(vit)
    # Some families name blocks of their whole model, such as the text embeddings of CLIP, which FSDP would not find,
    # or parts of a layer.
    first_layer = vit.get_submodule(tower.layers)[0]
    vit._no_split_modules = {type(first_layer).__name__}
    return vit


def check_kind(cls: type, name: str, options: dict) -> None:
    """Raise a `ValueError` with advice if `name`, a folder or Hub id, holds a model of another type."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name, **options)
    except OSError:  # reported by the loading itself, unless no config.json is needed (an adapter, one file)
        return
    model_type = fields.get("model_type")
    own_type = cls.config_class.model_type
    other_vit = (fields.get("vit_config") or {}).get("model_type")
    if model_type in (None, own_type) or (model_type in cls.opens and other_vit is None):
        return
    if own_type == ViTPConfig.model_type and model_type in VISION_MODELS:
        raise ValueError(f"{name} is a ViT alone ({model_type!r}), without the language model of {cls.__name__}.")
    if own_type == ViTPConfig.model_type and model_type in LANGUAGE_MODELS:
        raise ValueError(
            f"{name} is a checkpoint of {LANGUAGE_MODELS[model_type]}, whose parameter names differ from those of "
            f"{cls.__name__}. Convert it with `vitp convert {name} FOLDER`, and load FOLDER."
        )
    kind = repr(model_type)
    if model_type in LANGUAGE_MODELS:
        kind = f"vision-language model ({LANGUAGE_MODELS[model_type]})"
    elif other_vit is not None:
        kind = f"{model_type!r} on a {other_vit!r}"
    raise ValueError(f"{name} is a {kind}, but {cls.__name__} loads a {own_type!r}. {way_to_vit(name, fields)}")


class ViTPVisionLayer(InternVLVisionLayer):
    """InternVL's ViT block with stochastic depth on both residual branches (sampled per tile, in training only)."""

    def __init__(self, config: ViTPVisionConfig, drop_path_rate: float = 0.0):
        super().__init__(config)
        self.drop_path = Dinov3ViTDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        attention_output, _ = self.attention(self.layernorm_before(hidden_states))
        hidden_states = self.drop_path(self.lambda_1 * attention_output) + hidden_states

        layer_output = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return self.drop_path(self.lambda_2 * layer_output) + hidden_states


class ViTPVisionEncoder(InternVLVisionEncoder):
    """InternVL's ViT encoder with stochastic depth that increases linearly over the layers."""

    def __init__(self, config: ViTPVisionConfig):
        super(InternVLVisionEncoder, self).__init__()
        self.config = config
        depth = config.num_hidden_layers
        self.layer = nn.ModuleList()
        for index in range(depth):
            drop_path_rate = config.drop_path_rate * index / max(depth - 1, 1)
            self.layer.append(ViTPVisionLayer(config, drop_path_rate))
        self.gradient_checkpointing = False


class ViTPVisionPreTrainedModel(CheckpointsOfOurs, InternVLVisionPreTrainedModel):
    """Base class of the ViT models."""

    opens = VISION_MODELS
    config: ViTPVisionConfig
    config_class = ViTPVisionConfig
    base_model_prefix = "vitp_vision"
    input_modalities = ("image",)
    _no_split_modules = ["ViTPVisionLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, InternVLVisionEmbeddings):
            # The parent sets both to zero, so that a ViT trained from scratch could not tell positions apart.
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)


def final_norm(config: ViTPVisionConfig) -> nn.Module:
    """Return the norm after the last layer."""
    if config.use_mean_pooling:
        return nn.Identity()
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class ViTPVisionModel(ViTPVisionPreTrainedModel, InternVLVisionModel):
    """ViT of ViTP, the part that is kept after pretraining. A neck in the folder is not loaded."""

    opens = VISION_MODELS | {"vitp_adapter", "vitp_feature_pyramid"}

    def __init__(self, config: ViTPVisionConfig):
        super(InternVLVisionModel, self).__init__(config)
        self.embeddings = InternVLVisionEmbeddings(config)
        self.encoder = ViTPVisionEncoder(config)
        self.layernorm = final_norm(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.BoolTensor | None = None,
        **kwargs,
    ) -> tuple | InternVLVisionModelOutputWithPooling:
        r"""Encode images.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_tiles, num_channels, height, width)`):
                Normalized images; height and width are multiples of the patch size.
            bool_masked_pos (`torch.BoolTensor` of shape `(num_tiles, num_patches)`, *optional*):
                Patches to replace by the mask token.

        Returns:
            `last_hidden_state` of shape `(num_tiles, 1 + num_patches, hidden_size)`, the CLS token first, and
            `pooler_output` of shape `(num_tiles, hidden_size)`, the mean of the patch tokens.
        """
        kwargs["return_dict"] = True
        outputs = super().forward(pixel_values, bool_masked_pos=bool_masked_pos, **kwargs)
        return InternVLVisionModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state[:, 1:].mean(dim=1),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ViTPModel(CheckpointsOfOurs, InternVLModel):
    """Vision-language model without the LM head: vision model, projector and language model."""

    config: ViTPConfig
    config_class = ViTPConfig
    input_modalities = ("image", "text")

    def __init__(self, config: ViTPConfig):
        super(InternVLModel, self).__init__(config)
        self.vision_tower = build_vit(config.vision_config)
        self.multi_modal_projector = InternVLMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        visual_token_indices: torch.LongTensor | None = None,
        visible_token_indices: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        r"""Return the projected visual tokens of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_tiles, num_channels, height, width)`):
                Tiles of all images of the batch, in order. Height and width may differ.
            visual_token_indices (`torch.LongTensor` of shape `(num_kept,)`, *optional*):
                Indices of the `num_tiles * tokens_per_tile` visual tokens that VRL keeps. They are gathered before the
                projector, which therefore processes only these.
            visible_token_indices (`torch.LongTensor` of shape `(num_tiles, num_visible)`, *optional*):
                Indices of the visual tokens of each tile, those of `visual_token_indices` among them, whose patches
                the vision model computes. Other patches are dropped before its first layer.

        Returns:
            Outputs of the vision model, with the projected visual tokens as `pooler_output`, of shape
            `(num_tiles, tokens_per_tile, text_hidden_size)`, or with VRL `(num_kept, 1, text_hidden_size)`: each
            token is a group, so that `generate` can assign tokens to samples when it expands the batch for beam search.
        """
        tower = tower_of(self.config.vision_config)
        pixel_values = pixel_values.to(dtype=self.dtype)
        if visible_token_indices is not None:
            if vision_feature_layer != -1:
                raise ValueError(
                    f"Expected vision_feature_layer=-1, got {vision_feature_layer}: patches are dropped for the "
                    "features of the last layer alone. Set patch_drop_ratio=0."
                )
            return self._visible_features(pixel_values, visual_token_indices, visible_token_indices)
        if vision_feature_layer != -1:
            if isinstance(tower, TimmTower):
                raise ValueError(
                    f"Expected vision_feature_layer=-1, got {vision_feature_layer}: timm returns other layers as maps "
                    "without prefix tokens."
                )
            kwargs["output_hidden_states"] = True
        vision_outputs = tower.run(
            self.vision_tower,
            pixel_values,
            return_dict=True,
            **kwargs,
        )
        if vision_feature_layer == -1:
            features = vision_outputs.last_hidden_state
        else:
            features = vision_outputs.hidden_states[vision_feature_layer].contiguous()  # those of SigLIP are not
        if vision_feature_select_strategy == "default":
            first_patch = tower.num_prefix_tokens(self.config.vision_config)
            features = features[:, first_patch:]

        grid = self._grid(pixel_values)
        features = features.unflatten(1, grid)
        features = self.pixel_shuffle(features, scale_factor=self.config.downsample_ratio)
        features = features.reshape(features.shape[0], -1, features.shape[-1])
        if visual_token_indices is not None:
            indices = visual_token_indices.to(features.device)
            features = features.flatten(0, 1).index_select(0, indices).unsqueeze(1)
        return BaseModelOutputWithPooling(
            last_hidden_state=vision_outputs.last_hidden_state,
            pooler_output=self.multi_modal_projector(features),
            hidden_states=vision_outputs.hidden_states,
            attentions=getattr(vision_outputs, "attentions", None),
        )

    def _visible_features(
        self,
        pixel_values: torch.Tensor,
        visual_token_indices: torch.LongTensor | None,
        visible_token_indices: torch.LongTensor,
    ) -> BaseModelOutputWithPooling:
        """Return the outputs of [`get_image_features`] if patches are dropped before the vision model."""
        tower = tower_of(self.config.vision_config)
        grid = self._grid(pixel_values)
        # The pixel shuffle of the patches' indices gives the patches of each token, in the order of its channels.
        patches = torch.arange(grid[0] * grid[1], device=pixel_values.device).view(1, *grid, 1)
        patches_of_token = self.pixel_shuffle(patches, scale_factor=self.config.downsample_ratio).flatten(0, 2)
        visible_tokens = visible_token_indices.to(pixel_values.device)
        visible_patches = patches_of_token[visible_tokens]
        # All tiles keep the same number of patches, so a plain tensor is a batch without padding.
        states = tower.encode_patches(self.vision_tower, pixel_values, visible_patches.flatten(1))
        first_patch = tower.num_prefix_tokens(self.config.vision_config)
        features = states[:, first_patch:].unflatten(1, visible_patches.shape[1:]).flatten(2)
        if visual_token_indices is not None:
            visible_indices = flat_indices(visible_tokens, len(patches_of_token))
            positions = torch.searchsorted(visible_indices, visual_token_indices.to(pixel_values.device))
            features = features.flatten(0, 1).index_select(0, positions).unsqueeze(1)
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=self.multi_modal_projector(features),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        visual_token_indices: torch.LongTensor | None = None,
        visible_token_indices: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> tuple | InternVLModelOutputWithPast:
        r"""Run the model on token ids and images.

        Args:
            visual_token_indices (`torch.LongTensor` of shape `(num_kept,)`, *optional*):
                Visual tokens that VRL keeps, as ascending flat indices over the batch's tiles times tokens per tile.
                `input_ids` has one image token for each, and `position_ids` has their positions in the full sequence.
                [`ViTPProcessor`] returns all three.
            visible_token_indices (`torch.LongTensor` of shape `(num_tiles, num_visible)`, *optional*):
                Visual tokens of each tile whose patches the vision model computes, see [`get_image_features`]. Defaults
                to all.

        A sequence with gaps in its `position_ids` is one sequence, also without an `attention_mask`. With a cache, the
        tokens that follow it also need `position_ids`. Packed rows are marked by `cu_seq_lens_q` and related arguments,
        which FlashAttention reads, see [`ViTPDataCollator`].

        Raises:
            ValueError: if image tokens have no images, sequences cannot be recognized by their positions, or packed
                sequences would attend to one another.

        In training, the ViT also runs on text-only batches, on a tile whose tokens are all dropped. Logits and
        gradients do not change, but the ViT's gradients are zeros rather than `None`: processes without images take
        part in the reduction of the gradients (DDP, FSDP2, ZeRO), and the updates do not depend on the number of
        processes.
        """
        cache = cache_in(kwargs)
        if position_ids is None:
            check_continuation(cache)
        is_packed = kwargs.get("cu_seq_lens_q") is not None
        if is_packed:
            self._check_packed_attention()
        elif attention_mask is None and cache is None:
            # Without a mask, transformers would take gaps in the positions for the borders of packed sequences.
            if visual_token_indices is not None or has_gaps(position_ids):
                check_no_restart(position_ids)
                tokens = input_ids if input_ids is not None else inputs_embeds
                attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        has_images = pixel_values is not None or (mm_encoder_outputs or {}).get("image")
        if not has_images and input_ids is not None:
            self._check_no_image_tokens(input_ids, cache)
        if pixel_values is None and mm_encoder_outputs is None and self.training and torch.is_grad_enabled():
            pixel_values, visual_token_indices = self._unseen_tile()
        if pixel_values is not None and (visual_token_indices is not None or mm_encoder_outputs is None):
            # The ViT runs before the embeddings in any batch: FSDP and ZeRO-3 gather weights in the order of their use,
            # which must be the same in all processes.
            image_outputs = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                visual_token_indices=visual_token_indices,
                visible_token_indices=visible_token_indices,
                return_dict=True,
            )
            mm_encoder_outputs = {**(mm_encoder_outputs or {}), "image": image_outputs}
            pixel_values = None
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        if CACHE in outputs and has_gaps(position_ids):
            outputs[CACHE].positions_have_gaps = True
        return outputs

    def _check_packed_attention(self) -> None:
        """Raise a `ValueError` if the attention of the language model detects packed sequences by their positions."""
        attention = self.config.text_config._attn_implementation
        if attention in READ_POSITIONS:
            raise ValueError(
                f"cu_seq_lens_q marks packed sequences, but attention {attention!r} of the language model detects them "
                "by their positions, in which VRL leaves gaps. Train with ViTPTrainer and padding_free, or with "
                "attn_implementation='flash_attention_2'."
            )

    def _check_no_image_tokens(
        self,
        input_ids: torch.LongTensor,
        cache: Cache | None,
    ) -> None:
        """Raise a `ValueError` if a new sequence has image tokens, but no images were passed."""
        if torch.compiler.is_compiling() or (cache is not None and cache.get_seq_length() > 0):
            return  # generated tokens may be of any kind
        count = (input_ids == self.config.image_token_id).sum().item()
        if count:
            raise ValueError(
                f"Image features and image tokens do not match: input_ids have {count} image tokens, but pixel_values "
                "are missing. Pass all outputs of the processor."
            )

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Return the number of patches of a tile in height and width."""
        size = tuple(pixel_values.shape[-2:])
        ratio = self.config.downsample_ratio
        height, width = patch_grid(self.config.vision_config, size)
        if height * ratio % 1 or width * ratio % 1:
            raise ValueError(
                f"Tiles of {size[0]} x {size[1]} pixels have {height} x {width} patches, which must be divisible into "
                f"whole visual tokens by downsample_ratio={ratio}. Set a size of the image processor with an even "
                "number of patches (for a ratio of 0.5)."
            )
        return height, width

    def _unseen_tile(self) -> tuple[torch.Tensor, torch.LongTensor]:
        """Return a black tile as `pixel_values`, and `visual_token_indices` that drop all of its tokens."""
        config = self.config.vision_config
        device = self.get_input_embeddings().weight.device
        height, width = pair(config.image_size)
        pixel_values = torch.zeros(1, config.num_channels, height, width, device=device)
        visual_token_indices = torch.zeros(0, dtype=torch.long, device=device)
        return pixel_values, visual_token_indices


def cache_in(arguments: Mapping[str, Any]) -> Cache | None:
    """Return the key-value cache among arguments, which older transformers calls `past_key_values`."""
    if arguments.get("cache") is not None:
        return arguments["cache"]
    return arguments.get("past_key_values")


def check_continuation(cache: Cache | None) -> None:
    """Raise a `ValueError` if positions would be counted from the length of a sequence that VRL has shortened."""
    if not getattr(cache, "positions_have_gaps", False):
        return
    if cache.get_seq_length() > 0:
        raise ValueError(
            "The sequence in the cache was shortened by VRL, so the position of the next token does not follow from "
            "its length. Pass position_ids that continue from the last position of each prompt (`generate`: those of "
            "the whole sequence)."
        )
    cache.positions_have_gaps = False  # the cache was reset


def has_gaps(position_ids: torch.LongTensor | None) -> bool:
    """Return whether there are gaps in the positions of a row, as VRL leaves them; not known while compiling."""
    if position_ids is None or torch.compiler.is_compiling():
        return False
    return bool((position_ids.diff() > 1).any())


def check_no_restart(position_ids: torch.LongTensor | None) -> None:
    """Raise a `ValueError` if the positions of a row restart, as in packed rows. Not checked while compiling."""
    if position_ids is None or torch.compiler.is_compiling():
        return
    if (position_ids.diff() < 1).any():
        raise ValueError(
            "position_ids have gaps, as VRL leaves them, and also restart. Pass the attention_mask for padded rows, or "
            "cu_seq_lens_q for packed sequences."
        )


@dataclass
class ViTPAnswerScores(ModelOutput):
    """Scores of the tokens that have a label, each of shape `(num_answer_tokens,)`.

    Args:
        log_probs (`torch.FloatTensor`): log-probability of the label.
        entropy (`torch.FloatTensor`): entropy of the prediction in nats, without a gradient.
        is_top1 (`torch.BoolTensor`): whether the most likely token is the label.
    """

    log_probs: torch.FloatTensor | None = None
    entropy: torch.FloatTensor | None = None
    is_top1: torch.BoolTensor | None = None


def answer_positions(labels: torch.LongTensor) -> torch.LongTensor:
    """Return the indices of labels in the flattened `labels[:, 1:]`, int64 of shape `(num_answer_tokens,)`."""
    return (labels[:, 1:] != -100).flatten().nonzero()[:, 0]


def score_tokens(logits: torch.Tensor, labels: torch.LongTensor) -> ViTPAnswerScores:
    """Score labels by float32 logits, in chunks that are recomputed in the backward pass.

    Args:
        logits: of shape `(num_tokens, vocab_size)`.
        labels: of shape `(num_tokens,)`.
    """
    log_probs = []
    entropy = []
    is_top1 = []
    for some_logits, some_labels in zip(logits.split(SCORED_AT_ONCE), labels.split(SCORED_AT_ONCE)):
        some_log_probs, some_entropy, some_is_top1 = checkpoint(
            score_chunk,
            some_logits,
            some_labels,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        log_probs.append(some_log_probs)
        entropy.append(some_entropy)
        is_top1.append(some_is_top1)
    return ViTPAnswerScores(torch.cat(log_probs), torch.cat(entropy), torch.cat(is_top1))


def score_chunk(logits: torch.Tensor, labels: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor, torch.BoolTensor]:
    """Return the log-probabilities of labels, the entropies, and whether each label is the most likely token."""
    log_probs = logits.float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        is_top1 = log_probs.argmax(-1) == labels
    return log_probs.gather(-1, labels[:, None])[:, 0], entropy, is_top1


class ViTPForConditionalGeneration(CheckpointsOfOurs, InternVLForConditionalGeneration):
    """Vision-language model that ViTP trains end to end. After pretraining, its vision tower is kept."""

    config: ViTPConfig
    config_class = ViTPConfig
    input_modalities = ("image", "text")

    def __init__(self, config: ViTPConfig):
        super(InternVLForConditionalGeneration, self).__init__(config)
        self.model = ViTPModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _prepare_position_ids_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict,
    ) -> torch.LongTensor:
        check_continuation(cache_in(model_kwargs))
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        # An assistant model (assisted generation) is not told that a sequence begins, and would not receive the images.
        cache = cache_in(kwargs)
        is_whole = next_sequence_length in (None, input_ids.shape[1])
        begins = is_first_iteration or (is_whole and cache is not None and cache.get_seq_length() == 0)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=begins,
            **kwargs,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        visual_token_indices: torch.LongTensor | None = None,
        visible_token_indices: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        answer_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple | InternVLCausalLMOutputWithPast | ViTPAnswerScores:
        r"""Compute logits and, with `labels`, the loss.

        Args:
            visual_token_indices (`torch.LongTensor` of shape `(num_kept,)`, *optional*):
                Visual tokens that VRL keeps, see [`ViTPModel.forward`]. Defaults to all.
            visible_token_indices (`torch.LongTensor` of shape `(num_tiles, num_visible)`, *optional*):
                Visual tokens whose patches the vision model computes, see [`ViTPModel.forward`]. Defaults to all.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Targets, one for each of `input_ids`; -100 is ignored.
            cache, past_key_values (`Cache`, *optional*):
                Keys and values of the previous tokens, under the name of newer or of older transformers.
            answer_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Targets instead of `labels`, for training: only tokens with a label are scored, other logits are not
                computed. Returns [`ViTPAnswerScores`].
        """
        # Both are in the signature, because `generate` validates its arguments against it.
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values  # newer releases accept it with a warning
        if cache is not None:
            kwargs[CACHE] = cache
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "visual_token_indices": visual_token_indices,
            "visible_token_indices": visible_token_indices,
            "mm_encoder_outputs": mm_encoder_outputs,
            **kwargs,
        }
        if answer_labels is None:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **inputs)
        hidden_states = self.model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
        positions = answer_positions(answer_labels)
        logits = self.lm_head(hidden_states[positions])
        labels_at_positions = answer_labels[:, 1:].flatten()[positions]
        return score_tokens(logits, labels_at_positions)


__all__ = ["ViTPForConditionalGeneration", "ViTPModel", "ViTPVisionModel"]
