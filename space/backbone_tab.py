"""The tab Look inside: feature and attention maps of one or two backbones."""

import base64
import functools
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import torch
from answers import PROGRESS
from computing import PRIVATE, answering, message, new_file, write_png
from loading import REFERENCES, LoadedBackbone, Models
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
    BackboneMap,
    View,
    boxed,
    display_size,
    features_of,
    heat_map,
    heat_of,
    image_of,
    look,
    pack_features,
    patch_at,
    ringed,
    selected_backbones,
    similarity_to_point,
)
from PIL import Image
from reading import AS_STATED, PRESETS, Adjustment
from uploading import CROWNS, EXAMPLES, ImageInput, forget, image_input, name_of, picture_of, selected_path
from url_state import DEEP, Tab, slider

from modeling_vitp.images.reading import stored_size

BEGIN = "Choose an image or an example to begin."
MOVED = ("x", "y", "map", "from", "wx", "wy")  # settings that a click changes, by their key in the URL
COPY_LABEL = "Copy picture and link"
DOWNLOAD = "() => document.querySelector('#features_file').click()"
RESTORE_LABEL = f"() => new Promise((resolve) => setTimeout(() => resolve({json.dumps(COPY_LABEL)}), 2000))"


class MapControls(NamedTuple):
    """Controls that are always in sight."""

    image: ImageInput
    kind: gr.Radio
    segments: gr.Slider
    similarity_options: gr.Column
    boxes: gr.Slider
    second_image: ImageInput
    attention_options: gr.Column
    source: gr.Radio
    head: gr.Slider
    point_options: gr.Column
    x: gr.Slider
    y: gr.Slider
    opacity: gr.Slider
    is_smooth: gr.Checkbox
    resolution: gr.Slider


class BackboneControls(NamedTuple):
    """Controls of the backbones and of the colors, in the accordion."""

    first: gr.Dropdown
    second: gr.Dropdown
    layer: gr.Slider
    second_layer: gr.Slider
    component: gr.Slider
    colors: gr.Radio


class ReadingControls(NamedTuple):
    """Controls of the reading of the image, in the accordion, in the order of the fields of `Adjustment`."""

    position: gr.Slider
    preset: gr.Radio
    bands: gr.Textbox
    low: gr.Slider
    high: gr.Slider
    window_percent: gr.Slider
    center_x: gr.Slider
    center_y: gr.Slider


class ResultViews(NamedTuple):
    """Pictures and texts of the result, and the buttons below them."""

    picture: gr.Image
    map_a: gr.Image
    map_b: gr.Image
    second_picture: gr.Image
    map_c: gr.Image
    note: gr.HTML
    patches: gr.HTML
    copy_button: gr.Button
    features_button: gr.Button
    cancel_button: gr.Button
    features_file: gr.DownloadButton


class PageUpdate(NamedTuple):
    """Values or updates of the components that a handler changes, in the order of its outputs."""

    picture: Any
    map_a: Any
    map_b: Any
    second_picture: Any
    map_c: Any
    note: Any
    patches: Any
    layer: Any
    second_layer: Any
    head: Any
    component: Any
    segments: Any
    similarity_options: Any
    attention_options: Any
    point_options: Any
    scene: Any


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    start = models.backbone()
    gr.Markdown("**Click any point** of a picture to see which patches are similar to it, here and in another image.")
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            map_controls = _build_map_controls(start)
            with gr.Accordion("More settings", open=False, elem_classes="more"):
                backbone_controls = _build_backbone_controls(models, model_name, start)
                reading_controls = _build_reading_controls()
                scene = map_view("Overview: click to move the window", "overview", visible=False)
        with gr.Column(scale=3, elem_classes="results"):
            views = _build_result_views()
    return _connect(models, model_name, map_controls, backbone_controls, reading_controls, scene, views)


