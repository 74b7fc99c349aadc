"""Whose address counts behind a proxy, in requests and in streams."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory

from connections import consumers
from connections.addresses import client_address
from project import middleware

PROXIES = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),  # no proxy of ours: a claim
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "1.2.3.4, 198.51.100.1, 10.0.0.2", "198.51.100.1"),
        ("fd00::1", "2001:db8::7", "2001:db8::7"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", " , 10.0.0.2", "10.0.0.1"),
        ("", "198.51.100.1", ""),
    ],
)
def test_the_client_is_the_last_hop_outside(peer: str, forwarded_for: str, client: str) -> None:
    assert client_address(peer, forwarded_for, PROXIES) == client


def test_without_proxies_the_header_is_ignored() -> None:
    assert client_address("10.0.0.1", "198.51.100.1", []) == "10.0.0.1"


def test_a_stream_sees_the_client_behind_the_proxy(settings: Any) -> None:
    settings.TRUSTED_PROXIES = ["10.0.0.0/8"]
    headers = [(b"x-forwarded-for", b"1.2.3.4, 198.51.100.1"), (b"x-forwarded-for", b"10.0.0.2")]
    assert consumers._address_of({"client": ("10.0.0.1", 5000), "headers": headers}) == "198.51.100.1"
    assert consumers._address_of({"client": ("203.0.113.9", 5000), "headers": headers}) == "203.0.113.9"
    assert consumers._address_of({"client": None, "headers": []}) == ""


@pytest.mark.parametrize(
    ("peer", "client", "scheme"),
    [("10.0.0.1", "198.51.100.1", "https"), ("203.0.113.9", "203.0.113.9", "http")],
)
def test_a_request_sees_the_same_client(settings: Any, peer: str, client: str, scheme: str) -> None:
    settings.TRUSTED_PROXIES = ["10.0.0.0/8"]
    seen: list[HttpRequest] = []

    def answer(request: HttpRequest) -> HttpResponse:
        seen.append(request)
        return HttpResponse()

    claims = {"HTTP_X_FORWARDED_FOR": "1.2.3.4, 198.51.100.1", "HTTP_X_FORWARDED_PROTO": "https"}
    middleware.trusted_proxy(answer)(RequestFactory().get("/", REMOTE_ADDR=peer, **claims))
    assert (seen[0].META["REMOTE_ADDR"], seen[0].META["wsgi.url_scheme"]) == (client, scheme)
