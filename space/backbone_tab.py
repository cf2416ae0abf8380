"""The Backbone tab: maps of what one or two backbones make of an image."""

import html
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from computing import PRIVATE, QUEUE, gpu, told
from gradio.utils import get_upload_folder
from loading import LoadedBackbone, Models, UnavailableModel
from maps import (
    attention_map,
    display_size,
    draw_map,
    heat_of,
    native_resolution,
    patch_at,
    patch_features,
    rollout_map,
    similarity_to_point,
)
from PIL import Image
from uploading import example_choice, image_upload, open_rgb

from modeling_vitp.images.components import align_scores, colors_of, principal_scores

PCA, SIMILARITY, ATTENTION, ROLLOUT = "PCA of features", "Similarity to the point", "Attention", "Attention rollout"
FROM_CLS, FROM_POINT = "CLS token", "the point"
NO_BACKBONE = "none"
MIN_RESOLUTION, MAX_RESOLUTION = 4, 48
BEGIN = "Choose an image or an example to begin."


@dataclass(frozen=True)
class View:
    """What is to be seen of an image, whatever the backbone."""

    kind: str
    layer: int
    head: int
    from_point: bool
    point: tuple[float, float]
    resolution: int

    def values(self, backbone: LoadedBackbone, image: np.ndarray, features: torch.Tensor) -> torch.Tensor:
        """The map: of shape `(3, rows, columns)` for principal scores, `(rows, columns)` otherwise."""
        place = patch_at(self.point, *features.shape[1:])
        if self.kind == PCA:
            return principal_scores(features)
        if self.kind == SIMILARITY:
            return similarity_to_point(features, *place)
        query = place if self.from_point else None
        if self.kind == ROLLOUT:
            return rollout_map(backbone, image, self.resolution, query)
        head = min(self.head, backbone.model.config.num_attention_heads) or None
        return attention_map(backbone, image, self.resolution, self.layer_of(backbone), head, query)

    def layer_of(self, backbone: LoadedBackbone) -> int:
        return min(self.layer, backbone.model.config.num_hidden_layers)

    @property
    def has_point(self) -> bool:
        return self.kind == SIMILARITY or (self.kind in (ATTENTION, ROLLOUT) and self.from_point)

    def draw(self, maps: list[torch.Tensor], image: np.ndarray) -> tuple[list[Image.Image], str]:
        """The maps in colours that mean the same in each, and a line that says what they mean."""
        point = self.point if self.has_point else None
        if self.kind == PCA:
            scores = [maps[0], *(align_scores(other, maps[0]) for other in maps[1:])]
            meaning = "red, green and blue are the three first principal components"
            if len(maps) > 1:
                meaning += ", the second backbone's turned to match the first's"
            return [draw_map(colors_of(one)) for one in scores], meaning
        low, high = min(one.min().item() for one in maps), max(one.max().item() for one in maps)
        if self.kind == SIMILARITY:
            high = 1.0
        pictures = [draw_map(heat_of(one, low, high), image, point, opacity=0.75) for one in maps]
        return pictures, f"from dark, {low:.3g}, to bright, {high:.3g}"


def build_tab(models: Models, model_name: gr.Dropdown) -> dict[str, gr.components.Component]:
    """See `app.py`."""
    config = models.backbone().model.config
    gr.Markdown("What the features of a ViT tell apart. **Click any point** to see which places are like it.")
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            upload = image_upload(elem_id="backbone_image")
            example = example_choice(upload)
            kind = gr.Radio([PCA, SIMILARITY, ATTENTION, ROLLOUT], value=PCA, label="Map")
            depth, heads = config.num_hidden_layers, config.num_attention_heads
            layer = gr.Slider(1, depth, depth, step=1, label="Layer")
            with gr.Row(visible=False) as attention_options:
                head = gr.Slider(0, heads, 0, step=1, label="Head (0: mean of all)")
                source = gr.Radio([FROM_CLS, FROM_POINT], value=FROM_CLS, label="Attention of")
            resolution = gr.Slider(
                MIN_RESOLUTION,
                MAX_RESOLUTION,
                min(native_resolution(models.backbone()), MAX_RESOLUTION),
                step=1,
                label="Resolution: patches along the longer side",
            )
            first = gr.Dropdown(
                models.backbones, value=models.default, label="Backbone (any Hub id)", allow_custom_value=True
            )
            second = gr.Dropdown(
                [NO_BACKBONE, *models.backbones],
                value=NO_BACKBONE,
                label="Second backbone, side by side",
                allow_custom_value=True,
            )
            with gr.Accordion("Point by numbers", open=False):
                x = gr.Slider(0, 100, 50, step=0.1, label="Point: % from the left")
                y = gr.Slider(0, 100, 50, step=0.1, label="Point: % from the top")
        with gr.Column(scale=3):
            with gr.Row():
                picture = picture_view("Image", "The image that was given, as the model sees it")
                map_a = picture_view("Map", "Map of the backbone", elem_id="map_a")
                map_b = picture_view("Map of the second backbone", "Map of the second backbone", visible=False)
            note = gr.Markdown(BEGIN, label="Note", elem_id="backbone_note")
            with gr.Row():
                png_a = gr.DownloadButton("Map (PNG)", interactive=False, size="sm", elem_id="download_map")
                png_b = gr.DownloadButton("Second map (PNG)", visible=False, size="sm")
                npz = gr.DownloadButton("Features and maps (NPZ)", interactive=False, size="sm")
                cancel = gr.Button("Cancel", size="sm")
    size = gr.State()

    inputs = [upload, first, second, kind, layer, head, source, x, y, resolution]
    running = gr.on(
        [component.change for component in inputs],
        _renderer(models),
        inputs,
        [picture, map_a, map_b, note, png_a, png_b, npz, size],
        api_name="backbone_maps",
        trigger_mode="always_last",
        show_progress_on=map_a,
        **QUEUE,
    )
    cancel.click(None, cancels=running)
    kind.change(lambda kind: gr.Row(visible=kind in (ATTENTION, ROLLOUT)), kind, attention_options, **PRIVATE)
    for view in (picture, map_a, map_b):
        view.select(_pick, [size, kind], [x, y, kind, source], show_progress="hidden", **PRIVATE)
    first.change(_limiter(models), [first, layer, head], [layer, head], show_progress="hidden", **PRIVATE)
    model_name.change(lambda name: name, model_name, first, show_progress="hidden", **PRIVATE)
    keys = {"map": kind, "layer": layer, "head": head, "from": source, "res": resolution}
    return {"image": example, **keys, "a": first, "b": second, "x": x, "y": y}


