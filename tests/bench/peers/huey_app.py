"""huey with its SQLite storage, as its README sets it up: ``python -m huey.bin.huey_consumer tests.bench.peers.huey_app.huey``"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time

from huey import SqliteHuey

huey = SqliteHuey(filename=os.environ["BENCH_DATABASE"], store_none=True)


@huey.task()
def short() -> None:
    subprocess.run(["true"], check=True)


def main(count: int) -> None:
    """Queue ``count`` tasks and wait until each has its result; prints the seconds between."""
    before = huey.result_count()
    began = time.monotonic()
    for _ in range(count):
        short()
    while huey.result_count() - before < count:
        time.sleep(0.005)
    print("SECONDS", time.monotonic() - began)


if __name__ == "__main__":
    # Under the name that the consumer knows: a task of __main__ is one of another program.
    importlib.import_module("tests.bench.peers.huey_app").main(int(sys.argv[1]))
