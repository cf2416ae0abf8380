"""Evaluation of a pretraining on several processes: every row counts once, as on one."""

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput

from ..instructions.collator import NO_LABEL
from ..modeling_vitp import ViTPModel
from .batching import WholeBatchSampler, WholeBatchStream, gather_rows


class EvaluationOverProcesses:
    """Base of [`ViTPTrainer`], before [`~trl.SFTTrainer`], whose processes may have batches of other sizes, or none."""

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler:
        """In order: what is scored needs no grouping, and no row counts twice where the last batch is uneven."""
        args = self.args
        if args.world_size == 1:
            return torch.utils.data.SequentialSampler(eval_dataset)
        batches = args.eval_batch_size, args.world_size, args.process_index, args.dataloader_drop_last
        return WholeBatchSampler(len(eval_dataset), *batches)

    def prediction_step(self, model, inputs, *args, **kwargs):
        if self.args.world_size > 1 and "pixel_values" not in inputs:
            # Where the ViT's weights are sharded, each process has to run it as often as the others.
            vitp = next(module for module in self.model.modules() if isinstance(module, ViTPModel))
            pixel_values, indices = vitp._unseen_tile()
            inputs = {**inputs, "pixel_values": pixel_values, "visual_token_indices": indices}
        num_rows = (inputs["labels"] != NO_LABEL).any(1).sum().item()
        self._num_eval_rows = len(inputs["labels"]) if num_rows else 0
        outputs = super().prediction_step(model, inputs, *args, **kwargs)
        self._eval_losses.append((outputs[0].float().item(), num_rows))
        return outputs

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._eval_losses = []
        if self.args.world_size > 1:
            batch_size = self.args.eval_batch_size  # the last ones are smaller, or empty
            self.gather_function = lambda values: gather_rows(values, self._num_eval_rows, batch_size)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.world_size > 1:
            # In one process, a batch of a stream counts as a whole one, since its length is not known.
            is_stream = isinstance(getattr(dataloader.dataset, "dataset", None), WholeBatchStream)
            whole = self.args.eval_batch_size if is_stream else 0
            rounds = zip(*gather_object([self._eval_losses]))
            counted = [(loss, max(rows, whole if rows else 0)) for batches in rounds for loss, rows in batches]
            losses = np.repeat(*map(np.array, zip(*counted))).astype(np.float32)
            finite = np.isfinite(losses)
            if self.args.logging_nan_inf_filter and finite.any():
                losses = losses[finite]
            output.metrics[f"{metric_key_prefix}_loss"] = losses.mean().item()
        return output
