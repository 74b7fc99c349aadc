"""The client's address behind proxies: one rule for requests (``project/middleware.py``) and streams (``consumers.py``)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def client_address(peer: str, forwarded_for: str, networks: Iterable[Network]) -> str:
    """``peer``; when it is a proxy of ``networks``, the client that ``X-Forwarded-For`` names.

    From anybody else the header is a claim without proof, and is ignored.
    """
    networks = tuple(networks)
    if not within(peer, networks):
        return peer
    hops = [hop.strip() for hop in forwarded_for.split(",") if hop.strip()]
    # The last hop that is no proxy of ours is the client: what stands before it the client may have made up.
    return next((hop for hop in reversed(hops) if not within(hop, networks)), peer)


def within(address: str, networks: Iterable[Network]) -> bool:
    """Whether ``address`` is one, and in one of ``networks``."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)
