"""The tabs VRL and Ask, called by programs and by the page, on the tiny model."""

import asyncio
import html
import time
from types import SimpleNamespace

import api
import ask_tab
import gradio as gr
import numpy as np
import pytest
import torch
import vrl_tab
from answers import Answer, answers_by_drop_ratio, decode, encode, greedy
from boxes import COLORS
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from loading import TINY, Models
from pictures import picture
from PIL import Image, ImageColor
from visual_tokens import DIMMED
from vrl_cost import language_model_flops
from vrl_explained import explain, strip
from vrl_results import DROP_RATIOS, MAX_NEW_TOKENS, curve_of

from modeling_vitp.instructions.boxes import GridBox

QUESTION = "How many trees are there?"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script> **how many**?"
TOKENS_PER_TILE = 16  # tiny model: (112 / 14 / 2) ** 2


@pytest.fixture(scope="module")
def models():
    return Models(TINY)


@pytest.fixture(scope="module")
def client(models):
    with gr.Blocks(analytics_enabled=False) as app:
        model_name = gr.Dropdown([TINY], value=TINY, label="Model", allow_custom_value=True)
        keys = [key for tab in (vrl_tab, ask_tab) for key in tab.build_tab(models, model_name).state]
        api.build_api(models)
    assert len(keys) == len(set(keys))
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield Client(url, verbose=False)
    app.close()


@pytest.fixture(scope="module")
def ask_page(models):
    """Return the handler of the tab, which yields the updates of the page step by step."""
    with gr.Blocks(analytics_enabled=False) as app:
        ask_tab.build_tab(models, gr.Dropdown([TINY], value=TINY, label="Model"))
    (handler,) = {one.fn for one in app.fns.values() if getattr(one.fn, "__name__", "") == "ask_model"}

    def ask(question, said, first, second=None, longest=8):
        async def steps():
            given = (first and str(first), None, TINY, second and str(second), question, said, longest)
            return [step async for step in handler(*given, lambda *arguments, **named: None)]

        return asyncio.run(steps())

    return ask


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "scene.png"
    picture(336, 224).save(path)
    return path


@pytest.fixture(scope="module")
def later_scene(scene):
    path = scene.with_name("later.png")
    picture(168, 112, seed=1).save(path)
    return path


def ask(client, question, first, second=None, longest=8):
    second = second and handle_file(str(second))
    return client.submit(handle_file(str(first)), second, TINY, question, longest, api_name="/ask")


def conversation_of(step) -> list[tuple[str, str]]:
    """Return role and displayed text of each message."""
    return [(turn["role"], html.unescape(turn["content"])) for turn in step[1]]


def value_of(update):
    return update["value"] if isinstance(update, dict) and "value" in update else update


def test_tokens_are_shown_over_tiles_and_thumbnail(client, models, scene):
    tiles, thumbnail, summary, note = client.predict(handle_file(str(scene)), TINY, 0.75, 5, api_name="/visual_tokens")
    assert summary == "28 of 112 visual tokens are kept, over 2 × 3 tiles and a thumbnail."
    assert note == "scene.png: PNG, RGB, 336 × 224 pixels"
    image = picture(336, 224)
    inputs = encode(models.full().processor, [image], [{"role": "user", "content": "?"}], 0.75, seed=5)
    shown, pixels = np.array(Image.open(tiles)).astype(float), np.array(image)
    for index in range(6 * TOKENS_PER_TILE):
        tile, token = divmod(index, TOKENS_PER_TILE)
        top, left = tile // 3 * 112 + token // 4 * 28, tile % 3 * 112 + token % 4 * 28
        inner = np.s_[top + 4 : top + 24, left + 4 : left + 24]  # without tile borders
        factor = 1 if index in inputs["visual_token_indices"] else DIMMED
        assert np.abs(shown[inner] - factor * pixels[inner]).max() <= 0.5
    brightness = np.array(Image.open(thumbnail)).reshape(4, 112, 4, 112, 3).mean((1, 3, 4)).flatten()
    kept = [index - 6 * TOKENS_PER_TILE for index in inputs["visual_token_indices"].tolist()]
    assert (brightness > 60).nonzero()[0].tolist() == [token for token in kept if token >= 0]


