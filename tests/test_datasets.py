"""Readers: every format, however it is wrapped, and every refusal."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from whyrank.datasets import (
    read_corpus,
    read_excluded,
    read_qrels,
    read_queries,
    read_rankgpt,
    read_run,
)
from whyrank.errors import InputError
from whyrank.records import Document, Qrel, Query, ScoredDocument
from whyrank.store import BadLines, write_jsonl


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write text or bytes to a new file."""
    numbers = iter(range(1000))

    def do(content: str | bytes, name: str = "") -> Path:
        path = tmp_path / (name or f"file{next(numbers)}")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return do


RANKGPT = [
    {
        "query": "flea life",
        "hits": [
            {"content": "one", "docid": "d1", "qid": 7, "score": 1.0},
            {"content": "two", "docid": 2, "qid": 7, "score": 3.5},
        ],
    }
]
SOLR = (
    '{"add": {"doc": {"id": 1, "title": "a wing .", "body": "a wing . it lifts"}},\n'
    ' "add": {"doc": {"id": 2, "title": "heat", "body": "cold"}}}'
)

CORPORA = {
    "beir": (
        '{"_id": "d1", "title": "T", "text": "one", "metadata": {}}\n{"_id": 2, "title": "", "text": "two"}\n',
        [Document("d1", "one", "T"), Document("2", "two")],
    ),
    "bright": ('{"id": "a/b c.txt", "content": "one"}\n', [Document("a/b c.txt", "one")]),
    "list": (
        '[{"docid": "d1", "contents": "one"},\n {"docid": "d2", "contents": ""}]',
        [Document("d1", "one"), Document("d2", "")],
    ),
    "one object on many lines": ('{\n "id": "d1",\n "text": "one"\n}', [Document("d1", "one")]),
    "sgml": (
        "<DOC>\n<DOCNO> d1 </DOCNO>\nsmall &amp; large\nbodies\n</DOC>\n"
        "<doc><docno>d2</docno><TITLE>T</TITLE><TEXT>x <b>y</b></TEXT></doc>\n",
        [Document("d1", "small & large\nbodies"), Document("d2", "x  y", "T")],
    ),
    "columns": ("d1\tone two\nd2\tthree\n", [Document("d1", "one two"), Document("d2", "three")]),
    "rankgpt": (json.dumps(RANKGPT), [Document("d1", "one"), Document("2", "two")]),
    "solr": (SOLR, [Document("1", "it lifts", "a wing ."), Document("2", "cold", "heat")]),
}
QUERIES = {
    "beir": (
        '{"_id": "q1", "text": "why", "metadata": {}}\n{"_id": "q2", "text": "how"}\n',
        [Query("q1", "why"), Query("q2", "how")],
    ),
    "bright": (
        '{"query": "why", "id": "0", "excluded_ids": ["N/A"], "gold_ids": ["d"]}\n'
        '{"query": "how", "id": "1", "excluded_ids": [], "gold_ids": ["d"]}\n'
        '{"query": "who", "id": "2", "excluded_ids": ["x", "y z"], "gold_ids": ["d"]}\n',
        [Query("0", "why"), Query("1", "how"), Query("2", "who", ("x", "y z"))],
    ),
    "topics": (
        "<top>\n<num>1</num><title>\nMICROWAVE &lt; GUIDES\n</title>\n</top>\n"
        "<top>\n<num> Number: 301\n<title> Topic: Organized Crime\n<desc> Description:\nlong\n</top>\n",
        [Query("1", "MICROWAVE < GUIDES"), Query("301", "Organized Crime")],
    ),
    "columns": (
        "156\tdo goldfish grow\n11\twhat, 2, is 3\n",
        [Query("156", "do goldfish grow"), Query("11", "what, 2, is 3")],
    ),
    "rankgpt": (json.dumps(RANKGPT), [Query("7", "flea life")]),
    "cranfield": (
        '"what, is lift","184","3","29","0"\n"heat","1","-1"\n',
        [Query("1", "what, is lift"), Query("2", "heat")],
    ),
}
QRELS = {
    "trec": ("q1 0 d1 2\nq1 0 d2 0\nq2 Q0 d1 -2\n", [Qrel("q1", "d1", 2), Qrel("q1", "d2", 0), Qrel("q2", "d1", -2)]),
    "tabs": ("q1\t0\td 1\t2\n", [Qrel("q1", "d 1", 2)]),
    "beir": ("query-id\tcorpus-id\tscore\nq1\td1\t1\n", [Qrel("q1", "d1", 1)]),
    "three columns": ("q1 d1 1\n", [Qrel("q1", "d1", 1)]),
    "repeated": ("q1 0 d1 1\nq1 0 d1 1\n", [Qrel("q1", "d1", 1)]),
    "bright": ('{"query": "why", "id": "0", "gold_ids": ["d2", "d1"]}\n', [Qrel("0", "d2", 1), Qrel("0", "d1", 1)]),
    "cranfield": (
        '"what, is lift","184","3","29","0"\n"heat","1","-1"\n',
        [Qrel("1", "184", 3), Qrel("1", "29", 0), Qrel("2", "1", -1)],
    ),
}
RUNS = {
    "trec": (
        "q1 Q0 d2 2 1.5 tag\nq1 Q0 d1 1 2.5 tag\nq2 Q0 d1 1 -1e3 tag\n",
        {"q1": [("d1", 2.5), ("d2", 1.5)], "q2": [("d1", -1000.0)]},
    ),
    "tabs": ("q1\tQ0\td1\t0\t2\ttag\n", {"q1": [("d1", 2.0)]}),
    "ids with spaces": ("q1 Q0 Memory Management_2.txt 1 0.5 tag\n", {"q1": [("Memory Management_2.txt", 0.5)]}),
    # Score first, then the rank that was given, then the id.
    "ties": (
        "q Q0 a 4 1.0 t\nq Q0 b 3 1.0 t\nq Q0 d 9 1.0 t\nq Q0 c 9 1.0 t\nq Q0 e 7 2.0 t\n",
        {"q": [("e", 2.0), ("b", 1.0), ("a", 1.0), ("c", 1.0), ("d", 1.0)]},
    ),
    "json": ('{\n"q1": {"b": 1, "c": 2.5, "a": 1}\n}', {"q1": [("c", 2.5), ("a", 1.0), ("b", 1.0)]}),
    "json on one line": ('{"q1": {"b": 1}, "q2": {"a": 2}}', {"q1": [("b", 1.0)], "q2": [("a", 2.0)]}),
    "rankgpt": (json.dumps(RANKGPT), {"7": [("2", 3.5), ("d1", 1.0)]}),
}


