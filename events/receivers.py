"""What happens when a verb tells: what changed is appended to the log, in the same transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.dispatch import receiver

from events import log
from events.envelope import Change
from events.signals import status_changed


@receiver(status_changed, dispatch_uid="events.append_to_log")
def append_to_log(sender: Any, *, changes: Sequence[Change], **kwargs: Any) -> None:
    log.append_all(changes)
