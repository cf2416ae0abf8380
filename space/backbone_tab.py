"""The tab Look inside: feature and attention maps of one or two backbones."""

import base64
import functools
import html
import json
from collections.abc import Sequence
from dataclasses import fields, replace

import gradio as gr
import numpy as np
import torch
from answers import PROGRESS
from computing import PRIVATE, answering, message, new_file, write_png
from loading import REFERENCES, Models
from maps import (
    ATTENTION,
    CIVIDIS,
    COLOR_MAPS,
    EXPLANATIONS,
    FOREGROUND,
    FROM_CLS,
    FROM_POINT,
    HEADS,
    INFERNO,
    KINDS,
    MAX_RESOLUTION,
    MIN_RESOLUTION,
    NO_BACKBONE,
    OF_ATTENTION,
    OPACITY,
    PALETTE,
    PCA,
    ROLLOUT,
    SEGMENTS,
    SIMILARITY,
    TWIN,
    Seen,
    View,
    boxed,
    chosen,
    display_size,
    features_of,
    heat_map,
    heat_of,
    image_of,
    look,
    pack_features,
    patch_at,
    ringed,
    similarity_to_point,
)
from PIL import Image
from reading import AS_STATED, PRESETS, Adjustment
from uploading import CROWNS, EXAMPLES, forget, image_input, name_of, picture_of, selected_path
from url_state import DEEP, Tab, slider

from modeling_vitp.images.reading import stored_size

