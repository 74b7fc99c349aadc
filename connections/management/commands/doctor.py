"""``manage.py doctor``: what is missing or wrong, in plain words."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import ipaddress
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management.base import CommandError, CommandParser
from django.db import Error as DatabaseError
from django.db import connections as databases
from django.db.migrations.executor import MigrationExecutor
from django.db.models import Max, Min

from connections import vault
from connections.management.commands import _shared
from connections.models import ApiKey, Task
from connections.states import TASK_HELD, TaskStatus
from events.models import Event

Level = Literal["ok", "warning", "wrong"]

WAITING_TOO_LONG = dt.timedelta(minutes=1)
CLOCK_TOLERANCE = dt.timedelta(seconds=60)
LAYER_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``check`` is a stable name for programs, ``text`` is for people."""

    check: str
    level: Level
    text: str


Findings = Iterator[Finding]


def database(now: dt.datetime) -> Findings:
    try:
        with databases["default"].cursor() as cursor:
            cursor.execute("SELECT 1")
    except DatabaseError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        yield Finding("database", "wrong", f"The database cannot be reached: {first}. Is DATABASE_URL right?")
        return
    yield Finding("database", "ok", f"The database answers ({databases['default'].vendor}).")


def migrations(now: dt.datetime) -> Findings:
    executor = MigrationExecutor(databases["default"])
    missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if missing:
        yield Finding(
            "migrations", "wrong", f"{len(missing)} migrations are not applied. Run: manage.py migrate"
        )
    else:
        yield Finding("migrations", "ok", "All migrations are applied.")


def clock(now: dt.datetime) -> Findings:
    newest = Event.objects.aggregate(newest=Max("at"))["newest"]
    if newest is not None and newest - now > CLOCK_TOLERANCE:
        yield Finding(
            "clock", "wrong", f"The clock is behind: the log has an event of {newest:%Y-%m-%d %H:%M:%S} UTC."
        )
        return
    database = databases["default"]
    if database.vendor == "postgresql":
        with database.cursor() as cursor:
            cursor.execute("SELECT clock_timestamp()")
            apart = abs(cursor.fetchone()[0] - now)
        if apart > CLOCK_TOLERANCE:
            yield Finding(
                "clock",
                "wrong",
                f"The clocks of this machine and of the database are {apart.total_seconds():.0f} s apart.",
            )
            return
    yield Finding("clock", "ok", f"The clock says {now:%Y-%m-%d %H:%M:%S} UTC.")


def keys(now: dt.datetime) -> Findings:
    probe = secrets.token_hex(8)
    if vault.unseal(vault.seal(probe)) != probe:
        yield Finding("keys", "wrong", "The encryption key does not open what it has just closed.")
        return
    unreadable: list[str] = []
    count = 0
    for model, column in _shared.SEALED_COLUMNS:
        rows = model._default_manager.exclude(**{column: None}).values_list("pk", column)
        for pk, sealed in rows.iterator(chunk_size=200):
            count += 1
            try:
                vault.unseal(sealed)
            except vault.VaultError:
                unreadable.append(f"{model._meta.object_name}.{column} {pk}")
    if unreadable:
        shown = ", ".join(unreadable[:5]) + (" ..." if len(unreadable) > 5 else "")
        yield Finding(
            "keys",
            "wrong",
            f"{len(unreadable)} of {count} stored secrets cannot be read with ENCRYPTION_KEYS: {shown}. "
            "An old key is missing: put it behind the present one.",
        )
    else:
        yield Finding("keys", "ok", f"All {count} stored secrets can be read.")


def files(now: dt.datetime) -> Findings:
    folder: Path = settings.DATA_DIR
    open_ones = [
        path.name
        for path in [folder, *folder.iterdir()]
        if (path == folder or path.is_file()) and stat.S_IMODE(path.stat().st_mode) & 0o077
    ]
    if open_ones:
        yield Finding(
            "files",
            "wrong",
            f"Others on this machine can read {', '.join(sorted(open_ones))} in {folder}. "
            f"Run: chmod -R go= {folder}",
        )
    else:
        yield Finding("files", "ok", f"Only this user can read {folder}.")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def web(now: dt.datetime) -> Findings:
    if settings.DEBUG:
        yield Finding(
            "debug", "wrong", "DEBUG is on: error pages show the inside of the program. Set DEBUG=0."
        )
    else:
        yield Finding("debug", "ok", "DEBUG is off.")
    base = urlsplit(settings.BASE_URL)
    host = base.hostname or ""
    allowed = settings.ALLOWED_HOSTS
    if "*" in allowed:
        yield Finding(
            "hosts", "warning", "ALLOWED_HOSTS has *: any name is believed. List the names of this server."
        )
    elif not any(
        host == name.strip("[]") or (name.startswith(".") and (host == name[1:] or host.endswith(name)))
        for name in allowed
    ):
        yield Finding(
            "hosts", "wrong", f"BASE_URL is {settings.BASE_URL}, but ALLOWED_HOSTS does not have {host}."
        )
    else:
        yield Finding("hosts", "ok", f"ALLOWED_HOSTS has the host of BASE_URL ({host}).")
    if host in ("0.0.0.0", "::"):  # noqa: S104 (nothing is bound here)
        yield Finding(
            "base_url",
            "wrong",
            f"BASE_URL is {settings.BASE_URL}: links to it lead nowhere. Set the real address.",
        )
    elif base.scheme != "https" and not _is_local(host):
        yield Finding(
            "base_url",
            "warning",
            f"BASE_URL is {settings.BASE_URL}: passwords travel without encryption. Use https.",
        )
    else:
        yield Finding("base_url", "ok", f"BASE_URL is {settings.BASE_URL}.")
    if settings.ALLOW_PRIVATE_TARGETS:
        yield Finding(
            "private_targets",
            "warning",
            "ALLOW_PRIVATE_TARGETS is on: logins can reach addresses inside this network. For development only.",
        )
    else:
        yield Finding("private_targets", "ok", "Logins cannot reach private addresses.")


