"""Each server of the bench as a context manager: started on free loopback ports, published to, looked at, and ended by its pid."""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

import pytest

from tests.bench import check, measure, pace
from tests.bench.pace import CAP_SECONDS
from tests.conftest import ROOT, free_port, until
from tests.live import services

NCHAN = "/usr/lib/nginx/modules/ngx_nchan_module.so"
KEYS = 20
LIMIT = "100000"

_SETUP = """
import json
from django.contrib.auth.models import User
from django.utils import timezone
from connections import registry
admin = User.objects.create_superuser("bench", password="correct-horse-battery")
keys = [registry.create_api_key(owner_id=admin.pk, name=f"bench {number}", now=timezone.now())[1] for number in range(KEYS)]
print("SETUP", json.dumps([admin.pk, keys]))
"""


class Missing(RuntimeError):
    """Something that this server needs is not installed; says what."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Events ``first`` to ``last``; ``commits``: when each was committed, where that is known (nanoseconds)."""

    first: int
    last: int
    commits: dict[int, int]
    collapsed: bool = False


class Server:
    """One server under test. ``slow_publish``: publishing costs so much that it is waited for longer."""

    name: ClassVar[str]
    #: What the table calls it.
    title: ClassVar[str]
    path: ClassVar[str]
    #: Bytes that say that the stream is live.
    ready: ClassVar[str]
    #: Whether a client can come back with a cursor.
    resumes: ClassVar[bool] = True
    ours: ClassVar[bool] = False
    #: Whether another process than the server publishes.
    from_worker: ClassVar[bool] = False
    #: Whether it is measured with many more streams, too.
    scales: ClassVar[bool] = False
    headers: tuple[str, ...] = ("",)

    def __init__(self, folder: Path, streams: int) -> None:
        self.folder = folder / self.name
        self.folder.mkdir()
        self.streams = streams
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._seq = 0

    # ── What a subclass says ──

    def prepare(self) -> None:
        """Once, before the first start."""

    def command(self) -> tuple[list[str], dict[str, str]]:
        """Words and environment of the server."""
        raise NotImplementedError("each server of the bench says how it is started")

    def up(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    # ── Its life ──

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, port: int = 0) -> None:
        self.port = port or free_port()
        words, extra = self.command()
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ
        }
        with (self.folder / "server.log").open("ab") as output:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=kept | {"PYTHONUNBUFFERED": "1"} | extra, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        until(self.up, 40, f"{self.name} does not answer:\n{self.log()}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(12)
        # Workers of nginx, or a server that hangs. It leads its own group, so nobody else is met.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        try:
            self.start()
            yield self
        finally:
            self.stop()

    def close(self) -> None:
        """After the last run."""

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")[-3000:]

    # ── What it costs ──

    def cpu(self) -> int:
        """Nanoseconds of the server's processes alone."""
        return measure.cpu_ns([self.pid])

    def cpu_of_all(self) -> int:
        """... and of the publisher and the services behind it."""
        return self.cpu()

    def database_connections(self) -> int | None:
        return None

    def counters(self) -> dict[str, float]:
        """Its own counters, where it has some."""
        return {}

    # ── Publishing ──

    def requests(self) -> list[str]:
        """Heads of the requests that open a stream, without the last empty line."""
        return [
            f"GET {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAccept: text/event-stream\r\n{header}"
            for header in self.headers
        ]

    def publish(self, count: int, *, rate: float = 0, size: int = 300) -> Published:
        """``count`` events, ``rate`` a second (0: at once)."""
        first = self._seq + 1
        self._seq += count
        last, commits = self._publish(first, count, rate, size)
        return Published(first=first, last=max(first, last), commits=commits, collapsed=last < self._seq)

    def _publish(self, first: int, count: int, rate: float, size: int) -> tuple[int, dict[int, int]]:
        """One request, ``POST /bench/publish``; its view does the rest, in the server's process. Returns the last that it took."""
        wanted = {"first": first, "count": count, "rate": rate, "size": size, **self.words()}
        seconds = CAP_SECONDS + 15 + (count / rate if rate else 0)
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/bench/publish", json.dumps(wanted).encode(), method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                done = json.loads(answer.read())
        except TimeoutError:
            return first, {}
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{self.name} refused to publish: {error}\n{self.log()}") from error
        return done["last"], {int(seq): at for seq, at in done.get("commits", {}).items()}

    def words(self) -> dict[str, Any]:
        """What its view needs beside."""
        return {}


class Switchboard(Server):
    """SQLite, no Redis; the server itself commits the events, as the peers do."""

    name = "ours"
    title = "Switchboard (SQLite, publishes itself)"
    path = "/api/events"
    ready = "event: ready"
    ours = True
    scales = True
    environment: dict[str, str] = {}

    def prepare(self) -> None:
        words = [sys.executable, "manage.py", "migrate", "--verbosity", "0"]
        subprocess.run(words, cwd=ROOT, env=self._environment(), check=True)
        printed = self.shell(f"KEYS = {KEYS}\n{_SETUP}")
        self.audience, keys = json.loads(printed.split("SETUP", 1)[1])
        self.headers = tuple(f"Authorization: Bearer {key}\r\n" for key in keys)
        self.publisher: subprocess.Popen[bytes] | None = None

    def shell(self, code: str, given: str = "") -> str:
        """Run Python in the installation, in a process of its own, with ``given`` as its input; what it printed."""
        done = subprocess.run(
            [sys.executable, "manage.py", "shell", "--no-imports", "-c", code],
            cwd=ROOT, env=self._environment(), input=given, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"what prepares {self.name} failed:\n{done.stderr[-3000:]}")
        return done.stdout

    def _environment(self) -> dict[str, str]:
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ
        }
        return kept | {
            "DATA_DIR": str(self.folder),
            "PORT": str(self.port or 8000),
            "STREAM_LIMIT": LIMIT,
            "STREAM_PROCESS_LIMIT": LIMIT,
            "LOG_LEVEL": "WARNING",
            "DJANGO_SETTINGS_MODULE": "project.settings",
            **self.environment,
        }

    def command(self) -> tuple[list[str], dict[str, str]]:
        settings = {} if self.from_worker else {"DJANGO_SETTINGS_MODULE": "tests.bench.settings"}
        return [sys.executable, "-m", "project.server"], self._environment() | settings

    def up(self) -> bool:
        return _get(f"http://127.0.0.1:{self.port}/healthz")[0] == 200

    def start(self, port: int = 0) -> None:
        super().start(port)
        if self.from_worker and self.publisher is None:
            self.publisher = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.publisher"], cwd=ROOT, env=self._environment(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert self.publisher.stdout is not None
            if not self.publisher.stdout.readline():
                raise RuntimeError("the publisher did not start")

    def close(self) -> None:
        publisher, self.publisher = self.publisher, None
        if publisher is not None:
            assert publisher.stdin is not None
            assert publisher.stdout is not None
            publisher.stdin.close()
            publisher.kill()
            publisher.wait()
            publisher.stdout.close()

    def cpu_of_all(self) -> int:
        return self.cpu() + (measure.cpu_ns([self.publisher.pid]) if self.publisher else 0)

    def counters(self) -> dict[str, float]:
        status, text = _get(f"http://127.0.0.1:{self.port}/metrics", self.headers[0])
        if status != 200:
            return {}
        found = re.findall(r"^(switchboard_[a-z_]+(?:\{[^}]*\})?) ([0-9.e+]+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found if "_created" not in name}

    def words(self) -> dict[str, Any]:
        return {"topic": "bench", "audience": self.audience}

    def _publish(self, first: int, count: int, rate: float, size: int) -> tuple[int, dict[int, int]]:
        if self.publisher is None:
            return super()._publish(first, count, rate, size)
        assert self.publisher.stdin is not None
        assert self.publisher.stdout is not None
        wanted = {"first": first, "count": count, "size": size, "rate": rate, **self.words()}
        self.publisher.stdin.write(json.dumps(wanted).encode() + b"\n")
        self.publisher.stdin.flush()
        commits = {
            int(seq): at for seq, at in json.loads(self.publisher.stdout.readline())["commits"].items()
        }
        return max(commits, default=0), commits


class SwitchboardWorker(Switchboard):
    """SQLite, no Redis; another process commits the events."""

    name = "ours-worker"
    title = "Switchboard (SQLite, another process)"
    from_worker = True
    scales = False


class SwitchboardRedis(Switchboard):
    """PostgreSQL and Redis; another process commits the events."""

    name = "ours-redis"
    title = "Switchboard (PostgreSQL + Redis, another process)"
    from_worker = True

    def prepare(self) -> None:
        self._services = contextlib.ExitStack()
        try:
            database = self._services.enter_context(services.postgresql(self.folder))
            redis = self._services.enter_context(services.redis(self.folder))
            self.environment = {"DATABASE_URL": database.url, "REDIS_URL": redis.url}
            self._database, self._behind = database, [database.pid, redis.pid]
            super().prepare()
        except pytest.skip.Exception as skipped:
            self._services.close()
            raise Missing(str(skipped)) from None
        except BaseException:
            self._services.close()
            raise

    def close(self) -> None:
        super().close()
        self._services.close()

    def cpu_of_all(self) -> int:
        return super().cpu_of_all() + measure.cpu_ns(self._behind)

    def database_connections(self) -> int | None:
        """Of the server: all but the publisher's and that which counts."""
        ((count,),) = self._database.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return int(count) - (self.publisher is not None)


class Nchan(Server):
    """nginx with nchan: one worker, memory only."""

    name = "nchan"
    title = "nchan (nginx, C)"
    path = "/sub"
    ready = "\r\n\r\n"

    def prepare(self) -> None:
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None or not Path(NCHAN).exists():
            raise Missing("nchan is not installed (on Debian: apt-get install libnginx-mod-nchan)")
        self._program = program

    def command(self) -> tuple[list[str], dict[str, str]]:
        places = "\n".join(
            f"{kind}_temp_path {self.folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.folder / "nginx.conf").write_text(f"""
load_module {NCHAN};
daemon off;
{"user root;" if os.geteuid() == 0 else ""}
worker_processes 1;
worker_rlimit_nofile {self.streams + 500};
pid {self.folder}/nginx.pid;
error_log {self.folder}/error.log warn;
events {{ worker_connections {self.streams + 400}; }}
http {{
  access_log off;
  {places}
  keepalive_requests 1000000;
  nchan_shared_memory_size 256M;
  server {{
    listen 127.0.0.1:{self.port} backlog=4096;
    location = {self.path} {{
      nchan_subscriber eventsource;
      nchan_channel_id bench;
      nchan_subscriber_first_message newest;
      add_header Cache-Control no-cache;
    }}
    location = /pub {{
      nchan_publisher;
      nchan_channel_id bench;
      nchan_message_buffer_length 5000;
      nchan_message_timeout 10m;
    }}
  }}
}}
""")
        return [self._program, "-c", str(self.folder / "nginx.conf"), "-p", str(self.folder)], {}

    def start(self, port: int = 0) -> None:
        super().start(port)
        self._pub = socket.create_connection(("127.0.0.1", self.port), 5)
        self._pub.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._pub.makefile("rb")

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None and hasattr(self, "_pub"):
            self._answers.close()
            self._pub.close()
        super().stop(number)

    def _publish(self, first: int, count: int, rate: float, size: int) -> tuple[int, dict[int, int]]:
        """By HTTP on one connection; a burst is pipelined, so that its events come at once."""
        if rate:
            for seq, wait in pace.turns(first, count, rate):
                time.sleep(wait)
                self._pub.sendall(self._request(seq, size))
                self._answered()
            return self._seq, {}
        self._pub.sendall(b"".join(self._request(seq, size) for seq in range(first, first + count)))
        for _ in range(count):
            self._answered()
        return self._seq, {}

    def _request(self, seq: int, size: int) -> bytes:
        body = json.dumps(check.payload(seq, time.monotonic_ns(), size)).encode()
        head = f"POST /pub HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def _answered(self) -> None:
        length = 0
        status = self._answers.readline()
        if not status.startswith(b"HTTP/1.1 20"):
            raise RuntimeError(f"nchan refused to publish: {status!r}\n{self.log()}")
        while (line := self._answers.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        self._answers.read(length)


class Eventstream(Server):
    """django-eventstream on Daphne, as its README sets it up."""

    name = "eventstream"
    title = "django-eventstream (Daphne)"
    path = "/events/"
    ready = "event: stream-open"
    resumes = False
    storage = False

    def prepare(self) -> None:
        if subprocess.run(
            [sys.executable, "-c", "import django_eventstream"], capture_output=True
        ).returncode:
            raise Missing(
                "django-eventstream is not installed (make bench installs tests/bench/requirements.txt)"
            )
        subprocess.run(
            [sys.executable, "-m", "django", "migrate", "--verbosity", "0"], cwd=ROOT, check=True,
            env=os.environ | self._environment(),
        )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {
            "DJANGO_SETTINGS_MODULE": "tests.bench.peers.eventstream_settings",
            "BENCH_DATABASE": str(self.folder / "bench.sqlite3"),
            "BENCH_STORAGE": "1" if self.storage else "0",
        }

    def command(self) -> tuple[list[str], dict[str, str]]:
        return _daphne(self.port, "tests.bench.peers.eventstream_asgi:application"), self._environment()


class EventstreamStorage(Eventstream):
    """... with its database storage: for the storm, and for a burst without loss."""

    name = "eventstream-storage"
    title = "django-eventstream with storage"
    resumes = True
    storage = True


class Plain(Server):
    """A plain Channels consumer, each client a member of the group, in-memory layer, on Daphne."""

    name = "plain"
    title = "plain Channels consumer (Daphne)"
    path = "/events/"
    ready = ": open"
    resumes = False

    def command(self) -> tuple[list[str], dict[str, str]]:
        words = _daphne(self.port, "tests.bench.peers.plain_asgi:application")
        return words, {"DJANGO_SETTINGS_MODULE": "tests.bench.peers.plain_settings"}


def _daphne(port: int, application: str) -> list[str]:
    return [sys.executable, "-m", "daphne", "-v", "0", "-b", "127.0.0.1", "-p", str(port), application]


def _get(url: str, header: str = "") -> tuple[int, str]:
    name, _, value = header.strip().partition(": ")
    request = urllib.request.Request(url, headers={name: value} if name else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, ""
    except OSError:
        return 0, ""


ALL: tuple[type[Server], ...] = (
    Switchboard, SwitchboardWorker, SwitchboardRedis, Nchan, Eventstream, EventstreamStorage, Plain,
)  # fmt: skip
