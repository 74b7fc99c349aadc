"""The event streams over real sockets: headers, cursors, permissions, heartbeats, and the stream of one connection."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import Running, run_switchboard, until
from tests.live.streaming import Stream, call, connect, events, login, managed, many, write_elsewhere
from tests.sites.app import PASSWORD, USERNAME, Site

pytestmark = pytest.mark.live

HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
    "content-encoding": "identity",
    "x-content-type-options": "nosniff",
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Heartbeats every second, and few streams for each caller."""
    with run_switchboard(
        tmp_path_factory.mktemp("quick"),
        HEARTBEAT_SECONDS="1",
        STREAM_LIMIT="4",
        CORS_ORIGINS="https://app.example.com",
    ) as started:
        yield started


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as started:
        yield started


def headers_of(stream: Stream) -> dict[str, str]:
    return {name.lower(): value for name, value in stream.answer.getheaders()}


# ── /api/events ──


def test_C01_C03_a_stream_has_the_headers_of_the_contract_and_ready_is_first(running: Running) -> None:
    with events(running) as stream:
        ready = stream.named("ready")
        assert stream.status == 200
        got = headers_of(stream)
        assert {name: got.get(name) for name in HEADERS} == HEADERS
        assert stream.names()[0] == "ready"
        assert stream.parser.retry_ms is not None
        created = connect(running)
        event = stream.until(
            lambda event: event.name == "connection.created" and event.json()["id"] == created["id"]
        )
        assert int(event.id) > ready.json()["cursor"]


def test_C01_compression_is_not_applied_even_when_asked_for(running: Running) -> None:
    with events(running, Accept_Encoding="gzip, br") as stream:
        stream.named("ready")
        assert headers_of(stream)["content-encoding"] == "identity"


def test_B01_welcome_comes_before_everything_when_a_cid_was_given(running: Running) -> None:
    with events(running, "?cid=conn-1-abcdef") as stream:
        stream.named("ready")
        names = stream.names()
        # That it was opened is an event like any other, and may be there before everything is that "ready" waits for.
        assert [name for name in names if name != "client.opened"][:2] == ["welcome", "ready"]
        assert names[0] == "welcome"
        assert {
            "connection_id",
            "epoch",
            "cid_accepted",
            "resumed",
            "server_time",
            "heartbeat_seconds",
        } <= set(stream.events[0].json())


def test_C44_a_cursor_resumes_after_it_and_the_header_wins(running: Running) -> None:
    with events(running) as stream:
        start = stream.named("ready").json()["cursor"]
        ids = [connect(running)["id"] for _ in range(3)]
        stream.until(lambda event: event.name == "connection.created" and event.json()["id"] == ids[-1])
        expected = [(event.id, event.name, event.data) for event in stream.logged()]
    for stream in (
        events(running, f"?after={start}"),
        events(running, "?after=999999999", Last_Event_ID=str(start)),
    ):
        with stream:
            stream.named("ready")
            assert stream.names()[-1] == "ready"
            assert [(event.id, event.name, event.data) for event in stream.logged()][
                : len(expected)
            ] == expected


@pytest.mark.parametrize("cursor", ["-1", "x", "1.5", "99999999999999999999", "9" * 5000, "%00"])
def test_C44_a_cursor_that_is_no_cursor_is_400_before_any_byte_of_a_stream(
    running: Running, cursor: str
) -> None:
    with events(running, f"?after={cursor}") as stream:
        assert stream.status == 400
        assert headers_of(stream)["content-type"] == "application/json"
        assert stream.json()["code"] == "invalid_cursor"


@pytest.mark.parametrize(
    ("query", "code"), [("?topics=nonsense", "invalid_topics"), ("?what=1", "invalid_parameter")]
)
def test_wrong_parameters_are_400(running: Running, query: str, code: str) -> None:
    with events(running, query) as stream:
        assert (stream.status, stream.json()["code"]) == (400, code)


def test_B34_a_cursor_beyond_the_end_is_reset_and_the_stream_goes_on(running: Running) -> None:
    with events(running, "?after=4611686018427387904") as stream:
        reset = stream.named("reset").json()
        assert reset["reason"] == "unknown_cursor"
        assert stream.named("ready").json()["cursor"] >= reset["cursor"]
        created = connect(running)
        stream.until(lambda event: event.name == "connection.created" and event.json()["id"] == created["id"])


