"""The page of the Space: header, theme, the first tab and the About box.

    vitp space
    python space/app.py

The environment variables that name the models are described in `loading.py`. Each further tab is a module with a
function `build_tab(models, model_name) -> Tab`, which is called inside its `gr.Tab`. `model_name` is the model selector
at the top of the page. Rules for a tab:

- It is a row of two columns of the CSS classes `inputs` and `results`. Rarely needed inputs are in an accordion of the
  class `more`. A button of the class `run` scrolls a phone to the results.
- Handlers that run a model are decorated with `@computing.answering`, use `computing.turn(progress)` around the
  computation, and get the path of an image from `ImageInput.on`. Slow ones have a button that cancels them.
- The handlers of `Tab.at_start` compute the example of the tab, once for all visitors.
- A result names its input, and `uploading.forget` clears it when the input or the model changes.
- Errors are raised as `computing.message(text)` or as a `ValueError` of one line.
- Events of the page are private; `api.py` has the functions for programs.
- Every component has a label, every image an `alt_text`. Sliders are created by `url_state.slider`.
"""

import gc
import html
import inspect
import os
import threading
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple

import api
import apply_tab
import ask_tab
import backbone_tab
import compare_tab
import gradio as gr
import limits
import vrl_tab
from computing import QUEUE, answering, limit_memory
from finding import PIXELS, TRAINED, UNTRAINED, Finding, pictures_of, read_finding
from huggingface_hub import HfApi, ModelCard
from loading import FINE_TUNED, FULL, RANDOM, TINY, Models
from maps import draw_map, patch_features
from PIL import Image
from torch import nn
from uploading import CROWNS, EXAMPLES, open_pixels, thumbnails
from url_state import Tab, keep_in_url

from modeling_vitp.images.pixels import align_scores, colors_of, principal_scores

