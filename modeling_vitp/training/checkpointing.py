"""Checkpoints that are whole or not there, and that know the settings of the run they belong to."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..cards.record import read_json
from .values import check_type

logger = logging.getLogger(__name__)

# Checkpoints are written in this folder of the output folder. The Hub's uploads leave names with an underscore out.
STAGING = "_saving"
RECORD_NAME = "checkpoint.json"
TRAINING_DATA = "training data"  # the setting that says, in short, what is trained on
# What the record of a checkpoint holds; `hashes` and `data` are not in older ones.
RECORD = {
    "files": dict[str, int],
    "hashes": dict[str, str],
    "settings": dict[str, dict[str, Any]],
    "data": dict[str, str | None] | None,
}


def publish_checkpoint(
    staged: str | Path, checkpoint: str | Path, settings: dict[str, Any], data: dict[str, str | None] | None = None
) -> None:
    """Gives a checkpoint that was written in the staging folder its place, by a rename.

    A record is added to it: every file with its size, by which [`is_complete`] tells, and its SHA-256, by which
    [`check_files`] does (1.4 GB a second on one core of an AMD EPYC); the settings of the run; and the fingerprint of
    its data.
    Everything is flushed to the disk before the rename. An older checkpoint of that name is replaced.

    Args:
        staged: the checkpoint, in a folder on the same file system.
        checkpoint: where it belongs, `checkpoint-<step>`.
        settings: the settings of the run, see [`check_settings`].
        data: the fingerprint of what it reads, see [`~modeling_vitp.training.fingerprint.fingerprint`].
    """
    staged, checkpoint = Path(staged), Path(checkpoint)
    record = staged / RECORD_NAME
    record.unlink(missing_ok=True)
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    hashes = {path.relative_to(staged).as_posix(): hash_of(path) for path in files}
    contents = {"files": sizes, "hashes": hashes, "settings": settings, "data": data}
    record.write_text(json.dumps(contents, indent=2) + "\n")
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


def hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint_record(checkpoint: str | Path) -> dict[str, Any]:
    """The record of a checkpoint; empty without one. Raises a `ValueError` that names one that is damaged."""
    path = Path(checkpoint) / RECORD_NAME
    record = read_json(path)
    for name, kind in RECORD.items():
        if name in record:
            check_type(f"{path}: {name}", record[name], kind)
    missing = {"files", "settings"} - record.keys()
    if record and (missing or not {"fixed", "free"} <= record["settings"].keys()):
        raise ValueError(f"{path} is no record of a checkpoint: it needs the files, and fixed and free settings.")
    return record


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has its record and every file in it, in full size."""
    checkpoint = Path(checkpoint)
    try:
        sizes = read_checkpoint_record(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def check_files(checkpoint: str | Path) -> None:
    """Reads a checkpoint, and raises a `ValueError` that names the first file that is not what was written.

    One without a record is only looked at for the state of a trainer.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{checkpoint} is no checkpoint: it has no {TRAINER_STATE_NAME}.")
    for name, expected in read_checkpoint_record(checkpoint).get("hashes", {}).items():
        path = checkpoint / name
        if not path.is_file() or hash_of(path) != expected:
            what = "not what was written" if path.is_file() else "missing"
            raise ValueError(
                f"{path} is {what}. Delete {checkpoint} to go on from an earlier checkpoint; or, if it was changed on "
                f"purpose, its {RECORD_NAME}."
            )


@contextmanager
def going_on_from(checkpoint: str | Path | None) -> Iterator[None]:
    """Names the checkpoint that is read in an error that does not."""
    try:
        yield
    except Exception as error:  # of many kinds, where a file holds other things than it should
        if checkpoint is None or isinstance(error, ValueError) and str(checkpoint) in str(error):
            raise
        cause = " ".join(str(error).split())
        cause = cause if isinstance(error, ValueError) else f"{type(error).__name__}: {cause}"
        raise ValueError(f"The run cannot go on from {checkpoint}: {cause}") from error


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
            "%s is not a complete checkpoint and is passed over. Name it as resume_from_checkpoint to see why, or "
            "delete it.",
            checkpoints[step],
        )
    return None


def check_going_on(
    checkpoint: str | Path,
    settings: dict[str, dict[str, Any]],
    data: dict[str, str | None],
    allow_changed_data: bool = False,
) -> None:
    """Raises a `ValueError` if a run with these settings and data may not go on from a checkpoint, see
    [`check_settings`] and [`check_data`], or it has weights alone.
    """
    if not any(Path(checkpoint).glob("rng_state*.pth")):
        raise ValueError(
            f"{checkpoint} has weights alone, as save_only_model leaves them, so that the run cannot go on. Start a "
            "new one: give the checkpoint as model_name_or_path, and another output_dir."
        )
    check_data(checkpoint, data, allow_changed_data)
    if allow_changed_data:
        fixed = {name: value for name, value in settings["fixed"].items() if name != TRAINING_DATA}
        settings = settings | {"fixed": fixed}
    check_settings(checkpoint, settings)


def check_tokenizer(checkpoint: str | Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises a `ValueError` if a tokenizer is another than that of a checkpoint, as that of a model from scratch is if
    the texts that it is trained on have changed: what the model has learned of a token would be told of another one.
    """
    file = Path(checkpoint) / "tokenizer.json"
    if not file.is_file():
        return
    stored, given = Tokenizer.from_file(str(file)).get_vocab(), tokenizer.get_vocab()
    if stored != given:
        raise ValueError(
            f"The tokenizer of {checkpoint} has {len(stored)} tokens, and the run's {len(given)}, not the same: that "
            "of a model from_scratch is trained on the texts, which have changed. Restore them; or start a new run "
            "from its weights: give the checkpoint as model_name_or_path, and another output_dir."
        )


def check_settings(checkpoint: str | Path, settings: dict[str, dict[str, Any]]) -> None:
    """Compares a run's settings with those that a checkpoint was made under.

    Args:
        checkpoint: a checkpoint; one without a record is only warned about.
        settings: `fixed`, which may not differ, and `free`, which may, with a warning; perhaps `model`, what trains of
            it, and `given`, what it begins with and how it reads, which may not differ either, but which older
            checkpoints do not know; of what is given a trainer in Python need not know all.

    Raises:
        ValueError: names each setting that differs and may not, with both values.
    """
    recorded = read_checkpoint_record(checkpoint).get("settings")
    if recorded is None:
        logger.warning("%s has no record of its settings: whether the run goes on exactly is not known.", checkpoint)
        return
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the record
    differences = {
        kind: [
            f"{name} was {recorded[kind].get(name)!r} and is {value!r}"
            for name, value in settings[kind].items()
            if recorded[kind].get(name) != value and (kind != "given" or name in recorded[kind])
        ]
        for kind in settings
        if kind in recorded
    }
    wrong = [item for kind in ("fixed", "model", "given") for item in differences.get(kind, [])]
    if wrong:
        start = " from its weights: give the checkpoint as model_name_or_path, and another output_dir."
        if recorded.get("model", {}).get("use_peft"):
            start = ": give another output_dir."  # an adapter is no model to start from
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(wrong)}. Restore them to go on; or "
            f"start a new run{start}"
        )
    if differences["free"]:
        logger.warning(
            "Going on from %s with changed settings, so not as a run that never stopped: %s.",
            checkpoint,
            "; ".join(differences["free"]),
        )


