"""What the commands have in common: who acts, which object is meant, how errors and JSON are said."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import models
from django.utils import timezone

from connections import access, commands, hooks, inputs, payloads, task_inputs, tasks, transitions, vault
from connections.access import Principal
from connections.errors import ApiError, translate
from connections.models import (
    Credential,
    IdempotentAnswer,
    LoginFlow,
    ManagedAuthConnection,
    Profile,
    Submission,
    Task,
    TaskInput,
)
from connections.tasks import InvalidTransition

#: Every column that holds something encrypted by the vault. A new one has to be added here, or a key rotation forgets it.
SEALED_COLUMNS: tuple[tuple[type[models.Model], str], ...] = (
    (Profile, "state"),
    (Credential, "values"),
    (Credential, "totp_secret"),
    (LoginFlow, "handoff_sealed"),
    (Submission, "sealed"),
    (TaskInput, "sealed"),
    (Task, "hook_sealed"),
    (IdempotentAnswer, "sealed"),
)


class SwitchboardCommand(BaseCommand):
    """A command that acts as ``command <name>`` and prints JSON when asked to."""

    # Django's checks load every page and its URLs, which a command has no use for.
    requires_system_checks: list[str] = []

    def add_json(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")

    @property
    def actor(self) -> Principal:
        """Whoever may run commands on this machine may do everything; the log says which command it was."""
        return access.of_system(f"command {type(self).__module__.rpartition('.')[2]}")

    def print_json(self, value: Any) -> None:
        self.stdout.write(json.dumps(value, indent=2, ensure_ascii=False))


def now() -> dt.datetime:
    return timezone.now()


def owner(name: str | None) -> User:
    """The user called ``name``; without a name the first superuser.

    :raises CommandError: there is none.
    """
    users = get_user_model().objects.filter(is_active=True)
    if name is not None:
        found = users.filter(username=name).first()
        if found is None:
            raise CommandError(f"There is no active user {name!r}.")
        return found
    first = users.filter(is_superuser=True).order_by("pk").first()
    if first is None:
        raise CommandError(
            "There is no superuser yet: name an owner with --user, or run `manage.py createsuperuser`."
        )
    return first


def find_connection(text: str) -> ManagedAuthConnection:
    """A connection by its id (``ma_…``) or as ``domain/profile``.

    :raises CommandError: there is none, or ``domain/profile`` means several.
    """
    rows = ManagedAuthConnection.objects.select_related("profile", "credential")
    found = rows.filter(pk=text).first()
    if found is not None:
        return found
    domain, slash, profile = text.partition("/")
    matches = list(rows.filter(domain=domain, profile__name=profile)[:10]) if slash else []
    if not slash:
        matches = list(rows.filter(domain=domain)[:10])
    if not matches:
        raise CommandError(f"There is no connection {text!r}: give its id (ma_…) or domain/profile.")
    if len(matches) > 1:
        ids = ", ".join(f"{row.id} ({row.domain}/{row.profile.name})" for row in matches)
        raise CommandError(f"{text!r} means several connections; give an id: {ids}")
    return matches[0]


def find_profile(text: str, user: str | None) -> Profile:
    """A profile by its id (``prof_…``) or name.

    :raises CommandError: there is none, or several owners have one of that name.
    """
    found = Profile.objects.filter(pk=text).first()
    if found is not None:
        return found
    rows = Profile.objects.filter(name=text).select_related("owner")
    if user is not None:
        rows = rows.filter(owner=owner(user))
    matches = list(rows[:10])
    if not matches:
        raise CommandError(f"There is no profile {text!r}.")
    if len(matches) > 1:
        raise CommandError(f"Several users have a profile {text!r}; give --user or an id.")
    return matches[0]


@contextlib.contextmanager
def said_plainly() -> Iterator[None]:
    """Translate the refusals of the verbs into sentences."""
    try:
        yield
    except transitions.AlreadyExists as error:
        raise CommandError(f"That connection exists already: {error.existing_id}") from error
    except transitions.QuotaReached as error:
        raise CommandError(str(error)) from error
    except transitions.LoginInProgress as error:
        raise CommandError(
            f"A login is running already (started by {error.flow.started_by}, until "
            f"{payloads.timestamp(error.flow.expires_at)}). Cancel it first: manage.py cancel {error.flow.connection_id}"
        ) from error
    except (transitions.StaleInteraction, transitions.InvalidSubmission) as error:
        raise CommandError(str(error)) from error
    except transitions.FlowOver as error:
        was = f"; the last one ended as {error.flow.status}" if error.flow else ""
        raise CommandError(f"No login is running{was}. Start one: manage.py login CONNECTION") from error
    except InvalidTransition as error:
        raise CommandError(f"Not possible now: {error}.") from error
    except ManagedAuthConnection.DoesNotExist as error:
        raise CommandError("The connection was deleted meanwhile.") from error
    except Task.DoesNotExist as error:
        raise CommandError("The task was deleted meanwhile.") from error
    except commands.NotAllowed as error:
        hint = ""
        if settings.COMMANDS == "off":
            hint = " Where server and worker have COMMANDS=any, as `make run` gives it to them, it is needed here as well: COMMANDS=any manage.py …"
        raise CommandError(translate(error).message + hint) from error
    except (
        commands.InvalidCommand,
        tasks.NoCapacity,
        tasks.TaskOver,
        hooks.NoHook,
        task_inputs.TakesNoInput,
        task_inputs.InputQueueFull,
    ) as error:
        raise CommandError(translate(error).message) from error
    except vault.VaultError as error:
        raise CommandError(f"{error}. `manage.py doctor` tells more.") from error


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody else may read, also where one with other rights is in its place.

    :raises CommandError: when it cannot be written.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(text)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}.") from error


def read_stdin() -> str:
    """One value from standard input, without the line end that ``echo`` adds."""
    return sys.stdin.read().removesuffix("\n").removesuffix("\r")


def printable(text: str) -> str:
    """Titles and prompts come from outside: a terminal must not take them for commands."""
    return "".join(character if character.isprintable() else "?" for character in text)


def checked_config(data: dict[str, Any]) -> dict[str, Any]:
    """What makes a connection, under the same rules as the API; empty values are left out.

    :raises CommandError: naming each wrong key.
    """
    return checked(
        inputs.ConnectionCreate, {key: value for key, value in data.items() if value not in ("", [])}
    )


def checked(schema: type[inputs.Closed], data: dict[str, Any]) -> dict[str, Any]:
    """As the API checks it.

    :raises CommandError: naming each wrong key.
    """
    if not all(inputs.storable(text) for text in _texts(data)):
        raise CommandError("Text must be UTF-8, without NUL.")
    try:
        return inputs.checked(schema, data)
    except ApiError as error:
        details = "; ".join(detail["message"] for detail in error.details or [])
        # The message repeats the first detail.
        raise CommandError(details or error.message) from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
