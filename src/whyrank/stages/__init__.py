"""One file per verb: read the inputs, run the stage, write the outputs and their manifest.

Each function takes paths and options, does its work with progress on stderr, and returns what happened. The
command line and recipes are thin callers of these functions.
"""

from __future__ import annotations

import logging
from typing import Final

from whyrank.store import BadLines

__all__ = ["EXIT_OK", "EXIT_PARTIAL", "warn_of_bad_lines"]

EXIT_OK: Final = 0
EXIT_PARTIAL: Final = 7


def warn_of_bad_lines(bad: BadLines | None) -> None:
    """Tell how many lines `--skip-bad` passed over, for verbs whose result has no place for the count."""
    if bad is not None and bad.count:
        logging.getLogger("whyrank").warning("%d malformed lines were passed over: %s", bad.count, bad.examples[0])
