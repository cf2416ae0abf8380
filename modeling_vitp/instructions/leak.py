"""How far answers can be guessed from their own beginning, without looking at an image.

Under teacher forcing a model sees the true beginning of an answer, and of the answers before it. What follows from that
is learned without looking: the loss falls, and the ViT learns nothing. A small language model without images is trained
on some conversations of a source and tested on others, with the answers visible, as in training, and with all answers
hidden, which leaves the questions and the place in the answer. What the first does better is guessed.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedTokenizerBase, Qwen2Config

from ..vrl import keyed_generator

PAD, HIDDEN, QUESTION, ANSWER = range(NUM_MARKS := 4)
VOCABULARY = 2000  # tokens of the BPE that is trained where no tokenizer is given
MAX_TOKENS = 256  # of a conversation; what comes later is not read
MAX_PLACES = 64  # in a message that are told apart
MAX_HELD_OUT, HELD_OUT = 256, 0.2  # rows, and share of the rows
STEPS, BATCH, EVALUATIONS = 200, 16, 4
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 3e-3, 0.1, 0.1
LITTLE = 0.1  # bits a token, with which an answer says next to nothing that its question does not

Text = tuple[bool, str]  # whether it is an answer, and what it says
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Leak:
    """What the answers of a source can be guessed from; bits are those of a token of held-out answers, on average.

    Args:
        rows, tokens: held-out rows, and the tokens of their answers.
        hidden_bits, visible_bits: cross-entropy, given the question, with all answers hidden and with them visible.
        hidden_accuracy, visible_accuracy: how often the likeliest token is the true one.
        error: standard error of `guessed_bits`, over the held-out rows.
        steps: of the training.
        in_time: whether the time was enough for all steps.
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

    def __str__(self) -> str:
        return (
            f"of the {self.hidden_bits:.2f} bits that a token of an answer has given its question, "
            f"{self.guessed_bits:.2f} ± {self.error:.2f} are guessed from the answer before it"
        )


@dataclass(frozen=True)
class Conversation:
    """Its token ids, whether an answer has them, and their places in their messages; all of shape (length,)."""

    tokens: torch.LongTensor
    answered: torch.BoolTensor
    places: torch.LongTensor


