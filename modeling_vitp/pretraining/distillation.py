"""Distillation of a small ViT: a student learns the patch features of a frozen teacher."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import InterpolationMode, v2
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from ..bands import check_same_bands
from ..cards.record import public_name
from ..command.paths import not_there
from ..configuration_vitp import OWN_VISION_TYPES, ViTPVisionConfig, own_vision_config
from ..convert.export import export_backbone, image_processor_of
from ..convert.tensor_files import check_finite
from ..image_processing_vitp import ViTPImageProcessor
from ..images.pixels import normalized, shown, to_pixels
from ..images.reading import check_file, image_files, read_image, said
from ..input_spec import InputSpec
from ..modeling_vitp import build_vit
from ..modeling_vitp_backbone import open_vit, open_vit_config, square
from ..training.batching import share
from ..training.callbacks import choose, component_colors, patch_maps
from ..training.checkpointing import written_whole
from ..training.config import BaseConfig
from ..training.resuming import NUM_SAMPLES, hash_of_weights
from ..training.sample_trainer import AugmentedSamples, SampleTrainer
from ..vision_towers import pair, tower_of
from .arguments import DistillationArguments, DistillationSettings, ViewSettings
from .loading import check_config, config_class_of

# Default student, a ViT-S.
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
# Settings of the student that must match on resume.
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
SHAPE += ("drop_path_rate", "architecture", "model_args")
STATISTICS = 256  # images that the mean and the variance of the teacher's features are computed on


class ViewConfig(ViewSettings, BaseConfig):
    """Base of the training configurations of a [`ViTTrainer`], a mixin that precedes `TrainingArguments`."""

    unsupported = {
        "push_to_hub": "push the ViT at the end with `vitp push_to_hub OUTPUT_DIR/backbone NAMESPACE/NAME --what "
        "backbone`."
    }


@dataclass
class ViTPDistillationConfig(DistillationSettings, ViewConfig, TrainingArguments):
    """[`~transformers.TrainingArguments`] with the settings for distillation."""


class ImageFiles(Dataset):
    """Data set of image files, whose items have an `id` and an `image`, see [`~modeling_vitp.images.pixels.to_pixels`].

    The `id` is the path below the folder that all data have in common.

    Args:
        data: image files, and folders whose image files are read in sorted order, also in subfolders.
        input_spec: input spec of images that are not 8-bit RGB.

    Raises:
        ValueError: if no path is given, a path does not exist, or a folder has no image files.
    """

    def __init__(self, data: Sequence[str | Path], input_spec: dict | None = None):
        self.spec = InputSpec.from_dict(input_spec) if input_spec else None
        if not data:
            raise ValueError("Expected image files or folders with image files, got none.")
        root = os.path.commonpath([Path(os.path.abspath(place)).parent for place in data])
        self.files: list[tuple[Path, Path]] = []
        for place in map(Path, data):
            if not place.exists():
                raise ValueError(not_there(str(place)))
            paths = image_files(place) if place.is_dir() else [place]
            if not paths:
                raise ValueError(f"No image files found in {place}.")
            for path in paths:
                name = Path(os.path.relpath(path, root))
                self.files.append((path, name))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, name = self.files[index]
        try:
            image = to_pixels(read_image(path, None, self.spec), self.spec)
        except Exception as error:  # The type depends on the decoder.
            raise ValueError(f"{path} cannot be read: {said(error)}") from error
        return {"id": name.as_posix(), "image": image}


class ImageViews(AugmentedSamples):
    """Data set of transformed and normalized items of [`ImageFiles`]."""

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        sample, generator = self.sample(index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())
            pixels = self.pixels(sample["image"])
        return {"pixel_values": pixels, "id": sample["id"]}

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        view = self.augmentation(image)
        if view.is_floating_point():
            view = view.clamp(0, 1)  # Bicubic resampling overshoots.
        return normalized(view, self.image_processor)


class Distiller(nn.Module):
    """Student with a linear projection to the standardized patch features of its teacher.

    Args:
        student: ViT of any family, see [`~modeling_vitp.register_tower`].
        width: number of channels of the teacher.

    Attributes:
        mean, variance: statistics of the teacher's channels, float32 `(width,)`. The teacher's features are
            standardized by them, because a few channels of a large ViT have most of the variance.
    """

    def __init__(self, student: PreTrainedModel, width: int):
        super().__init__()
        self.student = student
        self.projection = nn.Linear(student.config.hidden_size, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def activation_checkpointing_enable(self, **kwargs) -> None:
        self.student.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs) -> None:  # called by transformers before 5.23
        self.student.gradient_checkpointing_enable(**kwargs)

    def predict(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the predicted features of the teacher, float32 `(batch_size, width, rows, columns)`."""
        return patch_maps(self.student, pixel_values, self.projection)

    def target(self, teacher_maps: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """Return the teacher's features on a grid, standardized, `(batch_size, width, *grid)`."""
        grid = tuple(grid)
        if teacher_maps.shape[-2:] != grid:
            teacher_maps = F.interpolate(teacher_maps, grid, mode="bilinear", antialias=True)
        deviation = (self.variance[:, None, None] + 1e-6).sqrt()
        return (teacher_maps - self.mean[:, None, None]) / deviation

    def forward(self, pixel_values: torch.Tensor, teacher_maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare student and teacher.

        Args:
            pixel_values: normalized images, float32 `(batch_size, num_channels, height, width)`.
            teacher_maps: features of the teacher for the same images, float32 `(batch_size, width, rows, columns)`.

        Returns:
            The loss, which is the mean over the patches of cosine distance plus smooth L1 distance, and the mean cosine
            similarity.
        """
        predicted = self.predict(pixel_values)
        target = self.target(teacher_maps, predicted.shape[-2:])
        cosine = F.cosine_similarity(predicted, target, dim=1).mean()
        loss = 1 - cosine + F.smooth_l1_loss(predicted, target)
        return loss, cosine


def resized(pixel_values: torch.Tensor, side: int) -> torch.Tensor:
    """Resize square images to `side` pixels (bicubic, antialiased)."""
    if pixel_values.shape[-1] == side:
        return pixel_values
    return F.interpolate(pixel_values, (side, side), mode="bicubic", antialias=True)


class ViTTrainer(SampleTrainer, Trainer):
    """Trainer of a ViT on random resized crops of images without labels.

    - Crops and flips depend on the seed and the epoch only. A run that resumes from a checkpoint ends with the same
      weights as an uninterrupted run.
    - At the end, the ViT is exported to the folder `backbone`, without what it is trained with.

    Args:
        model: model that contains the ViT, and returns the loss.
        vit: ViT in the model.
        args: training arguments with the fields of [`~modeling_vitp.pretraining.arguments.ViewSettings`].
        train_dataset, eval_dataset: instances of [`ImageFiles`].
        processing_class: image processor of the ViT.
        side: side of the crops in pixels.
    """

    fixed = ("crop_area", "horizontal_flip", "vertical_flip")
    counted = "images"

    def __init__(
        self,
        model: nn.Module,
        vit: PreTrainedModel,
        args: ViewConfig,
        train_dataset: ImageFiles | None,
        eval_dataset: ImageFiles | None,
        processing_class: ViTPImageProcessor,
        side: int,
        **kwargs: Any,
    ):
        self.vit = vit
        self.whole_view = v2.Resize((side, side), InterpolationMode.BICUBIC, antialias=True)
        seed = args.seed if args.data_seed is None else args.data_seed
        if train_dataset is not None:
            crop = v2.RandomResizedCrop(
                side,
                tuple(args.crop_area),
                interpolation=InterpolationMode.BICUBIC,
                antialias=True,
            )
            horizontal_flip = v2.RandomHorizontalFlip(args.horizontal_flip)
            vertical_flip = v2.RandomVerticalFlip(args.vertical_flip)
            augmentation = v2.Compose([crop, horizontal_flip, vertical_flip])
            train_dataset = ImageViews(train_dataset, augmentation, processing_class, seed)
        if eval_dataset is not None:
            eval_dataset = ImageViews(eval_dataset, self.whole_view, processing_class, seed)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )

    def train(self, *args, **kwargs) -> TrainOutput:
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError("FSDP and ZeRO-3 shard the ViT, which the first process exports at the end. Use DDP.")
        return super().train(*args, **kwargs)

    def run_settings(self) -> dict[str, dict[str, Any]]:
        settings = super().run_settings()
        shape = {name: getattr(self.vit.config, name) for name in SHAPE if hasattr(self.vit.config, name)}
        fixed = settings["fixed"]
        fixed[NUM_SAMPLES] = len(self.train_dataset)
        fixed["objective"] = type(self.accelerator.unwrap_model(self.model)).__name__
        fixed["ViT"] = shape
        return settings

    def training_data(self) -> Any:
        return {"images": [path for path, _ in self.train_dataset.samples.files]}

    def check_rows(self) -> None:
        files = list(self.train_dataset.samples.files)
        if self.eval_dataset:
            files += self.eval_dataset.samples.files
        for path, _ in tqdm(files, unit="image", desc="Checking images", leave=False):
            check_file(path)

    def watched_samples(self, number: int) -> list:
        dataset = self.eval_dataset or self.train_dataset
        return choose(dataset.samples, number, self.data_seed)

    def maps_to_draw(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the maps `(channels, rows, columns)` of an image `(1, num_channels, side, side)` to draw, by title."""
        return {"features": patch_maps(self.vit, pixels)[0]}

    def draw_samples(self, samples: list, path: Path) -> None:
        """Draw images with their [`maps_to_draw`] in common principal components."""
        views = ImageViews(samples, self.whole_view, self.processing_class, self.data_seed)
        maps_of_samples = []
        for sample in samples:
            pixels = views.pixels(sample["image"])[None].to(self.args.device)
            with self.compute_loss_context_manager():
                maps_of_samples.append(self.maps_to_draw(pixels))
        # The maps of an image are joined, so that they have the same principal components.
        joined_maps = [torch.cat([*maps.values()], 2) for maps in maps_of_samples]
        colors = component_colors(joined_maps, path.parent)
        titles = list(maps_of_samples[0])
        num_columns = 1 + len(titles)
        figure = Figure(figsize=(2.5 * num_columns, 2.7 * len(samples)), layout="constrained")
        axes = figure.subplots(len(samples), num_columns, squeeze=False)
        for sample, joined_colors, row_of_axes in zip(samples, colors, axes):
            picture = shown(sample["image"], self.processing_class.band_names)
            panels = [picture, *np.hsplit(joined_colors, len(titles))]
            for axis, title, panel in zip(row_of_axes, [sample["id"], *titles], panels):
                axis.imshow(panel, interpolation="nearest")
                axis.set_title(title, fontsize=8)
                axis.axis("off")
        figure.savefig(path, dpi=120)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint of the whole model during training, and otherwise export the ViT to `backbone`."""
        if self.is_in_train:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir) / "backbone"
            with written_whole(folder) as unfinished_folder:
                export_backbone(self.vit, unfinished_folder, self.processing_class)

    def _share(self) -> int:
        return 0  # the output folder has no model but `backbone`, whose card is written with it


class ViTPDistillationTrainer(ViTTrainer):
    """Trainer of a ViT on the patch features of another one.

    Both see the same random resized crop. If their grids differ, the features of the teacher are interpolated to the
    grid of the student. The student is exported without its projection.

    Args:
        student: ViT of any family, see [`load_student`].
        teacher: ViT of any family, see [`load_teacher`]. It is frozen.
        args: training arguments, [`ViTPDistillationConfig`].
        train_dataset, eval_dataset: instances of [`ImageFiles`].
        processing_class: image processor of the teacher.

    Raises:
        ValueError: if `teacher_image_size` is not a multiple of the teacher's patch size.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        args: ViTPDistillationConfig,
        train_dataset: ImageFiles | None = None,
        eval_dataset: ImageFiles | None = None,
        processing_class: ViTPImageProcessor | None = None,
        **kwargs: Any,
    ):
        self.side = square(student.config.image_size, "image_size of the student")
        patch = math.lcm(*pair(teacher.config.patch_size))
        self.teacher_side = args.teacher_image_size or math.ceil(self.side / patch) * patch
        if self.teacher_side % patch:
            raise ValueError(f"teacher_image_size must be a multiple of {patch} pixels, got {args.teacher_image_size}.")
        super().__init__(
            Distiller(student, teacher.config.hidden_size),
            student,
            args,
            train_dataset,
            eval_dataset,
            processing_class or ViTPImageProcessor(),
            max(self.side, self.teacher_side),
            **kwargs,
        )
        self.teacher = teacher.to(args.device).eval().requires_grad_(False)

    def run_settings(self) -> dict[str, dict[str, Any]]:
        settings = super().run_settings()
        settings["fixed"]["teacher_image_size"] = self.teacher_side
        settings["free"]["teacher"] = public_name(self.teacher.name_or_path)
        student_name = self.distiller.student.name_or_path
        settings["free"]["student"] = public_name(student_name) if student_name else None
        return settings

    def extra_settings(self) -> dict[str, Any]:
        settings = super().extra_settings()
        weights_hash = hash_of_weights(self.teacher, self.is_world_process_zero(), lambda name, weight: True)
        settings[f"weights of the teacher in {self.teacher.dtype}"] = weights_hash
        return settings

    @property
    def distiller(self) -> Distiller:
        """Student and projection without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        if not resume_from_checkpoint:
            self.measure_teacher()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def measure_teacher(self) -> None:
        """Compute mean and variance of the teacher's channels on crops of at most `STATISTICS` images."""
        generator = torch.Generator().manual_seed(self.data_seed)
        order = torch.randperm(len(self.train_dataset), generator=generator)
        crops = Subset(self.train_dataset, [(0, index) for index in order[:STATISTICS].tolist()])
        num_patches = 0
        sums = torch.zeros(2, self.teacher.config.hidden_size, dtype=torch.float64)
        for batch in self.loader_of(crops, self.args.train_batch_size):
            maps = self.teacher_maps(batch["pixel_values"].to(self.args.device))
            features = maps.movedim(1, -1).flatten(0, -2).cpu().double()
            num_patches += len(features)
            sums += torch.stack([features.sum(0), features.square().sum(0)])
        mean, square_mean = sums / num_patches
        self.distiller.mean.copy_(mean)
        self.distiller.variance.copy_((square_mean - mean.square()).clamp(min=0))

    def loader_of(self, samples: Dataset, batch_size: int) -> DataLoader:
        return DataLoader(
            samples,
            batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # the global one is for training
        )

    @torch.no_grad()
    def teacher_maps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features of the teacher, float32 `(batch_size, channels, rows, columns)`."""
        return patch_maps(self.teacher, resized(pixel_values, self.teacher_side))

    def compare(self, model: nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return loss and cosine similarity, see [`Distiller`]."""
        return model(resized(pixel_values, self.side), self.teacher_maps(pixel_values))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, cosine = self.compare(model, inputs["pixel_values"])
        if return_outputs:
            return loss, {"cosine": cosine}
        return loss

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Return a loader of the images that this process evaluates."""
        args = self.args
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        indices = share(range(len(dataset)), args.world_size, args.process_index)
        views = Subset(dataset, [(0, index) for index in indices])
        return self.loader_of(views, args.per_device_eval_batch_size)

    @torch.no_grad()
    def score(self, batches: Iterable, is_test: bool) -> dict[str, float]:
        model = self.distiller.eval()
        sums = torch.zeros(3, device=self.args.device)
        for batch in batches:
            pixels = batch["pixel_values"].to(self.args.device)
            with self.compute_loss_context_manager():
                loss, cosine = self.compare(model, pixels)
            sums += len(pixels) * torch.stack([torch.ones_like(loss), loss, cosine])
        num_images, loss_sum, cosine_sum = self.accelerator.reduce(sums).tolist()
        return {"loss": loss_sum / num_images, "cosine": cosine_sum / num_images}

    def maps_to_draw(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        student_maps = self.distiller.predict(resized(pixels, self.side))
        grid = student_maps.shape[-2:]
        teacher_maps = self.distiller.target(self.teacher_maps(pixels), grid)
        return {"teacher": teacher_maps[0], "student": student_maps[0]}


def load_teacher(name: str, bf16: bool = False) -> tuple[PreTrainedModel, ViTPImageProcessor]:
    """Load a teacher and its image processor.

    Args:
        name: folder or Hub id of an exported backbone, or of a ViT of another family.
        bf16: whether to load the weights in bfloat16 instead of float32.

    Raises:
        ValueError: if the model is not a ViT of a known family, or its weights are missing or not finite.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    teacher = open_vit(name, dtype=dtype)
    check_finite(teacher.state_dict(), name)
    image_processor = image_processor_of(name, pair(teacher.config.image_size))
    return teacher, image_processor


def load_student(
    args: DistillationArguments, teacher: PreTrainedModel, image_processor: ViTPImageProcessor
) -> PreTrainedModel:
    """Build a student with random weights, or load one to start from, in float32.

    Args:
        teacher: teacher, whose image and patch size are the default.
        image_processor: image processor of the teacher, whose bands the student takes.

    Raises:
        ValueError: if the configuration is invalid, the student has other bands than the teacher, or its image is not a
            square of whole patches.
    """
    band_names = image_processor.band_names
    if args.student is not None:
        student = open_vit(args.student)
        check_finite(student.state_dict(), args.student)
    else:
        if isinstance(args.student_config, str):
            config = own_vision_config(open_vit_config(args.student_config))
            config.dtype = torch.float32  # The stored one is often bfloat16, in which AdamW's small steps are lost.
        else:
            config = new_student_config(args.student_config or {}, teacher, band_names)
        student = build_vit(config)
        student.name_or_path = ""  # that of the configuration, which has given no weights
    config = student.config
    tower_of(config).freeze_unused(student)
    check_same_bands("the student", getattr(config, "band_names", None), args.teacher, band_names)
    side = square(config.image_size, "image_size of the student")
    patch_height, patch_width = pair(config.patch_size)
    if side % patch_height or side % patch_width:
        raise ValueError(
            f"Expected the image_size of the student to be a multiple of its patch_size, got {side} and "
            f"{[patch_height, patch_width]}."
        )
    return student


def new_student_config(
    fields: dict[str, Any], teacher: PreTrainedModel, band_names: list[str] | None
) -> PreTrainedConfig:
    """Return the configuration of a new student, by default a ViT-S with the image and patch size of the teacher.

    Args:
        fields: fields of the configuration, as the user has set them.
        band_names: bands of the teacher.
    """
    config_class = config_class_of("student_config", fields, ViTPVisionConfig.model_type)
    check_config("student_config", fields, config_class)
    if config_class.model_type in OWN_VISION_TYPES:
        patch_size = list(pair(teacher.config.patch_size))
        image_size = []
        for side, patch in zip(pair(teacher.config.image_size), patch_size):
            image_size.append(math.ceil(side / patch) * patch)  # rounded up to whole patches
        all_fields = {
            **SMALL,
            "image_size": image_size,
            "patch_size": patch_size,
            "band_names": band_names,
            **fields,
            "model_type": ViTPVisionConfig.model_type,
        }
        return own_vision_config(ViTPVisionConfig.from_dict(all_fields))
    if config_class.model_type.startswith("vitp_"):
        raise ValueError(f"student_config: expected a ViT such as 'vitp_vision', got {config_class.model_type!r}.")
    return own_vision_config(fields)
