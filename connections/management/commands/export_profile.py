"""``manage.py export_profile``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError, CommandParser

from connections import registry
from connections.management.commands import _shared


class Command(_shared.SwitchboardCommand):
    help = (
        "Print the saved state of a profile as Playwright's storage_state (JSON). "
        "Whoever has it is logged in: keep it like a password."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("profile", help="name, or id (prof_…)")
        parser.add_argument(
            "--output", metavar="FILE", type=Path, help="write it to a file of mode 0600 instead"
        )
        parser.add_argument(
            "--user", metavar="NAME", help="the owner, where several have a profile of that name"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        profile = _shared.find_profile(options["profile"], options["user"])
        with _shared.said_plainly():
            state = registry.profile_state(profile)
        if state is None:
            raise CommandError(f"Nothing is saved in {profile.name!r}: no login with it succeeded yet.")
        text = json.dumps(state, indent=2, ensure_ascii=False)
        if options["output"] is None:
            self.stdout.write(text)
            return
        _shared.write_private(options["output"], text + "\n")
        self.stderr.write(f"{options['output']} written (mode 0600).")
