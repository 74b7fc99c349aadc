"""The commands: what they do, what they print, what they refuse, and that no secret passes where others can see it."""

from __future__ import annotations

import datetime as dt
import getpass
import io
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from django.apps import apps
from django.contrib.auth.models import User
from django.core.management import call_command
from django.core.management.base import CommandError
from django.utils import timezone
from pytest_django import Settings

from connections import access, registry, task_inputs, tasks, transitions, vault
from connections.management.commands import _shared, doctor, login, rotate_keys
from connections.models import (
    ApiKey,
    Credential,
    IdempotentAnswer,
    LoginFlow,
    ManagedAuthConnection,
    Profile,
    Submission,
    Task,
    TaskOutput,
)
from connections.states import FlowStatus, FlowStep, TaskKind, TaskStatus
from connections.tasks import Hold
from events.models import Event
from tests.sites.app import PASSWORD, USERNAME, Site

Run = Callable[..., str]

USER_FIELD = {"id": "f_user", "ref": "username", "type": "identifier", "label": "User name", "required": True}
PASSWORD_FIELD = {
    "id": "f_pass",
    "ref": "password",
    "type": "password",
    "label": "Password",
    "required": True,
}
CODE_FIELD = {"id": "f_code", "ref": "code", "type": "code", "label": "Code", "required": True}


@pytest.fixture
def admin(db: Any) -> User:
    return User.objects.create_superuser("root", password="root-password")


@pytest.fixture
def run() -> Run:
    """Call a command; returns what it wrote to standard output."""

    def call(name: str, *words: str) -> str:
        out = io.StringIO()
        call_command(name, *words, stdout=out, stderr=io.StringIO())
        return out.getvalue()

    return call


@pytest.fixture
def connection(admin: User) -> ManagedAuthConnection:
    return transitions.create_connection(
        owner_id=admin.pk,
        domain="site.example",
        profile_name="me",
        config={},
        actor=access.of_user(admin),
        now=timezone.now(),
    )


def asking(
    connection: ManagedAuthConnection, *fields: dict[str, Any], choices: Any = ()
) -> tuple[LoginFlow, Hold]:
    """A flow that waits for these fields and choices, and the hold of its worker."""
    now = timezone.now()
    flow, _ = transitions.start_login(connection_id=connection.pk, actor=access.of_system("test"), now=now)
    hold = tasks.claim(worker="w1", kinds=[TaskKind.LOGIN], now=now)
    assert hold is not None
    transitions.await_input(hold=hold, fields=list(fields), choices=list(choices), now=now)
    flow.refresh_from_db()
    return flow, hold


def taken(hold: Hold) -> transitions.TakenAnswer:
    answer = transitions.take_submission(hold=hold, now=timezone.now())
    assert answer is not None
    return answer


# ── create_api_key, connect ───────────────────────────────────────────────────────────────────────────────────────


def test_an_api_key_is_printed_once_and_alone_on_standard_output(run: Run, admin: User) -> None:
    printed = run("create_api_key", "--name", "laptop")
    key = printed.strip()
    row = ApiKey.objects.get()
    assert key.startswith("sk_")
    assert row.key_hash == vault.hash_token(key)
    assert (row.owner, row.name) == (admin, "laptop")


def test_an_api_key_can_be_made_for_a_named_user(run: Run, admin: User, owner: User) -> None:
    shown = json.loads(run("create_api_key", "--user", "owner", "--json"))
    assert ApiKey.objects.get(pk=shown["id"]).owner == owner
    assert shown["user"] == "owner"


def test_without_a_superuser_a_command_says_how_to_name_an_owner(run: Run, owner: User) -> None:
    with pytest.raises(CommandError, match="--user"):
        run("create_api_key")
    with pytest.raises(CommandError, match="no active user 'nobody'"):
        run("create_api_key", "--user", "nobody")


