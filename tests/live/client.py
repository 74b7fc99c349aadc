"""A page with a stable id, whose bytes and time the test controls; the network between (:class:`Cut` of streaming.py); and servers to come back to."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import http.client
import json
import os
import secrets
import shutil
import socket
import sqlite3
import struct
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from events.sse import ServerSentEvent
from tests.conftest import Running, free_port, until
from tests.live import services
from tests.live.streaming import Stream, call


class Line(Stream):
    """A stream that reads when it may, ``portion`` bytes at a time, and ends as it is told to."""

    def __init__(self, tab: Tab, url: str, *, portion: int = 65536, **words: Any) -> None:
        self._tab = tab
        self._portion = portion
        self._may_read = threading.Event()
        self._may_read.set()
        # Before its first frame comes.
        tab.present = self
        super().__init__(url, **words)
        tab.lines.append(self)

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, AttributeError, ValueError):
            while self._may_read.wait() and (chunk := self.answer.read1(self._portion)):
                self.raw += chunk
                for event in self.parser.feed(chunk):
                    self.events.append(event)
                    self._tab.apply(self, event)
        self.ended.set()

    def pause(self) -> None:
        """Read nothing more; what arrives stays in the kernel, and then at the other end."""
        self._may_read.clear()

    def resume(self) -> None:
        self._may_read.set()

    def cut(self, *, reset: bool = False) -> None:
        """Hang up: in order, or as a machine that is gone."""
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
        self.resume()
        self.thread.join(5)
        self._connection.close()
        self.answer.close()

    def close(self) -> None:
        self.cut()

    @property
    def welcome(self) -> Any:
        return self.named("welcome").json()


class Tab:
    """A page: keeps its id and its cursor, adopts the id that it is given, answers questions, and stays away when it is told to.

    ``stopped``: why it does not come back; empty while it does. ``asked`` counts the questions.
    """

    def __init__(
        self, node: Running, *, cid: str = "", topics: str = "", key: str = "", answers: bool = True
    ) -> None:
        self.node = node
        self.cid = cid or f"cid-{uuid.uuid4()}"
        self.page = secrets.token_urlsafe(12)
        self.topics = topics
        self.key = key or node.api_key
        self.answers = answers
        self.cursor: int | None = None
        self.seen: list[int] = []
        self.epoch = 0
        self.asked = 0
        self.stopped = ""
        self.lines: list[Line] = []
        #: The stream whose frames count.
        self.present: Line | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for line in self.lines:
            line.close()

    @property
    def line(self) -> Line:
        return self.lines[-1]

    def open(
        self, node: Running | None = None, *, url: str = "", ready: bool = True, portion: int = 65536
    ) -> Line:
        """A stream of this page, from ``node`` or, past a network of its own, from the base ``url``."""
        self.node = node or self.node
        # What an older stream still brings is nothing: it comes again over the new one.
        self.present = None
        query = f"cid={self.cid}&page={self.page}" + (f"&topics={self.topics}" if self.topics else "")
        headers = {} if self.cursor is None else {"Last-Event-ID": str(self.cursor)}
        line = Line(
            self, f"{url or self.node.url}/api/events?{query}", key=self.key, headers=headers, portion=portion
        )
        if line.status == 204:
            self.stopped = "204"
        else:
            assert line.status == 200, bytes(line.raw)
            found = line.welcome
            self.cid, self.epoch = found["connection_id"], found["epoch"]
            if ready:
                line.named("ready")
        return line

    def apply(self, line: Line, event: ServerSentEvent) -> None:
        """What a page does with a frame. Called by the thread that reads."""
        if line is not self.present:
            return
        if "." in event.name:
            self.cursor = int(event.id)
            self.seen.append(self.cursor)
        elif event.name == "ready" and self.cursor is None:
            self.cursor = event.json()["cursor"]
        elif event.name == "probe" and event.json().get("question"):
            self.asked += 1
            if self.answers:
                threading.Thread(
                    target=self.say, args=["answer", {"nonce": event.json()["nonce"]}], daemon=True
                ).start()
        elif event.name == "superseded":
            self.stopped = "superseded"

    def reloaded(self) -> Tab:
        """The page after F5, or its duplicate: the same storage, another nonce."""
        return Tab(self.node, cid=self.cid, topics=self.topics, key=self.key)

    def say(self, verb: str, body: Any, *, node: Running | None = None) -> tuple[int, Any]:
        status, answer, _ = call(
            node or self.node, "POST", f"/api/clients/{self.cid}/{verb}", body, key=self.key
        )
        return status, answer

    def probe(self, node: Running | None = None) -> bool:
        """Whether the nonce comes back over the present stream."""
        nonce = secrets.token_urlsafe(9)
        status, _ = self.say("probe", {"epoch": self.epoch, "nonce": nonce}, node=node)
        if status != 202:
            return False
        self.line.until(lambda event: event.name == "probe" and event.json() == {"nonce": nonce})
        return True

    def claim(self, subject: str, *, takeover: bool = False) -> tuple[int, Any]:
        return self.say("claims", {"subject": subject, "takeover": takeover})

    @property
    def picture(self) -> Any:
        status, found, _ = call(self.node, "GET", f"/api/clients/{self.cid}", key=self.key)
        assert status == 200, found
        return found

    def wait_for(self, state: str, seconds: float = 40) -> Any:
        def look() -> Any:
            found = self.picture
            return found if found["state"] == state else None

        return until(look, seconds, f"it is not {state}: {self.picture}")


# ── Servers to come back to ──


@dataclasses.dataclass
class Node(Running):
    """One server process. ``second_key``: the admin's, too, and so another login."""

    second_key: str = ""
    name: str = "server"
    database: services.PostgreSQL | None = None

    def start_server(self) -> None:
        self.start(self.name)

    def stop_server(self, *words: Any) -> int:
        return self.stop(self.name, *words)

    @property
    def pid(self) -> int:
        return self.processes[self.name].pid

    def rows(self, query: str) -> list[Any]:
        """What is in the database itself."""
        if self.database is not None:
            return self.database.execute(query, database=self.env["DATABASE_URL"].rpartition("/")[2])
        with contextlib.closing(
            sqlite3.connect(f"file:{self.data_dir}/switchboard.sqlite3?mode=ro", uri=True)
        ) as file:
            return file.execute(query).fetchall()


