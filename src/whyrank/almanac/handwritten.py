"""The split `test-handwritten`: texts that were written freely, not drawn, with the almanac's knowledge behind them.

One TOML file per domain. Every document of a domain is a candidate of every query of the domain; labels and gold
explanations follow from mechanism, setting and observations, as everywhere in the almanac. Nothing is copied from the
grammar, so that no student can have learnt these texts by heart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from random import Random

from pydantic.dataclasses import dataclass as validated

from whyrank.almanac.collection import Collection, document_of
from whyrank.almanac.grammar import DocumentFacts, QueryFacts, reason, shuffled
from whyrank.almanac.laws import refuse
from whyrank.almanac.loading import domain_names, load_knowledge, names_on, read_toml, shelf
from whyrank.almanac.schema import STRICT, Common, Domain, Knowledge
from whyrank.almanac.splits import HANDWRITTEN
from whyrank.errors import InputError
from whyrank.records import Query

__all__ = ["Handwritten", "WrittenDocument", "WrittenQuery", "handwritten_names", "load_handwritten"]

NUM_COPIED = 5  # so many words in a row are no accident
SENTENCE_END = re.compile(r"[.?!]+[\"')”’]*(?=\s|$)")


@validated(config=STRICT)
class WrittenQuery:
    """A post of 1 to 4 sentences that reports two observations of a mechanism, in their order, in a setting."""

    mechanism: str
    setting: str
    observations: tuple[str, str]
    text: str


@validated(config=STRICT)
class WrittenDocument:
    """An entry of 2 to 5 sentences that explains a mechanism for a setting."""

    mechanism: str
    setting: str
    text: str


@validated(config=STRICT)
class Handwritten:
    """The file of one domain: a query per mechanism, a document per mechanism and setting. Ids are those of the
    domain's knowledge."""

    queries: tuple[WrittenQuery, ...]
    documents: tuple[WrittenDocument, ...]


Entry = WrittenQuery | WrittenDocument


def handwritten_names(folder: Path | None = None) -> tuple[str, ...]:
    """The domains that have a handwritten test (by default: among the shipped ones), in alphabetical order.

    Raises:
        InputError: there is no such folder, or a file has the name of no domain.
    """
    found, known = names_on(shelf("handwritten", folder)), domain_names()
    for name in found:
        if name not in known:
            raise InputError(f"{name}.toml: expected the name of a domain, one of {', '.join(known)}")
    return found


def load_handwritten(
    domains: Sequence[str] | None = None, *, num_queries: int | None = None, folder: Path | None = None
) -> Collection:
    """Read and check the split `test-handwritten`.

    Queries go round the domains. Ids are `handwritten-<domain>-<number>`, counted from 01 in the order of the file.

    Args:
        domains: names of the domains to read (all that have such a file by default); their order does not matter.
        num_queries: only the first so many queries, and the documents of their domains; all by default.
        folder: where one TOML file per domain lies; the shipped ones by default.

    Raises:
        InputError: a domain has no such file, a file is not of this shape or breaks a law (see `_breaches`; the
            message names file and entry), or there are fewer queries than asked for.
    """
    available = handwritten_names(folder)
    chosen = available if domains is None else tuple(sorted(set(domains)))
    missing = [name for name in chosen if name not in available]
    if missing or not chosen:
        raise InputError(
            f"expected domains that have a handwritten test, among {', '.join(available) or 'none'}, "
            f"found {', '.join(missing) or 'none'}"
        )
    knowledge = load_knowledge(chosen)
    written = {name: read_toml(shelf("handwritten", folder), name, Handwritten) for name in chosen}
    refuse("the almanac's handwritten test breaks its laws", _breaches(written, knowledge))
    return _collection(written, knowledge, num_queries)


def _collection(written: Mapping[str, Handwritten], knowledge: Knowledge, num_queries: int | None) -> Collection:
    facts, texts = _query_facts(written)
    if num_queries is not None and not 1 <= num_queries <= len(facts):
        raise InputError(f"expected 1 to {len(facts)} queries, as many as are written, found {num_queries}")
    facts = dict(list(facts.items())[:num_queries])
    asked = {fact.domain for fact in facts.values()}
    documents, document_facts = [], {}
    doc_ids: dict[str, list[str]] = {name: [] for name in written if name in asked}
    for name in doc_ids:
        for entry in written[name].documents:
            documents.append(document_of(entry.text))
            doc_ids[name].append(documents[-1].doc_id)
            document_facts[documents[-1].doc_id] = DocumentFacts(name, entry.mechanism, entry.setting, "", "", None)
    candidates = {query_id: tuple(shuffled(Random(query_id), doc_ids[fact.domain])) for query_id, fact in facts.items()}
    return Collection(
        split=HANDWRITTEN,
        queries=tuple(Query(query_id, texts[query_id]) for query_id in facts),
        documents=tuple(documents),
        candidates=candidates,
        reasons={
            (query_id, doc_id): reason(facts[query_id], document_facts[doc_id], knowledge)
            for query_id, found in candidates.items()
            for doc_id in found
        },
        query_facts=facts,
        document_facts=document_facts,
        held_out=frozenset(facts),
    )


