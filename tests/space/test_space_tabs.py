"""The tabs on VRL and for questions, called through gradio's client, on the tiny model."""

import html
import time
from types import SimpleNamespace

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

from modeling_vitp.instructions.boxes import GridBox

QUESTION = "How many trees are there?"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script> **how many**?"
TOKENS_PER_TILE = 16  # of the tiny model: (112 / 14 / 2) ** 2


@pytest.fixture(scope="module")
def models():
    return Models(TINY)


@pytest.fixture(scope="module")
def client(models):
    with gr.Blocks(analytics_enabled=False) as app:
        model_name = gr.Dropdown([TINY], value=TINY, label="Model", allow_custom_value=True)
        keys = [key for tab in (vrl_tab, ask_tab) for key in tab.build_tab(models, model_name)]
    assert len(keys) == len(set(keys))
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield Client(url, verbose=False)
    app.close()


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


@pytest.fixture(autouse=True)
def fresh(client):
    client.reset_session()


def ask(client, question, first, second=None, max_new_tokens=8):
    second = second and handle_file(str(second))
    return client.submit(TINY, handle_file(str(first)), second, question, max_new_tokens, api_name="/ask")


def conversation_of(result) -> list[tuple[str, str]]:
    """Who said what, as HTML shows it."""
    return [(turn["role"], html.unescape("".join(part["text"] for part in turn["content"]))) for turn in result[0]]


def value_of(update):
    return update["value"] if isinstance(update, dict) and "value" in update else update


def test_tokens_are_shown_over_tiles_and_thumbnail(client, models, scene):
    tiles, thumbnail, summary, note = client.predict(TINY, handle_file(str(scene)), 0.75, 5, api_name="/vrl_tokens")
    assert summary == "28 of 112 visual tokens are kept, over 2 × 3 tiles and a thumbnail."
    assert note == "PNG, RGB, 336 × 224 pixels"
    image = picture(336, 224)
    inputs = encode(models.full().processor, [image], [{"role": "user", "content": "?"}], 0.75, seed=5)
    shown, pixels = np.array(Image.open(tiles)).astype(float), np.array(image)
    for index in range(6 * TOKENS_PER_TILE):
        tile, token = divmod(index, TOKENS_PER_TILE)
        top, left = tile // 3 * 112 + token // 4 * 28, tile % 3 * 112 + token % 4 * 28
        inner = np.s_[top + 4 : top + 24, left + 4 : left + 24]  # beside the borders of tiles
        factor = 1 if index in inputs["visual_token_indices"] else DIMMED
        assert np.abs(shown[inner] - factor * pixels[inner]).max() <= 0.5
    brightness = np.array(Image.open(value_of(thumbnail))).reshape(4, 112, 4, 112, 3).mean((1, 3, 4)).flatten()
    kept = [index - 6 * TOKENS_PER_TILE for index in inputs["visual_token_indices"].tolist()]
    assert (brightness > 60).nonzero()[0].tolist() == [token for token in kept if token >= 0]


def test_image_of_one_tile_has_no_thumbnail(client, tmp_path):
    picture(100, 100).save(tmp_path / "small.jpg")
    _, thumbnail, summary, _ = client.predict(
        TINY, handle_file(str(tmp_path / "small.jpg")), 0, 0, api_name="/vrl_tokens"
    )
    assert summary == "16 of 16 visual tokens are kept, over one tile." and value_of(thumbnail) is None


def test_curve_and_table_have_the_answers_and_probabilities_of_the_model(client, models, scene):
    job = client.submit(TINY, handle_file(str(scene)), QUESTION, 0, 2, api_name="/vrl_curve")
    job.result()
    steps = job.outputs()
    full = models.full()
    wanted = list(
        answers_by_drop_ratio(
            full.model, full.processor, picture(336, 224), QUESTION, vrl_tab.DROP_RATIOS, (0, 1), vrl_tab.MAX_NEW_TOKENS
        )
    )
    assert len(steps) == len(wanted) == 1 + 2 * (len(vrl_tab.DROP_RATIOS) - 1)
    _, table, answer = steps[-1]
    assert answer == wanted[0].text
    assert [row[0] for row in table["data"]] == [f"{one.drop_ratio:g}" for one in wanted]
    assert [row[3] for row in table["data"]] == [one.text for one in wanted]
    for row, one in zip(table["data"], wanted):
        assert float(row[4]) == pytest.approx(one.probability, rel=0.01)
        assert float(row[5]) == pytest.approx(one.full_probability, rel=0.01)


