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
from ..conversations import message_texts
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
from ..processing_vitp import ViTPProcessor
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
    probe_data = args.probe_data
    if probe_data is None:
        return
    SegmentationProbe(
        DenseData.from_dict(probe_data.data),
        {"train": probe_data.train_split, "test": probe_data.test_split},
        l2=1e-2,
    )


def score_run(options: PretrainingOptions, data: PretrainData) -> dict[str, Any]:
    """Return and print the scores of a finished run: probes of its frozen backbone, and answers about unseen images.

    Args:
        options: options of the run. Its output folder has the trained model.
        data: data of the run. Questions are about its evaluation rows, and constant answers are those of its training
            rows.

    Returns:
        The scores of the probes as `probe`, those of the answers as `answers`, and their tables as `summary`. A key is
        missing if the data have no labels to probe on, or no questions that can be scored.
    """
    scores: dict[str, Any] = {}
    tables = []
    probe_scores = score_probe(options, data)
    if probe_scores:
        scores["probe"] = probe_scores
        tables += ["Probes of frozen features:", gains_table(probe_scores)]
    answer_scores = score_run_answers(options, data)
    if answer_scores:
        scores["answers"] = answer_scores
        tables += ["Answers about unseen images:", answers_table(answer_scores)]
    if tables:
        scores["summary"] = "\n\n".join(tables)
        print(f"\n{scores['summary']}")
    return scores


def score_probe(options: PretrainingOptions, data: PretrainData) -> dict[str, Any] | None:
    """Return the scores and gains of the backbone of a run, or `None` without labels that it can be probed on."""
    probe_data = options.data.probe_data
    training_args = options.training
    output_dir = Path(training_args.output_dir)
    if probe_data is not None:
        return probe_run(
            DenseData.from_dict(probe_data.data),
            train_split=probe_data.train_split,
            test_split=probe_data.test_split,
            output_dir=output_dir,
            seed=training_args.seed,
            device=training_args.device,
        )
    if data.test_images:
        return probe_labels(
            data.transform,
            data.test_images,
            output_dir=output_dir,
            seed=training_args.seed,
            device=training_args.device,
            color_jitter=training_args.color_jitter,
        )
    return None


def score_run_answers(options: PretrainingOptions, data: PretrainData) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the scores of the answers of a run, see [`score_pretraining`]; empty without stored evaluation rows."""
    if not isinstance(data.eval, Dataset):
        return {}
    training_args = options.training
    model = ViTPForConditionalGeneration.from_pretrained(training_args.output_dir)
    model.to(training_args.device)
    processor = ViTPProcessor.from_pretrained(training_args.output_dir)
    training_conversations = texts_of(data.train, data.transform, training_args.seed)
    # A transform draws the questions of a conversation about labels, so that none refers to an earlier one.
    are_independent = data.transform is not None
    return score_pretraining(
        model,
        processor,
        rows=data.eval,
        trained=training_conversations,
        seed=training_args.seed,
        are_independent=are_independent,
    )


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
        rows: conversations about images that the model has not seen. Their questions are asked.
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
            drawn_indices = random.Random(seed).sample(range(len(rows)), MOST_ROWS)
            rows = rows.select(sorted(drawn_indices))
        rows = prepare_rows(rows)  # Encoded images are known by their content, decoded ones by their address.
    if are_independent:
        rows = split_turns(rows)
    pairs_by_kind = questions_with_partners(rows)
    constants = best_constants(trained)
    collator = ViTPDataCollator(processor)
    torch.manual_seed(seed)
    scores = {}
    for kind, pairs in pairs_by_kind.items():
        if len(pairs) > MOST_QUESTIONS:
            drawn_indices = random.Random(seed).sample(range(len(pairs)), MOST_QUESTIONS)
            pairs = [pairs[index] for index in sorted(drawn_indices)]
        questions = [question for question, _ in pairs]
        own_pairs = [(question, None) for question in questions]
        own_answers = ask(model, collator, rows, own_pairs, kind, "own images")
        other_answers = ask(model, collator, rows, pairs, kind, "other images")
        constant_answers = [constants.get(kind, "")] * len(questions)
        scores[kind] = compare(kind, questions, own_answers, other_answers, constant_answers, seed)
    return scores


def questions_with_partners(rows: Iterable[dict[str, Any]]) -> dict[str, list[tuple[Question, Question]]]:
    """Return the questions of each scored kind, each with a question whose images replace its own."""
    questions, _ = read_questions(rows)
    partners = other_images([question.images for question in questions])
    pairs_by_kind = defaultdict(list)
    for question, partner in zip(questions, partners):
        if partner is not None and question.kind in MAIN_SCORES:
            pairs_by_kind[question.kind].append((question, questions[partner]))
    return pairs_by_kind


def texts_of(
    rows: Dataset | IterableDataset,
    transform: SampleTransform | None,
    seed: int,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages of evenly spaced training rows, or the first of a stream, for the constant answers."""
    rows = prepare_rows(rows)
    if isinstance(rows, Dataset):
        number = min(TRAINED_ROWS, len(rows))
        indices = np.linspace(0, len(rows) - 1, number)
        rows = rows.select(indices.round().astype(int))
    for row in itertools.islice(rows, TRAINED_ROWS):
        if hasattr(transform, "messages"):
            generator = keyed_generator(seed, row["id"], "constants")
            yield transform.messages(row, generator)
        elif transform is None:
            yield row["messages"]


