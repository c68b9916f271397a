"""From judgments to token ids with a loss mask, exactly as they will be asked at ranking time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from whyrank.errors import InputError
from whyrank.generators.hf.chat import ChatTokens
from whyrank.records import Document, Judgment, Mode, Query
from whyrank.template import Template

__all__ = ["IGNORED", "Example", "collate", "examples_of", "is_teachable"]

IGNORED = -100  # target id that torch's cross-entropy passes over


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of prompt and answer; the loss is on everything from `num_prompt` on."""

    ids: tuple[int, ...]
    num_prompt: int


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
            prompt = tokens.prompt_ids(template.render(asked, read, tokens, mode=mode).request)
            written = _written(template, judgment.label, judgment.explanation, mode, is_label_first)
            answer = [*_ids(written, tokens), *sorted(tokens.eos_ids)[:1]]
            yield Example((*prompt, *answer), len(prompt))


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


def collate(examples: Sequence[Example], pad_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and targets, each `(examples, longest)`, padded on the left.

    Padding on the left lines the answers up at the end, so that only the last positions need logits. Targets are
    the ids themselves where there is a loss and `IGNORED` elsewhere; the caller shifts them.
    """
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(examples), longest), dtype=torch.long)
    targets = torch.full((len(examples), longest), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, longest - length :] = torch.tensor(example.ids)
        mask[row, longest - length :] = 1
        num_answer = length - example.num_prompt
        targets[row, longest - num_answer :] = ids[row, longest - num_answer :]
    return ids, mask, targets
