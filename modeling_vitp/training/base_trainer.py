"""Base of all trainers: complete checkpoints, exact resuming, pushes without secrets."""

import inspect
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from huggingface_hub import CommitInfo, HfApi
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput, rotate_checkpoints
from transformers.utils import PushInProgress
from trl import SFTTrainer

from ..cards.record import METRICS, write_record
from ..command.errors import one_line
from ..convert.tensor_files import open_like_folder
from ..hub.failures import FAILURES, explain_failure
from ..hub.files import all_files, check_no_secrets, model_files
from ..hub.upload import Contents, gather_contents, link_files, push, push_folder, report_failure, write_model_card
from .batching import EpochBatchSampler
from .callbacks import LogPredictionsCallback, NamedBatches, SaveOnSignal, StopAtNotFinite, outlive_signals, take_names
from .checkpointing import (
    STAGING,
    FolderLock,
    attempt,
    check_files,
    check_room,
    going_on_from,
    last_checkpoint,
    optimizer_bytes,
    publish_checkpoint,
    told_if_full,
    warn_of_room,
    weight_bytes,
)
from .fingerprint import fingerprint_data
from .resume_config import check_going_on, start_fingerprint

logger = logging.getLogger(__name__)
# What is being sent, out of the way of checkpoints that are deleted meanwhile.
OUTBOX = "_pushing"
# The record of a run in the folder of a finished one, until it is finished itself.
RUNNING = "_running"


