"""The log: what happened, in the order in which it was committed. Append-only; written by ``events/log.py`` alone."""

from __future__ import annotations

from django.db import models


class Event(models.Model):
    """One change. ``id`` is the cursor that streams resume from."""

    id = models.BigAutoField(primary_key=True)
    name = models.CharField(max_length=64)
    topic = models.CharField(max_length=100, help_text="kind:id of the object")
    audience = models.BigIntegerField(help_text="key of the owner of the object")
    object_id = models.CharField(max_length=80)
    version = models.BigIntegerField()
    at = models.DateTimeField(help_text="when it happened")
    actor = models.CharField(max_length=200, blank=True)
    data = models.JSONField()

    class Meta:
        ordering = ["id"]
        indexes = [
            models.Index(fields=["topic", "id"], name="event_of_one_object"),
            models.Index(fields=["at"], name="event_retention"),
        ]
        permissions = [("follow_all_events", "Can see the events of everybody")]

    def __str__(self) -> str:
        return f"#{self.pk} {self.name} {self.topic}"


class LogMark(models.Model):
    """One row: up to where the log was pruned. A cursor below it cannot be continued (``reset {retention}``)."""

    id = models.PositiveSmallIntegerField(primary_key=True, default=1)
    pruned_through = models.BigIntegerField(default=0)

    class Meta:
        constraints = [models.CheckConstraint(condition=models.Q(id=1), name="log_mark_is_one_row")]

    def __str__(self) -> str:
        return f"pruned through #{self.pruned_through}"
