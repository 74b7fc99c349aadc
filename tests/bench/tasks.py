"""``make bench ARGS=tasks``: how quickly short tasks come and go beside django-q2 and huey, and how quickly one that writes much is read.

Prints two tables and writes ``tests/bench/results/tasks.json``. The method is in README.md.
"""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import argparse
import base64
import contextlib
import datetime as dt
import json
import os
import selectors
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

import ptyprocess

from tests.bench import measure
from tests.conftest import ROOT, Running, run_switchboard, until

RESULTS = Path(__file__).parent / "results" / "tasks.json"
#: Nothing is waited for longer than this.
CAP_SECONDS = 300
#: Takes so much at a time, and then this long nothing: a reader at the end of a long line.
SLOW_BYTES, SLOW_SECONDS = 4096, 0.5
#: The server's window for slow ones: see streams.py.
SLOW_WINDOW = 4096


# ── Many short tasks ──────────────────────────────────────────────────────────────────────────────────────────────


def _seconds(words: list[str], env: dict[str, str]) -> float:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=CAP_SECONDS, check=False
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return float(done.stdout.split("SECONDS", 1)[1])


@contextlib.contextmanager
def _worker(words: list[str], env: dict[str, str], number: int = signal.SIGTERM) -> Iterator[None]:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            process.send_signal(number)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                # Its children are in its session, and end with it.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _peer_env(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
    return kept | {"BENCH_DATABASE": str(folder / "queue.sqlite3"), "PYTHONPATH": str(ROOT), **more}


def rate_of_huey(folder: Path, count: int) -> float:
    env = _peer_env(folder)
    consumer = [
        "-m",
        "huey.bin.huey_consumer",
        "tests.bench.peers.huey_app.huey",
        "-w",
        "2",
        "-k",
        "process",
        "-q",
    ]
    with _worker(consumer, env, signal.SIGINT):
        _seconds(["-m", "tests.bench.peers.huey_app", "20"], env)
        return count / _seconds(["-m", "tests.bench.peers.huey_app", str(count)], env)


def rate_of_djangoq(folder: Path, count: int) -> float:
    env = _peer_env(folder, DJANGO_SETTINGS_MODULE="tests.bench.peers.djangoq_settings")
    subprocess.run(
        [sys.executable, "-m", "django", "migrate", "--verbosity", "0"],
        cwd=ROOT,
        env=env,
        check=True,
        timeout=60,
    )
    with _worker(["-m", "django", "qcluster"], env):
        _seconds(["-m", "tests.bench.peers.djangoq_app", "20"], env)
        return count / _seconds(["-m", "tests.bench.peers.djangoq_app", str(count)], env)


def rate_of_ours(folder: Path, count: int) -> float:
    with run_switchboard(folder, COMMANDS="any", COMMAND_LIMIT="1000000", LOG_LEVEL="WARNING") as running:
        env = running.env | {"PYTHONPATH": str(ROOT)}
        _seconds(["-m", "tests.bench.queueing", "ends", "20"], env)
        return count / _seconds(["-m", "tests.bench.queueing", "ends", str(count)], env)


RATES = {"ours": rate_of_ours, "huey": rate_of_huey, "django-q2": rate_of_djangoq}


# ── One task that writes much ─────────────────────────────────────────────────────────────────────────────────────


def _command(size: int) -> list[str]:
    # Where SIGPIPE is ignored, as ptyprocess leaves it, ``yes`` complains about its end.
    return ["sh", "-c", f"yes 2>/dev/null | head -c {size}"]


def plain_pty(size: int) -> tuple[float, int]:
    """Seconds and bytes of a program that reads the same command from a pseudo-terminal and does nothing with it."""
    began = time.monotonic()
    process = ptyprocess.PtyProcess.spawn(_command(size))
    count = 0
    with contextlib.suppress(EOFError):
        while True:
            count += len(process.read(65_536))
    process.wait()
    return time.monotonic() - began, count


