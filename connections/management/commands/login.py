"""``manage.py login``: a whole login in the terminal."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError, CommandParser

from connections import payloads, transitions
from connections.management.commands import _asking, _shared, _worker
from connections.models import LoginFlow, ManagedAuthConnection, Task
from connections.states import FlowStatus, FlowStep, TaskStatus
from events import log
from events.envelope import topic_of

#: Seconds that a task may wait for a worker before somebody should be told.
NO_WORKER_SECONDS = 3.0

SAID = {
    FlowStep.DISCOVERING: "looking at the site",
    FlowStep.AWAITING_INPUT: "the site asks for something",
    FlowStep.AWAITING_EXTERNAL_ACTION: "waiting for something done elsewhere",
    FlowStep.AWAITING_HUMAN_INTERVENTION: "waiting for somebody in the browser itself",
    FlowStep.SUBMITTING: "submitting",
}


class Command(_shared.SwitchboardCommand):
    help = (
        "Log in to a site in the terminal: shows each step as it happens and asks for what the site wants. "
        "Ctrl-C cancels the login (or leaves it running, with --keep). Exit code 1 when the login did not succeed."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("connection", help="id (ma_…) or domain/profile")
        parser.add_argument(
            "--worker", action="store_true", help="do the work here too; no other worker is needed"
        )
        parser.add_argument("--keep", action="store_true", help="Ctrl-C leaves the login running")

    def handle(self, *args: Any, **options: Any) -> None:
        row = _shared.find_connection(options["connection"])
        cursor = log.newest()
        with _shared.said_plainly():
            flow, code = transitions.start_login(connection_id=row.id, actor=self.actor, now=_shared.now())
        self.stdout.write(f"Logging in to {row.domain} as {row.profile.name}")
        self.stdout.write(f"In the browser instead: {payloads.hosted_url(row.id, code)}")
        try:
            with _worker.beside(wanted=options["worker"]) as check_worker:
                over = self._attend(row, flow, cursor, hint=not options["worker"], check_worker=check_worker)
        except (KeyboardInterrupt, EOFError) as error:
            self._leave(row, keep=options["keep"], asked=isinstance(error, KeyboardInterrupt))
            return
        self._report(over)

    def _attend(
        self,
        row: ManagedAuthConnection,
        flow: LoginFlow,
        cursor: int,
        *,
        hint: bool,
        check_worker: Callable[[], None],
    ) -> LoginFlow:
        """Show and ask until the flow is over; returns it."""
        asked = ""
        started = time.monotonic()
        while True:
            check_worker()
            transitions.expire_if_due(connection_id=row.id, now=_shared.now())
            flow.refresh_from_db()
            # After the look at the flow, so that nothing is asked before the step that it belongs to was shown.
            cursor = self._show(flow, cursor)
            if flow.is_over:
                return flow
            if hint and time.monotonic() - started > NO_WORKER_SECONDS:
                hint = False
                if Task.objects.filter(flow=flow, status=TaskStatus.QUEUED).exists():
                    self.stdout.write(
                        self.style.WARNING(
                            "No worker seems to be running: nobody has taken the login. Start one with "
                            "`manage.py run_worker`, or come again with --worker."
                        )
                    )
            question = _asking.interaction_of(flow)
            if question is None or question.id == asked:
                time.sleep(settings.POLL_SECONDS)
                continue
            if flow.step == FlowStep.AWAITING_EXTERNAL_ACTION and not self._wants_fallback(question):
                continue
            asked = question.id
            if question.website_error:
                self.stdout.write(self.style.WARNING(f"The site says: {question.website_error}"))
            self._put(row, flow, question)

    def _show(self, flow: LoginFlow, cursor: int) -> int:
        """Print the steps of this flow that the log has got since ``cursor``; returns the new cursor."""
        for event in log.read(cursor):
            cursor = event.id
            if event.name != "flow.state" or event.topic != topic_of("connection", flow.connection_id):
                continue
            if (
                event.data.get("flow_id") != flow.id
                or event.data.get("flow_status") != FlowStatus.IN_PROGRESS
            ):
                continue
            step = FlowStep(event.data["flow_step"])
            text = event.data.get("external_action_message") or SAID.get(step, step.label.lower())
            self.stdout.write(f"{event.at.astimezone():%H:%M:%S}  {text}")
            if event.data.get("live_view_url"):
                self.stdout.write(f"          {event.data['live_view_url']}")
        return cursor

    def _wants_fallback(self, question: _asking.Interaction) -> bool:
        """While the site waits for an approval elsewhere nobody is held at a prompt: Enter asks for the other ways."""
        if question.id != getattr(self, "_offered", None):
            self._offered = question.id
            self.stdout.write("          (press Enter for another way)")
        ready, _, _ = select.select([sys.stdin], [], [], settings.POLL_SECONDS)
        return bool(ready and sys.stdin.readline())

    def _put(self, row: ManagedAuthConnection, flow: LoginFlow, question: _asking.Interaction) -> None:
        answer = _asking.ask(question, self.stdout.write)
        try:
            transitions.submit(
                connection_id=row.id, answer=answer, actor=self.actor, now=_shared.now(), flow_id=flow.id
            )
        except (transitions.StaleInteraction, transitions.InvalidSubmission) as error:
            # Somebody answered on the hosted page meanwhile, for instance: the next look shows what is asked now.
            self.stdout.write(self.style.WARNING(str(error)))
        except transitions.FlowOver:
            return

    def _leave(self, row: ManagedAuthConnection, *, keep: bool, asked: bool) -> None:
        self.stdout.write("")
        if keep:
            self.stdout.write(f"The login goes on: manage.py submit {row.id}, or manage.py cancel {row.id}")
            return
        if asked and sys.stdin.isatty():
            try:
                if input("Cancel this login? [Y/n] ").strip().lower() in ("n", "no"):
                    self.stdout.write(f"It goes on: manage.py submit {row.id}, or manage.py cancel {row.id}")
                    return
            except (KeyboardInterrupt, EOFError):
                self.stdout.write("")
        with _shared.said_plainly():
            transitions.cancel(
                connection_id=row.id, actor=self.actor, reason="Canceled in the terminal.", now=_shared.now()
            )
        raise CommandError("The login was canceled.", returncode=130 if asked else 1)

    def _report(self, flow: LoginFlow) -> None:
        if flow.status == FlowStatus.SUCCESS:
            self.stdout.write(self.style.SUCCESS("Logged in. The profile keeps the session."))
            return
        why = flow.error_message or flow.website_error or flow.get_status_display()
        code = f" ({flow.error_code})" if flow.error_code else ""
        raise CommandError(f"Not logged in: {flow.get_status_display().lower()}. {why}{code}")
