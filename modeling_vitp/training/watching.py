"""What a model makes of a few fixed samples while it trains: pictures in its folder and where the run reports to."""

import importlib
import logging
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..command.errors import one_line
from ..images.pixels import align_scores, colors_of, principal_scores

logger = logging.getLogger(__name__)
FOLDER, COMPONENTS = "watch", "components.safetensors"
TAG = "watch/predictions"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# Libraries with one active run, a function `log` and a class `Image` of the path of a file.
LOGGED = {TrackioCallback: "trackio", WandbCallback: "wandb"}


class Watcher(TrainerCallback):
    """Draws a few samples before the first step and at each evaluation, or where there is none at each checkpoint.

    The picture of a step is `watch/step-000200.png` in the output folder, and an image of that step in TensorBoard,
    trackio and wandb, if the run reports to them. A step that has its picture gets no second one, so that a run that
    goes on sends none twice. Training is as it would be without, to the bit; a picture that fails is a warning.

    Args:
        trainer: a [`~modeling_vitp.training.run.Run`], which chooses the samples and draws them.
        number: of samples.
    """

    def __init__(self, trainer: Trainer, number: int):
        self.trainer, self.number = trainer, number
        self.folder = Path(trainer.args.output_dir) / FOLDER
        self._samples: list | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.accelerator.distributed_type in SHARDED:
            logger.warning("watch_samples: no pictures, since no process has the whole of a model that is sharded.")
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
            with undisturbed(self.trainer.model, self.trainer.args.device):
                if self._samples is None:
                    self._samples = self.trainer.watched_samples(self.number)
                self.trainer.draw_samples(self._samples, drawn)
            os.replace(drawn, path)
            send(self.trainer, path, step)
        except Exception as error:  # whatever a library raises: no run is lost for a picture
            cause = one_line(f"{type(error).__name__}: {error}").rstrip(".")
            logger.warning("The picture of step %d failed: %s. Training goes on.", step, cause)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A model in evaluation, without gradients; its modes and all random states are then as they were."""
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
    """An image, beside the scalars of that step, to whatever of TensorBoard, trackio and wandb the run reports to."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
            callback.tb_writer.add_image(TAG, pixels, step, dataformats="HWC")
            callback.tb_writer.flush()
        name = LOGGED.get(type(callback))
        if name is not None:
            library = importlib.import_module(name)
            library.log({TAG: library.Image(str(path)), "train/global_step": step})


def choose(samples: Dataset, number: int, seed: int) -> list:
    """The same samples of a data set for the same seed, in its order."""
    places = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:number]
    return [samples[place] for place in places.sort().values.tolist()]


def component_colors(features: Sequence[torch.Tensor], folder: Path) -> list[np.ndarray]:
    """Principal components of features as colors, turned towards those of the first step, which the folder keeps.

    Args:
        features: of each sample, of shape `(channels, rows, columns)`.

    Returns:
        uint8 of shape `(rows, columns, 3)` for each sample.
    """
    scores, path = [principal_scores(one.float().cpu()) for one in features], folder / COMPONENTS
    if path.is_file():
        first = load_file(path)
        scores = [align_scores(one, first.get(str(number), one)) for number, one in enumerate(scores)]
    else:
        save_file({str(number): one for number, one in enumerate(scores)}, path)
    return [colors_of(one) for one in scores]
