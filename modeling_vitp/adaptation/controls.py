"""Controls of an adaptation: checks of the instructions, and answers about test images with other images."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.arguments import VLMArguments
from ..evaluation.vlm import choose_questions
from ..input_spec import InputSpec
from ..instructions.answer_prior import LITTLE, check_answer_priors
from ..instructions.mixture import load_sources
from ..instructions.rows import SourceSettings
from ..instructions.validation import print_reports, save_reports, validate
from . import runs
from .arguments import AdaptArguments
from .labels import TaskData
from .overlap import (
    SECONDS_PER_IMAGE,
    Pair,
    draw,
    draw_pairs,
    find_pairs,
    images_of_files,
    images_of_instructions,
    index_images,
    likeness,
)
from .pretraining import Pretraining

CHECKS_SHARE = 0.05  # of the budget, for the model that guesses answers, and again for the search for test images
QUESTIONS = 200  # most questions of the control with other images


def check_instructions(
    args: AdaptArguments, pretraining: Pretraining, labels: TaskData, folder: Path
) -> dict[str, Any]:
    """Check the instructions for test images, damaged rows and answers that follow from their questions.

    The model that guesses answers, and the search for test images, take about a tenth of the budget at most: the model
    stops, and images are left out.

    Args:
        args: arguments of the command.
        pretraining: settings of the pretraining with its instructions.
        labels: labeled images.
        folder: folder for the reports of the sources, and for a picture of test images in the training data.

    Returns:
        `problems`, sentences for which the run stops; `overlap_problems`, those of test images in the training data;
        `answer_prior`, a table; `overlap`, the number of test images in the training data; `compared`, the shares of
        the training and test images that were compared.
    """
    seconds = CHECKS_SHARE * args.seconds
    image_processor = pretraining.image_processor
    mixture = load_sources(pretraining.instructions)
    reports = validate(mixture, os.cpu_count(), input_spec=image_processor.input_spec)
    seconds_of_source = seconds / len(mixture.sources)
    answer_prior = check_answer_priors(mixture.sources, reports, None, pretraining.seed, seconds_of_source)
    report_path = folder / "report.json"
    is_passed = save_reports(reports, {"instructions": pretraining.instructions}, report_path)
    print_reports(reports)
    print(answer_prior)
    problems = []
    if not is_passed:
        problems.append(f"The instructions are invalid, see {report_path}.")
    if labels.test_scenes == 1:
        problems.append(
            f"All {len(labels.images['test'])} test images are of one scene or patient: the verdict would be 'Not "
            "decided'. Add images of other scenes, or set scene_pattern so that they are told apart."
        )
    for report in reports:
        if report.answer_prior is not None and report.answer_prior.hidden_bits < LITTLE:
            problems.append(
                f"The answers of {report.name} follow from their questions: a ViT learns nothing from them. Give "
                "labels with several classes or numbers of objects, or other instructions."
            )
    spec = SourceSettings().spec_for(image_processor)
    overlap = check_overlap(args, labels, spec, int(seconds / SECONDS_PER_IMAGE), folder / "overlap.png")
    return {"problems": problems, "answer_prior": answer_prior, **overlap}


def check_overlap(
    args: AdaptArguments, labels: TaskData, spec: InputSpec, number: int, picture: Path
) -> dict[str, Any]:
    """Search for test images in the training images, and return the entries of the checks on them.

    Args:
        args: arguments of the command.
        labels: labeled images.
        spec: input spec of the images.
        number: most training images, and most test images.
        picture: file for a picture of the pairs.
    """
    if args.instructions is None:
        training_images = images_of_files(labels.images["train"])
    else:
        training_images = images_of_instructions(args.instructions, number, args.seed)
    test_images = images_of_files(labels.images["test"])
    compared_training = [training_images[index] for index in draw(len(training_images), number, args.seed)]
    compared_tests = [test_images[index] for index in draw(len(test_images), number, args.seed)]
    pairs = find_pairs(index_images(compared_tests, spec), compared_training)
    same_pairs = [pair for pair in pairs if pair.is_same]
    other_pairs = [pair for pair in pairs if not pair.is_same]
    problems = []
    if same_pairs:
        problems.append(describe_overlap(same_pairs, "in the training data", labels))
    elif other_pairs:
        least_score = likeness(compared_training, spec, args.seed)
        suspicious_pairs = [pair for pair in other_pairs if pair.match.score >= least_score]
        if suspicious_pairs:
            what = "perhaps in the training data: more alike to a training image than those are among themselves"
            problems.append(describe_overlap(suspicious_pairs, what, labels))
    if problems:
        draw_pairs(pairs, spec, picture)
        problems.append(f"Pairs: {picture}. If the images differ, add --allow_overlap.")
    return {
        "overlap_problems": problems,
        "overlap": len({pair.match.test_image for pair in same_pairs}),
        "compared": [len(compared_training) / len(training_images), len(compared_tests) / len(test_images)],
    }


def describe_overlap(pairs: Sequence[Pair], what: str, labels: TaskData) -> str:
    """Return a sentence on test images that are, or may be, in the training data.

    Args:
        pairs: pairs of images, the most alike first.
        what: what is said of the test images.
        labels: labeled images.
    """
    remedy = "Take them out"
    if labels.how.startswith("Split by"):  # and not by the labels
        remedy += ", or set scene_pattern so that the images of a scene stay together"
    match = pairs[0].match
    training_image = pairs[0].image["id"]
    num_test_images = len({pair.match.test_image for pair in pairs})
    return (
        f"{num_test_images} test image(s) are {what}, such as {match.test_image} in {training_image} (correlation "
        f"{match.score:.2f}). {remedy}."
    )


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
