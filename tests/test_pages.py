"""Every code block of every page runs, adapted in paths and sizes only. Those of `lab/` run in its own tests.

The quick blocks of the main pages run by default, all others in the slow suite.

`page_folder.py` makes the files that pages name; `page_blocks.py` runs a block, or only parses its command.
"""

import pkgutil
import re
import shlex
import shutil
import subprocess
import unicodedata

import pytest
from page_blocks import SLOW, Block, Place, find_pages, read_page, run_block, run_command
from page_folder import make_folder, names_of, without_gguf, written_files
from paths import ROOT

PAGES = find_pages()
MAIN = [  # run by the default suite, but for their commands that begin as one of SLOW
    "README.md",
    "recipes/configs/README.md",
    "recipes/make_instructions.md",
]
PATHS = {  # text of any page, and of one, -> what stands for it, of paths and sizes
    "": {"/datasets/": "datasets/"},
    "README.md": {"max_steps=1000": "max_steps=2, per_device_train_batch_size=2"},
    "recipes/pretrain.md": {"max_steps=1000": "max_steps=2, per_device_train_batch_size=2"},
    "recipes/finetune_segmentation.md": {
        "crop_size=512, max_steps=20000": "crop_size=64, max_steps=2",
        '"crop_size": 512, "max_steps": 20000': '"crop_size": 64, "max_steps": 2, "per_device_train_batch_size": 2',
    },
    "recipes/finetune_classification.md": {
        "image_size=224": "image_size=56",
        "num_train_epochs=10": "max_steps=2",
        '"height": 224, "width": 224': '"height": 56, "width": 56',
    },
    "recipes/finetune_detection.md": {
        "image_size=800": "image_size=64",
        "num_train_epochs=12": "max_steps=2",
        '"max_height": 800, "max_width": 800': '"max_height": 64, "max_width": 64',
    },
    "recipes/adapt.md": {'budget="24h")': 'budget="24h", **small_settings)'},
    "recipes/distill.md": {"num_train_epochs=10": "max_steps=2", '"image_size": 224': '"image_size": 64'},
    "modeling_vitp/README.md": {"[(600, 800), (512, 512)]": "[(48, 64), (64, 56)]", "image_size=800": "image_size=64"},
    "modeling_vitp/convert/README.md": {
        "ViTP_ViT.safetensors": "ViTP_ViT/model.safetensors",
        "convert upernet.safetensors": "convert upernet/model.safetensors",
        "detector.safetensors": "detector/model.safetensors",
        "image_size=512": "image_size=64",
    },
}
MADE = {  # by the page's own commands
    "modeling_vitp/convert/README.md": ["my_model", "my_detector", "my_backbone"],
    "recipes/export_backbone.md": ["my_backbone"],
}
ON_HUB = "recipes/push_to_hub.md"
INLINE = re.compile(r"`((?:vitp |pytest |python -m modeling_vitp\.|python (?:recipes|space)/)[^`]*)`")


@pytest.fixture(scope="module")
def everything(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    before = written_files()
    make_folder(folder, tokenizer)
    yield folder
    assert written_files() == before


@pytest.fixture
def place(everything, tmp_path, request, monkeypatch, quick_probe, quick_prior, forget_plugins):
    """Return a function that makes the folder in which a page is run, with what it names."""

    def make(page: str, is_slow: bool = False) -> Place:
        folder = tmp_path / "page"
        left_out = shutil.ignore_patterns(*MADE.get(page, ()))
        shutil.copytree(everything, folder, symlinks=True, ignore=left_out)
        names = names_of(page, folder)
        if page == ON_HUB:
            hub = request.getfixturevalue("hub")
            hub.organizations["my-org"] = {hub.user}
            names["token"] = hub.token()
        return Place(folder, names, PATHS[""] | PATHS.get(page, {}), is_slow)

    without_gguf(monkeypatch)
    return make


def slow_blocks(page: str) -> list[Block]:
    return [block for block in read_page(page)[1] if any(start in block.text for start in SLOW)]


def run_page(page: str, place: Place, monkeypatch) -> None:
    """Run the blocks of a page. The slow suite runs those of a main page that the default suite only reads."""
    text, blocks = read_page(page)
    for old in PATHS.get(page, ()):
        assert any(old in block.text for block in blocks), f"{page} no longer says {old}"
    monkeypatch.chdir(place.folder)
    for block in slow_blocks(page) if place.is_slow and page in MAIN else blocks:
        run_block(block, place, monkeypatch)
    for command in INLINE.findall(text):
        is_pattern = re.search(r"…|\[|NAME\b", command)  # of commands, not one that can be given
        if not is_pattern and len(shlex.split(command)) > 1:
            run_command(command, place, monkeypatch, only_parse=True)


@pytest.mark.parametrize("page", MAIN)
def test_quick_blocks_of_main_page_run(page, place, monkeypatch):
    run_page(page, place(page), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if not page.startswith("lab/") and (page not in MAIN or slow_blocks(page))]
)
def test_every_block_of_page_runs(page, place, monkeypatch):
    run_page(page, place(page, is_slow=True), monkeypatch)


def test_recipes_have_pages():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    shared = {"finetune_change_detection": "finetune_segmentation"}
    assert {f"recipes/{shared.get(name, name)}.md" for name in recipes} <= set(PAGES)


def anchor(title: str) -> str:
    """Return the part of a link after `#` for a title, as GitHub makes it."""
    kept = [one for one in title.lower() if one in " -_" or unicodedata.category(one)[0] in "LN"]
    return "".join(kept).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read_page(page)[0]):
        if target.startswith(("http://", "https://")):
            continue
        path, _, title = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if title:
            titles = re.findall("^#+ (.*)", file.read_text(), re.MULTILINE)
            assert title in map(anchor, titles), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    """Find files by their path from the root, from the page, or, as in tables, by their name alone."""
    files = {
        path.name for name in ("modeling_vitp", "recipes", "space", "tests", "lab") for path in (ROOT / name).rglob("*")
    }
    for path in re.findall(
        r"`((?:recipes|modeling_vitp|space|tests|lab)/[\w./-]*|[\w./-]+\.(?:py|yaml))`", read_page(page)[0]
    ):
        if re.search(r"\bNAME\b", path) or path in ("adapt.yaml", "data.yaml"):
            continue  # It is written by the reader or by a run.
        is_there = (ROOT / path).exists() or ((ROOT / page).parent / path).exists()
        assert is_there or path.rstrip("/") in files, f"{page}: {path}"


def test_names_in_pages_and_docstrings_are_there():
    sources = [path for name in ("modeling_vitp", "recipes", "space") for path in (ROOT / name).rglob("*.py")]
    found = {(path, name) for path in sources for name in re.findall(r"\[`~([\w.]+)`\]", path.read_text())}
    found |= {
        (page, name) for page in PAGES for name in re.findall(r"`(modeling_vitp\.(?!py)[\w.]+)`", read_page(page)[0])
    }
    for where, name in sorted(found, key=str):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise AssertionError(f"{where}: {name}") from error


def test_the_test_command_is_what_ci_runs():
    """Check by the very line of `.ci/run` that takes it out."""
    reads = next(line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("test_command="))
    script = f'{reads}\nprintf "%s\\n" "$test_command"'
    found = subprocess.run(["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    block = next(block for block in read_page("README.md")[1] if "pytest" in block.text)
    assert (
        found == block.text and (ROOT / "README.md").read_text().splitlines()[block.line - 2] == "<!-- test command -->"
    )