BEGIN = "Choose an image or an example to begin."
MOVED = ("x", "y", "map", "from", "wx", "wy")  # settings that a click changes, by their key in the URL
COPY_LABEL = "Copy picture and link"
DOWNLOAD = "() => document.querySelector('#features_file').click()"
map_view = functools.partial(picture_of, elem_classes="picture")
RESTORE_LABEL = f"() => new Promise((resolve) => setTimeout(() => resolve({json.dumps(COPY_LABEL)}), 2000))"


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    start = models.backbone()
    gr.Markdown("**Click any point** of a picture to see which patches are similar to it, here and in another image.")
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            image = image_input("backbone_image", CROWNS)
            kind = gr.Radio(KINDS, value=PCA, label="Map", elem_id="kind")
            segments = slider(2, len(PALETTE), 5, step=1, label="Number of segments", elem_id="segments", visible=False)
            with gr.Column(visible=False) as similarity_options:
                boxes = slider(0, 20, 5, step=1, label="Boxes around the most similar patches", elem_id="boxes")
                other = image_input("backbone_second_image", "Trees, Florida", "Image to search")
            with gr.Column(visible=False) as attention_options:
                source = gr.Radio(
                    [FROM_CLS, FROM_POINT],
                    value=FROM_CLS,
                    label="Attention of",
                    info="The CLS token is an extra token that collects features of the whole image.",
                    elem_id="source",
                )
                head = slider(0, start.heads, 0, step=1, label="Head (0: mean of all)", elem_id="head")
            with gr.Column(visible=False) as point_options:
                label = "Point, or arrow keys on a map: % from the left"
                x = slider(0, 100, 50, step=0.1, label=label, elem_id="point_x")
                y = slider(0, 100, 50, step=0.1, label="Point: % from the top", elem_id="point_y")
            opacity = slider(0, 1, OPACITY, step=0.05, label="Opacity of the map", elem_id="map_opacity")
            is_smooth = gr.Checkbox(label="Smooth between patches", info="Bicubic interpolation.", elem_id="smooth")
            whole = max(stored_size(EXAMPLES[CROWNS])) // max(start.patch)  # patches of the example at its own size
            resolution = resolution_slider(max(start.native, whole), "resolution")
            with gr.Accordion("More settings", open=False, elem_classes="more"):
                first, second = backbone_inputs(models, model_name, TWIN)
                layers = {"minimum": 1, "maximum": start.depth, "value": start.depth, "step": 1, "elem_classes": DEEP}
                layer = slider(**layers, label="Layer", elem_id="layer")
                second_layer = slider(**layers, label="Layer of the second backbone", elem_id="second_layer")
                component = slider(
                    0,
                    12,
                    0,
                    step=1,
                    label="Principal component (0: the first three as colors)",
                    info="Principal components (PCA) are the directions in which the features of an image differ most.",
                    elem_id="component",
                )
                colors = gr.Radio(
                    COLOR_MAPS,
                    value=INFERNO,
                    label="Colors from dark to bright",
                    info=f"{CIVIDIS} looks the same with color blindness.",
                    elem_id="colors",
                )
                gr.Markdown("**Reading of the image**")
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
                gr.Markdown("**A window of a large scene**")
                part = slider(1, 100, 100, step=1, label="Window: % of each side of the scene", elem_id="part")
                middle = "Center of the window: % from the "
                center_x = slider(0, 100, 50, step=0.1, label=f"{middle}left", elem_id="center_x")
                center_y = slider(0, 100, 50, step=0.1, label=f"{middle}top", elem_id="center_y")
                scene = map_view("Overview: click to move the window", "overview", visible=False)
        with gr.Column(scale=3, elem_classes="results"):
            with gr.Row(elem_id="maps"):
                picture = map_view("Image", "backbone_picture", "The image, as the model sees it")
                map_a = map_view("Map", "map_a", "Map of the backbone")
                map_b = map_view("Map of the second backbone", "map_b")
                there = map_view("Image to search", "second_picture", visible=False)
                map_c = map_view("In the second image", "map_c", "Map of the second image", visible=False)
            note = gr.HTML(BEGIN, label="Note", elem_id="backbone_note")
            patches = gr.HTML(visible="hidden", elem_id="patches")
            with gr.Row():
                copy = gr.Button(COPY_LABEL, size="sm", elem_id="copy_maps")
                keep = gr.Button("Features and maps (NPZ)", size="sm", elem_id="keep_features")
                cancel = gr.Button("Cancel", size="sm")
            file = gr.DownloadButton(visible="hidden", elem_id="features_file")

    # The controls by their key in the URL, in the order of the fields of View and Adjustment.
    settings = {"map": kind, "layer": layer, "layer_b": second_layer, "head": head, "from": source, "x": x, "y": y}
    settings |= {"res": resolution, "opacity_of_map": opacity, "colors": colors, "smooth": is_smooth, "pc": component}
    settings |= {"segments": segments, "boxes": boxes, "slice": position, "ct": preset, "bands": bands, "black": low}
    settings |= {"white": high, "window": part, "wx": center_x, "wy": center_y}
    inputs = [other.upload, other.example, first, second, *settings.values()]
    pictures = [picture, map_a, map_b, there, map_c]
    outputs = [*pictures, note, patches, layer, second_layer, head]
    outputs += [component, segments, similarity_options, attention_options, point_options, scene]

    @answering
    def see(path, other_upload, other_example, backbone, second_backbone, progress=PROGRESS, *values):
        """Yield the pictures, the note and the data for the mouse, and updates of the controls, see `outputs`."""
        view = view_of(*values)
        options = [PCA], [SEGMENTS], [SIMILARITY], OF_ATTENTION, [SIMILARITY, *OF_ATTENTION]
        is_shown = [gr.update(visible=view.kind in kinds) for kinds in options]
        hidden = gr.Image(None, visible=False)
        if path is None:
            yield None, None, None, hidden, hidden, BEGIN, "", *(gr.skip(),) * 3, *is_shown, hidden
            return
        names, other_path = chosen(backbone, second_backbone), selected_path(other_upload, other_example)
        for seen in look(models, path, names, view, progress):
            rgb, _, reading_note = image_of(models, path, names[0], view.adjustment)
            shown, (rows, columns) = _resized(rgb), seen[0].features.shape[1:]
            lines = [f"<b>{html.escape(reading_note)}</b>, {rows} × {columns} patches", EXPLANATIONS[view.kind]]
            lines += [_scale(one.title(view.kind), one.meaning, view) for one in seen]
            second_image, others, data = [hidden, hidden], None, ""
            if view.kind == SIMILARITY and other_path is not None:
                try:
                    second_image, others, line = _search(models, other_path, seen[0], view)
                except ValueError as error:  # for example, an image without the bands of the model
                    line = getattr(error, "message", html.escape(str(error)))
                lines.append(line)
            if view.kind == SIMILARITY and len(seen) == len(names):
                data, error = _data(seen, others, view)
                lines.append(f"Under the mouse, the values are within {error:.2g} of the exact ones.")
            text, details = "<br>".join(filter(None, lines)), "<br>".join(_details(one, view.kind) for one in seen)
            maps, missing = [_map_update(one, view.kind) for one in seen], 2 - len(seen)
            layers = zip(seen, (view.layer, view.second_layer))
            yield (
                write_png(ringed(shown, view.point) if view.has_point else shown, "image.png"),
                *maps + [gr.Image(None, visible=len(names) > 1)] * missing,
                *second_image,
                f"{text}<details><summary>Details</summary>{details}</details>",
                data,
                *[_up_to(one.backbone.depth, asked, one.layer) for one, asked in layers],
                *[gr.Slider(visible=len(names) > 1)] * missing,
                _up_to(seen[0].backbone.heads, view.head, min(view.head, seen[0].backbone.heads)),
                *is_shown,
                _overview(models, path, names[0], view),
            )

    @answering
    def see_at(path, other_upload, other_example, backbone, second_backbone, clicked, is_scene, progress, *values):
        """Move the point, or the window of a scene, to a pixel of the picture that was clicked.

        A map without a point is replaced by the similarity to the point.
        """
        adjustment = view_of(*values).adjustment
        rgb = image_of(models, path, backbone, replace(adjustment, part=100.0) if is_scene else adjustment).rgb
        x, y = (round(100 * (at + 0.5) / side, 1) for at, side in zip(clicked, display_size(rgb)))
        before, after = dict(zip(settings, values)), {"x": x, "y": y, "from": FROM_POINT}
        if is_scene:
            after = {"wx": x, "wy": y}
        elif before["map"] not in OF_ATTENTION:
            after["map"] = SIMILARITY
        values = (before | after).values()
        for shown in see.__wrapped__(path, other_upload, other_example, backbone, second_backbone, progress, *values):
            yield *shown, *(after.get(key, gr.skip()) for key in MOVED)

    async def see_click(
        path, other_upload, other_example, backbone, second_backbone, event: gr.SelectData, progress=PROGRESS, *values
    ):
        """Convert a click to plain values, because an event cannot be sent to the process of a GPU."""
        # A click on the small maps of the heads has no position in the image.
        if path is None or (values[0] == HEADS and event.target in (map_a, map_b)):
            yield (gr.skip(),) * (len(outputs) + len(MOVED))
            return
        selected = (path, other_upload, other_example, backbone, second_backbone)
        async for shown in see_at(*selected, tuple(event.index), event.target is scene, progress, *values):
            yield shown

    @functools.wraps(see)
    async def see_anew(path, upload, example, backbone, second_backbone, progress, kind, layer, second_layer, *others):
        """Show the last layer after the backbone has changed."""
        async for shown in see(path, upload, example, backbone, second_backbone, progress, kind, None, None, *others):
            yield shown

    @answering
    def keep_features(path, other_upload, other_example, backbone, second_backbone, *values):
        """Write the features and maps that are shown to a file and return its path."""
        if path is None:
            raise message("No image is selected. Choose an image first.")
        view = view_of(*values)
        *_, seen = look(models, path, chosen(backbone, second_backbone), view)
        return features_file(path, view, seen)

    options = {"trigger_mode": "always_last", "show_progress_on": map_a}
    models_changed = [first.input, second.input, model_name.input]
    forget([*image.changes, *models_changed], [*pictures, scene, note, patches])
    changes = [one.submit if one is bands else one.input for one in settings.values()]
    running = [image.on([*image.changes, *other.changes, *changes], see, inputs, outputs, **options)]
    running.append(image.on(models_changed, see_anew, inputs, outputs, **options))
    clicks = [view.select for view in (picture, map_a, map_b, scene)]
    moved = [*outputs, *(settings[key] for key in MOVED)]
    running.append(image.on(clicks, see_click, inputs, moved, **options))
    cancel.click(None, cancels=running)
    copy.click(None, None, copy, js="copyMaps", **PRIVATE).then(None, None, copy, js=RESTORE_LABEL, **PRIVATE)
    kept = image.on([keep.click], keep_features, inputs, file)
    kept.success(None, js=DOWNLOAD, **PRIVATE)
    state = {"image": image.example, **settings, "search": other.example, "a": first, "b": second}
    return Tab(state, [(*image.with_path(see, inputs), outputs)])


