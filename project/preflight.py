"""What reaches Django although a stream has its path: CORS preflights, and what does not ask for the stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def let_preflight_through(django_application: Any, router: Any) -> Any:
    """OPTIONS goes to Django, whatever the path; the consumers answer GET alone."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        chosen = django_application if scope["method"] == "OPTIONS" else router
        await chosen(scope, receive, send)

    return application


def where_asked_for(wants: Callable[[Any], bool], stream: Any, django_application: Any) -> Any:
    """The stream where the request asks for it; everything else under the path is Django's."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        chosen = stream if wants(scope) else django_application
        await chosen(scope, receive, send)

    return application
