"""``manage.py rotate_keys``"""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import CommandError, CommandParser
from django.db import models

from connections import vault
from connections.management.commands import _shared

BATCH = 200

HOW = """\
Encrypt every stored secret anew under the first encryption key.

1. Make a key:   python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"
2. Put it first: as the first line of DATA_DIR/encryption.key, or first in ENCRYPTION_KEYS=new,old
3. Restart server and worker, so that both read and write with it.
4. Run this command, then `manage.py doctor`.
5. Remove the old key and restart again.
"""


def reseal_column(model: type[models.Model], column: str) -> tuple[int, list[str]]:
    """Write one sealed column anew. Returns how many rows were written, and the keys of those that no key opens.

    A row that somebody else writes meanwhile is left alone: they encrypted it under the first key already.
    """
    written = 0
    unreadable: list[str] = []
    rows = model._default_manager.exclude(**{column: None}).order_by("pk")
    last: Any = None
    while True:
        batch = list(
            (rows.filter(pk__gt=last) if last is not None else rows).values_list("pk", column)[:BATCH]
        )
        if not batch:
            return written, unreadable
        for pk, old in batch:
            last = pk
            try:
                new = vault.reseal(old)
            except vault.VaultError:
                unreadable.append(str(pk))
                continue
            written += model._default_manager.filter(pk=pk, **{column: bytes(old)}).update(**{column: new})


class Command(_shared.SwitchboardCommand):
    help = "Encrypt every stored secret anew under the first encryption key (after a new key was put first)."

    def add_arguments(self, parser: CommandParser) -> None:
        self.add_json(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        if len(settings.ENCRYPTION_KEYS) < 2:
            raise CommandError(
                "There is one encryption key only, so there is nothing to change to.\n\n" + HOW
            )
        counts: dict[str, int] = {}
        unreadable: list[str] = []
        for model, column in _shared.SEALED_COLUMNS:
            name = f"{model._meta.object_name}.{column}"
            counts[name], failed = reseal_column(model, column)
            unreadable += [f"{name} {pk}" for pk in failed]
            if not options["json"]:
                self.stdout.write(f"{name:<28} {counts[name]:>8} encrypted anew")
        if options["json"]:
            self.print_json({"resealed": counts, "unreadable": unreadable})
        if unreadable:
            raise CommandError(
                f"{len(unreadable)} stored secrets cannot be read with any key and were left alone: "
                + ", ".join(unreadable[:20])
                + ". Do not remove a key before these are explained."
            )
        if not options["json"]:
            self.stdout.write("Done. The old key can be removed once `manage.py doctor` finds nothing wrong.")
