"""Training configuration of pretraining."""

from dataclasses import dataclass

from trl import SFTConfig

from ..training.config import BaseConfig
from .arguments import VRLArguments


@dataclass
class ViTPTrainingConfig(VRLArguments, BaseConfig, SFTConfig):
    """[`~trl.SFTConfig`] with VRL and with defaults for ViTP: 4,096 tokens, and bf16 on hardware that supports it."""

    unsupported = {
        "ignore_data_skip": "rows would be trained on twice. Remove it: skipping batches reads no images.",
        "shuffle_dataset": "data sets and streams are shuffled in every epoch. Remove it; "
        "train_sampling_strategy: sequential keeps their order.",
        "packing": "a step has fixed rows. Remove it; padding_free trains without padding.",
        "eval_packing": "rows have images. Remove it.",
        "use_liger_kernel": "only logits of answers are computed. Remove it.",
        "pad_token": "it would be ignored. Set pad_token of the tokenizer.",
        "router_aux_loss_coef": "the loss is computed on answers only, without a loss of the router. Remove it.",
        "label_smoothing_factor": "it is for image classification. Remove it.",
    }

    def __post_init__(self):
        # The collator encodes rows with their images. TRL would tokenize a text-only data set in advance.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        if self.completion_only_loss is False:
            raise ValueError(
                "completion_only_loss=False is not supported: the loss is computed on answers only. Remove it."
            )
        if self.chat_template_path and not self.chat_template_path.endswith((".jinja", ".j2")):
            raise ValueError(f"Expected chat_template_path to be a .jinja file, got {self.chat_template_path!r}.")
        if self.padding_free and self.neftune_noise_alpha:
            raise ValueError(
                "padding_free=True: neftune_noise_alpha would be scaled by the total length of all samples. Remove one "
                "of the two."
            )
        self.loss_type = self.loss_type or "nll"  # without it, TRL 1.14 replaces the model's forward pass
        super().__post_init__()
        if self.activation_offloading and self.use_cpu:
            raise ValueError(
                "activation_offloading=True needs an accelerator, but training runs on the CPU. Remove it."
            )
        # Dispatching would slice all tensors of a batch by rows, but the first dimension of tiles is not rows.
        self.accelerator_config.dispatch_batches = False
