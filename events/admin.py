"""The log in Django's admin, and the clients that follow it: to be searched and read. Nobody writes history here.

The one thing that can be done is to disconnect a client, through the verb.
"""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.auth import get_user_model
from django.core.exceptions import BadRequest
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, QueryDict
from django.template.response import TemplateResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from events import clients
from events.envelope import SIGNAL_NAMES
from events.models import Claim, Client, Event, LogMark, Presence
from events.states import ClientState

#: At most so many clients are disconnected with one click.
DISCONNECT_LIMIT = 200


class ReadableAdmin(admin.ModelAdmin):
    """What PostgreSQL cannot even be asked for is a wrong request (400), and no fault of ours: NUL in a search, a filter, an id or a form."""

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        _refuse_nul(*_texts(request.GET), *request.POST.getlist(ACTION_CHECKBOX_NAME))
        return super().changelist_view(request, extra_context)

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        # An address can fill in the form, and a row that is chosen in it is looked for before any field is judged.
        _refuse_nul(*_texts(request.GET), *_texts(request.POST))
        return super().changeform_view(request, object_id, form_url, extra_context)

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        _refuse_nul(object_id)
        return super().get_object(request, object_id, from_field)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        # The boxes that complete what is typed do not pass the list.
        _refuse_nul(search_term)
        return super().get_search_results(request, queryset, search_term)


def _texts(query: QueryDict) -> list[str]:
    return [text for name, values in query.lists() for text in (name, *values)]


def _refuse_nul(*texts: str) -> None:
    if any("\0" in text for text in texts):
        raise BadRequest("There is a NUL in what was asked for.")


class AppendOnlyAdmin(ReadableAdmin):
    """Rows that are written by the system alone: they can be looked at, and nothing else."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


def goes_with_its_user(request: HttpRequest, obj: Any) -> bool:
    """Whether this asks about a row that a user takes along. Django asks the row's own admin, which offers no deletion itself.

    The user's pages have decided by then whether this user may be deleted.
    """
    user = get_user_model()._meta
    names = {f"{user.app_label}_{user.model_name}_{view}" for view in ("delete", "changelist")}
    match = request.resolver_match
    return obj is not None and match is not None and match.url_name in names


class GoesWithUserAdmin(AppendOnlyAdmin):
    """Rows that say who is there now: no history that would have to outlive its user."""

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return goes_with_its_user(request, obj)


@admin.register(Event)
class EventAdmin(AppendOnlyAdmin):
    """What happened, newest first. Without ``follow_all_events`` staff see what concerns their own objects."""

    list_display = ("id", "at", "name", "where", "version", "actor")
    list_filter = ("name", ("at", admin.DateFieldListFilter))
    search_fields = ("topic__startswith", "object_id__exact", "actor", "name__startswith")
    search_help_text = "Id of an object, topic (connection:ma_…), event name or actor"
    ordering = ("-id",)
    # A log is long: counting all of it for every page would cost more than the page.
    show_full_result_count = False
    list_per_page = 50

    def get_queryset(self, request: HttpRequest) -> QuerySet[Event]:
        # What server processes say to each other through the log is nobody's history.
        rows: QuerySet[Event] = super().get_queryset(request).exclude(name__in=SIGNAL_NAMES)
        if request.user.has_perm("events.follow_all_events"):
            return rows
        # An admin page is never shown to somebody without a key; 0 is nobody's.
        return rows.filter(audience=request.user.pk or 0)

    @admin.display(description="topic", ordering="topic")
    def where(self, event: Event) -> str | SafeString:
        """The topic, leading to the object's page where it has one."""
        kind, _, object_id = event.topic.partition(":")
        if kind != "connection":
            return event.topic
        return format_html('<a href="/connections/{}">{}</a>', object_id, event.topic)


@admin.register(LogMark)
class LogMarkAdmin(AppendOnlyAdmin):
    list_display = ("id", "pruned_through")


class _OwnUnlessAllowed(AppendOnlyAdmin):
    """Without ``follow_all_events`` staff see their own. ``owner_path``: where the row says whose it is."""

    owner_path: str
    show_full_result_count = False
    list_per_page = 50

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        if request.user.has_perm("events.follow_all_events"):
            return rows
        return rows.filter(**{self.owner_path: request.user.pk or 0})


