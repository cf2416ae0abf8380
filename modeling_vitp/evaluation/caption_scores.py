"""BLEU, ROUGE-L and CIDEr of captions, by pycocoevalcap."""

import re
from collections.abc import Sequence

import numpy as np

# Numbers with their separators, words with their hyphens, and what follows an apostrophe.
TOKEN = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:-\w+)*|'\w+")


def score_captions(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray | float]:
    """`bleu_1` to `bleu_4` of all captions together; `rouge_l` and `cider` of each.

    Words are told as COCO's evaluation tells them, in lower case and without punctuation, but not by its tokenizer,
    which is a Java program. CIDEr is CIDEr-D, as there: from 0 to 10, and 0 where all images have the same references,
    since no word then tells one image from another.

    Args:
        references: of each caption, one or several.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found = {place: [tokenize(answer)] for place, answer in enumerate(answers)}
    wanted = {place: [tokenize(reference) for reference in several] for place, several in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    scores = {f"bleu_{order}": float(value) for order, value in enumerate(bleu, 1)}
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        scores[name] = np.asarray(scorer.compute_score(wanted, found)[1], dtype=float)
    return scores


def tokenize(text: str) -> str:
    """The words of a text in lower case, with a space between them."""
    return " ".join(TOKEN.findall(text.lower()))
