"""The consumer that one writes first: each client a member of the group. ``daphne tests.bench.peers.plain_asgi:application``"""

from __future__ import annotations

import os
from typing import Any

from channels.generic.http import AsyncHttpConsumer
from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application
from django.urls import path, re_path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.bench.peers.plain_settings")
django_application = get_asgi_application()


class Consumer(AsyncHttpConsumer):
    async def http_request(self, message: dict[str, Any]) -> None:
        # Not handle(): the base awaits it and then ends, so no message of the layer would be heard.
        await self.send_headers(
            headers=[(b"Content-Type", b"text/event-stream"), (b"Cache-Control", b"no-cache")]
        )
        await self.channel_layer.group_add("bench", self.channel_name)
        await self.send_body(b": open\n\n", more_body=True)

    async def bench_event(self, message: dict[str, Any]) -> None:
        await self.send_body(f"data: {message['data']}\n\n".encode(), more_body=True)

    async def disconnect(self) -> None:
        await self.channel_layer.group_discard("bench", self.channel_name)


application = ProtocolTypeRouter(
    {"http": URLRouter([path("events/", Consumer.as_asgi()), re_path(r"", django_application)])}
)
