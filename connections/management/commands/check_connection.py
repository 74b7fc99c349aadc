"""``manage.py check_connection``: a health check now, and what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError, CommandParser

from connections import payloads, transitions
from connections.management.commands import _shared, _worker
from connections.models import HealthCheck, ManagedAuthConnection, Task
from connections.states import ConnectionStatus, FlowType, TaskStatus


class Command(_shared.SwitchboardCommand):
    help = (
        "Look whether a profile is still signed in to its site, and wait for the result. Where the session is lost and can be had again "
        "without a person, a re-authentication begins. Exit code 1 when it is not signed in, 2 when that could not be told."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("connection", help="id (ma_…) or domain/profile")
        parser.add_argument(
            "--worker", action="store_true", help="do the work here too; no other worker is needed"
        )
        parser.add_argument("--no-wait", action="store_true", help="queue the check and leave")
        parser.add_argument(
            "--timeout", type=float, default=120.0, help="seconds to wait for the result (default 120)"
        )
        self.add_json(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        row = _shared.find_connection(options["connection"])
        with _shared.said_plainly():
            task = transitions.request_check(connection_id=row.id, actor=self.actor, now=_shared.now())
        if options["no_wait"]:
            if options["json"]:
                self.print_json({"task": payloads.task(task)})
            else:
                self.stdout.write(f"A check of {row} is queued ({task.id}).")
            return
        with _worker.beside(wanted=options["worker"]) as check_worker:
            task = self._wait(task, options["timeout"], check_worker)
        row.refresh_from_db()
        assert task.finished_at is not None, "it is over"
        # Both were written in one transaction, under one time.
        check = HealthCheck.objects.filter(connection=row, checked_at=task.finished_at).first()
        if task.status != TaskStatus.COMPLETED or check is None:
            raise CommandError(
                f"The check did not come to its end: {task.error or task.get_status_display().lower()}."
            )
        if options["json"]:
            self._print(row, task, check)
        else:
            self._tell(row, check)
        if check.status != ConnectionStatus.AUTHENTICATED:
            sys.exit(2 if check.status is None else 1)

    def _wait(self, task: Task, seconds: float, check_worker: Callable[[], None]) -> Task:
        end = time.monotonic() + seconds
        while True:
            check_worker()
            found = Task.objects.filter(pk=task.pk).first()
            if found is None:
                raise CommandError("The check was deleted meanwhile.")
            if found.is_over:
                return found
            if time.monotonic() > end:
                raise CommandError(
                    f"No result within {seconds:g} s; the check is {found.get_status_display().lower()} "
                    f"({task.id}). Is a worker running? `manage.py run_worker`, or --worker."
                )
            time.sleep(settings.POLL_SECONDS)

    def _print(self, row: ManagedAuthConnection, task: Task, check: HealthCheck) -> None:
        results = {ConnectionStatus.AUTHENTICATED: "signed_in", ConnectionStatus.NEEDS_AUTH: "signed_out"}
        self.print_json(
            {
                "result": results[ConnectionStatus(check.status)] if check.status else "unclear",
                "reason": check.reason or None,
                "check": payloads.timeline_check(check),
                "task": payloads.task(task),
                "connection": payloads.managed_auth(row, row.latest_flow()),
            }
        )

    def _tell(self, row: ManagedAuthConnection, check: HealthCheck) -> None:
        if check.status is None:
            self.stdout.write(f"{row}: that could not be told. {check.reason}")
            return
        if check.status == ConnectionStatus.AUTHENTICATED:
            self.stdout.write(f"{row} is signed in.")
            return
        self.stdout.write(f"{row} is not signed in any more.")
        flow = row.latest_flow()
        if flow is not None and flow.type == FlowType.REAUTH and flow.started_at >= check.checked_at:
            self.stdout.write("It is being signed in again with what is stored.")
        else:
            self.stdout.write(f"Sign in: manage.py login {row.id}")