def split_turns(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each question of conversations, with the same images."""
    single_rows = []
    for row in rows:
        images = images_of(row)
        messages = row["messages"]
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or turn == 0 or is_given(message):
                continue
            single_row = {
                "id": f"{row['id']}#{turn}",
                "images": images,
                "messages": messages[turn - 1 : turn + 1],
            }
            single_rows.append(single_row)
    return single_rows


def best_constants(conversations: Iterable[Sequence[dict[str, str]]]) -> dict[str, str]:
    """Return the constant answer of each kind that has the best main score on training answers."""
    constants = {}
    for kind, pairs in trained_answers(conversations).items():
        questions = [question for question, _ in pairs]
        answers = [answer for _, answer in pairs]
        references = [(answer,) for answer in answers]
        score_name = MAIN_SCORES[kind]
        candidate_scores = {}
        for candidate in candidates_of(kind, answers):
            scores = score_answers(kind, questions, [candidate] * len(answers), references)
            mean = float(np.mean(scores[score_name]))
            candidate_scores[candidate] = -mean if score_name in LOWER_IS_BETTER else mean
        constants[kind] = max(candidate_scores, key=candidate_scores.get)
    return constants


def trained_answers(conversations: Iterable[Sequence[dict[str, str]]]) -> dict[str, list[tuple[str, str]]]:
    """Return up to `MOST_CONSTANTS` questions with their answers of each scored kind."""
    pairs_by_kind = defaultdict(list)
    for messages in conversations:
        for question, answer in itertools.pairwise(messages):
            if question["role"] != "user" or answer["role"] != "assistant":
                continue
            question_text = " ".join(message_texts(question))
            answer_text = " ".join(message_texts(answer))
            kind = answer_kind(question_text, answer_text)
            if kind in MAIN_SCORES and len(pairs_by_kind[kind]) < MOST_CONSTANTS:
                pairs_by_kind[kind].append((question_text, answer_text))
    return pairs_by_kind


def candidates_of(kind: str, answers: Sequence[str]) -> list[str]:
    """Return the answers that may be the best constant: of maps, also each of their words in all cells."""
    distinct_answers = list(dict.fromkeys(answers))
    if kind == "grounding":
        return [answer for answer in distinct_answers if read_boxes(answer)[0]]
    if kind not in ("map", "fine_map"):
        return distinct_answers
    words = set()
    most_cells = 0
    for answer in answers:
        cells = answer.split()
        words.update(cells)
        most_cells = max(most_cells, len(cells))
    uniform_maps = [" ".join([word] * most_cells) for word in sorted(words)]
    return distinct_answers + uniform_maps


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
    longest_answer = 0
    for question, _ in pairs:
        tokens = tokenizer(question.references[0])["input_ids"]
        longest_answer = max(longest_answer, len(tokens))
    # An answer ends with one more token, the end of the turn.
    options: dict[str, Any] = {"max_new_tokens": min(longest_answer + 1, MOST_NEW_TOKENS)}
    samples = SAMPLES.get(kind, 1)
    batch_size = BATCH_SIZE
    if samples > 1:
        options.update(samples=samples, do_sample=True, top_k=0)
        first_question, _ = pairs[0]
        prompt = collator([rows[first_question.row]])
        prompt_length = prompt["input_ids"].shape[1]
        most_cached = CACHED_TOKENS // (samples * prompt_length)
        batch_size = max(min(BATCH_SIZE, most_cached), 1)
    answers = []
    for start in tqdm(range(0, len(pairs), batch_size), desc=f"{kind}, {description}"):
        conversations = []
        for question, partner in pairs[start : start + batch_size]:
            conversations.append(conversation_of(collator, rows, question, partner))
        sampled_answers = generate_answers(model, collator.processor, conversations, **options)
        for first in range(0, len(sampled_answers), samples):
            answers.append(middle_answer(kind, sampled_answers[first : first + samples]))
    return answers


def middle_answer(kind: str, answers: Sequence[str]) -> str:
    """Return the answer with the median number, or the map whose largest area overlaps most with those of the others.

    Without a number or an area in any answer, the first one is returned.
    """
    if kind == "count":
        numbered_answers = [answer for answer in answers if read_number(answer) is not None]
        if numbered_answers:
            numbered_answers.sort(key=read_number)
            return numbered_answers[(len(numbered_answers) - 1) // 2]
    if kind == "fine_map":
        boxes = {}
        for answer in answers:
            box = largest_area(answer)
            if box is not None:
                boxes[answer] = box
        if boxes:
            return max(boxes, key=lambda answer: sum(iou(boxes[answer], box) for box in boxes.values()))
    return answers[0]


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
    images = [" ".join(question.images) for question in questions]
    own_scores = score_answers(kind, texts, own, references)
    other_scores = score_answers(kind, texts, other, references)
    constant_scores = score_answers(kind, texts, constant, references)
    comparisons = {}
    for score_name in own_scores:
        own_mean = float(np.mean(own_scores[score_name]))
        control_means = {
            "other_images": float(np.mean(other_scores[score_name])),
            "constant": float(np.mean(constant_scores[score_name])),
        }
        comparison: dict[str, Any] = {"own": own_mean, **control_means}
        is_error = score_name in LOWER_IS_BETTER
        gains = []
        for control_mean in control_means.values():
            gain = own_mean - control_mean
            gains.append(-gain if is_error else gain)
        comparison["least_gain"] = min(gains)
        if is_error:
            for control, control_mean in control_means.items():
                if control_mean > 0:
                    comparison[f"ratio_to_{control}"] = own_mean / control_mean
        differences = own_scores[score_name] - other_scores[score_name]
        resampled_means = resample_mean(differences, images, seed)
        comparison["difference"] = np.percentile(resampled_means, [2.5, 97.5]).tolist()
        comparison["questions"] = len(questions)
        comparisons[score_name] = comparison
    return comparisons


def answers_table(scores: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a Markdown table with a row for each score."""
    columns = ["answers", "questions", "with own images", "with other images", "best constant"]
    lines = []
    for kind, comparisons in scores.items():
        for score_name, comparison in comparisons.items():
            line = [
                f"{kind}: {score_name.replace('_', ' ')}",
                comparison["questions"],
                f"{comparison['own']:.3f}",
                f"{comparison['other_images']:.3f}",
                f"{comparison['constant']:.3f}",
            ]
            lines.append(line)
    return table(columns, lines)