def test_curve_has_every_draw_and_the_mean_of_complete_ratios():
    answers = [
        Answer(ratio, seed, 1, 1, "", 0.0, probability)
        for ratio, seed, probability in [(0.0, 3, 0.8), (0.5, 3, 0.6), (0.5, 4, 0.2), (0.9, 3, 0.1)]
    ]
    curve = vrl_tab.curve_of(answers, range(3, 5))
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


def test_costs_are_told_for_the_whole_and_the_shortened_sequence(client, models, scene):
    table, summary = client.predict(TINY, handle_file(str(scene)), QUESTION, 0.75, 0, api_name="/vrl_cost")
    whole, short = table["data"]
    assert [whole[1], short[1]] == ["112", "28"] or [whole[1], short[1]] == [112, 28]
    config = models.full().model.config.text_config
    flops = [language_model_flops(config, int(row[2])) for row in (whole, short)]
    assert [row[3] for row in (whole, short)] == [f"{count / 1e9:.3g}" for count in flops]
    assert f"{1 - flops[1] / flops[0]:.0%} fewer operations" in summary


def test_stream_ends_with_the_greedy_answer_and_earlier_turns_count(client, models, scene):
    job = ask(client, QUESTION, scene)
    result = job.result()
    full = models.full()

    def answer_to(messages):
        inputs = encode(full.processor, [picture(336, 224)], messages)
        ids = full.model.generate(**inputs, **greedy(full.model, 8))[0, inputs["input_ids"].shape[1] :]
        return decode(full.processor, ids)

    messages = [{"role": "user", "content": QUESTION}]
    answer = answer_to(messages)
    assert conversation_of(result) == [("user", QUESTION), ("assistant", answer)]
    assert len(job.outputs()) > 3  # it grew
    follow_up = ask(client, "And now?", scene).result()
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
    assert conversation_of(follow_up)[2:] == [("user", "And now?"), ("assistant", answer_to(messages))]


def test_boxes_of_an_answer_are_drawn_on_the_image_and_counted(client, scene, monkeypatch):
    answer = "<ref>ship</ref><box>[[250, 250, 750, 750]]</box> and [0, 0, 1001, 5]"
    monkeypatch.setattr(ask_tab, "stream_answer", lambda *arguments: iter([answer[:9], answer]))
    result = ask(client, QUESTION, scene).result()
    assert conversation_of(result)[-1] == ("assistant", answer)
    drawn = np.array(Image.open(value_of(result[2])))
    assert drawn.shape == (448, 672, 3)  # enlarged, for the labels
    assert (drawn[112:336, 168] == ImageColor.getrgb(COLORS[0])).all()
    assert result[4] == "1 × ship; not on the grid from 0 to 1000, or without area: [0, 0, 1001, 5]"


def test_pair_is_shown_with_a_swipe_slider_at_one_size(client, models, scene, later_scene, monkeypatch):
    seen = SimpleNamespace()

    def answer_of(model, processor, inputs, max_new_tokens):
        seen.tiles = len(inputs["pixel_values"])
        return iter(["[500, 0, 1000, 1000]"])

    monkeypatch.setattr(ask_tab, "stream_answer", answer_of)
    result = ask(client, "What has changed?", scene, later_scene).result()
    assert seen.tiles == len(
        encode(
            models.full().processor, [picture(336, 224), picture(168, 112, 1)], [{"role": "user", "content": QUESTION}]
        )["pixel_values"]
    )
    assert value_of(result[2]) is None
    before, after = (np.array(Image.open(path)) for path in value_of(result[3]))
    assert before.shape == after.shape == (448, 672, 3)
    for image in (before, after):
        assert (image[30:, 336] == ImageColor.getrgb(COLORS[0])).all()
    shown = client.predict(TINY, handle_file(str(scene)), handle_file(str(later_scene)), api_name="/ask_show")
    assert shown[2].splitlines() == ["PNG, RGB, 336 × 224 pixels", "PNG, RGB, 168 × 112 pixels"]


