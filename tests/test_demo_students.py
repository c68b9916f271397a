"""The students that the demo and the full table compare: plans, equal compute, controls, and the rankings shown."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from whyrank.almanac import Collection, build
from whyrank.almanac.gold import gold_judgments, with_shuffled_explanations
from whyrank.demo.examples import choose_examples
from whyrank.demo.students import Plan, steps_for_same_compute, train_students
from whyrank.demo.systems import Row, candidates_of
from whyrank.errors import InputError
from whyrank.generators.hf.chat import ChatTokens
from whyrank.generators.scripted import Scripted, ScriptedAnswer
from whyrank.records import Judgment, Mode
from whyrank.rerank import Reranker
from whyrank.store import write_jsonl
from whyrank.template import Template
from whyrank.training.config import DistillConfig, TinyConfig
from whyrank.training.distill import Distilled, student_tokenizer
from whyrank.training.examples import examples_of

ALMANAC = Template.load("almanac")
TINY = TinyConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)
CONFIG = DistillConfig(num_steps=3, batch_size=2, num_warmup_steps=1, precision="float32", device="cpu", tiny=TINY)


@pytest.fixture(scope="module")
def collection() -> Collection:
    return build("test", 4, domains=["bread"])


def gold(collection: Collection) -> list[Judgment]:
    return list(gold_judgments(collection, ALMANAC, num_irrelevant=2))


@pytest.fixture(scope="module")
def data(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    collection.write(folder)
    write_jsonl(folder / "judgments.jsonl", gold(collection))
    return folder


def test_shuffled_explanations_keep_pairs_labels_and_sentences(collection: Collection) -> None:
    judgments = gold(collection)
    shuffled = list(with_shuffled_explanations(judgments, seed=1))
    assert [replace(one, explanation="", model="") for one in shuffled] == [
        replace(one, explanation="", model="") for one in judgments
    ]
    assert Counter(one.explanation for one in shuffled) == Counter(one.explanation for one in judgments)
    moved = sum(one.explanation != other.explanation for one, other in zip(shuffled, judgments, strict=True))
    assert moved > len(judgments) / 2
    assert list(with_shuffled_explanations(judgments, seed=1)) == shuffled


def test_equal_compute_reads_as_many_tokens(collection: Collection, data: Path) -> None:
    many = replace(CONFIG, num_steps=1000)
    num_steps = steps_for_same_compute(data / "judgments.jsonl", data, ALMANAC, many)
    judgments = gold(collection)
    queries = {query.query_id: query for query in collection.queries}
    wanted = {judgment.doc_id for judgment in judgments}
    documents = {document.doc_id: document for document in collection.documents if document.doc_id in wanted}
    tokens = ChatTokens(student_tokenizer(judgments, queries, documents, ALMANAC, TINY.vocab_size))
    modes: tuple[Mode, Mode] = ("explain", "direct")
    explain, direct = (
        sum(len(example.ids) for example in examples_of(judgments, queries, documents, ALMANAC, tokens, (mode,)))
        for mode in modes
    )
    assert num_steps == pytest.approx(1000 * explain / direct, abs=0.5)
    assert num_steps > 1200
    same = steps_for_same_compute(data / "judgments.jsonl", data, ALMANAC, many, mode="explain")
    assert same == 1000


@pytest.mark.slow
def test_a_student_is_resumed_in_other_company(data: Path, tmp_path: Path) -> None:
    """What a plan's checkpoint is identified by does not depend on how many plans there are."""
    judgments = data / "judgments.jsonl"
    plans = [Plan("one", judgments, replace(CONFIG, num_steps=1)), Plan("two", judgments, CONFIG)]
    together = train_students(plans, data, tmp_path, ALMANAC)
    assert train_students(plans[1:], data, tmp_path, ALMANAC)["two"].history == together["two"].history


@pytest.mark.slow
def test_students_are_trained_reported_once_and_never_again(data: Path, tmp_path: Path) -> None:
    plans = [
        Plan("one", data / "judgments.jsonl", CONFIG),
        Plan("two", data / "judgments.jsonl", replace(CONFIG, modes=("direct",), num_steps=2)),
    ]
    reported: list[tuple[str, int]] = []

    def on_trained(plan: Plan, student: Distilled) -> None:
        reported.append((plan.name, len(student.history)))

    trained = train_students(plans, data, tmp_path, ALMANAC, on_trained=on_trained)
    assert sorted(reported) == [("one", 3), ("two", 2)]
    assert list(trained) == ["one", "two"]
    assert all(math.isfinite(student.history[-1].loss) for student in trained.values())
    again = train_students(plans, data, tmp_path, ALMANAC)
    assert [student.history for student in again.values()] == [student.history for student in trained.values()]


@pytest.mark.slow
def test_a_student_that_cannot_be_trained_is_an_error(data: Path, tmp_path: Path) -> None:
    impossible = Plan("short", data / "judgments.jsonl", replace(CONFIG, learning_rate=1e30, num_warmup_steps=0))
    with pytest.raises(InputError, match="the loss is"):
        train_students([impossible], data, tmp_path, ALMANAC)


def test_the_worst_ranking_is_always_among_the_examples(collection: Collection, tmp_path: Path) -> None:
    documents = {document.doc_id: document.full_text for document in collection.documents}
    queries = {query.query_id: query.text for query in collection.queries}
    answers = [
        ScriptedAnswer(queries[query_id], documents[doc_id], explanation="So.", label=str(label))
        for (query_id, doc_id), label in collection.labels.items()
    ]
    reranker = Reranker.of(ALMANAC, Scripted(answers))
    candidates = candidates_of(collection)
    judgments = [
        result.judgment
        for query in collection.queries
        for result in reranker.rank(
            query, [candidates.documents[line.doc_id] for line in candidates.run[query.query_id]]
        )
    ]
    write_jsonl(tmp_path / "judgments.jsonl", judgments)
    ids = [query.query_id for query in collection.queries]
    known = next(query_id for query_id in ids if query_id not in collection.held_out)
    held_out = next(query_id for query_id in ids if query_id in collection.held_out)
    worst = next(query_id for query_id in ids if query_id not in (known, held_out))
    values = {**dict.fromkeys(ids, 0.5), known: 1.0, held_out: 0.9, worst: 0.1}
    examples = choose_examples(collection, Row("explain", values), reranker, tmp_path)
    assert [(example.query, example.ndcg) for example in examples] == [
        (queries[known], 1.0),
        (queries[held_out], 0.9),
        (queries[worst], 0.1),
    ]
    for example in examples:
        assert [example.gold[result.id] for result in example.ranking[:5]] == [2, 2, 1, 1, 1]  # the answers are gold
