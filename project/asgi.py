"""The ASGI application: streams go to their consumers, before Django's handler; everything else goes to Django."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application
from django.urls import path, re_path

# The consumers below need the models, which exist once this has run.
django_application = get_asgi_application()

from connections import consumers, task_streams
from events import operations
from project.logs import routed, traced
from project.preflight import let_preflight_through, where_asked_for


def _path(route: str, application: Any) -> Any:
    return path(route, routed(route, application))


application = traced(
    ProtocolTypeRouter(
        {
            "http": let_preflight_through(
                django_application,
                URLRouter(
                    [
                        _path("api/events", consumers.EventsConsumer.as_asgi()),
                        _path(
                            "auth/connections/<str:connection_id>/events",
                            consumers.ConnectionEventsConsumer.as_asgi(),
                        ),
                        _path(
                            "api/tasks/<str:task_id>/output",
                            where_asked_for(
                                task_streams.wants_stream,
                                task_streams.OutputConsumer.as_asgi(),
                                django_application,
                            ),
                        ),
                        _path("api/work/<str:task_id>/inputs", task_streams.InputsConsumer.as_asgi()),
                        _path("live", consumers.LiveConsumer.as_asgi()),
                        _path("readyz", operations.readyz),
                        _path("metrics", operations.metrics_page),
                        re_path(r"", django_application),  # type: ignore[arg-type]
                    ]
                ),
            )
        }
    )
)
