"""TREC's text files: qrels and runs, read and written; also two columns with queries, documents or exclusions.

Columns are separated by tabs where a line has tabs, else by white space. A run's line is
`query_id Q0 doc_id rank score tag`: the first two and the last three columns are fixed, so that a document id with
spaces in it (BRIGHT's stackoverflow has them) is still read whole. It cannot be written: other tools would
misread it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

from whyrank.datasets.formats import Located, excerpt, finite, id_of
from whyrank.datasets.runs import Run, strictly_decreasing
from whyrank.errors import InputError
from whyrank.records import Document, Qrel, Query, ScoredDocument
from whyrank.store import BadLines, atomic_path, read_lines

__all__ = [
    "columns_of",
    "document",
    "excluded",
    "is_qrels_header",
    "is_qrels_line",
    "is_run_line",
    "located_lines",
    "qrel",
    "query",
    "scored_document",
    "write_json_run",
    "write_run",
    "write_trec_qrels",
    "write_trec_run",
]


def located_lines(path: Path | str, bad: BadLines | None) -> Iterator[Located[str]]:
    """Every line that is not blank."""
    for number, line in read_lines(path, bad=bad):
        yield f"{path}:{number}", line


def columns_of(line: str) -> list[str]:
    """The columns of a line, separated by tabs if there is one."""
    return [column.strip() for column in line.split("\t")] if "\t" in line else line.split()


def is_qrels_header(line: str) -> bool:
    """Whether a line names columns, as BEIR's `query-id corpus-id score` does."""
    columns = columns_of(line)
    return len(columns) in (3, 4) and columns[0] in ("query-id", "query_id", "qid") and not _is_whole(columns[-1])


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def qrel(line: str) -> list[Qrel]:
    """The judgment of a line with three or four columns.

    Raises:
        InputError: the line has other columns, or the relevance is not a whole number.
    """
    columns = columns_of(line)
    if len(columns) not in (3, 4):
        raise InputError(
            f"expected 'query_id 0 doc_id relevance' or 'query_id doc_id relevance', found {len(columns)} columns: "
            f"{excerpt(line)}"
        )
    if not _is_whole(columns[-1]):
        raise InputError(f"expected a whole number as relevance, found {columns[-1]!r}")
    return [Qrel(id_of(columns[0]), id_of(columns[-2]), int(columns[-1]))]


def scored_document(line: str) -> ScoredDocument:
    """One line of a run.

    Raises:
        InputError: there are too few columns, the rank is not a whole number or the score not a finite number.
    """
    beginning = line.split(None, 2)
    ending = beginning[-1].rsplit(None, 3)
    if len(beginning) != 3 or len(ending) != 4:
        raise InputError(f"expected 'query_id Q0 doc_id rank score tag', found {excerpt(line)}")
    doc_id, rank, score, _ = ending
    if not _is_whole(rank):
        raise InputError(f"expected a whole number as rank (column 4), found {rank!r} in {excerpt(line)}")
    return ScoredDocument(beginning[0], doc_id, int(rank), finite(score))


def _two(line: str, what: str) -> tuple[str, str]:
    columns = line.split("\t")
    if len(columns) != 2:
        raise InputError(f"expected {what} in two columns with one tab between, found {excerpt(line)}")
    return id_of(columns[0].strip()), columns[1].strip()


def query(line: str) -> Query:
    """`query_id<tab>text`."""
    return Query(*_two(line, "query id and text"))


def document(line: str) -> Document:
    """`doc_id<tab>text`."""
    return Document(*_two(line, "document id and text"))


def excluded(line: str) -> tuple[str, str]:
    """`query_id doc_id`, with a tab or spaces between.

    Raises:
        InputError: there are not exactly two words; a longer line may be anything, a query for instance.
    """
    words = line.split()
    if len(words) != 2:
        raise InputError(f"expected 'query_id doc_id', found {len(words)} words: {excerpt(line)}")
    return words[0], words[1]


def is_run_line(line: str) -> bool:
    """Whether a line has a run's columns, whatever its score may be."""
    words = line.split()
    return len(words) >= 6 and _is_whole(words[-3])


def is_qrels_line(line: str) -> bool:
    """Whether a line has the columns of qrels."""
    columns = columns_of(line)
    return len(columns) in (3, 4) and _is_whole(columns[-1])


@contextmanager
def _writing(path: Path | str) -> Iterator[TextIO]:
    with atomic_path(path) as temporary:
        opener = gzip.open if str(path).endswith(".gz") else open
        with cast(TextIO, opener(temporary, "wt", encoding="utf-8", newline="\n")) as stream:
            yield stream


def _column(value: str, noun: str, advice: str) -> str:
    if value.split() != [value]:
        raise InputError(
            f"expected a {noun} without white space, which TREC files cannot hold, found {value!r}. {advice}"
        )
    return value


def write_trec_run(path: Path | str, run: Run, tag: str) -> int:
    """Write `query_id Q0 doc_id rank score tag` lines atomically (gzip if the name ends in `.gz`); returns how many.

    Scores are written so that they read back as the same float64. Where neighbours are tied, or differ by less than a
    32-bit float can tell, the lower one is written slightly lower (see `runs.strictly_decreasing`), because every
    tool orders ties in its own way and the order of the file is what was meant.

    Raises:
        InputError: an id or the tag contains white space, or scores do not decrease with rank.
    """
    num_written = 0
    tag = _column(tag, "tag", "Use another tag.")
    with _writing(path) as stream:
        for query_id, documents in run.items():
            query_id = _column(query_id, "query id", "Write a JSON run: a path that ends in .json.")
            scores = strictly_decreasing([scored.score for scored in documents])
            for rank, (scored, score) in enumerate(zip(documents, scores, strict=True), start=1):
                doc_id = _column(scored.doc_id, "document id", "Write a JSON run: a path that ends in .json.")
                stream.write(f"{query_id} Q0 {doc_id} {rank} {score!r} {tag}\n")
                num_written += 1
    return num_written


def write_json_run(path: Path | str, run: Run) -> int:
    """Write `{query_id: {doc_id: score}}` atomically, scores as in `write_trec_run`; returns the number of documents.

    Holds any id, also those with white space.

    Raises:
        InputError: scores do not decrease with rank.
    """
    scores = {
        query_id: dict(
            zip(
                (scored.doc_id for scored in documents),
                strictly_decreasing([scored.score for scored in documents]),
                strict=True,
            )
        )
        for query_id, documents in run.items()
    }
    with _writing(path) as stream:
        stream.write(json.dumps(scores, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return sum(map(len, scores.values()))


def write_run(path: Path | str, run: Run, tag: str) -> int:
    """`write_json_run` if the name ends in `.json` or `.json.gz`, else `write_trec_run`."""
    if str(path).removesuffix(".gz").endswith(".json"):
        return write_json_run(path, run)
    return write_trec_run(path, run, tag)


def write_trec_qrels(path: Path | str, qrels: Iterable[Qrel]) -> int:
    """Write `query_id 0 doc_id relevance` lines atomically (gzip if the name ends in `.gz`); returns how many.

    Columns are separated by tabs, as in BRIGHT's own files, so that `read_qrels` reads document ids with spaces.

    Raises:
        InputError: an id contains white space.
    """
    num_written = 0
    with _writing(path) as stream:
        for judged in qrels:
            query_id = _column(judged.query_id, "query id", "Rename it.")
            doc_id = _column(judged.doc_id, "document id", "Use `store.write_jsonl`, whose records `read_qrels` reads.")
            stream.write(f"{query_id}\t0\t{doc_id}\t{judged.relevance}\n")
            num_written += 1
    return num_written
