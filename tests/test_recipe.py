"""Recipes: what is read, refused, estimated, run, and left out because it is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.test_kill import kill_when, start
from whyrank.cli import app
from whyrank.errors import InputError
from whyrank.recipe import DONE_NAME, digest, read_recipe
from whyrank.store import read_json

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
EXAMPLES = ROOT / "docs" / "examples"
ROAD = f"""
about = "Search, rerank with answers from a file, measure."

[paths]
texts = "{EXAMPLES}"

[values]
method = "robertson"
answers = ""

[stages.search]
corpus = "{{texts}}/corpus.jsonl"
queries = "{{texts}}/queries.jsonl"
method = "{{method}}"
top_k = 3
out = "bm25.trec"

[stages.ranked]
verb = "rerank"
model = "scripted:{{answers}}"
run = "bm25.trec"
corpus = "{{texts}}/corpus.jsonl"
queries = "{{texts}}/queries.jsonl"
out = "ranked"

[stages.evaluate]
runs = ["bm25.trec", "ranked/run.trec"]
qrels = "{{texts}}/qrels.trec"
allow_unparsed = 0.5
"""
DOWN = "out = 'x'\ncorpus = 'c'\nqueries = 'q'\n"  # a whole search


def whyrank(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def outcomes(result: Result) -> dict[str, str]:
    """What became of each stage, from --json."""
    return {stage["stage"]: stage["outcome"] for stage in json.loads(result.stdout)["stages"]}


# ---- reading --------------------------------------------------------------------------------------------------


def test_names_are_replaced_in_texts_of_all_kinds(tmp_path: Path) -> None:
    text = """
    [paths]
    texts = "data"
    [values]
    model = "m"
    steps = 3
    [parameters]
    "{model}" = 5
    [stages.refine]
    queries = ["{texts}/a", "b"]
    num-steps = "{steps}"
    config = {adapter = {targets = ["{model}"]}}
    """
    recipe = read_recipe(written(tmp_path, text), {"steps": "7"})
    assert recipe.stages[0].options == {
        "queries": [f"{tmp_path}/data/a", "b"],
        "num_steps": "7",
        "config": {"adapter": {"targets": ["m"]}},
    }
    assert recipe.parameters == {"m": 5}


def test_given_paths_are_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = written(tmp_path, f"[paths]\ntexts = 'data'\n[stages.search]\n{DOWN}excluded = '{{texts}}'")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert read_recipe(recipe).stages[0].options["excluded"] == str(tmp_path / "data")
    assert read_recipe(recipe, {"texts": "other"}).stages[0].options["excluded"] == str(here / "other")


def test_a_stage_expects_what_the_recipe_does_unless_it_says_so(tmp_path: Path) -> None:
    text = "[expected]\nqueries = 7\ncandidates = 9\n[stages.rerank]\nexpected = {queries = 3}\n[stages.search]\n"
    first, second = read_recipe(written(tmp_path, text)).stages
    assert (first.expected.queries, first.expected.candidates) == (3, 9)
    assert (second.expected.queries, second.expected.candidates) == (7, 9)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("about = 'x'", "stages"),
        ("[stages]", "at least one table"),
        ("[stages.search]\n[extra]", "extra: "),
        ("[stages.search", "expected TOML"),
        ("[expected]\nqueries = -1\n[stages.search]", "queries of at least 0"),
        ("[expected]\nqeries = 1\n[stages.search]", "expected.qeries"),
        ("[stages.search]\nexpected = {queries = 'x'}", "stages.search.expected: queries"),
        ("[stages.search]\nverb = 3", "a text as verb"),
        ("[stages.search]\nout = '{nobody}'", "stages.search.out: {nobody} is in neither"),
        ("[values]\nurl = ''\n[stages.search]\nout = '{url}'", "give it with --set url="),
        ("[values]\na = 1\n[paths]\na = 'x'\n[stages.search]", "expected each name once, found 'a'"),
        ("[hardware]\nname = 'x'\n[stages.search]", "hardware.peak_tflops"),
    ],
)
def test_what_a_recipe_must_not_be(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert complaint in str(caught.value)


def test_setting_what_a_recipe_does_not_have_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "[values]\nurl = 'x'\n[stages.search]")
    with pytest.raises(InputError, match="no path or value called 'model'; it has url"):
        read_recipe(path, {"model": "x"})


@pytest.mark.parametrize(
    ("stage", "complaint"),
    [
        ("[stages.sing]", "stages.sing: expected a verb among mine, label"),
        (f"[stages.search]\n{DOWN}topk = 3", "no option 'topk'; did you mean top_k?"),
        (f"[stages.search]\n{DOWN}json = true", "no option 'json'"),
        (f"[stages.search]\n{DOWN}top_k = 0", "top-k"),
        (f"[stages.search]\n{DOWN}top_k = 'many'", "top-k"),
        (f"[stages.search]\n{DOWN}top_k = [1, 2]", "top_k: expected one value, found a list of 2"),
        (f"[stages.search]\n{DOWN}top_k = true", "top_k: expected a value, found true"),
        (f"[stages.search]\n{DOWN}skip_bad = 'yes'", "skip_bad: expected true or false, found 'yes'"),
        (f"[stages.search]\n{DOWN}b = 1.5", "expected b"),
        (f"[stages.search]\n{DOWN}method = {{a = 1}}", "method: expected a text or a number, found a table"),
        ("[stages.search]\nout = 'x'", "corpus"),
        ("[stages.mine]\nposts = 'p'\nsite = 'a.example'\nout = 'x'\ntest_fraction = 2", "test_fraction"),
        ("[stages.rerank]\nrun = 'r'\nout = 'x'\nsamples = 3", "temperature"),
        (f"[stages.distill]\njudgments = 'j'\n{DOWN}quantize = '4bit'", "lora_rank above 0"),
        (f"[stages.refine]\nmodel = 'm'\n{DOWN}config = {{clipp = 1}}", "clipp"),
    ],
)
def test_all_options_are_looked_at_before_anything_runs(tmp_path: Path, stage: str, complaint: str) -> None:
    good = f"[stages.first]\nverb = 'search'\ncorpus = '{EXAMPLES}/corpus.jsonl'\n"
    good += f"queries = '{EXAMPLES}/queries.jsonl'\nout = 'first.trec'\n"
    recipe = written(tmp_path, good + stage)
    for more in ((), ("--dry-run",)):
        result = whyrank("run", recipe, "--work", tmp_path / "work", *more)
        assert result.exit_code == 2
        told = " ".join(result.output.replace("│", " ").split())
        assert complaint in told
        assert not (tmp_path / "work" / "first.trec").exists()


# ---- running --------------------------------------------------------------------------------------------------


def road(folder: Path, *more: str) -> Result:
    """The road of the top of this file, with answers that can all be read."""
    recipe = written(folder, ROAD)
    given = ["--set", f"answers={EXAMPLES}/answers.jsonl", *more]
    return whyrank("run", recipe, "--work", folder / "work", *given, "--json")


def test_only_what_is_not_done_is_run(tmp_path: Path) -> None:
    everything = {"search": "done", "ranked": "done", "evaluate": "done"}
    nothing = {"search": "done before", "ranked": "done before", "evaluate": "done"}  # it leaves no file: shown again
    work = tmp_path / "work"
    assert outcomes(road(tmp_path)) == everything
    judged = (work / "ranked" / "judgments.jsonl").read_bytes()
    assert outcomes(road(tmp_path)) == nothing
    (work / "ranked" / "run.trec").unlink()
    assert outcomes(road(tmp_path)) == {**nothing, "ranked": "done"}
    assert (work / "ranked" / "judgments.jsonl").read_bytes() == judged
    (work / DONE_NAME).unlink()
    assert outcomes(road(tmp_path)) == everything


def test_another_option_runs_a_stage_and_those_that_read_what_it_changed(tmp_path: Path) -> None:
    road(tmp_path)
    before = (tmp_path / "work" / "bm25.trec").read_bytes()
    changed = outcomes(road(tmp_path, "--set", "method=bm25l"))
    is_changed = (tmp_path / "work" / "bm25.trec").read_bytes() != before
    assert is_changed
    assert changed == {"search": "done", "ranked": "done", "evaluate": "done"}


def copied_answers(folder: Path, num_left_out: int = 0) -> Path:
    """A script without its first answers: the pairs that lack one fail."""
    answers = folder / "answers.jsonl"
    lines = (EXAMPLES / "answers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    answers.write_text("".join(lines[num_left_out:]), encoding="utf-8")
    return answers


def test_a_changed_input_runs_what_reads_it_and_sets_aside_what_it_had_made(tmp_path: Path) -> None:
    given = ("--set", f"answers={copied_answers(tmp_path)}")
    road(tmp_path, *given)
    before = (tmp_path / "work" / "ranked" / "judgments.jsonl").read_bytes()
    with (tmp_path / "answers.jsonl").open("a", encoding="utf-8") as script:
        script.write(json.dumps({"query": "another", "document": "pair", "label": "1"}) + "\n")
    again = outcomes(road(tmp_path, *given))
    assert again == {"search": "done before", "ranked": "done", "evaluate": "done"}
    assert (tmp_path / "work" / "ranked.1" / "judgments.jsonl").read_bytes() == before
    assert (tmp_path / "work" / "ranked" / "run.trec").is_file()
    assert outcomes(road(tmp_path, *given))["ranked"] == "done before"


def test_a_stage_with_gaps_is_told_and_run_again(tmp_path: Path) -> None:
    given = ("--set", f"answers={copied_answers(tmp_path, num_left_out=1)}")
    for first in ("done", "done before"):
        result = road(tmp_path, *given)
        assert result.exit_code == 7
        assert outcomes(result) == {"search": first, "ranked": "gaps", "evaluate": "done"}


def test_a_failing_stage_is_named(tmp_path: Path) -> None:
    recipe = written(tmp_path, ROAD)
    result = whyrank("run", recipe, "--work", tmp_path / "work", "--set", f"answers={tmp_path}/none.jsonl")
    assert result.exit_code == 1
    assert str(result.exception).startswith("stage ranked: ")
    assert list(read_json(tmp_path / "work" / DONE_NAME)) == ["search"]


def test_json_is_all_there_is_on_standard_output(tmp_path: Path) -> None:
    result = road(tmp_path)
    assert result.exit_code == 0
    assert [stage["stage"] for stage in json.loads(result.stdout)["stages"]] == ["search", "ranked", "evaluate"]


def test_a_folder_counts_by_its_contents_without_accounts(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    first = digest(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_text("{}")
    assert digest(tmp_path / "model") == first
    (tmp_path / "model" / "weights").rename(tmp_path / "model" / "other")
    assert digest(tmp_path / "model") != first


# ---- estimating -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_can_be_estimated(path: Path, tmp_path: Path) -> None:
    result = whyrank("run", path, "--work", tmp_path / "work", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    stages = json.loads(result.stdout)["stages"]
    assert not (tmp_path / "work").exists()
    assert not any(stage["missing"] for stage in stages)
    assert sum(stage["hours"] for stage in stages) > 0


def test_the_papers_numbers_by_hand(tmp_path: Path) -> None:
    result = whyrank("run", RECIPES / "paper.toml", "--work", tmp_path / "work", "--dry-run", "--json")
    stages = {stage["stage"]: stage for stage in json.loads(result.stdout)["stages"]}
    # 20,000 questions x 5 documents; a prompt is 250 + 250 + 900 = 1,400 tokens, an answer 150 + 1.
    assert stages["label"]["num_pairs"] == 100_000
    assert stages["label"]["num_read"] == 140_000_000
    assert stages["label"]["num_written"] == 15_100_000
    assert stages["label"]["cost"] == pytest.approx(140 * 0.6 + 15.1 * 0.8)
    # 6,250 steps x 16 examples x 1,551 tokens, 4 operations per frozen parameter: 155.1e6 x 3.21e9 x 4 / (312e12 x .3).
    assert stages["distill"]["num_trained"] == 155_100_000
    assert stages["distill"]["hours"] == pytest.approx(155.1e6 * 3.21e9 * 4 / (312e12 * 0.3) / 3600)
    # 20,000 questions of 250 + 250 tokens, 60 tokens of search queries each; the refined student writes for 1,000.
    assert (stages["expand"]["num_read"], stages["expand"]["num_written"]) == (10_000_000, 1_200_000)
    assert (stages["search"]["num_read"], stages["search"]["num_written"]) == (500_000, 60_000)
    # What is distilled and refined is as large as what it began with.
    rerank = stages["rerank"]
    seconds = 2 * 3.21e9 * (rerank["num_read"] / (312e12 * 0.4) + rerank["num_written"] / (312e12 * 0.05))
    assert rerank["hours"] == pytest.approx(seconds / 3600)


def test_what_is_there_is_counted(tmp_path: Path) -> None:
    recipe = written(tmp_path, ROAD)
    given = ("--work", tmp_path / "work", "--set", f"answers={EXAMPLES}/answers.jsonl")
    before = json.loads(whyrank("run", recipe, *given, "--dry-run", "--json").stdout)["stages"]
    assert [stage["is_counted"] for stage in before] == [True, False, True]
    assert before[1]["num_pairs"] == 100 * 100
    whyrank("run", recipe, *given)
    num_lines = len((tmp_path / "work" / "bm25.trec").read_text().splitlines())
    after = json.loads(whyrank("run", recipe, *given, "--dry-run", "--json").stdout)["stages"]
    assert after[1]["num_pairs"] == num_lines
    assert [stage["is_done"] for stage in after] == [True, True, False]


def test_what_the_recipe_does_not_say_is_told(tmp_path: Path) -> None:
    text = f"[stages.label]\npairs = 'p'\nteacher = 'endpoint:http://localhost#big'\n{DOWN}"
    text += f"[stages.rerank]\nmodel = 'small'\nrun = 'r'\n{DOWN}"
    result = whyrank("run", written(tmp_path, text), "--dry-run")
    assert result.exit_code == 0
    assert '? the recipe does not say [prices."big"]' in result.output
    assert "? the recipe does not say [parameters] for small" in result.output


# ---- the almanac's recipe, really -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_almanacs_recipe_survives_kill_and_interruption(tmp_path: Path) -> None:
    work = tmp_path / "work"
    small = [f"--set={name}" for name in ("train_queries=40", "test_queries=2", "steps=6", "rounds=2")]
    command = ("run", str(RECIPES / "almanac.toml"), "--work", str(work), *small)
    assert kill_when(start(*command), lambda: (work / "student" / "metrics.jsonl").is_file())
    process = subprocess.Popen(
        [sys.executable, "-c", "from whyrank.cli import main; main()", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (work / "refined" / "metrics.jsonl").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors.decode()
    assert b"the same command continues" in errors
    last = json.loads(whyrank(*command, "--json").stdout)["stages"]
    assert [stage["outcome"] for stage in last[:3]] == ["done before"] * 3
    assert [stage["outcome"] for stage in last[3:]] == ["done"] * 5
    again = json.loads(whyrank(*command, "--json").stdout)["stages"]
    assert [stage["outcome"] for stage in again] == ["done before"] * 7 + ["done"]
