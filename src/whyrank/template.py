"""What the model is asked and how its answer is read: the single home of prompt, answer, parse, cut and scale.

A template is data: a TOML file with the wording, the separators, the labels and the limits. Mining, labelling,
training examples, reranking and serving use the same object, and every judgment names its version. The law that
ties writing to reading, for every text `why` and every label `y` of the scale:

    template.parse(template.answer(y, why)) == (y, why)

It holds because `answer` escapes what could be mistaken for structure (a line that begins like a label line, a
thinking tag, the separator) with a backslash, and `parse` takes it away again.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from whyrank.errors import InputError
from whyrank.generators import Request, Sampling, Segment, TextTokens
from whyrank.label_lines import LabelLines
from whyrank.records import Mode
from whyrank.store import LONE_SURROGATE, content_key

__all__ = ["Answer", "AnswerWords", "Limits", "PromptWords", "Rendered", "Scale", "Template", "cut_end"]

STRICT = ConfigDict(extra="forbid", frozen=True)
CHARACTERS_PER_TOKEN_AT_MOST = 32  # a longer text is cut by characters before it is tokenised (5 MB documents)
NUMBER_SCALES = {"0-2": range(3), "0-10": range(11), "0-100": range(101)}


class Answer(NamedTuple):
    """A label of the scale (`None` if the text holds no readable one) and the explanation before it."""

    label: str | None
    explanation: str


@dataclass(frozen=True, slots=True)
class Scale:
    """The labels in order, and what each is worth."""

    labels: tuple[str, ...]
    values: tuple[float, ...]

    def expected(self, probs: tuple[float, ...]) -> float:
        """Expected value of the label, for probabilities in the order of `labels` that sum to 1."""
        return float(sum(value * p for value, p in zip(self.values, probs, strict=True)))

    def value(self, label: str) -> float:
        """What one label is worth."""
        return self.values[self.labels.index(label)]

    def label_of(self, value: float) -> str:
        """The label that is worth exactly `value`.

        Raises:
            InputError: no label is.
        """
        if value not in self.values:
            raise InputError(f"expected a relevance of the scale {self.values}, found {value}")
        return self.labels[self.values.index(value)]


@validated(config=STRICT)
class PromptWords:
    """The words around query and document. `task` says what counts as relevant and can be replaced per call."""

    task: str
    explain_format: str = ""
    direct_format: str = ""
    system: str = ""
    query_heading: str = "Query:\n"
    document_heading: str = "Document:\n"


@validated(config=STRICT)
class AnswerWords:
    """The shape of an answer: `explanation_prompt why separator label_prompt label terminator`.

    `thinking` is the pair of tags around text that a reasoning model writes before its answer; it is dropped by
    `parse`, unless the separator itself holds the closing tag (then the thinking is the explanation). Two empty
    strings: nothing is a thinking tag.
    """

    explanation_prompt: str = "Explanation:"
    separator: str = "\n\n"
    label_prompt: str = "Relevance Label:"
    terminator: str = " ##"
    thinking: tuple[str, str] = ("<think>", "</think>")


@validated(config=STRICT)
class Limits:
    """Caps in tokens. A query over its cap is cut with a warning; a document over its cap is cut at the end."""

    max_query_tokens: int = 1024
    max_document_tokens: int = 2048
    max_explanation_tokens: int = 256


@dataclass(frozen=True, slots=True)
class Rendered:
    """A request, and what had to be cut to make it. `passage` is the span of the document that is shown."""

    request: Request
    passage: tuple[int, int]
    is_document_cut: bool
    is_query_cut: bool


@validated(config=ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,)))
class Template:
    """A prompt, an answer shape, a scale and limits. `labels` names a number scale or lists label words.

    With words, `values` gives each one's worth; two words default to 0 and 1, so that the score is the
    probability of the second. `chat_options` go to the chat template (`enable_thinking = false`).
    """

    name: str
    prompt: PromptWords
    labels: str | tuple[str, ...] = "0-2"
    values: tuple[float, ...] | None = None
    answer_words: AnswerWords = field(default_factory=AnswerWords)
    limits: Limits = field(default_factory=Limits)
    chat_options: Mapping[str, bool | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_labels()
        self._check_structure()

    def _check_labels(self) -> None:
        labels, texts = self.scale.labels, self.label_texts
        if len(labels) < 2 or len(self._label_lines.label_of_folded) != len(labels):
            raise InputError(f"template {self.name!r}: expected at least two different labels, found {labels}")
        if not all(label and label.strip() == label and "\n" not in label for label in labels):
            raise InputError(f"template {self.name!r}: a label is one line without space around it, found {labels}")
        if not all(math.isfinite(value) for value in self.scale.values):
            raise InputError(f"template {self.name!r}: expected finite values, found {self.scale.values}")
        for short, long in ((a, b) for a in texts for b in texts if a != b and b.startswith(a)):
            raise InputError(f"template {self.name!r}: label {long!r} begins with {short!r}: give a terminator")

    def _check_structure(self) -> None:
        words = self.answer_words
        if not (words.separator.strip() or self._label_lines.words):
            raise InputError(f"template {self.name!r}: a separator or a label_prompt must say where the label begins")
        if words.label_prompt.strip() and not re.match(r"\w", self._label_lines.words):
            raise InputError(f"template {self.name!r}: expected words in label_prompt, found {words.label_prompt!r}")
        if bool(words.thinking[0]) != bool(words.thinking[1]):
            raise InputError(f"template {self.name!r}: give both thinking tags or none, found {words.thinking}")
        if any("\\" in mark for mark in (*words.thinking, words.separator)):
            raise InputError(f"template {self.name!r}: separator and thinking tags cannot hold a backslash, the escape")
        if any(len(mark) == 1 for mark in self._protected):  # a backslash has no place inside
            raise InputError(
                f"template {self.name!r}: a separator and a thinking tag need at least two characters to be told from "
                f"text, found {', '.join(self._protected)}"
            )
        ending = "" if self._is_thinking_the_explanation else self.label_prompt("explain")
        tails = (tag[start:] for tag in words.thinking for start in range(1, len(tag)))
        if any(map(ending.startswith, tails)) or any(tag in ending for tag in words.thinking if tag):
            raise InputError(f"template {self.name!r}: text and separator together could spell one of {words.thinking}")

    # ---- loading and identity -------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str) -> Template:
        """Build from parsed TOML or JSON; unknown keys are refused.

        Raises:
            InputError: naming `where` and the key that is wrong.
        """
        try:
            return _ADAPTER.validate_python(dict(data))
        except ValidationError as cause:
            # A misspelt key also leaves its right spelling missing: name what was written first.
            problem = min(cause.errors(include_url=False), key=lambda found: "unexpected" not in found["type"])
            key = ".".join(str(part) for part in problem["loc"])
            found = problem["msg"].removeprefix("Value error, ")
            raise InputError(f"{where}: template key {key!r}: {found}" if key else f"{where}: {found}") from cause

    @classmethod
    def load(cls, name_or_path: str | Path) -> Template:
        """A template shipped with whyrank, by name, or a TOML file, by path.

        Raises:
            InputError: neither exists, or the file is not a template.
        """
        shipped = files("whyrank") / "templates"
        names = sorted(entry.name.removesuffix(".toml") for entry in shipped.iterdir() if entry.name.endswith(".toml"))
        if str(name_or_path) in names:
            raw = (shipped / f"{name_or_path}.toml").read_bytes()
        elif Path(name_or_path).is_file():
            raw = Path(name_or_path).read_bytes()
        else:
            raise InputError(f"no template {str(name_or_path)!r}: give a TOML file or one of {', '.join(names)}")
        try:
            return cls.from_dict(tomllib.loads(raw.decode("utf-8-sig")), where=str(name_or_path))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
            raise InputError(f"{name_or_path}: expected TOML, found: {cause}") from cause

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` reads them back."""
        data: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return data

    @property
    def version(self) -> str:
        """`name@` and eight digits that change with any word, label or limit."""
        return f"{self.name}@{content_key(json.dumps(self.to_dict(), sort_keys=True))[:8]}"

    def asks_like(self, other: Template) -> bool:
        """Whether both put the same question and expect the same answer (limits may differ)."""
        mine, theirs = self.to_dict(), other.to_dict()
        return all(mine[key] == theirs[key] for key in ("prompt", "labels", "values", "answer_words", "chat_options"))

    @property
    def scale(self) -> Scale:
        """The scale that `labels` and `values` name."""
        if isinstance(self.labels, str):
            if self.labels not in NUMBER_SCALES or self.values is not None:
                raise InputError(
                    f"template {self.name!r}: expected labels to be one of {sorted(NUMBER_SCALES)} without values, "
                    f"or a list of words, found {self.labels!r} with values {self.values}"
                )
            numbers = NUMBER_SCALES[self.labels]
            return Scale(tuple(str(n) for n in numbers), tuple(float(n) for n in numbers))
        values = self.values if self.values is not None else (0.0, 1.0)
        if len(values) != len(self.labels):
            raise InputError(f"template {self.name!r}: {len(self.labels)} label words need as many values")
        return Scale(self.labels, values)

    # ---- asking ---------------------------------------------------------------------------------------------

    def render(
        self,
        query: str,
        document: str,
        tokens: TextTokens,
        *,
        mode: Mode = "explain",
        sampling: Sampling | None = None,
        instruction: str | None = None,
    ) -> Rendered:
        """The request for one pair: instruction, query, document, in this order, so that the candidates of a
        query share all but the end. Only the document is cut to its limit, and the query to its own.

        Args:
            query: the query's text.
            document: the document's full text.
            tokens: measures text in the tokens of the model that will read it.
            mode: `explain` or `direct`.
            sampling: defaults to greedy with the template's explanation cap.
            instruction: replaces the template's `task` for this call.
        """
        words = self.prompt
        shown_query = query[: cut_end(query, self.limits.max_query_tokens, tokens)]
        end = cut_end(document, self.limits.max_document_tokens, tokens)
        form = words.explain_format if mode == "explain" else words.direct_format
        asked = "\n\n".join(part for part in (words.task if instruction is None else instruction, form) if part)
        segments = [
            Segment("user", "instruction", (asked + "\n\n" if asked else "") + words.query_heading),
            Segment("user", "query", shown_query),
            Segment("user", "instruction", "\n\n" + words.document_heading),
            Segment("user", "document", document[:end]),
        ]
        if words.system:
            segments.insert(0, Segment("system", "instruction", words.system))
        if mode == "explain" and self.answer_words.explanation_prompt:
            segments.append(Segment("assistant", "structure", self.answer_words.explanation_prompt))
        request = Request(
            segments=tuple(segments),
            stops=self.stops,
            label_prompt=self.label_prompt(mode),
            labels=self.label_texts,
            sampling=sampling or Sampling(max_tokens=self.limits.max_explanation_tokens),
            is_direct=mode == "direct",
            chat_options=dict(self.chat_options),
        )
        return Rendered(request, (0, end), end < len(document), len(shown_query) < len(query))

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends the explanation. A leading newline also matches the beginning of the text."""
        words = self.answer_words
        candidates = (
            words.separator.strip(),
            f"\n{words.label_prompt}" if words.label_prompt.strip() else "",
        )
        return tuple(stop for stop in candidates if stop)

    def label_prompt(self, mode: Mode) -> str:
        """What stands between the explanation (or, in `direct` mode, the prompt) and the label."""
        words = self.answer_words
        return words.separator + words.label_prompt if mode == "explain" else words.label_prompt

    @property
    def label_texts(self) -> tuple[str, ...]:
        """What may follow the label prompt: every label with its space and terminator."""
        return tuple(f" {label}{self.answer_words.terminator}" for label in self.scale.labels)

    # ---- answering and reading ------------------------------------------------------------------------------

    def answer(self, label: str, why: str, mode: Mode = "explain") -> str:
        """The text a model should have written. In `direct` mode the explanation is left out.

        Raises:
            InputError: `label` is not on the scale.
        """
        return "".join(text for _, text in self.answer_parts(label, why, mode))

    def answer_parts(self, label: str, why: str, mode: Mode = "explain") -> tuple[tuple[bool, str], ...]:
        """`answer` as `(is structure, text)` pieces that are tokenised apart, as at ranking time.

        The label prompt and the label are one piece: `Request.labels` says where it is split.
        """
        scale = self.scale
        if label not in scale.labels:
            raise InputError(f"expected one of the labels {', '.join(scale.labels)}, found {label!r}")
        ending = self.label_prompt(mode) + self.label_texts[scale.labels.index(label)]
        if mode == "direct":
            return ((True, ending),)
        return (
            (True, self.answer_words.explanation_prompt),
            (False, f" {self.escape(why)}"),
            (True, ending),
        )

    def parse(self, text: str) -> Answer:
        """Read a whole answer. Never raises and never guesses: what is not plainly a label is `None`.

        The answer's own form is read exactly. Other forms are read from the last line that is not blank (from what
        follows the separator, if the template has no words before its label), after NFKC, with Markdown marks, a
        pair of brackets or quotation marks allowed around it. A different label line before it makes the answer
        unreadable, and so does a thinking block that was never closed. Lone surrogates, which no file can hold, become
        U+FFFD.
        """
        text = _writable(text)
        body = self._after_thinking(text)
        found = None if body is None else self._parse_exact(body) or self._parse_loosely(body)
        return found or Answer(None, text)

    def read_explanation(self, text: str) -> str:
        """The explanation in a text that was generated up to a stop (phase 1)."""
        return self.unescape(_writable(text)).strip()

    @property
    def _is_thinking_the_explanation(self) -> bool:
        closing = self.answer_words.thinking[1]
        return bool(closing) and closing in self.answer_words.separator

    def _after_thinking(self, text: str) -> str | None:
        opening, closing = self.answer_words.thinking
        if self._is_thinking_the_explanation or not closing:
            return text
        _, closed, rest = text.rpartition(closing)
        if opening in rest:
            return None
        return rest.lstrip() if closed else text

    def _parse_exact(self, text: str) -> Answer | None:
        beginning = f"{self.answer_words.explanation_prompt} "
        for label, ending in zip(self.scale.labels, self.label_texts, strict=True):
            suffix = self.label_prompt("explain") + ending
            if text.startswith(beginning) and text.endswith(suffix) and len(text) >= len(beginning) + len(suffix):
                body = text[len(beginning) : len(text) - len(suffix)]
                is_clear = self._label_lines.claimed(body) <= {label} and not self._is_separated(body)
                return Answer(label, self.unescape(body)) if is_clear else None
        return None

    def _parse_loosely(self, text: str) -> Answer | None:
        mark = self.answer_words.separator.strip()
        if self._label_lines.words:
            before, _, statement = text.rstrip().rpartition("\n")
            # Words in a thought that was cut off are not the answer, even on a line of their own.
            is_clear = not self._is_thinking_the_explanation or mark in before or not before.strip()
        else:
            before, _, statement = text.rpartition(mark)
            is_clear = not self._is_separated(before)
        label = self._label_lines.label_on(statement)
        if label is None or not is_clear or not self._label_lines.claimed(before) <= {label}:
            return None
        why = before.strip().removeprefix(self.answer_words.explanation_prompt.strip()).strip().removesuffix(mark)
        return Answer(label, self.unescape(why).strip())

    def _is_separated(self, body: str) -> bool:
        """Whether a template without words before its label has a second separator, so that two labels compete."""
        return not self._label_lines.words and self.answer_words.separator.strip() in body

    @cached_property
    def _label_lines(self) -> LabelLines:
        return LabelLines(self.answer_words.label_prompt, self.scale.labels, self.answer_words.terminator)

    @property
    def _protected(self) -> list[str]:
        return sorted({*self.answer_words.thinking, self.answer_words.separator.strip()} - {""})

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """Behind the first character of every mark, whatever backslashes stand inside it; takes the first of them.

        Only that place is matched and not the mark, so that marks may overlap (`###` in `####`); and because
        backslashes inside do not count, the same places are found before and after escaping.
        """
        places = "|".join(map(_behind_first, self._protected)) or "(?!)"
        return re.compile(rf"(?:{places})\\?")

    def escape(self, why: str) -> str:
        """Make everything in `why` harmless that could be mistaken for the answer's structure.

        A label line gets a backslash before it, a thinking tag or a separator one after its first character, so
        that the escaped text holds neither a label line nor a stop.
        """
        marked = self._marks.sub(lambda match: f"\\{match[0]}", why)
        return self._label_lines.escape(marked)

    def unescape(self, text: str) -> str:
        """Undo `escape`; text that was never escaped is left as it is."""
        plain = self._label_lines.unescape(text)
        return self._marks.sub("", plain)


_ADAPTER: TypeAdapter[Template] = TypeAdapter(Template)


def _writable(text: str) -> str:
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def _behind_first(mark: str) -> str:
    rest = "".join(rf"\\*+{re.escape(character)}" for character in mark[1:])
    return f"(?<={re.escape(mark[0])})(?={rest})"


def cut_end(text: str, max_tokens: int, tokens: TextTokens) -> int:
    """Where to cut `text` so that at most `max_tokens` tokens remain; `len(text)` if it fits."""
    head = text[: max_tokens * CHARACTERS_PER_TOKEN_AT_MOST]
    offsets = tokens.offsets(head)
    if len(offsets) > max_tokens:
        return offsets[max_tokens - 1][1]
    return len(head)
