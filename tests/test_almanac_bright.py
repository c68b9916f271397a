"""The almanac in BRIGHT's layout: fields, pools, gold documents, and the header that makes it loadable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whyrank.almanac import Collection, build, load_handwritten, write_bright
from whyrank.datasets import read_corpus, read_qrels, read_queries

FIELDS = ["query", "reasoning", "id", "excluded_ids", "gold_ids_long", "gold_ids", "gold_answer"]


@pytest.fixture(scope="module", params=["test", "test-handwritten"])
def collection(request: pytest.FixtureRequest) -> Collection:
    return load_handwritten() if request.param == "test-handwritten" else build("test", 144)


@pytest.fixture(scope="module")
def folder(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bright")
    write_bright(collection, path)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_fields_are_those_of_bright(collection: Collection, folder: Path) -> None:
    texts = {query.query_id: query.text for query in collection.queries}
    for path in (folder / "examples").iterdir():
        for example in lines(path):
            assert list(example) == FIELDS
            assert texts.pop(example["id"]) == example["query"]
            assert collection.query_facts[example["id"]].domain == path.stem
            assert example["excluded_ids"] == example["gold_ids_long"] == ["N/A"]
            assert example["gold_answer"] == "N/A"
            assert example["reasoning"].endswith("same setting.")
    assert not texts


def test_the_pool_of_a_domain_holds_every_candidate(collection: Collection, folder: Path) -> None:
    texts = {document.doc_id: document.text for document in collection.documents}
    for path in (folder / "documents").iterdir():
        pool = {line["id"]: line["content"] for line in lines(path)}
        assert len(pool) == len(lines(path))
        asked = [query_id for query_id, facts in collection.query_facts.items() if facts.domain == path.stem]
        assert pool.keys() == {doc_id for query_id in asked for doc_id in collection.candidates[query_id]}
        assert all(texts[doc_id] == content for doc_id, content in pool.items())


def test_gold_documents_are_all_of_label_2(collection: Collection, folder: Path) -> None:
    """Among the candidates the labels say so; beyond them, a second query of the same cause and place does."""
    queries = collection.query_facts
    for path in (folder / "examples").iterdir():
        gold = {example["id"]: set(example["gold_ids"]) for example in lines(path)}
        assert gold
        for query_id, doc_ids in gold.items():
            labels = {doc_id: collection.labels[query_id, doc_id] for doc_id in collection.candidates[query_id]}
            assert {doc_id for doc_id, label in labels.items() if label == 2} == doc_ids & labels.keys()
            for other, other_ids in gold.items():
                facts = queries[query_id], queries[other]
                is_alike = len({(fact.mechanism, fact.setting) for fact in facts}) == 1
                assert (doc_ids == other_ids) == is_alike
                assert is_alike or not doc_ids & other_ids


def test_our_own_readers_understand_it(collection: Collection, folder: Path) -> None:
    examples = folder / "examples" / "bread.jsonl"
    queries = list(read_queries(examples))
    assert {query.query_id for query in queries} < {query.query_id for query in collection.queries}
    assert not any(query.excluded_doc_ids for query in queries)
    doc_ids = {document.doc_id for document in read_corpus(folder / "documents" / "bread.jsonl")}
    qrels = list(read_qrels(examples))
    assert {qrel.query_id for qrel in qrels} == {query.query_id for query in queries}
    assert {qrel.doc_id for qrel in qrels} <= doc_ids


def test_the_header_names_every_file(folder: Path) -> None:
    start, header, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", maxsplit=2)
    assert start == ""
    for kind in ("examples", "documents"):
        assert header.count(f"- config_name: {kind}\n") == 1
        for path in (folder / kind).iterdir():
            assert f"  - split: {path.stem}\n    path: {kind}/{path.name}\n" in header
    assert header.count("path: ") == sum(path.suffix == ".jsonl" for path in folder.rglob("*"))
    assert "label 2" in body


def test_another_content_has_another_header(tmp_path: Path) -> None:
    """Loaders that remember a data set by its header must not take one export for another."""
    for seed in (0, 1):
        write_bright(build("dev", 2, seed=seed, domains=["bread"]), tmp_path / str(seed))
    headers = [(tmp_path / name / "README.md").read_text(encoding="utf-8").split("---\n")[1] for name in "01"]
    assert headers[0] != headers[1]
    write_bright(build("dev", 2, domains=["bread"]), tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == (tmp_path / "0" / "README.md").read_bytes()
