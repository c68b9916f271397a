"""Every exception whyrank raises on purpose.

    WhyrankError
    ├── InputError          a file or argument is not what was expected (also a ValueError)
    │   └── OtherJob        a folder holds what was made from other inputs or with other options
    ├── MissingExtra        an optional dependency is not installed (also an ImportError)
    ├── UnsupportedModel    a checkpoint that this backend cannot run correctly
    ├── TemplateMismatch    checkpoint, tokenizer and template do not belong together
    ├── GenerationError     one request failed; travels inside `Completion.error`, never as text
    └── TooManyUnparsed     a run holds more unreadable judgments than the caller allowed

Messages say what was expected, what was found, and how to fix it.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = [
    "GenerationError",
    "InputError",
    "MissingExtra",
    "OtherJob",
    "TemplateMismatch",
    "TooManyUnparsed",
    "UnsupportedModel",
    "WhyrankError",
    "require",
]


class WhyrankError(Exception):
    """Base of every error that whyrank raises on purpose."""


class InputError(WhyrankError, ValueError):
    """A file, line or argument is not what was expected."""


class OtherJob(InputError):
    """A folder holds results of another job, which must not be mixed with those of this one."""


class MissingExtra(WhyrankError, ImportError):
    """An optional dependency is missing; the message carries the exact pip line."""


class UnsupportedModel(WhyrankError):
    """The checkpoint needs something that the chosen backend does not do."""


class TemplateMismatch(WhyrankError):
    """A checkpoint would be run with a prompt or tokenizer it was not trained with."""


class GenerationError(WhyrankError):
    """One request could not be completed."""


class TooManyUnparsed(WhyrankError):
    """A run holds more unreadable judgments than allowed."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise `MissingExtra` with the pip line that installs it, the cause chained."""
    try:
        return import_module(module)
    except ImportError as cause:
        raise MissingExtra(
            f"{module!r} could not be imported ({cause}). It belongs to the optional extra [{extra}]: "
            f"pip install 'whyrank[{extra}]'"
        ) from cause
