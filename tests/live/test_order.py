"""The order of the log with real writers on real databases: a reader with a cursor misses nothing, sees nothing twice, nothing out of order."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Self

import psycopg
import pytest

from tests.conftest import ROOT, Running, run_switchboard, until
from tests.live import services
from tests.live.streaming import events

pytestmark = pytest.mark.live

#: How long the random writers of each database are at work.
SECONDS = {"postgresql": 20, "sqlite": 4}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.PostgreSQL]:
    with services.postgresql(tmp_path_factory.mktemp("order-pg")) as started:
        yield started


@pytest.fixture(scope="module")
def installed(database: services.PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with run_switchboard(tmp_path_factory.mktemp("order"), DATABASE_URL=database.url) as started:
        yield started


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with run_switchboard(tmp_path_factory.mktemp("order-sqlite")) as started:
        yield started


class Child:
    """A process of :mod:`tests.live.writer`; a thread keeps the lines that it prints."""

    def __init__(self, running: Running, *words: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.live.writer", *words],
            cwd=ROOT, env=running.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.thread = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
        self.thread.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self.lines.append(line.strip())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.thread.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def wait_for(self, start: str, seconds: float = 20) -> str:
        """The first line that begins so, when it comes; it is taken away. What follows is returned."""

        def found() -> str | None:
            assert self.process.poll() is None or self.thread.is_alive() or self.lines, "the writer ended"
            return next((line for line in list(self.lines) if line.startswith(start)), None)

        line = until(found, seconds, f"no {start!r}; there is {self.lines}")
        self.lines.remove(line)
        return str(line).removeprefix(start).strip()

    def order(self, line: str) -> str:
        """Have one word of the script carried out; its result."""
        self.say(line)
        return self.wait_for(" ".join(line.split()[:2]))


@pytest.fixture(scope="module")
def script(installed: Running) -> Iterator[Child]:
    with Child(installed, "--script") as child:
        child.wait_for("READY")
        yield child


class Polling:
    """A reader with a cursor that asks without a pause; ``seen`` in the order of arrival."""

    def __init__(self, url: str) -> None:
        self.seen: list[int] = []
        self._over = threading.Event()
        self._connection = psycopg.connect(url, autocommit=True)
        self.start = self._newest()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _newest(self) -> int:
        ((newest,),) = self._connection.execute("SELECT coalesce(max(id), 0) FROM events_event").fetchall()
        return int(newest)

    def _look(self) -> int:
        cursor = self.seen[-1] if self.seen else self.start
        rows = self._connection.execute(
            "SELECT id FROM events_event WHERE id > %s ORDER BY id LIMIT 500", [cursor]
        ).fetchall()
        self.seen.extend(row[0] for row in rows)
        return len(rows)

    def _run(self) -> None:
        while not self._over.is_set():
            self._look()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join(5)
        self._connection.close()

    def finish(self) -> list[int]:
        """Everything up to now."""
        self._over.set()
        self._thread.join(5)
        while self._look():
            pass
        return self.seen


def table(running: Running, after: int = 0) -> list[int]:
    printed = running.shell(
        "import json; from events.models import Event; "
        f"print('IDS', json.dumps(list(Event.objects.filter(id__gt={after}).order_by('id').values_list('id', flat=True))))",
    )  # fmt: skip
    found: list[int] = json.loads(printed.split("IDS", 1)[1])
    return found


def waiting_for_the_order(database: services.PostgreSQL) -> int:
    """How many transactions wait for the one that told before them."""
    return int(
        database.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")[0][0]
    )


# ── One transaction after the other ──


def test_C44_who_told_first_commits_first_however_long_it_takes(
    installed: Running, database: services.PostgreSQL, script: Child
) -> None:
    with Polling(database.url) as reader, events(installed, f"?after={reader.start}") as stream:
        stream.named("ready")
        script.order("a begin")
        first = int(script.order("a append 1"))
        for name in ("b", "c", "d"):
            script.order(f"{name} begin")
            script.say(f"{name} append 1")
        until(lambda: waiting_for_the_order(database) == 3, 10)
        assert (reader.seen, stream.logged()) == ([], []), "nothing was committed"
        again = int(script.order("a append 2"))
        script.order("a commit")
        until(lambda: reader.seen == [first, again], 10, "what was committed is there")
        # Now one of the three has the turn; it commits, then the next. Which one is first is theirs.
        later: list[int] = []
        open_ones = ["b", "c", "d"]
        while open_ones:
            name = until(lambda: next((n for n in open_ones if _answered(script, n)), None), 10)
            later.append(int(script.wait_for(f"{name} append")))
            assert reader.seen == [first, again, *later[:-1]], "not before it is committed"
            script.order(f"{name} commit")
            open_ones.remove(name)
        expected = [first, again, *later]
        until(lambda: len(stream.logged()) == len(expected), 10)
        assert reader.finish() == expected == sorted(expected)
        assert [int(event.id) for event in stream.logged()] == expected
        assert table(installed, reader.start) == expected


def _answered(script: Child, name: str) -> bool:
    return any(line.startswith(f"{name} append") for line in list(script.lines))


def test_C44_a_transaction_that_told_nothing_yet_delays_nobody(
    installed: Running, database: services.PostgreSQL, script: Child
) -> None:
    with Polling(database.url) as reader:
        script.order("long begin")
        seen = int(script.order("long look"))
        # It even wrote: what would hold up a watermark of running transactions.
        script.order("long change 7")
        written = []
        for number in range(5):
            script.order("quick begin")
            written.append(int(script.order(f"quick append {number}")))
            script.order("quick commit")
        until(lambda: reader.seen == written, 10, "committed is visible, at once")
        assert int(script.order("long look")) == seen + 5
        last = int(script.order("long append 9"))
        script.order("long commit")
        assert reader.finish() == [*written, last]
    assert last > written[-1], "its place is where it told, not where it began"


def test_C35_what_is_rolled_back_leaves_a_gap_that_readers_step_over(
    installed: Running, database: services.PostgreSQL, script: Child
) -> None:
    with Polling(database.url) as reader, events(installed, f"?after={reader.start}") as stream:
        stream.named("ready")
        script.order("a begin")
        lost = [int(script.order(f"a append {number}")) for number in range(3)]
        script.order("a rollback")
        script.order("a begin")
        kept = [int(script.order("a append 4"))]
        script.order("a savepoint")
        lost.append(int(script.order("a append 5")))
        script.order("a back")
        # The turn was taken before the savepoint: it is still this transaction's.
        script.order("b begin")
        script.say("b append 1")
        until(lambda: waiting_for_the_order(database) == 1, 10)
        kept.append(int(script.order("a append 6")))
        script.order("a commit")
        kept.append(int(script.wait_for("b append")))
        script.order("b commit")
        until(lambda: len(stream.logged()) == 3, 10)
        assert reader.finish() == kept
        assert [int(event.id) for event in stream.logged()] == kept
    assert not set(lost) & set(table(installed))
    assert max(lost) < kept[1], "there was a gap to step over"


def test_C35_a_turn_that_was_taken_inside_a_savepoint_goes_with_it(
    database: services.PostgreSQL, script: Child
) -> None:
    with Polling(database.url) as reader:
        script.order("a begin")
        script.order("a savepoint")
        lost = int(script.order("a append 1"))
        script.order("a back")
        # Nothing of it is left to be told, so nobody waits for the rest of this transaction.
        script.order("b begin")
        first = int(script.order("b append 1"))
        script.say("a append 2")
        until(lambda: waiting_for_the_order(database) == 1, 10)
        script.order("b commit")
        second = int(script.wait_for("a append"))
        script.order("a commit")
        assert reader.finish() == [first, second]
    assert lost < first < second


def test_C36_a_writer_that_is_killed_in_the_middle_holds_up_nobody_and_told_nothing(
    installed: Running, database: services.PostgreSQL, script: Child
) -> None:
    with Polling(database.url) as reader, Child(installed, "--script") as victim:
        victim.wait_for("READY")
        victim.order("v begin")
        lost = int(victim.order("v append 1"))
        script.order("a begin")
        script.say("a append 1")
        until(lambda: waiting_for_the_order(database) == 1, 10)
        victim.process.send_signal(signal.SIGKILL)
        went_on = int(script.wait_for("a append"))
        script.order("a commit")
        assert reader.finish() == [went_on]
    assert lost < went_on
    assert lost not in table(installed)


# ── Many at once ──


class Follower:
    """``manage.py follow``: a process of its own that reads with a cursor."""

    def __init__(self, running: Running, after: int) -> None:
        self.ids: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, "manage.py", "follow", "--after", str(after), "--json"],
            cwd=ROOT, env=running.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.thread = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
        self.thread.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self.ids.append(json.loads(line)["id"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        self.process.wait(15)
        self.thread.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


def faults(seen: list[int], expected: list[int]) -> dict[str, int]:
    return {
        "missed": len(set(expected) - set(seen)),
        "invented": len(set(seen) - set(expected)),
        "out of order": sum(later <= earlier for earlier, later in itertools.pairwise(seen)),
        "duplicates": len(seen) - len(set(seen)),
    }


NONE = {"missed": 0, "invented": 0, "out of order": 0, "duplicates": 0}


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_C36_eight_writers_at_random_and_no_reader_misses_anything(
    kind: str, request: pytest.FixtureRequest
) -> None:
    running: Running = request.getfixturevalue("installed" if kind == "postgresql" else "on_sqlite")
    seconds = str(SECONDS[kind])
    start = max(table(running), default=0)
    with contextlib.ExitStack() as stack:
        # Two processes of four, so that they share neither a connection nor Python's one lock.
        writers = [
            stack.enter_context(Child(running, "--seconds", seconds, "--threads", "4", "--name", name))
            for name in ("x", "y")
        ]
        stream = stack.enter_context(events(running, f"?after={start}"))
        follower = stack.enter_context(Follower(running, start))
        readers: dict[str, Callable[[], list[int]]] = {
            "stream": lambda: [int(event.id) for event in stream.logged()],
            "follow": lambda: list(follower.ids),
        }
        if kind == "postgresql":
            polling = stack.enter_context(Polling(running.env["DATABASE_URL"]))
            readers["polling"] = lambda: list(polling.seen)
        stream.named("ready")
        for writer in writers:
            writer.wait_for("READY")
        for writer in writers:
            writer.say("go")
        counts = [int(writer.wait_for("DONE", float(seconds) + 30)) for writer in writers]
        expected = table(running, start)
        assert len(expected) == sum(counts)
        # How much is a matter of the machine, and on SQLite of luck, for its writers do not queue.
        assert min(counts) > 0, "both really wrote"
        assert sum(counts) > 100, "they really wrote"
        if kind == "postgresql":
            assert expected[-1] - expected[0] >= len(expected), "there were gaps to step over"
        for read in readers.values():
            with contextlib.suppress(AssertionError):
                until(lambda read=read: read() and read()[-1] >= expected[-1], 15)
        found = {name: faults(read(), expected) for name, read in readers.items()}
    assert found == dict.fromkeys(readers, NONE)
