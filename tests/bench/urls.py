"""Switchboard's URLs and ``POST /bench/publish``: the server itself commits events, as the peers' servers do."""

from __future__ import annotations

import json

from django.http import HttpRequest, JsonResponse
from django.urls import path

from project.urls import handler400, handler403, handler404, handler500
from project.urls import urlpatterns as urls
from tests.bench import writing

__all__ = ["handler400", "handler403", "handler404", "handler500", "urlpatterns"]


def publish(request: HttpRequest) -> JsonResponse:
    """``{"first": number, "count": n, "size": bytes, "rate": a second, ...}``: commit so many events."""
    commits = writing.write(**json.loads(request.body))
    return JsonResponse({"last": max(commits, default=0), "commits": commits})


urlpatterns = [path("bench/publish", publish), *urls]
