"""``make run``: server and worker under one roof, from an empty folder to a page in the browser.

One process checks the settings and the port, migrates where needed, makes the first admin, starts
``python -m project.server`` and ``manage.py run_worker``, prints what they say under their names, and stops both on Ctrl-C.
It restarts nothing: when one of the two dies the other is stopped too, and the exit code says so. For long-running
installations a service manager does that better (README, "Deploying").
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import http.client
import os
import queue
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

import django
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import connections as databases
from django.db.migrations.executor import MigrationExecutor
from django.db.utils import Error as DatabaseError

BASE_DIR = Path(__file__).resolve().parent.parent
ADMIN_NAME = "admin"
#: Seconds that the children get to finish after they were asked to.
STOP_SECONDS = 15
#: Seconds that the server gets to answer for the first time.
START_SECONDS = 60

#: Apps without tables that take a second to import; the children load them, this process has no use for them.
NOT_HERE = frozenset(
    {"daphne", "channels", "corsheaders", "django_htmx", "rest_framework", "drf_spectacular"}
)

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class CannotStart(SystemExit):
    """Why nothing was started, in one sentence."""

    def __init__(self, why: str) -> None:
        super().__init__(f"switchboard: {why}")


# ── Before anything starts ────────────────────────────────────────────────────────────────────────────────────────


def check_port(host: str, port: int) -> None:
    """Find out that the port cannot be had while there is nothing yet to clean up.

    :raises CannotStart: in plain words.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CannotStart(
            f"HOST: {host!r} is not an address or name of this machine ({error.strerror})."
        ) from error
    with socket.socket(family, kind, protocol) as probe:
        # As the server itself does: a port that merely lingers in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise CannotStart(
                    f"port {port} on {host} is in use by another program. Stop that one, or choose another "
                    f"port: make run PORT={port + 1 if port < 65535 else 8000}"
                ) from error
            if error.errno == errno.EACCES:
                raise CannotStart(
                    f"PORT: this user may not open port {port}; choose one above 1023."
                ) from error
            raise CannotStart(f"HOST: {host} port {port} cannot be opened: {error.strerror}.") from error


def keep_private(data_dir: Path) -> None:
    """What is written from now on, here and in the children, belongs to this user alone."""
    os.umask(0o077)
    data_dir.chmod(0o700)
    for path in data_dir.iterdir():
        if path.is_file() and path.stat().st_mode & 0o077:
            path.chmod(0o600)


def migrate() -> int:
    """Apply the migrations that are missing; returns how many were.

    :raises CannotStart: the database cannot be reached.
    """
    database = databases["default"]
    try:
        executor = MigrationExecutor(database)
    except DatabaseError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CannotStart(f"DATABASE_URL: the database cannot be reached: {first}") from error
    missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if missing:
        call_command("migrate", interactive=False, verbosity=0)
    return len(missing)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Admin:
    """The user to sign in with. ``password`` is None when the user was there already."""

    name: str
    password: str | None = None
    #: Whether the password came from ADMIN_PASSWORD, so that there is no reason to print it.
    chosen: bool = False


def first_admin(wanted_password: str) -> Admin:
    """The first superuser; made on the first start. A later ADMIN_PASSWORD changes nobody's password."""
    users = get_user_model()
    there = users.objects.filter(is_superuser=True, is_active=True).order_by("pk").first()
    if there is not None:
        return Admin(name=there.get_username())
    password = wanted_password or secrets.token_urlsafe(12)
    user, _ = users.objects.get_or_create(username=ADMIN_NAME)
    user.is_staff = user.is_superuser = user.is_active = True
    user.set_password(password)
    user.save()
    return Admin(name=ADMIN_NAME, password=password, chosen=bool(wanted_password))


