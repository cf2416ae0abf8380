"""API of the Space for programs: the functions behind the tabs, with plain values.

The page itself uses private events, which return updates of its components.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import gradio as gr
from apply_tab import result_of
from ask_tab import replies, summary_of
from backbone_tab import features_file, resolution_slider
from compare_tab import corruptions, two_images
from computing import QUEUE, answering, message, write_png
from loading import Models
from maps import FROM_CLS, FROM_POINT, KINDS, NO_BACKBONE, PCA, View, look, selected_backbones
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

    def endpoint(api_name: str, function: Callable, outputs: list[gr.components.Component]) -> None:
        """Add a function, whose arguments after the models are `arguments` by their names."""
        handler = answering(partial(function, models), gpu=function is not kept_tokens)
        inputs = [arguments[name] for name in inspect.signature(handler).parameters if name in arguments]
        gr.Button(visible=False).click(
            handler,
            inputs,
            outputs,
            api_name=api_name,
            api_description=inspect.getdoc(function),
            **QUEUE,
        )

    with gr.Row(visible=False):
        arguments = _arguments_by_name(models)
        picture = gr.Image(label="Picture", format="png")
        second_picture = gr.Image(label="Second picture", format="png")
        table = gr.Dataframe(label="Table")
        text = gr.Textbox(label="Text")
        facts = gr.JSON(label="Facts")
        note = gr.Textbox(label="Note")
        endpoint("maps", maps, [picture, second_picture, gr.File(label="Features"), facts])
        endpoint("corruptions", corruptions, [table, note])
        endpoint("two_images", two_images, [picture, second_picture, facts, note])
        endpoint("visual_tokens", kept_tokens, [picture, second_picture, text, note])
        endpoint("drop_ratios", answers_at, [table, text])
        endpoint("saved", savings, [table, text])
        endpoint("ask", ask, [text, facts, note])
        endpoint("apply", apply, [picture, facts, note])


def _arguments_by_name(models: Models) -> dict[str, gr.components.Component]:
    """Create a component for each argument of the functions, by the name of the argument."""
    full_model = models.full_names[0] if models.full_names else models.default
    fine_tuned = models.fine_tuned_names[0] if models.fine_tuned_names else None
    return {
        "image": gr.File(label="Image"),
        "second_image": gr.File(label="Second image"),
        "backbone": gr.Textbox(models.default, label="Backbone"),
        "second_backbone": gr.Textbox(NO_BACKBONE, label="Second backbone"),
        "model": gr.Textbox(full_model, label="Full model"),
        "fine_tuned": gr.Textbox(fine_tuned, label="Fine-tuned model"),
        "question": gr.Textbox(QUESTION, label="Question"),
        "kind": gr.Radio(KINDS, value=PCA, label="Kind"),
        "layer": slider(minimum=0, maximum=200, value=0, step=1, label="Layer, 0 for the last"),
        "second_layer": slider(minimum=0, maximum=200, value=0, step=1, label="Second layer, 0 for the last"),
        "head": slider(minimum=0, maximum=200, value=0, step=1, label="Head, 0 for the mean"),
        "attention_of": gr.Radio([FROM_CLS, FROM_POINT], value=FROM_CLS, label="Attention of"),
        "x": slider(minimum=0, maximum=100, value=50, step=0.1, label="x"),
        "y": slider(minimum=0, maximum=100, value=50, step=0.1, label="y"),
        "resolution": resolution_slider(models.backbone().native, "api_resolution"),
        "drop_ratio": slider(minimum=0, maximum=0.99, value=0.75, step=0.01, label="Drop ratio"),
        "seed": slider(minimum=0, maximum=2**31 - 1, value=0, step=1, label="Seed"),
        "draws": slider(minimum=1, maximum=8, value=3, step=1, label="Draws"),
        "longest": slider(minimum=1, maximum=512, value=128, step=1, label="Longest answer, in tokens"),
        "threshold": slider(minimum=0, maximum=1, value=0.3, step=0.01, label="Threshold"),
        "opacity": slider(minimum=0, maximum=1, value=0.5, step=0.01, label="Opacity"),
    }


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
    view = View(
        kind=kind,
        layer=layer,
        second_layer=second_layer,
        head=head,
        source=attention_of,
        x=x,
        y=y,
        resolution=resolution,
    )
    *_, backbone_maps = look(models, image, selected_backbones(backbone, second_backbone), view)
    rows, columns = backbone_maps[0].features.shape[1:]
    files = []
    descriptions = []
    for key, backbone_map in zip("ab", backbone_maps):
        files.append(write_png(backbone_map.picture, f"map_{key}.png"))
        description = {
            "backbone": backbone_map.name,
            "layer": backbone_map.layer,
            "depth": backbone_map.backbone.depth,
            "colors": backbone_map.meaning,
        }
        descriptions.append(description)
    facts = {"kind": kind, "rows": rows, "columns": columns, "maps": descriptions}
    second_file = files[1] if len(files) > 1 else None
    return files[0], second_file, features_file(image, view, backbone_maps), facts


def ask(
    models: Models,
    image: str | None,
    second_image: str | None,
    model: str,
    question: str,
    longest: int,
) -> Iterator[tuple[str, list[dict], str]]:
    """Yield the answer so far, its boxes on the grid from 0 to 1000, and a summary of the boxes."""
    for answer, _ in replies(models, image, second_image, model, question, longest):
        boxes, invalid_boxes = read_boxes(answer)
        box_facts = []
        for box in boxes:
            box_facts.append({"phrase": box.phrase, "box": [box.left, box.top, box.right, box.bottom]})
        yield answer, box_facts, summary_of(boxes, invalid_boxes)


def apply(
    models: Models,
    image: str | None,
    second_image: str | None,
    fine_tuned: str,
    threshold: float,
    opacity: float,
) -> tuple[Image.Image, dict, str]:
    """Return the result of a fine-tuned model as a picture and as JSON, and a note.

    The JSON has the objects above the threshold, the share of each class in the image, or the probability of each
    class.
    """
    result, note = result_of(models, image, second_image, fine_tuned)
    if result is None:
        raise message(note)
    return result.draw(threshold, opacity), result.facts(threshold), note
