"""The state machine of a client on one page. No ORM here: the states, and the arrows between them.

The README draws the same machine; ``tests/events/test_clients.py`` compares the drawing with the arrows.

A client is a browser tab or a program with a stable id. Its streams come and go; each has a number, the epoch::

    live        ─▶ suspended (the page was hidden) | inactive (its stream ended, or its process died) | closed (by an operator)
    suspended   ─▶ live | expired (nobody came back for 120 s) | closed
    inactive    ─▶ live | suspended (the page says so after its stream ended) | expired (nobody came back for 60 s) | closed
    expired     ─▶ live (anew: what it had claimed is gone)
    closed      ─▶ live (anew)
"""

from __future__ import annotations

from django.db.models import TextChoices


class ClientState(TextChoices):
    LIVE = "live", "Live"
    SUSPENDED = "suspended", "In the background"
    INACTIVE = "inactive", "Gone"
    EXPIRED = "expired", "Expired"
    CLOSED = "closed", "Disconnected"


_L, _S, _I, _E, _C = (
    ClientState.LIVE,
    ClientState.SUSPENDED,
    ClientState.INACTIVE,
    ClientState.EXPIRED,
    ClientState.CLOSED,
)

CLIENT_ARROWS: dict[ClientState, frozenset[ClientState]] = {
    _L: frozenset({_S, _I, _C}),
    _S: frozenset({_L, _E, _C}),
    _I: frozenset({_L, _S, _E, _C}),
    _E: frozenset({_L}),
    _C: frozenset({_L}),
}

#: States in which a client keeps its claims.
CLIENT_KEEPS = frozenset({_L, _S, _I})
