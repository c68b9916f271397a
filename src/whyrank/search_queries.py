"""Search queries in place of a question: what a model is asked, how its answer is read, and the loop around it.

Documents that answer a question often do not have its words: they name the cause, the principle, the method. A model
writes up to ten queries that do, and the first stage searches with them. The law that ties writing to reading, for all
`queries` as `normalised` gives them:

    parse(answer(queries)) == queries
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from whyrank.errors import OtherJob
from whyrank.generators import Completion, Generator, Request, Sampling, Segment, TextTokens
from whyrank.records import Query, SearchQueries
from whyrank.store import JsonlAppender, content_key
from whyrank.template import cut_end

__all__ = [
    "MAX_QUERIES",
    "PROMPT_VERSION",
    "QueryWriter",
    "WritingCounts",
    "answer",
    "normalised",
    "parse",
    "render",
    "write_into",
]

MAX_QUERIES: Final = 10
MAX_QUERY_TOKENS, MAX_WRITTEN_TOKENS = 1024, 256
LONGEST_QUERY: Final = 300  # characters; a longer line is prose
INSTRUCTION = """\
Write search queries that find documents which help to answer a question. Such documents often have other words than \
the question: they name its cause, the principle behind it, or the method that settles it.

Write at most ten queries of a few words each, one per line, each after a hyphen, and nothing else.

