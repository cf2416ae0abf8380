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
.wide, pre { overflow-x: auto; overflow-wrap: normal; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8884; padding: .3rem .6rem; text-align: left; vertical-align: top; }
td { white-space: nowrap; }
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
    for part in markdown.strip().split("\n\n"):
        if part.startswith("| "):
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines()]
            header, _, *rows = [[cell.strip().replace("\\|", "|") for cell in line] for line in lines]
            blocks.append(Table(header, rows))
        else:
            blocks.append(part)
    return blocks


def to_markdown(title: str, verdict: str, sections: Mapping[str, Sequence[Block]]) -> str:
    """Return a page as Markdown without front matter."""
    parts = [f"# {escape(title)}", f"**{escape(verdict)}**"]
    for name, blocks in sections.items():
        parts += [f"## {name}", *map(block_to_markdown, blocks)]
    return "\n\n".join(parts) + "\n"


def to_html(title: str, verdict: str, sections: Mapping[str, Sequence[Block]], folder: Path) -> str:
    """Return a page as HTML that needs no other file.

    Args:
        folder: folder of the pictures, which the page includes.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="verdict">{html.escape(verdict)}</p>']
    for name, blocks in sections.items():
        parts += [f"<h2>{name}</h2>", *(block_to_html(block, folder) for block in blocks)]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    return "\n".join(["<!DOCTYPE html>", '<html lang="en">', *head, "<body>", *parts, "</body>", "</html>", ""])


def escape(text: object) -> str:
    """Return a text in one line whose characters have no meaning in Markdown."""
    return re.sub(r"([\\`*\[\]<>]|(?<!\w)_|_(?!\w))", r"\\\1", re.sub(r"\s+", " ", str(text)))


def block_to_markdown(block: Block) -> str:
    match block:
        case Table(header, rows):
            texts = [[f"**{escape(one)}**" if isinstance(one, Strong) else escape(one) for one in row] for row in rows]
            return table([escape(one) for one in header], texts)
        case Code(language, text):
            return f"```{language}\n{text}\n```"
        case Picture(file, caption):
            return f"![{escape(caption)}]({quote(file)})"
        case list():
            return "\n".join(f"- {escape(one)}" for one in block)
    return escape(block)


def block_to_html(block: Block, folder: Path) -> str:
    match block:
        case Table(header, rows):
            lines = ["".join(f"<th>{html.escape(str(one))}</th>" for one in header)]
            for row in rows:
                texts = [(html.escape(str(one)), isinstance(one, Strong)) for one in row]
                lines.append("".join(f"<td>{f'<strong>{one}</strong>' if bold else one}</td>" for one, bold in texts))
            return '<div class="wide"><table>' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
        case Code(_, text):
            return f"<pre><code>{html.escape(text)}</code></pre>"
        case Picture(file, caption, figure):
            image = to_svg(figure) if figure else f'<img src="{data_uri(folder / file)}" alt="{html.escape(caption)}">'
            return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
        case list():
            return "<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in block) + "</ul>"
    return f"<p>{html.escape(block)}</p>"


def data_uri(path: Path) -> str:
    kind, content = mimetypes.guess_type(path.name)[0], base64.b64encode(path.read_bytes()).decode()
    return f"data:{kind};base64,{content}"


def to_svg(figure: Figure) -> str:
    """Return a chart as SVG in the text color of its page."""
    stream = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(CHARTS):
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = stream.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


@matplotlib.rc_context(CHARTS)
def draw_differences(differences: Mapping[str, Difference], title: str, scale: int) -> Figure:
    """Draw the difference to each model with its interval, times `scale`, in gray if the interval includes 0."""
    figure = Figure(figsize=(5.5, 1.2 + 0.35 * len(differences)), layout="constrained")
    axis = figure.subplots()
    for place, one in enumerate(differences.values()):
        mean = scale * one.mean
        low = scale * one.low
        high = scale * one.high
        color = "C0" if one.low > 0 or one.high < 0 else "0.5"
        axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="s", color=color, capsize=4)
    axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(differences)), list(differences))
    axis.set_ylim(len(differences) - 0.5, -0.5)
    axis.set_xlabel(title)
    return figure


@matplotlib.rc_context(CHARTS)
def draw_label_fractions(curves: Mapping[str, Mapping[float, Sequence[float]]], title: str, scale: int) -> Figure:
    """Draw the mean score of each model, times `scale`, over the fraction of labels, with a point for every seed."""
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axis = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        color = f"C{index % 10}"
        means = [scale * np.mean(values) for values in curve.values()]
        axis.plot([100 * one for one in curve], means, color=color, label=name)
        seeds = [(100 * fraction, scale * value) for fraction, values in curve.items() for value in values]
        axis.plot(*zip(*seeds), "o", color=color, markersize=4)
    fractions = sorted({fraction for curve in curves.values() for fraction in curve})
    axis.set_xscale("log")
    axis.set_xticks([], minor=True)
    axis.set_xticks([100 * one for one in fractions], [f"{100 * one:g}%" for one in fractions])
    axis.set_xlabel("labels")
    axis.set_ylabel(title)
    axis.legend(frameon=False)
    return figure
