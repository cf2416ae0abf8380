"""The Backbone tab: maps of what one or two backbones make of an image."""

import functools
import html
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import gradio as gr
import numpy as np
from computing import PRIVATE, QUEUE, answering, message, told
from finding import finding
from gradio.utils import get_upload_folder
from loading import Models
from maps import display_size, ringed
from PIL import Image
from uploading import CROWNS, EXAMPLES, forget, image_input, name_of
from url_state import DEEP, Tab
from views import (
    ATTENTION,
    FROM_CLS,
    FROM_POINT,
    KINDS,
    MAX_RESOLUTION,
    MIN_RESOLUTION,
    NO_BACKBONE,
    PCA,
    ROLLOUT,
    SIMILARITY,
    TWIN,
    Seen,
    View,
    chosen,
    image_of,
    look,
)

BEGIN = "Choose an image or an example to begin."
DOWNLOAD = "() => document.querySelector('#features_file').click()"


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """See `app.py`."""
    start = models.backbone()
    gr.Markdown(
        "What the features of a ViT tell apart, beside those of another or of the same with random weights. "
        "**Click any point** to see which places are like it."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            image = image_input("backbone_image", CROWNS)
            kind = gr.Radio(KINDS, value=PCA, label="Map")
            layers = {"minimum": 1, "maximum": start.depth, "value": start.depth, "step": 1, "elem_classes": DEEP}
            layer = gr.Slider(**layers, label="Layer", elem_id="layer")
            second_layer = gr.Slider(**layers, label="Layer of the second backbone", elem_id="second_layer")
            with gr.Row(visible=False) as attention_options:
                head = gr.Slider(0, start.heads, 0, step=1, label="Head (0: mean of all)")
                source = gr.Radio([FROM_CLS, FROM_POINT], value=FROM_CLS, label="Attention of")
            with Image.open(EXAMPLES[CROWNS]) as example:
                whole = max(example.size) // max(start.patch)  # the example at its own size
            resolution = gr.Slider(
                MIN_RESOLUTION,
                MAX_RESOLUTION,
                min(max(start.native, whole), MAX_RESOLUTION),
                step=1,
                label="Resolution: patches along the longer side",
            )
            first = gr.Dropdown(
                models.names, value=models.default, label="Backbone (any Hub id)", allow_custom_value=True
            )
            second = gr.Dropdown(
                [NO_BACKBONE, TWIN, *models.names],
                value=TWIN,
                label="Second backbone, side by side",
                allow_custom_value=True,
            )
            with gr.Accordion("Point by numbers", open=False):
                x = gr.Slider(0, 100, 50, step=0.1, label="Point: % from the left")
                y = gr.Slider(0, 100, 50, step=0.1, label="Point: % from the top")
        with gr.Column(scale=3, elem_classes="results"):
            sentence = gr.Markdown(label="What is seen", elem_id="finding")
            with gr.Row():
                picture = picture_view("Image", "The image that was given, as the model sees it")
                map_a = picture_view("Map", "Map of the backbone", elem_id="map_a")
                map_b = picture_view("Map of the second backbone", "Map of the second backbone", elem_id="map_b")
            note = gr.Markdown(BEGIN, label="Note", elem_id="backbone_note")
            with gr.Row():
                keep = gr.Button("Features and maps (NPZ)", size="sm", elem_id="keep_features")
                cancel = gr.Button("Cancel", size="sm")
            file = gr.DownloadButton(visible="hidden", elem_id="features_file")

    @answering
    def see(
        path: str | None,
        backbone: str,
        second_backbone: str,
        kind: str,
        layer: float | None,
        second_layer: float | None,
        head: float,
        attention_of: str,
        x: float,
        y: float,
        resolution: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        """The image, a map for each backbone, a sentence, a note, and the sliders as long as there are layers."""
        is_attention = gr.Row(visible=kind in (ATTENTION, ROLLOUT))
        if path is None:
            yield None, None, None, "", BEGIN, *(gr.skip(),) * 3, is_attention
            return
        point = (x / 100, y / 100)
        view = View(kind, (layer, second_layer), int(head), attention_of == FROM_POINT, point, int(resolution))
        names = chosen(backbone, second_backbone)
        for seen in look(models, path, names, view, progress):
            rgb, reading_note = image_of(models, path, names[0])
            original = Image.fromarray(rgb).resize(display_size(*rgb.shape[:2]))
            maps = [_shown(one, kind) for one in seen] + [gr.Image(None, visible=len(names) > 1)] * (2 - len(seen))
            rows, columns = seen[0].features.shape[1:]
            lines = [f"**{html.escape(reading_note)}**, {rows} × {columns} patches"]
            lines += [f"{html.escape(one.caption(kind))}: {one.meaning}." for one in seen]
            sliders = [gr.Slider(maximum=one.depth, value=one.layer, visible=True) for one in seen]
            sliders += [gr.Slider(visible=len(names) > 1)] * (2 - len(seen))
            yield (
                ringed(original, point) if view.has_point else original,
                *maps,
                finding(path, kind, seen),
                "  \n".join(lines),
                *sliders,
                gr.Slider(maximum=seen[0].heads, value=min(int(head), seen[0].heads)),
                is_attention,
            )

    @answering
    def see_like(
        path: str | None,
        backbone: str,
        second_backbone: str,
        kind: str,
        layer: float,
        second_layer: float,
        head: float,
        x: float,
        y: float,
        resolution: float,
        event: gr.SelectData,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        """A click into the image or a map: a PCA map becomes that of similarity to the point."""
        if path is None:
            return
        with told():
            rgb, _ = image_of(models, path, backbone)
        x, y = (round(100 * (at + 0.5) / side, 1) for at, side in zip(event.index, display_size(*rgb.shape[:2])))
        kind = SIMILARITY if kind == PCA else kind
        settings = (layer, second_layer, head, FROM_POINT, x, y, resolution)
        settings = (layer, second_layer, head, FROM_POINT, x, y, resolution)
        for outputs in see.__wrapped__(path, backbone, second_backbone, kind, *settings, progress):
            yield *outputs, x, y, kind, FROM_POINT

    @functools.wraps(see)
    async def see_anew(path, backbone, second_backbone, kind, layer, second_layer, *others):
        """With another backbone, from its last layer."""
        async for outputs in see(path, backbone, second_backbone, kind, None, None, *others):
            yield outputs

    @answering
    def keep_features(
        path: str | None,
        backbone: str,
        second_backbone: str,
        kind: str,
        layer: float,
        second_layer: float,
        head: float,
        attention_of: str,
        x: float,
        y: float,
        resolution: float,
    ) -> str:
        """A file with the features and maps as they are shown."""
        if path is None:
            raise message("There is no image yet, and so no features.")
        view = View(
            kind, (layer, second_layer), int(head), attention_of == FROM_POINT, (x / 100, y / 100), int(resolution)
        )
        *_, seen = look(models, path, chosen(backbone, second_backbone), view)
        return features_file(path, view, seen)

    settings = [kind, layer, second_layer, head, source, x, y, resolution]
    inputs = [first, second, *settings]
    outputs = [picture, map_a, map_b, sentence, note, layer, second_layer, head, attention_options]
    options = {**QUEUE, **PRIVATE, "trigger_mode": "always_last", "show_progress_on": map_a}
    running = image.changed(see, inputs, outputs, **options)
    running.append(
        gr.on([one.input for one in settings], see, [image.upload, *inputs], outputs, **options),
    )
    running.append(gr.on([first.input, second.input], see_anew, [image.upload, *inputs], outputs, **options))
    picks = [view.select for view in (picture, map_a, map_b)]
    without_source = [one for one in inputs if one is not source]
    running.append(gr.on(picks, see_like, [image.upload, *without_source], [*outputs, x, y, kind, source], **options))
    running.append(model_name.input(lambda name: name, model_name, first, **PRIVATE, show_progress="hidden"))
    running.append(running[-1].then(see_anew, [image.upload, *inputs], outputs, **options))
    cancel.click(None, cancels=running)
    nothing = [None, None, None, "", BEGIN]
    others = [image.upload.upload, image.upload.clear, image.upload.delete, image.example.input]
    forget(others, [picture, map_a, map_b, sentence, note], nothing)
    kept = keep.click(keep_features, [image.upload, *inputs], file, **QUEUE, **PRIVATE)
    kept.success(None, js=DOWNLOAD, **PRIVATE)

    keys = {"map": kind, "layer": layer, "layer_b": second_layer, "head": head, "from": source, "res": resolution}
    keys = {"image": image.example, **keys, "a": first, "b": second, "x": x, "y": y}
    return Tab(keys, [image.restored(see, inputs, outputs)])


def picture_view(label: str, alt_text: str, **options) -> gr.Image:
    return gr.Image(
        label=label,
        alt_text=alt_text,
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
        min_width=240,
        elem_classes="picture",
        **options,
    )


def features_file(path: str, view: View, seen: Sequence[Seen]) -> str:
    """Writes features and maps as NPZ, where files are cleared after a while."""
    arrays = {"image": name_of(path), "kind": view.kind, "head": view.head, "from_point": view.from_point}
    arrays |= {"point": view.point, "backbones": [one.name for one in seen], "layers": [one.layer for one in seen]}
    for key, one in zip("ab", seen):
        arrays |= {f"features_{key}": one.features.numpy(), f"map_{key}": one.values.numpy()}
    file = Path(tempfile.mkdtemp(dir=get_upload_folder()), "features.npz")
    np.savez(file, **arrays)
    return str(file)


def _shown(one: Seen, kind: str) -> gr.Image:
    caption = one.caption(kind)
    return gr.Image(one.picture, label=caption, alt_text=f"{caption}; {one.meaning}", visible=True)