class Reader:
    """One stream of the output: takes the frames apart as they come, and looks that each begins where the one before ended."""

    def __init__(self, running: Running, task_id: str, *, slow: bool) -> None:
        host, _, port = running.url.removeprefix("http://").partition(":")
        self.slow = slow
        self.socket = socket.socket()
        if slow:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_WINDOW)
        self.socket.connect((host, int(port)))
        request = (
            f"GET /api/tasks/{task_id}/output?from=start HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n"
            f"Authorization: Bearer {running.api_key}\r\n\r\n"
        )
        self.socket.sendall(request.encode())
        self.socket.setblocking(False)
        self.raw = 0
        self.end = 0
        self.wrong = 0
        self.ended = False
        self.closed = False
        self.next_at = 0.0
        self._buffer = b""
        self._body = b""
        self._headers = True

    def take(self, now: float) -> None:
        if self.slow:
            self.next_at = now + SLOW_SECONDS
        try:
            data = self.socket.recv(SLOW_BYTES if self.slow else 1 << 18)
        except BlockingIOError:
            return
        if not data:
            self.closed = True
            return
        self.raw += len(data)
        self._buffer += data
        if self._headers:
            head, found, rest = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise SystemExit(f"bench: the stream was refused: {head[:300]!r}")
            self._headers, self._buffer = False, rest
        self._unchunk()
        self._frames()

    def _unchunk(self) -> None:
        while True:
            line, found, rest = self._buffer.partition(b"\r\n")
            if not found:
                return
            size = int(line, 16)
            if len(rest) < size + 2:
                return
            self._body += rest[:size]
            self._buffer = rest[size + 2 :]
            if not size:
                return

    def _frames(self) -> None:
        *whole, self._body = self._body.split(b"\n\n")
        for frame in whole:
            fields = dict(line.partition(b": ")[::2] for line in frame.split(b"\n"))
            if fields.get(b"event") == b"end":
                self.ended = True
            if fields.get(b"event") != b"output":
                continue
            length = len(base64.b64decode(json.loads(fields[b"data"])["data"]))
            end = int(fields[b"id"])
            self.wrong += end - length != self.end
            self.end = end


def read_all(readers: list[Reader], running: Running, task_id: str, rest_seconds: float) -> float:
    """Read until the task has ended, and ``rest_seconds`` more or until the quick ones have everything; seconds until its end."""
    began = time.monotonic()
    selector = selectors.DefaultSelector()
    for reader in readers:
        selector.register(reader.socket, selectors.EVENT_READ, reader)
    paused: list[Reader] = []
    ended_at = 0.0
    look_at = began
    while True:
        now = time.monotonic()
        for reader in [each for each in paused if each.next_at <= now]:
            paused.remove(reader)
            selector.register(reader.socket, selectors.EVENT_READ, reader)
        for key, _ in selector.select(0.05):
            reader = key.data
            reader.take(now)
            if reader.closed:
                selector.unregister(reader.socket)
            elif reader.slow:
                selector.unregister(reader.socket)
                paused.append(reader)
        if now >= look_at and not ended_at:
            look_at = now + 0.1
            ended_at = time.monotonic() if _seconds_of(running, task_id) is not None else 0.0
        quick = [reader for reader in readers if not reader.slow]
        done = all(reader.ended for reader in quick)
        if (ended_at and (done or now > ended_at + rest_seconds)) or now > began + CAP_SECONDS:
            return (ended_at or now) - began


def _task(running: Running, task_id: str) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(running.manage("task", "show", task_id, "--json"))
    return shown


def _make(running: Running, argv: list[str]) -> str:
    env = running.env | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "tests.bench.queueing", "make", "--", *argv]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split("TASK", 1)[1].strip()


def _seconds_of(running: Running, task_id: str) -> float | None:
    """From the start of the task to its end, by its row; None while it runs."""

    with contextlib.closing(
        sqlite3.connect(f"file:{running.data_dir / 'switchboard.sqlite3'}?mode=ro", uri=True)
    ) as database:
        row = database.execute(
            "SELECT status, started_at, finished_at FROM connections_task WHERE id = ?", [task_id]
        ).fetchone()
    if row[0] == "failed":
        raise SystemExit("bench: the task failed")
    if row[2] is None:
        return None
    began, ended = (dt.datetime.fromisoformat(each) for each in row[1:])
    return (ended - began).total_seconds()


def throughput(folder: Path, size: int, readers: int, slow: int) -> dict[str, Any]:
    """Bytes per second through one task, against the plain program before and after it, without and with readers."""
    limits = {
        "COMMANDS": "any",
        "COMMAND_OUTPUT_BYTES": str(size * 4),
        "STREAM_LIMIT": "10000",
        "LOG_LEVEL": "WARNING",
    }
    result: dict[str, Any] = {"bytes": size, "readers": readers, "slow": slow}
    with run_switchboard(folder, **limits) as running:
        server, worker = (running.processes[name].pid for name in ("server", "worker"))
        warm = _make(running, _command(1_000_000))
        until(lambda: _seconds_of(running, warm), 60)
        plain_seconds, plain_bytes = plain_pty(size)
        resting = {"server": measure.rss([server]), "worker": measure.rss([worker])}
        task_id = _make(running, _command(size))
        seconds = until(lambda: _seconds_of(running, task_id), CAP_SECONDS)
        again_seconds, _ = plain_pty(size)
        plain = plain_bytes / statistics.mean([plain_seconds, again_seconds])
        kept = _task(running, task_id)["output_bytes"]
        result |= {
            "plain_mb_s": plain / 1e6,
            "alone_mb_s": kept / seconds / 1e6,
            "alone_ratio": kept / seconds / plain,
            "alone_whole": kept == plain_bytes,
        }
        task_id = _make(running, ["sh", "-c", f"sleep 3; yes 2>/dev/null | head -c {size}"])
        held = [Reader(running, task_id, slow=number < slow) for number in range(readers)]
        peak = {"server": 0, "worker": 0}
        with measuring(peak, server=server, worker=worker):
            seconds = read_all(held, running, task_id, rest_seconds=20) - 3
        quick = [reader.end for reader in held if not reader.slow]
        result |= {
            "read_mb_s": kept / seconds / 1e6,
            "read_ratio": kept / seconds / plain,
            "server_mib_more": (peak["server"] - resting["server"]) / 2**20,
            "worker_mib_more": (peak["worker"] - resting["worker"]) / 2**20,
            "quick_read_mb": statistics.median(quick) / 1e6,
            "not_where_the_one_before_ended": sum(reader.wrong for reader in held),
        }
        for reader in held:
            reader.socket.close()
    return result


