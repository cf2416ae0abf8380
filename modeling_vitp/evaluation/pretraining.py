"""Scores of a finished pretraining: probes of its backbone on labels, and answers to questions about unseen images.

A projector and a language model can learn to guess answers. Each score of answers therefore stands beside two controls:
answers to the same questions with another image, and the best constant answer of the training data.
"""

import itertools
import random
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from ..cards.sections import table
from ..data.annotations import AnnotatedImage
from ..data.boxes import iou
from ..instructions.boxes import read_boxes
from ..instructions.collator import ViTPDataCollator
from ..instructions.from_annotations.drawing import DrawnInstructions
from ..instructions.from_annotations.labeled_views import write_views
from ..instructions.rows import SampleTransform, images_of, is_given, prepare_rows
from ..metrics.resampling import resample_mean
from ..modeling_vitp import ViTPForConditionalGeneration
from ..pretraining.arguments import PretrainArguments
from ..pretraining.data import PretrainData
from ..pretraining.generation import generate_answers
from ..pretraining.options import PretrainingOptions
from ..processing_vitp import ViTPProcessor, message_texts
from ..tasks.segmentation.data import DenseData
from ..tasks.segmentation.probe import SegmentationProbe
from ..vrl import keyed_generator
from .answer_scores import LOWER_IS_BETTER, largest_area, read_number, score_answers
from .gains import gains_table, probe_run
from .run_probes import probe_scenes, probe_views
from .vlm import Question, answer_kind, conversation_of, other_images, read_questions

MOST_ROWS = 2000  # Whose questions may be asked.
MOST_QUESTIONS = 200  # Of each kind.
MOST_CONSTANTS = 200  # Number of training answers from which the best constant answer is chosen.
TRAINED_ROWS = 500  # Number of training rows from which these are taken.
BATCH_SIZE = 32
CACHED_TOKENS = 1 << 17  # Limit of the tokens in the cache of a batch of sampled answers.
# Sampled answers to a question for a number or for a fine map, of which the middle one is scored.
SAMPLES = {"count": 51, "fine_map": 12}
MOST_NEW_TOKENS = 512
# Main score of each kind, by which the constant answer is chosen.
MAIN_SCORES = {
    "count": "mean_error",
    "grounding": "mean_iou",
    "map": "mean_iou",
    "fine_map": "largest_area_iou",
    "vqa": "accuracy",
    "choice": "accuracy",
}


