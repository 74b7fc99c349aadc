"""The bench measures what it says: its checker sees a loss, a duplicate and a misorder, and a small run of it finds none of ours."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.bench import check, clients, streams, table
from tests.bench.load import Generator


def frame(seq: int) -> bytes:
    data = json.dumps(check.payload(seq, 1_000 * seq), separators=(",", ":"))
    return f"id: {seq + 500}\nevent: task.updated\ndata: {data}\n\n".encode()


def chunked(*frames: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in frames)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("step", [1, 7, 100, 100_000])
def test_the_reader_finds_each_event_with_its_time_wherever_the_bytes_are_cut(step: int) -> None:
    frames = [b'event: ready\ndata: {"cursor":77}\n\n', *(frame(seq) for seq in (1, 2, 3))]
    raw = HEAD + chunked(frames[0], b"".join(frames[1:3]), frames[3][:40], frames[3][40:])
    pieces = [(at, raw[start : start + step]) for at, start in enumerate(range(0, len(raw), step))]
    events, cursor = check.Reader().feed(pieces)
    assert [(event.seq, event.sent) for event in events] == [(1, 1000), (2, 2000), (3, 3000)]
    # Of each event the last byte says when it was there.
    second, end = raw.index(frames[2]), raw.index(frames[2]) + len(frames[2])
    assert [event.at for event in events] == [last // step for last in (second - 1, end - 1, len(raw) - 3)]
    assert cursor == "503"
    # In several portions it finds the same, and keeps what is incomplete.
    reader = check.Reader()
    found = [event for piece in pieces for event in reader.feed([piece])[0]]
    assert [event.seq for event in found] == [1, 2, 3]
    assert reader.status == 200


def test_a_torn_frame_and_broken_framing_are_noticed() -> None:
    # Without its empty line the second runs into the third: a reader sees one event that is neither.
    torn = frame(2).removesuffix(b"\n")
    events, _ = check.Reader().feed([(1, HEAD + chunked(frame(1), torn, frame(3), frame(4)))])
    assert [event.seq for event in events] == [1, 4]
    with pytest.raises(check.Broken):
        check.Reader().feed([(1, HEAD + chunked(frame(1)) + frame(2))])


@pytest.mark.parametrize(
    ("seqs", "expected"),
    [
        ([1, 2, 3, 4], check.Faults()),
        ([1, 2, 4], check.Faults(lost=1, incomplete=1)),
        ([], check.Faults(lost=4, incomplete=1)),
        ([1, 2, 2, 3, 4], check.Faults(duplicates=1)),
        ([1, 3, 2, 4], check.Faults(misordered=1)),
        ([1, 2, 3, 4, 1], check.Faults(duplicates=1, misordered=1)),
    ],
)
def test_a_planted_loss_duplicate_and_misorder_is_counted(seqs: list[int], expected: check.Faults) -> None:
    assert check.faults([seqs], 1, 4) == expected


@contextmanager
def scripted(answers: list[bytes]) -> Iterator[int]:
    """A server that says to each client in turn what stands here, once everybody is there; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        for _ in answers:
            held.append(listener.accept()[0])
        for client in held:
            client.sendall(HEAD + chunked(b": open\n\n"))
        for client, answer in zip(held, answers, strict=True):
            client.sendall(chunked(answer))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        thread.join(10)
        for one in (*held, listener):
            one.close()


def test_the_generator_reports_what_a_server_does_wrong() -> None:
    answers = [
        frame(1) + frame(2) + frame(3),
        frame(1) + frame(3),
        frame(1) + frame(2) + frame(2) + frame(3),
        frame(2) + frame(1) + frame(3),
    ]
    with Generator(len(answers)) as load, scripted(answers) as port:
        opened = load(
            "open", group="main", host="127.0.0.1", port=port, requests=["GET / HTTP/1.1\r\nHost: test\r\n"],
            count=len(answers), ready=": open",
        )  # fmt: skip
        assert opened["open"] == len(answers)
        waited = load("until", groups=["main"], last=3, timeout=10, quiet=10)
        assert waited == {"complete": True, "missing": 0}
        report = load("report", groups=["main"], first=1, last=3)
        assert (report["expected"], report["delivered"]) == (12, 12)
        faults = {name: report[name] for name in ("lost", "duplicates", "misordered", "incomplete")}
        assert faults == {"lost": 1, "duplicates": 1, "misordered": 1, "incomplete": 1}


