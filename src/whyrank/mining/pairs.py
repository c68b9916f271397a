"""Put questions and the pages that their answers link to together.

The paper (arXiv 2504.03947) trains on questions and the web pages linked from their answers. Here the text of
those pages comes from a page store or from the dump itself; nothing is fetched and nothing silently stands in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from whyrank.errors import InputError
from whyrank.mining.config import MiningConfig
from whyrank.mining.corpus import (
    Attribution,
    Corpus,
    context_document,
    page_document,
    post_document,
    question_query,
)
from whyrank.mining.decontamination import Excluded
from whyrank.mining.links import absolute, drop_reason, normalise, onsite_post_id
from whyrank.mining.negatives import FirstStage, bm25, negative_pairs
from whyrank.mining.pages import PageStore
from whyrank.mining.stackexchange import Link, Post
from whyrank.records import Document, Pair, Query
from whyrank.store import content_key

__all__ = ["Mined", "Threads", "is_test", "mine", "usable_links"]

ENDS = ("to_post", "to_page", "to_context", "to_contaminated", "without_text")
"""Where a usable link can end; every usable link is counted under exactly one of them."""


@dataclass(frozen=True, slots=True)
class Mined:
    """What was mined: queries in the order of their post ids, documents in the order they were first linked."""

    queries: tuple[Query, ...]
    documents: tuple[Document, ...]
    pairs: tuple[Pair, ...]
    attributions: tuple[Attribution, ...]
    counts: Mapping[str, int]


@dataclass(slots=True)
class Threads:
    """The posts of a dump by id, and the answers of each question. Holds the whole dump's text in memory."""

    questions: dict[str, Post] = field(default_factory=dict)
    answers: dict[str, Post] = field(default_factory=dict)
    answers_of: dict[str, list[Post]] = field(default_factory=dict)

    @classmethod
    def collect(cls, posts: Iterable[Post], counts: Counter[str]) -> Threads:
        """Order the posts into threads; `counts` receives what was read and which links answers hold.

        Raises:
            InputError: two posts have the same id.
        """
        threads = cls()
        for post in posts:
            if post.post_id in threads.questions or post.post_id in threads.answers:
                raise InputError(f"expected every post once, found post {post.post_id} twice; give each dump once")
            if post.is_question:
                threads.questions[post.post_id] = post
                continue
            threads.answers[post.post_id] = post
            threads.answers_of.setdefault(post.parent_id, []).append(post)
            counts["answers.with_links"] += any(link.kind == "anchor" for link in post.links)
            counts["links"] += len(post.links)
            for link in post.links:
                counts[f"links.{link.kind}"] += 1
        counts["questions"], counts["answers"] = len(threads.questions), len(threads.answers)
        for question_id, answers in threads.answers_of.items():
            if question_id not in threads.questions:
                counts["answers.without_question"] += len(answers)
                counts["links.dropped.without_question"] += sum(len(answer.links) for answer in answers)
        return threads

    def question_of(self, post_id: str) -> Post | None:
        """The question that a post is, or belongs to; `None` if the dump does not hold it."""
        answer = self.answers.get(post_id)
        return self.questions.get(answer.parent_id if answer else post_id)

    def best_answer(self, question: Post) -> Post | None:
        """The accepted answer, else the one with most votes, else the oldest."""
        answers = self.answers_of.get(question.post_id, [])
        return min(
            answers,
            key=lambda answer: (answer.post_id != question.accepted_id, -answer.score, int(answer.post_id)),
            default=None,
        )


def usable_links(
    question: Post, answers: Iterable[Post], config: MiningConfig, counts: Counter[str]
) -> Iterator[tuple[Post, Link]]:
    """Yield `(answer, link)` for every link that may lead to a page; the others are counted by reason.

    Links relative to the site's root come out as absolute addresses.
    """
    answers = list(answers)
    own = {question.post_id, *(answer.post_id for answer in answers)}
    for answer in answers:
        seen: set[str] = set()
        for raw in answer.links:
            link = replace(raw, href=absolute(raw.href, config.hosts))
            reason = _drop_reason(answer, link, own, seen, config)
            if reason is None:
                counts["links.usable"] += 1
                yield answer, link
            else:
                counts[f"links.dropped.{reason}"] += 1