# ── Children ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Output:
    """Whole lines of several children on one terminal, each under the name of its writer."""

    COLOURS = {"server": "36", "worker": "35"}

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self._lock = threading.Lock()
        self._coloured = stream.isatty() and not os.environ.get("NO_COLOR")

    def line(self, text: str = "", *, name: str | None = None) -> None:
        """Write one line. A reader that has gone (``make run | head``) is no reason to fail."""
        if name is not None:
            prefix = f"{name} │"
            if self._coloured:
                prefix = f"\x1b[{self.COLOURS.get(name, '33')}m{prefix}\x1b[0m"
            text = f"{prefix} {text}"
        with self._lock:
            if self._stream is None:
                return
            try:
                print(text, file=self._stream, flush=True)
            except (BrokenPipeError, ValueError):
                self._stream = None


def _die_with_parent() -> None:
    """Linux: a child whose supervisor is killed without a chance to stop it ends as well."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Child:
    """One running program of the supervisor, in a process group of its own so that Ctrl-C reaches it through us."""

    def __init__(
        self, name: str, command: list[str], output: Output, happened: queue.SimpleQueue[Happening]
    ) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            cwd=BASE_DIR,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self._reader = threading.Thread(
            target=self._read, args=(output, happened), name=f"output of {name}", daemon=True
        )

    def watch(self) -> None:
        """Start to read its output. Only after every child was forked: a fork and threads do not mix."""
        self._reader.start()

    def _read(self, output: Output, happened: queue.SimpleQueue[Happening]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            output.line(line.rstrip("\n"), name=self.name)
        happened.put(Happening(died=self.name, code=self.process.wait()))

    def ask_to_stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        """End it and what it started."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def drain(self) -> None:
        """Print what it still had to say."""
        self._reader.join(timeout=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Happening:
    """Something for the supervisor: a signal came, or a child has ended."""

    signal: int | None = None
    died: str | None = None
    code: int = 0


def ending(name: str, code: int) -> str:
    """How a child ended, in words."""
    if code < 0:
        return f"the {name} was killed by {signal.Signals(-code).name}"
    return f"the {name} stopped by itself with exit code {code}"


def patience() -> float:
    """Seconds that the children get to stop: a worker may have commands to see to (``COMMAND_ON_STOP``)."""
    finishing = settings.COMMAND_STOP_SECONDS if settings.COMMAND_ON_STOP == "finish" else 0
    return STOP_SECONDS + settings.COMMAND_KILL_SECONDS + finishing


def supervise(
    children: list[Child],
    happened: queue.SimpleQueue[Happening],
    output: Output,
    seconds: float | None = None,
) -> int:
    """Wait for a signal or for the end of a child, then stop everything within ``seconds``; returns the exit code."""
    seconds = STOP_SECONDS if seconds is None else seconds
    first = happened.get()
    code = 0
    if first.died is not None:
        output.line(
            f"switchboard: {ending(first.died, first.code)}; stopping the rest. Its last lines say why."
        )
        code = 1
    else:
        output.line()
        output.line("Stopping (Ctrl-C again kills) ...")
    for child in children:
        child.ask_to_stop()
    running = {child.name for child in children} - {first.died}
    deadline = time.monotonic() + seconds
    while running:
        try:
            event = happened.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            output.line(
                f"switchboard: {' and '.join(sorted(running))} did not stop within {seconds:g} s: killed."
            )
            code = code or 1
            break
        if event.died is not None:
            running.discard(event.died)
        elif event.signal is not None:
            output.line("switchboard: killed.")
            code = code or 130
            break
    for child in children:
        child.kill()
    for child in children:
        child.process.wait()
        child.drain()
    if code == 0:
        output.line("Stopped. `make run` goes on from here.")
    return code


def answers(host: str, port: int) -> bool:
    """Whether a web server answers there, whatever it says."""
    client = http.client.HTTPConnection(host, port, timeout=2)
    try:
        client.request("GET", "/healthz")
        client.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        client.close()
    return True


def wait_for_server(
    server: Child, host: str, port: int, happened: queue.SimpleQueue[Happening], output: Output
) -> None:
    """Wait until the server answers, has died, or a signal came; the latter stays in ``happened``."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (looked at, not bound)
    deadline = time.monotonic() + START_SECONDS
    while server.process.poll() is None and happened.empty() and not answers(reachable, port):
        if time.monotonic() > deadline:
            output.line(f"switchboard: the server has not answered for {START_SECONDS} s; waiting on.")
            return
        time.sleep(0.05)


# ── What is said ──────────────────────────────────────────────────────────────────────────────────────────────────


def manage_command() -> str:
    """How to call ``manage.py`` so that it means this installation: with the knobs that were set for this start."""
    names = ("DATA_DIR", "HOST", "PORT", "BASE_URL")
    knobs = [f"{name}={shlex.quote(os.environ[name])}" for name in names if os.environ.get(name)]
    if os.environ.get("DATABASE_URL"):
        # Its value holds a password.
        knobs.append("DATABASE_URL=...")
    return " ".join([*knobs, ".venv/bin/python manage.py"])


def greeting(admin: Admin) -> list[str]:
    """Where it runs, who may sign in, and what to do next."""
    url = settings.BASE_URL
    manage = manage_command()
    lines = ["", f"  Switchboard runs on {url}", f"  Sign in as      {admin.name}"]
    if admin.password is None:
        lines.append(f"  Password        as before (forgotten: {manage} changepassword {admin.name})")
    elif admin.chosen:
        lines.append("  Password        the one in ADMIN_PASSWORD")
    else:
        lines.append(f"  Password        {admin.password}   (shown this once)")
    lines += [
        f"  Data            {settings.DATA_DIR}",
        "",
        "  What next:",
        f"    1. Open {url} and add a connection: a web site, and a profile that stays logged in to it.",
        f"    2. Make an API key for the SDK: {manage} create_api_key --name laptop",
        f"    3. Or stay in the terminal:     {manage} connect example.com --profile me",
    ]
    if settings.COMMANDS == "any":
        lines.append(f"    4. Run a command in a worker:   COMMANDS=any {manage} task run -- uptime")
    loopback = settings.KNOBS.host in ("127.0.0.1", "::1", "localhost")
    if settings.ALLOW_PRIVATE_TARGETS and not loopback:
        lines += [
            "",
            "  Careful: logins may go to private addresses (ALLOW_PRIVATE_TARGETS=1) while others can reach this "
            "server. Set ALLOW_PRIVATE_TARGETS=0 outside of development.",
        ]
    return [*lines, "", "  Ctrl-C stops server and worker.", ""]


def main() -> int:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    # The first look at a setting reads project/env.py: a wrong value ends the program here, with its name.
    knobs = settings.KNOBS
    check_port(knobs.host, knobs.port)
    keep_private(knobs.data_dir)
    settings.INSTALLED_APPS = [
        # The same app without looking for the admin pages of all others.
        "django.contrib.admin.apps.SimpleAdminConfig" if app == "django.contrib.admin" else app
        for app in settings.INSTALLED_APPS
        if app not in NOT_HERE
    ]
    django.setup()
    output = Output(sys.stdout)
    count = migrate()
    if count:
        output.line(f"Database ready ({count} migrations applied)")
    admin = first_admin(knobs.admin_password)
    databases.close_all()

    happened: queue.SimpleQueue[Happening] = queue.SimpleQueue()

    def on_signal(number: int, frame: FrameType | None) -> None:
        happened.put(Happening(signal=number))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # `nohup make run` goes on when its terminal is closed.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)

    # No child needs to know it, and the environment of a process can be looked at.
    os.environ.pop("ADMIN_PASSWORD", None)
    server = Child("server", [sys.executable, "-m", "project.server"], output, happened)
    # One after the other: the page is there sooner when the worker does not start at the same moment.
    wait_for_server(server, knobs.host, knobs.port, happened, output)
    worker = Child("worker", [sys.executable, "manage.py", "run_worker"], output, happened)
    children = [server, worker]
    for child in children:
        child.watch()
    if (server.process.poll() is None and happened.empty()) or admin.password is not None:
        # Also after a bad start when there is a new password: it is not shown again.
        for line in greeting(admin):
            output.line(line)
    return supervise(children, happened, output, patience())


if __name__ == "__main__":
    sys.exit(main())
