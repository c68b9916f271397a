"""The chain of reasons from a query and a document to a label, as values and as a sentence.

Every word of the sentence can be derived from what stands before it: what was seen, what it suggests together,
what the text is about, whether these agree; then the two settings and whether they agree; then the label.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

__all__ = ["MAX_EXPLANATION_WORDS", "Reasoning"]

MAX_EXPLANATION_WORDS = 30
SENTENCE = re.compile(
    r"Here (?P<first>[a-z ]+?) and (?P<second>[a-z ]+) suggest (?P<query_cause>[a-z ]+), "
    r"the text means (?P<document_cause>[a-z ]+): (?P<cause>same|other) cause\. "
    r"Asked for (?P<query_setting>[a-z ]+), the text means (?P<document_setting>[a-z ]+): "
    r"(?P<setting>same|other) setting\."
)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What somebody believes about a pair, in the canonical names of the knowledge.

    Gold reasoning holds the truth; a teacher that errs systematically replaces a field, and its label and its
    explanation follow from the mistake.
    """

    first: str
    second: str
    query_cause: str
    document_cause: str
    query_setting: str
    document_setting: str

    @property
    def is_same_cause(self) -> bool:
        """Whether the document is about the mechanism behind the query."""
        return self.query_cause == self.document_cause

    @property
    def is_same_setting(self) -> bool:
        """Whether the document was written for the query's setting."""
        return self.query_setting == self.document_setting

    @property
    def label(self) -> int:
        """2 = right mechanism and right setting, 1 = right mechanism, other setting, 0 = otherwise."""
        return 1 + self.is_same_setting if self.is_same_cause else 0

    @property
    def text(self) -> str:
        """The explanation, of at most `MAX_EXPLANATION_WORDS` words in the shipped knowledge.

        Its two comparisons have the same form on purpose: a small network learns them together, and much sooner.
        """
        return (
            f"Here {self.first} and {self.second} suggest {self.query_cause}, "
            f"the text means {self.document_cause}: {'same' if self.is_same_cause else 'other'} cause. "
            f"Asked for {self.query_setting}, the text means {self.document_setting}: "
            f"{'same' if self.is_same_setting else 'other'} setting."
        )

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read an explanation back. `None` if it has another form or contradicts itself (says `same cause` of two
        different ones), which a model's text may."""
        found = SENTENCE.fullmatch(text.strip())
        if found is None:
            return None
        parts = found.groupdict()
        is_same_cause, is_same_setting = parts.pop("cause") == "same", parts.pop("setting") == "same"
        reasoning = cls(**parts)
        agrees = reasoning.is_same_cause == is_same_cause and reasoning.is_same_setting == is_same_setting
        return reasoning if agrees else None
