"""One claimed task to one outcome: a login, or a health check.

The driver asks a :class:`Person`; here every question becomes a step of the flow, and every answer comes from a submission that is
taken once. Whatever happens ends in exactly one verb: ``succeed``, ``fail``, or nothing because somebody else ended the flow.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

from channels.db import database_sync_to_async
from django.conf import settings
from django.db import OperationalError
from django.utils import timezone

from connections import transitions, vault
from connections.drivers.base import (
    Answer,
    Choice,
    Driver,
    DriverFailed,
    ExternalAction,
    Field,
    Question,
    StoredValues,
    Target,
    Totp,
)
from connections.models import ManagedAuthConnection
from connections.tasks import Hold, LeaseLost
from connections.transitions import FlowOver

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Looked again after this time even when no bell rang.
LOOK_SECONDS = 2.0
_CODE_KINDS = {"sms": "sms_code", "call": "sms_code", "email": "email_code", "totp": "totp_code"}


async def _db(work: Callable[..., T], /, **arguments: Any) -> T:
    """A verb in a thread. It is finished even when the caller is cancelled: a transaction is never left half done."""
    inner = asyncio.ensure_future(database_sync_to_async(work, thread_sensitive=False)(**arguments))
    try:
        # wait() and not shield(): it leaves the future alone as well, and keeps quiet about what nobody awaits any more.
        await asyncio.wait({inner})
    except asyncio.CancelledError:
        inner.add_done_callback(_after_cancelled)
        raise
    return inner.result()


def _after_cancelled(inner: asyncio.Future[Any]) -> None:
    """The end of a verb whose caller was cancelled: an error is read here, or asyncio would complain that nobody did."""
    error = None if inner.cancelled() else inner.exception()
    if error is not None and not isinstance(error, (LeaseLost, FlowOver)):
        _log_without_values("a verb whose caller was cancelled", error)


def _json(item: Field | Choice) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(item).items() if value is not None}


class FlowPerson:
    """The person behind a flow. Remembers, in memory only, what should be saved when the login succeeds."""

    def __init__(self, hold: Hold, bell: asyncio.Event) -> None:
        self._hold = hold
        self._bell = bell
        self._asked: Question | None = None
        self.values: dict[str, str] = {}
        self.kinds: set[str] = set()
        self.refs: set[str] = set()

    async def discovering(self) -> None:
        await _db(transitions.discovering, hold=self._hold, now=timezone.now())

    async def submitting_stored(self) -> None:
        self.kinds.add("stored")
        await _db(transitions.submit_stored, hold=self._hold, now=timezone.now())

    async def ask(self, question: Question) -> Answer:
        self._bell.clear()
        self._asked = question
        await _db(
            transitions.await_input,
            hold=self._hold,
            fields=[_json(field) for field in question.fields],
            choices=[_json(choice) for choice in question.choices],
            website_error=question.website_error or "",
            sso_provider=question.sso_provider or "",
            now=timezone.now(),
        )
        while True:
            answer = await self.answer_within(LOOK_SECONDS)
            if answer is not None:
                return answer

    async def external_action(self, action: ExternalAction) -> None:
        self.kinds.add("external_action")
        fallback = action.fallback or Question()
        self._asked = fallback
        await _db(
            transitions.await_external_action,
            hold=self._hold,
            message=action.message,
            fields=[_json(field) for field in fallback.fields],
            choices=[_json(choice) for choice in fallback.choices],
            website_error=fallback.website_error or "",
            now=timezone.now(),
        )

    async def answer_within(self, seconds: float) -> Answer | None:
        answer = await self._take()
        if answer is None:
            with contextlib.suppress(TimeoutError):
                # Not wait_for(): before Python 3.12 it swallows a cancellation that comes together with the bell.
                async with asyncio.timeout(seconds):
                    await self._bell.wait()
            self._bell.clear()
            answer = await self._take()
        return answer

    async def _take(self) -> Answer | None:
        taken = await _db(transitions.take_submission, hold=self._hold, now=timezone.now())
        if taken is None:
            return None
        self._remember(taken)
        return Answer(field_values=taken.field_values, choice_id=taken.choice_id)

    def _remember(self, taken: transitions.TakenAnswer) -> None:
        question = self._asked or Question()
        for field in question.fields:
            value = taken.field_values.get(field.id)
            if value is None:
                continue
            if field.type == "totp_code":
                self.kinds.add("totp_code")
            elif field.type == "code":
                kind = _CODE_KINDS.get(field.linked_mfa_type or "")
                self.kinds.add(kind or "input")
                if kind is None:
                    self.refs.add(field.ref)
            else:
                self.kinds.add(field.type)
                self.refs.add(field.ref)
                self.values[field.ref] = value
        chosen = next((choice for choice in question.choices if choice.id == taken.choice_id), None)
        if chosen is not None and chosen.type != "sso_provider":
            self.kinds.add("choice")

    def requirements(self) -> dict[str, Any]:
        """What this login needed: decides whether it could run without a person next time."""
        return {"kinds": sorted(self.kinds), "refs": sorted(self.refs)}


def load_target(connection_id: str) -> Target:
    """Everything a driver is told about a connection.

    :raises LeaseLost: the connection is gone.
    """
    row = (
        ManagedAuthConnection.objects.select_related("profile", "credential").filter(pk=connection_id).first()
    )
    if row is None:
        raise LeaseLost(connection_id)
    stored = StoredValues()
    if row.credential is not None:
        credential = row.credential
        totp = None
        if credential.totp_secret is not None:
            totp = Totp(
                secret=vault.unseal(credential.totp_secret),
                algorithm=cast("Any", credential.totp_algorithm),
                digits=credential.totp_digits,
                period=credential.totp_period,
            )
        stored = StoredValues(
            values=vault.unseal(credential.values), totp=totp, sso_provider=credential.sso_provider or None
        )
    return Target(
        domain=row.domain,
        login_url=row.login_url or None,
        allowed_domains=tuple(row.allowed_domains),
        storage_state=vault.unseal(row.profile.state) if row.profile.state is not None else None,
        stored=stored,
        check_url=row.post_login_url or None,
        allow_private=settings.ALLOW_PRIVATE_TARGETS,
    )


async def run_login(hold: Hold, bell: asyncio.Event, driver: Driver) -> None:
    """From DISCOVERING to one end. Cancelling it leaves the flow to whoever cancels (worker.py)."""
    person = FlowPerson(hold, bell)
    try:
        target = await _db(load_target, connection_id=str(hold.connection_id))
        success = await driver.login(target, person)
        await _db(
            transitions.succeed,
            hold=hold,
            storage_state=success.storage_state,
            post_login_url=success.post_login_url,
            values=person.values,
            requirements=person.requirements(),
            now=timezone.now(),
        )
    except (LeaseLost, FlowOver):
        # Canceled, expired or taken over meanwhile: there is nothing left to say.
        return
    except DriverFailed as failure:
        await _fail(hold, failure.code, failure.message, failure.website_error or "")
    except OperationalError:
        # The database is away or locked: the lease runs out by itself, and the login starts again (worker.py).
        raise
    except Exception as error:  # noqa: BLE001 (logged, and told: a flow never hangs because of a fault of ours)
        _log_without_values(f"task {hold.task_id}", error)
        await _fail(hold, "internal_error", "Something went wrong inside Switchboard while logging in.", "")


async def _fail(hold: Hold, code: str, message: str, website_error: str) -> None:
    with contextlib.suppress(LeaseLost, FlowOver):
        await _db(
            transitions.fail,
            hold=hold,
            code=code,
            message=message,
            website_error=website_error,
            now=timezone.now(),
        )


async def run_check(hold: Hold, driver: Driver) -> None:
    """Look whether the profile is still signed in, and record what was seen."""
    signed_in: bool | None = None
    reason = ""
    try:
        target = await _db(load_target, connection_id=str(hold.connection_id))
        if target.storage_state is None:
            reason = "Nobody has signed in with this profile yet."
        else:
            signed_in = await driver.check(target)
            reason = "" if signed_in is not None else "The site did not show whether the session is alive."
    except LeaseLost:
        return
    except DriverFailed as failure:
        reason = failure.message
    except Exception as error:  # noqa: BLE001 (logged, and recorded as inconclusive)
        _log_without_values(f"task {hold.task_id}", error)
        reason = "The check broke."
    with contextlib.suppress(LeaseLost):
        await _db(transitions.record_check, hold=hold, signed_in=signed_in, reason=reason, now=timezone.now())


def _log_without_values(what: str, error: BaseException) -> None:
    """Where it broke and what kind of error it was. Its text is left out: it may quote what somebody typed."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s broke with %s\n%s", what, type(error).__name__, where)
