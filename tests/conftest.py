"""Three people (owner, colleague, stranger), and a real server with a real worker for the tests that want one."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import Group, Permission, User
from django.core.cache import cache
from django.db import connection
from django.db.models import QuerySet
from django.utils import timezone
from hypothesis import HealthCheck, settings
from rest_framework.test import APIClient

from connections import registry
from connections.access import Principal, of_user
from events import log, metrics

ROOT = Path(__file__).resolve().parent.parent

# A shell starts what it puts into the background with Ctrl-C ignored, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How fast a loaded machine makes up its examples is no property of what is tested.
settings.register_profile("switchboard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("switchboard")


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    """Rate limits of one test are not those of the next."""
    cache.clear()
    yield
    cache.clear()


@pytest.fixture(autouse=True)
def _rows_are_locked_before_anything_is_told(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 6, over the whole suite: connection → flow → task → client → claim → log.

    On PostgreSQL telling takes the lock of the log until the commit. Who locks a row after it waits for somebody who may be waiting for the
    log: SQLite has no row locks and would never show it, so the order itself is watched.
    """
    if "test_properties" in request.node.nodeid:
        # There a whole history of verbs runs in one transaction.
        return
    told: set[str] = set()
    append, lock = log.append_all, QuerySet.select_for_update

    def telling(changes: Any) -> Any:
        told.update(connection.savepoint_ids[:1])
        return append(changes)

    def locking(rows: Any, *args: Any, **kwargs: Any) -> Any:
        late = set(connection.savepoint_ids[:1]) & told
        assert not late, f"{rows.model.__name__} is locked after something was told"
        return lock(rows, *args, **kwargs)

    monkeypatch.setattr(log, "append_all", telling)
    monkeypatch.setattr(QuerySet, "select_for_update", locking)


#: Counters of events/metrics.py that are always 0: a client expired although its stream was open, a replaced stream changed a row.
FAULTS = ("switchboard_clients_expired_live_total", "switchboard_clients_stale_changed_total")


@pytest.fixture
def counted_faults() -> None:
    """This test makes such a fault happen, to see that it is counted."""


@pytest.fixture(autouse=True)
def _no_client_is_harmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Over the whole suite. Servers of the live tests are asked when they are stopped: :func:`no_client_was_harmed`."""
    before = [metrics.REGISTRY.get_sample_value(name) for name in FAULTS]
    yield
    if "counted_faults" not in request.fixturenames:
        assert [metrics.REGISTRY.get_sample_value(name) for name in FAULTS] == before, FAULTS


@pytest.fixture
def owner(db: Any) -> User:
    """May run commands."""
    user = User.objects.create_user("owner", password="owner-password")
    user.user_permissions.add(Permission.objects.get(codename="run_commands"))
    return user


@pytest.fixture
def colleague(owner: User) -> User:
    """In the owner's team, and allowed to act, and to run commands."""
    team = Group.objects.create(name="team")
    permission = Permission.objects.get(codename="operate_managedauthconnection")
    team.permissions.add(permission, Permission.objects.get(codename="run_commands"))
    user = User.objects.create_user("colleague", password="colleague-password")
    owner.groups.add(team)
    user.groups.add(team)
    return user


@pytest.fixture
def stranger(db: Any) -> User:
    return User.objects.create_user("stranger", password="stranger-password")


@pytest.fixture
def principal(owner: User) -> Principal:
    return of_user(owner)


@pytest.fixture
def client_of(db: Any) -> Callable[[User], APIClient]:
    """An API client with a fresh key of that user."""

    def make(user: User) -> APIClient:
        _, plain = registry.create_api_key(owner_id=user.pk, name="test", now=timezone.now())
        client = APIClient(raise_request_exception=False)
        client.credentials(HTTP_AUTHORIZATION=f"Bearer {plain}")
        return client

    return make


