"""Our rewards in other trainers: as a reward function of TRL, and as rows for verl and OpenRLHF.

Those trainers write the whole answer themselves, label included. It is read by the template, so that an answer in
another form than the student's has no label. Group-wise rewards need all candidates of a query in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from whyrank.errors import InputError
from whyrank.generators import Request
from whyrank.generators.hf.chat import ChatTokens
from whyrank.records import Document, Query, Status
from whyrank.template import Template
from whyrank.training.rewards import WeightedReward, reward_group
from whyrank.training.rollouts import Evidence, Rollout, RolloutCandidate, RolloutGroup

__all__ = ["Trainer", "export_rows", "read_answer", "trl_reward"]

Trainer = Literal["trl", "verl", "openrlhf"]
PairIds = tuple[str, str]
DATA_SOURCE = "whyrank"


def read_answer(text: str, template: Template, num_tokens: int) -> Rollout:
    """A whole answer as a rollout; the explanation prompt, which ends the prompt, is put back before it."""
    answer = template.parse(template.answer_words.explanation_prompt + text)
    if answer.label is None:
        return Rollout(answer.explanation, "unparsed", None, None, None, num_tokens)
    status: Status = "ok"
    return Rollout(answer.explanation, status, answer.label, template.scale.value(answer.label), None, num_tokens)


def trl_reward(
    rewards: Sequence[WeightedReward], template: Template, *, unreadable: float = -1.0
) -> Callable[..., list[float]]:
    """The sum of rewards as a reward function of TRL's GRPOTrainer and RLOOTrainer.

    It expects the columns of `export_rows(..., trainer="trl")`: `query_id`, `doc_id`, `query`, `passage`, `evidence`.
    Rows of one query form a group as far as they come in one call: keep `shuffle_dataset` off and the batch a multiple
    of the candidates of a query, or rewards about order see only a part.

    Args:
        rewards: summed by weight.
        template: reads the answers.
        unreadable: what an answer without a label gets.
    """

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        places: dict[str, dict[str, list[int]]] = {}
        for place, ids in enumerate(zip(columns["query_id"], columns["doc_id"], strict=True)):
            places.setdefault(ids[0], {}).setdefault(ids[1], []).append(place)
        found = [0.0] * len(completions)
        for query_id, by_document in places.items():
            candidates = tuple(
                RolloutCandidate(
                    doc_id,
                    columns["passage"][own[0]],
                    tuple(read_answer(_text(completions[p]), template, len(completion_ids[p])) for p in own),
                    tuple(Evidence(**item) for item in columns["evidence"][own[0]]),
                )
                for doc_id, own in by_document.items()
            )
            query = columns["query"][next(iter(by_document.values()))[0]]
            cap = template.limits.max_explanation_tokens
            group = RolloutGroup(query_id, query, candidates, template.scale.values, cap)
            order = [place for own in by_document.values() for place in own]
            for place, value in zip(order, reward_group(group, rewards, unreadable=unreadable).total, strict=True):
                found[place] = value
        return found

    return reward


def _text(completion: Any) -> str:
    """A completion is a text, or for conversational data a list of messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def export_rows(
    evidence: Mapping[PairIds, Sequence[Evidence]],
    queries: Mapping[str, Query],
    documents: Mapping[str, Document],
    template: Template,
    tokens: ChatTokens,
    trainer: Trainer,
) -> Iterator[dict[str, Any]]:
    """One row per pair with evidence, the pairs of a query side by side.

    verl reads `prompt` and gives `reward_model.ground_truth` and `extra_info` to its reward function; OpenRLHF reads
    `input` and `label`. Prompts are messages for verl, and for the others text that is to be tokenised as it stands.

    Raises:
        InputError: a text is missing.
    """
    for (query_id, doc_id), found in sorted(evidence.items()):
        if not found:
            continue
        if query_id not in queries or doc_id not in documents:
            raise InputError(f"the pair ({query_id}, {doc_id}): its query or document is not in the given files")
        query, document = queries[query_id], documents[doc_id].full_text
        rendered = template.render(query.text, document, tokens)
        start, end = rendered.passage
        known = [asdict(item) for item in found]
        facts = {"query_id": query_id, "doc_id": doc_id, "query": query.text, "passage": document[start:end]}
        total = sum(item.trust for item in found)
        believed = sum(item.trust * item.value for item in found) / total
        if trainer == "verl":
            yield {
                "data_source": DATA_SOURCE,
                "prompt": _messages(rendered.request),
                "reward_model": {"style": "rule", "ground_truth": believed},
                "extra_info": {**facts, "evidence": known},
            }
        else:
            text = str(tokens.tokenizer.decode(tokens.prompt_ids(rendered.request)))
            yield (
                {"input": text, "label": believed, **facts}
                if trainer == "openrlhf"
                else {
                    "prompt": text,
                    **facts,
                    "evidence": known,
                }
            )


def _messages(request: Request) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for segment in request.segments:
        if not messages or messages[-1]["role"] != segment.role:
            messages.append({"role": segment.role, "content": ""})
        messages[-1]["content"] += segment.text
    return messages
