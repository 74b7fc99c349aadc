"""What time does to the rows: a few named sweeps with limits. No retries; the next tick is the retry.

Every sweep only finds candidates; the verb it calls looks again under the lock, so any number of reconcilers may run.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Iterable, Iterator

from django.conf import settings
from django.db.models import Exists, OuterRef, Q, QuerySet

from connections import tasks, transitions
from connections.models import IdempotentAnswer, LoginFlow, ManagedAuthConnection, Task
from connections.states import ConnectionStatus, FlowStatus, FlowStep, TaskKind
from events import clients, log

logger = logging.getLogger(__name__)
LIMIT = 200
#: Checks by the clock that may be open at a time: people who log in stand in the same queue.
OPEN_CHECKS = 25
#: How long one tick prunes. The urgent sweeps wait meanwhile, so it is short.
PRUNE_SECONDS = 2.0
IDEMPOTENCY_RETENTION = dt.timedelta(hours=24)


def expire_flows(now: dt.datetime) -> int:
    """Flows and questions whose time is over."""
    due = LoginFlow.objects.filter(status=FlowStatus.IN_PROGRESS).filter(
        Q(expires_at__lte=now) | Q(step=FlowStep.AWAITING_INPUT, input_expires_at__lte=now)
    )
    ids = list(due.values_list("connection_id", flat=True)[:LIMIT])
    return sum(_one_by_one(lambda pk: transitions.expire_if_due(connection_id=pk, now=now), ids))


def lost_tasks(now: dt.datetime) -> QuerySet[Task]:
    """Tasks that are held under a lease that has run out."""
    found: QuerySet[Task] = Task.objects.filter(lease_expires_at__lte=now)
    return found


def rescue_tasks(now: dt.datetime) -> int:
    """Tasks whose worker let its lease run out."""
    ids = list(lost_tasks(now).order_by("lease_expires_at").values_list("pk", flat=True)[:LIMIT])
    return sum(_one_by_one(lambda pk: transitions.rescue(task_id=pk, now=now), ids))


_RUNNING = Exists(LoginFlow.objects.filter(connection=OuterRef("pk"), status=FlowStatus.IN_PROGRESS))
_CHECKS = Task.objects.filter(kind=TaskKind.HEALTH_CHECK, finished_at=None)


def queue_checks(now: dt.datetime) -> int:
    """Sessions that are to be looked at. Who is logging in, or is being looked at, has to wait and takes nobody's turn."""
    due = ManagedAuthConnection.objects.filter(health_checks=True, next_check_at__lte=now)
    free = due.exclude(_RUNNING).exclude(Exists(_CHECKS.filter(connection=OuterRef("pk"))))
    ids = list(free.order_by("next_check_at").values_list("pk", flat=True)[:OPEN_CHECKS])
    if not ids:
        return 0
    room = max(0, OPEN_CHECKS - _CHECKS.count())
    return sum(_one_by_one(lambda pk: transitions.check_by_clock(connection_id=pk, now=now), ids[:room]))


def start_reauths(now: dt.datetime) -> int:
    """Re-authentications that failed, and whose pause is over."""
    due = ManagedAuthConnection.objects.filter(reauth_after__lte=now).exclude(_RUNNING)
    ids = list(due.order_by("reauth_after").values_list("pk", flat=True)[:OPEN_CHECKS])
    return sum(_one_by_one(lambda pk: transitions.reauth_by_clock(connection_id=pk, now=now), ids))


def plan_checks(now: dt.datetime) -> int:
    """Sessions that nobody has planned to look at: of an installation from before there were checks by the clock."""
    bare = ManagedAuthConnection.objects.filter(
        status=ConnectionStatus.AUTHENTICATED, health_checks=True, next_check_at=None
    ).exclude(Q(post_login_url="") | Q(profile__state_saved_at=None))
    ids = list(bare.values_list("pk", flat=True)[:LIMIT])
    return sum(_one_by_one(lambda pk: transitions.plan_check(connection_id=pk, now=now), ids))


def _one_by_one(verb: Callable[[str], bool], ids: Iterable[str]) -> Iterator[bool]:
    """Each by itself: a row that breaks is logged, and the ones after it have their turn."""
    for pk in ids:
        try:
            yield verb(pk)
        except Exception:
            logger.exception("the reconciler could not deal with %s; the next tick tries again", pk)


def sweep_clients(now: dt.datetime) -> int:
    """Clients whose server died, or that nobody came back for. The servers do this, too; this is for when there is none."""
    return clients.sweep()


def delete_old_tasks(now: dt.datetime) -> int:
    """Tasks that ended before ``TASK_RETENTION_DAYS``, with what they wrote: the oldest first, and a limited number, for each is told."""
    if not settings.TASK_RETENTION_DAYS:
        return 0
    before = now - dt.timedelta(days=settings.TASK_RETENTION_DAYS)
    old = Task.objects.filter(finished_at__lt=before).order_by("finished_at").values_list("pk", flat=True)

    def delete(pk: str) -> bool:
        tasks.delete(task_id=pk, actor="retention", now=now)
        return True

    return sum(_one_by_one(delete, list(old[:LIMIT])))


def prune_log(now: dt.datetime) -> int:
    """Events older than the retention: all of them, or as many as PRUNE_SECONDS allow."""
    return log.prune_all(now - dt.timedelta(days=settings.EVENT_RETENTION_DAYS), seconds=PRUNE_SECONDS)


def prune_idempotent_answers(now: dt.datetime) -> int:
    """Stored answers older than a day."""
    old = IdempotentAnswer.objects.filter(created_at__lt=now - IDEMPOTENCY_RETENTION)
    ids = list(old.values_list("pk", flat=True)[:LIMIT])
    return IdempotentAnswer.objects.filter(pk__in=ids).delete()[0]


Sweep = Callable[[dt.datetime], int]

#: What cannot wait, and what can.
URGENT: tuple[Sweep, ...] = (expire_flows, rescue_tasks, sweep_clients, queue_checks, start_reauths)
LEISURELY: tuple[Sweep, ...] = (plan_checks, prune_log, prune_idempotent_answers, delete_old_tasks)


def run(sweeps: tuple[Sweep, ...], *, now: dt.datetime) -> dict[str, int]:
    """Run the sweeps; one that breaks is logged and does not stop the others. Returns how much each changed (-1: broke)."""
    done = {}
    for sweep in sweeps:
        try:
            done[sweep.__name__] = sweep(now)
        except Exception:
            logger.exception("the sweep %s broke; the next tick tries again", sweep.__name__)
            done[sweep.__name__] = -1
    return done
