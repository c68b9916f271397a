"""Regenerate the marked parts of the documentation, or check that they are up to date.

    python scripts/docs.py            rewrite README.md, CONTRIBUTING.md and docs/*.md in place
    python scripts/docs.py --check    exit 1 and show what differs; pages may be named

A marked part stands between `<!-- KIND: WHAT -->` and `<!-- end -->`; `GENERATORS` says which kinds there are.
Examples really run, in an empty folder that holds `docs/examples` and `recipes`; times and speeds become an ellipsis.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import tables
from tables import code, table

from whyrank import Template, cli, datasets
from whyrank.cli.options import attribute_docs

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "whyrank"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
COMMENT = re.compile(r"<!-- (\w+)")
FENCE = re.compile(r"```(?P<language>\w+)\n(?P<text>.*?)```\n", re.S)
# A dumb terminal of a fixed size: what people see, without colours.
TERMINAL = {"COLUMNS": "100", "LINES": "50", "TERM": "dumb", "NO_COLOR": "1"}
VARYING = (
    (re.compile(r"\d+(\.\d+)?\s+s\)"), "… s)"),
    (re.compile(r"\d+\.\d documents per second"), "… documents per second"),
    (re.compile(r"loss \d+\.\d+ to \d+\.\d+ nats"), "loss … to … nats"),
)


class Screen(io.StringIO):
    """Text that believes it is a terminal, so that long lines are wrapped as people see them."""

    def isatty(self) -> bool:
        """Always true."""
        return True


# ---- running examples -----------------------------------------------------------------------------------------


def run_whyrank(arguments: list[str], screen: io.StringIO) -> tuple[str, int]:
    """What `whyrank` prints on standard output and, of its own, on standard error; and its exit code."""
    errors, code = io.StringIO(), 0
    logging.getLogger().handlers.clear()  # the last run's writes to what was its standard error
    with (
        patch.object(sys, "argv", ["whyrank", *arguments]),
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    complaints = [line for line in errors.getvalue().splitlines() if line.startswith("whyrank: ")]
    return screen.getvalue() + "".join(f"{line}\n" for line in complaints), code


def run_console(session: str) -> str:
    """The commands of a console session (lines that begin with `$ `), each with what it prints now."""
    lines, shown, code = iter(session.splitlines()), "", 0
    for line in lines:
        if not line.startswith("$ "):
            continue  # what was printed last time
        command = line
        while command.endswith("\\"):
            command += "\n" + next(lines)
        words = shlex.split(command.removeprefix("$ ").replace("\\\n", " "))
        if words == ["echo", "$?"]:
            output = f"{code}\n"
        elif words[0] == "whyrank":
            output, code = run_whyrank(words[1:], Screen())
        else:
            output = subprocess.run(shlex.join(words), shell=True, check=True, capture_output=True, text=True).stdout
        shown += f"{command}\n{output}"
    return shown


def run_python(code: str) -> str:
    """What a piece of Python prints."""
    screen = Screen()
    with contextlib.redirect_stdout(screen):
        exec(compile(code, "example", "exec"), {"__name__": "example"})
    return screen.getvalue()


def steady(text: str) -> str:
    """Without what differs from run to run."""
    for pattern, replacement in VARYING:
        text = pattern.sub(replacement, text)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def run(what: str, body: str) -> str:
    """A console session, or Python code followed by its output."""
    fences = list(FENCE.finditer(body))
    if not fences:
        raise SystemExit(f"expected a fenced block to run, found {body[:80]!r}")
    text = fences[0]["text"]
    if fences[0]["language"] == "console":
        return fenced("console", steady(run_console(text)))
    return f"{fenced('python', text)}\n{fenced('text', steady(run_python(text)))}"


# ---- describing the code --------------------------------------------------------------------------------------


def fenced(language: str, text: str) -> str:
    """A fenced block."""
    return f"```{language}\n{text.rstrip()}\n```\n"


def help_text(what: str, body: str) -> str:
    """What `whyrank VERB --help` prints."""
    return fenced("text", run_whyrank([*what.split(), "--help"], io.StringIO())[0])


def fields(what: str, body: str) -> str:
    """The fields of a dataclass, given as `module.Class`: description, and a table."""
    module, _, name = what.rpartition(".")
    record = getattr(import_module(module), name)
    described = re.split(r"\n\n(?:Args|Raises):", inspect.cleandoc(record.__doc__))[0]
    explained = attribute_docs(record)
    rows = []
    for field in dataclasses.fields(record):
        default = "" if field.default is dataclasses.MISSING else code(repr(field.default))
        rows.append((code(field.name), code(str(field.type)), default, explained.get(field.name, "")))
    return f"{described}\n\n{table(('field', 'type', 'default', 'meaning'), rows)}"


def formats(what: str, body: str) -> str:
    """The formats that a reader accepts: `corpus`, `queries`, `qrels`, `run` or `excluded`."""
    accepted: tuple[tuple[str, str], ...] = getattr(datasets, f"{what.upper()}_FORMATS")
    return table(("format", "how it begins"), [(name, code(example)) for name, example in accepted])


def templates(what: str, body: str) -> str:
    """The templates that are shipped."""
    rows = []
    for path in sorted((SOURCE / "templates").glob("*.toml")):
        template = Template.load(path.stem)
        comment = " ".join(line[2:] for line in path.read_text().splitlines() if line.startswith("# "))
        caps = (f"{value}" for value in dataclasses.astuple(template.limits))
        rows.append((code(path.stem), ", ".join(template.scale.labels[:3]), " / ".join(caps), comment))
        if len(template.scale.labels) > 3:
            rows[-1] = (rows[-1][0], f"0 to {template.scale.labels[-1]}", *rows[-1][2:])
    return table(("template", "labels", "query / document / explanation tokens", "what for"), rows)


def file(what: str, body: str) -> str:
    """A file of the repository, word for word."""
    return fenced(Path(what).suffix.removeprefix("."), (ROOT / what).read_text(encoding="utf-8"))


def file_map(what: str, body: str) -> str:
    """The modules with the first lines of their docstrings; `short` stops at packages."""
    lines = ["src/whyrank/", *(f"  {line}" for line in map_lines(SOURCE, is_short=what == "short"))]
    return fenced("text", "\n".join(lines))


def map_lines(folder: Path, *, is_short: bool) -> Iterator[str]:
    """One line per module, folders first."""
    entries = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    for path in sorted(entries, key=lambda path: (path.is_file(), path.name)):
        if path.name == "__init__.py":
            continue
        source = path / "__init__.py" if path.is_dir() else path
        first = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        yield f"{path.name + '/' if path.is_dir() else path.name:<20} {first}".rstrip()
        if path.is_dir() and not is_short:
            yield from (f"  {line}" for line in map_lines(path, is_short=is_short))


GENERATORS: Mapping[str, Callable[[str, str], str]] = {
    "help": help_text,
    "run": run,
    "fields": fields,
    "formats": formats,
    "templates": templates,
    "file": file,
    "map": file_map,
    "results": tables.reproduction,
    "demo": tables.demo,
    "explaining": tables.explaining,
    "fairness": tables.fairness,
    "embedded": tables.embedded,
    "auto": tables.auto,
    "precision": tables.precision,
    "refining": tables.refining,
    "speed": tables.speed,
    "training": tables.training,
    "expansion": tables.expansion,
    "larger": tables.larger,
}
MARKED = re.compile(
    rf"(?P<begin><!-- (?P<kind>{'|'.join(GENERATORS)})(?:: (?P<what>[^\n]+?))? -->\n)"
    r"(?P<body>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)
OTHER_COMMENTS = {"end", "owner"}  # the second marks a place that is filled by hand from a recorded run


# ---- pages ----------------------------------------------------------------------------------------------------


def regenerated(page: str) -> str:
    """The page with all its marked parts made anew; its examples share one folder."""

    strange = set(COMMENT.findall(page)) - GENERATORS.keys() - OTHER_COMMENTS
    if strange:
        raise SystemExit(f"unknown kind of generated part: {strange}; there are {', '.join(GENERATORS)}")

    def replaced(match: re.Match[str]) -> str:
        return match["begin"] + GENERATORS[match["kind"]](match["what"] or "", match["body"]) + match["end"]

    with tempfile.TemporaryDirectory(prefix="whyrank-docs-") as folder, patch.dict(os.environ, TERMINAL):
        for name in ("docs/examples", "recipes"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        with contextlib.chdir(folder):
            return MARKED.sub(replaced, page)


def main() -> None:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description="Regenerate the marked parts of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md, CONTRIBUTING.md and docs/*.md")
    chosen = parser.parse_args()
    stale: list[str] = []
    for page in [path.resolve() for path in chosen.pages] or PAGES:
        old = page.read_text(encoding="utf-8")
        new = regenerated(old)
        if new == old:
            continue
        stale.append(page.name)
        if chosen.check:
            sys.stdout.writelines(
                difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(page), "generated", n=1)
            )
        else:
            page.write_text(new, encoding="utf-8")
            sys.stdout.write(f"{page.name} rewritten\n")
    if chosen.check and stale:
        raise SystemExit(f"out of date: {', '.join(stale)}; run `make docs`")


if __name__ == "__main__":
    main()
