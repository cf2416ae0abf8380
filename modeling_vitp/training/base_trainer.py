"""Base trainer: complete checkpoints, exact resuming, pushes without secrets."""

import logging
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, is_peft_model
from huggingface_hub import CommitInfo, HfApi
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput, seed_worker
from transformers.utils import PushInProgress

from ..cards.record import METRICS, copy_record, forget_sources, warn_about_newer_releases, write_record
from ..command.errors import one_line
from ..convert.tensor_files import open_like_folder
from ..hub.failures import FAILURES, explain_failure
from ..hub.files import all_files, check_no_secrets, model_files
from ..hub.upload import Contents, gather_contents, link_files, push, push_folder, report_failure, write_model_card
from .batching import EpochBatchSampler, GlobalBatchSampler
from .callbacks import (
    LogPredictionsCallback,
    NamedBatches,
    RunState,
    SaveOnSignal,
    StopAtNotFinite,
    ignore_signals_in_worker,
    next_command,
    take_names,
)
from .checkpointing import (
    FolderLock,
    attempt,
    check_disk_space,
    check_files,
    delete_old_checkpoints,
    last_checkpoint,
    name_checkpoint_in_errors,
    optimizer_bytes,
    publish_checkpoint,
    stop_on_full_disk,
    warn_about_disk_space,
    weight_bytes,
    weight_names,
)
from .resuming import check_loaded, check_resume, fingerprint_data, free_settings, optimizer_settings, start_fingerprint

logger = logging.getLogger(__name__)
# Files of running pushes, linked here because their checkpoints may be deleted during the push.
OUTBOX = "_pushing"
# Record of a run in the output folder of an earlier finished run, until its own weights are saved.
RUNNING = "_running"