HERE = Path(__file__).parent
TABS = {
    "backbone": ("Look inside", backbone_tab.build_tab),
    "vrl": ("Hide parts", vrl_tab.build_tab),
    "ask": ("Ask", ask_tab.build_tab),
    "compare": ("Compare", compare_tab.build_tab),
    "apply": ("Apply", apply_tab.build_tab),
}
THEME = gr.themes.Default(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(  # The contrast of text and background is at least 4.5 to 1.
    color_accent="#0f766e",
    button_primary_background_fill="#0f766e",
    button_primary_background_fill_dark="#0f766e",
    button_primary_background_fill_hover="#115e59",
    button_primary_background_fill_hover_dark="#115e59",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_dark="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
    button_cancel_background_fill_hover_dark="#991b1b",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_500",
)
TITLE = "What a vision model learned"
SENTENCE = "This vision transformer learned to tell trees from ground by answering questions about images."
EXPLANATION = """\
<p>In the map, squares that look like tree are <i class="swatch tree"></i> green, and like ground \
<i class="swatch ground"></i> violet. White boxes are trees that people marked.</p>
<p>The numbers say how often the tree is found in a pair of squares, one of tree and one of ground, on {num_images} \
images that the model never saw. Guessing gives 50 of 100. The trained model leads the untrained one by {untrained} \
and the colors by {pixels} (95% intervals over the images).</p>"""
MEASURED = """\
- For each of the three, a linear layer learns on the 20 training images to predict from the description of one square \
of 8 × 8 pixels whether it shows a tree. The colors are those of the square.
- The share of pairs is the area under the ROC curve (AUC), the mean over the {num_images} images: {areas}.
- The images lie in one part of an aerial scene. The model was trained on other parts and on two more scenes, with \
questions such as "How many trees are there?". The image above is the one whose area of trees is nearest to half.
- Color statistics of a square's surroundings, chosen by hand for this task, reach 0.84, more than this small model, \
which was trained on one CPU core for ten minutes. On another scene, with other colors, it does worse than an \
untrained one."""
CITATION = """@article{vitp2025,
  title   = {Visual Instruction Pretraining for Domain-Specific Foundation Models},
  author  = {Li, Yuxuan and Zhang, Yicheng and Tang, Wenhao and Dai, Yimian and Cheng, Ming-Ming and Li, Xiang and
             Yang, Jian},
  journal = {arXiv preprint arXiv:2509.17562},
  year    = {2025},
  url     = {https://arxiv.org/abs/2509.17562}
}"""


def build_app(models: Models) -> gr.Blocks:
    """Build the page without launching it."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        with gr.Row(equal_height=True):
            gr.Markdown(f"# {TITLE}")
            model_name = gr.Dropdown(
                models.names,
                value=models.default,
                label="Model (any Hub id)",
                allow_custom_value=True,
                elem_id="model",
            )
        state = {"model": model_name}
        at_start = []
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Start", id="start", elem_id="start"):
                build_start(models)
            for name, (title, build_tab) in TABS.items():
                with gr.Tab(title, id=name):
                    tab: Tab = build_tab(models, model_name)
                    state.update(tab.state)
                    at_start += tab.at_start
        with gr.Accordion("About", open=False, elem_id="about"):
            box = gr.Markdown(about(models, models.default))
        with gr.Accordion("For programs", open=False, elem_id="programs"):
            gr.Markdown(api.EXAMPLE)
        describe = answering(partial(about, models), gpu=False)
        model_name.input(
            describe,
            model_name,
            box,
            show_progress="hidden",
            api_name="about",
            **QUEUE,
        )
        api.build_api(models)
        app.examples = keep_in_url(app, tabs, state, at_start)
    return app.queue(max_size=None)  # `computing.Line` limits the number of waiting visitors.


def build_start(models: Models) -> None:
    """Build the first tab, whose pictures are computed now: the finding of the packed model, or a map of another."""
    finding = read_finding(models)
    if finding is not None:
        image, maps = pictures_of(models, finding)
        _build_finding(finding, image, maps)
        return
    bands = models.backbone().band_names
    if bands:
        gr.Markdown(f"## This vision model reads images with {len(bands)} bands. Open one in the tab Look inside.")
    else:
        _build_features(models)


class TitledMap(NamedTuple):
    """Map for comparison, with its title and the caption below it."""

    title: str
    picture: Image.Image
    caption: str


def _build_finding(finding: Finding, image: Image.Image, maps: dict[str, Image.Image]) -> None:
    gr.Markdown(f"## {SENTENCE}")
    scores = {name: f": <b>{100 * area:.0f}</b> of 100" for name, area in finding.areas.items()}
    controls = [
        TitledMap("Untrained", maps[UNTRAINED], "Untrained" + scores[UNTRAINED]),
        TitledMap("Colors only", maps[PIXELS], "Colors only" + scores[PIXELS]),
    ]
    hero(image, maps[TRAINED], f"Trained model, drag the line{scores[TRAINED]}", controls)
    explanation = EXPLANATION.format(
        num_images=finding.num_images,
        untrained=_in_percent(finding.leads[UNTRAINED]),
        pixels=_in_percent(finding.leads[PIXELS]),
    )
    gr.HTML(explanation, padding=False)
    with gr.Accordion("How this was measured", open=False):
        areas = ", ".join(f"{name} {area:.3f}" for name, area in finding.areas.items())
        gr.Markdown(MEASURED.format(num_images=finding.num_images, areas=areas))


def _in_percent(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _build_features(models: Models) -> None:
    """Show the principal components of the features of an example, beside those of random weights."""
    trained = models.backbone()
    untrained = models.backbone(trained.name.removesuffix(RANDOM) + RANDOM)
    pixels, _ = open_pixels(str(EXAMPLES[CROWNS]))
    scores = principal_scores(patch_features(trained, pixels, trained.native))
    untrained_scores = principal_scores(patch_features(untrained, pixels, trained.native))
    picture = draw_map(colors_of(scores), pixels)
    untrained_picture = draw_map(colors_of(align_scores(untrained_scores, scores)), pixels)
    image = Image.fromarray(pixels).resize(picture.size)
    title = "The same model, untrained"
    gr.Markdown(f"## What {plain(trained.name)} sees: squares that it describes alike have like colors.")
    hero(image, picture, "Drag the line", [TitledMap(title, untrained_picture, title)])
    gr.Markdown("The colors are computed without labels, so they name no objects. What both maps show was not learned.")


def hero(
    image: Image.Image,
    picture: Image.Image,
    caption: str,
    other_maps: Sequence[TitledMap],
) -> None:
    """Show an image and its map with a line to drag between them, and other maps."""
    with gr.Row(elem_classes="hero"):
        with gr.Column(scale=4, min_width=300):
            gr.ImageSlider(
                (image, picture),
                label="Image and map: drag the line",
                show_label=False,
                interactive=False,
                max_height=480,
                buttons=[],
                elem_id="swipe",
            )
            gr.HTML(caption, padding=False, elem_classes="caption")
        for other_map in other_maps:
            with gr.Column(scale=3, min_width=150):
                gr.Image(
                    other_map.picture,
                    label=other_map.title,
                    alt_text=f"Map. {other_map.title}",
                    show_label=False,
                    interactive=False,
                    buttons=[],
                )
                gr.HTML(other_map.caption, padding=False, elem_classes="caption")


def about(models: Models, name: str) -> str:
    """Return Markdown about a model, the app and the method."""
    kind = models.kind(name)
    vit = models.backbone(name)
    license, date = _license_and_date(models, name)
    patch = vit.patch[0]
    side = vit.native * patch
    rows = {
        "Model": f"`{html.escape(name.replace('`', ''))}`, a {kind}",
        "License": plain(license),
        "Date": date,
        "ViT": f"{vit.depth} layers, width {vit.model.config.hidden_size}, {_millions(vit.model)} M parameters, "
        f"{side} × {side} pixels in patches of {patch}",
    }
    if kind == FULL:
        model = models.full(name).model
        rows["Whole model"] = (
            f"{_millions(model)} M parameters, language model {plain(model.config.text_config.model_type)}, "
            f"trained with a drop ratio of {model.config.vrl_drop_ratio:g}"
        )
    if kind == FINE_TUNED:
        classes = ", ".join(models.fine_tuned(name).names)
        rows["Classes"] = plain(classes[:500])
    rows["This app"] = "modeling-vitp, Apache-2.0. Images: NEON, from DeepForest (MIT); CT slice from pydicom (MIT)"
    rows["Method"] = "ViTP, visual instruction pretraining: [arXiv 2509.17562](https://arxiv.org/abs/2509.17562)"
    lines = []
    for key, value in rows.items():
        without_bars = value.replace("|", "/")
        lines.append(f"| **{key}** | {without_bars} |")
    table = "\n".join(lines)
    return f"| | |\n|---|---|\n{table}\n\nTo cite the method:\n\n```bibtex\n{CITATION}\n```"


def plain(text: str) -> str:
    """Return Markdown that shows a text of a model as it is, without pictures and links to other servers."""
    characters = []
    for character in text:
        is_safe = character.isalnum() or character in " ,.-"
        characters.append(character if is_safe else f"&#{ord(character)};")
    return "".join(characters)


def _millions(model: nn.Module) -> str:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{num_parameters / 1e6:.3g}"


def _license_and_date(models: Models, name: str) -> tuple[str, str]:
    """Return license and date of a model, from its card and repository or its folder."""
    if name == TINY:
        return "Apache-2.0 (random weights, made by this app)", f"{datetime.now(timezone.utc):%Y-%m-%d}"
    source = models.source(name)
    card = None
    date = None
    try:
        if source is not None and Path(source).is_dir():
            seconds = Path(source, "config.json").stat().st_mtime
            date = datetime.fromtimestamp(seconds, timezone.utc)
            card = ModelCard.load(Path(source, "README.md")).data
        else:
            # A visitor's model is requested without the token of the app.
            token = None if source is not None else False
            info = HfApi(token=token).model_info(source or name, timeout=5)
            card = info.card_data
            date = info.last_modified
    except Exception:  # Without a card or the Hub, the box says that license and date are not known.
        pass
    license = getattr(card, "license", None) or "not stated"
    return str(license), f"{date:%Y-%m-%d}" if date else "not known"


def head() -> str:
    """Return the scripts of the page and the tags that describe a shared link."""
    tags = {"og:title": TITLE, "og:description": SENTENCE, "description": SENTENCE}
    space = os.environ.get("SPACE_ID")
    if space:
        tags["og:image"] = f"https://huggingface.co/spaces/{space}/resolve/main/thumbnail.jpg"
    lines = [f'<meta name="{key}" property="{key}" content="{text}">' for key, text in tags.items()]
    for path in sorted(HERE.glob("*.js")):
        lines.append(f"<script>{path.read_text()}</script>")
    return "\n".join(lines)


def launch_options() -> dict:
    """Return the options of `launch`. Only uploads and files written by handlers can be downloaded."""
    return {
        "allowed_paths": [],
        "max_file_size": "200mb",
        "theme": THEME,
        "css_paths": HERE / "style.css",
        "css": thumbnails(),
        "head": head(),
        "footer_links": ["api", "gradio", "settings"],
        "run_history": False,
        "state_session_capacity": limits.SESSIONS,
        "ssr_mode": False,
    }


def serve(models: Models, **options) -> None:
    """Serve the page with further options of `launch`, and compute the examples of the tabs when it is up."""
    app = build_app(models)
    app.launch(prevent_thread_lock=True, **launch_options(), **options)
    for block in app.blocks.values():  # Gradio reads these signatures for each visitor.
        constructor = type(block).__init__
        constructor.__signature__ = inspect.signature(constructor)
    gc.freeze()  # The garbage collector would stop all answers for 0.3 s to walk through 600,000 objects that stay.

    def compute_examples() -> None:
        for compute in app.examples:  # One after another, so that visitors can be served in between.
            compute().exception()

    threading.Thread(target=compute_examples, daemon=True).start()
    app.block_thread()


if __name__ == "__main__":
    limit_memory()
    serve(Models.from_environment())
