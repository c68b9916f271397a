"""Training in several processes: the same steps as in one, one writer, and nothing lost when they are stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from whyrank.cli import app
from whyrank.store import read_json
from whyrank.training.ranks import ALONE, Ranks, launched, ranks

SMALL = ("--num-queries", "12", "--domain", "houseplants", "--num-irrelevant", "3", "--seed", "1")
SHAPE = ("--vocab-size", "400", "--hidden-size", "32", "--num-layers", "2", "--num-heads", "2")


@given(st.lists(st.integers(), max_size=40), st.integers(1, 9))
def test_shares_are_all_items_once_in_order_and_nearly_equal(items: list[int], size: int) -> None:
    shares = [list(Ranks(rank, size).share(items)) for rank in range(size)]
    assert [item for share in shares for item in share] == items
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_alone_nothing_is_shared() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert ALONE.gathered(ALONE.share([1, 2, 3])) == [1, 2, 3]
    assert ALONE.sums(1.5, 2.0) == (1.5, 2.0)
    assert ALONE.from_main(lambda: "found") == "found"
    ALONE.sum_gradients([parameter])
    assert parameter.grad is None
    with launched() as found:
        assert found is ALONE
        assert ranks() is ALONE


# ---- two processes ----------------------------------------------------------------------------------------------


def free_port() -> int:
    """Below those that the system hands out for outgoing connections: one of these could meet itself."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as listening, suppress(OSError):
            listening.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "whyrank")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def in_two(words: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """A command of whyrank in two processes."""
    return subprocess.run([*LAUNCHER, *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def in_one(words: Sequence[str | Path]) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)


def curve(folder: Path, *names: str) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in names] for line in lines]


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def almanac(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("almanac")
    in_one(("almanac", "export", "--split", "train", *SMALL, "--teacher", "-o", folder))
    return folder


@pytest.fixture(scope="module")
def distilling(almanac: Path) -> tuple[str | Path, ...]:
    texts = ("--queries", almanac / "queries.jsonl", "--corpus", almanac / "corpus.jsonl")
    taught = ("distill", "--judgments", almanac / "judgments.jsonl", *texts, "--template", "almanac", *SHAPE)
    dev = ("--dev-run", almanac / "candidates.trec", "--dev-qrels", almanac / "qrels.trec", "--eval-every", "4")
    dev_texts = ("--dev-queries", almanac / "queries.jsonl", "--dev-corpus", almanac / "corpus.jsonl")
    # Odd sizes and passes of few tokens: shares and the number of passes differ between the processes.
    sizes = ("--batch-size", "9", "--group-size", "3", "--max-pass-tokens", "300", "--num-warmup-steps", "2")
    steps = ("--num-steps", "8", "--save-every", "3", "--device", "cpu", "--precision", "float32", "--dev-top-k", "4")
    return (*taught, *dev, *dev_texts, *sizes, *steps)


@pytest.fixture(scope="module")
def student(distilling: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "one"
    in_one((*distilling, "-o", out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dividing", [(), ("--divide",)], ids=["whole", "divided"])
def test_two_processes_distil_as_one(
    dividing: tuple[str, ...], distilling: tuple[str | Path, ...], student: Path, tmp_path: Path
) -> None:
    distilling = (*distilling, *dividing)
    done = in_two((*distilling, "-o", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples (") == 1  # one of them prints
    names = ("loss", "grad_norm", "num_tokens", "step")
    for one, other in zip(curve(student, *names), curve(tmp_path / "two", *names), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert_same_weights(student, tmp_path / "two")
    assert read_json(tmp_path / "two" / "manifest.json")["is_finished"]
    again = in_two((*distilling, "-o", tmp_path / "two"))
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_accelerate_launches_it_too(distilling: tuple[str | Path, ...], student: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "whyrank", *map(str, distilling), "-o", str(tmp_path / "two")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_same_weights(student, tmp_path / "two")


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_killed(
    distilling: tuple[str | Path, ...], student: Path, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    words = [str(word) for word in (*distilling, "-o", out)]
    killed = subprocess.Popen([sys.executable, "-m", "whyrank", *words], stderr=subprocess.DEVNULL)
    while killed.poll() is None and not (out / "state" / "state.json").is_file():
        pass
    killed.kill()
    killed.wait()
    done = in_two(words)
    assert done.returncode == 0, done.stderr
    assert len(curve(out, "step")) == 8
    assert_same_weights(student, out)


@pytest.mark.slow
def test_two_processes_with_divided_weights_go_on_where_they_were_killed(
    distilling: tuple[str | Path, ...], student: Path, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    words = [str(word) for word in (*distilling, "--divide", "-o", out)]
    launched_ones = subprocess.Popen([*LAUNCHER, *words], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while launched_ones.poll() is None and not (out / "state" / "state.json").is_file():
        pass
    subprocess.run(["pkill", "-KILL", "-f", str(out)], check=True)  # the launcher and both
    assert launched_ones.wait() == -signal.SIGKILL
    num_done = len(read_json(out / "state" / "state.json")["history"])
    assert 0 < num_done < 8
    done = in_two(words)
    assert done.returncode == 0, done.stderr
    assert len(curve(out, "step")) == 8
    assert_same_weights(student, out)


MEASURED = """
import json, sys
import torch
from pathlib import Path
from whyrank.generators.hf.load import load_model
from whyrank.training.dividing import divide, is_divided, whole_weights
from whyrank.training.ranks import launched

def held(tensors):
    return sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel() for t in tensors)

with launched() as ranks:
    model = load_model(sys.argv[1], torch.device("cpu"), torch.float32)
    before = held(model.parameters())
    divide(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = held(s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    gradients, weights = held(p.grad for p in model.parameters()), held(model.parameters())
    with whole_weights(model):
        together = held(model.parameters())
    found = [before, weights, gradients, moments, together, held(model.parameters()), is_divided(model)]
    Path(sys.argv[2], f"{ranks.rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_each_process_holds_half_of_divided_weights_gradients_and_moments(student: Path, tmp_path: Path) -> None:
    (tmp_path / "measured.py").write_text(MEASURED)
    done = subprocess.run(
        [*LAUNCHER[:-2], str(tmp_path / "measured.py"), str(student), str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    whole = first[0]
    for position, times in ((1, 1), (2, 1), (3, 2)):
        assert first[position] + second[position] == times * whole
        assert abs(first[position] - second[position]) <= 0.05 * whole  # rows are not cut
    for found in (first, second):  # whole inside the block, divided again behind it
        assert found[4:] == [whole, found[1], True]


def test_one_process_divides_nothing(distilling: tuple[str | Path, ...], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*map(str, distilling), "--divide", "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "expected several processes" in str(done.exception)


@pytest.mark.parametrize("words", [("--optimizer", "muon"), ("--model", "some", "--lora-rank", "4")])
def test_what_cannot_be_divided_is_refused(
    words: tuple[str, ...], distilling: tuple[str | Path, ...], tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, [*map(str, distilling), *words, "--divide", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "divided weights" in " ".join(done.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize("dividing", [(), ("--divide", "--recompute")], ids=["whole", "divided"])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rwl"])
def test_two_processes_refine_as_one(
    algorithm: str, dividing: tuple[str, ...], almanac: Path, student: Path, tmp_path: Path
) -> None:
    texts = ("--queries", almanac / "queries.jsonl", "--corpus", almanac / "corpus.jsonl")
    known = ("--pairs", almanac / "pairs.jsonl", "--judgments", almanac / "teacher.jsonl")
    # The policy stays as it is in the first round and learns in the others.
    (tmp_path / "refine.toml").write_text("num_value_steps = 1\nnum_warmup_steps = 0\n")
    replay = ("--replay", almanac / "teacher.jsonl")
    dev = ("--dev-run", almanac / "candidates.trec", "--dev-qrels", almanac / "qrels.trec", "--dev-every", "2")
    sizes = ("--num-steps", "3", "--num-queries", "3", "--num-candidates", "3", "--num-samples", "2")
    more = ("--minibatch-size", "5", "--microbatch-size", "2", "--learning-rate", "1e-3", "--device", "cpu")
    settled = ("--config", tmp_path / "refine.toml")
    words = (
        "refine",
        "--model",
        student,
        *texts,
        *known,
        *replay,
        *dev,
        *sizes,
        *more,
        *settled,
        "--algorithm",
        algorithm,
    )
    in_one((*words, "-o", tmp_path / "one"))
    done = in_two((*words, *dividing, "-o", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    names = ("reward", "kl", "policy_loss", "value_loss", "replay_loss", "grad_norm", "step_kl", "num_updates")
    for one, other in zip(curve(tmp_path / "one", *names), curve(tmp_path / "two", *names), strict=True):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-3)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
