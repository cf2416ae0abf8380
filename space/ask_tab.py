"""The Ask tab: questions to the full model about one or two images."""

import html
from collections import Counter
from collections.abc import Iterator

import gradio as gr
from answers import MAX_QUESTION, check_length, encode, stream_answer
from boxes import draw_boxes
from computing import QUEUE, answering, turn
from loading import Models
from opened import FullModel
from PIL import Image, ImageOps
from reading import Reading
from saving import write_png
from uploading import forget, image_input, image_upload, name_of, open_upload
from url_state import Tab, slider

from modeling_vitp.instructions.boxes import GridBox, read_boxes

DISPLAY_SIDE = 800  # pixels
PROMPTS = {
    "Caption": "Describe the image.",
    "Counting": "How many trees are there?",
    "Presence": "Is there a ship in the image?",
    "Scene": "What kind of scene is this?",
    "Grounding": "Where is the largest tree?",
    "All of a class": "Give the boxes of all buildings.",
    "Referring": "Locate <ref>the largest ship</ref>.",
    "Region": "What is at <box>[[250, 250, 750, 750]]</box>?",
    "Medical": "Which imaging modality is this?",
    "Change": "What has changed between the two images?",
}


def build_tab(models: Models, model_name: gr.Dropdown) -> Tab:
    """Build the tab, see `app.py`."""

    @answering
    def show(path: str | None, model: str, second_path: str | None) -> tuple:
        has_images = path is not None or second_path is not None
        readings = read(models.full(model), path, second_path) if has_images else {}
        notes = "\n".join(f"{name_of(one)}: {reading.note}" for one, reading in readings.items())
        return *pictures_of([reading.to_rgb() for reading in readings.values()], []), notes, [], [], ""

    @answering
    def ask_model(
        path: str | None,
        model: str,
        second_path: str | None,
        question: str,
        said: list[dict[str, str]],
        max_new_tokens: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple]:
        messages = [*said, {"role": "user", "content": question or ""}]
        unchanged = (gr.skip(), gr.skip(), gr.skip())
        answer, pictures = "", []
        for answer, pictures[:] in replies(models, model, [path, second_path], messages, int(max_new_tokens), progress):
            so_far = [*messages, {"role": "assistant", "content": answer}] if answer else messages
            yield so_far, shown(so_far), gr.skip() if answer else "", *unchanged
        messages.append({"role": "assistant", "content": answer.strip() or "(no answer)"})
        boxes, wrong = read_boxes(answer)
        yield messages, shown(messages), gr.skip(), *pictures_of(pictures, boxes), summary_of(boxes, wrong)

    said = gr.State([])
    with gr.Row():
        with gr.Column(min_width=280, elem_classes="inputs"):
            image = image_input("ask-image")
            second = image_upload("Second image, for a pair", elem_id="ask-second-image")
            note = gr.Textbox(label="What was opened", interactive=False, lines=1, max_lines=2)
        with gr.Column(min_width=280, elem_classes="results"):
            picture = gr.Image(
                label="Image and boxes of the last answer",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="ask-picture",
                alt_text="The image, with the boxes of the last answer and their labels.",
            )
            pair = gr.ImageSlider(
                label="Swipe: first and second image",
                format="png",
                interactive=False,
                visible=False,
                elem_id="ask-pair",
            )
            found = gr.Textbox(label="Boxes in the last answer", interactive=False, elem_id="ask-boxes")
        with gr.Column(scale=2, min_width=280, elem_classes="results"):
            conversation = gr.Chatbot(
                label="Conversation",
                render_markdown=False,
                latex_delimiters=[],
                height=420,
                buttons=["copy"],
                elem_id="ask-conversation",
            )
            question = gr.Textbox(
                label="Question",
                placeholder="Ask about the image, or choose an example below",
                lines=1,
                max_length=MAX_QUESTION,
                submit_btn=False,
                elem_id="ask-question",
            )
            with gr.Row():
                ask_button = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask-button")
                stop = gr.Button("Stop", variant="stop", min_width=80, elem_id="ask-stop")
                clear = gr.Button("Start over", min_width=80)
            gr.Examples(
                [[prompt] for prompt in PROMPTS.values()],
                [question],
                example_labels=[f"{task}: {prompt}" for task, prompt in PROMPTS.items()],
                label="Example questions by task",
                examples_per_page=len(PROMPTS),
            )
            max_new_tokens = slider(8, 512, value=128, step=8, label="Longest answer, in tokens")

    asked = image.on(
        [ask_button.click, question.submit],
        ask_model,
        [model_name, second, question, said, max_new_tokens],
        [said, conversation, question, picture, pair, found],
        show_progress="minimal",
        show_progress_on=conversation,
        **QUEUE,
    )
    stop.click(None, cancels=[asked])
    changes = [*image.changes, second.upload, second.clear, second.delete, model_name.input]
    forget(changes, [picture, pair, note, conversation, found], [None, None, "", [], ""])
    outputs = [picture, pair, note, said, conversation, found]
    image.on(
        [*changes, clear.click, conversation.clear],
        show,
        [model_name, second],
        outputs,
        cancels=[asked],
        trigger_mode="always_last",
        show_progress_on=picture,
        **QUEUE,
    )
    state = {"ask_image": image.example, "q": question}
    return Tab(state, [(*image.with_path(show, [model_name, second]), outputs)])


