"""Base trainer of fine-tuning, and loading of the model that fine-tuning starts from."""

import copy
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import evaluate
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as F
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..bands import check_same_bands
from ..configuration_vitp import ViTPVisionConfig, known_keys
from ..convert.export import without_adapters
from ..convert.tensor_files import check_finite
from ..data.settings import parts_of
from ..input_spec import InputSpec
from ..metrics.base import DistributedMetric
from ..metrics.report import metric_path
from ..modeling_vitp import ViTPVisionModel
from ..modeling_vitp_backbone import ViTPMultiScaleBackbone
from ..modeling_vitp_multi_scale import NECKS
from ..opening import read_config_fields
from ..vision_towers import pair
from ..vrl import keyed_generator
from .arguments import BackboneArguments, StartArguments
from .base_trainer import BaseTrainer
from .batching import share
from .callbacks import choose, component_colors
from .freezing import find_vit, freeze_vit, layer_decay_groups, lora_rank
from .loading import check_config
from .resume_config import NUM_SAMPLES

logger = logging.getLogger(__name__)


class AugmentedSamples(Dataset):
    """Base of the training data sets of the tasks, with augmented samples.

    An index is a pair of epoch and sample index. The augmentation depends only on the epoch, the sample's id and the
    seed. A subclass implements `__getitem__`.

    Args:
        samples: data set of a task, whose items have an `id`.
        augmentation: augmentation of the task.
        image_processor: image processor with the mean and standard deviation of the model.
        seed: seed of the augmentation.
    """

    def __init__(self, samples: Dataset, augmentation: Callable, image_processor: BaseImageProcessor, seed: int):
        self.samples, self.augmentation = samples, augmentation
        self.image_processor, self.seed = image_processor, seed

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: tuple[int, int]) -> tuple[dict[str, Any], torch.Generator]:
        """Return a sample and the generator of its augmentation."""
        epoch, sample_index = index
        sample = self.samples[sample_index]
        return sample, keyed_generator(self.seed, sample["id"], epoch, "augmentation")


class SampleTrainer(BaseTrainer):
    """Base trainer of models on [`AugmentedSamples`], in which each process scores a part of the evaluated samples.

    A subclass also inherits from [`~transformers.Trainer`].

    Attributes:
        counted: name of the things that are scored, such as pixels, for the warning about scores that are NaN.
    """

    counted: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The model's loss is the mean over its batch, so the Trainer has to divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def score(self, batches: Iterable, is_test: bool) -> dict[str, float]:
        """Return the scores over the samples of all processes, NaN for scores without anything to count.

        Args:
            batches: batches of this process from `get_eval_dataloader`.
            is_test: whether this is the final evaluation on the test split.
        """
        raise NotImplementedError

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.callback_handler.eval_dataloader = dataloader
        scores = self.score(self._with_callbacks(dataloader), metric_key_prefix == "test")
        uncounted = [name for name, value in scores.items() if math.isnan(value)]
        if uncounted:
            logger.warning("%s: scores without any %s are NaN: %s.", description, self.counted, ", ".join(uncounted))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        num_samples = len(dataloader.dataset.dataset)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_samples)

    def _with_callbacks(self, dataloader: DataLoader) -> Iterator:
        """Yield the batches, and call `on_prediction_step` of the callbacks after each batch."""
        for batch in dataloader:
            yield batch
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)


