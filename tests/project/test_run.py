"""``make run``: what it checks, what it says, and that it leaves nothing behind. The slow part starts the real thing once."""

from __future__ import annotations

import io
import os
import queue
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from pytest_django import Settings

from project import run
from tests.conftest import ROOT, free_port, until

# ── Before anything starts ────────────────────────────────────────────────────────────────────────────────────────


def test_a_port_in_use_is_said_in_plain_words_with_a_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as refused:
            run.check_port("127.0.0.1", port)
    assert f"port {port} on 127.0.0.1 is in use" in str(refused.value)
    assert "make run PORT=" in str(refused.value)


def test_a_free_port_is_fine() -> None:
    run.check_port("127.0.0.1", free_port())


def test_an_address_of_another_machine_names_the_knob() -> None:
    with pytest.raises(SystemExit, match="HOST"):
        run.check_port("192.0.2.1", 8000)


def test_what_is_in_the_data_directory_becomes_private(tmp_path: Path) -> None:
    file = tmp_path / "switchboard.sqlite3"
    file.write_text("")
    file.chmod(0o644)
    before = os.umask(0o022)
    try:
        run.keep_private(tmp_path)
        (tmp_path / "new").write_text("")
    finally:
        os.umask(before)
    for path in (file, tmp_path / "new"):
        assert path.stat().st_mode & 0o077 == 0
    assert tmp_path.stat().st_mode & 0o077 == 0


def test_the_first_admin_is_made_once_and_keeps_the_password(db: Any) -> None:
    made = run.first_admin("")
    assert made.password is not None
    assert User.objects.get(username="admin").check_password(made.password)
    again = run.first_admin("another-password")
    assert again.password is None
    assert User.objects.get(username="admin").check_password(made.password)


def test_the_admin_gets_the_password_that_was_wanted(db: Any) -> None:
    run.first_admin("chosen-password")
    user = User.objects.get()
    assert user.check_password("chosen-password")
    assert user.is_superuser
    assert user.is_staff


def test_a_chosen_password_is_not_printed_and_a_made_one_is(settings: Settings) -> None:
    chosen = "\n".join(run.greeting(run.Admin(name="admin", password="chosen-password", chosen=True)))
    assert "chosen-password" not in chosen
    assert "made-up" in "\n".join(run.greeting(run.Admin(name="admin", password="made-up")))
    assert "made-up" not in repr(run.Admin(name="admin", password="made-up"))


@pytest.mark.parametrize(("commands", "steps"), [("off", 3), ("any", 4)])
def test_the_greeting_says_where_it_runs_and_what_comes_next(
    settings: Settings, commands: str, steps: int
) -> None:
    settings.COMMANDS = commands
    text = "\n".join(run.greeting(run.Admin(name="root")))
    assert settings.BASE_URL in text
    assert len(re.findall(r"^    \d\. ", text, re.MULTILINE)) == steps
    assert ("task run" in text) == (commands == "any")


def test_the_commands_that_are_suggested_mean_this_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_DIR", "/tmp/with blank")
    monkeypatch.setenv("DATABASE_URL", "postgres://u:secret@h/d")
    assert "DATA_DIR='/tmp/with blank'" in run.manage_command()
    assert "secret" not in run.manage_command()


