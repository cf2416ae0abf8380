"""What every trainer does: whole checkpoints, exact resuming, pushes without secrets."""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput, rotate_checkpoints
from transformers.utils import PushInProgress

from ..hub.files import all_files, check_no_secrets, model_files
from ..hub.upload import collect, report_failure
from .checkpointing import STAGING, check_settings, last_checkpoint, publish_checkpoint

logger = logging.getLogger(__name__)


class WholeCheckpoints:
    """Mixin of trainers, before [`~transformers.Trainer`]: a checkpoint is whole or not there, and goes on as it began.

    A subclass gives `_run_settings()`, what [`check_settings`] compares.
    """

    _is_saving = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
        self._settings = self._run_settings()
        if resume_from_checkpoint:
            check_settings(resume_from_checkpoint, self._settings)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_settings(self) -> dict[str, dict[str, Any]]:
        """What has to be as it was for a run to go on (`fixed`), and what changes its course only (`free`)."""
        raise NotImplementedError

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._is_saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        folder = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoint, staged = os.path.join(folder, name), os.path.join(folder, STAGING, name)
        if self.args.should_save:
            shutil.rmtree(os.path.join(folder, STAGING), ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = checkpoint
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(staged, checkpoint, self._settings)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self.args.should_save:
            rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # what is not in its place yet would be moved during the upload
            super()._push_from_checkpoint(checkpoint_folder)


def has_fast_bf16() -> bool:
    """Whether the device that training will run on computes in bfloat16 natively."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type != "cuda" or torch.cuda.is_bf16_supported(False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_loaded(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises a `ValueError` if a checkpoint and the model that it was loaded into have not the same keys."""
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint does not fit the model: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}. Resume with the configuration that the run was started with."
        )


# What is being sent, out of the way of checkpoints that are deleted meanwhile.
OUTBOX = "_pushing"


class PushesModels:
    """Mixin of trainers, before [`~transformers.Trainer`]: what it pushes, and that `training_args.bin` has no token.

    Each push is one commit of the model's files (see [`model_files`]); one that would send a secret is refused.
    `hub_strategy` "end" pushes at the end, "every_save" at each checkpoint too, in the background; "checkpoint" and
    "all_checkpoints" add the checkpoint to it, with its optimiser state, to go on from. A push in the background that
    fails is logged, and training goes on. With PEFT nothing is pushed before the end.

    Attributes:
        write_card: writes the card into a folder that is about to be pushed.
    """

    write_card: Callable[[Path], None] | None = None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        folder = Path(self.args.output_dir)
        check_no_secrets(folder)
        if self.write_card is not None:
            self.write_card(folder)
        return self._commit(model_files(folder), commit_message, token, revision, run_as_future=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy, checkpoint = self.args.hub_strategy, Path(checkpoint_folder)
        if not self.is_world_process_zero() or strategy == HubStrategy.END or is_peft_model(self.model):
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        outbox = Path(self.args.output_dir) / OUTBOX
        if not is_busy:
            shutil.rmtree(outbox, ignore_errors=True)
        model = outbox / checkpoint.name / "model"
        collect(model_files(checkpoint), model)
        if self.write_card is not None:
            self.write_card(model)
        batches = {f"Training in progress, step {self.state.global_step}": model_files(model)}
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            files = all_files(checkpoint)
            files.pop(TRAINING_ARGS_NAME, None)
            collect(files, outbox / checkpoint.name / "checkpoint")
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            staged = {f"{name}/{path}": outbox / checkpoint.name / "checkpoint" / path for path in files}
            batches[f"Training in progress, step {self.state.global_step}, checkpoint"] = staged
        try:
            for folder in (outbox / checkpoint.name).iterdir():
                check_no_secrets(folder)
        except ValueError as error:
            logger.warning("Step %d is not pushed: %s Training goes on.", self.state.global_step, error)
            return
        jobs = [self._commit(files, message, run_as_future=True) for message, files in batches.items()]
        for job in jobs:
            job.add_done_callback(report_failure)
        if is_busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        shutil.rmtree(Path(self.args.output_dir) / OUTBOX, ignore_errors=True)

    def _commit(
        self,
        files: dict[str, Path],
        message: str,
        token: str | None = None,
        revision: str | None = None,
        run_as_future: bool = False,
    ) -> CommitInfo | Future:
        return HfApi(token=token or self.args.hub_token).create_commit(
            self.hub_model_id,
            operations=[CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message=message,
            revision=revision or self.args.hub_revision,
            run_as_future=run_as_future,
        )
