"""What every answer of Django goes through: notes for the access line, body limit, security headers, addresses behind a proxy."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse

from connections.access import Principal
from connections.addresses import client_address, within
from project.logs import NOTES, Notes

Handler = Callable[[HttpRequest], HttpResponse]

#: Pages may load what this server serves, and nothing else. Trusted Types: text becomes HTML only through our two policies.
POLICY: dict[str, list[str]] = {
    "default-src": ["'none'"],
    "script-src": ["'self'"],
    "style-src": ["'self'"],
    "connect-src": ["'self'"],
    "img-src": ["'self'"],
    "font-src": ["'self'"],
    "manifest-src": ["'self'"],
    "form-action": ["'self'"],
    "base-uri": ["'none'"],
    "frame-ancestors": ["'none'"],
    "require-trusted-types-for": ["'script'"],
    "trusted-types": ["htmx", "switchboard"],
}

#: Django's admin and Swagger UI are others' pages: still nothing from elsewhere, but inline styles of their own.
_LOOSE = {
    **{name: value for name, value in POLICY.items() if "trusted-types" not in name},
    "script-src": ["'self'"],
    "style-src": ["'self'", "'unsafe-inline'"],
    "img-src": ["'self'", "data:"],
}
LOOSER: dict[str, dict[str, list[str]]] = {
    "/admin/": _LOOSE,
    "/api/docs": _LOOSE,
}


def _policy(path: str) -> dict[str, list[str]]:
    return next((policy for prefix, policy in LOOSER.items() if path.startswith(prefix)), POLICY)


def security_headers(get_response: Handler) -> Handler:
    """A strict Content-Security-Policy. A view may add sources with ``response.csp_extra = {"frame-ancestors": [...]}``."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        policy = dict(_policy(request.path))
        for name, sources in getattr(response, "csp_extra", {}).items():
            policy[name] = [source for source in policy.get(name, []) if source != "'none'"] + list(sources)
        response.headers.setdefault(
            "Content-Security-Policy",
            "; ".join(f"{name} {' '.join(sources)}" for name, sources in policy.items()),
        )
        response.headers.setdefault("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
        return response

    return middleware


def noted(get_response: Handler) -> Handler:
    """Notes for the access line (``project/logs.py``): which route answered, and who asked, when somebody had to find out."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        notes: Notes | None = getattr(request, "scope", {}).get(NOTES)
        if notes is not None:
            notes.route = _route(request)
            notes.caller = _caller(request)
        return response

    return middleware


def _route(request: HttpRequest) -> str:
    """The pattern and not the path: ids of hosted pages and whatever strangers try have no place in a log."""
    if request.resolver_match is not None:
        return str(request.resolver_match.route) or "/"
    return "static" if request.path.startswith(f"/{settings.STATIC_URL.strip('/')}/") else ""


def _caller(request: HttpRequest) -> str:
    """``key:7``, ``user:5``; empty when nobody asked. Only what is known already: this looks nothing up."""
    user = vars(request).get("user")
    # Not isinstance(): it would make Django's lazy user look itself up.
    if issubclass(type(user), Principal):
        assert user is not None
        return user.key
    pk = getattr(vars(request).get("_cached_user"), "pk", None)
    return f"user:{pk}" if pk is not None else ""


def body_limit(get_response: Handler) -> Handler:
    """A body that says it is too large is refused before anything reads it."""

    def middleware(request: HttpRequest) -> HttpResponse:
        declared = request.META.get("CONTENT_LENGTH") or "0"
        if declared.isdigit() and int(declared) > settings.MAX_BODY_BYTES:
            message = f"A body can have at most {settings.MAX_BODY_BYTES} bytes."
            return JsonResponse({"code": "payload_too_large", "message": message}, status=413)
        return get_response(request)

    return middleware


def trusted_proxy(get_response: Handler) -> Handler:
    """Behind a proxy of ``TRUSTED_PROXIES``: the client's address and scheme are what the proxy says.

    From anybody else ``X-Forwarded-For`` is a claim without proof, and is ignored.
    """
    networks = [ipaddress.ip_network(proxy) for proxy in settings.TRUSTED_PROXIES]

    def middleware(request: HttpRequest) -> HttpResponse:
        peer = request.META.get("REMOTE_ADDR") or ""
        if within(peer, networks):
            forwarded_for = request.META.get("HTTP_X_FORWARDED_FOR", "")
            request.META["REMOTE_ADDR"] = client_address(peer, forwarded_for, networks)
            if request.META.get("HTTP_X_FORWARDED_PROTO") == "https":
                request.META["wsgi.url_scheme"] = "https"
        return get_response(request)

    return middleware