def as_pairs(run: dict[str, list[ScoredDocument]]) -> dict[str, list[tuple[str, float]]]:
    for query_id, documents in run.items():
        assert [scored.rank for scored in documents] == list(range(1, len(documents) + 1))
        assert {scored.query_id for scored in documents} <= {query_id}
    return {query_id: [(scored.doc_id, scored.score) for scored in documents] for query_id, documents in run.items()}


@pytest.mark.parametrize("name", CORPORA)
def test_corpus_formats(name: str, write: Callable[..., Path]) -> None:
    text, expected = CORPORA[name]
    assert list(read_corpus(write(text))) == expected


@pytest.mark.parametrize("name", QUERIES)
def test_queries_formats(name: str, write: Callable[..., Path]) -> None:
    text, expected = QUERIES[name]
    assert list(read_queries(write(text))) == expected


@pytest.mark.parametrize("name", QRELS)
def test_qrels_formats(name: str, write: Callable[..., Path]) -> None:
    text, expected = QRELS[name]
    assert read_qrels(write(text)) == expected


@pytest.mark.parametrize("name", RUNS)
def test_run_formats(name: str, write: Callable[..., Path]) -> None:
    text, expected = RUNS[name]
    assert as_pairs(read_run(write(text))) == expected


def wrappings(text: str) -> dict[str, bytes]:
    return {
        "gzip": gzip.compress(text.encode()),
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "CRLF": text.replace("\n", "\r\n").encode(),
        "blank lines": b"\n  \n" + text.replace("\n", "\n\n").encode() + b"\n\n",
        "no last newline": text.rstrip("\n").encode(),
        "all": gzip.compress(b"\xef\xbb\xbf\r\n" + text.replace("\n", "\r\n\r\n").encode()),
    }


@pytest.mark.parametrize("wrapping", wrappings(""))
def test_how_a_file_is_wrapped_changes_nothing(wrapping: str, write: Callable[..., Path]) -> None:
    for text, documents in CORPORA.values():
        assert list(read_corpus(write(wrappings(text)[wrapping]))) == documents
    for text, queries in QUERIES.values():
        assert list(read_queries(write(wrappings(text)[wrapping]))) == queries
    for text, qrels in QRELS.values():
        assert read_qrels(write(wrappings(text)[wrapping])) == qrels
    for text, run in RUNS.values():
        assert as_pairs(read_run(write(wrappings(text)[wrapping]))) == run


