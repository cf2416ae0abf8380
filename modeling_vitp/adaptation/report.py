"""Report of an adaptation: scores of the adapted backbone and of others, and the verdict."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ..cards.model_card import cell_text
from ..evaluation.answer_scores import LOWER_IS_BETTER
from ..metrics.resampling import Difference, Score, paired_difference
from ..tasks import TASKS
from ..training.checkpointing import write_whole
from .arguments import ADAPTED, RANDOM
from .backbones import Backbones
from .labels import TaskData
from .pages import (
    CHARTS,
    Block,
    Code,
    Picture,
    Strong,
    Table,
    draw_differences,
    draw_label_fractions,
    read_blocks,
    to_html,
    to_markdown,
)

REPORT, README, PAGE = "report.json", "README.md", "report.html"
PLAN_FIELDS = ("machine", "budget", "steps", "fine_tuning_steps", "seeds")  # of the plan, in the report
FEW = 20  # number of scenes of test images below which the verdict warns of its intervals
UNITS = {
    "mean_iou": "mIoU",
    "map": "mAP",
    "box_map": "box mAP",
    "mask_map": "mask mAP",
    "mean_average_precision": "mAP",
}
BLIND = (
    "The answers to no kind of question are clearly better with the own image than with another: it is not shown that "
    "the language model looks at the image, nor that the pretraining taught the ViT what the labels say."
)


@dataclass
class AdaptationReport:
    """Results of an adaptation as plain data, with their verdict.

    Args:
        task: `classification`, `segmentation` or `detection`.
        metric: name of the main score, such as `mean_iou`.
        classes: names of the classes.
        data: `name`, `images` (number by split), `test_scenes` (number of scenes of the test images), and `how`
            (sentence that says how the images were split).
        plan: settings of the pretraining, and `planned_seconds` and `used_seconds` by stage.
        models: description of each backbone by its name. The adapted one is `adapted`, random weights are `random`.
        start: name of the backbone that the pretraining started from.
        fine_tuned: scores of fine-tuned models: `model`, `labels` (fraction), `seed`, `learning_rate`, `score`,
            `resampled` (scores of resamples of the test cases, the same for all models), `cases` (number of scenes or
            images that are resampled) and `folder`.
        frozen: scores of probes of frozen backbones: `model`, `probe`, `score`, `resampled` and `cases`.
        controls: `answers`, the `scores` of a model in the metrics of `vitp evaluate_vlm`; `answer_prior`, Markdown
            text; `overlap`, the number of test images in the training data; `early`, a text with the scores of a probe
            at 10% of the steps.
        pictures: image files, relative to the folder of the report.
        notes: sentences on what was not tested.
        command: command that runs the adaptation again.
        greater_is_better: whether a higher main score is better.
        is_share: whether the main score is a share between 0 and 1, which is shown in points.
    """

    task: str
    metric: str
    classes: list[str]
    data: dict
    plan: dict
    models: dict[str, str]
    start: str
    fine_tuned: list[dict] = field(default_factory=list)
    frozen: list[dict] = field(default_factory=list)
    controls: dict = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    greater_is_better: bool = True
    is_share: bool = True

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, `README.md` with its charts, and `report.html` to the folder of the pictures."""
        folder = Path(folder)
        write_whole(folder / REPORT, json.dumps(asdict(self)) + "\n")
        write_whole(folder / README, self.to_markdown())
        write_whole(folder / PAGE, self.to_html(folder))
        for block in (block for blocks in self.sections().values() for block in blocks):
            if isinstance(block, Picture) and block.figure is not None:
                with matplotlib.rc_context(CHARTS):
                    block.figure.savefig(folder / block.file, dpi=150)

    @classmethod
    def load(cls, folder: str | Path) -> "AdaptationReport":
        """Read the report of a folder."""
        return cls(**json.loads((Path(folder) / REPORT).read_text()))

    def to_markdown(self) -> str:
        """Return the report as Markdown without front matter. Its charts are files, which `save` writes."""
        return to_markdown(self.title, self.verdict, self.sections())

    def to_html(self, folder: str | Path) -> str:
        """Return the report as one page of HTML that needs no other file; `folder` has the pictures."""
        return to_html(self.title, self.verdict, self.sections(), Path(folder))

    @property
    def title(self) -> str:
        return f"Adaptation of {label(self.start)} to {self.data['name']}"

    @property
    def unit(self) -> str:
        return UNITS.get(self.metric, self.metric.replace("_", " "))

    @property
    def measure(self) -> str:
        """Main score with its unit."""
        return f"points of {self.unit}" if self.is_share else self.unit

    @property
    def scale(self) -> int:
        """Factor between the main score and its values in charts."""
        return 100 if self.is_share else 1

    def number(self, value: float, sign: str = "") -> str:
        """Return a main score, or a difference of two, in points or as it is."""
        if self.is_share:
            return points(value, sign)
        return f"{value:{sign}.3g}".replace("-", "−")

    def bounds(self, difference: Difference) -> str:
        return f"95% interval {self.number(difference.low)} to {self.number(difference.high)}"

    def runs(self, model: str, labels: float) -> list[dict]:
        """Return the entries of a model in `fine_tuned` that are trained on a fraction of the labels."""
        return [run for run in self.fine_tuned if (run["model"], run["labels"]) == (model, labels)]

    def scores(self, model: str, labels: float = 1.0) -> dict[int, Score]:
        """Return the test score of a fine-tuned model by seed."""
        scores = {}
        for run in self.runs(model, labels):
            scores[run["seed"]] = Score(run["score"], run["resampled"], run["cases"], self.greater_is_better)
        return scores

    def differences(self, labels: float = 1.0) -> dict[str, Difference]:
        """Return the differences in the main score of the adapted backbone to each other one, paired by seed.

        Args:
            labels: fraction of the training images of the fine-tuning.
        """
        ours, found = self.scores(ADAPTED, labels), {}
        for name in self.models:
            theirs = self.scores(name, labels)
            seeds = [seed for seed in ours if seed in theirs]
            if name != ADAPTED and seeds:
                found[name] = paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
        return found

    @property
    def verdict(self) -> str:
        """Advice on the backbone to use.

        A backbone is better if the 95% interval of the difference, over test scenes and at least two seeds, excludes
        0. If others are better than the adapted backbone, the advice is the best of them. If no difference to the start
        is found, the advice is the start.
        """
        differences, start = self.differences(), label(self.start)
        better = {}
        for name, difference in differences.items():
            if is_loss(difference):
                better[name] = difference.as_gain().mean
        best, to_start = min(better, key=better.get, default=self.start), differences.get(self.start)
        number = self.data.get("images", {}).get("test", FEW)
        scenes = self.data.get("test_scenes", number)
        if scenes == 1:
            best, first = "", "Not decided: all test images are of one scene or patient."
        elif best != self.start:
            verb = "they are" if best == RANDOM else "it is"
            first = f"Use {label(best)}: {verb} better than the adapted backbone by {self.loss(differences[best])}."
        elif to_start is None:
            first = f"Not decided: the adapted backbone was not compared with {start} after fine-tuning."
        elif to_start.seeds < 2:
            first = f"Not decided: with one seed, the interval covers test images only. {self.compare(best, to_start)}"
        elif self.start in better:
            first = f"Keep {start}: the adapted backbone is worse by {self.loss(to_start)}."
        elif to_start.is_clear:
            relation = "over" if self.greater_is_better else "compared with"
            first = f"Use the adapted backbone: {self.change(to_start)} ({self.bounds(to_start)}) {relation} {start}."
        else:
            change = f"{self.change(to_start)}, {self.bounds(to_start)}"
            first = f"Keep {start}: no difference to the adapted backbone was found ({change})."
        others = [self.compare(name, one) for name, one in differences.items() if name != best]
        found = f"{number} images" if scenes == number else f"images of {scenes} scenes or patients"
        few = f"The test split has {found}: with so few, do not rely on the intervals." * (1 < scenes < FEW)
        blind = "" if self.looks_at_images() else BLIND
        return " ".join(filter(None, [first, *others, self.direction, few, blind]))

    def compare(self, name: str, difference: Difference) -> str:
        """Return a sentence on a backbone, empty if the adapted one is clearly better."""
        if difference.seeds < 2:
            change = f"{self.change(difference)} ({self.bounds(difference)})"
            return f"In one seed, the difference of the adapted backbone to {label(name)} is {change}."
        if not difference.is_clear:
            return f"No difference to {label(name)} was found ({self.change(difference)}, {self.bounds(difference)})."
        if is_loss(difference):
            return f"The adapted backbone is worse than {label(name)} by {self.loss(difference)}."
        return ""

    @property
    def direction(self) -> str:
        """Sentence that says that a lower main score is better; empty if a higher one is."""
        return "" if self.greater_is_better else f"A lower {self.unit} is better."

    def change(self, difference: Difference) -> str:
        return f"{self.number(difference.mean, '+')} {self.measure}"

    def loss(self, difference: Difference) -> str:
        """Return the difference to a better backbone as a positive number, with its interval."""
        gain = difference.as_gain()
        loss = replace(gain, mean=-gain.mean, low=-gain.high, high=-gain.low)
        return f"{self.number(loss.mean)} {self.measure} ({self.bounds(loss)})"

    def looks_at_images(self) -> bool:
        """Return false if the answers to no kind of question are clearly better with the own image."""
        gains = []
        for scores in self.controls.get("answers", {}).values():
            # Each kind has one score here, because among several one is above 0 by chance more often.
            name = "mean_iou" if "mean_iou" in scores else next((key for key in scores if "gain" in scores[key]), None)
            if name is not None:
                low, high = scores[name]["gain"]  # interval of the difference
                gains.append(-high if name in LOWER_IS_BETTER else low)
        return not gains or max(gains) > 0

    def sections(self) -> dict[str, list[Block]]:
        """Return the parts of the pages after the verdict by title; empty parts are omitted."""
        sections = {
            "Fine-tuned": self.describe_fine_tuned(),
            "Fewer labels": self.describe_label_fractions(),
            "Frozen": self.describe_frozen(),
            "Controls": self.describe_controls(),
            "Data": [
                Table(["split", "images"], list(map(list, self.data.get("images", {}).items()))),
                str(self.data.get("how", "")),
                f"Task: {self.task}. Classes: {', '.join(self.classes)}.",
            ],
            "Cost": self.describe_cost(),
            "Not tested": [self.notes],
            "Pictures": [Picture(file, re.sub(r"[_\W]+", " ", Path(file).stem)) for file in self.pictures],
            "Run it again": [Code("bash", self.command)] if self.command else [],
        }
        filled = {title: [one for one in blocks if getattr(one, "rows", one)] for title, blocks in sections.items()}
        return {title: blocks for title, blocks in filled.items() if blocks}

    def fine_tuned_rows(self, labels: float) -> dict[str, list]:
        """Return the row of each fine-tuned backbone in a table."""
        rows, differences = {}, self.differences(labels)
        for name in self.models:
            runs = self.runs(name, labels)
            values = [run["score"] for run in runs]
            if values:
                spread = f" ± {self.number(np.std(values, ddof=1))}" if len(values) > 1 else ""
                rates = ", ".join(f"{rate:g}" for rate in sorted({run["learning_rate"] for run in runs}))
                mean = self.number(np.mean(values))
                difference = cell(differences.get(name), self.number)
                rows[name] = [label(name), mean + spread, len(values), difference]
                rows[name].append(rates)
        return rows

    @property
    def header(self) -> list[str]:
        """Titles of the columns of [`fine_tuned_rows`]."""
        return ["backbone", f"{self.unit} ± spread over seeds", "seeds", "adapted − it (95% interval)", "learning rate"]

    def describe_fine_tuned(self) -> list[Block]:
        rows, differences = self.fine_tuned_rows(1.0), self.differences()
        if not rows:
            return []
        text = f"Test scores in {self.measure}, with all labels. Differences are paired by seed and test image. "
        text += "In bold, the interval excludes 0."
        if self.direction:
            text += f" {self.direction}"
        if any(one.seeds < 2 for one in differences.values()):
            text += " With one seed, it covers test images only."
        blocks = [text, Table([*self.header, "weights"], [[*row, self.models[name]] for name, row in rows.items()])]
        if differences:
            to_each = {f"to {label(name)}": one for name, one in differences.items()}
            figure = draw_differences(to_each, f"difference of adapted in {self.measure}", self.scale)
            blocks.append(Picture("differences.png", "Differences of the adapted backbone, 95% intervals", figure))
        return blocks

    def describe_label_fractions(self) -> list[Block]:
        fractions, curves = sorted({run["labels"] for run in self.fine_tuned}), {}
        if len(fractions) < 2:
            return []
        for name in self.models:
            scores = {one: [score.value for score in self.scores(name, one).values()] for one in fractions}
            if any(scores.values()):
                curves[label(name)] = {fraction: values for fraction, values in scores.items() if values}
        rows = [[f"{100 * one:g}%", *row] for one in fractions for row in self.fine_tuned_rows(one).values()]
        figure = draw_label_fractions(curves, self.measure, self.scale)
        return [Table(["labels", *self.header], rows), Picture("label_fractions.png", "Scores by labels", figure)]

    def describe_frozen(self) -> list[Block]:
        scores = {
            (run["probe"], run["model"]): Score(run["score"], run["resampled"], run["cases"]) for run in self.frozen
        }
        rows = []
        for (probe, model), theirs in scores.items():
            ours = scores.get((probe, ADAPTED))
            is_other = ours is not None and model != ADAPTED
            difference = cell(paired_difference([ours], [theirs])) if is_other else ""
            rows.append([probe, label(model), points(theirs.value), difference])
        score = TASKS[self.task].probe_class.title
        text = f"Test scores of probes of frozen features: {score}, in points. The intervals cover test images only."
        return [text, Table(["probe", "backbone", "score", self.header[3]], rows)] if rows else []

    def describe_controls(self) -> list[Block]:
        rows = []
        for kind, scores in self.controls.get("answers", {}).items():
            for name, score in scores.items():
                gain = " to ".join(map(points, score.get("gain", ())))
                rows.append([kind, name.replace("_", " "), points(score["own"]), points(score["other_images"]), gain])
        blocks = []
        if rows:
            blocks.append("Answers of the language model in points. A model that looks loses points with other images.")
            blocks.append(Table(["questions", "score", "own image", "other image", "gain (95% interval)"], rows))
        if self.controls.get("overlap") is not None:
            blocks.append(f"Test images that were found in the training data: {self.controls['overlap']}.")
        if self.controls.get("early"):
            blocks.append(f"Probe of the backbone at 10% of the steps, beside its start: {self.controls['early']}.")
        if self.controls.get("answer_prior"):
            blocks += ["How well answers are guessed without images:", *read_blocks(self.controls["answer_prior"])]
        return blocks

    def describe_cost(self) -> list[Block]:
        planned, used = (self.plan.get(f"{key}_seconds") or {} for key in ("planned", "used"))
        stages = [[stage, duration(planned.get(stage)), duration(used.get(stage))] for stage in {**planned, **used}]
        stages += [["all", *(duration(sum(one.values())) for one in (planned, used))]] if stages else []
        settings = {key: value for key, value in self.plan.items() if not key.endswith("_seconds")}
        rows = [[key.replace("_", " "), cell_text(value)] for key, value in settings.items()]
        return [Table(["setting", "value"], rows), Table(["stage", "planned, h:mm:ss", "used, h:mm:ss"], stages)]


