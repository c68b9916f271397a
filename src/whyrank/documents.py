"""Documents as people have them in Python: texts, mappings or records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from whyrank.errors import InputError
from whyrank.records import Document

__all__ = ["DocumentLike", "read_document", "read_documents"]

ID_FIELDS = ("doc_id", "id", "_id", "docid")
TEXT_FIELDS = ("text", "content", "contents", "body")
DocumentLike = str | Mapping[str, object] | Document
"""A text, a mapping with an id and a text, or a record."""


def read_documents(documents: Iterable[DocumentLike], fields: Mapping[str, str]) -> list[Document]:
    """Records of all documents that a user gave; `fields` names where a mapping keeps its id, text and title.

    Raises:
        InputError: there are none, or one of them cannot be read (see `read_document`).
    """
    if isinstance(documents, str | Mapping):
        raise InputError(f"expected a list of documents, found a single {type(documents).__name__}")
    unknown = sorted(set(fields) - {"doc_id", "text", "title"})
    if unknown:
        raise InputError(f"expected fields among doc_id, text and title, found {', '.join(unknown)}")
    records = [read_document(document, index, fields) for index, document in enumerate(documents)]
    if not records:
        raise InputError("expected at least one document to rank, found none")
    return records


def read_document(document: DocumentLike, index: int, fields: Mapping[str, str]) -> Document:
    """A record from what a user gave; a text or mapping without an id gets its position as id.

    Raises:
        InputError: it is none of these, a mapping lacks a text or a field that `fields` names, or the text is not a
            string.
    """
    if isinstance(document, Document):
        return document
    if isinstance(document, str):
        return Document(str(index), document)
    if not isinstance(document, Mapping):
        raise InputError(f"document {index}: expected a text, a mapping or a Document, found {type(document).__name__}")
    absent = sorted(name for name in fields.values() if name not in document)
    if absent:
        raise InputError(f"document {index}: no field {', '.join(absent)}, found the fields {sorted(document)}")
    text = _pick(document, fields.get("text"), TEXT_FIELDS)
    if not isinstance(text, str):
        names = fields.get("text") or ", ".join(TEXT_FIELDS)
        raise InputError(f"document {index}: expected a text under {names}, found the fields {sorted(document)}")
    doc_id = _pick(document, fields.get("doc_id"), ID_FIELDS)
    title = _pick(document, fields.get("title"), ("title",))
    return Document(str(index) if doc_id is None else str(doc_id), text, title="" if title is None else str(title))


def _pick(document: Mapping[str, object], name: str | None, names: Sequence[str]) -> object:
    return next((document[key] for key in ((name,) if name else names) if key in document), None)
