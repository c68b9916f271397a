"""The Cranfield collection as Solr tutorials hand it round: documents in JSON, queries and grades in CSV.

The document file is one object that repeats the key `add` for every document, which `json.load` silently reduces to
the last one. The body begins with the title; it is taken off, so that `Document.full_text` says it once. A row of
the CSV is the query followed by pairs of document id and grade; a query's id is the number of its row, from 1. Among
the first rows there must be a query of several words: that is what tells the format from other tables.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whyrank.datasets.formats import Located, excerpt, field_of, id_of, load_json, text_of
from whyrank.errors import InputError
from whyrank.records import Document, Qrel, Query
from whyrank.store import read_lines

__all__ = ["document", "is_row", "qrels", "query", "rows", "solr_adds"]

Pairs = list[tuple[str, Any]]


def solr_adds(path: Path | str) -> Iterator[Located[Any]]:
    """What each `add` holds, in order.

    Raises:
        InputError: the file is not JSON, or its object has other keys.
    """
    commands = load_json(path, hook=list)
    for number, (name, command) in enumerate(commands, start=1):
        if name != "add":
            raise InputError(f"{path}: expected only the key 'add', found {name!r}")
        yield f"{path}, document {number}", command


def document(command: Any) -> Document:
    """The document of one `add`.

    Raises:
        InputError: there is no `doc` with `id` and `body`.
    """
    fields = _fields(_fields(command).get("doc"))
    doc_id, body = id_of(field_of(fields, ("id",))), text_of(field_of(fields, ("body",)))
    title = text_of(fields.get("title", ""))
    return Document(doc_id, body.removeprefix(title).strip(), title)


def _fields(pairs: Any) -> dict[str, Any]:
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise InputError(f'expected {{"doc": {{"id": ..., "body": ...}}}}, found {excerpt(pairs)}')
    return dict(pairs)


def is_row(line: str) -> bool:
    """Whether a line is a query of several words followed by pairs of id and grade.

    Without the demand for words `1,d1,2` of any other table would be the query "1", known by the number of its row.
    """
    try:
        query_text = _row(line)[0]
    except InputError:
        return False
    return "\t" not in line and len(query_text.split()) > 1


def _row(line: str) -> list[str]:
    try:
        row = next(csv.reader([line], strict=True))
    except csv.Error as cause:
        raise InputError(f"expected comma-separated values, found {excerpt(line)} ({cause})") from cause
    if len(row) < 3 or len(row) % 2 == 0 or not all(_is_whole(grade) for grade in row[2::2]):
        raise InputError(f"expected a query and pairs of document id and whole grade, found {excerpt(line)}")
    return row


def _is_whole(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def rows(path: Path | str) -> Iterator[Located[tuple[str, str]]]:
    """`(query id, line)` for every line that is not blank.

    Raises:
        InputError: a line is not UTF-8. It is never skipped, because all ids after it would be wrong.
    """
    for row_number, (line_number, line) in enumerate(read_lines(path, advice="Mend the line"), start=1):
        yield f"{path}:{line_number}", (str(row_number), line)


def query(item: tuple[str, str]) -> Query:
    """The query of one row."""
    query_id, line = item
    return Query(query_id, _row(line)[0])


def qrels(item: tuple[str, str]) -> list[Qrel]:
    """The judgments of one row."""
    query_id, line = item
    row = _row(line)
    return [Qrel(query_id, id_of(doc_id), int(grade)) for doc_id, grade in zip(row[1::2], row[2::2], strict=True)]