def test_own_records_are_read_back(tmp_path: Path) -> None:
    documents = [Document("d1", "text", "title", "source", "CC0"), Document("d2", "")]
    queries = [Query("q1", "why"), Query("q2", "how", ("d1", "d2"))]
    qrels = [Qrel("q1", "d1", 2), Qrel("q2", "d2", 0)]
    scored = [ScoredDocument("q1", "d1", 1, 0.1 + 0.2), ScoredDocument("q1", "d2", 2, -1e-17)]
    artefacts: dict[str, Sequence[object]] = {"d": documents, "q": queries, "r": qrels, "s": scored}
    for name, records in artefacts.items():
        write_jsonl(tmp_path / name, records)
    assert list(read_corpus(tmp_path / "d")) == documents
    assert list(read_queries(tmp_path / "q")) == queries
    assert read_qrels(tmp_path / "r") == qrels
    assert read_run(tmp_path / "s") == {"q1": scored}


def test_fields_name_what_the_file_calls_otherwise(write: Callable[..., Path]) -> None:
    path = write('{"pmid": 5, "abstract": "one", "name": "T", "text": "not this"}\n')
    fields = {"doc_id": "pmid", "text": "abstract", "title": "name"}
    assert list(read_corpus(path, fields=fields)) == [Document("5", "one", "T")]
    assert list(read_queries(path, fields={"query_id": "pmid", "text": "name"})) == [Query("5", "T")]
    with pytest.raises(InputError, match=r"expected fields among doc_id, text, title.*found body"):
        read_corpus(path, fields={"body": "abstract"})
    with pytest.raises(InputError, match="expected a field 'headline'"):
        read_corpus(path, fields={**fields, "title": "headline"})
    with pytest.raises(InputError, match="expected JSON objects, because names of fields"):
        read_corpus(write(CORPORA["columns"][0]), fields=fields)


def test_repeated_documents(write: Callable[..., Path]) -> None:
    line, other = '{"id": "d1", "text": "one"}\n', '{"id": "d1", "text": "two"}\n'
    assert list(read_corpus(write(line + line))) == [Document("d1", "one")]
    with pytest.raises(InputError, match=r":2: expected every document id once, found 'd1' again"):
        list(read_corpus(write(line + other)))
    bad = BadLines()
    assert list(read_corpus(write(line + other), bad=bad)) == [Document("d1", "one")]
    assert bad.count == 1


def test_skipping_bad_lines(write: Callable[..., Path]) -> None:
    path = write(
        b'{"_id": "d0", "te\n{"_id": "d1", "text": "one"}\n{"_id": "d2"}\n\xff\n[]\n{"_id": null, "text": "x"}\n'
    )
    bad = BadLines()
    assert list(read_corpus(path, bad=bad)) == [Document("d1", "one")]
    assert bad.count == 5  # torn, without a text, not UTF-8, not an object, without an id
    with pytest.raises(InputError, match=r":1: expected a JSON object.*--skip-bad"):
        list(read_corpus(path))
    bad = BadLines()
    run = read_run(write("q Q0 a 1 x t\nq Q0 b 2 1.5 t\nq Q0 b 3 1.0 t\nq Q0 c 4 nan t\n"), bad=bad)
    assert as_pairs(run) == {"q": [("b", 1.5)]}
    assert bad.count == 3
    with pytest.raises(
        InputError, match=r"expected at least one ranked document, found none .1 bad lines were skipped"
    ):
        read_run(write("q Q0 c 4 nan t\n"), bad=BadLines())


def test_skipping_is_advised_only_where_it_is_possible(write: Callable[..., Path]) -> None:
    # A row that is skipped would change the ids of all that follow.
    with pytest.raises(InputError, match=r":2: expected UTF-8 text, found .*\. Mend the line\.$"):
        read_qrels(write(b'"what is lift","184","3"\n"\xff","1","2"\n'), bad=BadLines())


