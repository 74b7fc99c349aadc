"""Which room answers which path. Streams are routed before this, in ``project/asgi.py``."""

from __future__ import annotations

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.urls import include, path
from django.views.decorators.http import require_safe


@require_safe
def healthz(request: HttpRequest) -> HttpResponse:
    """The process answers."""
    return HttpResponse("ok\n", content_type="text/plain")


admin.site.site_header = admin.site.site_title = "Switchboard"
admin.site.index_title = "Administration"

urlpatterns = [
    path("healthz", healthz),
    path("admin/", admin.site.urls),
    path("", include("connections.api_urls")),
    path("", include("connections.hosted_urls")),
    path("", include("connections.page_urls")),
]

handler400 = "connections.errors.bad_request"
handler403 = "connections.errors.permission_denied"
handler404 = "connections.errors.not_found"
handler500 = "connections.errors.server_error"
