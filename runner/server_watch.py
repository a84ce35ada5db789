"""Watches a prompt run on a server: seconds per node, and samples of memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from .live_host import HostError, LiveHost

RAM_INTERVAL_S = 0.05
VRAM_INTERVAL_S = 0.25
GIB = 2**30


@dataclass
class Row:
    """One node: the seconds it took, and the largest samples meanwhile (None: no GPU)."""

    node: str
    seconds: float
    ram_peak_bytes: int
    vram_peak_bytes: int | None


@dataclass
class Watched:
    """A prompt that ran, with its samples.

    history: the server's own entry.
    rows: the nodes in the order in which they ran.
    ram_before_bytes, ram_after_bytes: resident memory of the server process.
    """

    history: dict[str, Any]
    rows: list[Row]
    ram_before_bytes: int
    ram_after_bytes: int

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    def table(self) -> str:
        """The rows as text, with what the figures are."""
        has_vram = any(row.vram_peak_bytes is not None for row in self.rows)
        lines = [f"{'node':<24}{'seconds':>8}{'RAM peak':>12}" + f"{'VRAM peak':>12}" * has_vram]
        for row in self.rows:
            line = f"{row.node:<24}{row.seconds:>8.1f}{_gib(row.ram_peak_bytes):>12}"
            lines.append(line + (f"{_gib(row.vram_peak_bytes or 0):>12}" if has_vram else ""))
        peak = max((row.ram_peak_bytes for row in self.rows), default=self.ram_after_bytes)
        lines += [
            f"{'all':<24}{self.seconds:>8.1f}{_gib(peak):>12}",
            "",
            f"RAM of the server process: {_gib(self.ram_before_bytes)} before, {_gib(peak)} peak, "
            f"{_gib(self.ram_after_bytes)} after.",
            f"These are samples of its resident memory, every {RAM_INTERVAL_S * 1000:.0f} ms, "
            "mapped files included: a shorter peak is missed.",
        ]
        if has_vram:
            lines.append(
                f"VRAM in use on the whole card, sampled every {VRAM_INTERVAL_S * 1000:.0f} ms: "
                "other programs count too, and so does memory that torch keeps in reserve."
            )
        return "\n".join(lines)


@dataclass
class _Samples:
    """Samples memory in a thread, as (time, bytes)."""

    server: LiveHost
    has_vram: bool
    ram: list[tuple[float, int]] = field(default_factory=list)
    vram: list[tuple[float, int]] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> _Samples:
        self._threads = [threading.Thread(target=self._sample_ram, daemon=True)]
        if self.has_vram:
            self._threads.append(threading.Thread(target=self._sample_vram, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _sample_ram(self) -> None:
        with contextlib.suppress(psutil.Error):  # the process is gone: there is nothing to sample
            process = psutil.Process(self.server.pid)
            while True:
                self.ram.append((time.monotonic(), process.memory_info().rss))
                if self._end.wait(RAM_INTERVAL_S):
                    return

    def _sample_vram(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(HostError):
                device = self.server.get_json("/system_stats")["devices"][0]
                used = device["vram_total"] - device["vram_free"]
                self.vram.append((time.monotonic(), used))
            self._end.wait(VRAM_INTERVAL_S)


def watch(
    server: LiveHost,
    prompt: dict[str, Any],
    *,
    has_vram: bool,
    say: Callable[[str], None],
) -> Watched:
    """Runs a prompt to its end and reports each node.

    Args:
        server: a server that answers.
        prompt: a graph in the API format.
        has_vram: sample the first device of the server too.
        say: gets one line for each node that ends and for each step of a sampler.

    Raises:
        HostError: the server refused the prompt, a node failed, or the server died.
    """
    with _Samples(server, has_vram) as samples:
        starts, prompt_id = asyncio.run(_follow(server, prompt, say))
        end = time.monotonic()
        history = server.wait(prompt_id, timeout_s=60)
    rows = []
    for (node, start), stop in zip(starts, [*(t for _, t in starts[1:]), end], strict=True):
        ram = _peak(samples.ram, start, stop)
        rows.append(Row(node, stop - start, ram or 0, _peak(samples.vram, start, stop)))
    return Watched(history, rows, samples.ram[0][1], samples.ram[-1][1])


async def _follow(
    server: LiveHost, prompt: dict[str, Any], say: Callable[[str], None]
) -> tuple[list[tuple[str, float]], str]:
    """Listens on the server's websocket; returns when each node began, and the prompt's id."""
    client_id = uuid.uuid4().hex
    starts: list[tuple[str, float]] = []
    address = f"{server.url}/ws?clientId={client_id}"
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as ws,
    ):
        prompt_id = await asyncio.to_thread(server.queue, prompt, client_id)
        while True:
            try:
                message = await ws.receive(timeout=5)
            except asyncio.TimeoutError:
                server.check_alive()
                continue
            if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                server.check_alive()
                raise HostError("the server closed the connection while the prompt ran")
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            data = event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "executing":
                now = time.monotonic()
                if starts:
                    node, start = starts[-1]
                    say(f"{node}: done in {now - start:.1f} s")
                if data["node"] is None:
                    return starts, prompt_id
                starts.append((prompt[data["node"]]["class_type"], now))
            elif event["type"] == "progress":
                say(f"{prompt[data['node']]['class_type']}: {data['value']} of {data['max']}")
            elif event["type"] in ("execution_error", "execution_interrupted"):
                return starts, prompt_id


def _peak(samples: list[tuple[float, int]], start: float, stop: float) -> int | None:
    """The largest sample of a span; the nearest one where the span is shorter than the interval."""
    if not samples:
        return None
    inside = [size for when, size in samples if start <= when <= stop]
    nearest = min(samples, key=lambda sample: abs(sample[0] - start))[1]
    return max(inside, default=nearest)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
