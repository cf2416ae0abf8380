"""Base trainer of fine-tuning."""

import copy
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import evaluate
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as F
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from ..convert.export import without_adapters
from ..data.settings import parts_of
from ..metrics.base import DistributedMetric
from ..metrics.report import metric_path
from ..modeling_vitp_backbone import ViTPMultiScaleBackbone
from ..training.batching import share
from ..training.callbacks import choose, component_colors
from ..training.freezing import find_vit, layer_decay_groups, lora_rank
from ..training.resuming import NUM_SAMPLES
from ..training.sample_trainer import SampleTrainer
from ..vision_towers import pair


class FineTuningTrainer(SampleTrainer):
    """Base trainer of models with a [`~modeling_vitp.modeling_vitp_backbone.ViTPMultiScaleBackbone`].

    The arguments of a subclass inherit from [`~modeling_vitp.tasks.arguments.FineTuningSettings`].

    Attributes:
        scored_with: names of arguments that the scores depend on, for the record of the run.
        evaluates_one_by_one: whether an evaluation batch is one sample, or a list of samples.
        metric: metric with the main score. For instance segmentation, that of the masks.
    """

    scored_with: ClassVar[tuple[str, ...]] = ()
    evaluates_one_by_one: ClassVar[bool] = False
    metric: DistributedMetric

    def train(self, *args, **kwargs) -> TrainOutput:
        training_args = self.args
        if training_args.metric_for_best_model == "loss":  # the default of transformers; evaluation computes no loss
            training_args.metric_for_best_model = self.main_score
            training_args.greater_is_better = True
        score = (training_args.metric_for_best_model or "").removeprefix("eval_")
        # transformers takes every score whose name does not end in "loss" to be better when higher.
        if not self.greater_is_better(score):
            training_args.greater_is_better = False
        return super().train(*args, **kwargs)

    def run_settings(self) -> dict[str, dict[str, Any]]:
        settings = super().run_settings()
        args = self.args
        model = self.accelerator.unwrap_model(self.model)
        prefix, tower = find_vit(model)
        is_frozen = not model.get_parameter(prefix + tower.patch_kernel).requires_grad
        settings["fixed"].update(self.data_settings())
        settings["fixed"].update(
            freeze_backbone=is_frozen or None,
            backbone_lora_r=lora_rank(model),
            layer_decay=args.layer_decay,
            level_embeddings_at_input=args.level_embeddings_at_input or None,
            position_weight_decay=args.position_weight_decay or None,
        )
        return settings

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, its processor and its card. LoRA is merged unless the folder is a checkpoint."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        is_checkpoint = self.is_in_train and folder == self._checkpoint()
        if lora_rank(model) is not None and self.args.should_save and not is_checkpoint:
            without_adapters(copy.deepcopy(model)).save_pretrained(folder)

    def extra_settings(self) -> dict[str, Any]:
        return super().extra_settings() | {"input_spec": getattr(self.processing_class, "input_spec", None)}

    def training_data(self) -> Any:
        splits = parts_of(self.train_dataset.samples)
        return {f"split {number}": split.files_or_rows() for number, split in enumerate(splits, start=1)}

    def data_settings(self) -> dict[str, Any]:
        """Return the settings of the data that must match on resume."""
        return {
            NUM_SAMPLES: len(self.train_dataset),
            "classes": self.names,
        }

    def watched_samples(self, number: int) -> list:
        return choose(self.eval_dataset or self.train_dataset.samples, number, self.data_seed)

    def draw(self, samples: list, path: Path, maps: Sequence[np.ndarray] = (), is_test: bool = False) -> None:
        """Draw predictions as a PNG.

        Args:
            samples: items of the data set.
            path: PNG file.
            maps: [`component_maps`] of the samples, empty to omit them.
            is_test: whether to predict with the settings of the test split.
        """
        raise NotImplementedError

    def draw_samples(self, samples: list, path: Path) -> None:
        images = [sample.get("images") or [sample["image"]] for sample in samples]
        self.draw(samples, path, self.component_maps(images, path.parent))

    def scoring_settings(self) -> dict[str, Any]:
        """Return the settings that the scores depend on, for the record of the run."""
        return {name: getattr(self.args, name) for name in self.scored_with}

    def record(
        self,
        command: str | None,
        sources: Sequence[str | None],
        data: list[dict[str, Any]],
        evaluated_on: dict[str, Any] | None,
    ) -> None:
        settings = self.scoring_settings()
        if evaluated_on and settings:
            evaluated_on = evaluated_on | {"scored_with": settings}
        super().record(command, sources, data, evaluated_on)

    def load_metric(self, name: str, base: type = DistributedMetric, **settings: Any) -> evaluate.Metric:
        """Load a metric with the classes and processes of the run, see [`~modeling_vitp.metrics.report.metric_path`].

        Raises:
            ValueError: if the metric is not a subclass of `base`, or has no such setting.
        """
        metric = evaluate.load(
            metric_path(name),
            num_labels=len(self.names),
            num_process=self.args.world_size,
            process_id=self.args.process_index,
            **settings,
        )
        if not isinstance(metric, base):
            raise ValueError(f"metric={name!r} cannot score this task. Expected a subclass of {base.__name__}.")
        known_settings = set()
        for base_class in type(metric).__mro__:
            known_settings.update(inspect.signature(base_class.__init__).parameters)
        unknown_settings = sorted(settings.keys() - known_settings)
        if unknown_settings:  # evaluate ignores unknown settings
            raise ValueError(f"metric_options: unknown {unknown_settings} for the metric {name!r}.")
        return metric

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Return a loader of the samples that this process evaluates."""
        args = self.args
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        samples = Subset(dataset, share(range(len(dataset)), args.world_size, args.process_index))
        if self.evaluates_one_by_one:
            return DataLoader(samples, batch_size=None, num_workers=args.dataloader_num_workers)
        return DataLoader(
            samples,
            batch_size=args.per_device_eval_batch_size,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
        )

    def component_maps(self, images: Sequence[Sequence[torch.Tensor]], folder: Path) -> list[np.ndarray]:
        """Return the principal components of the ViT's features as colors.

        Args:
            images: one image, or the two images of a pair, of each sample, see
                [`~modeling_vitp.images.pixels.to_pixels`]. The features of a pair are concatenated horizontally.
            folder: folder that stores the components of the first picture, see
                [`~modeling_vitp.training.callbacks.component_colors`].
        """
        maps = []
        for sample_images in images:
            features = [self.patch_features(image) for image in sample_images]
            maps.append(torch.cat(features, dim=2))
        return component_colors(maps, folder)

    def patch_features(self, image: torch.Tensor) -> torch.Tensor:
        """Return the features of the ViT's last layer for an image that is resized to the model's image size.

        Args:
            image: image, see [`~modeling_vitp.images.pixels.to_pixels`]. Its longer side is resized.

        Returns:
            Features of shape `(hidden_size, rows, columns)`.
        """
        backbone = self.find_backbone()
        scale = max(pair(backbone.config.image_size)) / max(image.shape[-2:])
        height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
        image = F.resize(image, [height, width], antialias=True)
        image = F.to_dtype(image, scale=True)
        pixels = F.normalize(image, self.processing_class.image_mean, self.processing_class.image_std)
        tower, vit = backbone.tower
        last_layer = vit.get_submodule(tower.layers)[-1]
        outputs = []
        hook = last_layer.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        with hook, self.compute_loss_context_manager():
            backbone(pixels[None].to(self.args.device))
        tokens = outputs[-1]
        # Patches have 16 pixels, and sides are padded to multiples of 32.
        padded_rows = 2 * math.ceil(height / 32)
        padded_columns = 2 * math.ceil(width / 32)
        patch_tokens = tokens[-padded_rows * padded_columns :]
        features = patch_tokens.T.unflatten(1, (padded_rows, padded_columns))
        return features[:, : math.ceil(height / 16), : math.ceil(width / 16)]

    def find_backbone(self) -> ViTPMultiScaleBackbone:
        """Return the backbone of the model."""
        for module in self.accelerator.unwrap_model(self.model).modules():
            if isinstance(module, ViTPMultiScaleBackbone):
                return module
        raise ValueError(f"{type(self.model).__name__} has no backbone.")

    @property
    def main_score(self) -> str | None:
        """Name of the main score of the task in the scores of a split."""
        return self.metric.main_score

    def greater_is_better(self, score: str) -> bool:
        """Return whether a higher value of a score of a split is better, as its metric declares."""
        return self.metric.greater_is_better(score)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            num_layers = self.accelerator.unwrap_model(model).config.backbone_config.num_hidden_layers
            args = self.args
            groups = layer_decay_groups(
                model,
                args.learning_rate,
                args.weight_decay,
                args.layer_decay,
                num_layers,
                args.level_embeddings_at_input,
                args.position_weight_decay,
            )
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer
