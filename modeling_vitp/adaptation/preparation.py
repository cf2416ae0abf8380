"""Checks before anything runs: arguments, folders, and settings of an earlier call."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..evaluation.comparison import Progress, check_same_settings
from ..modeling_vitp_backbone import open_vit_config
from ..pretraining.loading import check_from_scratch
from ..training.checkpointing import FolderLock
from .arguments import AdaptArguments
from .backbones import baseline_paths, start_settings
from .bundle import change_texts
from .labels import instructions_digest, labels_digest

# Arguments that may differ when a run resumes.
CHANGEABLE = ("dry_run", "force", "allow_overlap", "output_dir", "budget", "seconds")
# Settings that the questions and their checks depend on.
SETTINGS_OF_CHECKS = {
    "data",
    "labels",
    "files of instructions",
    "instructions",
    "task",
    "class_names",
    "scene_pattern",
    "plugins",
    "seed",
    "bands",
}
CHECKED_STAGES = ("instructions", "checks")


def check_arguments(args: AdaptArguments) -> None:
    """Raise a `ValueError` for folders that overlap, or for a start or a baseline that is not a ViT."""
    processes = PartialState().num_processes
    if processes > 1:  # Most stages run in one process, and the others would wait for it.
        raise ValueError(f"adapt runs in one process, got {processes}. Start it without accelerate launch.")
    data = Path(args.data).resolve()
    folder = Path(args.output_dir).resolve()
    if data.is_relative_to(folder) or folder.is_relative_to(data):
        raise ValueError(f"data and output_dir must not contain each other, got {data} and {folder}.")
    baselines = baseline_paths(args)
    if args.start is not None and is_missing(args.start):
        raise ValueError(f"start: {args.start!r} not found. Expected a folder or Hub id of a ViT.")
    for path in baselines:
        if is_missing(path):
            raise ValueError(
                f"baselines: {path!r} not found. Expected start, random, mae, or a folder or Hub id of a ViT."
            )
    for path in baselines:
        open_vit_config(path)
    start = start_settings(args)
    if args.language_model not in (None, start.get("language_model")):
        raise ValueError(
            f"language_model must be combined with a ViT as start, got {args.language_model!r} for the start {start}. "
            "Remove it, or set start to a ViT, without from_scratch in pretraining."
        )
    check_from_scratch(start.get("from_scratch"))
    if "vision_model" in start:
        open_vit_config(start["vision_model"])


def is_missing(path: str) -> bool:
    """Return whether a path is neither a Hub id, such as `facebook/dinov2-base`, nor exists."""
    return "/" not in path and not Path(path).exists()


def open_progress(args: AdaptArguments, lock: FolderLock) -> Progress:
    """Lock the output folder, and return the results of the parts that an earlier call with the same data finished.

    If the earlier call had no plan that it kept, other settings begin anew, except that questions and their checks are
    kept unless the labels, the instructions or another setting of them changed.

    Args:
        args: arguments of the command.
        lock: lock of the output folder.

    Raises:
        ValueError: if the folder has trainings with other settings or data.
    """
    lock.acquire()
    folder = lock.folder
    settings = settings_of_call(args)
    record = folder / "settings.json"
    progress = Progress(folder / "progress.json")
    if record.is_file() and "plan" not in progress.parts:
        recorded = json.loads(record.read_text())
        if recorded != settings and recorded.keys() == settings.keys():
            kept_stages = CHECKED_STAGES
            for name in ("plan", "start", "random"):
                shutil.rmtree(folder / name, ignore_errors=True)
            if any(recorded[name] != settings[name] for name in SETTINGS_OF_CHECKS):
                kept_stages = ()
                for name in ("splits", "instructions", "validation"):
                    shutil.rmtree(folder / name, ignore_errors=True)
            record.unlink()
            for part in list(progress.parts):
                stage, *_ = part.split("/")
                if stage not in kept_stages:
                    progress.forget(part)
    check_same_settings(record, settings)
    return progress


def settings_of_call(args: AdaptArguments) -> dict[str, Any]:
    """Return the arguments that must not differ when a run resumes, with digests of the files that they name."""
    arguments = {}
    for name, value in vars(args).items():
        if name not in CHANGEABLE:
            arguments[name] = change_texts(value, absolute_path)
    settings = json.loads(json.dumps(arguments))  # as they are recorded
    settings["data"] = os.path.abspath(args.data)
    settings["labels"] = labels_digest(args.data)
    settings["bands"] = args.pretraining.get("input_spec")
    settings["files of instructions"] = None
    if args.instructions is not None:
        settings["files of instructions"] = instructions_digest(args.instructions)
    return settings


def absolute_path(text: str) -> str:
    """Return a relative path of an existing file as an absolute one, and other texts as they are."""
    if os.sep in text and os.path.exists(text):
        return os.path.abspath(text)
    return text
