"""The options of `whyrank mine`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from whyrank.errors import InputError

__all__ = ["MiningConfig"]


@dataclass(frozen=True, slots=True)
class MiningConfig:
    """How pairs are mined from one site's dump.

    Raises:
        InputError: a value lies outside its range.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    site: str
    """Host name of the dump's site, such as `ai.stackexchange.com`: ids and on-site links rest on it."""

    site_aliases: tuple[str, ...] = ()
    """Earlier host names of the same site (beer.stackexchange.com became alcohol.stackexchange.com)."""

    without_page: Literal["skip", "context"] = "skip"
    """A link whose page is not in the store: leave it out, or take what the answer says around the link."""

    min_answer_score: int = 0
    """Links of answers with a lower score (votes) are no evidence."""

    min_document_chars: int = 100
    """A page or context with fewer characters counts as having no text."""

    num_negatives: int = 4
    """Hard negatives per question: BM25 finds them, no answer links to them."""

    num_random: int = 1
    """Random negatives per question, beside the hard ones."""

    first_rank: int = 3
    """Hard negatives come from this BM25 rank (from 1, linked documents not counted); the top may be unlinked gold."""

    last_rank: int = 50
    """Hard negatives come from ranks up to this one."""

    test_fraction: float = 0.1
    """Share of questions in the test split, decided by the question's id alone; 0 to 1."""

    seed: int = 0
    """Fixes the draw of negatives."""

    def __post_init__(self) -> None:
        problems = [
            ("site", "a host name such as ai.stackexchange.com", "." in self.site and "/" not in self.site),
            ("without_page", "'skip' or 'context'", self.without_page in ("skip", "context")),
            ("min_document_chars", "at least 1", self.min_document_chars >= 1),
            ("num_negatives", "at least 0", self.num_negatives >= 0),
            ("num_random", "at least 0", self.num_random >= 0),
            ("first_rank", "at least 1", self.first_rank >= 1),
            ("last_rank", f"at least first_rank ({self.first_rank})", self.last_rank >= self.first_rank),
            ("test_fraction", "a number from 0 to 1", 0 <= self.test_fraction <= 1),
        ]
        for name, expected, is_good in problems:
            if not is_good:
                raise InputError(f"{name}: expected {expected}, found {getattr(self, name)!r}")

    @property
    def hosts(self) -> tuple[str, ...]:
        """All host names of the site in lower case, the present one first."""
        return tuple(host.lower() for host in (self.site, *self.site_aliases))
