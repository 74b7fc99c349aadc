"""``python -m tests.bench [streams|clients|tasks|logins|layers|order] ...``, or ``make bench ARGS="..."``; the method is in README.md."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import runpy
import sys
from pathlib import Path

from tests.bench import measure, streams, table
from tests.bench.load import Failed

RESULTS = Path(__file__).parent / "results" / "latest.json"

PARTS = {
    "streams": "the streams, beside nchan, django-eventstream and a plain Channels consumer",
    "table": "the table of the latest streams once more (--markdown: as it stands in README.md)",
    "clients": "a thousand clients that come back at once over two processes, with and without client records",
    "tasks": "a thousand short tasks beside django-q2 and huey, and one task that writes much, read by a hundred streams",
    "logins": "a login from its submission to the result on the stream and in Chromium",
    "layers": "the channel layers: what they lose and how late they are",
    "order": "the order of the log on PostgreSQL: the ways to keep it, and what they cost",
}

_EPILOG = """parts:
{parts}

examples:
  make bench                                                    everything (a quarter of an hour or two)
  make bench ARGS="streams --streams 1000 --runs 3"             the streams alone
  make bench ARGS="streams --streams 200 --runs 1 --only ours,nchan --modes paced,burst"
  make bench ARGS="clients --clients 200 --keys 10 --runs 1"
  make bench ARGS="tasks --runs 1"
  make bench ARGS="logins --logins 20"
  make bench ARGS="layers --help"                               what a part takes
"""


def main() -> None:
    part, words = (
        (sys.argv[1], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in PARTS else ("", sys.argv[1:])
    )
    if part == "streams":
        measure_streams(words)
    elif part == "table":
        print(table.render(json.loads(RESULTS.read_text()), markdown="--markdown" in words))
    elif part:
        run(part, words)
    else:
        shown = "\n".join(f"  {name:9} {what}" for name, what in PARTS.items())
        parser = argparse.ArgumentParser(
            prog="python -m tests.bench",
            usage="%(prog)s [PART [options of the part]]",
            description="Measure the streams and the queue. Without a part: all of them.",
            epilog=_EPILOG.format(parts=shown),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.parse_args(words)
        measure_streams([])
        for name in ("clients", "tasks", "logins", "layers", "order"):
            run(name, [])


def run(part: str, words: list[str]) -> None:
    """As a program of its own would: parts need Django set up in different ways."""
    streams.say(f"── {part} ──")
    sys.argv = [f"python -m tests.bench {part}", *words]
    runpy.run_module(f"tests.bench.{part}", run_name="__main__")


def measure_streams(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench streams",
        description=f"Measure {PARTS['streams']}.",
        epilog="Progress goes to standard error, the table to standard output, all figures to tests/bench/results/latest.json.",
    )
    streams.arguments(parser)
    parser.add_argument(
        "--markdown", action="store_true", help="print the table as Markdown, as it stands in README.md"
    )
    chosen = parser.parse_args(words)
    try:
        measured = streams.run(streams.options_of(chosen))
    except Failed as failed:
        raise SystemExit(f"bench: {failed}") from None
    result = {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": measure.machine(),
        "streams": measured,
        "targets": table.verdicts(measured),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(table.render(result, markdown=chosen.markdown))


if __name__ == "__main__":
    main()
