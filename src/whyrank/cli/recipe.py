"""`whyrank run`: the stages of a recipe, one after the other."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import JsonValue
from rich.table import Table

from whyrank.cli.commands import Command, commands_of
from whyrank.cli.estimating import Estimate, estimates_of
from whyrank.cli.options import Json, as_usage_error, console, print_json, resumable
from whyrank.recipe import DONE_NAME, Recipe, read_done, read_recipe, write_done
from whyrank.stages import EXIT_OK, EXIT_PARTIAL

__all__ = ["run"]

LINE_LENGTH: Final = 95


def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="TOML file with stages, each a verb with its options.")],
    work: Annotated[
        Path | None, typer.Option(help="Folder that a recipe's paths are relative to; default: out/NAME_OF_RECIPE.")
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Replaces one of the recipe's paths or values; repeatable."),
    ] = None,
    is_dry: Annotated[
        bool, typer.Option("--dry-run", help="Run nothing: check every option and estimate tokens, costs and hours.")
    ] = False,
    json: Json = False,
) -> None:
    """Run the stages of a recipe.

    All options of all stages are checked before the first one starts. Stages that are done are left out: the same
    command ended well, from the same inputs, and what it wrote is still there. Stopped at any moment, the same command
    continues where it was.

    \b
    Examples:
      whyrank run recipes/paper.toml --set posts=Posts.xml --dry-run
      whyrank run recipes/almanac.toml --work out/almanac
    """
    with as_usage_error():
        found = read_recipe(recipe, _given(given or ()))
    folder = (work or Path("out") / recipe.stem).resolve()
    if not is_dry:
        folder.mkdir(parents=True, exist_ok=True)
    # What is parsed for a dry run may write the options of a stage into a file: it must not be among real results.
    with _dry_folder(folder) if is_dry else contextlib.chdir(folder):
        with as_usage_error():
            commands = commands_of(found, context.find_root().command)
        if is_dry:
            _estimate(found, commands, folder, as_json=json)
            return
        with resumable(folder / DONE_NAME):
            outcomes = _run_all(commands, folder, as_json=json)
    if json:
        print_json({"recipe": str(recipe), "work": str(folder), "stages": [*outcomes]})
    else:
        _print_outcomes(outcomes, folder)
    raise typer.Exit(EXIT_PARTIAL if any(outcome["outcome"] == "gaps" for outcome in outcomes) else EXIT_OK)


def _given(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, _) in zip(texts, pairs, strict=True):
        if not (name and equals):
            raise typer.BadParameter(f"--set: expected NAME=VALUE, found {text!r}")
    return {name: value for name, _, value in pairs}


def _run_all(commands: Sequence[Command], work: Path, *, as_json: bool) -> list[dict[str, JsonValue]]:
    """Run what is not done, in the work folder; what the verbs print goes to standard error where JSON is asked for."""
    done = read_done(work)
    outcomes: list[dict[str, JsonValue]] = []
    for number, command in enumerate(commands, start=1):
        start = time.perf_counter()
        name = command.stage.name
        if command.is_done(done.get(name)):
            outcomes.append({"stage": name, "outcome": "done before", "seconds": 0.0})
            continue
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            console().print(f"[{number}/{len(commands)}] {name}: whyrank {shlex.join(command.words)}")
            code = command.run()
        if code == EXIT_OK:  # a stage with gaps is run again, and may close them
            done[name] = command.as_done()
            write_done(work, done)
        outcome = "done" if code == EXIT_OK else "gaps"
        outcomes.append({"stage": name, "outcome": outcome, "seconds": round(time.perf_counter() - start, 3)})
    return outcomes


def _print_outcomes(outcomes: Sequence[dict[str, JsonValue]], work: Path) -> None:
    names = [str(outcome["stage"]) for outcome in outcomes if outcome["outcome"] == "done before"]
    if names:
        console().print(f"{len(names)} of {len(outcomes)} stages were done before: {', '.join(names)}")
    for outcome in outcomes:
        if outcome["outcome"] != "done before":
            told = "ended with gaps, see above" if outcome["outcome"] == "gaps" else "done"
            console().print(f"{outcome['stage']}: {told} ({outcome['seconds']:.1f} s)")
    console().print(f"everything is in {work}")


# ---- the dry run ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _dry_folder(work: Path) -> Iterator[None]:
    """A folder that shows what is in the work folder, and is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="whyrank-dry-") as name:
        for entry in work.iterdir() if work.is_dir() else ():
            (Path(name) / entry.name).symlink_to(entry)
        with contextlib.chdir(name):
            yield