def _query_facts(written: Mapping[str, Handwritten]) -> tuple[dict[str, QueryFacts], dict[str, str]]:
    """What the queries say and their texts, by query id, going round the domains."""
    facts, texts = {}, {}
    for index, row in enumerate(zip_longest(*(file.queries for file in written.values())), start=1):
        for name, query in zip(written, row, strict=True):
            if query is not None:
                query_id = f"handwritten-{name}-{index:02d}"
                facts[query_id] = QueryFacts(name, query.mechanism, query.setting, query.observations, (), "", True)
                texts[query_id] = query.text
    return facts, texts


# ---- laws ----------------------------------------------------------------------------------------------------


def _breaches(written: Mapping[str, Handwritten], knowledge: Knowledge) -> Iterator[str]:
    """One line per broken law, `file: entry: what is wrong`."""
    for name, file in written.items():
        for line in _file_breaches(file, knowledge.domain(name), knowledge.common):
            yield f"{name}.toml: {line}"
    owners: dict[str, str] = {}
    for name, file in written.items():
        texts = [query.text for query in file.queries] + [document.text for document in file.documents]
        for sentence in (part for text in texts for part in re.split(r"(?<=[.?!]) ", text)):
            if sentence in owners:
                yield f"{name}.toml: expected each sentence once, found again, after {owners[sentence]}: {sentence!r}"
            owners[sentence] = f"{name}.toml"


def _file_breaches(file: Handwritten, domain: Domain, common: Common) -> Iterator[str]:
    mechanisms = [mechanism.id for mechanism in domain.mechanisms]
    settings = [setting.id for setting in domain.settings]
    yield from _not_once("query", mechanisms, [query.mechanism for query in file.queries])
    places = [f"{mechanism} in {setting}" for mechanism in mechanisms for setting in settings]
    yield from _not_once("document", places, [f"{entry.mechanism} in {entry.setting}" for entry in file.documents])
    copied = _copied_runs(domain, common)
    for query in file.queries:
        where = f"query for {query.mechanism!r}"
        if query.setting not in settings:
            yield f"{where}: no setting has the id {query.setting!r}"
        if query.mechanism in mechanisms:
            own = domain.mechanism(query.mechanism).observations
            if len(set(query.observations) & set(own)) != 2:
                yield f"{where}: expected two observations among {', '.join(own)}, found {list(query.observations)}"
        yield from _text_breaches(where, query, (1, 4), domain, copied)
    for entry in file.documents:
        where = f"document for {entry.mechanism!r} in {entry.setting!r}"
        yield from _text_breaches(where, entry, (2, 5), domain, copied)


def _not_once(kind: str, expected: Sequence[str], found: Sequence[str]) -> Iterator[str]:
    """Each expected thing once, and nothing else: ids that the knowledge does not have are found here, too."""
    counts = Counter(found)
    for name in expected:
        if counts[name] != 1:
            yield f"expected one {kind} for {name}, found {counts[name]}"
    for name in counts.keys() - set(expected):
        yield f"{kind} for {name}: the knowledge has no such entry"


def _text_breaches(
    where: str, entry: Entry, sizes: tuple[int, int], domain: Domain, copied: Mapping[str, str]
) -> Iterator[str]:
    text = entry.text
    if text != " ".join(text.split()):
        yield f"{where}: expected one line with single blanks, found {text!r}"
    num_sentences = len(SENTENCE_END.findall(text))
    if not sizes[0] <= num_sentences <= sizes[1]:
        yield f"{where}: expected {sizes[0]} to {sizes[1]} sentences, found {num_sentences}"
    if not text[:1].isupper() or SENTENCE_END.sub("", text[-3:]) == text[-3:]:
        yield f"{where}: expected a capital letter at the beginning and a full stop at the end, found {text!r}"
    words = f" {' '.join(_words(text))} "
    for mechanism in domain.mechanisms:
        if f" {mechanism.name} " in words:
            yield f"{where}: expected no name of a mechanism, found {mechanism.name!r}"
    for setting in domain.settings:
        for thing in setting.things:
            if setting.id != entry.setting and f" {thing} " in words:
                yield f"{where}: expected no thing of another setting, found {thing!r} of {setting.id!r}"
    for run, origin in copied.items():
        if f" {run} " in words:
            yield f"{where}: expected a wording of its own, found {run!r} of {origin!r}"


def _copied_runs(domain: Domain, common: Common) -> dict[str, str]:
    """What no handwritten text may hold, with the text of the grammar that it comes from: whole phrasings and
    statements, and any `NUM_COPIED` words in a row."""
    whole = [text for entry in domain.observations for text in entry.phrasings]
    whole += [text for mechanism in domain.mechanisms for text in mechanism.statements]
    frames = [*domain.query_frames, *domain.document_frames, *common.connections, *common.quotes]
    parts = [part for frame in frames for part in re.split(r"\{[a-z]+\}", frame)]
    runs = {text: text for text in whole}
    for text in (*whole, *parts, *common.openings, *common.details, *common.closers):
        words = _words(text)
        for start in range(len(words) - NUM_COPIED + 1):
            runs.setdefault(" ".join(words[start : start + NUM_COPIED]), text)
    return runs


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())
