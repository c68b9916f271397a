"""Where recorded figures come from, and how they are kept: `results/*.json`, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from whyrank.store import atomic_path

__all__ = ["RESULTS", "ROOT", "provenance", "write_result"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


# Read when the script starts: what is committed while it runs is not what ran.
COMMIT = _git("rev-parse", "HEAD")
IS_CHANGED = bool(_git("status", "--porcelain", "--untracked-files=no", "src", "scripts"))


def provenance(command: str) -> dict[str, Any]:
    """Command, commit, whether the sources differed from it, date and hardware."""
    return {
        "command": command,
        "commit": COMMIT,
        "is_changed": IS_CHANGED,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} CPU cores",
    }


def write_result(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
