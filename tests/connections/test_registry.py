"""Verbs of profiles, credentials and API keys, without HTTP."""

from __future__ import annotations

import datetime as dt

import pytest
from django.utils import timezone

from connections import registry, transitions, vault
from connections.access import NotFound
from connections.models import ApiKey, Credential, Profile
from events.models import Event

pytestmark = pytest.mark.django_db
NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


def credential(owner, **extra):
    return registry.create_credential(
        **{
            "owner_id": owner.pk,
            "name": "shop",
            "domain": "a.com",
            "values": {"password": "hunter2"},
            "now": NOW,
        }
        | extra
    )


def test_a_key_is_shown_once_and_only_its_hash_is_kept(owner):
    row, plain = registry.create_api_key(owner_id=owner.pk, name="ci", now=NOW)
    assert plain.startswith("sk_")
    assert row.prefix == plain[:8]
    assert row.key_hash == vault.hash_token(plain)
    assert plain not in repr(ApiKey.objects.values().get())


def test_a_key_is_revoked_once_and_the_first_time_is_kept(owner):
    row, _ = registry.create_api_key(owner_id=owner.pk, name="ci", now=NOW)
    assert registry.revoke_api_key(key_id=row.pk, now=NOW) is True
    assert registry.revoke_api_key(key_id=row.pk, now=timezone.now()) is False
    row.refresh_from_db()
    assert row.revoked_at == NOW


def test_names_are_taken_per_owner(owner, stranger):
    first = registry.create_profile(owner_id=owner.pk, name="work", now=NOW)
    with pytest.raises(registry.NameTaken) as taken:
        registry.create_profile(owner_id=owner.pk, name="work", now=NOW)
    assert taken.value.existing_id == first.pk
    registry.create_profile(owner_id=stranger.pk, name="work", now=NOW)
    kept = credential(owner)
    with pytest.raises(registry.NameTaken) as taken:
        credential(owner)
    assert taken.value.existing_id == kept.pk


def test_a_change_of_what_is_gone_is_not_found(owner, principal):
    with pytest.raises(NotFound):
        registry.update_credential(credential_id="cred_x", changes={}, actor=principal, now=NOW)
    with pytest.raises(NotFound):
        registry.rename_profile(profile_id="prof_x", name="x", actor=principal, now=NOW)
    registry.delete_credential(credential_id="cred_x", actor=principal, now=NOW)
    registry.delete_profile(profile_id="prof_x", actor=principal, now=NOW)


def test_a_rename_to_the_same_name_tells_nothing(owner, principal):
    connection = transitions.create_connection(
        owner_id=owner.pk, domain="a.com", profile_name="work", config={}, actor=principal, now=NOW
    )
    registry.rename_profile(profile_id=connection.profile_id, name="work", actor=principal, now=NOW)
    assert not Event.objects.filter(name="connection.updated").exists()


def test_what_a_connection_shows_of_its_credential_is_told_with_a_higher_version(owner, principal):
    row = credential(owner)
    connection = transitions.create_connection(
        owner_id=owner.pk,
        domain="a.com",
        profile_name="p",
        config={"credential": row},
        actor=principal,
        now=NOW,
    )
    registry.update_credential(credential_id=row.pk, changes={"name": "store"}, actor=principal, now=NOW)
    registry.delete_credential(credential_id=row.pk, actor=principal, now=NOW)
    told = Event.objects.filter(name="connection.updated", object_id=connection.pk).order_by("id")
    assert [event.data["credential"] for event in told] == [{"name": "store"}, None]
    assert [event.version for event in told] == [connection.version + 1, connection.version + 2]


def test_a_refused_rename_changes_nothing(owner, principal):
    credential(owner)
    other = credential(owner, name="other")
    with pytest.raises(registry.NameTaken):
        registry.update_credential(
            credential_id=other.pk,
            changes={"name": "shop", "values": {"password": "x"}},
            actor=principal,
            now=NOW,
        )
    other = Credential.objects.get(pk=other.pk)
    assert other.name == "other"
    assert vault.unseal(other.values) == {"password": "hunter2"}


def test_a_code_ends_with_its_period(owner):
    row = credential(owner, totp_secret="JBSWY3DPEHPK3PXP", totp_period=45)
    code, ends = registry.totp_code(row, now=NOW + dt.timedelta(seconds=44, milliseconds=900))
    assert (len(code), ends) == (
        6,
        dt.datetime.fromtimestamp((int(NOW.timestamp()) + 44) // 45 * 45 + 45, tz=dt.UTC),
    )
    with pytest.raises(NotFound):
        registry.totp_code(credential(owner, name="without"), now=NOW)


def test_the_state_of_a_profile_comes_out_as_it_went_in(owner):
    row = registry.create_profile(owner_id=owner.pk, name="work", now=NOW)
    assert registry.profile_state(row) is None
    Profile.objects.update(state=vault.seal({"cookies": []}))
    assert registry.profile_state(Profile.objects.get()) == {"cookies": []}
