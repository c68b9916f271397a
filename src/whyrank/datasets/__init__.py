"""Readers: files of other people in, records out.

Every reader recognises the format from the content (`formats` says by which rules), accepts gzip, a UTF-8 byte
order mark, CRLF and blank lines, turns ids into text, and refuses a file that fits none of its formats or holds no
record. With `bad`, lines that cannot be read are counted there and passed over; without, the first is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from whyrank.datasets import cranfield, jsonl, rankgpt, sgml, trec
from whyrank.datasets.formats import (
    Layout,
    Located,
    distinct,
    field_of,
    finite,
    first_lines,
    id_of,
    layout_of,
    named,
    parsed,
    read_objects,
    required,
    unrecognised,
    with_peek,
)
from whyrank.datasets.runs import Run, collect, without_excluded
from whyrank.datasets.trec import write_json_run, write_run, write_trec_qrels, write_trec_run
from whyrank.errors import InputError
from whyrank.records import Document, Qrel, Query, ScoredDocument
from whyrank.store import BadLines

__all__ = [
    "CORPUS_FORMATS",
    "EXCLUDED_FORMATS",
    "QRELS_FORMATS",
    "QUERIES_FORMATS",
    "RUN_FORMATS",
    "Run",
    "read_corpus",
    "read_excluded",
    "read_qrels",
    "read_queries",
    "read_rankgpt",
    "read_run",
    "without_excluded",
    "write_json_run",
    "write_run",
    "write_trec_qrels",
    "write_trec_run",
]

R = TypeVar("R")
Object = dict[str, Any]

RANKGPT_FORMAT = ("RankGPT", '[{"query": "...", "hits": [{"content": "...", "docid": "d1", "qid": 7, "score": 1.5}]}]')
EXAMPLES_FORMAT = ("BRIGHT examples", '{"id": "0", "query": "...", "excluded_ids": ["N/A"], "gold_ids": ["d1"]}')
CRANFIELD_FORMAT = ("Cranfield rows", '"what is lift","184","3","29","2"')
CORPUS_FORMATS = (
    ("JSON objects (BEIR, BRIGHT, whyrank)", '{"_id": "d1", "title": "...", "text": "..."}'),
    ("TREC SGML", "<DOC><DOCNO>d1</DOCNO>text</DOC>"),
    ("two columns", "d1<tab>text"),
    RANKGPT_FORMAT,
    ("Solr JSON (Cranfield)", '{"add": {"doc": {"id": 1, "title": "...", "body": "..."}}, "add": ...}'),
)
QUERIES_FORMATS = (
    ("JSON objects (BEIR, whyrank)", '{"_id": "q1", "text": "..."}'),
    EXAMPLES_FORMAT,
    ("TREC topics", "<top><num>1</num><title>text</title></top>"),
    ("two columns", "q1<tab>text"),
    RANKGPT_FORMAT,
    CRANFIELD_FORMAT,
)
QRELS_FORMATS = (
    ("TREC qrels", "q1 0 d1 2"),
    ("BEIR qrels", "q1<tab>d1<tab>2, with or without the header query-id<tab>corpus-id<tab>score"),
    EXAMPLES_FORMAT,
    ("whyrank records", '{"query_id": "q1", "doc_id": "d1", "relevance": 2}'),
    CRANFIELD_FORMAT,
)
RUN_FORMATS = (
    ("TREC run", "q1 Q0 d1 1 12.5 tag"),
    ("JSON run", '{"q1": {"d1": 12.5}}'),
    ("whyrank records", '{"query_id": "q1", "doc_id": "d1", "rank": 1, "score": 12.5}'),
    RANKGPT_FORMAT,
)
EXCLUDED_FORMATS = (("two columns", "q1 d1"), EXAMPLES_FORMAT)


def read_corpus(
    path: Path | str, *, bad: BadLines | None = None, fields: Mapping[str, str] | None = None
) -> Iterator[Document]:
    """The documents of a file in one of `CORPUS_FORMATS`, in order, as a stream (SGML, JSON lines, columns).

    `fields` maps our names to a JSON file's own, such as `{"doc_id": "pmid", "text": "abstract"}`; those fields
    must then be there. A document that is repeated word for word comes once.

    Raises:
        InputError: the format is not recognised, there are no documents, a record cannot be read (counted instead
            where `bad` is given), or an id comes twice with different texts.
    """
    layout = layout_of(path)
    _refuse_fields(fields, layout, path)
    if layout == "sgml":
        items: Iterator[Located[Document]] = parsed(
            _elements(path, "doc", bad, "documents", CORPUS_FORMATS), sgml.document, bad
        )
    elif layout == "solr":
        items = parsed(cranfield.solr_adds(path), cranfield.document, bad)
    elif layout == "columns":
        _expect_two_columns(path, "documents", CORPUS_FORMATS)
        items = parsed(trec.located_lines(path, bad), trec.document, bad)
    else:
        parse = jsonl.document_parser(fields)
        first, objects = with_peek(read_objects(path, layout, bad))
        if any(rankgpt.is_candidates(record) for _, record in first) and not fields:
            items = _flat(parsed(objects, rankgpt.documents, bad))
        else:
            _expect_one(first, parse, path, "documents", CORPUS_FORMATS)
            items = parsed(objects, parse, bad)
    unique = distinct(items, lambda doc: doc.doc_id, lambda doc: (doc.title, doc.text), "document id", bad)
    return required(unique, path, "document", bad)


def read_queries(
    path: Path | str, *, bad: BadLines | None = None, fields: Mapping[str, str] | None = None
) -> Iterator[Query]:
    """The queries of a file in one of `QUERIES_FORMATS`, in order. A TREC topic's text is its title.

    `fields` maps our names to a JSON file's own, such as `{"text": "gpt4_reason"}`.

    Raises:
        InputError: as for `read_corpus`.
    """
    layout = layout_of(path)
    _refuse_fields(fields, layout, path)
    if layout == "sgml":
        items: Iterator[Located[Query]] = parsed(
            _elements(path, "top", bad, "queries", QUERIES_FORMATS), sgml.topic, bad
        )
    elif layout == "columns" and _is_cranfield(path):
        items = parsed(cranfield.rows(path), cranfield.query, bad)
    elif layout == "columns":
        _expect_two_columns(path, "queries", QUERIES_FORMATS)
        items = parsed(trec.located_lines(path, bad), trec.query, bad)
    elif layout == "solr":
        raise unrecognised(path, "queries", QUERIES_FORMATS)
    else:
        parse = jsonl.query_parser(fields)
        first, objects = with_peek(read_objects(path, layout, bad))
        if any(rankgpt.is_candidates(record) for _, record in first) and not fields:
            items = parsed(objects, rankgpt.query, bad)
        else:
            _expect_one(first, parse, path, "queries", QUERIES_FORMATS)
            items = parsed(objects, parse, bad)
    unique = distinct(items, lambda query: query.query_id, lambda query: query, "query id", bad)
    return required(unique, path, "query", bad)


def read_qrels(path: Path | str, *, bad: BadLines | None = None) -> list[Qrel]:
    """The relevance judgments of a file in one of `QRELS_FORMATS`, in order; a line that is repeated counts once.

    Raises:
        InputError: as for `read_corpus`; a pair that has two different relevances is an error too.
    """
    layout = layout_of(path)
    if layout == "columns" and _is_cranfield(path):
        items = parsed(cranfield.rows(path), cranfield.qrels, bad)
    elif layout == "columns":
        first = first_lines(path)
        if not any(map(trec.is_qrels_line, first)):
            raise unrecognised(path, "qrels", QRELS_FORMATS)
        lines = trec.located_lines(path, bad)
        if trec.is_qrels_header(first[0]):
            next(lines)
        items = parsed(lines, trec.qrel, bad)
    elif layout in ("json", "jsonl"):
        peeked, objects = with_peek(read_objects(path, layout, bad))
        is_examples = any("gold_ids" in record for _, record in peeked)
        parse = jsonl.gold_qrels if is_examples else jsonl.own_qrel
        _expect_one(peeked, parse, path, "qrels", QRELS_FORMATS)
        items = parsed(objects, parse, bad)
    else:
        raise unrecognised(path, "qrels", QRELS_FORMATS)
    unique = distinct(_flat(items), lambda qrel: (qrel.query_id, qrel.doc_id), lambda qrel: qrel.relevance, "pair", bad)
    return list(required(unique, path, "judgment", bad))


def read_run(path: Path | str, *, bad: BadLines | None = None) -> dict[str, list[ScoredDocument]]:
    """The run of a file in one of `RUN_FORMATS`: query id to documents, best first, with ranks 1, 2, 3, ...

    Within a query the score decides, then the rank that the file gives, then the document id. The rank column of a
    TREC run is therefore only used between equal scores, as everywhere in TREC's tools.

    Raises:
        InputError: as for `read_corpus`; also a document that comes twice for a query, and a score that is not finite.
    """
    layout = layout_of(path)
    if layout == "columns":
        lines = trec.located_lines(path, bad)
        items = parsed(lines, trec.scored_document, bad)
        if not any(map(trec.is_run_line, first_lines(path))):
            raise unrecognised(path, "a run", RUN_FORMATS)
    elif layout in ("json", "jsonl"):
        items = _json_run(path, layout, bad)
    else:
        raise unrecognised(path, "a run", RUN_FORMATS)
    return collect(required(items, path, "ranked document", bad), bad)


def _json_run(path: Path | str, layout: Layout, bad: BadLines | None) -> Iterator[Located[ScoredDocument]]:
    peeked, objects = with_peek(read_objects(path, layout, bad))
    if any(rankgpt.is_candidates(record) for _, record in peeked):
        return _flat(parsed(objects, rankgpt.hits, bad))
    if any({"query_id", "doc_id", "score"} <= record.keys() for _, record in peeked):
        return parsed(objects, _own_scored_document, bad)
    if peeked and all(isinstance(scores, dict) for _, record in peeked for scores in record.values()):
        return _flat(parsed(objects, _mapped_run, bad))
    raise unrecognised(path, "a run", RUN_FORMATS)


def _own_scored_document(record: Object) -> ScoredDocument:
    rank = field_of(record, ("rank",))
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise InputError(f"expected a whole number as rank, found {rank!r}")
    query_id, doc_id = (id_of(field_of(record, (name,))) for name in ("query_id", "doc_id"))
    return ScoredDocument(query_id, doc_id, rank, finite(field_of(record, ("score",))))


def _mapped_run(record: Object) -> list[ScoredDocument]:
    """A JSON object has no order, so that ties are ordered by document id."""
    return [
        ScoredDocument(id_of(query_id), id_of(doc_id), 0, _number(score))
        for query_id, scores in record.items()
        for doc_id, score in scores.items()
    ]


def _number(value: Any) -> float:
    if isinstance(value, str):
        raise InputError(f"expected a number as score, found the text {value!r}")
    return finite(value)


def read_rankgpt(
    path: Path | str, *, bad: BadLines | None = None
) -> tuple[list[Query], list[Document], dict[str, list[ScoredDocument]]]:
    """Queries, documents (each once) and run of RankGPT candidates: a JSON list, one object, or JSON lines.

    Raises:
        InputError: as for `read_corpus`.
    """
    layout = layout_of(path)
    if layout not in ("json", "jsonl"):
        raise unrecognised(path, "RankGPT candidates", [RANKGPT_FORMAT])
    objects = list(required(read_objects(path, layout, bad), path, "query", bad))
    _expect_one(objects, rankgpt.query, path, "RankGPT candidates", [RANKGPT_FORMAT])
    whole = list(parsed(objects, lambda record: (rankgpt.query(record), rankgpt.documents(record)), bad))
    readable = {where for where, _ in whole}
    queries = distinct(((where, query) for where, (query, _) in whole), lambda q: q.query_id, hash, "query id", bad)
    documents = distinct(
        ((where, document) for where, (_, found) in whole for document in found),
        lambda document: document.doc_id,
        lambda document: document.text,
        "document id",
        bad,
    )
    hits = _flat(parsed((item for item in objects if item[0] in readable), rankgpt.hits, bad))
    return list(queries), list(documents), collect(hits, bad)


def read_excluded(path: Path | str, *, bad: BadLines | None = None) -> dict[str, set[str]]:
    """Documents that must never be ranked for a query, from a file in one of `EXCLUDED_FORMATS`.

    Queries without exclusions are left out, so that BRIGHT examples of a subset that excludes nothing give `{}`.

    Raises:
        InputError: as for `read_corpus`.
    """
    layout = layout_of(path)
    excluded: dict[str, set[str]] = {}
    if layout in ("json", "jsonl"):
        for query in read_queries(path, bad=bad):
            if query.excluded_doc_ids:
                excluded[query.query_id] = set(query.excluded_doc_ids)
        return excluded
    if layout != "columns":
        raise unrecognised(path, "exclusions", EXCLUDED_FORMATS)
    if not any(len(line.split()) == 2 for line in first_lines(path)):
        raise unrecognised(path, "exclusions", EXCLUDED_FORMATS)
    pairs = parsed(trec.located_lines(path, bad), trec.excluded, bad)
    for _, (query_id, doc_id) in required(pairs, path, "exclusion", bad):
        excluded.setdefault(query_id, set()).add(doc_id)
    return excluded


def _flat(items: Iterable[Located[list[R]]]) -> Iterator[Located[R]]:
    return chain.from_iterable(((where, record) for record in records) for where, records in items)


def _is_cranfield(path: Path | str) -> bool:
    return any(map(cranfield.is_row, first_lines(path)))


def _expect_two_columns(path: Path | str, noun: str, formats: Sequence[tuple[str, str]]) -> None:
    if not any(line.count("\t") == 1 for line in first_lines(path)):
        raise unrecognised(path, noun, formats)


def _elements(
    path: Path | str, name: str, bad: BadLines | None, noun: str, formats: Sequence[tuple[str, str]]
) -> Iterator[Located[str]]:
    if not any(f"<{name}" in line.lower() for line in first_lines(path)):
        raise unrecognised(path, noun, formats)
    return sgml.blocks(path, name, bad)


def _expect_one(
    first: Iterable[Located[Object]],
    parse: Callable[[Object], object],
    path: Path | str,
    noun: str,
    formats: Sequence[tuple[str, str]],
) -> None:
    """Refuse the file if none of its first objects can be read."""
    problem = "no readable object"
    for _, record in first:
        try:
            parse(record)
        except InputError as cause:
            problem = f"an object with the fields {named(record)} ({cause})"
        else:
            return
    raise unrecognised(path, noun, formats, problem)


def _refuse_fields(fields: Mapping[str, str] | None, layout: Layout, path: Path | str) -> None:
    if fields and layout not in ("json", "jsonl"):
        raise InputError(f"{path}: expected JSON objects, because names of fields were given, found another format")
