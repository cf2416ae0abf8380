"""ViTP models: transformers' InternVL with stochastic depth in the ViT and with visual tokens gathered for VRL.

Every class overrides only what differs from its parent, and keeps the parent's parameter names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import InternVLForConditionalGeneration, InternVLModel, InternVLVisionModel, PreTrainedConfig
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

# What a user may take for a checkpoint of ours. Its parameters have other names than ours, which transformers passes
# over with a report: the model would be left with random weights.
LANGUAGE_MODELS = {"vitp": "ViTP's", "internvl": "transformers' InternVL", "internvl_chat": "InternVL's own code"}
VISION_MODELS = {"vitp_vision", "internvl_vision", "vitp_backbone"}
READ_POSITIONS = {"eager", "sdpa", "flex_attention"}  # in transformers, to tell several sequences in one row
CACHE = "cache" if "cache" in InternVLModelOutputWithPast.__dataclass_fields__ else "past_key_values"  # by release
SCORED_AT_ONCE = 512  # tokens whose logits are in float32 at a time
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class CheckpointsOfOurs(NamesItsFiles):
    """Opening a checkpoint is an error where its names are not those of the class."""

    opens = frozenset()  # model types that it opens besides its own

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: if it holds another kind of model, whose weights have other names (a vision-language model for
                the ViT, a detector for its backbone …), or if a file is damaged, which is named.
        """
        if pretrained_model_name_or_path is not None:
            options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            with naming(pretrained_model_name_or_path, cls):
                check_kind(cls, pretrained_model_name_or_path, options)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def check_kind(cls: type, name: str, options: dict) -> None:
    """Raises a `ValueError` with the way around it if `name`, a folder or Hub id, holds a model of another kind."""
    try:
        fields = PreTrainedConfig.get_config_dict(name, **options)[0]
    except OSError:  # which loading will report, or it needs none: an adapter, one file
        return
    found, own = fields.get("model_type"), cls.config_class.model_type
    if found in (None, own) or found in cls.opens:
        return
    if own == ViTPConfig.model_type and found in VISION_MODELS:
        raise ValueError(f"{name} is a ViT alone, a {found!r}, without the language model that {cls.__name__} has.")
    if own == ViTPConfig.model_type and found in LANGUAGE_MODELS:
        raise ValueError(
            f"{name} is a checkpoint of {LANGUAGE_MODELS[found]}, whose parameters have other names than "
            f"{cls.__name__}'s. Convert it, `vitp convert {name} FOLDER`, and open FOLDER."
        )
    kind = f"{name} is a {found!r}"
    if found in LANGUAGE_MODELS:
        kind = f"{name} is a vision-language model ({LANGUAGE_MODELS[found]})"
    raise ValueError(f"{kind}, and {cls.__name__} opens a {own!r}. {way_to_vit(name, fields)}")


class ViTPVisionLayer(InternVLVisionLayer):
    """InternVL's ViT block with stochastic depth on both residual branches (drawn per tile, in training only)."""

    def __init__(self, config: ViTPVisionConfig, drop_path_rate: float = 0.0):
        super().__init__(config)
        self.drop_path = Dinov3ViTDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        attention_output, _ = self.attention(self.layernorm_before(hidden_states))
        hidden_states = self.drop_path(self.lambda_1 * attention_output) + hidden_states

        layer_output = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return self.drop_path(self.lambda_2 * layer_output) + hidden_states


class ViTPVisionEncoder(InternVLVisionEncoder):
    def __init__(self, config: ViTPVisionConfig):
        super(InternVLVisionEncoder, self).__init__()
        self.config = config
        depth = config.num_hidden_layers
        self.layer = nn.ModuleList(
            ViTPVisionLayer(config, config.drop_path_rate * index / max(depth - 1, 1)) for index in range(depth)
        )
        self.gradient_checkpointing = False


class ViTPVisionPreTrainedModel(CheckpointsOfOurs, InternVLVisionPreTrainedModel):
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
            # The parent zeroes both, which leaves a ViT that is trained from scratch blind to position.
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)