def make_report(
    labels: TaskData,
    plan: Mapping[str, Any],
    used_seconds: Mapping[str, float],
    backbones: Backbones,
    frozen: Sequence[dict],
    fine_tuned: Sequence[dict],
    controls: Mapping[str, Any],
    diverged: Sequence[str],
) -> AdaptationReport:
    """Collect the scores, the controls, the cost and what was not tested, and copy pictures of predictions.

    Args:
        labels: labeled images.
        plan: plan of the adaptation.
        used_seconds: seconds by stage.
        backbones: compared backbones.
        frozen: scores of probes.
        fine_tuned: scores of fine-tuned models, with their folders.
        controls: results of the controls.
        diverged: sentences on fine-tunings that are left out.
    """
    shown_models = (ADAPTED, backbones.start.name)
    pictures = {}
    for entry in fine_tuned:
        picture = Path(entry["folder"]) / "test" / "predictions.png"
        if picture.is_file() and entry["model"] in shown_models:
            pictures[f"predictions_{entry['model']}.png"] = picture
    for name, path in pictures.items():
        shutil.copy(path, backbones.folder / name)
    shown_plan = {name: plan[name] for name in PLAN_FIELDS}
    seconds = {"planned_seconds": plan["planned_seconds"], "used_seconds": dict(used_seconds)}
    return AdaptationReport(
        task=labels.task,
        metric=fine_tuned[0]["metric"],
        greater_is_better=fine_tuned[0]["greater_is_better"],
        is_share=fine_tuned[0]["is_share"],
        classes=[entry["name"] if isinstance(entry, dict) else entry for entry in labels.data["classes"]],
        data={
            "name": labels.root.name,
            "images": {split: len(images) for split, images in labels.images.items()},
            "test_scenes": labels.test_scenes,
            "how": labels.how,
        },
        plan=shown_plan | plan["settings"] | seconds,
        models=backbones.models,
        start=backbones.start.name,
        fine_tuned=[{name: value for name, value in entry.items() if name != "folder"} for entry in fine_tuned],
        frozen=list(frozen),
        controls={name: value for name, value in controls.items() if name != "problems"},
        pictures=list(pictures),
        notes=untested(plan, controls, diverged),
    )


