"""What a network says about answers that were drawn: log-probabilities, values and entropy of every action.

The actions of an answer are the tokens of its explanation, the token with which it ended it, and the label. The end is
the first token of the label prompt, which the runtime writes in the model's place; the rest of the label prompt is
read and never scored. The label is one action, whose probability is that among the labels of the scale, multiplied
along their trie. An explanation whose end was spelled anew (`Completion.logprobs` is `None`) is only read: its tokens
are not those that were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from whyrank.generators.hf.labels import prefixes_to_visit
from whyrank.training.packing import Strand, pack, predict
from whyrank.training.ppo_math import entropy, restricted

__all__ = ["Episode", "Scores", "ValueHead", "action_mask", "score"]

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Episode:
    """One drawn answer in tokens.

    `has_end`: the model ended the explanation itself. `log_probs` are those with which the engine drew the explanation.
    `label_prompt` and `labels` are the tokens of `Endings`; `label` is the place of the drawn label among them.
    """

    prompt: Tokens
    explanation: Tokens
    has_end: bool
    log_probs: tuple[float, ...] | None
    label_prompt: Tokens
    labels: tuple[Tokens, ...]
    label: int

    @property
    def num_free(self) -> int:
        """Actions before the label."""
        return 0 if self.log_probs is None else len(self.explanation) + self.has_end

    @property
    def strands(self) -> list[Strand]:
        """What has to be read: the answer up to its label, and every further way through the labels' trie."""
        written = (*self.prompt, *self.explanation, *self.label_prompt)
        paths = prefixes_to_visit(self.labels)
        start, asked = len(self.prompt), len(written)
        splits = (start, asked) if paths else (start,)
        free = [float(start <= place < start + self.num_free) for place in range(asked)]
        ways = [Strand((*written, self.labels[0][0]), (*free, 1.0), splits)]
        for path in paths:
            # After every node of the path but the root; which token stands there does not matter, the logits do.
            scored = [0.0] * (asked + 1) + [1.0] * len(path)
            ways.append(Strand((*written, *path, path[-1]), tuple(scored), splits))
        return ways


@dataclass(frozen=True, slots=True)
class Scores:
    """Of R rollouts with at most T actions and L labels: `log_probs`, `values` and `entropies` are `(R, T)`, 0 where
    there is no action; `labels` `(R, L)` are log-probabilities among the labels."""

    log_probs: Tensor
    values: Tensor
    entropies: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Scores:
        """The same on a device."""
        return self._each(lambda found: found.to(device))

    def detach(self) -> Scores:
        """The same without gradient."""
        return self._each(Tensor.detach)

    def rows(self, rows: Sequence[int], width: int) -> Scores:
        """Some rollouts, with at most `width` actions."""
        log_probs, values, entropies = (
            found[list(rows), :width] for found in (self.log_probs, self.values, self.entropies)
        )
        return Scores(log_probs, values, entropies, self.labels[list(rows)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Scores:
        return Scores(*map(change, (self.log_probs, self.values, self.entropies, self.labels)))


class ValueHead(nn.Module):
    """What is to be expected of an answer, from the last hidden state before an action. It begins at 0 everywhere."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, 1)
        nn.init.eye_(self.inner.weight)  # no random numbers: the same head for every seed
        nn.init.zeros_(self.inner.bias)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, states: Tensor) -> Tensor:
        """`(..., hidden)` to `(...)`, float32; no gradient goes into the states."""
        values: Tensor = self.outer(torch.tanh(self.inner(states.detach().float())))
        return values[..., 0]


def action_mask(episodes: Sequence[Episode], device: torch.device | str = "cpu") -> Tensor:
    """`(R, T)`, 1 where there is an action."""
    lengths = torch.tensor([episode.num_free + 1 for episode in episodes], device=device)
    return (torch.arange(int(lengths.max()), device=device)[None] < lengths[:, None]).float()


def score(
    model: PreTrainedModel,
    head: ValueHead | None,
    episodes: Sequence[Episode],
    temperature: float,
    *,
    has_entropy_gradient: bool = False,
) -> Scores:
    """Run a network over answers, those of one pair side by side, with gradient where torch records it.

    Args:
        model: a causal language model.
        head: values are 0 without one.
        episodes: all with the same labels.
        temperature: that with which explanations were drawn; labels are drawn at 1.
        has_entropy_gradient: whether entropies are to be optimised; with a large vocabulary that takes memory.
    """
    strands = [strand for episode in episodes for strand in episode.strands]
    batch = pack(strands, model.device)
    said = predict(model, batch)
    logits, states = said.logits.float(), said.states
    places = torch.arange(len(logits), device=logits.device).split(list(batch.num_scored))
    per_episode = len(strands) // len(episodes)
    first = list(places[::per_episode])
    roots = torch.stack([found[-1] for found in first])
    free = torch.cat([found[:-1] for found in first])
    mask = action_mask(episodes, logits.device)
    where = mask.nonzero(as_tuple=True)

    labels = restricted(_label_log_probs(logits, places, per_episode, episodes[0].labels))
    chosen = torch.tensor([[episode.label] for episode in episodes], device=logits.device)
    drawn = torch.log_softmax(logits[free] / temperature, dim=-1).gather(1, batch.targets[free][:, None])[:, 0]
    values = head(states) if head is not None else logits.new_zeros(len(logits))
    everything = torch.cat(first)
    log_probs = logits.new_zeros(len(logits)).scatter(0, free, drawn).scatter(0, roots, labels.gather(1, chosen)[:, 0])
    with torch.set_grad_enabled(has_entropy_gradient and torch.is_grad_enabled()):
        unsure = logits.new_zeros(len(logits)).scatter(0, free, entropy(logits[free] / temperature))
        unsure = unsure.scatter(0, roots, entropy(labels))

    def table(flat: Tensor) -> Tensor:
        return torch.zeros_like(mask).index_put(where, flat[everything])

    return Scores(table(log_probs), table(values), table(unsure), labels)


def _label_log_probs(logits: Tensor, places: Sequence[Tensor], per_episode: int, labels: tuple[Tokens, ...]) -> Tensor:
    """`(R, L)`: log-probability of every label, the product along its tokens."""
    paths = prefixes_to_visit(labels)
    at_node: dict[Tokens, Tensor] = {(): torch.stack([found[-1] for found in places[::per_episode]])}
    for number, path in enumerate(paths, start=1):
        scored = torch.stack(list(places[number::per_episode]))
        for depth in range(len(path)):
            at_node[path[: depth + 1]] = scored[:, depth]
    after = {node: torch.log_softmax(logits[where], dim=-1) for node, where in at_node.items()}
    return torch.stack(
        [torch.stack([after[label[:i]][:, label[i]] for i in range(len(label))]).sum(dim=0) for label in labels], dim=1
    )
