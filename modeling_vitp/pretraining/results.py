"""What a pretraining leaves beside its weights: the backbone before and after, and its summary as one picture."""

import copy
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import is_peft_model
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from ..convert.export import export_backbone
from ..convert.tensor_files import open_like_folder
from ..images.reading import read_image
from ..modeling_vitp import ViTPForConditionalGeneration
from ..modeling_vitp_backbone import open_vit
from ..training.callbacks import component_colors, patch_maps
from ..training.checkpointing import last_checkpoint, written_whole
from ..training.results import no_library_bars
from .generation import first_image, tile_of

if TYPE_CHECKING:
    from .trainer import ViTPTrainer

START = "backbone_at_start"


def keep_start(trainer: "ViTPTrainer") -> None:
    """Export the backbone before the first step to `backbone_at_start`, for comparison with the trained backbone.

    A resumed run keeps the existing export.
    """
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    folder = Path(args.output_dir) / START
    if folder.is_dir() and (args.resume_from_checkpoint or last_checkpoint(args.output_dir)):
        return
    with written_whole(folder) as unfinished_folder, no_library_bars():
        export_backbone(trainer.model, unfinished_folder, trainer.processing_class.image_processor)


def remove_pictured(output_dir: Path) -> None:
    """Remove what the summary of an earlier run shows: the backbone at its start and its predictions."""
    shutil.rmtree(output_dir / START, ignore_errors=True)
    (output_dir / "predictions.png").unlink(missing_ok=True)


def save_parts(trainer: "ViTPTrainer") -> None:
    """Save the merged model in the output folder and its backbone in `backbone`.

    The weights are read from the disk, because each process has only a part of the trainer's model under FSDP and ZeRO.
    LoRA, which is not sharded, is merged in a copy, so that the trained model is evaluated next.
    """
    output_dir = Path(trainer.args.output_dir)
    processor = trainer.processing_class
    if is_peft_model(trainer.model):
        copied_model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model))
        merged_model = copied_model.merge_and_unload()
        merged_model.save_pretrained(output_dir)
        open_like_folder(output_dir)
        processor.save_pretrained(output_dir)
        del copied_model, merged_model  # their memory is needed below
    else:
        shutil.rmtree(output_dir / "adapter", ignore_errors=True)  # of an earlier run
    model = ViTPForConditionalGeneration.from_pretrained(output_dir)
    alpha = trainer.args.interpolation_alpha
    start = output_dir / START if alpha < 1 else None
    export_backbone(
        model,
        output_dir / "backbone",
        processor.image_processor,
        start=start,
        interpolation_alpha=alpha,
    )


def draw_summary(trainer: "ViTPTrainer", number: int = 3) -> None:
    """Draw `summary.png`: features of the ViT before and after training, the loss, and predictions.

    The features are principal components of the same images, with the colors of the trained ViT turned to those of
    `backbone_at_start`; without that folder, the features before training are left out. The predictions are those of
    the task, or the last ones that were watched.

    Args:
        number: of images, at most.
    """
    output_dir = Path(trainer.args.output_dir)
    columns = picture_columns(trainer, number)
    num_rows = max((len(pictures) for pictures in columns.values()), default=0)
    num_rows = max(num_rows, 2)  # the plot of the loss needs the height of two
    num_columns = len(columns) + 2  # the plot of the loss is two wide
    width = 2.4 * num_columns
    heights = [2.4] * num_rows
    predictions = read_predictions(output_dir)
    if predictions is not None:
        heights.append(width * predictions.shape[0] / predictions.shape[1])
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), num_columns, height_ratios=heights)
    loss = np.asarray(read_image(output_dir / "loss.png", None))
    add_panel(figure, grid[:num_rows, len(columns) :], loss, "loss")
    for column, (title, pictures) in enumerate(columns.items()):
        for row, picture in enumerate(pictures):
            add_panel(figure, grid[row, column], picture, title if row == 0 else "")
    if predictions is not None:
        add_panel(figure, grid[num_rows, :], predictions, "predictions")
    figure.savefig(output_dir / "summary.png", dpi=110)


def picture_columns(trainer: "ViTPTrainer", number: int) -> dict[str, list[np.ndarray]]:
    """Return watched images, and the features of the ViT before and after training, by title."""
    output_dir = Path(trainer.args.output_dir)
    tiles = []
    images = []
    for row in trainer.watched_samples(number):
        messages, _, settings = trainer.watched_collator.conversation(row)
        image = first_image(messages)
        if image is not None:
            pixels, picture = tile_of(image, trainer.processing_class.image_processor, settings.images_kwargs)
            tiles.append(pixels)
            images.append(picture)
    if not tiles:
        return {}
    columns = {"image": images}
    backbones = {"ViT before training": output_dir / START, "ViT after training": output_dir / "backbone"}
    with tempfile.TemporaryDirectory() as folder:  # keeps the components of the first ViT
        for title, backbone in backbones.items():
            if not backbone.is_dir():
                continue
            vit = open_vit(backbone)
            with torch.no_grad():
                maps = [patch_maps(vit, pixels)[0] for pixels in tiles]
            columns[title] = component_colors(maps, Path(folder))
    return columns


def read_predictions(output_dir: Path) -> np.ndarray | None:
    """Return the picture of the task's predictions, or the last one that was watched, or `None`."""
    watched_pictures = sorted((output_dir / "watch").glob("step-*.png"))
    for path in (output_dir / "predictions.png", *watched_pictures[-1:]):
        if path.is_file():
            return np.asarray(read_image(path, None))
    return None


def add_panel(figure: Figure, place: SubplotSpec, picture: np.ndarray, title: str) -> None:
    axis = figure.add_subplot(place)
    axis.imshow(picture)
    axis.set_title(title)
    axis.axis("off")


def next_commands(output_dir: Path) -> list[str]:
    """Return commands that go on from a pretraining, with placeholders in capitals."""
    folder = shlex.quote(str(output_dir))
    backbone = shlex.quote(str(output_dir / "backbone"))
    return [
        f"vitp finetune_segmentation --data_root YOUR_MAPS --model_name_or_path {backbone}",
        f"vitp pretrain --model_name_or_path {folder} --dataset_name YOUR_DATA --output_dir NEW_FOLDER",
        f"vitp push_to_hub {folder} NAMESPACE/NAME --what backbone --dry_run",
    ]
