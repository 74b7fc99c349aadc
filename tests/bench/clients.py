"""``make bench ARGS=clients``: a thousand clients come back at once over two server processes, with and without client records.

Prints a table and writes ``tests/bench/results/clients.json``. The method is in README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench import measure
from tests.bench.load import Failed, Generator
from tests.bench.pace import CAP_SECONDS
from tests.bench.servers import Missing, Published, Server, SwitchboardRedis
from tests.bench.streams import median, say
from tests.conftest import until

RESULTS = Path(__file__).parent / "results" / "clients.json"

MISSED = 200
#: Events of somebody whom nobody here sees, in the middle of the missed ones.
FOREIGN = 20
FOREIGN_FIRST = 10_000_000
WARM = 5
#: What users may have open at one server, as it comes: each has less, and nobody is let in by a raised limit.
STREAM_LIMIT = 20
#: The time of the storm, × that of the same storm without client records.
LIMIT = 1.5
GROUPS = ("one", "two")
VARIANTS = {
    "clean": "sockets closed, and noticed",
    "kill": "both servers killed and started again",
}

Figures = dict[str, Any]

_PEOPLE = """
import json
from django.contrib.auth.models import Group, User
from django.utils import timezone
from connections import registry
team = Group.objects.create(name="bench")
people = []
for number in range(COUNT):
    user = User.objects.create_user(f"person-{number}")
    user.groups.add(team)
    row, plain = registry.create_api_key(owner_id=user.pk, name=f"key {number}", now=timezone.now())
    people.append([user.pk, row.pk, plain])
stranger = User.objects.create_user("stranger")
print("PEOPLE", json.dumps([people, stranger.pk]))
"""

#: Each client was there once, and has one claim; its stream has ended. Without streams: a thousand people would be told of each claim.
_CLAIMS = """
import json, sys
from events import clients
from events.clients import Arrival, Caller
members = [
    (Caller(owner_id=owner, binding=binding, who="bench"), cid, page, subject)
    for owner, binding, cid, page, subject in json.load(sys.stdin)
]
for start in range(0, len(members), 100):
    part = members[start : start + 100]
    arrivals = [
        Arrival(caller=caller, cid=cid, page=page, process=clients.process_name())
        for caller, cid, page, _ in part
    ]
    welcomes = clients.connect(arrivals)
    for caller, cid, _, subject in part:
        clients.take(caller=caller, cid=cid, subject=subject, audience=caller.owner_id)
    clients.disconnect([(welcome.pk, welcome.epoch, "gone") for welcome in welcomes])