def worker(now: dt.datetime) -> Findings:
    held = Task.objects.filter(status__in=TASK_HELD)
    alive = held.filter(lease_expires_at__gt=now).count()
    lost = held.filter(lease_expires_at__lte=now - WAITING_TOO_LONG).count()
    waiting = Task.objects.filter(status=TaskStatus.QUEUED, run_after__lte=now - WAITING_TOO_LONG)
    count = waiting.count()
    if lost:
        yield Finding(
            "worker", "wrong", f"{lost} tasks belong to a worker that has gone, and nobody takes them over. "
            "Start: manage.py run_worker"
        )  # fmt: skip
    elif count and not alive:
        since = waiting.aggregate(first=Min("run_after"))["first"]
        yield Finding(
            "worker",
            "wrong",
            f"{count} tasks wait for a worker, the oldest since {since:%Y-%m-%d %H:%M:%S} UTC. "
            "Start: manage.py run_worker",
        )
    elif count:
        yield Finding(
            "worker",
            "warning",
            f"{count} tasks wait longer than a minute: the workers are busy. Start another one.",
        )
    elif alive:
        yield Finding("worker", "ok", f"Workers hold {alive} tasks.")
    else:
        yield Finding("worker", "ok", "No task is waiting (so it cannot be told whether a worker runs).")


def layer(now: dt.datetime) -> Findings:
    backend = settings.CHANNEL_LAYERS["default"]["BACKEND"].rpartition(".")[2]
    try:
        async_to_sync(_through_the_layer)()
    except Exception as error:  # whatever a broker's client raises: the finding is what the caller wants
        text = str(error) or type(error).__name__
        yield Finding(
            "layer",
            "wrong",
            f"The channel layer ({backend}) does not work: {text}. Is REDIS_URL right? Events still arrive, a second later.",
        )
        return
    if "InMemory" in backend:
        yield Finding(
            "layer", "ok", "No REDIS_URL: each server looks for events by itself. Fine for one server."
        )
    else:
        yield Finding("layer", "ok", f"The channel layer answers ({backend}).")


async def _through_the_layer() -> None:
    found = get_channel_layer()
    if found is None:
        raise LookupError("none is configured")
    channel = await found.new_channel()
    async with asyncio.timeout(LAYER_SECONDS):
        await found.send(channel, {"type": "doctor"})
        await found.receive(channel)


def people(now: dt.datetime) -> Findings:
    admins = get_user_model().objects.filter(is_superuser=True, is_active=True).count()
    if admins:
        yield Finding("admins", "ok", f"There is at least one administrator ({admins}).")
    else:
        yield Finding("admins", "wrong", "Nobody can administer this: run manage.py createsuperuser")
    count = ApiKey.objects.filter(revoked_at=None).count()
    yield Finding(
        "api_keys",
        "ok",
        f"{count} API keys are valid." if count else "There is no API key yet: manage.py create_api_key",
    )


#: In this order: what a check relies on comes before it.
CHECKS: tuple[Callable[[dt.datetime], Findings], ...] = (
    database,
    migrations,
    clock,
    keys,
    files,
    web,
    worker,
    layer,
    people,
)
#: Without these nothing that reads tables makes sense.
FOUNDATION = frozenset({"database", "migrations"})


def examine(now: dt.datetime) -> list[Finding]:
    """Every finding; the checks that need a database are left out when there is no usable one."""
    findings: list[Finding] = []
    broken = False
    for check in CHECKS:
        if broken and check not in (files, web, layer):
            continue
        for finding in check(now):
            findings.append(finding)
            broken = broken or (finding.check in FOUNDATION and finding.level == "wrong")
    return findings


class Command(_shared.SwitchboardCommand):
    help = "Look at this installation and say what is missing or wrong. Exit code 1 when something is."

    def add_arguments(self, parser: CommandParser) -> None:
        self.add_json(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        findings = examine(_shared.now())
        wrong = [finding for finding in findings if finding.level == "wrong"]
        if options["json"]:
            self.print_json(
                {"ok": not wrong, "findings": [dataclasses.asdict(finding) for finding in findings]}
            )
        else:
            shown = {
                "ok": self.style.SUCCESS("ok     "),
                "warning": self.style.WARNING("warning"),
                "wrong": self.style.ERROR("WRONG  "),
            }
            for finding in findings:
                self.stdout.write(f"{shown[finding.level]}  {finding.text}")
        if wrong:
            raise CommandError(f"{len(wrong)} of {len(findings)} things are wrong.")
