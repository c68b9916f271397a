"""A chat endpoint on this machine that answers, and fails, as it is told: a real server on a real socket."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

Kind = Literal["answer", "status", "reset", "hang", "raw", "truncated", "drip"]


@dataclass(frozen=True)
class Reply:
    """What happens to one call."""

    kind: Kind = "answer"
    text: str | None = ""
    finish_reason: str | None = "stop"
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    logprobs: Any = None


@dataclass(frozen=True)
class Seen:
    """One call as it arrived. `arrived` and `answered` are readings of `time.monotonic()`."""

    document: str
    attempt: int
    arrived: float
    headers: dict[str, str]
    payload: dict[str, Any]
    reply: Reply
    path: str


Plan = Callable[[str, int], Reply]
"""From the document's text and the number of earlier calls for it to what happens."""


class FakeEndpoint:
    """Serves `plan` on 127.0.0.1 while the block lasts, and keeps what it has seen."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seen: list[Seen] = []
        self.max_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def note(self, headers: dict[str, str], payload: dict[str, Any], path: str) -> Reply:
        """Record a call and choose its reply."""
        document = payload["messages"][-1]["content"].rpartition("Document:\n")[2]
        with self._lock:
            attempt = sum(seen.document == document for seen in self.seen)
            reply = self.plan(document, attempt)
            self.seen.append(Seen(document, attempt, time.monotonic(), headers, payload, reply, path))
            self._at_once += 1
            self.max_at_once = max(self.max_at_once, self._at_once)
        return reply

    def done(self) -> None:
        """The call is about to be answered."""
        with self._lock:
            self._at_once -= 1


def _handler_for(endpoint: FakeEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

        def do_POST(self) -> None:
            length, sent = int(self.headers["Content-Length"]), b""
            with suppress(OSError):
                sent = self.rfile.read(length)
            if len(sent) < length:
                return  # the client went away
            reply = endpoint.note(dict(self.headers.items()), json.loads(sent), self.path)
            endpoint.closing.wait(reply.delay)
            endpoint.done()  # before the reply: its receiver may call again at once
            with suppress(OSError):  # the client went away
                self._reply(reply)

        def _reply(self, reply: Reply) -> None:
            if reply.kind == "hang":
                endpoint.closing.wait(30)
            elif reply.kind == "reset":
                # A linger time of 0 makes close() send RST.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            elif reply.kind == "drip":
                self._send(200, b" " * 1000, reply.headers, drip=0.02)
            elif reply.kind == "truncated":
                self._send(200, _chat(reply), reply.headers, num_missing=40)
            elif reply.kind == "answer":
                self._send(200, _chat(reply), reply.headers)
            else:
                self._send(reply.status, reply.body, reply.headers)

        def _send(
            self, status: int, body: bytes, headers: dict[str, str], *, num_missing: int = 0, drip: float = 0.0
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if drip:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if endpoint.closing.wait(drip):
                        return
            self.wfile.write(body[: len(body) - num_missing])
            self.close_connection = True

    return Handler


def _chat(reply: Reply) -> bytes:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text},
        "finish_reason": reply.finish_reason,
        "logprobs": reply.logprobs,
    }
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}).encode()
