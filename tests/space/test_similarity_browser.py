"""The tab Look inside in headless Chromium: clicks, arrow keys, similarity under the mouse, and copying."""

import base64
import io
import re
import shutil
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from app import build_app, launch_options
from loading import PACKED, Models
from maps import PCA, SIMILARITY
from matplotlib import colormaps
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from uploading import CROWNS, EXAMPLES

from modeling_vitp import ViTPForConditionalGeneration

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
READ = "async (kind) => { const [item] = await navigator.clipboard.read(); const blob = await item.getType(kind); %s }"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium not found: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        app = build_app(Models(str(PACKED)))
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **launch_options())
        yield url
        app.close()


@pytest.fixture(scope="module")
def context():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        context.set_default_timeout(60_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield context
        browser.close()


@pytest.fixture
def open_tab(context, url):
    """Return a function that opens the tab with these settings, and check that no script raised an error."""
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def open_tab(kind):
        settings = {"tab": "backbone", "map": kind, "opacity_of_map": 1, "boxes": 0}
        page.goto(f"{url}?{urlencode(settings)}")
        expect(page.locator("#map_b img")).to_have_attribute("alt", re.compile(f"^{kind}: "), timeout=60_000)
        return page

    yield open_tab
    page.close()
    assert errors == []


@torch.no_grad()
def features(name):
    """Return the features of an example by the packed model, of shape `(28, 28, channels)`."""
    vit = ViTPForConditionalGeneration.from_pretrained(PACKED, dtype=torch.float32).model.vision_tower.eval()
    small = np.asarray(Image.open(EXAMPLES[name]).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)) / 255
    values = torch.from_numpy((small - MEAN) / STD).movedim(-1, 0)[None].float()
    return vit(values).last_hidden_state[0, 1:].reshape(28, 28, -1)


def test_painted_similarities_are_exact_within_tolerance(open_tab):
    page = open_tab(SIMILARITY)
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


def test_click_is_one_request_and_link_and_picture_are_copied(open_tab):
    page, asked = open_tab(PCA), []
    page.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    shown = page.locator("#map_a img")
    box = shown.bounding_box()
    shown.click(position={"x": 0.7 * box["width"], "y": 0.2 * box["height"]})
    expect(shown).to_have_attribute("alt", re.compile(f"^{SIMILARITY}: quickstart, layer 4 of 4"), timeout=60_000)
    page.wait_for_function(f"new URLSearchParams(location.search).get('map') === '{SIMILARITY}'")
    expect(page.locator("#maps img")).to_have_count(5)
    page.wait_for_timeout(500)
    assert len(asked) == 1
    page.bring_to_front()
    page.locator("#copy_maps").click()
    expect(page.locator("#copy_maps")).to_have_text("Copied", timeout=10_000)
    assert page.evaluate(READ % "return await blob.text();", "text/plain") == page.url
    size = "const map = await createImageBitmap(blob); return [map.width, map.height];"
    assert page.evaluate(READ % size, "image/png") == [5 * 768, 768]
    page.locator("#map_a").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"Math.abs(new URLSearchParams(location.search).get('x') - {70 + 100 / 28}) < 0.3")
