"""From chat segments to token ids, so that text can never become structure.

The tokenizer's chat template is rendered once per shape of chat with placeholders where the texts go. What the
template wrote is tokenised with special tokens; every text is tokenised apart by a copy of the tokenizer that
has no added tokens at all, so `<|im_end|>` or `</think>` inside a document is spelled out in ordinary tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from jinja2.exceptions import TemplateError
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from whyrank.errors import TemplateMismatch, UnsupportedModel
from whyrank.generators import Request, Role, Segment
from whyrank.template import Template

__all__ = ["ChatTokens", "Endings"]

PLACEHOLDER = "\ue000{}\ue001"
PLACEHOLDER_PATTERN = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True, slots=True)
class Endings:
    """The tokens after the explanation: `prompt` is common to all labels, `labels` what follows for each."""

    prompt: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]


class ChatTokens:
    """A tokenizer with its chat template; implements `TextTokens`.

    Raises:
        UnsupportedModel: the tokenizer has no fast backend, so its added tokens cannot be taken away.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UnsupportedModel(
                f"{type(tokenizer).__name__} has no tokenizer.json backend; whyrank needs one to keep special tokens "
                "out of queries and documents. Convert the tokenizer to the fast format."
            )
        self.tokenizer = tokenizer
        self._backend = backend
        self._plain = _without_added_tokens(backend)
        self._added = {int(i): str(token.content) for i, token in backend.get_added_tokens_decoder().items()}
        # A text is measured, cut if it is too long, and then encoded, mostly as it was.
        self._measure = lru_cache(maxsize=64)(self._encode_plain)
        self.encode_text = lru_cache(maxsize=4096)(self._encode_text)
        self.encode_structure = lru_cache(maxsize=4096)(self._encode_structure)
        self._layout = lru_cache(maxsize=64)(self._render_layout)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer by the tokenizer's own account."""
        return frozenset(i for i in (self.tokenizer.eos_token_id,) if isinstance(i, int))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens; special tokens are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Character span of every token, as measured on the whole text."""
        return cast(Sequence[tuple[int, int]], self._measure(text).offsets)

    def _encode_plain(self, text: str) -> Encoding:
        return self._plain.encode(text, add_special_tokens=False)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        encoded = self._measure(text)
        ids: list[int] = []
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            written = self._added.get(token)
            if written is not None and len(written) > 1 and text[start:end].strip() == written.strip() != "":
                # A vocabulary may hold an added token as an ordinary piece too (Gemma's does): spell it out.
                ids += [i for letter in text[start:end] for i in self._plain.encode(letter).ids]
            else:
                ids.append(token)
        return tuple(ids)

    def _encode_structure(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def _encode_segment(self, segment: Segment) -> tuple[int, ...]:
        return self.encode_structure(segment.text) if segment.kind == "structure" else self.encode_text(segment.text)

    def prompt_ids(self, request: Request) -> list[int]:
        """The request's chat as token ids, up to and including the beginning of the answer."""
        return self.prompt_parts(request)[0]

    def prompt_parts(self, request: Request) -> tuple[list[int], int]:
        """The same, and how many of the tokens come before the first piece of the document: all documents of a query
        have these in common."""
        in_turns = [segment for segment in request.segments if segment.role != "assistant"]
        begun = [segment for segment in request.segments if segment.role == "assistant"]
        pieces = self._layout(tuple(segment.role for segment in in_turns), tuple(sorted(request.chat_options.items())))
        ids: list[int] = []
        num_shared: int | None = None
        for piece in pieces:
            if isinstance(piece, int) and in_turns[piece].kind == "document" and num_shared is None:
                num_shared = len(ids)
            ids += self._encode_segment(in_turns[piece]) if isinstance(piece, int) else self.encode_structure(piece)
        for segment in begun:
            ids += self._encode_segment(segment)
        return ids, min(num_shared or 0, len(ids) - 1)

    def _render_layout(
        self, roles: tuple[Role, ...], options: tuple[tuple[str, bool | str], ...]
    ) -> tuple[str | int, ...]:
        """What the chat template writes around the segments: structure as text, segments as their index."""
        if self.tokenizer.chat_template is None:
            return (self._beginning_of_text(), *range(len(roles)), "\n\n")
        try:
            rendered = self._apply_template(roles, dict(options))
        except TemplateError:
            # Some templates (Gemma's) refuse a system turn: its text then opens the user's turn.
            rendered = self._apply_template(tuple("user" for _ in roles), dict(options))
        parts = PLACEHOLDER_PATTERN.split(rendered)
        pieces = tuple(int(part) if index % 2 else part for index, part in enumerate(parts))
        shown = [piece for piece in pieces if isinstance(piece, int)]
        if shown != list(range(len(roles))):
            raise TemplateMismatch(
                f"the chat template of {self.tokenizer.name_or_path!r} does not show every message exactly once and in "
                f"order (expected pieces {list(range(len(roles)))}, found {shown}); give the tokenizer another one"
            )
        return tuple(piece for piece in pieces if piece != "")

    def _apply_template(self, roles: tuple[Role, ...], options: Mapping[str, bool | str]) -> str:
        messages: list[dict[str, str]] = []
        for index, role in enumerate(roles):
            if not messages or messages[-1]["role"] != role:
                messages.append({"role": role, "content": ""})
            messages[-1]["content"] += PLACEHOLDER.format(index)
        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **options}
        return cast(str, self.tokenizer.apply_chat_template(messages, **settings))

    def _beginning_of_text(self) -> str:
        """The text of the beginning token, for a base model whose tokenizer adds one."""
        bos = self.tokenizer.bos_token
        begins = self._backend.encode("", add_special_tokens=True).ids
        return str(bos) if bos is not None and begins[:1] == [self.tokenizer.bos_token_id] else ""

    def label_tokens(self, template: Template) -> dict[str, tuple[int, ...]]:
        """How this tokenizer spells each of the template's labels; kept on a checkpoint's card."""
        return {text: self.encode_structure(text) for text in template.label_texts}

    def endings(self, request: Request) -> Endings:
        """Label prompt and labels as tokens, tokenised together (as `answer_parts` are in training) and split
        where the labels part.

        Raises:
            TemplateMismatch: two labels have the same tokens, or one continues another.
        """
        if not request.labels:
            return Endings((), ())
        whole = [self.encode_structure(request.label_prompt + label) for label in request.labels]
        num_common = len(_common_prefix(whole))
        labels = tuple(ids[num_common:] for ids in whole)
        for label, ids in zip(request.labels, labels, strict=True):
            if not ids or any(other is not ids and other[: len(ids)] == ids for other in labels):
                raise TemplateMismatch(
                    f"label {label!r} is the beginning of another label in the tokens of "
                    f"{self.tokenizer.name_or_path!r}; give the template a terminator"
                )
        if num_common == 0:
            raise TemplateMismatch("the template's label prompt has no tokens in common before the labels")
        return Endings(whole[0][:num_common], labels)


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    shortest = min(sequences, key=len)
    for index, token in enumerate(shortest):
        if any(sequence[index] != token for sequence in sequences):
            return shortest[:index]
    return shortest


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    data: dict[str, Any] = json.loads(backend.to_str())
    data["added_tokens"] = []
    data["post_processor"] = None
    data["truncation"] = None
    data["padding"] = None
    plain: Tokenizer = Tokenizer.from_str(json.dumps(data))
    return plain
