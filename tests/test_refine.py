"""Refinement as a whole: students learn from rewards, what stays as it was, and a killed run loses nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from typer.testing import CliRunner

from tests.test_training import CONFIG as DISTILL
from tests.test_training import DOCUMENTS, QUERIES, judgments
from whyrank import Reranker
from whyrank.checkpoint import read_card
from whyrank.cli import app
from whyrank.errors import InputError
from whyrank.generators.hf.load import load_model
from whyrank.generators.opening import ModelOptions
from whyrank.records import Pair, Qrel, ScoredDocument
from whyrank.store import read_jsonl, write_jsonl
from whyrank.template import Template
from whyrank.training.alarms import RefineStep
from whyrank.training.config import AdapterConfig, TinyConfig
from whyrank.training.distill import distill
from whyrank.training.examples import examples_of
from whyrank.training.refine import Refined, RefineData, refine
from whyrank.training.refine_config import RefineConfig
from whyrank.training.rollouts import Evidence
from whyrank.training.validation import DevSet

SHORT = replace(Template.load("almanac"), limits=replace(Template.load("almanac").limits, max_explanation_tokens=24))
# What is known contradicts what was distilled: (fern, air) was 2, (bread, yeast) was 1.
TRUTH = {("fern", "air"): 0.0, ("fern", "yeast"): 2.0, ("bread", "air"): 2.0, ("bread", "yeast"): 0.0}
EVIDENCE = {ids: (Evidence(value, 1.0, "qrels"),) for ids, value in TRUTH.items()}
DATA = RefineData(EVIDENCE, QUERIES, DOCUMENTS)
CONFIG = RefineConfig(
    num_steps=12,
    num_queries=2,
    num_candidates=2,
    num_samples=8,
    minibatch_size=2,
    microbatch_size=2,
    learning_rate=7e-4,
    num_warmup_steps=1,
    num_value_steps=1,
    kl_coefficient=0.01,
    max_step_kl=0.5,
    kl_limit=50.0,
    length_price=0.0,
    replay_weight=0.0,
    dev_every=3,
    save_every=100,
    device="cpu",
)
# A toy of four pairs in opposition needs large steps.
FAST: dict[str, Any] = {"algorithm": "grpo", "learning_rate": 2e-3}
CPU = ModelOptions(device="cpu", dtype="float32")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows its four pairs, and is not yet so sure that it would never write anything else."""
    shape = TinyConfig(400, 48, 2, 2, 96, 192)
    config = replace(DISTILL, modes=("explain",), num_steps=45, batch_size=4, learning_rate=8e-3, tiny=shape)
    return distill(judgments(), QUERIES, DOCUMENTS, SHORT, tmp_path_factory.mktemp("student"), config).checkpoint


def run(student: Path, out: Path, on_step: Callable[[RefineStep], None] | None = None, **changed: Any) -> Refined:
    data = changed.pop("data", DATA)
    return refine(student, data, SHORT, out, replace(CONFIG, **changed), on_step=on_step)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    mine, theirs = weights(one), weights(other)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def plain(step: RefineStep) -> dict[str, Any]:
    return {**asdict(step), "seconds": 0.0}


# ---- learning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "rate"), [("ppo", 7e-4), ("grpo", 7e-4), ("rwl", 3e-4)])
def test_a_student_comes_round_to_the_evidence(student: Path, tmp_path: Path, algorithm: str, rate: float) -> None:
    """Distilled labels earn 1/2 for (bread, yeast) and nothing else: 1/8. The most there is is 1."""
    options = {"algorithm": algorithm, "learning_rate": rate, "is_centred": False}
    done = run(student, tmp_path / "out", num_steps=30, **options)  # type: ignore[arg-type]
    rewards = [step.reward for step in done.history]
    before, after = fmean(rewards[:3]), fmean(rewards[-3:])
    assert before < 0.3
    assert after > 0.55
    assert done.history[0].kl == done.history[0].kl_k3 == 0.0  # nothing has moved yet
    assert done.history[-1].kl_k3 > 0
    assert max(step.max_gap for step in done.history) < 1e-3
    assert done.alarm is None
    assert read_card(done.checkpoint / "whyrank.json").template == SHORT
    found = list(read_jsonl(done.checkpoint / "metrics.jsonl", RefineStep))
    assert tuple(found) == done.history
    Reranker.load(done.checkpoint, options=CPU).rank("my fern", ["Dry air."])


