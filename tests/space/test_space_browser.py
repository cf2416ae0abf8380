"""The Space in headless Chromium: a visit from the first page to a downloaded map, on a desk and on a phone.

Screenshots are kept in `outputs/screenshots`.
"""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import time
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch
from boxes import COLORS
from original_detectors import original_detector
from paths import ROOT
from pictures import picture
from PIL import Image, ImageColor
from playwright.sync_api import expect, sync_playwright
from tiny_models import HEAD, adapter_config

from modeling_vitp import (
    ViTPChangeDetectionConfig,
    ViTPDetectionImageProcessor,
    ViTPForChangeDetection,
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
)

IMAGE = ROOT / "space" / "examples" / "trees_florida.jpg"
PALETTE = np.array([ImageColor.getrgb(color) for color in COLORS], dtype=np.uint8)
SCREENSHOTS = ROOT / "outputs" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """Fine-tuned models, by the names of their folders, which lie where the app is started."""
    torch.manual_seed(0)
    maps = ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD)
    pairs = ViTPChangeDetectionConfig(backbone_config=adapter_config(), **HEAD)
    models = {
        "ships": (original_detector("oriented_rcnn"), ViTPDetectionImageProcessor()),
        "land": (ViTPForSemanticSegmentation(maps).eval(), ViTPSegmentationImageProcessor()),
        "changes": (ViTPForChangeDetection(pairs).eval(), ViTPSegmentationImageProcessor()),
    }
    folder = tmp_path_factory.mktemp("space")
    for name, (model, image_processor) in models.items():
        model.save_pretrained(folder / name)
        image_processor.save_pretrained(folder / name)
    return folder, {name: model for name, (model, _) in models.items()}