@pytest.mark.live
def test_a_small_run_of_the_bench_finds_no_loss_no_duplicate_and_no_misorder() -> None:
    options = streams.Options(
        streams=20, runs=1, seconds=1, only=("ours",), modes=("idle", "paced", "burst", "storm")
    )
    measured = streams.run(options)
    figures = measured["median"]["ours"]
    assert list(figures) == ["idle", "paced", "burst", "storm"]
    for mode, expected in (("paced", 20), ("burst", streams.BURST), ("storm", streams.MISSED)):
        found: dict[str, Any] = figures[mode]
        assert found["complete"], found
        assert found["delivered"] == found["expected"] == 20 * expected
        assert (found["lost"], found["duplicates"], found["misordered"]) == (0, 0, 0)
        assert (found["broken_framing"], found["closed"]) == ([], 0)
        assert found["cpu_us"] > 0
        assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p99"]
    assert figures["storm"]["without_cursor"] == 0
    judged = {target["what"]: target["met"] for target in table.verdicts(measured)}
    assert judged["lost, in every mode and run"] is True
    assert judged["paced: p99, × nchan"] is None


def welcome(cid: str, *, resumed: bool = True) -> bytes:
    data = json.dumps({"connection_id": cid, "epoch": 2, "cid_accepted": True, "resumed": resumed})
    return f"event: welcome\ndata: {data}\n\n".encode()


READY = b'retry: 1500\nevent: ready\ndata: {"cursor":503}\n\n'


def test_clients_come_back_to_the_other_process_and_what_each_was_told_is_judged() -> None:
    members = [
        clients.Member(owner=1, key_id=1, key="sk_test", cid=f"cid-{number}", page="p" * 8)
        for number in range(4)
    ]
    missed = frame(2) + frame(3)
    with (
        Generator(len(members)) as load,
        scripted([READY + frame(1)] * 2) as first,
        scripted([READY + frame(1)] * 2) as second,
        # To the other one: the third is a stranger there, and the fourth is told that it is ready too early, and twice.
        scripted([welcome("cid-2", resumed=False) + missed + READY, welcome("cid-3") + READY + missed + READY]) as one,
        scripted([welcome("cid-0") + missed + READY, welcome("cid-1") + frame(2) + READY + frame(3)]) as two,
    ):  # fmt: skip
        for group, port, part in zip(
            clients.GROUPS, (first, second), (members[:2], members[2:]), strict=True
        ):
            requests = [member.request(recorded=True) for member in part]
            opened = load(
                "open", group=group, host="127.0.0.1", port=port, requests=requests, count=2, ready="event: ready"
            )  # fmt: skip
            assert opened["open"] == 2
        groups = list(clients.GROUPS)
        assert load("until", groups=groups, last=1, timeout=10, quiet=10)["complete"]
        for group in groups:
            assert load("leave", group=group) == {"left": 2, "without_cursor": 0}
        load("start")
        answer = load(
            "come_back", group="one", port=two, beside={"two": one}, marks=["event: welcome", "event: ready"],
            last=3, timeout=10, quiet=10,
        )  # fmt: skip
        assert (answer["complete"], answer["missing"]) == (True, 0)
        report = load("report", groups=groups, first=2, last=3)
        faults = {name: report[name] for name in ("delivered", "lost", "duplicates", "misordered")}
        assert faults == {"delivered": 8, "lost": 0, "duplicates": 0, "misordered": 0}
        signs = load("signs", groups=groups)["clients"]
    figures = clients.judge(members, signs, answer["began_ns"], report["last_at_ns"], recorded=True)
    assert (figures["resumed"], figures["odd"]) == (3, 1)
    # Without records a welcome is what nobody asked for.
    assert clients.judge(members, signs, 0, 0, recorded=False)["odd"] == 4
    # The last one's "ready" or event ends the storm, whichever is later.
    told = [[(at * 10**9, "ready", "{}")] for at in (11, 12, 13, 14)]
    for last_at, seconds in ((12, 4.0), (15, 5.0)):
        timed = clients.judge(members, told, 10 * 10**9, last_at * 10**9, recorded=False)
        assert (timed["half_seconds"], timed["seconds"], timed["odd"]) == (3.0, seconds, 0)


