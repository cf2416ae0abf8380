"""Report of an adaptation: scores of the adapted backbone and of others, and the verdict."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib

from ..metrics.resampling import Difference, Score, corrected_differences, paired_difference
from ..training.checkpointing import write_whole
from .arguments import ADAPTED
from .backbones import Backbones
from .labels import TaskData
from .pages import CHARTS, Block, Picture, to_html, to_markdown
from .sections import make_sections
from .verdict import find_verdict, looks_at_images
from .wording import label, points

REPORT = "report.json"
README = "README.md"
PAGE = "report.html"
PLAN_FIELDS = ("machine", "budget", "image_size", "steps", "fine_tuning_steps", "seeds")  # of the plan, in the report
UNITS = {
    "mean_iou": "mIoU",
    "map": "mAP",
    "box_map": "box mAP",
    "mask_map": "mask mAP",
    "mean_average_precision": "mAP",
}


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
        frozen: scores of probes of frozen backbones: `model`, `probe`, `metric` (title of the score), `score`,
            `resampled` and `cases`.
        controls: `answers`, the `scores` of a model in the metrics of `vitp evaluate_vlm`; `answer_prior`, Markdown
            text; `overlap`, the number of test images in the training data; `early`, a text with the scores of a probe
            at 10% of the steps; `interpolation`, a text on how far the backbone went from its start.
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
        return to_markdown(self.title, find_verdict(self)[0], self.sections())

    def to_html(self, folder: str | Path) -> str:
        """Return the report as one page of HTML that needs no other file; `folder` has the pictures."""
        return to_html(self.title, find_verdict(self)[0], self.sections(), Path(folder))

    @property
    def verdict(self) -> str:
        """Advice on the backbone to use, with remarks."""
        return " ".join(find_verdict(self))

    def looks_at_images(self) -> bool:
        """Return false if the answers to no kind of question are clearly better with the own image."""
        return looks_at_images(self)

    def sections(self) -> dict[str, list[Block]]:
        """Return the sections of the pages after the verdict, by title."""
        return make_sections(self)

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

        They are corrected for the number of other backbones, see
        [`~modeling_vitp.metrics.resampling.corrected_differences`].

        Args:
            labels: fraction of the training images of the fine-tuning.
        """
        adapted_scores = self.scores(ADAPTED, labels)
        ours = {}
        theirs = {}
        for name in self.models:
            if name == ADAPTED:
                continue
            model_scores = self.scores(name, labels)
            common_seeds = [seed for seed in adapted_scores if seed in model_scores]
            if common_seeds:
                ours[name] = [adapted_scores[seed] for seed in common_seeds]
                theirs[name] = [model_scores[seed] for seed in common_seeds]
        return corrected_differences(ours, theirs)

    def frozen_scores(self) -> dict[tuple[str, str], Score]:
        """Return the test score of each probe and frozen backbone."""
        scores = {}
        for run in self.frozen:
            scores[run["probe"], run["model"]] = Score(run["score"], run["resampled"], run["cases"])
        return scores

    def frozen_differences(self) -> dict[tuple[str, str], Difference]:
        """Return the difference of the frozen adapted backbone to each other one, by probe and backbone."""
        scores = self.frozen_scores()
        differences = {}
        for (probe, model), score in scores.items():
            adapted_score = scores.get((probe, ADAPTED))
            if adapted_score is not None and model != ADAPTED:
                differences[probe, model] = paired_difference([adapted_score], [score])
        return differences


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
        controls=without_key(without_key(controls, "problems"), "overlap_problems"),
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
    for images, share in zip(("training", "test"), controls["compared"]):
        if share < 1:
            notes.append(f"Of the {images} images, {share:.0%} were searched for test images in the training data.")
    if not controls["answers"]:
        notes.append("Answers were not compared with those about other images.")
    return notes