def probe_labels(
    drawn: DrawnInstructions,
    test_images: Sequence[AnnotatedImage],
    output_dir: Path,
    seed: int,
    device: str | torch.device,
    color_jitter: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Probe the backbone of a run and its controls on the labels that its questions were drawn from.

    Boxes, oriented boxes (their upright boxes) and masks are probed by patches of views, see
    [`~modeling_vitp.evaluation.run_probes.probe_views`], images with one class each as a whole, see
    [`~modeling_vitp.evaluation.run_probes.probe_scenes`].

    Args:
        drawn: transform of the training images.
        test_images: labeled images that the run has not trained on.
        output_dir: folder of the run, to which pictures of patches are written as `probe`.
        seed: seed of the views and of the random weights.
        device: device of the backbones.
        color_jitter: fields of the [`~modeling_vitp.images.pixels.ColorJitter`] of the pretraining, which the training
            views of 8-bit images get too.

    Returns:
        The scores and gains, or `None` if the labels have no classes of patches or images, as those of pairs.
    """
    subject = drawn.asker.subject
    if subject == "scene":
        return probe_scenes(drawn.images, test_images, output_dir, seed, device)
    if subject not in ("objects", "regions"):
        return None
    views = output_dir / "probe" / "data"
    names = write_views(drawn, test_images, views, seed, color_jitter)
    scores = probe_views(views, names, output_dir, seed, device)
    shutil.rmtree(views)
    return scores


def check_probe_data(args: PretrainArguments) -> None:
    """Raise a `ValueError` if the images with masks that the backbone is probed on at the end are not found."""
    if args.probe_data is not None:
        splits = dict(zip(("train", "test"), args.probe_splits))
        SegmentationProbe(DenseData.from_dict(args.probe_data), splits, l2=1e-2)


def score_run(options: PretrainingOptions, data: PretrainData) -> dict[str, Any]:
    """Return and print the scores of a finished run: probes of its frozen backbone, and answers about unseen images.

    Returns:
        `probe`, `answers`, and `summary` with their tables; without the ones that the data do not allow.
    """
    args, training_args = options.data, options.training
    output_dir, seed, device = Path(training_args.output_dir), training_args.seed, training_args.device
    scores: dict[str, Any] = {}
    tables = []
    if args.probe_data is not None:
        scores["probe"] = probe_run(args.probe_data, args.probe_splits, output_dir, seed, device)
    elif data.test_images:
        jitter = training_args.color_jitter
        scores["probe"] = probe_labels(data.transform, data.test_images, output_dir, seed, device, jitter)
    if scores.get("probe"):
        tables += ["Probes of frozen features:", gains_table(scores["probe"])]
    if isinstance(data.eval, Dataset):
        model = ViTPForConditionalGeneration.from_pretrained(output_dir).to(device)
        processor = ViTPProcessor.from_pretrained(output_dir)
        trained = texts_of(data.train, data.transform, seed)
        scores["answers"] = score_pretraining(model, processor, data.eval, trained, seed, data.transform is not None)
        if scores["answers"]:
            tables += ["Answers about unseen images:", answers_table(scores["answers"])]
    if tables:
        scores["summary"] = "\n\n".join(tables)
        print(f"\n{scores['summary']}")
    return {name: value for name, value in scores.items() if value}


def score_pretraining(
    model: ViTPForConditionalGeneration,
    processor: ViTPProcessor,
    rows: Sequence[dict[str, Any]],
    trained: Iterable[Sequence[dict[str, str]]],
    seed: int,
    are_independent: bool = False,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the scores of answers by kind of the question and name of the score.

    An answer that is a number is the median of sampled answers, because the median minimizes the mean error; a fine map
    is the sampled one whose largest area overlaps most with those of the others. Other answers are greedy. Captions are
    not scored, see [`~modeling_vitp.evaluation.vlm.evaluate_vlm`].

    Args:
        model: pretrained model.
        processor: its processor.
        rows: conversations about images that the model has not seen.
        trained: messages of training conversations, for the constant answers.
        seed: seed of the chosen questions and of sampling.
        are_independent: whether the questions of a conversation do not depend on each other, so that each is asked
            alone. By default, earlier questions and correct answers precede a question.

    Returns:
        Of each score `own`, `other_images` and `constant`. `least_gain` is the smallest improvement of `own` over the
        two others; an error has `ratio_to_other_images` and `ratio_to_constant` too. `difference` is the 95% bootstrap
        interval, over images, of the difference of `own` to `other_images`. Empty without questions that can be scored.
    """
    if isinstance(rows, Dataset):
        if len(rows) > MOST_ROWS:
            rows = rows.select(sorted(random.Random(seed).sample(range(len(rows)), MOST_ROWS)))
        rows = prepare_rows(rows)  # Encoded images are known by their content, decoded ones by their address.
    rows = split_turns(rows) if are_independent else rows
    questions, _ = read_questions(rows)
    partners = other_images([question.images for question in questions])
    by_kind: dict[str, list[tuple[Question, Question]]] = defaultdict(list)
    for question, partner in zip(questions, partners):
        if partner is not None and question.kind in MAIN_SCORES:
            by_kind[question.kind].append((question, questions[partner]))
    constants = best_constants(trained)
    collator = ViTPDataCollator(processor)
    torch.manual_seed(seed)
    scores = {}
    for kind, pairs in by_kind.items():
        if len(pairs) > MOST_QUESTIONS:
            chosen = random.Random(seed).sample(range(len(pairs)), MOST_QUESTIONS)
            pairs = [pairs[index] for index in sorted(chosen)]
        asked = [question for question, _ in pairs]
        own = ask(model, collator, rows, [(question, None) for question in asked], kind, "own images")
        other = ask(model, collator, rows, pairs, kind, "other images")
        constant = [constants.get(kind, "")] * len(asked)
        scores[kind] = compare(kind, asked, own, other, constant, seed)
    return scores


def texts_of(
    rows: Dataset | IterableDataset, transform: SampleTransform | None, seed: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages of evenly spaced training rows, or the first of a stream, for the constant answers."""
    rows = prepare_rows(rows)
    if isinstance(rows, Dataset):
        indices = np.linspace(0, len(rows) - 1, min(TRAINED_ROWS, len(rows))).round().astype(int)
        rows = rows.select(indices)
    for row in itertools.islice(rows, TRAINED_ROWS):
        if hasattr(transform, "messages"):
            yield transform.messages(row, keyed_generator(seed, row["id"], "constants"))
        elif transform is None:
            yield row["messages"]


def split_turns(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each question of conversations, with the same images."""
    single_rows = []
    for row in rows:
        images, messages = images_of(row), row["messages"]
        for turn, message in enumerate(messages):
            if message["role"] == "assistant" and turn > 0 and not is_given(message):
                pair = messages[turn - 1 : turn + 1]
                single_rows.append({"id": f"{row['id']}#{turn}", "images": images, "messages": pair})
    return single_rows


def best_constants(conversations: Iterable[Sequence[dict[str, str]]]) -> dict[str, str]:
    """Return the constant answer of each kind that has the best main score on training answers."""
    by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for messages in conversations:
        for question, answer in zip(messages[:-1], messages[1:]):
            if answer["role"] == "assistant" and question["role"] == "user":
                texts = " ".join(message_texts(question)), " ".join(message_texts(answer))
                kind = answer_kind(*texts)
                if kind in MAIN_SCORES and len(by_kind[kind]) < MOST_CONSTANTS:
                    by_kind[kind].append(texts)
    constants = {}
    for kind, pairs in by_kind.items():
        questions, answers = zip(*pairs)
        references = [(answer,) for answer in answers]
        name = MAIN_SCORES[kind]
        values = {}
        for candidate in candidates_of(kind, answers):
            value = float(np.mean(score_answers(kind, questions, [candidate] * len(answers), references)[name]))
            values[candidate] = -value if name in LOWER_IS_BETTER else value
        constants[kind] = max(values, key=values.get)
    return constants


def candidates_of(kind: str, answers: Sequence[str]) -> list[str]:
    """Return the answers that may be the best constant: of maps, also each of their words in all cells."""
    if kind in ("map", "fine_map"):
        longest = max(len(answer.split()) for answer in answers)
        words = sorted({word for answer in answers for word in answer.split()})
        return [*dict.fromkeys(answers), *(" ".join([word] * longest) for word in words)]
    if kind == "grounding":
        return [answer for answer in dict.fromkeys(answers) if read_boxes(answer)[0]]
    return list(dict.fromkeys(answers))


@torch.no_grad()
def ask(
    model: ViTPForConditionalGeneration,
    collator: ViTPDataCollator,
    rows: Sequence[dict[str, Any]],
    pairs: Sequence[tuple[Question, Question | None]],
    kind: str,
    description: str,
) -> list[str]:
    """Return the answers to questions of one kind, with their own images or those of another question."""
    model.eval()
    tokenizer = collator.processor.tokenizer
    longest = max(len(tokenizer(question.references[0])["input_ids"]) for question, _ in pairs)
    options: dict[str, Any] = {"max_new_tokens": min(longest + 1, MOST_NEW_TOKENS)}  # and the end of the turn
    samples, batch_size = SAMPLES.get(kind, 1), BATCH_SIZE
    if samples > 1:
        options |= {"samples": samples, "do_sample": True, "top_k": 0}
        length = collator([rows[pairs[0][0].row]])["input_ids"].shape[1]
        batch_size = max(min(BATCH_SIZE, CACHED_TOKENS // (samples * length)), 1)
    answers = []
    for start in tqdm(range(0, len(pairs), batch_size), desc=f"{kind}, {description}"):
        batch = [conversation_of(collator, rows, *pair) for pair in pairs[start : start + batch_size]]
        sampled = generate_answers(model, collator.processor, batch, **options)
        for first in range(0, len(sampled), samples):
            answers.append(middle_answer(kind, sampled[first : first + samples]))
    return answers


def middle_answer(kind: str, answers: Sequence[str]) -> str:
    """Return the answer with the median number, or the map whose largest area overlaps most with those of the others.

    Without a number or an area in any answer, the first one is returned.
    """
    if kind == "count":
        numbered = [answer for answer in answers if read_number(answer) is not None]
        return sorted(numbered, key=read_number)[(len(numbered) - 1) // 2] if numbered else answers[0]
    boxes = {answer: largest_area(answer) for answer in answers} if kind == "fine_map" else {}
    boxes = {answer: box for answer, box in boxes.items() if box is not None}
    return max(boxes, key=lambda answer: sum(iou(boxes[answer], box) for box in boxes.values()), default=answers[0])


def compare(
    kind: str,
    questions: Sequence[Question],
    own: Sequence[str],
    other: Sequence[str],
    constant: Sequence[str],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return each score of three lists of answers, see [`score_pretraining`]."""
    texts = [question.text for question in questions]
    references = [question.references for question in questions]
    values = {"own": own, "other_images": other, "constant": constant}
    values = {name: score_answers(kind, texts, answers, references) for name, answers in values.items()}
    images = [" ".join(question.images) for question in questions]
    compared = {}
    for score, of_own in values["own"].items():
        means = {name: float(np.mean(of_name[score])) for name, of_name in values.items()}
        is_error = score in LOWER_IS_BETTER
        gains = [means["own"] - means[name] for name in ("other_images", "constant")]
        found: dict[str, Any] = {**means, "least_gain": min(-gain if is_error else gain for gain in gains)}
        if is_error:
            for name in ("other_images", "constant"):
                if means[name] > 0:
                    found[f"ratio_to_{name}"] = means["own"] / means[name]
        difference = of_own - values["other_images"][score]
        found["difference"] = np.percentile(resample_mean(difference, images, seed), [2.5, 97.5]).tolist()
        found["questions"] = len(questions)
        compared[score] = found
    return compared


def answers_table(scores: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a Markdown table with a row for each score."""
    columns = ["answers", "questions", "with own images", "with other images", "best constant"]
    lines = []
    for kind, of_kind in scores.items():
        for score, found in of_kind.items():
            values = [f"{found[name]:.3f}" for name in ("own", "other_images", "constant")]
            lines.append([f"{kind}: {score.replace('_', ' ')}", found["questions"], *values])
    return table(columns, lines)