def read(full: FullModel, *paths: str | None) -> dict[str, Reading]:
    """Open the images whose path is not `None` and return them by path."""
    spec = full.processor.image_processor.input_spec
    return {path: open_upload(path, input_spec=spec) for path in paths if path is not None}


def replies(
    models: Models,
    model: str,
    paths: list[str | None],
    messages: list[dict[str, str]],
    max_new_tokens: int,
    progress: gr.Progress | None = None,
) -> Iterator[tuple[str, list[Image.Image]]]:
    """Yield the answer to the last message so far, beginning with an empty one, and its images.

    Raises:
        ValueError: if no image is given, or the question is empty or too long.
    """
    full = models.full(model)
    images = [reading.to_rgb() for reading in read(full, *paths).values()]
    if not images:
        raise ValueError("No image is selected. Drop, choose or paste an image.")
    inputs = encode(full.processor, images, messages)
    check_length(full.model, inputs, max_new_tokens)
    yield "", images
    with turn(progress):
        for answer in stream_answer(full.model, full.processor, inputs, max_new_tokens):
            yield answer, images


def shown(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Escape messages for a `gr.Chatbot`, which renders HTML even without Markdown."""
    return [{**message, "content": html.escape(message["content"], quote=False)} for message in messages]


def pictures_of(images: list[Image.Image], boxes: list[GridBox]) -> tuple[dict, dict]:
    """Return updates of the image and the swipe slider: a single image, or a pair padded to the size of the first.

    Small images are enlarged so that labels can be read.
    """
    width, height = images[0].size if images else (1, 1)
    scale = max(1, round(DISPLAY_SIDE / max(width, height)))
    size = scale * width, scale * height
    sizes = [ImageOps.contain(image, size, Image.Resampling.BICUBIC).size for image in images]
    drawn = [
        write_png(ImageOps.pad(draw_boxes(image.resize(own, Image.Resampling.BICUBIC), boxes), size), "boxes.png")
        for image, own in zip(images, sizes)
    ]
    is_pair = len(drawn) == 2
    return (
        gr.update(value=drawn[0] if len(drawn) == 1 else None, visible=not is_pair),
        gr.update(value=tuple(drawn) if is_pair else None, visible=is_pair),
    )


def summary_of(boxes: list[GridBox], wrong: list[str]) -> str:
    """Summarize the number of boxes of each phrase and the invalid boxes."""
    counts = Counter(box.phrase or "without a phrase" for box in boxes)
    parts = [f"{count} × {phrase}" for phrase, count in counts.items()]
    if wrong:
        parts.append(f"invalid (outside the grid from 0 to 1000, or empty): {', '.join(wrong)}")
    return "; ".join(parts) or "None."
