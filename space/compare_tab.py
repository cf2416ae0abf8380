"""The Compare tab: how much of a backbone's features stays under corruption, or from one image to another."""

import html
from collections.abc import Callable, Iterator

import gradio as gr
import numpy as np
import pandas as pd
import torch
from backbone_tab import MAX_RESOLUTION, MIN_RESOLUTION, NO_BACKBONE, picture_view
from comparison import Comparison, compare, similarity_map
from computing import PRIVATE, QUEUE, gpu, told
from loading import LoadedBackbone, Models
from maps import draw_map, heat_of, native_resolution, patch_features
from PIL import Image
from uploading import example_choice, image_upload, open_rgb

from modeling_vitp.images.corruptions import SEVERITIES, corrupt

MAX_SIDE = 800  # the size at which the paper's robustness table was measured
COLUMNS = ["corruption", "backbone", "similarity", "parameters", "compared"]
BEGIN = "Choose an image or an example, then compare."


def build_tab(models: Models, model_name: gr.Dropdown) -> dict[str, gr.components.Component]:
    """See `app.py`."""
    gr.Markdown(
        "Cosine similarity of patch features: 1 where nothing changed. Either of one image to itself under the twelve "
        "corruptions of the paper's robustness table, rotation, scale and translation undone before; or of two images, "
        "place by place, such as before and after a change."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            upload = image_upload(elem_id="compare_image")
            example = example_choice(upload)
            other = image_upload("Second image", elem_id="compare_second_image")
            severity = gr.Slider(1, 5, 3, step=1, label="Severity of the corruptions")
            seed = gr.Number(0, label="Seed of the corruptions", precision=0, minimum=0, maximum=2**31 - 1)
            native = min(native_resolution(models.backbone()), MAX_RESOLUTION)
            resolution = gr.Slider(
                MIN_RESOLUTION, MAX_RESOLUTION, native, step=1, label="Resolution: patches along the longer side"
            )
            first = gr.Dropdown(
                models.backbones, value=models.default, label="Backbone (any Hub id)", allow_custom_value=True
            )
            second = gr.Dropdown(
                [NO_BACKBONE, *models.backbones],
                value=models.backbones[-1],
                label="Second backbone",
                allow_custom_value=True,
            )
            run = gr.Button("Compare under corruptions", variant="primary", elem_id="run_corruptions")
            run_pair = gr.Button("Compare the two images", elem_id="run_pair")
            cancel = gr.Button("Cancel", size="sm")
        with gr.Column(scale=3):
            note = gr.Markdown(BEGIN, label="Note", elem_id="compare_note")
            chart = gr.HTML(label="Similarity to the features of the clean image", elem_id="corruption_chart")
            with gr.Accordion("Table", open=False):
                table = gr.Dataframe(headers=COLUMNS, label="The chart in numbers", interactive=False, wrap=True)
            gallery = gr.Gallery(label="The corrupted images", columns=4, object_fit="contain", format="jpeg")
            with gr.Row():
                map_a = picture_view("Similarity of the two images", "Similarity of the two images", visible=False)
                map_b = picture_view("… by the second backbone", "… by the second backbone", visible=False)

    settings = [first, second, resolution]
    running = run.click(
        _corruptions(models),
        [upload, severity, seed, *settings],
        [chart, table, gallery, note],
        api_name="compare_corruptions",
        show_progress_on=chart,
        **QUEUE,
    )
    running_pair = run_pair.click(
        _pair(models),
        [upload, other, *settings],
        [map_a, map_b, note],
        api_name="compare_images",
        show_progress_on=note,
        **QUEUE,
    )
    cancel.click(None, cancels=[running, running_pair])
    model_name.change(lambda name: name, model_name, first, show_progress="hidden", **PRIVATE)
    return {"cimage": example, "severity": severity, "seed": seed, "cres": resolution, "ca": first, "cb": second}


def _corruptions(models: Models) -> Callable[..., Iterator[tuple]]:
    @gpu
    def compare_corruptions(
        image: str | None,
        severity: float,
        seed: float,
        backbone: str,
        second_backbone: str,
        resolution: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        """Similarity of the features under each corruption to the clean ones: a chart, a table, the images, a note."""
        progress(0, desc="Opening the image")
        backbones = _backbones(models, backbone, second_backbone)
        rgb, reading_note = open_rgb(image, MAX_SIDE, backbones[0].input_spec)
        encoders = {one.name: _encoder(one, int(resolution)) for one in backbones}
        rows, pictures = [], []
        for result in compare(rgb, encoders, severities=(int(severity),), seed=int(seed)):
            rows.append(_row(result))
            if len(rows) % len(encoders):
                continue
            name = _title(result.corruption)
            corrupted = corrupt(rgb, result.corruption, result.severity, int(seed))
            pictures.append((Image.fromarray(corrupted), f"{name}: {_settings(result)}"))
            progress(len(pictures) / len(SEVERITIES), desc=name)
            done = f"{len(pictures)} of {len(SEVERITIES)} corruptions at severity {severity:g}."
            note = f"{html.escape(reading_note)}  \n{done}"
            table = pd.DataFrame(rows, columns=COLUMNS)
            yield bar_chart(table), table, pictures if len(pictures) == len(SEVERITIES) else gr.skip(), note

    return compare_corruptions


def _pair(models: Models) -> Callable[..., tuple]:
    @gpu
    def compare_images(
        image: str | None,
        second_image: str | None,
        backbone: str,
        second_backbone: str,
        resolution: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple:
        """Where two images of one place differ for a backbone: a map by each backbone, and a note."""
        progress(0, desc="Opening the images")
        backbones = _backbones(models, backbone, second_backbone)
        before, note_before = open_rgb(image, MAX_SIDE, backbones[0].input_spec)
        after, note_after = open_rgb(second_image, MAX_SIDE, backbones[0].input_spec)
        after = np.asarray(Image.fromarray(after).resize(before.shape[1::-1], Image.Resampling.BICUBIC))
        maps = []
        for index, one in enumerate(backbones):
            progress((index + 0.5) / len(backbones), desc=one.name)
            encode = _encoder(one, int(resolution))
            maps.append(similarity_map(encode(before), encode(after)))
        low = min(one.min().item() for one in maps)
        views, lines = [], [html.escape(note_before), html.escape(note_after)]
        for one, values in zip(backbones, maps):
            text = f"cosine similarity {values.mean():.3f} on average; from dark, {low:.3g}, to bright, 1"
            heat = draw_map(heat_of(values, low, 1.0), after, opacity=0.75)
            views.append(gr.Image(heat, label=one.name, alt_text=f"{one.name}: {text}", visible=True))
            lines.append(f"**{html.escape(one.name)}**: {text}.")
        if len(views) == 1:
            views.append(gr.Image(None, visible=False))
        return *views, "  \n".join(lines)

    return compare_images


def _backbones(models: Models, *names: str | None) -> list[LoadedBackbone]:
    wanted = dict.fromkeys(name for name in names if name not in (None, "", NO_BACKBONE))
    with told():
        return [models.backbone(name) for name in wanted]


def _encoder(backbone: LoadedBackbone, resolution: int) -> Callable[[np.ndarray], torch.Tensor]:
    return lambda image: patch_features(backbone, image, resolution)


def bar_chart(table: pd.DataFrame) -> str:
    """HTML with a row for each corruption and in it a bar for each backbone; bars begin at a similarity of 0."""
    names = list(dict.fromkeys(table["backbone"]))
    legend = "".join(f'<span class="key key-{index}">{html.escape(name)}</span>' for index, name in enumerate(names))
    rows = []
    for corruption, group in table.groupby("corruption", sort=False):
        first = group.iloc[0]
        compared = "" if first["compared"] == "100%" else f"; {first['compared']} of the image compared"
        bars = "".join(
            f'<div class="bar bar-{names.index(row.backbone)}"><i style="width: {_percent(row.similarity)}%"></i>'
            f"<b>{row.similarity:.3f}</b></div>"
            for row in group.itertuples()
        )
        rows.append(
            f'<tr><th scope="row">{corruption}<small>{first["parameters"]}{compared}</small></th><td>{bars}</td></tr>'
        )
    caption = "Cosine similarity to the features of the clean image"
    return f'<table class="bars"><caption>{caption} {legend}</caption><tbody>{"".join(rows)}</tbody></table>'


def _percent(similarity: float) -> float:
    return round(100 * similarity, 1) if similarity > 0 else 0.0  # also of NaN, where nothing was left to compare


def _title(corruption: str) -> str:
    return corruption.replace("_", " ")


def _settings(result: Comparison) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in result.parameters.items())


def _row(result: Comparison) -> tuple[str, str, float, str, str]:
    similarity = round(result.similarity, 4)
    return _title(result.corruption), result.backbone, similarity, _settings(result), f"{100 * result.compared:.0f}%"
