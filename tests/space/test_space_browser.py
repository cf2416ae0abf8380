"""The Space in headless Chromium, on a desktop and on a phone: every button and every control of every tab.

The controls are found in the page itself, so that those of a new tab are tested too. Screenshots are kept in
`outputs/screenshots`.
"""

import base64
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from finding import PIXELS, TRAINED, UNTRAINED, read_finding
from loading import PACKED, Models
from original_detectors import original_detector
from paths import ROOT
from pictures import picture
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from tiny_models import HEAD, VISION, adapter_config

from modeling_vitp import (
    ViTPChangeDetectionConfig,
    ViTPDetectionImageProcessor,
    ViTPForChangeDetection,
    ViTPForSemanticSegmentation,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)

WAIT = 60_000  # milliseconds, on a busy machine
IMAGE = ROOT / "space" / "examples" / "trees_florida.jpg"
SCREENSHOTS = ROOT / "outputs" / "screenshots"
TABS = {"backbone": "Look inside", "vrl": "Hide parts", "ask": "Ask", "compare": "Compare", "apply": "Apply"}
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
expect.set_options(timeout=WAIT)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium not found: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a backbone and models of three tasks, in which the app runs."""
    torch.manual_seed(0)
    maps = ViTPSegmentationConfig(backbone_config=adapter_config(), **HEAD)
    pairs = ViTPChangeDetectionConfig(backbone_config=adapter_config(), **HEAD)
    folder = tmp_path_factory.mktemp("space")
    for name, model, image_processor in (
        ("ships", original_detector("oriented_rcnn"), ViTPDetectionImageProcessor()),
        ("land", ViTPForSemanticSegmentation(maps), ViTPSegmentationImageProcessor()),
        ("changes", ViTPForChangeDetection(pairs), ViTPSegmentationImageProcessor()),
    ):
        model.save_pretrained(folder / name)
        image_processor.save_pretrained(folder / name)
    deep = ViTPVisionConfig(**VISION | {"num_hidden_layers": 6}, initializer_range=0.3, layer_scale_init_value=1.0)
    export_backbone(ViTPVisionModel(deep), folder / "deep")
    return folder


@pytest.fixture(scope="module")
def silent_hub():
    """Return an address that accepts connections but never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def url(folder, silent_hub):
    """Start the app with the packed model from the command line and return its address."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": silent_hub,
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "PYTHONUNBUFFERED": "1",
        "VITP_BACKBONES": str(folder / "deep"),
        "VITP_FINE_TUNED": "ships,land,changes",
    }
    for name in ("VITP_MODEL", "GRADIO_SERVER_PORT"):
        environment.pop(name, None)
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, ROOT / "space" / "app.py"], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 240
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield found.group()
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def contexts():
    """Return a browser context of each size; the phone has dark mode. The pages of a context share the cache."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        phone = {"color_scheme": "dark", "has_touch": True, "is_mobile": True}
        yield {
            name: browser.new_context(viewport={"width": width, "height": height}, **phone if name == "phone" else {})
            for name, (width, height) in SIZES.items()
        }
        browser.close()


