"""``/events/`` and ``POST /bench/publish``."""

from __future__ import annotations

import json
import time

import django_eventstream
from django.http import HttpRequest, JsonResponse
from django.urls import include, path
from django_eventstream import send_event

from tests.bench import check, pace


def publish(request: HttpRequest) -> JsonResponse:
    wanted = json.loads(request.body)
    last = 0
    for seq, wait in pace.turns(wanted["first"], wanted["count"], wanted["rate"]):
        time.sleep(wait)
        send_event("bench", "message", check.payload(seq, time.monotonic_ns(), wanted["size"]))
        last = seq
    return JsonResponse({"last": last})


urlpatterns = [
    path("bench/publish", publish),
    path("events/", include(django_eventstream.urls), {"channels": ["bench"]}),
]