@admin.register(Client)
class ClientAdmin(_OwnUnlessAllowed, GoesWithUserAdmin):
    """Browser tabs and programs with a stable id. Rows of those that are over are kept for an hour."""

    owner_path = "owner_id"
    list_display = (
        "who",
        "shown_state",
        "path",
        "cid",
        "epoch",
        "opened_at",
        "last_seen_at",
        "address",
        "reason",
    )
    list_filter = ("state", ("last_seen_at", admin.DateFieldListFilter))
    search_fields = ("cid__startswith", "who", "path__startswith", "address__startswith")
    search_help_text = "Id (cid-…), user or key, page, address"
    ordering = ("-last_seen_at", "-pk")
    actions = ("disconnect",)
    #: Listed, so that the nonces of pages and the hash of a session do not appear.
    fields = (
        "cid", "who", "owner", "state", "reason", "path", "watches", "epoch", "process", "lease_expires_at", "expires_at",
        "cursor", "sent_cursor", "user_agent", "address", "opened_at", "connected_at", "last_seen_at", "version",
    )  # fmt: skip

    @admin.display(description="state", ordering="state")
    def shown_state(self, client: Client) -> str:
        """As the list of ``manage.py clients`` has it: a lease that ran out is not live."""
        lost = client.state == ClientState.LIVE and not clients.seems_live(client, clients.database_now())
        return "Lost contact" if lost else client.get_state_display()

    @admin.action(description="Disconnect…")
    def disconnect(self, request: HttpRequest, rows: QuerySet[Client]) -> HttpResponse | None:
        """Ask for a reason first. Everybody disconnects their own clients; others' with ``events.change_client``."""
        if not request.user.has_perm("events.change_client"):
            foreign = rows.exclude(owner=request.user.pk or 0).count()
            rows = rows.filter(owner=request.user.pk or 0)
            if foreign:
                self.message_user(
                    request, f"{foreign} of them are not yours to disconnect.", messages.WARNING
                )
        reason = request.POST.get("reason", "").replace("\0", "").strip()[:200]
        chosen = list(rows[:DISCONNECT_LIMIT])
        if not chosen:
            return None
        count = rows.count()
        if count > len(chosen):
            self.message_user(
                request,
                f"{count} are selected. This is about the first {len(chosen)} of them alone; do it again for the others.",
                messages.WARNING,
            )
        if "apply" not in request.POST or not reason:
            context = {
                **self.admin_site.each_context(request),
                "title": "Disconnect clients",
                "clients": chosen,
                "opts": self.opts,
            }
            return TemplateResponse(request, "admin/events/client/disconnect.html", context)
        done = sum(
            clients.close(pk=row.pk, reason=reason, actor=request.user.get_username()) for row in chosen
        )
        self.message_user(
            request,
            f"{done} of {len(chosen)} were disconnected; the others were gone already."
            if done < len(chosen)
            else f"{done} disconnected.",
        )
        return None


@admin.register(Claim)
class ClaimAdmin(_OwnUnlessAllowed):
    """Who is handling what. One row per subject, also when nobody is."""

    owner_path = "audience"
    list_display = ("subject", "who", "taken_at", "version")
    list_filter = (("client", admin.EmptyFieldListFilter), ("taken_at", admin.DateFieldListFilter))
    list_select_related = ("client",)
    search_fields = ("subject__startswith", "client__who", "client__cid__startswith")
    search_help_text = "Subject (connection:ma_…), user, or client id"
    fields = ("subject", "client", "taken_at", "version")

    @admin.display(description="handled by", ordering="client__who")
    def who(self, claim: Claim) -> str:
        return claim.client.who if claim.client else "nobody"


@admin.register(Presence)
class PresenceAdmin(_OwnUnlessAllowed, GoesWithUserAdmin):
    """Who looks and who types, for the half minute that it is so."""

    owner_path = "claim__audience"
    list_display = ("claim", "client", "doing", "until")
    list_select_related = ("claim", "client")
    list_filter = ("doing",)
    search_fields = ("claim__subject__startswith", "client__who")
    fields = ("claim", "client", "doing", "until")
