"""``manage.py events_stats``: what is in the log, how fast it grows, and the live numbers of a running server."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, connection
from django.db.models import Count
from django.db.models.functions import TruncDate
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from events import log
from events.envelope import SIGNAL_NAMES
from events.models import Event

#: No query looks at more events than the newest so many; where that cut something off, the output says so.
SCAN_LIMIT = 1_000_000
DAYS = 7

#: The live numbers that people see; ``--json`` has all of them.
SHOWN = (
    "switchboard_streams_open",
    "switchboard_principal_streams",
    "switchboard_draining",
    "switchboard_hub_running",
    "switchboard_hub_lag_events",
    "switchboard_hub_lag_seconds",
    "switchboard_events_delivered_total",
    "switchboard_events_skipped_total",
    "switchboard_events_out_of_order_total",
    "switchboard_stream_fallbacks_total",
    "switchboard_streams_ended_total",
    "switchboard_streams_refused_total",
    "switchboard_wakes_missed_total",
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Day:
    """How many events of one name happened on a day (UTC)."""

    day: dt.date
    name: str
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """The log at one moment. ``count`` is a lower bound, and ``days`` lacks older events, when ``cut_off`` is set."""

    count: int
    cut_off: bool
    oldest: Event | None
    newest: Event | None
    newest_cursor: int
    pruned_through: int
    days: list[Day]
    last_minute: int
    last_hour: int
    table_bytes: int
    bytes_of: str
    retention_days: int


def stats(now: dt.datetime) -> Stats:
    """A few queries, each over at most SCAN_LIMIT events."""
    newest_cursor = log.newest()
    lately = Event.objects.filter(id__gt=newest_cursor - SCAN_LIMIT)
    count = lately.count()
    cut_off = Event.objects.filter(id__lte=newest_cursor - SCAN_LIMIT).exists()
    week = lately.filter(at__gte=now - dt.timedelta(days=DAYS))
    grouped = (
        # What server processes say to each other is no event that anybody asks about.
        week.exclude(name__in=SIGNAL_NAMES)
        .order_by()
        .annotate(day=TruncDate("at", tzinfo=dt.UTC))
        .values("day", "name")
        .annotate(n=Count("id"))
    )
    size, bytes_of = _size()
    return Stats(
        count=count,
        cut_off=cut_off,
        oldest=Event.objects.order_by("id").first(),
        newest=Event.objects.order_by("-id").first(),
        newest_cursor=newest_cursor,
        pruned_through=log.oldest_cursor(),
        days=[
            Day(day=row["day"], name=row["name"], count=row["n"]) for row in grouped.order_by("day", "name")
        ],
        last_minute=lately.filter(at__gte=now - dt.timedelta(minutes=1)).count(),
        last_hour=lately.filter(at__gte=now - dt.timedelta(hours=1)).count(),
        table_bytes=size,
        bytes_of=bytes_of,
        retention_days=settings.EVENT_RETENTION_DAYS,
    )


def _size() -> tuple[int, str]:
    """Bytes on disk, and of what: ``table`` (with its indexes), or ``database`` where SQLite cannot tell them apart."""
    table = Event._meta.db_table
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SELECT pg_total_relation_size(%s::regclass)", [table])
            return int(cursor.fetchone()[0]), "table"
        try:
            cursor.execute(
                "SELECT sum(pgsize) FROM dbstat WHERE aggregate = TRUE"
                " AND name IN (SELECT name FROM sqlite_master WHERE tbl_name = %s)",
                [table],
            )
            return int(cursor.fetchone()[0]), "table"
        except DatabaseError:
            # SQLite was built without this virtual table.
            return Path(str(connection.settings_dict["NAME"])).stat().st_size, "database"


def live(url: str, token: str) -> dict[str, float]:
    """What ``/metrics`` of a server says: ``name{label="value"}`` to number.

    :raises CommandError: it cannot be read.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        # A proxy of the environment would pass the question on as somebody else's.
        answer = httpx.get(f"{url.rstrip('/')}/metrics", headers=headers, timeout=10, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CommandError(f"{url} does not answer: {error}") from error
    if answer.status_code in (401, 403):
        raise CommandError(
            f"{url} does not show its numbers ({answer.status_code}): set METRICS_TOKEN as it is set for the server, "
            "or ask on its machine, past the proxy."
        )
    if answer.status_code != 200:
        raise CommandError(f"{url}/metrics answers {answer.status_code}.")
    found = {}
    try:
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                if not math.isfinite(sample.value):
                    # JSON has no word for it.
                    continue
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    except ValueError as error:
        raise CommandError(f"{url}/metrics is not in Prometheus' format: {error}") from error
    return found


def as_json(found: Stats, numbers: dict[str, float] | None) -> str:
    """One object; times in RFC 3339, sizes in bytes, rates in events."""

    def event(row: Event | None) -> dict[str, Any] | None:
        return None if row is None else {"id": row.id, "at": row.at.isoformat()}

    shape: dict[str, Any] = {
        "events": {
            "count": found.count,
            "cut_off": found.cut_off,
            "oldest": event(found.oldest),
            "newest": event(found.newest),
            "newest_cursor": found.newest_cursor,
            "pruned_through": found.pruned_through,
        },
        "days": [{"day": row.day.isoformat(), "event": row.name, "count": row.count} for row in found.days],
        "written": {"last_minute": found.last_minute, "last_hour": found.last_hour},
        "size": {"bytes": found.table_bytes, "of": found.bytes_of},
        "retention_days": found.retention_days,
    }
    if numbers is not None:
        shape["live"] = numbers
    return json.dumps(shape, ensure_ascii=False)


def as_text(found: Stats, numbers: dict[str, float] | None) -> list[str]:
    """The same for people."""
    more = "more than " if found.cut_off else ""
    whole = "the table with its indexes" if found.bytes_of == "table" else "the whole database file"
    rows = [
        ("events in the log", f"{more}{found.count:,}"),
        ("oldest", _event(found.oldest)),
        ("newest", _event(found.newest)),
        ("pruned through", f"#{found.pruned_through}" if found.pruned_through else "nothing pruned"),
        ("kept for", f"{found.retention_days} days (EVENT_RETENTION_DAYS)"),
        ("size", f"{_bytes(found.table_bytes)}, {whole}"),
        ("written", f"{found.last_minute:,} in the last minute, {found.last_hour:,} in the last hour"),
    ]
    lines = [f"{name:<18} {value}" for name, value in rows]
    if found.days:
        lines += ["", *_table(found.days)]
        if found.cut_off:
            lines.append(f"(of the newest {SCAN_LIMIT:,} events)")
    if numbers is not None:
        shown = [name for name in numbers if name.partition("{")[0] in SHOWN]
        width = max((len(name) for name in shown), default=0)
        lines += ["", "live", *(f"  {name:<{width}}  {_number(numbers[name])}" for name in shown)]
    return lines


def _table(days: Iterable[Day]) -> list[str]:
    """A row per name, a column per day, and the sums."""
    counts = {(row.name, row.day): row.count for row in days}
    names = sorted({name for name, _ in counts})
    dates = sorted({day for _, day in counts})
    width = max(len("event"), *map(len, names))
    lines = [f"{'event':<{width}}" + "".join(f"{day:%m-%d}".rjust(10) for day in dates) + "sum".rjust(11)]
    for name in [*names, "sum"]:
        cells = [
            sum(n for (each, on), n in counts.items() if on == day and name in (each, "sum")) for day in dates
        ]
        lines.append(f"{name:<{width}}" + "".join(f"{n:>10,}" for n in cells) + f"{sum(cells):>11,}")
    return lines


def _event(row: Event | None) -> str:
    return "-" if row is None else f"#{row.id}  {row.at.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


class Command(BaseCommand):
    # Django's checks load every page and its URLs, which this has no use for.
    requires_system_checks: list[str] = []
    help = (
        "Show what is in the log of events: how many, since when, which, how fast it grows and how large it is. "
        "With --url also what a running server says about its streams."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        parser.add_argument(
            "--url",
            metavar="URL",
            help="add the live numbers of the server at this address, such as http://127.0.0.1:8000: one server process, "
            "asked directly and not through the proxy; METRICS_TOKEN is sent when it is set",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        numbers = live(options["url"], settings.METRICS_TOKEN) if options["url"] else None
        found = stats(timezone.now())
        if options["json"]:
            self.stdout.write(as_json(found, numbers))
        else:
            self.stdout.write("\n".join(as_text(found, numbers)))
