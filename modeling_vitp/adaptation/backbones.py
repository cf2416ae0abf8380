"""Compared backbones: the start of the pretraining, the adapted backbone and the baselines, and the size of images."""

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedConfig, set_seed

from ..configuration_vitp import ViTPVisionConfig
from ..convert.export import export_backbone, image_processor_of
from ..evaluation.comparison import Progress
from ..modeling_vitp import ViTPVisionModel
from ..modeling_vitp_backbone import open_vit_config
from ..opening import read_config_fields
from ..pretraining.loading import tiling, vision_config_of
from ..vision_towers import pair
from .arguments import ADAPTED, LANGUAGE_MODEL, MAE, RANDOM, START, AdaptArguments
from .labels import TaskData, median_size

START_SETTINGS = ("model_name_or_path", "vision_model", "language_model", "from_scratch")  # of `vitp pretrain`
LEAST_PATCHES = 8  # in each direction; smaller images are enlarged


@dataclass(frozen=True)
class Start:
    """ViT that the pretraining starts from.

    Args:
        settings: settings of the start for `vitp pretrain`.
        vit: folder or Hub id of the ViT; `None` for random weights.
        name: name in the report.
        size_reason: sentence on the size of the images that all backbones see.
    """

    settings: dict[str, Any]
    vit: str | None
    name: str
    size_reason: str = ""

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the ViT for images of the size that all backbones see."""
        if self.vit is None:
            return ViTPVisionConfig(**self.settings["from_scratch"]["vision_config"])
        return vision_config_of(self.vit, self.settings.get("vision_image_size"))

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that all backbones see: that of the tiles of the pretraining."""
        height, _ = pair(self.config.image_size)
        return height


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


def choose_image_size(size: tuple[int, int], config: PreTrainedConfig, option: int | None) -> tuple[int, str]:
    """Return the side in pixels of the images that all backbones see, and a sentence that gives the reason.

    The side is that of a square with as many pixels as an image, rounded up to two patches, because two by two patches
    become one visual token. It is at least 8 patches, to which smaller images are enlarged, and at most the size of
    the start. Larger images have several tiles in the pretraining.

    Args:
        size: median height and width of the images.
        config: configuration of the start.
        option: the option `image_size`, which is taken as it is.
    """
    height, width = size
    patch, _ = pair(config.patch_size)
    start_side, _ = pair(config.image_size)
    token_side = 2 * patch
    if option is not None:
        if option % token_side:
            raise ValueError(
                f"image_size must be a multiple of {token_side} pixels, two patches of the start, got {option}. Set it "
                f"to {math.ceil(option / token_side) * token_side}."
            )
        return option, f"All backbones see {option} x {option} pixels, as image_size says."
    largest = start_side // token_side * token_side
    smallest = min(LEAST_PATCHES * patch, largest)
    side_of_image = math.ceil(math.sqrt(height * width) / token_side) * token_side
    side = min(max(side_of_image, smallest), largest)
    if side < side_of_image:
        reason = f"the size of the start; the median image has {height} x {width}"
    elif side > side_of_image:
        reason = f"{LEAST_PATCHES} x {LEAST_PATCHES} patches; the median image has {height} x {width}"
    else:
        reason = f"as many as the median image, {height} x {width}, in whole patches"
    return side, f"All backbones see {side} x {side} pixels: {reason}. Option: image_size."


def whole_patches(backbone: str, side: int) -> int:
    """Return the side in pixels that is nearest to `side` in whole patches of a backbone, a folder or Hub id."""
    patch, _ = pair(open_vit_config(backbone).patch_size)
    return max(round(side / patch), 1) * patch


def open_start(args: AdaptArguments, labels: TaskData, folder: Path, progress: Progress) -> Start:
    """Return the start, whose ViT is exported to a folder if it is a part of a vision-language model.

    The size of its images is chosen if the ViT is combined with a language model. Other starts have tiles of one size.

    Args:
        args: arguments of the command.
        labels: labeled images, whose size the size of the start follows.
        folder: output folder of the adaptation.
        progress: results of finished parts.
    """
    settings = start_settings(args)
    size_reason = ""
    if "language_model" in settings:
        vit = settings["vision_model"]
        size = median_size(labels.images["train"], labels.window)
        side, size_reason = choose_image_size(size, open_vit_config(vit), args.image_size)
        settings["vision_image_size"] = side
    elif args.image_size is not None:
        raise ValueError(
            "image_size must be set for a ViT that is combined with a language model. Other starts have tiles of one "
            "size: remove the option."
        )
    elif "vision_model" in settings:
        vit = settings["vision_model"]
    elif "model_name_or_path" in settings:
        vit = str(folder / "start")
        model = settings["model_name_or_path"]
        progress.result("start", lambda: str(export_backbone(model, vit)))
    else:
        return Start(settings, None, RANDOM, size_reason)
    name = short_name(args.start or vit)
    is_taken = name in (ADAPTED, RANDOM) or (name == MAE and MAE in args.baselines)
    return Start(settings, vit, f"{name}-start" if is_taken else name, size_reason)


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

    def of_each_shape(self, with_weights: bool = True) -> list[str]:
        """Return a backbone of the shape of the start, and those that may have another shape, as folders or Hub ids.

        Args:
            with_weights: whether weights are needed. Without, the result is a backbone of the shape of the start.
        """
        if not with_weights:
            return [self.path(RANDOM, self.args.seed)]
        of_start = self.start.vit or self.path(RANDOM, self.args.seed)
        return [of_start, *[self.models[name] for name in self.others]]

    @property
    def others(self) -> list[str]:
        """Names of the baselines that are ViTs of their own, and may have another shape than the start."""
        names_of_start = (ADAPTED, RANDOM, MAE, self.start.name)
        return [name for name in self.models if name not in names_of_start]

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
