"""Source of a handler's image: upload or example."""

import asyncio
import shutil

import gradio as gr
import pytest
from computing import answering
from gradio.helpers import special_args
from uploading import CROWNS, EXAMPLES, image_input, name_of

PROGRESS = gr.Progress()


@answering
def path_and_more(path: str | None, event: gr.EventData, model: str, progress: gr.Progress = PROGRESS, *settings):
    return path, event, model, progress, settings


@pytest.mark.parametrize("example, name", [("CT slice", "CT_small.dcm"), (None, "own.png"), ("?", "own.png")])
def test_selected_example_precedes_upload(example, name):
    """Inputs that Gradio adds keep their position in the handler."""
    with gr.Blocks():
        image, model = image_input("image", None), gr.Textbox()
        handler, inputs = image.with_path(path_and_more, [model])
    assert inputs == [image.upload, image.example, model]
    given = ["own.png", example, "quickstart", 1, 2]
    given, *_ = special_args(handler, given, event_data=gr.EventData(None, {}))

    async def answers():
        return [answer async for answer in handler(*given)]

    ((path, event, model, progress, settings),) = asyncio.run(answers())
    assert path.endswith(name) and isinstance(event, gr.EventData)
    assert model == "quickstart" and progress is PROGRESS and settings == (1, 2)


def test_only_a_copy_has_the_name_of_an_example(tmp_path):
    for name, example in EXAMPLES.items():
        assert name_of(shutil.copy(example, tmp_path)) == name
    other = shutil.copy(EXAMPLES["Trees, Florida"], tmp_path / EXAMPLES[CROWNS].name)
    assert name_of(str(other)) == EXAMPLES[CROWNS].name