def test_connect_makes_a_connection_and_the_log_names_the_command(run: Run, admin: User) -> None:
    shown = json.loads(
        run(
            "connect", "Site.Example:8443", "--profile", "me",
            "--login-url", "https://site.example:8443/login", "--allow", "www.site.example", "--json",
        )
    )  # fmt: skip
    row = ManagedAuthConnection.objects.get(pk=shown["id"])
    assert (row.domain, row.profile.name, row.allowed_domains) == (
        "site.example:8443",
        "me",
        ["site.example"],
    )
    assert row.owner == admin
    assert Event.objects.get(name="connection.created").actor == "command connect"


def test_connect_refuses_what_the_api_refuses_and_names_the_field(run: Run, admin: User) -> None:
    with pytest.raises(CommandError, match="domain"):
        run("connect", "not a host", "--profile", "me")
    with pytest.raises(CommandError, match="login_url"):
        run("connect", "site.example", "--profile", "me", "--login-url", "ftp://site.example")
    with pytest.raises(CommandError) as refused:
        run("connect", "bad/host", "--profile", "me")
    assert str(refused.value).count("Use a host name") == 1


def test_connect_says_which_connection_exists_already(run: Run, connection: ManagedAuthConnection) -> None:
    with pytest.raises(CommandError, match=connection.pk):
        run("connect", "site.example", "--profile", "me")


def test_a_connection_is_found_by_id_and_by_domain_and_profile(
    run: Run, connection: ManagedAuthConnection
) -> None:
    for name in (connection.pk, "site.example/me", "site.example"):
        assert "No login" in run("cancel", name)
    with pytest.raises(CommandError, match="no connection"):
        run("cancel", "site.example/other")


def test_a_name_that_means_two_connections_is_refused_with_their_ids(
    run: Run, connection: ManagedAuthConnection, admin: User
) -> None:
    run("connect", "site.example", "--profile", "other")
    with pytest.raises(CommandError, match=connection.pk):
        run("cancel", "site.example")


# ── submit, cancel ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_code_can_be_submitted_on_the_command_line(run: Run, connection: ManagedAuthConnection) -> None:
    _, hold = asking(connection, CODE_FIELD)
    run("submit", connection.pk, "--field", "code=123456")
    assert taken(hold).field_values == {"f_code": "123456"}


def test_a48_a_password_on_the_command_line_is_refused_and_not_repeated(
    run: Run, connection: ManagedAuthConnection
) -> None:
    asking(connection, USER_FIELD, PASSWORD_FIELD)
    with pytest.raises(CommandError) as refused:
        run("submit", connection.pk, "--field", "username=alice", "--field", "password=hunter2")
    assert "hunter2" not in str(refused.value)
    assert "--field password=-" in str(refused.value)
    assert not Submission.objects.exists()


