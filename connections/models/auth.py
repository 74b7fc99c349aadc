"""What keeps a profile signed in to a site: profiles, credentials, connections, and one row for each attempt and look."""

from __future__ import annotations

import datetime as dt

from django.db import models
from django.db.models import F, Q

from connections.models.base import Owned, check_id, connection_id, credential_id, flow_id, profile_id
from connections.models.callers import ApiKey
from connections.states import ANSWERABLE, FLOW_END, ConnectionStatus, FlowStatus, FlowStep, FlowType


class Profile(Owned):
    """A browser profile: the cookies that keep somebody logged in, encrypted (Playwright's ``storage_state``)."""

    id = models.CharField(primary_key=True, max_length=40, default=profile_id, editable=False)
    name = models.CharField(max_length=255)
    state = models.BinaryField(null=True, blank=True, editable=False)
    state_saved_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [
            models.UniqueConstraint(fields=["owner", "name"], name="profile_name_once_per_owner"),
            models.CheckConstraint(condition=Q(name__length__gt=0), name="profile_has_a_name"),
        ]

    def __str__(self) -> str:
        return self.name


class Credential(Owned):
    """Values that a login needs again: encrypted, never handed out. Only their names are shown."""

    id = models.CharField(primary_key=True, max_length=40, default=credential_id, editable=False)
    name = models.CharField(max_length=255)
    domain = models.CharField(max_length=255)
    values = models.BinaryField(editable=False)
    value_keys = models.JSONField(default=list, editable=False)
    totp_secret = models.BinaryField(null=True, blank=True, editable=False)
    totp_algorithm = models.CharField(max_length=6, default="SHA1")
    totp_digits = models.PositiveSmallIntegerField(default=6)
    totp_period = models.PositiveSmallIntegerField(default=30)
    sso_provider = models.CharField(max_length=40, blank=True)

    class Meta:
        ordering = ["-created_at", "-id"]
        constraints = [
            models.UniqueConstraint(fields=["owner", "name"], name="credential_name_once_per_owner"),
            models.CheckConstraint(
                condition=Q(totp_digits__range=(6, 10), totp_period__range=(1, 3600)),
                name="credential_totp_in_range",
            ),
        ]

    def __str__(self) -> str:
        return self.name


