"""The pages, without a browser: who sees what, what a form does with and without script, what the stream sends."""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.core.management import call_command
from django.test import Client, RequestFactory
from django.utils import timezone

from connections import errors, fragments, tasks, transitions
from connections.access import Principal, of_user
from connections.models import LoginFlow, ManagedAuthConnection, Submission
from connections.states import FlowStatus, FlowStep
from connections.tasks import Hold
from events import log
from events.models import Event

pytestmark = pytest.mark.django_db(transaction=True)

PASSWORD_FIELDS = [
    {
        "id": "f1",
        "ref": "username",
        "type": "identifier",
        "label": "User name",
        "reason": "missing",
        "required": True,
    },
    {
        "id": "f2",
        "ref": "password",
        "type": "password",
        "label": "Password",
        "reason": "missing",
        "required": True,
    },
]
CODE_FIELDS = [
    {
        "id": "f3", "ref": "code", "type": "code", "label": "Code", "reason": "rejected", "required": True,
        "hint": "Sent to ••42", "input_mode": "numeric",
    },
]  # fmt: skip
CHOICES = [
    {"id": "c9", "type": "other", "label": "Another way"},
    {
        "id": "c1",
        "type": "mfa_method",
        "label": "Text message",
        "mfa_type": "sms",
        "masked_destination": "••42",
    },
    {"id": "c2", "type": "sso_provider", "label": "Continue with Google", "provider": "google"},
]
SCRIPT: Any = {"HTTP_HX_REQUEST": "true"}


def now() -> dt.datetime:
    return timezone.now()


def make(
    principal: Principal, domain: str = "acme.example", profile: str = "finance"
) -> ManagedAuthConnection:
    assert principal.user_id is not None
    return transitions.create_connection(
        owner_id=principal.user_id, domain=domain, profile_name=profile, config={}, actor=principal, now=now()
    )


def hold_of(connection: ManagedAuthConnection, principal: Principal) -> Hold:
    transitions.start_login(connection_id=connection.id, actor=principal, now=now())
    hold = tasks.claim(worker="worker-1", kinds=["login"], now=now())
    assert hold is not None
    return hold


def waiting(principal: Principal, *, fields: Any = PASSWORD_FIELDS, choices: Any = (), **kwargs: Any) -> Any:
    """A connection whose login asks ``fields``; returns (connection, flow, hold)."""
    connection = make(principal, **kwargs)
    hold = hold_of(connection, principal)
    flow = transitions.await_input(hold=hold, fields=list(fields), choices=list(choices), now=now())
    return connection, flow, hold


@pytest.fixture
def web(owner: User) -> Client:
    client = Client()
    client.force_login(owner)
    return client


# ── Who sees what ─────────────────────────────────────────────────────────────────────────────────────────────────

PAGES = ["/", "/connections", "/connections/new", "/tasks", "/tasks/new", "/clients", "/events"]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_asks_to_sign_in_and_comes_back(path: str, client: Client) -> None:
    answer = client.get(path)
    assert answer.status_code == 302
    assert answer.headers["Location"].startswith("/signin?next=")


@pytest.mark.parametrize("path", PAGES)
def test_a_page_opens_when_nothing_exists_yet_and_is_never_stored(path: str, web: Client) -> None:
    answer = web.get(path)
    assert answer.status_code == 200
    assert "no-store" in answer.headers["Cache-Control"]
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_a_script_that_is_signed_out_gets_401_and_no_login_page_to_swap(client: Client) -> None:
    assert client.get("/attention", **SCRIPT).status_code == 401


def test_a_foreign_connection_is_404_on_every_path(owner: User, stranger: User, principal: Principal) -> None:
    connection, flow, _ = waiting(principal)
    outsider = Client()
    outsider.force_login(stranger)
    for path in ("", "/edit", "/delete"):
        assert outsider.get(f"/connections/{connection.id}{path}").status_code == 404
    for path in ("login", "answer", "cancel", "seen", "check", "link", "delete"):
        sent = {"flow_id": flow.id, "interaction_id": flow.interaction_id}
        assert outsider.post(f"/connections/{connection.id}/{path}", sent).status_code == 404
    assert connection.domain not in outsider.get("/").content.decode()
    assert connection.domain not in outsider.get("/connections").content.decode()
    assert connection.id not in outsider.get("/events").content.decode()


