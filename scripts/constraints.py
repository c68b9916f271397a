"""Write `constraints.txt`: the versions with which the checks last passed, of everything that pyproject asks for.

Reads the environment that it runs in and follows the requirements of the extras [all] and [dev], so that nothing
else that happens to be installed gets in. Run by `make constraints` after an upgrade.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PLACE = Path(__file__).resolve().parent.parent / "constraints.txt"
HEADER = """\
# Versions with which `make check` and `make test` passed; written by `make constraints`.
# They hold for every platform: torch without its build (+cpu, +cu130), which the index decides.
"""


def needed(name: str, extras: tuple[str, ...], seen: set[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield `(name, version)` of everything that a distribution needs here, with repetitions."""
    found = distribution(name)
    for extra in ("", *extras):
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        for text in found.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                if requirement.name != "whyrank":
                    wanted = distribution(requirement.name)
                    yield wanted.metadata["Name"], Version(wanted.version).public
                yield from needed(requirement.name, tuple(requirement.extras), seen)


def main() -> None:
    """Write the file."""
    pins = sorted(set(needed("whyrank", ("all", "dev"), set())), key=lambda pin: canonicalize_name(pin[0]))
    PLACE.write_text(HEADER + "".join(f"{name}=={version}\n" for name, version in pins), encoding="utf-8")
    sys.stdout.write(f"{len(pins)} versions in {PLACE.name}\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
