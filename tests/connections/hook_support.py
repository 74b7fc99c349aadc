"""Receivers of reports: real HTTP on the loopback address, which keep what came in and answer as they are told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import standardwebhooks

SECRET = "whsec_" + "c3dpdGNoYm9hcmQtdGVzdC1zZWNyZXQtMzItYnl0ZXM="


@dataclasses.dataclass(frozen=True)
class Came:
    """One request as it came in."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, secret: str = SECRET) -> Any:
        """The body, after the library of Standard Webhooks has checked the signature and the time."""
        return standardwebhooks.Webhook(secret).verify(self.body, dict(self.headers))

    def json(self) -> Any:
        return json.loads(self.body)


@dataclasses.dataclass(frozen=True)
class Say:
    """An answer. ``after``: held back until this is set."""

    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    after: threading.Event | None = None


class Receiver:
    """``answer`` decides by the request and by how many came before it."""

    def __init__(self, answer: Callable[[Came, int], Say]) -> None:
        self.came: list[Came] = []
        self._answer = answer
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                came = Came(
                    self.path,
                    {name.lower(): value for name, value in self.headers.items()},
                    self.rfile.read(length),
                )
                with outer._lock:
                    before = len(outer.came)
                    outer.came.append(came)
                say = outer._answer(came, before)
                if say.after is not None:
                    say.after.wait(60)
                # Whoever was killed meanwhile does not hear it.
                with contextlib.suppress(OSError):
                    self.send_response(say.status)
                    for name, value in {"Content-Length": str(len(say.body)), **say.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(say.body)

            do_GET = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet: the receiver keeps what came."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)

    @property
    def port(self) -> int:
        return self._server.server_port

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextlib.contextmanager
def receiver(answer: Callable[[Came, int], Say] | Say | None = None) -> Iterator[Receiver]:
    """A receiver that runs inside the block; ``answer`` is what it says, always or by request."""
    fixed = answer if isinstance(answer, Say) else Say()
    made = Receiver(answer if callable(answer) else lambda came, before: fixed)
    serving = threading.Thread(target=made._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    serving.start()
    try:
        yield made
    finally:
        made._server.shutdown()
        made._server.server_close()