def backbone_inputs(models: Models, model_name: gr.Dropdown, second: str) -> list[gr.Dropdown]:
    """Create the selectors of two backbones. The first follows the model at the top of the page."""
    names, label = [NO_BACKBONE, TWIN, *models.names, *REFERENCES], "Second backbone, side by side"
    selectors = [
        gr.Dropdown(models.names, value=models.default, label="Backbone (any Hub id)", allow_custom_value=True),
        gr.Dropdown(names, value=second, label=label, allow_custom_value=True),
    ]
    model_name.input(None, model_name, selectors[0], js="(name) => name", **PRIVATE)
    return selectors


def resolution_slider(value: int, elem_id: str) -> gr.Slider:
    label = "Resolution: patches along the longer side"
    return slider(MIN_RESOLUTION, MAX_RESOLUTION, min(value, MAX_RESOLUTION), step=1, label=label, elem_id=elem_id)


def view_of(*values) -> View:
    """Build the view from the values of the controls, which are those of `View`, then those of `Adjustment`."""
    own = len(fields(View)) - 1
    return View(*values[:own], adjustment=Adjustment(*values[own:]))


def features_file(path: str, view: View, seen: Sequence[Seen]) -> str:
    """Write features and maps as NPZ to a temporary file and return its path."""
    arrays = {"image": name_of(path), "kind": view.kind, "head": view.head, "from_point": view.source == FROM_POINT}
    arrays |= {"point": view.point, "backbones": [one.name for one in seen], "layers": [one.layer for one in seen]}
    for key, one in zip("ab", seen):
        arrays |= {f"features_{key}": one.features.numpy(), f"map_{key}": one.values.numpy()}
    file = new_file("features.npz")
    np.savez(file, **arrays)
    return str(file)


