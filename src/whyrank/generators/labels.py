"""Which of a request's labels a piece of text names."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["find_label"]


def find_label(label: str, texts: Sequence[str]) -> int | None:
    """Position of `label` ("2") among label texts with terminators (" 2 ##"); `None` if it is none of them.

    A request holds labels with their common terminator. `label` names a text if what remains of it could be that
    terminator: every text ends with it, no text consists of it, and it does not begin inside a word ("tru" is
    not "true").
    """
    label = label.strip()
    found = [position for position, text in enumerate(texts) if label and _names(label, text, texts)]
    return found[0] if len(found) == 1 else None


def _names(label: str, text: str, texts: Sequence[str]) -> bool:
    whole = text.strip()
    if not whole.startswith(label):
        return False
    terminator = whole.removeprefix(label)
    if label[-1].isalnum() and terminator[:1].isalnum():
        return False
    return all(other.strip() != terminator.strip() and other.strip().endswith(terminator) for other in texts)