def test_C60_a_teammate_who_may_only_look_sees_no_button_and_is_refused(
    owner: User, principal: Principal
) -> None:
    connection, flow, _ = waiting(principal)
    team = Group.objects.create(name="lookers")
    looker = User.objects.create_user("looker", password="looker-password")
    owner.groups.add(team)
    looker.groups.add(team)
    client = Client()
    client.force_login(looker)
    page = client.get(f"/connections/{connection.id}").content.decode()
    assert 'class="detail read-only"' in page
    assert "/edit" not in page
    assert "/delete" not in page
    sent = {"interaction_id": flow.interaction_id, "field.f1": "a", "field.f2": "b"}
    refused = client.post(f"/connections/{connection.id}/answer", sent, **SCRIPT)
    assert refused.status_code == 403
    assert "only its owner" in refused.content.decode()
    assert client.post(f"/connections/{connection.id}/cancel").status_code == 403
    assert Submission.objects.count() == 0


def test_a_colleague_with_the_permission_answers_for_the_team(
    colleague: User, owner: User, principal: Principal
) -> None:
    connection, flow, _ = waiting(principal)
    client = Client()
    client.force_login(colleague)
    assert connection.domain in client.get("/").content.decode()
    sent = {"interaction_id": flow.interaction_id, "field.f1": "a", "field.f2": "b"}
    assert client.post(f"/connections/{connection.id}/answer", sent).status_code == 302
    assert Submission.objects.get().submitted_by == "colleague"


# ── Home ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_home_tells_a_newcomer_what_to_do_next(web: Client, owner: User) -> None:
    page = web.get("/").content.decode()
    assert "/connections/new" in page
    assert f"create_api_key --user {owner.username}" in page
    assert "/admin/" not in page
    owner.is_staff = True
    owner.save()
    assert "/admin/" in web.get("/").content.decode()


def test_home_shows_what_waits_with_its_form_oldest_deadline_first(web: Client, principal: Principal) -> None:
    first, flow, _ = waiting(principal, domain="first.example")
    second, _, _ = waiting(principal, domain="second.example", profile="b")
    LoginFlow.objects.filter(connection=second).update(input_expires_at=now() + dt.timedelta(seconds=30))
    page = web.get("/").content.decode()
    assert f'id="form-{first.id}-{flow.interaction_id}"' in page
    assert page.index(f"attn-{second.id}") < page.index(f"attn-{first.id}")
    assert "Waiting for you: user name and password" in page


def test_a_failure_needs_attention_until_it_was_seen(web: Client, principal: Principal) -> None:
    connection = make(principal)
    hold = hold_of(connection, principal)
    flow = transitions.fail(hold=hold, code="credentials_invalid", message="The site said no.", now=now())
    page = web.get("/").content.decode()
    assert "Failed: wrong user name or password" in page
    assert "The site said no." in page
    answer = web.post(f"/connections/{connection.id}/seen", {"flow_id": flow.id}, **SCRIPT)
    assert 'class="attn resolved' in answer.content.decode()
    assert "Nothing waits for you" in web.get("/").content.decode()


def test_what_is_done_stays_on_the_page_that_shows_it_and_goes_with_the_next_visit(
    web: Client, principal: Principal
) -> None:
    connection, _flow, _ = waiting(principal)
    transitions.cancel(connection_id=connection.id, actor=principal, reason="", now=now())
    kept = web.get(f"/attention?keep={connection.id}", **SCRIPT).content.decode()
    assert 'class="attn resolved' in kept
    assert connection.id not in web.get("/attention", **SCRIPT).content.decode()


def test_keep_cannot_be_used_to_look_at_foreign_connections(web: Client, stranger: User) -> None:
    foreign = make(of_user(stranger), domain="foreign.example")
    assert "foreign.example" not in web.get(f"/attention?keep={foreign.id}", **SCRIPT).content.decode()


