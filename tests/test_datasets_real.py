"""Real collections: what the readers find, against counts taken from the raw bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pytest

from whyrank.datasets import read_corpus, read_excluded, read_qrels, read_queries, read_rankgpt, read_run


def test_cranfield(shared_data: Path) -> None:
    folder = shared_data / "collections/cranfield"
    raw = (folder / "cranfield-data.json").read_text()
    documents = {document.doc_id: document for document in read_corpus(folder / "cranfield-data.json")}
    assert len(documents) == raw.count('"add"') == 1400
    bodies = [json.loads(found) for found in re.findall(r'"body" : ("(?:[^"\\]|\\.)*")', raw)]
    # Taking the title off and putting it back must give every word of every body; two bodies (1000 and 1369) do not
    # begin with their title exactly, and two documents (471 and 995) are empty.
    rebuilt = [document.full_text.split() for document in documents.values()]
    assert [number for number, body in enumerate(bodies, start=1) if rebuilt[number - 1] != body.split()] == [
        1000,
        1369,
    ]
    assert [doc_id for doc_id, document in documents.items() if not document.full_text] == ["471", "995"]
    rows = list(csv.reader(io.StringIO((folder / "cranfield-gt.csv").read_text())))
    queries, qrels = list(read_queries(folder / "cranfield-gt.csv")), read_qrels(folder / "cranfield-gt.csv")
    assert [query.text for query in queries] == [row[0] for row in rows]
    assert [query.query_id for query in queries] == [str(number) for number in range(1, 151)]
    assert len(qrels) == sum(len(row) // 2 for row in rows)
    assert {qrel.doc_id for qrel in qrels} <= documents.keys()


def test_vaswani(shared_data: Path) -> None:
    folder = shared_data / "collections/vaswani"
    raw = (folder / "doc-text.trec").read_text()
    documents = list(read_corpus(folder / "doc-text.trec"))
    assert len(documents) == raw.count("<DOC>") == 11429
    words = [block.split("</DOCNO>")[1].split() for block in raw.split("</DOC>")[:-1]]
    assert [document.text.split() for document in documents] == words
    assert len(list(read_queries(folder / "query-text.trec"))) == (folder / "query-text.trec").read_text().count(
        "<top>"
    )
    qrels = read_qrels(folder / "qrels")
    assert len(qrels) == (folder / "qrels").read_text().count("\n") == 2083
    assert {qrel.doc_id for qrel in qrels} <= {document.doc_id for document in documents}


def test_dl19_candidates(shared_data: Path) -> None:
    path = shared_data / "trec-dl/dl19.bm25-top100.with-text.json"
    queries, documents, run = read_rankgpt(path)
    raw = path.read_text()
    assert len(queries) == raw.count('"hits"') == 43
    assert sum(map(len, run.values())) == raw.count('"docid"') == 4300
    assert len(documents) == len(set(re.findall(r'"docid": "(\d+)"', raw))) == 4297
    assert list(read_corpus(path)) == documents
    assert list(read_queries(path)) == queries
    assert read_run(path) == run


@pytest.mark.parametrize("subset", ["aops", "biology", "leetcode", "pony", "stackoverflow", "theoremqa-theorems"])
def test_bright(subset: str, shared_data: Path) -> None:
    folder = shared_data / "bright"
    path = folder / "topics" / f"topics.bright-{subset}-original.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    queries = list(read_queries(path))
    assert [(query.query_id, query.text) for query in queries] == [(row["id"], row["query"]) for row in rows]
    excluded = [[] if row["excluded_ids"] == ["N/A"] else row["excluded_ids"] for row in rows]
    # aops names some documents twice.
    assert [list(query.excluded_doc_ids) for query in queries] == [list(dict.fromkeys(found)) for found in excluded]
    qrels = folder / "qrels" / f"qrels.bright-{subset}.txt"
    assert len(read_qrels(qrels)) == qrels.read_bytes().count(b"\n")


def test_exclusions_of_leetcode_in_both_files(shared_data: Path) -> None:
    folder = shared_data / "bright"
    pairs = read_excluded(folder / "qrels/exclude.bright-leetcode.txt")
    assert pairs == read_excluded(folder / "topics/topics.bright-leetcode-original.jsonl.gz")
    lines = (folder / "qrels/exclude.bright-leetcode.txt").read_text().split("\n")
    assert sum(map(len, pairs.values())) == len({line for line in lines if line})


def test_document_ids_with_spaces_in_a_run(shared_data: Path) -> None:
    path = shared_data / "bright/runs/reasonir-gpt4/stackoverflow.reasonir_gpt4cot_top100.txt"
    found = [scored.doc_id for documents in read_run(path).values() for scored in documents if " " in scored.doc_id]
    assert len(found) == sum(len(line.split()) == 7 for line in path.read_text().splitlines()) == 12
    assert all(re.fullmatch(r"pytorch_torch_tensor_functions/Memory Management_\d_\d\.txt", doc_id) for doc_id in found)
