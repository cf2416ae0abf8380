"""Sections of the report of an adaptation, after its verdict."""

from typing import TYPE_CHECKING

import numpy as np

from ..cards.model_card import cell_text
from .pages import Block, Code, Picture, Table, draw_differences, draw_label_fractions, read_blocks
from .verdict import find_verdict
from .wording import caption_of, cell, duration, label, points

if TYPE_CHECKING:
    from .report import AdaptationReport

EARLY_STAGES = ("models", "instructions", "checks", "plan")  # that end before there is a plan
DIFFERENCE_TITLE = "adapted − it (95% interval)"  # of a column


def make_sections(report: "AdaptationReport") -> dict[str, list[Block]]:
    """Return the sections of the pages after the verdict by title; empty blocks and sections are omitted."""
    all_sections = {
        "Fine-tuned": describe_fine_tuned(report),
        "Remarks": [find_verdict(report)[1:]],
        "Fewer labels": describe_label_fractions(report),
        "Frozen": describe_frozen(report),
        "Controls": describe_controls(report),
        "Data": describe_data(report),
        "Cost": describe_cost(report),
        "Not tested": [report.notes],
        "Pictures": [Picture(file, caption_of(file)) for file in report.pictures],
        "Run it again": describe_command(report),
    }
    sections = {}
    for title, blocks in all_sections.items():
        filled_blocks = [block for block in blocks if is_filled(block)]
        if filled_blocks:
            sections[title] = filled_blocks
    return sections


def fine_tuned_rows(report: "AdaptationReport", labels: float) -> dict[str, list]:
    """Return the row of each fine-tuned backbone in a table."""
    differences = report.differences(labels)
    rows = {}
    for name in report.models:
        runs = report.runs(name, labels)
        if not runs:
            continue
        scores = [run["score"] for run in runs]
        spread = f" ± {report.number(np.std(scores, ddof=1))}" if len(scores) > 1 else ""
        learning_rates = sorted({run["learning_rate"] for run in runs})
        rows[name] = [
            label(name),
            report.number(np.mean(scores)) + spread,
            len(scores),
            cell(differences.get(name), report.number),
            ", ".join(f"{rate:g}" for rate in learning_rates),
        ]
    return rows


def header(report: "AdaptationReport") -> list[str]:
    """Return the titles of the columns of [`fine_tuned_rows`]."""
    return [
        "backbone",
        f"{report.unit} ± spread over seeds",
        "seeds",
        DIFFERENCE_TITLE,
        "learning rate",
    ]


def describe_fine_tuned(report: "AdaptationReport") -> list[Block]:
    rows = fine_tuned_rows(report, 1.0)
    if not rows:
        return []
    differences = report.differences()
    text = f"Test scores in {report.measure}, with all labels. Differences are paired by seed and test image. "
    text += "In bold, the interval excludes 0."
    if len(differences) > 1:
        text += f" Intervals are wider than those of one comparison, because there are {len(differences)} (Holm)."
    if report.direction:
        text += f" {report.direction}"
    if any(difference.seeds < 2 for difference in differences.values()):
        text += " With one seed, it covers test images only."
    rows_with_weights = [[*row, report.models[name]] for name, row in rows.items()]
    blocks = [text, Table([*header(report), "weights"], rows_with_weights)]
    if differences:
        labeled_differences = {f"to {label(name)}": difference for name, difference in differences.items()}
        figure = draw_differences(labeled_differences, f"difference of adapted in {report.measure}", report.scale)
        blocks.append(Picture("differences.png", "Differences of the adapted backbone, 95% intervals", figure))
    return blocks


def describe_label_fractions(report: "AdaptationReport") -> list[Block]:
    fractions = sorted({run["labels"] for run in report.fine_tuned})
    if len(fractions) < 2:
        return []
    curves = {}
    for name in report.models:
        curve = {}
        for fraction in fractions:
            scores = [score.value for score in report.scores(name, fraction).values()]
            if scores:
                curve[fraction] = scores
        if curve:
            curves[label(name)] = curve
    rows = []
    for fraction in fractions:
        for row in fine_tuned_rows(report, fraction).values():
            rows.append([f"{100 * fraction:g}%", *row])
    figure = draw_label_fractions(curves, report.measure, report.scale)
    return [
        Table(["labels", *header(report)], rows),
        Picture("label_fractions.png", "Scores by labels", figure),
    ]