class ManagedAuthConnection(Owned):
    """A profile that stays logged in to a site. ``version`` grows by one with every visible change, flows included."""

    id = models.CharField(primary_key=True, max_length=40, default=connection_id, editable=False)
    profile = models.ForeignKey(Profile, on_delete=models.CASCADE, related_name="connections")
    domain = models.CharField(max_length=255, help_text="host name, with an optional port")
    login_url = models.URLField(max_length=2000, blank=True)
    allowed_domains = models.JSONField(default=list, blank=True)
    credential = models.ForeignKey(
        Credential, null=True, blank=True, on_delete=models.SET_NULL, related_name="connections"
    )
    external_credential = models.JSONField(
        null=True, blank=True, help_text="reference to an item of an external provider, stored and echoed"
    )
    status = models.CharField(
        max_length=16, choices=ConnectionStatus.choices, default=ConnectionStatus.NEEDS_AUTH, editable=False
    )
    save_credentials = models.BooleanField(default=True)
    record_session = models.BooleanField(default=False)
    health_checks = models.BooleanField(default=True)
    auto_reauth = models.BooleanField(default=True)
    health_check_interval = models.PositiveIntegerField(default=3600, help_text="seconds, 300 to 86400")
    browser = models.JSONField(null=True, blank=True, help_text="stored and echoed")
    proxy = models.JSONField(
        null=True, blank=True, help_text="deprecated twin of browser.proxy, stored and echoed"
    )
    browser_telemetry = models.JSONField(null=True, blank=True, help_text="deprecated, stored and echoed")
    last_auth_check_at = models.DateTimeField(null=True, blank=True)
    authenticated_at = models.DateTimeField(null=True, blank=True, help_text="last successful login")
    post_login_url = models.URLField(max_length=2000, blank=True)
    requirements = models.JSONField(
        null=True,
        blank=True,
        help_text='{"kinds": [...], "refs": [...]} that the last successful login asked for',
    )
    next_check_at = models.DateTimeField(null=True, blank=True, editable=False)
    checks_unclear = models.PositiveSmallIntegerField(
        default=0, db_default=0, editable=False, help_text="health checks in a row that could not tell"
    )
    reauths_failed = models.PositiveSmallIntegerField(
        default=0, db_default=0, editable=False, help_text="re-authentications in a row that failed"
    )
    reauth_after = models.DateTimeField(
        null=True, blank=True, editable=False, help_text="no automatic re-authentication before this"
    )
    version = models.PositiveBigIntegerField(default=1, editable=False)

    class Meta:
        ordering = ["-created_at", "-id"]
        verbose_name = "managed-auth connection"
        permissions = [("operate_managedauthconnection", "Can act on the connections of the own team")]
        constraints = [
            models.UniqueConstraint(
                fields=["profile", "domain"], name="connection_once_per_profile_and_domain"
            ),
            models.CheckConstraint(
                condition=Q(health_check_interval__range=(300, 86400)),
                name="connection_check_interval_in_range",
            ),
            models.CheckConstraint(
                condition=Q(status__in=ConnectionStatus.values), name="connection_status_is_known"
            ),
        ]
        indexes = [
            models.Index(fields=["owner", "-created_at", "-id"], name="connection_list"),
            models.Index(fields=["domain"], name="connection_by_domain"),
            models.Index(
                fields=["next_check_at"],
                condition=Q(health_checks=True, next_check_at__isnull=False),
                name="connection_check_due",
            ),
            models.Index(
                fields=["id"],
                condition=Q(
                    status=ConnectionStatus.AUTHENTICATED, health_checks=True, next_check_at__isnull=True
                ),
                name="connection_check_unplanned",
            ),
            models.Index(
                fields=["reauth_after"],
                condition=Q(reauth_after__isnull=False),
                name="connection_reauth_due",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.domain} / {self.profile.name}"

    def latest_flow(self) -> LoginFlow | None:
        """The most recent flow, whatever became of it; None when none ever ran."""
        return self.flows.order_by("-number").first()

    def can_reauth(self) -> tuple[bool, str]:
        """Whether a login could run without a person, and why (wire contract, section 7)."""
        if self.authenticated_at is None:
            return False, "no_prior_successful_login"
        if self.external_credential:
            return True, "external_credential"
        if self.credential is None:
            return False, "no_credential"
        if self.requirements is None:
            return True, "has_credential"
        kinds = set(self.requirements.get("kinds", []))
        if not kinds:
            return True, "no_requirements_recorded"
        for kind in ("external_action", "sms_code", "email_code"):
            if kind in kinds:
                return False, f"requires_{kind}"
        if "choice" in kinds or not set(self.requirements.get("refs", [])) <= set(self.credential.value_keys):
            return False, "requires_customer_input"
        if "totp_code" in kinds and self.credential.totp_secret is not None:
            return True, "totp_reauth_allowed"
        if "totp_code" in kinds:
            # A returning profile may not be challenged again, so an attempt is worth its price.
            has_state = self.profile.state_saved_at is not None
            return (True, "optimistic_totp_attempt") if has_state else (False, "requires_totp_without_secret")
        return True, "requirements_satisfiable"


class LoginFlow(models.Model):
    """One attempt to log in, with everything that its page shows now. Guarded by its connection's row lock."""

    id = models.CharField(primary_key=True, max_length=40, default=flow_id, editable=False)
    connection = models.ForeignKey(ManagedAuthConnection, on_delete=models.CASCADE, related_name="flows")
    number = models.PositiveIntegerField(help_text="1 for the first flow of the connection, and so on")
    type = models.CharField(max_length=8, choices=FlowType.choices, default=FlowType.LOGIN)
    status = models.CharField(
        max_length=12, choices=FlowStatus.choices, default=FlowStatus.IN_PROGRESS, editable=False
    )
    step = models.CharField(
        max_length=32, choices=FlowStep.choices, default=FlowStep.DISCOVERING, editable=False
    )
    step_entered_at = models.DateTimeField()

    interaction_id = models.CharField(max_length=40, blank=True, help_text="the question that is open now")
    input_expires_at = models.DateTimeField(null=True, blank=True)
    fields = models.JSONField(default=list, blank=True, editable=False)
    choices = models.JSONField(default=list, blank=True, editable=False)
    external_action_message = models.TextField(blank=True, editable=False)
    website_error = models.TextField(blank=True, editable=False)
    sso_provider = models.CharField(max_length=40, blank=True, editable=False)
    live_view_url = models.URLField(max_length=2000, blank=True, editable=False)
    post_login_url = models.URLField(max_length=2000, blank=True, editable=False)
    error_code = models.CharField(max_length=40, blank=True, editable=False)
    error_message = models.TextField(blank=True, editable=False)

    started_at = models.DateTimeField()
    updated_at = models.DateTimeField()
    expires_at = models.DateTimeField()
    completed_at = models.DateTimeField(null=True, blank=True)
    version = models.PositiveBigIntegerField(
        help_text="version of the connection at the last change of this flow"
    )

    started_by = models.CharField(max_length=200, help_text="who, in words")
    started_by_key = models.ForeignKey(
        ApiKey, null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    ended_by = models.CharField(max_length=200, blank=True, help_text="who canceled it, in words")
    end_reason = models.CharField(max_length=500, blank=True)
    acknowledged_at = models.DateTimeField(null=True, blank=True)

    #: The one-time code of the hosted page: hashed, and encrypted for replays of the same login request.
    handoff_hash = models.CharField(max_length=64, blank=True, editable=False)
    handoff_sealed = models.BinaryField(null=True, blank=True, editable=False)
    exchanged_at = models.DateTimeField(null=True, blank=True, editable=False)
    exchanged_by = models.CharField(max_length=64, blank=True, editable=False, help_text="hash of the client")

    class Meta:
        ordering = ["-started_at", "-id"]
        constraints = [
            models.UniqueConstraint(fields=["connection", "number"], name="flow_number_once_per_connection"),
            models.UniqueConstraint(
                fields=["connection"],
                condition=Q(status=FlowStatus.IN_PROGRESS),
                name="flow_one_running_per_connection",
            ),
            models.CheckConstraint(
                condition=Q(status=FlowStatus.IN_PROGRESS, completed_at=None)
                | (Q(status__in=sorted(FLOW_END)) & Q(completed_at__isnull=False)),
                name="flow_ended_when_it_says_so",
            ),
            models.CheckConstraint(
                condition=(Q(status=FlowStatus.IN_PROGRESS) & ~Q(step=FlowStep.COMPLETED))
                | (~Q(status=FlowStatus.IN_PROGRESS) & Q(step=FlowStep.COMPLETED)),
                name="flow_step_fits_its_status",
            ),
            models.CheckConstraint(
                condition=Q(interaction_id="") | Q(step__in=sorted(ANSWERABLE)),
                name="flow_asks_only_while_it_waits",
            ),
            models.CheckConstraint(
                condition=~Q(step=FlowStep.AWAITING_INPUT) | Q(interaction_id__length__gt=0),
                name="flow_waiting_for_input_asks",
            ),
            models.CheckConstraint(
                condition=~Q(step=FlowStep.AWAITING_INPUT) | Q(input_expires_at__isnull=False),
                name="flow_waiting_for_input_ends",
            ),
            models.CheckConstraint(
                condition=Q(expires_at__gt=F("started_at")), name="flow_expires_after_its_start"
            ),
        ]
        indexes = [
            models.Index(
                fields=["expires_at"], condition=Q(status=FlowStatus.IN_PROGRESS), name="flow_sweep_overall"
            ),
            models.Index(
                fields=["input_expires_at"],
                condition=Q(step=FlowStep.AWAITING_INPUT),
                name="flow_sweep_input",
            ),
            models.Index(fields=["handoff_hash"], name="flow_by_handoff_code"),
        ]

    def __str__(self) -> str:
        return f"{self.type.lower()} #{self.number} of {self.connection_id}"

    @property
    def is_over(self) -> bool:
        return self.status in FLOW_END

    def deadline(self) -> dt.datetime | None:
        """When this flow expires if nothing happens: the input's limit where one runs, else the whole flow's."""
        if self.is_over:
            return None
        if self.step == FlowStep.AWAITING_INPUT and self.input_expires_at:
            return min(self.input_expires_at, self.expires_at)
        return self.expires_at

    def is_due(self, now: dt.datetime) -> bool:
        """Whether it should be EXPIRED by now, noticed or not."""
        deadline = self.deadline()
        return deadline is not None and deadline <= now


class Submission(models.Model):
    """One accepted answer. Its values are encrypted, taken once by the worker, then erased."""

    flow = models.ForeignKey(LoginFlow, on_delete=models.CASCADE, related_name="submissions")
    interaction_id = models.CharField(max_length=40)
    fingerprint = models.CharField(max_length=64, editable=False, help_text="keyed hash, to know a replay by")
    sealed = models.BinaryField(null=True, editable=False)
    field_count = models.PositiveSmallIntegerField(default=0)
    submitted_by = models.CharField(max_length=200)
    created_at = models.DateTimeField()
    taken_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-created_at", "-pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["flow", "interaction_id"], name="submission_once_per_interaction"
            ),
            models.CheckConstraint(
                condition=Q(taken_at__isnull=True) | Q(sealed__isnull=True), name="submission_taken_is_erased"
            ),
        ]

    def __str__(self) -> str:
        return f"answer to {self.interaction_id}"


