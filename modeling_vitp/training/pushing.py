"""Pushing while training: only what belongs to the model goes, and no token is written."""

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from accelerate.utils import is_peft_model
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..hub.files import all_files, check_no_secrets, model_files

logger = logging.getLogger(__name__)

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


def collect(files: dict[str, Path], folder: Path) -> None:
    """Gives files a second name in another folder; copies them where the file system has no links."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)


def report_failure(job: Future) -> None:
    error = None if job.cancelled() else job.exception()
    if error is not None:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("A push failed, and training goes on; the next one sends what is missing. %s", cause)
