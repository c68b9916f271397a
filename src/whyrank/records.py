"""The records that every stage reads and writes.

Frozen slots dataclasses with the field names of ir_datasets and ir_measures. A record holds plain values
only, knows nothing about files (see `store`) and is compared by value. Ids are always strings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

__all__ = [
    "JUDGED_STATUSES",
    "Document",
    "Judgment",
    "Mode",
    "Pair",
    "Qrel",
    "Query",
    "Relation",
    "ScoredDocument",
    "SearchQueries",
    "Status",
    "to_plain",
]

LEFT_OUT_AT_DEFAULT = {"is_left_out_at_default": True}  # so that files written before the field was there stay the same

Mode = Literal["explain", "direct"]
"""How a pair is judged: reason first and then label, or label at once."""

Status = Literal["ok", "forced", "low_mass", "unparsed", "error"]
"""What the answer was worth.

`ok`: read as intended. `forced`: the explanation hit its cap; the label was still read. `low_mass`: the model
put less than half of its probability on the labels. `unparsed`: no label could be read. `error`: no answer
came. The last two have neither label nor score.
"""

JUDGED_STATUSES: frozenset[Status] = frozenset({"ok", "forced", "low_mass"})
"""The statuses that carry a label and a score."""

Relation = Literal["linked", "negative", "judged"]
"""Why a pair exists: an answer links to the page, a hard negative was drawn, or a person judged it."""


@dataclass(frozen=True, slots=True)
class Query:
    """What somebody asked, and the documents that must never be ranked for it (BRIGHT's `excluded_ids`)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    query_id: str
    text: str
    excluded_doc_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A text that may help. `source` and `licence` say where it comes from and what it allows."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    doc_id: str
    text: str
    title: str = ""
    source: str = ""
    licence: str = ""

    @property
    def full_text(self) -> str:
        """Title and text as the model and the index see them."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Qrel:
    """One relevance judgment of the collection; `relevance` is in the collection's own grades."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    query_id: str
    doc_id: str
    relevance: int


@dataclass(frozen=True, slots=True)
class ScoredDocument:
    """One line of a run. `rank` starts at 1; `score` decreases with it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    query_id: str
    doc_id: str
    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and a document to be labelled, with the reason why they were put together.

    `evidence` names what the relation rests on (for a link: the answer's post id); `relevance` is known only
    for `judged` pairs.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    query_id: str
    doc_id: str
    relation: Relation
    evidence: str = ""
    relevance: int | None = None


@dataclass(frozen=True, slots=True)
class Judgment:
    """What a model said about one pair, and everything needed to trust it or not.

    `key` is the content address: template, model, sampling, mode, query text and document text. `score` is the
    expected label in the units of the template's scale (float64), `label` the most probable one, `probs` the
    distribution over the scale in its order (`None` where the backend cannot tell), `label_mass` the
    unrestricted probability of all labels together. `passage` is the character span `[start, end)` of the
    document's full text that the model was shown. `label` and `score` are `None` if and only if the status is
    `unparsed` or `error`; then `unreadable` keeps the raw answer and `error` the exception, apart.

    A judgment may be combined from several answers: `num_samples` drawn for each of `num_passages` passages, of which
    `num_unreadable` could not be read. `passage` is then the winning one, tokens are summed, and `error` keeps the
    first exception even where other answers gave a label. These three stand in files only where they are not 1, 1, 0.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    key: str
    query_id: str
    doc_id: str
    status: Status
    mode: Mode
    label: str | None
    score: float | None
    probs: tuple[float, ...] | None
    label_mass: float | None
    explanation: str
    passage: tuple[int, int]
    is_document_cut: bool
    is_query_cut: bool
    num_prompt_tokens: int
    num_completion_tokens: int
    template: str
    model: str
    unreadable: str | None = None
    error: str | None = None
    num_samples: int = field(default=1, metadata=LEFT_OUT_AT_DEFAULT)
    num_passages: int = field(default=1, metadata=LEFT_OUT_AT_DEFAULT)
    num_unreadable: int = field(default=0, metadata=LEFT_OUT_AT_DEFAULT)

    @property
    def num_answers(self) -> int:
        """How many answers it was made from."""
        return self.num_samples * self.num_passages

    @property
    def num_unread_answers(self) -> int:
        """How many of them could not be read; of a single answer, its status tells."""
        return max(self.num_unreadable, int(self.score is None))


@dataclass(frozen=True, slots=True)
class SearchQueries:
    """What a model wrote to search with in place of a query, and everything needed to trust it or not.

    `key` is the content address: prompt, model, sampling and the query's text. `queries` is empty if and only if the
    status is `unparsed` or `error`; then `unreadable` keeps the raw answer and `error` the exception, apart. With
    `forced` the answer hit its cap, and the line that it ended in is left out.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    key: str
    query_id: str
    status: Literal["ok", "forced", "unparsed", "error"]
    queries: tuple[str, ...]
    is_query_cut: bool
    num_prompt_tokens: int
    num_completion_tokens: int
    prompt: str
    model: str
    unreadable: str | None = None
    error: str | None = None


def to_plain(record: Any) -> dict[str, Any]:
    """Any dataclass as the plain values that files hold, without fields that are left out at their default."""
    left_out = {
        entry.name
        for entry in fields(record)
        if entry.metadata.get("is_left_out_at_default") and getattr(record, entry.name) == entry.default
    }
    return {name: value for name, value in asdict(record).items() if name not in left_out}
