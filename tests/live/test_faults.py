"""Faults of a whole installation: a server, Redis, PostgreSQL, a worker, the network and a clock, while clients follow and events are written.

After each of them every client that keeps its cursor has every event of the table once, in order.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from events.log import ORDER_LOCK
from events.sse import Parser
from tests.conftest import ROOT, Running, missing, until
from tests.live import services
from tests.live.follower import Follower
from tests.live.services import Cluster
from tests.live.streaming import Cut, connect, events, login, managed, write_elsewhere
from tests.live.test_operations import numbers
from tests.live.test_order import Child
from tests.sites.app import Site

pytestmark = pytest.mark.live

HEARTBEAT = 2
#: A client takes silence for a broken line after this long.
SILENCE = 2.5 * HEARTBEAT
FOLLOWERS = 20
#: As long as the brief outage of a network that nobody is called for.
CUT_SECONDS = 30.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with services.cluster(
        tmp_path_factory.mktemp("faults"), HEARTBEAT_SECONDS=str(HEARTBEAT), LEASE_SECONDS="3"
    ) as started:
        yield started


class Load:
    """A process that writes all the time, and clients that follow: half of them through nginx, the others each on one server.

    ``of`` has them by the base of the URLs that they go to.
    """

    def __init__(self, cluster: Cluster, stack: contextlib.ExitStack, count: int = FOLLOWERS) -> None:
        self.cluster = cluster
        self.start = newest(cluster)
        self.of: dict[str, list[Follower]] = {}
        bases = [*[cluster.front.url] * len(cluster.nodes), *(node.url for node in cluster.nodes)]
        for _, base in zip(range(count), itertools.cycle(bases), strict=False):
            self.of.setdefault(base, []).append(stack.enter_context(self.follower([base])))
        self.writer = stack.enter_context(steady(cluster.nodes[0]))

    def follower(self, urls: list[str]) -> Follower:
        return Follower(urls, key=self.cluster.front.api_key, after=self.start, silence=SILENCE)

    @property
    def followers(self) -> list[Follower]:
        return [each for group in self.of.values() for each in group]

    def goes_on(self, more: int = 10, *, but: str = "") -> None:
        """Until everybody (but those of one base) has so many more events than now."""
        wanted = {
            each: len(each.seen) + more for base, group in self.of.items() if base != but for each in group
        }

        def left() -> list[Follower]:
            return [each for each, count in wanted.items() if len(each.seen) < count]

        try:
            until(lambda: not left(), 30)
        except AssertionError:
            raise AssertionError(f"{len(left())} hear nothing: {left()[0]}") from None

    def ids(self) -> list[int]:
        query = f"SELECT id FROM events_event WHERE id > {self.start} ORDER BY id"
        return [number for (number,) in self.cluster.postgresql.execute(query)]

    def finish(self) -> int:
        """Stop writing, and hold everybody against the table; how many attempts of the writer failed."""
        self.writer.say("stop")
        written, failed = map(int, self.writer.wait_for("DONE", 60).split())
        rows = self.cluster.postgresql.execute(
            f"SELECT id, topic, version FROM events_event WHERE id > {self.start} ORDER BY id"
        )
        assert [version for _, topic, version in rows if topic == "task:steady"] == [*range(1, written + 1)]
        table = [row[0] for row in rows]
        for follower in self.followers:
            until(lambda follower=follower: follower.cursor >= table[-1], 30, f"{follower}")
            # The workers may have told something since the look above: then there is more on both sides.
            until(lambda follower=follower: follower.seen == self.ids(), 30, f"{follower} is not the table")
            assert not follower.resets
            # Their key was good all the time: whatever was down, nobody was told that it is not.
            assert set(follower.refused) <= {502, 503, 504}
        for node in self.cluster.nodes:
            counted = numbers(node)
            assert counted["switchboard_events_skipped_total"] == 0
            assert counted["switchboard_events_out_of_order_total"] == 0
            assert "never retrieved" not in node.log("server")
        return failed


def newest(cluster: Cluster) -> int:
    ((found,),) = cluster.postgresql.execute("SELECT coalesce(max(id), 0) FROM events_event")
    return int(found)


class Companion(Child):
    """Another program of these tests, told and heard as that one."""

    def __init__(self, env: dict[str, str], module: str, *words: str) -> None:
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.thread = threading.Thread(target=self._read, args=[self.process.stdout], daemon=True)
        self.thread.start()


@contextlib.contextmanager
def steady(running: Running) -> Iterator[Child]:
    with Companion(running.env, "tests.live.steady", "--topic", "steady") as child:
        child.wait_for("READY")
        yield child


@contextlib.contextmanager
def load(cluster: Cluster, count: int = FOLLOWERS) -> Iterator[Load]:
    with contextlib.ExitStack() as stack:
        made = Load(cluster, stack, count)
        made.goes_on()
        yield made


# ── A server ──


def test_B41_B37_a_killed_server_and_its_return_cost_its_clients_no_event(cluster: Cluster) -> None:
    with load(cluster) as under:
        for node in cluster.nodes:
            opened = sum(each.opened for each in under.of[cluster.front.url])
            node.stop("server", signal.SIGKILL)
            # Through nginx its clients are with the other one now; who knows no other waits.
            under.goes_on(but=node.url)
            assert sum(each.opened for each in under.of[cluster.front.url]) > opened
            assert all(each.faults for each in under.of[node.url])
            node.start("server")
            node.wait_until_up()
            under.goes_on()
        assert under.finish() == 0, "no writer needs a server"


# ── Redis ──


def test_C36_a_killed_redis_delays_nothing_for_good_and_a_worker_is_heard_without_it(
    cluster: Cluster,
) -> None:
    redis = cluster.redis
    assert redis is not None
    with load(cluster) as under:
        redis.kill()
        under.goes_on()
        with Site(scenario="simple") as site:
            connection = connect(cluster.front, site.domain, login_url=site.url("/simple/login"))
            with managed(cluster.nodes[1], connection) as stream:
                login(cluster.front, connection)
                stream.until(lambda event: event.json().get("flow_step") == "AWAITING_INPUT", 30)
        redis.start()
        # It has forgotten who listened. They join again, and hear of events before they look by themselves.
        for node in cluster.nodes:
            heard = numbers(node)["switchboard_wakes_total"]
            until(lambda node=node, heard=heard: numbers(node)["switchboard_wakes_total"] > heard, 20)
        under.goes_on()
        assert under.finish() == 0, "no writer needs Redis"


def test_C36_C12_redis_cut_off_for_half_a_minute_and_a_client_whose_network_breaks_meanwhile(
    cluster: Cluster,
) -> None:
    """Redis takes connections and answers nothing, as behind a network that swallows everything; so do the lines of some clients."""
    redis = cluster.redis
    assert redis is not None
    with (
        load(cluster) as under,
        Cut(cluster.nodes[0].url) as network,
        contextlib.ExitStack() as stack,
    ):
        behind = [stack.enter_context(under.follower([network.url])) for _ in range(4)]
        under.of[network.url] = behind
        under.goes_on()
        began = time.monotonic()
        redis.pause()
        try:
            under.goes_on()
            heard = [numbers(node)["switchboard_wakes_total"] for node in cluster.nodes]

            # Events are written to lines that carry nothing any more: the server cannot know. Its clients take the silence for what
            # it is, and come back in vain; nobody else notices.
            opened = [each.opened for each in behind]
            network.swallow()
            until(lambda: network.swallowed > 1000, 20)
            under.goes_on(but=network.url)
            until(lambda: all(each.faults >= 2 for each in behind), 40)
            assert [each.opened for each in behind] == opened
            lost = newest(cluster)
            assert all(each.cursor < lost for each in behind)
            network.reset()
            network.heal()
            until(lambda: all(each.cursor >= lost for each in behind), 20)

            # Not a wait for anything: the length of the outage is the fault.
            while time.monotonic() - began < CUT_SECONDS:
                under.goes_on(1)
                time.sleep(0.2)
            assert [numbers(node)["switchboard_wakes_total"] for node in cluster.nodes] == heard
        finally:
            redis.resume()
        for node, count in zip(cluster.nodes, heard, strict=True):
            until(lambda node=node, count=count: numbers(node)["switchboard_wakes_total"] > count, 30)
        under.goes_on()
        assert under.finish() == 0, "no writer needs Redis"


# ── PostgreSQL ──


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGKILL], ids=["stopped immediately", "killed"])
def test_C35_postgresql_gone_in_the_middle_of_everything_costs_time_and_no_event(
    cluster: Cluster, number: signal.Signals
) -> None:
    with load(cluster) as under:
        opened = [each.opened for each in under.followers]
        cluster.postgresql.stop(number)
        try:
            # Streams that are open stay, with heartbeats: a passing fault ends nobody's session.
            beats = [each.heartbeats for each in under.followers]
            until(
                lambda: all(
                    each.heartbeats >= count + 4 for each, count in zip(under.followers, beats, strict=True)
                ),
                30,
                "no heartbeats without PostgreSQL",
            )
            assert [each.opened for each in under.followers] == opened
            # Who comes now is told to come again, and not that the key is wrong.
            with events(cluster.nodes[0]) as refused:
                assert refused.status == 503
                assert int(dict(refused.answer.getheaders())["Retry-After"]) > 0
        finally:
            cluster.postgresql.start()
        under.goes_on()
        assert [each.opened for each in under.followers] == opened
        assert under.finish() > 0, "the writer did not notice"


# ── Processes that die in mid-transaction ──


def test_C35_a_writer_killed_with_its_event_drawn_and_not_committed_leaves_no_event_and_no_lock(
    cluster: Cluster,
) -> None:
    with load(cluster, 6) as under, Child(cluster.nodes[0], "--script") as victim:
        victim.wait_for("READY")
        victim.order("v begin")
        drawn = int(victim.order("v append 1"))
        # The others wait for its end: whatever they write comes later.
        until(lambda: waiting(cluster), 10, "nobody waits for the lock of the log")
        assert newest(cluster) < drawn
        victim.process.kill()
        under.goes_on()
        assert newest(cluster) > drawn
        assert under.finish() == 0
        assert all(drawn not in each.seen for each in under.followers)


def waiting(cluster: Cluster) -> list[int]:
    """The sessions that wait for the lock of the log."""
    rows = cluster.postgresql.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    return [pid for (pid,) in rows]


@contextlib.contextmanager
def log_held(cluster: Cluster) -> Iterator[psycopg.Connection]:
    """The lock of the log, held by nobody of the installation: who tells waits in the middle of a transaction."""
    with psycopg.connect(cluster.postgresql.url, autocommit=True) as held:
        held.execute("SELECT pg_advisory_lock(%s)", [ORDER_LOCK])
        yield held


@pytest.mark.parametrize("transaction", [0, 1], ids=["while it takes a task", "while it tells what it found"])
def test_C35_a_worker_killed_in_mid_transaction_leaves_half_of_nothing_and_another_goes_on(
    cluster: Cluster, transaction: int
) -> None:
    first = cluster.nodes[0]
    with (
        Site(scenario="simple") as site,
        contextlib.ExitStack() as stack,
        ThreadPoolExecutor(1) as helper,
    ):
        start = newest(cluster)
        followers = [
            stack.enter_context(Follower([node.url], key=node.api_key, after=start, silence=SILENCE))
            for node in cluster.nodes
        ]
        connection = connect(cluster.front, site.domain, login_url=site.url("/simple/login"))
        first.stop("worker")
        login(cluster.front, connection)
        # The worker has changed its rows and is about to tell.
        hold = stack.enter_context(log_held(cluster))
        first.start("worker")
        until(lambda: len(waiting(cluster)) == 1, 30, "the worker never came to its event")
        for _ in range(transaction):
            # It may finish this one; who asks for the lock after it has it before its next.
            after_it = helper.submit(stack.enter_context, log_held(cluster))
            until(lambda: len(waiting(cluster)) == 2, 10)
            hold.close()
            hold = after_it.result(10)
            until(lambda: len(waiting(cluster)) == 1, 30, "the worker never came to its next event")
        before = state_of(cluster, connection["id"])
        first.stop("worker", signal.SIGKILL)
        hold.close()
        until(lambda: not waiting(cluster), 10)
        assert state_of(cluster, connection["id"]) == before, "half of its transaction is there"
        assert newest(cluster) == before[0]
        first.start("worker")
        until(lambda: state_of(cluster, connection["id"])[1][0] == "AWAITING_INPUT", 40, "nobody goes on")
        rows = cluster.postgresql.execute(
            f"SELECT id, name, data ->> 'version', topic FROM events_event WHERE id > {start} ORDER BY id"
        )
        topic = f"connection:{connection['id']}"
        versions = [int(version) for _, name, version, of in rows if (name, of) == ("flow.state", topic)]
        assert len(versions) > 1
        assert versions == sorted(set(versions))
        for follower in followers:
            until(lambda follower=follower: follower.cursor >= rows[-1][0], 20)
            assert follower.seen[: len(rows)] == [row[0] for row in rows]


def state_of(cluster: Cluster, connection: str) -> tuple[int, tuple[object, ...]]:
    """The newest event, and the login as it is in the table."""
    (row,) = cluster.postgresql.execute(
        "SELECT flow.step, flow.status, flow.version, task.status, task.version FROM connections_loginflow flow"
        f" JOIN connections_task task ON task.flow_id = flow.id WHERE flow.connection_id = '{connection}'"
    )
    return newest(cluster), row


# ── A clock ──

#: Every reading of the time of day is another lie of hours; clocks that only measure are true.
LIES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static long lie(void) {
    static unsigned count;
    static const long lies[] = {5 * 3600L, -7 * 3600L, 200 * 86400L, -40 * 86400L};
    return lies[__atomic_fetch_add(&count, 1, __ATOMIC_RELAXED) % 4];
}

int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, at);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += lie();
    return failed;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


@pytest.fixture(scope="module")
def lying_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes the clock of a process wrong and jumping."""
    compiler = shutil.which("cc")
    if compiler is None:
        missing("a C compiler")
    assert compiler is not None
    place = tmp_path_factory.mktemp("clock")
    (place / "lies.c").write_text(LIES)
    made = place / "lies.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(place / "lies.c"), "-ldl"], check=True)
    return made


