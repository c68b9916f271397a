"""A stand-in teacher that compares words and knows nothing: for trying out a pipeline before a model is at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from whyrank.errors import GenerationError
from whyrank.generators import ApproximateTokens, Completion, Request, TextTokens
from whyrank.generators.scripted import approximate_counts

__all__ = ["Overlap"]

MAX_NAMED_WORDS = 5
ENOUGH_WORDS = 8  # a question of a hundred words shares few of them even with the page that answers it
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a about an and are as at be but by can do does for from had has have how i if in is it its my not of on or "
        "so than that the their them then there these they this to was we were what when where which who why will "
        "with you your",
    )
)


class Overlap:
    """Labels a pair by how many of the query's words the document holds, and says so in every explanation.

    All of the query's words, or eight of a longer query, are a share of 1. The share, in [0, 1], is divided into as
    many equal bands as there are labels; the label of its band gets probability 1. A query without words gets the
    lowest label.
    """

    @property
    def name(self) -> str:
        """Always `overlap`."""
        return "overlap"

    @property
    def tokens(self) -> TextTokens:
        """Four characters per token."""
        return ApproximateTokens()

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Answer one request after the other, reading none ahead."""
        for index, request in enumerate(requests):
            yield index, self._complete(request)

    def _complete(self, request: Request) -> Completion:
        if not request.labels:
            return Completion.failed(GenerationError("overlap compares words to choose a label; it writes nothing"))
        asked = content_words(request.text_of("query"))
        offered = frozenset(content_words(request.text_of("document")))
        shared = [word for word in asked if word in offered]
        num_labels = len(request.labels)
        num_enough = min(len(asked), ENOUGH_WORDS)
        band = min(len(shared) * num_labels // num_enough, num_labels - 1) if asked else 0
        text = "" if request.is_direct else _explain(shared, len(asked))
        num_prompt, num_completion = approximate_counts(request, text)
        return Completion(
            text,
            "stop",
            label_probs=tuple(float(position == band) for position in range(num_labels)),
            num_prompt_tokens=num_prompt,
            num_completion_tokens=num_completion,
        )


def content_words(text: str) -> list[str]:
    """The different words of `text`, case folded, without stop words, in order of appearance."""
    words = (word.casefold() for word in re.findall(r"\w+", text))
    return list(dict.fromkeys(word for word in words if word not in STOP_WORDS))


def _explain(shared: list[str], num_asked: int) -> str:
    rule = f", where {ENOUGH_WORDS} count as all" if num_asked > ENOUGH_WORDS else ""
    compared = "This is a comparison of words only, not of meaning"
    if not shared:
        return f"{compared}: the document shares none of the query's {num_asked} words."
    named = ", ".join(shared[:MAX_NAMED_WORDS])
    more = " and others" if len(shared) > MAX_NAMED_WORDS else ""
    return f"{compared}: the document shares {len(shared)} of the query's {num_asked} words{rule} ({named}{more})."
