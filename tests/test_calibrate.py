"""`whyrank calibrate` and `rerank --mode auto` on a tiny random checkpoint: what is written, kept, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import save_checkpoint
from tests.command_line import run, run_json
from tests.test_kill import finish, kill_when, start, write_collection
from whyrank import Reranker
from whyrank.calibration import Calibration, fit_calibration
from whyrank.checkpoint import CARD_NAME, Card, read_card, write_card
from whyrank.datasets import read_run
from whyrank.errors import InputError, TemplateMismatch
from whyrank.generators.hf import HfGenerator
from whyrank.records import Judgment, Mode
from whyrank.store import read_jsonl
from whyrank.template import Template

TEMPLATE = Template.load("explain-0-2")
SHORT = replace(TEMPLATE, limits=replace(TEMPLATE.limits, max_explanation_tokens=6))
NUM_QUERIES, NUM_DOCUMENTS = 3, 8
NUM_PAIRS = NUM_QUERIES * NUM_DOCUMENTS
MODES: tuple[Mode, ...] = ("explain", "direct")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "model")
    spelled = HfGenerator.load(folder, device="cpu").tokens.label_tokens(SHORT)
    write_card(folder, Card(SHORT, MODES, spelled, training={"steps": 3}))
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_collection(tmp_path_factory.mktemp("collection"), NUM_QUERIES, NUM_DOCUMENTS)


@pytest.fixture(scope="module")
def calibrated(model: Path, collection: tuple[str, ...]) -> Path:
    """The checkpoint, calibrated by the command, with half of the pairs above their ceilings."""
    out = model.parent / "calibration"
    words = ("calibrate", "--model", str(model), *collection, "-o", str(out), "--coverage", "0.5", "--device", "cpu")
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert f"{NUM_PAIRS} pairs in both modes (0 left out)" in done.output
    return model


def scores(path: Path) -> dict[tuple[str, str], float]:
    return {(found.query_id, found.doc_id): found.score or 0.0 for found in read_jsonl(path, Judgment)}


def test_the_card_gets_what_the_judgments_say(calibrated: Path, collection: tuple[str, ...]) -> None:
    out = calibrated.parent / "calibration"
    direct, explained = scores(out / "judgments-direct.jsonl"), scores(out / "judgments.jsonl")
    assert len(direct) == len(explained) == NUM_PAIRS
    card = read_card(calibrated / CARD_NAME)
    assert card.calibration is not None
    pairs = [(direct[ids], explained[ids]) for ids in explained]
    again = fit_calibration(pairs, lowest=0.0, highest=2.0, weights=card.calibration.weights, coverage=0.5)
    assert card.calibration == again
    assert card == replace(card, template=SHORT, modes=MODES, training={"steps": 3})
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["stage"], manifest["is_finished"]) == ("calibrate", True)
    assert manifest["counts"]["num_new"] == 2 * NUM_PAIRS
    assert manifest["figures"]["calibration"] == card.calibration.to_dict()
    words = ("calibrate", "--model", str(calibrated), *collection, "-o", str(out), "--coverage", "0.5")
    found = run_json(*words, "--device", "cpu")
    assert (found["counts"]["num_new"], found["counts"]["num_known"]) == (0, 2 * NUM_PAIRS)
    assert found["calibration"] == card.calibration.to_dict()
    mean = sum(explained[ids] - direct[ids] for ids in explained) / NUM_PAIRS
    assert found["mean_shift"] == pytest.approx(mean)


def test_a_run_in_mode_auto_is_the_python_call_on_disk(
    calibrated: Path, collection: tuple[str, ...], tmp_path: Path
) -> None:
    words = ("rerank", *collection, "--model", str(calibrated), "--mode", "auto", "--auto-top-k", "2")
    words += ("--max-tokens-per-query", "30", "--auto-tolerance", "0.01", "--device", "cpu", "-o", str(tmp_path))
    done = run(*words)
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    config, counts = manifest["config"], manifest["counts"]
    assert config["mode"] == "auto"
    assert {name: config["auto"][name] for name in ("top_k", "max_tokens_per_query", "tolerance")} == {
        "top_k": 2,
        "max_tokens_per_query": 30,
        "tolerance": 0.01,
    }
    assert counts["most_tokens_per_query"] <= 30
    assert 2 * NUM_QUERIES <= counts["num_explained"] <= 5 * NUM_QUERIES
    assert f"{counts['num_explained']} documents got a reason" in done.output
    explained = scores(tmp_path / "judgments.jsonl")
    assert len(explained) == counts["num_explained"]
    reranker = Reranker.load(calibrated, mode="auto", auto_top_k=2, auto_tolerance=0.01, max_tokens_per_query=30)
    documents = [json.loads(line) for line in Path(collection[3]).read_text().splitlines()]
    ranked = read_run(tmp_path / "run.trec")
    for line in Path(collection[5]).read_text().splitlines():
        query = json.loads(line)
        ranking = reranker.rank(query["text"], documents)
        assert [found.id for found in ranking] == [found.doc_id for found in ranked[query["query_id"]]]
        expected = {doc_id for query_id, doc_id in explained if query_id == query["query_id"]}
        assert {found.id for found in ranking if found.is_explained} == expected


def test_one_query_on_the_command_line(calibrated: Path, collection: tuple[str, ...]) -> None:
    words = ("rerank", "--query", "why", "--documents", collection[3], "--model", str(calibrated), "--mode", "auto")
    found = run_json(*words, "--max-tokens-per-query", "12", "--device", "cpu")["results"]
    assert len(found) == NUM_DOCUMENTS
    assert sum(result["is_explained"] for result in found) in (
        2,
        3,
    )  # of at most 6 tokens each; the first may take less


@pytest.mark.parametrize(
    "num_lines", [pytest.param(3, marks=pytest.mark.slow), NUM_PAIRS + 2], ids=["direct", "reasons"]
)
def test_killed_and_called_again(calibrated: Path, collection: tuple[str, ...], tmp_path: Path, num_lines: int) -> None:
    words = ("rerank", *collection, "--model", str(calibrated), "--mode", "auto", "--auto-top-k", "4")
    words += ("--batch-size", "2", "--device", "cpu")
    assert run(*words, "-o", str(tmp_path / "whole")).exit_code == 0
    out, names = tmp_path / "out", ("judgments-direct.jsonl", "judgments.jsonl")

    def num_written() -> int:
        return sum((out / name).read_bytes().count(b"\n") for name in names if (out / name).is_file())

    kill_when(start(*words, "-o", str(out)), lambda: num_written() >= num_lines)
    num_known = num_written()
    assert num_known >= num_lines
    finish(*words, "-o", str(out))
    counts, whole = (json.loads((tmp_path / name / "manifest.json").read_text())["counts"] for name in ("out", "whole"))
    assert counts["num_known"] == num_known
    assert counts["num_known"] + counts["num_new"] == whole["num_new"]
    assert counts["num_tokens"] == whole["num_tokens"]
    assert [line.split()[:4] for line in (out / "run.trec").read_text().splitlines()] == [
        line.split()[:4] for line in (tmp_path / "whole" / "run.trec").read_text().splitlines()
    ]
    for name in names:
        found, expected = scores(out / name), scores(tmp_path / "whole" / name)
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_card_without_a_calibration_is_what_it_was(tmp_path: Path) -> None:
    write_card(tmp_path, Card(SHORT, MODES))
    data = json.loads((tmp_path / CARD_NAME).read_text())
    assert "calibration" not in data
    assert read_card(tmp_path / CARD_NAME).calibration is None
    calibration = Calibration((0.0, 2.0), (0.0, 2.0), (2.0,), (1.5,), 0.9, 7, "m")
    write_card(tmp_path, Card(SHORT, MODES, calibration=calibration))
    assert read_card(tmp_path / CARD_NAME).calibration == calibration
    (tmp_path / CARD_NAME).write_text(json.dumps({**data, "calibration": {"knots": [0.0]}}))
    with pytest.raises(InputError, match="the calibration is damaged"):
        read_card(tmp_path / CARD_NAME)


def test_what_cannot_be_calibrated_or_run_is_refused(model: Path, collection: tuple[str, ...], tmp_path: Path) -> None:
    card = read_card(model / CARD_NAME)
    write_card(tmp_path, replace(card, calibration=None))
    with pytest.raises(InputError, match=r"has none; make one .*whyrank calibrate --model FOLDER"):
        Reranker.load(tmp_path, mode="auto")
    write_card(tmp_path, replace(card, modes=("explain",)))
    with pytest.raises(TemplateMismatch, match="auto needs a checkpoint that was trained for explain and direct"):
        Reranker.load(tmp_path, mode="auto")
    words = ("calibrate", *collection, "-o", str(tmp_path / "out"))
    only_one = run(*words, "--model", str(tmp_path))
    assert isinstance(only_one.exception, TemplateMismatch)
    nowhere = run(*words, "--model", str(tmp_path / "nowhere"))
    assert isinstance(nowhere.exception, InputError)
    assert "expected a folder with a checkpoint of whyrank distill" in str(nowhere.exception)
    assert run(*words, "--model", str(tmp_path), "--coverage", "1.5").exit_code == 2
    idle = run("rerank", *collection, "--model", "overlap", "-o", str(tmp_path / "out"), "--auto-top-k", "3")
    assert idle.exit_code == 2
    assert not (tmp_path / "out").exists()