def test_C44_a_client_whose_clock_is_wrong_by_hours_and_jumps_has_every_event_once(
    cluster: Cluster, lying_clock: Path
) -> None:
    with load(cluster, 2) as under:
        env = cluster.front.env | {"LD_PRELOAD": str(lying_clock), "KEY": cluster.front.api_key}
        client = Companion(
            env, "tests.live.follower", cluster.nodes[0].url, cluster.nodes[1].url,
            "--after", str(under.start), "--silence", str(SILENCE),
        )  # fmt: skip
        with client:
            until(lambda: len(client.lines) > 20, 20)
            cluster.nodes[0].stop("server", signal.SIGKILL)
            cluster.nodes[0].start("server")
            cluster.nodes[0].wait_until_up()
            under.goes_on()
            assert under.finish() == 0
            table = under.followers[0].seen
            until(lambda: len(client.lines) >= len(table), 20)
        clock, ids = zip(*(line.split() for line in client.lines), strict=True)
        assert [int(each) for each in ids] == table
        times = [float(each) for each in clock]
        assert all(abs(each - time.time()) > 3600 for each in times), "its clock was right"
        assert any(later < earlier - 3600 for earlier, later in itertools.pairwise(times))


# ── A slow reader ──


def test_C12_B31_a_reader_of_one_kilobyte_a_second_has_everything_once_and_nobody_waits_for_it(
    cluster: Cluster,
) -> None:
    node = cluster.nodes[0]
    start = newest(cluster)
    fallbacks = numbers(node)["switchboard_stream_fallbacks_total"]
    host, _, port = node.domain.partition(":")
    parser, seen, taken = Parser(), [], 0
    with socket.socket() as slow, events(node, f"?topics=tasks&after={start}") as quick:
        # Before connect(): the window is agreed upon then.
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.settimeout(20)
        slow.connect((host, int(port)))
        slow.sendall(
            f"GET /api/events?topics=task:slow&after={start} HTTP/1.0\r\nHost: {node.domain}\r\n"
            f"Authorization: Bearer {node.api_key}\r\n\r\n".encode()
        )
        head = b""
        while b"\r\n\r\n" not in head:
            head += slow.recv(1)
        assert head.startswith(b"HTTP/1.1 200") or head.startswith(b"HTTP/1.0 200"), head

        def take(size: int) -> None:
            nonlocal taken
            part = slow.recv(size)
            assert part, "its stream was ended"
            taken += len(part)
            seen.extend(int(event.id) for event in parser.feed(part) if "." in event.name)

        quick.named("ready")
        written = threading.Thread(target=fill, args=(node,))
        written.start()
        for _ in range(10):
            take(1024)
            # The speed of this reader, not a wait for anything.
            time.sleep(1)
        written.join(60)
        until(lambda: len(quick.logged()) >= 200 + FLOOD, 20)
        # The quick one has it all while the slow one has next to nothing.
        assert taken <= 10 * 1024
        assert len(seen) < 10
        table = [
            row[0]
            for row in cluster.postgresql.execute(
                f"SELECT id FROM events_event WHERE topic = 'task:slow' AND id > {start} ORDER BY id"
            )
        ]
        assert len(table) == 200
        while len(seen) < 200:
            take(65536)
        assert seen == table
        told = [int(event.id) for event in quick.logged()]
        assert told == sorted(set(told))
    counted = numbers(node)
    # What it wanted had left the memory of the process by then: it was read from the log.
    assert counted["switchboard_stream_fallbacks_total"] > fallbacks
    assert counted["switchboard_events_skipped_total"] == 0


#: Events of 100 kB: more than a process keeps in memory of what is new.
FLOOD = 60


def fill(node: Running) -> None:
    write_elsewhere(node, 200, topic="slow", size=2000)
    write_elsewhere(node, FLOOD, topic="flood", size=100_000)
