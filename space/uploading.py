"""The upload of an image and the example images, the same in every tab."""

from pathlib import Path

import gradio as gr
import numpy as np
import PIL.Image
from computing import PRIVATE, message, told
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from pydicom.data import get_testdata_file
from reading import Reading, read_image

HERE = Path(__file__).parent
EXAMPLES = {
    "Trees, Yellowstone": HERE / "examples" / "trees_yellowstone.jpg",
    "Trees, Florida": HERE / "examples" / "trees_florida.jpg",
    "CT slice": Path(get_testdata_file("CT_small.dcm", download=False)),
}


def image_upload(label: str = "Image", elem_id: str | None = None) -> gr.File:
    """A place to drop, choose or paste an image file of any kind that [`reading.read_image`] opens.

    It gives the path of the upload; Gradio refuses paths that are no uploads.
    """
    return gr.File(label=f"{label}: drop, choose or paste", height=140, elem_id=elem_id, elem_classes="image-upload")


def example_choice(upload: gr.File) -> gr.Radio:
    """Example images as a choice that fills the upload; one's own upload takes the choice back."""
    choice = gr.Radio(list(EXAMPLES), label="… or an example")

    def fill(name: str | None) -> str | None:
        return save_file_to_cache(EXAMPLES[name], get_upload_folder()) if name in EXAMPLES else gr.skip()

    choice.change(fill, choice, upload, show_progress="hidden", **PRIVATE)
    upload.upload(lambda: None, None, choice, **PRIVATE)
    return choice


def open_upload(path: str | None, max_side: int = 2048, input_spec: dict | None = None) -> Reading:
    """The image of an upload.

    Args:
        input_spec: of the model that will see it; for images that are not 8-bit, such as CT or 16-bit GeoTIFF.

    Raises:
        gradio.Error: a message in the page if there is no upload, or it is no image that can be opened.
    """
    if path is None:
        raise message("There is no image yet: drop, choose or paste one.")
    with told():
        reading = read_image(path, max_side)
        if input_spec and not isinstance(reading.image, PIL.Image.Image):
            reading = read_image(path, max_side, input_spec)
        return reading


def open_rgb(path: str | None, max_side: int = 2048, input_spec: dict | None = None) -> tuple[np.ndarray, str]:
    """As [`open_upload`]: the image in uint8 RGB, of shape `(height, width, 3)`, and the note of how it was read."""
    reading = open_upload(path, max_side, input_spec)
    with told():
        return np.asarray(reading.to_rgb()), reading.note
