"""The almanac: an embedded, hand-written collection in which observations have to be combined.

Queries report two observations in lay words; documents explain mechanisms in textbook words. Each observation fits
several mechanisms, and only both together decide; the setting must match too. Word overlap says nothing about the
label. It is a model organism and the offline demonstration, never a measure of quality on real text.
"""

from __future__ import annotations

from whyrank.almanac.bright import write_bright
from whyrank.almanac.collection import NUM_CANDIDATES, Collection, GoldExplanation, build
from whyrank.almanac.grammar import QUOTE_PROBABILITY, REPEAT_PROBABILITY, DocumentFacts, QueryFacts
from whyrank.almanac.handwritten import handwritten_names, load_handwritten
from whyrank.almanac.loading import domain_names, load_knowledge
from whyrank.almanac.reasoning import MAX_EXPLANATION_WORDS, Reasoning
from whyrank.almanac.schema import Domain, Knowledge, Mechanism, Observation, Setting
from whyrank.almanac.splits import DRAWN_SPLITS, HANDWRITTEN, SPLITS, DrawnSplit, Split

__all__ = [
    "DRAWN_SPLITS",
    "HANDWRITTEN",
    "MAX_EXPLANATION_WORDS",
    "NUM_CANDIDATES",
    "QUOTE_PROBABILITY",
    "REPEAT_PROBABILITY",
    "SPLITS",
    "Collection",
    "DocumentFacts",
    "Domain",
    "DrawnSplit",
    "GoldExplanation",
    "Knowledge",
    "Mechanism",
    "Observation",
    "QueryFacts",
    "Reasoning",
    "Setting",
    "Split",
    "build",
    "domain_names",
    "handwritten_names",
    "load_handwritten",
    "load_knowledge",
    "write_bright",
]
