"""`whyrank.json`: what a checkpoint was trained to be asked, saved beside its weights and checked on load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from whyrank.calibration import Calibration, calibration_from_dict
from whyrank.errors import InputError, TemplateMismatch
from whyrank.records import Mode
from whyrank.store import atomic_path, read_json
from whyrank.template import Template

__all__ = ["CARD_NAME", "Card", "read_card", "write_card"]

CARD_NAME = "whyrank.json"
CARD_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Card:
    """The card of a checkpoint.

    `label_tokens` maps each label text to its token ids at training time, so that a tokenizer that changed on the
    way is noticed. `training` is free-form provenance. `calibration`, which mode `auto` rests on, is measured after
    training; a card may be without one. `search_queries` is the version of the prompt by which it was taught to write
    search queries, and empty if it was not.
    """

    template: Template
    modes: tuple[Mode, ...] = ("explain",)
    label_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    search_queries: str = ""

    def check(self, *, mode: Mode, template: Template | None, label_tokens: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse to run the checkpoint in a way it was not trained for.

        Raises:
            TemplateMismatch: another prompt, answer shape or scale, an untrained mode, or other label tokens.
        """
        if template is not None and not template.asks_like(self.template):
            raise TemplateMismatch(
                f"the checkpoint was trained with template {self.template.version}, not {template.version}; leave "
                "--template out to use its own"
            )
        if mode not in self.modes:
            raise TemplateMismatch(
                f"the checkpoint was trained for --mode {' and '.join(self.modes)}, not for {mode}: its answers "
                "would mean nothing"
            )
        if self.label_tokens and dict(self.label_tokens) != dict(label_tokens):
            raise TemplateMismatch(
                f"the tokenizer spells the labels as {dict(label_tokens)}, at training time it was "
                f"{dict(self.label_tokens)}; restore the tokenizer that was saved with the checkpoint"
            )

    def check_search_queries(self, prompt: str) -> None:
        """Refuse a checkpoint that was not taught to write search queries, or by another prompt.

        Raises:
            TemplateMismatch: which of the two.
        """
        if self.search_queries != prompt:
            found = f"by {self.search_queries}" if self.search_queries else "not at all"
            raise TemplateMismatch(
                f"expected a checkpoint that was taught to write search queries by {prompt}, found one that was taught "
                f"{found}; train one with whyrank distill --search-queries, or give another model"
            )

    def check_both_modes(self) -> None:
        """Refuse a checkpoint that lacks one of the modes that `auto` is made of.

        Raises:
            TemplateMismatch: it was trained for one mode only.
        """
        if set(self.modes) != set(get_args(Mode)):
            raise TemplateMismatch(
                f"--mode auto needs a checkpoint that was trained for {' and '.join(get_args(Mode))} (whyrank distill "
                f"--modes explain,direct); this one was trained for {' and '.join(self.modes)}"
            )


def write_card(folder: Path | str, card: Card) -> None:
    """Write `whyrank.json` into a checkpoint folder."""
    data = {
        "format": CARD_FORMAT,
        "template_version": card.template.version,
        "template": card.template.to_dict(),
        "modes": list(card.modes),
        "label_tokens": {label: list(ids) for label, ids in card.label_tokens.items()},
        "training": dict(card.training),
    }
    if card.search_queries:
        data["search_queries"] = card.search_queries
    if card.calibration is not None:  # without one, the card is what it has always been
        data["calibration"] = card.calibration.to_dict()
    with atomic_path(Path(folder) / CARD_NAME) as temporary:
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_card(path: Path | str) -> Card:
    """Read a `whyrank.json`.

    Raises:
        InputError: it is not one, comes from a newer whyrank, or its template was edited by hand.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != CARD_FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: expected a whyrank card of format {CARD_FORMAT}, found {found!r}; update whyrank")
    try:
        card = Card(
            template=Template.from_dict(data["template"], where=str(path)),
            modes=tuple(data["modes"]),
            label_tokens={label: tuple(ids) for label, ids in data["label_tokens"].items()},
            training=data["training"],
            search_queries=str(data.get("search_queries", "")),
            calibration=calibration_from_dict(data["calibration"], where=str(path)) if "calibration" in data else None,
        )
        version = data["template_version"]
    except (KeyError, TypeError, AttributeError) as cause:
        raise InputError(
            f"{path}: expected a whole whyrank card, found one that is damaged ({type(cause).__name__}: {cause}); "
            "copy it again from the checkpoint"
        ) from cause
    if card.template.version != version:
        raise InputError(
            f"{path}: the template is {card.template.version}, the card was written for {version}; a checkpoint's "
            "template must not be edited"
        )
    return card
