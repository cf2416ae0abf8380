"""Callbacks of all trainers: running sums, steps that are not finite, signals, and pictures of predictions."""

import importlib
import logging
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import ExportableState

from ..cards.sections import without_tokens
from ..command.errors import RunStopped, TrainingDiverged, one_line
from ..configuration_vitp import patch_grid
from ..convert.tensor_files import not_finite
from ..images.pixels import align_scores, colors_of, principal_scores
from ..images.reading import read_image
from ..vision_towers import tower_of

logger = logging.getLogger(__name__)
FOLDER, COMPONENTS = "watch", "components.safetensors"
TAG = "watch/predictions"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# Trackers with one active run, a function `log` and a class `Image` that takes the path of a file.
LOGGED = {TrackioCallback: "trackio", WandbCallback: "wandb"}
SAMPLES = "sample_ids"
SMALLEST_SCALE = 1.0  # below this scale of a GradScaler, scaling does not cause gradients that are not finite


class NamedBatches:
    """Collator that adds the ids of the rows to a batch, under `sample_ids`; [`take_names`] removes them."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any] | None]) -> dict[str, Any]:
        # Read the ids first, because the collator may change the rows.
        names = [str(row["id"]) for row in examples if isinstance(row, dict) and row.get("id") is not None]
        batch = self.collator(examples)
        batch[SAMPLES] = names
        return batch


def take_names(batches: list[dict[str, Any]]) -> list[str]:
    return [name for batch in batches for name in batch.pop(SAMPLES, [])]


class RunState(TrainerCallback, ExportableState):
    """Callback that restores running sums, begins epochs, publishes checkpoints and waits for pushes.

    Its state in a checkpoint is the sums since the last log. It also restores the state of other callbacks.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        stored = dict(state.stateful_callbacks) if state.global_step else {}
        own = stored.pop(type(self).__name__, None)
        self.trainer.restore_sums(own and own["attributes"])
        for name, states in stored.items():
            callbacks = [one for one in self.trainer.callback_handler.callbacks if type(one).__name__ == name]
            # Of several callbacks of a class, transformers appends the states to a list at each checkpoint.
            states = states[-len(callbacks) :] if isinstance(states, list) else [states]
            for callback, one in zip(callbacks, states):
                for attribute, value in one["attributes"].items():
                    setattr(callback, attribute, value)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.begin_epoch()
        if state.global_step >= state.max_steps:
            control.should_training_stop = True

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._resumed_from = None  # later errors have other causes than the checkpoint

    def on_save(self, args, state, control, **kwargs):
        self.trainer.publish()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.finish_pushes()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.trainer._sums or {}}


class StopAtNotFinite(TrainerCallback):
    """Callback that raises [`TrainingDiverged`] after the first step with a loss or weights that are NaN or infinite.

    A gradient that is not finite is detected by the weights. A step that a GradScaler skips does not change them.

    Attributes:
        losses: losses of the batches of this step.
        samples: ids of the rows of this step in this process.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.losses: list[torch.Tensor] = []
        self.samples: list[str] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        scaler = self.trainer.accelerator.scaler
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        wrong = not_finite(parameters)
        if wrong:
            what = f"weights are NaN or infinite, in {', '.join(wrong[:3])}{' …' * (len(wrong) > 3)}"
        elif all(loss.isfinite() for loss in self.losses):
            return
        elif scaler is not None and scaler.get_scale() >= SMALLEST_SCALE:
            return
        else:
            what = f"the loss is {sum(loss.item() for loss in self.losses)}"
        names = ", ".join(map(repr, self.samples)) or "without ids"
        raise TrainingDiverged(
            f"Step {state.global_step} is not finite: {what}. Samples of the step: {names}. The step is not saved. "
            "Start a new run from the last checkpoint (model_name_or_path) with a smaller learning_rate, or resume "
            "without these samples (allow_changed_data)."
        )


class SaveOnSignal(TrainerCallback):
    """Callback that saves and raises [`RunStopped`] at the end of `stop_at_step`, or of the step of a signal.

    All processes save and stop at the same step, even if only one of them receives the signal.

    Args:
        names: names of the signals. A second SIGINT stops at once.
    """

    def __init__(self, trainer: Trainer, names: list[str]):
        self.trainer, self.names = trainer, names
        self.received: int | None = None
        self._is_stopping = False
        self._before = {}

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for name in self.names:
            number = getattr(signal, name, None)
            # Windows has no SIGHUP, and nohup ignores it.
            if number is None or name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            # Logging is not safe in a signal handler: its lock may be held.
            again = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            try:
                os.write(2, f"\n{signal.Signals(number).name}: saving at the end of this step.{again}\n".encode())
            except OSError:  # The terminal was closed. An error of the progress bar would end the run before it saves.
                for descriptor in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    def _is_asked(self) -> bool:
        if not self.names:
            return False
        if self.trainer.args.world_size == 1:
            return self.received is not None
        # The signal may reach only some processes, or reach them in different steps.
        flag = torch.tensor(self.received or 0, device=self.trainer.args.device)
        number = self.trainer.accelerator.gather(flag.view(1)).max().item()
        self.received = self.received or number or None
        return bool(number)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._is_stopping = self._is_asked() or args.stop_at_step == state.global_step < state.max_steps
        if self._is_stopping:
            if control.should_evaluate:
                # Save before the evaluation too, because the scheduler may end the run during the evaluation.
                self.trainer.save_checkpoint()
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if not self._is_stopping:
            return
        saved = f"checkpoint-{state.global_step} of {state.max_steps} steps is saved in {args.output_dir}"
        cause = "stop_at_step" if self.received is None else signal.Signals(self.received).name
        status = 0 if self.received is None else 128 + self.received
        raise RunStopped(f"stopped by {cause}: {saved}. Nothing is exported. {next_command(args)}", status)


def ignore_signals_in_worker(names: list[str], then: Callable[[int], None] | None, worker_id: int) -> None:
    """Make a worker of a loader ignore the signals that save, unless its parent process sends them.

    Slurm, `timeout` and Ctrl-C send a signal to all processes of a group. The training process then needs its workers
    until the end of the step, and ends them itself.

    Args:
        names: names of the signals that save.
        then: function to call afterwards, the loader's usual `worker_init_fn`.
        worker_id: index of the worker.
    """
    for name in {"SIGINT", "SIGHUP"}.intersection(names):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if "SIGTERM" in names and hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process().pid
        threading.Thread(target=exit_on_signal_of, args=(parent,), daemon=True).start()
    if then is not None:
        then(worker_id)


def exit_on_signal_of(parent: int) -> None:
    """Exit when the parent process sends SIGTERM; ignore SIGTERM of other processes."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def next_command(args) -> str:
    """Return the sentence with the command that resumes the run, without tokens."""
    if args.world_size > 1 or not sys.argv[0]:
        return "Resume with the command that started the run."
    program = sys.argv[0] if sys.argv[0].startswith("vitp ") else f"{shlex.quote(sys.executable)} {sys.argv[0]}"
    return f"Resume with: {program} {shlex.join(without_tokens(sys.argv[1:]))}"