def _build_map_controls(start: LoadedBackbone) -> MapControls:
    image = image_input("backbone_image", CROWNS)
    kind = gr.Radio(KINDS, value=PCA, label="Map", elem_id="kind")
    segments = slider(
        minimum=2,
        maximum=len(PALETTE),
        value=5,
        step=1,
        label="Number of segments",
        elem_id="segments",
        visible=False,
    )
    with gr.Column(visible=False) as similarity_options:
        boxes = slider(
            minimum=0,
            maximum=20,
            value=5,
            step=1,
            label="Boxes around the most similar patches",
            elem_id="boxes",
        )
        second_image = image_input("backbone_second_image", "Trees, Florida", "Image to search")
    attention_options, source, head = _build_attention_options(start)
    point_options, x, y = _build_point_options()
    opacity = slider(
        minimum=0,
        maximum=1,
        value=OPACITY,
        step=0.05,
        label="Opacity of the map",
        elem_id="map_opacity",
    )
    is_smooth = gr.Checkbox(label="Smooth between patches", info="Bicubic interpolation.", elem_id="smooth")
    patches_of_example = max(stored_size(EXAMPLES[CROWNS])) // max(start.patch)
    resolution = resolution_slider(max(start.native, patches_of_example), "resolution")
    return MapControls(
        image=image,
        kind=kind,
        segments=segments,
        similarity_options=similarity_options,
        boxes=boxes,
        second_image=second_image,
        attention_options=attention_options,
        source=source,
        head=head,
        point_options=point_options,
        x=x,
        y=y,
        opacity=opacity,
        is_smooth=is_smooth,
        resolution=resolution,
    )


def _build_attention_options(start: LoadedBackbone) -> tuple[gr.Column, gr.Radio, gr.Slider]:
    with gr.Column(visible=False) as attention_options:
        source = gr.Radio(
            [FROM_CLS, FROM_POINT],
            value=FROM_CLS,
            label="Attention of",
            info="The CLS token is an extra token that collects features of the whole image.",
            elem_id="source",
        )
        head = slider(
            minimum=0,
            maximum=start.heads,
            value=0,
            step=1,
            label="Head (0: mean of all)",
            elem_id="head",
        )
    return attention_options, source, head


def _build_point_options() -> tuple[gr.Column, gr.Slider, gr.Slider]:
    with gr.Column(visible=False) as point_options:
        x = slider(
            minimum=0,
            maximum=100,
            value=50,
            step=0.1,
            label="Point, or arrow keys on a map: % from the left",
            elem_id="point_x",
        )
        y = slider(
            minimum=0,
            maximum=100,
            value=50,
            step=0.1,
            label="Point: % from the top",
            elem_id="point_y",
        )
    return point_options, x, y