def _drop_reason(answer: Post, link: Link, own: Collection[str], seen: set[str], config: MiningConfig) -> str | None:
    if answer.score < config.min_answer_score:
        return "low_score"
    if link.kind == "code":
        return "code"
    reason = drop_reason(link.href, config.hosts)
    if reason is not None:
        return reason
    post_id = onsite_post_id(link.href, config.hosts)
    if post_id in own:
        return "self_link"
    target = post_id or normalise(link.href)
    if target in seen:
        return "repeated"
    seen.add(target)
    return None


class _Finder:
    """Finds the text behind links and remembers which documents came from which target."""

    def __init__(
        self, threads: Threads, clean: Collection[str], pages: PageStore, config: MiningConfig, counts: Counter[str]
    ) -> None:
        self.corpus = Corpus()
        self._threads, self._clean, self._pages = threads, clean, pages
        self._config, self._counts = config, counts
        self._ids_of_target: dict[str, set[str]] = {}

    def find(self, answer: Post, link: Link) -> str | None:
        """The id of the document behind a usable link; `None` if its text is not known or must not be used."""
        post_id = onsite_post_id(link.href, self._config.hosts)
        question = self._threads.question_of(post_id) if post_id else None
        if post_id and question and question.post_id not in self._clean:
            self._counts["links.to_contaminated"] += 1
            return None
        self._counts["links.onsite_missing"] += post_id is not None and question is None
        doc_id = self._post(post_id, question) if post_id and question else self._page(link)
        doc_id = doc_id or self._context(answer, link)
        if doc_id is None:
            self._counts["links.without_text"] += 1
        else:
            self._ids_of_target.setdefault(self._target(link) or "", set()).add(doc_id)
        return doc_id

    def _post(self, post_id: str, question: Post) -> str:
        answer = self._threads.answers.get(post_id) or self._threads.best_answer(question)
        self._counts["links.to_post"] += 1
        return self.corpus.add(*post_document(self._config.site, question, answer))

    def _page(self, link: Link) -> str | None:
        page = self._pages.get(link.href)
        if page is None:
            return None
        if len(page.text) < self._config.min_document_chars:
            self._counts["links.page_too_short"] += 1
            return None
        self._counts["links.to_page"] += 1
        return self.corpus.add(*page_document(page))

    def _context(self, answer: Post, link: Link) -> str | None:
        if self._config.without_page == "skip":
            return None
        if len(link.paragraph) < self._config.min_document_chars:
            self._counts["links.context_too_short"] += 1
            return None
        self._counts["links.to_context"] += 1
        return self.corpus.add(*context_document(self._config.site, answer, link, normalise(link.href)))

    def _target(self, link: Link) -> str | None:
        """One name for everything that a link may stand for: all answers of a question are one target."""
        post_id = onsite_post_id(link.href, self._config.hosts)
        question = self._threads.question_of(post_id) if post_id else None
        if question is not None:
            return question.post_id
        try:
            return normalise(absolute(link.href, self._config.hosts))
        except InputError:
            return None

    def own_documents(self, question: Post) -> set[str]:
        """Documents that hold the question itself, because another thread links to it."""
        site, answers = self._config.site, self._threads.answers_of.get(question.post_id, [])
        names = [f"{site}/q/{question.post_id}", *(f"{site}/a/{answer.post_id}" for answer in answers)]
        return {doc_id for name in names if (doc_id := self.corpus.known_id(name))}

    def mentioned_documents(self, question: Post) -> set[str]:
        """Documents behind any link of the thread, dropped links and the question's own links included."""
        posts = [question, *self._threads.answers_of.get(question.post_id, [])]
        targets = (self._target(link) for post in posts for link in post.links)
        return {doc_id for target in targets if target for doc_id in self._ids_of_target.get(target, ())}


def _evidence(site: str, question: Post, answer: Post) -> str:
    accepted = " accepted" if answer.post_id == question.accepted_id else ""
    return f"{site}/a/{answer.post_id} score={answer.score}{accepted}"


