"""Which combination and which text belongs to which split.

Both are functions of the thing itself, so that two splits built apart, with any seed and size, never meet. One split
is not drawn at all: it was written freely (see `handwritten`).
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from whyrank.almanac.schema import Domain, Mechanism, Setting
from whyrank.errors import InputError
from whyrank.store import content_key

__all__ = ["DRAWN_SPLITS", "HANDWRITTEN", "SPLITS", "DrawnSplit", "Split", "combinations_of", "drawn", "split_of_text"]

DrawnSplit = Literal["train", "dev", "test"]
"""The splits that the grammar draws."""

Split = Literal[DrawnSplit, "test-handwritten"]
"""Every split."""

DRAWN_SPLITS: Final[tuple[DrawnSplit, ...]] = get_args(DrawnSplit)
SPLITS: Final[tuple[Split, ...]] = get_args(Split)
HANDWRITTEN: Final = "test-handwritten"
TRAIN_SHARE, DEV_SHARE = 0.7, 0.1


def drawn(split: str) -> DrawnSplit:
    """The name of a split that the grammar draws.

    Raises:
        InputError: it is the handwritten one, or no split at all.
    """
    for known in DRAWN_SPLITS:
        if split == known:
            return known
    if split == HANDWRITTEN:
        raise InputError(
            f"expected a split that is drawn, among {', '.join(DRAWN_SPLITS)}, found {split!r}: "
            "its texts exist already, and load_handwritten() reads them"
        )
    raise InputError(f"expected a split among {', '.join(DRAWN_SPLITS)}, found {split!r}")


def combinations_of(split: DrawnSplit, domain: Domain, mechanism: Mechanism) -> list[tuple[tuple[str, str], Setting]]:
    """The (observation pair, setting) combinations of a mechanism that queries of this split may use.

    Each pair is tested in one setting, used for development in one other (every second pair), and trained in the
    rest. The settings rotate, so that every pair is seen in training, and test asks for combinations, not for facts.
    """
    num_settings = len(domain.settings)
    chosen = []
    for index, pair in enumerate(mechanism.pairs()):
        for place in range(num_settings):
            distance = (place - index) % num_settings
            owner: DrawnSplit = "test" if distance == 0 else "dev" if distance == 1 and index % 2 == 0 else "train"
            if owner == split:
                chosen.append((pair, domain.settings[place]))
    return chosen


def split_of_text(text: str) -> DrawnSplit:
    """The split that a document's text belongs to, by its hash: 70 % train, 10 % dev, 20 % test."""
    place = int(content_key("almanac", text)[:8], 16) / 16**8
    if place < TRAIN_SHARE:
        return "train"
    return "dev" if place < TRAIN_SHARE + DEV_SHARE else "test"