class Guesser(nn.Module):
    """A small causal language model that is told each token's place in its message."""

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
        self.places = nn.Embedding(MAX_PLACES, config.hidden_size)
        nn.init.normal_(self.places.weight, std=config.initializer_range)

    def forward(self, tokens: torch.Tensor, places: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(num_wanted, vocabulary)` where `wanted` is true; all three are of shape (batch, length)."""
        embeddings = self.lm.embed_tokens(tokens) + self.places(places)
        states = self.lm(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return states[wanted] @ self.lm.embed_tokens.weight.T

    def guess(self, batch: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bits of the answers' tokens, hidden and visible, and whether the likeliest is the true one, both of shape
        (2, num_tokens); and the conversation of each, of shape (num_tokens,)."""
        tokens, answered, places = (
            pad_sequence([getattr(one, name) for one in batch], batch_first=True)
            for name in ("tokens", "answered", "places")
        )
        inputs = torch.cat([tokens.masked_fill(answered, HIDDEN), tokens])[:, :-1]
        wanted, targets = answered[:, 1:], tokens[:, 1:][answered[:, 1:]].repeat(2)
        logits = self(inputs, places[:, :-1].repeat(2, 1), wanted.repeat(2, 1))
        bits = cross_entropy(logits, targets, reduction="none") / math.log(2)
        is_right = logits.argmax(dim=-1) == targets
        return bits.view(2, -1), is_right.view(2, -1), wanted.nonzero()[:, 0]


def measure_leak(
    conversations: Sequence[Conversation], seed: int = 0, steps: int = STEPS, seconds: float = math.inf, name: str = ""
) -> Leak:
    """Trains a small model on a part of the conversations and tests it on the others.

    Args:
        conversations: see [`encode`]; in the order of which a part is drawn by the seed.
        steps, seconds: the training ends with what comes first; its rate falls to 0 in that time. With all steps the
            result depends on the conversations and the seed alone.

    Returns:
        The best of a few tests on the way, of each kind.
    """
    generator = keyed_generator(seed, "leak")
    order = [conversations[place] for place in torch.randperm(len(conversations), generator=generator).tolist()]
    num_held_out = held_out(len(order))
    tested, trained = order[:num_held_out], order[num_held_out:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Guesser(1 + max(int(one.tokens.max()) for one in conversations))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    results, step, start = [], 0, time.monotonic()
    with tqdm(total=steps, desc=f"{name}: guessing", unit=" steps") as progress:
        while (done := max(step / steps, (time.monotonic() - start) / seconds)) < 1:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate_at(done)
            chosen = torch.randint(len(trained), (BATCH,), generator=generator).tolist()
            bits, _, _ = model.guess([trained[place] for place in chosen])
            optimizer.zero_grad()
            bits.mean().backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            progress.update()
            if done > (len(results) + 1) / EVALUATIONS:
                results.append(test(model, tested))
        results.append(test(model, tested))
    return best_of(results, len(tested), step, step == steps)


def held_out(num_rows: int) -> int:
    return min(MAX_HELD_OUT, math.ceil(HELD_OUT * num_rows))


def rate_at(done: float) -> float:
    """A short linear rise, and a cosine to 0."""
    return min(done / WARMUP, 1.0) * (1 + math.cos(math.pi * done)) / 2 + 1e-3


@torch.no_grad()
def test(model: Guesser, conversations: Sequence[Conversation]) -> torch.Tensor:
    """Sums for each conversation, hidden and visible: bits, right guesses, tokens; of shape (2, 3, number)."""
    sums = torch.zeros(2, 3, len(conversations), dtype=torch.float64)
    for start in range(0, len(conversations), BATCH):
        bits, is_right, owners = model.guess(conversations[start : start + BATCH])
        for place, values in enumerate((bits, is_right, torch.ones_like(bits))):
            sums[:, place].index_add_(1, start + owners, values.double())
    return sums


def best_of(results: Sequence[torch.Tensor], rows: int, steps: int, in_time: bool) -> Leak:
    """The best of several tests with the answers hidden, and of those with them visible."""
    hidden, visible = (min((result[kind] for result in results), key=lambda sums: sums[0].sum()) for kind in (0, 1))
    tokens = hidden[2].sum()
    differences = hidden[0] - visible[0]
    spread = differences - hidden[2] * differences.sum() / tokens
    figures = [(sums[place].sum() / tokens).item() for place in (0, 1) for sums in (hidden, visible)]
    return Leak(rows, int(tokens), *figures, (spread.square().sum().sqrt() / tokens).item(), steps, in_time)


def encode(texts: Iterable[Sequence[Text]], tokenize: Tokenize) -> list[Conversation]:
    """Texts as token ids, each message after a mark of its role; a conversation without an answer is left out."""
    encoded = []
    for conversation in texts:
        tokens, answered, places = [], [], []
        for is_answer, text in conversation:
            ids = tokenize(text)
            tokens += [ANSWER if is_answer else QUESTION, *ids]
            answered += [False, *[is_answer] * len(ids)]
            places += [min(place, MAX_PLACES - 1) for place in range(len(ids) + 1)]
        if any(answered[:MAX_TOKENS]):
            encoded.append(Conversation(*(torch.tensor(part[:MAX_TOKENS]) for part in (tokens, answered, places))))
    return encoded


def tokenizer_of(texts: Sequence[Sequence[Text]], tokenizer: PreTrainedTokenizerBase | None) -> Tokenize:
    """Ids from `NUM_MARKS` on: of a tokenizer's tokens those that the texts have, or of a BPE trained on the texts."""
    said = [text for conversation in texts for _, text in conversation]
    if tokenizer is None:
        own = Tokenizer(models.BPE())
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        own.train_from_iterator(said, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
        return lambda text: [NUM_MARKS + token for token in own.encode(text).ids]

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    known = sorted({token for text in said for token in ids_of(text)})
    numbers = {token: NUM_MARKS + place for place, token in enumerate(known)}
    return lambda text: [numbers[token] for token in ids_of(text)]
