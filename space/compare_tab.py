"""The Compare tab: similarity of a backbone's features under corruption, or between two images."""

import html
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import gradio as gr
import numpy as np
import pandas as pd
import torch
from answers import PROGRESS
from backbone_tab import backbone_inputs, resolution_slider
from computing import answering, errors_as_messages, message, new_file, seconds_left, turn, write_png
from loading import RANDOM, LoadedBackbone, Models
from maps import NO_BACKBONE, OPACITY, draw_map, grid_of, heat_of, patch_features, selected_backbones
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.nn import functional as F
from uploading import (
    CROWNS,
    EXAMPLES,
    ImageInput,
    example_path,
    forget,
    image_input,
    image_upload,
    name_of,
    open_pixels,
    picture_of,
)
from url_state import Tab

from modeling_vitp.bands import describe_bands
from modeling_vitp.images.corruptions import SEVERITIES, corrupt, motion, parameters, undo_motion

MAX_SIDE = 800  # image size of the paper's robustness table
ORDER = (3, 1, 5, 2, 4)  # order of the severities: results that stop early still span the range
COLUMNS = ["corruption", "severity", "backbone", "share", "similarity", "floor", "parameters", "compared"]
BEGIN = "Choose an image or an example, then compare."
ASPECT_TOLERANCE = 0.03  # largest difference of the log aspect ratios of two images of one place
COLORS = ("#0f766e", "#b45309", "#64748b")  # first and second backbone, random weights
CAPTION = "Kept similarity: 1 as for the clean image, 0 as for a different image"
CLEARLY = 0.05  # smallest difference of the mean kept similarities that the summary calls better
WORDS = """\
- **Cosine similarity**: 1 if the features of two images agree at a place, 0 if they have nothing in common. Rotation, \
scale and translation are undone first.
- **Floor**: the similarity of this image to *other* images. It is high for a ViT with random weights, to which all \
images look alike.
- **Kept similarity**: the similarity on a scale from the floor (0) to the clean image (1). Below 0, the corrupted \
image is less similar to the clean one than other images are.
"""


class Controls(NamedTuple):
    image: ImageInput
    run_button: gr.Button
    second_image: gr.File
    pair_button: gr.Button
    cancel_button: gr.Button
    first: gr.Dropdown
    second: gr.Dropdown
    resolution: gr.Slider
    seed: gr.Number


