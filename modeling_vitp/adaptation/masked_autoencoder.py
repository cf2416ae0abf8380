"""Masked autoencoder that an adaptation is compared with: same start and images, as many operations, no labels."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..command.settings import from_mapping
from ..metrics.resampling import first_near_best
from ..pretraining.masked_autoencoder import MaskedAutoencoderConfig, mae_steps, train_masked_autoencoder
from ..pretraining.plan import config_of_start, pretraining_operations, work_of
from .arguments import RANDOM
from .backbones import Backbones
from .pretraining import EARLY, RATE_SHARES, Pretraining
from .probing import Prober

MOST_IMAGES = 64  # in a batch


def mae_config(
    pretraining: Pretraining, backbones: Backbones, folder: Path, **settings: Any
) -> MaskedAutoencoderConfig:
    """Return the training arguments of the masked autoencoder, in the precision of the pretraining.

    Args:
        pretraining: settings of the pretraining.
        backbones: compared backbones, with the user's settings.
        folder: output folder.
        settings: settings that replace those of the user.

    Raises:
        ValueError: if a setting of the user is wrong.
    """
    training_args = pretraining.arguments.training_args
    all_settings = {
        "lr_scheduler_type": "cosine",
        "bf16": training_args.bf16,
        "fp16": training_args.fp16,
        **backbones.args.mae,
        "output_dir": str(folder),
        "save_total_limit": 1,
        "logging_steps": 10,
        "seed": pretraining.seed,
        "report_to": "none",
        "watch_samples": training_args.watch_samples,
        **settings,
    }
    return from_mapping(MaskedAutoencoderConfig, all_settings, "mae")


def mae_rates(pretraining: Pretraining, backbones: Backbones) -> list[float]:
    """Return the learning rates to choose from: as many as the pretraining has, or one that the user sets."""
    rate = mae_config(pretraining, backbones, backbones.folder).learning_rate
    if "learning_rate" in backbones.args.mae or not pretraining.vision_rates:
        return [rate]
    return [share * rate for share in RATE_SHARES]


@dataclass(frozen=True)
class Autoencoder:
    """Training of the masked autoencoder.

    Args:
        pretraining: settings of the pretraining.
        plan: steps and settings of the pretraining.
        backbones: compared backbones.
        prober: probes that choose the learning rate, with the training images.
    """

    pretraining: Pretraining
    plan: Mapping[str, Any]
    backbones: Backbones
    prober: Prober

    @property
    def images(self) -> Sequence[Path]:
        return self.prober.labels.images["train"]

    @property
    def batch(self) -> int:
        return min(MOST_IMAGES, len(self.images))

    @cached_property
    def operations(self) -> float:
        """Floating-point operations of the planned pretraining."""
        arguments = self.pretraining.parse(self.plan["settings"], self.plan["steps"])
        training_args = arguments.training_args
        config, _ = config_of_start(arguments.args, arguments.model_args)
        image_processor, _ = arguments.tiling()
        summaries = self.pretraining.summarize(image_processor)
        work = work_of(training_args, 1, summaries, arguments.args.from_scratch is not None)
        ratios = (training_args.vrl_drop_ratio, training_args.patch_drop_ratio)
        return pretraining_operations(config, work, *ratios, bf16=training_args.bf16)

    @cached_property
    def steps(self) -> int:
        """Number of steps with as many operations as the planned pretraining."""
        return mae_steps(self.pretraining.start.config, self.batch, self.operations)

    def train(self) -> None:
        """Train with the learning rate of [`choose_rate`], if there are several, and store the result."""
        progress = self.backbones.progress
        rates = mae_rates(self.pretraining, self.backbones)
        rate = rates[0]
        if len(rates) > 1:
            rate = progress.result("mae/rate", lambda: self.choose_rate(rates))
            print(f"The masked autoencoder goes on with the learning rate {rate:g}.")
        progress.result("mae", lambda: self.train_with(rate, self.steps, self.backbones.folder / "mae"))

    def choose_rate(self, rates: Sequence[float]) -> float:
        """Return the lowest rate whose score after a tenth of the steps is within one standard error of the best.

        The score is that of a linear probe on the validation images, as in the pretraining.
        """
        folder = self.backbones.folder / "mae_rates"
        early_steps = max(round(EARLY * self.steps), 1)
        trained_backbones = []
        for rate in rates:
            output = folder / f"rate_{rate:g}"
            self.train_with(rate, early_steps, output)
            trained_backbones.append(str(output / "backbone"))
        scores = self.prober.linear_scores(trained_backbones, folder / "probe")
        shutil.rmtree(folder)
        return rates[first_near_best(scores)]

    def train_with(self, rate: float, steps: int, output: Path) -> dict[str, Any]:
        """Train or resume in an output folder, and return what was trained."""
        config = mae_config(
            self.pretraining,
            self.backbones,
            output,
            learning_rate=rate,
            max_steps=steps,
            save_steps=max(steps // 10, 1),
            per_device_train_batch_size=self.batch,
        )
        start = self.pretraining.start
        vit = start.vit or self.backbones.path(RANDOM, self.pretraining.seed)
        train_masked_autoencoder(vit, self.images, config, start.image_size)
        return {"steps": steps, "batch": self.batch, "operations": self.operations, "learning_rate": rate}