def test_the_numbers_count_the_latest_login_of_each_connection(principal: Principal) -> None:
    waiting(principal, domain="a.example")
    hold_of(make(principal, domain="b.example"), principal)
    failed = make(principal, domain="c.example")
    transitions.fail(hold=hold_of(failed, principal), code="network_error", message="No.", now=now())
    assert fragments.counts(principal) == {"waiting": 1, "tasks": 2, "running": 1, "failed": 1, "tabs": 0}
    transitions.start_login(connection_id=failed.id, actor=principal, now=now())
    assert fragments.counts(principal) == {"waiting": 1, "tasks": 3, "running": 2, "failed": 0, "tabs": 0}


# ── Lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_list_filters_by_the_address_alone(web: Client, principal: Principal) -> None:
    waiting(principal, domain="acme.example")
    make(principal, domain="quiet.example")
    found = web.get("/connections?status=waiting").content.decode()
    assert "acme.example" in found
    assert "quiet.example" not in found
    found = web.get("/connections?q=QUIET").content.decode()
    assert "quiet.example" in found
    assert "acme.example" not in found
    assert "Nothing matches these filters" in web.get("/connections?q=nothing-like-it").content.decode()
    assert web.get("/connections?status=%00&page=-3&sort=x&q=%00").status_code == 200


def test_the_list_has_pages_that_keep_the_filter(web: Client, principal: Principal) -> None:
    for number in range(30):
        make(principal, domain=f"site-{number:02}.example")
    first = web.get("/connections?q=site&sort=domain").content.decode()
    assert first.count('id="row-') == 25
    assert "q=site&amp;sort=domain&amp;page=2" in first
    second = web.get("/connections?q=site&sort=domain&page=2").content.decode()
    assert second.count('id="row-') == 5
    assert "site-29.example" in second


def test_the_list_costs_the_same_number_of_queries_for_one_row_and_for_twenty(
    web: Client, principal: Principal, django_assert_max_num_queries: Any
) -> None:
    for number in range(20):
        waiting(principal, domain=f"site-{number:02}.example")
    with django_assert_max_num_queries(18):
        web.get("/connections")
    with django_assert_max_num_queries(24):
        web.get("/")


def test_names_are_text_and_never_markup(web: Client, principal: Principal) -> None:
    evil = '<img src=x onerror="alert(1)">'
    connection, _, _hold = waiting(
        principal, profile=evil, fields=[{**PASSWORD_FIELDS[0], "label": evil, "hint": evil}]
    )
    for path in ("/", "/connections", f"/connections/{connection.id}", "/events", "/tasks"):
        assert "<img src=x" not in web.get(path).content.decode(), path
    item = fragments.present(connection.id)
    assert item is not None
    assert "<img src=x" not in fragments.connection_parts(item)


def test_tasks_are_listed_with_their_state(web: Client, principal: Principal) -> None:
    waiting(principal)
    page = web.get("/tasks?status=waiting_for_input").content.decode()
    assert "Log in to acme.example" in page
    assert "Waiting for you" in page
    assert "Nothing matches" in web.get("/tasks?status=failed").content.decode()


# ── Events ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_feed_is_newest_first_with_filters_and_a_cursor(web: Client, principal: Principal) -> None:
    _connection, _, _ = waiting(principal)
    page = web.get("/events").content.decode()
    ids = [int(found) for found in re.findall(r'id="event-(\d+)"', page)]
    assert ids == sorted(ids, reverse=True)
    assert len(ids) >= 4
    only = web.get("/events?type=connection.created&object=acme").content.decode()
    assert re.findall(r'id="event-(\d+)"', only) == [str(ids[-1])]
    older = web.get(f"/events?cursor={ids[1]}").content.decode()
    assert [int(found) for found in re.findall(r'id="event-(\d+)"', older)] == ids[2:]
    assert web.get("/events?cursor=abc&type=nothing").status_code == 200


def test_the_feed_can_be_exported_and_a_cell_is_never_a_formula(web: Client, owner: User) -> None:
    make(of_user(owner, actor="=cmd()"))
    rows = json.loads(web.get("/events?format=json").content)
    assert rows[0]["name"] == "connection.created"
    assert rows[0]["actor"] == "=cmd()"
    assert ",'=cmd()" in web.get("/events?format=csv").content.decode()


