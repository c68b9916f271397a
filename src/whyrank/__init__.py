"""Rerankers that show their reasons."""

from whyrank.errors import WhyrankError
from whyrank.generators.opening import ModelOptions
from whyrank.records import Document, Judgment, Query
from whyrank.rerank import Ranked, Ranking, Reranker
from whyrank.template import Template

__all__ = [
    "Document",
    "Judgment",
    "ModelOptions",
    "Query",
    "Ranked",
    "Ranking",
    "Reranker",
    "Template",
    "WhyrankError",
]
