"""Measurement of how well the answers of a source can be predicted from their own beginning, without an image.

Under teacher forcing, a model sees the true beginning of an answer and all earlier answers. Tokens that follow from
this text are learned without the image: the loss falls, but the ViT learns nothing. To measure this, a small language
model without images is trained on some conversations of a source and tested on others. It is tested twice: with visible
answers, as in training, and with hidden answers, so that only the questions and the position in the answer are known.
The difference of the two losses is the guessed part.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedTokenizerBase, Qwen2Config

from ..cards.sections import table
from ..conversations import message_texts
from ..vrl import keyed_generator
from .sources import Source, all_rows, read_source

if TYPE_CHECKING:
    from .validation import SourceReport

MAX_ROWS, MIN_ROWS = 2000, 50  # Limits of the number of rows of a source.
NUM_MARKS = 4
PAD, HIDDEN, QUESTION, ANSWER = range(NUM_MARKS)
VOCABULARY = 2000  # Size of the BPE vocabulary that is trained if no tokenizer is passed.
MAX_TOKENS = 256  # Maximum length of a conversation in tokens; the rest is ignored.
MAX_POSITIONS = 64  # Number of position embeddings within a message.
MAX_HELD_OUT, HELD_OUT = 256, 0.2  # Maximum number and fraction of held-out rows.
STEPS, BATCH, EVALUATIONS = 200, 16, 4
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 3e-3, 0.1, 0.1
LITTLE = 0.1  # Bits per token below which answers follow from their questions.
MUCH = 0.1  # Guessed share of the bits from which the report warns.

Text = tuple[bool, str]  # Whether the text is an answer, and the text.
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class AnswerPrior:
    """Predictability of the answers of a source; bits are means over the tokens of held-out answers.

    Args:
        rows, tokens: number of held-out rows and of the tokens in their answers.
        hidden_bits, visible_bits: cross-entropy given the question, with hidden and with visible answers.
        hidden_accuracy, visible_accuracy: top-1 accuracy of the tokens, with hidden and with visible answers.
        error: standard error of `guessed_bits` over the held-out rows.
        steps: number of training steps.
        in_time: whether all steps were finished within the time limit.
    """

    rows: int
    tokens: int
    hidden_bits: float
    visible_bits: float
    hidden_accuracy: float
    visible_accuracy: float
    error: float
    steps: int
    in_time: bool

    @property
    def guessed_bits(self) -> float:
        return self.hidden_bits - self.visible_bits

    @property
    def guessed_share(self) -> float:
        return self.guessed_bits / self.hidden_bits if self.hidden_bits > LITTLE else 0.0

    def to_dict(self) -> dict:
        return {**asdict(self), "guessed_bits": self.guessed_bits, "guessed_share": self.guessed_share}


def check_answer_priors(
    sources: Iterable[Source],
    reports: Sequence["SourceReport"],
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    seconds: float,
) -> str:
    """Measure the answer prior of each readable source, add it to its report, and return a summary of all sources."""
    priors = {}
    for source, report in zip(sources, reports):
        if report.error is None:
            report.answer_prior = priors[source.name] = source_answer_prior(source, tokenizer, seed, seconds)
    return describe_priors(priors)


def source_answer_prior(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    seconds: float = math.inf,
) -> AnswerPrior | None:
    """Return the answer prior of a source, or `None` if it has fewer than `MIN_ROWS` rows with answers."""
    texts = list(read_texts(source, seed))
    conversations = encode_texts(texts, make_tokenize(texts, tokenizer))
    if len(conversations) < MIN_ROWS:
        return None
    return measure_answer_prior(
        conversations,
        seed,
        STEPS,
        seconds,
        source.name,
    )


def read_texts(source: Source, seed: int) -> Iterator[list[Text]]:
    """Yield the texts of valid rows, out of `MAX_ROWS` random rows or the first `MAX_ROWS` rows of a stream."""
    rows = read_source(source)
    if isinstance(rows, Dataset):
        generator = keyed_generator(seed, source.name, "leak")
        indices = torch.randperm(len(rows), generator=generator)[:MAX_ROWS]
        rows = rows.select(indices.tolist())
    else:
        rows = itertools.islice(all_rows(rows), MAX_ROWS)
    for row in rows:
        if row["error"] is not None:
            continue
        texts = []
        for message in row["messages"]:
            is_answer = message["role"] == "assistant"
            texts.append((is_answer, "".join(message_texts(message))))
        yield texts


class Conversation(NamedTuple):
    """Token ids, whether each belongs to an answer, and the positions in the messages; all of shape (length,)."""

    tokens: torch.LongTensor
    answered: torch.BoolTensor
    positions: torch.LongTensor


def encode_texts(texts: Iterable[Sequence[Text]], tokenize: Tokenize) -> list[Conversation]:
    """Encode conversations; a role token precedes each message. Conversations without an answer are omitted."""
    encoded = []
    for conversation in texts:
        tokens = []
        answered = []
        positions = []
        for is_answer, text in conversation:
            ids = tokenize(text)
            tokens.append(ANSWER if is_answer else QUESTION)
            tokens += ids
            answered.append(False)
            answered += [is_answer] * len(ids)
            positions += [min(position, MAX_POSITIONS - 1) for position in range(len(ids) + 1)]
        if any(answered[:MAX_TOKENS]):
            encoded.append(
                Conversation(
                    torch.tensor(tokens[:MAX_TOKENS]),
                    torch.tensor(answered[:MAX_TOKENS]),
                    torch.tensor(positions[:MAX_TOKENS]),
                )
            )
    return encoded


def make_tokenize(texts: Sequence[Sequence[Text]], tokenizer: PreTrainedTokenizerBase | None) -> Tokenize:
    """Return a function from a text to token ids, which start at `NUM_MARKS`.

    The vocabulary contains the tokens of the tokenizer that occur in the texts. Without a tokenizer, a BPE is trained
    on the texts.
    """
    contents = []
    for conversation in texts:
        contents += [text for _, text in conversation]
    if tokenizer is None:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.train_from_iterator(contents, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
        return lambda text: [NUM_MARKS + token for token in bpe.encode(text).ids]

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    vocabulary = set()
    for text in contents:
        vocabulary.update(ids_of(text))
    numbers = {token: NUM_MARKS + index for index, token in enumerate(sorted(vocabulary))}
    return lambda text: [numbers[token] for token in ids_of(text)]


class GuessingModel(nn.Module):
    """Small causal language model with embeddings of each token's position in its message."""

    def __init__(self, vocabulary_size: int):
        super().__init__()
        config = Qwen2Config(
            vocab_size=vocabulary_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=MAX_TOKENS,
        )
        self.lm = AutoModel.from_config(config)
        self.positions = nn.Embedding(MAX_POSITIONS, config.hidden_size)
        nn.init.normal_(self.positions.weight, std=config.initializer_range)

    def forward(self, batch: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the losses of the answer tokens, with hidden and with visible answers.

        Returns:
            Bits and whether the top-1 token is correct, both `(2, num_tokens)`, and the index of each token's
            conversation in the batch, `(num_tokens,)`.
        """
        tokens = pad_sequence([conversation.tokens for conversation in batch], batch_first=True)
        answered = pad_sequence([conversation.answered for conversation in batch], batch_first=True)
        positions = pad_sequence([conversation.positions for conversation in batch], batch_first=True)
        hidden_tokens = tokens.masked_fill(answered, HIDDEN)
        inputs = torch.cat([hidden_tokens, tokens])[:, :-1]
        is_target = answered[:, 1:]
        targets = tokens[:, 1:][is_target].repeat(2)
        position_embeddings = self.positions(positions[:, :-1].repeat(2, 1))
        embeddings = self.lm.embed_tokens(inputs) + position_embeddings
        states = self.lm(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        target_states = states[is_target.repeat(2, 1)]
        logits = target_states @ self.lm.embed_tokens.weight.T
        bits = cross_entropy(logits, targets, reduction="none") / math.log(2)
        is_right = logits.argmax(dim=-1) == targets
        owners = is_target.nonzero()[:, 0]
        return bits.view(2, -1), is_right.view(2, -1), owners

    @torch.no_grad()
    def evaluate(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return the sums of bits, correct tokens and tokens of each conversation, of shape `(2, 3, num)`."""
        sums = torch.zeros(2, 3, len(conversations), dtype=torch.float64)
        for start in range(0, len(conversations), BATCH):
            bits, is_right, owners = self(conversations[start : start + BATCH])
            owners = start + owners
            sums[:, 0].index_add_(1, owners, bits.double())
            sums[:, 1].index_add_(1, owners, is_right.double())
            sums[:, 2].index_add_(1, owners, torch.ones_like(bits).double())
        return sums


def measure_answer_prior(
    conversations: Sequence[Conversation],
    seed: int = 0,
    steps: int = STEPS,
    seconds: float = math.inf,
    name: str = "",
) -> AnswerPrior:
    """Train a small model on a random part of the conversations and test it on the others.

    Args:
        steps, seconds: limits of the training, at the first of which it ends; the learning rate decays to 0. If all
            steps are finished, the result depends on the conversations and the seed alone.

    Returns:
        The best of several evaluations during training, for hidden and for visible answers.
    """
    generator = keyed_generator(seed, "leak")
    order = torch.randperm(len(conversations), generator=generator)
    shuffled = [conversations[index] for index in order.tolist()]
    num_held_out = min(MAX_HELD_OUT, math.ceil(HELD_OUT * len(shuffled)))
    held_out = shuffled[:num_held_out]
    training = shuffled[num_held_out:]
    largest_token = max(int(conversation.tokens.max()) for conversation in conversations)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GuessingModel(vocabulary_size=largest_token + 1)
    evaluations, num_steps = train_and_evaluate(
        model,
        training,
        held_out,
        generator,
        steps,
        seconds,
        name,
    )
    hidden = lowest_bits([sums[0] for sums in evaluations])
    visible = lowest_bits([sums[1] for sums in evaluations])
    hidden_bits, hidden_correct, num_tokens = hidden
    visible_bits, visible_correct, _ = visible
    total_tokens = num_tokens.sum()
    differences = hidden_bits - visible_bits
    deviations = differences - num_tokens * differences.sum() / total_tokens
    return AnswerPrior(
        rows=len(held_out),
        tokens=int(total_tokens),
        hidden_bits=(hidden_bits.sum() / total_tokens).item(),
        visible_bits=(visible_bits.sum() / total_tokens).item(),
        hidden_accuracy=(hidden_correct.sum() / total_tokens).item(),
        visible_accuracy=(visible_correct.sum() / total_tokens).item(),
        error=(deviations.square().sum().sqrt() / total_tokens).item(),
        steps=num_steps,
        in_time=num_steps == steps,
    )


def train_and_evaluate(
    model: GuessingModel,
    training: Sequence[Conversation],
    held_out: Sequence[Conversation],
    generator: torch.Generator,
    steps: int,
    seconds: float,
    name: str,
) -> tuple[list[torch.Tensor], int]:
    """Train a model up to the first of both limits, and return its evaluations and the number of its steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
    )
    evaluations = []
    step = 0
    start = time.monotonic()
    with tqdm(total=steps, desc=f"{name}: guessing", unit=" steps") as progress:
        while True:
            elapsed = time.monotonic() - start
            progress_share = step / steps
            # The clock counts only if it is ahead of the next step: otherwise, the result does not depend on it.
            if elapsed / seconds > (step + 1) / steps:
                progress_share = elapsed / seconds
            if progress_share >= 1:
                break
            optimizer.param_groups[0]["lr"] = learning_rate(progress_share)
            indices = torch.randint(len(training), (BATCH,), generator=generator).tolist()
            bits, _, _ = model([training[index] for index in indices])
            optimizer.zero_grad()
            bits.mean().backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            progress.update()
            if progress_share > (len(evaluations) + 1) / EVALUATIONS:
                evaluations.append(model.evaluate(held_out))
        evaluations.append(model.evaluate(held_out))
    return evaluations, step


def learning_rate(progress_share: float) -> float:
    """Return the learning rate after a share of the training: a linear warm-up with cosine decay."""
    warmup = min(progress_share / WARMUP, 1.0)
    decay = 1 + math.cos(math.pi * progress_share)
    return LEARNING_RATE * (warmup * decay / 2 + 1e-3)


def lowest_bits(evaluations: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the evaluation with the lowest sum of bits, out of those of [`GuessingModel.evaluate`] of one kind."""
    return min(evaluations, key=lambda sums: sums[0].sum())


def describe_priors(priors: Mapping[str, AnswerPrior | None]) -> str:
    """Return a table of the sources, in descending order of the guessed share, and advice."""
    measured = {}
    unmeasured_names = []
    for name, prior in priors.items():
        if prior is None:
            unmeasured_names.append(name)
        else:
            measured[name] = prior
    ranked_names = sorted(measured, key=lambda name: -measured[name].guessed_share)
    header = [
        "source",
        "held-out rows",
        "bits per token, given the question",
        "guessed from the answer before it",
        "",
        "accuracy without it",
        "accuracy with it",
    ]
    lines = [prior_cells(name, measured[name]) for name in ranked_names]
    for name in unmeasured_names:
        lines.append([name, f"fewer than {MIN_ROWS} rows in all", "", "", "", "", ""])
    paragraphs = [table(header, lines)]
    guessed_names = [name for name in ranked_names if measured[name].guessed_share >= MUCH]
    if guessed_names:
        most_guessed = measured[guessed_names[0]]
        paragraphs.append(
            f"In {guessed_names[0]}, an answer token has {most_guessed.hidden_bits:.2f} bits given its question, of "
            f"which {most_guessed.guessed_bits:.2f} ± {most_guessed.error:.2f} are guessed from the answer before it. "
            f"At least a tenth is guessed in {', '.join(guessed_names)}: there the loss falls without use of the "
            "images. The training setting `answer_mask_ratio` hides answer tokens in the input of the language model. "
            "Maps of collages (make_instructions) have answers that cannot be guessed from their beginning."
        )
    certain_names = [name for name in ranked_names if measured[name].hidden_bits < LITTLE]
    if certain_names:
        paragraphs.append(
            f"In {', '.join(certain_names)}, answers follow from their questions: they teach nothing about the images."
        )
    return "\n\n".join(paragraphs)


def prior_cells(name: str, prior: AnswerPrior) -> list[str]:
    """Return the cells of a source in the table of [`describe_priors`]."""
    rows = str(prior.rows)
    if not prior.in_time:
        rows += f", stopped at step {prior.steps} by the time limit"
    return [
        name,
        rows,
        f"{prior.hidden_bits:.2f}",
        f"{prior.guessed_bits:.2f} ± {prior.error:.2f}",
        f"{prior.guessed_share:.0%}",
        f"{prior.hidden_accuracy:.0%}",
        f"{prior.visible_accuracy:.0%}",
    ]
