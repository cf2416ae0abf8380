"""The Compare tab: similarity of a backbone's features under corruption, or between two images."""

import html
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import gradio as gr
import numpy as np
import pandas as pd
import torch
from charts import line_charts, save_charts
from comparison import Comparison, compare, similarity_map
from computing import PRIVATE, QUEUE, answering, errors_as_messages, message, seconds_left, turn
from loading import RANDOM, REFERENCES, Models
from maps import draw_map, grid_of, heat_of, patch_features
from opened import LoadedBackbone
from PIL import Image, ImageOps
from saving import new_file, write_png
from uploading import EXAMPLES, example_path, forget, image_input, image_upload, name_of, open_pixels
from url_state import Tab, slider
from views import MAX_RESOLUTION, MIN_RESOLUTION, NO_BACKBONE, OPACITY, chosen

from modeling_vitp.bands import describe_bands
from modeling_vitp.images.corruptions import SEVERITIES as CORRUPTIONS

MAX_SIDE = 800  # image size of the paper's robustness table
ORDER = (3, 1, 5, 2, 4)  # order of the severities: results that stop early still span the range
COLUMNS = ["corruption", "severity", "backbone", "share", "similarity", "floor", "parameters", "compared"]
NO_ROWS = {"headers": COLUMNS, "data": [], "metadata": None}
BEGIN = "Choose an image or an example, then compare."
SHAPES = 0.03  # largest difference of the log aspect ratios of two images of one place
DOWNLOADS = "() => document.querySelector('#comparison_file').click()"


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    gr.Markdown(
        "Compare the patch features of an image with those of the same image **under corruption**. The similarity is "
        "the cosine similarity, after rotation, scale and translation are undone. It is shown as a share of the range "
        "from the *floor* to 1, where the floor is the similarity to different images. Without the floor, a ViT with "
        "random weights looks robust, because all images are similar to it. Or compare **two images** of one place."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            image = image_input("compare_image")
            other = image_upload("Second image", elem_id="compare_second_image")
            seed = gr.Number(0, label="Seed of the corruptions", precision=0, minimum=0, maximum=2**31 - 1)
            native = min(models.backbone().native, MAX_RESOLUTION)
            resolution = slider(
                MIN_RESOLUTION,
                MAX_RESOLUTION,
                native,
                step=1,
                label="Resolution: patches along the longer side",
                elem_id="compare_resolution",
            )
            first = gr.Dropdown(
                models.names, value=models.default, label="Backbone (any Hub id)", allow_custom_value=True
            )
            second = gr.Dropdown(
                [NO_BACKBONE, *models.names, *REFERENCES],
                value=NO_BACKBONE,
                label="Second backbone",
                allow_custom_value=True,
            )
            run = gr.Button("Compare under corruptions", variant="primary", elem_id="run_corruptions")
            run_pair = gr.Button("Compare the two images", elem_id="run_pair")
            cancel = gr.Button("Cancel", size="sm")
        with gr.Column(scale=3, elem_classes="results"):
            note = gr.Markdown(BEGIN, label="Note", elem_id="compare_note")
            chart = gr.HTML(label="Preserved share of the features under corruption", elem_id="corruption_chart")
            with gr.Row():
                csv = gr.Button("Table (CSV)", size="sm", elem_id="keep_csv")
                png = gr.Button("Chart (PNG)", size="sm", elem_id="keep_png")
            with gr.Accordion("Table", open=False):
                table = gr.Dataframe(headers=COLUMNS, label="The chart in numbers", interactive=False, wrap=True)
            with gr.Row():
                map_a = pair_view("Similarity of the two images", "pair_a")
                map_b = pair_view("… by the second backbone", "pair_b")
            file = gr.DownloadButton(visible="hidden", elem_id="comparison_file")
    found = gr.State(time_to_live=3600)

    @answering
    def compare_corruptions(
        path: str | None,
        seed: float,
        backbone: str,
        second_backbone: str,
        resolution: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        """Yield the results under each corruption so far, as results, chart and table, and a note."""
        for results, note in corruptions(models, path, seed, backbone, second_backbone, resolution, progress):
            yield (path, results), line_charts(results), table_of(results), note

    @answering
    def compare_pair(
        path: str | None,
        second_path: str | None,
        backbone: str,
        second_backbone: str,
        resolution: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple:
        """Return a similarity map of two images of one place for each backbone, and a note."""
        maps, lines = pair_maps(models, path, second_path, backbone, second_backbone, resolution, progress)
        views = [
            gr.Image(write_png(picture, "map.png"), label=name, alt_text=text, visible=True)
            for name, picture, text, _ in maps
        ]
        return *views, *[gr.Image(None, visible=False)] * (2 - len(views)), "  \n".join(lines)

    running = image.on(
        [run.click],
        compare_corruptions,
        [seed, first, second, resolution],
        [found, chart, table, note],
        show_progress_on=chart,
        **QUEUE,
    )
    running_pair = image.on(
        [run_pair.click],
        compare_pair,
        [other, first, second, resolution],
        [map_a, map_b, note],
        show_progress_on=note,
        **QUEUE,
    )
    cancel.click(None, cancels=[running, running_pair])
    model_name.input(None, model_name, first, js="(name) => name", **PRIVATE)
    changes = [*image.changes, other.upload, other.clear, other.delete]
    changes += [first.input, second.input, resolution.input, seed.input, model_name.input]
    forget(changes, [chart, table, map_a, map_b, note], ["", NO_ROWS, None, None, BEGIN], [running, running_pair])
    for button, writer in ((csv, csv_of), (png, png_of)):
        button.click(writer, found, file, **PRIVATE).success(None, js=DOWNLOADS, **PRIVATE)
    state = {"cimage": image.example, "seed": seed, "cres": resolution, "ca": first, "cb": second}
    return Tab(state)


def pair_view(label: str, elem_id: str) -> gr.Image:
    return gr.Image(
        label=label, alt_text=label, interactive=False, format="png", visible=False, min_width=240, elem_id=elem_id
    )


def corruptions(
    models: Models, path: str, seed: float, first: str, second: str, resolution: float, progress: Callable | None = None
) -> Iterator[tuple[list[Comparison], str]]:
    """Yield the results so far and a note, which tells if the time limit ended the comparison."""
    backbones = opened(models, compared_names(first, second), progress)
    rgb, reading_note = open_pixels(path, MAX_SIDE, backbones[0].input_spec)
    others = [fitted(name, rgb.shape) for name in EXAMPLES if name != name_of(path)]
    encoders = {one.name: encoder(one, int(resolution)) for one in backbones}
    total, results, longest = len(ORDER) * len(CORRUPTIONS), [], 0.0
    head = f"**{html.escape(reading_note)}**; the floor is over {len(others)} other images."
    with turn(progress):
        began = time.monotonic()
        for result in compare(rgb, encoders, severities=ORDER, seed=int(seed), others=others):
            results.append(result)
            if len(results) % len(encoders):
                continue
            done, now = len(results) // len(encoders), time.monotonic()
            longest, began = max(longest, now - began), now
            is_late = seconds_left() is not None and seconds_left() < 2 * longest + 1
            if progress is not None:
                progress((done, total), desc=f"{result.corruption.replace('_', ' ')}, severity {result.severity}")
            if is_late or done % len(CORRUPTIONS) == 0:
                ending = ": the time limit was reached." if is_late and done < total else "."
                yield list(results), f"{head}  \n{done} of {total} corrupted images{ending}"
            if is_late:
                return


def pair_maps(
    models: Models,
    path: str,
    second_path: str,
    first: str,
    second: str,
    resolution: float,
    progress: Callable | None = None,
) -> tuple[list[tuple[Image.Image, str, str, np.ndarray]], list[str]]:
    """Return map, name, caption and similarities of each backbone, and the lines of a note.

    Raises:
        gradio.Error: if the images have different aspect ratios.
    """
    backbones = opened(models, chosen(first, second), progress)
    before, note_before = open_pixels(path, MAX_SIDE, backbones[0].input_spec)
    after, note_after = open_pixels(second_path, MAX_SIDE, backbones[0].input_spec)
    check_shapes(before, after)
    maps, lines = [], [f"**{html.escape(note_before)}**", f"**{html.escape(note_after)}**"]
    with turn(progress):
        for index, one in enumerate(backbones):
            if progress is not None:
                progress((index + 0.5) / len(backbones), desc=f"Computing with {one.name}")
            encode, grid = encoder(one, int(resolution)), grid_of(*before.shape[:2], int(resolution))
            maps.append(similarity_map(encode(before), encode(after, grid)))
    found = []
    for one, values in zip(backbones, maps):
        low = values.min().item()
        text = f"cosine similarity {values.mean():.3f} on average; from dark, {low:.3g}, to bright, 1"
        found.append((draw_map(heat_of(values, low, 1.0), after, opacity=OPACITY), one.name, text, values.numpy()))
        lines.append(f"{html.escape(one.name)}: {text}.")
    return found, lines


def check_shapes(before: np.ndarray, after: np.ndarray) -> None:
    """Raise an error if two images of one place have different aspect ratios."""
    sides = [image.shape[:2] for image in (before, after)]
    if abs(np.log(sides[0][0] * sides[1][1] / (sides[0][1] * sides[1][0]))) > SHAPES:
        sizes = " and ".join(f"{width} × {height}" for height, width in sides)
        raise message(f"The two images have different aspect ratios, {sizes}. Crop them to the same ground first.")


def compared_names(first: str, second: str | None) -> list[str]:
    """Return the names of the compared backbones, which always include the first one with random weights."""
    return list(dict.fromkeys([*chosen(first, second), first.removesuffix(RANDOM) + RANDOM]))


def opened(models: Models, names: Sequence[str], progress: Callable | None) -> list[LoadedBackbone]:
    backbones = []
    for index, name in enumerate(names):
        if progress is not None:
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


def table_of(results: Sequence[Comparison]) -> pd.DataFrame:
    rows = [
        (
            one.corruption.replace("_", " "),
            one.severity,
            one.backbone,
            round(one.share, 4),
            round(one.similarity, 4),
            round(one.floor, 4),
            ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in one.parameters.items()),
            f"{100 * one.compared:.0f}%",
        )
        for one in results
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def csv_of(found: tuple | None) -> str:
    return _written(found, "corruptions.csv", lambda path, results, file: table_of(results).to_csv(file, index=False))


def png_of(found: tuple | None) -> str:
    return _written(found, "corruptions.png", lambda path, results, file: save_charts(results, name_of(path), file))


def _written(found: tuple | None, name: str, write: Callable) -> str:
    if found is None:
        raise message("There are no results to save. Compare first.")
    file = new_file(name)
    write(*found, file)
    return str(file)
