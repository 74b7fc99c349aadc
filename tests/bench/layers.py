"""Which Redis channel layer carries the wake-ups: ``python -m tests.bench.layers``. Prints a table and a line of JSON.

The use is ours: one group with one member per process, messages that say nothing, two receiving processes and a third that sends. For each layer
of channels-redis: how soon a wake-up arrives, what it costs, what a receiver costs that hears nothing, how many of 1,000 quick ones
are lost, and whether a receiver hears again by itself after its connection was cut, after Redis was restarted, and after it was silent.
The choice, with its reasons, stands in ``project/settings.py``.
"""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()

from tests.live import services

LAYERS = {
    "core": "channels_redis.core.RedisChannelLayer",
    "pubsub": "channels_redis.pubsub.RedisPubSubChannelLayer",
}
GROUP = "bench"
PACED = 300
BURST = 1000
IDLE_SECONDS = 5.0
#: How long a receiver may take to hear again after a fault.
RECOVERY_SECONDS = 15.0
#: How long Redis says nothing.
SILENT_SECONDS = 8.0


def layer_of(name: str, url: str) -> Any:
    module, _, kind = LAYERS[name].rpartition(".")
    return getattr(importlib.import_module(module), kind)(hosts=[url])


async def receive(name: str, url: str) -> None:
    """Hears wake-ups as a hub does, and writes ``<n> <monotonic ns>`` for each."""
    layer = layer_of(name, url)
    while True:
        try:
            channel = await layer.new_channel("hub")
            await layer.group_add(GROUP, channel)
            print("joined", flush=True)
            while True:
                message = await layer.receive(channel)
                print(message["n"], time.monotonic_ns(), flush=True)
        except Exception as error:
            print("error", type(error).__name__, flush=True)
            await asyncio.sleep(1)


class Receiver:
    """One receiving process; a task reads what it hears."""

    def __init__(self) -> None:
        self.heard: dict[int, int] = {}
        self.errors = 0
        self.joined = asyncio.Event()

    async def start(self, name: str, url: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bench.layers", "--receive", name, url,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.task = asyncio.create_task(self._read())
        await asyncio.wait_for(self.joined.wait(), 20)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            word, _, rest = line.decode().strip().partition(" ")
            if word == "joined":
                self.joined.set()
            elif word == "error":
                self.errors += 1
            else:
                self.heard[int(word)] = int(rest)

    def cpu_ns(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0])

    async def stop(self) -> None:
        self.process.kill()
        await self.process.wait()
        await self.task


class Run:
    def __init__(self, layer: Any, receivers: list[Receiver]) -> None:
        self.layer = layer
        self.receivers = receivers
        self.number = 0
        self.sent: dict[int, int] = {}
        self.longest_send = 0.0
        self.send_errors = 0

    async def send(self) -> int:
        self.number += 1
        self.sent[self.number] = started = time.monotonic_ns()
        try:
            await self.layer.group_send(GROUP, {"type": "events.wake", "n": self.number})
        except Exception:
            self.send_errors += 1
        self.longest_send = max(self.longest_send, (time.monotonic_ns() - started) / 1e9)
        return self.number

    async def cpu_of(self, work: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
        """``(CPU seconds of one receiver, CPU seconds of the sender)``."""
        before, own = sum(each.cpu_ns() for each in self.receivers), time.process_time()
        await work()
        spent = sum(each.cpu_ns() for each in self.receivers) - before
        return spent / 1e9 / len(self.receivers), time.process_time() - own

    async def hears_again(self, what: str) -> float | None:
        """Seconds until every receiver has heard a wake-up that was sent after now; None when one never does."""
        started, first = time.monotonic(), self.number + 1
        while time.monotonic() - started < RECOVERY_SECONDS:
            await self.send()
            await asyncio.sleep(0.1)
            if all(any(n >= first for n in each.heard) for each in self.receivers):
                last = max(min(at for n, at in each.heard.items() if n >= first) for each in self.receivers)
                return last / 1e9 - started
        print(f"  never heard again after: {what}", file=sys.stderr)
        return None


async def measure(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, services.redis(Path(directory)) as redis:
        layer = layer_of(name, redis.url)
        receivers = [Receiver() for _ in range(2)]
        for each in receivers:
            await each.start(name, redis.url)
        run = Run(layer, receivers)
        await run.hears_again("start")
        result: dict[str, Any] = {"layer": LAYERS[name]}

        idle, _ = await run.cpu_of(lambda: asyncio.sleep(IDLE_SECONDS))
        result["idle_cpu_percent"] = 100 * idle / IDLE_SECONDS

        async def paced() -> None:
            for _ in range(PACED):
                await run.send()
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)

        first = run.number + 1
        started = time.monotonic()
        receiving, sending = await run.cpu_of(paced)
        receiving -= idle / IDLE_SECONDS * (time.monotonic() - started)
        late = [(each.heard[n] - run.sent[n]) / 1e6 for each in receivers for n in each.heard if n >= first]
        result["latency_p50_ms"] = statistics.median(late)
        result["latency_p99_ms"] = statistics.quantiles(late, n=100)[98]
        result["receive_cpu_us"] = receiving / PACED * 1e6
        result["send_cpu_us"] = sending / PACED * 1e6

        first = run.number + 1
        for _ in range(BURST):
            await run.send()
        await asyncio.sleep(2)
        got = [sum(n >= first for n in each.heard) for each in receivers]
        result["lost_of_burst_percent"] = 100 * (1 - sum(got) / (2 * BURST))

        redis.cut()
        result["hears_again_after_cut_s"] = await run.hears_again("its connection was cut")
        redis.kill()
        await asyncio.sleep(1)
        redis.start()
        result["hears_again_after_restart_s"] = await run.hears_again("Redis was restarted")
        redis.pause()
        run.longest_send = 0.0
        end = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < end:
            await run.send()
            await asyncio.sleep(0.1)
        result["longest_send_while_silent_s"] = run.longest_send
        redis.resume()
        result["hears_again_after_silence_s"] = await run.hears_again("Redis was silent")
        result["receiver_errors"] = sum(each.errors for each in receivers)
        result["send_errors"] = run.send_errors
        for each in receivers:
            await each.stop()
        await layer.flush()
        return result


def main() -> None:
    results = [asyncio.run(measure(name)) for name in LAYERS]
    print(f"{'':32}" + "".join(f"{name:>12}" for name in LAYERS))
    for key in results[0]:
        if key != "layer":
            values = [result[key] for result in results]
            print(f"{key:32}" + "".join(f"{'never' if v is None else f'{v:.2f}':>12}" for v in values))
    print(json.dumps(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--receive", nargs=2, metavar=("LAYER", "URL"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.receive:
        asyncio.run(receive(*chosen.receive))
    else:
        main()
