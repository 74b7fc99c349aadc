"""``POST /bench/publish``"""

from __future__ import annotations

import asyncio
import json
import time

from channels.layers import get_channel_layer
from django.http import HttpRequest, JsonResponse
from django.urls import path

from tests.bench import check, pace


async def publish(request: HttpRequest) -> JsonResponse:
    wanted = json.loads(request.body)
    layer = get_channel_layer()
    assert layer is not None
    last = 0
    for seq, wait in pace.turns(wanted["first"], wanted["count"], wanted["rate"]):
        await asyncio.sleep(wait)
        data = json.dumps(check.payload(seq, time.monotonic_ns(), wanted["size"]))
        await layer.group_send("bench", {"type": "bench.event", "data": data})
        last = seq
    return JsonResponse({"last": last})


urlpatterns = [path("bench/publish", publish)]
