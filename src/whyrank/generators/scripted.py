"""A generator that says what it was told to say: for tests, documentation and demonstrations without a model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from whyrank.errors import GenerationError, InputError
from whyrank.generators import ApproximateTokens, Completion, Request, TextTokens
from whyrank.generators.labels import find_label
from whyrank.store import read_numbered_jsonl

__all__ = ["Scripted", "ScriptedAnswer", "approximate_counts", "text_before_stop"]

TOKENS = ApproximateTokens()


@dataclass(frozen=True, slots=True)
class ScriptedAnswer:
    """What to answer for one pair: exactly one of `probs`, `label` and `answer` is given.

    `query` and `document` are the full texts. `probs` are the unrestricted probabilities of the labels in the
    scale's order, each in [0, 1], together at most 1. `label` stands for probability 1 on it. `answer` is the
    whole text of a backend that cannot append a label prompt; the template parses it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    query: str
    document: str
    explanation: str = ""
    probs: tuple[float, ...] | None = None
    label: str | None = None
    answer: str | None = None


class Scripted:
    """Answers from a script; a pair without one fails with a `GenerationError`, and never gets a made-up label.

    A pair is looked up by the texts that the request shows. Texts may have been cut to a limit, so a script also
    matches if its document begins with the shown document and its query with the shown query; if different
    answers match, none is chosen and the pair fails.

    Args:
        answers: the script. The same answer twice is one answer.
        name: identifies the script in judgments and their keys.

    Raises:
        InputError: an answer is not well formed, or a pair has two different answers.
    """

    def __init__(self, answers: Iterable[ScriptedAnswer], name: str = "scripted") -> None:
        self._name = name
        self._by_pair: dict[tuple[str, str], ScriptedAnswer] = {}
        for number, answer in enumerate(answers, start=1):
            self._add(answer, f"answer {number}")
        self._sort()

    @classmethod
    def from_file(cls, path: Path | str, name: str = "scripted") -> Scripted:
        """Read the script from JSON lines of `ScriptedAnswer`.

        Raises:
            InputError: as above, naming file and line.
        """
        scripted = cls((), name=name)
        for number, answer in read_numbered_jsonl(path, ScriptedAnswer):
            scripted._add(answer, f"{path}:{number}")
        scripted._sort()
        return scripted

    def _add(self, answer: ScriptedAnswer, where: str) -> None:
        given = [key for key in ("probs", "label", "answer") if getattr(answer, key) is not None]
        if len(given) != 1:
            raise InputError(f"{where}: expected one of probs, label and answer, found {' and '.join(given) or 'none'}")
        if answer.answer is not None and answer.explanation:
            raise InputError(f"{where}: a whole answer holds its own explanation; leave explanation out")
        probs = answer.probs
        if probs is not None and not (all(0 <= p <= 1 for p in probs) and sum(probs) <= 1 + 1e-6):
            raise InputError(f"{where}: expected probabilities that sum to at most 1, found {probs}")
        if self._by_pair.setdefault((answer.query, answer.document), answer) != answer:
            raise InputError(f"{where}: a different answer for the same query and document came before; keep one")

    def _sort(self) -> None:
        self._sorted = sorted(self._by_pair.values(), key=lambda answer: answer.document)
        self._documents = [answer.document for answer in self._sorted]

    @property
    def name(self) -> str:
        """The name given."""
        return self._name

    @property
    def tokens(self) -> TextTokens:
        """Four characters per token."""
        return TOKENS

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """Answer one request after the other, reading none ahead."""
        for index, request in enumerate(requests):
            try:
                completion = self._complete(request)
            except GenerationError as error:
                completion = Completion.failed(error)
            yield index, completion

    def _find(self, query: str, document: str) -> ScriptedAnswer:
        exact = self._by_pair.get((query, document))
        if exact is not None:
            return exact
        found = []
        if query and document:  # an empty text is not the beginning of another one
            for position in range(bisect_left(self._documents, document), len(self._sorted)):
                answer = self._sorted[position]
                if not answer.document.startswith(document):
                    break
                if answer.query.startswith(query):
                    found.append(answer)
        if len(found) != 1:
            what = f"{len(found)} answers match" if found else "no answer"
            raise GenerationError(f"{self.name}: {what} for the query {query[:80]!r}, document {document[:80]!r}")
        return found[0]

    def _complete(self, request: Request) -> Completion:
        scripted = self._find(request.text_of("query"), request.text_of("document"))
        if scripted.answer is not None:
            num_prompt, num_completion = approximate_counts(request, scripted.answer)
            return Completion(
                scripted.answer, "stop", num_prompt_tokens=num_prompt, num_completion_tokens=num_completion
            )
        if not request.labels:
            raise GenerationError(f"{self.name}: expected an `answer` to a request without labels, found a label")
        text = "" if request.is_direct else text_before_stop(scripted.explanation, request.stops)
        spans = TOKENS.offsets(text)
        is_long = len(spans) > request.sampling.max_tokens
        if is_long:
            text = text[: spans[request.sampling.max_tokens][0]]
        num_prompt, num_completion = approximate_counts(request, text)
        return Completion(
            text,
            "length" if is_long else "stop",
            label_probs=self._label_probs(scripted, request.labels),
            num_prompt_tokens=num_prompt,
            num_completion_tokens=num_completion,
        )

    def _label_probs(self, scripted: ScriptedAnswer, labels: tuple[str, ...]) -> tuple[float, ...]:
        if scripted.probs is not None:
            if len(scripted.probs) != len(labels):
                raise GenerationError(
                    f"{self.name}: expected {len(labels)} probabilities, one for each of {labels}, "
                    f"found {len(scripted.probs)}"
                )
            return scripted.probs
        position = find_label(scripted.label or "", labels)
        if position is None:
            raise GenerationError(f"{self.name}: expected one of the labels {labels}, found {scripted.label!r}")
        return tuple(float(position == other) for other in range(len(labels)))


def text_before_stop(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first stop; a stop's leading newline also matches the beginning of the text."""
    padded = f"\n{text}"
    end = min((found for found in map(padded.find, stops) if found >= 0), default=len(padded))
    return padded[1:end]


def approximate_counts(request: Request, text: str) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, estimated."""
    return sum(len(TOKENS.offsets(segment.text)) for segment in request.segments), len(TOKENS.offsets(text))