def _estimate(recipe: Recipe, commands: Sequence[Command], work: Path, *, as_json: bool) -> None:
    done = read_done(work)
    ready = [command.is_done(done.get(command.stage.name)) for command in commands]
    estimates = estimates_of(recipe, commands)
    if as_json:
        rows: list[dict[str, JsonValue]] = [
            {
                "stage": command.stage.name,
                "command": ["whyrank", *command.words],
                "is_done": is_ready,
                **estimate.to_json(),
            }
            for command, estimate, is_ready in zip(commands, estimates, ready, strict=True)
        ]
        print_json({"recipe": str(recipe.path), "about": recipe.about, "stages": rows})
        return
    screen = console()
    if recipe.about:
        screen.print(recipe.about + "\n")
    screen.print(_table(commands, estimates, ready))
    hardware = recipe.hardware
    if hardware is not None:
        screen.print(
            f"hours on {hardware.name}: {hardware.peak_tflops:g} TFLOP/s, of which {hardware.reading:.0%} in reading, "
            f"{hardware.writing:.0%} in writing, {hardware.training:.0%} in training"
        )
    if not all(estimate.is_counted for estimate in estimates):
        screen.print("~ as the recipe expects or its options say; other numbers were counted in files")
    for missing in dict.fromkeys(estimate.missing for estimate in estimates if estimate.missing):
        screen.print(f"? the recipe does not say {missing}")
    screen.print("\nThe same, stage by stage, in the work folder:")
    for command in commands:
        screen.print("\n".join(_lines(command, work)), soft_wrap=True)


def _lines(command: Command, work: Path) -> list[str]:
    """A command as a person would write it, in lines that can be copied together."""
    groups: list[str] = ["whyrank"]  # an option stands in one line with its value
    for word in command.words:
        shown = shlex.quote(os.path.relpath(word, work) if os.path.isabs(word) else word)
        if word.startswith("-"):
            groups.append(shown)
        else:
            groups[-1] += f" {shown}"
    lines = groups[:1]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) > LINE_LENGTH:
            lines[-1] += " \\"
            lines.append(f"  {group}")
        else:
            lines[-1] += f" {group}"
    return lines


def _table(commands: Sequence[Command], estimates: Sequence[Estimate], ready: Sequence[bool]) -> Table:
    table = Table("stage", box=None, pad_edge=False)
    for heading in ("pairs", "tokens read", "written", "trained", "cost", "hours"):
        table.add_column(heading, justify="right")
    for command, estimate, is_ready in zip(commands, estimates, ready, strict=True):
        name = f"{command.stage.name} (done)" if is_ready else command.stage.name
        work = estimate.work
        pairs = f"{'' if estimate.is_counted else '~'}{work.num_pairs:,}" if work.num_pairs else ""
        counts = [_amount(number) for number in (work.num_read, work.num_written, work.num_trained)]
        table.add_row(name, pairs, *counts, _money(estimate.cost), _money(estimate.hours))
    still = [estimate for estimate, is_ready in zip(estimates, ready, strict=True) if not is_ready]
    totals = [sum(getattr(estimate.work, name) for estimate in still) for name in ("num_read", "num_written")]
    trained = sum(estimate.work.num_trained for estimate in still)
    costs, hours = ([getattr(estimate, name) or 0.0 for estimate in still] for name in ("cost", "hours"))
    table.add_section()
    table.add_row("to do", "", *map(_amount, (*totals, trained)), _money(sum(costs)), _money(sum(hours)))
    return table


def _amount(number: int) -> str:
    """A number of tokens, short."""
    if not number:
        return ""
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def _money(value: float | None) -> str:
    """A cost or a time; nothing for zero, `?` for what is not known."""
    if value is None:
        return "?"
    return "<0.01" if 0 < value < 0.01 else f"{value:,.2f}" if value else ""