def test_a_password_can_be_piped_in(
    run: Run, connection: ManagedAuthConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hold = asking(connection, USER_FIELD, PASSWORD_FIELD)
    monkeypatch.setattr("sys.stdin", io.StringIO(" with spaces \n"))
    run("submit", connection.pk, "--field", "username=alice", "--field", "password=-")
    assert taken(hold).field_values == {"f_user": "alice", "f_pass": " with spaces "}


def test_values_are_asked_for_and_secrets_are_not_echoed(
    run: Run, connection: ManagedAuthConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hold = asking(connection, USER_FIELD, PASSWORD_FIELD)
    monkeypatch.setattr("builtins.input", lambda prompt: "alice")
    monkeypatch.setattr(getpass, "getpass", lambda prompt: "secret")
    run("submit", "site.example/me")
    assert taken(hold).field_values == {"f_user": "alice", "f_pass": "secret"}


def test_a_choice_is_made_by_number(run: Run, connection: ManagedAuthConnection) -> None:
    choices = [
        {"id": "c_sms", "type": "mfa_method", "label": "Text message", "mfa_type": "sms"},
        {"id": "c_app", "type": "mfa_method", "label": "Authenticator", "mfa_type": "totp"},
    ]
    _, hold = asking(connection, choices=choices)
    with pytest.raises(CommandError, match="2\\) Authenticator"):
        run("submit", connection.pk, "--choice", "3")
    run("submit", connection.pk, "--choice", "2")
    assert taken(hold).choice_id == "c_app"


def test_submit_says_what_is_asked_when_a_field_is_not(run: Run, connection: ManagedAuthConnection) -> None:
    asking(connection, CODE_FIELD)
    with pytest.raises(CommandError, match="It asks for: code"):
        run("submit", connection.pk, "--field", "token=1")
    with pytest.raises(CommandError, match="NAME=VALUE"):
        run("submit", connection.pk, "--field", "123456")


def test_submit_without_a_running_login_says_so(run: Run, connection: ManagedAuthConnection) -> None:
    with pytest.raises(CommandError, match="No login is running"):
        run("submit", connection.pk, "--field", "code=1")


def test_cancel_ends_the_login_with_its_reason(run: Run, connection: ManagedAuthConnection) -> None:
    flow, _ = asking(connection, CODE_FIELD)
    shown = json.loads(run("cancel", connection.pk, "--reason", "wrong account", "--json"))
    assert shown["flow_status"] == FlowStatus.CANCELED
    flow.refresh_from_db()
    assert (flow.end_reason, flow.ended_by) == ("wrong account", "command cancel")
    assert "No login" in run("cancel", connection.pk)


# ── login ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def site() -> Iterator[Site]:
    with Site(scenario="simple") as running:
        yield running


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What somebody types: identifiers by ``input``, the password without echo. Holds the prompts."""
    prompts: list[str] = []

    def answer(value: str) -> Callable[[str], str]:
        def read(prompt: str) -> str:
            prompts.append(prompt)
            return value

        return read

    monkeypatch.setattr("builtins.input", answer(USERNAME))
    monkeypatch.setattr(getpass, "getpass", answer(PASSWORD))
    return prompts


@pytest.mark.django_db(transaction=True)
def test_a_whole_login_runs_in_the_terminal(run: Run, admin: User, site: Site, typed: list[str]) -> None:
    row = json.loads(run("connect", site.domain, "--profile", "me", "--json"))
    printed = run("login", row["id"], "--worker")
    assert "Logged in" in printed
    assert "looking at the site" in printed
    assert "submitting" in printed
    assert f"/login/{row['id']}?code=" in printed
    assert PASSWORD not in printed
    assert ManagedAuthConnection.objects.get(pk=row["id"]).status == "AUTHENTICATED"
    assert len(typed) == 2
    # Its own worker has given everything back and left nothing behind.
    assert not Task.objects.exclude(status=TaskStatus.COMPLETED).exists()


@pytest.mark.django_db(transaction=True)
def test_a_login_tells_when_no_worker_takes_it(
    run: Run, connection: ManagedAuthConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connections.management.commands.login.NO_WORKER_SECONDS", 0.0)
    out = io.StringIO()

    def nobody_comes(seconds: float) -> None:
        if "No worker" in out.getvalue():
            raise KeyboardInterrupt

    monkeypatch.setattr("connections.management.commands.login.time.sleep", nobody_comes)
    with pytest.raises(CommandError, match="canceled"):
        call_command("login", connection.pk, stdout=out)
    assert "No worker seems to be running" in out.getvalue()
    flow = connection.latest_flow()
    assert flow is not None
    assert flow.status == FlowStatus.CANCELED


def test_ctrl_c_with_keep_leaves_the_login_running(
    run: Run, connection: ManagedAuthConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("connections.management.commands.login.time.sleep", interrupt)
    assert "goes on" in run("login", connection.pk, "--keep")
    flow = connection.latest_flow()
    assert flow is not None
    assert flow.status == FlowStatus.IN_PROGRESS


def test_a_second_login_is_refused_with_the_way_out(run: Run, connection: ManagedAuthConnection) -> None:
    asking(connection, CODE_FIELD)
    with pytest.raises(CommandError, match=f"manage.py cancel {connection.pk}"):
        run("login", connection.pk)


def test_a28_an_answer_that_comes_too_late_is_explained_and_the_new_question_is_put(
    run: Run, connection: ManagedAuthConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody answers on the hosted page while this terminal waits at its prompt."""
    holds: list[Hold] = []
    prompts: list[str] = []

    def worker_comes(seconds: float) -> None:
        if not holds:
            hold = tasks.claim(worker="w1", kinds=[TaskKind.LOGIN], now=timezone.now())
            assert hold is not None
            holds.append(hold)
            transitions.await_input(hold=hold, fields=[USER_FIELD], choices=[], now=timezone.now())
        else:
            transitions.fail(hold=holds[0], code="credentials_invalid", message="Wrong.", now=timezone.now())

    def type_late(prompt: str) -> str:
        prompts.append(prompt)
        if len(prompts) == 1:
            transitions.submit(
                connection_id=connection.pk,
                answer=transitions.SubmittedAnswer(field_values={"f_user": "bob"}),
                actor=access.of_system("hosted page"),
                now=timezone.now(),
            )
            transitions.await_input(hold=holds[0], fields=[CODE_FIELD], choices=[], now=timezone.now())
        return "alice"

    monkeypatch.setattr("connections.management.commands.login.time.sleep", worker_comes)
    monkeypatch.setattr("builtins.input", type_late)
    out = io.StringIO()
    with pytest.raises(CommandError, match="credentials_invalid"):
        call_command("login", connection.pk, stdout=out)
    assert "asks something else by now" in out.getvalue()
    assert [prompt.partition(":")[0] for prompt in prompts] == ["User name", "Code"]


# ── export_profile ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_profile_is_exported_to_a_file_that_nobody_else_reads(
    run: Run, admin: User, tmp_path: Path
) -> None:
    profile = registry.create_profile(owner_id=admin.pk, name="me", now=timezone.now())
    with pytest.raises(CommandError, match="Nothing is saved"):
        run("export_profile", "me")
    state = {"cookies": [{"name": "session", "value": "é"}], "origins": []}
    Profile.objects.filter(pk=profile.pk).update(state=vault.seal(state), state_saved_at=timezone.now())
    assert json.loads(run("export_profile", "me")) == state
    target = tmp_path / "state.json"
    target.write_text("old")
    target.chmod(0o644)
    assert run("export_profile", profile.pk, "--output", str(target)) == ""
    assert json.loads(target.read_text(encoding="utf-8")) == state
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_an_export_does_not_write_through_a_symbolic_link(run: Run, admin: User, tmp_path: Path) -> None:
    profile = registry.create_profile(owner_id=admin.pk, name="me", now=timezone.now())
    Profile.objects.filter(pk=profile.pk).update(
        state=vault.seal({"cookies": []}), state_saved_at=timezone.now()
    )
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CommandError, match="cannot be written"):
        run("export_profile", "me", "--output", str(tmp_path / "link"))
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_name_of_several_profiles_wants_an_owner(run: Run, admin: User, owner: User) -> None:
    for user in (admin, owner):
        profile = registry.create_profile(owner_id=user.pk, name="me", now=timezone.now())
        Profile.objects.filter(pk=profile.pk).update(state=vault.seal({"of": user.username}))
    with pytest.raises(CommandError, match="--user"):
        run("export_profile", "me")
    assert json.loads(run("export_profile", "me", "--user", "owner")) == {"of": "owner"}