class ResultViews(NamedTuple):
    summary: gr.Markdown
    chart: gr.Image
    map_a: gr.Image
    map_b: gr.Image
    note: gr.Markdown
    table: gr.Dataframe


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    start = models.backbone()
    gr.Markdown(
        "How much do the features of an image change when the image is **corrupted**, by noise, blur, haze and so on? "
        "Or compare **two images** of one place."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            controls = _build_controls(models, model_name, start)
        with gr.Column(scale=3, min_width=280, elem_classes="results"):
            views = _build_result_views()
    compare_corruptions, compare_pair = _handlers(models)
    image = controls.image
    second_image = controls.second_image
    first = controls.first
    second = controls.second
    resolution = controls.resolution
    seed = controls.seed
    inputs = [first, second, resolution, seed]
    outputs = [views.summary, views.chart, views.table, views.note]
    running = image.on(
        [controls.run_button.click],
        compare_corruptions,
        inputs,
        outputs,
        show_progress_on=views.chart,
    )
    running_pair = image.on(
        [controls.pair_button.click],
        compare_pair,
        [second_image, first, second, resolution],
        [views.map_a, views.map_b, views.note],
        show_progress_on=views.note,
    )
    controls.cancel_button.click(None, cancels=[running, running_pair])
    changes = [
        *image.changes,
        second_image.upload,
        second_image.clear,
        second_image.delete,
        first.input,
        second.input,
        resolution.input,
        seed.input,
        model_name.input,
    ]
    cleared_views = [views.summary, views.chart, views.table, views.map_a, views.map_b, views.note]
    forget(changes, cleared_views, [running, running_pair])
    state = {"cimage": image.example, "seed": seed, "cres": resolution, "ca": first, "cb": second}
    if start.band_names is not None:
        return Tab(state)
    return Tab(state, [(*image.with_path(compare_corruptions, inputs), outputs, [*changes, controls.run_button.click])])


def _build_controls(models: Models, model_name: gr.Dropdown, start: LoadedBackbone) -> Controls:
    image = image_input("compare_image", CROWNS)
    run_button = gr.Button(
        "Compare under corruptions",
        variant="primary",
        elem_id="run_corruptions",
        elem_classes="run",
    )
    second_image = image_upload("Second image", elem_id="compare_second_image")
    pair_button = gr.Button("Compare the two images", elem_id="run_pair", elem_classes="run")
    cancel_button = gr.Button("Cancel", size="sm")
    with gr.Accordion("More settings", open=False, elem_classes="more"):
        first, second = backbone_inputs(models, model_name, NO_BACKBONE)
        resolution = resolution_slider(start.native, "compare_resolution")
        seed = gr.Number(0, label="Seed of the corruptions", precision=0, minimum=0, maximum=2**31 - 1)
    return Controls(
        image=image,
        run_button=run_button,
        second_image=second_image,
        pair_button=pair_button,
        cancel_button=cancel_button,
        first=first,
        second=second,
        resolution=resolution,
        seed=seed,
    )


def _build_result_views() -> ResultViews:
    summary = gr.Markdown(label="Summary", elem_id="compare_summary")
    chart = picture_of("Kept similarity under corruption", "corruption_chart")
    with gr.Row():
        map_a = picture_of("Similarity of the two images", "pair_a", visible=False)
        map_b = picture_of("… by the second backbone", "pair_b", visible=False)
    note = gr.Markdown(BEGIN, label="Note", elem_id="compare_note")
    with gr.Accordion("The chart in numbers", open=False):
        table = gr.Dataframe(headers=COLUMNS, label="Table", interactive=False, wrap=True)
    gr.Markdown(WORDS)
    return ResultViews(summary, chart, map_a, map_b, note, table)


def _handlers(models: Models) -> tuple[Callable, Callable]:
    """Return the handlers `compare_corruptions` and `compare_pair`."""

    @answering
    def compare_corruptions(path, backbone, second_backbone, resolution, seed, progress=PROGRESS):
        """Yield summary, chart, table and note of the corruptions so far."""
        for rows, text in corruptions(models, path, backbone, second_backbone, resolution, seed, progress):
            words = summary_of(rows)
            file = new_file("corruptions.png")
            chart_of(rows, name_of(path)).savefig(file)
            yield words, gr.Image(str(file), alt_text=f"{CAPTION}. {words}"), rows, text

    @answering
    def compare_pair(path, second_path, backbone, second_backbone, resolution, progress=PROGRESS):
        """Return a similarity map of two images of one place for each backbone, and a note."""
        first_map, second_map, facts, text = two_images(
            models, path, second_path, backbone, second_backbone, resolution, progress
        )
        updates = [gr.Image(None, visible=False), gr.Image(None, visible=False)]
        for index, (picture, fact) in enumerate(zip((first_map, second_map), facts)):
            file = write_png(picture, "map.png")
            updates[index] = gr.Image(file, label=fact["backbone"], alt_text=text, visible=True)
        return *updates, text

    return compare_corruptions, compare_pair


# Corruptions


def corruptions(
    models: Models,
    image: str | None,
    backbone: str,
    second_backbone: str,
    resolution: int,
    seed: int | None,
    progress: gr.Progress = PROGRESS,
) -> Iterator[tuple[pd.DataFrame, str]]:
    """Yield a table of the results at one severity, then of all, and a note, which tells if the time limit was reached.

    The backbones always include the first one with random weights.
    """
    untrained = backbone.removesuffix(RANDOM) + RANDOM
    names = dict.fromkeys([*selected_backbones(backbone, second_backbone), untrained])
    backbones = open_backbones(models, list(names), progress)
    rgb, reading_note = open_pixels(image, MAX_SIDE, backbones[0].input_spec)
    others = [fitted(name, rgb.shape) for name in EXAMPLES if name != name_of(image)]
    encoders = {opened.name: encoder(opened, resolution) for opened in backbones}
    heading = f"**{html.escape(reading_note)}**; the floor is over {len(others)} other images."
    num_images = len(ORDER) * len(SEVERITIES)
    results = []
    longest = 0.0
    with turn(progress):
        start = time.monotonic()
        for result in compare(rgb, encoders, severities=ORDER, seed=seed or 0, others=others):
            results.append(result)
            if len(results) % len(encoders):  # Another backbone follows on the same image.
                continue
            num_done = len(results) // len(encoders)
            end = time.monotonic()
            longest = max(longest, end - start)
            start = end
            is_late = seconds_left() is not None and seconds_left() < 2 * longest + 1
            step = f"{result.corruption.replace('_', ' ')}, severity {result.severity}"
            progress((num_done, num_images), desc=step)
            if is_late or num_done in (len(SEVERITIES), num_images):
                ending = ": the time limit was reached." if is_late and num_done < num_images else "."
                yield table_of(results), f"{heading}  \n{num_done} of {num_images} corrupted images{ending}"
            if is_late:
                return


class Comparison(NamedTuple):
    """Feature similarity of one backbone under one corruption and severity, a row of the table.

    Args:
        share: similarity rescaled from [floor, 1] to [0, 1]: 1 for an unchanged image, 0 for a different image. A
            backbone that maps all images to similar features has a high similarity, but a low share.
        similarity: mean cosine similarity over the compared patches, in [-1, 1]; NaN without a compared patch.
        floor: mean similarity of the image to other images at the same patch positions.
        parameters: parameters of the corruption.
        compared: share of compared patches, in [0, 1]; less than 1 only for geometric corruptions.
    """

    corruption: str
    severity: int
    backbone: str
    share: float
    similarity: float
    floor: float
    parameters: dict[str, float]
    compared: float


def compare(
    image: np.ndarray,
    backbones: Mapping[str, Callable[[np.ndarray], torch.Tensor]],
    corruptions: Sequence[str] = tuple(SEVERITIES),
    severities: Sequence[int] = (3,),
    seed: int = 0,
    others: Sequence[np.ndarray] = (),
) -> Iterator[Comparison]:
    """Yield comparisons, ordered by severity, corruption and backbone.

    Args:
        image: uint8 RGB of shape `(height, width, 3)`, at the size at which corruptions are applied.
        backbones: functions, by name, from such an image to patch features of shape `(channels, rows, columns)`. They
            may resize the image, but not crop or pad it.
        seed: seed of the corruptions. All backbones see the same images.
        others: images of the same shape for the floor; the floor is 0 without them.

    Raises:
        ValueError: if a corruption or severity is unknown, before anything is computed.
    """
    cases = []
    for severity in severities:
        for name in corruptions:
            cases.append((name, severity, parameters(name, severity)))
    clean_features = {backbone: encode(image) for backbone, encode in backbones.items()}
    floors = {}
    for backbone, encode in backbones.items():
        similarities = []
        for other in others:
            similarities.append(similarity_map(clean_features[backbone], encode(other)).mean().item())
        floors[backbone] = float(np.mean(similarities)) if similarities else 0.0
    height, width = image.shape[:2]
    for name, severity, settings in cases:
        corrupted = corrupt(image, name, severity, seed)
        matrix = motion(name, severity, height, width, seed=seed)
        for backbone, encode in backbones.items():
            similarity = similarity_map(clean_features[backbone], encode(corrupted), matrix)
            mean = similarity.nanmean().item()
            floor = floors[backbone]
            yield Comparison(
                corruption=name,
                severity=severity,
                backbone=backbone,
                share=(mean - floor) / (1 - floor) if floor < 1 else float("nan"),
                similarity=mean,
                floor=floor,
                parameters=settings,
                compared=similarity.isfinite().float().mean().item(),
            )


def similarity_map(clean: torch.Tensor, corrupted: torch.Tensor, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cosine similarity of patch features, `(channels, rows, columns)`, at each patch of the clean image.

    A motion ([`~modeling_vitp.images.corruptions.motion`]) is undone first, by interpolation. The similarity is NaN
    where it moved the patch out of the image.
    """
    clean = clean.float()
    corrupted = corrupted.float()
    if matrix is None:
        return F.cosine_similarity(clean, corrupted, dim=0)
    undone, valid = undo_motion(corrupted, matrix)
    similarity = F.cosine_similarity(clean, undone, dim=0)
    return similarity.masked_fill(~valid, torch.nan)


def table_of(results: Sequence[Comparison]) -> pd.DataFrame:
    table = pd.DataFrame(results).round(4)
    table["corruption"] = table["corruption"].str.replace("_", " ")
    texts = []
    for result in results:
        text = ", ".join(f"{name} {value:g}" for name, value in result.parameters.items())
        texts.append(text.replace("_", " "))
    table["parameters"] = texts
    return table


def summary_of(table: pd.DataFrame) -> str:
    """Describe the chart in words: the mean share of each backbone, and the corruptions with the best and the worst."""
    means = table.groupby("backbone", sort=False)["share"].mean()
    first = means.index[0]
    shares = table[table["backbone"] == first].groupby("corruption")["share"].mean().dropna()
    if shares.empty:
        return "No patch could be compared."
    bold_names = {name: f"**{html.escape(name)}**" for name in means.index}
    best = shares.idxmax()
    worst = shares.idxmin()
    averages = ", ".join(f"{bold_names[name]} keeps {mean:.2f}" for name, mean in means.items())
    text = (
        f"On average, {averages} of the similarity to the clean image. {bold_names[first]} keeps most under {best} "
        f"({shares[best]:.2f}) and least under {worst} ({shares[worst]:.2f})."
    )
    if len(means) > 1 and means[first] < means.iloc[1:].max() + CLEARLY:
        text += f" {bold_names[first]} is not more robust than the other."
    negative_shares = shares[shares < 0].sort_values()
    if not negative_shares.empty:
        corruptions = ", ".join(negative_shares.index)
        text += f" Under {corruptions}, the image is less similar to the clean one than other images are."
    return text


def chart_of(table: pd.DataFrame, title: str) -> Figure:
    """Return a chart of the share by severity for each corruption, all with the same axes, which span all values."""
    names = table["backbone"].unique()
    colors = [*COLORS[: len(names) - 1], COLORS[-1]]
    cases = table.groupby("corruption", sort=False)
    rows = math.ceil(len(cases) / 4)
    columns = min(4, len(cases))
    figure = Figure(figsize=(10, 7), layout="constrained", dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, (corruption, results) in zip(grid.flat, cases):
        for color, name in zip(colors, names):
            line = results[results["backbone"] == name].sort_values("severity")
            axis.plot(
                line["severity"],
                line["share"],
                "o-",
                color=color,
                label=name,
                markersize=4,
            )
        axis.set_title(corruption)
        axis.set_xticks(range(1, 6))
        axis.tick_params(labelbottom=True, labelleft=True)
        for level in (0, 1):
            axis.axhline(level, color="0.6", linewidth=0.8)
        axis.set_xlabel("severity")
    figure.supylabel("kept similarity")
    figure.suptitle(f"{title}\n{CAPTION}")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def open_backbones(models: Models, names: Sequence[str], progress: gr.Progress = PROGRESS) -> list[LoadedBackbone]:
    """Open backbones, with the names by which they were asked for. Raise an error for a backbone of other bands."""
    backbones = []
    for index, name in enumerate(names):
        progress((index, len(names)), desc=f"Opening {name}")
        with errors_as_messages():
            backbone = models.backbone(name)
            bands = backbone.band_names
            if bands:
                raise ValueError(f"{name} takes {describe_bands(bands)}, but this tab compares features of RGB images.")
        backbones.append(replace(backbone, name=name))
    return backbones


def encoder(backbone: LoadedBackbone, resolution: int) -> Callable[..., torch.Tensor]:
    """Return a function from an image, and optionally a grid of patches, to the patch features."""

    def encode(image: np.ndarray, grid: tuple[int, int] | None = None) -> torch.Tensor:
        return patch_features(backbone, image, resolution, grid=grid)

    return encode


def fitted(name: str, shape: Sequence[int]) -> np.ndarray:
    """Crop the middle of an example to the shape of another image."""
    rgb, _ = open_pixels(example_path(name), MAX_SIDE)
    height, width = shape[:2]
    return np.asarray(ImageOps.fit(Image.fromarray(rgb), (width, height)))


# Two images


def two_images(
    models: Models,
    image: str | None,
    second_image: str | None,
    backbone: str,
    second_backbone: str,
    resolution: int,
    progress: gr.Progress = PROGRESS,
) -> tuple[Image.Image, Image.Image | None, list[dict], str]:
    """Return a similarity map of two images of one place for each backbone, the similarities in numbers, and a note.

    Raises:
        gradio.Error: if an image is missing or the images have different aspect ratios.
    """
    if image is not None and second_image is None:
        raise message("No second image is selected. Drop or paste the second image of the same place.")
    backbones = open_backbones(models, selected_backbones(backbone, second_backbone), progress)
    before, note_before = open_pixels(image, MAX_SIDE, backbones[0].input_spec)
    after, note_after = open_pixels(second_image, MAX_SIDE, backbones[0].input_spec)
    check_shapes(before, after)
    pictures = []
    facts = []
    lines = [f"**{html.escape(note_before)}**", f"**{html.escape(note_after)}**"]
    grid = grid_of(*before.shape[:2], resolution)
    with turn(progress):
        for index, opened in enumerate(backbones):
            progress((index + 0.5) / len(backbones), desc=f"Computing with {opened.name}")
            encode = encoder(opened, resolution)
            similarity = similarity_map(encode(before), encode(after, grid))
            lowest = similarity.min().item()
            mean = similarity.mean().item()
            pictures.append(draw_map(heat_of(similarity, lowest, 1.0), after, opacity=OPACITY))
            facts.append({"backbone": opened.name, "mean": mean, "lowest": lowest})
            text = f"cosine similarity {mean:.3f} on average; from dark, {lowest:.3g}, to bright, 1"
            lines.append(f"{html.escape(opened.name)}: {text}.")
    second_picture = pictures[1] if len(pictures) > 1 else None
    return pictures[0], second_picture, facts, "  \n".join(lines)


def check_shapes(before: np.ndarray, after: np.ndarray) -> None:
    """Raise an error if two images of one place have different aspect ratios."""
    height_before, width_before = before.shape[:2]
    height_after, width_after = after.shape[:2]
    ratio = height_before * width_after / (width_before * height_after)
    if abs(np.log(ratio)) > ASPECT_TOLERANCE:
        sizes = f"{width_before} × {height_before} and {width_after} × {height_after}"
        raise message(f"The two images have different aspect ratios, {sizes}. Crop them to the same ground first.")
