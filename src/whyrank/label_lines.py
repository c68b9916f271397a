"""The lines of an answer that state a label: how they are recognised, read and quoted.

Lines are folded before they are compared (NFKC, then case), Markdown marks around a label are not part of it, and
the work is linear in the length of the text, whatever it holds.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from functools import cached_property

__all__ = ["LabelLines"]

LINE_START = r"(?:[^\S\n]|[*_#>`~|+•-])*+"  # Markdown that may open a line
MARK = r"[\s*_#`]*+"  # Markdown around a label is not part of it
AROUND = frozenset({"", "[]", "<>", "()", '""', "''", "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"})
"""What may stand around a label: prompts show its place in brackets, and models copy them."""
LONGEST = 200  # characters of a label line; bounds the work on hostile text


@dataclass(frozen=True)
class LabelLines:
    """The label lines of one template: its words before a label, its labels, and what may follow them."""

    label_prompt: str
    labels: tuple[str, ...]
    terminator: str

    @cached_property
    def words(self) -> str:
        """The words before a label, folded, without colon and marks; empty if the template has none."""
        words = re.sub(rf"^{LINE_START}", "", _folded(self.label_prompt).strip())
        return words.rstrip("*_#`:" + string.whitespace)

    @cached_property
    def label_of_folded(self) -> dict[str, str]:
        """From the folded form of each label to the label."""
        return {_folded(label): label for label in self.labels}

    @cached_property
    def _beginning(self) -> re.Pattern[str] | None:
        """How a label line begins; `None` if the template has no words before its label."""
        return re.compile(rf"{LINE_START}{re.escape(self.words)}(?!\w)") if self.words else None

    @cached_property
    def _candidates(self) -> re.Pattern[str]:
        """Where a label line may begin: a quick look before the exact one. Group 1 holds the escaping backslashes."""
        first = self.words[:1]
        return re.compile(rf"^(\\*+)(?={LINE_START}[{re.escape(first + first.upper())}\x80-\U0010ffff])", re.MULTILINE)

    @cached_property
    def _statement(self) -> re.Pattern[str]:
        """A whole line that states one label and nothing else."""
        beginning = self._beginning.pattern if self._beginning else ""
        colon = ":" if ":" in self.label_prompt else ":?"
        labels = "|".join(re.escape(label) for label in sorted(self.label_of_folded, key=len, reverse=True))
        terminator = re.escape(_folded(self.terminator).strip())
        # Brackets lazily, so that a label which holds some itself is found whole.
        opening, closing = (f"[{re.escape(''.join(pair[side:][:1] for pair in sorted(AROUND)))}]??" for side in (0, 1))
        label = f"(?P<opening>{opening})(?P<label>{labels})(?P<closing>{closing})"
        return re.compile(rf"{beginning}{MARK}{colon}{MARK}{label}{MARK}(?:{terminator})?\.?{MARK}")

    def _is_begun_at(self, match: re.Match[str]) -> bool:
        line = match.string[match.end() : match.end() + LONGEST].partition("\n")[0]
        return self._beginning is not None and self._beginning.match(_folded(line)) is not None

    def label_on(self, line: str) -> str | None:
        """The label that `line` states and nothing else, or `None`; brackets or quotation marks may be around it."""
        if len(line) > LONGEST or any(unicodedata.category(c) == "No" for c in line):
            return None  # NFKC would read the footnote in "1\N{SUPERSCRIPT TWO}" as a digit of "12"
        stated = self._statement.fullmatch(_folded(line))
        if stated is None or stated["opening"] + stated["closing"] not in AROUND:
            return None
        return self.label_of_folded[stated["label"]]

    def claimed(self, text: str) -> set[str | None]:
        """Labels on the label lines of `text` that are not escaped; `None` stands for an unreadable one."""
        found = (match for match in self._candidates.finditer(text) if not match[1] and self._is_begun_at(match))
        return {self.label_on(line) for line in {text[match.start() :].partition("\n")[0] for match in found}}

    def escape(self, text: str) -> str:
        """Put a backslash before every label line."""
        return self._candidates.sub(lambda found: f"\\{found[0]}" if self._is_begun_at(found) else found[0], text)

    def unescape(self, text: str) -> str:
        """Take it away again; other lines stay as they are."""
        return self._candidates.sub(lambda found: found[0][1:] if self._is_begun_at(found) else found[0], text)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