Question:
"""
BEGINNING = "Search queries:"
THINKING = ("<think>", "</think>")
PROMPT_VERSION: Final = f"search-queries@{content_key(INSTRUCTION, BEGINNING)[:8]}"
LISTED = re.compile(r"\s*(?:[-*•‣–]|\(?\d{1,2}[.):])\s+(?P<query>.*)")
QUOTES = ('""', "''", "“”", "‘’", "``", "**")


def normalised(queries: Iterable[str]) -> tuple[str, ...]:
    """Queries as they are kept: on one line each, none empty, longer than 300 characters, with a thinking tag in
    it, or there twice (whatever the case of its letters), and at most ten."""
    different: dict[str, str] = {}
    for query in queries:
        line = " ".join(query.split())
        if 0 < len(line) <= LONGEST_QUERY and not any(tag in line for tag in THINKING):
            different.setdefault(line.casefold(), line)
    return tuple(different.values())[:MAX_QUERIES]


def render(query: str, tokens: TextTokens, chat_options: Mapping[str, bool | str] = {}) -> tuple[Request, bool]:
    """The request for one question, and whether the question had to be cut (to 1,024 tokens)."""
    end = cut_end(query, MAX_QUERY_TOKENS, tokens)
    segments = (
        Segment("user", "instruction", INSTRUCTION),
        Segment("user", "query", query[:end]),
        Segment("assistant", "structure", BEGINNING),
    )
    request = Request(
        segments, (), "", (), sampling=Sampling(max_tokens=MAX_WRITTEN_TOKENS), chat_options=dict(chat_options)
    )
    return request, end < len(query)


def answer(queries: Sequence[str]) -> str:
    """What a model should have written behind the beginning of its answer."""
    return "".join(f"\n- {query}" for query in queries)


def parse(text: str, *, is_cut: bool = False) -> tuple[str, ...]:
    """The queries in an answer; none if it holds nothing that plainly is one.

    Lists with hyphens, bullets or numbers are read, and lines without such marks if no line has one; quotation marks
    around a query are taken off then, and a line that introduces the list is passed over. A thinking block before the
    list is dropped; one that was never closed makes the answer unreadable. With `is_cut` the last line is left out.
    """
    _, closed, rest = text.rpartition(THINKING[1])
    body = rest if closed else text
    if THINKING[0] in body:
        return ()
    lines = [line for line in body.split("\n") if line.strip()]
    lines = lines[:-1] if is_cut else lines
    listed = [found["query"] for line in lines if (found := LISTED.fullmatch(line))]
    if listed and all(line.startswith("- ") for line in lines):
        return normalised(listed)  # the answer's own form: nothing is taken off
    plain = [line for line in lines if not line.rstrip().endswith(":") and not line.startswith("```")]
    return normalised(_without_quotes(query.strip()) for query in listed or plain)


def _without_quotes(query: str) -> str:
    is_quoted = len(query) > 2 and query[0] + query[-1] in QUOTES
    return query.strip(query[0] + query[-1]) if is_quoted else query


# ---- the loop -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueryWriter:
    """A model that writes search queries."""

    generator: Generator
    chat_options: Mapping[str, bool | str] = field(default_factory=dict)

    def key(self, query: Query) -> str:
        """Content address of what it writes: everything that can change it, and nothing else."""
        options = json.dumps(dict(self.chat_options), sort_keys=True)
        return content_key(PROMPT_VERSION, self.generator.name, str(MAX_WRITTEN_TOKENS), options, query.text)

    def write(self, queries: Iterable[Query]) -> Iterator[SearchQueries]:
        """What it writes for each query, as soon as it is ready, in any order. Read as a stream."""
        under_way: dict[int, tuple[Query, bool]] = {}

        def requests() -> Iterator[Request]:
            for number, query in enumerate(queries):
                request, is_cut = render(query.text, self.generator.tokens, self.chat_options)
                under_way[number] = (query, is_cut)
                yield request

        for number, completion in self.generator.generate(requests()):
            yield self._read(*under_way.pop(number), completion)

    def _read(self, query: Query, is_query_cut: bool, completion: Completion) -> SearchQueries:
        is_cut = completion.finish_reason == "length"
        found = () if completion.error else parse(completion.text, is_cut=is_cut)
        status: Literal["ok", "forced", "unparsed", "error"] = "forced" if is_cut else "ok"
        if not found:
            status = "error" if completion.error else "unparsed"
        return SearchQueries(
            key=self.key(query),
            query_id=query.query_id,
            status=status,
            queries=found,
            is_query_cut=is_query_cut,
            num_prompt_tokens=completion.num_prompt_tokens,
            num_completion_tokens=completion.num_completion_tokens,
            prompt=PROMPT_VERSION,
            model=self.generator.name,
            unreadable=completion.text if status == "unparsed" else None,
            error=str(completion.error) if completion.error else None,
        )


@dataclass(slots=True)
class WritingCounts:
    """What became of the queries; `num_known` were in the file before."""

    num_known: int = 0
    num_new: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    num_completion_tokens: int = 0

    @property
    def num_unreadable(self) -> int:
        """Queries for which there is nothing to search with but themselves."""
        return self.statuses["unparsed"] + self.statuses["error"]

    def to_counts(self) -> dict[str, int]:
        """For a manifest."""
        counts = {"known": self.num_known, "new": self.num_new, "completion_tokens": self.num_completion_tokens}
        return {**counts, **{f"status.{status}": count for status, count in sorted(self.statuses.items())}}


def write_into(
    path: Path, writer: QueryWriter, queries: Sequence[Query], counts: WritingCounts
) -> Iterator[SearchQueries]:
    """Write search queries for every query that `path` does not hold yet, append each as it comes, and yield all.

    Failed requests are tried again. After a kill nothing is lost and nothing doubled.

    Raises:
        OtherJob: the file holds what was made otherwise for one of the queries.
        InputError: another process is writing the file, or it holds something else.
    """
    with JsonlAppender(path, SearchQueries) as appender:
        before = list(appender.existing())
        known = {found.query_id: found for found in before if found.status != "error"}
        for query in queries:
            found = known.get(query.query_id)
            if found is not None and found.key != writer.key(query):
                raise OtherJob(
                    f"{path} holds search queries for {query.query_id!r} by {found.model} with {found.prompt}, made "
                    "from another text, model or prompt; choose another output folder"
                )
        if len(known) < len(before):
            appender.rewrite(known.values())
        for query in queries:
            if query.query_id in known:
                counts.num_known += 1
                yield _counted(known[query.query_id], counts)
        for written in writer.write(query for query in queries if query.query_id not in known):
            appender.append(written)
            counts.num_new += 1
            yield _counted(written, counts)


def _counted(found: SearchQueries, counts: WritingCounts) -> SearchQueries:
    counts.statuses[found.status] += 1
    counts.num_completion_tokens += found.num_completion_tokens
    return found
