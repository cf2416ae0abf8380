"""`torch_compile`: each layer of the ViT and of the language model by itself, for any length."""

from typing import Any

import torch
from transformers.models.dinov3_vit.modeling_dinov3_vit import Dinov3ViTDropPath
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings


class CompiledLayers:
    """Base of trainers, before [`~transformers.Trainer`]: with `torch_compile`, accelerate compiles regions and not the
    whole model. Layers share what was compiled for the first of them, shapes are dynamic, and random numbers are those
    of a run that is not compiled. Evaluation and checkpoints are those of the model itself, under its own names.
    """

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        args = super()._build_accelerator_args(**kwargs)
        if self.args.torch_compile:
            args["dynamo_plugin"].use_regional_compilation = args["dynamo_plugin"].dynamic = True
            torch._inductor.config.fallback_random = True
            # Stochastic depth has another rate in each layer, which would be compiled anew for it. Compiled embeddings
            # of one tile give gradients that share memory, so that what is accumulated is added to both.
            for module in self.model.modules():
                if isinstance(module, Dinov3ViTDropPath | InternVLVisionEmbeddings):
                    module.forward = torch.compiler.disable(module.forward)
        return args

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        self.model.train()  # accelerate compiles a copy, which shares layers and not the flag of what holds them
        return super().training_step(*args, **kwargs)
