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
FOLDER = "watch"
COMPONENTS = "components.safetensors"
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
        names = []
        for row in examples:
            if isinstance(row, dict) and row.get("id") is not None:
                names.append(str(row["id"]))
        batch = self.collator(examples)
        batch[SAMPLES] = names
        return batch


def take_names(batches: list[dict[str, Any]]) -> list[str]:
    names = []
    for batch in batches:
        names += batch.pop(SAMPLES, [])
    return names


class RunState(TrainerCallback, ExportableState):
    """Callback that restores running sums, begins epochs, publishes checkpoints and waits for pushes.

    Its state in a checkpoint is the sums since the last log. It also restores the state of other callbacks.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        stored_states = dict(state.stateful_callbacks) if state.global_step else {}
        state_of_run = stored_states.pop(type(self).__name__, None)
        self.trainer.restore_sums(state_of_run["attributes"] if state_of_run else None)
        for class_name, callback_states in stored_states.items():
            callbacks = []
            for callback in self.trainer.callback_handler.callbacks:
                if type(callback).__name__ == class_name:
                    callbacks.append(callback)
            if isinstance(callback_states, list):
                # Of several callbacks of a class, transformers appends the states to a list at each checkpoint.
                callback_states = callback_states[-len(callbacks) :]
            else:
                callback_states = [callback_states]
            for callback, callback_state in zip(callbacks, callback_states):
                for attribute, value in callback_state["attributes"].items():
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
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        wrong_weights = not_finite(trained)
        if wrong_weights:
            ellipsis = " …" if len(wrong_weights) > 3 else ""
            problem = f"weights are NaN or infinite, in {', '.join(wrong_weights[:3])}{ellipsis}"
        elif all(loss.isfinite() for loss in self.losses):
            return
        else:
            scaler = self.trainer.accelerator.scaler
            if scaler is not None and scaler.get_scale() >= SMALLEST_SCALE:
                return  # the scaler skips the step
            problem = f"the loss is {sum(loss.item() for loss in self.losses)}"
        samples = ", ".join(map(repr, self.samples)) or "without ids"
        raise TrainingDiverged(
            f"Step {state.global_step} is not finite: {problem}. Samples of the step: {samples}. The step is not "
            "saved. Start a new run from the last checkpoint (model_name_or_path) with a smaller learning_rate, or "
            "resume without these samples (allow_changed_data)."
        )


class SaveOnSignal(TrainerCallback):
    """Callback that saves and raises [`RunStopped`] at the end of `stop_at_step`, or of the step of a signal.

    All processes save and stop at the same step, even if only one of them receives the signal.

    Args:
        names: names of the signals. A second SIGINT stops at once.
    """

    def __init__(self, trainer: Trainer, names: list[str]):
        self.trainer = trainer
        self.names = names
        self.received: int | None = None
        self._is_stopping = False
        self._earlier_handlers = {}

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for name in self.names:
            number = getattr(signal, name, None)
            if number is None:  # Windows has no SIGHUP
                continue
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:  # nohup ignores it
                continue
            self._earlier_handlers[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier_handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        message = f"\n{signal.Signals(number).name}: saving at the end of this step."
        if number == signal.SIGINT:
            message += " Press Ctrl-C again to stop at once."
        # Logging is not safe in a signal handler: its lock may be held.
        try:
            os.write(2, f"{message}\n".encode())
        except OSError:  # The terminal was closed. An error of the progress bar would end the run before it saves.
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    def _is_asked(self) -> bool:
        if not self.names:
            return False
        if self.trainer.args.world_size == 1:
            return self.received is not None
        # The signal may reach only some processes, or reach them in different steps.
        number = torch.tensor([self.received or 0], device=self.trainer.args.device)
        largest_number = self.trainer.accelerator.gather(number).max().item()
        if largest_number == 0:
            return False
        if self.received is None:
            self.received = largest_number
        return True

    def on_step_end(self, args, state, control, model=None, **kwargs):
        is_last_step = args.stop_at_step == state.global_step < state.max_steps
        self._is_stopping = self._is_asked() or is_last_step
        if not self._is_stopping:
            return
        if control.should_evaluate:
            # Save before the evaluation too, because the scheduler may end the run during the evaluation.
            self.trainer.save_checkpoint()
        control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if not self._is_stopping:
            return
        if self.received is None:
            cause = "stop_at_step"
            status = 0
        else:
            cause = signal.Signals(self.received).name
            status = 128 + self.received
        checkpoint = f"checkpoint-{state.global_step} of {state.max_steps} steps is saved in {args.output_dir}"
        raise RunStopped(f"stopped by {cause}: {checkpoint}. Nothing is exported. {next_command(args)}", status)


def ignore_signals_in_worker(names: list[str], then: Callable[[int], None] | None, worker_id: int) -> None:
    """Make a worker of a loader ignore the signals that save, unless its parent process sends them.

    Slurm, `timeout` and Ctrl-C send a signal to all processes of a group. The training process then needs its workers
    until the end of the step, and ends them itself.

    Args:
        names: names of the signals that save.
        then: function to call afterwards, the loader's usual `worker_init_fn`.
        worker_id: index of the worker.
    """
    for name in ("SIGINT", "SIGHUP"):
        if name in names and hasattr(signal, name):
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
    program = sys.argv[0]
    if args.world_size > 1 or not program:
        return "Resume with the command that started the run."
    if not program.startswith(("vitp ", "python -m ")):
        program = f"{shlex.quote(sys.executable)} {program}"
    words = shlex.join(without_tokens(sys.argv[1:]))
    return f"Resume with: {program} {words}"


class LogPredictionsCallback(TrainerCallback):
    """Callback that draws predictions of a few samples before the first step and at each evaluation.

    Without evaluation, predictions are drawn at each checkpoint. The picture of a step is `watch/step-000200.png` in
    the output folder, and an image in TensorBoard, trackio and wandb if the run reports to them. A step that already
    has a picture is not drawn again, so that a resumed run logs no image twice. Drawing does not change the training:
    weights are identical to the bit. If a picture fails, a warning is logged.
    """

    def __init__(self, trainer: Trainer, number: int):
        self.trainer = trainer
        self.number = number
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
            unfinished_path = path.with_name(f".{path.name}")
            with evaluation_mode(self.trainer.model, self.trainer.args.device):
                if self._samples is None:
                    self._samples = self.trainer.watched_samples(self.number)
                self.trainer.draw_samples(self._samples, unfinished_path)
            os.replace(unfinished_path, path)
            send(self.trainer, path, step)
        except Exception as error:  # a failed picture must not stop the run
            cause = one_line(f"{type(error).__name__}: {error}").rstrip(".")
            logger.warning("The picture of step %d failed: %s. Training continues.", step, cause)


@contextmanager
def evaluation_mode(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set a model to evaluation mode without gradients, and restore its modes and all random states at the end."""
    modes = {module: module.training for module in model.modules()}
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes.items():
            module.training = mode


