"""The Space in headless Chromium, on desktop and phone, from the first page to a downloaded map.

Screenshots are kept in `outputs/screenshots`.
"""

import base64
import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import parse_qs, urlparse

import nibabel
import numpy as np
import pydicom
import pytest
import rasterio
import torch
from axe_playwright_python.sync_playwright import Axe
from boxes import COLORS
from loading import PACKED
from original_detectors import original_detector
from paths import ROOT
from pictures import picture
from PIL import Image, ImageColor, ImageOps
from playwright.sync_api import expect, sync_playwright
from pydicom.data import get_testdata_file
from reading import read_image
from sklearn.metrics import roc_auc_score
from tiny_models import HEAD, VISION, adapter_config
from transformers import AutoModel

from modeling_vitp import (
    ViTPChangeDetectionConfig,
    ViTPDetectionImageProcessor,
    ViTPForChangeDetection,
    ViTPForConditionalGeneration,
    ViTPForSemanticSegmentation,
    ViTPProcessor,
    ViTPSegmentationConfig,
    ViTPSegmentationImageProcessor,
    ViTPVisionConfig,
    ViTPVisionModel,
    export_backbone,
)
from modeling_vitp.images.corruptions import corrupt

WAIT = 120_000  # milliseconds, on a busy machine
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CROWNS = ROOT / "space" / "examples" / "tree_crowns.jpg"
IMAGE = ROOT / "space" / "examples" / "trees_florida.jpg"
PALETTE = np.array([ImageColor.getrgb(color) for color in COLORS], dtype=np.uint8)
SCREENSHOTS = ROOT / "outputs" / "screenshots"
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
def models(tmp_path_factory):
    """Return models of all kinds by the names of their folders, in the working directory of the app."""
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
    deep = ViTPVisionConfig(**VISION | {"num_hidden_layers": 6}, initializer_range=0.3, layer_scale_init_value=1.0)
    export_backbone(ViTPVisionModel(deep), folder / "deep")
    return folder, {name: model for name, (model, _) in models.items()}


@pytest.fixture(scope="module")
def silent_hub():
    """Return an address that accepts connections but never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def url(models, silent_hub):
    """Start the app with the packed model from the command line and return its address."""
    folder, fine_tuned = models
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": silent_hub,
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "PYTHONUNBUFFERED": "1",
        "VITP_BACKBONES": str(folder / "deep"),
        "VITP_FINE_TUNED": ",".join(fine_tuned),
    }
    for name in ("VITP_MODEL", "GRADIO_SERVER_PORT"):
        environment.pop(name, None)
    log = folder / "log"
    with log.open("w") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, ROOT / "space" / "app.py"], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 240
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        print(f"the app was there after {time.monotonic() - start:.1f} s")
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


@pytest.fixture(scope="module")
def desk(browser):
    """Return a desktop browser context, whose pages share the cache."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    yield context
    context.close()


@pytest.fixture(scope="module")
def phone(browser):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True, is_mobile=True
    )
    yield context
    context.close()


@pytest.fixture
def page(desk, url):
    """Return a desktop page of the app and check that no script raised an error."""
    page = desk.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    open_page(page, url)
    yield page
    page.close()
    assert errors == []


def open_page(page, url):
    """Wait until the first image is visible, and record messages, which fade out."""
    page.set_default_timeout(WAIT)
    page.add_init_script(
        """window.messages = new Set();
        new MutationObserver(() => document.querySelectorAll(".toast-body").forEach(
            (toast) => window.messages.add(toast.innerText))).observe(document, {childList: true, subtree: true});"""
    )
    page.goto(url)
    expect(page.locator("#map_b img")).to_be_visible()


def upload(page, path, place="#backbone_image"):
    if page.locator(f"{place} input[type=file]").count() == 0:
        page.locator(f"{place} button[aria-label=Clear], {place} button[title=Clear]").first.click()
    page.locator(f"{place} input[type=file]").set_input_files(path)


def wait_for_message(page, text):
    page.wait_for_function("(text) => [...window.messages].some((one) => one.includes(text))", arg=text, timeout=WAIT)


def choose(page, label, name, index=0):
    """Choose a value in a visible dropdown."""
    box = page.get_by_label(label).locator("visible=true").nth(index)
    box.fill(name)
    box.press("Enter")


def enter(page, field, text):
    """Enter a text until it is kept; a field of an accordion is reset shortly after opening."""
    deadline = time.monotonic() + 30
    field.fill(text)
    page.wait_for_timeout(100)
    while field.input_value() != text:
        assert time.monotonic() < deadline, f"a field stays at {field.input_value()}"
        field.fill(text)
        page.wait_for_timeout(100)
    field.press("Enter")