class HealthCheck(models.Model):
    """One look at whether a profile is still logged in. ``status`` null: it could not be told."""

    id = models.CharField(primary_key=True, max_length=40, default=check_id, editable=False)
    connection = models.ForeignKey(ManagedAuthConnection, on_delete=models.CASCADE, related_name="checks")
    status = models.CharField(max_length=16, choices=ConnectionStatus.choices, null=True, blank=True)
    previous_status = models.CharField(max_length=16, choices=ConnectionStatus.choices)
    reason = models.CharField(max_length=500, blank=True)
    checked_at = models.DateTimeField()

    class Meta:
        ordering = ["-checked_at", "-id"]
        indexes = [models.Index(fields=["connection", "-checked_at"], name="check_timeline")]

    def __str__(self) -> str:
        return f"check of {self.connection_id}"


class SiteCircuit(models.Model):
    """The circuit breaker of one site: while it is open nobody's profile is checked there."""

    domain = models.CharField(primary_key=True, max_length=255)
    failures = models.PositiveIntegerField(default=0, help_text="checks in a row that could not tell")
    retry_at = models.DateTimeField(null=True, blank=True, help_text="open until then; then one check tries")
    updated_at = models.DateTimeField()

    class Meta:
        ordering = ["domain"]

    def __str__(self) -> str:
        return self.domain