class FineTuningTrainer(SampleTrainer):
    """Base trainer of models with a [`~modeling_vitp.modeling_vitp_backbone.ViTPMultiScaleBackbone`].

    The arguments of a subclass inherit from [`~modeling_vitp.training.arguments.FineTuningSettings`].

    Attributes:
        scored_with: names of arguments that the scores depend on, for the record of the run.
        evaluates_one_by_one: whether an evaluation batch is one sample, or a list of samples.
        metric: metric with the main score. For instance segmentation, that of the masks.
    """

    scored_with: ClassVar[tuple[str, ...]] = ()
    evaluates_one_by_one: ClassVar[bool] = False
    metric: DistributedMetric

    def train(self, *args, **kwargs) -> TrainOutput:
        if self.args.metric_for_best_model == "loss":  # The default of transformers, but evaluation computes no loss.
            self.args.metric_for_best_model, self.args.greater_is_better = self.main_score, True
        return super().train(*args, **kwargs)

    def run_settings(self) -> dict[str, dict[str, Any]]:
        settings, args, model = super().run_settings(), self.args, self.accelerator.unwrap_model(self.model)
        prefix, tower = find_vit(model)
        settings["fixed"] |= self.data_settings() | {
            "freeze_backbone": not model.get_parameter(prefix + tower.patch_kernel).requires_grad or None,
            "backbone_lora_r": lora_rank(model),
            "layer_decay": args.layer_decay,
            "level_embeddings_at_input": args.level_embeddings_at_input or None,
            "position_weight_decay": args.position_weight_decay or None,
        }
        return settings

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, its processor and its card. LoRA is merged unless the folder is a checkpoint."""
        super().save_model(output_dir, _internal_call)
        folder, model = Path(output_dir or self.args.output_dir), self.accelerator.unwrap_model(self.model)
        is_checkpoint = self.is_in_train and folder == self._checkpoint()
        if lora_rank(model) is not None and self.args.should_save and not is_checkpoint:
            without_adapters(copy.deepcopy(model)).save_pretrained(folder)

    def extra_settings(self) -> dict[str, Any]:
        return super().extra_settings() | {"input_spec": getattr(self.processing_class, "input_spec", None)}

    def training_data(self) -> Any:
        parts = parts_of(self.train_dataset.samples)
        return {f"split {number}": part.files_or_rows() for number, part in enumerate(parts, start=1)}

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
        processes = {"num_process": self.args.world_size, "process_id": self.args.process_index}
        metric = evaluate.load(metric_path(name), num_labels=len(self.names), **processes, **settings)
        if not isinstance(metric, base):
            raise ValueError(f"metric={name!r} cannot score this task. Expected a subclass of {base.__name__}.")
        known = {parameter for cls in type(metric).__mro__ for parameter in inspect.signature(cls.__init__).parameters}
        if settings.keys() - known:  # evaluate ignores unknown settings
            raise ValueError(f"metric_options: unknown {sorted(settings.keys() - known)} for the metric {name!r}.")
        return metric

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Return a loader of the samples that this process evaluates."""
        dataset, args = self.eval_dataset if eval_dataset is None else eval_dataset, self.args
        mine = Subset(dataset, share(range(len(dataset)), args.world_size, args.process_index))
        batches = (None, None) if self.evaluates_one_by_one else (args.per_device_eval_batch_size, list)
        return DataLoader(mine, batches[0], collate_fn=batches[1], num_workers=args.dataloader_num_workers)

    def component_maps(self, images: Sequence[Sequence[torch.Tensor]], folder: Path) -> list[np.ndarray]:
        """Return the principal components of the ViT's features as colors.

        Args:
            images: one image, or the two images of a pair, of each sample, see
                [`~modeling_vitp.images.pixels.to_pixels`]. The features of a pair are concatenated horizontally.
            folder: folder that stores the components of the first picture, see
                [`~modeling_vitp.training.callbacks.component_colors`].
        """
        maps = [torch.cat([self.patch_features(image) for image in images_of_one], 2) for images_of_one in images]
        return component_colors(maps, folder)

    def patch_features(self, image: torch.Tensor) -> torch.Tensor:
        """Return the features of the ViT's last layer for an image that is resized to the model's image size.

        Args:
            image: image, see [`~modeling_vitp.images.pixels.to_pixels`]. Its longer side is resized.

        Returns:
            Features of shape `(hidden_size, rows, columns)`.
        """
        modules = self.accelerator.unwrap_model(self.model).modules()
        backbone = next(module for module in modules if isinstance(module, ViTPMultiScaleBackbone))
        scale = max(pair(backbone.config.image_size)) / max(image.shape[-2:])
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        image = F.to_dtype(F.resize(image, size, antialias=True), scale=True)
        pixels = F.normalize(image, self.processing_class.image_mean, self.processing_class.image_std)
        tower, vit = backbone.tower
        outputs, last_layer = [], vit.get_submodule(tower.layers)[-1]
        hook = last_layer.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        with hook, self.compute_loss_context_manager():
            backbone(pixels[None].to(self.args.device))
        states = outputs[-1]
        # Patches have 16 pixels, and sides are padded to multiples of 32.
        rows, columns = (-(-side // 32) * 2 for side in size)
        features = states[-rows * columns :].T.unflatten(1, (rows, columns))
        return features[:, : -(-size[0] // 16), : -(-size[1] // 16)]

    @property
    def main_score(self) -> str | None:
        """Name of the main score of the task in the scores of a split."""
        return self.metric.main_score

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
            optimizer_cls, settings = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = optimizer_cls(groups, **settings)
        return self.optimizer


def check_start(model_class: type[PreTrainedModel], args: StartArguments, do_train: bool = True) -> None:
    """Check the arguments of the start. No file is opened, except the start's configuration without training.

    Raises:
        ValueError: if not exactly one start is given, if random weights would be scored without training, or if a field
            of the configurations is unknown.
    """
    if (args.model_name_or_path is None) == (args.from_scratch is None):
        raise ValueError(
            "Give either model_name_or_path, a pretrained backbone or a fine-tuned model, or from_scratch. To remove "
            "the one in the configuration, add --model_name_or_path '' or --from_scratch '{}'."
        )
    if args.from_scratch is not None and not do_train:
        raise ValueError(
            "do_train is false, but from_scratch gives random weights, which are not scored. Set model_name_or_path, "
            "and remove from_scratch with --from_scratch '{}'."
        )
    if not do_train:
        found = read_config_fields(args.model_name_or_path, revision=args.model_revision)
        if found.get("model_type") != model_class.config_class.model_type:
            raise ValueError(
                f"do_train is false, but {args.model_name_or_path} is of type {found.get('model_type')!r}. Expected a "
                f"fine-tuned model of type {model_class.config_class.model_type!r}."
            )
    check_config("from_scratch", args.from_scratch, ViTPVisionConfig)
    has_neck, neck = isinstance(args, BackboneArguments), args.neck or "adapter"
    keys = {name: known_keys(backbone.config_class) for name, backbone in NECKS.items()} if has_neck else {}
    for name, found in keys.items():
        if others := sorted({*(args.backbone or {})} & found - keys[neck]):
            raise ValueError(
                f"backbone: {others} are settings of neck: {name}, but neck is {neck}. To remove the settings in the "
                "configuration, add --backbone '{}'."
            )
    check_config("backbone", args.backbone, NECKS[neck].config_class if has_neck else ViTPVisionConfig)
    check_config("head", args.head, model_class.config_class, ("backbone_config", "id2label", "label2id"))
    for place in ("from_scratch", "backbone", "head"):
        for name, value in (getattr(args, place) or {}).items():
            if name.endswith(("_size", "_channels", "_layers", "_heads")) and value == 0:
                raise ValueError(f"{place}.{name} must be at least 1, got 0.")


def load_on_backbone(
    model_class: type[PreTrainedModel],
    args: StartArguments,
    names: list[str],
    build: Callable[..., PreTrainedModel] | None = None,
    input_spec: dict | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Load the model in float32, with a new head unless it is a fine-tuned model.

    Args:
        names: names of the classes.
        build: function with the arguments of `model_class.from_backbone`, which is the default.
        input_spec: input spec of the data. If it names bands, the RGB weights of a backbone are spread over them, see
            [`~modeling_vitp.spread_bands`].
        settings: further arguments of `from_backbone`. Fields of `args.head` take precedence.

    Raises:
        ValueError: if [`check_start`] fails, a fine-tuned model has other classes or other weights than the settings
            need, or the start has other bands.
    """
    check_start(model_class, args)
    name, revision = args.model_name_or_path, {"revision": args.model_revision}
    band_names, id2label = InputSpec.from_dict(input_spec).band_names, dict(enumerate(names))
    found = {} if name is None else read_config_fields(name, **revision)
    if found.get("model_type") == model_class.config_class.model_type:
        model = load_fine_tuned(model_class, args, id2label)
    else:
        bands = {} if band_names is None else {"band_names": band_names}
        if name is None:
            start, more = ViTPVisionModel(ViTPVisionConfig(**args.from_scratch | bands)), bands
        else:
            start, more = name, revision | bands
        drop_path_rate = 0.0 if args.freeze_backbone and not args.backbone_lora_r else args.drop_path_rate
        backbone = {"drop_path_rate": drop_path_rate, **(args.backbone or {}), **more}
        head = {**settings, **(args.head or {})}
        neck = {} if args.neck is None else {"neck": args.neck}
        build = build or model_class.from_backbone
        model = build(start, **neck, id2label=id2label, backbone_kwargs=backbone, **head)
    own_bands = getattr(model.config.backbone_config, "band_names", None)
    check_same_bands(name or "from_scratch", own_bands, "data: input_spec", band_names)
    check_finite(model.state_dict(), name or "from_scratch")
    if args.freeze_backbone or args.backbone_lora_r:
        freeze_vit(model, args.backbone_lora_r)
    return model


def load_fine_tuned(
    model_class: type[PreTrainedModel], args: StartArguments, id2label: dict[int, str]
) -> PreTrainedModel:
    """Load a fine-tuned model in float32 with the settings in `args.head`.

    Raises:
        ValueError: if its classes, its neck or the settings in `args.backbone` are not the model's own.
    """
    start, settings = args.model_name_or_path, {"dtype": torch.float32, **(args.head or {})}
    model, found = model_class.from_pretrained(
        start, revision=args.model_revision, output_loading_info=True, **settings
    )
    if missing := found["missing_keys"]:
        raise ValueError(f"head: {args.head} needs weights that {start} lacks, such as {min(missing)}.")
    if model.config.id2label != id2label:
        found, expected = [*model.config.id2label.values()], [*id2label.values()]
        raise ValueError(f"Expected {start} to have classes {expected}, found {found}.")
    own = model.config.backbone_config.to_dict()
    if args.neck is not None and own["model_type"] != NECKS[args.neck].config_class.model_type:
        raise ValueError(
            f"neck: {args.neck} differs from that of {start}, a fine-tuned model, which keeps its own. Remove the "
            "option, or set the other neck."
        )
    given = json.loads(json.dumps(args.backbone or {}))
    if differ := sorted(name for name, value in given.items() if json.loads(json.dumps(own.get(name))) != value):
        raise ValueError(
            f"backbone: {differ} differ from {start}, a fine-tuned model, which keeps its backbone. Set them to "
            f"{ {name: own.get(name) for name in differ} }, or remove them with --backbone '{{}}'."
        )
    return model


def load_image_processor(
    image_processor_class: type[BaseImageProcessor], args: StartArguments, do_train: bool = True, **settings: Any
) -> BaseImageProcessor:
    """Return an image processor with the mean and standard deviation of the model that training starts from.

    Without `do_train`, images are also resized as in the training of the model, whatever the size in `settings`.
    """
    if args.model_name_or_path is None:
        return image_processor_class(**settings)
    if not do_train:
        own, _ = image_processor_class.get_image_processor_dict(args.model_name_or_path, revision=args.model_revision)
        resizing = {name: own[name] for name in ("do_resize", "size") if own.get(name) is not None}
        if differ := [name for name, value in resizing.items() if settings.get(name, value) != value]:
            logger.warning("Scoring with %s of the model: %s.", " and ".join(differ), [own[name] for name in differ])
        settings |= resizing
    return image_processor_class.from_backbone(args.model_name_or_path, revision=args.model_revision, **settings)
