"""The log in Django's admin: to be searched and read. Nobody writes history here."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString

from events.models import Event, LogMark


class AppendOnlyAdmin(admin.ModelAdmin):
    """Rows that are written by the system alone: they can be looked at, and nothing else."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


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
        rows: QuerySet[Event] = super().get_queryset(request)
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
