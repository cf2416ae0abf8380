"""A signal lets a run save at the end of its step and stop, unfinished."""

import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import torch
from transformers import Trainer, TrainerCallback

from .stops import RunStopped


class SaveOnSignal(TrainerCallback):
    """Saves at the end of the step in which the signal came, in all processes, and raises [`RunStopped`].

    Args:
        names: of the signals. A second SIGINT stops at once.
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
            number = getattr(signal, name)
            self._before[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        for number, before in self._before.items():
            # That of transformers' own just-in-time checkpoint would ignore the signal from here on.
            is_jit = getattr(before, "__module__", None) == "transformers.trainer_jit_checkpoint"
            signal.signal(number, signal.SIG_DFL if is_jit or before is None else before)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            # Not by logging, of which a lock may be held.
            os.write(2, f"\n{signal.Signals(number).name}: saving at the end of this step.\n".encode())

    def _is_asked(self) -> bool:
        if not self.names:
            return False
        if self.trainer.args.world_size == 1:
            return self.received is not None
        # The signal need not reach all processes, nor in the same step.
        flag = torch.tensor(self.received or 0, device=self.trainer.args.device)
        number = self.trainer.accelerator.gather(flag.view(1)).max().item()
        self.received = self.received or number or None
        return bool(number)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._is_stopping = self._is_asked()
        if self._is_stopping:
            if control.should_evaluate:
                # Before the evaluation, for which there may be no time; it is saved again after it, as it always is.
                self.trainer.save_checkpoint()
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if not self._is_stopping:
            return
        saved = f"checkpoint-{state.global_step} of {state.max_steps} steps is in {args.output_dir}"
        raise RunStopped(
            f"stopped by {signal.Signals(self.received).name}: {saved}, and nothing is exported. {next_command(args)}",
            128 + self.received,
        )


def outlive_signals(names: list[str], then: Callable[[int], None] | None, worker_id: int) -> None:
    """In a worker of a loader: what is sent to the whole group of processes, as by Slurm, `timeout` or Ctrl-C, is for
    the process that trains, which needs its workers to the end of the step. That process alone ends them.

    Args:
        names: of the signals that save.
        then: what the loader would do in a worker otherwise.
    """
    if "SIGINT" in names:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "SIGTERM" in names and hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        parent = multiprocessing.parent_process().pid
        threading.Thread(target=end_if_told_by, args=(parent,), daemon=True).start()
    if then is not None:
        then(worker_id)


def end_if_told_by(parent: int) -> None:
    """Waits for the SIGTERM of this process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def next_command(args) -> str:
    """How to go on, without a token that was given in the command."""
    if args.world_size > 1 or not sys.argv[0]:
        return "Go on with the command that it was started with."
    program = sys.argv[0] if sys.argv[0].startswith("vitp ") else f"{shlex.quote(sys.executable)} {sys.argv[0]}"
    words, is_value = [], False
    for word in sys.argv[1:]:
        is_token = word.startswith("-") and word.split("=")[0].endswith("token")
        if is_token or is_value:
            is_value = is_token and "=" not in word
        else:
            words.append(word)
    return f"Go on with: {program} {shlex.join(words)}"
