"""The upload of an image, the same in every tab."""

import gradio as gr
from computing import message
from reading import Reading, UnreadableImage, read_image


def image_upload(label: str = "Image", elem_id: str | None = None) -> gr.File:
    """A place to drop, choose or paste an image file of any kind that [`reading.read_image`] opens.

    It gives the path of the upload; Gradio refuses paths that are no uploads.
    """
    return gr.File(label=f"{label}: drop, choose or paste (JPEG, PNG, TIFF, DICOM …)", height=140, elem_id=elem_id)


def open_upload(path: str | None, max_side: int = 2048) -> Reading:
    """The image of an upload.

    Raises:
        gradio.Error: a message in the page if there is no upload, or it is no image that can be opened.
    """
    if path is None:
        raise message("There is no image yet: drop, choose or paste one.")
    try:
        return read_image(path, max_side)
    except UnreadableImage as error:
        raise message(error) from error