# ── rotate_keys ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def every_sealed_column(connection: ManagedAuthConnection, settings: Settings) -> str:
    """A secret in each sealed column, under the only key; returns that key."""
    old = Fernet.generate_key().decode()
    settings.ENCRYPTION_KEYS = [old]
    now = timezone.now()
    registry.create_credential(
        owner_id=connection.owner_id, name="c", domain="site.example", values={"password": "p"},
        totp_secret="JBSWY3DPEHPK3PXP", now=now,
    )  # fmt: skip
    Profile.objects.update(state=vault.seal({"cookies": []}), state_saved_at=now)
    asking(connection, CODE_FIELD)
    transitions.submit(
        connection_id=connection.pk,
        answer=transitions.SubmittedAnswer(field_values={"f_code": "123"}),
        actor=access.of_system("test"),
        now=now,
    )
    IdempotentAnswer.objects.create(
        scope="key:1", key="k", fingerprint="f", sealed=vault.seal({}), created_at=now
    )
    task = tasks.enqueue(kind=TaskKind.COMMAND, title="c", connection=connection, actor="test", now=now)
    task_inputs.add_input(task_id=task.pk, content="line", message_id="m", actor="test", now=now)
    tasks.create(
        owner_id=connection.owner_id, kind="build", title="b", spec={}, hook_url="https://site.example/hook", hook_secret="whsec_x",
        actor="test", now=now,
    )  # fmt: skip
    return old


