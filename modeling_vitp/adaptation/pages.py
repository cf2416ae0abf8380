"""Pages of a report: the same paragraphs, tables, code, pictures and charts as Markdown and as HTML."""

import base64
import html
import io
import mimetypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..cards.sections import table
from ..metrics.resampling import Difference

# Names in charts are the user's: they are not formulas, and the browser draws them.
CHARTS = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "report"}
# Nothing is loaded and no script runs, whatever the texts of the page contain.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; overflow-wrap: anywhere; }
.verdict { border-left: 4px solid #1f77b4; padding-left: 1rem; font-size: 1.2rem; }
.wide, pre { overflow-x: auto; overflow-wrap: break-word; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8884; padding: .3rem .6rem; text-align: left; vertical-align: top; }
pre { background: #8882; padding: .6rem; }
figure { margin: 1rem 0; }
img, svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; }
"""


class Strong(str):
    """Text of a table cell in bold."""


class Table(NamedTuple):
    header: list
    rows: list[list]


class Code(NamedTuple):
    language: str
    text: str


class Picture(NamedTuple):
    """Image file, relative to the folder of the pages. If it has a figure, HTML has the figure as SVG."""

    file: str
    caption: str
    figure: Figure | None = None


Block = str | list[str] | Table | Code | Picture  # A text is a paragraph, and a list of texts is a list.


def read_blocks(markdown: str) -> list[Block]:
    """Return the paragraphs and the tables of [`~modeling_vitp.cards.sections.table`] in a text."""
    blocks = []
    for paragraph in markdown.strip().split("\n\n"):
        if paragraph.startswith("| "):
            header, _, *rows = [read_cells(line) for line in paragraph.splitlines()]
            blocks.append(Table(header, rows))
        else:
            blocks.append(paragraph)
    return blocks


def read_cells(line: str) -> list[str]:
    """Return the cells of a line of a table."""
    cells = re.split(r"(?<!\\)\|", line)[1:-1]
    return [cell.strip().replace("\\|", "|") for cell in cells]


def to_markdown(title: str, verdict: str, sections: Mapping[str, Sequence[Block]]) -> str:
    """Return a page as Markdown without front matter."""
    paragraphs = [f"# {escape(title)}", f"**{escape(verdict)}**"]
    for name, blocks in sections.items():
        paragraphs.append(f"## {name}")
        for block in blocks:
            paragraphs.append(block_to_markdown(block))
    return "\n\n".join(paragraphs) + "\n"


def to_html(title: str, verdict: str, sections: Mapping[str, Sequence[Block]], folder: Path) -> str:
    """Return a page as HTML that needs no other file.

    Args:
        folder: folder of the pictures, which the page includes.
    """
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "<body>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="verdict">{html.escape(verdict)}</p>',
    ]
    for name, blocks in sections.items():
        lines.append(f"<h2>{name}</h2>")
        for block in blocks:
            lines.append(block_to_html(block, folder))
    lines += ["</body>", "</html>"]
    return "\n".join(lines) + "\n"


def escape(text: object) -> str:
    """Return a text in one line whose characters have no meaning in Markdown."""
    line = re.sub(r"\s+", " ", str(text))
    return re.sub(r"([\\`*\[\]<>]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def block_to_markdown(block: Block) -> str:
    match block:
        case Table(header, rows):
            texts = [[cell_to_markdown(cell) for cell in row] for row in rows]
            return table([escape(title) for title in header], texts)
        case Code(language, text):
            return f"```{language}\n{text}\n```"
        case Picture(file, caption):
            return f"![{escape(caption)}]({quote(file)})"
        case list():
            return "\n".join(f"- {escape(text)}" for text in block)
    return escape(block)


def cell_to_markdown(cell: object) -> str:
    text = escape(cell)
    return f"**{text}**" if isinstance(cell, Strong) else text


def block_to_html(block: Block, folder: Path) -> str:
    match block:
        case Table(header, rows):
            return table_to_html(header, rows)
        case Code(_, text):
            return f"<pre><code>{html.escape(text)}</code></pre>"
        case Picture(file, caption, figure):
            caption = html.escape(caption)
            if figure:
                image = to_svg(figure)
            else:
                image = f'<img src="{data_uri(folder / file)}" alt="{caption}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        case list():
            items = [f"<li>{html.escape(text)}</li>" for text in block]
            return "<ul>" + "".join(items) + "</ul>"
    return f"<p>{html.escape(block)}</p>"


def table_to_html(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    titles = [f"<th>{html.escape(str(title))}</th>" for title in header]
    lines = ["<tr>" + "".join(titles) + "</tr>"]
    for row in rows:
        cells = [cell_to_html(cell) for cell in row]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def cell_to_html(cell: object) -> str:
    text = html.escape(str(cell))
    if isinstance(cell, Strong):
        text = f"<strong>{text}</strong>"
    return f"<td>{text}</td>"


def data_uri(path: Path) -> str:
    media_type, _ = mimetypes.guess_type(path.name)
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{media_type};base64,{content}"


def to_svg(figure: Figure) -> str:
    """Return a chart as SVG in the text color of its page."""
    stream = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # None leaves them out, so that files are equal.
    with matplotlib.rc_context(CHARTS):
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    file_text = stream.getvalue()
    svg = file_text[file_text.index("<svg") :]
    return svg.replace("#000000", "currentColor")


def excludes_zero(difference: Difference) -> bool:
    """Return whether the interval of a difference excludes 0, also for a single seed."""
    return difference.low > 0 or difference.high < 0


@matplotlib.rc_context(CHARTS)
def draw_differences(differences: Mapping[str, Difference], title: str, scale: int) -> Figure:
    """Draw the difference to each model with its interval, times `scale`, in gray if the interval includes 0."""
    num_models = len(differences)
    figure = Figure(figsize=(5.5, 1.2 + 0.35 * num_models), layout="constrained")
    axis = figure.subplots()
    for row, difference in enumerate(differences.values()):
        mean = scale * difference.mean
        low = scale * difference.low
        high = scale * difference.high
        axis.errorbar(
            mean,
            row,
            xerr=[[mean - low], [high - mean]],
            fmt="s",
            color="C0" if excludes_zero(difference) else "0.5",
            capsize=4,
        )
    axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(num_models), list(differences))
    axis.set_ylim(num_models - 0.5, -0.5)  # The first model is at the top.
    axis.set_xlabel(title)
    return figure


@matplotlib.rc_context(CHARTS)
def draw_label_fractions(curves: Mapping[str, Mapping[float, Sequence[float]]], title: str, scale: int) -> Figure:
    """Draw the mean score of each model, times `scale`, over the fraction of labels, with a point for every seed."""
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axis = figure.subplots()
    fractions = set()
    for index, (name, curve) in enumerate(curves.items()):
        fractions.update(curve)
        percentages = []
        means = []
        seed_percentages = []
        seed_scores = []
        for fraction, scores in curve.items():
            percentages.append(100 * fraction)
            means.append(scale * np.mean(scores))
            for score in scores:
                seed_percentages.append(100 * fraction)
                seed_scores.append(scale * score)
        color = f"C{index % 10}"
        axis.plot(percentages, means, color=color, label=name)
        axis.plot(seed_percentages, seed_scores, "o", color=color, markersize=4)
    ticks = [100 * fraction for fraction in sorted(fractions)]
    axis.set_xscale("log")
    axis.set_xticks([], minor=True)
    axis.set_xticks(ticks, [f"{percentage:g}%" for percentage in ticks])
    axis.set_xlabel("labels")
    axis.set_ylabel(title)
    axis.legend(frameon=False)
    return figure