def test_single_tile_has_no_thumbnail(client, tmp_path):
    picture(100, 100).save(tmp_path / "small.jpg")
    _, thumbnail, summary, _ = client.predict(
        handle_file(str(tmp_path / "small.jpg")), TINY, 0, 0, api_name="/visual_tokens"
    )
    assert summary == "16 of 16 visual tokens are kept, over one tile." and thumbnail is None


def test_curve_and_table_show_model_answers(client, models, scene):
    job = client.submit(handle_file(str(scene)), TINY, QUESTION, 0, 2, api_name="/drop_ratios")
    job.result()
    steps = job.outputs()
    full = models.full()
    wanted = list(
        answers_by_drop_ratio(
            full.model, full.processor, picture(336, 224), QUESTION, DROP_RATIOS, (0, 1), MAX_NEW_TOKENS
        )
    )
    assert len(steps) == len(wanted) == 1 + 2 * (len(DROP_RATIOS) - 1)
    table, answer = steps[-1]
    assert answer == wanted[0].text
    assert [row[0] for row in table["data"]] == [f"{one.drop_ratio:g}" for one in wanted]
    assert [row[3] for row in table["data"]] == [one.text for one in wanted]
    for row, one in zip(table["data"], wanted):
        assert float(row[4]) == pytest.approx(one.probability, rel=0.01)
        assert float(row[5]) == pytest.approx(one.full_probability, rel=0.01)


def test_curve_has_draws_and_mean():
    answers = [
        Answer(ratio, seed, 1, 1, "", 0.0, probability)
        for ratio, seed, probability in [(0.0, 3, 0.8), (0.5, 3, 0.6), (0.5, 4, 0.2), (0.9, 3, 0.1)]
    ]
    curve = curve_of(answers, range(3, 5))
    points = {(row["draw"], row["drop ratio"]): row["probability"] for _, row in curve.iterrows()}
    assert points == {
        ("seed 3", 0.0): 0.8,
        ("seed 4", 0.0): 0.8,
        ("mean", 0.0): 0.8,
        ("seed 3", 0.5): 0.6,
        ("seed 4", 0.5): 0.2,
        ("mean", 0.5): pytest.approx(0.4),
        ("seed 3", 0.9): 0.1,
    }


def test_answer_attention_equals_language_model_attention(models):
    full, image = models.full(), picture(336, 224)
    found = explain(full, image, QUESTION, 0.75, 5, max_new_tokens=6)
    inputs = encode(full.processor, [image], [{"role": "user", "content": QUESTION}], 0.75, seed=5)
    with torch.no_grad():
        ids = full.model.generate(**inputs, **greedy(full.model, 6))
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        positions = inputs["position_ids"]
        given = dict(inputs) | {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.cat([positions, positions[:, -1:] + 1 + torch.arange(new)], 1),
        }
        attentions = full.model(**given, output_attentions=True, use_cache=False).attentions
    length = inputs["input_ids"].shape[1]
    mean = torch.stack(attentions)[:, 0, :, length - 1 : -1].mean((0, 1, 2)).numpy()
    is_visual = inputs["input_ids"][0] == full.model.config.image_token_id
    kept = inputs["visual_token_indices"].numpy()
    assert found.text == decode(full.processor, ids[0, length:])
    assert found.share == pytest.approx(mean[:length][is_visual].sum() / mean.sum(), rel=1e-3)
    for index, value in zip(kept, mean[:length][is_visual]):
        tile, token = divmod(int(index), TOKENS_PER_TILE)
        if tile < 6:
            place = tile // 3 * 4 + token // 4, tile % 3 * 4 + token % 4
            assert found.attention[place] == pytest.approx(value, rel=1e-3)
    assert np.isfinite(found.attention).sum() == (kept < 6 * TOKENS_PER_TILE).sum()
    np.testing.assert_array_equal(found.positions, inputs["position_ids"][0])
    cells = np.asarray(strip(found))[8::16, 8::16].reshape(-1, 3)
    bright = (cells == (255, 176, 0)).all(1)
    np.testing.assert_array_equal(np.flatnonzero(bright), found.positions[is_visual])
    assert (cells[: found.positions[-1]] == (51, 65, 85)).all(1).sum() == 112 - 28


