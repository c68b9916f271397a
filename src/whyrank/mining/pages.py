"""The text of linked pages, brought by the user as JSON lines and looked up by address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from whyrank.errors import InputError
from whyrank.mining.html_text import main_text
from whyrank.mining.links import normalise
from whyrank.store import BadLines, read_jsonl

__all__ = ["Page", "PageStore", "StoredPage", "read_pages"]


@dataclass(frozen=True, slots=True)
class StoredPage:
    """One line of a page file: an address with either `text` or `html`, and what is known of the licence."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    url: str
    text: str | None = None
    html: str | None = None
    title: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.html is None):
            raise ValueError(
                f"expected either text or html for {self.url}, found {'none' if not self.text else 'both'}"
            )
        normalise(self.url)


@dataclass(frozen=True, slots=True)
class Page:
    """A page as text. `url` is the address that was stored, not the normalised one."""

    url: str
    text: str
    title: str = ""
    licence: str = ""


def read_pages(lines: Iterable[StoredPage]) -> Iterator[Page]:
    """Convert stored pages one by one; HTML becomes the visible text of its main part."""
    for line in lines:
        if line.html is None:
            yield Page(line.url, (line.text or "").strip(), line.title, line.licence)
        else:
            converted = main_text(line.html)
            yield Page(line.url, converted.text, line.title or converted.title, line.licence)


class PageStore:
    """Pages in memory, found by normalised address. Of two with the same address the first one stays.

    `num_repeated` counts the others.

    Raises:
        InputError: an address is not an http(s) address.
    """

    def __init__(self, pages: Iterable[Page] = ()) -> None:
        self.num_repeated = 0
        self._pages: dict[str, Page] = {}
        for page in pages:
            if self._pages.setdefault(normalise(page.url), page) is not page:
                self.num_repeated += 1

    @classmethod
    def read(cls, *paths: Path | str, bad: BadLines | None = None) -> PageStore:
        """Read JSON-lines files of `StoredPage`.

        Raises:
            InputError: a line is no such record. With `bad`, the line is counted there and passed over.
        """
        return cls(page for path in paths for page in read_pages(read_jsonl(path, StoredPage, bad=bad)))

    def get(self, url: str) -> Page | None:
        """The page under this address; `None` if it is not stored or the address is malformed."""
        try:
            return self._pages.get(normalise(url))
        except InputError:
            return None

    def __len__(self) -> int:
        return len(self._pages)
