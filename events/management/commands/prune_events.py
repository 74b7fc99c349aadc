"""``manage.py prune_events``"""

from __future__ import annotations

import argparse
import datetime as dt
import json
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser
from django.utils import timezone
from django.utils.dateparse import parse_date, parse_datetime

from events import log

#: From so many deleted rows on their space is made usable at once; below, autovacuum does it in its time.
VACUUM_ROWS = 5_000


def moment(text: str) -> dt.datetime:
    """A date or an RFC 3339 time; without a zone it is UTC."""
    try:
        found = parse_datetime(text)
        day = parse_date(text) if found is None else None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date that exists") from error
    if day is not None:
        found = dt.datetime(day.year, day.month, day.day, tzinfo=dt.UTC)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2026-01-31 or 2026-01-31T12:00:00Z")
    return found if found.tzinfo else found.replace(tzinfo=dt.UTC)


def days(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("a number of days, 0 or more")
    return number


class Command(BaseCommand):
    # Django's checks load every page and its URLs, which this has no use for.
    requires_system_checks: list[str] = []
    help = "Delete old events from the log. Streams that want to continue from before them are told to read the state again."

    def add_arguments(self, parser: CommandParser) -> None:
        which = parser.add_mutually_exclusive_group()
        which.add_argument(
            "--days",
            type=days,
            default=settings.EVENT_RETENTION_DAYS,
            help="keep this many days (default: EVENT_RETENTION_DAYS, now %(default)s)",
        )
        which.add_argument(
            "--before", type=moment, metavar="TIME", help="delete what happened before this time"
        )
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")

    def handle(self, *args: Any, **options: Any) -> None:
        before = options["before"] or timezone.now() - dt.timedelta(days=options["days"])
        count = log.prune_all(before)
        if count >= VACUUM_ROWS:
            log.vacuum()
        if options["json"]:
            self.stdout.write(json.dumps({"pruned": count, "before": before.isoformat()}))
        else:
            self.stdout.write(f"{count} events from before {before:%Y-%m-%d %H:%M:%S %Z} deleted.")
