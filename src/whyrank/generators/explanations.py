"""Where an explanation ends: the one rule for all backends that see tokens.

Pure functions on the tokens that a model wrote. The end of an answer (a special token) is the backend's business; what
is given here is what was written before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from whyrank.generators import FinishReason, Request

__all__ = ["Explanation", "Spelling", "num_until_stop", "reason_to_stop", "settle_explanation"]

STOP_WINDOW = 24  # tokens at the end of an explanation that are searched for a stop after every step


class Spelling(Protocol):
    """Tokens to text and back."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens; special tokens are left out."""
        ...

    def encode_text(self, text: str, /) -> tuple[int, ...]:
        """Plain text as tokens, none of them special."""
        ...


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which of the written tokens are the explanation.

    The first `num_kept` of them are; where the explanation ends inside the next one, `tail` spells the rest of it.
    """

    num_kept: int
    tail: tuple[int, ...] = ()


def reason_to_stop(ids: Sequence[int], spelling: Spelling, request: Request) -> FinishReason | None:
    """Whether these tokens are enough: `stop` after a stop, `length` at the cap, else `None`.

    To be asked after every token: only the last `STOP_WINDOW` of them are looked at.
    """
    is_all = len(ids) <= STOP_WINDOW
    if _has_stop(spelling.decode(ids[-STOP_WINDOW:]), request, is_all=is_all):
        return "stop"
    return "length" if len(ids) >= request.sampling.max_tokens else None


def num_until_stop(ids: Sequence[int], spelling: Spelling, request: Request) -> int | None:
    """How many tokens it takes until the first stop is complete; `None` if there is none.

    For backends that hand over the whole explanation at once, perhaps with more than was wanted.
    """

    def has_stop(num: int) -> bool:
        return _has_stop(spelling.decode(ids[:num]), request, is_all=True)

    return bisect_left(range(len(ids) + 1), True, key=has_stop) if has_stop(len(ids)) else None


def settle_explanation(ids: Sequence[int], spelling: Spelling, request: Request) -> Explanation:
    """Settle which tokens are the explanation: those before the first stop, without the beginning of the label
    prompt, which the runtime appends itself. The context of the label is then the one of training."""
    text = spelling.decode(ids)
    found = [at for at in (f"\n{text}".find(stop) for stop in request.stops) if at >= 0]
    end = max(min(found) - 1, 0) if found else len(text)
    prompt = request.label_prompt
    end -= next((size for size in range(len(prompt), 0, -1) if text[:end].endswith(prompt[:size])), 0)
    num_kept = len(ids)
    if end == len(text):
        return Explanation(num_kept)
    shown = text
    while num_kept and not (len(shown) <= end and text.startswith(shown)):
        num_kept -= 1
        shown = spelling.decode(ids[:num_kept])
    return Explanation(num_kept, spelling.encode_text(text[len(shown) : end]) if len(shown) < end else ())


def _has_stop(text: str, request: Request, *, is_all: bool) -> bool:
    """A leading newline of a stop also matches the beginning of the text."""
    return any(stop in (f"\n{text}" if is_all else text) for stop in request.stops)
