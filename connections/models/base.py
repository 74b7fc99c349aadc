"""What all rows share: ids, owners, and who sees what."""

from __future__ import annotations

import secrets
from typing import Any, Protocol

from django.conf import settings
from django.db import models
from django.db.models.functions import Length

models.CharField.register_lookup(Length)

OPERATE = "connections.operate_managedauthconnection"
RUN_COMMANDS = "connections.run_commands"


def new_id(prefix: str) -> str:
    """An opaque id such as ``ma_5f0c…``: 96 random bits, so it tells nothing and is never guessed."""
    return f"{prefix}_{secrets.token_hex(12)}"


def connection_id() -> str:
    return new_id("ma")


def credential_id() -> str:
    return new_id("cred")


def profile_id() -> str:
    return new_id("prof")


def flow_id() -> str:
    return new_id("flow")


def task_id() -> str:
    return new_id("task")


def check_id() -> str:
    return new_id("check")


def delivery_id() -> str:
    return new_id("msg")


class Caller(Protocol):
    """What a read needs to know of whoever asks: the keys of the owners whose objects they see; None: everybody's."""

    @property
    def audiences(self) -> frozenset[int] | None: ...


class OwnedQuerySet(models.QuerySet[Any]):
    """Rows that have an owner. Every read on somebody's behalf starts with :meth:`visible_to`."""

    def visible_to(self, principal: Caller) -> OwnedQuerySet:
        """What this caller may see: their own and their team's; everything for a superuser."""
        if principal.audiences is None:
            return self
        return self.filter(owner_id__in=principal.audiences)


class Owned(models.Model):
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    created_at = models.DateTimeField()
    updated_at = models.DateTimeField()

    objects = OwnedQuerySet.as_manager()

    class Meta:
        abstract = True