def test_every_encrypted_column_of_every_model_is_rotated() -> None:
    """A new sealed column that nobody lists would be lost with the old key."""
    binary = {
        (model, field.name)
        for model in apps.get_models()
        for field in model._meta.get_fields()
        if type(field).__name__ == "BinaryField"
    }
    # What a command wrote is kept as it came: it is read piece by piece, and whoever may see the task may see it.
    assert binary - {(TaskOutput, "data")} == set(_shared.SEALED_COLUMNS)


def test_rotation_puts_every_secret_under_the_new_key(
    run: Run, every_sealed_column: str, settings: Settings
) -> None:
    new = Fernet.generate_key().decode()
    settings.ENCRYPTION_KEYS = [new, every_sealed_column]
    shown = json.loads(run("rotate_keys", "--json"))
    assert shown["unreadable"] == []
    assert all(shown["resealed"].values()), shown
    settings.ENCRYPTION_KEYS = [new]
    for model, column in _shared.SEALED_COLUMNS:
        for sealed in model._default_manager.exclude(**{column: None}).values_list(column, flat=True):
            vault.unseal(sealed)
    assert vault.unseal(Credential.objects.get().values) == {"password": "p"}


def test_rotation_leaves_alone_what_no_key_opens_and_names_it(
    run: Run, every_sealed_column: str, settings: Settings
) -> None:
    settings.ENCRYPTION_KEYS = [Fernet.generate_key().decode(), Fernet.generate_key().decode()]
    before = bytes(Credential.objects.get().values)
    with pytest.raises(CommandError, match=r"Credential\.values cred_"):
        run("rotate_keys")
    assert bytes(Credential.objects.get().values) == before


def test_rotation_goes_on_over_many_batches(
    run: Run, every_sealed_column: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotate_keys, "BATCH", 2)
    owner_id = Profile.objects.get().owner_id
    now = timezone.now()
    for number in range(4):
        registry.create_credential(owner_id=owner_id, name=f"n{number}", domain="d", values={}, now=now)
    settings.ENCRYPTION_KEYS = [Fernet.generate_key().decode(), every_sealed_column]
    assert json.loads(run("rotate_keys", "--json"))["resealed"]["Credential.values"] == 5


def test_with_one_key_rotation_explains_how_to_add_another(run: Run, db: Any, settings: Settings) -> None:
    settings.ENCRYPTION_KEYS = settings.ENCRYPTION_KEYS[:1]
    with pytest.raises(CommandError, match="ENCRYPTION_KEYS=new,old"):
        run("rotate_keys")