@contextlib.contextmanager
def measuring(peak: dict[str, int], **pids: int) -> Iterator[None]:
    """Notes the largest resident memory of each process, descendants included, every tenth of a second, in a process of its own."""
    watch = (
        "import json, sys, time\nfrom tests.bench import measure\npids = json.loads(sys.argv[1])\npeak = dict.fromkeys(pids, 0)\n"
        "import select\n"
        "while not select.select([sys.stdin], [], [], 0.1)[0]:\n"
        "    peak = {name: max(peak[name], measure.rss([pid])) for name, pid in pids.items()}\n"
        "print(json.dumps(peak))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", watch, json.dumps(pids)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield
    finally:
        out, _ = process.communicate(b"\n", timeout=20)
        peak.update(json.loads(out))


# ── Both ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench tasks", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000, help="short tasks (default 1000)")
    parser.add_argument("--runs", type=int, default=3, help="the median of so many runs counts (default 3)")
    parser.add_argument(
        "--bytes", type=int, default=200_000_000, help="what the one task writes (default 200000000)"
    )
    parser.add_argument("--readers", type=int, default=100, help="streams that read it (default 100)")
    parser.add_argument("--slow", type=int, default=10, help="so many of them read slowly (default 10)")
    parser.add_argument("--only", choices=["rate", "throughput"], help="one of the two")
    chosen = parser.parse_args()
    result: dict[str, Any] = {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": measure.machine(),
        "tasks": chosen.tasks,
    }
    if chosen.only != "throughput":
        rates: dict[str, list[float]] = {name: [] for name in RATES}
        for number in range(chosen.runs):
            for name, rate in RATES.items():
                with tempfile.TemporaryDirectory(prefix="switchboard-bench-") as folder:
                    rates[name].append(rate(Path(folder), chosen.tasks))
                print(f"run {number + 1}: {name} {rates[name][-1]:.1f} tasks a second", file=sys.stderr)
        result["rates"] = rates
        print(f"{chosen.tasks} × `true`, from the queue to the end, SQLite, median of {chosen.runs}")
        ours = statistics.median(rates["ours"])
        for name, values in rates.items():
            middle = statistics.median(values)
            print(f"  {name:<12}{middle:>9.1f} a second    ours ×{ours / middle:>5.2f}  (at least 1)")
    if chosen.only != "rate":
        runs = []
        for number in range(chosen.runs):
            with tempfile.TemporaryDirectory(prefix="switchboard-bench-") as folder:
                runs.append(throughput(Path(folder), chosen.bytes, chosen.readers, chosen.slow))
            print(f"run {number + 1}: {json.dumps(runs[-1])}", file=sys.stderr)
        result["throughput"] = runs
        print(f"`yes | head -c {chosen.bytes}` in one task, median of {chosen.runs}")
        for name, words in (
            ("plain_mb_s", "MB/s, a plain program that reads the terminal"),
            ("alone_mb_s", "MB/s into the log of the task, nobody reads"),
            ("alone_ratio", "of the plain program (at least 0.5)"),
            ("read_mb_s", f"MB/s while {chosen.readers} streams read it, {chosen.slow} of them slowly"),
            ("read_ratio", "of the plain program"),
            ("server_mib_more", "MiB that the server grew meanwhile"),
            ("worker_mib_more", "MiB that the worker grew meanwhile"),
            ("quick_read_mb", "MB that a quick stream had 20 s after the end"),
            ("not_where_the_one_before_ended", "pieces that did not begin where the one before ended (0)"),
        ):
            print(f"  {statistics.median(run[name] for run in runs):>10.2f}  {words}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
