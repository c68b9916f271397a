"""The documents that questions are paired with, and who wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict

from whyrank.mining.links import normalise
from whyrank.mining.pages import Page
from whyrank.mining.stackexchange import Link, Post
from whyrank.records import Document, Query
from whyrank.store import content_key

__all__ = ["Attribution", "Corpus", "context_document", "page_document", "post_document", "question_query"]

POINTING_WORDS = frozenset({"", "here", "this", "link", "source", "article", "this article", "this link", "this page"})
"""Anchor texts that say nothing about the page, and so make no title."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """Who wrote a part of a query or document, and under which licence.

    `author_id` is the site's user id (profile: https://SITE/users/ID), empty for deleted accounts and for web
    pages. `is_licence_derived`: the dump named none; the date of the post decided.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    record_id: str
    role: Literal["query", "document"]
    site: str
    post_id: str
    author_id: str
    author_name: str
    licence: str
    is_licence_derived: bool
    url: str


def _of_post(record_id: str, role: Literal["query", "document"], site: str, post: Post) -> Attribution:
    return Attribution(
        record_id=record_id,
        role=role,
        site=site,
        post_id=post.post_id,
        author_id=post.author_id,
        author_name=post.author_name,
        licence=post.licence,
        is_licence_derived=post.is_licence_derived,
        url=f"https://{site}/{'q' if post.is_question else 'a'}/{post.post_id}",
    )


def question_query(site: str, question: Post, excluded_doc_ids: tuple[str, ...]) -> tuple[Query, Attribution]:
    """The question as a query: title, then body."""
    query_id = f"{site}/q/{question.post_id}"
    text = f"{question.title}\n\n{question.text}".strip()
    return Query(query_id, text, excluded_doc_ids), _of_post(query_id, "query", site, question)


def _licence(*posts: Post) -> str:
    named = (post.licence + (" (derived from the post's date)" if post.is_licence_derived else "") for post in posts)
    return "; ".join(dict.fromkeys(named))


def post_document(site: str, question: Post, answer: Post | None) -> tuple[Document, list[Attribution]]:
    """A question with one of its answers, as a document; the question alone if it has none."""
    posts = [question] if answer is None else [question, answer]
    last = posts[-1]
    doc_id = f"{site}/{'q' if last.is_question else 'a'}/{last.post_id}"
    document = Document(
        doc_id=doc_id,
        text="\n\n".join(post.text for post in posts if post.text),
        title=question.title,
        source=f"https://{doc_id}",
        licence=_licence(*posts),
    )
    return document, [_of_post(doc_id, "document", site, post) for post in posts]


def page_document(page: Page) -> tuple[Document, list[Attribution]]:
    """A stored page as a document; its licence is what the store says, empty if unknown."""
    url = normalise(page.url)
    doc_id = f"page/{content_key(url)[:16]}"
    host = urlsplit(url).hostname or ""
    attribution = Attribution(doc_id, "document", host, "", "", "", page.licence, False, page.url)
    return Document(doc_id, page.text, page.title, page.url, page.licence), [attribution]


def context_document(site: str, answer: Post, link: Link, url: str) -> tuple[Document, list[Attribution]]:
    """What an answer says around a link, where the page itself is not known; `source` says so."""
    doc_id = f"{site}/a/{answer.post_id}/{content_key(url)[:8]}"
    is_title = link.anchor.casefold() not in POINTING_WORDS and "://" not in link.anchor
    document = Document(
        doc_id=doc_id,
        text=link.paragraph,
        title=link.anchor if is_title else "",
        source=f"link-context:{url}",
        licence=_licence(answer),
    )
    return document, [_of_post(doc_id, "document", site, answer)]


class Corpus:
    """Documents in the order they came; the same text is the same document, whatever its address."""

    def __init__(self) -> None:
        self.num_merged = 0
        self._documents: dict[str, Document] = {}
        self._id_of_text: dict[str, str] = {}
        self._id_of: dict[str, str] = {}
        self._attributions: dict[tuple[str, str, str], Attribution] = {}

    def add(self, document: Document, attributions: list[Attribution]) -> str:
        """Take a document in and return the id under which its text is known."""
        if document.doc_id in self._id_of:
            return self._id_of[document.doc_id]
        key = content_key(" ".join(document.text.split()))
        doc_id = self._id_of_text.setdefault(key, document.doc_id)
        self._id_of[document.doc_id] = doc_id
        self.num_merged += doc_id != document.doc_id
        self._documents.setdefault(doc_id, document)
        for one in attributions:
            self._attributions.setdefault((doc_id, one.url, one.post_id), replace(one, record_id=doc_id))
        return doc_id

    def known_id(self, doc_id: str) -> str | None:
        """The id under which a document was taken in; `None` if it was not."""
        return self._id_of.get(doc_id)

    def documents(self) -> Iterator[Document]:
        """All documents, each once."""
        return iter(self._documents.values())

    def attributions(self) -> Iterator[Attribution]:
        """Who wrote them; a merged document names every source."""
        return iter(self._attributions.values())
