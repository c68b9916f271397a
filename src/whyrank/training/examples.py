"""From judgments to token ids with a loss mask, exactly as they will be asked at ranking time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from whyrank.errors import InputError
from whyrank.generators.hf.chat import ChatTokens
from whyrank.records import Document, Judgment, Mode, Query, SearchQueries
from whyrank.search_queries import answer, render
from whyrank.template import Template
from whyrank.training.packing import Strand

__all__ = ["Example", "examples_of", "is_teachable", "search_query_examples", "to_strand"]


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of prompt and answer; the loss is on everything from `num_prompt` on.

    All documents of the query share the first `num_shared` tokens. The label, terminator included, is written by the
    tokens `[start, end)` of `label_place`; `label` is what it says.
    """

    ids: tuple[int, ...]
    num_prompt: int
    num_shared: int = 0
    label_place: tuple[int, int] = (0, 0)
    label: str = ""


def examples_of(
    judgments: Iterable[Judgment],
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    template: Template,
    tokens: ChatTokens,
    modes: Sequence[Mode] = ("explain",),
    *,
    is_label_first: bool = False,
    word_dropout: float = 0.0,
    seed: int = 0,
) -> Iterator[Example]:
    """One example per teachable judgment and mode; the others are left out.

    The document is cut as it was for the teacher by the template's own limit, so that training and ranking see
    the same text; of one that was judged by passages, the student reads the winning one. With `is_label_first` a direct
    example ends in its judgment's explanation. With `word_dropout` each example leaves out that share of its words,
    drawn by `seed` and its place.

    Raises:
        InputError: a judgment's query or document is not given, it was made on another scale, or it has no
            explanation to learn from because it was made in direct mode.
    """
    for number, judgment in enumerate(judgments):
        if judgment.label is None or not is_teachable(judgment):
            continue
        query, document = queries.get(judgment.query_id), documents.get(judgment.doc_id)
        if query is None or document is None:
            missing = f"query {judgment.query_id!r}" if query is None else f"document {judgment.doc_id!r}"
            raise InputError(f"{_who(judgment)}: {missing} is not in the given files")
        _check(judgment, template, needs_why="explain" in modes or is_label_first)
        for mode in modes:
            rng = Random(f"{seed}/{number}/{mode}")
            asked = _with_dropout(query.text, word_dropout, rng)
            read = _with_dropout(_taught_text(judgment, document), word_dropout, rng)
            request = template.render(asked, read, tokens, mode=mode).request
            prompt, num_shared = tokens.prompt_parts(request)
            written = _written(template, judgment.label, judgment.explanation, mode, is_label_first)
            taught = [*_ids(written, tokens), *sorted(tokens.eos_ids)[:1]]
            num_label = len(tokens.endings(request).labels[template.scale.labels.index(judgment.label)])
            # The label ends the first piece of a direct answer, and the last one of an explained answer.
            end = len(prompt) + len(_ids(written[:1] if mode == "direct" else written, tokens))
            yield Example((*prompt, *taught), len(prompt), num_shared, (end - num_label, end), judgment.label)


def search_query_examples(
    written: Iterable[SearchQueries], queries: Mapping[str, Query], template: Template, tokens: ChatTokens
) -> Iterator[Example]:
    """One example per query with search queries that were read as intended; the others are left out.

    Raises:
        InputError: a query is not given.
    """
    for item in written:
        if item.status != "ok":
            continue
        if item.query_id not in queries:
            raise InputError(f"search queries for {item.query_id!r}: this query is not in the given files")
        request, _ = render(queries[item.query_id].text, tokens, template.chat_options)
        prompt = tokens.prompt_ids(request)
        ids = [*tokens.encode_text(answer(item.queries)), *sorted(tokens.eos_ids)[:1]]
        yield Example((*prompt, *ids), len(prompt))


def to_strand(example: Example, label_weight: float = 1.0) -> Strand:
    """What the loss is on: 1 for every token of the answer, `label_weight` for those of the label."""
    start, end = example.label_place
    weights = [0.0] * example.num_prompt + [1.0] * (len(example.ids) - example.num_prompt)
    weights[start:end] = [label_weight] * (end - start)
    return Strand(example.ids, tuple(weights), (example.num_shared,))


def is_teachable(judgment: Judgment) -> bool:
    """Whether a student should learn from it: it was read as intended.

    An explanation that hit its cap ends in the middle, and a teacher with little probability on the labels was not
    answering the question; neither is an example to follow.
    """
    return judgment.status == "ok"


def _check(judgment: Judgment, template: Template, needs_why: bool) -> None:
    labels = template.scale.labels
    num_labels = len(labels) if judgment.probs is None else len(judgment.probs)
    if judgment.label not in labels or num_labels != len(labels):
        raise InputError(
            f"{_who(judgment)} has label {judgment.label!r} of a scale with {num_labels} labels, template "
            f"{template.version} has {', '.join(labels)}; label with the template that is to be taught"
        )
    if judgment.mode == "direct" and needs_why:
        raise InputError(f"{_who(judgment)} was made in direct mode and has no explanation; teach --modes direct")


def _taught_text(judgment: Judgment, document: Document) -> str:
    start, end = judgment.passage
    return document.full_text[start:end] if judgment.num_passages > 1 else document.full_text


def _with_dropout(text: str, share: float, rng: Random) -> str:
    """The text without some of its words, at least one of which stays; white space is kept only where it is plain."""
    if not share:
        return text
    words = text.split()
    kept = [word for word in words if rng.random() >= share]
    return " ".join(kept or words[:1])


def _who(judgment: Judgment) -> str:
    return f"the judgment of ({judgment.query_id}, {judgment.doc_id})"


def _written(
    template: Template, label: str, why: str, mode: Mode, is_label_first: bool
) -> tuple[tuple[bool, str], ...]:
    """What the model is to write, as `(is structure, text)`; the explanation prompt already ends the prompt."""
    parts = template.answer_parts(label, why, mode)
    if mode == "explain":
        return parts[1:]
    if not is_label_first:
        return parts
    return (*parts, (True, template.answer_words.separator), *template.answer_parts(label, why, "explain")[:2])


def _ids(parts: Sequence[tuple[bool, str]], tokens: ChatTokens) -> list[int]:
    encoded = (
        tokens.encode_structure(text) if is_structure else tokens.encode_text(text) for is_structure, text in parts
    )
    return [token for ids in encoded for token in ids]
