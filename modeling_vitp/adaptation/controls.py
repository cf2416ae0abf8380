"""Controls of an adaptation: checks of the instructions, and answers about test images with other images."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature

from ..evaluation.arguments import VLMArguments
from ..evaluation.vlm import choose_questions
from ..instructions.answer_prior import LITTLE, check_answer_priors
from ..instructions.mixture import load_sources
from ..instructions.overlap import TestImages
from ..instructions.rows import SourceSettings
from ..instructions.validation import SourceReport, print_reports, save_reports, validate
from . import runs
from .labels import TaskData
from .pretraining import Pretraining

QUESTIONS = 200  # most questions of the control with other images


def check_instructions(pretraining: Pretraining, labels: TaskData, report_path: Path) -> dict[str, Any]:
    """Check the instructions for test images, damaged rows and answers that follow from their questions.

    Args:
        pretraining: settings of the pretraining with its instructions.
        labels: labeled images.
        report_path: file for the reports of the sources.

    Returns:
        `problems`, sentences for which the run stops; `answer_prior`, a table; `overlap`, the number of images.
    """
    image_processor = pretraining.image_processor
    mixture = load_sources(pretraining.instructions)
    workers = os.cpu_count()
    files = [str(path) for path in labels.images["test"]]
    images = Dataset.from_dict({"image": files})
    images = images.cast_column("image", ImageFeature(decode=False))
    input_spec = SourceSettings().spec_for(image_processor)
    test_images = TestImages(images, files, workers, input_spec)
    reports = validate(
        mixture,
        workers,
        test_images=test_images,
        input_spec=image_processor.input_spec,
    )
    # Without a limit of time, on which the learning rate would depend, so that a resumed run has the same figures.
    answer_prior = check_answer_priors(mixture.sources, reports, None, pretraining.seed, math.inf)
    is_passed = save_reports(reports, {"instructions": pretraining.instructions}, report_path)
    print_reports(reports)
    print(answer_prior)
    problems = overlap_problems(reports, labels)
    if not problems and not is_passed:
        problems.append(f"The instructions are invalid, see {report_path}.")
    if labels.test_scenes == 1:
        problems.append(
            f"All {len(files)} test images are of one scene or patient: the verdict would be 'Not decided'. Add "
            "images of other scenes, or set scene_pattern so that they are told apart."
        )
    for report in reports:
        if report.answer_prior is not None and report.answer_prior.hidden_bits < LITTLE:
            problems.append(
                f"The answers of {report.name} follow from their questions: a ViT learns nothing from them. Give "
                "labels with several classes or numbers of objects, or other instructions."
            )
    return {
        "problems": problems,
        "answer_prior": answer_prior,
        "overlap": len(overlapping_images(reports)),
    }


def overlapping_images(reports: Sequence[SourceReport]) -> set[str]:
    """Return the test images that are in the training data."""
    images = set()
    for report in reports:
        for match in report.overlap:
            images.add(match["test_image"])
    return images


def overlap_problems(reports: Sequence[SourceReport], labels: TaskData) -> list[str]:
    """Return a sentence if test images are in the training data."""
    matches = []
    for report in reports:
        matches += report.overlap
    if not matches:
        return []
    remedy = "Take them out"
    if labels.how.startswith("Split by"):  # and not by the labels
        remedy += ", or set scene_pattern so that the images of a scene stay together"
    example = matches[0]
    return [
        f"{len(overlapping_images(reports))} test image(s) are in the training data, such as {example['test_image']} "
        f"in row {example['id']}. {remedy}."
    ]


def control_settings(model: Path, questions: Path) -> dict[str, Any]:
    """Return the configuration of `vitp evaluate_vlm` for questions about test images.

    Args:
        model: folder of the pretraining.
        questions: folder of the questions.
    """
    return {
        "models": [str(model)],
        "dataset_name": str(questions),
        "split": "train",
        "limit": QUESTIONS,
    }


def count_control_questions(settings: dict[str, Any]) -> int:
    """Return the number of questions of the control, whose errors must not wait for the trainings."""
    _, questions, _, _ = choose_questions(VLMArguments(**settings))
    return len(questions)


def score_answers(settings: dict[str, Any], output: Path, has_questions: bool) -> dict[str, Any]:
    """Return the scores of answers to questions about test images, with their own images and with others.

    Args:
        settings: configuration of `vitp evaluate_vlm`.
        output: output folder.
        has_questions: whether there are questions about test images. Given instructions have none.
    """
    if not has_questions:
        return {"answers": {}}
    metrics = runs.run_vlm_evaluation(settings, output)
    return {"answers": metrics["models"][0]["scores"]}
