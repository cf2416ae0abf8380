"""ViTP: visual instruction pretraining of a vision transformer inside a vision-language model (arXiv 2509.17562)."""

import importlib
import importlib.metadata
import sys

# Imported on first access. All but conversion and export need the `recipes` extra (TRL, datasets, rasterio).
_LAZY = {
    "AnnotationOptions": "instructions.arguments",
    "ProbeArguments": "probing.arguments",
    "TASKS": "tasks",
    "VLMArguments": "evaluation.arguments",
    "ViTPClassificationTrainer": "tasks.classification.trainer",
    "ViTPClassificationTrainingConfig": "tasks.classification.trainer",
    "ViTPDataCollator": "instructions.collator",
    "ViTPDetectionTrainer": "tasks.detection.trainer",
    "ViTPDetectionTrainingConfig": "tasks.detection.trainer",
    "ViTPSegmentationTrainer": "tasks.segmentation.trainer",
    "ViTPSegmentationTrainingConfig": "tasks.segmentation.trainer",
    "ViTPTrainer": "pretraining.trainer",
    "ViTPTrainingConfig": "pretraining.config",
    "adapt": "adaptation.adapt",
    "compose": "pretraining.loading",
    "convert_checkpoint": "convert.checkpoint",
    "detect_large": "tasks.detection.prediction",
    "evaluate_vlm": "evaluation.vlm",
    "export_backbone": "convert.export",
    "export_timm": "convert.timm_folder",
    "fine_tune": "tasks.fine_tuning",
    "interpolate_vit": "convert.interpolation",
    "make_instructions": "instructions.making",
    "predict_large": "tasks.segmentation.prediction",
    "predict_volume": "tasks.segmentation.prediction",
    "pretrain": "pretraining.run",
    "probe": "tasks.probing",
    "start_from_scratch": "pretraining.loading",
}


__version__ = "0.1.0"
_NEEDED = "5.20"  # of transformers, as in setup.cfg


def _check_versions() -> None:
    """Raise an `ImportError` that names the requirement if Python or transformers is too old."""
    if sys.version_info < (3, 11):
        raise ImportError(f"modeling_vitp needs Python 3.11 or newer, found {sys.version.split()[0]}.")
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("modeling_vitp needs transformers: pip install 'modeling-vitp'.") from None
    major, minor, *_ = installed.split(".")
    needed_major, needed_minor = _NEEDED.split(".")
    if (int(major), int(minor)) < (int(needed_major), int(needed_minor)):
        raise ImportError(
            f"modeling_vitp needs transformers {_NEEDED} or newer, found {installed}: "
            f"pip install 'transformers~={_NEEDED}.0'."
        )


_check_versions()
if "vitp_command" not in sys.modules:  # a command registers the models after it has checked its arguments
    from .auto import *  # noqa: F403


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    models = importlib.import_module(".auto", __name__)
    if name not in _LAZY:
        return getattr(models, name)
    try:
        module = importlib.import_module(f".{_LAZY[name]}", __name__)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs {error.name}: install the extra with pip install 'modeling-vitp[recipes]'."
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    models = importlib.import_module(".auto", __name__)  # also in a command, which has not imported them yet
    names = {name for name in vars(models) if not name.startswith("_")}
    return sorted({*globals(), *_LAZY, *names})
