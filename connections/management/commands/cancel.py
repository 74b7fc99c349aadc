"""``manage.py cancel``"""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from connections import payloads, transitions
from connections.management.commands import _shared
from connections.states import FlowStatus


class Command(_shared.SwitchboardCommand):
    help = "Cancel the running login of a connection. Without one nothing changes."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("connection", help="id (ma_…) or domain/profile")
        parser.add_argument(
            "--reason", default="Canceled on the command line.", help="shown to whoever watches it"
        )
        self.add_json(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        row = _shared.find_connection(options["connection"])
        running = row.flows.filter(status=FlowStatus.IN_PROGRESS).exists()
        with _shared.said_plainly():
            transitions.cancel(
                connection_id=row.id, actor=self.actor, reason=options["reason"], now=_shared.now()
            )
        row.refresh_from_db()
        flow = row.latest_flow()
        if options["json"]:
            self.print_json(payloads.managed_auth(row, flow))
        elif running and flow is not None:
            self.stdout.write(f"Login {flow.number} of {row} is {flow.get_status_display().lower()} now.")
        else:
            self.stdout.write(f"No login of {row} was running.")
