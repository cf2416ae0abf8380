"""Handlers of the tab Look inside."""

import asyncio
import json
import re

import gradio as gr
import numpy as np
import pytest
from backbone_tab import build_tab
from gradio.helpers import special_args
from loading import TINY, Models
from maps import FROM_POINT, SIMILARITY
from PIL import Image


@pytest.fixture(scope="module")
def app():
    with gr.Blocks() as app:
        build_tab(Models(TINY), gr.Dropdown([TINY], value=TINY))
    return app


def component_of(app, name):
    return next(one for one in app.blocks.values() if name in (one.elem_id, getattr(one, "label", None)))


def call(app, handler, event=None, **changed):
    """Return the results of a handler by the id or label of their components, with the initial settings."""
    function = next(one for one in app.fns.values() if getattr(one.fn, "__name__", None) == handler)
    values = [changed.get(one.elem_id, one.value) for one in function.inputs]
    arguments, *_ = special_args(function.fn, values, event_data=event)

    async def answers():
        return [answer async for answer in function.fn(*arguments)]

    *_, last = asyncio.run(answers())
    names = [one.elem_id or getattr(one, "label", None) for one in function.outputs]
    return dict(zip(names, last))


def click(app, target, x, y):
    return gr.SelectData(component_of(app, target), {"index": [x, y], "value": None})


@pytest.mark.parametrize("target", ["backbone_picture", "map_b"])
def test_click_moves_point_and_shows_similarity(app, target):
    found = call(app, "see_click", click(app, target, 192, 576), resolution=4)
    assert (found["point_x"], found["point_y"], found["kind"], found["source"]) == (25.1, 75.1, SIMILARITY, FROM_POINT)
    ring = np.argwhere((np.asarray(Image.open(found["backbone_picture"])) == 255).all(-1))
    np.testing.assert_allclose(ring.mean(0), (576, 192), atol=12)
    data = json.loads(re.search("data-patches='(.*)'", found["patches"])[1])
    assert [one["id"] for one in data["maps"]] == ["map_a", "map_b", "map_c"]
    assert {one["rows"] for one in data["maps"]} == {4}
    assert found["second_picture"].visible and found["map_c"].visible


def test_click_on_overview_moves_window(app):
    found = call(app, "see_click", click(app, "overview", 383.5, 191.5), part=20, resolution=4)
    assert (found["center_x"], found["center_y"]) == (50, 25) and found["kind"] == gr.skip()
    assert "window from 89, 33" in found["backbone_note"]