def _build_backbone_controls(models: Models, model_name: gr.Dropdown, start: LoadedBackbone) -> BackboneControls:
    first, second = backbone_inputs(models, model_name, TWIN)
    layer = slider(
        minimum=1,
        maximum=start.depth,
        value=start.depth,
        step=1,
        label="Layer",
        elem_id="layer",
        elem_classes=DEEP,
    )
    second_layer = slider(
        minimum=1,
        maximum=start.depth,
        value=start.depth,
        step=1,
        label="Layer of the second backbone",
        elem_id="second_layer",
        elem_classes=DEEP,
    )
    component = slider(
        minimum=0,
        maximum=12,
        value=0,
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
    return BackboneControls(
        first=first,
        second=second,
        layer=layer,
        second_layer=second_layer,
        component=component,
        colors=colors,
    )


def _build_reading_controls() -> ReadingControls:
    gr.Markdown("**Reading of the image**")
    position = slider(
        minimum=0,
        maximum=100,
        value=50,
        step=0.5,
        label="Slice or frame: % from the feet up",
        elem_id="slice",
    )
    preset = gr.Radio([AS_STATED, *PRESETS], value=AS_STATED, label="Window of CT", elem_id="preset")
    bands = gr.Textbox(
        label="Bands of red, green and blue, then Enter; found by name if empty",
        placeholder="8, 4, 3",
        max_length=50,
        elem_id="bands",
    )
    low = slider(minimum=0, maximum=49, value=2, step=0.5, label="Black: percentile", elem_id="low")
    high = slider(
        minimum=51,
        maximum=100,
        value=98,
        step=0.5,
        label="White: percentile",
        elem_id="high",
    )
    window_percent, center_x, center_y = _build_window_controls()
    return ReadingControls(
        position=position,
        preset=preset,
        bands=bands,
        low=low,
        high=high,
        window_percent=window_percent,
        center_x=center_x,
        center_y=center_y,
    )


def _build_window_controls() -> tuple[gr.Slider, gr.Slider, gr.Slider]:
    gr.Markdown("**A window of a large scene**")
    window_percent = slider(
        minimum=1,
        maximum=100,
        value=100,
        step=1,
        label="Window: % of each side of the scene",
        elem_id="part",
    )
    center_x = slider(
        minimum=0,
        maximum=100,
        value=50,
        step=0.1,
        label="Center of the window: % from the left",
        elem_id="center_x",
    )
    center_y = slider(
        minimum=0,
        maximum=100,
        value=50,
        step=0.1,
        label="Center of the window: % from the top",
        elem_id="center_y",
    )
    return window_percent, center_x, center_y


def _build_result_views() -> ResultViews:
    with gr.Row(elem_id="maps"):
        picture = map_view("Image", "backbone_picture", "The image, as the model sees it")
        map_a = map_view("Map", "map_a", "Map of the backbone")
        map_b = map_view("Map of the second backbone", "map_b")
        second_picture = map_view("Image to search", "second_picture", visible=False)
        map_c = map_view("In the second image", "map_c", "Map of the second image", visible=False)
    note = gr.HTML(BEGIN, label="Note", elem_id="backbone_note")
    patches = gr.HTML(visible="hidden", elem_id="patches")
    with gr.Row():
        copy_button = gr.Button(COPY_LABEL, size="sm", elem_id="copy_maps")
        features_button = gr.Button("Features and maps (NPZ)", size="sm", elem_id="keep_features")
        cancel_button = gr.Button("Cancel", size="sm")
    features_file = gr.DownloadButton(visible="hidden", elem_id="features_file")
    return ResultViews(
        picture=picture,
        map_a=map_a,
        map_b=map_b,
        second_picture=second_picture,
        map_c=map_c,
        note=note,
        patches=patches,
        copy_button=copy_button,
        features_button=features_button,
        cancel_button=cancel_button,
        features_file=features_file,
    )


def map_view(
    label: str,
    elem_id: str,
    alt_text: str | None = None,
    **options,
) -> gr.Image:
    return picture_of(label, elem_id, alt_text, elem_classes="picture", **options)


def _settings_by_key(
    map_controls: MapControls, backbone_controls: BackboneControls, reading_controls: ReadingControls
) -> dict[str, gr.components.Component]:
    """Return the controls by their key in the URL, in the order of the fields of `View` and `Adjustment`."""
    return {
        "map": map_controls.kind,
        "layer": backbone_controls.layer,
        "layer_b": backbone_controls.second_layer,
        "head": map_controls.head,
        "from": map_controls.source,
        "x": map_controls.x,
        "y": map_controls.y,
        "res": map_controls.resolution,
        "opacity_of_map": map_controls.opacity,
        "colors": backbone_controls.colors,
        "smooth": map_controls.is_smooth,
        "pc": backbone_controls.component,
        "segments": map_controls.segments,
        "boxes": map_controls.boxes,
        "slice": reading_controls.position,
        "ct": reading_controls.preset,
        "bands": reading_controls.bands,
        "black": reading_controls.low,
        "white": reading_controls.high,
        "window": reading_controls.window_percent,
        "wx": reading_controls.center_x,
        "wy": reading_controls.center_y,
    }


def _connect(
    models: Models,
    model_name: gr.Dropdown,
    map_controls: MapControls,
    backbone_controls: BackboneControls,
    reading_controls: ReadingControls,
    scene: gr.Image,
    views: ResultViews,
) -> Tab:
    """Register the handlers of the tab and return its state."""
    image = map_controls.image
    second_image = map_controls.second_image
    first = backbone_controls.first
    second = backbone_controls.second
    settings = _settings_by_key(map_controls, backbone_controls, reading_controls)
    pictures = [views.picture, views.map_a, views.map_b, views.second_picture, views.map_c]
    inputs = [second_image.upload, second_image.example, first, second, *settings.values()]
    outputs = [
        *pictures,
        views.note,
        views.patches,
        backbone_controls.layer,
        backbone_controls.second_layer,
        map_controls.head,
        backbone_controls.component,
        map_controls.segments,
        map_controls.similarity_options,
        map_controls.attention_options,
        map_controls.point_options,
        scene,
    ]
    see, see_at, see_anew = _handlers(models, list(settings))
    keep_features = _features_handler(models)
    see_click = _click_handler(see_at, [views.map_a, views.map_b], scene, len(outputs))
    options = {"trigger_mode": "always_last", "show_progress_on": views.map_a}
    models_changed = [first.input, second.input, model_name.input]
    forget([*image.changes, *models_changed], [*pictures, scene, views.note, views.patches])
    settings_changed = []
    for control in settings.values():
        settings_changed.append(control.submit if control is reading_controls.bands else control.input)
    changes = [*image.changes, *second_image.changes, *settings_changed]
    clicks = [view.select for view in (views.picture, views.map_a, views.map_b, scene)]
    moved_settings = [settings[key] for key in MOVED]
    running = [
        image.on(changes, see, inputs, outputs, **options),
        image.on(models_changed, see_anew, inputs, outputs, **options),
        image.on(clicks, see_click, inputs, [*outputs, *moved_settings], **options),
    ]
    views.cancel_button.click(None, cancels=running)
    copying = views.copy_button.click(None, None, views.copy_button, js="copyMaps", **PRIVATE)
    copying.then(None, None, views.copy_button, js=RESTORE_LABEL, **PRIVATE)
    writing = image.on([views.features_button.click], keep_features, inputs, views.features_file)
    writing.success(None, js=DOWNLOAD, **PRIVATE)
    state = {"image": image.example, **settings, "search": second_image.example, "a": first, "b": second}
    return Tab(state, [(*image.with_path(see, inputs), outputs, [*changes, *models_changed, *clicks])])


def _handlers(models: Models, keys: Sequence[str]) -> tuple[Callable, Callable, Callable]:
    """Return the handlers `see`, `see_at` and `see_anew`.

    Args:
        keys: keys of the settings in the URL, in the order of the values that the handlers get.
    """

    @answering
    def see(path, other_upload, other_example, backbone, second_backbone, progress=PROGRESS, *values):
        """Yield the pictures, the note and the data for the mouse, and updates of the controls."""
        view = view_of(*values)
        if path is None:
            yield _update_without_image(view)
            return
        names = selected_backbones(backbone, second_backbone)
        other_path = selected_path(other_upload, other_example)
        for maps in look(models, path, names, view, progress):
            yield _update_of(models, path, other_path, names, maps, view)

    @answering
    def see_at(path, other_upload, other_example, backbone, second_backbone, clicked, is_scene, progress, *values):
        """Move the point, or the window of a scene, to a pixel of the picture that was clicked.

        A map without a point is replaced by the similarity to the point.
        """
        settings = dict(zip(keys, values))
        moved_settings = _moved_settings(models, path, backbone, clicked, is_scene, view_of(*values))
        if not is_scene and settings["map"] not in OF_ATTENTION:
            moved_settings["map"] = SIMILARITY
        settings.update(moved_settings)
        updates = see.__wrapped__(
            path,
            other_upload,
            other_example,
            backbone,
            second_backbone,
            progress,
            *settings.values(),
        )
        for update in updates:
            yield *update, *(moved_settings.get(key, gr.skip()) for key in MOVED)

    @functools.wraps(see)
    async def see_anew(path, upload, example, backbone, second_backbone, progress, kind, layer, second_layer, *values):
        """Show the last layer after the backbone has changed."""
        updates = see(path, upload, example, backbone, second_backbone, progress, kind, None, None, *values)
        async for update in updates:
            yield update

    return see, see_at, see_anew


def _click_handler(see_at: Callable, map_views: Sequence[gr.Image], scene: gr.Image, num_outputs: int) -> Callable:
    """Return the handler `see_click`."""

    async def see_click(
        path,
        other_upload,
        other_example,
        backbone,
        second_backbone,
        event: gr.SelectData,
        progress=PROGRESS,
        *values,
    ):
        """Convert a click to plain values, because an event cannot be sent to the process of a GPU."""
        is_map = event.target in map_views
        # A click on the small maps of the heads has no position in the image.
        if path is None or (is_map and values[0] == HEADS):
            yield (gr.skip(),) * (num_outputs + len(MOVED))
            return
        updates = see_at(
            path,
            other_upload,
            other_example,
            backbone,
            second_backbone,
            tuple(event.index),
            event.target is scene,
            progress,
            *values,
        )
        async for update in updates:
            yield update

    return see_click


def _features_handler(models: Models) -> Callable:
    """Return the handler `keep_features`."""

    @answering
    def keep_features(path, other_upload, other_example, backbone, second_backbone, *values):
        """Write the features and maps that are shown to a file and return its path."""
        if path is None:
            raise message("No image is selected. Choose an image first.")
        view = view_of(*values)
        *_, maps = look(models, path, selected_backbones(backbone, second_backbone), view)
        return features_file(path, view, maps)

    return keep_features


def _moved_settings(
    models: Models,
    path: str,
    backbone: str,
    clicked: tuple[float, float],
    is_scene: bool,
    view: View,
) -> dict[str, Any]:
    """Return the settings, by their key in the URL, that a click on a pixel of a picture or of the scene changes."""
    adjustment = view.adjustment
    if is_scene:
        adjustment = replace(adjustment, window_percent=100.0)
    width, height = display_size(image_of(models, path, backbone, adjustment).rgb)
    x = round(100 * (clicked[0] + 0.5) / width, 1)
    y = round(100 * (clicked[1] + 0.5) / height, 1)
    if is_scene:
        return {"wx": x, "wy": y}
    return {"x": x, "y": y, "from": FROM_POINT}


def _visibilities(kind: str) -> dict[str, dict]:
    """Return updates that show the controls that matter for a kind of map and hide the others."""
    has_attention = kind in OF_ATTENTION
    return {
        "component": gr.update(visible=kind == PCA),
        "segments": gr.update(visible=kind == SEGMENTS),
        "similarity_options": gr.update(visible=kind == SIMILARITY),
        "attention_options": gr.update(visible=has_attention),
        "point_options": gr.update(visible=kind == SIMILARITY or has_attention),
    }


def _update_without_image(view: View) -> PageUpdate:
    hidden = gr.Image(None, visible=False)
    return PageUpdate(
        picture=None,
        map_a=None,
        map_b=None,
        second_picture=hidden,
        map_c=hidden,
        note=BEGIN,
        patches="",
        layer=gr.skip(),
        second_layer=gr.skip(),
        head=gr.skip(),
        scene=hidden,
        **_visibilities(view.kind),
    )


def _update_of(
    models: Models,
    path: str,
    other_path: str | None,
    names: Sequence[str],
    maps: Sequence[BackboneMap],
    view: View,
) -> PageUpdate:
    """Return the update of the page for the maps so far, of one or two backbones."""
    first = maps[0]
    rgb, _, reading_note = image_of(models, path, names[0], view.adjustment)
    picture = _resized(rgb)
    if view.has_point:
        picture = ringed(picture, view.point)
    rows, columns = first.features.shape[1:]
    lines = [f"<b>{html.escape(reading_note)}</b>, {rows} × {columns} patches", EXPLANATIONS[view.kind]]
    for backbone_map in maps:
        lines.append(_scale(backbone_map.title(view.kind), backbone_map.meaning, view))
    second_picture = gr.Image(None, visible=False)
    map_c = gr.Image(None, visible=False)
    other_features = None
    patches = ""
    if view.kind == SIMILARITY and other_path is not None:
        try:
            second_picture, map_c, other_features, line = _search(models, other_path, first, view)
        except ValueError as error:  # for example, an image without the bands of the model
            line = getattr(error, "message", html.escape(str(error)))
        lines.append(line)
    if view.kind == SIMILARITY and len(maps) == len(names):
        patches, largest_error = _data(maps, other_features, view)
        lines.append(f"Under the mouse, the values are within {largest_error:.2g} of the exact ones.")
    text = "<br>".join(filter(None, lines))
    details = "<br>".join(_details(backbone_map, view.kind) for backbone_map in maps)
    if len(maps) > 1:
        map_b = _map_update(maps[1], view.kind)
        second_layer = _up_to(maps[1].backbone.depth, view.second_layer, maps[1].layer)
    else:
        map_b = gr.Image(None, visible=len(names) > 1)
        second_layer = gr.Slider(visible=len(names) > 1)
    heads = first.backbone.heads
    return PageUpdate(
        picture=write_png(picture, "image.png"),
        map_a=_map_update(first, view.kind),
        map_b=map_b,
        second_picture=second_picture,
        map_c=map_c,
        note=f"{text}<details><summary>Details</summary>{details}</details>",
        patches=patches,
        layer=_up_to(first.backbone.depth, view.layer, first.layer),
        second_layer=second_layer,
        head=_up_to(heads, view.head, min(view.head, heads)),
        scene=_overview(models, path, names[0], view),
        **_visibilities(view.kind),
    )


def backbone_inputs(models: Models, model_name: gr.Dropdown, second: str) -> list[gr.Dropdown]:
    """Create the selectors of two backbones. The first follows the model at the top of the page."""
    first_selector = gr.Dropdown(
        models.names, value=models.default, label="Backbone (any Hub id)", allow_custom_value=True
    )
    second_selector = gr.Dropdown(
        [NO_BACKBONE, TWIN, *models.names, *REFERENCES],
        value=second,
        label="Second backbone, side by side",
        allow_custom_value=True,
    )
    model_name.input(None, model_name, first_selector, js="(name) => name", **PRIVATE)
    return [first_selector, second_selector]


def resolution_slider(value: int, elem_id: str) -> gr.Slider:
    return slider(
        minimum=MIN_RESOLUTION,
        maximum=MAX_RESOLUTION,
        value=min(value, MAX_RESOLUTION),
        step=1,
        label="Resolution: patches along the longer side",
        elem_id=elem_id,
    )


def view_of(*values) -> View:
    """Build the view from the values of the controls, which are those of `View`, then those of `Adjustment`."""
    num_view_values = len(fields(View)) - 1  # without the adjustment
    adjustment = Adjustment(*values[num_view_values:])
    return View(*values[:num_view_values], adjustment=adjustment)


def features_file(path: str, view: View, maps: Sequence[BackboneMap]) -> str:
    """Write features and maps as NPZ to a temporary file and return its path."""
    arrays = {
        "image": name_of(path),
        "kind": view.kind,
        "head": view.head,
        "from_point": view.source == FROM_POINT,
        "point": view.point,
        "backbones": [backbone_map.name for backbone_map in maps],
        "layers": [backbone_map.layer for backbone_map in maps],
    }
    for key, backbone_map in zip("ab", maps):
        arrays[f"features_{key}"] = backbone_map.features.numpy()
        arrays[f"map_{key}"] = backbone_map.values.numpy()
    file = new_file("features.npz")
    np.savez(file, **arrays)
    return str(file)


def _resized(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray(rgb).resize(display_size(rgb))


def _overview(models: Models, path: str, name: str, view: View) -> gr.Image:
    """Return the whole scene with the outline of the visible window; hidden if the window is the whole scene."""
    window = view.adjustment.window
    if window is None:
        return gr.Image(None, visible=False)
    scene = image_of(models, path, name, replace(view.adjustment, window_percent=100.0))
    picture = boxed(_resized(scene.rgb), [window])
    return gr.Image(write_png(picture, "overview.png"), visible=True)


def _map_update(backbone_map: BackboneMap, kind: str) -> gr.Image:
    title = backbone_map.title(kind)
    return gr.Image(
        write_png(backbone_map.picture, "map.png"),
        label=title,
        alt_text=f"{kind}: {title}; {backbone_map.meaning}",
        visible=True,
    )


def _up_to(maximum: int, requested: float | None, value: int) -> gr.Slider:
    """Return an update of a slider with a new maximum.

    The value is set only if the requested one was out of range, because the visitor may be moving the slider.
    """
    if requested == value:
        return gr.Slider(maximum=maximum, visible=True)
    return gr.Slider(maximum=maximum, visible=True, value=value)


def _scale(title: str, meaning: str, view: View) -> str:
    """Return the color bar of a map with its meaning; empty for maps in more than one color."""
    if view.kind in (FOREGROUND, SEGMENTS) or (view.kind == PCA and not view.component):
        return ""
    stops = heat_of(torch.linspace(0, 1, 8)[None], colors=view.colors)[0]
    colors = ", ".join(f"rgb{tuple(stop.tolist())}" for stop in stops)
    bar = f'<i class="colorbar" style="background: linear-gradient(90deg, {colors})"></i>'
    return f"{html.escape(title)}: {bar} {html.escape(meaning)}."


def _details(backbone_map: BackboneMap, kind: str) -> str:
    """Return the name of the model output that a map shows, and the meaning of its colors."""
    if kind == ROLLOUT:
        output = "attentions"
    elif kind in (ATTENTION, HEADS):
        output = f"attentions[{backbone_map.layer - 1}]"
    else:
        output = f"hidden_states[{backbone_map.layer}]"
    title = html.escape(backbone_map.title(kind))
    return f"{title}, <code>{output}</code> of transformers: {backbone_map.meaning}."


def _search(
    models: Models,
    path: str,
    backbone_map: BackboneMap,
    view: View,
) -> tuple[gr.Image, gr.Image, torch.Tensor, str]:
    """Return another image, its similarity to the point of a map, its features, and a line that describes both."""
    backbone_name = backbone_map.name
    rgb = image_of(models, path, backbone_name).rgb
    other_features = features_of(models, path, backbone_name, view.resolution, backbone_map.layer)
    row, column = patch_at(view.point, *backbone_map.features.shape[1:])
    similarity = similarity_to_point(backbone_map.features, row, column, other_features)
    heat, meaning = heat_map(similarity, rgb, view, has_point=False)
    name = name_of(path)
    title = f"{view.kind}, in {name}"
    picture = gr.Image(write_png(_resized(rgb), "image.png"), label=name, alt_text=name, visible=True)
    similarity_picture = gr.Image(
        write_png(heat, "map.png"),
        label=title,
        alt_text=f"{title}, by {backbone_name}; {meaning}",
        visible=True,
    )
    return picture, similarity_picture, other_features, _scale(title, meaning, view)


def _data(maps: Sequence[BackboneMap], other_features: torch.Tensor | None, view: View) -> tuple[str, float]:
    """Return the data of `similarity.js` as HTML, and the largest error of its similarities.

    The data are, for each map, the reduced features of its patches and the map that the point belongs to.
    """
    if other_features is None:
        packed = {"map_a": pack_features(maps[0].features)}
    else:
        packed = {"map_a": pack_features(maps[0].features, other_features)}
    if len(maps) > 1:
        packed["map_b"] = pack_features(maps[1].features)
    map_data = []
    for name, features in packed.items():
        map_data.append({**features.images[0], "id": name, "of": name, "under": "backbone_picture"})
    for codes in packed["map_a"].images[1:]:
        map_data.append({**codes, "id": "map_c", "of": "map_a", "under": "second_picture"})
    color_bytes = heat_of(torch.linspace(0, 1, 256)[None], colors=view.colors).tobytes()
    data = {
        "maps": map_data,
        "scales": {name: features.scales for name, features in packed.items()},
        "colors": base64.b64encode(color_bytes).decode(),
        "opacity": view.opacity,
    }
    largest_error = max(features.error for features in packed.values())
    return f"<i data-patches='{json.dumps(data)}'></i>", largest_error
