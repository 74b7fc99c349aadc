"""Django's admin: every model is there, nothing secret is shown, and what a verb owns goes through the verb."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from django.apps import apps
from django.contrib import admin as django_admin
from django.contrib.admin.utils import quote
from django.contrib.auth.models import Group, Permission, User
from django.test import Client
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries

from connections import access, hooks, outputs, registry, task_inputs, tasks, transitions, vault
from connections.models import (
    ApiKey,
    Capacity,
    Credential,
    HealthCheck,
    HookDelivery,
    IdempotentAnswer,
    LoginFlow,
    ManagedAuthConnection,
    Profile,
    SiteCircuit,
    Submission,
    Task,
    TaskInput,
    TaskOutput,
)
from connections.states import FlowStatus, TaskKind
from events import models as events_models
from events.models import Claim, Event, LogMark, Presence
from tests.connections.client_support import Login
from tests.connections.task_support import HOOK_SECRET

OUR_MODELS = [
    model for label in ("connections", "events") for model in apps.get_app_config(label).get_models()
]
HISTORY = [
    Event, LogMark, events_models.Client, Claim, Presence,
    HealthCheck, Submission, IdempotentAnswer, LoginFlow, Task, TaskInput, TaskOutput, HookDelivery, SiteCircuit, Capacity,
]  # fmt: skip
PASSWORD = "hunter2-of-the-site"
CODE_FIELD = {"id": "f_code", "ref": "code", "type": "code", "label": "Code", "required": True}


@pytest.fixture
def root(db: Any) -> User:
    return User.objects.create_superuser("root", password="root-password")


@pytest.fixture
def browser(root: User) -> Client:
    client = Client()
    client.force_login(root)
    return client


def make_connection(owner: User, domain: str = "site.example", profile: str = "me") -> ManagedAuthConnection:
    return transitions.create_connection(
        owner_id=owner.pk,
        domain=domain,
        profile_name=profile,
        config={},
        actor=access.of_user(owner),
        now=timezone.now(),
    )


@pytest.fixture
def everything(owner: User) -> dict[type, Any]:
    """One row of every model, with a secret wherever one can be."""
    now = timezone.now()
    key, _ = registry.create_api_key(owner_id=owner.pk, name="laptop", now=now)
    credential = registry.create_credential(
        owner_id=owner.pk,
        name="mine",
        domain="site.example",
        values={"password": PASSWORD},
        totp_secret="JBSWY3DPEHPK3PXP",
        now=now,
    )
    row = make_connection(owner)
    Profile.objects.update(state=vault.seal({"cookies": [{"value": PASSWORD}]}), state_saved_at=now)
    check = transitions.request_check(connection_id=row.pk, actor=access.of_user(owner), now=now)
    hold = tasks.claim(worker="w", kinds=[TaskKind.HEALTH_CHECK], now=now)
    assert hold is not None
    assert hold.task_id == check.pk
    health = transitions.record_check(hold=hold, signed_in=False, reason="signed out", now=now)
    flow, _ = transitions.start_login(connection_id=row.pk, actor=access.of_user(owner), now=now)
    hold = tasks.claim(worker="w", kinds=[TaskKind.LOGIN], now=now)
    assert hold is not None
    transitions.await_input(hold=hold, fields=[CODE_FIELD], choices=[], now=now)
    transitions.submit(
        connection_id=row.pk,
        answer=transitions.SubmittedAnswer(field_values={"f_code": PASSWORD}),
        actor=access.of_user(owner),
        now=now,
    )
    command = tasks.enqueue(kind=TaskKind.COMMAND, title="run", connection=row, actor="owner", now=now)
    line = task_inputs.add_input(task_id=command.pk, content=PASSWORD, message_id="m", actor="owner", now=now)
    answer = IdempotentAnswer.objects.create(
        scope="key:1",
        key="k",
        fingerprint="0f" * 32,
        status_code=200,
        sealed=vault.seal({"x": PASSWORD}),
        created_at=now,
    )
    return {
        ApiKey: key,
        Credential: credential,
        Profile: row.profile,
        ManagedAuthConnection: row,
        LoginFlow: LoginFlow.objects.get(),
        Submission: Submission.objects.get(),
        HealthCheck: health,
        Task: Task.objects.get(flow=flow),
        IdempotentAnswer: answer,
        TaskInput: line,
        TaskOutput: _what_a_task_wrote(owner),
        HookDelivery: HookDelivery.objects.get(),
        Capacity: Capacity.objects.create(name=tasks.COMMANDS),
        SiteCircuit: SiteCircuit.objects.create(domain="site.example", failures=3, updated_at=now),
        Event: Event.objects.order_by("-id")[0],
        LogMark: LogMark.objects.create(pruned_through=0),
        **_a_client(owner, row.pk),
    }


def _what_a_task_wrote(owner: User) -> TaskOutput:
    """A task that has ended, with output, and with a hook whose address and secret hold what nobody may see."""
    now = timezone.now()
    tasks.create(
        owner_id=owner.pk, kind="build", title="b", spec={"payload": {}}, hook_url=f"https://hook.example/in?token={PASSWORD}", hook_secret=PASSWORD,
        actor="owner", now=now,
    )  # fmt: skip
    hold = tasks.claim(worker="w", kinds=["build"], now=now)
    assert hold is not None
    outputs.append(task_id=hold.task_id, worker="w", attempt=1, data=PASSWORD.encode(), now=now)
    tasks.settle(hold=hold, now=now)
    return TaskOutput.objects.get()


def _a_client(owner: User, connection_id: str) -> dict[type, Any]:
    login = Login(owner)
    mine = login.come()
    login.claim(mine.cid, f"connection:{connection_id}")
    login.post(mine.cid, "presence", {"subject": f"connection:{connection_id}", "doing": "typing"})
    return {
        events_models.Client: events_models.Client.objects.get(),
        Claim: Claim.objects.get(),
        Presence: Presence.objects.get(),
    }


def page(model: type, *words: object) -> str:
    # As the admin's own links do: it takes "_24" in an address for an escape.
    tail = "/".join(quote(str(word)) for word in words)
    return f"/admin/{model._meta.app_label}/{model._meta.model_name}/" + (f"{tail}/" if tail else "")  # type: ignore[attr-defined]


def act(browser: Client, model: type, action: str, *rows: Any) -> str:
    """Choose an action of the list; returns the page that follows."""
    answer = browser.post(
        page(model), {"action": action, "_selected_action": [row.pk for row in rows]}, follow=True
    )
    assert answer.status_code == 200
    return answer.content.decode()


# ── Pages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_model_has_its_pages() -> None:
    missing = [model.__name__ for model in OUR_MODELS if not django_admin.site.is_registered(model)]
    assert missing == []


@pytest.mark.parametrize("model", OUR_MODELS, ids=lambda model: model.__name__)
def test_lists_searches_and_pages_answer(browser: Client, everything: dict[type, Any], model: type) -> None:
    for address in (page(model), page(model) + "?q=site", page(model, everything[model].pk, "change")):
        assert browser.get(address).status_code == 200, address


@pytest.mark.parametrize("model", OUR_MODELS, ids=lambda model: model.__name__)
def test_a48_no_page_shows_a_secret_or_what_one_is_encrypted_to(
    browser: Client, everything: dict[type, Any], model: type
) -> None:
    row = everything[model]
    html = "".join(
        browser.get(address).content.decode() for address in (page(model), page(model, row.pk, "change"))
    )
    assert PASSWORD not in html
    assert "gAAAAA" not in html, "a Fernet token"
    for name in ("key_hash", "handoff_hash", "fingerprint"):
        if hasattr(row, name):
            assert getattr(row, name) not in html


@pytest.mark.parametrize("model", HISTORY, ids=lambda model: model.__name__)
def test_history_can_be_neither_added_to_nor_changed_nor_deleted(
    browser: Client, everything: dict[type, Any], model: type
) -> None:
    row = everything[model]
    assert browser.get(page(model, "add")).status_code == 403
    assert browser.post(page(model, row.pk, "change"), {"status": "x"}).status_code == 403
    assert browser.post(page(model, row.pk, "delete"), {"post": "yes"}).status_code == 403
    assert "delete_selected" not in browser.get(page(model)).content.decode()
    assert model._default_manager.filter(pk=row.pk).exists()  # type: ignore[attr-defined]


def test_a_status_cannot_be_typed(browser: Client, everything: dict[type, Any]) -> None:
    html = browser.get(
        page(ManagedAuthConnection, everything[ManagedAuthConnection].pk, "change")
    ).content.decode()
    names = set(re.findall(r'<(?:input|select|textarea)[^>]* name="([^"]+)"', html))
    assert not names & {"status", "version", "domain", "owner", "profile", "post_login_url"}
    assert "login_url" in names


def test_connections_flows_and_tasks_lead_to_the_dashboard(
    browser: Client, everything: dict[type, Any]
) -> None:
    row = everything[ManagedAuthConnection]
    for model in (ManagedAuthConnection, LoginFlow, Task, HealthCheck, Event):
        html = browser.get(page(model)).content.decode()
        assert f'href="/connections/{row.pk}"' in html, model


def test_lists_do_not_ask_the_database_once_per_row(
    browser: Client, owner: User, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    for number in range(12):
        row = make_connection(owner, f"site{number}.example")
        transitions.start_login(connection_id=row.pk, actor=access.of_user(owner), now=timezone.now())
    for model in (ManagedAuthConnection, LoginFlow, Task, Event, Profile):
        with django_assert_max_num_queries(9):
            browser.get(page(model))


def test_the_link_to_the_latest_login_leads_there(browser: Client, everything: dict[type, Any]) -> None:
    html = browser.get(page(ManagedAuthConnection)).content.decode()
    link = re.search(r'href="(/admin/connections/loginflow/[^"]+/change/)"', html)
    assert link is not None
    assert everything[LoginFlow].pk in browser.get(link[1]).content.decode()


@pytest.mark.parametrize("model", OUR_MODELS, ids=lambda model: model.__name__)
def test_a_nul_in_an_address_is_a_wrong_request_and_never_reaches_the_database(
    browser: Client, everything: dict[type, Any], model: type
) -> None:
    pk = model._meta.pk.name  # type: ignore[attr-defined]
    for tail in (
        "?q=%00",
        "?q=a%00b",
        f"?{pk}=%00",
        f"?{pk}__exact=a%00",
        "?%00=1",
        "%00/change/",
        "%00/history/",
    ):
        assert browser.get(page(model) + tail).status_code == 400, tail
    chosen = {"action": "delete_selected", "_selected_action": ["a\0"]}
    assert browser.post(page(model), chosen).status_code == 400
    assert browser.get(page(model) + "?q=").status_code == 200


def test_a_nul_in_a_form_or_what_fills_it_in_is_a_wrong_request(browser: Client, owner: User) -> None:
    add = page(ManagedAuthConnection, "add")
    assert browser.get(add + "?owner=%00").status_code == 400
    assert browser.post(add, form(owner=owner.pk, credential="\0")).status_code == 400
    assert not ManagedAuthConnection.objects.exists()


def test_a_nul_in_a_box_that_completes_is_a_wrong_request(browser: Client) -> None:
    box = "/admin/autocomplete/?app_label=connections&model_name=managedauthconnection&field_name=credential"
    assert browser.get(f"{box}&term=%00").status_code == 400
    assert browser.get(f"{box}&term=a").status_code == 200


# ── Tasks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _task_of(owner: User, **more: Any) -> Task:
    return tasks.create(
        owner_id=owner.pk, kind="build", title="b", spec={}, actor="owner", now=timezone.now(), **more
    )


def test_C22_tasks_are_killed_with_a_reason_and_what_has_ended_stays(browser: Client, owner: User) -> None:
    open_one, ended = _task_of(owner), _task_of(owner)
    tasks.claim(worker="w", kinds=["build"], now=timezone.now())
    hold = tasks.claim(worker="w", kinds=["build"], now=timezone.now())
    assert hold is not None
    tasks.settle(hold=hold, now=timezone.now())
    chosen = {"action": "kill", "_selected_action": [open_one.pk, ended.pk], "reason": "it hangs"}
    said = browser.post(page(Task), chosen, follow=True).content.decode()
    assert "1 tasks are killed, or about to be" in said
    assert "This task is over: it is completed." in said
    open_one.refresh_from_db()
    assert (open_one.kill_reason, open_one.kill_requested_by) == ("it hangs", "root")
    ended.refresh_from_db()
    assert (ended.status, ended.kill_requested_at) == ("completed", None)


def test_C60_who_may_only_look_kills_nothing_in_the_administration(
    staff: Callable[..., Client], owner: User, stranger: User
) -> None:
    row = _task_of(owner)
    lookers = Group.objects.create(name="lookers")
    owner.groups.add(lookers)
    stranger.groups.add(lookers)
    client = staff("view_task")
    act(client, Task, "kill", row)
    act(client, Task, "redeliver_hook", row)
    row.refresh_from_db()
    assert (row.status, row.kill_requested_at) == ("queued", None)


def test_C30_a_report_is_sent_again_from_the_administration(browser: Client, owner: User) -> None:
    row, without = (
        _task_of(owner, hook_url="https://hook.example/in", hook_secret=HOOK_SECRET),
        _task_of(owner),
    )
    for _ in range(2):
        hold = tasks.claim(worker="w", kinds=["build"], now=timezone.now())
        assert hold is not None
        tasks.settle(hold=hold, now=timezone.now())
    report = hooks.claim(worker="w", now=timezone.now())
    assert report is not None
    hooks.delivered(report=report, status=200, now=timezone.now())
    said = act(browser, Task, "redeliver_hook", row, without)
    assert "1 reports are sent again" in said
    assert "There is no report to send" in said
    assert HookDelivery.objects.get().state == "pending"


# ── A user who leaves ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def leaver(owner: User, stranger: User) -> User:
    """Somebody with a key, and a client that is at a colleague's connection: nothing of theirs is history."""
    group = Group.objects.create(name="colleagues")
    for user in (owner, stranger):
        user.groups.add(group)
        user.user_permissions.add(Permission.objects.get(codename="operate_managedauthconnection"))
    registry.create_api_key(owner_id=owner.pk, name="laptop", now=timezone.now())
    # Read again: permissions are remembered by the object.
    _a_client(User.objects.get(pk=owner.pk), make_connection(stranger).pk)
    assert Claim.objects.get().client is not None
    assert Presence.objects.exists()
    return owner


