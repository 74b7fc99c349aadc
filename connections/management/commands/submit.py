"""``manage.py submit``"""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser

from connections import payloads, transitions
from connections.management.commands import _asking, _shared
from connections.transitions import FlowOver, SubmittedAnswer


class Command(_shared.SwitchboardCommand):
    help = (
        "Answer what the site asks right now. Without --field and --choice the values are asked for in the terminal. "
        "Passwords are never taken from the command line: other users of this machine could read them there."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("connection", help="id (ma_…) or domain/profile")
        parser.add_argument(
            "--field",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a value, by the field's name or id; NAME=- reads it from standard input (one field; needed for secrets)",
        )
        parser.add_argument("--choice", metavar="NUMBER", help="one of the choices, by number or id")
        self.add_json(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        row = _shared.find_connection(options["connection"])
        transitions.expire_if_due(connection_id=row.id, now=_shared.now())
        flow = row.latest_flow()
        with _shared.said_plainly():
            if flow is None or flow.is_over:
                raise FlowOver(flow)
        question = _asking.interaction_of(flow)
        if question is None:
            raise CommandError(f"Nothing is being asked right now ({flow.get_step_display().lower()}).")
        answer = self._answer(question, options["field"], options["choice"])
        with _shared.said_plainly():
            flow = transitions.submit(
                connection_id=row.id, answer=answer, actor=self.actor, now=_shared.now(), flow_id=flow.id
            )
        if options["json"]:
            self.print_json(payloads.managed_auth(row, flow))
        else:
            self.stdout.write("Accepted. `manage.py follow` shows what comes of it.")

    def _answer(
        self, question: _asking.Interaction, fields: list[str], choice: str | None
    ) -> SubmittedAnswer:
        if choice is not None:
            if fields:
                raise CommandError("Either --field or --choice.")
            choice_id = _asking.pick_choice(question, choice)
            if choice_id is None:
                offered = "\n".join(
                    _asking.choice_line(n, c) for n, c in enumerate(question.choices, start=1)
                )
                raise CommandError(f"There is no choice {choice!r}. Offered:\n{offered or '  nothing'}")
            return SubmittedAnswer(interaction_id=question.id, choice_id=choice_id)
        if not fields:
            if question.website_error:
                self.stdout.write(f"The site says: {question.website_error}")
            try:
                return _asking.ask(question, self.stdout.write)
            except EOFError:
                raise CommandError("There is nobody to ask: give the values with --field NAME=-.") from None
        values: dict[str, str] = {}
        if sum(text.partition("=")[2] == "-" for text in fields) > 1:
            raise CommandError("Only one value can come from standard input.")
        for text in fields:
            name, equals, value = text.partition("=")
            if not equals:
                # Without a value it may be one that slipped in: not repeated.
                raise CommandError("--field wants NAME=VALUE, or NAME=- for standard input.")
            field = _asking.field_named(question, name)
            if value == "-":
                value = _shared.read_stdin()
            elif _asking.is_secret(field):
                raise CommandError(
                    f"{field['label']} is a secret and is not taken from the command line. Pipe it in with "
                    f"--field {name}=-, or leave --field out and be asked. Change it if it was a real one: it is in "
                    "your shell's history now."
                )
            values[str(field["id"])] = value
        return SubmittedAnswer(interaction_id=question.id, field_values=values)
