"""Stream the posts of a Stack Exchange dump (`Posts.xml`) with their links.

The format: one `row` element per post, everything in attributes, the body as HTML. `PostTypeId` 1 is a
question and 2 an answer; wiki excerpts, moderator nominations and the rest are counted and passed over.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from lxml import etree

from whyrank.errors import InputError
from whyrank.mining.html_text import Anchor, PlainText, plain_text
from whyrank.store import BadLines, open_binary

if TYPE_CHECKING:
    from lxml.etree import ParserTarget  # exists in the stubs only

__all__ = ["Link", "LinkKind", "Post", "licence_of", "links_of", "read_posts"]

LinkKind = Literal["anchor", "bare", "code"]
"""An `<a href>`, a URL written out in running text, or a URL inside code (a command, seldom a reference)."""

CHUNK = 1 << 16
QUESTION, ANSWER = "1", "2"
LICENCE_CHANGES = (("2011-04-08", "CC BY-SA 2.5"), ("2018-05-02", "CC BY-SA 3.0"))
LATEST_LICENCE = "CC BY-SA 4.0"
BARE_URL = re.compile(r"https?://[^\s<>\"'`|\\^{}]+", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n")
SHORT_PARAGRAPH = 80
"""A paragraph with a link and fewer characters than this says little: the one before it is taken too."""


@dataclass(frozen=True, slots=True)
class Link:
    """A link of a post as its author wrote it.

    `href` is raw (see `links.normalise`); `anchor` is the text it covers, empty for images; `sentence` and
    `paragraph` are the text around it, the link's own text included.
    """

    href: str
    kind: LinkKind
    anchor: str
    sentence: str
    paragraph: str


@dataclass(frozen=True, slots=True)
class Post:
    """A question or an answer. Ids are those of the dump; `created` is an ISO date and time (UTC).

    `parent_id` is an answer's question, `accepted_id` a question's accepted answer (empty: none). `author_id`
    is empty for a deleted account, whose name then stands in `author_name`.
    """

    post_id: str
    is_question: bool
    text: str
    title: str
    links: tuple[Link, ...]
    score: int
    parent_id: str
    accepted_id: str
    author_id: str
    author_name: str
    created: str
    licence: str
    is_licence_derived: bool


class _Rows:
    """Receives the parser's events (lxml calls these methods by name) and keeps only rows not yet drained."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        self.root = ""

    def doctype(self, name: str | None, public_id: str | None, system: str | None) -> None:
        raise _DoctypeFound

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.root = self.root or tag
        if tag == "row":
            self.rows.append(dict(attributes))

    def end(self, tag: str) -> None:
        """Nothing to do: a row is complete when it starts."""

    def close(self) -> None:
        """Nothing to give back: rows were drained while reading."""


class _DoctypeFound(Exception):
    """Leaves the parser before any entity of the document type could be used."""


