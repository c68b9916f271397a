"""Keep the figures of a demo run: results/demo.json from out/demo's results and manifest.

python scripts/record_demo.py out/demo
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from provenance import RESULTS, provenance, write_result

from whyrank.store import read_json


def main(folder: Path) -> None:
    """Join figures and provenance; nothing is typed by hand."""
    manifest, results = read_json(folder / "manifest.json"), read_json(folder / "results.json")
    if not manifest["is_finished"]:
        sys.exit(f"{folder} holds a demo that did not finish")
    kept = {
        **provenance("make demo"),
        "date": manifest["started"][:10],
        "seed": manifest["seed"],
        "config": manifest["config"],
        "hardware": {key: manifest["hardware"][key] for key in ("machine", "num_cpus")},
        "versions": manifest["versions"],
        "seconds": manifest["seconds"],
        "counts": manifest["counts"],
        **results,
    }
    write_result(RESULTS / "demo.json", kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a demo that has finished")
    main(parser.parse_args().folder)