# ── doctor ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def healthy(admin: User, settings: Settings, tmp_path: Path) -> Settings:
    """An installation in which nothing is wrong."""
    tmp_path.chmod(0o700)
    settings.DATA_DIR = tmp_path
    settings.BASE_URL = "https://switchboard.example.com"
    settings.ALLOWED_HOSTS = ["switchboard.example.com"]
    settings.ALLOW_PRIVATE_TARGETS = False
    return settings


def levels() -> dict[str, str]:
    return {finding.check: finding.level for finding in doctor.examine(timezone.now())}


def test_the_doctor_finds_nothing_wrong_in_a_healthy_installation(run: Run, healthy: Settings) -> None:
    shown = json.loads(run("doctor", "--json"))
    assert shown["ok"] is True
    assert {finding["level"] for finding in shown["findings"]} == {"ok"}


def test_the_doctor_ends_with_an_error_when_something_is_wrong(run: Run, db: Any, healthy: Settings) -> None:
    User.objects.all().delete()
    with pytest.raises(CommandError, match="1 of"):
        run("doctor")
    assert levels()["admins"] == "wrong"


def test_the_doctor_sees_files_that_others_can_read(healthy: Settings) -> None:
    secret = healthy.DATA_DIR / "secret.key"
    secret.write_text("s")
    secret.chmod(0o644)
    assert levels()["files"] == "wrong"
    secret.chmod(0o600)
    assert levels()["files"] == "ok"


def test_the_doctor_sees_a_secret_that_no_key_opens(healthy: Settings, every_sealed_column: str) -> None:
    assert levels()["keys"] == "ok"
    healthy.ENCRYPTION_KEYS = [Fernet.generate_key().decode()]
    assert levels()["keys"] == "wrong"


@pytest.mark.parametrize(
    ("name", "value", "check", "level"),
    [
        ("DEBUG", True, "debug", "wrong"),
        ("ALLOW_PRIVATE_TARGETS", True, "private_targets", "warning"),
        ("ALLOWED_HOSTS", ["other.example.com"], "hosts", "wrong"),
        ("ALLOWED_HOSTS", [".example.com"], "hosts", "ok"),
        ("ALLOWED_HOSTS", ["*"], "hosts", "warning"),
        ("BASE_URL", "http://switchboard.example.com", "base_url", "warning"),
        ("BASE_URL", "http://0.0.0.0:8000", "base_url", "wrong"),
    ],
)
def test_the_doctor_looks_at_the_settings(
    healthy: Settings, name: str, value: Any, check: str, level: str
) -> None:
    setattr(healthy, name, value)
    assert levels()[check] == level


def test_the_doctor_misses_a_worker_when_tasks_wait(
    healthy: Settings, connection: ManagedAuthConnection
) -> None:
    transitions.request_check(connection_id=connection.pk, actor=access.of_system("test"), now=timezone.now())
    assert levels()["worker"] == "ok"
    Task.objects.update(run_after=timezone.now() - dt.timedelta(minutes=2))
    assert levels()["worker"] == "wrong"
    hold = tasks.claim(worker="w", kinds=[TaskKind.HEALTH_CHECK], now=timezone.now())
    assert hold is not None
    assert levels()["worker"] == "ok"
    Task.objects.update(lease_expires_at=timezone.now() - dt.timedelta(minutes=2))
    assert levels()["worker"] == "wrong"


def test_the_doctor_says_when_the_channel_layer_cannot_be_reached(healthy: Settings) -> None:
    healthy.CHANNEL_LAYERS = {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": ["redis://127.0.0.1:1/0"]},
        }
    }
    assert levels()["layer"] == "wrong"


def test_the_doctor_sees_a_clock_that_went_back(healthy: Settings, connection: ManagedAuthConnection) -> None:
    found = {f.check: f.level for f in doctor.examine(timezone.now() - dt.timedelta(days=1))}
    assert found["clock"] == "wrong"


def test_the_step_of_a_flow_is_said_in_words_for_every_step() -> None:
    from_states = {step for step in FlowStep if step != FlowStep.COMPLETED}
    assert from_states == set(login.SAID)
