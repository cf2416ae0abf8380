"""MkDocs hook that builds the site from the pages of the repository, and its reference from the docstrings.

The pages stay beside the code that they describe, where GitHub shows them. A page is on the site if `nav` in
`mkdocs.yml` lists it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
REFERENCE = {  # page -> pattern of its public names; the first pattern that matches decides
    "trainers": r".*(Trainer|TrainingConfig)",
    "processors": r".*(Processor|Collator)",
    "configurations": r".*Config|InputSpec",
    "models": r"ViTP.*",
    "functions": r".*",
}


def public_names() -> dict[str, str]:
    """Return the public names of the package, each with its full path, without importing the package."""
    package = ast.parse((ROOT / "modeling_vitp" / "__init__.py").read_text())
    models = ast.parse((ROOT / "modeling_vitp" / "auto" / "__init__.py").read_text())
    values = {
        node.targets[0].id: node.value
        for node in [*package.body, *models.body]
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    modules = ast.literal_eval(values["_LAZY"])
    imports = {
        name.name: node.module for node in models.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    modules |= {name: imports[name] for name in ast.literal_eval(values["__all__"])}
    return {name: f"modeling_vitp.{module}.{name}" for name, module in modules.items()}


def pages_of(nav: list | dict | str) -> Iterator[str]:
    """Yield the paths of the pages in a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(item)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the navigation, the files that they link to, and the pages of the reference."""
    for file in list(files):
        # Pages of docs/ too come by their path from the root of the repository, as their links expect.
        if file.src_dir == config.docs_dir:
            files.remove(file)
    pages = [page for page in pages_of(config.nav) if not page.startswith("reference/")]
    paths = dict.fromkeys(pages)
    for page in pages:
        for link in re.findall(r"\]\(([^)#:\s]+)\)", (ROOT / page).read_text()):
            path = ((ROOT / page).parent / link).resolve()
            if path.is_file() and path.suffix != ".md":
                paths[path.relative_to(ROOT).as_posix()] = None
    for path in paths:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))

    names = public_names()
    for page, pattern in REFERENCE.items():
        of_page = [name for name in sorted(names) if re.fullmatch(pattern, name)]
        title = f"# {page.capitalize()}\n\nImport these names from `modeling_vitp`.\n"
        text = "\n".join([title, *(f"::: {names.pop(name)}\n" for name in of_page)])
        files.append(File.generated(config, f"reference/{page}.md", content=text))
    return files


def on_page_content(html: str, config: MkDocsConfig, **kwargs) -> str:
    """Link names such as [`~package.module.name`] in docstrings, as transformers' documentation writes them."""
    names = public_names()

    def link(match: re.Match) -> str:
        path = names.get(match[1], match[1])
        return f'<autoref optional identifier="{path}"><code>{path.rpartition(".")[2]}</code></autoref>'

    return re.sub(r"\[<code>~?([\w.]+)</code>\]", link, html)
