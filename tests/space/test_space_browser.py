"""The Space in headless Chromium, on a desktop and on a phone: every button and every control of every tab.

The controls are found in the page itself, so that those of a new tab are tested too. Screenshots are kept in
`outputs/screenshots`.
"""

import base64
import io
import re
import shutil
import socket
import time
from urllib.parse import parse_qs, urlencode, urlparse

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from finding import PIXELS, TRAINED, UNTRAINED, read_finding
from handlers import normalized, running_app
from loading import PACKED, Models
from maps import PCA, SIMILARITY
from matplotlib import colormaps
from original_detectors import original_detector
from paths import ROOT
from pictures import picture
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from tiny_models import HEAD, VISION, adapter_config
from uploading import CROWNS, EXAMPLES

from modeling_vitp import (
    ViTPChangeDetectionConfig,
    ViTPDetectionImageProcessor,
    ViTPForChangeDetection,
    ViTPForConditionalGeneration,
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
READ = "async (kind) => { const [item] = await navigator.clipboard.read(); const blob = await item.getType(kind); %s }"
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
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": silent_hub, "VITP_BACKBONES": str(folder / "deep")}
    with running_app(folder, environment | {"VITP_FINE_TUNED": "ships,land,changes"}) as (url, _):
        yield url
    log = (folder / "log").read_text()
    assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def browser():
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def errors():
    """Return the failed scripts and requests of all pages, which `check_errors` checks after each test."""
    return []


@pytest.fixture(autouse=True)
def check_errors(errors):
    errors.clear()
    yield
    assert errors == []


@pytest.fixture(scope="module")
def open_page(browser, url, errors):
    """Return a function that opens a page, and waits until its tabs show their examples.

    Each page has a context of its own, because the pages of a context have six connections to a server in all.
    """

    def is_error(line):  # Gradio sends an invalid request if nothing is running that can be canceled.
        return line.type == "error" and not line.location["url"].endswith(("/cancel", "/reset"))

    def open_page(size="desktop", context=None, **query):
        if context is None:
            options = {"color_scheme": "dark", "has_touch": True, "is_mobile": True} if size == "phone" else {}
            options["viewport"] = dict(zip(("width", "height"), SIZES[size]))
            context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(f"{line.text} {line.location}") if is_error(line) else None)
        page.add_init_script(INSTRUMENTS)
        load(page, f"{url}?{urlencode(query)}")
        return page

    return open_page


def load(page, address):
    page.goto(address)
    page.wait_for_function("window.urlIsRestored")
    settle(page)


@pytest.fixture(scope="module")
def pages(open_page):
    """Return a page of each size, with few patches. Tests that change nothing come first."""
    return {size: open_page(size, res=12, cres=4) for size in SIZES}


@pytest.fixture(scope="module")
def map_page(open_page):
    """Return a page with maps that cover the image, without boxes."""
    return open_page(tab="backbone", map=SIMILARITY, opacity_of_map=1, boxes=0)


@pytest.fixture(scope="module")
def visitors(open_page):
    """Return the pages of two visitors, in which each test sets what it needs."""
    return [open_page(tab="backbone"), open_page(tab="backbone")]


INSTRUMENTS = """{
document.addEventListener("DOMContentLoaded", () => document.head.insertAdjacentHTML(
    "beforeend", "<style>* { animation: none !important; transition: none !important; }</style>"));
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
"""Errors that have been shown, the number of events that are being computed, and the time of the last change of it.