def test_costs_cover_full_and_short_sequence(client, models, scene):
    table, summary = client.predict(handle_file(str(scene)), TINY, QUESTION, 0.75, 0, api_name="/saved")
    whole, short = table["data"]
    assert [whole[1], short[1]] == ["112", "28"] or [whole[1], short[1]] == [112, 28]
    config = models.full().model.config.text_config
    flops = [language_model_flops(config, int(row[2])) for row in (whole, short)]
    assert [row[3] for row in (whole, short)] == [f"{count / 1e9:.3g}" for count in flops]
    assert f"{1 - flops[1] / flops[0]:.0%} fewer operations" in summary


def test_stream_ends_with_greedy_answer_of_conversation(client, ask_page, models, scene):
    job = ask(client, QUESTION, scene)
    full = models.full()

    def answer_to(messages):
        inputs = encode(full.processor, [picture(336, 224)], messages)
        ids = full.model.generate(**inputs, **greedy(full.model, 8))[0, inputs["input_ids"].shape[1] :]
        return decode(full.processor, ids)

    messages = [{"role": "user", "content": QUESTION}]
    answer = answer_to(messages)
    assert job.result()[0] == answer and len(job.outputs()) > 3  # The answer grew step by step.
    steps = ask_page(QUESTION, [], scene)
    assert conversation_of(steps[-1]) == [("user", QUESTION), ("assistant", answer)] and len(steps) > 3
    follow_up = ask_page("And now?", steps[-1][0], scene)[-1]
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
    assert conversation_of(follow_up)[2:] == [("user", "And now?"), ("assistant", answer_to(messages))]


def test_answer_boxes_are_drawn_and_counted(client, ask_page, scene, monkeypatch):
    answer = "<ref>ship</ref><box>[[250, 250, 750, 750]]</box> and [0, 0, 1001, 5]"
    monkeypatch.setattr(ask_tab, "stream_answer", lambda *arguments: iter([answer[:9], answer]))
    step = ask_page(QUESTION, [], scene)[-1]
    assert conversation_of(step)[-1] == ("assistant", answer)
    drawn = np.array(Image.open(value_of(step[3])))
    assert drawn.shape == (448, 672, 3)  # enlarged so that labels are readable
    assert (drawn[112:336, 168] == ImageColor.getrgb(COLORS[0])).all()
    assert step[5] == "1 × ship; invalid (outside the grid from 0 to 1000, or empty): [0, 0, 1001, 5]"
    said, boxes, words = ask(client, QUESTION, scene).result()
    assert (said, words) == (answer, step[5]) and boxes == [{"phrase": "ship", "box": [250, 250, 750, 750]}]


def test_pair_keeps_aspect_ratio_in_slider(ask_page, models, scene, tmp_path, monkeypatch):
    seen = SimpleNamespace()
    picture(100, 200, seed=1).save(tmp_path / "tall.png")

    def answer_of(model, processor, inputs, max_new_tokens):
        seen.tiles = len(inputs["pixel_values"])
        return iter(["[500, 0, 1000, 1000]"])

    monkeypatch.setattr(ask_tab, "stream_answer", answer_of)
    step = ask_page("What has changed?", [], scene, tmp_path / "tall.png")[-1]
    messages = [{"role": "user", "content": QUESTION}]
    pair = [picture(336, 224), picture(100, 200, 1)]
    assert seen.tiles == len(encode(models.full().processor, pair, messages)["pixel_values"])
    assert value_of(step[3]) is None
    before, after = (np.array(Image.open(path)) for path in value_of(step[4]))
    assert before.shape == after.shape == (448, 672, 3)
    assert (before[30:, 336] == ImageColor.getrgb(COLORS[0])).all()
    inside = np.flatnonzero(after.any((0, 2)))
    assert inside[-1] - inside[0] + 1 == 224  # half as wide as high


