"""Keep the figures of a demo run: results/demo.json from out/demo's results and manifest.

python scripts/record_demo.py out/demo
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from whyrank.store import atomic_path, read_json

OUT = Path(__file__).resolve().parent.parent / "results" / "demo.json"


def main(folder: Path) -> None:
    """Join figures and provenance; nothing is typed by hand."""
    manifest, results = read_json(folder / "manifest.json"), read_json(folder / "results.json")
    if not manifest["is_finished"]:
        sys.exit(f"{folder} holds a demo that did not finish")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    kept = {
        "command": "make demo",
        "commit": commit,
        "date": manifest["started"][:10],
        "seed": manifest["seed"],
        "config": manifest["config"],
        "hardware": {key: manifest["hardware"][key] for key in ("machine", "num_cpus")},
        "versions": manifest["versions"],
        "seconds": manifest["seconds"],
        "counts": manifest["counts"],
        **results,
    }
    with atomic_path(OUT) as temporary:
        temporary.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
