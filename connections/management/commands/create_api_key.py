"""``manage.py create_api_key``"""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from connections import payloads, registry
from connections.management.commands import _shared


class Command(_shared.SwitchboardCommand):
    help = "Make an API key. It is shown this once; only its hash is kept."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--user", metavar="NAME", help="whose key it is (default: the first superuser)")
        parser.add_argument(
            "--name", default="command line", help="what to recognise the key by (%(default)s)"
        )
        self.add_json(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        user = _shared.owner(options["user"])
        row, plain = registry.create_api_key(owner_id=user.pk, name=options["name"], now=_shared.now())
        if options["json"]:
            self.print_json(
                {
                    "id": row.pk,
                    "name": row.name,
                    "user": user.get_username(),
                    "key": plain,
                    "created_at": payloads.timestamp(row.created_at),
                }
            )
            return
        # The key alone on standard output: KEY=$(manage.py create_api_key) works.
        self.stderr.write(f"API key {row.name!r} of {user.get_username()}; it is not shown again:")
        self.stdout.write(plain)