class BaseTrainer:
    """Base of all trainers, a mixin that precedes [`~transformers.Trainer`] in the list of base classes.

    - If the loss or the weights are not finite after a step, the run stops with an error that names the step and its
      samples, and the step is not saved.
    - A signal of `save_on_signal` saves a checkpoint at the end of the step and stops the run.
    - Only one run writes to an output folder at a time; a second run raises an error. The record of an earlier finished
      run stays in the folder until its weights are replaced.
    - A checkpoint is complete or does not exist. A resumed run ends with the same weights as an uninterrupted run.
      Changed settings and damaged checkpoint files raise an error.
    - A push is one commit of the model's files and their card (see [`~modeling_vitp.hub.upload.push`]). A push that
      contains a secret is refused, and no token is written. `hub_strategy` "end" pushes at the end; "every_save" also
      pushes at each checkpoint, in the background; "checkpoint" and "all_checkpoints" also push the checkpoint with
      its optimizer state. If a background push fails, the error is logged and training continues. With PEFT, nothing
      is pushed before the end.
    - Predictions of a few samples are drawn during training, see
      [`~modeling_vitp.training.callbacks.LogPredictionsCallback`].

    A subclass implements [`watched_samples`] and [`draw_samples`].

    Attributes:
        fixed: names of further arguments that must match on resume, see [`run_settings`].
        free: names of further arguments that may differ on resume.
        trains_on_answers: whether the loss is that of answers of a language model.
    """

    fixed: ClassVar[tuple[str, ...]] = ()
    free: ClassVar[tuple[str, ...]] = ()
    trains_on_answers: ClassVar[bool] = False

    _resumed_from: str | None = None  # the resumed checkpoint, until the first step begins
    _resumed_state: TrainerState | None = None
    _sums: dict[str, Any] | None = None  # running sums of the checkpoint that is being written
    _unfinished: Path | None = None  # the checkpoint that is being written
    _lock: FolderLock | None = None
    _loader: DataLoader | None = None  # the training loader
    _recorded: dict[str, Any] | None = None  # arguments of `write_record`
    _weights_at_start: str | None = None  # hash of the pretrained weights, if the run starts from a checkpoint

    def run_settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings that must match (`fixed`) or may differ (`free`) on resume.

        [`~modeling_vitp.training.resuming.check_resume_settings`] compares them. A subclass may add others.
        """
        args = self.args
        fixed = {}
        for name in ("seed", "dataloader_drop_last", *self.fixed):
            fixed[name] = getattr(args, name)
        fixed["data_seed"] = self.data_seed
        fixed["global batch size"] = self.get_total_train_batch_size(args)
        fixed.update(optimizer_settings(args))
        free = free_settings(args)
        for name in self.free:
            free[name] = getattr(args, name)
        for name in fixed:
            free.pop(name, None)
        return {"fixed": fixed, "free": free}

    def extra_settings(self) -> dict[str, Any]:
        """Return settings that must match on resume if both the run and the checkpoint have them."""
        if self._weights_at_start:
            return {"weights that it starts from": self._weights_at_start}
        return {}

    def watched_samples(self, number: int) -> list:
        """Return at most `number` samples whose predictions are drawn during training, determined by the seed."""
        raise NotImplementedError

    def draw_samples(self, samples: list, path: Path) -> None:
        """Draw samples with their labels, the model's predictions, and the principal components of its backbone.

        Args:
            samples: samples returned by [`watched_samples`].
            path: PNG file. Its folder also stores the principal components of the first picture.
        """
        raise NotImplementedError

    def save_parts(self) -> None:
        """Save parts of the trained model beside it, in the main process. By default there are none."""

    def draw_summary(self) -> None:
        """Draw the run as one picture. By default there is none."""

    def training_data(self) -> Any:
        """Return the data that [`~modeling_vitp.training.resuming.fingerprint_data`] hashes."""
        return self.train_dataset

    def _from_main_process(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run a step in the main process, and return its result or raise its error as `ValueError` in all processes."""
        result = None
        message = None
        if self.is_world_process_zero():
            try:
                result = step(*args)
            except (ValueError, OSError) as error:
                message = str(error)
        result, message = broadcast_object_list([result, message])
        if message:
            raise ValueError(message)
        return result

    def _last_checkpoint(self) -> str | None:
        # Nodes with folders of their own (save_on_each_node) may have been killed after different checkpoints.
        return self._from_main_process(last_checkpoint, self.args.output_dir)

    @property
    def data_seed(self) -> int:
        """Seed of the data: `data_seed`, or `seed` if it is not set."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        if self._lock is None:
            self._lock = FolderLock(self.args.output_dir)
        releases_lock = not self._lock.is_held
        if self.is_world_process_zero():
            self._lock.acquire()
            warn_about_newer_releases()
        try:
            with stop_on_full_disk(self.args.output_dir):
                return self._train(resume_from_checkpoint, *args, **kwargs)
        except BaseException as error:
            releases_lock = True
            if self._unfinished is not None and self.args.should_save:
                shutil.rmtree(self._unfinished, ignore_errors=True)  # it may have filled the disk
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(self._describe_interruption()) from error
            raise
        finally:
            if releases_lock:
                self._lock.release()

    def _describe_interruption(self) -> str:
        output_dir = self.args.output_dir
        checkpoint = last_checkpoint(output_dir)
        if checkpoint:
            progress = f"the last checkpoint is {checkpoint}"
        else:
            progress = f"nothing is saved in {output_dir} yet"
        return f"interrupted: {progress}. {next_command(self.args)}"

    def _train(self, resume_from_checkpoint: str | bool | None, *train_args, **kwargs) -> TrainOutput:
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise ValueError(
                "fsdp_state_dict_type must be FULL_STATE_DICT, as in recipes/accelerate/fsdp2.yaml: with another one, "
                "which is accelerate's default, no model would be saved at the end."
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(f"No complete checkpoint to resume from found in {self.args.output_dir}.")
        self._prepare_run(resume_from_checkpoint)
        args = self.args
        signals = self._set_callbacks()
        signals.install()
        self._resumed_from = resume_from_checkpoint or None
        self._resumed_state = None
        if resume_from_checkpoint:
            with name_checkpoint_in_errors(resume_from_checkpoint):
                self._resumed_state = TrainerState.load_from_json(Path(resume_from_checkpoint, TRAINER_STATE_NAME))
        # The Trainer would delete old checkpoints before the new one is complete, and push without a check for secrets.
        self._save_total_limit = args.save_total_limit
        self._push_checkpoints = args.push_to_hub
        args.save_total_limit = None
        args.push_to_hub = False
        try:
            output = super().train(resume_from_checkpoint, *train_args, **kwargs)
            # The Trainer's own mean is without the steps before the run was resumed.
            mean = self.mean_loss()
            return TrainOutput(output.global_step, mean.get("train_loss", 0.0), {**output.metrics, **mean})
        except Exception as error:
            with name_checkpoint_in_errors(self._resumed_from):
                raise error
        finally:
            args.save_total_limit = self._save_total_limit
            args.push_to_hub = self._push_checkpoints
            signals.restore()
            if self._loader is not None:
                # End persistent workers here. The garbage collector would delete their queues first, and then wait
                # for each worker until a timeout.
                self._loader._iterator = None

    def _prepare_run(self, checkpoint: str | None) -> None:
        """Check everything that can be checked before the first step, and write the record of the run.

        Args:
            checkpoint: checkpoint to resume from.
        """
        if self._recorded is None:
            config = getattr(self.model, "config", None)
            model_name = getattr(config, "_name_or_path", None)
            # A stream has no length.
            num_samples = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
            self.record(None, [model_name], [{"samples": num_samples}], None)
        self._settings = self.run_settings()
        self._settings["given"] = self.extra_settings()
        self._data = self._from_main_process(lambda: fingerprint_data(self.training_data()))
        if checkpoint:
            with name_checkpoint_in_errors(checkpoint):
                self._from_main_process(check_files, checkpoint)
                self.check_checkpoint(checkpoint)
        elif self.is_world_process_zero():
            self.check_rows()
        self._check_disk_space()
        self._write_record()
        logger.info(self._describe_run())

    def _set_callbacks(self) -> SaveOnSignal:
        """Add the callbacks of this class, in place of those of an earlier training, and return the last one."""
        self._finite = StopAtNotFinite(self)
        callbacks = [RunState(self), self._finite]
        if self.args.watch_samples and self.is_world_process_zero():
            callbacks.append(LogPredictionsCallback(self, self.args.watch_samples))
        signals = SaveOnSignal(self, self.args.save_on_signal)
        callbacks.append(signals)  # last, because it raises after the others
        for callback in callbacks:
            self.pop_callback(type(callback))
            self.add_callback(callback)
        # RunState is first, because it makes checkpoints valid.
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, RunState))
        return signals

    def _describe_run(self) -> str:
        args = self.args
        if args.bf16:
            precision = "bfloat16"
        elif args.fp16:
            precision = "float16"
        else:
            precision = "float32"
        if args.checkpoint_every == 0:
            checkpointing = "without activation checkpointing"
        elif args.checkpoint_every == 1:
            checkpointing = "activation checkpointing"
        else:
            checkpointing = f"activation checkpointing of every {args.checkpoint_every}th layer"
        return (
            f"Training in {args.world_size} process(es), {self.get_total_train_batch_size(args)} samples a step, in "
            f"{precision}, {checkpointing}."
        )

    def check_checkpoint(self, checkpoint: str) -> None:
        """Raise a `ValueError` if the run cannot resume from a checkpoint."""
        check_resume(checkpoint, self._settings, self._data, self.args.allow_changed_data)
        stored_weights = weight_names(checkpoint)
        if not stored_weights or is_peft_model(self.model):
            return
        tied_weights = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        expected_weights = set(self.model.state_dict())
        check_loaded(
            missing=expected_weights - stored_weights - tied_weights,
            unexpected=stored_weights - expected_weights,
        )
        # Tied weights are not stored. Without this, the Trainer would warn about each of them.
        self.model._keys_to_ignore_on_save = sorted(expected_weights - stored_weights) or None

    def train_or_resume(self) -> dict[str, Any]:
        """Train from `resume_from_checkpoint`, or from the last checkpoint in the output folder if it is not set.

        Returns:
            Training metrics with the mean loss over all steps of the run, including steps before it was resumed.
        """
        checkpoint = self.args.resume_from_checkpoint or self._last_checkpoint()
        if checkpoint is not None and not self.args.resume_from_checkpoint:
            logger.info("Resuming from %s. To start a new run, set another output_dir.", checkpoint)
        return self.train(resume_from_checkpoint=checkpoint).metrics

    def check_rows(self) -> None:
        """Check the training data in one process before a new run begins.

        Raises:
            ValueError: if a row is invalid.
        """

    # Batches

    def train_sampler(self) -> GlobalBatchSampler:
        """Return a sampler of the training batches of this process, as keys of `train_dataset`."""
        return EpochBatchSampler(
            len(self.train_dataset),
            self.args.train_batch_size,
            seed=self.data_seed,
            **self._sharding(),
        )

    def _sharding(self) -> dict[str, Any]:
        return {
            "accumulation_steps": self.args.gradient_accumulation_steps,
            "num_processes": self.args.world_size,
            "process_index": self.args.process_index,
            "drop_last": self.args.dataloader_drop_last,
        }

    def get_train_dataloader(self) -> DataLoader:
        self._sampler = self.train_sampler()
        self._sampler.check_not_empty()
        return self.data_loader(self.train_dataset, self.data_collator, batch_sampler=self._sampler)

    def data_loader(self, dataset: Dataset, collator: Any, is_training: bool = True, **kwargs) -> DataLoader:
        """Return a loader of the batches of this process on its device.

        Args:
            dataset: map-style data set or stream.
            collator: function from rows to a batch.
            is_training: whether batches carry the ids of their samples.
            kwargs: `batch_sampler` or `batch_size`.
        """
        loader = self._on_device(self._base_loader(dataset, collator, is_training, **kwargs))
        if is_training:
            self._loader = loader.base_dataloader
        return loader

    def _base_loader(self, dataset: Dataset, collator: Any, is_training: bool, **kwargs) -> DataLoader:
        args = self.args
        seed_this_worker = None
        if is_training:
            seed_this_worker = partial(
                seed_worker,
                num_workers=args.dataloader_num_workers,
                rank=args.process_index,
            )
        return DataLoader(
            dataset,
            collate_fn=NamedBatches(collator) if is_training else collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            # Without a generator of its own, the loader draws worker seeds from the global generator. A resumed run
            # would draw them at other times than an uninterrupted run, and stochastic depth would differ.
            generator=torch.Generator(),
            worker_init_fn=partial(ignore_signals_in_worker, args.save_on_signal, seed_this_worker),
            **kwargs,
        )

    def _on_device(self, loader: DataLoader) -> DataLoader:
        """Move the batches of a loader to the device without sharding, because each process has its own batches."""
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=bool(self.args.accelerator_config.non_blocking),
        )

    def begin_epoch(self) -> None:
        """Set the epoch of the sampler from the number of trained steps."""
        step = self.state.global_step
        self._sampler.is_over = step >= self.state.max_steps  # the run is resumed after its last step
        steps_of_epoch = max(self._sampler.num_global_batches, 1)
        self._sampler.set_epoch(step // steps_of_epoch)

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        resumed_from = self._resumed_from
        self._resumed_from = None  # errors of the data must not name the checkpoint
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._resumed_from = resumed_from
        self._finite.losses = []
        self._finite.samples = take_names(batches)
        return batches, num_items

    # Sums between two logs, which checkpoints store

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._finite.losses.append(loss)
        self._loss_sum += loss
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # training loss; the Trainer loses its own sum when a run is resumed
            num_steps = self.state.global_step - self._last_logged
            loss_sum = self.accelerator.gather(self._loss_sum).mean().item()
            logs["loss"] = loss_sum / num_steps
            self._loss_sum.zero_()
            self._last_logged = self.state.global_step
        super().log(logs, start_time)

    def running_sums(self) -> dict[str, Any]:
        """Return the sums of all processes since the last log, as JSON values."""
        loss_sums = self.accelerator.gather(self._loss_sum).view(-1)
        return {"losses": loss_sums.tolist(), "last_logged": self._last_logged}

    def restore_sums(self, sums: dict[str, Any] | None) -> None:
        """Restore the sums of a checkpoint, or set them to zero if there are none."""
        self._loss_sum = torch.tensor(0.0, device=self.args.device)
        self._last_logged = self.state.global_step
        if sums is None:
            return
        loss_sums = torch.tensor(sums["losses"])
        if len(loss_sums) == self.args.world_size:
            self._loss_sum += loss_sums[self.args.process_index]
        else:  # the number of processes has changed
            self._loss_sum += loss_sums.mean()
        self._last_logged = sums["last_logged"]

    def mean_loss(self) -> dict[str, float]:
        """Return the mean loss over all steps of a finished run, including the steps before it was resumed."""
        # The sum since the last log. Logged means, which are of all processes too, are added below.
        loss_sum = self.accelerator.gather(self._loss_sum).mean().item()
        logged_step = 0
        for logs in self.state.log_history:
            if "loss" in logs:
                loss_sum += logs["loss"] * (logs["step"] - logged_step)
                logged_step = logs["step"]
        num_steps = logged_step + self.state.global_step - self._last_logged
        if num_steps == 0:
            return {}
        return {"train_loss": loss_sum / num_steps}

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, its processor and its card without a token.

        If the folder is a checkpoint of this run, only the model and processor are saved. The record of the run is
        copied if the folder is not `output_dir`, which has it already.
        """
        args = self.args
        folder = Path(output_dir or args.output_dir)
        if self.is_in_train and folder == self._checkpoint():
            self._begin_checkpoint(folder)
        token = args.hub_token
        args.hub_token = None
        try:
            with stop_on_full_disk(args.output_dir):
                super().save_model(output_dir, _internal_call=True)
        finally:
            args.hub_token = token
        if args.should_save:
            open_like_folder(folder)
        if _internal_call:
            return
        self.keep_record()
        if args.should_save:
            if folder != Path(args.output_dir):
                copy_record(args.output_dir, folder)
            kind = "adapter" if is_peft_model(self.model) else "model"
            attempt(folder, "the card", write_model_card, kind, folder, self.hub_model_id)
        if args.push_to_hub:
            self.push_to_hub("Model save", revision=args.hub_revision)

    def _begin_checkpoint(self, folder: Path) -> None:
        """Store the running sums of a checkpoint, and make room for its files."""
        self._sums = self.running_sums()
        self._unfinished = folder
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # remains of a run that was killed during saving
        self.accelerator.wait_for_everyone()
        self._check_disk_space("a checkpoint")

    def _checkpoint(self) -> Path:
        return Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the last trained step."""
        self._save_checkpoint(self.model, None)
        self.publish()

    def publish(self) -> None:
        """Make the checkpoint that was just written valid, delete old checkpoints, and push it in the background."""
        checkpoint = self._checkpoint()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_checkpoint(checkpoint, self._settings, self._data)
        self._unfinished = None
        self.accelerator.wait_for_everyone()
        if self._push_checkpoints:
            self._push_checkpoint(checkpoint)
        if self.args.should_save:
            delete_old_checkpoints(checkpoint, self._save_total_limit, self.state.best_model_checkpoint)

    def _check_disk_space(self, purpose: str = "the model") -> None:
        """Raise [`RunStopped`] if the disk has no room for the weights and the optimizer state.

        Args:
            purpose: what the room is for, in the error. Except for "a checkpoint", the room for the checkpoints that
                follow is checked too, with a warning.
        """
        args = self.args
        if not args.should_save:
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        size_of_weights = weight_bytes(self.model, is_peft_model(self.model))
        size_of_state = 0 if args.save_only_model else optimizer_bytes(self.optimizer)
        check_disk_space(args.output_dir, size_of_weights + size_of_state, purpose)
        if purpose != "a checkpoint" and args.save_strategy != "no" and not args.save_only_model:
            size_of_moments = 2 * weight_bytes(self.model, is_adapter=True)  # Adam has two
            warn_about_disk_space(args.output_dir, size_of_weights + size_of_moments)

    # The Hub

    def record(
        self,
        command: str | None,
        sources: Sequence[str | None],
        data: list[dict[str, Any]],
        evaluated_on: dict[str, Any] | None,
    ) -> None:
        """Set the record of the run for its card, see [`~modeling_vitp.cards.record.write_record`].

        The record is written when training begins. The record of an earlier finished run is kept until [`keep_record`].
        If this method is not called, [`train`] records the checkpoint of the model and the number of samples.
        """
        if self._lock is None:
            self._lock = FolderLock(self.args.output_dir)
        if self.is_world_process_zero():
            self._lock.acquire()
        self._recorded = {"command": command, "sources": sources, "data": data, "evaluated_on": evaluated_on}
        if any(sources) and not is_peft_model(self.model):  # for an adapter, the settings name its base model
            self._weights_at_start = start_fingerprint(self.model, self.is_world_process_zero())

    def _write_record(self) -> None:
        if not self.is_world_process_zero():
            return
        output_dir = Path(self.args.output_dir)
        running = output_dir / RUNNING
        shutil.rmtree(running, ignore_errors=True)
        is_finished = any(output_dir.glob("*.safetensors*")) or (output_dir / METRICS).is_file()
        write_record(running if is_finished else output_dir, settings=self._settings, **self._recorded)

    def keep_record(self) -> None:
        """Replace the record, metrics and sources of an earlier run, after the weights of this run are saved."""
        output_dir = Path(self.args.output_dir)
        running = output_dir / RUNNING
        if not self.is_world_process_zero() or not running.is_dir():
            return
        (output_dir / METRICS).unlink(missing_ok=True)
        forget_sources(output_dir)
        for path in running.iterdir():
            os.replace(path, output_dir / path.name)
        running.rmdir()

    def share(self) -> int:
        """Write the card, or push the folder with its card if `push_to_hub` is set, and return the exit status."""
        try:
            return self._share()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _share(self) -> int:
        args = self.args
        output_dir = Path(args.output_dir)
        if not args.push_to_hub:
            return attempt(output_dir, "the card", write_model_card, "model", output_dir, self.hub_model_id)
        try:
            commit = push_folder(
                HfApi(token=args.hub_token),
                output_dir,
                self.hub_model_id,
                private=args.hub_private_repo,
                revision=args.hub_revision,
                commit_message="End of training",
            )
        except FAILURES as error:
            cause = explain_failure(error, self.hub_model_id)
        except (ValueError, OSError) as error:
            cause = one_line(str(error)).rstrip(".")
        except Exception as error:  # a failed push must not lose the run
            cause = one_line(f"{type(error).__name__}: {error}").rstrip(".")
        else:
            print(f"On the Hub: {commit.commit_url}")
            return 0
        logger.error(
            "The run is saved in %s, but the push failed: %s. Push again with: %s",
            output_dir,
            cause,
            self._push_command(),
        )
        return 1

    def _push_command(self) -> str:
        """Return the command that pushes the output folder."""
        args = self.args
        words = ["vitp", "push_to_hub", str(Path(args.output_dir)), self.hub_model_id, "--what", "model"]
        if args.hub_revision:
            words += ["--revision", args.hub_revision]
        if args.hub_private_repo:
            words.append("--private")
        return shlex.join(words)

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
        if private is not None:
            self.args.hub_private_repo = private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        self.keep_record()
        if not self.is_world_process_zero():
            return None
        self.finish_pushes()
        api = HfApi(token=token or self.args.hub_token)
        push_output = partial(
            push_folder,
            api,
            self.args.output_dir,
            self.hub_model_id,
            private=self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            what="adapter" if is_peft_model(self.model) else "model",
        )
        if blocking:
            return push_output()
        return api.run_as_future(push_output)

    def finish_pushes(self) -> None:
        """Wait for background pushes to end."""
        if self.push_in_progress is not None:
            self.push_in_progress.wait_until_done()
        if self.is_world_process_zero():  # the only process that knows when the pushes end
            shutil.rmtree(Path(self.args.output_dir) / OUTBOX, ignore_errors=True)

    push_in_progress: PushInProgress | None = None

    def _push_checkpoint(self, checkpoint: Path) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END or is_peft_model(self.model):
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if not is_busy:
            shutil.rmtree(Path(args.output_dir) / OUTBOX, ignore_errors=True)
        try:
            contents = self._contents_of(checkpoint)
        except ValueError as error:
            logger.warning("Step %d is not pushed: %s Training continues.", self.state.global_step, error)
            return
        api = HfApi(token=args.hub_token)
        job = api.run_as_future(
            push,
            api,
            contents,
            self.hub_model_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        job.add_done_callback(report_failure)
        if is_busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _contents_of(self, checkpoint: Path) -> Contents:
        """Return the files of a checkpoint to push, as hard links that survive the deletion of the checkpoint."""
        strategy = self.args.hub_strategy
        output_dir = Path(self.args.output_dir)
        model_folder = output_dir / OUTBOX / checkpoint.name / "model"
        state_folder = output_dir / OUTBOX / checkpoint.name / "checkpoint"
        link_files(model_files(checkpoint), model_folder)
        running = output_dir / RUNNING
        record_folder = running if running.is_dir() else output_dir
        contents = gather_contents("model", model_folder, self.hub_model_id, run=record_folder)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            state_files = all_files(checkpoint)
            state_files.pop(TRAINING_ARGS_NAME, None)
            link_files(state_files, state_folder)
            check_no_secrets(state_folder)
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            for path in state_files:
                contents.files[f"{name}/{path}"] = state_folder / path
        return contents
