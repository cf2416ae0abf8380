"""The Ask tab: questions to the full model about one or two images."""

import html
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import gradio as gr
import limits
from answers import PROGRESS, QUESTION, check_length, draw_boxes, encode, stream_answer
from checking import UnavailableModel
from computing import PRIVATE, answering, turn, write_png
from loading import PACKED, FullModel, Models
from PIL import Image
from reading import Reading
from uploading import CROWNS, ImageInput, forget, image_input, image_upload, name_of, open_upload, picture_of
from url_state import Tab, slider

from modeling_vitp.instructions.boxes import GridBox, read_boxes

DISPLAY_SIDE = 800  # pixels
NOT_LEARNED = [
    "How many trees are in the top left quarter?",
    "Are there more than 8 trees?",
    "Is there a tree in the bottom right quarter?",
    "How dense is the forest?",
    "Where is the largest tree?",
    "Describe the image.",
]
"""Questions of the quickstart's training that the packed model, `PACKED`, answers no better than a constant does."""
QUICKSTART_NOTE = (
    "Measured on 132 images of unseen ground: the number of trees is wrong by 3.2 on average. Always saying 4, the "
    "median of the training ground, is wrong by 3.9, the answers to other images by 4.7, and 7, the best number in "
    "hindsight, by 3.2. Answers to questions marked *not learned* are no better than a constant."
)
OTHER_NOTE = "Questions of common training data. Which of them this model has learned was not measured."
PROMPTS = [
    "Describe the image.",
    QUESTION,
    "Is there a ship in the image?",
    "What kind of scene is this?",
    "Where is the largest tree?",
    "Give the boxes of all buildings.",
    "Locate <ref>the largest ship</ref>.",
    "What is at <box>[[250, 250, 750, 750]]</box>?",
    "Which imaging modality is this?",
    "What has changed between the two images?",
]


class Controls(NamedTuple):
    image: ImageInput
    question: gr.Textbox
    run_button: gr.Button
    stop_button: gr.Button
    second_image: gr.File
    longest: gr.Slider


class ResultViews(NamedTuple):
    """Views of the results, of which the first five are the outputs of the handlers."""

    conversation: gr.Chatbot
    picture: gr.Image
    second_picture: gr.Image
    boxes: gr.Textbox
    note: gr.Textbox
    examples: gr.Radio
    about_examples: gr.Markdown


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""
    gr.Markdown("Ask the whole model about an image. It does not see earlier questions and answers.")
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_classes="inputs"):
            controls = _build_controls()
        with gr.Column(scale=3, min_width=280, elem_classes="results"):
            views = _build_result_views(models)
    show, ask_model = _handlers(models)
    image = controls.image
    question = controls.question
    second_image = controls.second_image
    conversation = views.conversation
    examples = views.examples
    inputs = [model_name, second_image, question, conversation, controls.longest]
    inputs_of_example = [model_name, second_image, examples, conversation, controls.longest]
    outputs = [conversation, views.picture, views.second_picture, views.boxes, views.note]
    options = {"show_progress": "minimal", "show_progress_on": conversation}
    starts = [controls.run_button.click, question.submit]
    asking = image.on(starts, ask_model, inputs, outputs, **options)
    examples.input(None, examples, question, js="(question) => question", **PRIVATE)
    asking_example = image.on([examples.input], ask_model, inputs_of_example, outputs, **options)
    running = [asking, asking_example]
    controls.stop_button.click(None, cancels=running)
    changes = [*image.changes, second_image.upload, second_image.clear, second_image.delete, model_name.input]
    forget(changes, outputs, running)
    image.on(
        changes,
        show,
        [model_name, second_image],
        [*outputs, examples, views.about_examples],
        trigger_mode="always_last",
        show_progress="minimal",
        show_progress_on=views.picture,
    )
    state = {"ask_image": image.example, "q": question}
    if models.default not in models.full_names:
        return Tab(state)
    return Tab(state, [(*image.with_path(ask_model, inputs), outputs, [*changes, *starts, examples.input])])


def _build_controls() -> Controls:
    image = image_input("ask-image", CROWNS)
    question = gr.Textbox(
        QUESTION,
        label="Question",
        max_length=limits.QUESTION,
        submit_btn=False,
        elem_id="ask-question",
    )
    run_button = gr.Button("Ask", variant="primary", elem_id="ask-button", elem_classes="run")
    stop_button = gr.Button("Stop", size="sm", elem_id="ask-stop")
    with gr.Accordion("More settings", open=False, elem_classes="more"):
        second_image = image_upload("Second image, for a pair", elem_id="ask-second-image")
        longest = slider(minimum=8, maximum=512, value=128, step=8, label="Longest answer, in tokens")
    return Controls(
        image=image,
        question=question,
        run_button=run_button,
        stop_button=stop_button,
        second_image=second_image,
        longest=longest,
    )


