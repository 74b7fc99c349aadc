"""The one-time code and the session token, as a domain: no HTTP."""

from __future__ import annotations

import datetime as dt
import threading

import jwt
import pytest
from django.contrib.auth.models import User
from django.db import connection as database
from django.utils import timezone

from connections import access, handoff, tasks, transitions
from connections.access import Principal
from connections.models import LoginFlow
from connections.states import FlowStatus

ALICE, BOB = handoff.client_of("10.0.0.1", "Firefox"), handoff.client_of("10.0.0.2", "Safari")
SECOND = dt.timedelta(seconds=1)


@pytest.fixture
def now() -> dt.datetime:
    return timezone.now()


def start(owner: User, principal: Principal, now: dt.datetime, name: str = "p") -> tuple[LoginFlow, str]:
    row = transitions.create_connection(
        owner_id=owner.pk, domain="site.example", profile_name=name, config={}, actor=principal, now=now
    )
    return transitions.start_login(connection_id=row.id, actor=principal, now=now)


def test_A03_a_code_is_exchanged_once(owner: User, principal: Principal, now: dt.datetime) -> None:
    flow, code = start(owner, principal, now)
    same, token = handoff.exchange(connection_id=flow.connection_id, code=code, client=ALICE, now=now)
    assert same.id == flow.id
    with pytest.raises(handoff.CodeUsed):
        handoff.exchange(connection_id=flow.connection_id, code=code, client=BOB, now=now + SECOND)
    assert handoff.principal_of_token(token, now=now).flow_id == flow.id


def test_A03_the_same_client_gets_the_identical_token_within_ten_seconds_and_nothing_later(
    owner: User, principal: Principal, now: dt.datetime
) -> None:
    flow, code = start(owner, principal, now)
    _, first = handoff.exchange(connection_id=flow.connection_id, code=code, client=ALICE, now=now)
    _, again = handoff.exchange(
        connection_id=flow.connection_id, code=code, client=ALICE, now=now + 10 * SECOND
    )
    assert again == first
    with pytest.raises(handoff.CodeUsed):
        handoff.exchange(connection_id=flow.connection_id, code=code, client=ALICE, now=now + 11 * SECOND)


@pytest.mark.django_db(transaction=True)
def test_A03_of_two_clients_that_exchange_in_parallel_exactly_one_wins(django_user_model: type[User]) -> None:
    now = timezone.now()
    user = django_user_model.objects.create_user("racer")
    principal = access.of_user(user)
    for number in range(5):
        flow, code = start(user, principal, now, name=f"race {number}")
        won: list[str] = []
        lost: list[str] = []
        gate = threading.Barrier(4)

        def run(
            client: str, flow: LoginFlow, code: str, gate: threading.Barrier, won: list[str], lost: list[str]
        ):
            gate.wait()
            try:
                _, token = handoff.exchange(
                    connection_id=flow.connection_id, code=code, client=client, now=now
                )
                won.append(token)
            except handoff.CodeUsed:
                lost.append(client)
            finally:
                database.close()

        clients = [handoff.client_of(f"10.0.0.{last}", "x") for last in range(4)]
        threads = [threading.Thread(target=run, args=(c, flow, code, gate, won, lost)) for c in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 3)


def test_A03_looking_at_a_code_consumes_nothing(owner: User, principal: Principal, now: dt.datetime) -> None:
    flow, code = start(owner, principal, now)
    for client in (ALICE, BOB, ALICE):
        assert handoff.peek(connection_id=flow.connection_id, code=code, client=client, now=now).id == flow.id
    handoff.exchange(connection_id=flow.connection_id, code=code, client=BOB, now=now)
    with pytest.raises(handoff.CodeUsed):
        handoff.peek(connection_id=flow.connection_id, code=code, client=ALICE, now=now)


def test_A03_a_wrong_code_or_the_code_of_another_connection_is_unknown(
    owner: User, principal: Principal, now: dt.datetime
) -> None:
    flow, _ = start(owner, principal, now, "one")
    _, other_code = start(owner, principal, now, "two")
    for code in ("", "wrong", other_code):
        with pytest.raises(handoff.UnknownCode):
            handoff.exchange(connection_id=flow.connection_id, code=code, client=ALICE, now=now)


def test_A03_a_code_dies_with_its_flow(owner: User, principal: Principal, now: dt.datetime) -> None:
    flow, code = start(owner, principal, now, "canceled")
    transitions.cancel(connection_id=flow.connection_id, actor=principal, reason="no", now=now)
    with pytest.raises(handoff.CodeUsed):
        handoff.exchange(connection_id=flow.connection_id, code=code, client=ALICE, now=now)
    flow, code = start(owner, principal, now, "late")
    with pytest.raises(handoff.CodeUsed):
        handoff.exchange(connection_id=flow.connection_id, code=code, client=ALICE, now=flow.expires_at)