@pytest.mark.parametrize("key", ["", "sk_wrong"])
def test_C02_A02_without_a_valid_key_it_is_401_json_and_no_stream(running: Running, key: str) -> None:
    with events(running, key=key) as stream:
        assert stream.status == 401
        assert headers_of(stream)["content-type"] == "application/json"
        assert set(stream.json()) >= {"code", "message"}


def test_another_method_is_405(running: Running) -> None:
    status, body, headers = call(running, "POST", "/api/events", {})
    assert (status, body["code"], headers["allow"]) == (405, "method_not_allowed", "GET")


def test_C05_others_see_only_what_is_theirs_and_topics_narrow_it(running: Running) -> None:
    first, second = connect(running), connect(running)
    with (
        events(running, f"?topics=connection:{second['id']}") as narrow,
        events(running, "?topics=tasks") as tasks,
        events(running, key=running.other_api_key) as other,
    ):
        for stream in (narrow, tasks, other):
            stream.named("ready")
        for connection in (first, second):
            status, body, _ = call(
                running, "PATCH", f"/auth/connections/{connection['id']}", {"save_credentials": False}
            )
            assert status == 200, body
        theirs = connect(running, key=running.other_api_key)
        event = narrow.named("connection.updated")
        assert event.json()["id"] == second["id"]
        other.until(lambda event: event.name == "connection.created")
        assert {event.json()["id"] for event in narrow.logged()} == {second["id"]}
        assert {event.json()["id"] for event in other.logged()} == {theirs["id"]}
        assert tasks.logged() == []


def test_C07_silence_is_broken_by_heartbeats(quick: Running) -> None:
    with events(quick) as stream:
        stream.named("ready")
        until(lambda: len(stream.of("heartbeat")) >= 2, 10)
        assert set(stream.of("heartbeat")[0].json()) == {"server_time"}
        assert stream.of("heartbeat")[0].id == "", "a heartbeat carries no cursor"


def test_C02_too_many_streams_of_one_caller_are_429_and_a_closed_one_makes_room(quick: Running) -> None:
    def open_one() -> Stream:
        return events(quick, key=quick.other_api_key)

    held = [open_one() for _ in range(4)]
    try:
        assert [stream.status for stream in held] == [200] * 4
        with open_one() as refused:
            assert refused.status == 429
            assert int(headers_of(refused)["retry-after"]) > 0
            assert refused.json()["code"] == "too_many_streams"
        # C06: the place of a client that is gone is free at once.
        held.pop().close()

        def free() -> bool:
            with open_one() as again:
                return again.status == 200

        until(free, 5)
    finally:
        for stream in held:
            stream.close()


def test_B14_at_the_limit_of_streams_a_page_whose_network_changed_comes_back_and_nobody_else_comes(
    quick: Running,
) -> None:
    cids = [f"cid-{uuid.uuid4()}" for _ in range(5)]

    def open_one(cid: str, page: str = "page-one") -> Stream:
        return events(quick, f"?cid={cid}&page={page}", key=quick.other_api_key)

    with contextlib.ExitStack() as opened:
        held = [opened.enter_context(open_one(cid)) for cid in cids[:4]]
        for stream in held:
            stream.named("ready")
        for cid, page in ((cids[4], "page-one"), (cids[0], "page-two")):
            assert opened.enter_context(open_one(cid, page)).status == 429
        for before in (held[0], held[1]):
            cid = before.named("welcome").json()["connection_id"]
            again = opened.enter_context(open_one(cid))
            assert again.named("welcome").json() | {"server_time": ""} == {
                **before.named("welcome").json(), "server_time": "", "epoch": 2, "resumed": True,
            }  # fmt: skip
            before.named("superseded")
            assert before.ended.wait(20)
        assert opened.enter_context(open_one(cids[4])).status == 429


_REVOKE = """
from connections.models import ApiKey
from connections import registry
from django.utils import timezone
registry.revoke_api_key(key_id=ApiKey.objects.get(name="doomed").pk, now=timezone.now())
"""
_MAKE = """
from connections import registry
from django.contrib.auth.models import User
from django.utils import timezone
user, _ = User.objects.get_or_create(username={user!r})
print("KEY", registry.create_api_key(owner_id=user.pk, name={name!r}, now=timezone.now())[1])
"""
_DEACTIVATE = """
from django.contrib.auth.models import User
User.objects.filter(username="leaver").update(is_active=False)
"""


