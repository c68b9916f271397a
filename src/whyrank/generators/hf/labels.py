"""The distribution over labels that are token sequences.

Probabilities multiply along the trie of the label sequences, so "10" is not "1" and a label counts only with
its terminator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

__all__ = ["children", "inner_nodes", "label_log_probs", "prefixes_to_visit"]

Tokens = tuple[int, ...]


@lru_cache
def inner_nodes(labels: tuple[Tokens, ...]) -> tuple[Tokens, ...]:
    """The proper prefixes of the labels, after which next-token logits are needed: the empty one, which is the root of
    their trie, first, and each before those that it begins."""
    return tuple(sorted({label[:end] for label in labels for end in range(len(label))}))


def prefixes_to_visit(labels: tuple[Tokens, ...]) -> tuple[Tokens, ...]:
    """The inner nodes without those that begin another one: reading along each of them passes all but the root."""
    nodes = inner_nodes(labels)
    beginnings = {node[:end] for node in nodes for end in range(len(node))}
    return tuple(node for node in nodes if node and node not in beginnings)


def children(labels: tuple[Tokens, ...], node: Tokens) -> list[int]:
    """The tokens that may follow an inner node."""
    return sorted({label[len(node)] for label in labels if label[: len(node)] == node != label})


def label_log_probs(labels: Sequence[Tokens], after: Mapping[Tokens, Mapping[int, float]]) -> list[float]:
    """Natural-log probability of each label.

    Args:
        labels: token sequences, none a prefix of another.
        after: for every inner node of the trie (the empty prefix included), the log-probability of each token
            that may follow it.
    """
    return [sum(after[label[:end]][label[end]] for end in range(len(label))) for label in labels]
