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
    args = trainer.args
    folder = Path(args.output_dir) / START
    is_resumed = folder.is_dir() and (args.resume_from_checkpoint or last_checkpoint(args.output_dir))
    if trainer.is_world_process_zero() and not is_resumed:
        with written_whole(folder) as written, no_library_bars():
            export_backbone(trainer.model, written, trainer.processing_class.image_processor)


def remove_pictured(output_dir: Path) -> None:
    """Remove what the summary of an earlier run shows: the backbone at its start and its predictions."""
    shutil.rmtree(output_dir / START, ignore_errors=True)
    (output_dir / "predictions.png").unlink(missing_ok=True)


def save_parts(trainer: "ViTPTrainer") -> None:
    """Save the merged model in the output folder and its backbone in `backbone`.

    The weights are read from the disk, because each process has only a part of the trainer's model under FSDP and ZeRO.
    LoRA, which is not sharded, is merged in a copy, so that the trained model is evaluated next.
    """
    output_dir, processor = Path(trainer.args.output_dir), trainer.processing_class
    if is_peft_model(trainer.model):
        merged = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).merge_and_unload()
        merged.save_pretrained(output_dir)
        open_like_folder(output_dir)
        processor.save_pretrained(output_dir)
        del merged
    else:
        shutil.rmtree(output_dir / "adapter", ignore_errors=True)  # of an earlier run
    model = ViTPForConditionalGeneration.from_pretrained(output_dir)
    export_backbone(model, output_dir / "backbone", processor.image_processor)


def draw_summary(trainer: "ViTPTrainer", number: int = 3) -> None:
    """Draw `summary.png`: features of the ViT before and after training, the loss, and predictions.

    The features are principal components of the same images, with the colors of the trained ViT turned to those of
    `backbone_at_start`; without that folder, the features before training are left out. The predictions are those of
    the task, or the last ones that were watched.

    Args:
        number: of images, at most.
    """
    output_dir, image_processor = Path(trainer.args.output_dir), trainer.processing_class.image_processor
    tiles, columns = [], {}
    for row in trainer.watched_samples(number):
        messages, _, settings = trainer.watched_collator.conversation(row)
        image = first_image(messages)
        if image is not None:
            pixels, picture = tile_of(image, image_processor, settings.images_kwargs)
            tiles.append(pixels)
            columns.setdefault("image", []).append(picture)
    with tempfile.TemporaryDirectory() as folder:  # keeps the components of the first ViT
        for title, name in (("ViT before training", START), ("ViT after training", "backbone")):
            if tiles and (output_dir / name).is_dir():
                vit = open_vit(output_dir / name)
                with torch.no_grad():
                    maps = [patch_maps(vit, pixels)[0] for pixels in tiles]
                columns[title] = component_colors(maps, Path(folder))

    watched = sorted((output_dir / "watch").glob("step-*.png"))[-1:]
    predictions = [path for path in (output_dir / "predictions.png", *watched) if path.is_file()][:1]
    pictures = {path.stem: np.asarray(read_image(path, None)) for path in (*predictions, output_dir / "loss.png")}
    loss, rows, width = pictures.pop("loss"), max(len(tiles), 2), 2.4 * (len(columns) + 2)
    heights = [2.4] * rows + [width * picture.shape[0] / picture.shape[1] for picture in pictures.values()]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), len(columns) + 2, height_ratios=heights)
    panels = [("loss", loss, grid[:rows, len(columns) :])]
    for column, (title, drawn) in enumerate(columns.items()):
        panels += [(title if row == 0 else "", panel, grid[row, column]) for row, panel in enumerate(drawn)]
    panels += [("predictions", picture, grid[rows, :]) for picture in pictures.values()]
    for title, panel, place in panels:
        axis = figure.add_subplot(place)
        axis.imshow(panel)
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(output_dir / "summary.png", dpi=110)


def next_commands(output_dir: Path) -> list[str]:
    """Return commands that go on from a pretraining, with placeholders in capitals."""
    folder = shlex.quote(str(output_dir))
    backbone = shlex.quote(str(output_dir / "backbone"))
    return [
        f"vitp finetune_segmentation --data_root YOUR_MAPS --model_name_or_path {backbone}",
        f"vitp pretrain --model_name_or_path {folder} --dataset_name YOUR_DATA --output_dir NEW_FOLDER",
        f"vitp push_to_hub {folder} NAMESPACE/NAME --what backbone --dry_run",
    ]
