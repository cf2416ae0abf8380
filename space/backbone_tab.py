"""The Backbone tab: feature and attention maps of one or two backbones."""

import functools
import html
from collections.abc import Iterator, Sequence
from dataclasses import replace

import gradio as gr
import numpy as np
from adjusting import AS_STATED, PRESETS, Adjustment, adjustment_of
from computing import PRIVATE, QUEUE, answering, errors_as_messages, message
from finding import finding
from loading import REFERENCES, Models
from maps import boxed, display_size, ringed
from PIL import Image
from saving import new_file, write_png
from uploading import CROWNS, EXAMPLES, forget, image_input, image_upload, name_of
from url_state import DEEP, Tab, slider
from views import (
    ATTENTION,
    FOREGROUND,
    FROM_CLS,
    FROM_POINT,
    HEADS,
    KINDS,
    MAX_RESOLUTION,
    MIN_RESOLUTION,
    NO_BACKBONE,
    OF_ATTENTION,
    OPACITY,
    PCA,
    ROLLOUT,
    SIMILARITY,
    TWIN,
    Seen,
    View,
    chosen,
    elsewhere,
    image_of,
    look,
)

BEGIN = "Choose an image or an example to begin."
DOWNLOAD = "() => document.querySelector('#features_file').click()"


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    start = models.backbone()
    gr.Markdown(
        "Look at the features of a ViT, next to those of another ViT or of the same ViT with random weights. "
        "**Click any point** to see which patches are similar to it."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            image = image_input("backbone_image", CROWNS)
            kind = gr.Radio(KINDS, value=PCA, label="Map")
            layers = {"minimum": 1, "maximum": start.depth, "value": start.depth, "step": 1, "elem_classes": DEEP}
            layer = slider(**layers, label="Layer", elem_id="layer")
            second_layer = slider(**layers, label="Layer of the second backbone", elem_id="second_layer")
            with gr.Row(visible=False) as attention_options:
                head = slider(0, start.heads, 0, step=1, label="Head (0: mean of all)")
                source = gr.Radio([FROM_CLS, FROM_POINT], value=FROM_CLS, label="Attention of")
            with Image.open(EXAMPLES[CROWNS]) as example:
                whole = max(example.size) // max(start.patch)  # patches of the example at its own size
            resolution = slider(
                MIN_RESOLUTION,
                MAX_RESOLUTION,
                min(max(start.native, whole), MAX_RESOLUTION),
                step=1,
                label="Resolution: patches along the longer side",
                elem_id="resolution",
            )
            first = gr.Dropdown(
                models.names, value=models.default, label="Backbone (any Hub id)", allow_custom_value=True
            )
            second = gr.Dropdown(
                [NO_BACKBONE, TWIN, *models.names, *REFERENCES],
                value=TWIN,
                label="Second backbone, side by side",
                allow_custom_value=True,
            )
            opacity = slider(0, 1, OPACITY, step=0.05, label="Opacity of the map", elem_id="map_opacity")
            x = slider(0, 100, 50, step=0.1, label="Point, or arrow keys on a map: % from the left", elem_id="point_x")
            y = slider(0, 100, 50, step=0.1, label="Point: % from the top", elem_id="point_y")
            with gr.Accordion("Reading of the image: slice, window, bands", open=False):
                position = slider(0, 100, 50, step=0.5, label="Slice or frame: % from the feet up", elem_id="slice")
                preset = gr.Radio([AS_STATED, *PRESETS], value=AS_STATED, label="Window of CT", elem_id="preset")
                bands = gr.Textbox(
                    label="Bands of red, green and blue, then Enter; found by name if empty",
                    placeholder="8, 4, 3",
                    max_length=50,
                    elem_id="bands",
                )
                low = slider(0, 49, 2, step=0.5, label="Black: percentile", elem_id="low")
                high = slider(51, 100, 98, step=0.5, label="White: percentile", elem_id="high")
            with gr.Accordion("A window of a large scene", open=False):
                part = slider(1, 100, 100, step=1, label="Window: % of each side of the scene", elem_id="part")
                center_x = slider(
                    0, 100, 50, step=0.1, label="Center of the window: % from the left", elem_id="center_x"
                )
                center_y = slider(
                    0, 100, 50, step=0.1, label="Center of the window: % from the top", elem_id="center_y"
                )
                scene = picture_view(
                    "Overview: click to move the window", "The scene and the window", elem_id="overview", visible=False
                )
            other = image_upload("Image to search", elem_id="backbone_second_image")
        with gr.Column(scale=3, elem_classes="results"):
            sentence = gr.Markdown(label="Finding", elem_id="finding")
            with gr.Row():
                picture = picture_view("Image", "The image, as the model sees it", elem_id="backbone_picture")
                map_a = picture_view("Map", "Map of the backbone", elem_id="map_a")
                map_b = picture_view("Map of the second backbone", "Map of the second backbone", elem_id="map_b")
            map_c = picture_view("In the second image", "Map of the second image", elem_id="map_c", visible=False)
            note = gr.HTML(BEGIN, label="Note", elem_id="backbone_note")
            with gr.Row():
                keep = gr.Button("Features and maps (NPZ)", size="sm", elem_id="keep_features")
                cancel = gr.Button("Cancel", size="sm")
            file = gr.DownloadButton(visible="hidden", elem_id="features_file")

    # The last arguments of each handler are the values of `settings` below, which `view_of` reads.

    @answering
    def see(
        path: str | None,
        other_path: str | None,
        backbone: str,
        second_backbone: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
        *settings,
    ) -> Iterator[tuple]:
        """Yield image, a map for each backbone, finding, note, and sliders with the backbones' number of layers."""
        view = view_of(*settings)
        is_attention = gr.Row(visible=view.kind in OF_ATTENTION)
        if path is None:
            nothing = gr.Image(None, visible=False)
            yield None, None, None, nothing, "", BEGIN, *(gr.skip(),) * 3, is_attention, nothing
            return
        names = chosen(backbone, second_backbone)
        for seen in look(models, path, names, view, progress):
            rgb, _, reading_note = image_of(models, path, names[0], view.adjustment)
            original = Image.fromarray(rgb).resize(display_size(*rgb.shape[:2]))
            maps = [_shown(one, view.kind) for one in seen] + [gr.Image(None, visible=len(names) > 1)] * (2 - len(seen))
            rows, columns = seen[0].features.shape[1:]
            lines = [f"<b>{html.escape(reading_note)}</b>, {rows} × {columns} patches"]
            lines += [_line(one.caption(view.kind), one.meaning, one.layer, view) for one in seen]
            there = gr.Image(None, visible=False)
            if other_path is not None and view.kind == SIMILARITY:
                drawn, meaning = elsewhere(models, path, other_path, seen[0], view)
                title = f"Similarity to the point, in {name_of(other_path)}"
                there = gr.Image(
                    write_png(drawn, "map_c.png"),
                    label=title,
                    alt_text=f"{title}, by {seen[0].name}; {meaning}",
                    visible=True,
                )
                lines.append(_line(title, meaning, seen[0].layer, view))
            sliders = [_slider(one.depth, asked, one.layer) for one, asked in zip(seen, view.layers)]
            sliders += [gr.Slider(visible=len(names) > 1)] * (2 - len(seen))
            yield (
                write_png(ringed(original, view.point) if view.has_point else original, "image.png"),
                *maps,
                there,
                finding(path, view.kind, seen),
                "<br>".join(lines),
                *sliders,
                _slider(seen[0].heads, view.head, min(view.head, seen[0].heads)),
                is_attention,
                _overview(models, path, names[0], view),
            )

    @answering
    def see_like(
        path: str | None,
        other_path: str | None,
        backbone: str,
        second_backbone: str,
        event: gr.SelectData,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
        *settings,
    ) -> Iterator[tuple]:
        """Handle a click on the image or a map: a PCA map is replaced by the similarity to the point."""
        # A click on the small maps of the heads has no position in the image.
        if path is None or (settings[0] == HEADS and event.target is not picture):
            yield (gr.skip(),) * (len(outputs) + 4)
            return
        with errors_as_messages():
            rgb = image_of(models, path, backbone, view_of(*settings).adjustment).rgb
        x, y = percent_of(event, rgb)
        kind, layer, second_layer, head, _, _, _, *others = settings
        kind = SIMILARITY if kind in (PCA, FOREGROUND) else kind
        settings = (kind, layer, second_layer, head, FROM_POINT, x, y, *others)
        for shown in see.__wrapped__(path, other_path, backbone, second_backbone, progress, *settings):
            yield *shown, x, y, kind, FROM_POINT

    @answering
    def see_there(
        path: str | None,
        other_path: str | None,
        backbone: str,
        second_backbone: str,
        event: gr.SelectData,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
        *settings,
    ) -> Iterator[tuple]:
        """Move the window to the position of a click on the overview."""
        whole = replace(view_of(*settings).adjustment, part=100.0)
        x, y = percent_of(event, image_of(models, path, backbone, whole).rgb)
        for shown in see.__wrapped__(path, other_path, backbone, second_backbone, progress, *settings[:-2], x, y):
            yield *shown, x, y

    @functools.wraps(see)
    async def see_anew(path, other_path, backbone, second_backbone, progress, kind, layer, second_layer, *others):
        """Show the last layer after the backbone has changed."""
        async for shown in see(path, other_path, backbone, second_backbone, progress, kind, None, None, *others):
            yield shown

    @answering
    def keep_features(path: str | None, other_path: str | None, backbone: str, second_backbone: str, *settings) -> str:
        """Write the features and maps that are shown to a file and return its path."""
        if path is None:
            raise message("No image is selected. Choose an image first.")
        view = view_of(*settings)
        *_, seen = look(models, path, chosen(backbone, second_backbone), view)
        return features_file(path, view, seen)

    settings = [kind, layer, second_layer, head, source, x, y, resolution, opacity, position, preset, bands, low, high]
    settings += [part, center_x, center_y]
    inputs = [other, first, second, *settings]
    outputs = [picture, map_a, map_b, map_c, sentence, note, layer, second_layer, head, attention_options]
    outputs.append(scene)
    options = {**QUEUE, "trigger_mode": "always_last", "show_progress_on": map_a}
    nothing = [None, None, None, None, "", BEGIN, None]
    forget(image.changes, [picture, map_a, map_b, map_c, sentence, note, scene], nothing)
    changes = [*image.changes, other.upload, other.clear, other.delete]
    changes += [one.submit if one is bands else one.input for one in settings]
    running = [image.on(changes, see, inputs, outputs, **options)]
    model_name.input(None, model_name, first, js="(name) => name", **PRIVATE)
    running.append(image.on([first.input, second.input, model_name.input], see_anew, inputs, outputs, **options))
    picks = [view.select for view in (picture, map_a, map_b)]
    running.append(image.on(picks, see_like, inputs, [*outputs, x, y, kind, source], **options))
    running.append(image.on([scene.select], see_there, inputs, [*outputs, center_x, center_y], **options))
    cancel.click(None, cancels=running)
    kept = image.on([keep.click], keep_features, inputs, file, **QUEUE)
    kept.success(None, js=DOWNLOAD, **PRIVATE)

    keys = {"map": kind, "layer": layer, "layer_b": second_layer, "head": head, "from": source, "res": resolution}
    keys |= {"opacity_of_map": opacity, "slice": position, "ct": preset, "bands": bands, "black": low, "white": high}
    keys |= {"window": part, "wx": center_x, "wy": center_y}
    keys = {"image": image.example, **keys, "a": first, "b": second, "x": x, "y": y}
    return Tab(keys, [(*image.with_path(see, inputs), outputs)])


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


def _overview(models: Models, path: str, name: str, view: View) -> gr.Image:
    """Return the whole scene with the outline of the visible window; hidden if the window is the whole scene."""
    if view.adjustment.window is None:
        return gr.Image(None, visible=False)
    rgb = image_of(models, path, name, replace(view.adjustment, part=100.0)).rgb
    return gr.Image(write_png(boxed(rgb, view.adjustment.window), "overview.png"), visible=True)


def percent_of(event: gr.SelectData, rgb: np.ndarray) -> tuple[float, float]:
    """Return the position of a click on a picture, in percent from the left and from the top."""
    return tuple(round(100 * (at + 0.5) / side, 1) for at, side in zip(event.index, display_size(*rgb.shape[:2])))


def features_file(path: str, view: View, seen: Sequence[Seen]) -> str:
    """Write features and maps as NPZ to a temporary file and return its path."""
    arrays = {"image": name_of(path), "kind": view.kind, "head": view.head, "from_point": view.from_point}
    arrays |= {"point": view.point, "backbones": [one.name for one in seen], "layers": [one.layer for one in seen]}
    for key, one in zip("ab", seen):
        arrays |= {f"features_{key}": one.features.numpy(), f"map_{key}": one.values.numpy()}
    file = new_file("features.npz")
    np.savez(file, **arrays)
    return str(file)


def view_of(
    kind: str,
    layer: float | None,
    second_layer: float | None,
    head: float,
    attention_of: str,
    x: float,
    y: float,
    resolution: float,
    opacity: float = OPACITY,
    *adjustments,
) -> View:
    """Build the view from the values of the controls; `x` and `y` are percent from the left and from the top.

    Args:
        adjustments: the arguments of [`adjusting.adjustment_of`], all or none.
    """
    adjustment = adjustment_of(*adjustments) if adjustments else Adjustment()
    layers, point = (layer, second_layer), (x / 100, y / 100)
    return View(kind, layers, int(head), attention_of == FROM_POINT, point, int(resolution), opacity, adjustment)


def _slider(maximum: int, asked: float | None, shown: int) -> gr.Slider:
    """Return an update of a slider with a new maximum.

    The value is set only if the old one was out of range, because the visitor may be moving the slider.
    """
    return gr.Slider(maximum=maximum, visible=True, **({} if asked == shown else {"value": shown}))


def _line(caption: str, meaning: str, layer: int, view: View) -> str:
    """Return caption and meaning of a map with its color bar and the name of the model output that it shows."""
    bar = "" if view.kind in (PCA, FOREGROUND) else '<i class="colorbar"></i> '
    source = {ROLLOUT: "attentions", ATTENTION: f"attentions[{layer - 1}]", HEADS: f"attentions[{layer - 1}]"}
    code = source.get(view.kind, f"hidden_states[{layer}]")
    return f"{html.escape(caption)} (<code>{code}</code>): {bar}{meaning}."


def _shown(one: Seen, kind: str) -> gr.Image:
    caption = one.caption(kind)
    shown = write_png(one.picture, "map.png")
    return gr.Image(
        shown, label=caption.removeprefix(f"{kind} of "), alt_text=f"{caption}; {one.meaning}", visible=True
    )
