"""CORS preflights of the stream's path are answered where all others are: by Django's middleware."""

from __future__ import annotations

from typing import Any


def let_preflight_through(django_application: Any, router: Any) -> Any:
    """OPTIONS goes to Django, whatever the path; the consumers answer GET alone."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        chosen = django_application if scope["method"] == "OPTIONS" else router
        await chosen(scope, receive, send)

    return application
