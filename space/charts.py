"""Line charts as HTML: similarity over the severity of corruptions (also as PNG), and answers over drop ratios."""

import html
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from comparison import Comparison
from matplotlib.figure import Figure

WIDTH, HEIGHT = 150, 90  # of one small chart, in SVG units
SEVERITIES = (1, 2, 3, 4, 5)
COLORS = ("#0d9488", "#b45309", "#64748b")  # first, second, random weights; the same in style.css
CAPTION = "Preserved share of the features: 1 as for the clean image, 0 as for a different image"


def line_charts(results: Sequence[Comparison]) -> str:
    """Return HTML with a chart for each corruption and a line for each backbone; point titles contain the numbers."""
    names = list(dict.fromkeys(result.backbone for result in results))
    legend = "".join(f'<span class="key key-{index}">{html.escape(name)}</span>' for index, name in enumerate(names))
    charts = []
    for corruption in dict.fromkeys(result.corruption for result in results):
        lines = []
        for index, name in enumerate(names):
            mine = [one for one in results if one.corruption == corruption and one.backbone == name]
            points = [(x_of(one.severity), y_of(one.share), one) for one in sorted(mine, key=lambda one: one.severity)]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
            dots = "".join(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" data-backbone="{index}" data-severity="{one.severity}" '
                f'data-share="{one.share:.4f}"><title>{html.escape(name)}, severity {one.severity}: {one.share:.2f} '
                f"({one.similarity:.3f}, floor {one.floor:.3f})</title></circle>"
                for x, y, one in points
            )
            lines.append(f'<g class="line-{index}"><polyline points="{path}"/>{dots}</g>')
        title = corruption.replace("_", " ")
        zero = y_of(0)
        charts.append(
            f'<figure data-corruption="{corruption}"><figcaption>{title}</figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}, severities 1 to 5">'
            f'<path class="axis" d="M14 {zero:.1f}H{WIDTH}M14 {y_of(1):.1f}H{WIDTH}"/>'
            f'<text x="0" y="{zero + 3:.1f}">0</text><text x="0" y="{y_of(1) + 3:.1f}">1</text>'
            f"{''.join(lines)}</svg></figure>"
        )
    return f'<div class="charts"><p>{CAPTION}, over severities 1 to 5. {legend}</p>{"".join(charts)}</div>'


def answer_chart(curve: pd.DataFrame) -> str:
    """Return HTML with the probability of the full answer over the drop ratio, for each draw and their mean.

    Args:
        curve: points of [`vrl_results.curve_of`].
    """
    width, height, left, bottom = 480, 210, 44, 176
    top = max(curve["probability"].max(), 1e-6)

    def x_at(ratio: float) -> str:
        return f"{left + ratio * (width - left - 8):.1f}"

    def y_at(probability: float) -> float:
        return bottom - probability / top * (bottom - 12)

    lines = []
    for draw, points in curve.groupby("draw", sort=False):
        coordinates = [(x_at(x), f"{y_at(y):.1f}", x, y) for x, y in zip(points["drop ratio"], points["probability"])]
        path = " ".join(f"{x},{y}" for x, y, *_ in coordinates)
        dots = "".join(
            f'<circle cx="{x}" cy="{y}" r="2.5" data-draw="{draw}" data-ratio="{ratio:g}" '
            f'data-probability="{probability:.6g}"><title>drop ratio {ratio:g}, {draw}: {probability:.3g}</title>'
            "</circle>"
            for x, y, ratio, probability in coordinates
        )
        style = "mean line-0" if draw == "mean" else "line-2"
        # The mean comes first in `curve` and is drawn last, on top.
        lines.insert(0, f'<g class="{style}"><polyline points="{path}"/>{dots}</g>')
    ticks = "".join(
        f'<text x="{x_at(ratio)}" y="{bottom + 16}" text-anchor="middle">{ratio:g}</text>'
        for ratio in (0, 0.25, 0.5, 0.75, 1)
    )
    levels = "".join(
        f'<path class="axis" d="M{left} {y_at(level):.1f}H{width}"/>'
        f'<text x="{left - 4}" y="{y_at(level) + 4:.1f}" text-anchor="end">{level:.2g}</text>'
        for level in (0, top / 2, top)
    )
    return (
        '<figure class="charts curve"><figcaption>Probability of that answer by drop ratio '
        '<span class="key key-0">mean</span><span class="key key-2">each draw</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Probability of that answer by drop ratio">'
        f'{levels}{ticks}<text x="{(width + left) / 2:.0f}" y="{height - 2}" text-anchor="middle">drop ratio</text>'
        f"{''.join(lines)}</svg></figure>"
    )


def x_of(severity: int) -> float:
    return 22 + (severity - 1) * (WIDTH - 30) / 4


def y_of(share: float) -> float:
    """Map a share in [-0.2, 1] to the height of a chart. Values are clipped; NaN is drawn at the bottom."""
    kept = min(max(share, -0.2), 1.0) if share == share else -0.2
    return 6 + (1 - kept) / 1.2 * (HEIGHT - 12)


def save_charts(results: Sequence[Comparison], title: str, path: Path) -> None:
    """Save the charts of [`line_charts`] as PNG."""
    names = list(dict.fromkeys(result.backbone for result in results))
    corruptions = list(dict.fromkeys(result.corruption for result in results))
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(10, 7), layout="constrained")
        axes = figure.subplots(-(-len(corruptions) // 4), min(4, len(corruptions)), squeeze=False, sharey=True).flat
        for axis, corruption in zip(axes, corruptions):
            for color, name in zip(COLORS, names):
                mine = [one for one in results if one.corruption == corruption and one.backbone == name]
                mine.sort(key=lambda one: one.severity)
                axis.plot([one.severity for one in mine], [one.share for one in mine], "o-", color=color, label=name)
            axis.set(title=corruption.replace("_", " "), xticks=SEVERITIES, ylim=(-0.2, 1.05))
            axis.axhline(0, color="0.7", linewidth=0.8)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(f"{title}\n{CAPTION}")
        figure.savefig(path, dpi=120)