# ── One connection ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_connection_is_created_from_what_the_address_bar_shows_and_its_login_starts(
    web: Client, owner: User
) -> None:
    sent = {
        "domain": "https://Acme.example/login?x=1", "profile_name": " finance ", "login_url": "", "allowed_domains": "",
        "credential": "", "save_credentials": "on", "health_checks": "on", "health_check_interval": "3600", "start": "1",
    }  # fmt: skip
    answer = web.post("/connections/new", sent)
    row = ManagedAuthConnection.objects.get()
    assert answer.status_code == 302
    assert answer.headers["Location"] == f"/connections/{row.id}"
    assert (row.domain, row.profile.name, row.auto_reauth) == ("acme.example", "finance", False)
    assert row.flows.get().step == FlowStep.DISCOVERING
    again = web.post("/connections/new", sent)
    assert again.status_code == 400
    assert f"/connections/{row.id}" in again.content.decode()


def test_a_wrong_form_comes_back_with_its_values_and_says_what_is_wrong(web: Client) -> None:
    sent = {
        "domain": "no domain",
        "profile_name": "kept-name",
        "health_check_interval": "3600",
        "login_url": "ftp://x",
    }
    answer = web.post("/connections/new", sent)
    page = answer.content.decode()
    assert answer.status_code == 400
    assert "kept-name" in page
    assert "Use a host name" in page
    assert "absolute http or https URL" in page


def test_settings_are_changed_and_a_foreign_credential_cannot_be_chosen(
    web: Client, principal: Principal, stranger: User
) -> None:
    connection = make(principal)
    sent = {"login_url": "https://acme.example/in", "allowed_domains": "*.a.example, b.example", "credential": "",
            "health_check_interval": "300"}  # fmt: skip
    assert web.post(f"/connections/{connection.id}/edit", sent).status_code == 302
    connection.refresh_from_db()
    assert connection.allowed_domains == ["a.example", "b.example"]
    assert not connection.health_checks
    assert (
        web.post(f"/connections/{connection.id}/edit", {**sent, "credential": "cred_foreign"}).status_code
        == 400
    )


def test_deleting_asks_first(web: Client, principal: Principal) -> None:
    connection, _, _ = waiting(principal)
    asked = web.get(f"/connections/{connection.id}/delete")
    assert asked.status_code == 200
    assert ManagedAuthConnection.objects.count() == 1
    assert web.post(f"/connections/{connection.id}/delete").status_code == 302
    assert ManagedAuthConnection.objects.count() == 0


def test_reading_a_connection_expires_a_login_whose_time_is_over(web: Client, principal: Principal) -> None:
    connection, flow, _ = waiting(principal)
    LoginFlow.objects.filter(pk=flow.pk).update(input_expires_at=now() - dt.timedelta(seconds=1))
    page = web.get(f"/connections/{connection.id}").content.decode()
    assert "Expired" in page
    assert f"form-{connection.id}" not in page
    assert LoginFlow.objects.get().status == FlowStatus.EXPIRED


def test_the_form_fits_its_fields(web: Client, principal: Principal) -> None:
    connection, _flow, _ = waiting(principal, fields=[*PASSWORD_FIELDS, *CODE_FIELDS], choices=CHOICES)
    page = web.get(f"/connections/{connection.id}").content.decode()
    inputs = {found[1]: found[0] for found in re.findall(r'(<input [^>]*name="field\.(f\d)"[^>]*>)', page)}
    assert 'type="text"' in inputs["f1"]
    assert 'autocomplete="username"' in inputs["f1"]
    assert 'type="password"' in inputs["f2"]
    assert 'autocomplete="current-password"' in inputs["f2"]
    assert 'autocomplete="one-time-code"' in inputs["f3"]
    assert 'inputmode="numeric"' in inputs["f3"]
    assert 'aria-invalid="true"' in inputs["f3"]
    assert "The site did not accept this" in page
    assert all("value=" not in found for found in inputs.values())
    buttons = re.findall(r'name="selected_choice_id" value="(c\d)"', page)
    assert buttons == ["c1", "c9", "c2"]