# ── Children ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Stage:
    """Children that are small scripts, and what the supervisor wrote."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.output = run.Output(self.stream)
        self.happened: queue.SimpleQueue[run.Happening] = queue.SimpleQueue()
        self.children: list[run.Child] = []

    def child(self, name: str, script: str) -> run.Child:
        child = run.Child(name, [sys.executable, "-c", script], self.output, self.happened)
        self.children.append(child)
        return child

    def supervise(self) -> int:
        """Wait until those that say so are up: before that a signal would find them unprepared."""
        for child in self.children:
            child.watch()
        for child in self.children:
            if "up" in str(child.process.args):
                until(lambda name=child.name: f"{name} │ up" in self.said, 20)
        return run.supervise(self.children, self.happened, self.output)

    @property
    def said(self) -> str:
        return self.stream.getvalue()


ORDERLY = (
    "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); print('up', flush=True); "
    "signal.sigwait([signal.SIGTERM]); print('bye', flush=True)"
)
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    for child in made.children:
        child.kill()
        child.process.wait()
        assert child.process.stdout is not None
        child.drain()
        child.process.stdout.close()


def test_a_child_that_dies_stops_the_other_and_the_exit_code_says_so(stage: Stage) -> None:
    stage.child("server", ORDERLY)
    stage.child("worker", "raise SystemExit(7)")
    assert stage.supervise() == 1
    assert "the worker stopped by itself with exit code 7" in stage.said
    assert "server │ bye" in stage.said
    assert all(child.process.poll() is not None for child in stage.children)


def test_a_killed_child_is_said_to_be_killed() -> None:
    assert run.ending("worker", -9) == "the worker was killed by SIGKILL"


def test_a_signal_stops_both_in_order(stage: Stage) -> None:
    for name in ("server", "worker"):
        stage.child(name, ORDERLY)
    stage.happened.put(run.Happening(signal=signal.SIGINT))
    assert stage.supervise() == 0
    assert "server │ bye" in stage.said
    assert "worker │ bye" in stage.said


def test_a_second_signal_kills(stage: Stage) -> None:
    child = stage.child("server", STUBBORN)
    for _ in range(2):
        stage.happened.put(run.Happening(signal=signal.SIGINT))
    assert stage.supervise() == 130
    assert child.process.returncode == -signal.SIGKILL


def test_a_child_that_does_not_stop_in_time_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STOP_SECONDS", 0.05)
    stage.child("worker", STUBBORN)
    stage.happened.put(run.Happening(signal=signal.SIGTERM))
    assert stage.supervise() == 1
    assert "worker did not stop within" in stage.said


def test_commands_get_the_time_that_was_promised_to_them(settings: Any) -> None:
    settings.COMMAND_STOP_SECONDS, settings.COMMAND_KILL_SECONDS = 60, 5.0
    settings.COMMAND_ON_STOP = "finish"
    assert run.patience() == run.STOP_SECONDS + 65
    settings.COMMAND_ON_STOP = "interrupt"
    assert run.patience() == run.STOP_SECONDS + 5


def test_a_reader_that_has_gone_does_not_stop_the_supervisor() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    output = run.Output(stream)
    output.line("one")
    output.line("two")
    # What could not be written is still in the stream's buffer, and closing tries once more.
    with pytest.raises(BrokenPipeError):
        stream.close()


# ── The real thing ────────────────────────────────────────────────────────────────────────────────────────────────


class Started:
    """``python -m project.run`` as a process of its own, with a data directory of its own."""

    def __init__(self, data_dir: Path, **extra: str) -> None:
        self.port = free_port()
        self.log = data_dir.parent / f"run-{self.port}.log"
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "project.run"],
                cwd=ROOT,
                env=kept | {"DATA_DIR": str(data_dir), "PORT": str(self.port)} | extra,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str) -> None:
        until(
            lambda: text in self.said or self.process.poll() is not None, 60, f"no {text!r} in:\n{self.said}"
        )
        assert text in self.said

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@pytest.mark.live
def test_it_starts_from_nothing_stops_on_ctrl_c_and_goes_on_where_it_was(tmp_path: Path) -> None:
    data_dir = tmp_path / "var"
    first = Started(data_dir)
    second = None
    try:
        first.wait_for("is ready")
        password = re.search(r"Password +(\S+) +\(shown this once\)", first.said)
        assert password is not None
        assert run.answers("127.0.0.1", first.port)
        assert first.stop() == 0
        assert "worker │ worker stopped" in first.said
        assert not run.answers("127.0.0.1", first.port)
        assert {path.name for path in data_dir.iterdir()} >= {
            "secret.key",
            "encryption.key",
            "switchboard.sqlite3",
        }
        assert [
            path.name for path in data_dir.iterdir() if path.is_file() and path.stat().st_mode & 0o077
        ] == []

        second = Started(data_dir, ADMIN_PASSWORD="too-late-for-that")
        second.wait_for("is ready")
        assert "as before" in second.said
        assert "migrations applied" not in second.said
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(30) == 0
    finally:
        for started in (first, second):
            if started is not None and started.process.poll() is None:
                started.process.kill()
                started.process.wait()


@pytest.mark.live
def test_a_wrong_knob_stops_the_start_before_anything_runs(tmp_path: Path) -> None:
    started = Started(tmp_path / "var", ALLOW_PRIVATE_TARGETS="perhaps")
    assert started.process.wait(30) == 1
    assert started.said.startswith("switchboard: ALLOW_PRIVATE_TARGETS: ")
    assert "Traceback" not in started.said