def untested(plan: Mapping[str, Any], controls: Mapping[str, Any], diverged: Sequence[str]) -> list[str]:
    """Return sentences on what was not tested."""
    notes = ["Images of another place, time or device than those of the test split were not tested."]
    notes += diverged
    if len(plan["seeds"]) == 1:
        notes.append("Each model was fine-tuned with one seed: the randomness of training is not in the intervals.")
    if not controls["answers"]:
        notes.append("Answers were not compared with those about other images.")
    return notes


def label(name: str) -> str:
    return "random weights" if name == RANDOM else name


def points(value: float, sign: str = "") -> str:
    """Return a score in points with one decimal and a minus sign."""
    return f"{round(100 * float(value), 1) + 0.0:{sign}.1f}".replace("-", "−")  # `+ 0.0` turns -0.0 to 0.0.


def is_loss(difference: Difference) -> bool:
    """Return whether the first model is clearly worse."""
    return difference.is_clear and difference.as_gain().mean < 0


def cell(difference: Difference | None, number: Callable[..., str] = points) -> str:
    """Return a difference with its interval for a table, in bold if the interval excludes 0.

    Args:
        difference: difference; `None` gives an empty cell.
        number: function that formats a score with a sign.
    """
    if difference is None:
        return ""
    text = f"{number(difference.mean, '+')} ({number(difference.low)} to {number(difference.high)})"
    return Strong(text) if difference.low > 0 or difference.high < 0 else text


def duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
