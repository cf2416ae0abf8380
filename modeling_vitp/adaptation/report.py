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
    excludes_zero,
    read_blocks,
    to_html,
    to_markdown,
)

REPORT = "report.json"
README = "README.md"
PAGE = "report.html"
PLAN_FIELDS = ("machine", "budget", "steps", "fine_tuning_steps", "seeds")  # of the plan, in the report
DIFFERENCE_TITLE = "adapted − it (95% interval)"  # of a column
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
        for blocks in self.sections().values():
            for block in blocks:
                if isinstance(block, Picture) and block.figure is not None:
                    with matplotlib.rc_context(CHARTS):
                        block.figure.savefig(folder / block.file, dpi=150)

    @classmethod
    def load(cls, folder: str | Path) -> "AdaptationReport":
        """Read the report of a folder."""
        fields = json.loads((Path(folder) / REPORT).read_text())
        return cls(**fields)

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
        runs = []
        for run in self.fine_tuned:
            if run["model"] == model and run["labels"] == labels:
                runs.append(run)
        return runs

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
        adapted_scores = self.scores(ADAPTED, labels)
        differences = {}
        for name in self.models:
            if name == ADAPTED:
                continue
            model_scores = self.scores(name, labels)
            common_seeds = [seed for seed in adapted_scores if seed in model_scores]
            if common_seeds:
                differences[name] = paired_difference(
                    [adapted_scores[seed] for seed in common_seeds],
                    [model_scores[seed] for seed in common_seeds],
                )
        return differences

    @property
    def verdict(self) -> str:
        """Advice on the backbone to use.

        A backbone is better if the 95% interval of the difference, over test scenes and at least two seeds, excludes
        0. If others are better than the adapted backbone, the advice is the best of them. If no difference to the start
        is found, the advice is the start.
        """
        differences = self.differences()
        num_images = self.data.get("images", {}).get("test", FEW)
        num_scenes = self.data.get("test_scenes", num_images)
        if num_scenes == 1:
            advised_backbone = ""
            sentences = ["Not decided: all test images are of one scene or patient."]
        else:
            advised_backbone = self.best_backbone(differences)
            sentences = [self.advise(advised_backbone, differences)]
        for name, difference in differences.items():
            if name != advised_backbone:
                sentences.append(self.compare(name, difference))
        sentences.append(self.direction)
        if 1 < num_scenes < FEW:
            each_is_a_scene = num_scenes == num_images
            contents = f"{num_images} images" if each_is_a_scene else f"images of {num_scenes} scenes or patients"
            sentences.append(f"The test split has {contents}: with so few, do not rely on the intervals.")
        if not self.looks_at_images():
            sentences.append(BLIND)
        return " ".join(sentence for sentence in sentences if sentence)

    def best_backbone(self, differences: Mapping[str, Difference]) -> str:
        """Return the best of the backbones that are better than the adapted one; the start if none is.

        Args:
            differences: differences of the adapted backbone to the others.
        """
        losses = {}
        for name, difference in differences.items():
            if is_loss(difference):
                losses[name] = difference.as_gain().mean
        return min(losses, key=losses.get, default=self.start)

    def advise(self, best: str, differences: Mapping[str, Difference]) -> str:
        """Return the sentence of the verdict on the backbone to use.

        Args:
            best: best of the other backbones, see [`best_backbone`].
            differences: differences of the adapted backbone to the others.
        """
        start = label(self.start)
        if best != self.start:
            verb = "they are" if best == RANDOM else "it is"
            return f"Use {label(best)}: {verb} better than the adapted backbone by {self.loss(differences[best])}."
        if self.start not in differences:
            return f"Not decided: the adapted backbone was not compared with {start} after fine-tuning."
        difference = differences[self.start]
        if difference.seeds < 2:
            comparison = self.compare(self.start, difference)
            return f"Not decided: with one seed, the interval covers test images only. {comparison}"
        if is_loss(difference):
            return f"Keep {start}: the adapted backbone is worse by {self.loss(difference)}."
        change = self.change(difference)
        bounds = self.bounds(difference)
        if difference.is_clear:
            relation = "over" if self.greater_is_better else "compared with"
            return f"Use the adapted backbone: {change} ({bounds}) {relation} {start}."
        return f"Keep {start}: no difference to the adapted backbone was found ({change}, {bounds})."

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
        least_gains = []
        for scores in self.controls.get("answers", {}).values():
            # Each kind has one score here, because among several one is above 0 by chance more often.
            name = decisive_score(scores)
            if name is not None:
                low, high = scores[name]["gain"]  # interval of the difference
                least_gains.append(-high if name in LOWER_IS_BETTER else low)
        return not least_gains or max(least_gains) > 0

    def sections(self) -> dict[str, list[Block]]:
        """Return the sections of the pages after the verdict by title; empty blocks and sections are omitted."""
        all_sections = {
            "Fine-tuned": self.describe_fine_tuned(),
            "Fewer labels": self.describe_label_fractions(),
            "Frozen": self.describe_frozen(),
            "Controls": self.describe_controls(),
            "Data": self.describe_data(),
            "Cost": self.describe_cost(),
            "Not tested": [self.notes],
            "Pictures": [Picture(file, caption_of(file)) for file in self.pictures],
            "Run it again": [Code("bash", self.command)] if self.command else [],
        }
        sections = {}
        for title, blocks in all_sections.items():
            filled_blocks = [block for block in blocks if is_filled(block)]
            if filled_blocks:
                sections[title] = filled_blocks
        return sections

    def fine_tuned_rows(self, labels: float) -> dict[str, list]:
        """Return the row of each fine-tuned backbone in a table."""
        differences = self.differences(labels)
        rows = {}
        for name in self.models:
            runs = self.runs(name, labels)
            if not runs:
                continue
            scores = [run["score"] for run in runs]
            spread = f" ± {self.number(np.std(scores, ddof=1))}" if len(scores) > 1 else ""
            learning_rates = sorted({run["learning_rate"] for run in runs})
            rows[name] = [
                label(name),
                self.number(np.mean(scores)) + spread,
                len(scores),
                cell(differences.get(name), self.number),
                ", ".join(f"{rate:g}" for rate in learning_rates),
            ]
        return rows

    @property
    def header(self) -> list[str]:
        """Titles of the columns of [`fine_tuned_rows`]."""
        return [
            "backbone",
            f"{self.unit} ± spread over seeds",
            "seeds",
            DIFFERENCE_TITLE,
            "learning rate",
        ]

    def describe_fine_tuned(self) -> list[Block]:
        rows = self.fine_tuned_rows(1.0)
        if not rows:
            return []
        differences = self.differences()
        text = f"Test scores in {self.measure}, with all labels. Differences are paired by seed and test image. "
        text += "In bold, the interval excludes 0."
        if self.direction:
            text += f" {self.direction}"
        if any(difference.seeds < 2 for difference in differences.values()):
            text += " With one seed, it covers test images only."
        rows_with_weights = [[*row, self.models[name]] for name, row in rows.items()]
        blocks = [text, Table([*self.header, "weights"], rows_with_weights)]
        if differences:
            labeled_differences = {f"to {label(name)}": difference for name, difference in differences.items()}
            figure = draw_differences(labeled_differences, f"difference of adapted in {self.measure}", self.scale)
            blocks.append(Picture("differences.png", "Differences of the adapted backbone, 95% intervals", figure))
        return blocks

    def describe_label_fractions(self) -> list[Block]:
        fractions = sorted({run["labels"] for run in self.fine_tuned})
        if len(fractions) < 2:
            return []
        curves = {}
        for name in self.models:
            curve = {}
            for fraction in fractions:
                scores = [score.value for score in self.scores(name, fraction).values()]
                if scores:
                    curve[fraction] = scores
            if curve:
                curves[label(name)] = curve
        rows = []
        for fraction in fractions:
            for row in self.fine_tuned_rows(fraction).values():
                rows.append([f"{100 * fraction:g}%", *row])
        figure = draw_label_fractions(curves, self.measure, self.scale)
        return [
            Table(["labels", *self.header], rows),
            Picture("label_fractions.png", "Scores by labels", figure),
        ]

    def describe_frozen(self) -> list[Block]:
        if not self.frozen:
            return []
        scores = {}
        for run in self.frozen:
            scores[run["probe"], run["model"]] = Score(run["score"], run["resampled"], run["cases"])
        rows = []
        for (probe, model), score in scores.items():
            adapted_score = scores.get((probe, ADAPTED))
            difference = None
            if adapted_score is not None and model != ADAPTED:
                difference = paired_difference([adapted_score], [score])
            rows.append([probe, label(model), points(score.value), cell(difference)])
        score_title = TASKS[self.task].probe_class.title
        text = (
            f"Test scores of probes of frozen features: {score_title}, in points. The intervals cover test images only."
        )
        return [text, Table(["probe", "backbone", "score", DIFFERENCE_TITLE], rows)]

    def describe_controls(self) -> list[Block]:
        rows = []
        for kind, scores in self.controls.get("answers", {}).items():
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
            blocks.append("Answers of the language model in points. A model that looks loses points with other images.")
            blocks.append(Table(["questions", "score", "own image", "other image", "gain (95% interval)"], rows))
        if self.controls.get("overlap") is not None:
            blocks.append(f"Test images that were found in the training data: {self.controls['overlap']}.")
        if self.controls.get("early"):
            blocks.append(f"Probe of the backbone at 10% of the steps, beside its start: {self.controls['early']}.")
        if self.controls.get("answer_prior"):
            blocks.append("How well answers are guessed without images:")
            blocks += read_blocks(self.controls["answer_prior"])
        return blocks

    def describe_data(self) -> list[Block]:
        rows = [[split, number] for split, number in self.data.get("images", {}).items()]
        return [
            Table(["split", "images"], rows),
            str(self.data.get("how", "")),
            f"Task: {self.task}. Classes: {', '.join(self.classes)}.",
        ]

    def describe_cost(self) -> list[Block]:
        planned_seconds = self.plan.get("planned_seconds") or {}
        used_seconds = self.plan.get("used_seconds") or {}
        stage_rows = []
        for stage in {**planned_seconds, **used_seconds}:
            stage_rows.append([stage, duration(planned_seconds.get(stage)), duration(used_seconds.get(stage))])
        if stage_rows:
            total_planned = duration(sum(planned_seconds.values()))
            total_used = duration(sum(used_seconds.values()))
            stage_rows.append(["all", total_planned, total_used])
        setting_rows = []
        for name, value in self.plan.items():
            if not name.endswith("_seconds"):
                setting_rows.append([name.replace("_", " "), cell_text(value)])
        return [
            Table(["setting", "value"], setting_rows),
            Table(["stage", "planned, h:mm:ss", "used, h:mm:ss"], stage_rows),
        ]


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
    class_names = []
    for class_setting in labels.data["classes"]:
        class_names.append(class_setting["name"] if isinstance(class_setting, dict) else class_setting)
    shown_plan = {name: plan[name] for name in PLAN_FIELDS}
    shown_plan.update(plan["settings"])
    shown_plan["planned_seconds"] = plan["planned_seconds"]
    shown_plan["used_seconds"] = dict(used_seconds)
    return AdaptationReport(
        task=labels.task,
        metric=fine_tuned[0]["metric"],
        greater_is_better=fine_tuned[0]["greater_is_better"],
        is_share=fine_tuned[0]["is_share"],
        classes=class_names,
        data={
            "name": labels.root.name,
            "images": {split: len(images) for split, images in labels.images.items()},
            "test_scenes": labels.test_scenes,
            "how": labels.how,
        },
        plan=shown_plan,
        models=backbones.models,
        start=backbones.start.name,
        fine_tuned=[without_key(run, "folder") for run in fine_tuned],
        frozen=list(frozen),
        controls=without_key(controls, "problems"),
        pictures=copy_predictions(fine_tuned, backbones),
        notes=untested(plan, controls, diverged),
    )


