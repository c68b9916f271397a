"""The command line: parse, call one function, print what came out.

Exit codes: 0 all went well, 1 it failed, 2 the command was used wrongly, 7 it finished with gaps.
"""

from __future__ import annotations

import logging
import sys

import typer

from whyrank.cli import data, models
from whyrank.cli.almanac import almanac
from whyrank.cli.options import show_version
from whyrank.errors import WhyrankError

__all__ = ["app", "main"]

app = typer.Typer(
    name="whyrank",
    help="Rerankers that show their reasons: mine, label, distil, rerank, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.callback()(show_version)
for verb in (data.mine, models.label, models.distill, data.search, models.rerank, data.evaluate, models.demo):
    app.command()(verb)
app.add_typer(almanac, name="almanac")


def main() -> None:
    """Run a command; errors that whyrank raises on purpose become one line on stderr and exit code 1."""
    warnings_only = logging.StreamHandler()
    warnings_only.setLevel(logging.WARNING)  # some libraries set their own loggers to DEBUG
    warnings_only.addFilter(lambda record: not record.name.startswith("huggingface_hub"))  # prints its own
    logging.basicConfig(format="whyrank: %(message)s", level=logging.WARNING, handlers=[warnings_only])
    try:
        app()
    except (WhyrankError, OSError) as error:
        sys.stderr.write(f"whyrank: {error}\n")
        sys.exit(1)
