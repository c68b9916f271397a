"""TREC SGML: documents between `<DOC>` and `</DOC>`, topics between `<top>` and `</top>`.

A document's text is what its `<TEXT>` elements hold, or, where there are none, everything after `<DOCNO>` that is
not a title; the title is `<TITLE>`, `<HEADLINE>` or `<HL>`. A topic's text is its title. Other tags are taken out,
character references are resolved, and tag names may be written in either case.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from whyrank.datasets.formats import Located, excerpt, reject
from whyrank.errors import InputError
from whyrank.records import Document, Query
from whyrank.store import BadLines, read_lines

__all__ = ["blocks", "document", "topic"]

TAG = re.compile(r"</?[A-Za-z][^<>]*>")
DOCNO = re.compile(r"<DOCNO>(.*?)</DOCNO>", re.IGNORECASE | re.DOTALL)
TITLE = re.compile(r"<(TITLE|HEADLINE|HL)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
TEXT = re.compile(r"<TEXT>(.*?)</TEXT>", re.IGNORECASE | re.DOTALL)
NUMBER = re.compile(r"<num>(?:\s*Number:)?\s*([^<]*)", re.IGNORECASE)
TOPIC_TITLE = re.compile(r"<title>(?:\s*Topic:)?\s*([^<]*)", re.IGNORECASE)


def blocks(path: Path | str, name: str, bad: BadLines | None) -> Iterator[Located[str]]:
    """What stands inside each element `name`, with the line on which it begins.

    Raises:
        InputError: text stands outside of the elements, or one is not closed.
    """
    opening = re.compile(rf"<{name}(?:\s[^>]*)?>", re.IGNORECASE)
    closing = re.compile(rf"</{name}\s*>", re.IGNORECASE)
    held: list[str] | None = None
    start = 0
    for number, line in read_lines(path, bad=bad):
        if held is not None and "<" not in line:  # nearly every line
            held.append(line)
            continue
        for piece in re.split(rf"(?i)(?<=</{name}>)", line):
            begin = opening.search(piece)
            outside = piece[: begin.start()] if begin else piece
            if held is None and TAG.sub("", outside).strip():
                reject(f"{path}:{number}: expected <{name}>, found {excerpt(outside)}", bad)
            if begin:
                if held is not None:
                    reject(f"{path}:{number}: expected </{name}> for line {start}, found another <{name}>", bad)
                held, start = [], number
                piece = piece[begin.end() :]
            if held is None:
                continue
            held.append(piece)
            if closing.search(piece):
                yield f"{path}:{start}", closing.split("\n".join(held), maxsplit=1)[0]
                held = None
    if held is not None:
        reject(f"{path}:{start}: expected </{name}> before the end of the file, found none", bad)


def _plain(markup: str) -> str:
    return html.unescape(TAG.sub(" ", markup)).strip()


def document(block: str) -> Document:
    """The document of one `<DOC>` block.

    Raises:
        InputError: it has no `<DOCNO>`.
    """
    number = DOCNO.search(block)
    if number is None or not number[1].strip():
        raise InputError(f"expected <DOCNO>id</DOCNO> in the document, found {excerpt(block.strip())}")
    rest = block[: number.start()] + block[number.end() :]
    title = " ".join(_plain(match[2]) for match in TITLE.finditer(rest))
    bodies = TEXT.findall(rest)
    text = "\n".join(map(_plain, bodies)) if bodies else _plain(TITLE.sub(" ", rest))
    return Document(number[1].strip(), text, title)


def topic(block: str) -> Query:
    """The topic of one `<top>` block.

    Raises:
        InputError: its number or its title is missing.
    """
    number, title = NUMBER.search(block), TOPIC_TITLE.search(block)
    if number is None or not number[1].strip() or title is None:
        raise InputError(f"expected <num>id</num> and <title>text in the topic, found {excerpt(block.strip())}")
    return Query(number[1].strip(), html.unescape(title[1]).strip())
