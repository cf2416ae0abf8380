"""API of the Space for programs: one function for each task of the tabs, with plain values.

The page itself uses private events, which return updates of its components.
"""

from collections.abc import Iterator
from typing import Any

import gradio as gr
from about import about
from applied import Labels, Objects
from apply_tab import drawn, found_by
from ask_tab import replies, summary_of
from backbone_tab import features_file, view_of
from compare_tab import corruptions, pair_maps, table_of
from computing import QUEUE, answering
from finding import finding
from loading import Models
from saving import write_png
from views import FROM_CLS, FROM_POINT, KINDS, MAX_RESOLUTION, MIN_RESOLUTION, NO_BACKBONE, PCA, chosen, look
from vrl_results import QUESTION, answers, kept_tokens, saved_by
from vrl_results import table_of as table_of_answers

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

    @answering
    def maps(
        image: str | None,
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
    ) -> tuple[str, str | None, str, dict]:
        """Return the maps of one or two backbones, features and maps as NPZ, and a description of the pictures."""
        path, layers = needed(image), (int(layer) or None, int(second_layer) or None)
        view = view_of(kind, *layers, head, attention_of, x, y, resolution)
        *_, seen = look(models, path, chosen(backbone, second_backbone), view)
        rows, columns = seen[0].features.shape[1:]
        shown = [{"backbone": one.name, "layer": one.layer, "depth": one.depth, "colors": one.meaning} for one in seen]
        facts = {"kind": kind, "rows": rows, "columns": columns, "maps": shown, "finding": finding(path, kind, seen)}
        pictures = [write_png(one.picture, f"map_{key}.png") for key, one in zip("ab", seen)] + [None] * (2 - len(seen))
        return *pictures, features_file(path, view, seen), facts

    @answering
    def compare_corruptions(
        image: str | None, backbone: str, second_backbone: str, resolution: float, seed: float
    ) -> tuple[Any, str]:
        """Return the feature similarity under each corruption and severity as a table, and a note."""
        *_, (results, note) = corruptions(models, needed(image), seed, backbone, second_backbone, resolution)
        return table_of(results), note

    @answering
    def two_images(
        image: str | None, second_image: str | None, backbone: str, second_backbone: str, resolution: float
    ) -> tuple[str, str | None, list[dict]]:
        """Return a similarity map of two images of one place for each backbone, and the mean similarities."""
        found, _ = pair_maps(models, needed(image), needed(second_image), backbone, second_backbone, resolution)
        pictures = [write_png(one[0], f"similarity_{key}.png") for key, one in zip("ab", found)]
        facts = [{"backbone": name, "mean": float(values.mean())} for _, name, _, values in found]
        return *pictures, *[None] * (2 - len(pictures)), facts

    @answering
    def visual_tokens(
        image: str | None, model: str, drop_ratio: float, seed: float
    ) -> tuple[str, str | None, str, str]:
        """Return image and thumbnail, with dropped visual tokens darkened, the number of kept tokens, and a note."""
        tiles, thumbnail, summary, note = kept_tokens(models, needed(image), model, drop_ratio, seed)
        return (
            write_png(tiles, "tiles.png"),
            write_png(thumbnail, "thumbnail.png") if thumbnail else None,
            summary,
            note,
        )

    @answering
    def drop_ratios(
        image: str | None, model: str, question: str, seed: float, draws: float
    ) -> Iterator[tuple[Any, str]]:
        """Yield a table of the answers at growing drop ratios, and the answer with all visual tokens."""
        for found, _, _ in answers(models, needed(image), model, question, seed, draws):
            yield table_of_answers(found), found[0].text

    @answering
    def saved_time(image: str | None, model: str, question: str, drop_ratio: float, seed: float) -> tuple[Any, str]:
        """Return the cost with and without dropped tokens as a table, and a summary."""
        return saved_by(models, needed(image), model, question, drop_ratio, seed)

    @answering
    def ask(
        image: str | None, second_image: str | None, model: str, question: str, longest: float
    ) -> Iterator[tuple[str, list[dict], str]]:
        """Yield the answer so far, its boxes on the grid from 0 to 1000, and a summary of the boxes."""
        messages = [{"role": "user", "content": question or ""}]
        for answer, _ in replies(models, model, [image, second_image], messages, int(longest)):
            boxes, wrong = read_boxes(answer)
            found = [{"phrase": box.phrase, "box": [box.left, box.top, box.right, box.bottom]} for box in boxes]
            yield answer, found, summary_of(boxes, wrong)

    @answering
    def apply(
        image: str | None, second_image: str | None, model: str, threshold: float, opacity: float
    ) -> tuple[str, dict, str]:
        """Return the result of a fine-tuned model as a picture and as JSON, and a note."""
        found, note = found_by(models, needed(image), second_image, model)
        picture, _ = drawn(found, threshold, opacity)
        return write_png(picture, "found.png"), facts_of(found, threshold), note

    @answering
    def about_model(model: str) -> str:
        """Return a description of a model in Markdown."""
        return about(models, model)

    def endpoint(handler, inputs: list, outputs: list, name: str) -> None:
        gr.Button(visible=False).click(handler, inputs, outputs, api_name=name, **QUEUE)

    with gr.Row(visible=False):
        full = models.full_names[0] if models.full_names else models.default
        fine_tuned = models.fine_tuned_names[0] if models.fine_tuned_names else None

        def named(label: str, value: str | None) -> gr.Textbox:
            return gr.Textbox(value, label=label)

        def number(label: str, low: float, high: float, value: float, step: float = 1) -> gr.Slider:
            return gr.Slider(low, high, value, step=step, label=label)

        image, second_image = gr.File(label="Image"), gr.File(label="Second image")
        backbone, second = named("Backbone", models.default), named("Second backbone", NO_BACKBONE)
        model, question = named("Model", full), named("Question", QUESTION)
        seed = number("Seed", 0, 2**31 - 1, 0)
        resolution = number("Resolution", MIN_RESOLUTION, MAX_RESOLUTION, min(models.backbone().native, MAX_RESOLUTION))
        settings = [
            gr.Radio(KINDS, value=PCA, label="Kind"),
            number("Layer, 0 for the last", 0, 200, 0),
            number("Second layer, 0 for the last", 0, 200, 0),
            number("Head, 0 for the mean", 0, 200, 0),
            gr.Radio([FROM_CLS, FROM_POINT], value=FROM_CLS, label="Attention of"),
            number("x", 0, 100, 50, 0.1),
            number("y", 0, 100, 50, 0.1),
        ]
        drop_ratio = number("Drop ratio", 0, 0.99, 0.75, 0.01)
        score, opacity = number("Threshold", 0, 1, 0.3, 0.01), number("Opacity", 0, 1, 0.5, 0.01)

        def files(count: int) -> list[gr.File]:
            return [gr.File(label=label) for label in ("Picture", "Second picture", "Features")[:count]]

        def table() -> gr.Dataframe:
            return gr.Dataframe(label="Table")

        text, facts = gr.Textbox(label="Text"), gr.JSON(label="Facts")
        endpoint(maps, [image, backbone, second, *settings, resolution], [*files(3), facts], "maps")
        endpoint(compare_corruptions, [image, backbone, second, resolution, seed], [table(), text], "corruptions")
        endpoint(two_images, [image, second_image, backbone, second, resolution], [*files(2), facts], "two_images")
        endpoint(
            visual_tokens,
            [image, model, drop_ratio, seed],
            [*files(2), text, gr.Textbox(label="Note")],
            "visual_tokens",
        )
        endpoint(drop_ratios, [image, model, question, seed, number("Draws", 1, 8, 3)], [table(), text], "drop_ratios")
        endpoint(saved_time, [image, model, question, drop_ratio, seed], [table(), text], "saved")
        longest = number("Longest answer, in tokens", 1, 512, 128)
        words = gr.Textbox(label="Boxes in words")
        endpoint(ask, [image, second_image, model, question, longest], [text, facts, words], "ask")
        applied = [image, second_image, named("Fine-tuned model", fine_tuned), score, opacity]
        endpoint(apply, applied, [*files(1), facts, text], "apply")
        endpoint(about_model, [named("Model", models.default)], [text], "about")


def needed(path: str | None) -> str:
    if path is None:
        raise ValueError("No image was passed. Pass an image with handle_file.")
    return path


def facts_of(found: Any, threshold: float) -> dict:
    """Convert the result of a fine-tuned model to JSON.

    A detector's result has the objects above a score, with corners in pixels of the picture, whose width and height are
    given. Other results have the share of each class in the image, or the probability of each class.
    """
    if isinstance(found, Objects):
        shown = [index for index, score in enumerate(found.scores) if score > threshold]
        objects = [
            {
                "class": found.names[found.labels[index]],
                "score": float(found.scores[index]),
                "corners": found.corners[index].tolist(),
            }
            for index in shown
        ]
        height, width = found.image.shape[:2]
        return {"width": width, "height": height, "objects": objects}
    if isinstance(found, Labels):
        return {"probabilities": dict(zip(found.names, found.probabilities.tolist()))}
    return {"shares": {name: float((found.labels == index).mean()) for index, name in enumerate(found.names)}}
