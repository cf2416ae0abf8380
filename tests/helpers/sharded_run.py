"""Entry point of the one or two processes of `torchrun sharded_run.py FOLDER`.

They train with our trainer under FSDP2 and with InternVL of transformers in a plain loop, and write gradients and the
collectives of a step to FOLDER. accelerate shards on accelerators only, so its state is patched to use gloo on CPUs.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from internvl_oracle import build_native
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_run import make_rows, make_trainer
from transformers import TrainerCallback

from modeling_vitp import ViTPDataCollator

STEPS = 3
COLLECTIVES = ("all_gather", "allgather", "reduce_scatter", "all_reduce", "allreduce", "all_to_all", "broadcast")


class Collectives(TorchDispatchMode):
    """Dispatch mode that records the name of each collective and the bytes of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is DTensor for kind in types):
            return NotImplemented  # Its inner operations are then dispatched here.
        name = func.__name__.split(".")[0].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name.startswith(COLLECTIVES):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.seen.append((name, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **kwargs or {})


class Watch(TrainerCallback):
    """Callback that records the number of collectives, or the gradients, at the end of each step."""

    def __init__(self, collectives: Collectives | None = None):
        self.collectives, self.ends, self.gradients = collectives, [], []

    def on_step_end(self, args, state, control, **kwargs):
        if self.collectives is not None:
            self.ends.append(len(self.collectives.seen))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.collectives is None:
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            whole = {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in gradients.items()}
            self.gradients.append(whole)


def trainer_of(folder: Path, accumulation: int = 1, **options):
    """Build our trainer, which shards with two processes."""
    world = dist.get_world_size()
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": STEPS}
    options |= {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 100, "drop_path_rate": 0.0}
    trainer = make_trainer(folder / "unused", **options)
    if world > 1:
        state = AcceleratorState()
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    return trainer


def gradients(folder: Path) -> None:
    accumulation = 2 // dist.get_world_size()
    trainer, watch = trainer_of(folder, accumulation, optim="sgd", learning_rate=0.1, max_grad_norm=0), Watch()
    trainer.add_callback(watch)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]  # of two processes, the second one has no row
    trainer.save_model(folder / "saved", _internal_call=True)
    if dist.get_rank() == 0:
        torch.save(watch.gradients, folder / "gradients.pt")
        (folder / "evaluated.json").write_text(json.dumps(loss))


def of_trainer(folder: Path, accumulation: int) -> list[list[tuple[str, int]]]:
    """Return the collectives of each step except the first."""
    trainer, collectives = (
        trainer_of(folder, accumulation, num_rows=24),
        Collectives(),
    )  # enough rows for all steps in one epoch
    trainer.model.config.save_pretrained(folder / "model")
    watch = Watch(collectives)
    trainer.add_callback(watch)
    with collectives:
        trainer.train()
    return [collectives.seen[start:end] for start, end in zip(watch.ends, watch.ends[1:])]


def of_plain_loop(folder: Path) -> list[list[tuple[str, int]]]:
    """Return the collectives of transformers' model, with blocks, embeddings and head sharded separately."""
    ours = make_trainer(folder / "unused", drop_path_rate=0.0)
    model = build_native(ours.model).train()
    for module in list(model.modules()):
        if type(module).__name__ in ("InternVLVisionLayer", "Qwen2DecoderLayer"):
            fully_shard(module)
    fully_shard(model.get_input_embeddings())
    fully_shard(model.lm_head, reshard_after_forward=False)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = ViTPDataCollator(ours.processing_class, vrl_drop_ratio=0.0)(list(make_rows(2)))
    steps = []
    for _ in range(STEPS):
        with Collectives() as collectives:
            model(**batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        steps.append(collectives.seen)
    return steps[1:]


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    gradients(folder)
    if dist.get_world_size() > 1:
        seen = {"1": of_trainer(folder, 1), "2": of_trainer(folder, 2), "plain": of_plain_loop(folder)}
        if dist.get_rank() == 0:
            (folder / "collectives.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