# ── Answering ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_A08_an_accepted_answer_takes_the_form_away_in_the_same_moment(
    web: Client, principal: Principal
) -> None:
    connection, flow, hold = waiting(principal)
    sent = {"interaction_id": flow.interaction_id, "field.f1": "alice", "field.f2": "s3cret-value"}
    answer = web.post(f"/connections/{connection.id}/answer", sent, **SCRIPT)
    body = answer.content.decode()
    assert answer.status_code == 200
    assert f'hx-target="#state-{connection.id}"' in body
    assert "Sending…" in body
    assert f"form-{connection.id}" not in body
    assert "s3cret-value" not in body
    taken = transitions.take_submission(hold=hold, now=now())
    assert taken is not None
    assert taken.field_values == {"f1": "alice", "f2": "s3cret-value"}
    assert "s3cret-value" not in json.dumps(list(Event.objects.values_list("data", flat=True)))


def test_A28_a_stale_interaction_says_so_and_brings_the_new_question(
    web: Client, principal: Principal
) -> None:
    connection, flow, hold = waiting(principal)
    sent = {"interaction_id": flow.interaction_id, "field.f1": "a", "field.f2": "b"}
    web.post(f"/connections/{connection.id}/answer", sent, **SCRIPT)
    transitions.take_submission(hold=hold, now=now())
    new = transitions.await_input(hold=hold, fields=CODE_FIELDS, choices=[], now=now())
    answer = web.post(f"/connections/{connection.id}/answer", {**sent, "field.f2": "other words"}, **SCRIPT)
    body = answer.content.decode()
    assert answer.status_code == 409
    assert re.search(r"You answered \d+ s ago\. Please answer the new question", body)
    assert f'id="form-{connection.id}-{new.interaction_id}"' in body
    assert body.index("new question") > body.index("hx-partial"), (
        "the message comes after the parts, so it stays"
    )


def test_A29_a_form_that_names_no_question_is_refused(web: Client, principal: Principal) -> None:
    connection, _, _ = waiting(principal)
    answer = web.post(f"/connections/{connection.id}/answer", {"field.f1": "a", "field.f2": "b"}, **SCRIPT)
    assert answer.status_code == 400
    assert Submission.objects.count() == 0


def test_A30_the_same_form_twice_is_one_submission(web: Client, principal: Principal) -> None:
    connection, flow, _ = waiting(principal)
    sent = {"interaction_id": flow.interaction_id, "field.f1": "a", "field.f2": "b"}
    answers = [web.post(f"/connections/{connection.id}/answer", sent, **SCRIPT).status_code for _ in range(2)]
    assert answers == [200, 200]
    assert Submission.objects.count() == 1


def test_an_incomplete_answer_keeps_the_form_and_names_the_field(web: Client, principal: Principal) -> None:
    connection, flow, _ = waiting(principal)
    answer = web.post(
        f"/connections/{connection.id}/answer",
        {"interaction_id": flow.interaction_id, "field.f1": "a"},
        **SCRIPT,
    )
    body = answer.content.decode()
    assert answer.status_code == 400
    assert "Please fill in: Password." in body
    assert f'hx-target="#say-{connection.id}-{flow.interaction_id}"' in body
    assert "state-" not in body


def test_an_answer_to_a_login_that_ended_is_410_and_shows_the_end(web: Client, principal: Principal) -> None:
    connection, flow, _ = waiting(principal)
    transitions.cancel(connection_id=connection.id, actor=principal, reason="", now=now())
    sent = {"interaction_id": flow.interaction_id, "field.f1": "a", "field.f2": "b"}
    answer = web.post(f"/connections/{connection.id}/answer", sent, **SCRIPT)
    assert answer.status_code == 410
    assert "Cancelled by owner" in answer.content.decode()


def test_a_choice_is_an_answer(web: Client, principal: Principal) -> None:
    connection, flow, hold = waiting(principal, fields=[], choices=CHOICES)
    sent = {"interaction_id": flow.interaction_id, "selected_choice_id": "c1"}
    assert web.post(f"/connections/{connection.id}/answer", sent).status_code == 302
    taken = transitions.take_submission(hold=hold, now=now())
    assert taken is not None
    assert taken.choice_id == "c1"


