"""``manage.py run_reconciler``: the sweeps without a worker."""

from __future__ import annotations

import json
import threading
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand
from django.utils import timezone

from connections import reconciler

STEP_SECONDS = 5.0


class Command(BaseCommand):
    help = (
        "Expire flows and questions, rescue tasks of dead workers, prune the log. Every worker does this as well; "
        "run it by itself where no worker runs, or once from a timer."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--once", action="store_true", help="one pass, then stop")
        parser.add_argument("--json", action="store_true", help="print what each sweep changed as JSON")

    def handle(self, *args: Any, once: bool, **options: Any) -> None:
        pause = threading.Event()
        while True:
            done = reconciler.run(reconciler.URGENT + reconciler.LEISURELY, now=timezone.now())
            if options["json"]:
                self.stdout.write(json.dumps(done))
            elif once or any(done.values()):
                self.stdout.write(", ".join(f"{name}: {count}" for name, count in done.items()))
            if once:
                return
            pause.wait(STEP_SECONDS)