MAKE = """
import json
from django.contrib.auth.models import User
from django.utils import timezone
from connections import registry
admin = User.objects.create_superuser("admin", password="correct-horse-battery")
other = User.objects.create_user("other", password="staple-battery-horse")
keys = [registry.create_api_key(owner_id=user.pk, name="test", now=timezone.now())[1] for user in (admin, other, admin)]
print("KEYS", json.dumps(keys))
"""

#: An installation with its users, as files and, on PostgreSQL, as a database to copy: making one takes seconds.
_made: dict[str, tuple[Path, list[str]]] = {}


def _environment(data_dir: Path, port: int, extra: dict[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
    return kept | {
        "PORT": str(port),
        "DATA_DIR": str(data_dir),
        "ALLOW_PRIVATE_TARGETS": "1",
        "COMMANDS": "any",
        "PYTHONUNBUFFERED": "1",
        "STREAM_LIMIT": "500",
        "DJANGO_SETTINGS_MODULE": "project.settings",
        **extra,
    }


def _installed(data_dir: Path, database: services.PostgreSQL | None) -> tuple[str, list[str]]:
    """A new installation in ``data_dir``: its DATABASE_URL (empty: SQLite), and its keys."""
    kind = database.url if database else "sqlite"
    if kind not in _made:
        place = Path(tempfile.mkdtemp(prefix="sb-made-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        env = _environment(place, 1, {"DATABASE_URL": database.url} if database else {})
        first = Running(url="", env=env, data_dir=place, api_key="", other_api_key="")
        first.manage("migrate", "--verbosity", "0")
        # Not by shell(): a database that is copied must have nobody in it, and a process that has ended is surely out.
        printed = first.manage("shell", "--no-imports", "-c", MAKE)
        _made[kind] = place, json.loads(printed.split("KEYS", 1)[1])
    place, keys = _made[kind]
    shutil.copytree(place, data_dir, dirs_exist_ok=True)
    if database is None:
        return "", keys
    name = f"copy_{uuid.uuid4().hex[:8]}"
    database.execute(f'CREATE DATABASE "{name}" TEMPLATE switchboard', database="postgres")
    return database.url_of(name), keys


@contextlib.contextmanager
def installation(
    directory: Path,
    *,
    servers: int,
    started: bool = True,
    database: services.PostgreSQL | None = None,
    kind: type[Node] = Node,
    **extra: str,
) -> Iterator[list[Node]]:
    """So many server processes on one database and one data directory, without a worker, whose sweeps would be one more."""
    url, keys = _installed(directory, database)
    nodes = []
    for number in range(1, servers + 1):
        port = free_port()
        env = _environment(directory, port, {**extra, **({"DATABASE_URL": url} if url else {})})
        nodes.append(
            kind(
                url=f"http://127.0.0.1:{port}", env=env, data_dir=directory, api_key=keys[0], other_api_key=keys[1],
                second_key=keys[2], name="server" if number == 1 else f"server{number}", database=database,
            )
        )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for node in nodes if started else ():
            stack.callback(services.stop_all, node)
            node.start_server()
        for node in nodes if started else ():
            node.wait_until_up()
        yield nodes
