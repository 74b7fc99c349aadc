"""Who calls, and what they were answered."""

from __future__ import annotations

from django.conf import settings
from django.db import models


class ApiKey(models.Model):
    """A key of the API. The key itself is shown once; the row holds its SHA-256."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=100)
    prefix = models.CharField(max_length=16, help_text="the first characters, to recognise the key by")
    key_hash = models.CharField(max_length=64, unique=True, editable=False)
    created_at = models.DateTimeField()
    last_used_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-created_at", "-pk"]
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"


class IdempotentAnswer(models.Model):
    """The stored answer to a POST that carried an ``Idempotency-Key`` (wire contract, section 6). Encrypted."""

    scope = models.CharField(max_length=80, help_text="the caller")
    key = models.CharField(max_length=255)
    fingerprint = models.CharField(max_length=64, editable=False)
    status_code = models.PositiveSmallIntegerField(null=True)
    sealed = models.BinaryField(null=True, editable=False)
    created_at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["scope", "key"], name="idempotency_key_once_per_caller")
        ]
        indexes = [models.Index(fields=["created_at"], name="idempotency_retention")]

    def __str__(self) -> str:
        return f"answer for {self.scope}"