"""

_CLAIMS_KEPT = """
SELECT count(*) FROM events_claim JOIN events_client ON events_client.id = events_claim.client_id
WHERE subject = 'task:' || substr(cid, 5) AND state = 'live'
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    clients: int = 1000
    keys: int = 50
    runs: int = 3
    variants: tuple[str, ...] = tuple(VARIANTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One client: whose it is, with which key it comes, and which page of it has the stream."""

    owner: int
    key_id: int
    key: str
    cid: str
    page: str

    @property
    def subject(self) -> str:
        return f"task:{self.cid.removeprefix('cid-')}"

    def request(self, *, recorded: bool) -> str:
        """Head of its request, without the last empty line. ``recorded``: it brings its id."""
        query = "topics=connections,tasks" + (f"&cid={self.cid}&page={self.page}" if recorded else "")
        return (
            f"GET /api/events?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
            f"User-Agent: bench\r\nAuthorization: Bearer {self.key}\r\n"
        )


class First(SwitchboardRedis):
    """The process beside which the second one runs. PostgreSQL, Redis and the publisher are its."""

    name = "clients-1"
    title = "Switchboard (PostgreSQL + Redis, two processes)"

    def _environment(self) -> dict[str, str]:
        return super()._environment() | {"STREAM_LIMIT": str(STREAM_LIMIT)}

    def sql(self, query: str) -> Any:
        """The one value of a query; None for a statement that has none."""
        rows = self._database.execute(query)
        return rows[0][0] if rows else None


class Second(SwitchboardRedis):
    """Another process of the same installation: it has nothing of its own but its port."""

    name = "clients-2"
    title = First.title

    def __init__(self, folder: Path, streams: int, first: First) -> None:
        super().__init__(folder, streams)
        self._first = first
        self.publisher = None

    def prepare(self) -> None:
        self.headers = self._first.headers

    def _environment(self) -> dict[str, str]:
        # Also its data directory, where the secret key is.
        return self._first._environment() | {"PORT": str(self.port)}

    def start(self, port: int = 0) -> None:
        Server.start(self, port)

    def cpu_of_all(self) -> int:
        return self.cpu()

    def close(self) -> None:
        """Nothing that would outlive it."""


class Pair:
    """One installation of two server processes, and those who use it."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.first = First(folder, options.clients)
        self.second = Second(folder, options.clients, self.first)
        self.servers: tuple[First | Second, ...] = (self.first, self.second)
        self.options = options

    def prepare(self) -> None:
        """:raises Missing: PostgreSQL or Redis is not installed."""
        self.first.prepare()
        self.second.prepare()
        printed = self.first.shell(f"COUNT = {self.options.keys}\n{_PEOPLE}")
        self.people, self.stranger = json.loads(printed.split("PEOPLE", 1)[1])

    def crowd(self) -> list[list[Member]]:
        """New clients, by the server that they come to. Each key has as many here as there."""
        members: list[list[Member]] = [[], []]
        for number in range(self.options.clients):
            owner, key_id, key = self.people[number // 2 % len(self.people)]
            member = Member(
                owner=owner, key_id=key_id, key=key, cid=f"cid-{uuid.uuid4()}", page=uuid.uuid4().hex
            )
            members[number % 2].append(member)
        return members

    def forget(self) -> None:
        """The next storm finds the tables as this one did. No server may run."""
        for table in ("events_presence", "events_claim", "events_client"):
            self.first.sql(f"DELETE FROM {table}")
        self.first.sql("VACUUM ANALYZE")

    def claim(self, members: Sequence[Member]) -> None:
        given = [[each.owner, f"key:{each.key_id}", each.cid, each.page, each.subject] for each in members]
        self.first.shell(_CLAIMS, json.dumps(given))

    # ── The processes ──

    def start(self) -> None:
        """Both at once; where they were, if they were somewhere."""
        with ThreadPoolExecutor(len(self.servers)) as threads:
            list(threads.map(lambda server: server.start(server.port), self.servers))

    def kill(self) -> None:
        for server in self.servers:
            server.stop(signal.SIGKILL)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        try:
            self.start()
            yield
        finally:
            # Nobody is there who would want a farewell.
            self.kill()

    def close(self) -> None:
        for server in self.servers:
            server.close()

    # ── What is asked of both ──

    def cpu(self) -> int:
        return sum(server.cpu() for server in self.servers)

    def cpu_of_all(self) -> int:
        return sum(server.cpu_of_all() for server in self.servers)

    def count(self, name: str) -> float:
        """A number of ``/metrics``, over both; all its labels."""
        return sum(
            value
            for server in self.servers
            for key, value in server.counters().items()
            if key.partition("{")[0] == f"switchboard_{name}"
        )

    def transactions(self) -> int:
        """Transactions of the database that wrote something, ever."""
        return int(self.first.sql("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))

    def newest(self) -> int:
        return int(self.first.sql("SELECT coalesce(max(id), 0) FROM events_event"))

    # ── Publishing ──

    def publish(self, count: int) -> Published:
        """So many events, of everybody in turn: the team sees them all."""
        first, done = 0, 0
        while done < count:
            self.first.audience = self.people[done % len(self.people)][0]
            part = min(4, count - done)
            published = self.first.publish(part)
            first, done = first or published.first, done + part
        return Published(first=first, last=published.last, commits={})

    def publish_missed(self) -> Published:
        """The missed events; halfway some of a stranger. Whoever got one of those would get lower numbers after it: *misordered*."""
        before = self.publish(MISSED // 2)
        self.first.audience = self.stranger
        self.first._publish(FOREIGN_FIRST, FOREIGN, 0, 300)
        after = self.publish(MISSED - MISSED // 2)
        return dataclasses.replace(after, first=before.first)


# ── The storm ──


def storm(pair: Pair, variant: str, *, recorded: bool) -> Figures:
    """One storm from the first stream to the last figure. ``recorded``: with client records and claims."""
    pair.forget()
    members = pair.crowd()
    everybody = [member for half in members for member in half]
    if recorded:
        pair.claim(everybody)
    with Generator(len(everybody)) as load, pair.running():
        opened = open_streams(pair, load, members, recorded=recorded)
        mark = pair.newest()
        noticed = leave(pair, load, variant, recorded=recorded)
        published = pair.publish_missed()
        if variant == "kill":
            pair.start()
        figures = come_back(pair, load, published, recorded=recorded)
        signs = load("signs", groups=list(GROUPS))["clients"]
        figures |= judge(everybody, signs, figures.pop("_began_ns"), figures["last_at_ns"], recorded=recorded)
        if not figures["complete"]:
            figures["seconds"] = None
        figures |= {"open_seconds": opened, "noticed_seconds": noticed}
        if recorded:
            figures |= {
                "claims_kept": int(pair.first.sql(_CLAIMS_KEPT)),
                "claims_told": int(
                    pair.first.sql(
                        f"SELECT count(*) FROM events_event WHERE id > {mark} AND name LIKE 'claim.%'"
                    )
                ),
            }
        for name in ("clients_expired_live", "clients_stale_changed"):
            figures[name] = int(pair.count(f"{name}_total"))
        return figures


def open_streams(pair: Pair, load: Generator, members: list[list[Member]], *, recorded: bool) -> float:
    """Everybody's stream, and a few events, so that each has a cursor; the seconds until all were open."""
    seconds = 0.0
    for group, server, half in zip(GROUPS, pair.servers, members, strict=True):
        opened = load(
            "open", group=group, host="127.0.0.1", port=server.port, count=len(half), ready="event: ready",
            requests=[member.request(recorded=recorded) for member in half], timeout=60 + len(half) / 100,
        )  # fmt: skip
        if opened["open"] != len(half):
            raise Failed(
                f"{opened['open']} of {len(half)} streams opened: {opened['failed']}\n{server.log()}"
            )
        seconds += opened["seconds"]
    published = pair.publish(WARM)
    waited = load("until", groups=list(GROUPS), last=published.last, timeout=CAP_SECONDS, quiet=CAP_SECONDS)
    if not waited["complete"]:
        raise Failed(f"{waited['missing']} streams did not get what was published")
    return round(seconds, 3)


def leave(pair: Pair, load: Generator, variant: str, *, recorded: bool) -> float | None:
    """All at once; the seconds until the servers know, where they live."""
    began = time.monotonic()
    if variant == "kill":
        pair.kill()
    for group in GROUPS:
        left = load("leave", group=group)
        if left["without_cursor"]:
            raise Failed(f"{left['without_cursor']} clients have no cursor to come back with")
    if variant == "kill":
        return None
    until(lambda: not pair.count("streams_open"), CAP_SECONDS, "the servers do not notice that all have left")
    if recorded:
        live = "SELECT count(*) FROM events_client WHERE state <> 'inactive'"
        until(lambda: not pair.first.sql(live), CAP_SECONDS, "clients that left are not inactive")
    return round(time.monotonic() - began, 3)


def come_back(pair: Pair, load: Generator, published: Published, *, recorded: bool) -> Figures:
    """All at once, each to the other process; what they got, and what it cost."""
    marks = ["event: ready", *(["event: welcome"] if recorded else [])]
    one, two = GROUPS
    transactions, newest = pair.transactions(), pair.newest()
    with load.measured() as generator:
        alone, everything = pair.cpu(), pair.cpu_of_all()
        answer = load(
            "come_back", group=one, port=pair.second.port, beside={two: pair.first.port}, marks=marks,
            last=published.last, timeout=CAP_SECONDS, quiet=CAP_SECONDS,
        )  # fmt: skip
        alone, everything = pair.cpu() - alone, pair.cpu_of_all() - everything
    transactions, newest = pair.transactions() - transactions, pair.newest() - newest
    report = load("report", groups=list(GROUPS), first=published.first, last=published.last)
    return report | {
        "complete": answer["complete"],
        "cpu_seconds": round(alone / 1e9, 3),
        "all_cpu_seconds": round(everything / 1e9, 3),
        "transactions": transactions,
        "events_written": newest,
        "log_reads": int(pair.count("log_reads_total")),
        "generator": generator,
        "_began_ns": answer["began_ns"],
    }


def judge(
    members: Sequence[Member], signs: Sequence[Any], began: int, last_at: int, *, recorded: bool
) -> Figures:
    """What the streams' own frames say: who was welcomed as whom, and when the last was ready.

    ``signs``: ``(nanoseconds, name, data)`` of each client, in their order. ``seconds``: until each had its welcome, its last event (the
    last of all came at ``last_at``) and ``ready``. ``resumed``: clients that are again who they were, and have what they had.
    ``odd``: clients that were told anything but one welcome and one ``ready``, in this order.
    """
    resumed = odd = 0
    ready: list[int] = []
    for member, told in zip(members, signs, strict=True):
        names = [name for _, name, _ in told]
        odd += names != [*(["welcome"] if recorded else []), "ready"]
        ready.extend(at for at, name, _ in told if name == "ready")
        for welcome in [json.loads(data) for _, name, data in told if name == "welcome"]:
            resumed += (
                welcome["resumed"] and welcome["cid_accepted"] and welcome["connection_id"] == member.cid
            )
    ready.sort()
    return {
        "resumed": resumed if recorded else None,
        "odd": odd,
        "half_seconds": round((ready[len(ready) // 2] - began) / 1e9, 3) if ready else None,
        "seconds": round((max(ready[-1], last_at) - began) / 1e9, 3) if ready else None,
    }


def run(options: Options) -> dict[str, Any]:
    """Every variant with and without client records, in each run; the medians, and every single run.

    :raises Missing: PostgreSQL or Redis is not installed.
    """
    started = time.monotonic()
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in options.variants}
    loads: list[float] = []
    with tempfile.TemporaryDirectory(prefix="switchboard-bench-") as folder, contextlib.ExitStack() as stack:
        # PostgreSQL's own user must be able to come in.
        Path(folder).chmod(0o755)
        pair = Pair(Path(folder), options)
        pair.prepare()
        stack.callback(pair.close)
        for number in range(options.runs):
            for variant in options.variants:
                loads.append(round(os.getloadavg()[0], 2))
                found: dict[str, Any] = {}
                # Which one is first must not be what makes the difference.
                for name in ("recorded", "plain") if number % 2 == 0 else ("plain", "recorded"):
                    found[name] = storm(pair, variant, recorded=name == "recorded")
                    say(
                        f"run {number + 1} of {options.runs}: {variant}, {name}: {found[name]['seconds']} s "
                        f"({time.monotonic() - started:.0f} s, load {loads[-1]:.1f})"
                    )
                recorded, plain = found["recorded"], found["plain"]
                found["ratio"] = ratio(recorded["seconds"], plain["seconds"])
                found["cpu_ratio"] = ratio(recorded["all_cpu_seconds"], plain["all_cpu_seconds"])
                runs[variant].append(found)
    return {
        "clients": options.clients,
        "keys": options.keys,
        "runs": options.runs,
        "seconds": round(time.monotonic() - started),
        "load_averages": loads,
        "median": {variant: median(each) for variant, each in runs.items()},
        "each": runs,
    }


def ratio(mine: float | None, other: float | None) -> float | None:
    return round(mine / other, 3) if mine is not None and other else None


# ── What is said of it ──


def verdicts(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target: the figure, what it may be (``exactly`` or ``at most``), and whether it is met. Faults are summed over all runs."""
    found: list[dict[str, Any]] = []

    def add(what: str, figure: Any, limit: float, *, exactly: bool = False) -> None:
        met = figure is not None and (figure == limit if exactly else figure <= limit)
        found.append({"what": what, "figure": figure, "limit": limit, "exactly": exactly, "met": bool(met)})

    for variant, runs in measured["each"].items():
        recorded = [each["recorded"] for each in runs]
        add(f"{variant}: time, × that without client records", measured["median"][variant]["ratio"], LIMIT)
        for what, name in (("clients resumed", "resumed"), ("claims kept by them", "claims_kept")):
            # The worst run counts.
            add(f"{variant}: {what}", min(each[name] for each in recorded), measured["clients"], exactly=True)
        faults = {
            "clients told anything but welcome and ready": "odd",
            "claims told of again": "claims_told",
            "clients_expired_live": "clients_expired_live",
            "clients_stale_changed": "clients_stale_changed",
            "events missed": "lost",
            "events twice": "duplicates",
            "events misordered": "misordered",
        }
        both = [each[name] for each in runs for name in ("recorded", "plain")]
        for what, name in faults.items():
            figure = sum(each.get(name, 0) for each in both)
            if name == "lost":
                # A framing that does not hold hides what came after it.
                figure += sum(len(each["broken_framing"]) for each in both)
            add(f"{variant}: {what}", figure, 0, exactly=True)
    return found


_COLUMNS = (
    ("all back s", "seconds", 2), ("half s", "half_seconds", 2), ("servers' CPU s", "cpu_seconds", 2),
    ("all CPU s", "all_cpu_seconds", 2), ("writing transactions", "transactions", 0), ("events written", "events_written", 0),
    ("reads of the log", "log_reads", 0), ("noticed s", "noticed_seconds", 2), ("opened s", "open_seconds", 2),
)  # fmt: skip


def render(result: dict[str, Any]) -> str:
    measured = result["clients"]
    machine = result["machine"]
    lines = [
        f"{measured['clients']} clients of {measured['keys']} keys over two processes, median of {measured['runs']} run(s), {result['at'][:10]}, "
        f"{machine['processors']} × {machine['processor']}, Linux {machine['kernel']}, Python {machine['python']}; "
        f"load average before each run {min(measured['load_averages'])} to {max(measured['load_averages'])}; {measured['seconds']} s in all",
        "",
        f"{'':<24}" + "".join(f"{title:>{len(title) + 2}}" for title, _, _ in _COLUMNS),
    ]
    for variant, figures in measured["median"].items():
        for name, title in (("recorded", "with records"), ("plain", "without")):
            cells = [(heading, figures[name].get(key), digits) for heading, key, digits in _COLUMNS]
            lines.append(
                f"{variant + ': ' + title:<24}"
                + "".join(
                    f"{'–' if value is None else format(value, f',.{digits}f'):>{len(heading) + 2}}"
                    for heading, value, digits in cells
                )
            )
    lines += ["", f"{'target':<52}{'figure':>9}  {'is to be':<14}"]
    for each in verdicts(measured):
        figure = "–" if each["figure"] is None else f"{each['figure']:,g}"
        wanted = f"{'' if each['exactly'] else 'at most '}{each['limit']:,g}"
        lines.append(f"{each['what']:<52}{figure:>9}  {wanted:<14}{'ok' if each['met'] else 'NOT OK'}")
    shares = [
        each[name]["generator"]["busy"]
        for runs in measured["each"].values()
        for each in runs
        for name in ("recorded", "plain")
    ]
    lines.append("")
    for variant, runs in measured["each"].items():
        times, costs = ([str(each[name]) for each in runs] for name in ("ratio", "cpu_ratio"))
        lines.append(
            f"{variant} ({VARIANTS[variant]}): time × {', '.join(times)}; CPU × {', '.join(costs)} in the runs"
        )
    lines += [
        f"The load generator was busy for {100 * min(shares):.0f} to {100 * max(shares):.0f} % of one processor.",
    ]
    return "\n".join(lines)


def options_of(words: Sequence[str] | None = None) -> Options:
    """:raises SystemExit: for what cannot be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--clients", type=int, default=Options.clients, help="clients, half of them on each process"
    )
    parser.add_argument("--keys", type=int, default=Options.keys, help="API keys, each of another user")
    parser.add_argument(
        "--runs", type=int, default=Options.runs, help="the table shows the median of so many"
    )
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), metavar="A,B", help="how they were dropped: clean, kill"
    )
    chosen = parser.parse_args(words)
    variants = tuple(name for name in chosen.variants.split(",") if name)
    for name in variants:
        if name not in VARIANTS:
            raise SystemExit(f"bench: {name!r} is none of {', '.join(VARIANTS)}")
    if chosen.clients < 2 or chosen.keys < 1 or chosen.runs < 1 or not variants:
        raise SystemExit("bench: at least 2 clients, 1 key, 1 run and 1 variant")
    if chosen.clients > 2 * STREAM_LIMIT * chosen.keys:
        raise SystemExit(
            f"bench: a key may have {STREAM_LIMIT} streams at a server: so many clients need more --keys"
        )
    return Options(clients=chosen.clients, keys=chosen.keys, runs=chosen.runs, variants=variants)


def main() -> None:
    options = options_of()
    try:
        measured = run(options)
    except Missing as missing:
        print(f"clients: left out, {missing}")
        return
    except Failed as failed:
        raise SystemExit(f"bench: {failed}") from None
    result = {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": measure.machine(),
        "clients": measured,
        "targets": verdicts(measured),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(render(result))


if __name__ == "__main__":
    main()
