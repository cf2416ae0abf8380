"""API of the Space for programs: the functions behind the tabs, with plain values.

The page itself uses private events, which return updates of its components.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import gradio as gr
from apply_tab import found_by
from ask_tab import replies, summary_of
from backbone_tab import features_file, resolution_slider
from compare_tab import corruptions, two_images
from computing import QUEUE, answering, message, write_png
from loading import Models
from maps import FROM_CLS, FROM_POINT, KINDS, NO_BACKBONE, PCA, View, chosen, look
from PIL import Image
from url_state import slider
from vrl_tab import QUESTION, answers_at, kept_tokens, savings

from modeling_vitp.instructions.boxes import read_boxes

EXAMPLE = """\
```python
from gradio_client import Client, handle_file

client = Client("ADDRESS")  # the address of this page, or NAMESPACE/NAME of a Space
picture, second_picture, features, facts = client.predict(handle_file("scene.png"), api_name="/maps")
```

`client.view_api()` lists all functions with their arguments: `/maps`, `/corruptions`, `/two_images`, `/visual_tokens`,
`/drop_ratios`, `/saved`, `/ask`, `/apply` and `/about`. Pictures and files are returned as paths of downloads, tables
as `headers` and `data`, all other values as JSON."""


def build_api(models: Models) -> None:
    """Add the functions of the API, as hidden components, to the page that is being built."""

    def endpoint(api_name: str, function: Callable, *outputs: gr.components.Component) -> None:
        """Add a function, whose arguments after the models are `arguments` by their names."""
        handler = answering(partial(function, models), gpu=function is not kept_tokens)
        names = [name for name in inspect.signature(handler).parameters if name in arguments]
        options = {"api_name": api_name, "api_description": inspect.getdoc(function), **QUEUE}
        gr.Button(visible=False).click(handler, [arguments[name] for name in names], outputs, **options)

    with gr.Row(visible=False):
        arguments = {
            "image": gr.File(label="Image"),
            "second_image": gr.File(label="Second image"),
            "backbone": gr.Textbox(models.default, label="Backbone"),
            "second_backbone": gr.Textbox(NO_BACKBONE, label="Second backbone"),
            "model": gr.Textbox([*models.full_names, models.default][0], label="Full model"),
            "fine_tuned": gr.Textbox([*models.fine_tuned_names, None][0], label="Fine-tuned model"),
            "question": gr.Textbox(QUESTION, label="Question"),
            "kind": gr.Radio(KINDS, value=PCA, label="Kind"),
            "layer": slider(0, 200, 0, step=1, label="Layer, 0 for the last"),
            "second_layer": slider(0, 200, 0, step=1, label="Second layer, 0 for the last"),
            "head": slider(0, 200, 0, step=1, label="Head, 0 for the mean"),
            "attention_of": gr.Radio([FROM_CLS, FROM_POINT], value=FROM_CLS, label="Attention of"),
            "x": slider(0, 100, 50, step=0.1, label="x"),
            "y": slider(0, 100, 50, step=0.1, label="y"),
            "resolution": resolution_slider(models.backbone().native, "api_resolution"),
            "drop_ratio": slider(0, 0.99, 0.75, step=0.01, label="Drop ratio"),
            "seed": slider(0, 2**31 - 1, 0, step=1, label="Seed"),
            "draws": slider(1, 8, 3, step=1, label="Draws"),
            "longest": slider(1, 512, 128, step=1, label="Longest answer, in tokens"),
            "threshold": slider(0, 1, 0.3, step=0.01, label="Threshold"),
            "opacity": slider(0, 1, 0.5, step=0.01, label="Opacity"),
        }
        picture, second = (gr.Image(label=label, format="png") for label in ("Picture", "Second picture"))
        table, text, facts = gr.Dataframe(label="Table"), gr.Textbox(label="Text"), gr.JSON(label="Facts")
        note = gr.Textbox(label="Note")
        endpoint("maps", maps, picture, second, gr.File(label="Features"), facts)
        endpoint("corruptions", corruptions, table, note)
        endpoint("two_images", two_images, picture, second, facts, note)
        endpoint("visual_tokens", kept_tokens, picture, second, text, note)
        endpoint("drop_ratios", answers_at, table, text)
        endpoint("saved", savings, table, text)
        endpoint("ask", ask, text, facts, note)
        endpoint("apply", apply, picture, facts, note)


def maps(
    models: Models,
    image: str | None,
    backbone: str,
    second_backbone: str,
    kind: str,
    layer: int,
    second_layer: int,
    head: int,
    attention_of: str,
    x: float,
    y: float,
    resolution: int,
) -> tuple[str, str | None, str, dict]:
    """Return the maps of one or two backbones, features and maps as NPZ, and a description of the pictures."""
    view = View(kind, layer, second_layer, head, attention_of, x, y, resolution)
    *_, seen = look(models, image, chosen(backbone, second_backbone), view)
    rows, columns = seen[0].features.shape[1:]
    shown = [
        {"backbone": one.name, "layer": one.layer, "depth": one.backbone.depth, "colors": one.meaning} for one in seen
    ]
    facts = {"kind": kind, "rows": rows, "columns": columns, "maps": shown}
    pictures = [write_png(one.picture, f"map_{key}.png") for key, one in zip("ab", seen)] + [None] * (2 - len(seen))
    return *pictures, features_file(image, view, seen), facts


def ask(
    models: Models, image: str | None, second_image: str | None, model: str, question: str, longest: int
) -> Iterator[tuple[str, list[dict], str]]:
    """Yield the answer so far, its boxes on the grid from 0 to 1000, and a summary of the boxes."""
    for answer, _ in replies(models, image, second_image, model, question, longest):
        boxes, wrong = read_boxes(answer)
        found = [{"phrase": box.phrase, "box": [box.left, box.top, box.right, box.bottom]} for box in boxes]
        yield answer, found, summary_of(boxes, wrong)


def apply(
    models: Models, image: str | None, second_image: str | None, fine_tuned: str, threshold: float, opacity: float
) -> tuple[Image.Image, dict, str]:
    """Return the result of a fine-tuned model as a picture and as JSON, and a note.

    The JSON has the objects above the threshold, the share of each class in the image, or the probability of each
    class.
    """
    found, note = found_by(models, image, second_image, fine_tuned)
    if found is None:
        raise message(note)
    return found.draw(threshold, opacity), found.facts(threshold), note
