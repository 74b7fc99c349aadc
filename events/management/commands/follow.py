"""``manage.py follow``: the log in the terminal, as it happens."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from events import log
from events.envelope import Interest, parse_topics
from events.models import Event

BATCH = 500


def next_events(cursor: int, interest: Interest) -> tuple[list[Event], int]:
    """What the log has got since ``cursor`` and ``interest`` wants, and the cursor to go on from."""
    rows = log.read(cursor, BATCH)
    if rows:
        cursor = rows[-1].id
    return [row for row in rows if interest.wants(row.topic, row.audience)], cursor


def as_json(event: Event) -> str:
    """One line of JSON."""
    return json.dumps(
        {
            "id": event.id,
            "event": event.name,
            "topic": event.topic,
            "actor": event.actor,
            "data": event.data,
        },
        ensure_ascii=False,
    )


def as_text(event: Event) -> str:
    """One line for people: time, cursor, name, topic, the states that it tells, who did it."""
    states = [
        str(event.data[key])
        for key in ("status", "flow_status", "flow_step", "error_code")
        if event.data.get(key) not in (None, "")
    ]
    line = (
        f"{event.at.astimezone():%H:%M:%S} #{event.id:<6} {event.name:<20} {event.topic}  {' '.join(states)}"
    )
    return f"{line}  ({event.actor})" if event.actor else line


class Command(BaseCommand):
    # Django's checks load every page and its URLs, which this has no use for.
    requires_system_checks: list[str] = []
    help = "Show events of the log as they happen, until Ctrl-C."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--after",
            type=int,
            metavar="CURSOR",
            help="begin after this event (0: from the beginning; default: now)",
        )
        parser.add_argument(
            "--topics",
            default="",
            help="comma separated: connections, tasks, clients, or kind:id such as connection:ma_1 (default: all)",
        )
        parser.add_argument("--count", type=int, metavar="N", help="stop after N events")
        parser.add_argument("--json", action="store_true", help="one line of JSON per event")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            interest = Interest(topics=parse_topics(options["topics"]))
        except ValueError as error:
            raise CommandError(str(error)) from error
        cursor = self._start(options["after"])
        show = as_json if options["json"] else as_text
        left = options["count"]
        try:
            while left is None or left > 0:
                events, following = next_events(cursor, interest)
                for event in events[:left]:
                    self.stdout.write(show(event))
                    self.stdout.flush()
                if left is not None:
                    left -= len(events[:left])
                if following == cursor:
                    time.sleep(settings.POLL_SECONDS)
                cursor = following
        except KeyboardInterrupt:
            self.stderr.write(f"Go on from here: manage.py follow --after {cursor}")
        except BrokenPipeError:
            # Whoever read (head, less) has seen enough. What is still buffered goes nowhere when Python ends.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def _start(self, after: int | None) -> int:
        """The cursor to begin with; says so when it cannot be the wanted one."""
        newest = log.newest()
        if after is None:
            return newest
        if after < 0 or after > newest:
            raise CommandError(f"There is no event {after} yet: the newest is {newest}.")
        oldest = log.oldest_cursor()
        if after < oldest:
            self.stderr.write(f"Events up to {oldest} were pruned; this begins after them.")
            return oldest
        return after
