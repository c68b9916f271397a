"""The command line: parse, call one function, print what came out.

Exit codes: 0 all went well, 1 it failed, 2 the command was used wrongly, 7 it finished with gaps, 130 it was
interrupted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Final

import typer

from whyrank.cli import data, models, rerank
from whyrank.cli.almanac import almanac
from whyrank.cli.calibrate import calibrate
from whyrank.cli.distill import distill
from whyrank.cli.expand import expand
from whyrank.cli.options import Interrupted, show_version
from whyrank.cli.recipe import run
from whyrank.cli.refine import refine
from whyrank.errors import WhyrankError

__all__ = ["app", "main"]

EXIT_INTERRUPTED: Final = 130  # 128 and the number of the signal, as shells have it

app = typer.Typer(
    name="whyrank",
    help="Rerankers that show their reasons: mine, label, distil, refine, rerank, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.callback()(show_version)
for verb in (
    data.mine,
    models.label,
    distill,
    refine,
    calibrate,
    expand,
    data.search,
    rerank.rerank,
    data.evaluate,
    run,
    models.demo,
):
    app.command()(verb)
app.add_typer(almanac, name="almanac")


def main() -> None:
    """Run a command; errors that whyrank raises on purpose become one line on stderr and exit code 1."""
    warnings_only = logging.StreamHandler()
    warnings_only.setLevel(logging.WARNING)  # some libraries set their own loggers to DEBUG
    # The one prints its own; the other advises to fetch compiled code from the hub whenever peft looks for it.
    silenced = ("huggingface_hub", "bitsandbytes.backends.cpu")
    warnings_only.addFilter(lambda record: not record.name.startswith(silenced))
    logging.basicConfig(format="whyrank: %(message)s", level=logging.WARNING, handlers=[warnings_only])
    try:
        app()
    except (SystemExit, KeyboardInterrupt) as stop:
        causes = list(_chain(stop))
        if not any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise
        is_kept = any(isinstance(cause, Interrupted) for cause in causes)
        more = "; the same command continues where it stopped" if is_kept else ""
        sys.stderr.write(f"whyrank: interrupted{more}\n")
        sys.exit(EXIT_INTERRUPTED)
    except (WhyrankError, OSError) as error:
        sys.stderr.write(f"whyrank: {error}\n")
        sys.exit(1)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came from: Typer turns an interruption into an exit."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