def mine(
    posts: Iterable[Post],
    pages: PageStore,
    config: MiningConfig,
    *,
    exclude_texts: Iterable[str] = (),
    first_stage: FirstStage = bm25,
    counts: Counter[str] | None = None,
) -> Mined:
    """Mine one dump: linked pairs with their evidence, then hard and random negatives.

    A question is kept if at least one usable link of its answers leads to a known text: a post of the same
    dump, a page of `pages`, or (with `without_page="context"`) the answer's words around the link. Questions
    that equal one of `exclude_texts` or share 13 words in a row with one are dropped, and so are links to them.
    `counts` may come in with what the reader counted.

    Raises:
        InputError: two posts have the same id.
    """
    counts = Counter() if counts is None else counts
    counts.update({f"links.{end}": 0 for end in ENDS})
    threads = Threads.collect(posts, counts)
    excluded = Excluded(exclude_texts)
    clean = {
        post_id
        for post_id, question in threads.questions.items()
        if not excluded.matches(question.title, question.text, f"{question.title} {question.text}")
    }
    counts["questions.contaminated"] = len(threads.questions) - len(clean)
    finder = _Finder(threads, clean, pages, config, counts)
    linked = dict(_linked(threads, finder, clean, config, counts))
    documents = tuple(finder.corpus.documents())
    queries, authors, banned = _queries(threads, finder, linked, config)
    negatives: dict[str, list[Pair]] = {query.query_id: [] for query in queries}
    for pair in negative_pairs(queries, documents, banned, config, first_stage, counts):
        negatives[pair.query_id].append(pair)
    counts["questions.kept"], counts["documents"] = len(queries), len(documents)
    counts["documents.merged"] = finder.corpus.num_merged
    counts["pairs.linked"] = sum(len(pairs) for pairs in linked.values())
    counts["pairs.negative"] = sum(len(pairs) for pairs in negatives.values())
    pairs = (pair for own in zip(linked.values(), negatives.values(), strict=True) for group in own for pair in group)
    return Mined(
        queries=queries,
        documents=documents,
        pairs=tuple(pairs),
        attributions=(*authors, *finder.corpus.attributions()),
        counts=dict(sorted(counts.items())),
    )


def _queries(
    threads: Threads, finder: _Finder, linked: Mapping[str, list[Pair]], config: MiningConfig
) -> tuple[tuple[Query, ...], tuple[Attribution, ...], dict[str, frozenset[str]]]:
    """The kept questions as queries, their authors, and per query id the documents that are no negatives."""
    queries, authors, banned = [], [], {}
    for question_id, pairs in linked.items():
        question, positive = threads.questions[question_id], {pair.doc_id for pair in pairs}
        own = finder.own_documents(question) - positive
        query, author = question_query(config.site, question, tuple(sorted(own)))
        queries.append(query)
        authors.append(author)
        banned[query.query_id] = frozenset(positive | own | finder.mentioned_documents(question))
    return tuple(queries), tuple(authors), banned


def _linked(
    threads: Threads, finder: _Finder, clean: Collection[str], config: MiningConfig, counts: Counter[str]
) -> Iterator[tuple[str, list[Pair]]]:
    """Yield `(question id, linked pairs)` of every question with at least one known page, by number."""
    for question_id in sorted(threads.questions, key=int):
        question, answers = threads.questions[question_id], threads.answers_of.get(question_id, [])
        if question_id not in clean:
            counts["links.dropped.contaminated"] += sum(len(answer.links) for answer in answers)
            continue
        evidence: dict[str, list[str]] = {}
        num_usable = 0
        for answer, link in usable_links(question, answers, config, counts):
            num_usable += 1
            doc_id = finder.find(answer, link)
            if doc_id is not None:
                evidence.setdefault(doc_id, []).append(_evidence(config.site, question, answer))
        counts["questions.without_usable_link"] += num_usable == 0
        counts["questions.without_text"] += num_usable > 0 and not evidence
        if evidence:
            query_id = f"{config.site}/q/{question_id}"
            yield (
                question_id,
                [Pair(query_id, doc_id, "linked", "; ".join(dict.fromkeys(why))) for doc_id, why in evidence.items()],
            )


def is_test(query_id: str, test_fraction: float) -> bool:
    """Whether a question belongs to the test split: its id alone decides, whatever else the dump holds."""
    return int(content_key("split", query_id), 16) < test_fraction * 16**32