@pytest.fixture
def open_page(contexts, url):
    """Return a function that opens a page, and check that no script or request of any page has failed.

    The function waits until the tab shows its example.
    """
    pages, errors = [], []

    def is_error(line):  # Gradio sends an invalid request if nothing is running that can be canceled.
        return line.type == "error" and not line.location["url"].endswith(("/cancel", "/reset"))

    def open_page(size="desktop", query=""):
        page = contexts[size].new_page()
        pages.append(page)
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(f"{line.text} {line.location}") if is_error(line) else None)
        page.add_init_script(INSTRUMENTS)
        page.goto(f"{url}?{query}")
        page.wait_for_function("window.urlIsRestored")
        settle(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert errors == []


INSTRUMENTS = """{
window.messages = []; window.pending = 0; window.lastEvent = performance.now();
new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach((node) => {
    const toast = node.querySelector?.(".toast-body.error");
    if (toast) window.messages.push(toast.innerText);
}))).observe(document, {childList: true, subtree: true});
const send = window.fetch, count = (number) => { window.pending += number; window.lastEvent = performance.now(); };
const read = async (reader, decoder = new TextDecoder(), rest = "") => {
    for (let part; !(part = await reader.read()).done;) {
        const pieces = (rest + decoder.decode(part.value)).split('"msg":"process_completed"');
        count(1 - pieces.length);
        rest = pieces.at(-1).slice(-30);
    }
};
window.fetch = async (resource, ...options) => {
    const address = String(resource.url ?? resource);
    if (address.includes("/queue/join")) count(1);
    const response = await send(resource, ...options);
    if (address.includes("/queue/data")) read(response.clone().body.getReader()).catch(() => {});
    return response;
};
}"""
"""Errors that have been shown, the number of events that are being computed, and the time of the last change of it."""


def settle(page):
    """Wait until no result is being computed."""
    page.wait_for_timeout(100)  # An event is sent shortly after a control has changed.
    page.wait_for_function("window.pending <= 0 && performance.now() - window.lastEvent > 200", polling=50)


def results(page):
    """Return what the results of the open tab show: texts, values and addresses of images."""
    return page.evaluate(
        """() => [...document.querySelectorAll(".results")].filter((one) => one.offsetParent).map((one) => [
            one.innerText, ...[...one.querySelectorAll("img")].map((image) => image.src),
            ...[...one.querySelectorAll("textarea, input")].map((field) => field.value)]).flat().join("\\n")"""
    )


NEXT = """(done) => {
    const shown = (one) => one.offsetParent !== null && !one.disabled && !one.readOnly;
    const panel = [...document.querySelectorAll("[role=tabpanel]")].find(shown);
    const text = (one) => (one?.innerText ?? "").trim();
    const kinds = {
        text: "textarea, input[type=text]:not([role=combobox])", slider: "input[type=range]",
        number: ".block:not(:has([type=range])) input[type=number]", dropdown: "input[role=combobox]",
        checkbox: "input[type=checkbox]", radio: "input[type=radio]:not(:checked)", button: "button",
    };
    document.querySelectorAll("[data-next]").forEach((one) => one.removeAttribute("data-next"));
    panel.querySelectorAll("button.label-wrap:not(.open)").forEach((one) => one.click());
    for (const [kind, selector] of Object.entries(kinds)) for (const one of panel.querySelectorAll(selector)) {
        const block = one.closest("fieldset, .block");
        let name = kind === "button" ? text(one) : text(block?.querySelector("[data-testid=block-info], label"));
        if (kind === "radio" && !name.includes("example")) name += ": " + text(one.closest("label"));
        const key = kind + " " + name.replace(/\\s+/g, " ");
        if (!shown(one) || done.includes(key) || !name || one.closest(".image-upload, .label-wrap")) continue;
        one.setAttribute("data-next", "");
        return [kind, key, one.matches("button.run")];
    }
    return null;
}"""
WITHOUT_RESULT = re.compile("button (Cancel|Stop|Copy|Copied)")  # nothing is running, or the clipboard has changed


def change(page, kind):
    """Change the control that is marked in the page, to another value that is valid for every tab."""
    control = page.locator("[data-next]")
    if kind in ("radio", "checkbox", "button"):
        control.click()
    elif kind == "slider":
        is_last = control.evaluate("(one) => Number(one.value) >= Number(one.max)")
        control.press("ArrowLeft" if is_last else "ArrowRight")
    elif kind == "number":
        control.press("ArrowUp")
    elif kind == "dropdown":
        value = control.input_value()
        control.click()
        names = page.locator("[role=option]:visible").all_inner_texts()
        names = [name.strip().removeprefix("✓").strip() for name in names]
        other = next(name for name in names if name != value and "/" not in name)
        control.fill(other)
        control.press("Enter")
    else:
        is_bands = re.search(r"\d", control.get_attribute("placeholder") or "")
        control.fill("3, 2, 1" if is_bands else "Is there a tree?")
        control.press("Enter")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tab", TABS)
def test_every_control_changes_a_result(open_page, tab, size):
    """Each control is changed once, on the phone each button; no error may appear. Then the page must be accessible.

    A phone scrolls to the results of a button that computes them.
    """
    page, done, downloads = open_page(size, f"tab={tab}"), [], []
    page.on("download", lambda download: downloads.append(download))
    panel = page.locator("[role=tabpanel]:visible")
    for second in panel.locator("input[type=file]").all()[1:]:
        second.set_input_files(IMAGE.with_name("tree_crowns.jpg"))
        settle(page)
    for unchanged in ([], None):  # A control may only matter for a model that is chosen later, and is changed again.
        while marked := page.evaluate(NEXT, done):
            kind, key, is_run = marked
            done.append(key)
            if kind != "button" and size == "phone":
                continue
            if is_run:  # A result of the same input would be the same.
                panel.locator("fieldset", has_text="or an example").locator("input:not(:checked)").first.click()
                settle(page)
            before = results(page)
            change(page, kind)
            settle(page)
            if is_run and size == "phone":
                page.wait_for_timeout(500)  # for the smooth scrolling
                assert -10 < page.locator(".results:visible").first.bounding_box()["y"] < 422
            if kind != "button" and results(page) == before:
                panel.locator("button.run, button.primary").locator("visible=true").first.click()
                settle(page)
            if results(page) == before and not downloads and not WITHOUT_RESULT.match(key):
                assert unchanged is not None, f"{key} changes nothing"
                unchanged.append(key)
            downloads.clear()
            assert not page.evaluate("window.messages"), key
            assert page.locator("[data-testid=status-tracker] .error:visible").count() == 0, key
        done = [key for key in done if key not in (unchanged or [])]
    assert len(done) > 3
    page.screenshot(path=SCREENSHOTS / f"{tab}_{size}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    found = Axe().run(page).response["violations"]
    serious = {one["id"]: one["nodes"][0]["html"][:200] for one in found if one["impact"] in ("serious", "critical")}
    assert serious == {}


@pytest.mark.parametrize("size", SIZES)
def test_first_screen_is_understood_without_jargon(open_page, size):
    """Sentence, swipe, controls and their figures are on one screen, without a term that a stranger does not know."""
    page, (width, height) = open_page(size), SIZES[size]
    expect(page.get_by_role("heading", level=2)).to_contain_text("learned to tell trees from ground by answering")
    text = page.evaluate("document.body.innerText")
    assert not re.search(r"ViT|VRL|CLS|PCA|AUC|rollout|hidden_state", text)
    areas = read_finding(Models(str(PACKED))).areas
    for name, title in ((TRAINED, "Trained model"), (UNTRAINED, "Untrained"), (PIXELS, "Colors only")):
        caption = page.locator(".caption.prose", has_text=re.compile(f"^{title}"))
        expect(caption).to_contain_text(f"{100 * areas[name]:.0f} of 100")
        assert caption.bounding_box()["y"] + caption.bounding_box()["height"] < height
    swipe = page.locator("#swipe img").first.bounding_box()
    assert abs(swipe["width"] - swipe["height"]) < 2 and swipe["width"] > min(320, width / 4)
    for tab in page.get_by_role("tab").all():  # none is behind a menu
        box = tab.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    page.screenshot(path=SCREENSHOTS / f"start_{size}.png")


@pytest.mark.parametrize("tab, column", [("backbone", ".results"), ("vrl", ".inputs")])
def test_shorter_column_stays_in_view(open_page, tab, column):
    page = open_page(query=f"tab={tab}")
    page.mouse.wheel(0, 300)
    page.wait_for_timeout(300)
    assert 0 <= page.locator(f"{column}:visible").first.bounding_box()["y"] < 300


def test_click_and_arrow_keys_move_the_point(open_page):
    page = open_page(query="tab=backbone")
    joined, shown = [], page.locator("#map_a img").first
    page.on("request", lambda request: joined.append(request.url) if "queue/join" in request.url else None)
    box = shown.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.2)
    expect(shown).to_have_attribute("alt", re.compile("^Similarity to the point.+quickstart, layer 4 of 4"))
    page.wait_for_function("new URLSearchParams(location.search).get('map') === 'Similarity to the point'")
    assert (number(page, "x"), number(page, "y")) == pytest.approx((70, 20), abs=1.5) and len(joined) == 1
    before = number(page, "x")
    page.locator("#map_a").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"Math.abs(new URLSearchParams(location.search).get('x') - {before + 100 / 28}) < 0.2")


