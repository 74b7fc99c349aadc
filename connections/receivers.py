"""What is done when rows of other apps go. Imported when the apps are ready (events.apps)."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models.signals import pre_delete
from django.dispatch import receiver

from connections.models import ManagedAuthConnection, Task
from events import clients


@receiver(pre_delete, sender=settings.AUTH_USER_MODEL, dispatch_uid="connections.owner_leaves")
def owner_leaves(sender: Any, instance: Any, **kwargs: Any) -> None:
    """A user is deleted, and what is theirs goes along. It is locked first, in the order of all verbs: connection → task → client → claim."""
    with transaction.atomic():
        for model in (ManagedAuthConnection, Task):
            list(model.objects.select_for_update().filter(owner=instance.pk).order_by("pk").values_list("pk"))
        clients.close_all(instance.pk)
