"""Ctrl-C: one line, exit code 130, and the promise to continue only where it is kept."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import RERANKED, TEXTS, order, run_json
from tests.fake_endpoint import FakeEndpoint, Reply

# A process that is started in the background may have inherited that it ignores the signal.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from whyrank.cli import main
sys.stderr.write("started\\n")
sys.stderr.flush()
main()
"""


def interrupt(*words: str, when: Callable[[], bool] | None = None) -> tuple[int, str, list[str]]:
    """Exit code, standard output and lines of standard error of a command that gets SIGINT as soon as `when`; or,
    without a condition, as soon as it has read a line of its standard input, which stays open."""
    command = [sys.executable, "-c", START, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        assert process.stdin is not None
        assert process.stderr.readline() == "started\n"
        process.stdin.write('{"_id": "d1", "text": "A plant."}\n')
        process.stdin.flush()
        unread = process.stdin.fileno()
        while not (when() if when else num_unread(unread) == 0):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err.splitlines()


def num_unread(pipe: int) -> int:
    """Bytes written to a pipe that its reader has not taken yet."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.usefixtures("here")
def test_an_interrupted_job_says_that_it_continues_and_does() -> None:
    judgments = Path("out/judgments.jsonl")

    def slow_after_two(document: str, attempt: int) -> Reply:
        is_begun = judgments.is_file() and judgments.read_bytes().count(b"\n") >= 2
        label = 2 * ("leaves" in document or "stays" in document) or int("plant" in document or "flat" in document)
        return Reply(text=f"Relevance Label: {label} ##", delay=30.0 if is_begun and not is_late else 0.0)

    is_late = False
    with FakeEndpoint(slow_after_two) as server:
        model = ("--model", f"endpoint:{server.url}#m", "--concurrency", "1", "--mode", "direct")
        words = ("rerank", "--run", "run.trec", *TEXTS, *model, "-o", "out")
        code, out, err = interrupt(*words, when=lambda: judgments.is_file() and judgments.read_bytes().count(b"\n") > 1)
        assert (code, out) == (130, "")
        assert err[-1] == "whyrank: interrupted; the same command continues where it stopped"
        assert not any("Traceback" in line for line in err)
        is_late = True
        counts = run_json(*words)["counts"]
    assert counts["num_known"] >= 2
    assert counts["num_known"] + counts["num_new"] == 5
    assert order("out/run.trec") == RERANKED


@pytest.mark.usefixtures("here")
def test_what_does_not_continue_promises_nothing() -> None:
    words = ("rerank", "--query", "plant", "--documents", "-", "--model", "overlap")
    code, out, err = interrupt(*words)
    assert (code, out, err) == (130, "", ["whyrank: interrupted"])