Nothing is animated, to save time.
"""


def settle(page):
    """Wait until no result is being computed."""
    page.wait_for_timeout(100)  # An event is sent shortly after a control has changed.
    page.wait_for_function("window.pending <= 0 && performance.now() - window.lastEvent > 200", polling=50)


def show(page, tab):
    """Open a tab, and forget the errors that have been shown."""
    page.get_by_role("tab", name=TABS[tab]).click()
    settle(page)
    page.evaluate("window.messages = []")


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
RESULTS_ARE_IN_VIEW = """() => {
    const top = [...document.querySelectorAll(".results")].find((one) => one.offsetParent).getBoundingClientRect().top;
    return -10 < top && top < 422;
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
def test_first_screen_is_understood_without_jargon(pages, size):
    """Sentence, swipe, controls and their figures are on one screen, without a term that a stranger does not know."""
    page, (width, height) = pages[size], SIZES[size]
    expect(page.get_by_role("heading", level=2)).to_contain_text("learned to tell trees from ground by answering")
    text = page.evaluate("document.body.innerText")
    assert not re.search(r"ViT|VRL|CLS|PCA|AUC|rollout|hidden_state", text)
    areas = read_finding(Models(str(PACKED))).areas
    for name, title in ((TRAINED, "Trained model"), (UNTRAINED, "Untrained"), (PIXELS, "Colors only")):
        caption = page.locator(".caption.prose", has_text=re.compile(f"^{title}"))
        expect(caption).to_contain_text(f"{100 * areas[name]:.0f} of 100")
        assert caption.bounding_box()["y"] + caption.bounding_box()["height"] < height
    for tab in page.get_by_role("tab").all():  # none is behind a menu
        box = tab.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    page.screenshot(path=SCREENSHOTS / f"start_{size}.png")


@torch.no_grad()
def features(name):
    """Return the features of an example by the packed model, of shape `(28, 28, channels)`."""
    vit = ViTPForConditionalGeneration.from_pretrained(PACKED, dtype=torch.float32).model.vision_tower.eval()
    small = np.asarray(Image.open(EXAMPLES[name]).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    return vit(normalized(small)).last_hidden_state[0, 1:].reshape(28, 28, -1)


def test_painted_similarities_are_exact_within_tolerance(map_page):
    page = map_page
    canvases = page.locator("#maps canvas.similarity")
    for target in ("#backbone_picture", "#map_b", "#map_a"):
        page.locator(f"{target} img").hover()
        expect(canvases).to_have_count(3)
    shown, canvas = page.locator("#map_a img"), page.locator("#map_a canvas")
    box = shown.bounding_box()
    shown.hover(position={"x": 0.3 * box["width"], "y": 0.6 * box["height"]})
    expect(canvas).to_have_attribute("data-place", str(16 * 28 + 8))
    assert canvas.bounding_box() == pytest.approx(shown.bounding_box(), abs=1)
    note = page.locator("#backbone_note").inner_text()
    tolerance = float(re.search(r"within ([\d.e-]+) of the exact", note)[1])
    assert tolerance < 0.02
    colors, vector = colormaps["inferno"](np.arange(256), bytes=True)[:, :3].astype(int), features(CROWNS)[16, 8]
    middles = ((np.arange(28) + 0.5) * 768 / 28).astype(int)
    for target, name in (("#map_a", CROWNS), ("#map_c", "Trees, Florida")):
        address = page.locator(f"{target} canvas").evaluate("(canvas) => canvas.toDataURL()")
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB"))
        indices = np.abs(drawn[np.ix_(middles, middles)][:, :, None].astype(int) - colors).sum(-1).argmin(-1)
        exact = torch.cosine_similarity(features(name), vector, dim=-1).numpy()
        painted = exact.min() + indices / 255 * (1 - exact.min())
        assert np.abs(painted - exact).max() < 2 * tolerance + 1 / 255  # of the value and of the scale's minimum
    page.mouse.move(2, 2)
    expect(canvases).to_have_count(0)


def test_click_is_one_request_and_link_and_picture_are_copied(map_page):
    page, asked = map_page, []
    page.get_by_role("radio", name=PCA, exact=True).check()
    expect(page.locator("#map_b img")).to_have_attribute("alt", re.compile(f"^{PCA}: "))
    settle(page)
    page.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    shown = page.locator("#map_a img")
    box = shown.bounding_box()
    shown.click(position={"x": 0.7 * box["width"], "y": 0.2 * box["height"]})
    expect(shown).to_have_attribute("alt", re.compile(f"^{SIMILARITY}: quickstart, layer 4 of 4"))
    page.wait_for_function(f"new URLSearchParams(location.search).get('map') === '{SIMILARITY}'")
    expect(page.locator("#maps img")).to_have_count(5)
    settle(page)
    assert (number(page, "x"), number(page, "y")) == pytest.approx((70, 20), abs=1.5) and len(asked) == 1
    page.bring_to_front()
    page.locator("#copy_maps").click()
    expect(page.locator("#copy_maps")).to_have_text("Copied")
    assert page.evaluate(READ % "return await blob.text();", "text/plain") == page.url
    size = "const map = await createImageBitmap(blob); return [map.width, map.height];"
    assert page.evaluate(READ % size, "image/png") == [5 * 768, 768]
    before = number(page, "x")
    page.locator("#map_a").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"Math.abs(new URLSearchParams(location.search).get('x') - {before + 100 / 28}) < 0.2")
    settle(page)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tab", TABS)
def test_every_control_changes_a_result(pages, tab, size):
    """Each control is changed once, on the phone each button; no error may appear. Then the page must be accessible.

    A phone scrolls to the results of a button that computes them.
    """
    page, done, downloads = pages[size], [], []
    page.on("download", lambda download: downloads.append(download))
    show(page, tab)
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
                page.wait_for_function(RESULTS_ARE_IN_VIEW)
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


def number(page, key):
    return float(parse_qs(urlparse(page.url).query)[key][0])


def test_link_restores_the_page(visitors):
    page, again = visitors
    page.get_by_label("Trees, Yellowstone").first.check()
    page.get_by_role("radio", name="Attention", exact=True).check()
    settle(page)
    shown = page.locator("#map_a img").first.get_attribute("alt")
    assert re.match("Attention.+quickstart", shown)
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_function("new URLSearchParams(location.search).get('tab') === 'compare'")
    load(again, page.url)
    expect(again.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    show(again, "backbone")
    expect(again.get_by_role("radio", name="Attention", exact=True)).to_be_checked()
    expect(again.locator("#map_a img").first).to_have_attribute("alt", shown)


def choose(page, label, name):
    box = page.get_by_label(label).locator("visible=true").first
    box.fill(name)
    box.press("Enter")


def test_bad_file_and_markup_are_shown_as_text(visitors, tmp_path):
    (tmp_path / "text.jpg").write_text("This is not an image.")
    page, _ = visitors
    show(page, "backbone")
    page.locator("#backbone_image input[type=file]").set_input_files(tmp_path / "text.jpg")
    page.wait_for_function("window.messages.some((one) => one.includes('text.jpg cannot be opened'))")
    show(page, "ask")
    markup = "<b>How many</b> trees?<img src=x onerror='window.harmed = true'>"
    question = page.locator("#ask-question textarea, #ask-question input").first
    question.fill(markup)
    question.press("Enter")
    expect(page.get_by_text("<b>How many</b> trees?<img src=x").first).to_be_visible()
    settle(page)
    assert page.evaluate("window.harmed") is None


def test_pasted_image_is_uploaded(visitors):
    paste = """(data) => {
        const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "pasted.png", {type: "image/png"}));
        document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
    }"""
    page, _ = visitors
    show(page, "backbone")
    for width in (120, 60):  # The second image replaces the first.
        buffer = io.BytesIO()
        picture(width, 40).save(buffer, "PNG")
        page.evaluate(paste, base64.b64encode(buffer.getvalue()).decode())
        expect(page.locator("#backbone_note")).to_contain_text(f"{width} × 40 pixels")


def test_refused_model_leaves_no_map_and_its_error_disappears(visitors):
    page, _ = visitors
    show(page, "backbone")
    choose(page, "Model (any Hub id)", "not a model")
    page.wait_for_function("window.messages.length")
    settle(page)
    assert page.locator("#map_a img, #map_b img").count() == 0
    choose(page, "Model (any Hub id)", "deep")
    expect(page.locator("#map_a img").first).to_have_attribute("alt", re.compile("deep, layer 6 of 6"))
    assert page.locator(".toast-body.error").count() == 0
    assert page.locator("[data-testid=status-tracker] .error:visible").count() == 0


def test_slow_model_does_not_block_other_visitors(visitors):
    """One visitor names a model on a Hub that does not answer, another one computes."""
    waiting, other = visitors
    for page in visitors:
        show(page, "backbone")
    choose(waiting, "Model (any Hub id)", "slow/model")
    start = time.monotonic()
    other.get_by_role("radio", name="Segments", exact=True).check()
    expect(other.locator("#map_a img").first).to_have_attribute("alt", re.compile("^Segments.+quickstart"))
    assert time.monotonic() - start < 15
    expect(waiting.locator("#map_a img")).to_have_count(0)
    waiting.wait_for_function("window.messages.some((one) => one.includes('slow/model'))")
