"""The log: what happened, in the order in which it was committed. Append-only; written by ``events/log.py`` alone.

And the clients that follow it, with what they have claimed; written by ``events/clients.py`` alone.
"""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.db.models import Q

from events.states import CLIENT_KEEPS, ClientState


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


class Client(models.Model):
    """A browser tab or a program with a stable id (``cid``), which belongs to one user and one session or key.

    ``epoch`` numbers its streams. Whatever a stream, a lease or a timer does to the row is conditional on its epoch.
    """

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    cid = models.CharField(max_length=80)
    binding = models.CharField(max_length=80, help_text="the session or key that it belongs to")
    who = models.CharField(max_length=200, help_text="how pages name it: the user, or the key")
    page = models.CharField(max_length=64, blank=True, help_text="nonce of the page that has the stream")
    former_pages = models.JSONField(
        default=list, blank=True, help_text="pages that lost it, the newest first"
    )
    epoch = models.PositiveBigIntegerField(default=0)
    state = models.CharField(max_length=12, choices=ClientState.choices, default=ClientState.EXPIRED)
    process = models.CharField(max_length=120, blank=True, help_text="the server process of its stream")
    lease_expires_at = models.DateTimeField(
        null=True, blank=True, help_text="renewed by the process while the stream is open"
    )
    expires_at = models.DateTimeField(null=True, blank=True, help_text="when its claims are released")
    cursor = models.BigIntegerField(null=True, blank=True, help_text="what it said to have applied")
    sent_cursor = models.BigIntegerField(null=True, blank=True, help_text="what its stream had been handed")
    user_agent = models.CharField(max_length=300, blank=True)
    address = models.CharField(max_length=64, blank=True)
    path = models.CharField(max_length=300, blank=True, help_text="the page that it shows")
    watches = models.JSONField(default=list, blank=True, help_text="topics; empty: everything")
    opened_at = models.DateTimeField(null=True, blank=True, help_text="since when it is there without a gap")
    connected_at = models.DateTimeField(null=True, blank=True, help_text="begin of the present stream")
    last_seen_at = models.DateTimeField(null=True, blank=True)
    reason = models.CharField(max_length=200, blank=True, help_text="why it is in this state")
    version = models.PositiveBigIntegerField(default=0)

    class Meta:
        ordering = ["-last_seen_at", "-pk"]
        constraints = [
            models.UniqueConstraint(fields=["owner", "cid"], name="client_once_per_owner"),
            models.CheckConstraint(
                condition=~Q(state=ClientState.LIVE)
                | Q(lease_expires_at__isnull=False, expires_at__isnull=True),
                name="client_live_has_a_lease",
            ),
            models.CheckConstraint(
                condition=~Q(state__in=[ClientState.SUSPENDED, ClientState.INACTIVE])
                | Q(expires_at__isnull=False),
                name="client_away_has_an_end",
            ),
        ]
        indexes = [
            models.Index(
                fields=["lease_expires_at"], condition=Q(state=ClientState.LIVE), name="client_lapse"
            ),
            models.Index(
                fields=["expires_at"],
                condition=Q(state__in=[ClientState.SUSPENDED, ClientState.INACTIVE]),
                name="client_expire",
            ),
            models.Index(fields=["last_seen_at"], name="client_list_and_purge"),
        ]

    def __str__(self) -> str:
        return f"{self.who} {self.cid}"

    @property
    def keeps_claims(self) -> bool:
        return self.state in CLIENT_KEEPS


class Claim(models.Model):
    """Who is handling a subject (``connection:ma_…``, ``task:task_…``): one row per subject, also when nobody is."""

    subject = models.CharField(max_length=100, unique=True, help_text="kind:id, the topic of the object")
    audience = models.BigIntegerField(help_text="key of the owner of the object")
    client = models.ForeignKey(
        Client, null=True, blank=True, on_delete=models.SET_NULL, related_name="claims"
    )
    taken_at = models.DateTimeField(null=True, blank=True)
    version = models.PositiveBigIntegerField(default=0, help_text="grows with every change of who is there")

    class Meta:
        ordering = ["subject"]
        constraints = [
            models.CheckConstraint(
                condition=Q(client__isnull=True) | Q(taken_at__isnull=False), name="claim_says_since_when"
            )
        ]

    def __str__(self) -> str:
        return self.subject


class Presence(models.Model):
    """Somebody who looks at a subject, or types an answer, without handling it. A lease that the page renews."""

    LOOKING, TYPING = "looking", "typing"

    claim = models.ForeignKey(Claim, on_delete=models.CASCADE, related_name="people")
    client = models.ForeignKey(Client, on_delete=models.CASCADE, related_name="presences")
    doing = models.CharField(max_length=10, choices=[(LOOKING, "is looking"), (TYPING, "is typing")])
    until = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["claim", "client"], name="presence_once_per_client_and_subject")
        ]
        indexes = [models.Index(fields=["until"], name="presence_lapse")]

    def __str__(self) -> str:
        return f"{self.client_id} {self.doing}"