def test_without_script_every_form_redirects_and_the_message_is_on_the_next_page(
    web: Client, principal: Principal
) -> None:
    connection, flow, _ = waiting(principal)
    answer = web.post(
        f"/connections/{connection.id}/answer", {"interaction_id": flow.interaction_id}, follow=True
    )
    assert answer.redirect_chain == [(f"/connections/{connection.id}", 302)]
    assert "Please fill in: User name, Password." in answer.content.decode()
    home = web.post(
        f"/connections/{connection.id}/cancel", {"reason": "lunch"}, HTTP_REFERER="http://testserver/"
    )
    assert home.headers["Location"] == "/"
    assert "lunch" in web.get(f"/connections/{connection.id}").content.decode()


def test_a_form_without_a_token_is_refused(owner: User, principal: Principal) -> None:
    connection, _flow, _ = waiting(principal)
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(owner)
    assert strict.post(f"/connections/{connection.id}/cancel").status_code == 403
    page = strict.get(f"/connections/{connection.id}").content.decode()
    token = re.search(r'"X-CSRFToken":"([^"]+)"', page)
    assert token is not None
    answer = strict.post(f"/connections/{connection.id}/cancel", **SCRIPT, HTTP_X_CSRFTOKEN=token.group(1))
    assert answer.status_code == 200


def test_a_sign_in_without_its_token_gets_a_page_of_ours_and_json_under_the_api(client: Client) -> None:
    strict = Client(enforce_csrf_checks=True)
    answer = strict.post("/signin", {"username": "a", "password": "b"})
    assert answer.status_code == 403
    assert "This form could not be accepted" in answer.content.decode()
    assert "style=" not in answer.content.decode()
    told = errors.csrf_failure(RequestFactory().post("/auth/connections"), reason="no cookie")
    assert (told.status_code, json.loads(told.content)["code"]) == (403, "forbidden")


def test_no_page_may_be_framed(client: Client) -> None:
    assert client.get("/signin").headers["X-Frame-Options"] == "DENY"


def test_the_link_for_somebody_else_is_fresh_and_shown_to_the_asker_alone(
    web: Client, principal: Principal
) -> None:
    connection, _, _ = waiting(principal)
    links = set()
    for _ in range(2):
        body = web.post(f"/connections/{connection.id}/link", **SCRIPT).content.decode()
        found = re.search(r'value="(http[^"]+\?code=[^"]+)"', body)
        assert found is not None
        links.add(found.group(1))
    assert len(links) == 2
    item = fragments.present(connection.id)
    assert item is not None
    assert "code=" not in fragments.connection_parts(item)
    plain = web.post(f"/connections/{connection.id}/link")
    assert plain.status_code == 200
    assert "code=" in plain.content.decode()


def test_starting_twice_says_that_one_is_running(web: Client, principal: Principal) -> None:
    connection = make(principal)
    assert web.post(f"/connections/{connection.id}/login", **SCRIPT).status_code == 200
    again = web.post(f"/connections/{connection.id}/login", **SCRIPT)
    assert again.status_code == 409
    assert "running already" in again.content.decode()


# ── The stream ────────────────────────────────────────────────────────────────────────────────────────────────────


def message_of(connection: ManagedAuthConnection) -> str:
    event = Event.objects.filter(topic=f"connection:{connection.id}").order_by("-id")[0]
    html = fragments.live_message(log.envelope(event))
    assert html is not None
    return html


def test_a_message_of_the_stream_holds_every_part_and_nothing_of_any_viewer(
    web: Client, principal: Principal
) -> None:
    connection, _flow, _ = waiting(principal)
    html = message_of(connection)
    for part in ("row", "state", "attn", "facts", "attempts", "timeline"):
        assert f'<hx-partial hx-target="#{part}-{connection.id}" hx-swap="outerMorph"><' in html
    assert "csrfmiddlewaretoken" not in html
    assert " UTC</time>" in html
    connection.refresh_from_db()
    assert html.count(f'data-rev="{connection.version}"') == 6