class ViTPVisionModel(ViTPVisionPreTrainedModel, InternVLVisionModel):
    """The ViT of ViTP: what pretraining keeps, as a backbone. It is opened without the neck that a folder may have."""

    opens = VISION_MODELS | {"vitp_adapter", "vitp_feature_pyramid"}

    def __init__(self, config: ViTPVisionConfig):
        super(InternVLVisionModel, self).__init__(config)
        self.embeddings = InternVLVisionEmbeddings(config)
        self.encoder = ViTPVisionEncoder(config)
        self.layernorm = (
            nn.Identity() if config.use_mean_pooling else nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.BoolTensor | None = None, **kwargs
    ) -> tuple | InternVLVisionModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(num_tiles, num_channels, height, width)`):
                Normalised images; height and width are multiples of the patch size.
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
    """Vision model, projector and language model, without the LM head."""

    config: ViTPConfig
    config_class = ViTPConfig
    input_modalities = ("image", "text")

    def __init__(self, config: ViTPConfig):
        super(InternVLModel, self).__init__(config)
        self.vision_tower = ViTPVisionModel._from_config(config.vision_config)
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
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(num_tiles, num_channels, height, width)`):
                The tiles of all images of the batch, in order. Height and width need not be equal.
            visual_token_indices (`torch.LongTensor` of shape `(num_kept,)`, *optional*):
                VRL: which of the `num_tiles * tokens_per_tile` visual tokens to keep. They are gathered before the
                projector, which therefore runs on the kept ones only.

        Returns:
            The vision model's outputs, with the projected visual tokens as `pooler_output`: of shape
            `(num_tiles, tokens_per_tile, text_hidden_size)`, or `(num_kept, 1, text_hidden_size)` under VRL. There
            each token is a group of its own, so that `generate` can tell to which sample it belongs when it expands
            the batch for beams.
        """
        if vision_feature_layer != -1:
            kwargs["output_hidden_states"] = True
        vision_outputs = self.vision_tower(pixel_values.to(dtype=self.dtype), return_dict=True, **kwargs)
        if vision_feature_layer == -1:
            features = vision_outputs.last_hidden_state
        else:
            features = vision_outputs.hidden_states[vision_feature_layer]
        if vision_feature_select_strategy == "default":
            features = features[:, 1:, :]

        grid = self._grid(pixel_values)
        features = features.unflatten(1, grid)
        features = self.pixel_shuffle(features, scale_factor=self.config.downsample_ratio)
        features = features.reshape(features.shape[0], -1, features.shape[-1])
        if visual_token_indices is not None:
            features = features.flatten(0, 1).index_select(0, visual_token_indices.to(features.device)).unsqueeze(1)
        vision_outputs.pooler_output = self.multi_modal_projector(features)
        return vision_outputs

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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> tuple | InternVLModelOutputWithPast:
        r"""
        Args:
            visual_token_indices (`torch.LongTensor` of shape `(num_kept,)`, *optional*):
                VRL: the visual tokens to keep, ascending, as flat indices over the batch's tiles times tokens per
                tile. `input_ids` holds one image token for each, and `position_ids` their positions in the full
                sequence; [`ViTPProcessor`] makes all three.

        A sequence with gaps in its `position_ids` is one sequence, also without an `attention_mask`; with a cache, what
        follows it needs `position_ids` too. Several lie end to end in one row where `cu_seq_lens_q` and the like say
        so, which FlashAttention takes, see [`ViTPDataCollator`].

        Raises:
            ValueError: if there are image tokens without images, positions from which the sequence is not clear, or
                several sequences in one row that attention would take for one.

        In training the ViT runs on text-only batches too, on a tile of which no token is kept. It changes neither
        logits nor gradients, but the ViT's gradients are zeros then and not `None`: processes that see no image take
        part in the gradient's reduction (DDP, FSDP2, ZeRO), and the optimizer treats the ViT the same on any number.
        """
        cache = cache_in(kwargs)
        if position_ids is None:
            check_continuation(cache)
        compiling = torch.compiler.is_compiling()  # when values cannot be looked at
        is_end_to_end = kwargs.get("cu_seq_lens_q") is not None
        attention = self.config.text_config._attn_implementation
        if is_end_to_end and attention in READ_POSITIONS:
            raise ValueError(
                f"cu_seq_lens_q says that there are several sequences in one row, and the language model's attention, "
                f"{attention!r}, tells them by their positions, in which VRL leaves gaps. Train with ViTPTrainer and "
                "padding_free, or with attn_implementation='flash_attention_2'."
            )
        if (
            attention_mask is None
            and cache is None
            and not is_end_to_end
            and (visual_token_indices is not None or (not compiling and jump_ahead(position_ids)))
        ):
            # Without a mask, transformers would read the gaps in the positions as borders of packed sequences.
            if not compiling and position_ids is not None and (position_ids.diff() < 1).any():
                raise ValueError(
                    "position_ids have gaps, as VRL leaves them, and also start again: give the attention_mask, which "
                    "says where rows are padded, or cu_seq_lens_q, which says where each of several sequences begins."
                )
            tokens = input_ids if input_ids is not None else inputs_embeds
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        if pixel_values is None and not (mm_encoder_outputs or {}).get("image") and input_ids is not None:
            self._check_no_image_tokens(input_ids, cache)
        if pixel_values is None and mm_encoder_outputs is None and self.training and torch.is_grad_enabled():
            pixel_values, visual_token_indices = self._unseen_tile()
        if visual_token_indices is not None and pixel_values is not None:
            mm_encoder_outputs = {
                **(mm_encoder_outputs or {}),
                "image": self.get_image_features(
                    pixel_values=pixel_values,
                    vision_feature_layer=vision_feature_layer,
                    vision_feature_select_strategy=vision_feature_select_strategy,
                    visual_token_indices=visual_token_indices,
                    return_dict=True,
                ),
            }
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
        if not compiling and cache_in(outputs) is not None and jump_ahead(position_ids):
            cache_in(outputs).positions_have_gaps = True
        return outputs

    def _check_no_image_tokens(self, input_ids: torch.LongTensor, cache: Cache | None) -> None:
        """Raises a `ValueError` if a sequence that starts here has image tokens, for which there is no image."""
        if torch.compiler.is_compiling() or (cache is not None and cache.get_seq_length() > 0):
            return  # what a model has written may be any token
        count = (input_ids == self.config.image_token_id).sum().item()
        if count:
            raise ValueError(
                f"image features and image tokens do not match: input_ids hold {count} image tokens, but there are no "
                "pixel_values. Pass all that the processor gives."
            )

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Patches of a tile, in height and width."""
        size, ratio = tuple(pixel_values.shape[-2:]), self.config.downsample_ratio
        height, width = patch_grid(self.config.vision_config, size)
        if height * ratio % 1 or width * ratio % 1:
            raise ValueError(
                f"tiles of {size[0]} x {size[1]} pixels have {height} x {width} patches, which are not joined to whole "
                f"visual tokens at downsample_ratio={ratio}: give the image processor a size with an even number of "
                "patches, at the usual ratio of 0.5."
            )
        return height, width

    def _unseen_tile(self) -> tuple[torch.Tensor, torch.LongTensor]:
        """A black tile, as `pixel_values`, and `visual_token_indices` that keep none of its tokens."""
        config, device = self.config.vision_config, self.get_input_embeddings().weight.device
        return (
            torch.zeros(1, config.num_channels, *config.image_size, device=device),
            torch.zeros(0, dtype=torch.long, device=device),
        )


