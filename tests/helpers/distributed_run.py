"""Entry point of the processes of `torchrun distributed_run.py FOLDER`, which write their results to FOLDER."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_run import make_rows, make_trainer, summary
from transformers import TrainerCallback

from modeling_vitp import ViTPDataCollator
from modeling_vitp.instructions.mixture import load_mixture, open_mixture
from modeling_vitp.instructions.rows import prepare_rows


class KeepGradients(TrainerCallback):
    """Callback that records the gradient of every optimizer step, and the rows of this process."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradient = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
        self.gradients.append(gradient)


def keep_rows(trainer, known_by=lambda row: row["id"]):
    """Wrap a collator to record the ids of the rows of each batch."""
    seen, collate = [], trainer.data_collator.__class__.__call__

    class Noting(trainer.data_collator.__class__):
        def __call__(self, examples):
            seen.append([known_by(example) for example in examples if example is not None])
            return collate(self, examples)

    trainer.data_collator.__class__ = Noting
    return seen


def ddp(folder: Path, name: str, **options) -> None:
    """Train two epochs of ten rows: 4, 4 and 2 rows a step for any number of processes."""
    world = int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(
        folder / name,
        drop_path_rate=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // world,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        max_steps=6,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        **options,
    )
    keep = KeepGradients()
    trainer.add_callback(keep)
    seen = keep_rows(trainer)
    trainer.train()
    ids = [None] * world
    dist.all_gather_object(ids, seen)
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{name}.json").write_text(json.dumps({"log": log, "ids": ids}))
        torch.save(keep.gradients, folder / f"{name}.pt")


def split(folder: Path) -> None:
    """Train six steps of two rows a process on the Parquet stream in `FOLDER/rows`."""
    source = {"name": "rows", "folder": "rows", "rows": 20, "streaming": True}
    mixture = load_mixture({"root": str(folder), "sources": [source], "split_streams": True, "shuffle_buffer": 4})
    options = {"gradient_accumulation_steps": 1, "max_steps": 6, "eval_strategy": "no", "save_strategy": "no"}
    trainer = make_trainer(folder / "split", train_rows=open_mixture(mixture, 0), **options)
    seen = keep_rows(trainer, lambda row: (row["id"], row["messages"][-1]["content"][0]["text"]))
    trainer.train()
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, {"rows": seen, "weights": summary(trainer)["weights"]})
    if trainer.is_world_process_zero():
        (folder / "split.json").write_text(json.dumps(found))


def fsdp2(folder: Path, name: str, **drops) -> None:
    """Train one step with `fully_shard`; of two processes, the second one has the text-only rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    trainer = make_trainer(folder / "unused", drop_path_rate=0.0, save_strategy="no", eval_strategy="no")
    model = trainer.model.train()
    rows = list(make_rows())
    rows = [row for row in rows if row["images"]][:3] + [row for row in rows if not row["images"]]
    collator = ViTPDataCollator(trainer.processing_class, vrl_drop_ratio=0.75, **drops)
    labels = collator(rows)["labels"]
    num_items = (labels[:, 1:] != -100).sum()
    mine = rows if world == 1 else [rows[:3], rows[3:]][rank]
    batch = collator(mine)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items)
    loss.backward()
    total = loss.detach() / world
    dist.all_reduce(total)
    gradients = {}
    for parameter_name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[parameter_name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    if rank == 0:
        torch.save({"loss": total, "gradients": gradients}, folder / f"{name}.pt")


def evaluated(folder: Path) -> None:
    """Evaluate losses and scores on five rows in batches of two, of a map-style data set and of a stream."""
    rows = make_rows(5)
    trainer = make_trainer(folder / "unused", drop_path_rate=0.0, per_device_eval_batch_size=2)
    found, scores = {}, {}
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    for name, dataset in [("map", rows), ("stream", rows.to_iterable_dataset(num_shards=2))]:
        found[name] = trainer.evaluate(prepare_rows(dataset))["eval_loss"]
        trainer.compute_metrics = tokens_of
        scores[name] = trainer.evaluate(prepare_rows(dataset))["eval_tokens"]
        trainer.compute_metrics = None
        output = trainer.predict(prepare_rows(dataset))
        scores[f"{name}, predicted"] = tokens_of(output)["tokens"]
    if trainer.is_world_process_zero():
        (folder / "evaluated.json").write_text(json.dumps(found))
        (folder / "scored.json").write_text(json.dumps(scores))


def tokens_of(output) -> dict[str, list]:
    """Return the answer tokens of each row and the predicted tokens."""
    labels, predictions = output.label_ids[:, 1:], output.predictions[:, :-1]
    rows = [(row[row >= 0].tolist(), guess[row >= 0].tolist()) for row, guess in zip(labels, predictions)]
    return {"tokens": rows}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    evaluated(folder)
    fsdp2(folder, "fsdp2")
    fsdp2(folder, "fsdp2_patches", patch_drop_ratio=0.5)
    ddp(folder, "accumulated")
    ddp(folder, "rebalanced", train_sampling_strategy="batch_rebalance")
    ddp(folder, "checkpointed", gradient_checkpointing=True)
    ddp(folder, "padding_free", padding_free=True)
    ddp(folder, "stream", stream=True)
    ddp(folder, "warmup", vrl_warmup_steps=4, answer_mask_ratio=0.5)
    ddp(folder, "stream_warmup", stream=True, vrl_warmup_steps=4)
    ddp(folder, "patches", patch_drop_ratio=0.5, patch_drop_end=0.4)
    split(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