def send(trainer: Trainer, path: Path, step: int) -> None:
    """Log an image to TensorBoard, trackio and wandb, if the run reports to them."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            pixels = np.asarray(read_image(path, None).convert("RGB"))
            callback.tb_writer.add_image(TAG, pixels, step, dataformats="HWC")
            callback.tb_writer.flush()
        library_name = LOGGED.get(type(callback))
        if library_name is not None:
            library = importlib.import_module(library_name)
            library.log({TAG: library.Image(str(path)), "train/global_step": step})


def choose(samples: Dataset, number: int, seed: int) -> list:
    """Return random samples of a data set in its order, determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(samples), generator=generator)[:number]
    return [samples[index] for index in sorted(indices.tolist())]


def patch_maps(vit: PreTrainedModel, pixel_values: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
    """Return the patch features of a ViT as maps, float32 `(batch_size, channels, rows, columns)`.

    Args:
        vit: ViT of any family, see [`~modeling_vitp.register_tower`].
        pixel_values: normalized images `(batch_size, num_channels, height, width)`.
        head: module that is applied to the features of each patch.
    """
    features = tower_of(vit.config).patch_tokens(vit, pixel_values.to(vit.dtype))
    if head is not None:
        features = head(features)
    grid = patch_grid(vit.config, pixel_values.shape[-2:])
    channels_first = features.float().transpose(1, 2)
    return channels_first.unflatten(2, grid)


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
    path = folder / COMPONENTS
    scores = {}
    for number, sample_features in enumerate(features):
        scores[str(number)] = principal_scores(sample_features.float().cpu())
    if path.is_file():
        first_scores = load_file(path)
        for number, sample_scores in scores.items():
            reference = first_scores.get(number, sample_scores)
            scores[number] = align_scores(sample_scores, reference)
    else:
        save_file(scores, path)
    return [colors_of(sample_scores) for sample_scores in scores.values()]