def number(page, key):
    return float(parse_qs(urlparse(page.url).query)[key][0])


def test_link_restores_the_page(open_page):
    page = open_page(query="tab=backbone")
    page.get_by_label("Trees, Yellowstone").first.check()
    page.get_by_role("radio", name="Attention", exact=True).check()
    settle(page)
    shown = page.locator("#map_a img").first.get_attribute("alt")
    assert re.match("Attention.+quickstart", shown)
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_function("new URLSearchParams(location.search).get('tab') === 'compare'")
    again = open_page(query=urlparse(page.url).query)
    expect(again.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    again.get_by_role("tab", name="Look inside").click()
    expect(again.get_by_role("radio", name="Attention", exact=True)).to_be_checked()
    expect(again.locator("#map_a img").first).to_have_attribute("alt", shown)


def test_refused_model_leaves_no_map_and_its_error_disappears(open_page):
    page = open_page(query="tab=backbone")
    choose(page, "Model (any Hub id)", "not a model")
    page.wait_for_function("window.messages.length")
    settle(page)
    assert page.locator("#map_a img, #map_b img").count() == 0
    choose(page, "Model (any Hub id)", "deep")
    expect(page.locator("#map_a img").first).to_have_attribute("alt", re.compile("deep, layer 6 of 6"))
    assert page.locator(".toast-body.error").count() == 0
    assert page.locator("[data-testid=status-tracker] .error:visible").count() == 0


def choose(page, label, name):
    box = page.get_by_label(label).locator("visible=true").first
    box.fill(name)
    box.press("Enter")


def test_every_kind_of_model_opens(open_page):
    page = open_page(query="tab=backbone")
    page.locator("#about button").first.click()
    for name, kind in (("deep", "backbone"), ("land", "fine-tuned model"), ("ships", "fine-tuned model")):
        choose(page, "Model (any Hub id)", name)
        expect(page.locator("#map_a img").first).to_have_attribute("alt", re.compile(f"{name}, layer"))
        expect(page.locator("#about")).to_contain_text(f"{name}, a {kind}")


def test_bad_file_and_markup_are_shown_as_text(open_page, tmp_path):
    (tmp_path / "text.jpg").write_text("This is not an image.")
    page = open_page(query="tab=backbone")
    page.locator("#backbone_image input[type=file]").set_input_files(tmp_path / "text.jpg")
    page.wait_for_function("window.messages.some((one) => one.includes('text.jpg cannot be opened'))")
    page.get_by_role("tab", name="Ask").click()
    markup = "<b>How many</b> trees?<img src=x onerror='window.harmed = true'>"
    question = page.locator("#ask-question textarea, #ask-question input").first
    question.fill(markup)
    question.press("Enter")
    expect(page.get_by_text("<b>How many</b> trees?<img src=x").first).to_be_visible()
    settle(page)
    assert page.evaluate("window.harmed") is None


def test_pasted_image_is_uploaded(open_page):
    paste = """(data) => {
        const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "pasted.png", {type: "image/png"}));
        document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
    }"""
    page = open_page(query="tab=backbone")
    for width in (120, 60):  # The second image replaces the first.
        buffer = io.BytesIO()
        picture(width, 40).save(buffer, "PNG")
        page.evaluate(paste, base64.b64encode(buffer.getvalue()).decode())
        expect(page.locator("#backbone_note")).to_contain_text(f"{width} × 40 pixels")


def test_slow_model_does_not_block_other_visitors(open_page):
    """One visitor names a model on a Hub that does not answer, another one computes."""
    waiting, other = open_page(query="tab=backbone"), open_page(query="tab=backbone")
    choose(waiting, "Model (any Hub id)", "slow/model")
    start = time.monotonic()
    other.get_by_role("radio", name="Attention", exact=True).check()
    expect(other.locator("#map_a img").first).to_have_attribute("alt", re.compile("^Attention.+quickstart"))
    assert time.monotonic() - start < 15
    expect(waiting.locator("#map_a img")).to_have_count(0)
    waiting.wait_for_function("window.messages.some((one) => one.includes('slow/model'))")


def test_controls_have_labels(open_page):
    """All visible controls and images of every tab have a label or an alternative text."""
    page = open_page()
    for tab in page.get_by_role("tab").all():
        tab.click()
        page.wait_for_timeout(300)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, select, button, img:not([alt=''])")]
                .filter((element) => element.offsetParent !== null && element.type !== "file")
                .filter((element) => !(element.labels?.length || element.ariaLabel || element.title || element.alt
                    || element.ariaLabelledByElements?.length || element.textContent.trim()
                    || element.querySelector("[alt]:not([alt=''])") || element.placeholder || element.closest("label")))
                .map((element) => element.outerHTML.slice(0, 300))"""
        )
        assert nameless == []


def test_page_and_large_photo_are_fast(open_page, tmp_path):
    start = time.monotonic()
    page = open_page(query="tab=backbone")
    expect(page.locator("#map_b img").first).to_be_visible()
    first = time.monotonic() - start
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=90)
    start = time.monotonic()
    page.locator("#backbone_image input[type=file]").set_input_files(tmp_path / "large.jpg")
    expect(page.locator("#backbone_note")).to_contain_text("4000 × 3000 pixels")
    expect(page.locator("#map_a img").first).to_be_visible()
    large = time.monotonic() - start
    print(f"page with its example {first:.2f} s, map of 4000 x 3000 {large:.2f} s")
    assert first < 5 and large < 10
