"""Long documents as passages: windows of whole sentences, each within the template's cap of tokens.

A document over the cap is otherwise cut, and what stands behind the cut is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from whyrank.errors import InputError
from whyrank.generators import TextTokens
from whyrank.records import Document, Query
from whyrank.search import Bm25Index
from whyrank.sentences import sentences
from whyrank.template import CHARACTERS_PER_TOKEN_AT_MOST, cut_end

__all__ = ["LongDocuments", "PassageScore", "Passages", "Span", "choose", "passages_of", "windows"]

LongDocuments = Literal["cut", "passages"]
"""What becomes of a document over the template's cap: only its beginning is judged, or it is judged by passages."""

PassageScore = Literal["max", "mean-top-2"]
"""A document's score: that of its best passage, or the mean of its two best."""

Span = tuple[int, int]
MOST_REPEATED = 0.25  # share of a window's tokens that may repeat the one before


@dataclass(frozen=True, slots=True)
class Passages:
    """How long documents are judged by passages.

    Raises:
        InputError: a value is unknown or out of its range.
    """

    score: PassageScore = "max"
    """A long document's score: that of its best passage (max), or the mean of its two best (mean-top-2)."""

    max_passages: int = 8
    """Passages judged per document; of more, the first is kept, and those that BM25 ranks highest for the query."""

    num_overlap_sentences: int = 1
    """Sentences at the end of a passage that the next one repeats, as far as they take a quarter of it at most."""

    def __post_init__(self) -> None:
        if self.score not in get_args(PassageScore):
            raise InputError(
                f"expected a passage score among {', '.join(get_args(PassageScore))}, found {self.score!r}"
            )
        if self.max_passages < 1:
            raise InputError(f"expected max_passages of at least 1, found {self.max_passages}")
        if self.num_overlap_sentences < 0:
            raise InputError(f"expected num_overlap_sentences of at least 0, found {self.num_overlap_sentences}")

    @property
    def num_best(self) -> int:
        """How many of the best passages the score is the mean of."""
        return 1 if self.score == "max" else 2


def passages_of(long_documents: LongDocuments | Passages) -> Passages | None:
    """The settings that a choice stands for; `None` where long documents are cut.

    Raises:
        InputError: it is no such choice.
    """
    if isinstance(long_documents, Passages):
        return long_documents
    if long_documents not in get_args(LongDocuments):
        choices = ", ".join(get_args(LongDocuments))
        raise InputError(f"expected long_documents among {choices}, or a Passages, found {long_documents!r}")
    return Passages() if long_documents == "passages" else None


def windows(text: str, max_tokens: int, tokens: TextTokens, *, num_overlap_sentences: int = 1) -> list[Span]:
    """Character spans `[start, end)` of windows that together cover all of `text`, in order.

    Each holds as many whole sentences as fit into `max_tokens`, measured on the window itself by `tokens`, and begins
    with the last sentences of the one before (`Passages.num_overlap_sentences`). A sentence that does not fit is cut
    by tokens, behind white space where there is any in the second half. A text that fits is one window.

    Raises:
        InputError: `max_tokens` is not positive.
    """
    if max_tokens < 1:
        raise InputError(f"expected max_document_tokens of at least 1 to make passages of, found {max_tokens}")
    if cut_end(text, max_tokens, tokens) == len(text):
        return [(0, len(text))]
    packing = _Packing(text, max_tokens, tokens)
    found: list[Span] = []
    first, last = 0, packing.last_that_fits(0)
    while True:
        found.append((packing.pieces[first][0], packing.pieces[last][1]))
        if last == len(packing.pieces) - 1:
            return found
        first, last = packing.following(first, last, num_overlap_sentences)


class _Packing:
    """Sentences, or pieces of those that are too long, and what they weigh in tokens, each measured apart."""

    def __init__(self, text: str, max_tokens: int, tokens: TextTokens) -> None:
        self._text = text
        self._max_tokens = max_tokens
        self._tokens = tokens
        self.pieces = [piece for start, end in sentences(text) for piece in self._cut(start, end)]
        self._sizes = [self._size(start, end) for start, end in self.pieces]

    def last_that_fits(self, first: int) -> int:
        """The last piece of the window that begins with piece `first`; the first piece is always in."""
        last, size = first, self._sizes[first]
        while last + 1 < len(self.pieces) and size + self._sizes[last + 1] <= self._max_tokens:
            last += 1
            size += self._sizes[last]
        # Sentences that were measured apart may weigh more together.
        while last > first and self._size(self.pieces[first][0], self.pieces[last][1]) > self._max_tokens:
            last -= 1
        return last

    def following(self, first: int, last: int, num_repeated: int) -> tuple[int, int]:
        """The next window: with as much repeated as is allowed and leaves room for something new."""
        for start in range(max(first, last - num_repeated) + 1, last + 1):
            if sum(self._sizes[start : last + 1]) <= MOST_REPEATED * self._max_tokens:
                end = self.last_that_fits(start)
                if end > last:
                    return start, end
        return last + 1, self.last_that_fits(last + 1)

    def _size(self, start: int, end: int) -> int:
        return len(self._tokens.offsets(self._text[start:end]))

    def _cut(self, start: int, end: int) -> list[Span]:
        pieces: list[Span] = []
        while start < end:
            head = self._text[start : min(end, start + self._max_tokens * CHARACTERS_PER_TOKEN_AT_MOST)]
            stop = max(1, cut_end(head, self._max_tokens, self._tokens))
            if start + stop < end:
                stop = _behind_white_space(head, stop)
            while stop > 1 and self._size(start, start + stop) > self._max_tokens:
                stop -= 1  # a token that was cut off may be spelled in more
            pieces.append((start, start + stop))
            start += stop
        return pieces


def _behind_white_space(text: str, stop: int) -> int:
    """The place behind the last white space of `text[stop // 2:stop]`; `stop` if there is none."""
    return next((place for place in range(stop, stop // 2, -1) if text[place - 1].isspace()), stop)


def choose(query: str, text: str, spans: Sequence[Span], max_passages: int) -> list[Span]:
    """At most `max_passages` of the spans, in their order.

    The first is always kept: it holds the title and says what the document is about. Then come those that BM25 ranks
    highest for the query, the spans being its collection; where too few share a word with the query, the earliest.
    """
    if len(spans) <= max_passages:
        return list(spans)
    width = len(str(len(spans)))
    passages = [Document(f"{number:0{width}}", text[start:end]) for number, (start, end) in enumerate(spans)]
    try:
        (ranked,) = Bm25Index.build(passages).search([Query("query", query)], top_k=len(spans)).values()
    except InputError:  # not a word in all of them
        ranked = []
    wanted = dict.fromkeys([0, *(int(line.doc_id) for line in ranked), *range(len(spans))])
    return [spans[number] for number in sorted(list(wanted)[:max_passages])]
