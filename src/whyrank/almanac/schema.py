"""What the almanac knows: hand-written TOML files, one per domain, and the laws that they keep.

A domain's observations and mechanisms form a puzzle: every observation fits at least two mechanisms, and any two
observations of one mechanism fit no other. One alone is ambiguous; the combination decides. The words are chosen
so that this is the only way through: a thing names its setting and nothing else, and the last phrasing and the
last statement of each list are held out for the test split.

All texts are lower-case words and single blanks, so that a word is the same wherever the grammar puts it.
"""

from __future__ import annotations

from itertools import combinations
from typing import TypeVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from whyrank.errors import InputError

__all__ = ["Common", "Domain", "Knowledge", "Mechanism", "Observation", "Setting"]

STRICT = ConfigDict(extra="forbid", frozen=True)


@validated(config=STRICT)
class Observation:
    """Something a lay person sees. `summary` (2-4 words) is what explanations call it; the last phrasing
    (3-9 words each) is held out."""

    id: str
    summary: str
    phrasings: tuple[str, ...]

    def shown(self, is_held_out: bool) -> tuple[str, ...]:
        """The phrasings that may be used: the held-out one alone, or all others."""
        return self.phrasings[-1:] if is_held_out else self.phrasings[:-1]


@validated(config=STRICT)
class Mechanism:
    """A cause. `name` (2-3 words) is what explanations call it, `observations` what it makes visible; the last
    of its textbook `statements` (8-14 words each) is held out."""

    id: str
    name: str
    observations: tuple[str, ...]
    statements: tuple[str, ...]

    def shown(self, is_held_out: bool) -> tuple[str, ...]:
        """The statements that may be used: the held-out one alone, or all others."""
        return self.statements[-1:] if is_held_out else self.statements[:-1]

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every two of its observations, in the order of the file."""
        return tuple(combinations(self.observations, 2))


@validated(config=STRICT)
class Setting:
    """Where the trouble happens. `things` (1-3 words each) belong to it and to no other setting."""

    id: str
    name: str
    things: tuple[str, ...]


@validated(config=STRICT)
class Domain:
    """One field of everyday knowledge. Frames are sentences with a `{thing}` in them: a query's end in a full
    stop, a document's in a colon, because a statement follows."""

    name: str
    query_frames: tuple[str, ...]
    document_frames: tuple[str, ...]
    settings: tuple[Setting, ...]
    observations: tuple[Observation, ...]
    mechanisms: tuple[Mechanism, ...]

    def observation(self, observation_id: str) -> Observation:
        """The observation with this id; `KeyError` if there is none."""
        return _by_id(self.observations, observation_id)

    def mechanism(self, mechanism_id: str) -> Mechanism:
        """The mechanism with this id; `KeyError` if there is none."""
        return _by_id(self.mechanisms, mechanism_id)

    def setting(self, setting_id: str) -> Setting:
        """The setting with this id; `KeyError` if there is none."""
        return _by_id(self.settings, setting_id)

    def explained_by(self, first: str, second: str) -> Mechanism:
        """The only mechanism that fits both observations.

        Raises:
            InputError: none does.
        """
        for mechanism in self.mechanisms:
            if first in mechanism.observations and second in mechanism.observations:
                return mechanism
        raise InputError(f"{self.name}: expected two observations of one mechanism, found {first!r} and {second!r}")


@validated(config=STRICT)
class Common:
    """Sentences that are evidence for nothing: `{first}`, `{second}` and `{phrase}` stand for phrasings."""

    openings: tuple[str, ...]
    connections: tuple[str, ...]
    details: tuple[str, ...]
    quotes: tuple[str, ...]
    closers: tuple[str, ...]


@validated(config=STRICT)
class Knowledge:
    """The chosen domains, by file name in alphabetical order, and the words they share."""

    common: Common
    domains: tuple[Domain, ...]

    def domain(self, name: str) -> Domain:
        """The domain with this name; `KeyError` if it was not loaded."""
        for domain in self.domains:
            if domain.name == name:
                return domain
        raise KeyError(name)


Entry = TypeVar("Entry", Observation, Mechanism, Setting)


def _by_id(entries: tuple[Entry, ...], entry_id: str) -> Entry:
    for entry in entries:
        if entry.id == entry_id:
            return entry
    raise KeyError(entry_id)
