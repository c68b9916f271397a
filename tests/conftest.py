"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.command_line import DOCUMENTS, QRELS, QUERIES, RUN
from tests.user_templates import RULED, SHIPPED, THINKING, from_toml
from whyrank.records import Pair
from whyrank.store import write_jsonl
from whyrank.template import Template

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real collections that are read, never shipped; `WHYRANK_DATA` says where they are."""
    place = Path(os.environ.get("WHYRANK_DATA", REPOSITORY.parent / "shared" / "data"))
    if not place.is_dir():
        pytest.skip(f"real data not found at {place}: set WHYRANK_DATA")
    return place


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one file of each kind, and the present one."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("docs.jsonl", DOCUMENTS)
    write_jsonl("queries.jsonl", QUERIES)
    Path("run.trec").write_text("\n".join(RUN) + "\n")
    Path("qrels.txt").write_text("\n".join(QRELS) + "\n")
    hits = [{"qid": "q1", "docid": d.doc_id, "content": d.full_text, "score": 9 - i} for i, d in enumerate(DOCUMENTS)]
    Path("rankgpt.json").write_text(json.dumps([{"query": QUERIES[0].text, "hits": hits[:3]}]))
    pairs = [Pair("q1", "d2", "linked", "17"), Pair("q1", "d3", "negative"), Pair("q2", "d4", "negative")]
    write_jsonl("pairs.jsonl", pairs)
    return tmp_path


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Template, ...]:
    """Every template that is shipped, and two of users."""
    folder = tmp_path_factory.mktemp("templates")
    users = (from_toml(THINKING, folder), from_toml(RULED, folder))
    return (*(Template.load(name) for name in SHIPPED), *users)
