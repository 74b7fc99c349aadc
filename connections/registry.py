"""Verbs for what has no status: profiles, credentials and API keys. Keyword-only; time is an argument.

What a connection shows of its profile and credential (their names, and whether it can sign in again by itself) changes with
them, so these verbs tell ``connection.updated`` for every connection that uses them. Lock order: connection first.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import QuerySet

from connections import health, telling, transitions, vault
from connections.access import NotFound, Principal
from connections.models import ApiKey, Credential, ManagedAuthConnection, Profile, Task, new_id
from connections.states import TASK_END
from connections.totp import Generator

Json = dict[str, Any]

#: What a credential without a secret says about codes.
TOTP_DEFAULTS = {"totp_algorithm": "SHA1", "totp_digits": 6, "totp_period": 30}


class NameTaken(Exception):
    """The owner has another object of this name. ``existing_id`` is that one."""

    def __init__(self, existing_id: str) -> None:
        super().__init__(existing_id)
        self.existing_id = existing_id


# ── API keys ──────────────────────────────────────────────────────────────────────────────────────────────────────


def create_api_key(*, owner_id: int, name: str, now: dt.datetime) -> tuple[ApiKey, str]:
    """A new key, and the key itself in plain: the only time that it is shown."""
    plain = vault.new_api_key()
    row = ApiKey.objects.create(
        owner_id=owner_id,
        name=name[:100] or "API key",
        prefix=plain[:8],
        key_hash=vault.hash_token(plain),
        created_at=now,
    )
    return row, plain


def revoke_api_key(*, key_id: int, now: dt.datetime) -> bool:
    """End a key for good. False when it was revoked before, which is no error and keeps the first time."""
    return bool(ApiKey.objects.filter(pk=key_id, revoked_at=None).update(revoked_at=now))


# ── What uses a profile or a credential ───────────────────────────────────────────────────────────────────────────


def _lock_connections(**where: Any) -> list[ManagedAuthConnection]:
    rows: QuerySet[ManagedAuthConnection] = ManagedAuthConnection.objects.filter(**where)
    return list(rows.select_for_update(of=("self",)).order_by("pk"))


def _tell_updated(ids: list[str], *, actor: Principal, now: dt.datetime) -> None:
    """One version up for each, and tell what it looks like now."""
    for row in (
        ManagedAuthConnection.objects.select_related("profile", "credential")
        .filter(pk__in=ids)
        .order_by("pk")
    ):
        row.version += 1
        row.updated_at = now
        row.save(update_fields=["version", "updated_at"])
        telling.connection("connection.updated", row, at=now, actor=actor.name[:200])


# ── Profiles ──────────────────────────────────────────────────────────────────────────────────────────────────────


def create_profile(*, owner_id: int, name: str | None, now: dt.datetime) -> Profile:
    """A profile without state. Without a name it is called by its id.

    :raises NameTaken: the owner has one of this name.
    """
    new = new_id("prof")
    row = Profile(id=new, owner_id=owner_id, name=name or new, created_at=now, updated_at=now)
    _insert(row)
    return row


def rename_profile(*, profile_id: str, name: str, actor: Principal, now: dt.datetime) -> Profile:
    """Give a profile another name; its connections show it from then on.

    :raises NameTaken: the owner has another one of this name.
    :raises NotFound: it is gone.
    """
    with transaction.atomic():
        used_by = [row.pk for row in _lock_connections(profile_id=profile_id)]
        row = _lock(Profile, profile_id)
        if row.name == name:
            return row
        row.name = name
        row.updated_at = now
        _update(row, ["name", "updated_at"])
        _tell_updated(used_by, actor=actor, now=now)
        return row


def delete_profile(*, profile_id: str, actor: Principal, now: dt.datetime) -> None:
    """Delete a profile with its state and its connections; a running login is canceled first."""
    with transaction.atomic():
        connections = _lock_connections(profile_id=profile_id)
        list(Profile.objects.select_for_update().filter(pk=profile_id))
        # All that is locked is locked before the first is told: telling takes the lock of the log, which comes last.
        running = Task.objects.filter(connection__in=connections).exclude(status__in=TASK_END)
        list(running.select_for_update(of=("self",)).order_by("pk"))
        for connection in connections:
            transitions.delete_connection(connection_id=connection.pk, actor=actor, now=now)
        Profile.objects.filter(pk=profile_id).delete()


def profile_state(profile: Profile) -> Json | None:
    """The decrypted ``storage_state`` (Playwright's format); None when nobody ever signed in.

    :raises vault.VaultError: it cannot be decrypted.
    """
    if profile.state is None:
        return None
    state: Json = vault.unseal(profile.state)
    return state


# ── Credentials ───────────────────────────────────────────────────────────────────────────────────────────────────


def create_credential(
    *,
    owner_id: int,
    name: str,
    domain: str,
    values: Mapping[str, str],
    sso_provider: str = "",
    totp_secret: str | None = None,
    totp_algorithm: str = "SHA1",
    totp_digits: int = 6,
    totp_period: int = 30,
    now: dt.datetime,
) -> Credential:
    """Keep values encrypted. ``totp_secret`` is base32 without padding.

    :raises NameTaken: the owner has one of this name.
    """
    row = Credential(
        owner_id=owner_id,
        name=name,
        domain=domain,
        values=vault.seal(dict(values)),
        value_keys=sorted(values),
        totp_secret=vault.seal(totp_secret) if totp_secret else None,
        totp_algorithm=totp_algorithm,
        totp_digits=totp_digits,
        totp_period=totp_period,
        sso_provider=sso_provider,
        created_at=now,
        updated_at=now,
    )
    _insert(row)
    return row


def update_credential(
    *, credential_id: str, changes: Mapping[str, Any], actor: Principal, now: dt.datetime
) -> Credential:
    """Change what ``changes`` names: ``name``, ``domain``, ``sso_provider``, ``remove_value_keys`` and then ``values`` (merged),
    ``totp_secret`` (None removes it and its metadata), ``totp_algorithm``, ``totp_digits``, ``totp_period``.

    :raises NameTaken: the owner has another one of this name.
    :raises NotFound: it is gone.
    """
    with transaction.atomic():
        using = _lock_connections(credential_id=credential_id)
        row = _lock(Credential, credential_id)
        for key in ("name", "domain", "sso_provider", "totp_algorithm", "totp_digits", "totp_period"):
            if key in changes:
                setattr(row, key, changes[key])
        if "values" in changes or "remove_value_keys" in changes:
            removed = set(changes.get("remove_value_keys", ()))
            kept = {key: value for key, value in vault.unseal(row.values).items() if key not in removed}
            merged = {**kept, **changes.get("values", {})}
            row.values = vault.seal(merged)
            row.value_keys = sorted(merged)
        if "totp_secret" in changes:
            secret = changes["totp_secret"]
            row.totp_secret = vault.seal(secret) if secret else None
            if not secret:
                for key, default in TOTP_DEFAULTS.items():
                    setattr(row, key, default)
        row.updated_at = now
        _update(row, None)
        for connection in using:
            # What is stored by now may be what the site wants.
            if health.begin_anew(connection, now):
                connection.save(update_fields=["reauths_failed", "reauth_after"])
        _tell_updated([connection.pk for connection in using], actor=actor, now=now)
        return row


def delete_credential(*, credential_id: str, actor: Principal, now: dt.datetime) -> None:
    """Delete a credential; the connections that used it have none from then on."""
    with transaction.atomic():
        used_by = [row.pk for row in _lock_connections(credential_id=credential_id)]
        Credential.objects.filter(pk=credential_id).delete()
        _tell_updated(used_by, actor=actor, now=now)


def totp_code(credential: Credential, *, now: dt.datetime) -> tuple[str, dt.datetime]:
    """The one-time code of this moment (RFC 6238), and when it ends.

    :raises NotFound: no secret is stored.
    """
    if credential.totp_secret is None:
        raise NotFound(credential.pk)
    generator = Generator(
        vault.unseal(credential.totp_secret),
        algorithm=credential.totp_algorithm,
        digits=credential.totp_digits,
        interval=credential.totp_period,
    )
    seconds = int(now.timestamp())
    return generator.at(seconds), dt.datetime.fromtimestamp(generator.ends(seconds), tz=dt.UTC)


# ── Shared ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _lock(model: type[Profile] | type[Credential], pk: str) -> Any:
    row = model.objects.select_for_update().filter(pk=pk).first()
    if row is None:
        raise NotFound(pk)
    return row


def _taken(row: Profile | Credential) -> NameTaken | None:
    other = (
        type(row)
        .objects.filter(owner_id=row.owner_id, name=row.name)
        .exclude(pk=row.pk)
        .values_list("pk", flat=True)
    ).first()
    return None if other is None else NameTaken(str(other))


def _insert(row: Profile | Credential) -> None:
    try:
        with transaction.atomic():
            row.save(force_insert=True)
    except IntegrityError as error:
        raise _taken(row) or error from None


def _update(row: Profile | Credential, fields: list[str] | None) -> None:
    try:
        with transaction.atomic():
            row.save(force_update=True, update_fields=fields)
    except IntegrityError as error:
        raise _taken(row) or error from None