@pytest.mark.parametrize(
    ("reader", "line"),
    [
        ("corpus", '{"_id": "d\\ud800", "text": "x"}'),
        ("corpus", '{"_id": "d", "text": "x \\ud800 y"}'),
        ("corpus", '{"_id": "d", "text": "x", "title": "\\udfff"}'),
        ("corpus", '{"_id": "d", "text": "x", "source": "\\ud800", "licence": ""}'),
        ("queries", '{"_id": "q", "text": "\\udc00\\ud800"}'),  # the wrong way round: no pair
        ("qrels", '{"query_id": "q", "doc_id": "\\ud800", "relevance": 1}'),
        ("run", '{"q": {"\\ud800": 1.5}}'),
    ],
)
def test_a_lone_surrogate_is_refused_where_it_stands(reader: str, line: str, write: Callable[..., Path]) -> None:
    whole = "\\ud83d\\ude00"  # a pair: one character, U+1F600
    good = line.replace("\\udc00\\ud800", whole).replace("\\udfff", whole).replace("\\ud800", whole)
    path = write(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=":2: expected text that UTF-8 can hold, found the lone surrogate"):
        list(READERS[reader](path))
    bad = BadLines()
    found = READERS[reader](path, bad=bad)
    assert "\U0001f600" in str(found if isinstance(found, dict) else list(found))
    assert bad.count == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "q Q0 a 1 2.0 t\nq Q0 a 2 1.0 t\n",
            r":2: expected every document once for a query, found document 'a' a second",
        ),
        ("q Q0 a 1 1_5 t\n", r":1: expected a finite number as score, found '1_5'"),
        ("q Q0 a 1 nan t\n", r":1: expected a finite number as score, found 'nan'"),
        ("q Q0 a 1 2.0 t\nq Q0 b 2 -inf t\n", r":2: expected a finite number as score, found '-inf'"),
        ("q Q0 a 1 2.0 t\nq Q0 b 2.0 1.0 t\n", r":2: expected a whole number as rank .column 4., found '2.0'"),
        ("q Q0 a 1 2.0 t\nq Q0 b 1.0 t\n", r":2: expected 'query_id Q0 doc_id rank score tag'"),
        ('{"q": {"a": NaN}}', "expected a finite number as score, found nan"),
        ('{"q": {"a": true}}', "expected a finite number as score, found True"),
        ('{"q": {"a": "1.5"}}', "expected a number as score, found the text '1.5'"),
        ('{"q": {"a": 1, "a": 2}}', "expected every key of an object once, found 'a' twice"),
        ('{\n"q": {"a": 1}, "q": {"b": 2}}', "expected every key of an object once, found 'q' twice"),
        (
            '[{"query": "x", "hits": [{"docid": "a", "qid": 1}, {"docid": "a", "qid": 1}]}]',
            "found document 'a' a second",
        ),
        (
            '[{"query": "x", "hits": [{"docid": "a", "qid": 1, "score": 1}, {"docid": "b", "qid": 1}]}]',
            "'score' in all hits",
        ),
        (
            '[{"query": "x", "hits": [{"docid": "a", "qid": 1}, {"docid": "b", "qid": 2}]}]',
            "expected one qid in all hits",
        ),
        ('[{"query": "x", "hits": []}]', "expected hits, each an object"),
    ],
)
def test_runs_that_are_refused(text: str, problem: str, write: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=problem):
        read_run(write(text))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("q 0 d 1\nq 0 d 2\n", r":2: expected every pair once, found \('q', 'd'\) again"),
        ("q 0 d 1\nq 0 d 1.0\n", r":2: expected a whole number as relevance, found '1.0'"),
        ("q 0 d 1\nq 0 d e 1\n", r":2: expected 'query_id 0 doc_id relevance'.*found 5 columns"),
        ('{"query_id": "q", "doc_id": "d", "relevance": true}', "expected a whole number as relevance, found True"),
        ("query-id\tcorpus-id\tscore\n", "Accepted formats"),
        # Not Cranfield's rows, which begin with a query: its ids would be row numbers, here 1, 2 and 3.
        ("1,d1,2\n1,d2,0\n2,d3,1\n", r"(?s): expected qrels, .*: put tabs in place of the commas.*Accepted formats"),
        ("query-id,corpus-id,score\nq1,d1,2\n", "put tabs in place of the commas"),
    ],
)
def test_qrels_that_are_refused(text: str, problem: str, write: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=problem):
        read_qrels(write(text))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<DOC>\nno number\n</DOC>", r":1: expected <DOCNO>id</DOCNO>"),
        ("<DOC>\n<DOCNO>1</DOCNO>\nx\n", r":1: expected </doc> before the end of the file"),
        ("<DOC>\n<DOCNO>1</DOCNO>\nx\n<DOC>\n<DOCNO>2</DOCNO></DOC>", r":4: expected </doc> for line 1"),
        ("<DOC><DOCNO>1</DOCNO>x</DOC> stray\n", r":1: expected <doc>, found ' stray'"),
        ('{"add": {"doc": {"id": 1, "body": "x"}}, "commit": {}}', "expected only the key 'add', found 'commit'"),
        ('{"add": {"doc": {"id": 1}}}', "document 1: expected a field 'body'"),
        ('{"id": "d1", "text": "x", "title": 5}', "expected a text, found 5"),
        ("d1\tx\nd2\tx\ty\n", r":2: expected document id and text in two columns"),
    ],
)
def test_corpora_that_are_refused(text: str, problem: str, write: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=problem):
        list(read_corpus(write(text)))


