"""Model names that lead nowhere: the hub is asked once, and one line says what to type."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.command_line import ONE, process

ADVICE = "Give the folder of a checkpoint (out/student) or a hub id (owner/name)"


class EmptyHub(BaseHTTPRequestHandler):
    """Knows no model, and says so as the hub does."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a hub without models is asked, by processes that have nothing in their cache."""
    EmptyHub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield EmptyHub.asked
        server.shutdown()


@pytest.mark.usefixtures("here")
def test_a_mistyped_name_is_asked_for_once(hub: list[str]) -> None:
    done = process(*ONE, "--model", "expalin-student")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("whyrank: no folder 'expalin-student' is here, and as a hub id it was refused: ")
    assert done.stderr.endswith(f"{ADVICE}\n")
    assert hub == ["/expalin-student/resolve/main/config.json"]


@pytest.mark.usefixtures("here")
def test_a_hub_out_of_reach_is_one_line(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    done = process(*ONE, "--model", "expalin-student")
    assert (done.returncode, done.stdout, hub) == (1, "", [])
    assert done.stderr == (
        "whyrank: no folder 'expalin-student' is here, and the hub cannot be reached or has no config.json of a model "
        f"with this id. {ADVICE}\n"
    )
