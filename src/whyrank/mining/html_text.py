"""HTML to plain text, with links and code remembered by their place in that text.

The parser feeds events and no tree is built: nesting may be as deep as it likes and memory follows the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from lxml import etree

if TYPE_CHECKING:
    from lxml.etree import ParserTarget  # exists in the stubs only

__all__ = ["Anchor", "PlainText", "main_text", "plain_text"]

INVISIBLE = frozenset({"script", "style", "template", "head", "noscript", "iframe", "svg", "object"})
PAGE_CHROME = frozenset({"nav", "footer", "aside", "form", "button", "select", "dialog", "menu"})
PARAGRAPHS = frozenset(
    {"p", "div", "pre", "blockquote", "ul", "ol", "dl", "table", "section", "article", "main", "header", "hr"}
    | {"h1", "h2", "h3", "h4", "h5", "h6", "figure", "figcaption", "address", "details", "summary", "body"}
)
LINES = frozenset({"li", "tr", "dt", "dd", "br", "caption", "option"})
CELLS = frozenset({"td", "th"})
MAIN_PARTS = frozenset({"main", "article"})
SHARE_OF_MAIN = 0.25
"""A `main` or `article` with less of the visible text than this is a teaser, not the page."""

STRENGTH = {"": 0, " ": 1, "\n": 2, "\n\n": 3}


@dataclass(frozen=True, slots=True)
class Anchor:
    """A link and the characters `[start, end)` of the text that it covers; an image link covers none."""

    href: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PlainText:
    """What a reader sees, paragraphs apart by a blank line.

    `code` and `main` are character spans `[start, end)` of `text`: preformatted or code text, and the parts
    that the page itself calls its main part or an article.
    """

    text: str
    title: str = ""
    anchors: tuple[Anchor, ...] = ()
    code: tuple[tuple[int, int], ...] = ()
    main: tuple[tuple[int, int], ...] = ()


class _Writer:
    """Joins pieces of text with the strongest separator asked for between them."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.length = 0
        self.separator = ""
        self._is_after_bullet = False

    def separate(self, separator: str) -> None:
        """Ask for `separator` before the next text; a bullet keeps its text beside it."""
        if not self._is_after_bullet and STRENGTH[separator] > STRENGTH[self.separator]:
            self.separator = separator

    def flow(self, text: str) -> None:
        """Write running text: any white space is one blank."""
        if text[:1].isspace():
            self.separate(" ")
        words = text.split()
        if words:
            self._write(" ".join(words))
            if text[-1:].isspace():
                self.separate(" ")

    def verbatim(self, text: str) -> None:
        """Write preformatted text as it stands, but for line ends before its first line."""
        text = text.replace("\r\n", "\n")
        if self.separator or not self.length:
            text = text.lstrip("\n")
        if text:
            self._write(text)

    def end_verbatim(self) -> None:
        """Take back the white space at the end of preformatted text."""
        while self.parts and not self.parts[-1].strip():
            self.length -= len(self.parts.pop())
        if self.parts:
            trimmed = self.parts[-1].rstrip()
            self.length -= len(self.parts[-1]) - len(trimmed)
            self.parts[-1] = trimmed

    def bullet(self) -> None:
        """Begin a list item."""
        self.flow("- ")
        self._is_after_bullet = True

    def end_item(self) -> None:
        """End a list item, even an empty one."""
        self._is_after_bullet = False

    def _write(self, text: str) -> None:
        self._is_after_bullet = False
        if self.length:
            self.parts.append(self.separator)
            self.length += len(self.separator)
        self.separator = ""
        self.parts.append(text)
        self.length += len(text)

    @property
    def next_start(self) -> int:
        """Where the next character will stand."""
        return self.length + len(self.separator) if self.length else 0


class _Target:
    """Receives the parser's events (lxml calls these methods by name)."""

    def __init__(self, hidden: frozenset[str]) -> None:
        self.writer = _Writer()
        self.title: list[str] = []
        self.anchors: list[Anchor] = []
        self.code: list[tuple[int, int]] = []
        self.main: list[tuple[int, int]] = []
        self._hidden = hidden
        self._open: list[tuple[str, int, str | None]] = []
        self._num_hidden = self._num_main = self._num_pre = 0

    def _is_hidden(self, tag: str) -> bool:
        return tag in self._hidden or (tag == "header" and "nav" in self._hidden and not self._num_main)

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if self._num_hidden or self._is_hidden(tag):
            self._num_hidden += 1
            self._open.append((tag, -1, None))
            return
        self._separate(tag)
        if tag == "li":
            self.writer.bullet()
        self._open.append((tag, self.writer.next_start, attributes.get("href") if tag == "a" else None))
        self._num_main += tag in MAIN_PARTS
        self._num_pre += tag == "pre"

    def end(self, tag: str) -> None:
        if not self._open:
            return
        tag, start, href = self._open.pop()
        if start < 0:
            self._num_hidden -= 1
            return
        self._num_main -= tag in MAIN_PARTS
        if tag == "pre":
            self._num_pre -= 1
            self.writer.end_verbatim()
        elif tag == "li":
            self.writer.end_item()
        end = max(start, self.writer.length)
        if href is not None:
            # An image link covers no text; it then stands where the text before it ended.
            span = (start, end) if self.writer.length > start else (self.writer.length, self.writer.length)
            self.anchors.append(Anchor(href.strip(), *span))
        if tag in ("pre", "code") and self.writer.length > start:
            self.code.append((start, end))
        if tag in MAIN_PARTS and self.writer.length > start:
            self.main.append((start, end))
        self._separate(tag)

    def _separate(self, tag: str) -> None:
        if tag in PARAGRAPHS:
            self.writer.separate("\n\n")
        elif tag in LINES:
            self.writer.separate("\n")
        elif tag in CELLS:
            self.writer.separate(" ")

    def data(self, text: str) -> None:
        if self._num_hidden:
            if [tag for tag, _, _ in self._open[-2:]] == ["head", "title"]:
                self.title.append(text)
        elif self._num_pre:
            self.writer.verbatim(text)
        else:
            self.writer.flow(text)

    def close(self) -> PlainText:
        return PlainText(
            text="".join(self.writer.parts),
            title=" ".join("".join(self.title).split()),
            anchors=tuple(self.anchors),
            code=tuple(self.code),
            main=tuple(self.main),
        )


def plain_text(html: str, *, hidden: frozenset[str] = INVISIBLE) -> PlainText:
    """Convert a fragment or a whole page; elements in `hidden` leave nothing. Never raises on broken HTML."""
    # Bytes, because lxml refuses text that begins with an encoding declaration.
    source = html.replace("\0", " ").encode("utf-8", errors="replace")
    target = _Target(hidden)
    if not source.strip():
        return target.close()
    parser = etree.HTMLParser(target=cast("ParserTarget[PlainText]", target), encoding="utf-8", huge_tree=True)
    parser.feed(source)
    return parser.close()


def main_text(html: str) -> PlainText:
    """The visible text of a page's main part, without navigation, forms and footers.

    The longest `main` or `article` counts as the main part if it holds a quarter of the visible text; else the
    whole page does. Anchors and spans are dropped: they would no longer fit.
    """
    page = plain_text(html, hidden=INVISIBLE | PAGE_CHROME)
    start, end = max(page.main, key=lambda span: span[1] - span[0], default=(0, 0))
    if end - start < SHARE_OF_MAIN * len(page.text):
        start, end = 0, len(page.text)
    return PlainText(text=page.text[start:end].strip(), title=page.title)