class BaseTrainer:
    """Base of all trainers, before [`~transformers.Trainer`].

    - A step with a loss or weights that are not finite ends the run: it is named, with its samples, and not saved.
    - A signal of `save_on_signal` saves at the end of the step and ends the run, unfinished.
    - One run writes to a folder at a time; another one is refused. What is recorded of a finished run in it stays until
      the weights are replaced.
    - A checkpoint is whole or not there. A run that goes on from one ends as the run that never stopped; one of other
      settings is an error, and so is a file in it that is not what was written.
    - A push is one commit of the model's files and their card (see [`~modeling_vitp.hub.upload.push`]); one that would
      send a secret is refused, and no token is written. `hub_strategy` "end" pushes at the end, "every_save" at each
      checkpoint too, in the background; "checkpoint" and "all_checkpoints" add the checkpoint to it, with its
      optimizer state, to go on from. A push in the background that fails is logged, and training goes on. With PEFT
      nothing is pushed before the end.
    - Predictions of a few samples are drawn in training, see
      [`~modeling_vitp.training.callbacks.LogPredictionsCallback`].

    A subclass gives [`run_settings`], [`watched_samples`] and [`draw_samples`], and keeps the batches of training,
    which have a `set_epoch`, as `_train_batches`.
    """

    _is_saving = False
    _resumed_from: str | None = None  # until the first batch is asked for
    _lock: FolderLock | None = None
    _loader: DataLoader | None = None  # of training
    _recorded: tuple | None = None
    _weights_at_start: str | None = None  # in short, where they were named

    def run_settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings that must match (`fixed`) and may differ (`free`) when a run goes on, see
        [`~modeling_vitp.training.resume_config.check_resume_settings`].
        """
        raise NotImplementedError

    def extra_settings(self) -> dict[str, Any]:
        """Return settings that must match when a run goes on, where both the run and the checkpoint know them."""
        return {"weights that it starts from": self._weights_at_start} if self._weights_at_start else {}

    def watched_samples(self, number: int) -> list:
        """Return the samples, at most `number`, whose predictions are drawn in training: the same for the same seed."""
        raise NotImplementedError

    def draw_samples(self, samples: list, path: Path) -> None:
        """Draw samples with their labels, the model's predictions, and the principal components of its backbone.

        Args:
            samples: some of [`watched_samples`].
            path: of the PNG, in whose folder the components of the first picture are kept.
        """
        raise NotImplementedError

    def training_data(self) -> Any:
        """Return what [`~modeling_vitp.training.fingerprint.fingerprint_data`] hashes, to detect changes on resume."""
        return self.train_dataset

    def _from_main_process(self, step: Callable[..., Any], *args: Any) -> Any:
        """Return what a step gives in the main process, in all of them; raise its `ValueError` in all of them."""
        result, error = None, None
        if self.is_world_process_zero():
            try:
                result = step(*args)
            except (ValueError, OSError) as wrong:
                error = str(wrong)
        result, error = broadcast_object_list([result, error])
        if error:
            raise ValueError(error)
        return result

    @property
    def data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        lock = self._lock = self._lock or FolderLock(self.args.output_dir)
        is_outermost = not lock.is_held
        if self.is_world_process_zero():
            lock.acquire()
        try:
            with told_if_full(self.args.output_dir):
                return self._train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            is_outermost = True
            raise
        finally:
            if is_outermost:
                lock.release()

    def _train(self, resume_from_checkpoint: str | bool | None, *args, **kwargs) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir} to resume from.")
        self._settings = self.run_settings() | {"given": self.extra_settings()}
        self._data = self._from_main_process(lambda: fingerprint_data(self.training_data()))
        if resume_from_checkpoint:
            with going_on_from(resume_from_checkpoint):
                self._from_main_process(check_files, resume_from_checkpoint)
                self.check_checkpoint(resume_from_checkpoint)
        elif self.is_world_process_zero():
            self.check_rows()
        self._check_room()
        self._write_record()
        self._finite = StopAtNotFinite(self)
        names = self.args.saving_signals
        if self.args.enable_jit_checkpoint:
            # transformers' own writes beside the staging folder, and then returns as if the run were at its end.
            self.pop_callback(JITCheckpointCallback)
            names = sorted({"SIGTERM", *names})
        signals = SaveOnSignal(self, names)
        for callback in (self._finite, signals):
            self.pop_callback(type(callback))
            self.add_callback(callback)
        self.pop_callback(LogPredictionsCallback)
        if self.args.watch_samples and self.is_world_process_zero():
            self.add_callback(LogPredictionsCallback(self, self.args.watch_samples))
        signals.install()
        self._resumed_from = resume_from_checkpoint or None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            with going_on_from(self._resumed_from):
                raise error
        finally:
            signals.restore()
            if self._loader is not None:
                # Its persistent workers end here. Left to the garbage collector, which takes their queues first, each
                # would be waited for in vain.
                self._loader._iterator = None

    def check_checkpoint(self, checkpoint: str) -> None:
        """Raises a `ValueError` if the run may not go on from a checkpoint."""
        check_going_on(checkpoint, self._settings, self._data, self.args.allow_changed_data)

    def train_or_resume(self) -> dict[str, Any]:
        """Train from `resume_from_checkpoint` if it is given, or else from the last checkpoint in the output folder.

        Returns:
            The metrics of training, with the mean loss over all steps of the run; the Trainer's is of those since it
            was resumed.
        """
        checkpoint = self.args.resume_from_checkpoint or last_checkpoint(self.args.output_dir)
        if checkpoint is not None and not self.args.resume_from_checkpoint:
            logger.info("Going on from %s. To start afresh, give another output_dir.", checkpoint)
        batch_size = self.get_total_train_batch_size(self.args)
        logger.info("Training in %d process(es), %d samples a step.", self.args.world_size, batch_size)
        return self.train(resume_from_checkpoint=checkpoint).metrics | mean_loss(self)

    def check_rows(self) -> None:
        """Looks, in one process and before a run that begins at its start, at what it is to be trained on.

        Raises:
            ValueError: if some of it cannot be used.
        """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochBatchSampler:
        self._train_batches = EpochBatchSampler(
            len(self.train_dataset if train_dataset is None else train_dataset),
            self._train_batch_size,
            self.args.gradient_accumulation_steps,
            self.args.world_size,
            self.args.process_index,
            self.data_seed,
            drop_last=self.args.dataloader_drop_last,
        )
        self._train_batches.check_not_empty()
        return self._train_batches

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        collator = self.data_collator
        if is_training:
            self.data_collator = NamedBatches(collator)
        try:
            dataloader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator
        # The seeds of workers would be drawn from the global generator, at other times in a run that is resumed than in
        # one that never stopped, and stochastic depth would differ from there on.
        loader = getattr(dataloader, "base_dataloader", dataloader)
        loader.generator = torch.Generator()
        loader.worker_init_fn = partial(outlive_signals, self.args.saving_signals, loader.worker_init_fn)
        if is_training:
            self._loader = loader
        return dataloader

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        self._resumed_from = None
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._finite.losses, self._finite.samples = [], take_names(batches)
        return batches, num_items

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._finite.losses.append(loss)
        return loss

    def _run_epoch(self, *args, epoch: int, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # Resumed after its last step, where the Trainer would train one more.
            self.control.should_training_stop = True
            return
        # The Trainer does it too, but does not reach it in several processes once it skips batches.
        self._train_batches.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    # Checkpoints

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with going_on_from(checkpoint):
            super()._load_rng_state(checkpoint)

    def save_checkpoint(self) -> None:
        """Saves the step that was just trained, whenever."""
        self._save_checkpoint(self.model, None)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._is_saving else folder

    def _check_room(self) -> None:
        """Before the first step, and before each save: for weights and optimizer, beside what is there already."""
        args = self.args
        if not args.should_save:
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        weights = weight_bytes(self.model, is_peft_model(self.model))
        state = 0 if args.save_only_model else optimizer_bytes(self.optimizer)
        check_room(args.output_dir, weights + state, "a checkpoint" if self._is_saving else "the model")
        if not self._is_saving and args.save_strategy != "no" and not args.save_only_model:
            trained = weight_bytes(self.model, is_adapter=True)
            warn_of_room(args.output_dir, weights + 2 * trained)  # Adam's two moments

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with told_if_full(self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        open_like_folder(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        folder = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoint, staged = os.path.join(folder, name), os.path.join(folder, STAGING, name)
        if self.args.should_save:
            shutil.rmtree(os.path.join(folder, STAGING), ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            self._check_room()
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(os.path.join(folder, STAGING), ignore_errors=True)
            raise
        finally:
            self._is_saving = False
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = checkpoint
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(staged, checkpoint, self._settings, self._data)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self.args.should_save:
            rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    # The Hub

    def record(
        self,
        argv: Sequence[str] | None,
        sources: Sequence[str | None],
        data: list[dict[str, Any]],
        evaluated_on: dict[str, Any] | None,
    ) -> None:
        """Records what the run is for its card, as soon as it trains; see
        [`~modeling_vitp.cards.record.write_record`]. Until [`keep_record`], what is there of a finished run stays.
        """
        self._lock = FolderLock(self.args.output_dir)
        if self.is_world_process_zero():
            self._lock.acquire()
        self._recorded = argv, sources, data, evaluated_on
        if any(sources) and not is_peft_model(self.model):  # the adapter's settings know what it lies on
            self._weights_at_start = start_fingerprint(self.model, self.is_world_process_zero())

    def _write_record(self) -> None:
        if self._recorded is None or not self.is_world_process_zero():
            return
        argv, *about = self._recorded
        folder, running = Path(self.args.output_dir), Path(self.args.output_dir) / RUNNING
        shutil.rmtree(running, ignore_errors=True)
        is_finished = any(folder.glob("*.safetensors*")) or (folder / METRICS).is_file()
        write_record(running if is_finished else folder, argv, self._settings, *about)

    def _record_folder(self) -> Path:
        running = Path(self.args.output_dir) / RUNNING
        return running if running.is_dir() else Path(self.args.output_dir)

    def keep_record(self) -> None:
        """Replaces the record of the run before, now that the weights are of this one."""
        running = Path(self.args.output_dir) / RUNNING
        if self.is_world_process_zero() and running.is_dir():
            for path in running.iterdir():
                os.replace(path, running.parent / path.name)
            running.rmdir()

    def share(self) -> int:
        """Writes the card, and pushes the output folder if `push_to_hub` is set, at the end; the exit status."""
        try:
            return self._share()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _share(self) -> int:
        args, output_dir = self.args, Path(self.args.output_dir)
        if not args.push_to_hub:
            return attempt(output_dir, "the card", write_model_card, "model", output_dir, self.hub_model_id)
        self._finish_current_push()
        where = self.hub_model_id, args.hub_private_repo, args.hub_revision
        try:
            done = push_folder(HfApi(token=args.hub_token), output_dir, *where, "End of training")
        except FAILURES as error:
            cause = explain_failure(error, self.hub_model_id)
        except (ValueError, OSError) as error:
            cause = one_line(str(error)).rstrip(".")
        except Exception as error:  # of the card or a library: nothing of the run is lost for it
            cause = one_line(f"{type(error).__name__}: {error}").rstrip(".")
        else:
            print(f"On the Hub: {done.commit_url}")
            return 0
        command = f"vitp push_to_hub {shlex.quote(str(output_dir))} {self.hub_model_id} --what model"
        logger.error("The run is complete in %s, but not on the Hub: %s. Go on with: %s", output_dir, cause, command)
        return 1

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
        api, what = HfApi(token=token or self.args.hub_token), "adapter" if is_peft_model(self.model) else "model"
        private = self.args.hub_private_repo if private is None else private
        revision = revision or self.args.hub_revision
        arguments = api, self.args.output_dir, self.hub_model_id, private, revision, commit_message, what
        return push_folder(*arguments) if blocking else api.run_as_future(push_folder, *arguments)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        shutil.rmtree(Path(self.args.output_dir) / OUTBOX, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._is_saving:
            return  # what is not in its place yet would be moved during the upload
        strategy, checkpoint = self.args.hub_strategy, Path(checkpoint_folder)
        if not self.is_world_process_zero() or strategy == HubStrategy.END or is_peft_model(self.model):
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not is_busy:
            shutil.rmtree(Path(self.args.output_dir) / OUTBOX, ignore_errors=True)
        try:
            contents = self._contents_of(checkpoint)
        except ValueError as error:
            logger.warning("Step %d is not pushed: %s Training goes on.", self.state.global_step, error)
            return
        api, message = HfApi(token=self.args.hub_token), f"Training in progress, step {self.state.global_step}"
        private, revision = self.args.hub_private_repo, self.args.hub_revision
        job = api.run_as_future(push, api, contents, self.hub_model_id, private, revision, message)
        job.add_done_callback(report_failure)
        if is_busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _contents_of(self, checkpoint: Path) -> Contents:
        """What goes to the Hub of a checkpoint, held by second names of its files."""
        strategy, outbox = self.args.hub_strategy, Path(self.args.output_dir) / OUTBOX / checkpoint.name
        link_files(model_files(checkpoint), outbox / "model")
        contents = gather_contents("model", outbox / "model", self.hub_model_id, run=self._record_folder())
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            files = all_files(checkpoint)
            files.pop(TRAINING_ARGS_NAME, None)
            link_files(files, outbox / "checkpoint")
            check_no_secrets(outbox / "checkpoint")
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            contents.files |= {f"{name}/{path}": outbox / "checkpoint" / path for path in files}
        return contents


def mean_loss(trainer: Trainer) -> dict[str, float]:
    """Return the mean loss over all steps of a run that has ended."""
    total, last = trainer._tr_loss.item(), 0  # of the steps since the last log, and then of all
    for logs in trainer.state.log_history:
        if "loss" in logs:
            total += logs["loss"] * (logs["step"] - last)
            last = logs["step"]
    num_steps = last + trainer.state.global_step - trainer._globalstep_last_logged
    return {"train_loss": total / num_steps} if num_steps else {}


# The private members of transformers' and TRL's trainers that ours override or read, each for want of a public one.
# They are looked for when training is first imported, so that a release without one is named before a run.
TESTED = {"transformers": "5.24", "trl": "1.16"}  # setup.cfg caps there

# Overridden: by name, the parameters that are passed by name or relied on.
OVERRIDDEN = {
    # Which rows make a batch, with which collator.
    "_get_dataloader": {"dataset", "description", "batch_size", "is_training"},
    "_get_train_sampler": {"train_dataset"},
    "_get_eval_sampler": {"eval_dataset"},
    # Tiles that are normalised on the device.
    "_prepare_inputs": {"inputs"},
    # The epoch reaches the collator, and a run that was at its last step trains no further one.
    "_run_epoch": {"epoch", "epochs_trained", "resume_from_checkpoint", "steps_trained_in_current_epoch"},
    # Where a stream was.
    "_init_training_state": {"max_steps", "num_update_steps_per_epoch", "num_train_epochs", "trial"},
    "_save_rng_state": {"output_dir"},
    "_load_rng_state": {"checkpoint"},
    # Checkpoints that are whole or not there, without a token, and loaded strictly.
    "_get_output_dir": {"trial"},
    "_save": {"output_dir", "state_dict"},
    "_save_checkpoint": {"model", "trial"},
    "_issue_warnings_after_load": {"load_result"},
    # Layers that are compiled by themselves.
    "_build_accelerator_args": {"kwargs"},
    # Pushes of the model's files alone.
    "_push_from_checkpoint": {"checkpoint_folder"},
    "_finish_current_push": set(),
}
# Read and written: running sums, which a checkpoint has to keep.
READ = {
    Trainer: ("_tr_loss", "_globalstep_last_logged", "_train_batch_size"),
    SFTTrainer: ("_metrics", "_total_train_tokens"),
}


def missing_members() -> list[str]:
    """Return what the installed releases lack of these, in words."""
    missing = []
    for name, parameters in OVERRIDDEN.items():
        method = getattr(Trainer, name, None)
        lacking = parameters - set(inspect.signature(method).parameters) if method else None
        if lacking is None:
            missing.append(f"Trainer.{name}")
        elif lacking:
            missing.append(f"the parameter {', '.join(sorted(lacking))} of Trainer.{name}")
    for trainer, names in READ.items():
        code = (getattr(member, "__code__", None) for member in vars(trainer).values())
        known = {name for part in code if part is not None for name in part.co_names}
        missing += [f"{trainer.__name__}.{name}" for name in names if name not in known]
    return missing


def check_members() -> None:
    """Raise an `ImportError` that says which releases are needed."""
    missing = missing_members()
    if missing:
        found = ", ".join(f"{name} {version(name)}" for name in TESTED)
        needed = " ".join(f"'{name}=={release}.*'" for name, release in TESTED.items())
        raise ImportError(f"Training does not work with {found}, which lack {'; '.join(missing)}: pip install {needed}")


check_members()
