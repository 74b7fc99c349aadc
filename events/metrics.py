"""What this process counts about its streams. No Django, no I/O: the rooms above count, ``/metrics`` and the bench read.

Counters only grow; what is "now" (streams open, lag of the hub) is asked of its owner when somebody looks.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

REGISTRY = CollectorRegistry(auto_describe=True)


def _counter(name: str, what: str, *labels: str) -> Counter:
    return Counter(f"switchboard_{name}", what, labels, registry=REGISTRY)


EVENTS_READ = _counter("events_read", "Events that the hub took from the log and offered to its streams.")
EVENTS_DELIVERED = _counter("events_delivered", "Events handed to a stream, counted once per stream.")
EVENTS_SKIPPED = _counter(
    "events_skipped",
    "Cursors that a stream was moved over without their events (it was told by a reset). 0 unless retention.",
)
OUT_OF_ORDER = _counter(
    "events_out_of_order",
    "Events that came with an id not above the last one. Always 0, or the log is broken.",
)
LOG_READS = _counter(
    "log_reads", "Queries for events, by who asked: the hub's own look, or a stream that catches up.", "by"
)
WAKES = _counter("wakes", "Wake-ups heard from the channel layer.")
WAKES_MISSED = _counter(
    "wakes_missed", "Looks of the hub that found events without a wake-up having said so."
)
WAKES_UNSENT = _counter(
    "wakes_unsent", "Wake-ups that the channel layer did not take. Costs latency, never an event."
)
FALLBACKS = _counter(
    "stream_fallbacks",
    "Times an open stream fell behind what is in memory, and went on from pages of the log.",
)
OPENED = _counter("streams_opened", "Streams that were opened.")
REFUSED = _counter("streams_refused", "Streams that were not opened, by status.", "status")
ENDED = _counter("streams_ended", "Streams that ended, by reason; ``gone`` when the client left.", "reason")
RESETS = _counter("stream_resets", "Cursors that could not be continued, by reason.", "reason")
CHECKS_SHARED = _counter(
    "checks_shared", "Permission checks answered by a look that another stream had just made."
)
CLIENTS = _counter(
    "clients", "What became of clients, by event: opened, resumed, inactive, expired ...", "what"
)
CLIENTS_REFUSED = _counter(
    "clients_refused", "Ids that a client brought and did not get, by reason.", "reason"
)
STALE = _counter(
    "clients_stale",
    "Somebody acted for a stream that has been replaced, and changed nothing. An answer, not a fault.",
    "verb",
)
EXPIRED_LIVE = _counter(
    "clients_expired_live",
    "Clients that expired although their stream was open. Always 0, or leases are broken.",
)
STALE_CHANGED = _counter(
    "clients_stale_changed", "Rows that were changed for a stream that has been replaced. Always 0."
)