@pytest.fixture(scope="module")
def url(fine_tuned):
    """The address of the app, started as a user does, with the tiny model."""
    folder, models = fine_tuned
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "PYTHONUNBUFFERED": "1",
        "VITP_FINE_TUNED": ",".join(models),
    }
    for name in ("VITP_MODEL", "VITP_BACKBONES", "GRADIO_SERVER_PORT"):
        environment.pop(name, None)
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, ROOT / "space" / "app.py"], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield found.group()
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser():
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """A page on a desk, at the app, of which every script ran without an error."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    expect(page.get_by_role("tab", name="Backbone")).to_be_visible()
    yield page
    page.close()
    assert errors == []


def upload(page, path, place="#backbone_image"):
    page.locator(f"{place} input[type=file]").set_input_files(path)


def shoot(page, name):
    page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def query_of(page):
    return {key: values[0] for key, values in parse_qs(urlparse(page.url).query).items()}


def map_image(page, place="#map_a"):
    """The map that is shown."""
    source = page.locator(f"{place} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def test_a_visit(page, tmp_path):
    upload(page, IMAGE)
    shown = page.locator("#map_a img")
    expect(shown).to_have_attribute("alt", re.compile("PCA of features of tiny random model, layer 3"))
    expect(page.locator("#backbone_note")).to_contain_text("400 × 400 pixels")
    shoot(page, "backbone_light")

    box = shown.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.2)
    expect(shown).to_have_attribute("alt", re.compile("Similarity to the point"))
    expect(page.get_by_role("radio", name="Similarity to the point")).to_be_checked()
    page.wait_for_function("new URLSearchParams(location.search).get('map') === 'Similarity to the point'")
    query = query_of(page)
    assert float(query["x"]) == pytest.approx(70, abs=1) and float(query["y"]) == pytest.approx(20, abs=1)
    brightest = np.argwhere(map_image(page).sum(-1, dtype=int) > 500)
    row, column = np.median(brightest, axis=0) / 768 * 8
    assert (int(row), int(column)) == (1, 5)
    shoot(page, "similarity_light")

    page.wait_for_timeout(500)
    with page.expect_download() as download:
        page.locator("#download_map").click()
    download.value.save_as(tmp_path / "map.png")
    assert "similarity" in download.value.suggested_filename
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "map.png").convert("RGB")), map_image(page))

    page.get_by_role("radio", name="Attention", exact=True).check()
    expect(shown).to_have_attribute("alt", re.compile("^Attention of"))
    page.get_by_label("Second backbone, side by side").click()
    page.get_by_role("option", name="untrained ViT").click()
    expect(page.get_by_alt_text(re.compile("Attention of untrained ViT"))).to_be_visible()
    shoot(page, "attention_two_backbones_light")


def test_the_drop_ratio_is_moved(page):
    page.get_by_role("tab", name="VRL").click()
    upload(page, IMAGE, "#vrl-image")
    summary = page.locator("#vrl-summary textarea, #vrl-summary input")
    expect(summary).to_have_value(re.compile(r"16 of 64|\d+ of \d+ visual tokens are kept"))
    kept, total = map(int, re.findall(r"\d+", summary.input_value().replace(",", ""))[:2])
    assert kept == -(-total // 4)  # a drop ratio of 0.75 to begin with
    before = page.locator("#vrl-tiles img").get_attribute("src")
    number = page.locator("#vrl-drop-ratio input[type=number]")
    number.fill("0.5")
    number.press("Enter")
    expect(summary).to_have_value(re.compile(f"^{-(-total // 2)} of {total} "))
    expect(page.locator("#vrl-tiles img")).not_to_have_attribute("src", before)
    page.locator("#vrl-drop-ratio input[type=range]").focus()
    page.keyboard.press("Home")
    expect(summary).to_have_value(re.compile(f"^{total} of {total} "))
    page.wait_for_function("new URLSearchParams(location.search).get('r') === '0'")
    page.keyboard.press("End")
    expect(summary).to_have_value(re.compile(f"^{-(-total // 100)} of {total} "))
    page.locator("#vrl-ask").click()
    expect(page.locator("#vrl-answer textarea, #vrl-answer input")).not_to_have_value("", timeout=60_000)
    shoot(page, "vrl_light")


def test_a_question_is_asked(page):
    page.get_by_role("tab", name="Ask").click()
    upload(page, IMAGE, "#ask-image")
    expect(page.locator("#ask-picture img")).to_be_visible()
    question = page.locator("#ask-question textarea, #ask-question input")
    question.fill("<b>How many</b> trees?<img src=x onerror='window.harmed = true'>")
    question.press("Enter")
    conversation = page.locator("#ask-conversation")
    expect(conversation).to_contain_text("<b>How many</b> trees?<img src=x")
    expect(page.locator("#ask-boxes textarea, #ask-boxes input")).not_to_have_value("", timeout=60_000)
    assert page.evaluate("window.harmed") is None
    shoot(page, "ask_light")
    question.fill("   ")
    question.press("Enter")
    expect(page.locator(".toast-body")).to_be_visible()


def test_the_url_opens_the_page_as_it_was_left(page, browser):
    page.get_by_label("Trees, Yellowstone").first.check()
    page.get_by_role("radio", name="Attention rollout").check()
    page.get_by_label("Resolution").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#map_a img")).to_have_attribute("alt", re.compile("Attention rollout of"))
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_function("new URLSearchParams(location.search).get('tab') === 'compare'")
    query = query_of(page)
    assert query["image"] == "Trees, Yellowstone" and query["map"] == "Attention rollout" and query["tab"] == "compare"
    again = browser.new_page()
    again.goto(page.url)
    expect(again.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    again.get_by_role("tab", name="Backbone").click()
    expect(again.get_by_role("radio", name="Attention rollout")).to_be_checked()
    expect(again.locator("#map_a img")).to_have_attribute("alt", page.locator("#map_a img").get_attribute("alt"))
    assert query_of(again) == {key: value for key, value in query.items() if key != "tab"}
    again.close()


def test_corruptions(page):
    page.get_by_role("tab", name="Compare").click()
    upload(page, IMAGE, "#compare_image")
    expect(page.locator("#compare_image")).to_contain_text("trees")
    page.locator("#run_corruptions").click()
    expect(page.locator("#compare_note")).to_contain_text("12 of 12 corruptions", timeout=60_000)
    assert page.locator("#corruption_chart .bar").count() == 24
    shoot(page, "compare_light")

    note = page.locator("#compare_note")
    page.get_by_label("Resolution").last.fill("48")
    page.get_by_label("Resolution").last.press("Enter")
    page.locator("#run_corruptions").click()
    expect(note).to_contain_text("1 of 12 corruptions", timeout=60_000)
    page.get_by_role("button", name="Cancel").last.click()
    page.wait_for_timeout(3000)
    stopped = note.inner_text()
    assert "12 of 12" not in stopped
    page.wait_for_timeout(2000)
    assert note.inner_text() == stopped


@pytest.fixture
def apply(page, fine_tuned, tmp_path):
    """A function: applies a model in its tab to pictures of 96 x 80 pixels, and gives these and what the model gives
    here, apart from the app."""
    page.get_by_role("tab", name="Apply").click()

    @torch.no_grad()
    def run(name, pairs=False):
        page.get_by_label("Fine-tuned model (any Hub id)").click()
        page.get_by_role("option", name=name).click()
        images, inputs = [], []
        for seed, place in enumerate(("#apply_image", "#apply_second_image")[: 1 + pairs]):
            picture(96, 80, seed).save(tmp_path / f"{seed}.png")
            upload(page, tmp_path / f"{seed}.png", place)
            expect(page.locator(place)).to_contain_text(f"{seed}")
            images.append(np.asarray(Image.open(tmp_path / f"{seed}.png").convert("RGB")))
            mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
            pixels = (images[-1] / 255 - mean) / std
            inputs.append(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
        page.locator("#run_apply").click()
        return images, fine_tuned[1][name](*inputs)

    return run


def move(page, slider, value):
    number = page.locator(f"{slider} input[type=number]")
    number.fill(str(value))
    number.press("Enter")


def wait_for_picture(page, wanted):
    """Until the picture of the tab Apply is as it should be."""
    deadline = time.monotonic() + 30
    while not np.array_equal(map_image(page, "#apply_picture"), wanted):
        assert time.monotonic() < deadline, "the picture is another"
        page.wait_for_timeout(200)


def test_what_a_detector_finds_is_drawn_from_a_score_on(page, apply):
    (image,), outputs = apply("ships")
    scores = outputs.scores[0]
    legend = page.locator("#apply_legend")
    expect(legend).to_contain_text(f"Objects with a score above 0.3: {int((scores > 0.3).sum())}", timeout=60_000)
    shoot(page, "apply_light")
    move(page, "#threshold", 0.95)
    expect(legend).to_contain_text(f"Objects with a score above 0.95: {int((scores > 0.95).sum())}")
    assert 0 < (scores > 0.95).sum() < (scores > 0.3).sum()
    color = ImageColor.getrgb(COLORS[outputs.labels[0, 0]])  # of the best one, which is on top
    corners = outputs.pred_corners[0, 0].numpy() * [96, 80]
    middles = (corners + np.roll(corners, -1, 0)) / 2
    drawn = map_image(page, "#apply_picture")
    inside = [(x, y) for x, y in middles.round().astype(int) if 2 <= x < 94 and 20 <= y < 78]
    assert inside and drawn.shape == image.shape
    for x, y in inside:
        assert (drawn[y - 2 : y + 3, x - 2 : x + 3] == color).all(-1).any()
    move(page, "#threshold", 1)
    expect(legend).to_contain_text("Objects with a score above 1: 0")
    wait_for_picture(page, image)


def test_classes_are_laid_over_the_image(page, apply):
    _, outputs = apply("land")
    labels = outputs.logits[0].argmax(0).numpy()
    for label in np.unique(labels):
        share = f"{100 * (labels == label).mean():.1f}%"
        expect(page.locator("#apply_legend")).to_contain_text(share, timeout=60_000)
    move(page, "#opacity", 1)
    wait_for_picture(page, PALETTE[labels])


def test_changes_are_laid_over_the_second_image(page, apply):
    move(page, "#opacity", 1)
    images, outputs = apply("changes", pairs=True)
    labels = outputs.logits[0].argmax(0).numpy()
    share = f"{100 * (labels == 0).mean():.1f}%"
    expect(page.locator("#apply_legend")).to_contain_text(share, timeout=60_000)
    wait_for_picture(page, np.where(labels[..., None] == 0, images[1], PALETTE[labels]))
    shoot(page, "apply_changes_light")


@pytest.mark.parametrize("tab", ["Backbone", "VRL", "Ask", "Compare", "Apply"])
def test_dark_and_on_a_phone(browser, url, tab):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True, is_mobile=True)
    examples = "image=Trees%2C+Florida&cimage=CT+slice&vrl_image=Trees%2C+Florida&ask_image=CT+slice"
    page.goto(f"{url}?__theme=dark&{examples}&b=untrained+ViT&tab={tab.lower()}")
    shown = {
        "Backbone": "#map_a img",
        "VRL": "#vrl-tiles img",
        "Ask": "#ask-picture img",
        "Compare": "#run_corruptions",
        "Apply": "#run_apply",
    }
    page.locator(shown[tab]).wait_for()
    if tab == "Compare":
        expect(page.locator("#compare_image")).to_contain_text("CT")
        page.locator("#run_corruptions").click()
        expect(page.locator("#compare_note")).to_contain_text("12 of 12 corruptions", timeout=60_000)
    shoot(page, f"{tab.lower()}_dark_phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 80
    page.close()


def test_everything_has_a_name(page):
    """What can be seen, in every tab, has a label or an alternative text."""
    upload(page, IMAGE)
    expect(page.locator("#map_a img")).to_be_visible()
    for tab in page.get_by_role("tab").all():
        tab.click()
        page.wait_for_timeout(500)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, select, button, img")]
                .filter((element) => element.offsetParent !== null && element.type !== "file")
                .filter((element) => !(element.labels?.length || element.ariaLabel || element.title || element.alt
                    || element.ariaLabelledByElements?.length || element.textContent.trim()
                    || element.querySelector("[alt]:not([alt=''])") || element.placeholder || element.closest("label")))
                .map((element) => element.outerHTML.slice(0, 300))"""
        )
        assert nameless == []