@pytest.mark.parametrize("together", [False, True])
def test_a_user_is_deleted_with_the_clients_and_keys_that_stand_for_them(
    browser: Client, leaver: User, together: bool
) -> None:
    if together:
        chosen = {"action": "delete_selected", "_selected_action": [leaver.pk]}
        asked, done = browser.post(page(User), chosen), {**chosen, "post": "yes"}
        answer = browser.post(page(User), done, follow=True)
    else:
        asked = browser.get(page(User, leaver.pk, "delete"))
        answer = browser.post(page(User, leaver.pk, "delete"), {"post": "yes"}, follow=True)
    assert "have permission to delete" not in asked.content.decode()
    assert answer.status_code == 200
    assert not User.objects.filter(pk=leaver.pk).exists()
    for model in (events_models.Client, Presence, ApiKey):
        assert not model.objects.exists(), model
    assert Claim.objects.get().client is None


def test_who_may_not_delete_a_user_does_not_delete_what_goes_with_them(
    staff: Callable[..., Client], leaver: User
) -> None:
    names = ["view_user", "view_client", "view_presence", "view_apikey", "delete_client", "delete_apikey"]
    client = staff(*names)
    assert client.post(page(User, leaver.pk, "delete"), {"post": "yes"}).status_code == 403
    assert events_models.Client.objects.exists()
    assert ApiKey.objects.exists()
    client = staff(*names, "delete_user")
    client.post(page(User, leaver.pk, "delete"), {"post": "yes"})
    assert not User.objects.filter(pk=leaver.pk).exists()


