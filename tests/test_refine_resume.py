"""A refinement that was stopped anywhere, inside a file of its state included, ends as if it had not been."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_refine import Stop, largest_difference, one_thread, plain, run, student, write_inputs
from whyrank.store import read_jsonl
from whyrank.training.alarms import RefineStep

__all__ = ["one_thread", "student"]  # fixtures

FILES = ("model.safetensors", "head.safetensors", "optimizer.safetensors", "state.json")
# A process that dies by kill -9 when half of a file of its third state is on disk.
DIES_INSIDE = """
import os, signal, sys
from pathlib import Path
from whyrank.training import checkpoints

name, times = sys.argv.pop(1), 0
write_tensors, write_text = checkpoints.save_file, Path.write_text

def maybe_die(path):
    global times
    times += path.name == name and path.parent.name == ".state.growing"
    if times == 3:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

def tensors_and_die(tensors, path):
    write_tensors(tensors, path)
    maybe_die(path)

def text_and_die(path, *words, **more):
    write_text(path, *words, **more)
    maybe_die(path)

checkpoints.save_file, Path.write_text = tensors_and_die, text_and_die
from whyrank.cli import main
main()
"""


@pytest.fixture(scope="module")
def whole(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rounds at a stretch."""
    return run(student, tmp_path_factory.mktemp("whole"), num_steps=6, save_every=2).checkpoint


def assert_same_end(out: Path, whole: Path) -> None:
    assert largest_difference(out, whole) <= 1e-6
    logs = [[plain(step) for step in read_jsonl(folder / "metrics.jsonl", RefineStep)] for folder in (out, whole)]
    assert [step["reward"] for step in logs[0]] == [step["reward"] for step in logs[1]]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".") or path.is_dir()]


@pytest.mark.parametrize("name", [*FILES[::3], *(pytest.param(name, marks=pytest.mark.slow) for name in FILES[1:3])])
def test_a_damaged_state_costs_rounds_and_nothing_else(
    student: Path, whole: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """States are saved after rounds 2 and 4; the newer one is cut short, so that the other one is gone on from."""
    out, rounds = tmp_path / "out", list[int]()

    def stop(step: RefineStep) -> None:
        if step.step == 5:
            raise Stop

    with pytest.raises(Stop):
        run(student, out, stop, num_steps=6, save_every=2)
    assert {path.name for path in (out / "state").iterdir()} == set(FILES)
    damaged = out / "state" / name
    damaged.write_bytes(damaged.read_bytes()[: random.Random(name).randrange(damaged.stat().st_size)])
    run(student, out, lambda step: rounds.append(step.step), num_steps=6, save_every=2)
    assert rounds == [3, 4, 5, 6]
    assert "is damaged" in caplog.text
    assert_same_end(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_kill_inside_a_file_costs_a_round(student: Path, tmp_path: Path, name: str) -> None:
    words = [*write_inputs(tmp_path, student), "--num-steps", "5", "--save-every", "1", "--num-threads", "1"]
    command, alone = [sys.executable, "-c"], {**os.environ, "OMP_NUM_THREADS": "1"}
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    died = subprocess.run([*command, DIES_INSIDE, name, *words, "-o", str(out)], env=alone, capture_output=True)
    assert died.returncode == -9, died.stderr
    assert (out / ".state.growing" / name).is_file()
    for folder in (out, undisturbed):
        done = subprocess.run(
            [*command, "from whyrank.cli import main; main()", *words, "-o", str(folder)],
            env=alone,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
    assert_same_end(out, undisturbed)
