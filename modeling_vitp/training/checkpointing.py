"""Checkpoints that are whole or not there, and that know the settings of the run they belong to."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

logger = logging.getLogger(__name__)

# Checkpoints are written in this folder of the output folder. The Hub's uploads leave names with an underscore out.
STAGING = "_saving"
RECORD_NAME = "checkpoint.json"


def publish_checkpoint(staged: str | Path, checkpoint: str | Path, settings: dict[str, Any]) -> None:
    """Gives a checkpoint that was written in the staging folder its place, by a rename.

    A record is added to it: every file with its size, by which [`is_complete`] tells, and the settings of the run.
    Everything is flushed to the disk before the rename. An older checkpoint of that name is replaced.

    Args:
        staged: the checkpoint, in a folder on the same file system.
        checkpoint: where it belongs, `checkpoint-<step>`.
        settings: the settings of the run, see [`check_settings`].
    """
    staged, checkpoint = Path(staged), Path(checkpoint)
    record = staged / RECORD_NAME
    record.unlink(missing_ok=True)
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    record.write_text(json.dumps({"files": sizes, "settings": settings}, indent=2) + "\n")
    for path in [*files, record, *(path for path in staged.rglob("*") if path.is_dir()), staged]:
        flush(path)
    if checkpoint.exists():
        replaced = staged.parent / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        checkpoint.rename(replaced)
    staged.rename(checkpoint)
    flush(checkpoint.parent)
    shutil.rmtree(staged.parent)


def flush(path: Path) -> None:
    """Writes a file or a folder's entries through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has its record and every file in it, in full size."""
    checkpoint = Path(checkpoint)
    try:
        sizes = json.loads((checkpoint / RECORD_NAME).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def last_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint of the highest step that is complete; a warning names those that are not. `None` without any."""
    checkpoints = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            checkpoints[int(match[1])] = path
    for step in sorted(checkpoints, reverse=True):
        if is_complete(checkpoints[step]):
            return str(checkpoints[step])
        logger.warning(
            "%s is not a complete checkpoint and is passed over. Name it as resume_from_checkpoint to use it all the "
            "same, or delete it.",
            checkpoints[step],
        )
    return None


def check_settings(checkpoint: str | Path, settings: dict[str, dict[str, Any]]) -> None:
    """Compares a run's settings with those that a checkpoint was made under.

    Args:
        checkpoint: a checkpoint; one without a record is only warned about.
        settings: `fixed`, which may not differ, and `free`, which may, with a warning.

    Raises:
        ValueError: names each fixed setting that differs, with both values.
    """
    record = Path(checkpoint) / RECORD_NAME
    if not record.is_file():
        logger.warning("%s has no record of its settings: whether the run goes on exactly is not known.", checkpoint)
        return
    recorded = json.loads(record.read_text())["settings"]
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the record
    differences = {
        kind: [
            f"{name} was {recorded[kind].get(name)!r} and is {value!r}"
            for name, value in settings[kind].items()
            if recorded[kind].get(name) != value
        ]
        for kind in settings
    }
    if differences["fixed"]:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(differences['fixed'])}. Restore them to go "
            "on; or start a new run from its weights: give the checkpoint as model_name_or_path, and another "
            "output_dir."
        )
    if differences["free"]:
        logger.warning(
            "Going on from %s with changed settings, so not as a run that never stopped: %s.",
            checkpoint,
            "; ".join(differences["free"]),
        )


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