@pytest.mark.parametrize("model", [events_models.Client, Presence, ApiKey], ids=lambda model: model.__name__)
def test_what_goes_with_its_user_cannot_be_deleted_by_itself(
    browser: Client, leaver: User, model: Any
) -> None:
    row = model.objects.get()
    assert browser.get(page(model, row.pk, "delete")).status_code == 403
    assert browser.post(page(model, row.pk, "delete"), {"post": "yes"}).status_code == 403
    chosen = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
    browser.post(page(model), chosen)
    assert "delete_selected" not in browser.get(page(model)).content.decode()
    assert "deletelink" not in browser.get(page(model, row.pk, "change")).content.decode()
    assert model.objects.filter(pk=row.pk).exists()


def test_people_without_staff_rights_do_not_get_in(owner: User, everything: dict[type, Any]) -> None:
    client = Client()
    client.force_login(owner)
    assert client.get(page(ManagedAuthConnection)).status_code == 302


# ── Verbs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def form(**changed: Any) -> dict[str, Any]:
    return {
        "domain": "Site.Example",
        "profile_name": "me",
        "login_url": "https://site.example/login",
        "allowed_domains": "www.site.example\nid.example",
        "save_credentials": "on",
        "health_checks": "on",
        "auto_reauth": "on",
        "health_check_interval": "3600",
        **changed,
    }