class LogPredictionsCallback(TrainerCallback):
    """Callback that draws predictions of a few samples before the first step and at each evaluation.

    Without evaluation, predictions are drawn at each checkpoint. The picture of a step is `watch/step-000200.png` in
    the output folder, and an image in TensorBoard, trackio and wandb if the run reports to them. A step that already
    has a picture is not drawn again, so that a resumed run logs no image twice. Drawing does not change the training:
    weights are identical to the bit. If a picture fails, a warning is logged.
    """

    def __init__(self, trainer: Trainer, number: int):
        self.trainer, self.number = trainer, number
        self.folder = Path(trainer.args.output_dir) / FOLDER
        self._samples: list | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.accelerator.distributed_type in SHARDED:
            logger.warning("watch_samples: no pictures are drawn, because the model is sharded over processes.")
            self.number = 0
        elif state.global_step == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._show(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self._show(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        if args.eval_strategy == "no":
            self._show(state.global_step)

    def _show(self, step: int) -> None:
        path = self.folder / f"step-{step:06d}.png"
        if not self.number or path.is_file():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            drawn = path.with_name(f".{path.name}")
            with evaluation_mode(self.trainer.model, self.trainer.args.device):
                if self._samples is None:
                    self._samples = self.trainer.watched_samples(self.number)
                self.trainer.draw_samples(self._samples, drawn)
            os.replace(drawn, path)
            send(self.trainer, path, step)
        except Exception as error:  # a failed picture must not stop the run
            cause = one_line(f"{type(error).__name__}: {error}").rstrip(".")
            logger.warning("The picture of step %d failed: %s. Training continues.", step, cause)


@contextmanager
def evaluation_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set a model to evaluation mode without gradients, and restore its modes and all random states at the end."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, mode in modes.items():
            module.training = mode


def send(trainer: Trainer, path: Path, step: int) -> None:
    """Log an image to TensorBoard, trackio and wandb, if the run reports to them."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            pixels = np.asarray(read_image(path, None).convert("RGB"))
            callback.tb_writer.add_image(TAG, pixels, step, dataformats="HWC")
            callback.tb_writer.flush()
        name = LOGGED.get(type(callback))
        if name is not None:
            library = importlib.import_module(name)
            library.log({TAG: library.Image(str(path)), "train/global_step": step})


def choose(samples: Dataset, number: int, seed: int) -> list:
    """Return random samples of a data set in its order, determined by the seed."""
    indices = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:number]
    return [samples[index] for index in indices.sort().values.tolist()]


def patch_maps(vit: PreTrainedModel, pixel_values: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
    """Return the patch features of a ViT as maps, float32 `(batch_size, channels, rows, columns)`.

    Args:
        vit: ViT of any family, see [`~modeling_vitp.register_tower`].
        pixel_values: normalized images `(batch_size, num_channels, height, width)`.
        head: module that is applied to the features of each patch.
    """
    tokens = tower_of(vit.config).patch_tokens(vit, pixel_values.to(vit.dtype))
    tokens = tokens if head is None else head(tokens)
    return tokens.float().transpose(1, 2).unflatten(2, patch_grid(vit.config, pixel_values.shape[-2:]))


def component_colors(features: Sequence[torch.Tensor], folder: Path) -> list[np.ndarray]:
    """Return the first principal components of features as colors.

    The components are rotated to match those of the first step, which are stored in the folder, so that colors are
    comparable between steps.

    Args:
        features: features of each sample, of shape `(channels, rows, columns)`.
        folder: folder of the stored components.

    Returns:
        uint8 image of shape `(rows, columns, 3)` for each sample.
    """
    scores, path = [principal_scores(one.float().cpu()) for one in features], folder / COMPONENTS
    if path.is_file():
        first = load_file(path)
        scores = [align_scores(one, first.get(str(number), one)) for number, one in enumerate(scores)]
    else:
        save_file({str(number): one for number, one in enumerate(scores)}, path)
    return [colors_of(one) for one in scores]
