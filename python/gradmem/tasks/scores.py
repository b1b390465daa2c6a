"""Answers as text: exact match, and SQuAD's own exact match and F1 (Rajpurkar et al., arXiv 1606.05250, 1806.03822)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["normalised", "squad_exact_match", "squad_f1", "text_exact_match"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """``text`` as SQuAD compares it: lower case, without ASCII punctuation, the articles a, an and the, and white space
    beyond one space between words; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def text_exact_match(answer: str, gold: Sequence[str]) -> float:
    """1.0 where ``answer`` is one of the ``gold`` answers, white space at the ends aside, else 0.0."""
    return float(answer.strip() in {text.strip() for text in gold})


def squad_exact_match(answer: str, gold: Sequence[str]) -> float:
    """1.0 where ``answer``, normalised, equals one of the ``gold`` answers, else 0.0.

    Args:
        answer: what was generated.
        gold: the right answers; none, or none with a word left, is a question without an answer.
    """
    return float(normalised(answer) in {normalised(text) for text in _with_words(gold)})


def squad_f1(answer: str, gold: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the normalised words, the best over the ``gold`` answers.

    Words count as often as they occur. Where either side has no word, 1.0 if neither has, else 0.0.

    Args:
        answer: what was generated.
        gold: as in :func:`squad_exact_match`.
    """
    words = normalised(answer).split()
    return max(_f1(words, normalised(text).split()) for text in _with_words(gold))


def _with_words(gold: Sequence[str]) -> Sequence[str]:
    return [text for text in gold if normalised(text)] or [""]


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = (Counter(words) & Counter(gold)).total()
    return 2 * common / (len(words) + len(gold))  # 2 p r / (p + r) with p = common / words, r = common / gold
