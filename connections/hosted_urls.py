"""Addresses of the hosted login page. The cookie of a page is scoped to ``/login/<connection>``, so everything lives below it."""

from __future__ import annotations

from django.urls import path

from connections import hosted

app_name = "hosted"

urlpatterns = [
    path("login/<str:connection_id>", hosted.page, name="page"),
    path("login/<str:connection_id>/start", hosted.start, name="start"),
    path("login/<str:connection_id>/state", hosted.state, name="state"),
    path("login/<str:connection_id>/submit", hosted.submit, name="submit"),
]
