"""Kernel's official Python SDK against a real server and a real worker, with nothing changed but the base URL."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import kernel
import pytest
from kernel import AsyncKernel, Kernel

from tests.conftest import Running, until
from tests.sites import EMAIL, PASSWORD, TOTP_SECRET, USERNAME, Site

pytestmark = pytest.mark.live
_numbers = itertools.count(1)


def fresh_name() -> str:
    """Profiles are shared by all tests of the session."""
    return f"sdk {next(_numbers)}"


@pytest.fixture
def client(running: Running) -> Iterator[Kernel]:
    # With the SDK's own retries: what is not to be repeated must say so itself.
    with Kernel(api_key=running.api_key, base_url=running.url) as made:
        yield made


class Follower:
    """Follows a connection in a thread, as a program does beside its own work."""

    def __init__(self, client: Kernel, connection_id: str) -> None:
        self.events: list[Any] = []
        self.closed = threading.Event()
        self.error: BaseException | None = None
        self._client = client
        self._id = connection_id
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            with self._client.auth.connections.follow(self._id) as stream:
                for event in stream:
                    self.events.append(event)
        except BaseException as error:  # shown by the test
            self.error = error
        finally:
            self.closed.set()

    @property
    def states(self) -> list[Any]:
        return [event for event in list(self.events) if event.event == "managed_auth_state"]

    def wait_for(self, step: str, *, after: str | None = None) -> Any:
        """The next state in this step, with another interaction than ``after``."""

        def look() -> Any:
            assert self.error is None, self.error
            last = self.states[-1:]
            return next((e for e in last if e.flow_step == step and e.interaction_id != after), None)

        return until(look, 30, f"no {step}: {[(e.flow_status, e.flow_step) for e in self.states]}")

    def end(self) -> Any:
        """The last state, once the server has closed the stream."""
        assert self.closed.wait(30), f"not closed: {[(e.flow_status, e.flow_step) for e in self.states]}"
        assert self.error is None, self.error
        return self.states[-1]


def answer(client: Kernel, connection_id: str, event: Any, given: dict[str, str]) -> None:
    accepted = client.auth.connections.submit(
        connection_id,
        interaction_id=event.interaction_id,
        field_values={field.id: given[field.type] for field in event.fields},
    )
    assert accepted.accepted is True


def test_a_login_to_djangos_admin_with_a_wrong_password_first(client: Kernel, running: Running) -> None:
    name = fresh_name()
    connections = client.auth.connections
    connection = connections.create(
        domain=running.domain, profile_name=name, login_url=f"{running.url}/admin/login/", health_checks=False
    )
    assert (connection.status, connection.flow_status) == ("NEEDS_AUTH", None)
    with pytest.raises(kernel.ConflictError) as conflict:
        connections.create(domain=running.domain, profile_name=name)
    assert conflict.value.body["existing_id"] == connection.id  # type: ignore[index]

    started = connections.login(connection.id)
    assert started.flow_type == "LOGIN"
    assert connections.login(connection.id) == started, "the same request again is the same answer"
    follower = Follower(client, connection.id)
    first = follower.wait_for("AWAITING_INPUT")
    assert [field.type for field in first.fields] == ["identifier", "password"]
    assert [field.name for field in first.discovered_fields] == [field.ref for field in first.fields]
    answer(client, connection.id, first, {"identifier": running.username, "password": "wrong"})

    second = follower.wait_for("AWAITING_INPUT", after=first.interaction_id)
    assert "correct username and password" in second.website_error
    assert {field.reason for field in second.fields} == {"rejected"}
    with pytest.raises(kernel.BadRequestError) as stale:
        answer(client, connection.id, first, {"identifier": running.username, "password": "other"})
    assert stale.value.body["code"] == "stale_interaction"  # type: ignore[index]
    answer(client, connection.id, second, {"identifier": running.username, "password": running.password})

    end = follower.end()
    assert (end.flow_status, end.flow_step) == ("SUCCESS", "COMPLETED")
    assert end.post_login_url.startswith(f"{running.url}/admin/")
    asked = [state.interaction_id for state in follower.states if state.flow_step == "AWAITING_INPUT"]
    assert len(asked) == len(set(asked)) == 2, "one event per question"

    now = connections.retrieve(connection.id)
    assert (now.status, now.flow_status, now.can_reauth) == ("AUTHENTICATED", "SUCCESS", True)
    (row,) = connections.timeline(connection.id).items
    assert (row.type, row.status, row.step) == ("login", "SUCCESS", "COMPLETED")
    assert row.completed_at is not None
    with pytest.raises(kernel.APIStatusError) as over:
        connections.submit(connection.id, fields={"password": "x"})
    assert over.value.status_code == 410

    late = Follower(client, connection.id)
    assert late.end().flow_status == "SUCCESS"
    assert len(late.states) == 1, "a stream opened after the end gets that state and is closed"

    state = client.profiles.download(name).json()
    assert "sessionid" in {cookie["name"] for cookie in state["cookies"]}


def test_a_login_with_an_authenticator_code(client: Kernel) -> None:
    with Site(scenario="totp") as site:
        connection = client.auth.connections.create(domain=site.domain, profile_name=fresh_name())
        client.auth.connections.login(connection.id)
        follower = Follower(client, connection.id)
        first = follower.wait_for("AWAITING_INPUT")
        answer(client, connection.id, first, {"identifier": USERNAME, "password": PASSWORD})
        second = follower.wait_for("AWAITING_INPUT", after=first.interaction_id)
        assert [field.type for field in second.fields] == ["totp_code"]
        answer(client, connection.id, second, {"totp_code": site.totp()})
        assert follower.end().flow_status == "SUCCESS"


def test_stored_values_and_a_stored_secret_log_in_without_anybody(client: Kernel) -> None:
    with Site(scenario="totp") as site:
        name = fresh_name()
        stored = client.credentials.create(
            name=name,
            domain=site.domain,
            values={"username": USERNAME, "password": PASSWORD},
            totp_secret=TOTP_SECRET,
        )
        assert stored.has_totp_secret
        assert stored.totp_code is not None
        connection = client.auth.connections.create(
            domain=site.domain, profile_name=name, credential={"name": name}
        )
        client.auth.connections.login(connection.id)
        follower = Follower(client, connection.id)
        assert follower.end().flow_status == "SUCCESS"
        assert "AWAITING_INPUT" not in {state.flow_step for state in follower.states}
        assert client.auth.connections.retrieve(connection.id).can_reauth


def test_a_choice_of_accounts_by_its_canonical_id(client: Kernel) -> None:
    with Site(scenario="accounts") as site:
        connection = client.auth.connections.create(domain=site.domain, profile_name=fresh_name())
        client.auth.connections.login(connection.id)
        follower = Follower(client, connection.id)
        first = follower.wait_for("AWAITING_INPUT")
        answer(client, connection.id, first, {"identifier": EMAIL, "password": PASSWORD})
        second = follower.wait_for("AWAITING_INPUT", after=first.interaction_id)
        assert len(second.choices) > 1
        assert [option.id for option in second.sign_in_options] == [choice.id for choice in second.choices]
        client.auth.connections.submit(
            connection.id, interaction_id=second.interaction_id, selected_choice_id=second.choices[0].id
        )
        assert follower.end().flow_status == "SUCCESS"


def test_a_canceled_login_ends_its_stream(client: Kernel, running: Running) -> None:
    with Site(scenario="simple") as site:
        connection = client.auth.connections.create(domain=site.domain, profile_name=fresh_name())
        client.auth.connections.login(connection.id)
        follower = Follower(client, connection.id)
        follower.wait_for("AWAITING_INPUT")
        client.post(f"/auth/connections/{connection.id}/cancel", cast_to=object)
        assert follower.end().flow_status == "CANCELED"


def test_a_health_check_is_run_and_stands_in_the_timeline(client: Kernel) -> None:
    with Site(scenario="simple") as site:
        connection = client.auth.connections.create(domain=site.domain, profile_name=fresh_name())
        client.auth.connections.login(connection.id)
        follower = Follower(client, connection.id)
        answer(
            client,
            connection.id,
            follower.wait_for("AWAITING_INPUT"),
            {"identifier": USERNAME, "password": PASSWORD},
        )
        assert follower.end().flow_status == "SUCCESS"
        client.post(f"/auth/connections/{connection.id}/check", cast_to=object)
        rows = until(
            lambda: client.auth.connections.timeline(connection.id, type="health_check").items,
            30,
            "the health check was not run",
        )
        assert [(row.type, row.status) for row in rows] == [("health_check", "AUTHENTICATED")]
        both = client.auth.connections.timeline(connection.id).items
        assert [row.type for row in both] == ["health_check", "login"]
        assert client.auth.connections.retrieve(connection.id).last_auth_check_at is not None


def test_lists_are_walked_page_by_page(client: Kernel) -> None:
    name = fresh_name()
    made = [client.auth.connections.create(domain=f"d{n}.example", profile_name=name).id for n in range(5)]
    walked = [row.id for row in client.auth.connections.list(profile_name=name, limit=2)]
    assert walked == list(reversed(made)), "newest first, each once"
    page = client.auth.connections.list(profile_name=name, limit=2)
    assert (page.has_more, page.next_offset) == (True, 2)
    assert [row.id for row in client.auth.connections.list(profile_name=name, query="d3.")] == [made[3]]
    changed = client.auth.connections.update(made[0], auto_reauth=False, allowed_domains=["www.a.example"])
    assert (changed.auto_reauth, changed.allowed_domains) == (False, ["a.example"])
    client.auth.connections.delete(made[0])
    assert len(list(client.auth.connections.list(profile_name=name))) == 4


def test_credentials_are_kept_changed_and_deleted(client: Kernel) -> None:
    name = fresh_name()
    made = client.credentials.create(
        name=name, domain="shop.example", values={"username": "u", "password": "p"}
    )
    with pytest.raises(kernel.ConflictError):
        client.credentials.create(name=name, domain="shop.example", values={})
    assert client.credentials.retrieve(name).value_keys == ["password", "username"]
    changed = client.credentials.update(
        made.id, remove_value_keys=["username"], values={"pin": "1"}, totp_secret="JBSWY3DPEHPK3PXP"
    )
    assert changed.value_keys == ["password", "pin"]
    code = client.credentials.totp_code(name)
    assert (len(code.code), code.expires_at.tzinfo is not None) == (6, True)
    assert made.id in {row.id for row in client.credentials.list(query=name)}
    client.credentials.delete(name)
    with pytest.raises(kernel.NotFoundError):
        client.credentials.totp_code(made.id)


def test_profiles_are_kept_renamed_and_deleted(client: Kernel) -> None:
    name = fresh_name()
    made = client.profiles.create(name=name)
    with pytest.raises(kernel.ConflictError):
        client.profiles.create(name=name)
    assert client.profiles.retrieve(name).id == made.id
    assert client.profiles.update(made.id, name=f"{name} new").name == f"{name} new"
    assert [row.id for row in client.profiles.list(query=f"{name} n")] == [made.id]
    with pytest.raises(kernel.NotFoundError):
        client.profiles.download(made.id)
    client.profiles.delete(f"{name} new")
    with pytest.raises(kernel.NotFoundError):
        client.profiles.retrieve(made.id)


def test_errors_are_the_exceptions_of_the_sdk_and_deliberate_ones_are_not_repeated(running: Running) -> None:
    seen: list[str] = []
    http = httpx.Client(event_hooks={"request": [lambda request: seen.append(request.url.path)]})
    with Kernel(api_key=running.api_key, base_url=running.url, http_client=http) as client:
        name = fresh_name()
        connection = client.auth.connections.create(domain="a.example", profile_name=name)
        seen.clear()
        with pytest.raises(kernel.ConflictError):
            client.auth.connections.create(domain="a.example", profile_name=name)
        with pytest.raises(kernel.BadRequestError):
            client.auth.connections.create(domain="https://a.example", profile_name=name)
        with pytest.raises(kernel.BadRequestError):
            client.auth.connections.login(connection.id, extra_body={"surprise": 1})
        with pytest.raises(kernel.NotFoundError):
            client.auth.connections.retrieve("ma_none")
        with pytest.raises(kernel.APIStatusError) as over:
            client.auth.connections.submit(connection.id, fields={"a": "b"})
        assert over.value.status_code == 410
        assert over.value.body["code"] == "no_active_flow"  # type: ignore[index]
        assert len(seen) == 5, "each was asked once"
    with (
        Kernel(api_key="sk_wrong", base_url=running.url) as nobody,
        pytest.raises(kernel.AuthenticationError),
    ):
        nobody.auth.connections.list()
    with Kernel(api_key=running.other_api_key, base_url=running.url) as other:
        with pytest.raises(kernel.NotFoundError):
            other.auth.connections.retrieve(connection.id)
        with pytest.raises(kernel.NotFoundError):
            other.auth.connections.follow(connection.id)


def test_a_login_runs_once_at_a_time(client: Kernel, running: Running) -> None:
    with Site(scenario="simple") as site:
        connection = client.auth.connections.create(domain=site.domain, profile_name=fresh_name())
        client.auth.connections.login(connection.id)
        follower = Follower(client, connection.id)
        first = follower.wait_for("AWAITING_INPUT")
        answer(client, connection.id, first, {"identifier": USERNAME, "password": "wrong"})
        with pytest.raises(kernel.ConflictError) as running_one:
            client.auth.connections.login(connection.id)
        assert running_one.value.body["code"] == "login_in_progress"  # type: ignore[index]
        client.auth.connections.delete(connection.id)
        assert follower.end().flow_status == "CANCELED"


def test_the_asynchronous_sdk_follows_as_well(running: Running) -> None:
    async def walk() -> list[str]:
        steps: list[str] = []
        async with AsyncKernel(api_key=running.api_key, base_url=running.url) as client:
            connection = await client.auth.connections.create(domain=site.domain, profile_name=fresh_name())
            await client.auth.connections.login(connection.id)
            async with await client.auth.connections.follow(connection.id) as stream:
                async for event in stream:
                    if event.event != "managed_auth_state":
                        continue
                    steps.append(
                        str(event.flow_status if event.flow_step == "COMPLETED" else event.flow_step)
                    )
                    if event.flow_step == "AWAITING_INPUT":
                        await client.auth.connections.submit(
                            connection.id, fields={"username": USERNAME, "password": PASSWORD}
                        )
        return steps

    with Site(scenario="simple") as site:
        steps = asyncio.run(asyncio.wait_for(walk(), 60))
    assert steps[-1] == "SUCCESS"
    assert steps.count("AWAITING_INPUT") == 1


# ── Beside the SDK: what the React component and other programs do ────────────────────────────────────────────────


def test_A02_A03_a_page_exchanges_its_code_and_follows_with_its_token_alone(
    client: Kernel, running: Running
) -> None:
    with Site(scenario="simple") as site, httpx.Client(base_url=running.url, timeout=30) as page:
        connection = client.auth.connections.create(domain=site.domain, profile_name=fresh_name())
        started = client.auth.connections.login(connection.id)
        path = f"/auth/connections/{connection.id}"
        exchanged = page.post(f"{path}/exchange", json={"code": started.handoff_code}).json()
        bearer = {"Authorization": f"Bearer {exchanged['jwt']}"}
        assert page.get(path, headers=bearer).json()["flow_id"] == exchanged["invocation_id"]
        with httpx.Client(base_url=running.url, headers={"User-Agent": "somebody else"}) as another:
            assert another.post(f"{path}/exchange", json={"code": started.handoff_code}).status_code == 410

        other = client.auth.connections.create(domain="other.example", profile_name=fresh_name())
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            refused = page.get(f"{path}/events", headers=headers)
            assert refused.status_code == 401
            assert refused.headers["content-type"].startswith("application/json")
        foreign = page.get(f"/auth/connections/{other.id}/events", headers=bearer)
        assert foreign.status_code in (401, 403)
        assert page.get("/api/events", headers=bearer).status_code == 401

        with Kernel(api_key=exchanged["jwt"], base_url=running.url) as as_page:
            follower = Follower(as_page, connection.id)
            first = follower.wait_for("AWAITING_INPUT")
            answer(as_page, connection.id, first, {"identifier": USERNAME, "password": PASSWORD})
            assert follower.end().flow_status == "SUCCESS"
        assert page.get(path, headers=bearer).json()["flow_status"] == "SUCCESS"
        assert page.post(f"{path}/submit", headers=bearer, json={"fields": {"a": "b"}}).status_code == 410


def test_a_chunked_body_is_read_and_a_huge_one_refused(running: Running) -> None:
    def chunks(body: bytes) -> Iterator[bytes]:
        for start in range(0, len(body), 4096):
            yield body[start : start + 4096]

    headers = {"Authorization": f"Bearer {running.api_key}", "Content-Type": "application/json"}
    name = fresh_name()
    small = httpx.post(
        f"{running.url}/profiles", headers=headers, content=chunks(f'{{"name": "{name}"}}'.encode())
    )
    assert (small.status_code, small.json().get("name")) == (201, name)
    huge = httpx.post(
        f"{running.url}/profiles", headers=headers, content=chunks(b'{"name": "' + b"x" * 3_000_000 + b'"}')
    )
    assert (huge.status_code, huge.json()["code"]) == (413, "payload_too_large")
    declared = httpx.post(f"{running.url}/profiles", headers=headers, content=b"x" * 3_000_000)
    assert (declared.status_code, declared.json()["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    "query", ["after=x", "after=-1", "after=1.5", "after=" + "9" * 30, "topics=nonsense", "topics=x:1"]
)
def test_a_bad_cursor_or_topic_is_400_before_the_first_byte(running: Running, query: str) -> None:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    refused = httpx.get(f"{running.url}/api/events?{query}", headers=headers)
    assert refused.status_code == 400
    assert refused.headers["content-type"].startswith("application/json")
    assert set(refused.json()) >= {"code", "message"}


def test_a_stored_answer_outlives_a_restart_of_the_server(own_running: Running) -> None:
    headers = {"Authorization": f"Bearer {own_running.api_key}", "Idempotency-Key": "once"}
    url = f"{own_running.url}/profiles"
    first = httpx.post(url, headers=headers, json={})
    assert first.status_code == 201
    own_running.stop("server")
    own_running.start("server")
    own_running.wait_until_up()
    again = httpx.post(url, headers=headers, json={})
    assert (again.status_code, again.json()) == (201, first.json())
    assert httpx.post(url, headers=headers, json={"name": "other"}).json()["code"] == "idempotency_conflict"


def test_A48_what_was_typed_is_in_no_log_of_server_or_worker(client: Kernel, running: Running) -> None:
    secret = "xyzzy-swordfish-42"
    with Site(scenario="simple") as site:
        connection = client.auth.connections.create(domain=site.domain, profile_name=fresh_name())
        started = client.auth.connections.login(connection.id)
        follower = Follower(client, connection.id)
        first = follower.wait_for("AWAITING_INPUT")
        answer(client, connection.id, first, {"identifier": USERNAME, "password": secret})
        second = follower.wait_for("AWAITING_INPUT", after=first.interaction_id)
        assert secret not in (second.website_error or "")
        assert secret not in repr(follower.events)
        client.auth.connections.delete(connection.id)
        follower.end()
    for name in ("server", "worker"):
        assert secret not in running.log(name)
        assert str(started.handoff_code) not in running.log(name)
        assert running.api_key not in running.log(name)
