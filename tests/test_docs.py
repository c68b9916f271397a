"""What newcomers read is true: generated parts are fresh, links lead somewhere, commands can be typed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from whyrank.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCS = ROOT / "scripts" / "docs.py"


def names_of(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def check(*pages: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DOCS), "--check", *map(str, pages)], capture_output=True, text=True)


# ---- generated parts ------------------------------------------------------------------------------------------


def test_generated_parts_are_up_to_date() -> None:
    done = check()
    assert done.returncode == 0, f"run `make docs`\n{done.stdout}{done.stderr}"


def test_a_stale_part_is_noticed_and_not_changed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    session = "<!-- run -->\n```console\n$ whyrank search\nWRONG\n$ echo $?\n2\n```\n<!-- end -->\n"
    page.write_text(session, encoding="utf-8")
    done = check(page)
    assert (done.returncode, page.read_text(encoding="utf-8")) == (1, session)
    assert "out of date" in done.stderr
    # Options are missing, so that nothing is printed and the exit code is 2: one line goes, none comes.
    changes = [line for line in done.stdout.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert changes == ["-WRONG"]


def test_an_unknown_kind_of_part_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- helf: search -->\n<!-- end -->\n", encoding="utf-8")
    done = check(page)
    assert done.returncode == 1
    assert "helf" in done.stderr


# ---- links ----------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """Anchors as GitHub makes them from headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", names_of(PAGES))
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{name}: {link}: {sorted(anchors_of(target))}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page in seen:
            continue
        seen.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
        waiting += [page.parent / link for link in links if link.endswith(".md") and "://" not in link]
    assert {page.resolve() for page in PAGES} <= seen


# ---- commands -------------------------------------------------------------------------------------------------


def commands_in(text: str) -> Iterator[list[str]]:
    """The arguments of every `whyrank ...` line in fenced blocks, with or without a prompt before it."""
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            for piece in line.strip().removeprefix("$ ").split(" | "):
                if piece.strip().startswith("whyrank "):
                    # Not shlex's own comments: they would begin inside endpoint:URL#MODEL.
                    yield shlex.split(re.sub(r"\s#.*", "", piece))[1:]


def parse(arguments: list[str]) -> None:
    """Parse as the command line does, without running anything."""
    command, rest = typer.main.get_command(app), arguments
    while isinstance(command, typer.core.TyperGroup):
        assert rest, f"expected a verb, found {arguments}"
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context("whyrank", list(rest))


@pytest.mark.parametrize("name", [name for name in names_of(PAGES) if list(commands_in((ROOT / name).read_text()))])
def test_commands_can_be_typed(name: str) -> None:
    for arguments in commands_in((ROOT / name).read_text(encoding="utf-8")):
        parse(arguments)


def test_commands_are_found_and_wrong_ones_refused() -> None:
    page = "```sh\ncat x | whyrank search --corpus a \\\n  --querys b -o c  # first\n```\nwhyrank not this\n"
    (arguments,) = commands_in(page)
    assert arguments == ["search", "--corpus", "a", "--querys", "b", "-o", "c"]
    with pytest.raises(Exception, match="--querys"):
        parse(arguments)


# ---- dependencies ---------------------------------------------------------------------------------------------


def requirements() -> dict[str, Requirement]:
    """What pyproject asks for, by canonical name, without whyrank's own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    found = {str(canonicalize_name(Requirement(text).name)): Requirement(text) for text in texts}
    return {name: requirement for name, requirement in found.items() if name != "whyrank"}


def test_constraints_pin_what_pyproject_asks_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [line for line in pins.values() if "+" in line]  # no builds: they differ between machines
    pinned = {str(canonicalize_name(name)): version for name, version in pins.items()}
    assert len(pinned) == len(pins)
    for name, requirement in requirements().items():
        if name != "vllm":  # reserved; pins torch itself
            assert requirement.specifier.contains(pinned[name]), requirement


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Dependencies")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\w-]+) \|", text, re.MULTILINE)
    assert {canonicalize_name(row) for row in rows} - {"package"} == set(requirements())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_commands_in_pages_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        blocks = "".join(block for _, block in FENCE.findall(page.read_text(encoding="utf-8")))
        inline = re.findall(r"`make ([\w-]+)`", page.read_text(encoding="utf-8"))
        assert {*inline, *re.findall(r"^make ([\w-]+)", blocks, re.MULTILINE)} <= targets, page
