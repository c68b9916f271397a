"""What a job says about requests that failed: the first reason, and how many there are."""

from __future__ import annotations

from whyrank.errors import GenerationError

__all__ = ["describe_failures", "require_answers"]


def describe_failures(num_failed: int, first: str | None) -> str:
    """One line with the reason of the first failure; the others are often the same."""
    return f"{num_failed} requests failed, the first with: {first}"


def require_answers(num_failed: int, num_judgments: int, first: str | None) -> None:
    """Refuse a job in which nothing was answered: what came of it would look like a result.

    Raises:
        GenerationError: every request failed.
    """
    if num_failed and num_failed == num_judgments:
        raise GenerationError(f"no answer at all: {describe_failures(num_failed, first)}")
