"""The figures as a table, and what the issue asks of them: each target, the figure, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Medians = dict[str, dict[str, dict[str, Any]]]
CAP = "> 30"


def _get(figures: dict[str, Any] | None, *names: str) -> Any:
    value: Any = figures
    for name in names:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _number(value: Any, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _share(figures: dict[str, Any]) -> str:
    share = _get(figures, "share")
    return "–" if share is None else f"{100 * share:.4g} %"


def _seconds(figures: dict[str, Any]) -> str:
    if not figures:
        return "–"
    # Who did not deliver everything was not done when the last event came.
    return _number(figures.get("seconds"), 2) if figures.get("complete") else f"{CAP} or never"


_COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("idle", "idle KiB", lambda f: _number(_get(f, "kib_per_stream"), 1)),
    ("idle", "threads", lambda f: _number(_get(f, "threads_more"), 0)),
    ("paced", "paced µs", lambda f: _number(_get(f, "cpu_us"), 1)),
    ("paced", "all µs", lambda f: _number(_get(f, "all_cpu_us"), 1)),
    ("paced", "p50 ms", lambda f: _number(_get(f, "latency_ms", "p50"), 1)),
    ("paced", "p99 ms", lambda f: _number(_get(f, "latency_ms", "p99"), 1)),
    ("paced", "got", _share),
    ("burst", "burst µs", lambda f: _number(_get(f, "all_cpu_us"), 2)),
    ("burst", "got", _share),
    ("burst", "last s", lambda f: _number(_get(f, "seconds"), 2)),
    ("storm", "storm s", _seconds),
    ("storm", "got", _share),
    ("restart", "restart s", _seconds),
    ("slow", "slow: p99 ms", lambda f: _number(_get(f, "paced_latency_ms", "p99"), 1)),
    ("slow", "slow got", lambda f: _share(_get(f, "slow") or {})),
    ("slow", "KiB each", lambda f: _number(_get(f, "grown_kib_per_slow"), 0)),
)


def _ratio(ours: Any, theirs: Any) -> float | None:
    if not isinstance(ours, int | float) or not isinstance(theirs, int | float) or not theirs:
        return None
    return round(ours / theirs, 3)


def verdicts(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target of the issue for each of our deployments that was measured: ``met`` is None where something was not measured."""
    medians: Medians = measured["median"]
    found: list[dict[str, Any]] = []
    for name in (each for each in medians if each.startswith("ours")):
        ours = medians[name]

        def add(what: str, figure: Any, limit: float, unit: str = "", name: str = name) -> None:
            met = None if figure is None else bool(figure <= limit)
            found.append(
                {"server": name, "what": what, "figure": figure, "limit": limit, "unit": unit, "met": met}
            )

        def against(peer: str, mode: str, *path: str, ours: dict[str, Any] = ours) -> float | None:
            return _ratio(_get(ours, mode, *path), _get(medians.get(peer), mode, *path))

        for peer, cpu, late in (("eventstream", 0.2, 0.1), ("nchan", 1.2, 1.5)):
            add(f"paced: CPU of the server per event, × {peer}", against(peer, "paced", "cpu_us"), cpu)
            # Without Redis another process's commits are looked for, not told: their target is the one second below.
            if name != "ours-worker":
                add(f"paced: p99, × {peer}", against(peer, "paced", "latency_ms", "p99"), late)
        add("burst: CPU of all processes per event, × nchan", against("nchan", "burst", "all_cpu_us"), 0.5)
        add("idle: a stream", _get(ours, "idle", "kib_per_stream"), 25, "KiB")
        add("idle: threads more, for all streams", _get(ours, "idle", "threads_more"), 4)
        if name == "ours-redis":
            add("idle: database connections, for all streams", _get(ours, "idle", "database_connections"), 3)
        storm = _get(ours, "storm", "seconds") if _get(ours, "storm", "complete") else None
        add("storm: all caught up, × nchan", _ratio(storm, _get(medians.get("nchan"), "storm", "seconds")), 5)
        reads = _reads(_get(ours, "storm", "counters") or {})
        add("storm: reads of the log", reads, max(20, measured["streams"] // 20))
        if "scale" in ours:
            add(
                f"burst at {measured['many']} streams, × that at {measured['streams']}",
                _ratio(_get(ours, "scale", "all_cpu_us"), _get(ours, "burst", "all_cpu_us")),
                1.8,
            )
        if name == "ours-redis":
            add(
                "commit in another process → wire, p50",
                _get(ours, "paced", "from_commit_ms", "p50"),
                10,
                "ms",
            )
        if name == "ours-worker":
            add(
                "commit in another process → wire, p50",
                _get(ours, "paced", "from_commit_ms", "p50"),
                1000,
                "ms",
            )
            add(
                "commit in another process → wire, p99",
                _get(ours, "paced", "from_commit_ms", "p99"),
                1000,
                "ms",
            )
        for fault in ("lost", "duplicates", "misordered"):
            add(f"{fault}, in every mode and run", _sum(measured["each"][name], fault), 0)
    return found


def _reads(counters: dict[str, float]) -> float | None:
    known = [value for key, value in counters.items() if key.startswith("switchboard_log_reads_total")]
    return sum(known) if known else None


def _sum(runs: list[dict[str, dict[str, Any]]], fault: str) -> int | None:
    """Over all runs and modes. Duplicates and disorder stay with a client, so a later mode reports them again: 0 is what counts."""
    parts = [
        figures for run in runs for mode in run.values() for figures in (mode, mode.get("slow")) if figures
    ]
    known = [figures[fault] for figures in parts if fault in figures]
    # A framing that does not hold hides what came after it.
    broken = sum(len(figures.get("broken_framing", ())) for figures in parts)
    return sum(known) + broken if known else None


def render(result: dict[str, Any], *, markdown: bool = False) -> str:
    measured = result["streams"]
    medians: Medians = measured["median"]
    columns = [column for column in _COLUMNS if any(column[0] in figures for figures in medians.values())]
    head = ["", *(title for _, title, _ in columns), "twice", "disorder"]
    rows = [
        [
            measured["titles"][name],
            *(show(figures.get(mode) or {}) for mode, _, show in columns),
            # Over all runs and modes: these are faults, and a median would hide them.
            *(_number(_sum(measured["each"][name], fault), 0) for fault in ("duplicates", "misordered")),
        ]
        for name, figures in medians.items()
    ]
    machine = result["machine"]
    lines = [
        f"{measured['streams']} streams, median of {measured['runs']} run(s), {result['at'][:10]}, "
        f"{machine['processors']} × {machine['processor']}, Linux {machine['kernel']}, Python {machine['python']}; "
        f"load average before each run {min(measured['load_averages'], default=0)} to {max(measured['load_averages'], default=0)}; "
        f"{measured['seconds']} s in all",
        "",
        *_grid(head, rows, markdown),
        "",
    ]
    judged = [
        [
            target["server"],
            target["what"],
            _number(target["figure"], 2)
            + (f" {target['unit']}" if target["unit"] and target["figure"] is not None else ""),
            f"{target['limit']:g}" + (f" {target['unit']}" if target["unit"] else ""),
            {True: "met", False: "NOT MET", None: "not measured"}[target["met"]],
        ]
        for target in verdicts(measured)
    ]
    if judged:
        lines += _grid(["", "target", "figure", "at most", ""], judged, markdown, left=2)
    lines += ["", *(f"{name} is left out: {why}" for name, why in measured["left_out"].items())]
    busy = [
        figures["generator"]["busy"]
        for runs in measured["each"].values()
        for run in runs
        for figures in run.values()
        if "generator" in figures
    ]
    if busy:
        lines.append(
            f"The load generator was busy for {100 * min(busy):.0f} to {100 * max(busy):.0f} % of one processor."
        )
    return "\n".join(lines).rstrip()


def _grid(head: list[str], rows: list[list[str]], markdown: bool, left: int = 1) -> list[str]:
    """The first ``left`` columns begin at the left, the others end at the right."""
    if markdown:
        rule = ["---"] * left + ["---:"] * (len(head) - left)
        return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
    widths = [max(len(cells[number]) for cells in (head, *rows)) for number in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in (head, *rows)
    ]
