"""The Compare tab: similarity of a backbone's features under corruption, or between two images."""

import html
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
from maps import NO_BACKBONE, OPACITY, chosen, draw_map, grid_of, heat_of, patch_features
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.nn import functional as F
from uploading import (
    CROWNS,
    EXAMPLES,
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


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    start = models.backbone()
    gr.Markdown(
        "How much do the features of an image change when the image is **corrupted**, by noise, blur, haze and so on? "
        "Or compare **two images** of one place."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            image = image_input("compare_image", CROWNS)
            options = {"variant": "primary", "elem_id": "run_corruptions", "elem_classes": "run"}
            run = gr.Button("Compare under corruptions", **options)
            other = image_upload("Second image", elem_id="compare_second_image")
            run_pair = gr.Button("Compare the two images", elem_id="run_pair", elem_classes="run")
            cancel = gr.Button("Cancel", size="sm")
            with gr.Accordion("More settings", open=False, elem_classes="more"):
                first, second = backbone_inputs(models, model_name, NO_BACKBONE)
                resolution = resolution_slider(start.native, "compare_resolution")
                seed = gr.Number(0, label="Seed of the corruptions", precision=0, minimum=0, maximum=2**31 - 1)
        with gr.Column(scale=3, min_width=280, elem_classes="results"):
            sentence = gr.Markdown(label="Summary", elem_id="compare_summary")
            chart = picture_of("Kept similarity under corruption", "corruption_chart")
            with gr.Row():
                map_a = picture_of("Similarity of the two images", "pair_a", visible=False)
                map_b = picture_of("… by the second backbone", "pair_b", visible=False)
            note = gr.Markdown(BEGIN, label="Note", elem_id="compare_note")
            with gr.Accordion("The chart in numbers", open=False):
                table = gr.Dataframe(headers=COLUMNS, label="Table", interactive=False, wrap=True)
            gr.Markdown(WORDS)

    @answering
    def compare_corruptions(path, backbone, second_backbone, resolution, seed, progress=PROGRESS):
        """Yield summary, chart, table and note of the corruptions so far."""
        for rows, text in corruptions(models, path, backbone, second_backbone, resolution, seed, progress):
            words, file = summary_of(rows), new_file("corruptions.png")
            chart_of(rows, name_of(path)).savefig(file)
            yield words, gr.Image(str(file), alt_text=f"{CAPTION}. {words}"), rows, text

    @answering
    def compare_pair(path, second_path, backbone, second_backbone, resolution, progress=PROGRESS):
        """Return a similarity map of two images of one place for each backbone, and a note."""
        *maps, facts, text = two_images(models, path, second_path, backbone, second_backbone, resolution, progress)
        views = [
            gr.Image(write_png(one, "map.png"), label=fact["backbone"], alt_text=text, visible=True)
            for one, fact in zip(maps, facts)
        ]
        return *views, *[gr.Image(None, visible=False)] * (2 - len(views)), text

    inputs, outputs = [first, second, resolution, seed], [sentence, chart, table, note]
    running = image.on([run.click], compare_corruptions, inputs, outputs, show_progress_on=chart)
    pair = [other, first, second, resolution], [map_a, map_b, note]
    running_pair = image.on([run_pair.click], compare_pair, *pair, show_progress_on=note)
    cancel.click(None, cancels=[running, running_pair])
    changes = [*image.changes, other.upload, other.clear, other.delete]
    changes += [first.input, second.input, resolution.input, seed.input, model_name.input]
    forget(changes, [sentence, chart, table, map_a, map_b, note], [running, running_pair])
    state = {"cimage": image.example, "seed": seed, "cres": resolution, "ca": first, "cb": second}
    if start.band_names is not None:
        return Tab(state)
    return Tab(state, [(*image.with_path(compare_corruptions, inputs), outputs)])


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
    names = dict.fromkeys([*chosen(backbone, second_backbone), backbone.removesuffix(RANDOM) + RANDOM])
    backbones = opened(models, list(names), progress)
    rgb, reading_note = open_pixels(image, MAX_SIDE, backbones[0].input_spec)
    others = [fitted(name, rgb.shape) for name in EXAMPLES if name != name_of(image)]
    encoders = {one.name: encoder(one, resolution) for one in backbones}
    total, results, longest = len(ORDER) * len(SEVERITIES), [], 0.0
    head = f"**{html.escape(reading_note)}**; the floor is over {len(others)} other images."
    with turn(progress):
        began = time.monotonic()
        for result in compare(rgb, encoders, severities=ORDER, seed=seed or 0, others=others):
            results.append(result)
            if len(results) % len(encoders):
                continue
            done, now = len(results) // len(encoders), time.monotonic()
            longest, began = max(longest, now - began), now
            is_late = seconds_left() is not None and seconds_left() < 2 * longest + 1
            progress((done, total), desc=f"{result.corruption.replace('_', ' ')}, severity {result.severity}")
            if is_late or done in (len(SEVERITIES), total):
                ending = ": the time limit was reached." if is_late and done < total else "."
                yield table_of(results), f"{head}  \n{done} of {total} corrupted images{ending}"
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
    cases = [(name, severity, parameters(name, severity)) for severity in severities for name in corruptions]
    clean = {backbone: encode(image) for backbone, encode in backbones.items()}
    floors = {}
    for backbone, encode in backbones.items():
        similarities = [similarity_map(clean[backbone], encode(other)).mean().item() for other in others]
        floors[backbone] = float(np.mean(similarities)) if similarities else 0.0
    for name, severity, settings in cases:
        corrupted = corrupt(image, name, severity, seed)
        matrix = motion(name, severity, *image.shape[:2], seed=seed)
        for backbone, encode in backbones.items():
            similarity = similarity_map(clean[backbone], encode(corrupted), matrix)
            mean, floor = similarity.nanmean().item(), floors[backbone]
            share = (mean - floor) / (1 - floor) if floor < 1 else float("nan")
            compared = similarity.isfinite().float().mean().item()
            yield Comparison(name, severity, backbone, share, mean, floor, settings, compared)


def similarity_map(clean: torch.Tensor, corrupted: torch.Tensor, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cosine similarity of patch features, `(channels, rows, columns)`, at each patch of the clean image.

    A motion ([`~modeling_vitp.images.corruptions.motion`]) is undone first, by interpolation. The similarity is NaN
    where it moved the patch out of the image.
    """
    clean, corrupted = clean.float(), corrupted.float()
    if matrix is None:
        return F.cosine_similarity(clean, corrupted, dim=0)
    undone, valid = undo_motion(corrupted, matrix)
    return F.cosine_similarity(clean, undone, dim=0).masked_fill(~valid, torch.nan)


def table_of(results: Sequence[Comparison]) -> pd.DataFrame:
    table = pd.DataFrame(results).round(4)
    table["corruption"] = table["corruption"].str.replace("_", " ")
    texts = (", ".join(f"{name} {value:g}" for name, value in one.parameters.items()) for one in results)
    table["parameters"] = [text.replace("_", " ") for text in texts]
    return table


def summary_of(table: pd.DataFrame) -> str:
    """Describe the chart in words: the mean share of each backbone, and the corruptions with the best and the worst."""
    means = table.groupby("backbone", sort=False)["share"].mean()
    first, *others = means.index
    shares = table[table["backbone"] == first].groupby("corruption")["share"].mean().dropna()
    if shares.empty:
        return "No patch could be compared."
    bold, (best, worst) = {name: f"**{html.escape(name)}**" for name in means.index}, (shares.idxmax(), shares.idxmin())
    kept = ", ".join(f"{bold[name]} keeps {means[name]:.2f}" for name in means.index)
    text = (
        f"On average, {kept} of the similarity to the clean image. {bold[first]} keeps most under {best} "
        f"({shares[best]:.2f}) and least under {worst} ({shares[worst]:.2f})."
    )
    if others and means[first] < means[others].max() + CLEARLY:
        text += f" {bold[first]} is not more robust than the other."
    if below := list(shares[shares < 0].sort_values().index):
        text += f" Under {', '.join(below)}, the image is less similar to the clean one than other images are."
    return text


def chart_of(table: pd.DataFrame, title: str) -> Figure:
    """Return a chart of the share by severity for each corruption, all with the same axes, which span all values."""
    names, cases = table["backbone"].unique(), table.groupby("corruption", sort=False)
    figure = Figure(figsize=(10, 7), layout="constrained", dpi=120)
    grid = figure.subplots(-(-len(cases) // 4), min(4, len(cases)), squeeze=False, sharex=True, sharey=True)
    for axis, (corruption, rows) in zip(grid.flat, cases):
        for color, name in zip([*COLORS[: len(names) - 1], COLORS[-1]], names):
            line = rows[rows["backbone"] == name].sort_values("severity")
            axis.plot(line["severity"], line["share"], "o-", color=color, label=name, markersize=4)
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


def opened(models: Models, names: Sequence[str], progress: gr.Progress = PROGRESS) -> list[LoadedBackbone]:
    backbones = []
    for index, name in enumerate(names):
        progress((index, len(names)), desc=f"Opening {name}")
        with errors_as_messages():
            backbones.append(replace(models.backbone(name), name=name))
            if bands := backbones[-1].band_names:
                raise ValueError(f"{name} takes {describe_bands(bands)}, but this tab compares features of RGB images.")
    return backbones


def encoder(backbone: LoadedBackbone, resolution: int) -> Callable[..., torch.Tensor]:
    return lambda image, grid=None: patch_features(backbone, image, resolution, grid=grid)


def fitted(name: str, shape: Sequence[int]) -> np.ndarray:
    """Crop the middle of an example to the shape of another image."""
    rgb, _ = open_pixels(example_path(name), MAX_SIDE)
    return np.asarray(ImageOps.fit(Image.fromarray(rgb), shape[1::-1]))


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
    backbones = opened(models, chosen(backbone, second_backbone), progress)
    before, note_before = open_pixels(image, MAX_SIDE, backbones[0].input_spec)
    after, note_after = open_pixels(second_image, MAX_SIDE, backbones[0].input_spec)
    check_shapes(before, after)
    pictures, facts, lines = [], [], [f"**{html.escape(one)}**" for one in (note_before, note_after)]
    with turn(progress):
        for index, one in enumerate(backbones):
            progress((index + 0.5) / len(backbones), desc=f"Computing with {one.name}")
            encode, grid = encoder(one, resolution), grid_of(*before.shape[:2], resolution)
            values = similarity_map(encode(before), encode(after, grid))
            low, mean = values.min().item(), values.mean().item()
            pictures.append(draw_map(heat_of(values, low, 1.0), after, opacity=OPACITY))
            facts.append({"backbone": one.name, "mean": mean, "lowest": low})
            text = f"cosine similarity {mean:.3f} on average; from dark, {low:.3g}, to bright, 1"
            lines.append(f"{html.escape(one.name)}: {text}.")
    return *pictures, *[None] * (2 - len(pictures)), facts, "  \n".join(lines)


def check_shapes(before: np.ndarray, after: np.ndarray) -> None:
    """Raise an error if two images of one place have different aspect ratios."""
    sides = [image.shape[:2] for image in (before, after)]
    if abs(np.log(sides[0][0] * sides[1][1] / (sides[0][1] * sides[1][0]))) > ASPECT_TOLERANCE:
        sizes = " and ".join(f"{width} × {height}" for height, width in sides)
        raise message(f"The two images have different aspect ratios, {sizes}. Crop them to the same ground first.")