@pytest.mark.parametrize(
    ("user", "name", "end"), [("admin", "doomed", _REVOKE), ("leaver", "leaver", _DEACTIVATE)]
)
def test_A49_a_revoked_key_and_a_deactivated_user_end_the_stream_within_a_heartbeat(
    quick: Running, user: str, name: str, end: str
) -> None:
    key = quick.shell(_MAKE.format(user=user, name=name)).split("KEY ")[1].strip()
    with events(quick, key=key) as stream:
        stream.named("ready")
        quick.shell(end)
        assert stream.named("end", 3).json() == {"reason": "session_over", "reconnect": False}
        assert stream.ended.wait(30)
        assert stream.names()[-1] == "end"
    with events(quick, key=key) as again:
        assert again.status == 401


def test_A49_a_revoked_key_ends_its_stream_also_while_its_address_is_over_the_limit_of_wrong_keys(
    tmp_path: Path,
) -> None:
    """The limit answers 429 where it would answer 401, which must not be taken for a passing fault."""
    # A server of its own: its address is refused for a minute.
    with run_switchboard(tmp_path, HEARTBEAT_SECONDS="1") as running:
        flood_and_revoke(running)


def flood_and_revoke(running: Running) -> None:
    key = running.manage("create_api_key", "--user", running.other_username, "--name", "flooded").split()[-1]
    with events(running, key=key) as stream:
        stream.named("ready")
        while call(running, "GET", "/auth/connections", key="sk_wrong")[0] != 429:
            pass
        running.shell(
            "from connections.models import ApiKey; from django.utils import timezone\n"
            "ApiKey.objects.filter(name='flooded').update(revoked_at=timezone.now())",
        )  # fmt: skip
        assert stream.named("end").json() == {"reason": "session_over", "reconnect": False}


def test_A49_signing_out_ends_the_streams_of_the_session(quick: Running) -> None:
    made = quick.shell(
        "from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY\n"
        "from django.contrib.auth.models import User\n"
        "from django.contrib.sessions.backends.db import SessionStore\n"
        "user = User.objects.get(username='admin'); session = SessionStore()\n"
        "session[SESSION_KEY] = str(user.pk); session[HASH_SESSION_KEY] = user.get_session_auth_hash()\n"
        "session[BACKEND_SESSION_KEY] = 'django.contrib.auth.backends.ModelBackend'\n"
        "session.save(); print('SID', session.session_key)",
    ).split("SID ")[1].strip()  # fmt: skip
    cookie = {"Cookie": f"sessionid={made}"}
    with (
        Stream(f"{quick.url}/api/events", headers=cookie) as stream,
        Stream(f"{quick.url}/live", headers=cookie) as live,
    ):
        stream.named("ready")
        live.named("ready")
        assert live.names()[0] == "welcome"
        # Row B51: the page of somebody who was signed in here before gets nothing of the one who is now.
        with Stream(f"{quick.url}/live", headers=cookie | {"X-Page-User": "user:0"}) as former:
            assert former.status == 401
        quick.shell(
            f"from django.contrib.sessions.models import Session; Session.objects.filter(pk='{made}').delete()",
        )  # fmt: skip
        for each in (stream, live):
            assert each.named("end", 3).json() == {"reason": "session_over", "reconnect": False}
    with Stream(f"{quick.url}/api/events", headers=cookie) as again:
        assert again.status == 401


def test_B08_a_page_of_another_site_opens_no_stream_with_the_cookie_of_ours(running: Running) -> None:
    cid = f"cid-{uuid.uuid4()}"
    with http_session(running) as (cookie, _):
        for path in ("/live", "/api/events"):
            for site, status in (
                ("cross-site", 401),
                ("same-site", 401),
                ("same-origin", 200),
                ("none", 200),
            ):
                headers = {"Cookie": cookie, "Sec-Fetch-Site": site}
                with Stream(f"{running.url}{path}?cid={cid}&page=forged-page", headers=headers) as stream:
                    assert stream.status == status, (path, site)


def test_C36_a_change_of_another_process_is_on_every_open_stream_within_a_second(running: Running) -> None:
    delays: list[float] = []
    with many(5, lambda: events(running, "?topics=task:elsewhere")) as streams:
        for stream in streams:
            stream.named("ready")
        # A machine that is busy delays everything now and then, and a hub that looks too rarely delays everything always.
        while not delays or (min(delays) >= 1.0 and len(delays) < 5):
            write_elsewhere(running, 20, topic="elsewhere")
            wrote = time.monotonic()
            count = 20 * (len(delays) + 1)
            for stream in streams:
                until(lambda stream=stream, count=count: len(stream.logged()) == count, 5)
            delays.append(max(stream.times[-1] for stream in streams) - wrote)
            for stream in streams:
                assert [event.json()["n"] for event in stream.logged()][-20:] == list(range(20))
    assert min(delays) < 1.0, delays


