"""The head of the language model where FSDP2 shards it."""

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


def gather_head_before_loss(model: PreTrainedModel) -> None:
    """Has FSDP2 gather the head for a loss that takes its weight without calling it, and so reduce its gradient.

    TRL's does, and gathers a weight that is still sharded itself; of the gradient of what it has gathered, each process
    then keeps its part of its own alone, and those of the others are lost.
    """

    def gather(*_) -> None:
        head = model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()

    model.base_model.register_forward_hook(gather)
