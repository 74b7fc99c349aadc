"""``manage.py clients``: who is connected, and disconnecting one."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from events import clients
from events.models import Client
from events.states import CLIENT_KEEPS, ClientState

DEFAULT_REASON = "disconnected on the command line"
#: At most so many are listed.
LIMIT = 1000


def state_of(row: Client, now: dt.datetime) -> str:
    """In words; a lease that ran out and was not found yet is not live."""
    if row.state == ClientState.LIVE and not clients.seems_live(row, now):
        return "lost contact"
    return str(ClientState(row.state).label).lower()


def ago(moment: dt.datetime | None, now: dt.datetime) -> str:
    """``12 s``, ``38 min``, ``5 h``, ``3 d``; ``-`` for never."""
    if moment is None:
        return "-"
    seconds = max(0, int((now - moment).total_seconds()))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _printable(text: str) -> str:
    """Names and paths come from outside: a terminal must not take them for commands."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _storable(text: str) -> bool:
    """Bytes on the command line that are no UTF-8 arrive as lone surrogates, which no database takes; NUL PostgreSQL does not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def table(rows: list[Client], now: dt.datetime) -> list[str]:
    heads = ("WHO", "STATE", "PAGE", "CONNECTED", "SEEN", "LAG", "ID")
    lines = [
        (
            _printable(row.who)[:40],
            state_of(row, now),
            _printable(row.path)[:50] or "-",
            ago(row.opened_at, now),
            ago(row.last_seen_at, now),
            str(clients.lag(row, now)),
            row.cid,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *lines]
    ]


class Command(BaseCommand):
    # Django's checks load every page and its URLs, which this has no use for.
    requires_system_checks: list[str] = []
    help = (
        "List the clients: browser tabs and programs with a stable id. Without a filter those that are there or expected back. "
        "With --disconnect end the stream of one; its page shows the reason and does not come back until it is reloaded."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--user", metavar="NAME", help="only clients of this user")
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--state", choices=ClientState.values, help="only clients in this state")
        which.add_argument(
            "--all",
            action="store_true",
            help="also those that expired or were disconnected (kept for an hour)",
        )
        which.add_argument("--disconnect", metavar="CID", help="disconnect the client with this id (cid-…)")
        parser.add_argument(
            "--reason",
            default=DEFAULT_REASON,
            help="shown on the page that is disconnected (default: %(default)r)",
        )
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")

    def handle(self, *args: Any, **options: Any) -> None:
        for name in ("user", "reason"):
            if not _storable(options[name] or ""):
                raise CommandError(f"--{name} is no text in UTF-8.")
        rows = Client.objects.filter(epoch__gt=0).select_related("owner")
        if options["user"] is not None:
            rows = rows.filter(owner__username=options["user"])
        if options["disconnect"] is not None:
            self._disconnect(rows, options)
            return
        if options["state"]:
            rows = rows.filter(state=options["state"])
        elif not options["all"]:
            rows = rows.filter(state__in=CLIENT_KEEPS)
        found = list(rows.order_by("-last_seen_at", "-pk")[: LIMIT + 1])
        now = clients.database_now()
        shown = found[:LIMIT]
        if options["json"]:
            self.stdout.write(json.dumps([self._picture(row, now) for row in shown], indent=2))
        elif shown:
            self.stdout.write("\n".join(table(shown, now)))
        else:
            self.stdout.write("No client.")
        if len(found) > LIMIT:
            self.stderr.write(f"There are more than {LIMIT}: name a --user or a --state.")

    def _picture(self, row: Client, now: dt.datetime) -> dict[str, Any]:
        more = {"seems_live": clients.seems_live(row, now), "lag": clients.lag(row, now)}
        return {**clients.picture(row), "owner": row.owner.get_username(), **more}

    def _disconnect(self, rows: Any, options: dict[str, Any]) -> None:
        try:
            cid = clients.normal_cid(options["disconnect"])
        except ValueError as error:
            raise CommandError(str(error)) from error
        found = list(rows.filter(cid=cid)[:10])
        if not found:
            raise CommandError(f"There is no client {cid}.")
        if len(found) > 1:
            names = ", ".join(sorted(row.owner.get_username() for row in found))
            raise CommandError(f"Several users have a client {cid}: name one with --user ({names}).")
        row = found[0]
        done = clients.close(
            pk=row.pk, reason=options["reason"].strip()[:200] or DEFAULT_REASON, actor="command clients"
        )
        if options["json"]:
            row.refresh_from_db()
            self.stdout.write(
                json.dumps({"disconnected": done, **self._picture(row, clients.database_now())}, indent=2)
            )
        elif done:
            self.stdout.write(f"{_printable(row.who)} ({cid}) was disconnected.")
        else:
            self.stdout.write(f"{_printable(row.who)} ({cid}) was gone already: nothing was changed.")