def test_what_is_no_image_gets_a_message_and_the_app_goes_on(page, tmp_path):
    (tmp_path / "text.jpg").write_text("This is no image.")
    upload(page, tmp_path / "text.jpg")
    expect(page.get_by_text("text.jpg is no image that can be opened")).to_be_visible()
    shoot(page, "message_light")
    page.get_by_label("Trees, Florida").first.check()
    expect(page.locator("#map_a img")).to_be_visible()


def test_an_image_is_pasted(page):
    paste = """(data) => {
        const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "pasted.png", {type: "image/png"}));
        document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
    }"""
    for width in (120, 60):  # the second takes the place of the first
        buffer = io.BytesIO()
        picture(width, 40).save(buffer, "PNG")
        page.evaluate(paste, base64.b64encode(buffer.getvalue()).decode())
        expect(page.locator("#backbone_note")).to_contain_text(f"{width} × 40 pixels")


def test_first_page_and_a_large_photograph_are_fast(browser, url, tmp_path):
    page = browser.new_page()
    start = time.monotonic()
    page.goto(url)
    expect(page.locator("#backbone_image")).to_be_visible()
    first_page = time.monotonic() - start
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=90)
    start = time.monotonic()
    upload(page, tmp_path / "large.jpg")
    expect(page.locator("#backbone_note")).to_contain_text("4000 × 3000 pixels")
    expect(page.locator("#map_a img")).to_be_visible()
    large = time.monotonic() - start
    print(f"first page {first_page:.2f} s, map of 4000 x 3000 {large:.2f} s")
    page.close()
    assert first_page < 5 and large < 10