def test_markup_in_questions_and_answers_is_text(client, scene, monkeypatch):
    monkeypatch.setattr(ask_tab, "stream_answer", lambda *arguments: iter([MARKUP]))
    result = ask(client, MARKUP, scene).result()
    assert conversation_of(result) == [("user", MARKUP), ("assistant", MARKUP)]
    assert not any("<" in part["text"] for turn in result[0] for part in turn["content"])


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("  ", "question is empty"),
        (None, "question is empty"),
        ("x" * 2001, "2,001 characters"),
        ("a <IMG_CONTEXT>", "image token"),
    ],
)
def test_what_is_no_question_is_told_in_a_message(client, scene, question, wanted):
    with pytest.raises(AppError, match=wanted):
        ask(client, question, scene).result()
    with pytest.raises(AppError, match=wanted):
        client.predict(TINY, handle_file(str(scene)), question, 0, 1, api_name="/vrl_curve")
    with pytest.raises(AppError, match=wanted):
        client.predict(TINY, handle_file(str(scene)), question, 0.5, 0, api_name="/vrl_cost")


def test_too_long_a_conversation_is_told_in_a_message(client, scene, monkeypatch):
    monkeypatch.setattr(ask_tab, "stream_answer", lambda *arguments: iter(["x" * 9000]))
    ask(client, QUESTION, scene).result()
    with pytest.raises(AppError, match="start a new conversation"):
        ask(client, QUESTION, scene).result()
    client.predict(TINY, handle_file(str(scene)), None, api_name="/ask_show")  # starts a new one
    assert len(conversation_of(ask(client, QUESTION, scene).result())) == 2


def test_no_image_or_none_that_can_be_opened_is_told_in_a_message(client, tmp_path):
    for arguments in [
        {"api_name": "/vrl_curve", "args": (QUESTION, 0, 1)},
        {"api_name": "/vrl_cost", "args": (QUESTION, 0.5, 0)},
        {"api_name": "/ask", "args": (None, QUESTION, 8)},
    ]:
        with pytest.raises(AppError, match="no image yet"):
            client.predict(TINY, None, *arguments["args"], api_name=arguments["api_name"])
    assert client.predict(TINY, None, 0.5, 0, api_name="/vrl_tokens")[3] == "There is no image yet."
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(AppError, match="no image that can be opened"):
        client.predict(TINY, handle_file(str(tmp_path / "text.jpg")), 0.5, 0, api_name="/vrl_tokens")
    with pytest.raises(AppError):
        path = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        client.predict(TINY, path, 0.5, 0, api_name="/vrl_tokens")


def test_stopped_answer_ends_the_generation(client, scene, monkeypatch):
    """Waits for the generator's end, which is when the model stops (see `test_answers`)."""
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
    said = conversation_of(ask(client, QUESTION, scene).result())
    assert said == [("user", QUESTION), ("assistant", "trees"), ("user", QUESTION), ("assistant", "12")]


def test_summary_counts_boxes_by_phrase():
    boxes = [GridBox(0, 0, 1, 1, "ship"), GridBox(0, 0, 2, 2, "ship"), GridBox(0, 0, 3, 3)]
    assert ask_tab.summary_of(boxes, []) == "2 × ship; 1 × without a phrase"
    assert ask_tab.summary_of([], []) == "None."


def test_handlers_leave_no_gradients(client, models, scene):
    ask(client, QUESTION, scene).result()
    assert all(weight.grad is None for weight in models.full().model.parameters())
    assert torch.is_grad_enabled()