def picture_view(label: str, alt_text: str, **options) -> gr.Image:
    return gr.Image(
        label=label,
        alt_text=alt_text,
        interactive=False,
        buttons=["fullscreen"],
        min_width=240,
        elem_classes="picture",
        **options,
    )


def _renderer(models: Models) -> Callable[..., Iterator[tuple]]:
    @lru_cache(maxsize=8)
    def image_of(path: str, name: str) -> tuple[np.ndarray, str]:
        return open_rgb(path, input_spec=models.backbone(name).input_spec)

    @lru_cache(maxsize=8)
    def features_of(path: str, name: str, resolution: int, layer: int) -> torch.Tensor:
        return patch_features(models.backbone(name), image_of(path, name)[0], resolution, layer)

    @gpu
    def backbone_maps(
        image: str | None,
        backbone: str,
        second_backbone: str,
        kind: str,
        layer: float,
        head: float,
        attention_of: str,
        x: float,
        y: float,
        resolution: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        """Maps of an image by one or two backbones: pictures, what they mean, and files to keep."""
        if image is None:
            yield None, None, gr.Image(None, visible=False), BEGIN, *_no_files(), None
            return
        view = View(kind, int(layer), int(head), attention_of == FROM_POINT, (x / 100, y / 100), int(resolution))
        names = [backbone] + [second_backbone] * (second_backbone not in (None, "", NO_BACKBONE))
        features, maps = [], []
        for index, name in enumerate(names):
            progress(index / len(names), desc=name)
            with told():
                one = models.backbone(name)
            features.append(features_of(str(image), name, view.resolution, view.layer_of(one)))
            maps.append(view.values(one, image_of(str(image), name)[0], features[-1]))
            yield _outputs(view, names[: index + 1], *image_of(str(image), names[0]), features, maps)

    return backbone_maps


def _outputs(
    view: View,
    names: list[str],
    image: np.ndarray,
    reading_note: str,
    features: list[torch.Tensor],
    maps: list[torch.Tensor],
) -> tuple:
    rows, columns = features[0].shape[1:]
    size = display_size(rows, columns)
    pictures, meaning = view.draw(maps, image)
    original = draw_map(np.asarray(Image.fromarray(image).resize(size)), point=view.point if view.has_point else None)
    layer = "" if view.kind == ROLLOUT else f", layer {view.layer}"
    note = f"{html.escape(reading_note)}  \n{view.kind}{layer}, {rows} × {columns} patches: {meaning}."

    folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
    original.save(folder / "image.jpg", quality=92)
    arrays = {"kind": view.kind, "layer": view.layer, "head": view.head, "from_point": view.from_point}
    arrays |= {"point": view.point, "backbones": names}
    shown, downloads = [], []
    for key, name, picture, feature, values in zip("ab", names, pictures, features, maps):
        path = str(folder / f"{view.kind.lower().replace(' ', '_')}_{key}.png")
        picture.save(path)
        alt_text = f"{view.kind} of {name}{layer}; {meaning}"
        shown.append(gr.Image(path, label=name, alt_text=alt_text, visible=True))
        downloads.append(gr.DownloadButton(value=path, interactive=True, visible=True))
        arrays |= {f"features_{key}": feature.numpy(), f"map_{key}": values.numpy()}
    if len(names) == 1:
        shown.append(gr.Image(None, visible=False))
        downloads.append(gr.DownloadButton(value=None, visible=False))
    np.savez(folder / "features.npz", **arrays)
    downloads.append(gr.DownloadButton(value=str(folder / "features.npz"), interactive=True))
    return str(folder / "image.jpg"), *shown, note, *downloads, size


def _no_files() -> list[gr.DownloadButton]:
    return [
        gr.DownloadButton(value=None, interactive=False),
        gr.DownloadButton(value=None, visible=False),
        gr.DownloadButton(value=None, interactive=False),
    ]


def _pick(size: tuple[int, int] | None, kind: str, event: gr.SelectData) -> tuple:
    """The clicked point; a PCA map becomes that of similarity to it."""
    if size is None:
        return (gr.skip(),) * 4
    x, y = (round(100 * (index + 0.5) / side, 1) for index, side in zip(event.index, size))
    return x, y, SIMILARITY if kind == PCA else kind, FROM_POINT


def _limiter(models: Models) -> Callable[[str, float, float], tuple]:
    def limits(name: str, layer: float, head: float) -> tuple:
        """Sliders as long as the backbone has layers and heads."""
        try:
            config = models.backbone(name).model.config
        except UnavailableModel:
            return gr.skip(), gr.skip()  # the maps say what is wrong
        depth, heads = config.num_hidden_layers, config.num_attention_heads
        return gr.Slider(maximum=depth, value=min(layer, depth)), gr.Slider(maximum=heads, value=min(head, heads))

    return limits
