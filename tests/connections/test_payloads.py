"""The outward shapes: canonical and legacy with the same content, absent as the contract says, secrets nowhere."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from django.contrib.auth.models import User

from connections import payloads, vault
from connections.models import Credential, LoginFlow
from connections.states import FlowStatus, FlowStep
from tests.connections.flow_support import CHOICES, CODE, FIELDS, T0, Story


def asking(owner: User) -> LoginFlow:
    story = Story.of(owner)
    story.start()
    story.claim()
    return story.ask([*FIELDS, CODE], CHOICES, website_error="Look here.", sso_provider="google")


def test_canonical_and_legacy_shapes_carry_the_same_content(owner: User) -> None:
    shown = payloads.flow_fields(asking(owner))
    fields, legacy = shown["fields"] or [], shown["discovered_fields"] or []
    assert (
        [f["ref"] for f in fields] == [f["name"] for f in legacy] == ["username", "password", "note", "code"]
    )
    assert [f["label"] for f in fields] == [f["label"] for f in legacy]
    assert [f["required"] for f in fields] == [f["required"] for f in legacy] == [True, True, False, True]
    assert [f["type"] for f in legacy] == ["email", "password", "text", "code"]
    assert legacy[0]["selector"] == fields[0]["observed_selector"] == "#user"
    assert legacy[3]["linked_mfa_type"] == "sms"
    choices = shown["choices"] or []
    assert [c["id"] for c in choices] == ["c1", "c2", "c3", "github", "c5"]
    assert shown["mfa_options"] == [
        {"type": "sms", "label": "Text ••42", "target": "••42", "description": "by text"},
        {"type": "switch", "label": "Passkey"},
    ]
    assert shown["pending_sso_buttons"] == [
        {"provider": "google", "selector": "#google", "label": "Google"},
        {"provider": "github", "selector": "", "label": "GitHub"},
    ]
    assert shown["sign_in_options"] == [{"id": "c5", "label": "alice@work", "description": "last used today"}]


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ({"type": "identifier"}, "text"),
        ({"type": "identifier", "input_mode": "email"}, "email"),
        ({"type": "identifier", "input_mode": "tel"}, "tel"),
        ({"type": "identifier", "input_mode": "numeric"}, "number"),
        ({"type": "password"}, "password"),
        ({"type": "code"}, "code"),
        ({"type": "totp_code"}, "totp"),
        ({"type": "totp_secret"}, "text"),
        ({"type": "text"}, "text"),
    ],
)
def test_each_field_type_has_its_legacy_twin(field: dict[str, Any], kind: str) -> None:
    assert payloads._legacy_field({"ref": "r", "label": "L", **field})["type"] == kind


def test_get_shows_absent_flow_fields_as_null_and_events_omit_them(owner: User) -> None:
    flow = Story.of(owner).start()
    shown = payloads.flow_fields(flow)
    state = payloads.flow_state(flow)
    absent = {name for name, value in shown.items() if value is None}
    assert {"fields", "choices", "mfa_options", "website_error", "interaction_id", "live_view_url"} <= absent
    assert set(state) == (set(shown) - absent) | {"version"}
    assert all(value is not None for value in state.values())


def test_before_any_flow_every_flow_field_is_null(owner: User) -> None:
    shown = payloads.managed_auth(Story.of(owner).connection, None)
    assert {shown[name] for name in payloads.FlowFields.__annotations__} == {None}  # type: ignore[literal-required]


def test_an_ended_flow_has_no_hosted_page(owner: User) -> None:
    flow = Story.of(owner).bring_to(FlowStatus.CANCELED).flow()
    assert payloads.flow_fields(flow)["hosted_url"] is None


def test_the_one_time_code_is_only_in_the_answer_to_login(owner: User) -> None:
    flow = Story.of(owner).start()
    answer = payloads.login(flow, "the-code")
    assert answer["hosted_url"] == f"http://testserver/login/{flow.connection_id}?code=the-code"
    assert "code=" not in str(payloads.flow_fields(flow)["hosted_url"])


def test_timestamps_are_utc_with_z_to_the_millisecond() -> None:
    east = dt.datetime(2026, 3, 1, 14, 0, 0, 123_456, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    assert payloads.timestamp(east) == "2026-03-01T12:00:00.123Z"


def test_a_connection_shows_its_credential_by_name_only(owner: User) -> None:
    kept = Credential.objects.create(
        owner=owner, name="kept", domain="example.com", created_at=T0, updated_at=T0,
        values=vault.seal({"password": "UNMISTAKABLE"}), value_keys=["password"], totp_secret=vault.seal("SECRETBASE32"),
    )  # fmt: skip
    story = Story.of(owner, credential=kept)
    assert payloads.connection_fields(story.connection)["credential"] == {"name": "kept"}
    shape = payloads.credential(kept)
    assert (shape["has_values"], shape["has_totp_secret"], shape["value_keys"]) == (True, True, ["password"])
    assert "value_keys" not in payloads.credential(kept, keys=False)
    assert "UNMISTAKABLE" not in repr(shape)
    assert "SECRETBASE32" not in repr(shape)


def test_a_timeline_row_is_there_from_the_first_moment_and_keeps_its_end(owner: User) -> None:
    story = Story.of(owner)
    row = payloads.timeline_flow(story.start())
    assert (row["type"], row["status"], row["step"]) == ("login", "IN_PROGRESS", "DISCOVERING")
    assert "completed_at" not in row
    story.claim()
    row = payloads.timeline_flow(story.fail())
    assert (row["status"], row["error_code"], row["website_error"]) == (
        "FAILED",
        "credentials_invalid",
        "Nope",
    )
    assert row["completed_at"] == payloads.timestamp(T0)


def test_a_connection_without_a_page_to_look_at_says_that_it_cannot_be_checked(owner: User) -> None:
    story = Story.of(owner)
    assert payloads.connection_fields(story.row())["health_check_unavailable_reason"] == "no_auth_check_url"
    story.bring_to(FlowStep.SUBMITTING)
    story.succeed()
    assert payloads.connection_fields(story.row())["health_check_unavailable_reason"] is None


def test_A04_an_event_does_not_carry_what_belongs_to_the_connection_and_get_always_does(owner: User) -> None:
    story = Story.of(owner)
    state = payloads.flow_state(story.start())
    shown = payloads.managed_auth(story.row(), story.flow())
    assert not {"id", "domain", "profile_name", "status"} & set(state)
    assert (shown["id"], shown["domain"], shown["profile_name"]) == (story.id, "example.com", "work")