# ── The stream of one connection ──


def answer(running: Running, connection: dict[str, object], state: dict[str, object]) -> int:
    values = {"identifier": USERNAME, "password": PASSWORD}
    fields = {field["id"]: values[field["type"]] for field in state["fields"]}  # type: ignore[index,attr-defined]
    return call(
        running, "POST", f"/auth/connections/{connection['id']}/submit",
        {"interaction_id": state["interaction_id"], "field_values": fields},
    )[0]  # fmt: skip


def test_A05_A09_A15_A50_a_login_as_its_streams_see_it(quick: Running, site: Site) -> None:
    connection = connect(quick, site.domain, login_url=site.url("/simple/login"))
    with managed(quick, connection) as early, managed(quick, connection) as twin:
        # Before any flow: nothing but heartbeats.
        early.named("sse_heartbeat", 5)
        assert set(early.names()) == {"sse_heartbeat"}
        login(quick, connection)
        state = early.until(lambda event: event.json().get("flow_step") == "AWAITING_INPUT").json()
        with managed(quick, connection) as late:
            first = late.named("managed_auth_state").json()
            assert first["interaction_id"] == state["interaction_id"], "the state is the first frame"
            early.until(lambda event: event.name == "sse_heartbeat" and early.events.index(event) > 2, 5)
            assert answer(quick, connection, state) == 202
            for stream in (early, twin, late):
                assert stream.ended.wait(20), "the server closes after the terminal state"
                assert stream.events[-1].json()["flow_status"] == "SUCCESS"
    for stream in (early, twin, late):
        assert headers_of(stream)["x-sse-content-type"] == "application/json"
        assert stream.parser.comments == 0
        for block in stream.raw.split(b"\n\n")[:-1]:
            name, data = block.split(b"\n")
            assert name.startswith(b"event: ")
            assert data.startswith(b"data: {")
        for event in stream.events:
            body = event.json()
            assert body["event"] == event.name
            assert "timestamp" in body
            assert not {"id", "domain", "profile_name", "connection_id"} & set(body), "A04"
            if event.name == "managed_auth_state":
                assert {"flow_status", "flow_step"} <= set(body)
        asked = [
            event.json()["interaction_id"]
            for event in stream.events
            if event.json().get("flow_step") == "AWAITING_INPUT"
        ]
        assert asked == [state["interaction_id"]], "one event for each interaction"
        versions = [event.json()["version"] for event in stream.of("managed_auth_state")]
        assert versions == sorted(set(versions))
        assert PASSWORD.encode() not in stream.raw
    with managed(quick, connection) as after:
        assert after.ended.wait(30)
        assert [event.json()["flow_status"] for event in after.events] == ["SUCCESS"], (
            "A22: opened after the end"
        )


def test_A02_A16_the_stream_of_a_connection_refuses_strangers(quick: Running) -> None:
    connection = connect(quick)
    for key, status in ((quick.other_api_key, 404), ("sk_wrong", 401), ("", 401)):
        with managed(quick, connection, key=key) as stream:
            assert stream.status == status
            assert set(stream.json()) >= {"code", "message"}
    with managed(quick, {"id": "ma_unknown"}) as stream:
        assert stream.status == 404


def test_A49_a_page_of_a_canceled_flow_sees_the_end_and_one_of_an_older_flow_is_over(
    quick: Running, site: Site
) -> None:
    connection = connect(quick, site.domain, login_url=site.url("/simple/login"))
    code = login(quick, connection)["handoff_code"]
    path = f"/auth/connections/{connection['id']}"
    status, body, _ = call(quick, "POST", f"{path}/exchange", {"code": code})
    assert status == 200
    with managed(quick, connection, key=body["jwt"]) as stream:
        stream.named("managed_auth_state")
        with events(quick, key=body["jwt"]) as everything:
            assert everything.status == 401, "the token opens this one stream and nothing else"
        assert call(quick, "POST", f"{path}/cancel", {})[0] == 200
        assert stream.ended.wait(30)
        assert stream.events[-1].json()["flow_status"] == "CANCELED"
    login(quick, connection)
    with managed(quick, connection, key=body["jwt"]) as over:
        assert over.status == 410
        assert over.json()["message"]


def test_deleting_the_connection_ends_its_stream(quick: Running) -> None:
    connection = connect(quick)
    with managed(quick, connection) as stream:
        stream.named("sse_heartbeat", 5)
        assert call(quick, "DELETE", f"/auth/connections/{connection['id']}")[0] == 204
        assert stream.ended.wait(30)


