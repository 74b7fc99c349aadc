"""When sessions are looked at, and when lost ones are signed in again: the arithmetic, and the circuit breakers of sites.

Nothing here changes a status or tells anything. The functions set fields of a connection that its caller has locked and saves
(:data:`FIELDS`); of :class:`SiteCircuit` this is the only writer. Its row is locked after connection, flow and task, and before the log.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import random

from connections.models import ManagedAuthConnection, SiteCircuit
from connections.states import ConnectionStatus

#: What the functions below set.
FIELDS = ("next_check_at", "checks_unclear", "reauths_failed", "reauth_after")

#: Of every pause, so that what began together does not come together for ever.
JITTER = 0.1
#: The longest pause between two checks that cannot tell.
LONGEST_UNCLEAR = dt.timedelta(days=1)

#: After failed re-authentications; the pause doubles.
REAUTH_FIRST, REAUTH_LONGEST = dt.timedelta(minutes=5), dt.timedelta(hours=24)
#: So many in a row, and no more are tried until a person does something.
REAUTH_LIMIT = 6

#: So many checks in a row that could not tell, over all connections of a site, open its circuit.
CIRCUIT_AFTER = 5
CIRCUIT_FIRST, CIRCUIT_LONGEST = dt.timedelta(minutes=5), dt.timedelta(hours=6)
#: How long everybody waits for the result of the one trial.
TRIAL = dt.timedelta(minutes=5)

#: The ``spec`` of checks by the clock. A check that a person asks for has none.
BY_CLOCK, AS_TRIAL = {"by": "clock"}, {"by": "clock", "trial": True}


def about(pause: dt.timedelta) -> dt.timedelta:
    """``pause`` with its jitter."""
    return pause * random.uniform(1 - JITTER, 1 + JITTER)


def _doubled(first: dt.timedelta, times: int, longest: dt.timedelta) -> dt.timedelta:
    return min(first * 2 ** min(times, 30), longest)


# ── Checks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def can_be_checked(connection: ManagedAuthConnection) -> bool:
    """Whether there is a session to look at, a page to look at it on, and the wish to."""
    return (
        connection.health_checks
        and bool(connection.post_login_url)
        and connection.profile.state_saved_at is not None
    )


def is_checked(connection: ManagedAuthConnection) -> bool:
    """Whether the clock checks it: who is known to be signed out needs no check."""
    return connection.status == ConnectionStatus.AUTHENTICATED and can_be_checked(connection)


def _interval(connection: ManagedAuthConnection) -> dt.timedelta:
    return dt.timedelta(seconds=connection.health_check_interval)


def plan(connection: ManagedAuthConnection, now: dt.datetime) -> None:
    """The next check comes one interval from now, longer while checks cannot tell; none where nothing is checked."""
    connection.next_check_at = _next(connection, now) if is_checked(connection) else None


def _next(connection: ManagedAuthConnection, now: dt.datetime) -> dt.datetime:
    return now + about(_doubled(_interval(connection), connection.checks_unclear, LONGEST_UNCLEAR))


def spread(connection: ManagedAuthConnection, now: dt.datetime) -> None:
    """The first check of one that has no plan: anywhere within its interval."""
    connection.next_check_at = None
    if is_checked(connection):
        connection.next_check_at = now + _interval(connection) * random.random()


def put_off(connection: ManagedAuthConnection, until: dt.datetime) -> None:
    """Checked again soon after ``until``, and not with all others at once."""
    connection.next_check_at = until + _interval(connection) * random.uniform(0, JITTER)


def signed_in(connection: ManagedAuthConnection, now: dt.datetime) -> None:
    """A login or a check has shown that the session lives, whatever the status was before: what failed is forgotten."""
    connection.checks_unclear = 0
    connection.reauths_failed = 0
    connection.reauth_after = None
    connection.next_check_at = _next(connection, now) if can_be_checked(connection) else None


# ── Re-authentication ─────────────────────────────────────────────────────────────────────────────────────────────


def signs_in_again(connection: ManagedAuthConnection) -> bool:
    """Whether a lost session is signed in again without a person (wire contract, section 7).

    External providers are stored as references and not asked, so nothing could be typed.
    """
    possible, reason = connection.can_reauth()
    return (
        connection.health_checks and connection.auto_reauth and possible and reason != "external_credential"
    )


def reauth_failed(connection: ManagedAuthConnection, now: dt.datetime) -> None:
    """The next one comes after a pause; none after :data:`REAUTH_LIMIT` of them."""
    connection.reauths_failed += 1
    connection.reauth_after = None
    if connection.reauths_failed < REAUTH_LIMIT:
        pause = _doubled(REAUTH_FIRST, connection.reauths_failed - 1, REAUTH_LONGEST)
        connection.reauth_after = now + about(pause)


def begin_anew(connection: ManagedAuthConnection, now: dt.datetime) -> bool:
    """A person has changed what re-authentications failed for: the next one is due at once. False when none had failed."""
    if not connection.reauths_failed:
        return False
    connection.reauths_failed = 0
    connection.reauth_after = now if connection.status == ConnectionStatus.NEEDS_AUTH else None
    return True


# ── The circuit of a site ─────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Pass:
    """Whether a check may go to a site. ``until`` (None: it may): not before this. ``trial``: it alone decides what comes next."""

    trial: bool = False
    until: dt.datetime | None = None


def ask(domain: str, now: dt.datetime) -> Pass:
    """May this site be checked now? Of an open circuit whose time has come, one caller gets the trial. In a transaction."""
    if not SiteCircuit.objects.filter(domain=domain, retry_at__isnull=False).exists():
        return Pass()
    row = SiteCircuit.objects.select_for_update().get(domain=domain)
    if row.retry_at is None:
        # Closed while we waited for the lock.
        return Pass()
    if row.retry_at > now:
        return Pass(until=row.retry_at)
    # Should the trial never come back, the next one is let through then.
    row.retry_at = now + TRIAL
    row.updated_at = now
    row.save(update_fields=["retry_at", "updated_at"])
    return Pass(trial=True)


def clear(domain: str, now: dt.datetime) -> None:
    """A check could tell: the circuit is closed."""
    SiteCircuit.objects.filter(domain=domain).exclude(failures=0, retry_at=None).update(
        failures=0, retry_at=None, updated_at=now
    )


def unclear(domain: str, *, trial: bool, now: dt.datetime) -> None:
    """A check could not tell. The last of :data:`CIRCUIT_AFTER` in a row opens the circuit; a trial opens it for twice as long.

    Others that were under way when it opened do not count. In a transaction.
    """
    SiteCircuit.objects.get_or_create(domain=domain, defaults={"updated_at": now})
    row = SiteCircuit.objects.select_for_update().get(domain=domain)
    if row.retry_at is not None and not trial:
        return
    row.failures += 1
    if row.failures >= CIRCUIT_AFTER:
        row.retry_at = now + about(_doubled(CIRCUIT_FIRST, row.failures - CIRCUIT_AFTER, CIRCUIT_LONGEST))
    row.updated_at = now
    row.save()


def circuit(domain: str) -> SiteCircuit | None:
    """The open circuit of a site; None where it is closed."""
    return SiteCircuit.objects.filter(domain=domain, retry_at__isnull=False).first()