def check_loaded(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises a `ValueError` if a checkpoint and the model that it was loaded into have not the same keys."""
    if missing or unexpected:
        raise ValueError(
            f"The checkpoint does not fit the model: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}. Resume with the configuration that the run was started with."
        )


def check_data(checkpoint: str | Path, data: dict[str, str | None], may_change: bool = False) -> None:
    """Compares the fingerprint of a run's data with that of a checkpoint, which older ones lack: a warning.

    Args:
        may_change: whether other data are a warning, too.

    Raises:
        ValueError: names the parts that differ, and the way around it.
    """
    recorded = read_checkpoint_record(checkpoint).get("data")
    if recorded is None:
        logger.warning("%s has no fingerprint of its data: whether they are the same is not known.", checkpoint)
        return
    names = [name for name in {**recorded, **data} if recorded.get(name) != data.get(name)]
    unknown = [name for name in data if data[name] is None]
    if unknown:
        logger.warning("Whether %s changed since %s is not known.", ", ".join(map(repr, unknown)), checkpoint)
    names = [name for name in names if name not in unknown]
    if not names:
        return
    changed = f"{', '.join(map(repr, names))} changed since {checkpoint} was written"
    if not may_change:
        raise ValueError(
            f"What is trained on is not what it was: {changed} (contents, sizes or times of files). Restore it to go "
            "on as a run that never stopped; go on all the same with --allow_changed_data; or start a new run from its "
            "weights: give the checkpoint as model_name_or_path, and another output_dir."
        )
    logger.warning("Going on with other data, so not as a run that never stopped: %s.", changed)