def test_browsers_of_an_allowed_origin_may_read_the_stream_and_others_may_not(quick: Running) -> None:
    connection = connect(quick)
    path = f"/auth/connections/{connection['id']}/events"
    for origin, allowed in (
        ("https://app.example.com", "https://app.example.com"),
        ("https://evil.example", None),
    ):
        with managed(quick, connection, Origin=origin) as stream:
            assert headers_of(stream).get("access-control-allow-origin") == allowed
            assert "access-control-allow-credentials" not in headers_of(stream)
        with managed(quick, connection, key="sk_wrong", Origin=origin) as refused:
            assert headers_of(refused).get("access-control-allow-origin") == allowed, (
                "its page must be able to read the 401"
            )
        asked = {
            "Origin": origin, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization,last-event-id",
        }  # fmt: skip
        _, _, headers = call(quick, "OPTIONS", path, headers=asked)
        assert headers.get("access-control-allow-origin") == allowed
        if allowed:
            assert {"authorization", "last-event-id"} <= set(
                headers["access-control-allow-headers"].split(", ")
            )


def test_C08_the_life_of_a_stream_is_limited_also_while_events_flow(tmp_path: Path) -> None:
    lives: list[float] = []
    with run_switchboard(tmp_path, STREAM_MAX_SECONDS="2") as started:
        # Again on a machine that is busy with other things: what holds the end back holds it back every time.
        while not lives or (abs(lives[-1] - 2) >= 2 * 0.1 + 1 and len(lives) < 5):
            with events(started) as stream:
                stream.named("ready")
                opened = time.monotonic()
                while not stream.ended.is_set() and time.monotonic() - opened < 60:
                    connect(started)
                assert stream.named("end").json() == {"reason": "lifetime", "reconnect": True}
                lives.append(stream.times[-1] - opened)
        assert abs(lives[-1] - 2) < 2 * 0.1 + 1, lives
        assert stream.names()[-1] == "end"
        seen = [event.id for event in stream.logged()]
        with events(started, f"?after={seen[-1]}") as again, events(started, "?after=0") as everything:
            for each in (again, everything):
                each.named("ready")
            assert (
                seen
                == [event.id for event in everything.logged() if int(event.id) <= int(seen[-1])][-len(seen) :]
            )


def test_B35_what_has_ended_still_tells_its_end_to_a_client_that_was_away(running: Running) -> None:
    connection = connect(running)
    with events(running, f"?topics=connection:{connection['id']}&after=0") as stream:
        cursor = stream.named("connection.created").id
    assert call(running, "DELETE", f"/auth/connections/{connection['id']}")[0] == 204
    with events(running, f"?topics=connection:{connection['id']}&after={cursor}") as again:
        again.named("ready")
        assert again.names()[-2:] == ["connection.deleted", "ready"]


BURST = """
import datetime as dt
from django.db import transaction
from connections import telling
from connections.models import ManagedAuthConnection
rows = list(ManagedAuthConnection.objects.select_related("profile", "credential").filter(pk__in={ids!r}).order_by("pk"))
with transaction.atomic():
    for number in range(20):
        for row in rows:
            telling.connection("connection.updated", row, at=dt.datetime.now(dt.UTC), actor="test")
"""


def test_C40_a_burst_is_drawn_once_for_each_object_that_it_names(running: Running) -> None:
    rows = [connect(running), connect(running)]
    with (
        http_session(running) as (cookie, cursor),
        Stream(f"{running.url}/live?topics=connections&since={cursor}", headers={"Cookie": cookie}) as stream,
    ):
        stream.named("ready")
        ids = [row["id"] for row in rows]
        running.shell(BURST.format(ids=ids))
        until(lambda: len(stream.of("message")) >= 2, 10)
        stream.named("counts")
        drawn = [event.data for event in stream.of("message")]
        assert [sum(each in html for html in drawn) for each in ids] == [1, 1]


@contextlib.contextmanager
def http_session(running: Running) -> Iterator[tuple[str, str]]:
    """A signed-in browser's cookie, and the newest cursor."""
    with httpx.Client(base_url=running.url) as http:
        http.get("/signin")
        form = {
            "username": running.username,
            "password": running.password,
            "csrfmiddlewaretoken": http.cookies["csrftoken"],
        }
        assert http.post("/signin", data=form, headers={"Referer": running.url}).status_code == 302
        with events(running) as stream:
            cursor = stream.named("ready").json()["cursor"]
        yield f"sessionid={http.cookies['sessionid']}", str(cursor)