def test_adding_a_connection_goes_through_the_verb(browser: Client, owner: User) -> None:
    answer = browser.post(page(ManagedAuthConnection, "add"), form(owner=owner.pk), follow=True)
    row = ManagedAuthConnection.objects.get()
    assert answer.status_code == 200
    assert (row.owner, row.domain, row.profile.name) == (owner, "site.example", "me")
    assert row.allowed_domains == ["site.example", "id.example"]
    event = Event.objects.get(name="connection.created")
    assert (event.object_id, event.actor) == (row.pk, "root")


def test_a_form_that_the_api_would_refuse_is_refused(browser: Client, owner: User) -> None:
    for wrong in (
        {"domain": "no host"},
        {"login_url": "ftp://site.example"},
        {"allowed_domains": "a/b"},
        {"health_check_interval": "5"},
    ):
        answer = browser.post(page(ManagedAuthConnection, "add"), form(owner=owner.pk, **wrong))
        assert answer.status_code == 200
        assert b"errorlist" in answer.content, wrong
    assert not ManagedAuthConnection.objects.exists()


def test_a_second_connection_of_the_same_profile_is_refused(browser: Client, owner: User) -> None:
    make_connection(owner)
    answer = browser.post(page(ManagedAuthConnection, "add"), form(owner=owner.pk))
    assert "already has a connection" in answer.content.decode()
    assert ManagedAuthConnection.objects.count() == 1


