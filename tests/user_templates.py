"""Templates as users write them, beside those that whyrank ships."""

from __future__ import annotations

from pathlib import Path

from whyrank.template import Template

__all__ = ["RULED", "SHIPPED", "THINKING", "from_toml"]

SHIPPED = ("explain-0-2", "explain-0-10", "explain-0-100", "explain-true-false", "almanac")

THINKING = """
name = "thinks-first"
labels = ["false", "true"]
[prompt]
task = "Is the passage relevant to the query?"
query_heading = "Query: "
document_heading = "Passage: "
[answer_words]
explanation_prompt = "<think>"
separator = "\\n</think>"
label_prompt = ""
terminator = ""
"""
RULED = """
name = "ruled"
labels = "0-10"
chat_options = { enable_thinking = false }
[prompt]
task = "Judge."
[answer_words]
explanation_prompt = ""
separator = "\\n---\\n"
label_prompt = "**Grade:**"
terminator = " END"
"""


def from_toml(text: str, folder: Path) -> Template:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return Template.load(path)