def _rows(path: Path | str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield `(number, attributes)` of every row, from 1, in memory that does not grow."""
    target, number = _Rows(), 0
    # Not resolve_entities=False: libxml2 then leaves `&amp;` in attributes as `&#38;`, and bodies would be decoded
    # once too little. Without a document type there is no entity but XML's own five.
    parser = etree.XMLParser(
        target=cast("ParserTarget[None]", target), resolve_entities="internal", no_network=True, load_dtd=False
    )
    with open_binary(path) as stream:
        while True:
            chunk = stream.read(CHUNK)
            try:
                parser.feed(chunk) if chunk else parser.close()
            except _DoctypeFound as cause:
                raise InputError(
                    f"{path}: expected a dump without a document type, found a DOCTYPE; dumps have none, and it "
                    "could declare entities that fill the memory. Remove it if you trust the file."
                ) from cause
            except etree.XMLSyntaxError as cause:
                raise InputError(
                    f"{path}: expected well-formed XML, found near row {max(1, number + len(target.rows))}: {cause}. "
                    "Download or unpack the dump again."
                ) from cause
            for attributes in target.rows:
                number += 1
                yield number, attributes
            target.rows.clear()
            if not chunk:
                break
    if target.root != "posts":
        raise InputError(f"{path}: expected the root element <posts>, found <{target.root}>; give the dump's Posts.xml")


def read_posts(path: Path | str, *, counts: Counter[str] | None = None, bad: BadLines | None = None) -> Iterator[Post]:
    """Yield the questions and answers of a dump in file order; gzip is recognised, `-` is standard input.

    `counts` receives `posts.question`, `posts.answer`, `posts.skipped_type_N` and `posts.bad`.

    Raises:
        InputError: the XML is broken, has a DOCTYPE or another root, or a row is no post (missing `Id`, `Body`,
            `ParentId` of an answer, …). With `bad`, such rows are counted there and passed over; broken XML is
            always an error.
    """
    counts = Counter() if counts is None else counts
    for number, row in _rows(path):
        kind = row.get("PostTypeId")
        if kind is not None and kind not in (QUESTION, ANSWER):
            counts[f"posts.skipped_type_{kind}"] += 1
            continue
        try:
            post = _post(row)
        except ValueError as cause:
            message = f"{path}: row {number} (Id {row.get('Id', 'missing')}): {cause}"
            if bad is None:
                raise InputError(f"{message}. Mend the row, or pass --skip-bad to count and skip such rows.") from cause
            bad.add(message)
            counts["posts.bad"] += 1
            continue
        counts["posts.question" if post.is_question else "posts.answer"] += 1
        yield post


def _post(row: dict[str, str]) -> Post:
    is_question = _needed(row, "PostTypeId") == QUESTION
    post_id, created = _needed(row, "Id"), _needed(row, "CreationDate")
    if not post_id.isascii() or not post_id.isdigit():
        raise ValueError(f"expected a number as Id, found {post_id!r}")
    if not re.match(r"\d{4}-\d\d-\d\d", created):
        raise ValueError(f"expected an ISO date as CreationDate, found {created!r}")
    body = plain_text(_needed(row, "Body", may_be_empty=True))
    return Post(
        post_id=post_id,
        is_question=is_question,
        text=body.text,
        title=" ".join(_needed(row, "Title").split()) if is_question else "",
        links=tuple(links_of(body)),
        score=int(row.get("Score", "0")),
        parent_id="" if is_question else _needed(row, "ParentId"),
        accepted_id=row.get("AcceptedAnswerId", ""),
        author_id=row.get("OwnerUserId", ""),
        author_name=row.get("OwnerDisplayName", ""),
        created=created,
        licence=row.get("ContentLicense") or licence_of(created),
        is_licence_derived=not row.get("ContentLicense"),
    )


def _needed(row: dict[str, str], name: str, *, may_be_empty: bool = False) -> str:
    value = row.get(name)
    if value is None or not (value or may_be_empty):
        raise ValueError(f"expected the attribute {name}, found {'nothing' if value is None else 'an empty one'}")
    return value


def licence_of(created: str) -> str:
    """The licence under which a post of this ISO date was given; used where a row names none.

    CC BY-SA 2.5 before 2011-04-08, 3.0 before 2018-05-02, 4.0 since (stackoverflow.com/help/licensing).
    """
    day = created[:10]
    return next((licence for change, licence in LICENCE_CHANGES if day < change), LATEST_LICENCE)


def links_of(body: PlainText) -> Iterator[Link]:
    """Every link of a text: anchors in the order they end, then URLs written out."""
    for anchor in body.anchors:
        yield _link(body.text, anchor, "anchor")
    for match in BARE_URL.finditer(body.text):
        url = _without_punctuation(match[0])
        start, end = match.start(), match.start() + len(url)
        if any(anchor.start < end and start < anchor.end for anchor in body.anchors):
            continue
        is_code = any(first <= start < last for first, last in body.code)
        yield _link(body.text, Anchor(url, start, end), "code" if is_code else "bare")


def _without_punctuation(url: str) -> str:
    """Cut the punctuation of the sentence off; a closing bracket stays if the URL opened it."""
    while url[-1] in ".,;:!?*_)]":
        if (url[-1] == ")" and url.count("(") >= url.count(")")) or (
            url[-1] == "]" and url.count("[") >= url.count("]")
        ):
            break
        url = url[:-1]
    return url


def _paragraph_start(text: str, place: int) -> int:
    before = text.rfind("\n\n", 0, place)
    return before + 2 if before >= 0 else 0


def _link(text: str, anchor: Anchor, kind: LinkKind) -> Link:
    first = _paragraph_start(text, anchor.start)
    last = text.find("\n\n", anchor.end)
    last = len(text) if last < 0 else last
    breaks = [first, *(m.end() for m in SENTENCE_END.finditer(text, first, last)), last]
    begin = max(place for place in breaks if place <= anchor.start or place == first)
    end = min(place for place in breaks if place >= max(anchor.end, begin + 1) or place == last)
    if last - first < SHORT_PARAGRAPH and first > 0:
        first = _paragraph_start(text, first - 2)
    return Link(
        href=anchor.href,
        kind=kind,
        anchor=" ".join(text[anchor.start : anchor.end].split()),
        sentence=" ".join(text[begin:end].split()),
        paragraph=text[first:last].strip(),
    )
