"""Steps of pretraining and fine-tuning runs: train, save, score, draw, push, and print the results.

Results are saved before the next step that may fail: weights, then the backbone, then each score.
"""

import copy
import json
import logging
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging as transformers_logging

from ..auto.registry import ModelEntry, find_model
from ..cards.model_card import headlines
from ..cards.record import copy_record
from ..convert.export import export_backbone
from ..convert.tensor_files import open_like_folder
from ..hub.upload import write_model_card
from ..images.reading import read_image
from ..metrics.report import without_nan
from ..modeling_vitp import ViTPForConditionalGeneration
from ..modeling_vitp_backbone import open_vit
from .arguments import SplitArguments
from .base_trainer import BaseTrainer
from .callbacks import component_colors, patch_maps
from .checkpointing import attempt, check_no_model, last_checkpoint, stop_on_full_disk, write_whole, written_whole
from .freezing import lora_rank
from .generation import first_image, tile_of
from .vitp_trainer import ViTPTrainer

logger = logging.getLogger(__name__)
START = "backbone_at_start"


def check_splits(training_args: TrainingArguments, args: SplitArguments) -> list[str]:
    """Return the names of the splits that a run opens.

    With `do_train` false, this is the test split, or else the evaluation split, and the other splits are not needed.

    Raises:
        ValueError: if the test split is trained or selected on, or if evaluation during training,
            `load_best_model_at_end` or `resample_test` has no suitable split.
    """
    if args.resample_test and args.test_split is None:
        raise ValueError("resample_test needs a test_split: set it, or remove resample_test.")
    if not training_args.do_train:
        check_no_model(training_args.output_dir)
        training_args.eval_strategy, args.eval_split = IntervalStrategy.NO, None if args.test_split else args.eval_split
        return [split for split in (args.eval_split, args.test_split) if split]
    if args.test_split in {*args.train_splits, args.eval_split} - {None}:
        raise ValueError(f"Split {args.test_split!r} is the test_split: it may not be trained or selected on.")
    if training_args.eval_strategy != "no" and args.eval_split is None:
        strategy = IntervalStrategy(training_args.eval_strategy).value
        raise ValueError(f"eval_strategy: {strategy} needs an eval_split: set it, or eval_strategy: no.")
    if training_args.load_best_model_at_end and args.eval_split in {*args.train_splits, None}:
        raise ValueError("load_best_model_at_end needs an eval_split that is not in train_splits.")
    return list(dict.fromkeys([*args.train_splits, *filter(None, (args.eval_split, args.test_split))]))


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Hide the progress bars of transformers and datasets, so that only one bar moves at a time."""
    shown = [library for library in (transformers_logging, datasets) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def keep_start(trainer: ViTPTrainer) -> None:
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


def train(trainer: BaseTrainer, **counted: Any) -> dict[str, Any]:
    """Train or resume a run, and save the weights; for pretraining also the backbone, and LoRA in `adapter`.

    Without a `train_dataset`, nothing is trained or saved.

    Args:
        counted: further entries of the metrics, such as numbers of training samples.

    Returns:
        The metrics, in all processes.

    Raises:
        ValueError: if LoRA would be trained under FSDP or ZeRO-3.
    """
    metrics: dict[str, Any] = {"seed": trainer.args.seed}
    if trainer.train_dataset is None:
        return metrics
    if (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()) and lora_rank(trainer.model) is not None:
        raise ValueError("LoRA cannot be trained under FSDP and ZeRO-3, which shard the weights to merge. Use DDP.")
    with no_library_bars():
        metrics |= {"train": trainer.train_or_resume(), **counted}
    skipped = count_skipped(trainer)
    if skipped:
        metrics["skipped_rows"] = skipped
        logger.warning("Rows skipped since the run was started or resumed, by source: %s", json.dumps(skipped))
    folder = Path(trainer.args.output_dir)
    with no_library_bars():
        trainer.save_model(folder / "adapter" if is_peft_model(trainer.model) else folder, _internal_call=True)
    trainer.keep_record()
    save_metrics(trainer, metrics)
    if trainer.is_world_process_zero():
        unset_hf_deepspeed_config()  # This process alone loads models from here on: ZeRO-3 would wait for the others.
    if isinstance(trainer, ViTPTrainer) and trainer.is_world_process_zero():
        with stop_on_full_disk(folder), no_library_bars():
            save_parts(trainer)
    return metrics


def count_skipped(trainer: BaseTrainer) -> dict[str, int]:
    """Return the number of skipped rows of each source over all processes."""
    own = getattr(trainer.data_collator, "skipped", None)
    if own is None:
        return {}
    counts = [own] if PartialState().num_processes == 1 else gather_object([own])
    return dict(sum(map(Counter, counts), Counter()))


def save_parts(trainer: ViTPTrainer) -> None:
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


def evaluate(trainer: BaseTrainer, metrics: dict[str, Any], name: str, samples: Dataset | None) -> None:
    """Score a split, if it is given, add the scores to the metrics, and save them."""
    if samples is not None:
        metrics[name] = trainer.evaluate(samples, metric_key_prefix=name)
        save_metrics(trainer, metrics)


def fine_tune(
    trainer: BaseTrainer,
    eval_dataset: Dataset | None,
    test_dataset: Dataset | None,
    num_pictures: int = 0,
    submit: Callable[[], None] | None = None,
    score_controls: Callable[[], dict[str, float]] | None = None,
    resample_test: bool = False,
    **counted: Any,
) -> int:
    """Train, score both splits, and finish the run, see [`train`], [`evaluate`], [`finish`] and [`report`].

    Args:
        num_pictures: number of samples in `predictions.png`.
        submit: function that writes the files for a benchmark's server.
        score_controls: function that returns further scores on the test split.
        resample_test: whether the metrics have the main score of each resample of the cases of the test split as
            `test_resampled`, and the number of cases as `test_cases`.
        counted: further entries of the metrics.

    Returns:
        The exit status.
    """
    metrics = train(trainer, **counted)
    evaluate(trainer, metrics, "eval", eval_dataset)
    evaluate(trainer, metrics, "test", test_dataset)
    if eval_dataset is not None or test_dataset is not None:
        metrics["main_score"] = trainer.main_score
    if resample_test:
        score = trainer.metric.score_images()
        metrics |= {"test_resampled": score.resampled, "test_cases": score.cases}
    if score_controls is not None:
        metrics["test"] |= score_controls()
    if not trainer.is_world_process_zero():
        return 0
    save_metrics(trainer, metrics)
    status = finish(trainer, test_dataset or eval_dataset, num_pictures, submit)
    return report(metrics, Path(trainer.args.output_dir), trainer.model.config.model_type) or status


def save_metrics(trainer: BaseTrainer, metrics: dict[str, Any]) -> None:
    """Write `metrics.json` in the main process."""
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "metrics.json"
        write_whole(path, json.dumps(without_nan(metrics), indent=2) + "\n")


def finish(
    trainer: BaseTrainer,
    samples: Dataset | None = None,
    num_pictures: int = 0,
    submit: Callable[[], None] | None = None,
) -> int:
    """Draw pictures and a summary of a pretraining, write the files for a benchmark's server and the cards, and push.

    Args:
        samples: of which `num_pictures`, spread over them, are drawn with the model's predictions.
        submit: writes the files for the server.

    Returns:
        The exit status: 1 if any of these steps failed.
    """
    output_dir = Path(trainer.args.output_dir)
    status = attempt(output_dir, "a picture", draw_pictures, trainer, samples, num_pictures)
    if submit is not None:
        status |= attempt(output_dir, "the submission", submit)
    for part in ("backbone", "adapter"):
        if (output_dir / part).is_dir():
            status |= attempt(output_dir, f"the card of {part}", write_part_card, part, output_dir)
    if isinstance(trainer, ViTPTrainer) and trainer.train_dataset is not None and trainer.args.watch_samples:
        with no_library_bars():
            status |= attempt(output_dir, "the summary picture", draw_summary, trainer)
    return status | (trainer.share() if trainer.train_dataset is not None else 0)


def draw_pictures(trainer: BaseTrainer, samples: Dataset | None, number: int) -> None:
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if trainer.train_dataset is not None:
        draw_losses(trainer.state.log_history, output_dir / "loss.png", isinstance(trainer, ViTPTrainer))
    number = min(number, len(samples or ()))
    if number:
        shown = [samples[index * len(samples) // number] for index in range(number)]
        trainer.draw(shown, output_dir / "predictions.png", is_test=True)


def draw_losses(log_history: list[dict], path: Path, of_answers: bool = True) -> None:
    """Draw training and evaluation loss over the steps of a trainer's log, those of a pretraining if `of_answers`."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    labels = ("training (under VRL)", "evaluation (every visual token)") if of_answers else ("training", "evaluation")
    for key, label in zip(("loss", "eval_loss"), labels):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            axis.plot(*zip(*points), label=label, marker="o" if len(points) < 20 else None)
    axis.set(xlabel="step", ylabel="loss on the answers" if of_answers else "loss", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(StrMethodFormatter("{x:.3g}"))
    if axis.lines:  # a run may end before it logs
        axis.legend()
    figure.savefig(path, dpi=110)


def draw_summary(trainer: ViTPTrainer, number: int = 3) -> None:
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


def write_part_card(part: str, output_dir: Path) -> None:
    copy_record(output_dir, output_dir / part)
    write_model_card(part, output_dir / part)


def report(metrics: dict[str, Any], output_dir: Path, model_type: str) -> int:
    """Print the headline metrics, the requirements of a pretraining, and the next commands.

    Args:
        model_type: key of `MODELS`, whose declaration names the headline metrics.

    Returns:
        The exit status: 1 if a requirement is not met.
    """
    entry, backbone, requirements = find_model(model_type), output_dir / "backbone", metrics.get("requirements", [])
    rows = [("train", "Loss", metrics["train"]["train_loss"])] if "train_loss" in metrics.get("train", {}) else []
    rows += [(split, title, value) for split, _, title, value in headlines(entry, without_nan(metrics), {})]
    print(f"\nMetrics (all of them: {output_dir / 'metrics.json'})")
    for split, title, value in rows:
        print(f"    {split:<14}{title:<44}{value:.4g}")
    for found in requirements:
        result = "passed" if found["passed"] else "failed"
        reached = found["missing"] if found["reached"] is None else f"{found['reached']:.3f}"
        print(f"{result}: {found['score']} {found['relation']} {found['bound']:g}: {reached}")
    print(f"\nModel, processor and pictures: {output_dir}")
    if (output_dir / "summary.png").is_file():
        print(f"The run in one picture: {output_dir / 'summary.png'}")
    if backbone.is_dir():
        print(f'The backbone on its own: transformers.AutoModel.from_pretrained("{backbone}")')
    if backbone.is_dir() or "train" in metrics:
        print("\nNext:", *next_commands(entry, output_dir), sep="\n    ")
    failed = [found["score"] for found in requirements if not found["passed"]]
    if failed:
        print(f"Requirements NOT met: {', '.join(failed)}. The outputs are kept.", file=sys.stderr)
    return 1 if failed else 0


def next_commands(entry: ModelEntry, output_dir: Path) -> list[str]:
    """Return three commands that go on from a run, with placeholders in capitals."""
    folder, backbone = shlex.quote(str(output_dir)), shlex.quote(str(output_dir / "backbone"))
    if (output_dir / "backbone").is_dir():
        return [
            f"vitp finetune_segmentation --data_root YOUR_MAPS --model_name_or_path {backbone}",
            f"vitp pretrain --model_name_or_path {folder} --dataset_name YOUR_DATA --output_dir NEW_FOLDER",
            f"vitp push_to_hub {folder} NAMESPACE/NAME --what backbone --dry_run",
        ]
    images = " ".join(["IMAGE.tif"] * getattr(entry.model_class, "images_per_sample", 1))
    predict = {"image-segmentation": "CLASSES.tif", "object-detection": "OBJECTS.geojson"}
    commands = [f"vitp space {folder}"]
    if entry.pipeline_tag in predict:
        commands.append(f"vitp predict_large {folder} {images} --output {predict[entry.pipeline_tag]}")
    else:
        commands.append(f"vitp evaluate_robustness --models {folder}")
    return [*commands, f"vitp push_to_hub {folder} NAMESPACE/NAME --what model --dry_run"]