def test_somebody_who_was_quicker_is_told_about_and_not_a_fault(
    browser: Client, owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(**kwargs: Any) -> Any:
        raise transitions.AlreadyExists("ma_other")

    monkeypatch.setattr(transitions, "create_connection", too_late)
    answer = browser.post(page(ManagedAuthConnection, "add"), form(owner=owner.pk), follow=True)
    assert answer.status_code == 200
    assert "already has a connection" in answer.content.decode()


def test_changing_a_connection_tells_what_changed_and_nothing_else(browser: Client, owner: User) -> None:
    row = make_connection(owner)
    unchanged = {
        "health_check_interval": "3600", "save_credentials": "on", "health_checks": "on", "auto_reauth": "on",
    }  # fmt: skip
    browser.post(page(ManagedAuthConnection, row.pk, "change"), {**unchanged, "record_session": "on"})
    row.refresh_from_db()
    assert row.record_session
    assert row.version == 2
    browser.post(page(ManagedAuthConnection, row.pk, "change"), {**unchanged, "record_session": "on"})
    row.refresh_from_db()
    assert row.version == 2
    assert Event.objects.filter(name="connection.updated").count() == 1


def test_deleting_a_connection_cancels_its_login_and_tells(browser: Client, owner: User) -> None:
    row = make_connection(owner)
    transitions.start_login(connection_id=row.pk, actor=access.of_user(owner), now=timezone.now())
    answer = browser.post(page(ManagedAuthConnection, row.pk, "delete"), {"post": "yes"}, follow=True)
    assert answer.status_code == 200
    assert not ManagedAuthConnection.objects.exists()
    names = list(Event.objects.order_by("-id").values_list("name", flat=True))
    assert names[0] == "connection.deleted"
    assert Event.objects.filter(name="flow.state", data__flow_status=FlowStatus.CANCELED).exists()


def test_deleting_several_goes_through_the_verb_for_each(browser: Client, owner: User) -> None:
    rows = [make_connection(owner, f"site{number}.example") for number in range(3)]
    browser.post(
        page(ManagedAuthConnection),
        {"action": "delete_selected", "_selected_action": [row.pk for row in rows], "post": "yes"},
    )
    assert Event.objects.filter(name="connection.deleted").count() == 3


def test_actions_start_and_cancel_logins_and_queue_checks(browser: Client, owner: User) -> None:
    row = make_connection(owner)
    act(browser, ManagedAuthConnection, "start_login", row)
    flow = LoginFlow.objects.get()
    assert flow.started_by == "root"
    assert "is running already" in act(browser, ManagedAuthConnection, "start_login", row)
    act(browser, ManagedAuthConnection, "cancel_login", row)
    flow.refresh_from_db()
    assert flow.status == FlowStatus.CANCELED
    act(browser, ManagedAuthConnection, "request_check", row)
    assert Task.objects.filter(kind=TaskKind.HEALTH_CHECK).count() == 1


def test_canceling_an_old_flow_leaves_the_running_one_alone(browser: Client, owner: User) -> None:
    row = make_connection(owner)
    actor, now = access.of_user(owner), timezone.now()
    old, _ = transitions.start_login(connection_id=row.pk, actor=actor, now=now)
    transitions.cancel(connection_id=row.pk, actor=actor, reason="", now=now)
    new, _ = transitions.start_login(connection_id=row.pk, actor=actor, now=now)
    assert "has ended" in act(browser, LoginFlow, "cancel_login", old)
    new.refresh_from_db()
    assert new.status == FlowStatus.IN_PROGRESS
    act(browser, Task, "cancel_login", Task.objects.get(flow=new))
    new.refresh_from_db()
    assert new.status == FlowStatus.CANCELED
    act(browser, LoginFlow, "acknowledge", new)
    new.refresh_from_db()
    assert new.acknowledged_at is not None


def test_an_api_key_is_shown_once_and_can_be_revoked(browser: Client, root: User) -> None:
    answer = browser.post(page(ApiKey, "add"), {"owner": root.pk, "name": "laptop"}, follow=True)
    shown = re.search(r"sk_[\w-]+", answer.content.decode())
    assert shown is not None
    row = ApiKey.objects.get()
    assert row.key_hash == vault.hash_token(shown[0])
    assert shown[0] not in browser.get(page(ApiKey)).content.decode()
    act(browser, ApiKey, "revoke", row)
    row.refresh_from_db()
    assert row.revoked_at is not None


def test_profiles_are_made_renamed_and_deleted_by_verbs(browser: Client, owner: User) -> None:
    browser.post(page(Profile, "add"), {"owner": owner.pk, "name": "one"})
    row = Profile.objects.get()
    connection = make_connection(owner, profile="one")
    browser.post(page(Profile, row.pk, "change"), {"name": "two"})
    row.refresh_from_db()
    assert row.name == "two"
    assert Event.objects.get(name="connection.updated").data["profile_name"] == "two"
    browser.post(page(Profile, row.pk, "delete"), {"post": "yes"})
    assert not Profile.objects.exists()
    assert Event.objects.get(name="connection.deleted").object_id == connection.pk


def test_deleting_a_credential_tells_the_connections_that_used_it(
    browser: Client, everything: dict[type, Any]
) -> None:
    row, credential = everything[ManagedAuthConnection], everything[Credential]
    ManagedAuthConnection.objects.update(credential=credential)
    browser.post(page(Credential, credential.pk, "delete"), {"post": "yes"})
    assert not Credential.objects.exists()
    told = Event.objects.filter(name="connection.updated", object_id=row.pk).order_by("-id")[0]
    assert told.data["credential"] is None


# ── Staff who may not do everything ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def staff(stranger: User) -> Callable[..., Client]:
    """A browser of somebody with staff rights and these permissions, who is in nobody's team."""

    def make(*codenames: str) -> Client:
        stranger.is_staff = True
        stranger.save()
        stranger.user_permissions.set(Permission.objects.filter(codename__in=codenames))
        client = Client()
        client.force_login(stranger)
        return client

    return make


def test_c60_staff_see_their_own_objects_and_not_those_of_strangers(
    staff: Callable[..., Client], everything: dict[type, Any]
) -> None:
    client = staff(*(f"view_{model._meta.model_name}" for model in OUR_MODELS))
    for model in OUR_MODELS:
        if model is LogMark:
            continue
        if model in (IdempotentAnswer, Capacity, SiteCircuit):
            assert client.get(page(model)).status_code == 403
            continue
        answer = client.get(page(model, everything[model].pk, "change"))
        assert answer.status_code == 302, model
        assert f"/{quote(everything[model].pk)}/change/" not in client.get(page(model)).content.decode()


def test_c60_staff_cannot_make_a_key_that_acts_as_somebody_else(
    staff: Callable[..., Client], owner: User, stranger: User
) -> None:
    client = staff("add_apikey", "view_apikey")
    client.post(page(ApiKey, "add"), {"owner": owner.pk, "name": "borrowed"})
    assert ApiKey.objects.get().owner == stranger


def test_c60_staff_cannot_make_a_connection_for_somebody_else(
    staff: Callable[..., Client], owner: User
) -> None:
    client = staff("add_managedauthconnection", "view_managedauthconnection", "view_user", "view_credential")
    answer = client.post(page(ManagedAuthConnection, "add"), form(owner=owner.pk), follow=True)
    assert "may look" in answer.content.decode()
    assert not ManagedAuthConnection.objects.exists()


def test_staff_who_may_only_look_are_offered_no_actions(staff: Callable[..., Client], stranger: User) -> None:
    make_connection(stranger)
    client = staff("view_managedauthconnection")
    assert "start_login" not in client.get(page(ManagedAuthConnection)).content.decode()
