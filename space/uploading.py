"""The upload of an image and the example images, the same in every tab."""

import base64
import functools
import inspect
import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import limits
import numpy as np
import PIL.Image
import PIL.ImageOps
from adjusting import Adjustment, is_volume, read_slice
from bands import rgb_bands
from computing import PRIVATE, message, told
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from headers import check_header
from pydicom.data import get_testdata_file
from reading import Reading, read_image

HERE = Path(__file__).parent
CROWNS = "Tree crowns"
EXAMPLES = {
    CROWNS: HERE / "examples" / "tree_crowns.jpg",
    "Trees, Yellowstone": HERE / "examples" / "trees_yellowstone.jpg",
    "Trees, Florida": HERE / "examples" / "trees_florida.jpg",
    "CT slice": Path(get_testdata_file("CT_small.dcm", download=False)),
}


@dataclass(frozen=True)
class ImageInput:
    """Where an image comes from: an upload or an example, of which the page empties the other when one is given."""

    upload: gr.File
    example: gr.Radio

    @property
    def changes(self) -> list[Callable]:
        """The events after which there is another image, or none."""
        return [self.upload.upload, self.upload.clear, self.upload.delete, self.example.input]

    def on(
        self, triggers: Sequence[Callable], handler: Callable, inputs: Sequence[Any], outputs: Sequence[Any], **options
    ) -> gr.events.Dependency:
        """Calls a handler at these events, with the path of the image that there is at that moment, and the inputs.

        Args:
            handler: marked with [`computing.answering`]; its first argument is the path, `None` without an image.
        """
        return gr.on(triggers, *self.given(handler, inputs), outputs, **PRIVATE, **options)

    def given(self, handler: Callable, inputs: Sequence[Any]) -> tuple[Callable, list]:
        """The handler as the page calls it, and its inputs in the page."""
        first, *others = inspect.signature(handler).parameters.values()

        @functools.wraps(handler)
        async def answer(upload: str | None, example: str | None, *arguments) -> AsyncIterator:
            async for found in handler(example_path(example) if example in EXAMPLES else upload, *arguments):
                yield found

        example = inspect.Parameter("example", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        answer.__signature__ = inspect.Signature([first, example, *others])  # where Gradio puts progress and events
        return answer, [self.upload, self.example, *inputs]


def thumbnails() -> str:
    """CSS by which the choice of each example shows a small picture of it."""
    rules = []
    for name in EXAMPLES:
        small = open_upload(str(EXAMPLES[name]), 128).to_rgb()
        buffer = io.BytesIO()
        PIL.ImageOps.fit(small, (48, 48)).save(buffer, "JPEG", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        rules.append(
            f'label[data-testid="{name}-radio-label"]::before {{ content: ""; width: 40px; height: 40px; '
            f"margin-right: 6px; border-radius: 4px; background: url(data:image/jpeg;base64,{data}) center / cover; }}"
        )
    return "\n".join(rules)


def image_upload(label: str = "Image", elem_id: str | None = None) -> gr.File:
    """A place to drop, choose or paste an image file of any kind that [`reading.read_image`] opens.

    It gives the path of the upload; Gradio refuses paths that are no uploads.
    """
    return gr.File(label=f"{label}: drop or paste", height=140, elem_id=elem_id, elem_classes="image-upload")


def image_input(elem_id: str, value: str | None = None) -> ImageInput:
    """An upload with example images as a choice below.

    Args:
        value: the name of the example that is there at first.
    """
    upload = image_upload(elem_id=elem_id)
    example = gr.Radio(list(EXAMPLES), value=value, label="… or an example")
    gr.on([upload.upload, upload.clear, upload.delete], None, None, example, js="() => null", **PRIVATE)
    example.input(None, None, upload, js="() => null", **PRIVATE)
    return ImageInput(upload, example)


def example_path(name: str) -> str:
    """The file of an example, where uploads are."""
    return save_file_to_cache(EXAMPLES[name], get_upload_folder())


def name_of(path: str) -> str:
    """What an image is called in a result."""
    return next((name for name, example in EXAMPLES.items() if example.name == Path(path).name), Path(path).name)


def forget(triggers: Sequence[Callable], outputs: Sequence[Any], values: Sequence[Any], cancels: Sequence = ()) -> None:
    """What was found in another image, or by another model, is no longer shown; the page does so by itself.

    To be called before what these events start: the page runs what one event starts one after another, to its end.

    Args:
        triggers: events of the inputs of a result.
        outputs: the components that show it.
        values: what these show without a result.
        cancels: the events that are on their way to it.
    """
    if cancels:
        gr.on(triggers, None, None, None, cancels=list(cancels), **PRIVATE)
    gr.on(triggers, None, None, list(outputs), js=f"() => {json.dumps(list(values))}", **PRIVATE)


def open_upload(
    path: str | None,
    max_side: int = 2048,
    input_spec: dict | None = None,
    adjustment: Adjustment = Adjustment(),  # noqa: B008
) -> Reading:
    """The image of an upload.

    Args:
        input_spec: of the model that will see it; for images that are not 8-bit, such as CT or 16-bit GeoTIFF.
        adjustment: what the visitor wants otherwise.

    Raises:
        gradio.Error: a message in the page if there is no upload, or it is no image that can be opened.
    """
    if path is None:
        raise message("There is no image yet: drop, choose or paste one.")
    with told():
        check_header(Path(path))
        if is_volume(path):
            return read_slice(Path(path), max_side, adjustment, input_spec)
        bands = (input_spec or {}).get("band_names")
        if bands:
            max_side = min(max_side, int((limits.BAND_VALUES / len(bands)) ** 0.5))
        read = functools.partial(read_image, path, max_side, position=adjustment.position, window=adjustment.window)
        if bands:
            return read(adjustment.spec(input_spec))
        bands = rgb_bands(path)
        named = bands and {"bands": bands}
        reading = read(named)
        is_deep = not isinstance(reading.image, PIL.Image.Image)
        if adjustment.changes_values or (input_spec and is_deep):
            spec = adjustment.spec(input_spec if is_deep else None)
            reading = read({**(named or {}), **(spec or {})})
        return reading


def open_pixels(
    path: str | None,
    max_side: int = 2048,
    input_spec: dict | None = None,
    adjustment: Adjustment = Adjustment(),  # noqa: B008
) -> tuple[np.ndarray, str]:
    """As [`open_upload`]: the image as a model takes it, and the note of how it was read, which begins with its name.

    It is uint8 RGB of shape `(height, width, 3)`; for a model of other bands float32 of shape `(height, width, bands)`
    in [0, 1].
    """
    reading = open_upload(path, max_side, input_spec, adjustment)
    with told():
        return reading.pixels().movedim(0, -1).contiguous().numpy(), f"{name_of(path)}: {reading.note}"
