"""Verdict of an adaptation: advice on the backbone to use, from the differences of the fine-tuned models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..evaluation.answer_scores import LOWER_IS_BETTER
from ..metrics.resampling import Difference
from .arguments import RANDOM
from .wording import label, points

if TYPE_CHECKING:
    from .report import AdaptationReport

FEW = 20  # number of scenes of test images below which the verdict warns of its intervals
BLIND = (
    "The answers to no kind of question are clearly better with the own image than with another: it is not shown that "
    "the language model looks at the image, nor that the pretraining taught the ViT what the labels say."
)


def find_verdict(report: "AdaptationReport") -> list[str]:
    """Return the advice on the backbone to use, one sentence, and sentences of remarks.

    A backbone is better if the 95% interval of the difference, over test scenes and at least two seeds, excludes
    0. If others are better than the adapted backbone, the advice is the best of them. If no difference to the start
    is found, the advice is the start.
    """
    differences = report.differences()
    num_images = report.data.get("images", {}).get("test", FEW)
    num_scenes = report.data.get("test_scenes", num_images)
    if num_scenes == 1:
        advised_backbone = ""
        sentences = ["Not decided: all test images are of one scene or patient."]
    else:
        advised_backbone = best_backbone(report, differences)
        sentences = [advise(report, advised_backbone, differences)]
    for name, difference in differences.items():
        if name != advised_backbone:
            sentences.append(compare(report, name, difference))
    sentences.append(report.direction)
    if 1 < num_scenes < FEW:
        each_is_a_scene = num_scenes == num_images
        contents = f"{num_images} images" if each_is_a_scene else f"images of {num_scenes} scenes or patients"
        sentences.append(f"The test split has {contents}: with so few, do not rely on the intervals.")
    sentences += frozen_below_random(report)
    if not looks_at_images(report):
        sentences.append(BLIND)
    return [sentence for sentence in sentences if sentence]


def frozen_below_random(report: "AdaptationReport") -> list[str]:
    """Return a sentence for each probe in which the frozen adapted backbone is clearly below random weights."""
    sentences = []
    for (probe, model), difference in report.frozen_differences().items():
        if model == RANDOM and difference.high < 0:
            sentences.append(
                f"Frozen, the adapted backbone is below random weights in the probe {probe} "
                f"({points(difference.mean, '+')} points, 95% interval {points(difference.low)} to "
                f"{points(difference.high)}): its features were harmed."
            )
    return sentences


def best_backbone(report: "AdaptationReport", differences: Mapping[str, Difference]) -> str:
    """Return the best of the backbones that are better than the adapted one; the start if none is.

    Args:
        differences: differences of the adapted backbone to the others.
    """
    losses = {}
    for name, difference in differences.items():
        if is_loss(difference):
            losses[name] = difference.as_gain().mean
    return min(losses, key=losses.get, default=report.start)


def advise(report: "AdaptationReport", best: str, differences: Mapping[str, Difference]) -> str:
    """Return the sentence of the verdict on the backbone to use.

    Args:
        best: best of the other backbones, see [`best_backbone`].
        differences: differences of the adapted backbone to the others.
    """
    start = label(report.start)
    if best != report.start:
        verb = "they are" if best == RANDOM else "it is"
        return f"Use {label(best)}: {verb} better than the adapted backbone by {report.loss(differences[best])}."
    if report.start not in differences:
        return f"Not decided: the adapted backbone was not compared with {start} after fine-tuning."
    difference = differences[report.start]
    if difference.seeds < 2:
        comparison = compare(report, report.start, difference)
        return f"Not decided: with one seed, the interval covers test images only. {comparison}"
    if is_loss(difference):
        return f"Keep {start}: the adapted backbone is worse by {report.loss(difference)}."
    change = report.change(difference)
    bounds = report.bounds(difference)
    if difference.is_clear:
        relation = "over" if report.greater_is_better else "compared with"
        return f"Use the adapted backbone: {change} ({bounds}) {relation} {start}."
    return f"Keep {start}: no difference to the adapted backbone was found ({change}, {bounds})."


def compare(report: "AdaptationReport", name: str, difference: Difference) -> str:
    """Return a sentence on a backbone, empty if the adapted one is clearly better."""
    if difference.seeds < 2:
        change = f"{report.change(difference)} ({report.bounds(difference)})"
        return f"In one seed, the difference of the adapted backbone to {label(name)} is {change}."
    if not difference.is_clear:
        return f"No difference to {label(name)} was found ({report.change(difference)}, {report.bounds(difference)})."
    if is_loss(difference):
        return f"The adapted backbone is worse than {label(name)} by {report.loss(difference)}."
    return ""


def looks_at_images(report: "AdaptationReport") -> bool:
    """Return false if the answers to no kind of question are clearly better with the own image."""
    least_gains = []
    for scores in report.controls.get("answers", {}).values():
        # Each kind has one score here, because among several one is above 0 by chance more often.
        name = decisive_score(scores)
        if name is not None:
            low, high = scores[name]["gain"]  # interval of the difference
            least_gains.append(-high if name in LOWER_IS_BETTER else low)
    return not least_gains or max(least_gains) > 0


def decisive_score(scores: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the name of the score of a kind of question that tells whether the model looks at the image."""
    if "mean_iou" in scores:
        return "mean_iou"
    for name, score in scores.items():
        if "gain" in score:
            return name
    return None


def is_loss(difference: Difference) -> bool:
    """Return whether the first model is clearly worse."""
    return difference.is_clear and difference.as_gain().mean < 0
