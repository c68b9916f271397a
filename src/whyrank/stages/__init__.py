"""One file per verb: read the inputs, run the stage, write the outputs and their manifest.

Each function takes paths and options, does its work with progress on stderr, and returns what happened. The
command line and recipes are thin callers of these functions.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EXIT_OK", "EXIT_PARTIAL"]

EXIT_OK: Final = 0
EXIT_PARTIAL: Final = 7