def _build_result_views(models: Models) -> ResultViews:
    with gr.Row():
        with gr.Column(min_width=280):
            picture = picture_of("Image and boxes of the last answer", "ask-picture")
            second_picture = picture_of("Second image", "ask-second-picture", visible=False)
        with gr.Column(min_width=280):
            conversation = gr.Chatbot(
                label="Questions and answers",
                render_markdown=False,
                latex_delimiters=[],
                height=380,
                buttons=["copy"],
                elem_id="ask-conversation",
            )
    boxes = gr.Textbox(label="Boxes in the last answer", interactive=False, elem_id="ask-boxes")
    note = gr.Textbox(label="What was opened", interactive=False, elem_id="ask-note")
    choices, note_on_examples = examples_for(models, models.default)
    examples = gr.Radio(choices, label="Example questions, asked when you choose one", elem_id="ask-examples")
    return ResultViews(
        conversation=conversation,
        picture=picture,
        second_picture=second_picture,
        boxes=boxes,
        note=note,
        examples=examples,
        about_examples=gr.Markdown(note_on_examples),
    )


def _handlers(models: Models) -> tuple[Callable, Callable]:
    """Return the handlers `show` and `ask_model`."""

    @answering(gpu=False)
    def show(path, model, second_path):
        """Return the images without an answer, a note on the files, and the example questions of the model."""
        choices, note_on_examples = examples_for(models, model)
        try:
            readings = open_images(models.full(model), path, second_path)
            note = note_of(readings) or "No image is selected."
        except UnavailableModel as error:
            readings = {}
            note = str(error)
        return [], *pictures_of(readings, []), "", note, gr.Radio(choices, value=None), note_on_examples

    @answering
    def ask_model(path, model, second_path, question, conversation, longest, progress=PROGRESS):
        """Yield the answer so far below the earlier questions and answers, then the images with its boxes."""
        asked_conversation = [*conversation, turn_of("user", question or "")]
        stream = replies(models, path, second_path, model, question, longest, progress)
        answer, readings = next(stream)
        for answer, _ in stream:
            yield [*asked_conversation, turn_of("assistant", answer)], *(gr.skip(),) * 4
        boxes, invalid_boxes = read_boxes(answer)
        answered_conversation = [*asked_conversation, turn_of("assistant", answer.strip() or "(no answer)")]
        pictures = pictures_of(readings, boxes)
        yield answered_conversation, *pictures, summary_of(boxes, invalid_boxes), note_of(readings)

    return show, ask_model


def examples_for(models: Models, model: str) -> tuple[list, str]:
    """Return the example questions for a model, marked if it has not learned them, and a note about them."""
    if models.source(model) != str(PACKED):  # the user's own quickstart was not measured
        return PROMPTS, OTHER_NOTE
    choices = [QUESTION]
    for question in NOT_LEARNED:
        choices.append((f"not learned: {question}", question))
    return choices, QUICKSTART_NOTE


def open_images(full: FullModel, *paths: str | None) -> dict[str, Reading]:
    """Open the images whose path is not `None` and return them by path."""
    spec = full.processor.image_processor.input_spec
    return {path: open_upload(path, input_spec=spec) for path in paths if path is not None}


def note_of(readings: dict[str, Reading]) -> str:
    return "\n".join(f"{name_of(path)}: {reading.note}" for path, reading in readings.items())


def replies(
    models: Models,
    image: str | None,
    second_image: str | None,
    model: str,
    question: str,
    longest: int,
    progress: gr.Progress = PROGRESS,
) -> Iterator[tuple[str, dict[str, Reading]]]:
    """Yield the answer to a question so far, beginning with an empty one, and the images by their path.

    Raises:
        ValueError: if no image is given, or the question is empty or too long.
    """
    full = models.full(model)
    readings = open_images(full, image, second_image)
    if not readings:
        raise ValueError("No image is selected. Drop, choose or paste an image.")
    images = [reading.to_rgb() for reading in readings.values()]
    inputs = encode(full.processor, images, question or "")
    check_length(full.model, inputs, longest)
    yield "", readings
    with turn(progress):
        for answer in stream_answer(full.model, full.processor, inputs, longest):
            yield answer, readings


def turn_of(role: str, text: str) -> dict[str, str]:
    """Return a message for a `gr.Chatbot`, which renders HTML even without Markdown."""
    return {"role": role, "content": html.escape(text, quote=False)}


def pictures_of(readings: dict[str, Reading], boxes: list[GridBox]) -> list[gr.Image]:
    """Return updates of the two pictures with the boxes drawn, enlarged if they are small, to make labels readable."""
    updates = [gr.Image(None, visible=True), gr.Image(None, visible=False)]
    for index, reading in enumerate(readings.values()):
        image = reading.to_rgb()
        scale = max(1, round(DISPLAY_SIDE / max(image.size)))
        large_size = (scale * image.width, scale * image.height)
        large_image = image.resize(large_size, Image.Resampling.BICUBIC)
        file = write_png(draw_boxes(large_image, boxes), "boxes.png")
        updates[index] = gr.Image(file, visible=True)
    return updates


def summary_of(boxes: list[GridBox], invalid_boxes: list[str]) -> str:
    """Summarize the number of boxes of each phrase and the invalid boxes."""
    counts = Counter(box.phrase or "without a phrase" for box in boxes)
    lines = [f"{count} × {phrase}" for phrase, count in counts.items()]
    if invalid_boxes:
        lines.append(f"invalid (outside the grid from 0 to 1000, or empty): {', '.join(invalid_boxes)}")
    return "; ".join(lines) or "None."
