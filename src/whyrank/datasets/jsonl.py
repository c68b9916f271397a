"""Documents and queries as JSON objects: BEIR, BRIGHT, and whyrank's own records.

A document has an id (`doc_id`, `_id`, `id`, `docid`), a text (`text`, `contents`, `content`, `body`) and may have a
`title`. A query has an id (`query_id`, `_id`, `id`, `qid`) and a text (`text`, `query`); BRIGHT's `excluded_ids`
become `excluded_doc_ids`. Where an object has several of these names the first counts. Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whyrank.datasets.formats import field_of, id_of, listed, text_of
from whyrank.errors import InputError
from whyrank.records import Document, Qrel, Query

__all__ = ["document_parser", "gold_qrels", "own_qrel", "query_parser"]

DOCUMENT_NAMES: dict[str, tuple[str, ...]] = {
    "doc_id": ("doc_id", "_id", "id", "docid"),
    "text": ("text", "contents", "content", "body"),
    "title": ("title",),
    "source": ("source",),
    "licence": ("licence",),
}
QUERY_NAMES: dict[str, tuple[str, ...]] = {
    "query_id": ("query_id", "_id", "id", "qid"),
    "text": ("text", "query"),
    "excluded_doc_ids": ("excluded_doc_ids", "excluded_ids"),
}
NOTHING = "N/A"
"""What BRIGHT writes into a list of ids that is empty."""


def _names(
    known: Mapping[str, tuple[str, ...]], fields: Mapping[str, str] | None
) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """Where to look for each of our fields, and which were asked for and so must be there."""
    fields = fields or {}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise InputError(f"expected fields among {', '.join(known)}, found {', '.join(unknown)}")
    return {name: (fields[name],) if name in fields else names for name, names in known.items()}, frozenset(fields)


def _optional(record: Mapping[str, Any], names: Sequence[str], is_asked_for: bool) -> Any:
    if not is_asked_for and not any(name in record for name in names):
        return None
    return field_of(record, names)


def document_parser(fields: Mapping[str, str] | None) -> Callable[[dict[str, Any]], Document]:
    """Reads one object; `fields` maps our names to the file's own.

    Raises:
        InputError: `fields` names a field that documents do not have.
    """
    names, asked_for = _names(DOCUMENT_NAMES, fields)

    def parse(record: dict[str, Any]) -> Document:
        doc_id = id_of(field_of(record, names["doc_id"]))
        text = text_of(field_of(record, names["text"]))
        title = _optional(record, names["title"], "title" in asked_for)
        # Other people's `source` may be anything; only a text is what we mean by it.
        source, licence = (_optional(record, names[key], key in asked_for) for key in ("source", "licence"))
        return Document(
            doc_id,
            text,
            title="" if title is None else text_of(title),
            source=text_of(source) if isinstance(source, str) else "",
            licence=text_of(licence) if isinstance(licence, str) else "",
        )

    return parse


def query_parser(fields: Mapping[str, str] | None) -> Callable[[dict[str, Any]], Query]:
    """Reads one object; `fields` maps our names to the file's own.

    Raises:
        InputError: `fields` names a field that queries do not have.
    """
    names, asked_for = _names(QUERY_NAMES, fields)

    def parse(record: dict[str, Any]) -> Query:
        query_id = id_of(field_of(record, names["query_id"]))
        text = text_of(field_of(record, names["text"]))
        excluded = _optional(record, names["excluded_doc_ids"], "excluded_doc_ids" in asked_for)
        return Query(query_id, text, _ids(excluded))

    return parse


def _ids(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(dict.fromkeys(id_of(item) for item in listed(value) if item != NOTHING))


def gold_qrels(record: dict[str, Any]) -> list[Qrel]:
    """BRIGHT's `gold_ids` of one example, each with relevance 1."""
    query_id = id_of(field_of(record, QUERY_NAMES["query_id"]))
    return [Qrel(query_id, doc_id, 1) for doc_id in _ids(field_of(record, ("gold_ids",)))]


def own_qrel(record: dict[str, Any]) -> list[Qrel]:
    """A `Qrel` record as `store.write_jsonl` writes it."""
    relevance = field_of(record, ("relevance",))
    if not isinstance(relevance, int) or isinstance(relevance, bool):
        raise InputError(f"expected a whole number as relevance, found {relevance!r}")
    return [Qrel(id_of(field_of(record, ("query_id",))), id_of(field_of(record, ("doc_id",))), relevance)]