def test_values_learn_alone_at_first(student: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"is_centred": False, "value_learning_rate": 1e-2, "kl_coefficient": 0.0}
    done = run(student, tmp_path / "out", num_steps=7, num_value_steps=7, **options)
    assert largest_difference(student, done.checkpoint) == 0.0
    assert done.history[-1].value_loss < done.history[0].value_loss / 2
    assert done.history[-1].explained_variance > 0.5 > done.history[0].explained_variance
    assert done.history[1].kl == 0.0
    assert run(student, tmp_path / "more", num_steps=3, num_value_steps=2).history[2].step_kl > 0


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_where_all_samples_earn_the_same_nothing_moves(student: Path, tmp_path: Path, algorithm: str) -> None:
    """Nobody earns anything: advantages over the pair's other samples are 0, and so is the step."""
    same = RefineData({ids: (Evidence(1.0, 1e-30, "qrels"),) for ids in TRUTH}, QUERIES, DOCUMENTS)
    options: dict[str, Any] = {"data": same, "num_value_steps": 0, "kl_coefficient": 0.0, "unreadable_reward": 0.0}
    done = run(student, tmp_path / "out", algorithm=algorithm, num_steps=2, rewards=("agreement=0",), **options)
    assert largest_difference(student, done.checkpoint) == 0.0


def test_a_price_holds_the_student_back(student: Path, tmp_path: Path) -> None:
    free, dear = (
        run(student, tmp_path / f"{price}", num_steps=12, kl_coefficient=price, **FAST).history[-1]
        for price in (0.0, 1.0)
    )
    assert dear.kl_k3 < free.kl_k3 / 2


def test_the_price_follows_its_target(student: Path, tmp_path: Path) -> None:
    """No distance while only values learn: a fifth less for every 32 answers of a horizon of 32."""
    done = run(student, tmp_path / "out", num_steps=3, kl_target=0.5, kl_horizon=32, num_value_steps=3)
    assert [step.kl_coefficient for step in done.history] == pytest.approx([0.01, 0.008, 0.0064])


def test_a_round_ends_when_it_has_moved_enough(student: Path, tmp_path: Path) -> None:
    done = run(student, tmp_path / "out", num_steps=3, num_epochs=10, temperature=1.5, max_step_kl=1e-4, **FAST)
    assert all(0 < step.num_updates < 20 for step in done.history)
    assert all(step.step_kl > 1e-4 for step in done.history)