def copy_predictions(fine_tuned: Sequence[dict], backbones: Backbones) -> list[str]:
    """Copy pictures of the predictions of the adapted backbone and of the start, and return the names of the files.

    Args:
        fine_tuned: scores of fine-tuned models, with their folders.
        backbones: compared backbones, whose folder gets the pictures.
    """
    names = []
    for run in fine_tuned:
        picture = Path(run["folder"]) / "test" / "predictions.png"
        if run["model"] in (ADAPTED, backbones.start.name) and picture.is_file():
            name = f"predictions_{run['model']}.png"
            shutil.copy(picture, backbones.folder / name)
            names.append(name)
    return list(dict.fromkeys(names))


def without_key(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of a mapping without a key."""
    return {name: value for name, value in mapping.items() if name != key}


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


def caption_of(file: str) -> str:
    """Return the name of a picture as words."""
    return re.sub(r"[_\W]+", " ", Path(file).stem)


def is_filled(block: Block) -> bool:
    """Return whether a block has a text, or a table has rows."""
    return bool(block.rows) if isinstance(block, Table) else bool(block)


def decisive_score(scores: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the name of the score of a kind of question that tells whether the model looks at the image."""
    if "mean_iou" in scores:
        return "mean_iou"
    for name, score in scores.items():
        if "gain" in score:
            return name
    return None


def points(value: float, sign: str = "") -> str:
    """Return a score in points with one decimal and a minus sign."""
    rounded_points = round(100 * float(value), 1) + 0.0  # `+ 0.0` turns -0.0 to 0.0.
    return f"{rounded_points:{sign}.1f}".replace("-", "−")


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
    return Strong(text) if excludes_zero(difference) else text


def duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
