"""Components that all tabs share: image uploads with examples, and pictures of results."""

import base64
import filecmp
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
from checking import check_header
from computing import PRIVATE, QUEUE, errors_as_messages, message
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from pydicom.data import get_testdata_file
from reading import UNADJUSTED, Adjustment, Reading, read_image

HERE = Path(__file__).parent
CROWNS = "Tree crowns"
EXAMPLES = {
    CROWNS: HERE / "examples" / "tree_crowns.jpg",
    "Trees, Yellowstone": HERE / "examples" / "trees_yellowstone.jpg",
    "Trees, Florida": HERE / "examples" / "trees_florida.jpg",
    "CT slice": Path(get_testdata_file("CT_small.dcm", download=False)),
}
KINDS = "Photographs, GeoTIFF, JPEG 2000, DICOM and NIfTI can be opened."


@dataclass(frozen=True)
class ImageInput:
    """Upload and example selector of an image. Setting one clears the other in the page."""

    upload: gr.File
    example: gr.Radio

    @property
    def changes(self) -> list[Callable]:
        """Events after which the image has changed or was removed."""
        return [self.upload.upload, self.upload.clear, self.upload.delete, self.example.input]

    def on(
        self,
        triggers: Sequence[Callable],
        handler: Callable,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        **options,
    ) -> gr.events.Dependency:
        """Call a handler, decorated with [`computing.answering`], with the path of the image (or `None`) and inputs."""
        handler_of_upload, all_inputs = self.with_path(handler, inputs)
        return gr.on(
            triggers,
            handler_of_upload,
            all_inputs,
            outputs,
            **PRIVATE,
            **QUEUE,
            **options,
        )

    def with_path(self, handler: Callable, inputs: Sequence[Any]) -> tuple[Callable, list]:
        """Return the handler, wrapped to take upload and example in place of the path, and its inputs."""
        path_parameter, *other_parameters = inspect.signature(handler).parameters.values()

        @functools.wraps(handler)
        async def answer(upload: str | None, example: str | None, *arguments) -> AsyncIterator:
            path = selected_path(upload, example)
            async for result in handler(path, *arguments):
                yield result

        example_parameter = inspect.Parameter("example", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        # Gradio reads the signature to pass progress and events.
        answer.__signature__ = inspect.Signature([path_parameter, example_parameter, *other_parameters])
        return answer, [self.upload, self.example, *inputs]


def thumbnails() -> str:
    """Return CSS that shows a thumbnail beside each example."""
    rules = []
    for name, path in EXAMPLES.items():
        small = open_upload(str(path), 128).to_rgb()
        buffer = io.BytesIO()
        PIL.ImageOps.fit(small, (48, 48)).save(buffer, "JPEG", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        rules.append(
            f'label[data-testid="{name}-radio-label"]::before {{ content: ""; width: 40px; height: 40px; '
            f"margin-right: 6px; border-radius: 4px; background: url(data:image/jpeg;base64,{data}) center / cover; }}"
        )
    return "\n".join(rules)


def image_upload(label: str, elem_id: str) -> gr.File:
    """Create an upload, whose value is the path of the file. Gradio refuses paths of other files."""
    return gr.File(label=f"{label}: drop or paste", height=140, elem_id=elem_id, elem_classes="image-upload")


def image_input(elem_id: str, value: str, label: str = "Image") -> ImageInput:
    """Create an upload with a selector of example images, of which `value` is selected at first."""
    upload = image_upload(label, elem_id)
    example = gr.Radio(
        list(EXAMPLES),
        value=value,
        label="… or an example",
        info=KINDS,
        elem_classes="examples",
    )
    gr.on(
        [upload.upload, upload.clear, upload.delete],
        None,
        None,
        example,
        js="() => null",
        **PRIVATE,
    )
    example.input(None, None, upload, js="() => null", **PRIVATE)
    return ImageInput(upload, example)


def selected_path(upload: str | None, example: str | None) -> str | None:
    """Return the path of the image that is selected with an [`ImageInput`]."""
    return example_path(example) if example in EXAMPLES else upload


def example_path(name: str) -> str:
    """Copy an example to the folder of uploads and return its path."""
    return save_file_to_cache(EXAMPLES[name], get_upload_folder())


def name_of(path: str) -> str:
    """Return the name of the example that the file is a copy of, otherwise the file name."""
    file_name = Path(path).name
    for example_name, example in EXAMPLES.items():
        if example.name == file_name and Path(path).is_file() and filecmp.cmp(path, example, shallow=False):
            return example_name
    return file_name


def picture_of(
    label: str,
    elem_id: str,
    alt_text: str | None = None,
    **options,
) -> gr.Image:
    """Create the picture of a result."""
    settings = {"elem_classes": "found", "min_width": 240, **options}
    return gr.Image(
        label=label,
        elem_id=elem_id,
        alt_text=alt_text or label,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        **settings,
    )


def forget(triggers: Sequence[Callable], outputs: Sequence[Any], cancels: Sequence = ()) -> None:
    """Reset results in the page to their initial values at these events, and cancel running events.

    Call this function before registering handlers of the same events, because the page runs them in this order.
    """
    if cancels:
        gr.on(triggers, None, None, None, cancels=list(cancels), **PRIVATE)
    values = json.dumps([output.value for output in outputs])
    gr.on(triggers, None, None, list(outputs), js=f"() => {values}", **PRIVATE)


def open_upload(
    path: str | None,
    max_side: int = limits.SIDE,
    input_spec: dict | None = None,
    adjustment: Adjustment = UNADJUSTED,
) -> Reading:
    """Open an uploaded image.

    Args:
        input_spec: input spec of the model, for images that are not 8-bit, such as CT or 16-bit GeoTIFF.
        adjustment: settings of the visitor, which take precedence.

    Raises:
        gradio.Error: if the upload is missing or cannot be opened.
    """
    if path is None:
        raise message("No image is selected. Drop, choose or paste an image.")
    with errors_as_messages():
        check_header(Path(path))
        band_names = None if input_spec is None else input_spec.get("band_names")
        if band_names:
            max_side = min(max_side, int((limits.BAND_VALUES / len(band_names)) ** 0.5))
        read = functools.partial(
            read_image,
            path,
            max_side,
            position=adjustment.position,
            window=adjustment.window,
        )
        if band_names:
            return read(adjustment.spec(input_spec))
        reading = read()
        is_8_bit = isinstance(reading.image, PIL.Image.Image)
        spec = adjustment.spec(None if is_8_bit else input_spec)
        return read(spec) if spec else reading


def open_pixels(
    path: str | None,
    max_side: int = limits.SIDE,
    input_spec: dict | None = None,
    adjustment: Adjustment = UNADJUSTED,
) -> tuple[np.ndarray, str]:
    """Open an uploaded image as pixels and return them with a note that begins with the name of the image.

    The arguments are those of [`open_upload`]. The pixels are uint8 RGB of shape `(height, width, 3)`, or float32 of
    shape `(height, width, bands)` in [0, 1] for a model with other bands.
    """
    reading = open_upload(path, max_side, input_spec, adjustment)
    with errors_as_messages():
        pixels = reading.pixels().movedim(0, -1).contiguous().numpy()
    return pixels, f"{name_of(path)}: {reading.note}"