def describe_frozen(report: "AdaptationReport") -> list[Block]:
    if not report.frozen:
        return []
    differences = report.frozen_differences()
    rows = []
    for (probe, model), score in report.frozen_scores().items():
        rows.append([probe, label(model), points(score.value), cell(differences.get((probe, model)))])
    score_title = report.frozen[0]["metric"]
    text = (
        f"Test scores of probes of frozen features: {score_title}, in points. A frozen backbone is not trained: a "
        "probe reads its features. 20-NN takes the labels of the 20 most similar training features; linear is a linear "
        "classifier. The intervals cover test images only."
    )
    return [text, Table(["probe", "backbone", "score", DIFFERENCE_TITLE], rows)]


def describe_controls(report: "AdaptationReport") -> list[Block]:
    rows = []
    for kind, scores in report.controls.get("answers", {}).items():
        for name, score in scores.items():
            rows.append(
                [
                    kind,
                    name.replace("_", " "),
                    points(score["own"]),
                    points(score["other_images"]),
                    " to ".join(points(bound) for bound in score.get("gain", ())),
                ]
            )
    blocks = []
    if rows:
        blocks.append(
            "Answers of the language model in points. A model that looks loses points with other images. Kinds of "
            "questions: vqa, a short answer; count, a number; grounding, boxes; map and fine_map, a grid of classes; "
            "caption, a sentence."
        )
        blocks.append(Table(["questions", "score", "own image", "other image", "gain (95% interval)"], rows))
    if report.controls.get("overlap") is not None:
        blocks.append(f"Test images that were found in the training data: {report.controls['overlap']}.")
    if report.controls.get("early"):
        blocks.append(f"Probe of the backbone at 10% of the steps, beside its start: {report.controls['early']}.")
    if report.controls.get("interpolation"):
        blocks.append(f"The adapted backbone is {report.controls['interpolation']}.")
    if report.controls.get("answer_prior"):
        blocks.append("How well answers are guessed without images:")
        blocks += read_blocks(report.controls["answer_prior"])
    return blocks


def describe_data(report: "AdaptationReport") -> list[Block]:
    rows = [[split, number] for split, number in report.data.get("images", {}).items()]
    return [
        Table(["split", "images"], rows),
        str(report.data.get("how", "")),
        f"Task: {report.task}. Classes: {', '.join(report.classes)}.",
    ]


def describe_cost(report: "AdaptationReport") -> list[Block]:
    planned_seconds = report.plan.get("planned_seconds") or {}
    used_seconds = report.plan.get("used_seconds") or {}
    stage_rows = []
    for stage in {**used_seconds, **planned_seconds}:
        planned_time = "before the plan" if stage in EARLY_STAGES else "in the time that the plan leaves"
        if stage in planned_seconds:
            planned_time = duration(planned_seconds[stage])
        stage_rows.append([stage, planned_time, duration(used_seconds.get(stage))])
    if stage_rows:
        total_planned = duration(sum(planned_seconds.values()))
        total_used = duration(sum(used_seconds.values()))
        stage_rows.append(["all", total_planned, total_used])
    setting_rows = []
    for name, value in report.plan.items():
        if not name.endswith("_seconds"):
            setting_rows.append([name.replace("_", " "), cell_text(value)])
    return [
        Table(["setting", "value"], setting_rows),
        Table(["stage", "planned, h:mm:ss", "used, h:mm:ss"], stage_rows),
    ]


def describe_command(report: "AdaptationReport") -> list[Block]:
    if not report.command:
        return []
    return ["In the folder that the adaptation was started in:", Code("bash", report.command)]


def is_filled(block: Block) -> bool:
    """Return whether a block has a text, or a table has rows."""
    return bool(block.rows) if isinstance(block, Table) else bool(block)
