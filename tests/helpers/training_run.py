"""Small training run in processes that tests start, stop and kill."""

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from launching import finish, processes, ranks_of
from peft import LoraConfig
from pictures import picture
from tiny_models import TEXT, VISION
from transformers import TrainerCallback, TrainerState

from modeling_vitp import ViTPTrainer, ViTPTrainingConfig
from modeling_vitp.instructions.arguments import AnnotationOptions
from modeling_vitp.instructions.from_annotations.source import LabelSource
from modeling_vitp.pretraining.loading import build_model, build_tokenizer
from modeling_vitp.training import base_trainer, checkpointing

SIZES = [(56, 56), (112, 56), None, (168, 112), (56, 112), (112, 112), None, (56, 56), (168, 56), (56, 168)]
ANSWERS = ["3", "There are 12 trees.", "top left", "7", "12 and 3", "none", "What trees?", "many", "2", "quarter"]
FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)
OPTIONS = {
    "vrl_drop_ratio": 0.75,
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_steps": 2,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "watch_samples": 0,
}
TIMES = ("runtime", "samples_per_second", "steps_per_second", "train_loss", "total_flos")


def make_rows(num_rows: int = 10) -> Dataset:
    rows = []
    for index in range(num_rows):
        size = SIZES[index % len(SIZES)]
        answer = {"role": "assistant", "content": ANSWERS[index % len(ANSWERS)]}
        images = [] if size is None else [picture(*size, index)]
        messages = [{"role": "user", "content": "How many trees?"}, answer]
        rows.append({"id": f"row-{index}", "images": images, "messages": messages})
    return Dataset.from_list(rows, features=FEATURES)