def test_microbatches_change_nothing(student: Path, tmp_path: Path) -> None:
    """One forward pass for four pairs, or four for one each, and for four replayed judgments: the same weights."""
    from whyrank.generators.hf.chat import ChatTokens
    from whyrank.generators.hf.load import load_tokenizer

    replay = list(examples_of(judgments(), QUERIES, DOCUMENTS, SHORT, ChatTokens(load_tokenizer(student))))
    data, losses = replace(DATA, replay=replay), []
    folders = []
    for size in (4, 1):
        options: dict[str, Any] = {"num_steps": 3, "minibatch_size": 4, "microbatch_size": size, "temperature": 1.5}
        options |= {"replay_weight": 2.0, "replay_size": 4}
        done = run(student, tmp_path / f"{size}", data=data, **options)
        folders.append(done.checkpoint)
        losses.append([step.replay_loss for step in done.history])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] > 0
    assert largest_difference(*folders) < 2e-5
    assert largest_difference(folders[0], student) > 1e-3


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_layers_may_be_computed_again(
    student: Path, tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, from more passes through the layers."""
    real, counts = LlamaDecoderLayer.forward, [0, 0]
    folders: list[Path] = []

    def counted(self: LlamaDecoderLayer, *args: Any, **kwargs: Any) -> Any:
        counts[len(folders)] += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    for is_again in (False, True):
        options: dict[str, Any] = {"algorithm": algorithm, "num_steps": 3, "temperature": 1.5}
        done = run(student, tmp_path / f"{is_again}", is_recomputed=is_again, **options)
        folders.append(done.checkpoint)
    assert counts[1] > counts[0]
    assert largest_difference(*folders) < 1e-6
    assert largest_difference(folders[0], student) > 1e-4


def test_replay_keeps_what_was_distilled(student: Path, tmp_path: Path) -> None:
    from whyrank.generators.hf.chat import ChatTokens
    from whyrank.generators.hf.load import load_tokenizer

    replay = list(examples_of(judgments(), QUERIES, DOCUMENTS, SHORT, ChatTokens(load_tokenizer(student))))
    data = replace(DATA, replay=replay)
    options: dict[str, Any] = {"num_steps": 10, "kl_coefficient": 0.0, **FAST}
    alone = run(student, tmp_path / "alone", **options)
    both = run(student, tmp_path / "both", data=data, replay_weight=5.0, replay_size=4, **options)
    assert alone.history[-1].replay_loss == 0.0
    assert 0 < both.history[-1].replay_loss < both.history[0].replay_loss
    assert both.history[-1].reward < alone.history[-1].reward


def test_an_adapter_is_its_own_reference(student: Path, tmp_path: Path) -> None:
    """Without distance at first, with distance later; a stopped run ends as if it had not been; it is written alone, or
    whole with its base."""
    options: dict[str, Any] = {"num_steps": 4, "save_every": 2, **FAST, "adapter": AdapterConfig(rank=4)}
    options |= {"data": replace(DATA, dev=dev_set({"fern": "yeast", "bread": "air"})), "temperature": 1.5}
    whole = run(student, tmp_path / "whole", **options)
    assert whole.history[0].kl == whole.history[0].kl_k3 == 0.0
    assert whole.history[-1].kl_k3 > 0
    assert max(step.max_gap for step in whole.history) < 1e-3

    def stop(step: RefineStep) -> None:
        if step.step == 3:
            raise Stop

    with pytest.raises(Stop):
        run(student, tmp_path / "out", stop, **options)
    resumed = run(student, tmp_path / "out", **options)
    assert [plain(step) for step in resumed.history] == [plain(step) for step in whole.history]
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (resumed.checkpoint, whole.checkpoint)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert not (whole.checkpoint / "model.safetensors").exists()
    merged = run(student, tmp_path / "merged", **{**options, "adapter": AdapterConfig(rank=4, is_merged=True)})
    assert weights(merged.checkpoint).keys() == weights(student).keys()
    assert not (merged.checkpoint / "adapter_config.json").exists()
    cpu = torch.device("cpu")
    reloaded = load_model(whole.checkpoint, cpu, torch.float32).state_dict()
    for name, value in load_model(merged.checkpoint, cpu, torch.float32).state_dict().items():
        torch.testing.assert_close(reloaded[name], value, atol=1e-6, rtol=0)


# ---- the best checkpoint, alarms ----------------------------------------------------------------------------------


def dev_set(relevant: dict[str, str]) -> DevSet:
    lines = {q: [ScoredDocument(q, d, i + 1, -float(i)) for i, d in enumerate(DOCUMENTS)] for q in QUERIES}
    return DevSet(tuple(QUERIES.values()), DOCUMENTS, lines, tuple(Qrel(q, d, 1) for q, d in relevant.items()))


def test_the_checkpoint_that_ranks_dev_best_is_kept(student: Path, tmp_path: Path) -> None:
    """With dev qrels that agree with the teacher and evidence that does not, the distilled student stays the best."""
    spoiled = replace(DATA, dev=dev_set({"fern": "air", "bread": "yeast"}))
    done = run(student, tmp_path / "spoiled", data=spoiled, num_steps=20, max_dev_drop=10.0, **FAST)
    assert done.first_dev == done.best_dev == 1.0
    assert done.best_step == 0
    assert [step.step for step in done.history if step.dev is not None] == [3, 6, 9, 12, 15, 18, 20]
    assert done.history[-1].dev is not None
    assert done.history[-1].dev < 1.0
    assert largest_difference(student, done.checkpoint) == 0.0
    mended = replace(DATA, dev=dev_set({"fern": "yeast", "bread": "air"}))
    done = run(student, tmp_path / "mended", data=mended, num_steps=20, **FAST)
    assert done.first_dev == pytest.approx(0.631, abs=1e-3)  # 1 / log2(3), the second place
    assert done.best_dev == 1.0
    assert done.best_step > 0
    assert not (tmp_path / "mended" / "best").exists()
    told = read_card(done.checkpoint / "whyrank.json").training
    assert (told["best_step"], told["best_dev"], told["alarm"]) == (done.best_step, 1.0, None)


def test_gaming_stops_the_run(student: Path, tmp_path: Path) -> None:
    spoiled = replace(DATA, dev=dev_set({"fern": "air", "bread": "yeast"}))
    done = run(student, tmp_path / "out", data=spoiled, num_steps=60, **FAST)
    assert done.alarm is not None
    assert "the rewards are being gamed" in done.alarm
    assert len(done.history) < 60
    assert largest_difference(student, done.checkpoint) == 0.0
    assert run(student, tmp_path / "out", data=spoiled, num_steps=60, **FAST) == done  # told again, not run again


# ---- resuming -------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("place", [2, 5])
def test_a_stopped_run_ends_as_if_it_had_not_been(student: Path, tmp_path: Path, place: int) -> None:
    options: dict[str, Any] = {
        "num_steps": 6,
        "save_every": 2,
        "kl_target": 0.1,
        "kl_horizon": 100,
        "length_price": 1.0,
    }
    options |= {"data": replace(DATA, dev=dev_set({"fern": "yeast", "bread": "air"}))}
    whole = run(student, tmp_path / "whole", **options)

    def stop(step: RefineStep) -> None:
        if step.step == place:
            raise Stop

    with pytest.raises(Stop):
        run(student, tmp_path / "out", stop, **options)
    steps: list[int] = []
    resumed = run(student, tmp_path / "out", lambda step: steps.append(step.step), **options)
    assert steps == list(range(place // 2 * 2 + 1, 7))
    assert largest_difference(resumed.checkpoint, whole.checkpoint) == 0.0
    assert [plain(step) for step in resumed.history] == [plain(step) for step in whole.history]
    assert (resumed.best_step, resumed.best_dev) == (whole.best_step, whole.best_dev)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_a_state_of_another_run_is_refused(student: Path, tmp_path: Path) -> None:
    def stop(step: RefineStep) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(student, tmp_path / "out", stop, save_every=1)
    with pytest.raises(InputError, match="holds a state of another run"):
        run(student, tmp_path / "out", save_every=1, seed=1)
    shutil.rmtree(tmp_path / "out" / "state")
    run(student, tmp_path / "out", num_steps=1)
    with pytest.raises(InputError, match="holds a checkpoint trained on other data"):
        run(student, tmp_path / "out", num_steps=2)


def test_a_student_that_was_distilled_anew_is_another_one(student: Path, tmp_path: Path) -> None:
    """The folder of the student is the same; its weights are not, so what is in `out` came from another start."""
    copy = Path(shutil.copytree(student, tmp_path / "student"))
    run(copy, tmp_path / "out", num_steps=1)
    changed = weights(copy)
    changed["model.norm.weight"] += 0.1
    save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds a checkpoint trained on other data"):
        run(copy, tmp_path / "out", num_steps=1)


def test_a_kill_behind_the_last_write_leaves_no_rubbish(student: Path, tmp_path: Path) -> None:
    done = run(student, tmp_path / "out", num_steps=1)
    for leftover in ("state", "best"):
        (done.checkpoint / leftover).mkdir()
    assert run(student, tmp_path / "out", num_steps=1).history == done.history
    assert not [name for name in ("state", "best") if (done.checkpoint / name).exists()]


def test_missing_texts_and_evidence_are_named(student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected pairs with evidence"):
        run(student, tmp_path, data=replace(DATA, evidence={}))
    with pytest.raises(InputError, match=r"the pair \(fern, moss\): document 'moss' is not"):
        run(student, tmp_path, data=replace(DATA, evidence={("fern", "moss"): EVIDENCE["fern", "air"]}))
    with pytest.raises(InputError, match="expected every reward once, found 'format' twice"):
        run(student, tmp_path, rewards=("format=1", "format=2"))


# ---- the command ------------------------------------------------------------------------------------------------


def write_inputs(folder: Path, student: Path) -> list[str]:
    """The files of a run, as options; with links in place of qrels."""
    write_jsonl(folder / "queries.jsonl", QUERIES.values())
    write_jsonl(folder / "docs.jsonl", DOCUMENTS.values())
    write_jsonl(folder / "pairs.jsonl", [Pair(q, d, "linked" if v else "negative") for (q, d), v in TRUTH.items()])
    write_jsonl(folder / "judgments.jsonl", judgments())
    (folder / "qrels.txt").write_text("fern 0 yeast 1\nbread 0 air 1\n")
    (folder / "run.trec").write_text(
        "".join(f"{q} Q0 {d} {i + 1} {-i} r\n" for q in QUERIES for i, d in enumerate(DOCUMENTS))
    )
    (folder / "refine.toml").write_text("num_warmup_steps = 1\nnum_value_steps = 1\nnum_steps = 99\n")
    names = {"--queries": "queries.jsonl", "--corpus": "docs.jsonl", "--pairs": "pairs.jsonl"}
    names |= {"--judgments": "judgments.jsonl", "--replay": "judgments.jsonl", "--config": "refine.toml"}
    names |= {"--dev-run": "run.trec", "--dev-qrels": "qrels.txt"}
    words = ["refine", "--model", str(student), *(w for o, n in names.items() for w in (o, str(folder / n)))]
    return [*words, "--device", "cpu", "--num-samples", "2", "--num-queries", "2", "--consensus-trust", "0.1"]


def test_the_command(student: Path, tmp_path: Path) -> None:
    words = write_inputs(tmp_path, student)
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, [*words, "--num-steps", "2", "--reward", "ranking_gain=2", "-o", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["history"]) == 2
    assert told["num_pairs"] == 4
    assert list(told["history"][0]["rewards"]) == ["ranking_gain"]
    config = json.loads((out / "manifest.json").read_text())["config"]
    assert (config["num_steps"], config["num_value_steps"], config["num_samples"]) == (2, 1, 2)
    assert config["evidence"]["consensus_trust"] == 0.1
    assert told["history"][1]["replay_loss"] > 0


def test_an_alarm_has_an_exit_code_of_its_own(student: Path, tmp_path: Path) -> None:
    words = [*write_inputs(tmp_path, student), "--num-steps", "9", "--kl-limit", "1e-9", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--learning-rate", "1e-3"])
    assert result.exit_code == 7, result.output
    assert "stopped: the policy has moved" in result.stdout
    assert (tmp_path / "out" / "whyrank.json").is_file()


@pytest.mark.parametrize(
    ("more", "code", "problem"),
    [
        (["--trust", "1"], 2, "No such option"),
        (["--temperature", "0"], 2, "expected temperature above 0"),
        (["--reward", "praise"], 1, "expected a reward among agreement"),
        (["--pairs", "nowhere.jsonl"], 1, "nowhere.jsonl"),
    ],
)
def test_wrong_use_is_told(student: Path, tmp_path: Path, more: list[str], code: int, problem: str) -> None:
    words = [*write_inputs(tmp_path, student), "-o", str(tmp_path / "out"), *more]
    done = CliRunner().invoke(app, words)
    told = done.output if code == 2 else str(done.exception)
    assert (done.exit_code, problem in " ".join(told.replace("│", " ").split())) == (code, True), told


def num_saved(out: Path) -> int:
    """Rounds in the last saved state; between two renames there is none for a moment."""
    try:
        return len(json.loads((out / "state" / "state.json").read_text())["history"])
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("num_kills", [1, pytest.param(10, marks=pytest.mark.slow)], ids=["few", "many"])
def test_killed_runs_end_in_the_same_weights(student: Path, tmp_path: Path, num_kills: int) -> None:
    words = [
        *write_inputs(tmp_path, student),
        "--num-steps",
        str(6 * num_kills),
        "--save-every",
        "1",
        "--dev-every",
        "2",
    ]
    words += ["--num-threads", "1"]
    rng, out = random.Random(num_kills), tmp_path / "out"
    for number in range(num_kills):
        place = 6 * number + rng.randrange(5)
        process = subprocess.Popen(
            [sys.executable, "-c", "from whyrank.cli import main; main()", *words, "-o", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while process.poll() is None and num_saved(out) <= place:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.1))
        process.kill()
        assert process.wait() == -9
    whole = tmp_path / "whole"
    for folder in (out, whole):
        result = CliRunner().invoke(app, [*words, "-o", str(folder)])
        assert result.exit_code == 0, result.output
    assert largest_difference(out, whole) <= 1e-6
    logs = [[plain(step) for step in read_jsonl(folder / "metrics.jsonl", RefineStep)] for folder in (out, whole)]
    assert [log["reward"] for log in logs[0]] == [log["reward"] for log in logs[1]]
    assert len(logs[0]) == 6 * num_kills