#: Below what kernels give to outgoing connections (from 32768 on), which could take a port between the look and its use. Every process of
#: the suite begins elsewhere, and gives none twice.
PORTS = range(18_000, 32_000)
_next_port = itertools.count(os.getpid() * 61)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    for number in itertools.islice(_next_port, len(PORTS)):
        port = PORTS[number % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no port of {PORTS} is free")


@dataclasses.dataclass
class Running:
    """A server and a worker as real processes, on SQLite without Redis, in a data directory of their own."""

    url: str
    env: dict[str, str]
    data_dir: Path
    api_key: str
    other_api_key: str
    username: str = "admin"
    password: str = "correct-horse-battery"
    other_username: str = "other"
    other_password: str = "staple-battery-horse"
    processes: dict[str, subprocess.Popen[bytes]] = dataclasses.field(default_factory=dict)

    @property
    def domain(self) -> str:
        return self.url.removeprefix("http://")

    def manage(self, *words: str, stdin: str = "", check: bool = True) -> str:
        """Run a management command; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "manage.py", *words],
            cwd=ROOT, env=self.env, input=stdin, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"manage.py {' '.join(words)} failed:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def shell(self, script: str) -> str:
        """Run a script in this installation, in a process of its own; returns what it printed. A script that raises is a failed test."""
        return _shell_of(self.env).run(script)

    def start(self, name: str) -> None:
        """Start ``server`` or ``worker`` (any name that begins so); its output goes to ``<data_dir>/<name>.log``."""
        words = {
            "server": [sys.executable, "-m", "project.server"],
            "worker": [sys.executable, "manage.py", "run_worker"],
        }[name.rstrip("0123456789")]
        with (self.data_dir / f"{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                words, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        no_client_was_harmed(self)
        process = self.processes.pop(name)
        process.send_signal(number)
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{name} did not stop within 20 s") from None

    def log(self, name: str) -> str:
        return (self.data_dir / f"{name}.log").read_text(errors="replace")

    def wait_until_up(self) -> None:
        until(
            lambda: _answers(f"{self.url}/healthz"), 40, f"the server does not answer:\n{self.log('server')}"
        )


class _Shell:
    """A process of :mod:`tests.shell`."""

    def __init__(self, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.shell"],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, script: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(script) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the shell ended ({self._process.poll()}):\n{script}"
        printed, error = json.loads(line)
        assert not error, f"{script}\n{printed}\n{error}"
        return str(printed)

    def close(self) -> None:
        self._process.communicate()


#: By the environment: an installation with other knobs is another one. Only the latest, for each takes memory.
_shells: dict[tuple[tuple[str, str], ...], _Shell] = {}
SHELLS = 2


def _shell_of(env: dict[str, str]) -> _Shell:
    name = tuple(sorted(env.items()))
    found = _shells.pop(name, None)
    if found is None:
        while len(_shells) >= SHELLS:
            _shells.pop(next(iter(_shells))).close()
        found = _Shell(env)
    _shells[name] = found
    return found


@pytest.fixture(scope="session", autouse=True)
def _shells_are_closed() -> Iterator[None]:
    yield
    while _shells:
        _shells.popitem()[1].close()


def no_client_was_harmed(running: Running) -> None:
    """The counters of FAULTS, of a server that is about to be stopped and answers; one that was killed or hangs took them along."""
    request = urllib.request.Request(f"{running.url}/metrics")
    if token := running.env.get("METRICS_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return
    harm = [line for line in lines if line.startswith(FAULTS) and float(line.split()[1])]
    assert not harm, f"{running.url}: {harm}"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


#: What a machine that is busy with other things is given: a wait ends with its condition, so a limit measures nothing and only ends what hangs.
PATIENCE = 3


def until(condition: Callable[[], Any], seconds: float, message: str = "it did not happen in time") -> Any:
    """Wait for a condition; its value when it is true, a failed test when it never is. ``seconds`` are those of an idle machine.

    Most conditions ask a server. The longer it takes the less often it is looked at, so that what is waited for has the processor.
    """
    begin = time.monotonic()
    while (waited := time.monotonic() - begin) < seconds * PATIENCE:
        value = condition()
        if value:
            return value
        time.sleep(min(max(0.01, waited / 10), 0.25))
    raise AssertionError(message)


SETUP = """
import json
from django.contrib.auth.models import Permission, User
from django.utils import timezone
from connections import registry
admin = User.objects.create_superuser("admin", password="correct-horse-battery")
other = User.objects.create_user("other", password="staple-battery-horse")
other.user_permissions.add(Permission.objects.get(codename="run_commands"))
keys = [registry.create_api_key(owner_id=user.pk, name="test", now=timezone.now())[1] for user in (admin, other)]
print("KEYS", json.dumps(keys))
"""


@functools.cache
def _migrated() -> tuple[Path, list[str]]:
    """A data directory as :func:`run_switchboard` wants it, and the keys in it. Made once and copied, for migrating takes longer than many a test."""
    folder = Path(tempfile.mkdtemp(prefix="switchboard-migrated-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    first = Running(
        url="", env=_environment(folder, free_port()), data_dir=folder, api_key="", other_api_key=""
    )
    return folder, _set_up(first)


def _set_up(running: Running) -> list[str]:
    running.manage("migrate", "--verbosity", "0")
    printed = running.manage("shell", "--no-imports", "-c", SETUP)
    keys: list[str] = json.loads(printed.split("KEYS", 1)[1])
    return keys


def _environment(data_dir: Path, port: int, **extra: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
    return kept | {
        "PORT": str(port),
        "DATA_DIR": str(data_dir),
        "ALLOW_PRIVATE_TARGETS": "1",
        "COMMANDS": "any",
        "PYTHONUNBUFFERED": "1",
        "DJANGO_SETTINGS_MODULE": "project.settings",
        **extra,
    }


@contextlib.contextmanager
def run_switchboard(data_dir: Path, **extra: str) -> Iterator[Running]:
    """A migrated installation with an admin, another user and a key of each; server and worker are started."""
    port = free_port()
    env = _environment(data_dir, port, **extra)
    running = Running(
        url=f"http://127.0.0.1:{port}", env=env, data_dir=data_dir, api_key="", other_api_key=""
    )
    if "DATABASE_URL" in extra:
        running.api_key, running.other_api_key = _set_up(running)
    else:
        folder, (running.api_key, running.other_api_key) = _migrated()
        shutil.copytree(folder, data_dir, dirs_exist_ok=True)
    try:
        running.start("server")
        running.start("worker")
        running.wait_until_up()
        yield running
        no_client_was_harmed(running)
    finally:
        for process in running.processes.values():
            process.terminate()
        for process in running.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One installation for all tests that do not stop its processes. Use your own domains and profiles."""
    with run_switchboard(tmp_path_factory.mktemp("running"), STREAM_LIMIT="100") as started:
        yield started


@pytest.fixture
def own_running(tmp_path: Path) -> Iterator[Running]:
    """An installation of this test alone: it may be stopped, killed, filled. The lease is short."""
    with run_switchboard(tmp_path, LEASE_SECONDS="3", STREAM_LIMIT="100") as started:
        yield started


CHROMIUM = "/usr/bin/chromium"
CHROMIUM_FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def missing(what: str) -> None:
    """A service is not installed: skip at home, fail where everything must run (``REQUIRE_SERVICES=1``)."""
    if os.environ.get("REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser of the module's own."""
    if not Path(CHROMIUM).exists():
        missing("Chromium")
    playwright_api = pytest.importorskip("playwright.sync_api")
    # How long a condition is waited for says nothing about how fast a page is: machines are busy.
    playwright_api.expect.set_options(timeout=20_000)
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=False, args=CHROMIUM_FLAGS, chromium_sandbox=False
        )
        yield browser
        browser.close()
