"""Compared backbones: the start of the pretraining, the adapted backbone and the baselines."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedConfig, set_seed

from ..configuration_vitp import ViTPVisionConfig
from ..convert.export import export_backbone
from ..evaluation.comparison import Progress
from ..modeling_vitp import ViTPVisionModel
from ..modeling_vitp_backbone import open_vit_config
from ..opening import read_config_fields
from ..pretraining.loading import image_processor_of, tiling
from ..vision_towers import pair
from .arguments import ADAPTED, LANGUAGE_MODEL, MAE, RANDOM, START, AdaptArguments

START_SETTINGS = ("model_name_or_path", "vision_model", "language_model", "from_scratch")  # of `vitp pretrain`


@dataclass(frozen=True)
class Start:
    """ViT that the pretraining starts from.

    Args:
        settings: settings of the start for `vitp pretrain`.
        vit: folder or Hub id of the ViT; `None` for random weights.
        name: name in the report.
    """

    settings: dict[str, Any]
    vit: str | None
    name: str

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the ViT."""
        if self.vit is None:
            return ViTPVisionConfig(**self.settings["from_scratch"]["vision_config"])
        return open_vit_config(self.vit)


def start_settings(args: AdaptArguments) -> dict[str, Any]:
    """Return the settings of the start for `vitp pretrain`."""
    if args.start is None:
        settings = {}
        for name in START_SETTINGS:
            if args.pretraining.get(name):
                settings[name] = args.pretraining[name]
        return settings
    config = read_config_fields(args.start)
    if config.get("model_type") in ("vitp", "internvl"):
        return {"model_name_or_path": args.start}
    from_scratch = args.pretraining.get("from_scratch")
    if from_scratch:
        return {"vision_model": args.start, "from_scratch": from_scratch}
    return {"vision_model": args.start, "language_model": args.language_model or LANGUAGE_MODEL}


def open_start(args: AdaptArguments, folder: Path, progress: Progress) -> Start:
    """Return the start, whose ViT is exported to a folder if it is a part of a vision-language model.

    Args:
        args: arguments of the command.
        folder: output folder of the adaptation.
        progress: results of finished parts.
    """
    settings = start_settings(args)
    if "vision_model" in settings:
        vit = settings["vision_model"]
    elif "model_name_or_path" in settings:
        vit = str(folder / "start")
        model = settings["model_name_or_path"]
        progress.result("start", lambda: str(export_backbone(model, vit)))
    else:
        return Start(settings, None, RANDOM)
    name = short_name(args.start or vit)
    is_taken = name in (ADAPTED, RANDOM) or (name == MAE and MAE in args.baselines)
    return Start(settings, vit, f"{name}-start" if is_taken else name)


def baseline_paths(args: AdaptArguments) -> list[str]:
    """Return the baselines that are folders and Hub ids."""
    return [path for path in args.baselines if path not in (START, RANDOM, MAE, args.start)]


@dataclass
class Backbones:
    """Backbones that are compared, and their folders.

    Args:
        args: arguments of the command.
        start: start of the pretraining.
        folder: output folder of the adaptation.
        progress: results of finished parts.
    """

    args: AdaptArguments
    start: Start
    folder: Path
    progress: Progress

    @cached_property
    def models(self) -> dict[str, str]:
        """Descriptions of the backbones by name, the adapted one first."""
        args = self.args
        start = self.start
        models = {ADAPTED: "the backbone of this run"}
        is_start_compared = START in args.baselines or args.start in args.baselines
        if is_start_compared and start.vit is not None:
            models[start.name] = f"{args.start or start.vit}, the start"
        if RANDOM in args.baselines or start.vit is None:
            models[RANDOM] = "random weights"
        if MAE in args.baselines:
            images = "same" if args.instructions is None else "labeled training"
            models[MAE] = f"masked autoencoder on the {images} images, with as many operations"
        for path in baseline_paths(args):
            used_names = {*models, MAE, RANDOM, start.name}
            models[unique_name(short_name(path), used_names)] = path
        return models

    def path(self, model: str, seed: int) -> str:
        """Return the folder or Hub id of a backbone.

        Args:
            model: name of the backbone.
            seed: seed of random weights, which have a folder for each seed.
        """
        if model == RANDOM:
            output = self.folder / "random" / f"seed_{seed}"
            self.progress.result(f"random/{seed}", lambda: write_random(self.start, output, seed))
            return str(output)
        if model == ADAPTED:
            return str(self.folder / "pretraining" / "backbone")
        if model == MAE:
            return str(self.folder / "mae" / "backbone")
        return self.start.vit if model == self.start.name else self.models[model]


def write_random(start: Start, output: Path, seed: int) -> None:
    """Export a backbone of the shape of the start with random weights."""
    config = start.config
    if start.vit is None:
        image_processor, _ = tiling(None, start.settings["from_scratch"])
    else:
        image_processor = image_processor_of(start.vit, pair(config.image_size))
    set_seed(seed)
    if isinstance(config, ViTPVisionConfig):
        model = ViTPVisionModel(config)
    else:
        model = AutoModel.from_config(config)
    export_backbone(model, output, image_processor)


def short_name(path: str) -> str:
    """Return the last part of a folder or Hub id; of the folder `backbone` of a run, that of the run."""
    folder = Path(os.path.abspath(path))
    if folder.name == "backbone" and folder.parent.name:
        return folder.parent.name
    return folder.name


def unique_name(name: str, used_names: set[str]) -> str:
    """Return a name, with a number after it if it is used."""
    candidate = name
    number = 1
    while candidate in used_names:
        number += 1
        candidate = f"{name}-{number}"
    return candidate