def test_the_parts_of_the_stream_are_those_of_the_page(web: Client, principal: Principal) -> None:
    connection, _, _ = waiting(principal)
    page = web.get(f"/connections/{connection.id}").content.decode()
    state = re.search(
        rf'<section class="state card" id="state-{connection.id}".*?</section>', page, re.DOTALL
    )
    sent = re.search(
        rf'<section class="state card" id="state-{connection.id}".*?</section>',
        message_of(connection),
        re.DOTALL,
    )
    assert state is not None
    assert sent is not None
    token = re.compile(r'<input type="hidden" name="csrfmiddlewaretoken"[^>]*>')
    assert token.sub("", state.group()) == sent.group()


def test_a_deleted_connection_says_so_on_every_page_that_shows_it(principal: Principal) -> None:
    connection = make(principal)
    transitions.delete_connection(connection_id=connection.id, actor=principal, now=now())
    html = message_of(connection)
    assert html.count("Deleted") == 3


def test_a_task_updates_its_row(principal: Principal) -> None:
    waiting(principal)
    event = Event.objects.filter(topic__startswith="task:").order_by("-id")[0]
    html = fragments.live_message(log.envelope(event))
    assert html is not None
    assert "Waiting for you" in html
    assert '<tr id="task-' in html


def test_the_page_carries_the_cursor_from_before_its_rows_were_read(
    web: Client, principal: Principal
) -> None:
    waiting(principal)
    assert f"since={log.newest()}" in web.get("/").content.decode()


def test_the_timeline_tells_who_did_what_without_any_value(web: Client, principal: Principal) -> None:
    connection, flow, _ = waiting(principal)
    sent = {"interaction_id": flow.interaction_id, "field.f1": "alice", "field.f2": "s3cret-value"}
    web.post(f"/connections/{connection.id}/answer", sent)
    page = web.get(f"/connections/{connection.id}").content.decode()
    told = re.findall(r'<span class="moment-text">([^<]*)</span>', page)
    assert told[:3] == [
        "login started by owner",
        "asks for user name and password",
        "answer sent by owner (values are not kept in the log)",
    ]


# ── Signing in ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_signing_in_goes_where_one_wanted_to_go_but_never_elsewhere(client: Client, owner: User) -> None:
    credentials = {"username": "owner", "password": "owner-password"}
    assert client.post("/signin", {**credentials, "next": "/events"}).headers["Location"] == "/events"
    client.logout()
    assert client.post("/signin", {**credentials, "next": "https://evil.example/"}).headers["Location"] == "/"


def test_signing_out_is_a_post(web: Client) -> None:
    assert web.get("/signout").status_code == 405
    assert web.post("/signout").status_code == 302
    assert web.get("/").status_code == 302


def test_guessing_passwords_is_slowed_down_for_that_name_and_address_alone(
    client: Client, owner: User, stranger: User
) -> None:
    wrong = {"username": "owner", "password": "guess"}
    assert [client.post("/signin", wrong).status_code for _ in range(8)] == [400] * 8
    blocked = client.post("/signin", {"username": "OWNER", "password": "owner-password"})
    assert blocked.status_code == 429
    assert blocked.headers["Retry-After"] == "300"
    assert "guess" not in blocked.content.decode()
    right = {"username": "stranger", "password": "stranger-password"}
    assert client.post("/signin", right).status_code == 302
    other_address = Client(REMOTE_ADDR="192.0.2.7")
    assert (
        other_address.post("/signin", {"username": "owner", "password": "owner-password"}).status_code == 302
    )


def test_an_unknown_page_is_404_in_html(web: Client) -> None:
    answer = web.get("/no-such-page")
    assert answer.status_code == 404
    assert "There is nothing here" in answer.content.decode()


def test_the_command_that_the_empty_home_page_names_makes_a_key(
    owner: User, capsys: pytest.CaptureFixture[str]
) -> None:
    web = Client()
    web.force_login(owner)
    found = re.search(r"<code>python manage\.py ([^<]+)</code>", web.get("/").content.decode())
    assert found
    call_command(*found[1].split())
    assert capsys.readouterr().out.strip().startswith("sk_")
    assert owner.username in found[1]
