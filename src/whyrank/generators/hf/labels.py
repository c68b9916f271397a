"""The distribution over labels that are token sequences.

Probabilities multiply along the trie of the label sequences, so "10" is not "1" and a label counts only with
its terminator. `paths` are the prefixes after which next-token logits are needed; every other prefix lies on
one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

__all__ = ["label_log_probs", "prefixes_to_visit"]

Tokens = tuple[int, ...]


@lru_cache
def prefixes_to_visit(labels: tuple[Tokens, ...]) -> tuple[Tokens, ...]:
    """The longest proper, non-empty prefixes of the labels, without those that begin another one.

    Visiting each of them once gives the logits after every inner node of the trie.
    """
    inner = {label[:end] for label in labels for end in range(1, len(label))}
    beginnings = {node[:end] for node in inner for end in range(1, len(node))}
    return tuple(sorted(inner - beginnings))


def label_log_probs(labels: Sequence[Tokens], after: Mapping[Tokens, Mapping[int, float]]) -> list[float]:
    """Natural-log probability of each label.

    Args:
        labels: token sequences, none a prefix of another.
        after: for every inner node of the trie (the empty prefix included), the log-probability of each token
            that may follow it.
    """
    return [sum(after[label[:end]][label[end]] for end in range(len(label))) for label in labels]