def _resized(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray(rgb).resize(display_size(rgb))


def _overview(models: Models, path: str, name: str, view: View) -> gr.Image:
    """Return the whole scene with the outline of the visible window; hidden if the window is the whole scene."""
    if view.adjustment.window is None:
        return gr.Image(None, visible=False)
    whole = _resized(image_of(models, path, name, replace(view.adjustment, part=100.0)).rgb)
    return gr.Image(write_png(boxed(whole, [view.adjustment.window]), "overview.png"), visible=True)


def _map_update(one: Seen, kind: str) -> gr.Image:
    file, alt_text = write_png(one.picture, "map.png"), f"{kind}: {one.title(kind)}; {one.meaning}"
    return gr.Image(file, label=one.title(kind), alt_text=alt_text, visible=True)


def _up_to(maximum: int, asked: float | None, shown: int) -> gr.Slider:
    """Return an update of a slider with a new maximum.

    The value is set only if the old one was out of range, because the visitor may be moving the slider.
    """
    return gr.Slider(maximum=maximum, visible=True, **({} if asked == shown else {"value": shown}))


def _scale(title: str, meaning: str, view: View) -> str:
    """Return the color bar of a map with its meaning; empty for maps in more than one color."""
    if view.kind in (FOREGROUND, SEGMENTS) or (view.kind == PCA and not view.component):
        return ""
    stops = heat_of(torch.linspace(0, 1, 8)[None], colors=view.colors)[0]
    colors = ", ".join(f"rgb{tuple(stop.tolist())}" for stop in stops)
    bar = f'<i class="colorbar" style="background: linear-gradient(90deg, {colors})"></i>'
    return f"{html.escape(title)}: {bar} {html.escape(meaning)}."


def _details(one: Seen, kind: str) -> str:
    """Return the name of the model output that a map shows, and the meaning of its colors."""
    output = {ROLLOUT: "attentions", ATTENTION: f"attentions[{one.layer - 1}]", HEADS: f"attentions[{one.layer - 1}]"}
    code = output.get(kind, f"hidden_states[{one.layer}]")
    return f"{html.escape(one.title(kind))}, <code>{code}</code> of transformers: {one.meaning}."


def _search(models: Models, path: str, one: Seen, view: View) -> tuple[list[gr.Image], torch.Tensor, str]:
    """Return another image, its similarity to the point of a map, its features, and a line that describes both."""
    rgb = image_of(models, path, one.name).rgb
    others = features_of(models, path, one.name, view.resolution, one.layer)
    place = patch_at(view.point, *one.features.shape[1:])
    drawn, meaning = heat_map(similarity_to_point(one.features, *place, others), rgb, view, has_point=False)
    name, plain = name_of(path), write_png(_resized(rgb), "image.png")
    title = f"{view.kind}, in {name}"
    alt_text = f"{title}, by {one.name}; {meaning}"
    pictures = [
        gr.Image(plain, label=name, alt_text=name, visible=True),
        gr.Image(write_png(drawn, "map.png"), label=title, alt_text=alt_text, visible=True),
    ]
    return pictures, others, _scale(title, meaning, view)


def _data(seen: Sequence[Seen], others: torch.Tensor | None, view: View) -> tuple[str, float]:
    """Return the data of `similarity.js` as HTML, and the largest error of its similarities.

    The data are, for each map, the reduced features of its patches and the map that the point belongs to.
    """
    packed = {"map_a": pack_features(seen[0].features, *[] if others is None else [others])}
    packed |= {f"map_{key}": pack_features(one.features) for key, one in zip("b", seen[1:])}
    maps = [{**one.images[0], "id": name, "of": name, "under": "backbone_picture"} for name, one in packed.items()]
    maps += [{**one, "id": "map_c", "of": "map_a", "under": "second_picture"} for one in packed["map_a"].images[1:]]
    scales = {name: one.scales for name, one in packed.items()}
    colors = base64.b64encode(heat_of(torch.linspace(0, 1, 256)[None], colors=view.colors).tobytes()).decode()
    data = {"maps": maps, "scales": scales, "colors": colors, "opacity": view.opacity}
    return f"<i data-patches='{json.dumps(data)}'></i>", max(one.error for one in packed.values())