def test_A03_a_fresh_code_replaces_the_one_before_and_tokens_go_on_working(
    owner: User, principal: Principal, now: dt.datetime
) -> None:
    flow, code = start(owner, principal, now)
    _, token = handoff.exchange(connection_id=flow.connection_id, code=code, client=ALICE, now=now)
    _, fresh = transitions.new_handoff(connection_id=flow.connection_id, actor=principal, now=now)
    with pytest.raises(handoff.UnknownCode):
        handoff.exchange(connection_id=flow.connection_id, code=code, client=ALICE, now=now)
    handoff.exchange(connection_id=flow.connection_id, code=fresh, client=BOB, now=now)
    assert handoff.principal_of_token(token, now=now).flow_id == flow.id


def test_A02_the_token_has_the_claims_of_the_contract_and_is_bound_to_connection_and_flow(
    owner: User, principal: Principal, now: dt.datetime
) -> None:
    flow, code = start(owner, principal, now)
    _, token = handoff.exchange(connection_id=flow.connection_id, code=code, client=ALICE, now=now)
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["iss"] == "kernel-api"
    assert claims["managed_auth_session_id"] == flow.connection_id
    assert claims["invocation_id"] == flow.id
    assert claims["exp"] - claims["iat"] == 30 * 60
    page = handoff.principal_of_token(token, now=now)
    assert (page.connection_id, page.flow_id, page.is_page) == (flow.connection_id, flow.id, True)


def test_A02_a_token_that_is_old_forged_or_no_token_is_refused_as_expired(
    owner: User, principal: Principal, now: dt.datetime
) -> None:
    flow, _ = start(owner, principal, now)
    token = handoff.token_of(flow, at=now)
    with pytest.raises(handoff.TokenExpired):
        handoff.principal_of_token(token, now=now + handoff.LIFETIME + SECOND)
    claims = jwt.decode(token, options={"verify_signature": False})
    forged = jwt.encode(claims, "another key of thirty-two characters", algorithm="HS256")
    unsigned = jwt.encode(claims, None, algorithm="none")
    for text in (forged, unsigned, "", "x.y.z", token[:-3]):
        with pytest.raises(handoff.TokenExpired):
            handoff.principal_of_token(text, now=now)


def test_A49_after_the_end_the_token_still_reads_the_result_until_the_flow_would_have_expired(
    owner: User, principal: Principal, now: dt.datetime
) -> None:
    flow, _ = start(owner, principal, now)
    token = handoff.token_of(flow, at=now + dt.timedelta(minutes=10))
    hold = tasks.claim(worker="w", kinds=["login"], now=now)
    assert hold is not None
    transitions.fail(hold=hold, code="credentials_invalid", message="No.", now=now)
    assert handoff.principal_of_token(token, now=now).flow_id == flow.id
    with pytest.raises(handoff.TokenOver):
        handoff.principal_of_token(token, now=flow.expires_at)


def test_A49_an_expired_flow_a_newer_flow_and_a_deleted_connection_end_the_token(
    owner: User, principal: Principal, now: dt.datetime
) -> None:
    flow, _ = start(owner, principal, now, "newer")
    token = handoff.token_of(flow, at=now)
    transitions.cancel(connection_id=flow.connection_id, actor=principal, reason="no", now=now)
    assert handoff.principal_of_token(token, now=now)
    transitions.start_login(connection_id=flow.connection_id, actor=principal, now=now)
    with pytest.raises(handoff.TokenOver):
        handoff.principal_of_token(token, now=now)

    flow, _ = start(owner, principal, now, "expired")
    token = handoff.token_of(flow, at=now + dt.timedelta(minutes=20))
    # Its time is over, whether somebody has noticed or not.
    with pytest.raises(handoff.TokenOver):
        handoff.principal_of_token(token, now=flow.expires_at)
    assert transitions.expire_if_due(connection_id=flow.connection_id, now=flow.expires_at)
    assert LoginFlow.objects.get(pk=flow.id).status == FlowStatus.EXPIRED
    with pytest.raises(handoff.TokenOver):
        handoff.principal_of_token(token, now=flow.expires_at)

    flow, _ = start(owner, principal, now, "deleted")
    token = handoff.token_of(flow, at=now)
    transitions.delete_connection(connection_id=flow.connection_id, actor=principal, now=now)
    with pytest.raises(handoff.TokenOver):
        handoff.principal_of_token(token, now=now)
