"""What an OpenAI-compatible chat endpoint is sent, and what its answer is worth."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from whyrank.errors import GenerationError
from whyrank.generators import Completion, Request, Segment
from whyrank.generators.labels import find_label

__all__ = ["chat_messages", "chat_payload", "label_distribution", "read_chat_answer"]

NUM_TOP_LOGPROBS = 20  # the most that services give
LEAST_LISTED_MASS = 0.99  # from here on, a label that is not among the listed tokens has probability 0
LABEL_MARKS = " \t*_`"  # Markdown that may stand between the label prompt and the label
FINISHED = frozenset({"stop", "eos", "eos_token", "stop_sequence", "end_turn"})
# A service tokenises the chat as one text, so that a special token inside a document would become structure.
SPECIAL_TOKEN = re.compile(
    r"<(?=[|｜][^<>\s]{1,64}[|｜]>|/?(?:s|bos|eos|pad|unk|think|start_of_turn|end_of_turn)>|</?SYS>>)|\[(?=/?INST\])"
)


def chat_messages(request: Request) -> list[dict[str, str]]:
    """The chat as messages. A chat endpoint writes its own answer, so the beginning of ours is left out.

    Special tokens of the common chat families inside query and document get a space after their first
    character: they reach the model as plain text.
    """
    segments = list(request.segments)
    while segments and segments[-1].role == "assistant":
        segments.pop()
    grouped = groupby(segments, key=lambda segment: segment.role)
    return [{"role": role, "content": "".join(map(_plain, parts))} for role, parts in grouped]


def _plain(segment: Segment) -> str:
    is_foreign = segment.kind in ("query", "document")
    return SPECIAL_TOKEN.sub(lambda match: f"{match[0]} ", segment.text) if is_foreign else segment.text


def chat_payload(
    request: Request, model: str, *, num_label_tokens: int, token_limit_field: str, has_logprobs: bool
) -> dict[str, Any]:
    """The body of the one call that asks for the whole answer."""
    num_explained = 0 if request.is_direct else request.sampling.max_tokens
    payload: dict[str, Any] = {
        "model": model,
        "messages": chat_messages(request),
        "temperature": request.sampling.temperature,
        token_limit_field: num_explained + num_label_tokens,
    }
    if request.sampling.temperature > 0:  # a greedy answer draws nothing, and not every service knows the field
        payload["seed"] = request.sampling.seed
    if request.chat_options:
        payload["chat_template_kwargs"] = dict(request.chat_options)
    if has_logprobs:
        payload |= {"logprobs": True, "top_logprobs": NUM_TOP_LOGPROBS}
    return payload


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: Any = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)


class _Chat(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class _TopToken(BaseModel):
    token: str
    logprob: float


class _Token(_TopToken):
    top_logprobs: list[_TopToken] = []


class _Logprobs(BaseModel):
    content: list[_Token]


def read_chat_answer(body: bytes, request: Request) -> Completion:
    """The completion in the body of a call that succeeded.

    The text is the whole answer, and `finish_reason` `length` means that this answer is cut. Where the body holds
    log-probabilities that give the label distribution, the text is the explanation alone and `label_probs` is set.

    Raises:
        GenerationError: the body is not a chat completion with an answer in it; the message does not quote it.
    """
    try:
        chat = _Chat.model_validate_json(body)
    except ValidationError as cause:
        problem = cause.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise GenerationError(
            f"expected a chat completion as JSON, found {where or 'a body'}: {problem['msg']}"
        ) from None
    choice = chat.choices[0]
    reason, text = choice.finish_reason, choice.message.content
    if reason != "length" and reason not in FINISHED:
        raise GenerationError(f"expected an answer that ended by itself or by its length, found {reason!r}")
    if not text and reason != "length":
        raise GenerationError("expected an answer with text, found none")
    usage = chat.usage or _Usage(prompt_tokens=0, completion_tokens=0)
    answer, label_probs = text or "", None
    if reason != "length":
        found = label_distribution(answer, _tokens(choice.logprobs), request)
        answer, label_probs = found or (answer, None)
    return Completion(
        answer,
        "length" if reason == "length" else "stop",
        label_probs=label_probs,
        num_prompt_tokens=usage.prompt_tokens,
        num_completion_tokens=usage.completion_tokens,
    )


def _tokens(logprobs: Any) -> list[_Token]:
    """Tokens with their alternatives; none if the service gives no log-probabilities or gives them in another form."""
    try:
        return _Logprobs.model_validate(logprobs).content
    except ValidationError:
        return []


def label_distribution(text: str, tokens: Sequence[_Token], request: Request) -> tuple[str, tuple[float, ...]] | None:
    """Explanation and unrestricted label probabilities, read where the answer's last line states its label.

    `None`, so that the whole answer is parsed instead, unless the last line is the label prompt and one label, that
    label is one token, every other label is among the listed alternatives (or these hold 0.99 of the
    probability), no listed token is only the beginning of a label that is not listed, and the explanation holds
    neither a stop nor a thought.
    """
    joined = "".join(token.token for token in tokens)
    if not tokens or joined.strip() != text.strip():
        return None
    words = request.label_prompt.strip().rsplit("\n", 1)[-1]
    line_start = joined.rstrip().rfind("\n") + 1
    prompt = re.compile(rf"[#>{LABEL_MARKS}]*{re.escape(words)}[{LABEL_MARKS}]*", re.IGNORECASE).match(
        joined, line_start
    )
    explanation = _explanation(joined[:line_start], request)
    if not words or prompt is None or explanation is None:
        return None
    token = _token_at(prompt.end(), tokens)
    stated = find_label(token.token, request.labels)
    if stated is None or not _is_alone(joined[prompt.end() :], token.token.strip(), request.labels[stated]):
        return None
    probs = _label_probs(token, request.labels)
    return None if probs is None else (explanation, probs)


def _explanation(text: str, request: Request) -> str | None:
    beginning = "".join(segment.text for segment in request.segments if segment.role == "assistant")
    if "think>" in text or any(stop in f"\n{text}" for stop in request.stops):
        return None
    return text.strip().removeprefix(beginning.strip()).strip()


def _token_at(position: int, tokens: Sequence[_Token]) -> _Token:
    end = 0
    for token in tokens:
        end += len(token.token)
        if end > position:
            return token
    return _Token(token="", logprob=0.0)


def _is_alone(rest: str, label: str, label_text: str) -> bool:
    return rest.strip(f"{LABEL_MARKS}\n.") in (label, label_text.strip())


def _label_probs(token: _Token, labels: Sequence[str]) -> tuple[float, ...] | None:
    listed = {top.token: math.exp(min(top.logprob, 0.0)) for top in (token, *token.top_logprobs)}
    probs, seen = [0.0] * len(labels), set()
    for text, probability in listed.items():
        position = find_label(text, labels)
        if position is not None:
            probs[position] += probability
            seen.add(position)
    missing = [label.strip() for position, label in enumerate(labels) if position not in seen]
    is_begun = any(label.startswith(text.strip()) for label in missing for text in listed if text.strip())
    if missing and (is_begun or sum(listed.values()) < LEAST_LISTED_MASS):
        return None
    return tuple(probs)
