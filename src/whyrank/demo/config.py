"""How large the demo is; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DemoConfig"]


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Sizes that fit into six minutes on two CPU cores."""

    domains: tuple[str, ...] = ("houseplants", "bicycle", "bread")
    """Domains of the almanac that the students are trained on and tested with."""
    num_steps: int = 480
    """Optimizer steps of the explaining student."""
    num_train_queries: int = 2000
    """Queries that training pairs are drawn from."""
    num_queries: int = 40
    """Test queries, 24 candidates each."""
    num_irrelevant: int = 5
    """Label-0 documents per training query."""
    seed: int = 0
    """Fixes data and weights."""