def test_clients_that_are_not_all_back_with_their_claims_and_in_time_are_called_not_ok() -> None:
    fine: dict[str, Any] = {
        "lost": 0, "duplicates": 0, "misordered": 0, "broken_framing": [], "odd": 0, "clients_expired_live": 0,
        "clients_stale_changed": 0, "seconds": 1.0, "generator": {"busy": 0.1},
    }  # fmt: skip
    mine = fine | {"resumed": 1000, "claims_kept": 1000, "claims_told": 0}
    good = {"recorded": mine, "plain": fine, "ratio": 1.5, "cpu_ratio": 1.4}
    worse = mine | {"claims_kept": 999, "clients_expired_live": 1, "broken_framing": ["torn"]}
    bad = {"recorded": worse, "plain": fine | {"duplicates": 2}, "ratio": 1.51, "cpu_ratio": 1.4}

    def measured(*runs: dict[str, Any]) -> dict[str, Any]:
        return {
            "clients": 1000, "keys": 50, "runs": len(runs), "seconds": 1, "load_averages": [0.1],
            "median": {"clean": streams.median(list(runs))}, "each": {"clean": list(runs)},
        }  # fmt: skip

    assert all(target["met"] for target in clients.verdicts(measured(good, good)))
    judged = {
        each["what"].removeprefix("clean: "): each["met"] for each in clients.verdicts(measured(good, bad))
    }
    wrong = {
        "time, × that without client records",
        "claims kept by them",
        "events missed",
        "events twice",
        "clients_expired_live",
    }
    assert {what for what, met in judged.items() if not met} == wrong
    # One that never got there is not in time.
    never = good | {"ratio": clients.ratio(None, 1.0)}
    assert not clients.verdicts(measured(never))[0]["met"]
    machine = {"processors": 2, "processor": "test", "kernel": "6", "python": "3"}
    shown = clients.render({"at": "2026-11-21T00:00:00", "machine": machine, "clients": measured(good, bad)})
    assert shown.count("NOT OK") == len(wrong)


def test_a_figure_beyond_its_target_is_called_not_met() -> None:
    def figures(cpu: float, late: float, lost: int) -> dict[str, Any]:
        return {"paced": {"cpu_us": cpu, "latency_ms": {"p99": late}, "lost": lost}}

    runs = {"ours": [figures(7.0, 30.0, 1)], "nchan": [figures(8.0, 10.0, 0)]}
    measured = {
        "streams": 20,
        "many": 40,
        "each": runs,
        "median": {name: each[0] for name, each in runs.items()},
    }
    judged = {target["what"]: (target["figure"], target["met"]) for target in table.verdicts(measured)}
    assert judged["paced: CPU of the server per event, × nchan"] == (0.875, True)
    assert judged["paced: p99, × nchan"] == (3.0, False)
    assert judged["paced: p99, × eventstream"] == (None, None)
    assert judged["lost, in every mode and run"] == (1, False)


def test_a_run_that_did_not_get_there_counts_as_slower_than_those_that_did() -> None:
    assert streams.median([{"seconds": 1.0}, {"seconds": None}, {"seconds": 3.0}]) == {"seconds": 3.0}
    assert streams.median([{"seconds": None}, {"seconds": None}, {"seconds": 3.0}]) == {"seconds": None}
    assert streams.median([True, False, False]) is False
