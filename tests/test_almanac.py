"""The almanac's collections: composition, splits, reproducibility, and that text alone decides every label."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from whyrank.almanac import (
    DRAWN_SPLITS,
    MAX_EXPLANATION_WORDS,
    NUM_CANDIDATES,
    Collection,
    DrawnSplit,
    GoldExplanation,
    Knowledge,
    Reasoning,
    build,
    load_knowledge,
)
from whyrank.almanac.splits import combinations_of
from whyrank.errors import InputError
from whyrank.records import Document, Query
from whyrank.store import read_jsonl

NUM_QUERIES = 144  # two rounds over 72 mechanisms


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return load_knowledge()


@pytest.fixture(scope="module")
def built() -> dict[DrawnSplit, Collection]:
    return {split: build(split, NUM_QUERIES) for split in DRAWN_SPLITS}


# ---- an independent reader: texts and knowledge only -----------------------------------------------------------


class Solver:
    """Finds the label of a pair in its two texts, with string search in the knowledge files and nothing else.

    Case does not count: a phrase may begin a sentence."""

    def __init__(self, knowledge: Knowledge) -> None:
        self.causes_of_phrase = {
            phrase: {m.id for m in domain.mechanisms if observation.id in m.observations}
            for domain in knowledge.domains
            for observation in domain.observations
            for phrase in observation.phrasings
        }
        self.cause_of_statement = {
            statement: mechanism.id
            for domain in knowledge.domains
            for mechanism in domain.mechanisms
            for statement in mechanism.statements
        }
        self.setting_of_thing = {
            thing: (domain.name, setting.id)
            for domain in knowledge.domains
            for setting in domain.settings
            for thing in setting.things
        }

    def setting(self, text: str) -> tuple[str, str]:
        plain = text.lower()
        (named,) = {
            place
            for thing, place in self.setting_of_thing.items()
            if re.search(rf"the {thing}(?:[.:]| with it)", plain)
        }
        return named

    def read_query(self, text: str) -> tuple[str, tuple[str, str]]:
        one, other = (causes for phrase, causes in self.causes_of_phrase.items() if phrase in text.lower())
        (cause,) = one & other
        return cause, self.setting(text)

    def read_document(self, text: str) -> tuple[str, tuple[str, str]]:
        (cause,) = (found for statement, found in self.cause_of_statement.items() if statement in text.lower())
        return cause, self.setting(text)


def test_the_texts_alone_decide_every_label(built: dict[DrawnSplit, Collection], knowledge: Knowledge) -> None:
    solver = Solver(knowledge)
    for collection in built.values():
        asked = {query.query_id: solver.read_query(query.text) for query in collection.queries}
        written = {document.doc_id: solver.read_document(document.text) for document in collection.documents}
        for (query_id, doc_id), label in collection.labels.items():
            is_same_cause, is_same_setting = (a == b for a, b in zip(asked[query_id], written[doc_id], strict=True))
            assert label == (0 if not is_same_cause else 2 if is_same_setting else 1)


# ---- composition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", DRAWN_SPLITS)
def test_every_query_has_the_same_mix_of_candidates(built: dict[DrawnSplit, Collection], split: DrawnSplit) -> None:
    collection = built[split]
    assert len(collection.queries) == NUM_QUERIES
    assert len({document.doc_id for document in collection.documents}) == len(collection.documents)
    for query in collection.queries:
        doc_ids = collection.candidates[query.query_id]
        facts = collection.query_facts[query.query_id]
        assert len(set(doc_ids)) == NUM_CANDIDATES == 24
        labels = Counter(collection.labels[query.query_id, doc_id] for doc_id in doc_ids)
        assert labels == {2: 2, 1: 3, 0: 19}
        documents = [collection.document_facts[doc_id] for doc_id in doc_ids]
        assert sum(document.domain == facts.domain for document in documents) == 20
        assert facts.thing not in {document.thing for document in documents}


def test_at_least_five_candidates_miss_by_one_observation(
    built: dict[DrawnSplit, Collection], knowledge: Knowledge
) -> None:
    collection = built["test"]
    for query_id, doc_ids in collection.candidates.items():
        facts = collection.query_facts[query_id]
        domain = knowledge.domain(facts.domain)
        num_near = 0
        for document in (collection.document_facts[doc_id] for doc_id in doc_ids):
            if document.domain == facts.domain and document.setting == facts.setting:
                shared = set(domain.mechanism(document.mechanism).observations) & set(facts.observations)
                num_near += len(shared) == 1
        assert num_near >= 5


def test_one_domain_alone_fills_all_candidates() -> None:
    collection = build("dev", 12, domains=["bread"])
    assert {facts.domain for facts in collection.document_facts.values()} == {"bread"}
    assert {facts.domain for facts in collection.query_facts.values()} == {"bread"}
    assert all(len(doc_ids) == 24 for doc_ids in collection.candidates.values())


def test_queries_go_round_the_mechanisms(built: dict[DrawnSplit, Collection], knowledge: Knowledge) -> None:
    num_mechanisms = sum(len(domain.mechanisms) for domain in knowledge.domains)
    asked = Counter((facts.domain, facts.mechanism) for facts in built["train"].query_facts.values())
    assert len(asked) == num_mechanisms
    assert set(asked.values()) == {NUM_QUERIES // num_mechanisms}


def test_observations_come_in_either_order(built: dict[DrawnSplit, Collection], knowledge: Knowledge) -> None:
    in_order = 0
    for facts in built["train"].query_facts.values():
        pairs = knowledge.domain(facts.domain).mechanism(facts.mechanism).pairs()
        in_order += facts.observations in pairs
    assert NUM_QUERIES / 4 < in_order < 3 * NUM_QUERIES / 4  # one half, give or take five standard errors


def num_sentences(text: str) -> int:
    return len(re.findall(r"[.?!](?: |$)", text))


def test_sizes_are_those_of_short_posts_and_entries(built: dict[DrawnSplit, Collection]) -> None:
    for collection in built.values():
        assert all(10 <= len(query.text.split()) <= 45 for query in collection.queries)
        assert all(15 <= len(document.text.split()) <= 60 for document in collection.documents)
        assert {num_sentences(query.text) for query in collection.queries} == {1, 2, 3, 4}
        assert {num_sentences(document.text) for document in collection.documents} == {2, 3, 4, 5}
        assert all(len(text.split()) <= MAX_EXPLANATION_WORDS for text in collection.explanations.values())


def test_every_sentence_begins_with_a_capital_letter(built: dict[DrawnSplit, Collection]) -> None:
    for collection in built.values():
        texts = [query.text for query in collection.queries] + [document.text for document in collection.documents]
        for text in texts:
            assert all(sentence[0].isupper() for sentence in re.split(r"(?<=[.?!]) ", text)), text


def test_the_number_of_sentences_says_nothing(built: dict[DrawnSplit, Collection]) -> None:
    """Of the documents of every label, half have two sentences and a twentieth has five, as the grammar says."""
    lengths = {document.doc_id: num_sentences(document.text) for c in built.values() for document in c.documents}
    pairs = [(label, lengths[doc_id]) for c in built.values() for (_, doc_id), label in c.labels.items()]
    for label in (0, 1, 2):
        found = [length for other, length in pairs if other == label]  # at least 864: standard error of a half .017
        for least, share in ((3, 0.5), (4, 0.2), (5, 0.05)):
            assert sum(length >= least for length in found) / len(found) == pytest.approx(share, abs=0.06), label


def test_qrels_hold_every_candidate_in_order(built: dict[DrawnSplit, Collection]) -> None:
    collection = built["dev"]
    expected = [(query_id, doc_id) for query_id, doc_ids in collection.candidates.items() for doc_id in doc_ids]
    assert [(qrel.query_id, qrel.doc_id) for qrel in collection.qrels] == expected
    assert [qrel.relevance for qrel in collection.qrels] == [collection.labels[pair] for pair in expected]


# ---- splits ----------------------------------------------------------------------------------------------------


def test_combinations_are_dealt_out_without_rest(knowledge: Knowledge) -> None:
    for domain in knowledge.domains:
        for mechanism in domain.mechanisms:
            dealt = [
                (pair, setting.id)
                for split in DRAWN_SPLITS
                for pair, setting in combinations_of(split, domain, mechanism)
            ]
            assert len(dealt) == len(set(dealt)) == len(mechanism.pairs()) * len(domain.settings)
            trained = {pair for pair, _ in combinations_of("train", domain, mechanism)}
            assert trained == set(mechanism.pairs())


def test_combinations_of_three_pairs_and_four_settings(knowledge: Knowledge) -> None:
    """By hand: one setting of each pair for test (3), one of the first and third pair for dev (2), 7 of 12 remain."""
    plants = knowledge.domain("houseplants")
    assert len(plants.settings) == 4
    drought = plants.mechanism("drought-stress")
    assert [len(combinations_of(split, plants, drought)) for split in DRAWN_SPLITS] == [7, 2, 3]
    test = [(pair, setting.id) for pair, setting in combinations_of("test", plants, drought)]
    assert test == [
        (("drooping-leaves", "brown-tips"), "bathroom"),
        (("drooping-leaves", "curled-leaves"), "balcony"),
        (("brown-tips", "curled-leaves"), "office"),
    ]


def test_no_text_and_no_combination_is_in_two_splits() -> None:
    seeds = {"train": 0, "dev": 1, "test": 2}  # the law does not depend on the seeds
    seen: dict[object, str] = {}
    for split in DRAWN_SPLITS:
        collection = build(split, NUM_QUERIES, seed=seeds[split])
        entries: set[object] = {query.text for query in collection.queries}
        entries |= {document.text for document in collection.documents}
        for facts in collection.query_facts.values():
            entries.add((facts.domain, facts.mechanism, frozenset(facts.observations), facts.setting))
        for entry in entries:
            assert seen.setdefault(entry, split) == split


def test_held_out_texts_are_used_in_half_of_test_and_nowhere_else(
    built: dict[DrawnSplit, Collection], knowledge: Knowledge
) -> None:
    kept = {entry.phrasings[-1] for domain in knowledge.domains for entry in domain.observations}
    kept |= {entry.statements[-1] for domain in knowledge.domains for entry in domain.mechanisms}
    pattern = re.compile("|".join(sorted(kept)), re.IGNORECASE)
    assert len(built["test"].held_out) == NUM_QUERIES // 2
    assert not built["train"].held_out | built["dev"].held_out
    for collection in built.values():
        texts = {entry.doc_id: entry.text for entry in collection.documents}
        for query in collection.queries:
            is_held_out = query.query_id in collection.held_out
            # two phrasings in the query, one statement in each document (and perhaps a quote)
            assert len(pattern.findall(query.text)) == (2 if is_held_out else 0)
            for doc_id in collection.candidates[query.query_id]:
                assert (len(pattern.findall(texts[doc_id])) > 0) == is_held_out


# ---- reproducibility -------------------------------------------------------------------------------------------


def digest(collection: Collection) -> str:
    lines = [query.text for query in collection.queries]
    lines += [document.text for document in collection.documents]
    lines += [f"{gold.query_id} {gold.doc_id} {gold.label} {gold.explanation}" for gold in collection.gold()]
    return sha256("\n".join(lines).encode()).hexdigest()


def test_the_same_arguments_give_the_same_collection() -> None:
    assert digest(build("dev", 10, seed=4)) == digest(build("dev", 10, seed=4))
    assert digest(build("dev", 10, seed=4)) != digest(build("dev", 10, seed=5))


def test_bytes_do_not_depend_on_the_hash_seed_of_the_interpreter(tmp_path: Path) -> None:
    """A set or a dict key order that leaked into the texts would show here."""
    program = "import sys; from whyrank.almanac import build; build('test', 12).write(sys.argv[1])"
    written = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", program, str(folder)], check=True, env=environment)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert all(written[0].values())


def test_a_larger_collection_begins_with_the_smaller() -> None:
    small, large = build("test", 20), build("test", 50)
    assert large.queries[:20] == small.queries
    assert large.documents[: len(small.documents)] == small.documents
    assert {query_id: large.candidates[query_id] for query_id in small.candidates} == small.candidates


# ---- reasoning -------------------------------------------------------------------------------------------------

GOLD = Reasoning("wet soil", "pale colour", "light shortage", "light shortage", "bathroom", "office")
GOLD_TEXT = (
    "Here wet soil and pale colour suggest light shortage, the text means light shortage: same cause. "
    "Asked for bathroom, the text means office: other setting."
)


def test_reasoning_is_written_as_two_comparisons() -> None:
    assert GOLD.text == GOLD_TEXT
    assert GOLD.label == 1
    assert replace(GOLD, document_setting="bathroom").label == 2
    assert replace(GOLD, document_setting="bathroom", document_cause="root rot").label == 0
    assert replace(GOLD, document_cause="root rot").label == 0


def test_reasoning_is_read_back(built: dict[DrawnSplit, Collection]) -> None:
    for reasoning in built["dev"].reasons.values():
        assert Reasoning.parse(reasoning.text) == reasoning


def test_reasoning_that_contradicts_itself_is_not_read() -> None:
    assert Reasoning.parse(GOLD_TEXT) == GOLD
    assert Reasoning.parse(GOLD_TEXT.replace("same cause", "other cause")) is None
    assert Reasoning.parse(GOLD_TEXT.replace("other setting", "same setting")) is None
    assert Reasoning.parse("It is light shortage.") is None


def test_a_mistaken_reader_gets_the_label_of_the_mistake(built: dict[DrawnSplit, Collection]) -> None:
    """What a scripted teacher needs: believing in another cause turns every relevant document into a 0."""
    for reasoning in built["dev"].reasons.values():
        mistaken = replace(reasoning, query_cause="something else")
        assert mistaken.label == 0
        assert "suggest something else" in mistaken.text
        assert "other cause" in mistaken.text


# ---- on disk ---------------------------------------------------------------------------------------------------


def test_a_collection_is_written_and_read_back(tmp_path: Path) -> None:
    collection = build("test", 8)
    collection.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "candidates.trec",
        "corpus.jsonl",
        "explanations.jsonl",
        "qrels.trec",
        "queries.jsonl",
    ]
    assert tuple(read_jsonl(tmp_path / "queries.jsonl", Query)) == collection.queries
    assert tuple(read_jsonl(tmp_path / "corpus.jsonl", Document)) == collection.documents
    gold = list(read_jsonl(tmp_path / "explanations.jsonl", GoldExplanation))
    assert {(line.query_id, line.doc_id): line.label for line in gold} == collection.labels
    assert {line.query_id for line in gold if line.is_held_out_phrasing} == collection.held_out
    qrels = [line.split() for line in (tmp_path / "qrels.trec").read_text(encoding="utf-8").splitlines()]
    assert {(line[0], line[2]): int(line[3]) for line in qrels} == collection.labels
    run = [line.split() for line in (tmp_path / "candidates.trec").read_text(encoding="utf-8").splitlines()]
    for query_id, doc_ids in collection.candidates.items():
        mine = [line for line in run if line[0] == query_id]
        assert [line[2] for line in mine] == list(doc_ids)
        assert [int(line[3]) for line in mine] == list(range(1, 25))
        assert [int(line[4]) for line in mine] == list(range(24, 0, -1))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="expected a split among train, dev, test, found 'valid'"):
        build("valid", 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"that is drawn, among train, dev, test, .*load_handwritten\(\) reads them"):
        build("test-handwritten", 3)
    with pytest.raises(InputError, match="num_queries of at least 1, found 0"):
        build("train", 0)
    with pytest.raises(InputError, match="found moon"):
        build("train", 3, domains=["moon"])