def move(page, slider, value):
    enter(page, page.locator(f"{slider} input[type=number]"), str(value))


def shoot(page, name):
    page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def query_of(page):
    return {key: values[0] for key, values in parse_qs(urlparse(page.url).query).items()}


def map_image(page, place="#map_a"):
    """Return the pixels of the visible map."""
    source = page.locator(f"{place} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def wait_for_map(page, is_right, place="#map_a"):
    """Wait until the visible map passes a check."""
    deadline = time.monotonic() + WAIT / 1000
    while not is_right(map_image(page, place)):
        assert time.monotonic() < deadline, "the map is another"
        page.wait_for_timeout(200)


def plain_states(folder, pixels):
    """Return hidden states and attentions of transformers for uint8 pixels of whole patches."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    values = torch.from_numpy((pixels / 255 - MEAN) / STD).movedim(-1, 0)[None].float()
    with torch.no_grad():
        return model(values, output_hidden_states=True, output_attentions=True)


def test_first_page_shows_finding(browser, url, models):
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    start = time.monotonic()
    open_page(page, url)
    print(f"the finding was seen {time.monotonic() - start:.1f} s after the page was asked for")
    trained = page.locator("#map_a img")
    expect(trained).to_have_attribute("alt", re.compile("PCA of features of quickstart, layer 4 of 4"))
    random = re.compile("PCA of features of quickstart, random weights, layer 4 of 4")
    expect(page.locator("#map_b img")).to_have_attribute("alt", random)
    expect(page.locator("#backbone_note")).to_contain_text("Tree crowns: JPEG, RGB, 224 × 224 pixels")
    pixels = np.asarray(Image.open(CROWNS).convert("RGB"))
    whole = ViTPForConditionalGeneration.from_pretrained(PACKED, dtype=torch.float32).model.vision_tower
    vit = whole.eval()
    with torch.no_grad():
        values = torch.from_numpy((pixels / 255 - MEAN) / STD).movedim(-1, 0)[None].float()
        features = vit(values).last_hidden_state[0, 1:].double().numpy()
    left, _, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    marked, middle = np.zeros((28, 28), bool), (np.arange(28) + 0.5) * 8
    for x0, y0, x1, y1 in json.loads(CROWNS.with_suffix(".json").read_text())["boxes"]:
        marked |= ((middle > y0) & (middle < y1))[:, None] & ((middle > x0) & (middle < x1))
    areas = [roc_auc_score(marked.ravel(), left[:, index]) for index in range(3)]
    best = max(max(area, 1 - area) for area in areas)
    expect(page.locator("#finding")).to_contain_text("component of quickstart separates patches of tree crowns")
    expect(page.locator("#finding")).to_contain_text(f"with an AUC of {best:.2f}")
    found = re.findall(r"0\.\d\d", page.locator("#finding").inner_text())
    assert float(found[0]) > float(found[1]) + 0.05
    shoot(page, "first_page_light")
    page.close()


def test_click_is_one_request_and_download_on_demand(page, models, tmp_path):
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "queue/join" in request.url else None)
    shown = page.locator("#map_a img")
    box = shown.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.2)
    expect(shown).to_have_attribute("alt", re.compile("Similarity to the point of quickstart, layer 4 of 4"))
    expect(page.get_by_role("radio", name="Similarity to the point")).to_be_checked()
    page.wait_for_function("new URLSearchParams(location.search).get('map') === 'Similarity to the point'")
    query = query_of(page)
    assert float(query["x"]) == pytest.approx(70, abs=1.5) and float(query["y"]) == pytest.approx(20, abs=1.5)
    page.wait_for_timeout(1000)
    assert len(asked) == 1
    assert not list((models[0] / "uploads").rglob("*.npz"))
    ring = np.argwhere(map_image(page).sum(-1, dtype=int) == 765)
    np.testing.assert_allclose(ring.mean(0) / 768, (0.2, 0.7), atol=0.03)
    with page.expect_download() as download:
        page.locator("#keep_features").click()
    download.value.save_as(tmp_path / "features.npz")
    with np.load(tmp_path / "features.npz") as arrays:
        assert arrays["image"] == "Tree crowns" and arrays["layers"].tolist() == [4, 4]
        assert arrays["map_a"].shape == (28, 28) and arrays["kind"] == "Similarity to the point"
        place = int(float(query["y"]) / 100 * 28), int(float(query["x"]) / 100 * 28)
        features = arrays["features_a"]
        clicked = features[:, place[0], place[1], None, None]
        expected = (features * clicked).sum(0) / np.linalg.norm(features, axis=0) / np.linalg.norm(clicked)
        np.testing.assert_allclose(arrays["map_a"], expected, atol=1e-5)
    shoot(page, "similarity_light")


def test_layer_sliders_and_scales_follow_each_backbone(page, models):
    """Attention of a deep and a shallow backbone is compared on an image five times as wide as high."""
    picture(5 * 56, 56).save(models[0] / "wide.png")
    upload(page, models[0] / "wide.png")
    expect(page.locator("#backbone_note")).to_contain_text("wide.png")
    choose(page, "Backbone (any Hub id)", "deep")
    shown = page.locator("#map_a img")
    expect(shown).to_have_attribute("alt", re.compile("of deep, layer 6 of 6"))
    choose(page, "Second backbone, side by side", "quickstart")
    expect(page.locator("#map_b img")).to_have_attribute("alt", re.compile("of quickstart, layer 4 of 4"))
    page.get_by_role("radio", name="Attention", exact=True).check()
    expect(shown).to_have_attribute("alt", re.compile("^Attention of deep, layer 6 of 6"))
    move(page, "#layer", 5)
    expect(shown).to_have_attribute("alt", re.compile("^Attention of deep, layer 5 of 6"))
    move(page, "#resolution", 20)
    expect(page.locator("#backbone_note")).to_contain_text("4 × 20 patches")
    expect(page.locator("#map_b img")).to_have_attribute("alt", re.compile("^Attention of quickstart, layer 4 of 4"))
    pixels = np.asarray(Image.open(models[0] / "wide.png").convert("RGB"))
    attention = plain_states(models[0] / "deep", pixels).attentions[4][0].mean(0)[0, 1:].reshape(4, 20).numpy()
    low, high = (f"{value:.3g}" for value in (attention.min(), attention.max()))
    expect(shown).to_have_attribute("alt", re.compile(f"from dark, {re.escape(low)}, to bright, {re.escape(high)}"))
    maps = [map_image(page, place) for place in ("#map_a", "#map_b")]
    for one in maps:
        assert one.shape[:2] == (154, 768) and one.max() > 200  # The aspect ratio is kept and the image is not black.
    patch = np.argwhere(maps[0].sum(-1, dtype=int) > maps[0].sum(-1, dtype=int).max() - 90).mean(0) / (
        154 / 4,
        768 / 20,
    )
    assert tuple(patch.astype(int)) == np.unravel_index(attention.argmax(), (4, 20))
    assert str(models[0] / "deep") not in page.content()
    shoot(page, "attention_two_backbones_light")


def test_map_controls(page, models):
    """Opacity, color bar, all heads, foreground, second image and arrow keys change the maps."""
    pixels = np.asarray(Image.open(CROWNS).convert("RGB"))
    shown = page.locator("#map_a img")
    move(page, "#map_opacity", 0)
    wait_for_map(page, lambda drawn: np.ptp(drawn.astype(int), axis=-1).max() <= 3)  # the image in gray
    move(page, "#map_opacity", 1)
    wait_for_map(page, lambda drawn: np.ptp(drawn.astype(int), axis=-1).max() > 60)
    page.get_by_role("radio", name="PCA of the foreground").check()
    expect(shown).to_have_attribute("alt", re.compile("^PCA of the foreground of quickstart"))
    wait_for_map(page, lambda drawn: 0.05 < (np.ptp(drawn.astype(int), axis=-1) <= 3).mean() < 0.95)
    page.get_by_role("radio", name="Attention of every head").check()
    expect(shown).to_have_attribute("alt", re.compile("^Attention of every head of quickstart, layer 4 of 4"))
    expect(page.locator("#backbone_note code").first).to_have_text("attentions[3]")
    expect(page.locator("#backbone_note .colorbar")).to_have_count(2)
    shoot(page, "heads_light")

    box = page.locator("#map_a").locator("..").locator("..").get_by_role("img").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.get_by_role("radio", name="Similarity to the point").check()
    upload(page, IMAGE, "#backbone_second_image")
    there = page.locator("#map_c img")
    expect(there).to_have_attribute("alt", re.compile("Similarity to the point, in Trees, Florida, by quickstart"))
    x, y = (float(page.locator(f"{one} input[type=number]").input_value()) for one in ("#point_x", "#point_y"))
    vit = ViTPForConditionalGeneration.from_pretrained(PACKED, dtype=torch.float32).model.vision_tower.eval()

    @torch.no_grad()
    def features(image):
        small = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) / 255
        values = torch.from_numpy((small - MEAN) / STD).movedim(-1, 0)[None].float()
        return vit(values).last_hidden_state[0, 1:].reshape(28, 28, -1)

    vector = features(Image.fromarray(pixels))[int(y / 100 * 28), int(x / 100 * 28)]
    likeness = torch.cosine_similarity(features(Image.open(IMAGE).convert("RGB")), vector, dim=-1).numpy()
    drawn = map_image(page, "#map_c").sum(-1, dtype=int)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert likeness[int(row / drawn.shape[0] * 28), int(column / drawn.shape[1] * 28)] > likeness.max() - 0.02

    page.locator("#map_a").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"Math.abs(document.querySelector('#point_x input').value - {x + 100 / 28}) < 0.2")
    page.wait_for_function(f"Math.abs(new URLSearchParams(location.search).get('x') - {x + 100 / 28}) < 0.2")
    label = "document.querySelector(\"label[data-testid='Trees, Florida-radio-label']\")"
    thumbnail = f"getComputedStyle({label}, '::before').backgroundImage"
    assert page.evaluate(thumbnail).startswith('url("data:image/jpeg')


def test_domain_images_follow_reading_controls(page, tmp_path):
    """Sentinel-2 bands are found by name, CT uses a window, and a volume has slices."""
    data = np.random.default_rng(0).integers(0, 4000, (4, 56, 56)).astype(np.uint16)
    options = {"driver": "GTiff", "height": 56, "width": 56, "count": 4, "dtype": "uint16"}
    with rasterio.open(tmp_path / "sentinel.tif", "w", **options) as target:
        target.write(data)
        for index, name in enumerate(("B02", "B03", "B04", "B08")):
            target.set_band_description(index + 1, name)
    values = np.add.outer(np.zeros((60, 60)), 100 * np.arange(9)).astype(np.int16)
    values[20:40] += 500
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "volume.nii.gz")
    note, shown = page.locator("#backbone_note"), "#backbone_picture"

    def stretched(band):
        low, high = np.percentile(data[band], (2, 98))
        return (255 * np.clip((data[band] - low) / (high - low), 0, 1)).round()

    def is_like(expected):
        def check(drawn):
            small = np.asarray(Image.fromarray(drawn).resize(expected.shape[1::-1], Image.Resampling.BOX)).astype(float)
            return np.corrcoef(small.ravel(), expected.ravel())[0, 1] > 0.97

        return check

    upload(page, tmp_path / "sentinel.tif")
    expect(note).to_contain_text("bands 3, 2, 1 of 4")
    wait_for_map(page, is_like(np.stack([stretched(band) for band in (2, 1, 0)], -1)), shown)
    page.get_by_text("Reading of the image").click()
    enter(page, page.locator("#bands input, #bands textarea"), "4, 3, 2")
    expect(note).to_contain_text("bands 4, 3, 2 of 4")
    wait_for_map(page, is_like(np.stack([stretched(band) for band in (3, 2, 1)], -1)), shown)
    page.locator("#bands input, #bands textarea").fill("")
    upload(page, get_testdata_file("CT_small.dcm", download=False))
    expect(note).to_contain_text("CT slice: DICOM, CT")
    page.locator("#preset").get_by_role("radio", name="lung").check()
    expect(note).to_contain_text("window -1350 to 150")
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    units = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    lung = 255 * np.clip((units + 1350) / 1500, 0, 1)
    wait_for_map(page, is_like(np.stack([lung] * 3, -1)), shown)
    page.locator("#preset").get_by_role("radio", name="as the file says").check()
    upload(page, tmp_path / "volume.nii.gz")
    expect(note).to_contain_text("NIfTI, slice 5 of 9")
    move(page, "#slice", 100)
    expect(note).to_contain_text("NIfTI, slice 9 of 9")
    shoot(page, "volume_light")


def test_overview_click_moves_scene_window(page, tmp_path):
    """The map shows the window of the file, and the overview shows its outline."""
    ramps = np.broadcast_to(np.arange(3000, dtype=np.uint16) // 12, (3000, 3000))
    data = np.stack([ramps, ramps.T, np.zeros_like(ramps)]).astype(np.uint8)
    options = {"driver": "GTiff", "height": 3000, "width": 3000, "count": 3, "dtype": "uint8", "tiled": True}
    with rasterio.open(tmp_path / "scene.tif", "w", **options) as target:
        target.write(data)
    upload(page, tmp_path / "scene.tif")
    expect(page.locator("#backbone_note")).to_contain_text("scene.tif")
    page.get_by_text("A window of a large scene").click()
    move(page, "#part", 20)
    overview = page.locator("#overview img")
    expect(overview).to_be_visible()
    box = overview.bounding_box()
    overview.click(position={"x": 0.8 * box["width"], "y": 0.25 * box["height"]})

    def is_there(drawn):
        """Return whether the picture is the window of 20% around the click."""
        red, green, _ = drawn.reshape(-1, 3).mean(0)
        return abs(red - 0.8 * 250) < 4 and abs(green - 0.25 * 250) < 4

    wait_for_map(page, is_there, "#backbone_picture")
    x, y = (float(page.locator(f"{one} input[type=number]").input_value()) for one in ("#center_x", "#center_y"))
    assert abs(x - 80) < 0.5 and abs(y - 25) < 0.5
    drawn = map_image(page, "#overview")
    outline = np.argwhere((drawn == 255).all(-1))
    (top, left), (bottom, right) = outline.min(0), outline.max(0)
    side = drawn.shape[0]
    for found, wanted in ((left, 0.7), (right, 0.9), (top, 0.15), (bottom, 0.35)):
        assert abs(found / side - wanted) < 0.01
    page.wait_for_function("Math.abs(new URLSearchParams(location.search).get('wx') - 80) < 0.5")


def test_phone_shows_result_first(browser, url):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    open_page(page, url)
    assert page.locator("#map_a img").bounding_box()["y"] < page.locator("#backbone_image").bounding_box()["y"]
    assert page.locator("#finding").bounding_box()["y"] < 700
    shoot(page, "first_page_phone")
    page.close()


def test_every_kind_of_model_opens(page, models):
    page.get_by_role("tab", name="Backbone").click()
    for name, kind in (("deep", "backbone"), ("land", "fine-tuned model"), ("ships", "fine-tuned model")):
        choose(page, "Model (any Hub id)", name)
        expect(page.locator("#map_a img")).to_have_attribute("alt", re.compile(f"PCA of features of {name}, layer"))
        page.locator("#about button").first.click() if not page.locator("#about table").is_visible() else None
        expect(page.locator("#about")).to_contain_text(f"{name}, a {kind}")
    pixels = np.asarray(Image.open(CROWNS).convert("RGB").resize((224, 224)))
    with torch.no_grad():
        values = torch.from_numpy((pixels / 255 - MEAN) / STD).movedim(-1, 0)[None].float()
        choose(page, "Model (any Hub id)", "land")
        expect(page.locator("#map_a img")).to_have_attribute("alt", re.compile("of land, layer 4 of 4"))
        move(page, "#map_opacity", 1)
        move(page, "#resolution", 14)
        expect(page.locator("#backbone_note")).to_contain_text("14 × 14 patches")
        states = models[1]["land"](values, output_hidden_states=True).hidden_states[-1][0]
    flat = states.double().numpy() - states.double().numpy().mean(0)
    left = np.linalg.svd(flat, full_matrices=False)[0][:, 0].reshape(14, 14)
    red = map_image(page)[27::55, 27::55, 0][:14, :14].astype(float)
    assert abs(np.corrcoef(red.ravel(), np.clip(left * 14, -2, 2).ravel())[0, 1]) > 0.99
    choose(page, "Model (any Hub id)", "deep")
    page.get_by_role("tab", name="Ask").click()
    upload(page, IMAGE, "#ask-image")
    wait_for_message(page, "deep is a backbone and cannot answer")


def test_drop_ratio_slider_updates_tokens(page):
    page.get_by_role("tab", name="VRL").click()
    upload(page, IMAGE, "#vrl-image")
    summary = page.locator("#vrl-summary textarea, #vrl-summary input")
    expect(summary).to_have_value(re.compile(r"16 of 64|\d+ of \d+ visual tokens are kept"))
    kept, total = map(int, re.findall(r"\d+", summary.input_value().replace(",", ""))[:2])
    assert kept == -(-total // 4)  # initial drop ratio of 0.75
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
    dots = page.locator("#vrl-curve circle")
    expect(dots).to_have_count(6 * 4)  # three draws and their mean for each drop ratio
    check_vrl_curve(dots)
    shoot(page, "vrl_light")


@torch.no_grad()
def check_vrl_curve(dots):
    """Compare the curve with the probability of the full answer for the kept tokens, computed by teacher forcing."""
    full = ViTPForConditionalGeneration.from_pretrained(PACKED, dtype=torch.float32).eval()
    processor = ViTPProcessor.from_pretrained(PACKED)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many trees are there?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    image, answer, places = Image.open(IMAGE).convert("RGB"), None, {}
    names = ("data-draw", "data-ratio", "data-probability", "cx", "cy")
    for draw, *numbers in dots.evaluate_all(
        "(all, names) => all.map((dot) => names.map((n) => dot.getAttribute(n)))", names
    ):
        places[draw, float(numbers[0])] = tuple(map(float, numbers[1:]))
    for seed in range(3):
        for ratio in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95):
            given = {"vrl_drop_ratio": ratio, "vrl_keys": [(seed,)]} if ratio else {}
            inputs = processor(images=image, text=text, return_tensors="pt", **given)
            if answer is None:
                answer = full.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
                answer = answer[: answer.tolist().index(processor.tokenizer.eos_token_id) + 1]
            length = inputs["input_ids"].shape[1]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "position_ids" in inputs:
                following = inputs["position_ids"][:, -1:] + 1 + torch.arange(len(answer))
                inputs["position_ids"] = torch.cat([inputs["position_ids"], following], dim=1)
            scores = full(**inputs).logits[0, length - 1 : -1].log_softmax(-1)
            expected = scores.gather(-1, answer[:, None]).sum().exp().item()
            assert places[f"seed {seed}", ratio][0] == pytest.approx(expected, rel=1e-3)
    x, y = ([place[index] for place in places.values()] for index in (1, 2))
    assert np.polyfit(x, [ratio for _, ratio in places], 1, full=True)[1][0] < 1e-3
    assert np.polyfit(y, [place[0] for place in places.values()], 1, full=True)[1][0] < 1e-6
    for ratio in {ratio for _, ratio in places}:
        draws = [places[f"seed {seed}", ratio][0] for seed in range(3)]
        assert places["mean", ratio][0] == pytest.approx(np.mean(draws), rel=1e-4)


def test_answers_with_and_without_dropping(page, tmp_path):
    page.get_by_role("tab", name="VRL").click()
    upload(page, CROWNS, "#vrl-image")
    expect(page.locator("#vrl-tiles img")).to_be_visible()
    page.locator("#vrl-both").click()
    whole, short = (page.locator(f"#{one} textarea, #{one} input") for one in ("vrl-whole", "vrl-short"))
    expect(short).to_have_value(re.compile("from 13 visual tokens in"))
    full = ViTPForConditionalGeneration.from_pretrained(PACKED, dtype=torch.float32).eval()
    processor = ViTPProcessor.from_pretrained(PACKED)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many trees are there?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    for ratio, box in ((0.0, whole), (0.75, short)):
        image = Image.open(CROWNS).convert("RGB")
        inputs = processor(images=image, text=text, vrl_drop_ratio=ratio, vrl_keys=[(0,)], return_tensors="pt")
        given = full.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = processor.tokenizer.decode(given, skip_special_tokens=True).strip()
        assert re.search(f": {re.escape(answer)}, probability", box.input_value())
    sequence = map_image(page, "#vrl-sequence")[8::16, 8::16].reshape(-1, 3)
    assert (sequence == (255, 176, 0)).all(1).sum() == 13 and (sequence == (51, 65, 85)).all(1).sum() == 49 - 13
    shoot(page, "vrl_explained_light")


def test_question_is_answered(page):
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
    wait_for_message(page, "The question is empty")


def test_url_restores_the_page(page, browser):
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


def test_corruption_chart_shows_shares_of_backbones(page, models, tmp_path):
    page.get_by_role("tab", name="Compare").click()
    picture(84, 70).save(tmp_path / "scene.png")
    upload(page, tmp_path / "scene.png", "#compare_image")
    expect(page.locator("#compare_image")).to_contain_text("scene")
    choose(page, "Backbone (any Hub id)", "deep")
    move(page, "#compare_resolution", 6)
    page.locator("#run_corruptions").click()
    note = page.locator("#compare_note")
    expect(note).to_contain_text("60 of 60 corrupted images")
    expect(note).to_contain_text("scene.png: PNG, RGB, 84 × 70 pixels; the floor is over 4 other images")
    chart = page.locator("#corruption_chart")
    assert chart.locator("figure").count() == 12 and chart.locator("circle").count() == 12 * 5 * 2
    assert chart.locator(".key").all_inner_texts() == ["deep", "deep, random weights"]

    def features(pixels):
        return plain_states(models[0] / "deep", pixels).last_hidden_state[0, 1:].double().numpy()

    def cosine(a, b):
        return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()

    pixels = np.asarray(picture(84, 70))
    clean = features(pixels)
    floor = np.mean([cosine(clean, features(np.asarray(ImageOps.fit(other, (84, 70))))) for other in examples()])
    for name, severity in (("haze", 3), ("gaussian_noise", 5)):
        similarity = cosine(clean, features(corrupt(pixels, name, severity, 0)))
        share = (similarity - floor) / (1 - floor)
        shown = chart.locator(f"[data-corruption={name}] [data-backbone='0'][data-severity='{severity}']")
        assert float(shown.get_attribute("data-share")) == pytest.approx(share, abs=2e-3)
    shoot(page, "compare_light")
    with page.expect_download() as download:
        page.locator("#keep_csv").click()
    download.value.save_as(tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(rows) == 120 and {row["backbone"] for row in rows} == {"deep", "deep, random weights"}
    assert float(rows[0]["floor"]) == pytest.approx(floor, abs=1e-3)
    with page.expect_download() as download:
        page.locator("#keep_png").click()
    download.value.save_as(tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").size == (1200, 840)


def examples():
    """Return the other examples as 8-bit RGB."""
    paths = [CROWNS, IMAGE.with_name("trees_yellowstone.jpg"), IMAGE]
    yield from (Image.open(path).convert("RGB") for path in paths)
    yield read_image(get_testdata_file("CT_small.dcm", download=False), 800).to_rgb()


def test_result_is_cleared_when_input_changes(page, tmp_path):
    page.get_by_role("tab", name="Compare").click()
    note, chart = page.locator("#compare_note"), page.locator("#corruption_chart")
    upload(page, IMAGE, "#compare_image")
    expect(page.locator("#compare_image")).to_contain_text("trees")
    page.locator("#run_corruptions").click()
    expect(note).to_contain_text("Trees, Florida", timeout=WAIT)
    expect(chart.locator("figure").first).to_be_visible()
    picture(60, 50).save(tmp_path / "next.png")
    upload(page, tmp_path / "next.png", "#compare_image")
    expect(chart.locator("figure")).to_have_count(0)
    expect(note).to_have_text("Choose an image or an example, then compare.")
    page.wait_for_timeout(4000)  # a canceled result must not appear later
    expect(chart.locator("figure")).to_have_count(0)

    page.get_by_role("tab", name="VRL").click()
    upload(page, IMAGE, "#vrl-image")
    answer = page.locator("#vrl-answer textarea, #vrl-answer input")
    saved = page.locator("#vrl-saved textarea, #vrl-saved input")
    expect(page.locator("#vrl-tiles img")).to_be_visible()
    page.locator("#vrl-ask").click()
    expect(answer).to_have_value(re.compile("^Trees, Florida: "))
    page.locator("#vrl-measure").click()
    expect(saved).to_have_value(re.compile("^Trees, Florida: at a drop ratio of 0.75"))
    upload(page, tmp_path / "next.png", "#vrl-image")
    expect(answer).to_have_value("")
    expect(saved).to_have_value("")
    expect(page.locator("#vrl-note textarea, #vrl-note input")).to_have_value(re.compile("^next.png: PNG"))


def test_slow_model_does_not_block_other_visitors(browser, page, url):
    """One visitor names a model on a Hub that does not answer, one computes for long, one waits."""
    choose(page, "Backbone (any Hub id)", "slow/model")
    others = [browser.new_page(), browser.new_page()]
    start = time.monotonic()
    open_page(others[0], url)
    others[0].get_by_role("radio", name="Attention rollout").check()
    expect(others[0].locator("#map_a img")).to_have_attribute("alt", re.compile("^Attention rollout of quickstart"))
    print(f"beside a model that is loading: page and map in {time.monotonic() - start:.1f} s")
    open_page(others[1], url)
    for other in others:
        other.get_by_role("tab", name="Compare").click()
        upload(other, IMAGE, "#compare_image")
        expect(other.locator("#compare_image")).to_contain_text("trees")
    move(others[0], "#compare_resolution", 28)
    others[0].locator("#run_corruptions").click()
    expect(others[0].locator("#corruption_chart")).to_contain_text(re.compile("severity"))
    others[1].locator("#run_corruptions").click()
    expect(others[1].get_by_text("Waiting: 1 before you")).to_be_visible()
    others[0].get_by_role("button", name="Cancel").locator("visible=true").click()
    expect(others[1].locator("#compare_note")).to_contain_text("corrupted images", timeout=WAIT)
    wait_for_message(page, "No public model 'slow/model'")
    for other in others:
        other.close()


@pytest.mark.parametrize("tab", ["Backbone", "VRL", "Ask", "Compare", "Apply"])
def test_tabs_have_no_serious_accessibility_violation(page, tab):
    """axe-core is used through the package axe-playwright-python."""
    page.get_by_role("tab", name=tab).click()
    page.wait_for_timeout(1000)
    found = Axe().run(page).response["violations"]
    serious = {one["id"]: one["nodes"][0]["html"][:200] for one in found if one["impact"] in ("serious", "critical")}
    assert serious == {}


@pytest.fixture
def apply(page, models, tmp_path):
    """Return a function that applies a model in its tab to pictures of 96 x 80 pixels.

    The function returns the pictures and the result of the model outside of the app.
    """
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
        return images, models[1][name](*inputs)

    return run


def enlarged(pixels):
    """Enlarge an image of 96 x 80 pixels eight times, as the tab Apply does."""
    return np.kron(pixels, np.ones((8, 8, 1), np.uint8)).astype(np.uint8)


def wait_for_picture(page, wanted):
    """Wait until the picture of the tab Apply passes a check."""
    deadline = time.monotonic() + 30
    while not np.array_equal(map_image(page, "#apply_picture"), wanted):
        assert time.monotonic() < deadline, "the picture is another"
        page.wait_for_timeout(200)


def test_detections_above_threshold_are_drawn(page, apply):
    (image,), outputs = apply("ships")
    scores = outputs.scores[0]
    legend = page.locator("#apply_legend")
    expect(legend).to_contain_text(f"Objects with a score above 0.3: {int((scores > 0.3).sum())}", timeout=60_000)
    shoot(page, "apply_light")
    move(page, "#threshold", 0.95)
    expect(legend).to_contain_text(f"Objects with a score above 0.95: {int((scores > 0.95).sum())}")
    assert 0 < (scores > 0.95).sum() < (scores > 0.3).sum()
    color = ImageColor.getrgb(COLORS[outputs.labels[0, 0]])  # the color of the best object, which is on top
    corners = outputs.pred_corners[0, 0].numpy() * [96, 80]
    middles = (corners + np.roll(corners, -1, 0)) / 2
    drawn = map_image(page, "#apply_picture")
    inside = [(x, y) for x, y in (8 * middles).round().astype(int) if 16 <= x < 8 * 94 and 160 <= y < 8 * 78]
    assert inside and drawn.shape == enlarged(image).shape
    for x, y in inside:
        assert (drawn[y - 2 : y + 3, x - 2 : x + 3] == color).all(-1).any()
    move(page, "#threshold", 1)
    expect(legend).to_contain_text("Objects with a score above 1: 0")
    wait_for_picture(page, enlarged(image))


def test_classes_are_drawn_on_the_image(page, apply):
    _, outputs = apply("land")
    labels = outputs.logits[0].argmax(0).numpy()
    for label in np.unique(labels):
        share = f"{100 * (labels == label).mean():.1f}%"
        expect(page.locator("#apply_legend")).to_contain_text(share, timeout=60_000)
    move(page, "#opacity", 1)
    wait_for_picture(page, enlarged(PALETTE[labels]))


def test_changes_are_drawn_on_the_second_image(page, apply):
    move(page, "#opacity", 1)
    images, outputs = apply("changes", pairs=True)
    labels = outputs.logits[0].argmax(0).numpy()
    share = f"{100 * (labels == 0).mean():.1f}%"
    expect(page.locator("#apply_legend")).to_contain_text(share, timeout=60_000)
    wait_for_picture(page, enlarged(np.where(labels[..., None] == 0, images[1], PALETTE[labels])))
    shoot(page, "apply_changes_light")


@pytest.mark.parametrize("tab", ["Backbone", "VRL", "Ask", "Compare", "Apply"])
def test_tabs_work_in_dark_mode_on_phone(phone, url, tab):
    page = phone.new_page()
    examples = "image=Trees%2C+Florida&cimage=CT+slice&vrl_image=Trees%2C+Florida&ask_image=CT+slice"
    page.goto(f"{url}?__theme=dark&{examples}&b=the+same+with+random+weights&tab={tab.lower()}")
    shown = {
        "Backbone": "#map_a img",
        "VRL": "#vrl-tiles img",
        "Ask": "#ask-picture img",
        "Compare": "#run_corruptions",
        "Apply": "#run_apply",
    }
    expect(page.locator(shown[tab])).to_be_visible()
    if tab == "Compare":
        expect(page.get_by_role("radio", name="CT slice")).to_be_checked()
        page.locator("#run_corruptions").click()
        expect(page.locator("#compare_note")).to_contain_text("60 of 60 corrupted images", timeout=60_000)
    shoot(page, f"{tab.lower()}_dark_phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 80
    page.close()


def test_controls_have_labels(page):
    """All visible controls and images of every tab have a label or an alternative text."""
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


def test_invalid_image_shows_message(page, tmp_path):
    (tmp_path / "text.jpg").write_text("This is not an image.")
    upload(page, tmp_path / "text.jpg")
    wait_for_message(page, "text.jpg cannot be opened")
    shoot(page, "message_light")
    page.get_by_label("Trees, Florida").first.check()
    expect(page.locator("#map_a img")).to_be_visible()


def test_pasted_image_is_uploaded(page):
    paste = """(data) => {
        const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "pasted.png", {type: "image/png"}));
        document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true}));
    }"""
    for width in (120, 60):  # The second image replaces the first.
        buffer = io.BytesIO()
        picture(width, 40).save(buffer, "PNG")
        page.evaluate(paste, base64.b64encode(buffer.getvalue()).decode())
        expect(page.locator("#backbone_note")).to_contain_text(f"{width} × 40 pixels")


def test_first_page_and_large_photo_are_fast(browser, url, tmp_path):
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
