"""The streams, measured side by side: Switchboard and its peers, each with the same load generator, one after the other.

How each figure is taken is in README.md; what it should be is in ``targets.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench import measure
from tests.bench.load import Failed, Generator, raise_limit
from tests.bench.pace import CAP_SECONDS
from tests.bench.servers import ALL, Missing, Published, Server

#: In the order in which they are measured.
MODES = ("idle", "paced", "burst", "storm", "restart", "slow", "scale")
RATE = 20
BURST = 200
MISSED = 200
SLOW, STALLED = 50, 10
SLOW_BYTES_A_SECOND = 1000
SLOW_PAYLOAD = 2000
#: Slow readers sit at the end of a long line: a window of two packets of the Internet's size. On the loopback's terms the kernel
#: of the server would hold megabytes for each, and nothing of this would reach the server itself.
LINE = {"receive_buffer": 4096, "segment": 1400}
WARM = 20
#: Nothing came for so long: what is still missing is lost.
QUIET_SECONDS = 3.0

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    streams: int = 1000
    many: int = 5000
    runs: int = 3
    seconds: float = 10
    only: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Course:
    """One server, one run: the modes one after the other on the same streams."""

    def __init__(
        self, server: Server, options: Options, load: Generator, given_up: set[str] | None = None
    ) -> None:
        self.given_up = given_up or set()
        self.server = server
        self.options = options
        self.load = load
        self.figures: dict[str, Figures] = {}

    def run(self) -> dict[str, Figures]:
        wanted = [mode for mode in self.options.modes if self._fits(mode) and mode not in self.given_up]
        self.fresh(self.options.streams, "idle" in wanted)
        for mode in wanted:
            if mode == "idle":
                continue
            began = time.monotonic()
            self.figures[mode] = getattr(self, mode)()
            say(f"    {mode}: {time.monotonic() - began:.0f} s")
            if self.figures[mode].get("collapsed"):
                say(f"    {mode}: not done after {CAP_SECONDS} s; the server is started anew")
                self.server.stop(signal.SIGKILL)
                self.server.start()
                self.fresh(self.options.streams, False)
        return self.figures

    def _fits(self, mode: str) -> bool:
        server = self.server
        return {
            "storm": server.resumes,
            "restart": server.ours and server.from_worker,
            "slow": server.name not in ("plain", "eventstream-storage"),
            "paced": server.name != "eventstream-storage",
            "scale": False,
        }.get(mode, True)

    # ── The modes ──

    def fresh(self, streams: int, measured: bool) -> None:
        """Warm the server up and open the streams; memory, threads, descriptors and database connections before and after."""
        load, server = self.load, self.server
        self.open("warm", WARM)
        published = server.publish(5)
        load("until", groups=["warm"], last=published.last, timeout=CAP_SECONDS, quiet=QUIET_SECONDS)
        # One stays: what is there once for all streams (our hub with its connection and caches) is there before, too.
        load("leave", group="warm", count=WARM - 1)
        time.sleep(1)
        pids = [server.pid]
        before = (
            measure.rss(pids),
            measure.threads(pids),
            measure.descriptors(pids),
            server.database_connections(),
        )
        opened = self.open("main", streams)
        time.sleep(1)
        after = (
            measure.rss(pids),
            measure.threads(pids),
            measure.descriptors(pids),
            server.database_connections(),
        )
        if measured:
            self.figures["idle"] = {
                "kib_per_stream": round((after[0] - before[0]) / streams / 1024, 2),
                "threads_more": after[1] - before[1],
                "descriptors_more": after[2] - before[2] - streams,
                "database_connections": after[3],
                "open_seconds": opened["seconds"],
            }
        load("leave", group="warm")
        # Every client gets a first event, so each has a cursor to come back with.
        published = server.publish(1)
        load("until", groups=["main"], last=published.last, timeout=CAP_SECONDS, quiet=QUIET_SECONDS)

    def paced(self) -> Figures:
        """RATE events a second."""
        with self._measured("main") as figures:
            published = self.server.publish(max(1, int(RATE * self.options.seconds)), rate=RATE)
            self._until(published, figures)
        return figures

    def burst(self) -> Figures:
        """BURST events at once."""
        with self._measured("main") as figures:
            published = self.server.publish(BURST)
            self._until(published, figures)
        return figures

    def storm(self) -> Figures:
        """Everybody leaves, MISSED events are published, everybody comes back at once with a cursor."""
        left = self.load("leave", group="main")
        time.sleep(1)
        published = self.server.publish(MISSED)
        with self._measured("main") as figures:
            figures["without_cursor"] = left["without_cursor"]
            self._return(published, figures)
        return figures

    def restart(self) -> Figures:
        """The server is killed, MISSED events are published, it is started again, everybody comes back at once with a cursor."""
        self.server.stop(signal.SIGKILL)
        self.load("leave", group="main")
        published = self.server.publish(MISSED)
        self.server.start(self.server.port)
        with self._measured("main") as figures:
            self._return(published, figures)
        return figures

    def slow(self) -> Figures:
        """SLOW of the streams read at SLOW_BYTES_A_SECOND and STALLED not at all, while paced events and a burst come."""
        load, server = self.load, self.server
        streams = self.options.streams
        slow, stalled = max(1, min(SLOW, streams // 20)), max(1, min(STALLED, streams // 100))
        load("leave", group="main", count=slow + stalled)
        self.open("slow", slow, rate=SLOW_BYTES_A_SECOND, **LINE)
        self.open("stalled", stalled, rate=0, **LINE)
        before = measure.rss([server.pid])
        with self._measured("main") as figures:
            paced = server.publish(int(RATE * min(5, self.options.seconds)), rate=RATE, size=SLOW_PAYLOAD)
            published = server.publish(BURST, size=SLOW_PAYLOAD)
            published = dataclasses.replace(
                published, first=paced.first, commits=paced.commits | published.commits
            )
            self._until(published, figures)
        paced_alone = load(
            "report", groups=["main"], first=paced.first, last=paced.last, commits=paced.commits
        )
        figures["paced_latency_ms"] = paced_alone["latency_ms"]
        figures["grown_kib_per_slow"] = round(
            (measure.rss([server.pid]) - before) / (slow + stalled) / 1024, 1
        )
        # Now they read what they missed, as fast as it comes.
        load("rate", group="slow", rate=None)
        load("rate", group="stalled", rate=None)
        both = ["slow", "stalled"]
        load("until", groups=both, last=published.last, timeout=CAP_SECONDS, quiet=QUIET_SECONDS)
        figures["slow"] = load("report", groups=both, first=published.first, last=published.last)
        for name in both:
            load("leave", group=name)
        return figures

    # ── Their parts ──

    def open(self, group: str, count: int, **how: Any) -> Figures:
        server = self.server
        answer = self.load(
            "open", group=group, host="127.0.0.1", port=server.port, requests=server.requests(), count=count,
            ready=server.ready, timeout=60 + count / 100, **how,
        )  # fmt: skip
        if answer["open"] != count:
            raise Failed(
                f"{server.name}: {answer['open']} of {count} streams opened: {answer['failed']}\n{server.log()}"
            )
        return answer

    @contextlib.contextmanager
    def _measured(self, group: str) -> Iterator[Figures]:
        """CPU and counters over the block, and then the report on what it published (``_first`` to ``_last``)."""
        figures: Figures = {}
        counters = self.server.counters()
        with self.load.measured() as cost:
            alone, everything = self.server.cpu(), self.server.cpu_of_all()
            yield figures
            alone, everything = self.server.cpu() - alone, self.server.cpu_of_all() - everything
        first, last = figures.pop("_first"), figures.pop("_last")
        commits = figures.pop("_commits")
        report = self.load("report", groups=[group], first=first, last=last, commits=commits)
        # What comes twice was delivered once.
        delivered = max(1, report["expected"] - report["lost"])
        grown = {
            name: value - counters.get(name, 0.0)
            for name, value in self.server.counters().items()
            if value != counters.get(name, 0.0) and "_total" in name
        }
        figures |= report | {
            "cpu_us": round(alone / delivered / 1000, 3),
            "all_cpu_us": round(everything / delivered / 1000, 3),
            "generator": cost,
            "counters": grown,
        }

    def _note(self, published: Published, figures: Figures) -> None:
        figures |= {"_first": published.first, "_last": published.last, "_commits": published.commits}
        figures["collapsed"] = published.collapsed

    def _until(self, published: Published, figures: Figures) -> None:
        self._note(published, figures)
        seconds = 2 if published.collapsed else CAP_SECONDS
        answer = self.load(
            "until", groups=["main"], last=published.last, timeout=seconds, quiet=QUIET_SECONDS
        )
        figures["complete"] = answer["complete"]

    def _return(self, published: Published, figures: Figures) -> None:
        self._note(published, figures)
        answer = self.load(
            "come_back", group="main", port=self.server.port, last=published.last, timeout=CAP_SECONDS,
            quiet=CAP_SECONDS,
        )  # fmt: skip
        figures["complete"] = answer["complete"]
        figures["_began_ns"] = answer["began_ns"]


def scale(server: Server, options: Options) -> Figures:
    """The burst at ``options.many`` streams."""
    with Generator(options.many) as load, server.running():
        course = Course(server, options, load)
        course.fresh(options.many, True)
        return course.burst() | {"idle": course.figures["idle"]}


def one_run(server: Server, options: Options, given_up: set[str]) -> dict[str, Figures]:
    """``given_up``: modes that this server did not get done in an earlier run. They are not asked for again, and added to here."""
    with Generator(options.streams + WARM + SLOW + STALLED) as load, server.running():
        figures = Course(server, options, load, given_up).run()
    for figure in figures.values():
        began = figure.pop("_began_ns", None)
        if began is not None:
            figure["seconds"] = round((figure["last_at_ns"] - began) / 1e9, 3) if figure["complete"] else None
        figure.pop("last_at_ns", None)
    given_up |= {mode for mode, found in figures.items() if found.get("collapsed") or hopeless(mode, found)}
    return figures


def hopeless(mode: str, found: Figures) -> bool:
    """It lasts nearly as long as anything is waited for: once is enough."""
    if mode in ("storm", "restart") and not found["complete"]:
        return True
    return mode in ("burst", "storm", "restart") and (found["seconds"] or 0) > CAP_SECONDS / 2


def median(values: list[Any]) -> Any:
    """Of numbers their median, of mappings that of each value, of flags what most say, of anything else the last."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], dict):
        names = {name: None for value in known for name in value}
        return {name: median([value.get(name) for value in known]) for name in names}
    if isinstance(known[0], bool):
        return sum(known) * 2 > len(known)
    if isinstance(known[0], int | float):
        # A run that did not get there counts as longer than all that did.
        ordered = sorted(known) + [None] * (len(values) - len(known))
        middle = ordered[len(ordered) // 2]
        return statistics.median(known) if len(known) == len(values) else middle
    return known[-1]


def run(options: Options) -> dict[str, Any]:
    """All chosen servers, ``options.runs`` times in turn; the medians, and every single run."""
    started = time.monotonic()
    if "scale" in options.modes and raise_limit(options.many) < options.many:
        options = dataclasses.replace(options, many=raise_limit(options.many))
        say(
            f"the system allows no more open files than {options.many} streams need (ulimit -Hn): 'scale' has so many"
        )
    runs: dict[str, list[dict[str, Figures]]] = {}
    titles: dict[str, str] = {}
    left_out: dict[str, str] = {}
    loads: list[float] = []
    given_up: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory(prefix="switchboard-bench-") as folder, contextlib.ExitStack() as stack:
        # A server of another user (PostgreSQL, nginx's worker) must be able to come in.
        Path(folder).chmod(0o755)
        servers: list[Server] = []
        for kind in ALL:
            if options.only and kind.name not in options.only:
                continue
            say(f"preparing {kind.name}")
            server = kind(Path(folder), options.streams)
            try:
                server.prepare()
            except Missing as missing:
                left_out[kind.name] = str(missing)
                say(f"  {kind.name} is left out: {missing}")
                continue
            stack.callback(server.close)
            servers.append(server)
            titles[server.name] = server.title
        for number in range(options.runs):
            for server in list(servers):
                load = os.getloadavg()[0]
                loads.append(round(load, 2))
                say(
                    f"run {number + 1} of {options.runs}: {server.name} ({time.monotonic() - started:.0f} s, load {load:.1f})"
                )
                try:
                    figures = one_run(server, options, given_up.setdefault(server.name, set()))
                    if "scale" in options.modes and server.scales:
                        say(f"    burst at {options.many} streams")
                        figures["scale"] = scale(server, options)
                except (Failed, AssertionError, RuntimeError) as failed:
                    if server.ours:
                        raise
                    # A peer that cannot do it does not take the others' figures away.
                    left_out[server.name] = f"failed in run {number + 1}: {str(failed).splitlines()[0]}"
                    say(f"  {server.name} {left_out[server.name]}")
                    servers.remove(server)
                    continue
                runs.setdefault(server.name, []).append(figures)
    return {
        "streams": options.streams,
        "many": options.many,
        "runs": options.runs,
        "seconds": round(time.monotonic() - started),
        "load_averages": loads,
        "titles": titles,
        "left_out": left_out,
        "median": {name: median(each) for name, each in runs.items()},
        "each": runs,
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", type=int, default=1000, help="streams to hold (default: 1000)")
    parser.add_argument("--many", type=int, default=5000, help="streams of the mode 'scale' (default: 5000)")
    parser.add_argument(
        "--runs", type=int, default=3, help="the table shows the median of so many (default: 3)"
    )
    parser.add_argument("--seconds", type=float, default=10, help="length of the mode 'paced' (default: 10)")
    parser.add_argument(
        "--only",
        default="",
        metavar="A,B",
        help=f"servers: {', '.join(kind.name for kind in ALL)} (default: all)",
    )
    parser.add_argument(
        "--modes", default="", metavar="A,B", help=f"modes: {', '.join(MODES)} (default: all)"
    )


def options_of(chosen: argparse.Namespace) -> Options:
    """:raises SystemExit: for a name that is none."""
    only = tuple(name for name in chosen.only.split(",") if name)
    modes = tuple(name for name in chosen.modes.split(",") if name) or MODES
    for given, known in ((only, [kind.name for kind in ALL]), (modes, list(MODES))):
        for name in given:
            if name not in known:
                raise SystemExit(f"bench: {name!r} is none of {', '.join(known)}")
    if chosen.streams < 10 or chosen.runs < 1:
        raise SystemExit("bench: at least 10 streams and 1 run")
    return Options(
        streams=chosen.streams, many=chosen.many, runs=chosen.runs, seconds=chosen.seconds, only=only,
        modes=tuple(mode for mode in MODES if mode in modes),
    )  # fmt: skip