def test_markup_in_conversation_is_escaped(ask_page, scene, monkeypatch):
    monkeypatch.setattr(ask_tab, "stream_answer", lambda *arguments: iter([MARKUP]))
    step = ask_page(MARKUP, [], scene)[-1]
    assert conversation_of(step) == [("user", MARKUP), ("assistant", MARKUP)]
    assert not any("<" in turn["content"] for turn in step[1])


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("  ", "question is empty"),
        (None, "question is empty"),
        ("x" * 2001, "2,001 characters"),
        ("a <IMG_CONTEXT>", "image token"),
    ],
)
def test_invalid_question_shows_message(client, scene, question, wanted):
    with pytest.raises(AppError, match=wanted):
        ask(client, question, scene).result()
    with pytest.raises(AppError, match=wanted):
        client.predict(handle_file(str(scene)), TINY, question, 0, 1, api_name="/drop_ratios")
    with pytest.raises(AppError, match=wanted):
        client.predict(handle_file(str(scene)), TINY, question, 0.5, 0, api_name="/saved")


def test_long_conversation_shows_message(ask_page, scene):
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "x" * 9000}]
    with pytest.raises(gr.Error, match="limit of"):
        ask_page(QUESTION, said, scene)
    assert len(conversation_of(ask_page(QUESTION, [], scene)[-1])) == 2


def test_missing_or_invalid_image_shows_message(client, tmp_path):
    calls = {
        "/drop_ratios": (TINY, QUESTION, 0, 1),
        "/saved": (TINY, QUESTION, 0.5, 0),
        "/ask": (None, TINY, QUESTION, 8),
        "/visual_tokens": (TINY, 0.5, 0),
    }
    for name, arguments in calls.items():
        with pytest.raises(AppError, match="No image"):
            client.predict(None, *arguments, api_name=name)
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(AppError, match="text.jpg cannot be opened"):
        client.predict(handle_file(str(tmp_path / "text.jpg")), TINY, 0.5, 0, api_name="/visual_tokens")
    with pytest.raises(AppError):
        path = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        client.predict(path, TINY, 0.5, 0, api_name="/visual_tokens")


def test_canceled_answer_ends_generation(client, scene, monkeypatch):
    """The model stops when the generator ends, see `test_answers`."""
    ended = []

    def endless(*arguments):
        try:
            while True:
                time.sleep(0.05)
                yield "trees"
        finally:
            ended.append(True)

    monkeypatch.setattr(ask_tab, "stream_answer", endless)
    job = ask(client, QUESTION, scene)
    while len(job.outputs()) < 3:
        time.sleep(0.05)
    assert not ended
    job.cancel()
    deadline = time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended
    monkeypatch.setattr(ask_tab, "stream_answer", lambda *arguments: iter(["12"]))
    assert ask(client, QUESTION, scene).result()[0] == "12"


def test_summary_counts_boxes_by_phrase():
    boxes = [GridBox(0, 0, 1, 1, "ship"), GridBox(0, 0, 2, 2, "ship"), GridBox(0, 0, 3, 3)]
    assert ask_tab.summary_of(boxes, []) == "2 × ship; 1 × without a phrase"
    assert ask_tab.summary_of([], []) == "None."


def test_handlers_leave_no_gradients(client, models, scene):
    ask(client, QUESTION, scene).result()
    assert all(weight.grad is None for weight in models.full().model.parameters())
    assert torch.is_grad_enabled()