READERS: dict[str, Callable[..., Iterable[object]]] = {
    "corpus": read_corpus,
    "queries": read_queries,
    "qrels": read_qrels,
    "run": read_run,
    "excluded": read_excluded,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "text", ["prose, and nothing else", '{"name": "x"}', "<html></html>", '"some quoted text"', "[1, 2]", "{}"]
)
def test_what_fits_no_format_is_refused_with_the_list_of_formats(
    reader: str, text: str, write: Callable[..., Path]
) -> None:
    with pytest.raises(InputError, match=r"(?s)Accepted formats:\n  \S|expected a JSON object, found 1|at least one"):
        list(READERS[reader](write(text)))


@pytest.mark.parametrize("reader", READERS)
def test_files_without_content_are_refused(reader: str, write: Callable[..., Path]) -> None:
    for content in (b"", b"\n \r\n", b"\xef\xbb\xbf", gzip.compress(b"")):
        with pytest.raises(InputError, match="found no line that is not blank"):
            list(READERS[reader](write(content)))
    with pytest.raises(InputError, match="found nothing"):
        list(READERS[reader]("no such file"))
    with pytest.raises(InputError, match="expected a file, found '-'"):
        list(READERS[reader]("-"))


def test_one_kind_of_file_is_not_taken_for_another(write: Callable[..., Path]) -> None:
    """Every text above, given to the wrong reader, is refused or holds what that reader names."""
    for text, _ in QRELS.values():
        with pytest.raises(InputError):
            read_run(write(text))
    for name in ("trec", "ties", "json", "ids with spaces"):
        for reader in ("corpus", "queries", "qrels", "excluded"):
            with pytest.raises(InputError):
                list(READERS[reader](write(RUNS[name][0])))
    for name in ("topics", "columns"):
        for reader in ("qrels", "run", "excluded"):
            with pytest.raises(InputError):
                list(READERS[reader](write(QUERIES[name][0])))


def test_rankgpt_whole(write: Callable[..., Path]) -> None:
    queries, documents, run = read_rankgpt(write(json.dumps(RANKGPT)))
    assert queries == [Query("7", "flea life")]
    assert documents == [Document("d1", "one"), Document("2", "two")]
    assert as_pairs(run) == {"7": [("2", 3.5), ("d1", 1.0)]}
    as_lines = "\n".join(json.dumps(record) for record in RANKGPT)
    assert read_rankgpt(write(as_lines)) == (queries, documents, run)
    assert read_rankgpt(write(json.dumps(RANKGPT[0], indent=2))) == (queries, documents, run)


def test_rankgpt_order_without_scores(write: Callable[..., Path]) -> None:
    def hits(**columns: list[int]) -> str:
        rows = [
            {"content": d, "docid": d, "qid": "q", **{k: v[i] for k, v in columns.items()}} for i, d in enumerate("abc")
        ]
        return json.dumps({"query": "x", "hits": rows})

    assert as_pairs(read_run(write(hits()))) == {"q": [("a", 3.0), ("b", 2.0), ("c", 1.0)]}
    assert as_pairs(read_run(write(hits(rank=[2, 3, 1])))) == {"q": [("c", 3.0), ("a", 2.0), ("b", 1.0)]}
    assert as_pairs(read_run(write(hits(rank=[1, 3, 2], score=[5, 5, 9])))) == {
        "q": [("c", 9.0), ("a", 5.0), ("b", 5.0)]
    }


def test_excluded(write: Callable[..., Path]) -> None:
    assert read_excluded(write("0 d1\n0\td2\n1 d1\n")) == {"0": {"d1", "d2"}, "1": {"d1"}}
    assert read_excluded(write(QUERIES["bright"][0])) == {"2": {"x", "y z"}}
    nothing = '{"query": "why", "id": "0", "excluded_ids": ["N/A"]}\n'
    assert read_excluded(write(nothing)) == {}
