"""Drawing answers: the engine writes explanations, the label is drawn from its distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from whyrank.errors import GenerationError
from whyrank.generators import Completion, Sampling
from whyrank.generators.hf import HfGenerator
from whyrank.records import Document, Query, Status
from whyrank.store import content_key
from whyrank.template import Rendered, Template
from whyrank.training.ranks import ranks
from whyrank.training.rollouts import Evidence, Rollout, RolloutCandidate, RolloutGroup
from whyrank.training.scoring import Episode

__all__ = ["Drawn", "draw"]

LEAST_LABEL_MASS = 0.5  # as for judgments: below it the model was not answering the question
PairIds = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A round of answers: the groups that rewards look at, and the same answers as episodes, in the same order.

    An answer without any probability on the labels has its place in `groups`; in `episodes` its label is the first.
    """

    groups: tuple[RolloutGroup, ...]
    episodes: tuple[Episode, ...]


def draw(
    generator: HfGenerator,
    template: Template,
    chosen: Sequence[tuple[Query, Sequence[Document]]],
    evidence: Mapping[PairIds, tuple[Evidence, ...]],
    *,
    num_samples: int,
    temperature: float,
    seed: str,
) -> Drawn:
    """Draw `num_samples` answers for every candidate; the prompt of a pair is read once. Of several processes each
    draws its share, and all have all of them afterwards.

    What is drawn depends on the network, the seed and the ids of the pair, not on its company.

    Raises:
        GenerationError: a pair does not fit the model.
    """
    cap = template.limits.max_explanation_tokens
    asked: list[tuple[str, str, Rendered]] = []
    for query, documents in chosen:
        for document in documents:
            for number in range(num_samples):
                own = int(content_key(seed, query.query_id, document.doc_id, str(number))[:15], 16)
                sampling = Sampling(temperature, cap, own)
                rendered = template.render(query.text, document.full_text, generator.tokens, sampling=sampling)
                asked.append((query.query_id, document.doc_id, rendered))
    answers = ranks().gathered(_answers(generator, ranks().share(asked)))
    rollouts, episodes = [], []
    for index, (_, _, rendered) in enumerate(asked):
        rollout, episode = _read(rendered, answers[index], generator, template)
        rollouts.append(rollout)
        episodes.append(episode)
    source = iter(zip(asked, rollouts, strict=True))
    groups = []
    for query, documents in chosen:
        candidates = []
        for document in documents:
            own_rows = [next(source) for _ in range(num_samples)]
            start, end = own_rows[0][0][2].passage
            known = evidence.get((query.query_id, document.doc_id), ())
            samples = tuple(rollout for _, rollout in own_rows)
            candidates.append(RolloutCandidate(document.doc_id, document.full_text[start:end], samples, known))
        groups.append(RolloutGroup(query.query_id, query.text, tuple(candidates), template.scale.values, cap))
    return Drawn(tuple(groups), tuple(episodes))


def _answers(generator: HfGenerator, asked: Sequence[tuple[str, str, Rendered]]) -> list[Completion]:
    """What the network writes, in the order of what is asked."""
    answers: dict[int, Completion] = {}
    for index, completion in generator.generate(rendered.request for _, _, rendered in asked):
        if completion.error is not None:
            raise GenerationError(f"({asked[index][0]}, {asked[index][1]}): {completion.error}") from completion.error
        answers[index] = completion
    return [answers[index] for index in range(len(asked))]


def _read(
    rendered: Rendered, completion: Completion, generator: HfGenerator, template: Template
) -> tuple[Rollout, Episode]:
    request, tokens = rendered.request, generator.tokens
    ends = tokens.endings(request)
    raw, written = completion.label_probs or (), completion.token_ids or ()
    mass = sum(raw)
    probs = tuple(p / mass for p in raw) if mass > 0 else None
    # Another stream than the engine's, so that the label is independent of the last token.
    place = Random(f"label {request.sampling.seed}").choices(range(len(raw)), probs)[0] if probs else None
    status: Status = "ok" if mass >= LEAST_LABEL_MASS else "low_mass"
    if completion.finish_reason == "length":
        status = "forced"
    if place is None:
        status = "unparsed"
    scale = template.scale
    rollout = Rollout(
        explanation=template.read_explanation(completion.text),
        status=status,
        label=None if place is None else scale.labels[place],
        value=None if place is None else scale.values[place],
        probs=probs,
        num_tokens=len(written),
    )
    episode = Episode(
        prompt=tuple(tokens.prompt_ids(request)),
        explanation=written,
        has_end=completion.finish_reason == "stop",
        log_probs=completion.logprobs,
        label_prompt=ends.prompt,
        labels=ends.labels,
        label=place or 0,
    )
    return rollout, episode
