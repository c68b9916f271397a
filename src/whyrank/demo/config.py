"""How large the demo is; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from whyrank.training.config import DistillConfig

__all__ = ["RECIPE", "DemoConfig"]

# How students of the almanac are trained; docs/log.md says why.
RECIPE = DistillConfig(device="cpu", optimizer="muon", learning_rate=6e-3)


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Sizes that fit into six minutes on two CPU cores."""

    domains: tuple[str, ...] = ("houseplants", "bicycle", "bread")
    """Domains of the almanac that the students are trained on and tested with."""
    num_steps: int = 320
    """Optimizer steps of the explaining student."""
    num_train_queries: int = 2000
    """Queries that training pairs are drawn from."""
    num_queries: int = 40
    """Test queries of these domains, 24 candidates each."""
    num_shipped_queries: int = 144
    """Test queries of all domains, for the shipped model."""
    num_irrelevant: int = 5
    """Label-0 documents per training query."""
    seed: int = 0
    """Fixes data and weights."""
