"""Keep benchmark queries out of what is mined."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["Excluded"]

WORD = re.compile(r"\w+")
NGRAM = 13
"""Length in words of a shared passage that counts as the same text (the length used for GPT-3: Brown et al. 2020,
arXiv 2005.14165, appendix C)."""


class Excluded:
    """Texts that must not be mined, compared without regard to case, punctuation and white space."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._wholes: set[tuple[str, ...]] = set()
        self._ngrams: set[tuple[str, ...]] = set()
        for text in texts:
            words = _words(text)
            if words:
                self._wholes.add(words)
                self._ngrams.update(_ngrams(words))

    def matches(self, *texts: str) -> bool:
        """Whether one of the texts equals an excluded one or shares 13 words in a row with it."""
        if not self._wholes:
            return False
        split = [_words(text) for text in texts]
        return any(words in self._wholes or not self._ngrams.isdisjoint(_ngrams(words)) for words in split)


def _words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.casefold()))


def _ngrams(words: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    return (words[start : start + NGRAM] for start in range(len(words) - NGRAM + 1))