def make_trainer(
    folder,
    stream: bool = False,
    num_rows: int = 10,
    num_shards: int = 2,
    drop_path_rate: float = 0.1,
    lora: bool | dict = False,
    train_rows=None,
    vision: dict = VISION,
    annotations: tuple[str, dict] | None = None,
    **options,
):
    """Return a trainer of a tiny model, on generated rows, on `train_rows`, or on a folder of labels with options."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["How many trees are there? There are 12 trees in the top left quarter."], 400)
    if vision is VISION:
        vision = {**VISION, "drop_path_rate": drop_path_rate}
    model, processor = build_model(tokenizer, vision, TEXT, {"max_patches": 6})
    rows = make_rows(num_rows)
    if train_rows is None:
        train_rows = rows.to_iterable_dataset(num_shards).shuffle(seed=3, buffer_size=3) if stream else rows
    args = ViTPTrainingConfig(str(folder), **{**OPTIONS, **options})
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
    adapter = LoraConfig(**settings | (lora if isinstance(lora, dict) else {})) if lora else None
    drawn = None
    if annotations is not None:
        folder_of_labels, label_options = annotations
        drawn = LabelSource.open(folder_of_labels, AnnotationOptions(**label_options)).draw(args.seed)
        train_rows = drawn.rows()
    datasets = {"train_dataset": train_rows, "eval_dataset": rows.select(range(3))}
    settings = {"processing_class": processor, "peft_config": adapter, "sample_transform": drawn}
    return ViTPTrainer(model, args, **datasets, **settings)


def summary(trainer) -> dict:
    """Return the state that must be bitwise equal in an interrupted and an uninterrupted run."""
    weights = hashlib.sha256()
    for parameter in trainer.model.parameters():
        weights.update(parameter.detach().numpy().tobytes())
    log = [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in trainer.state.log_history]
    return {
        "step": trainer.state.global_step,
        "log": [entry for entry in log if len(entry) > 3],
        "weights": weights.hexdigest(),
    }


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class KillAtStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


class Send(TrainerCallback):
    """Callback that sends a signal to this process in a step."""

    def __init__(self, number: int, step: int, times: int = 1):
        self.number, self.step, self.times = number, step, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def kill_while_saving(trainer: ViTPTrainer, stage: str, step: int) -> None:
    """Make the process be killed during one stage of saving the checkpoint of `step`."""

    def at_step(function, act):
        def wrapped(*args, **kwargs):
            if trainer.state.global_step == step:
                act(*args, **kwargs)
                die()
            return function(*args, **kwargs)

        return wrapped

    def halve(name):
        for path in Path(trainer.args.output_dir).rglob(name):
            if f"checkpoint-{step}" in path.parts:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def half_of(function, name):
        return at_step(function, lambda *args, **kwargs: (function(*args, **kwargs), halve(name)))

    if stage == "model":
        trainer._save = half_of(trainer._save, "model.safetensors")
    elif stage == "optimizer":
        trainer._save_optimizer_and_scheduler = half_of(trainer._save_optimizer_and_scheduler, "optimizer.pt")
    elif stage == "state":
        trainer._save_rng_state = half_of(trainer._save_rng_state, "rng_state*")
        TrainerState.save_to_json = at_step(TrainerState.save_to_json, lambda self, path: Path(path).write_text("{"))
    elif stage == "before the record":
        base_trainer.publish_checkpoint = at_step(base_trainer.publish_checkpoint, lambda *args: None)
    elif stage == "rotation":
        delete = shutil.rmtree

        def delete_half(folder, *args, **kwargs):
            folder = Path(folder)
            is_checkpoint = folder.name.startswith("checkpoint-") and (folder / "checkpoint.json").is_file()
            if trainer.state.global_step != step or not is_checkpoint:
                return delete(folder, *args, **kwargs)
            (folder / "trainer_state.json").unlink()
            (folder / "model.safetensors").unlink()
            die()

        shutil.rmtree = delete_half
    else:
        raise ValueError(stage)


def train(folder: str, kill: tuple[str, int] | None = None, tell: tuple[int, int] | None = None, **options) -> None:
    """Train from the last checkpoint, if any, and write the summary.

    Args:
        folder: folder of the run.
        kill: stage and step in which the process is killed.
        tell: process index and step in which the process is told to stop.
        options: settings of the trainer.
    """
    # Data loader workers are forks of this process, not of a second fork server.
    multiprocessing.set_start_method("fork", force=True)
    gc.freeze()  # A run collects garbage; going through the objects of all imports is a quarter of its time.
    trainer = make_trainer(folder, **options)
    if tell is not None and tell[0] == trainer.args.process_index:
        trainer.add_callback(Send(signal.SIGTERM, tell[1]))
    if kill is not None and kill[0] == "step":
        trainer.add_callback(KillAtStep(kill[1]))
    elif kill is not None:
        kill_while_saving(trainer, *kill)
    trainer.train(resume_from_checkpoint=checkpointing.last_checkpoint(folder))
    if trainer.is_world_process_zero():
        (Path(folder) / "summary.json").write_text(json.dumps(summary(trainer)))


def train_rank(environment: dict[str, str], folder: str, options: dict) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    train(folder, **options)


def start_ranks(world: int, folder, **options) -> list[multiprocessing.Process]:
    """Start distributed training in processes forked from the server."""
    context = processes()
    ranks = [context.Process(target=train_rank, args=(rank, str(folder), options)) for rank in ranks_of(world)]
    for rank in ranks:
        rank.start()
    return ranks


def run_ranks(world: int, folder, **options) -> list[int]:
    """Run distributed training in such processes and return their exit codes. If one fails, the others are killed."""
    return finish(start_ranks(world, folder, **options))


def run(folder, kill=None, **options) -> dict | None:
    """Train in a separate process and return its summary, or `None` if it was killed as requested."""
    with contextlib.suppress(FileNotFoundError):
        (Path(folder) / "summary.json").unlink()
    process = processes().Process(target=train, args=(str(folder), kill), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == (0 if kill is None else -signal.SIGKILL), process.exitcode
    return None if kill is not None else json.loads((Path(folder) / "summary.json").read_text())


def kill_at_random_moments(root: Path, world: int = 1, number: int = 10, **options) -> list[Path]:
    """Kill runs at random moments and resume them until they end, and return their folders.

    Check that their summary is the one of an uninterrupted run.
    """

    def train_for(seconds: float, folder: str) -> list[int]:
        end = time.monotonic() + seconds
        if world > 1:
            ranks = start_ranks(world, root / folder, **options)
        else:
            ranks = [processes().Process(target=train, args=(str(root / folder),), kwargs=options)]
            ranks[0].start()
        for rank in ranks:
            rank.join(max(0, end - time.monotonic()))
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
        return [rank.exitcode for rank in ranks]

    server = processes().Process(target=time.monotonic)
    server.start()
    server.join()  # the imports of the server do not count as time of a run
    started = time.monotonic()
    ended, killed = [0] * world, [-signal.SIGKILL] * world
    assert train_for(600, "whole") == ended
    duration = time.monotonic() - started
    whole = json.loads((root / "whole" / "summary.json").read_text())
    delays, codes = random.Random(0), []
    while len(codes) < 2 * number or codes.count(killed) < number:
        codes.append(train_for(delays.uniform(0, duration / 3), f"killed-{codes.count(ended)}"))
    folders = list(root.glob("killed-*"))
    for folder in folders:
        assert train_for(600, folder.name) == ended
        assert json.loads((folder / "summary.json").read_text()) == whole
    assert folders and whole["step"] == options["max_steps"]
    return folders


if __name__ == "__main__":
    train(sys.argv[1], **json.loads(sys.argv[2]))
