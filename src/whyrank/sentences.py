"""Where sentences end: a small rule that would rather miss an end than make one up.

No dependency splits sentences, and passages need only that a window does not stop in the middle of a thought: a missed
end makes a window a little shorter.
"""

from __future__ import annotations

import re
from itertools import pairwise

__all__ = ["sentences"]

# Always matches a whole run of marks, so that a page of dots is read once and not once from every dot.
ENDING = re.compile(
    r"[.!?…]++[\"'”’»)\]]*+\s*+"  # Latin, Greek and Cyrillic, which need white space behind the mark
    r"|[。！？｡।॥؟۔]++[」』”’）)]*+\s*+"
    r"|\n[^\S\n]*+\n\s*+"  # a blank line
)
NEEDS_SPACE = frozenset(".!?…")
LAST_WORD = re.compile(r"[\w.]++$")
INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # J or U.S or e.g
LONGEST_ABBREVIATION = 12
ABBREVIATIONS = frozenset(
    re.findall(
        r"\w+",
        "al approx apr aug ca cf ch co corp dec dept dr ed eds eq eqs est etc feb fig figs gen hon inc jan jr jul jun "
        "ltd mar messrs mr mrs ms mt no nos nov oct p pp prof resp rev sec sen sep sept sr st tab univ viz vol vs",
    )
)


def sentences(text: str) -> list[tuple[int, int]]:
    """Character spans `[start, end)` of the sentences of `text`, in order and without gaps.

    White space belongs to the sentence before it. A sentence ends at `.`, `!`, `?` or `…` with white space behind it,
    unless a small letter follows or the full stop belongs to an abbreviation, an initial or the number of a list; at
    the full-width and Indic marks; and at a blank line.
    """
    starts = [0]
    starts += [found.end() for found in ENDING.finditer(text) if found.end() < len(text) and _is_end(text, found)]
    return list(pairwise([*starts, len(text)]))


def _is_end(text: str, found: re.Match[str]) -> bool:
    mark = found[0]
    if mark[0] not in NEEDS_SPACE or mark.count("\n") > 1:
        return True
    if not mark[-1].isspace() or text[found.end()].islower():
        return False
    return mark.rstrip() != "." or not _is_abbreviated(text, found.start())


def _is_abbreviated(text: str, end: int) -> bool:
    """Whether the word before a full stop at `end` is short for something, or numbers a line."""
    start = max(0, end - LONGEST_ABBREVIATION)
    word = LAST_WORD.search(text[start:end])
    if word is None:
        return False
    if word[0].isdecimal():
        place = start + word.start()
        return place == 0 or text[place - 1] == "\n"
    return word[0].casefold() in ABBREVIATIONS or INITIALS.fullmatch(word[0]) is not None
