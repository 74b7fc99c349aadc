"""Every model in Django's admin. What a verb owns is changed through the verb; what is history is read only.

No secret and no sealed column is shown: the fields of each page are listed, so that a new column does not appear by itself.
Staff without superuser rights see what they may see in the dashboard (``access.py``), and API keys only of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.helpers import ActionForm
from django.contrib.admin.utils import quote
from django.core.exceptions import ObjectDoesNotExist, ValidationError
from django.db.models import Model, OuterRef, QuerySet, Subquery
from django.db.models.functions import Length
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

from connections import access, hooks, inputs, payloads, registry, tasks, transitions
from connections.access import Principal
from connections.errors import translate
from connections.models import (
    OPERATE,
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
from connections.states import FlowStatus, FlowStep
from events.admin import AppendOnlyAdmin, ReadableAdmin, goes_with_its_user

NEVER = "—"
REASON = "Canceled in the administration."

#: What verbs refuse with. Anything else is a fault, and is treated as one.
REFUSALS = (
    transitions.AlreadyExists,
    transitions.QuotaReached,
    transitions.LoginInProgress,
    transitions.FlowOver,
    tasks.InvalidTransition,
    tasks.TaskOver,
    hooks.NoHook,
    registry.NameTaken,
    access.NotFound,
    access.Forbidden,
    ObjectDoesNotExist,
)


def actor_of(request: HttpRequest) -> Principal:
    return access.of_user(request.user)


def dashboard_link(connection_id: str | None, text: object = None) -> str | SafeString:
    """A link to the connection's page of the dashboard."""
    if not connection_id:
        return NEVER
    return format_html('<a href="/connections/{}">{}</a>', connection_id, text or connection_id)


# ── What the pages have in common ─────────────────────────────────────────────────────────────────────────────────