def cache_in(values: Mapping[str, Any]) -> Cache | None:
    """Return the key-value cache among arguments or outputs, which older transformers calls `past_key_values`."""
    return values.get("cache") if values.get("cache") is not None else values.get("past_key_values")


def check_continuation(cache: Cache | None) -> None:
    """Raises a `ValueError` if positions would be counted from the length of a sequence that VRL has shortened."""
    if not getattr(cache, "positions_have_gaps", False):
        return
    if cache.get_seq_length() > 0:
        raise ValueError(
            "the sequence in the cache was shortened by VRL, so its length does not say at which position the next "
            "token is. Give position_ids: for each row the last one of the prompt plus 1, and so on (`generate` takes "
            "those of the whole sequence)."
        )
    cache.positions_have_gaps = False  # it was emptied


def jump_ahead(position_ids: torch.LongTensor | None) -> bool:
    """Whether there are gaps in the positions of a row, as VRL leaves them."""
    return position_ids is not None and bool((position_ids.diff() > 1).any())


@dataclass
class ViTPAnswerScores(ModelOutput):
    """Scores of the tokens that have a label, each of shape `(num_answer_tokens,)`.

    Args:
        log_probs (`torch.FloatTensor`): log-probability of the label.
        entropy (`torch.FloatTensor`): entropy of the prediction in nats, without a gradient.
        is_top1 (`torch.BoolTensor`): whether the likeliest token is the label.
    """

    log_probs: torch.FloatTensor | None = None
    entropy: torch.FloatTensor | None = None
    is_top1: torch.BoolTensor | None = None


def answer_positions(labels: torch.LongTensor) -> torch.LongTensor:
    """Return the indices of labels in the flattened `labels[:, 1:]`, int64 of shape `(num_answer_tokens,)`."""
    return (labels[:, 1:] != -100).flatten().nonzero()[:, 0]


def score_tokens(logits: torch.Tensor, labels: torch.LongTensor) -> ViTPAnswerScores:
    """Score labels by logits, in float32 and in chunks, which are computed again in the backward pass.

    Args:
        logits: of shape `(num_tokens, vocab_size)`.
        labels: of shape `(num_tokens,)`.
    """

    def score(logits: torch.Tensor, labels: torch.LongTensor) -> tuple[torch.Tensor, ...]:
        log_probs = logits.float().log_softmax(-1)
        with torch.no_grad():
            entropy, is_top1 = -(log_probs.exp() * log_probs).sum(-1), log_probs.argmax(-1) == labels
        return log_probs.gather(-1, labels[:, None])[:, 0], entropy, is_top1

    chunks = zip(logits.split(SCORED_AT_ONCE), labels.split(SCORED_AT_ONCE))
    scores = [checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return ViTPAnswerScores(*(torch.cat(parts) for parts in zip(*scores)))


class ViTPForConditionalGeneration(CheckpointsOfOurs, InternVLForConditionalGeneration):
    """The vision-language model that ViTP trains end to end; its vision tower is what is kept."""

    config: ViTPConfig
    config_class = ViTPConfig
    input_modalities = ("image", "text")

    def __init__(self, config: ViTPConfig):
        super(InternVLForConditionalGeneration, self).__init__(config)
        self.model = ViTPModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """See [`ViTPModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> torch.LongTensor:
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
        # A model that drafts for another one is never told that a sequence begins, and would not be given its images.
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
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        answer_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple | InternVLCausalLMOutputWithPast | ViTPAnswerScores:
        r"""
        Args:
            visual_token_indices (`torch.LongTensor` of shape `(num_kept,)`, *optional*):
                The visual tokens that VRL keeps, see [`ViTPModel.forward`]. All are kept if not given.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Targets, of the length of `input_ids`; -100 is ignored.
            cache, past_key_values (`Cache`, *optional*):
                Keys and values of the tokens before, under the name of newer or of older transformers.
            answer_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Instead of `labels`, in training: only the tokens that have a label are scored, and no other logits are
                computed. Returns [`ViTPAnswerScores`].
        """
        # Both are in the signature, by which `generate` checks what it is given.
        cache = past_key_values if cache is None else cache
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
            "mm_encoder_outputs": mm_encoder_outputs,
            **kwargs,
        }
        if answer_labels is None:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **inputs)
        hidden_states, positions = self.model(**inputs).last_hidden_state[:, :-1], answer_positions(answer_labels)
        logits = self.lm_head(hidden_states.flatten(0, 1)[positions])
        return score_tokens(logits, answer_labels[:, 1:].flatten()[positions])


__all__ = ["ViTPForConditionalGeneration", "ViTPModel", "ViTPVisionModel"]