class OwnedAdmin(ReadableAdmin):
    """Rows that belong to somebody. ``owner_path`` leads from the row to its owner's key."""

    owner_path = "owner_id"
    show_full_result_count = False
    list_per_page = 50

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows = super().get_queryset(request)
        audiences = actor_of(request).audiences
        return rows if audiences is None else rows.filter(**{f"{self.owner_path}__in": audiences})

    def has_operate_permission(self, request: HttpRequest) -> bool:
        """Whether the actions that call verbs are offered; each row is checked again."""
        return request.user.has_perm(OPERATE)

    def for_each(
        self, request: HttpRequest, rows: QuerySet[Any], verb: Callable[[Any, Principal], Any], done: str
    ) -> None:
        """Call a verb for each row and say what came of it. One refusal does not stop the others."""
        actor = actor_of(request)
        count = 0
        for row in rows:
            try:
                if not actor.may_operate(self.owner_of(row)):
                    raise access.Forbidden(row.pk)
                verb(row, actor)
                count += 1
            except REFUSALS as error:
                self.message_user(request, f"{row}: {translate(error).message}", messages.WARNING)
        if count:
            self.message_user(request, f"{count} {done}.", messages.SUCCESS)

    def owner_of(self, row: Any) -> int:
        """The key of the row's owner."""
        value = row
        for name in self.owner_path.split("__"):
            value = getattr(value, name)
        return int(value)

    def require_operable(self, request: HttpRequest, owner_id: int) -> None:
        if not actor_of(request).may_operate(owner_id):
            raise access.Forbidden(str(owner_id))

    # A refusal after the form was found valid (somebody was quicker): nothing was changed, and the page says why.

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        try:
            return super().changeform_view(request, object_id, form_url, extra_context)
        except REFUSALS as error:
            return self._refused(request, error)

    def delete_view(
        self, request: HttpRequest, object_id: str, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        try:
            return super().delete_view(request, object_id, extra_context)
        except REFUSALS as error:
            return self._refused(request, error)

    def _refused(self, request: HttpRequest, error: Exception) -> HttpResponse:
        self.message_user(request, translate(error).message, messages.ERROR)
        return HttpResponseRedirect(request.get_full_path())


class DeletedByVerb(OwnedAdmin):
    """Deletion goes through a verb, which also sees to what hangs on the row."""

    def delete_by_verb(self, row: Any, actor: Principal) -> None:
        raise NotImplementedError("each admin of this kind names its verb")

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        self.require_operable(request, self.owner_of(obj))
        self.delete_by_verb(obj, actor_of(request))

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self.for_each(request, queryset, self.delete_by_verb, "deleted with all that belongs to them")

    def get_deleted_objects(
        self, objs: QuerySet[Any] | Sequence[Model], request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        # The history below cannot be deleted by itself, but it goes with what it is the history of.
        to_delete, counts, _, protected = super().get_deleted_objects(objs, request)
        return to_delete, counts, set(), protected


class ReadOnlyAdmin(AppendOnlyAdmin, OwnedAdmin):
    """Looked at here, written by verbs alone."""


def take_over(obj: Model, row: Model) -> None:
    """Let the admin's instance be the row that the verb returned."""
    obj.__dict__.update(row.__dict__)


# ── Connections ───────────────────────────────────────────────────────────────────────────────────────────────────


class DomainsField(forms.CharField):
    """A list of domains, one a line."""

    widget = forms.Textarea(attrs={"rows": 3})

    def prepare_value(self, value: Any) -> Any:
        return "\n".join(value) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        try:
            return list(dict.fromkeys(inputs.normal_root(text) for text in str(value or "").split()))
        except ValueError as error:
            raise ValidationError(str(error)) from error

    def has_changed(self, initial: Any, data: Any) -> bool:
        return list(initial or []) != str(data or "").split()


class ConnectionForm(forms.ModelForm):
    """The configuration, under the same rules as the API."""

    profile_name = forms.CharField(
        max_length=255, help_text="The profile; it is made when it does not exist."
    )
    # Declared, so that a URL is judged by the API's rule alone.
    login_url = forms.CharField(max_length=2000, required=False, widget=forms.URLInput(attrs={"size": 80}))
    allowed_domains = DomainsField(required=False, help_text="One a line; empty: anywhere.")

    class Meta:
        model = ManagedAuthConnection
        fields = (
            "owner",
            "domain",
            "login_url",
            "allowed_domains",
            "credential",
            "save_credentials",
            "record_session",
            "health_checks",
            "auto_reauth",
            "health_check_interval",
        )

    def clean_domain(self) -> str:
        try:
            return inputs.normal_host(str(self.cleaned_data["domain"]))
        except ValueError as error:
            raise ValidationError(str(error)) from error

    def clean_login_url(self) -> str:
        url = str(self.cleaned_data["login_url"] or "")
        try:
            return inputs.normal_url(url) if url else ""
        except ValueError as error:
            raise ValidationError(str(error)) from error

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        adding = self.instance._state.adding
        owner = data.get("owner") if adding else self.instance.owner
        credential = data.get("credential")
        if owner is not None and credential is not None and credential.owner_id != owner.pk:
            self.add_error("credential", "This credential belongs to somebody else.")
        if adding and owner is not None:
            same = ManagedAuthConnection.objects.filter(
                owner=owner, domain=data.get("domain"), profile__name=data.get("profile_name")
            )
            if same.exists():
                self.add_error("domain", "This profile already has a connection to this domain.")
        return data


@admin.register(ManagedAuthConnection)
class ConnectionAdmin(DeletedByVerb):
    form = ConnectionForm
    list_display = (
        "domain",
        "profile",
        "owner",
        "status",
        "flow",
        "authenticated_at",
        "last_auth_check_at",
        "page",
    )
    list_filter = ("status", "health_checks", "auto_reauth", ("created_at", admin.DateFieldListFilter))
    search_fields = ("id", "domain", "profile__name", "owner__username")
    list_select_related = ("profile", "owner")
    autocomplete_fields = ("owner", "credential")
    actions = ("start_login", "cancel_login", "request_check")
    readonly_fields = (
        "id",
        "profile",
        "status",
        "flow",
        "authenticated_at",
        "last_auth_check_at",
        "post_login_url",
        "external_credential",
        "browser",
        "version",
        "created_at",
        "updated_at",
    )
    configuration = (
        "login_url",
        "allowed_domains",
        "credential",
        "save_credentials",
        "record_session",
        "health_checks",
        "auto_reauth",
        "health_check_interval",
    )

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        if obj is None:
            return [(None, {"fields": ("owner", "profile_name", "domain", *self.configuration)})]
        return [
            (None, {"fields": ("id", "owner", "profile", "domain", "status", "flow")}),
            ("Configuration", {"fields": self.configuration}),
            (
                "What is known",
                {
                    "fields": (
                        "authenticated_at",
                        "last_auth_check_at",
                        "post_login_url",
                        "external_credential",
                        "browser",
                        "version",
                        "created_at",
                        "updated_at",
                    )
                },
            ),
        ]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return self.readonly_fields if obj is None else ("owner", "domain", *self.readonly_fields)

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        form = super().get_form(request, obj, change, **kwargs)
        if obj is not None:
            # The profile is chosen once; a declared field of the form would be asked for on each change.
            form.base_fields.pop("profile_name", None)
        return form

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        # One row may have thousands of flows; the list shows the last one's end.
        latest = LoginFlow.objects.filter(connection=OuterRef("pk")).order_by("-number")
        return (
            super()
            .get_queryset(request)
            .annotate(
                flow_id=Subquery(latest.values("pk")[:1]),
                flow_status=Subquery(latest.values("status")[:1]),
                flow_step=Subquery(latest.values("step")[:1]),
            )
        )

    def view_on_site(self, obj: Any) -> str:
        return f"/connections/{obj.pk}"

    @admin.display(description="latest login")
    def flow(self, row: Any) -> str | SafeString:
        if row.flow_id is None:
            return NEVER
        running = row.flow_status == FlowStatus.IN_PROGRESS
        return format_html(
            '<a href="{}">{}</a>',
            # Quoted: the admin takes "_24" in an address for an escape, and our ids have an underscore.
            reverse("admin:connections_loginflow_change", args=[quote(row.flow_id)]),
            FlowStep(row.flow_step).label if running else FlowStatus(row.flow_status).label,
        )

    @admin.display(description="dashboard")
    def page(self, row: ManagedAuthConnection) -> str | SafeString:
        return dashboard_link(row.pk, "open")

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        actor, now, data = actor_of(request), timezone.now(), form.cleaned_data
        self.require_operable(request, obj.owner_id)
        if change:
            changes = {name: data[name] for name in form.changed_data if name in transitions.CONFIG}
            row = transitions.update_connection(connection_id=obj.pk, changes=changes, actor=actor, now=now)
        else:
            row = transitions.create_connection(
                owner_id=obj.owner_id,
                domain=data["domain"],
                profile_name=data["profile_name"],
                config={name: data[name] for name in self.configuration},
                actor=actor,
                now=now,
            )
        take_over(obj, row)

    def delete_by_verb(self, row: Any, actor: Principal) -> None:
        transitions.delete_connection(connection_id=row.pk, actor=actor, now=timezone.now())

    @admin.action(description="Start login", permissions=["operate"])
    def start_login(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self.for_each(
            request,
            queryset,
            lambda row, actor: transitions.start_login(connection_id=row.pk, actor=actor, now=timezone.now()),
            "logins started; their pages in the dashboard show what is asked",
        )

    @admin.action(description="Cancel the running login", permissions=["operate"])
    def cancel_login(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self.for_each(
            request,
            queryset,
            lambda row, actor: transitions.cancel(
                connection_id=row.pk, actor=actor, reason=REASON, now=timezone.now()
            ),
            "connections have no running login any more",
        )

    @admin.action(description="Request a health check", permissions=["operate"])
    def request_check(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self.for_each(
            request,
            queryset,
            lambda row, actor: transitions.request_check(
                connection_id=row.pk, actor=actor, now=timezone.now()
            ),
            "health checks queued",
        )


# ── API keys, profiles, credentials ───────────────────────────────────────────────────────────────────────────────


@admin.register(ApiKey)
class ApiKeyAdmin(OwnedAdmin):
    """A key is made and revoked here, never changed. It is deleted with its owner alone: the log keeps naming it."""

    list_display = ("name", "prefix", "owner", "created_at", "last_used_at", "revoked_at")
    list_filter = (("revoked_at", admin.EmptyFieldListFilter), ("created_at", admin.DateFieldListFilter))
    search_fields = ("name", "prefix", "owner__username")
    list_select_related = ("owner",)
    autocomplete_fields = ("owner",)
    actions = ("revoke",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        # A key acts as its owner: a team shares its connections, not its keys.
        rows = super().get_queryset(request)
        return rows if request.user.is_superuser else rows.filter(owner_id=request.user.pk)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        if obj is None:
            return ("owner", "name") if request.user.is_superuser else ("name",)
        return ("name", "prefix", "owner", "created_at", "last_used_at", "revoked_at")

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return goes_with_its_user(request, obj)

    def has_revoke_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("connections.change_apikey")

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        owner: Any = obj.owner if request.user.is_superuser else request.user
        row, plain = registry.create_api_key(owner_id=owner.pk, name=obj.name, now=timezone.now())
        take_over(obj, row)
        self.message_user(
            request,
            format_html("The key, shown this once: <code>{}</code>", plain),
            messages.WARNING,
        )

    @admin.action(description="Revoke", permissions=["revoke"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self.for_each(
            request,
            queryset,
            lambda row, actor: registry.revoke_api_key(key_id=row.pk, now=timezone.now()),
            "keys are revoked",
        )


@admin.register(Profile)
class ProfileAdmin(DeletedByVerb):
    list_display = ("name", "owner", "has_state", "state_saved_at", "last_used_at", "created_at")
    list_filter = (("state_saved_at", admin.EmptyFieldListFilter), ("created_at", admin.DateFieldListFilter))
    search_fields = ("id", "name", "owner__username")
    list_select_related = ("owner",)
    autocomplete_fields = ("owner",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        # The state is large, encrypted, and never shown.
        return super().get_queryset(request).defer("state")

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        if obj is None:
            return ("owner", "name")
        return (
            "id",
            "owner",
            "name",
            "has_state",
            "state_saved_at",
            "last_used_at",
            "created_at",
            "updated_at",
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return () if obj is None else tuple(name for name in self.get_fields(request, obj) if name != "name")

    @admin.display(description="has state", boolean=True)
    def has_state(self, row: Profile) -> bool:
        return row.state_saved_at is not None

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        self.require_operable(request, obj.owner_id)
        if change:
            row = registry.rename_profile(
                profile_id=obj.pk, name=obj.name, actor=actor_of(request), now=timezone.now()
            )
        else:
            row = registry.create_profile(owner_id=obj.owner_id, name=obj.name, now=timezone.now())
        take_over(obj, row)

    def delete_by_verb(self, row: Any, actor: Principal) -> None:
        registry.delete_profile(profile_id=row.pk, actor=actor, now=timezone.now())


@admin.register(Credential)
class CredentialAdmin(DeletedByVerb):
    """Names and no values. Credentials are made where values are typed: in the dashboard and through the API."""

    list_display = ("name", "domain", "owner", "value_names", "has_totp", "created_at")
    list_filter = (
        "sso_provider",
        ("totp_secret", admin.EmptyFieldListFilter),
        ("created_at", admin.DateFieldListFilter),
    )
    search_fields = ("id", "name", "domain", "owner__username")
    list_select_related = ("owner",)
    fields = (
        "id",
        "owner",
        "name",
        "domain",
        "value_names",
        "has_totp",
        "totp_algorithm",
        "totp_digits",
        "totp_period",
        "sso_provider",
        "created_at",
        "updated_at",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).defer("values")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    @admin.display(description="values for")
    def value_names(self, row: Credential) -> str:
        return ", ".join(row.value_keys) or NEVER

    @admin.display(description="authenticator", boolean=True)
    def has_totp(self, row: Credential) -> bool:
        return row.totp_secret is not None

    def delete_by_verb(self, row: Any, actor: Principal) -> None:
        registry.delete_credential(credential_id=row.pk, actor=actor, now=timezone.now())


# ── What happened ─────────────────────────────────────────────────────────────────────────────────────────────────


@admin.register(LoginFlow)
class LoginFlowAdmin(ReadOnlyAdmin):
    owner_path = "connection__owner_id"
    list_display = ("id", "connection_page", "number", "type", "status", "step", "started_by", "started_at")
    list_filter = ("status", "step", "type", "error_code", ("started_at", admin.DateFieldListFilter))
    search_fields = ("id", "connection__id", "connection__domain", "connection__profile__name", "started_by")
    list_select_related = ("connection__profile", "connection__owner")
    actions = ("cancel_login", "acknowledge")
    fields = (
        "id",
        "connection_page",
        "number",
        "type",
        "status",
        "step",
        "step_entered_at",
        "interaction_id",
        "input_expires_at",
        "external_action_message",
        "website_error",
        "error_code",
        "error_message",
        "sso_provider",
        "started_by",
        "started_at",
        "updated_at",
        "expires_at",
        "completed_at",
        "ended_by",
        "end_reason",
        "acknowledged_at",
        "version",
    )

    def view_on_site(self, obj: Any) -> str:
        return f"/connections/{obj.connection_id}"

    @admin.display(description="connection", ordering="connection")
    def connection_page(self, row: LoginFlow) -> str | SafeString:
        return dashboard_link(row.connection_id, row.connection)

    @admin.action(description="Cancel", permissions=["operate"])
    def cancel_login(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        def cancel(row: LoginFlow, actor: Principal) -> None:
            # The verb cancels what runs; a flow that was over before must not take a later one with it.
            if row.is_over:
                raise transitions.FlowOver(row)
            transitions.cancel(
                connection_id=row.connection_id, actor=actor, reason=REASON, now=timezone.now()
            )

        self.for_each(request, queryset, cancel, "logins canceled")

    @admin.action(description="Mark as seen", permissions=["operate"])
    def acknowledge(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self.for_each(
            request,
            queryset,
            lambda row, actor: transitions.acknowledge(flow_id=row.pk, actor=actor, now=timezone.now()),
            "marked as seen",
        )


class ReasonForm(ActionForm):
    """Beside the choice of an action."""

    reason = forms.CharField(max_length=500, required=False, label="Reason")


@admin.register(Task)
class TaskAdmin(ReadOnlyAdmin):
    list_display = (
        "id",
        "kind",
        "title",
        "status",
        "owner",
        "connection_page",
        "attempts",
        "leased_by",
        "created_at",
    )
    list_filter = ("status", "kind", "error_code", ("created_at", admin.DateFieldListFilter))
    search_fields = ("id", "title", "connection__id", "connection__domain", "leased_by", "error")
    list_select_related = ("owner", "connection__profile", "flow")
    action_form = ReasonForm
    actions = ("cancel_login", "kill", "redeliver_hook")
    fields = (
        "id",
        "kind",
        "title",
        "status",
        "owner",
        "connection_page",
        "flow",
        "parent",
        "labels",
        "what",
        "timeout_seconds",
        "created_by",
        "attempts",
        "leased_by",
        "lease_expires_at",
        "run_after",
        "created_at",
        "started_at",
        "finished_at",
        "last_activity_at",
        "prompt",
        "inputs_waiting",
        "prompt_delivered",
        "output_bytes",
        "output_dropped",
        "exit_code",
        "signal",
        "error_code",
        "error",
        "kill_requested_at",
        "kill_requested_by",
        "kill_reason",
        "hook",
        "version",
    )

    def view_on_site(self, obj: Any) -> str | None:
        return f"/connections/{obj.connection_id}" if obj.connection_id else None

    @admin.display(description="connection", ordering="connection")
    def connection_page(self, row: Task) -> str | SafeString:
        return dashboard_link(row.connection_id, row.connection)

    @admin.display(description="what is done")
    def what(self, row: Task) -> str:
        return json.dumps(row.spec, ensure_ascii=False) if row.spec else NEVER

    @admin.display(description="hook")
    def hook(self, row: Task) -> str:
        """Where the report goes, without what may be a token."""
        shown = payloads.task(row)["hook"]
        return f"{shown['url']} ({shown['state'] or 'when it ends'})" if shown else NEVER

    @admin.action(description="Cancel the login", permissions=["operate"])
    def cancel_login(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        def cancel(row: Task, actor: Principal) -> None:
            if row.flow is None or row.flow.is_over or row.connection_id is None:
                raise transitions.FlowOver(row.flow)
            transitions.cancel(
                connection_id=row.connection_id, actor=actor, reason=REASON, now=timezone.now()
            )

        self.for_each(request, queryset, cancel, "logins canceled")

    @admin.action(description="Kill, for the reason beside", permissions=["operate"])
    def kill(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        reason = request.POST.get("reason", "").replace("\0", "").strip() or "Killed in the administration."
        self.for_each(
            request,
            queryset,
            lambda row, actor: transitions.kill_task(
                task_id=row.pk, actor=actor, reason=reason, now=timezone.now()
            ),
            "tasks are killed, or about to be",
        )

    @admin.action(description="Send the report to the hook again", permissions=["operate"])
    def redeliver_hook(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self.for_each(
            request,
            queryset,
            lambda row, actor: hooks.redeliver(task_id=row.pk, actor=actor.name, now=timezone.now()),
            "reports are sent again",
        )


@admin.register(TaskOutput)
class TaskOutputAdmin(ReadOnlyAdmin):
    """How much was written when. What it was is on the page of the task, and in the API."""

    owner_path = "task__owner_id"
    list_display = ("__str__", "task", "start", "size", "at")
    list_filter = (("at", admin.DateFieldListFilter),)
    search_fields = ("task__id", "task__title")
    list_select_related = ("task",)
    ordering = ("-pk",)
    fields = ("task", "start", "size", "at")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).defer("data").annotate(size=Length("data"))

    @admin.display(description="bytes")
    def size(self, row: Any) -> int:
        return int(row.size)


@admin.register(HookDelivery)
class HookDeliveryAdmin(ReadOnlyAdmin):
    """Reports of ended tasks to their hooks. Sent again from the page of the tasks."""

    owner_path = "task__owner_id"
    list_display = ("id", "task", "state", "attempts", "last_status", "next_attempt_at", "delivered_at")
    list_filter = ("state", "last_status", ("created_at", admin.DateFieldListFilter))
    search_fields = ("id", "task__id", "task__title", "last_error")
    list_select_related = ("task",)
    fields = (
        "id",
        "task",
        "state",
        "attempts",
        "next_attempt_at",
        "leased_by",
        "lease_expires_at",
        "last_status",
        "last_error",
        "delivered_at",
        "created_at",
        "updated_at",
    )


class SuperuserAdmin(AppendOnlyAdmin):
    """Rows that have no owner whom they could be shown to."""

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return bool(request.user.is_superuser)


@admin.register(Capacity)
class CapacityAdmin(SuperuserAdmin):
    """Rows that are locked while something is counted. They hold nothing."""

    list_display = ("name",)
    search_fields = ("name",)
    fields = ("name",)


@admin.register(SiteCircuit)
class SiteCircuitAdmin(SuperuserAdmin):
    """Sites whose profiles are not checked at present, because checks there could not tell."""

    list_display = ("domain", "failures", "retry_at", "updated_at")
    list_filter = (("retry_at", admin.EmptyFieldListFilter),)
    search_fields = ("domain",)
    fields = ("domain", "failures", "retry_at", "updated_at")


@admin.register(HealthCheck)
class HealthCheckAdmin(ReadOnlyAdmin):
    owner_path = "connection__owner_id"
    list_display = ("id", "connection_page", "previous_status", "status", "reason", "checked_at")
    list_filter = ("status", ("checked_at", admin.DateFieldListFilter))
    search_fields = ("id", "connection__id", "connection__domain", "connection__profile__name")
    list_select_related = ("connection__profile",)
    fields = ("id", "connection_page", "previous_status", "status", "reason", "checked_at")

    @admin.display(description="connection", ordering="connection")
    def connection_page(self, row: HealthCheck) -> str | SafeString:
        return dashboard_link(row.connection_id, row.connection)


@admin.register(Submission)
class SubmissionAdmin(ReadOnlyAdmin):
    """Who answered when. The values are encrypted until the worker takes them, and erased then."""

    owner_path = "flow__connection__owner_id"
    list_display = ("interaction_id", "flow", "submitted_by", "field_count", "created_at", "taken_at")
    list_filter = (("created_at", admin.DateFieldListFilter), ("taken_at", admin.EmptyFieldListFilter))
    search_fields = ("interaction_id", "flow__id", "flow__connection__id", "submitted_by")
    list_select_related = ("flow__connection",)
    fields = ("flow", "interaction_id", "field_count", "submitted_by", "created_at", "taken_at")


@admin.register(TaskInput)
class TaskInputAdmin(ReadOnlyAdmin):
    """Who sent what when. It is encrypted until the task takes it, and erased then."""

    owner_path = "task__owner_id"
    list_display = ("__str__", "task", "kind", "submitted_by", "byte_count", "created_at", "taken_at")
    list_filter = (
        "kind",
        ("created_at", admin.DateFieldListFilter),
        ("taken_at", admin.EmptyFieldListFilter),
    )
    search_fields = ("task__id", "message_id", "submitted_by")
    list_select_related = ("task",)
    fields = (
        "task",
        "number",
        "kind",
        "submit",
        "message_id",
        "byte_count",
        "submitted_by",
        "created_at",
        "taken_at",
    )


@admin.register(IdempotentAnswer)
class IdempotentAnswerAdmin(SuperuserAdmin):
    """Which requests were answered already."""

    list_display = ("scope", "key", "status_code", "created_at")
    list_filter = ("status_code", ("created_at", admin.DateFieldListFilter))
    search_fields = ("scope", "key")
    fields = ("scope", "key", "status_code", "created_at")
